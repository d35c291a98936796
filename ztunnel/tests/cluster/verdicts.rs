//! `nodeLocal: kernel` in a cluster: the node agent prepares the pods, one ztunnel of the node at a time writes verdicts.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use capture::{Backend, Capture, Tools};
use harness::netns::{Host, root_or_skip, skip_without_ebpf};
use model::{Action, NodeLocal, NodeLocalModes, Scope, Settings};
use net::Netns;
use net::seqpacket::Seqpacket;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use crate::configuration::{policy, principal, strict};
use crate::lab::traffic::{PORT, Talk, ask, serve, talk};
use crate::lab::{Cluster, Options, Ztunnel, eventually};

const PODS: [&str; 3] = ["client", "other", "web"];
/// The longest that a verdict outlives its ztunnel, and some.
const LEASE: Duration = Duration::from_secs(5);
/// What is no longer allowed has been reset within this, also on a machine with much to do. A lease that ran out resets nothing.
pub const CUT: Duration = Duration::from_secs(5);
/// What does not pass has not passed after this.
const SOON: Duration = Duration::from_secs(1);
/// A pod that was enrolled is looked at within this.
const LOOK: Duration = Duration::from_secs(4);
/// The flags of a ztunnel that runs beside another one.
const PORTS: [(&str, &str); 3] = [
    ("--admin-address", "127.0.0.1:16000"),
    ("--metrics-address", "0.0.0.0:16020"),
    ("--readiness-address", "0.0.0.0:16021"),
];

/// A node with three pods, and what is left of it on the machine.
struct World {
    cluster: Cluster,
    node: Netns,
    pods: Vec<Host>,
    /// Where the agent told an older ztunnel of pods.
    older: Option<Seqpacket>,
}

impl Drop for World {
    fn drop(&mut self) {
        let capture = self.cluster.agents["a"].capture.clone();
        let _ = self.node.run(capture::remove_verdicts);
        for pod in &self.pods {
            let _ = capture.remove(&pod.netns);
        }
    }
}

/// What captures by eBPF on the node, as its agent has it.
pub fn ebpf(node: &Netns) -> Result<Arc<dyn Capture>, capture::Missing> {
    node.run(|| {
        let capture = capture::probe(Backend::Ebpf, &Tools::default())?;
        assert!(capture.prepare_verdicts().unwrap());
        Ok(capture)
    })
    .unwrap()
}

impl World {
    async fn start(what: &str) -> Option<Self> {
        if !root_or_skip(what) {
            return None;
        }
        let mut cluster = Cluster::build(&[("a", &PODS)]);
        let node = cluster.node("a").netns.clone();
        let capture = match ebpf(&node) {
            Ok(capture) => capture,
            Err(missing) => {
                skip_without_ebpf(what, &missing);
                return None;
            }
        };
        cluster.agents.get_mut("a").unwrap().capture = capture;
        cluster.options = Options::default()
            .argument("--kernel-verdicts")
            .argument("--termination-grace-period")
            .argument("60s");
        cluster.tell_all();
        let node_local = NodeLocalModes { mesh: NodeLocal::Kernel, ..NodeLocalModes::default() };
        cluster.control_plane.settings(&Settings { node_local, ..Settings::default() });
        // What passes is not what came before the enrolment, which is refused.
        cluster.control_plane.policy(&strict());
        cluster.control_plane.server.ready();
        cluster.run("a").await;
        let pods = PODS.map(|name| cluster.pod(name).clone()).into();
        Some(Self { cluster, node, pods, older: None })
    }

    fn ztunnel(&self) -> &Ztunnel {
        self.cluster.ztunnel("a")
    }

    /// A second ztunnel, which is told of all pods and is ready.
    async fn second(&mut self) -> Ztunnel {
        let options = PORTS.into_iter().fold(self.cluster.options.clone(), |options, (flag, address)| {
            options.argument(flag).argument(address)
        });
        let second = self.cluster.another("a", &options);
        let agent = self.cluster.agents.get_mut("a").unwrap();
        let connected = agent.accept().await;
        self.older = agent.turn_to(connected);
        for pod in &self.pods {
            agent.add(pod).await;
        }
        agent.snapshot_sent().await;
        eventually("the second is ready", async || second.get(16021, "/healthz/ready").await.is_ok()).await;
        second
    }
}

fn json(page: &str) -> Value {
    serde_json::from_str(page).unwrap()
}

/// What a ztunnel, whose admin port this is, tells of an open connection.
pub async fn told(of: &Ztunnel, admin: u16, open: &Talk) -> Vec<Value> {
    let connections = json(&of.get(admin, "/connections").await.unwrap());
    let source = open.local.to_string();
    let all = connections["open"].as_array().unwrap();
    all.iter().filter(|c| c["source"] == source.as_str()).cloned().collect()
}

/// Connects until no ztunnel is on the path any more.
async fn past_by(of: &Ztunnel, admin: u16, from: &Host, to: SocketAddr) -> Talk {
    let mut found = None;
    eventually("a connection passes by a verdict", async || {
        let open = talk(from, to).await.unwrap();
        let views = told(of, admin, &open).await;
        let passes = views.len() == 2 && views.iter().all(|c| c["carrier"] == "kernel");
        found = Some(open);
        passes
    })
    .await;
    found.unwrap()
}

pub async fn past(of: &Ztunnel, from: &Host, to: SocketAddr) -> Talk {
    past_by(of, 15000, from, to).await
}

/// What a ztunnel says of its verdicts.
async fn verdicts(of: &Ztunnel, admin: u16) -> Value {
    json(&of.get(admin, "/config_dump").await.unwrap())["verdicts"].clone()
}

#[tokio::test]
async fn connections_pass_by_and_end_when_they_are_no_longer_allowed() {
    let Some(world) = World::start("nodeLocal: kernel in a cluster").await else { return };
    let (cluster, a) = (&world.cluster, world.ztunnel());
    let [client, other, web] = PODS.map(|name| cluster.pod(name));
    let _server = serve(web, PORT);
    let captured =
        async || a.capture("client").await["captureCounters"]["captured_outbound"].as_u64().unwrap();
    for v6 in [false, true] {
        let to = SocketAddr::new(web.ip(v6), PORT);
        let mut open = past(a, client, to).await;
        assert_eq!((open.hello.client, open.hello.reached), (open.local, to));
        open.echo().await.unwrap();
        for view in told(a, 15000, &open).await {
            assert_eq!(view["source_identity"], "spiffe://cluster.local/ns/shop/sa/client", "{view}");
            assert_eq!(view["destination_identity"], "spiffe://cluster.local/ns/shop/sa/web", "{view}");
            assert_eq!(view["bytes_sent"], 15, "{view}");
        }
        let before = captured().await;
        for _ in 0..5 {
            ask(client, to).await.unwrap();
        }
        assert_eq!(captured().await, before, "ztunnel was asked");
        // A pod that was enrolled a moment ago is looked at time and again.
        sleep(LOOK).await;
        open.echo().await.unwrap();
    }
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut allowed = past(a, other, to).await;
    let mut open = past(a, client, to).await;
    let deny = policy("deny", Scope::Namespace, Action::Deny, principal("client"));
    cluster.enforce(&deny).await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    allowed.echo().await.unwrap();
    ask(client, to).await.unwrap_err();
    cluster.control_plane.unset(proto::AUTHORIZATION_TYPE_URL, "shop/deny");
    cluster.in_force().await;

    // Who leaves the mesh leaves with what it has.
    let mut open = past(a, client, to).await;
    let left = cluster.agents["a"].remove(client);
    left.await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    allowed.echo().await.unwrap();
    assert_eq!(a.metric("culvert_verdict_stuck").await, 0.0);
    // What the agent no longer finds fit is carried; what passes goes on.
    world
        .node
        .run(|| other.shell("ip link add extra type veth peer name more && ip link set extra up"))
        .unwrap()
        .unwrap();
    cluster.agents["a"].redirect(other);
    eventually("ztunnel carries them", async || {
        let next = talk(other, to).await.unwrap();
        let views = told(a, 15000, &next).await;
        views.len() == 2 && views.iter().all(|c| c["carrier"] == "node-local")
    })
    .await;
    allowed.echo().await.unwrap();
    let unfit = verdicts(a, 15000).await;
    assert!(unfit["unfitPods"].to_string().contains("not found it fit"), "{unfit}");
}

#[tokio::test]
async fn nothing_passes_without_a_ztunnel_and_the_next_one_begins_anew() {
    let Some(mut world) = World::start("a ztunnel's end under nodeLocal: kernel").await else { return };
    let [client, _, web] = PODS.map(|name| world.cluster.pod(name).clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut open = past(world.ztunnel(), &client, to).await;

    // The agent's end and its successor change nothing of it.
    let agent = world.cluster.agents.get_mut("a").unwrap();
    agent.stop();
    agent.capture = ebpf(&world.node).unwrap();
    open.echo().await.unwrap();
    drop(past(world.ztunnel(), &client, to).await);
    world.cluster.enforce(&policy("deny", Scope::Namespace, Action::Deny, principal("client"))).await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    world.cluster.control_plane.unset(proto::AUTHORIZATION_TYPE_URL, "shop/deny");
    world.cluster.in_force().await;
    let agent = world.cluster.agents.get_mut("a").unwrap();
    agent.restart().await;
    for pod in &world.pods {
        agent.add(pod).await;
    }
    agent.snapshot_sent().await;
    let mut open = past(world.ztunnel(), &client, to).await;
    open.echo().await.unwrap();

    let a = world.cluster.ztunnel_mut("a");
    a.signal(Signal::SIGKILL);
    a.ended().await;
    sleep(LEASE).await;
    assert!(!matches!(timeout(SOON, open.echo()).await, Ok(Ok(()))), "it outlives the lease");
    let refused = timeout(SOON, ask(&client, to)).await;
    assert!(!matches!(refused, Ok(Ok(_))), "a new connection passes: {refused:?}");
    world.cluster.run("a").await;
    open.end().await.unwrap_err();
    let mut open = past(world.ztunnel(), &client, to).await;
    open.echo().await.unwrap();
}

#[tokio::test]
async fn one_of_two_ztunnels_writes_and_the_other_takes_over_when_that_has_ended() {
    let Some(mut world) = World::start("two ztunnels under nodeLocal: kernel").await else { return };
    let [client, other, web] = PODS.map(|name| world.cluster.pod(name).clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut open = past(world.ztunnel(), &client, to).await;
    let second = world.second().await;
    // The first has it still.
    eventually("the second waits for its turn", async || {
        let said = verdicts(&second, 16000).await;
        assert_eq!(said["attached"], false, "{said}");
        said["trouble"].as_str().is_some_and(|trouble| trouble.contains("another process"))
    })
    .await;
    drop(past(world.ztunnel(), &client, to).await);
    sleep(LOOK).await;
    open.echo().await.unwrap();

    // It drains: what is open goes on, and what comes is the second's, which carries it.
    world.cluster.ztunnel_mut("a").signal(Signal::SIGTERM);
    eventually("the second carries what comes", async || {
        let Ok(next) = talk(&client, to).await else { return false };
        let views = told(&second, 16000, &next).await;
        views.len() == 2 && views.iter().all(|c| c["carrier"] == "node-local")
    })
    .await;
    open.echo().await.unwrap();
    // Policies are followed to the end.
    let mut allowed = talk(&other, to).await.unwrap();
    world.cluster.control_plane.policy(&policy("deny", Scope::Namespace, Action::Deny, principal("client")));
    timeout(Duration::from_secs(10), open.end()).await.expect("it goes on").unwrap_err();
    allowed.echo().await.unwrap();
    world.cluster.control_plane.unset(proto::AUTHORIZATION_TYPE_URL, "shop/deny");
    world.cluster.ztunnel_mut("a").ended().await;
    eventually("it is allowed again", async || ask(&client, to).await.is_ok()).await;
    let mut open = past_by(&second, 16000, &client, to).await;
    open.echo().await.unwrap();
    assert_eq!(verdicts(&second, 16000).await["attached"], true);
    drop(second);
    sleep(LEASE).await;
    assert!(!matches!(timeout(SOON, open.echo()).await, Ok(Ok(()))), "it outlives the lease");
}

/// With `/sys/fs/bpf` read-only and the two capabilities that the chart gives, as in its DaemonSet.
#[tokio::test]
async fn the_rights_of_the_chart_are_enough() {
    let Some(mut world) = World::start("nodeLocal: kernel with few rights").await else { return };
    if !Path::new("/usr/bin/setpriv").exists() {
        println!("skipped: setpriv is missing");
        return;
    }
    let line = "mount --bind /sys/fs/bpf /sys/fs/bpf && mount -o remount,bind,ro /sys/fs/bpf && exec setpriv \
                --bounding-set -all,+sys_admin,+net_admin --no-new-privs \"$@\"";
    world.cluster.options = world.cluster.options.clone().wrapper(&[
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        line,
        "sh",
    ]);
    world.cluster.run("a").await;
    let [client, _, web] = PODS.map(|name| world.cluster.pod(name).clone());
    let _server = serve(&web, PORT);
    let mut open = past(world.ztunnel(), &client, SocketAddr::new(web.ipv4.into(), PORT)).await;
    open.echo().await.unwrap();
    world.cluster.enforce(&policy("deny", Scope::Namespace, Action::Deny, principal("client"))).await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
}
