//! The chart: its documents say what its values are, and what it renders keeps its promises.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    dead_code
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

#[path = "../src/yaml.rs"]
mod yaml;

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/culvert")
}

fn read(path: &str) -> String {
    fs::read_to_string(chart().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn values() -> Value {
    yaml::read(&read("values.yaml")).unwrap().remove(0)
}

/// A value that has a comment: its path, and the comment.
fn described() -> Vec<(String, String)> {
    let (mut found, mut comment, mut path) = (Vec::new(), Vec::new(), Vec::<(usize, String)>::new());
    for line in read("values.yaml").lines() {
        let (indent, text) = (line.len() - line.trim_start().len(), line.trim());
        if let Some(words) = text.strip_prefix("# ") {
            comment.push(words.to_owned());
            continue;
        }
        if let Some((key, _)) = text.split_once(':').filter(|(key, _)| !key.starts_with('-')) {
            path.retain(|(depth, _)| *depth < indent);
            path.push((indent, key.to_owned()));
            if !comment.is_empty() {
                let names: Vec<_> = path.iter().map(|(_, name)| name.as_str()).collect();
                found.push((names.join("."), comment.join(" ")));
            }
        }
        comment.clear();
    }
    found
}

fn at<'v>(value: &'v Value, path: &str) -> &'v Value {
    path.split('.').fold(value, |value, key| &value[key])
}

/// `UPDATE_DOCS=1 cargo test -p cli --test chart` writes the file anew.
#[test]
fn the_readme_is_made_from_the_values() {
    let (all, values) = (described(), values());
    let mut text = include_str!("chart/README.head.md").to_owned();
    for (path, comment) in &all {
        let has_below = all.iter().any(|(p, _)| p.starts_with(&format!("{path}.")));
        let default = if has_below { String::new() } else { format!("`{}`", at(&values, path)) };
        text.push_str(&format!("| `{path}` | {default} | {} |\n", comment.replace('|', "\\|")));
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(chart().join("README.md"), &text).unwrap();
    }
    assert!(read("README.md") == text, "the chart's README.md is not in step: UPDATE_DOCS=1 writes it anew");
}

fn schema_paths(schema: &Value, prefix: &str, found: &mut Vec<String>) {
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        schema_paths(below, &path, found);
        found.push(path);
    }
}

#[test]
fn the_schema_knows_exactly_the_values() {
    let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
    let mut known = Vec::new();
    schema_paths(&schema, "", &mut known);
    let described: Vec<String> = described().into_iter().map(|(path, _)| path).collect();
    for path in &described {
        assert!(known.contains(path), "values.schema.json does not know {path}");
    }
    for path in known.iter().filter(|p| *p != "global") {
        assert!(described.contains(path), "values.yaml does not describe {path}");
        assert!(!at(&values(), path).is_null(), "{path} has no default");
    }
    assert_eq!(schema["additionalProperties"], false);
}

#[test]
fn the_chart_is_of_the_programs_version() {
    let chart = yaml::read(&read("Chart.yaml")).unwrap().remove(0);
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}

/// Helm, where there is one: of the tests' cluster, or of this machine.
fn helm() -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kube/bin/helm");
    let candidates = [std::env::var_os("HELM").map(PathBuf::from), Some(built), Some("helm".into())];
    let works = |p: &PathBuf| Command::new(p).arg("version").output().is_ok_and(|o| o.status.success());
    candidates.into_iter().flatten().find(works)
}

fn template(helm: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(helm);
    command.args(["template", "mesh", "--namespace", "some-system", "--kube-version", "1.33.0"]);
    command.arg(chart()).args(more).output().unwrap()
}

fn rendered(helm: &Path, more: &[&str]) -> Vec<Value> {
    let output = template(helm, more);
    assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
    yaml::read(&String::from_utf8(output.stdout).unwrap()).unwrap()
}

fn id(object: &Value) -> String {
    format!("{}/{}", object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap())
}

const EVERYTHING: &[&str] = &[
    "--set=networkPolicy.enabled=true,resourceQuota.enabled=true,controlPlane.autoscaling.enabled=true",
    "--set=controlPlane.env.A=b,ztunnel.env.C=1,node.extraArgs={--x},image.pullSecrets={s}",
];

#[test]
fn what_is_rendered_keeps_its_promises() {
    let Some(helm) = helm() else {
        eprintln!("skipped: there is no helm (the tests' cluster builds one in target/kube/bin)");
        return;
    };
    let objects = rendered(&helm, EVERYTHING);
    for kind in ["Deployment", "DaemonSet", "HorizontalPodAutoscaler", "NetworkPolicy", "ResourceQuota"] {
        assert!(objects.iter().any(|o| o["kind"] == kind), "no {kind}");
    }
    for object in &objects {
        let cluster_wide = [
            "ClusterRole",
            "ClusterRoleBinding",
            "ValidatingWebhookConfiguration",
            "MutatingWebhookConfiguration",
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
        ];
        let wanted = if cluster_wide.contains(&object["kind"].as_str().unwrap()) {
            Value::Null
        } else {
            "some-system".into()
        };
        // Nodes' Leases are where they are.
        let is_right = object["kind"].as_str().unwrap().starts_with("Role");
        if !is_right || object["metadata"]["namespace"] != "kube-node-lease" {
            assert_eq!(object["metadata"]["namespace"], wanted, "{}", id(object));
        }
        pod_is_confined(object);
        rights_are_named(object);
    }
    let text = serde_json::to_string(&objects).unwrap();
    assert!(!text.contains("culvert-system") && !text.contains("<no value>"), "{text}");
}

fn pod_is_confined(object: &Value) {
    let spec = &object["spec"]["template"]["spec"];
    if spec.is_null() {
        return;
    }
    let id = id(object);
    assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{id}");
    assert!(spec["priorityClassName"].is_string() && spec["serviceAccountName"].is_string(), "{id}");
    for container in spec["containers"].as_array().unwrap() {
        let security = &container["securityContext"];
        assert_eq!(security["readOnlyRootFilesystem"], true, "{id}");
        assert_eq!(security["allowPrivilegeEscalation"], false, "{id}");
        assert_ne!(security["privileged"], true, "{id}");
        assert_eq!(security["capabilities"]["drop"][0], "ALL", "{id}");
        assert!(container["resources"]["requests"]["memory"].is_string(), "{id}");
        assert!(container["readinessProbe"].is_object(), "{id}");
        assert!(container["image"].as_str().unwrap().ends_with(env!("CARGO_PKG_VERSION")), "{id}");
    }
    let root = spec["securityContext"]["runAsNonRoot"] == true;
    assert_eq!(root, object["kind"] == "Deployment", "{id}: only what enters namespaces is root");
}

fn rights_are_named(object: &Value) {
    if object["kind"] == "ValidatingAdmissionPolicy" {
        return;
    }
    for rule in object["rules"].as_array().into_iter().flatten() {
        let text = rule.to_string();
        assert!(!text.contains('*'), "{}: {text}", id(object));
    }
}

#[test]
fn node_proxies_of_another_namespace_get_what_they_need_there() {
    let Some(helm) = helm() else { return };
    let accounts = "--set=controlPlane.trustedNodeAccounts={some-system/ztunnel,proxies/ztunnel}";
    let objects = rendered(&helm, &[accounts]);
    let there: Vec<_> = objects.iter().filter(|o| o["metadata"]["namespace"] == "proxies").collect();
    assert_eq!(
        there.iter().map(|o| o["kind"].as_str().unwrap()).collect::<Vec<_>>(),
        ["Role", "RoleBinding"]
    );
    assert!(there[0]["rules"].to_string().contains("pods"), "{}", there[0]);
    assert_eq!(there[1]["subjects"][0]["namespace"], "some-system");
    let text = serde_json::to_string(&objects).unwrap();
    assert!(text.contains("--trusted-node-accounts=some-system/ztunnel,proxies/ztunnel"), "{text}");
}

#[test]
fn ztunnel_reads_the_root_of_who_it_asks() {
    let Some(helm) = helm() else { return };
    for (set, map) in [
        ("ztunnel.enabled=true", "culvert-ca-root-cert"),
        ("ztunnel.caAddress=https://istiod:15012", "istio-ca-root-cert"),
        ("ztunnel.xdsAddress=https://istiod:15012", "istio-ca-root-cert"),
        ("ztunnel.caAddress=https://ca:15012,ztunnel.rootConfigMap=other", "other"),
    ] {
        let objects = rendered(&helm, &[&format!("--set={set}")]);
        let ztunnel = objects.iter().find(|o| id(o) == "DaemonSet/ztunnel").unwrap();
        let volumes = ztunnel["spec"]["template"]["spec"]["volumes"].as_array().unwrap();
        let root = volumes.iter().find(|v| v["name"] == "root").unwrap();
        assert_eq!(root["configMap"]["name"], map, "{set}");
    }
}

/// The pods' specifications and annotations of agent and ztunnel, as a cluster of this version gets them.
fn on_nodes(helm: &Path, version: &str, set: &str) -> [Value; 2] {
    let objects = rendered(helm, &["--kube-version", version, &format!("--set={set}")]);
    ["DaemonSet/culvert-node", "DaemonSet/ztunnel"]
        .map(|name| objects.iter().find(|o| id(o) == name).unwrap()["spec"]["template"].clone())
}

#[test]
fn what_nodes_confine_containers_with_lets_agent_and_ztunnel_do_their_work() {
    let Some(helm) = helm() else { return };
    let old = "container.apparmor.security.beta.kubernetes.io/culvert-node";
    let armor = |template: &Value| {
        let field = &template["spec"]["securityContext"]["appArmorProfile"]["type"];
        (
            field.as_str().map(str::to_owned),
            template["metadata"]["annotations"][old].as_str().map(str::to_owned),
        )
    };
    let text = |text: &str| Some(text.to_owned());
    for (version, profile, expected) in [
        ("1.29.5", "Unconfined", (None, text("unconfined"))),
        ("1.29.5-gke.1", "RuntimeDefault", (None, text("runtime/default"))),
        ("1.30.0", "Unconfined", (text("Unconfined"), None)),
        ("1.33.1-eks-1", "RuntimeDefault", (text("RuntimeDefault"), None)),
    ] {
        let [agent, _] = on_nodes(&helm, version, &format!("node.appArmorProfile={profile}"));
        assert_eq!(armor(&agent), expected, "{version}");
    }
    let types = |set: &str| {
        on_nodes(&helm, "1.33.0", set)
            .map(|template| template["spec"]["securityContext"]["seLinuxOptions"]["type"].clone())
    };
    assert_eq!(types("node.enabled=true"), ["spc_t", "spc_t"]);
    assert_eq!(types("node.seLinuxType=container_t"), ["container_t", "container_t"]);
    assert_eq!(types("node.seLinuxType="), [Value::Null, Value::Null]);
}

#[test]
fn waypoints_are_pulled_with_the_same_secrets() {
    let Some(helm) = helm() else { return };
    let overrides = |sets: &[&str]| -> Value {
        let objects = rendered(&helm, sets);
        let deployment = objects.iter().find(|o| id(o) == "Deployment/culvertd").unwrap();
        let env = deployment["spec"]["template"]["spec"]["containers"][0]["env"].as_array().unwrap();
        let found = env.iter().find(|variable| variable["name"] == "WAYPOINT_OVERRIDES").unwrap();
        serde_json::from_str(found["value"].as_str().unwrap()).unwrap()
    };
    assert_eq!(overrides(&[]), serde_json::json!({}));
    let secrets = |of: &Value| of["deployment"]["spec"]["template"]["spec"]["imagePullSecrets"].clone();
    let both = overrides(&["--set=image.pullSecrets={a,b},waypoint.overrides.deployment.spec.replicas=2"]);
    assert_eq!(secrets(&both), serde_json::json!([{"name": "a"}, {"name": "b"}]));
    assert_eq!(both["deployment"]["spec"]["replicas"], 2);
    let own = "--set=waypoint.overrides.deployment.spec.template.spec.imagePullSecrets[0].name=c";
    let own = overrides(&["--set=image.pullSecrets={a}", own]);
    assert_eq!(secrets(&own), serde_json::json!([{"name": "c"}]));
}

#[test]
fn the_bpf_file_system_is_mounted_unless_nodes_have_none() {
    let Some(helm) = helm() else { return };
    for (set, agent, ztunnel) in [
        ("node.capture=auto", true, true),
        ("node.capture=nftables", true, false),
        ("node.bpfDir=", false, false),
        ("node.capture=nftables,node.bpfDir=", false, false),
    ] {
        let objects = rendered(&helm, &[&format!("--set={set}")]);
        let is_mounted = |name: &str| {
            let spec = &objects.iter().find(|o| id(o) == name).unwrap()["spec"]["template"]["spec"];
            let has = |list: &Value| list.as_array().unwrap().iter().any(|entry| entry["name"] == "bpf");
            let (volume, mount) = (has(&spec["volumes"]), has(&spec["containers"][0]["volumeMounts"]));
            assert_eq!(volume, mount, "{set}: {name}");
            volume
        };
        assert_eq!(is_mounted("DaemonSet/culvert-node"), agent, "{set}");
        assert_eq!(is_mounted("DaemonSet/ztunnel"), ztunnel, "{set}");
    }
}

#[test]
fn verdicts_are_asked_of_both_or_none_and_take_no_further_rights() {
    let Some(helm) = helm() else { return };
    let seen = |set: &str| {
        let objects = rendered(&helm, &[&format!("--set={set}")]);
        ["DaemonSet/culvert-node", "DaemonSet/ztunnel"].map(|name| {
            let spec = &objects.iter().find(|o| id(o) == name).unwrap()["spec"]["template"]["spec"];
            let container = &spec["containers"][0];
            let arguments = container["args"].as_array().unwrap();
            (
                arguments.iter().any(|a| a == "--kernel-verdicts"),
                container["securityContext"].clone(),
                spec["volumes"].clone(),
            )
        })
    };
    let (without, with) = (seen("node.capture=ebpf"), seen("node.capture=ebpf,node.kernelVerdicts=true"));
    for (without, with) in without.into_iter().zip(with) {
        assert!(!without.0 && with.0);
        assert_eq!((without.1, without.2), (with.1, with.2));
    }
}

#[test]
fn a_second_revision_has_names_of_its_own() {
    let Some(helm) = helm() else { return };
    let names = |more: &[&str]| rendered(&helm, more).iter().map(id).collect::<Vec<_>>();
    let first = names(&[]);
    let second = names(&["--set=revision=next,node.enabled=false,ztunnel.enabled=false"]);
    assert!(second.len() > 5, "{second:?}");
    let both: Vec<_> = second.iter().filter(|name| first.contains(name)).collect();
    assert!(both.is_empty(), "{both:?}");
}

#[test]
fn a_value_that_is_not_known_is_refused() {
    let Some(helm) = helm() else { return };
    for wrong in [
        "nosuch=1",
        "ztunnel.nosuch=1",
        "image.pullPolicy=Sometimes",
        "controlPlane.replicas=0",
        "log.format=xml",
        "ztunnel.xdsAddress=http://plain:15010",
        "meshConfig.trustDomain=a b",
        "clusterDomain=Cluster_local",
        "controlPlane=null",
        "node.capture=ebpf,node.bpfDir=",
        "node.kernelVerdicts=true",
        "node.kernelVerdicts=true,node.capture=nftables",
        "node.kernelVerdicts=true,node.enabled=false",
    ] {
        let output = template(&helm, &["--set", wrong]);
        assert!(!output.status.success(), "{wrong} was taken");
    }
}
