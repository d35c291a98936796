//! The plugin's binary and the agent, called by libcni (its own command, cnitool) behind a real primary plugin.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use harness::netns::{Host, root_or_skip};
use net::Netns;
use node_agent::chain::Chain;
use node_agent::metrics::Metrics;
use node_agent::plugin;
use process::metrics::Registry;
use process::readiness::Readiness;
use serde_json::{Value, json};

use super::lab::{Agent, FakeZtunnel, World};

/// Where a program of the workspace, or one that is built here, is.
fn target() -> PathBuf {
    // target/debug/deps/node-HASH
    std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_owned()
}

fn built(what: &mut Command) -> bool {
    what.output().is_ok_and(|output| output.status.success())
}

/// Whether a program is newer than its sources: a test run of the whole workspace has built it.
fn is_newer(program: &Path, sources: &Path) -> bool {
    let modified = |path: &Path| path.metadata().and_then(|there| there.modified()).ok();
    let newest =
        std::fs::read_dir(sources).unwrap().map(|entry| modified(&entry.unwrap().path())).max().flatten();
    modified(program).is_some_and(|built| newest.is_some_and(|changed| built > changed))
}

/// The plugin.
pub fn plugin_binary() -> Option<PathBuf> {
    let plugin = target().join("culvert-cni");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let is_there = is_newer(&plugin, &workspace.join("cni-plugin/plugin/src"))
        || built(Command::new(env!("CARGO")).args(["build", "-p", "cni-plugin"]).current_dir(workspace));
    is_there.then_some(plugin)
}

/// The directory with the plugin, and cnitool; `None` where there is no Go, no way to its modules, or no primary plugin.
fn programs() -> Option<&'static (PathBuf, PathBuf)> {
    static PROGRAMS: OnceLock<Option<(PathBuf, PathBuf)>> = OnceLock::new();
    let find = || {
        let plugin = plugin_binary()?;
        let tool = target().join("cnitool");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cnitool");
        let go = |program: &str, package: &str| {
            let mut go = Command::new("go");
            built(go.current_dir(&sources).args(["build", "-o"]).arg(target().join(program)).arg(package))
        };
        let all = plugin.exists()
            && Path::new("/usr/lib/cni/bridge").exists()
            && go("cnitool", "github.com/containernetworking/cni/cnitool")
            && go("cni-gc", ".");
        all.then(|| (target(), tool))
    };
    PROGRAMS.get_or_init(find).as_ref()
}

/// libcni on the node, with directories of its own.
struct Libcni<'w> {
    world: &'w World,
    pod: &'static str,
    netns: PathBuf,
}

impl Libcni<'_> {
    fn node(&self) -> &Host {
        &self.world.lab.node("a").host
    }

    fn call(&self, command: &str) -> Result<String, String> {
        let tool = &programs().unwrap().1;
        self.run(tool, &[command, "pods", &self.netns.to_string_lossy()])
    }

    /// GC, after which these sandboxes are left.
    fn gc(&self, sandboxes: &[&str]) -> Result<String, String> {
        self.run(&programs().unwrap().0.join("cni-gc"), &[&["pods"], sandboxes].concat())
    }

    fn run(&self, tool: &Path, arguments: &[&str]) -> Result<String, String> {
        let plugins = &programs().unwrap().0;
        let directory = self.world.directory.path();
        let cache = directory.join("cache");
        std::fs::create_dir_all(&cache).unwrap();
        let pod = self.world.server.pods.lock().unwrap()[self.pod].identity.clone();
        let mut process = Command::new("unshare");
        // What libcni remembers goes into a place of this test.
        let line = "mkdir -p /var/lib/cni && mount --bind \"$0\" /var/lib/cni && exec \"$@\"";
        process.args(["--mount", "sh", "-c", line]).arg(cache).arg(tool).args(arguments);
        process
            .env("CNI_PATH", format!("{}:{}:/usr/lib/cni", plugins.display(), directory.display()))
            .env("NETCONFPATH", directory.join("conf"))
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID={}",
                    pod.namespace, pod.name, pod.uid
                ),
            );
        let output = self.node().output(&mut process).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(text(&output.stdout) + &text(&output.stderr))
        }
    }
}

/// Distributions have plugins of 1.0.0: this one speaks 1.1.0 for it.
const NEWER_BRIDGE: &str = r#"#!/bin/sh
case "$CNI_COMMAND" in
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}' ;;
GC | STATUS) cat > /dev/null ;;
*)
    output=$(sed 's/"cniVersion":"1.1.0"/"cniVersion":"1.0.0"/g' | /usr/lib/cni/bridge)
    status=$?
    printf '%s' "$output" | sed 's/"cniVersion": "1.0.0"/"cniVersion": "1.1.0"/'
    exit $status
    ;;
esac
"#;

/// A namespace by name, as runtimes make them; gone with this.
struct Named(String);

impl Drop for Named {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

/// A primary plugin of this version and ours behind it. Where our agent is to listen.
fn configured(world: &World, version: &str) -> PathBuf {
    let directory = world.directory.path();
    let (conf, socket) = (directory.join("conf"), directory.join("plugin.sock"));
    std::fs::create_dir(&conf).unwrap();
    let primary = json!({
        "cniVersion": version, "name": "pods",
        "plugins": [{
            "type": if version == "1.1.0" { "newer-bridge" } else { "bridge" }, "bridge": "test0", "isGateway": true,
            "ipam": { "type": "host-local", "subnet": "10.99.0.0/24", "dataDir": directory.join("ipam") },
        }],
    });
    std::fs::write(conf.join("10-pods.conflist"), primary.to_string()).unwrap();
    let newer = directory.join("newer-bridge");
    std::fs::write(&newer, NEWER_BRIDGE).unwrap();
    std::fs::set_permissions(&newer, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    Chain::new(&conf, &socket, &["kube-system".to_owned()]).sync().unwrap();
    socket
}

/// STATUS came with 1.1.0: a node without pods of the mesh is ready when the agent is.
fn waits(libcni: &Libcni<'_>, readiness: &Readiness) {
    libcni.call("status").unwrap();
    let unmet = readiness.condition("something");
    assert!(libcni.call("status").unwrap_err().contains("something: not yet"));
    unmet.holds();
}

/// What came with 1.1.0, too.
fn collects(libcni: &Libcni<'_>, agent: &Agent, readiness: &Readiness) {
    // Where pods run, an agent in trouble does not take them out of their services.
    let unmet = readiness.condition("something else");
    libcni.call("status").unwrap();
    unmet.holds();
    let uid = libcni.world.uid("web");
    let sandbox = agent.node.dump()["pods"][0]["container"].as_str().unwrap().to_owned();
    libcni.gc(&[&sandbox, "another"]).unwrap();
    assert!(agent.state(&uid).is_some());
    // What libcni remembers it would remove by DEL: it forgets, as after a restart of the node.
    std::fs::remove_dir_all(libcni.world.directory.path().join("cache")).unwrap();
    libcni.gc(&["another"]).unwrap();
    assert_eq!(agent.state(&uid), None, "it is not among those that are left");
    let error = libcni.call("gc").unwrap_err();
    assert!(error.contains("valid-attachments"), "without a list nothing is released: {error}");
}

async fn with_version(version: &str) {
    let world = World::labelled();
    // The sandbox is a new one, whose address the primary chooses.
    world.server.pods.lock().unwrap().get_mut("web").unwrap().addresses.clear();
    let socket = configured(&world, version);
    let name = format!("{}-sandbox", world.host("web").namespace);
    assert!(Command::new("ip").args(["netns", "add", &name]).status().unwrap().success());
    let named = Named(name);
    let netns = PathBuf::from("/run/netns").join(&named.0);
    let nft = |what: &[&str]| {
        let output = Command::new("ip").args(["netns", "exec", &named.0, "nft"]).args(what).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let rules = || nft(&["list", "ruleset"]);

    let agent = world.agent().await;
    let readiness = Readiness::default();
    let routes = plugin::routes(&agent.node, &readiness, &Metrics::new(&Registry::new()));
    let serving = tokio::spawn(plugin::listen(&socket, routes).unwrap());
    let libcni = Libcni { world: &world, pod: "web", netns: netns.clone() };
    let call = |command: &'static str| tokio::task::block_in_place(|| libcni.call(command));

    if version == "1.1.0" {
        tokio::task::block_in_place(|| waits(&libcni, &readiness));
    }
    let error = call("add").unwrap_err();
    assert!(error.contains("no ztunnel is connected"), "{version}: {error}");
    call("del").unwrap();
    assert_eq!(rules(), "");
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    let result: Value = serde_json::from_str(&call("add").unwrap()).unwrap();
    assert_eq!(result["cniVersion"], version);
    let address = result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    assert!(address.starts_with("10.99.0."), "{result}");
    assert!(ztunnel.was_told(&format!("add {}", world.uid("web"))));
    assert!(rules().contains("culvert"));
    let there = Netns::open(&netns).unwrap();
    assert!(
        agent.node.dump()["pods"][0]["netns"].as_str().unwrap().contains(&there.id().inode().to_string())
    );

    // CHECK came with 0.4.0.
    if version != "0.3.1" {
        call("check").unwrap();
        nft(&["flush", "ruleset"]);
        let error = call("check").unwrap_err();
        assert!(error.contains("not as they were"), "{version}: {error}");
    }
    if version == "1.1.0" {
        tokio::task::block_in_place(|| collects(&libcni, &agent, &readiness));
    }
    call("del").unwrap();
    call("del").unwrap();
    agent.until("let go", || agent.state(&world.uid("web")).is_none()).await;

    // An agent that is away keeps no pod from ending.
    serving.abort();
    let _ = serving.await;
    call("del").unwrap();
    let excluded = Libcni { world: &world, pod: "other", netns };
    world.server.pods.lock().unwrap().get_mut("other").unwrap().identity.namespace = "kube-system".to_owned();
    let result = tokio::task::block_in_place(|| excluded.call("add")).unwrap();
    assert!(result.contains("10.99.0."), "{result}");
}

#[tokio::test(flavor = "multi_thread")]
async fn libcni_adds_checks_collects_and_removes_in_every_version() {
    if !root_or_skip("libcni adds, checks, collects and removes in every version") {
        return;
    }
    if programs().is_none() {
        use std::io::Write;
        let why = "skipped: libcni: needs Go and its module proxy, and containernetworking-plugins";
        let _ = writeln!(std::io::stderr(), "{why}");
        return;
    }
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        with_version(version).await;
    }
}
