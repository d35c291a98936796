use proptest::prelude::*;

use super::*;

const CALICO: &str = r#"{
  "name": "k8s-pod-network", "cniVersion": "0.3.1", "disableCheck": true,
  "plugins": [
    { "type": "calico", "ipam": { "type": "calico-ipam" }, "secret": "x" },
    { "type": "portmap", "snat": true, "capabilities": { "portMappings": true } }
  ]
}"#;
const SINGLE: &str = r#"{ "cniVersion": "1.0.0", "name": "mynet", "type": "bridge", "bridge": "cni0" }"#;

struct Directory(tempfile::TempDir);

impl Directory {
    fn with(files: &[(&str, &str)]) -> Self {
        let directory = Self(tempfile::tempdir().unwrap());
        for (name, content) in files {
            directory.write(name, content);
        }
        directory
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.0.path().join(name), content).unwrap();
    }

    fn chain(&self) -> Chain {
        Chain::new(self.0.path(), Path::new("/run/agent.sock"), &["kube-system".to_owned()])
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.0.path().join(name)).unwrap()).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        names
    }
}

#[test]
fn the_primarys_plugins_come_first_and_unchanged() {
    let directory = Directory::with(&[("10-calico.conflist", CALICO)]);
    let synced = directory.chain().sync().unwrap();
    assert!(synced.changed && synced.ours.ends_with("02-culvert.conflist"));
    let ours = directory.json("02-culvert.conflist");
    let mut expected: Value = serde_json::from_str(CALICO).unwrap();
    expected["plugins"].as_array_mut().unwrap().push(json!({
        "type": "culvert-cni", "agentSocket": "/run/agent.sock", "excludeNamespaces": ["kube-system"],
        "primary": "10-calico.conflist",
    }));
    assert_eq!(ours, expected);
    assert_eq!(directory.json("10-calico.conflist"), serde_json::from_str::<Value>(CALICO).unwrap());
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(fs::metadata(&synced.ours).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!directory.chain().sync().unwrap().changed, "nothing to do");
}

#[test]
fn a_single_plugin_becomes_a_list() {
    for name in ["10-bridge.conf", "10-bridge.json"] {
        let directory = Directory::with(&[(name, SINGLE)]);
        directory.chain().sync().unwrap();
        let ours = directory.json("02-culvert.conflist");
        assert_eq!((&ours["name"], &ours["cniVersion"]), (&json!("mynet"), &json!("1.0.0")));
        assert_eq!(ours["plugins"][0]["bridge"], "cni0");
        assert_eq!(ours["plugins"][1]["type"], "culvert-cni");
    }
}

#[test]
fn it_follows_the_primary_and_comes_back() {
    let directory = Directory::with(&[]);
    let chain = directory.chain();
    assert!(matches!(chain.sync(), Err(ChainError::NoPrimary(_))));
    directory.write("10-calico.conflist", CALICO);
    chain.sync().unwrap();
    directory.write("10-calico.conflist", &CALICO.replace("true", "false"));
    assert!(chain.sync().unwrap().changed);
    assert_eq!(directory.json("02-culvert.conflist")["disableCheck"], false);
    for damage in ["", "{", "{}"] {
        directory.write("02-culvert.conflist", damage);
        assert!(chain.sync().unwrap().changed, "{damage:?}");
    }
    // What some primaries do to the files of others.
    assert_eq!(chain.sync().unwrap().warnings, [""; 0]);
    fs::rename(
        directory.0.path().join("02-culvert.conflist"),
        directory.0.path().join("02-culvert.conflist.cilium_bak"),
    )
    .unwrap();
    let synced = chain.sync().unwrap();
    assert!(synced.changed && synced.warnings[0].contains("cni.exclusive"), "{synced:?}");
    fs::remove_file(directory.0.path().join("10-calico.conflist")).unwrap();
    assert!(matches!(chain.sync(), Err(ChainError::NoPrimary(_))));
    assert!(directory.names().contains(&"02-culvert.conflist".to_owned()), "the last good one stays");
}

#[test]
fn of_several_primaries_the_first_by_name_counts() {
    let directory = Directory::with(&[("10-calico.conflist", CALICO), ("05-bridge.conf", SINGLE)]);
    directory.write("01-notes.txt", "no configuration");
    assert!(directory.chain().sync().unwrap().primary.ends_with("05-bridge.conf"));
    assert_eq!(directory.json("02-culvert.conflist")["name"], "mynet");
}

#[test]
fn our_file_sorts_before_the_primarys() {
    for (primary, ours) in [
        ("10-a.conflist", "02-culvert.conflist"),
        ("01-a.conflist", "00-culvert.conflist"),
        ("00-a.conflist", "00-00-culvert.conflist"),
        ("00-00-a.conflist", "0-culvert.conflist"),
        ("calico.conflist", "02-culvert.conflist"),
    ] {
        // Left by an earlier name of the primary.
        let directory = Directory::with(&[(primary, CALICO), ("03-culvert.conflist", "{}")]);
        let synced = directory.chain().sync().unwrap();
        assert!(synced.ours.ends_with(ours), "{primary}: {synced:?}");
        assert_eq!(
            directory.names(),
            {
                let mut n = [ours, primary];
                n.sort_unstable();
                n
            },
            "{primary}"
        );
        assert!(*ours < *primary);
    }
    let directory = Directory::with(&[("!a.conflist", CALICO)]);
    let error = directory.chain().sync().unwrap_err();
    assert!(matches!(error, ChainError::SortsFirst(_)) && error.to_string().contains("rename"), "{error}");
}

#[test]
fn a_malformed_primary_is_said_and_the_last_good_file_stays() {
    for (content, said) in [
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        (r#"{"cniVersion":"1.0.0","name":"a"}"#, "no list of plugins"),
        (r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#, "no name"),
        (r#"{"cniVersion":"1.0.0","name":"a","plugins":[{}]}"#, "no type"),
        (r#"{"cniVersion":"1.0.0","name":"a","plugins":[]}"#, "no plugins but ours"),
        (r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"culvert-cni"}]}"#, "no plugins but ours"),
        (r#"{"cniVersion":"0.2.0","name":"a","plugins":[{"type":"a"}]}"#, "speaks 0.3.1"),
        (r#"{"name":"a","plugins":[{"type":"a"}]}"#, "speaks 0.3.1"),
        (r#"{"cniVersion":1,"name":"a","plugins":[{"type":"a"}]}"#, "no string"),
    ] {
        let directory = Directory::with(&[("10-calico.conflist", CALICO)]);
        directory.chain().sync().unwrap();
        let good = directory.json("02-culvert.conflist");
        directory.write("10-calico.conflist", content);
        let error = directory.chain().sync().unwrap_err().to_string();
        assert!(
            error.contains(said) && error.contains("last good") && error.contains("10-calico"),
            "{error}"
        );
        assert_eq!(directory.json("02-culvert.conflist"), good);
        let fresh = Directory::with(&[("10-calico.conflist", content)]);
        assert!(fresh.chain().sync().unwrap_err().to_string().contains("without the mesh's plugin"));
    }
}

#[test]
fn behind_a_broken_primary_the_next_one_is_taken_and_the_broken_one_named() {
    let directory = Directory::with(&[("05-broken.conf", "{"), ("10-calico.conflist", CALICO)]);
    let chain = directory.chain();
    let synced = chain.sync().unwrap();
    assert!(synced.primary.ends_with("10-calico.conflist") && synced.changed);
    let ours = || directory.json("02-culvert.conflist")["name"].to_string().replace('"', "");
    assert_eq!(ours(), "k8s-pod-network");
    assert!(synced.warnings[0].contains("05-broken.conf: it is not JSON"), "{synced:?}");
    // It is followed, and named again and again, as long as the first one is broken.
    directory.write("10-calico.conflist", &CALICO.replace("k8s-pod-network", "other"));
    assert_eq!(chain.sync().unwrap().warnings, synced.warnings);
    assert_eq!(ours(), "other");
    directory.write("05-broken.conf", SINGLE);
    assert_eq!(chain.sync().unwrap().warnings, [""; 0]);
    assert_eq!(ours(), "mynet");
    // The pods that run are in the network of the first one now: that of the other one is no substitute.
    directory.write("05-broken.conf", "{");
    let error = chain.sync().unwrap_err().to_string();
    assert!(error.contains("05-broken.conf") && error.contains("last good"), "{error}");
    assert_eq!(ours(), "mynet");
    // Ours is damaged: no good one is left of the first.
    directory.write("02-culvert.conflist", "{");
    assert!(chain.sync().unwrap().primary.ends_with("10-calico.conflist"));
    directory.write("10-calico.conflist", "[]");
    fs::remove_file(directory.0.path().join("02-culvert.conflist")).unwrap();
    let error = chain.sync().unwrap_err().to_string();
    assert!(error.contains("05-broken") && error.contains("10-calico") && error.contains("start without"));
}

/// What Multus writes: a plugin that calls those of the primary that it has found, and others that pods ask for.
fn multus(delegates: &Value) -> String {
    json!({ "cniVersion": "0.3.1", "name": "multus-cni-network", "type": "multus", "delegates": delegates })
        .to_string()
}

#[test]
fn ours_and_a_primary_that_takes_it_up_do_not_take_up_each_other_for_ever() {
    // The mesh was there first: what Multus takes for the primary is ours.
    let directory = Directory::with(&[("10-calico.conflist", CALICO)]);
    let chain = directory.chain();
    chain.sync().unwrap();
    let ours = directory.json("02-culvert.conflist");
    let by_name = json!({ "cniVersion": "0.3.1", "name": "x", "type": "multus",
                          "clusterNetwork": "/host/etc/cni/net.d/02-culvert.conflist" });
    let list = json!({ "cniVersion": "0.3.1", "name": "x",
                       "plugins": [{ "type": "multus", "delegates": [ours] }] });
    for takes_it_up in [multus(&json!([ours])), by_name.to_string(), list.to_string()] {
        directory.write("00-multus.conf", &takes_it_up);
        let synced = chain.sync().unwrap();
        assert_eq!((synced.changed, synced.warnings), (false, Vec::new()), "{takes_it_up}");
        assert!(synced.primary.ends_with("10-calico.conflist"), "{takes_it_up}");
        assert_eq!(directory.names(), ["00-multus.conf", "02-culvert.conflist", "10-calico.conflist"]);
    }
    // Ours follows the primary behind it, by the name that Multus knows.
    directory.write("10-calico.conflist", &CALICO.replace("true", "false"));
    assert!(chain.sync().unwrap().changed);
    assert_eq!(directory.json("02-culvert.conflist")["disableCheck"], false);
    // It has let go of ours, and would lead past it.
    directory.write("00-multus.conf", &multus(&json!([{ "type": "calico" }])));
    assert!(chain.sync().unwrap().primary.ends_with("00-multus.conf"));
    let names: Vec<String> = directory.names();
    assert!(names[0].ends_with("-culvert.conflist") && names.len() == 3, "{names:?}");
}

#[test]
fn removal_leaves_those_that_call_ours_what_they_lead_to() {
    let directory = Directory::with(&[("10-calico.conflist", CALICO)]);
    let chain = directory.chain();
    chain.sync().unwrap();
    directory.write("00-multus.conf", &multus(&json!([directory.json("02-culvert.conflist")])));
    assert!(chain.is_called().unwrap());
    chain.remove().unwrap();
    let mut left: Value = serde_json::from_str(CALICO).unwrap();
    assert_eq!(directory.json("02-culvert.conflist"), left);
    // As Multus does when what it leads to has changed.
    directory.write("00-multus.conf", &multus(&json!([left])));
    assert!(!chain.is_called().unwrap());
    // Installed anew, it is ours again.
    left["plugins"].as_array_mut().unwrap().truncate(1);
    directory.write("10-calico.conflist", &left.to_string());
    assert!(chain.sync().unwrap().changed);
    directory.write("00-multus.conf", &multus(&json!([{ "type": "calico" }])));
    chain.remove().unwrap();
    assert_eq!(directory.names(), ["00-multus.conf", "10-calico.conflist"]);
}

#[test]
fn before_multus_ours_has_a_name_that_it_does_not_take_for_a_primary() {
    for name in ["00-multus.conf", "00-multus.conflist"] {
        let list = json!({ "cniVersion": "1.0.0", "name": "x",
                           "plugins": [{ "type": "multus", "delegates": [{ "type": "calico" }] }] });
        let content = if name.ends_with("list") { list.to_string() } else { multus(&json!([])) };
        let directory = Directory::with(&[("10-calico.conflist", CALICO), (name, &content)]);
        let synced = directory.chain().sync().unwrap();
        assert!(synced.primary.ends_with(name));
        assert_eq!(directory.names(), ["00-multus-culvert.conflist", name, "10-calico.conflist"]);
        let plugins = &directory.json("00-multus-culvert.conflist")["plugins"];
        assert_eq!((&plugins[0]["type"], &plugins[1]["type"]), (&json!("multus"), &json!(PLUGIN)));
    }
}

#[test]
fn a_link_that_leads_out_of_the_directory_counts_as_the_runtime_counts_it() {
    let link = |directory: &Directory, name: &str, to: &Path| {
        std::os::unix::fs::symlink(to, directory.0.path().join(name)).unwrap();
    };
    // One that can be followed is a file like any other.
    let directory = Directory::with(&[]);
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("calico"), CALICO).unwrap();
    link(&directory, "10-calico.conflist", &elsewhere.path().join("calico"));
    assert!(directory.chain().sync().unwrap().primary.ends_with("10-calico.conflist"));
    // One that can't be from here may be the runtime's first: ours has to sort before it.
    let directory = Directory::with(&[("10-calico.conflist", CALICO)]);
    link(&directory, "01-a.conflist", Path::new("/nowhere/a"));
    link(&directory, "00-directory.conf", elsewhere.path());
    let synced = directory.chain().sync().unwrap();
    assert!(synced.primary.ends_with("10-calico.conflist") && synced.ours.ends_with("00-culvert.conflist"));
    assert!(synced.warnings[0].contains("01-a.conflist: it is a link"), "{synced:?}");
    let directory = Directory::with(&[]);
    link(&directory, "01-a.conflist", Path::new("/nowhere/a"));
    assert!(directory.chain().sync().unwrap_err().to_string().contains("it is a link"));
}

#[test]
fn versions_are_those_that_both_speak() {
    for (own, listed, expected, several) in [
        ("0.3.1", json!(null), "0.3.1", json!(null)),
        ("1.1.0", json!(null), "1.1.0", json!(null)),
        ("0.4.0", json!(["0.4.0", "1.0.0", "1.2.0"]), "0.4.0", json!(["0.4.0", "1.0.0"])),
        ("1.2.0", json!(["1.1.0", "1.2.0"]), "1.1.0", json!(["1.1.0"])),
    ] {
        let primary =
            json!({ "cniVersion": own, "cniVersions": listed, "name": "a", "plugins": [{ "type": "a" }] });
        let composed =
            compose(primary.to_string().as_bytes(), true, &json!({ "type": PLUGIN }), "x").unwrap();
        let composed: Value = serde_json::from_slice(&composed).unwrap();
        assert_eq!(composed["cniVersion"], expected);
        assert_eq!(composed["cniVersions"], several);
    }
}

#[test]
fn a_copy_of_our_plugin_in_the_primary_is_not_doubled() {
    let copied =
        CALICO.replace(r#"{ "type": "portmap""#, r#"{ "type": "culvert-cni" }, { "type": "portmap""#);
    let directory = Directory::with(&[("10-calico.conflist", &copied)]);
    directory.chain().sync().unwrap();
    let types: Vec<_> = directory.json("02-culvert.conflist")["plugins"]
        .as_array()
        .unwrap()
        .iter()
        .map(|plugin| plugin["type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(types, ["calico", "portmap", "culvert-cni"]);
}

#[test]
fn removal_leaves_the_primary_alone() {
    let directory = Directory::with(&[("10-calico.conflist", CALICO)]);
    directory.chain().sync().unwrap();
    directory.chain().remove().unwrap();
    assert_eq!(directory.names(), ["10-calico.conflist"]);
    directory.chain().remove().unwrap();
}

/// A good configuration with some bytes changed: some are still JSON.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let changes = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4);
    (proptest::sample::select(vec![CALICO, SINGLE]), changes).prop_map(|(text, changes)| {
        let mut bytes = text.as_bytes().to_vec();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    })
}

proptest! {
    #[test]
    fn what_is_composed_ends_with_our_plugin_once_and_stays_as_it_is(content in damaged(), is_list: bool) {
        let plugin = json!({ "type": PLUGIN, "agentSocket": "/x" });
        if let Ok(composed) = compose(&content, is_list, &plugin, "10-a.conflist") {
            let list: Value = serde_json::from_slice(&composed).unwrap();
            let plugins = list["plugins"].as_array().unwrap();
            prop_assert!(plugins.len() > 1 && VERSIONS.contains(&list["cniVersion"].as_str().unwrap()));
            prop_assert_eq!(plugins.iter().filter(|p| p["type"] == PLUGIN).count(), 1);
            prop_assert_eq!(plugins.last().unwrap()["agentSocket"].as_str(), Some("/x"));
            prop_assert_eq!(primary_of(&composed), Some("10-a.conflist".to_owned()));
            prop_assert_eq!(compose(&composed, true, &plugin, "10-a.conflist"), Ok(composed));
        }
    }
}
