//! Plugin and agent, killed while a pod is added: nothing is left that the kubelet's next attempt meets.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use capture::{Backend, Tools};
use harness::netns::root_or_skip;
use net::Netns;
use node_agent::metrics::Metrics;
use node_agent::node::{AddRequest, Answer, Times};
use node_agent::plugin;
use node_agent::record::Record;
use process::metrics::Registry;
use process::readiness::Readiness;
use serde_json::{Value, json};

use super::lab::{Around, FakeZtunnel, PATIENCE, Server, World, application, pod, start, who};

/// A process that is killed with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The plugin, as the container runtime calls it for a sandbox of `web`.
fn call(binary: &Path, world: &World, socket: &Path, command: &str, sandbox: &str) -> Running {
    let host = world.host("web");
    let network = json!({
        "cniVersion": "1.0.0", "name": "pods", "type": "culvert-cni", "agentSocket": socket,
        "prevResult": { "cniVersion": "1.0.0", "ips": [{ "address": format!("{}/24", host.ipv4) }] },
    });
    let mut child = Command::new(binary)
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", sandbox)
        .env("CNI_NETNS", format!("/run/netns/{}", host.namespace))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID={}", world.uid("web")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(network.to_string().as_bytes()).unwrap();
    Running(child)
}

/// What it prints, where it succeeds.
async fn succeeds(mut process: Running) -> String {
    for _ in 0..PATIENCE.as_millis() / 5 {
        if let Some(status) = process.0.try_wait().unwrap() {
            let mut text = String::new();
            std::io::Read::read_to_string(process.0.stdout.as_mut().unwrap(), &mut text).unwrap();
            assert!(status.success(), "{text}");
            return text;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the plugin does not end");
}

/// How many descriptors of this process are of this namespace.
fn descriptors_of(netns: &Netns) -> usize {
    let name = format!("net:[{}]", netns.id().inode());
    let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    all.filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| to == Path::new(&name))).count()
}

#[tokio::test]
async fn a_plugin_that_is_killed_leaves_nothing() {
    if !root_or_skip("a plugin that is killed leaves nothing") {
        return;
    }
    let binary = super::peer::plugin_binary().expect("the plugin is built");
    let world = World::labelled();
    let agent = world.agent().await;
    let ztunnel = FakeZtunnel::start(&world.socket()).await;
    let socket = world.directory.path().join("plugin.sock");
    let routes = plugin::routes(&agent.node, &Readiness::default(), &Metrics::new(&Registry::new()));
    let serving = tokio::spawn(plugin::listen(&socket, routes).unwrap());
    let (uid, netns) = (world.uid("web"), world.host("web").netns.clone());
    let before = descriptors_of(&netns);
    let let_go = || {
        let told = ztunnel.told.lock().unwrap();
        let count = |what: &str| told.iter().filter(|told| told.starts_with(what)).count();
        let is_recorded = Record::open(&world.directory.path().join("state")).unwrap().get(&uid).is_some();
        agent.state(&uid).is_none() && !is_recorded && count("add") == count("del")
    };
    for round in 0..24_u64 {
        // Some are killed before they have asked, some while ztunnel is asked, while the rules are written, or afterwards.
        ztunnel.hold.store(round % 3 == 0, Ordering::Relaxed);
        let adding = call(&binary, &world, &socket, "ADD", &format!("sandbox-{round}"));
        tokio::time::sleep(Duration::from_millis(round * 5)).await;
        drop(adding);
        // The kubelet ends the sandbox at once; what was begun for it may come to its end after that.
        succeeds(call(&binary, &world, &socket, "DEL", &format!("sandbox-{round}"))).await;
        ztunnel.hold.store(false, Ordering::Relaxed);
        if round % 2 == 0 {
            agent.until("let go", let_go).await;
        }
        // And makes another.
        let again = format!("sandbox-{round}-again");
        let result = succeeds(call(&binary, &world, &socket, "ADD", &again)).await;
        assert_eq!(serde_json::from_str::<Value>(&result).unwrap()["cniVersion"], "1.0.0");
        assert_eq!(agent.ztunnels.served(&uid), Ok(()));
        let dump = agent.node.dump();
        assert_eq!(dump["pods"].as_array().unwrap().len(), 1);
        assert_eq!(
            (dump["pods"][0]["container"].as_str(), dump["pods"][0]["state"].as_str()),
            (Some(&*again), Some("enrolled"))
        );
        succeeds(call(&binary, &world, &socket, "DEL", &again)).await;
        agent.until("let go", let_go).await;
    }
    agent.until("no descriptor is left", || descriptors_of(&netns) == before).await;
    serving.abort();
}

/// Where the agent that is killed stops, and never goes on.
const STEPS: [&str; 4] = ["ztunnel is asked", "before the rules", "after the rules", "enrolled"];
/// In the environment of the agent that is killed: what it is to do.
const TASK: &str = "CULVERT_TEST_KILLED_AGENT";

fn stop(directory: &Path) {
    std::fs::write(directory.join("stopped"), "").unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Not a case of its own: the process that the next one kills.
#[tokio::test]
async fn the_agent_that_is_killed() {
    let Ok(task) = std::env::var(TASK) else { return };
    let task: Value = serde_json::from_str(&task).unwrap();
    let text = |name: &str| task[name].as_str().unwrap().to_owned();
    let (directory, at) = (PathBuf::from(text("directory")), text("at"));
    let request: AddRequest = serde_json::from_value(task["request"].clone()).unwrap();
    let server = Arc::new(Server::default());
    server.namespaces.lock().unwrap().insert("shop".to_owned(), Some("ambient".to_owned()));
    let web = pod("web", &text("uid"), &[]);
    server.pods.lock().unwrap().insert("web".to_owned(), web);
    let inner = capture::probe(Backend::Nftables, &Tools::default()).unwrap();
    let (place, marked) = (at.clone(), directory.clone());
    let stops = Around::new(inner, move |install| {
        if place == "before the rules" {
            stop(&marked);
        }
        let installed = install();
        if place == "after the rules" {
            stop(&marked);
        }
        installed
    });
    let agent = start(server, &directory, stops, None, Times::default()).await;
    agent.until("a ztunnel", || agent.ztunnels.connected() > 0).await;
    let outcome = agent.add(request).await;
    assert_eq!((at.as_str(), outcome), ("enrolled", Ok(Answer::Enrolled)));
    stop(&directory);
}

/// What the plugin asks for.
fn request_of(world: &World, uid: &str) -> serde_json::Value {
    let host = world.host("web");
    json!({
        "Netns": format!("/run/netns/{}", host.namespace), "PodName": "web", "PodNamespace": "shop",
        "PodUID": uid, "ContainerID": "killed",
        "IPs": [{ "Address": { "IP": host.ipv4 } }, { "Address": { "IP": host.ipv6 } }],
    })
}

#[tokio::test]
async fn an_agent_that_is_killed_at_any_step_leaves_the_pod_closed_and_the_next_attempt_works() {
    if !root_or_skip("an agent that is killed at any step leaves the pod closed and the next attempt works") {
        return;
    }
    let world = World::labelled();
    application(world.host("web"));
    let (uid, state) = (world.uid("web"), world.directory.path().join("state"));
    for at in STEPS {
        // The one before may still be on its way out.
        let _ = std::fs::remove_file(world.socket());
        let task = json!({ "directory": world.directory.path(), "at": at, "uid": uid, "request": request_of(&world, &uid) });
        let mut agent = Command::new(std::env::current_exe().unwrap());
        agent.args(["--exact", "killed::the_agent_that_is_killed"]).env(TASK, task.to_string());
        let killed = Running(agent.stdout(Stdio::null()).spawn().unwrap());
        let until = async |what: &str, done: &dyn Fn() -> bool| {
            for _ in 0..PATIENCE.as_millis() / 5 {
                if done() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            panic!("{at}: {what}");
        };
        until("it listens", &|| net::seqpacket::Seqpacket::connect(&world.socket()).is_ok()).await;
        let ztunnel = FakeZtunnel::start(&world.socket()).await;
        ztunnel.hold.store(at == "ztunnel is asked", Ordering::Relaxed);
        let asked = format!("add {uid}");
        until("ztunnel is asked", &|| ztunnel.was_told(&asked)).await;
        let stopped = world.directory.path().join("stopped");
        if at != "ztunnel is asked" {
            until("it stops", &|| stopped.exists()).await;
            std::fs::remove_file(&stopped).unwrap();
        }
        drop(killed);
        drop(ztunnel);
        assert!(
            Record::open(&state).unwrap().get(&uid).is_some(),
            "{at}: it is recorded before anything else"
        );
        let peer = world.address("web", false);
        if ["after the rules", "enrolled"].contains(&at) {
            assert_eq!(who(world.host("client"), peer).await, "nobody", "{at}: with no agent and no ztunnel");
        }

        let agent = world.agent().await;
        assert_eq!(who(world.host("client"), peer).await, "nobody", "{at}: what is recorded is closed");
        let ztunnel = FakeZtunnel::start(&world.socket()).await;
        // The kubelet never had an answer: it ends the sandbox and makes another.
        let request = |container: &str| {
            let mut request = world.request("web");
            request.container_id = container.to_owned();
            request
        };
        if at != "enrolled" {
            agent.node.del(&request("killed"));
        }
        assert_eq!(agent.add(request("next")).await, Ok(Answer::Enrolled), "{at}");
        assert_eq!(who(world.host("client"), peer).await, "ztunnel", "{at}");
        agent.node.del(&request("killed"));
        assert_eq!(agent.state(&uid).as_deref(), Some("enrolled"), "{at}: the killed one's DEL may be late");
        agent.node.del(&request("next"));
        agent.until("ztunnel lets go", || ztunnel.was_told(&format!("del {uid}"))).await;
        assert_eq!(Record::open(&state).unwrap().entries(), []);
        assert!(world.capture.remove(&world.host("web").netns).unwrap(), "{at}");
    }
}
