//! `nodeLocal: kernel` with the node agent itself (`culvert-node`) beside ztunnel, and an API server that says which pods are in the
//! mesh.

use std::fs;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use capture::Capture;
use harness::netns::{Host, Process, root_or_skip, skip_without_ebpf};
use model::{Action, NodeLocal, NodeLocalModes, Scope, Settings};
use net::Netns;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::configuration::{policy, principal};
use crate::lab::kubernetes::{Kubernetes, last_lines, logged};
use crate::lab::traffic::{PORT, ask, serve};
use crate::lab::{Cluster, Options, PATIENCE, eventually, within};
use crate::verdicts::{CUT, ebpf, past, told};

const PODS: [&str; 3] = ["client", "other", "web"];
/// How many agents are killed one after the other.
const AGENTS: u64 = 5;
const LABEL: &str = "istio.io/dataplane-mode";
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// The agent's program and the plugin's, where they are newer than what they are made of: a run of all tests has built them.
fn built() -> Option<PathBuf> {
    let programs = Path::new(env!("CARGO_BIN_EXE_ztunnel")).parent().unwrap();
    let changed = |path: &Path| path.metadata().and_then(|found| found.modified()).ok();
    let newest = |sources: &Path| {
        let all = fs::read_dir(sources).unwrap().map(|entry| entry.unwrap().path());
        all.filter_map(|path| changed(&path)).max()
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cni-plugin");
    let made = [("culvert-node", "agent/src"), ("culvert-cni", "plugin/src")];
    let is_new = |(program, sources): &(&str, &str)| {
        changed(&programs.join(program)).is_some_and(|built| Some(built) > newest(&workspace.join(sources)))
    };
    made.iter().all(is_new).then(|| programs.to_owned())
}

/// The binaries of Kubernetes.
fn kubernetes() -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kube/bin");
    let programs = std::env::var_os("KUBE_BIN").map_or(built, PathBuf::from);
    Kubernetes::PROGRAMS.iter().all(|name| programs.join(name).exists()).then_some(programs)
}

/// A node with three pods, and what runs on it.
struct World {
    // In the order in which they have to go.
    agent: Option<Process>,
    cluster: Cluster,
    server: Kubernetes,
    node: Netns,
    pods: Vec<Host>,
    programs: PathBuf,
    capture: Arc<dyn Capture>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            last_lines(&self.dir());
        }
        self.agent = None;
        let _ = self.node.run(capture::remove_verdicts);
        for pod in &self.pods {
            let _ = self.capture.remove(&pod.netns);
        }
    }
}

impl World {
    async fn start(what: &str) -> Option<Self> {
        if !root_or_skip(what) {
            return None;
        }
        let (Some(programs), Some(servers)) = (built(), kubernetes()) else {
            let why = "cargo build -p node-agent -p cni-plugin makes the agent, make e2e the API server";
            let _ = writeln!(io::stderr(), "skipped: {what}: {why}");
            return None;
        };
        let mut cluster = Cluster::build(&[("a", &PODS[..]), ("k", &[][..])]);
        let node = cluster.node("a").netns.clone();
        // Only to take away what is left.
        let capture = match ebpf(&node) {
            Ok(capture) => capture,
            Err(missing) => {
                skip_without_ebpf(what, &missing);
                return None;
            }
        };
        node.run(capture::remove_verdicts).unwrap().unwrap();
        let dir = cluster.dir().join("kubernetes");
        for name in ["bin", "net.d", "state"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        let primary = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]});
        fs::write(dir.join("net.d/10-pods.conflist"), primary.to_string()).unwrap();
        let server = Kubernetes::start(cluster.node("k"), &dir, &servers);
        let pods: Vec<Host> = PODS.map(|name| cluster.pod(name).clone()).into();
        declare(&server, &pods);

        // The stand-in of the agent makes room for it.
        cluster.agents.get_mut("a").unwrap().stop();
        cluster.options = Options::default().argument("--kernel-verdicts");
        cluster.tell_all();
        let node_local = NodeLocalModes { mesh: NodeLocal::Kernel, ..NodeLocalModes::default() };
        cluster.control_plane.settings(&Settings { node_local, ..Settings::default() });
        cluster.control_plane.server.ready();
        let mut world = Self { agent: None, cluster, server, node, pods, programs, capture };
        world.run_agent();
        world.cluster.launch("a");
        world.cluster.ztunnel_mut("a").ready().await;
        for pod in &world.pods {
            world.added(pod).await;
        }
        Some(world)
    }

    fn dir(&self) -> PathBuf {
        self.cluster.dir().join("kubernetes")
    }

    fn pod(&self, name: &str) -> &Host {
        self.cluster.pod(name)
    }

    /// Starts the agent, in the place of one that has ended.
    fn run_agent(&mut self) {
        let dir = self.dir();
        let mut agent = Command::new(self.programs.join("culvert-node"));
        let place = |flag: &str, name: &str| format!("--{flag}={}", dir.join(name).display());
        agent.args([
            place("cni-bin-dir", "bin"),
            place("cni-conf-dir", "net.d"),
            place("plugin-socket", "plugin.sock"),
            place("state-dir", "state"),
            format!("--plugin-binary={}", self.programs.join("culvert-cni").display()),
            format!("--zds-socket={}", self.cluster.dir().join("zds-a").display()),
            format!("--kubeconfig={}", self.server.kubeconfig().display()),
        ]);
        agent.args(["--node=a", "--capture=ebpf", "--kernel-verdicts"]);
        // In a cluster these ports are the node's, and ztunnel has others.
        agent.args(["--admin-address=127.0.0.1:17000", "--metrics-address=127.0.0.1:17020"]);
        agent.args(["--readiness-address=127.0.0.1:17021"]);
        self.agent = Some(logged(self.cluster.node("a"), &mut agent, &dir.join("agent.log")));
    }

    /// Has the agent add a pod, as the plugin asks it to.
    fn add(&self, pod: &Host) -> Result<(), String> {
        let body = json!({
            "Netns": format!("/run/netns/{}", pod.namespace), "ContainerID": format!("{}-sandbox", pod.name), "IfName": "eth0",
            "PodName": pod.name, "PodNamespace": "shop", "PodUID": self.uid(&pod.name),
            "IPs": [{"Interface": null, "Address": {"IP": pod.ipv4, "Mask": "////AA=="}}],
        });
        let body = body.to_string();
        let exchange = || -> io::Result<String> {
            let mut stream = UnixStream::connect(self.dir().join("plugin.sock"))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let length = body.len();
            write!(
                stream,
                "POST /cmdadd HTTP/1.1\r\nHost: agent\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            )?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        // The ztunnel that has to acknowledge it is another process.
        let answer = tokio::task::block_in_place(exchange).map_err(|error| error.to_string())?;
        let body =
            answer.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str::<Value>(body).ok());
        if body.is_some_and(|body| body["enrolled"] == true) { Ok(()) } else { Err(answer) }
    }

    /// Has a pod added, once the agent and ztunnel are there.
    async fn added(&self, pod: &Host) {
        let mut said = String::new();
        let added = within(PATIENCE, async || match self.add(pod) {
            Ok(()) => true,
            Err(answer) => {
                said = answer;
                false
            }
        });
        assert!(added.await, "{}: {said}", pod.name);
    }

    fn uid(&self, pod: &str) -> String {
        let pod = self.server.get("pod", "shop", pod).unwrap();
        pod["metadata"]["uid"].as_str().unwrap().to_owned()
    }

    /// What the API server has of a pod's redirection.
    fn redirection(&self, pod: &str) -> Value {
        tokio::task::block_in_place(|| self.server.get("pod", "shop", pod).unwrap())["metadata"]["annotations"]
            [REDIRECTION]
            .clone()
    }

    /// Labels a pod out of the mesh, and waits until it is.
    async fn take_out(&self, pod: &str) {
        self.server.kubectl(&["label", "pod", "-n", "shop", pod, &format!("{LABEL}=none")], "").unwrap();
        eventually("it has left", async || self.redirection(pod).is_null()).await;
    }

    /// Labels it in again, and waits until it is.
    async fn take_in(&self, pod: &str) {
        self.server.kubectl(&["label", "pod", "-n", "shop", pod, &format!("{LABEL}-")], "").unwrap();
        // As its container starts anew: no process is in the pod by which the agent would find it.
        self.added(self.pod(pod)).await;
        eventually("it is back", async || self.redirection(pod) == "enabled").await;
    }

    async fn policy(&self, name: &str, denied: &str) {
        self.cluster.enforce(&policy(name, Scope::Namespace, Action::Deny, principal(denied))).await;
    }

    async fn no_policy(&self, name: &str) {
        self.cluster.control_plane.unset(proto::AUTHORIZATION_TYPE_URL, &format!("shop/{name}"));
        self.cluster.in_force().await;
    }
}

/// The namespace, and pods that run on the node.
fn declare(server: &Kubernetes, pods: &[Host]) {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {LABEL: "ambient"}}});
    server.apply(&[namespace]);
    for pod in pods {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod.name, "namespace": "shop"},
            "spec": {"nodeName": "a", "serviceAccountName": pod.name, "automountServiceAccountToken": false,
                     "containers": [{"name": "main", "image": "none"}]},
        });
        server.apply(std::slice::from_ref(&object));
        let ips = [json!({"ip": pod.ipv4}), json!({"ip": pod.ipv6})];
        server.set_status(&object, &json!({"phase": "Running", "podIP": pod.ipv4, "podIPs": ips}));
    }
}

/// The agent prepares, ztunnel decides: neither knows of the other but by ZDS and what is kept on the node.
#[tokio::test(flavor = "multi_thread")]
async fn connections_pass_while_agent_and_ztunnel_come_and_go() {
    let Some(mut world) = World::start("culvert-node and ztunnel under nodeLocal: kernel").await else {
        return;
    };
    let [client, other, web] = PODS.map(|name| world.pod(name).clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut allowed = past(world.cluster.ztunnel("a"), &other, to).await;
    let mut open = past(world.cluster.ztunnel("a"), &client, to).await;
    assert_eq!((open.hello.client, open.hello.reached), (open.local, to));
    world.policy("deny", "client").await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    ask(&client, to).await.unwrap_err();
    allowed.echo().await.unwrap();
    world.no_policy("deny").await;

    // The agent is killed, and the next one finds all as it was.
    let mut open = past(world.cluster.ztunnel("a"), &client, to).await;
    world.agent.as_ref().unwrap().signal(Signal::SIGKILL).unwrap();
    world.agent = None;
    open.echo().await.unwrap();
    drop(past(world.cluster.ztunnel("a"), &client, to).await);
    world.run_agent();
    eventually("the next agent is there", async || {
        world.cluster.node("a").shell("curl -fsS -m 5 http://127.0.0.1:17021/healthz/ready").is_ok()
    })
    .await;
    open.echo().await.unwrap();
    allowed.echo().await.unwrap();

    // Who leaves the mesh leaves with what it has, by the label alone; and can come back.
    world.take_out("client").await;
    // The agent gives others time to hear of it.
    timeout(PATIENCE, open.end()).await.expect("it goes on").unwrap_err();
    let source = open.local.to_string();
    let ended = world.cluster.ztunnel("a").last(|c| c["source"] == source.as_str()).await;
    assert_eq!(ended["carrier"], "kernel", "{ended}");
    allowed.echo().await.unwrap();
    world.take_in("client").await;
    let mut open = past(world.cluster.ztunnel("a"), &client, to).await;

    // ztunnel is killed: the next one is told of all pods by the agent, and begins anew.
    world.cluster.ztunnel_mut("a").signal(Signal::SIGKILL);
    world.cluster.ztunnel_mut("a").ended().await;
    world.cluster.launch("a");
    world.cluster.ztunnel_mut("a").ready().await;
    timeout(PATIENCE, open.end()).await.expect("what an earlier ztunnel let pass goes on").unwrap_err();
    let mut open = past(world.cluster.ztunnel("a"), &client, to).await;
    let views = told(world.cluster.ztunnel("a"), 15000, &open).await;
    let expected = "spiffe://cluster.local/ns/shop/sa/client";
    assert!(views.iter().all(|view| view["source_identity"] == expected), "{views:?}");

    // One that drains is told of no pod any more: what passes of one that leaves is ended by the agent.
    let mut allowed = past(world.cluster.ztunnel("a"), &other, to).await;
    world.cluster.ztunnel_mut("a").signal(Signal::SIGTERM);
    world.cluster.ztunnel("a").says(&["draining"]).await;
    world.take_out("client").await;
    timeout(PATIENCE, open.end()).await.expect("it goes on").unwrap_err();
    allowed.echo().await.unwrap();
}

/// Who connects all the while does not notice that agents are killed and come.
#[tokio::test(flavor = "multi_thread")]
async fn no_connection_is_lost_as_agents_are_killed() {
    let Some(mut world) = World::start("culvert-node is killed under connections within the node").await
    else {
        return;
    };
    let [client, other, web] = PODS.map(|name| world.pod(name).clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    for pod in [&client, &other] {
        drop(past(world.cluster.ztunnel("a"), pod, to).await);
    }
    let over = Arc::new(AtomicBool::new(false));
    let callers = [&client, &other, &client, &other].map(|pod| {
        let (pod, over) = (pod.clone(), over.clone());
        tokio::spawn(async move {
            let mut made = 0_u32;
            while !over.load(Ordering::Relaxed) {
                ask(&pod, to).await.map_err(|error| format!("{} after {made}: {error}", pod.name))?;
                made += 1;
                // There are not so many ports.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Ok::<_, String>(made)
        })
    });
    for number in 0..AGENTS {
        world.agent.as_ref().unwrap().signal(Signal::SIGKILL).unwrap();
        world.agent = None;
        world.run_agent();
        eventually("the next agent is there", async || {
            world.cluster.node("a").shell("curl -fsS -m 5 http://127.0.0.1:17021/healthz/ready").is_ok()
        })
        .await;
        // At another point of what it does.
        tokio::time::sleep(Duration::from_millis(number * 130 % 700)).await;
        if callers.iter().any(JoinHandle::is_finished) {
            break;
        }
    }
    over.store(true, Ordering::Relaxed);
    for caller in callers {
        let made = caller.await.unwrap().unwrap();
        assert!(made > 20, "{made} connections say little");
    }
}
