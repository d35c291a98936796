//! Connections that pass by the kernel's verdict, with no proxy on their path: all that is seen of them, and their end.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use harness::netns::{Host, root_or_skip};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::lab::manifests::{ServiceManifest, join, mtls, namespace, node_local, policy, vips};
use crate::lab::traffic::{PORT, Talk, ask, serve, serve_with, talk};
use crate::lab::{Mesh, Options, eventually};

pub const VIP: u8 = 1;
const BULK: u16 = 9003;
/// The longest that a verdict outlives its ztunnel, and some.
const LEASE: Duration = Duration::from_secs(5);
/// What is no longer allowed has been reset within this, also on a machine with much to do. A lease that ran out resets nothing.
pub const CUT: Duration = Duration::from_secs(5);
/// What does not pass has not passed after this.
const SOON: Duration = Duration::from_secs(1);

/// Whether verdicts can be kept here.
pub fn or_skip(what: &str) -> bool {
    if !root_or_skip(what) {
        return false;
    }
    if let Err(missing) = capture::probe(capture::Backend::Ebpf, &capture::Tools::default()) {
        println!("skipped: {what}: {missing}");
        return false;
    }
    true
}

pub fn options() -> Options {
    Options::default().argument("--capture").argument("ebpf")
}

/// Three pods on a node, STRICT.
async fn mesh() -> Mesh {
    mesh_with(&options()).await
}

async fn mesh_with(options: &Options) -> Mesh {
    let mut mesh = Mesh::build(&[("a", &["client", "other", "web"])]);
    mesh.put("mesh", &node_local("kernel"));
    mesh.put("mtls", &mtls("STRICT", None));
    mesh.put("web", &ServiceManifest::new("web", VIP, 80, PORT).to_string());
    mesh.run("a", options).await;
    mesh
}

/// Where the node's programs and maps are.
fn directory(mesh: &Mesh) -> PathBuf {
    ebpf::Pins::of_others(ebpf::bpf_file_system()).of_node(&mesh.node("a").netns).verdicts()
}

/// Waits until a connection passes after the pods were captured anew, which they are not all at once.
async fn past_again(mesh: &Mesh, from: &Host, to: SocketAddr) {
    eventually("a connection passes by a verdict again", async || {
        let Ok(open) = talk(from, to).await else { return false };
        told(mesh, "open", &open).await.iter().any(|c| c["carrier"] == "kernel")
    })
    .await;
}

/// Waits as long as it takes until pairs that nothing leads to are forgotten.
async fn forgotten(mut check: impl AsyncFnMut() -> bool) {
    for _ in 0..60 {
        if check().await {
            return;
        }
        sleep(Duration::from_secs(1)).await;
    }
    panic!("it is not so after a minute");
}

fn list<'a>(connections: &'a Value, of: &str) -> &'a Vec<Value> {
    connections[of].as_array().unwrap()
}

/// The open connection as ztunnel tells of it: what is told of its client's port.
pub async fn told(mesh: &Mesh, of: &str, open: &Talk) -> Vec<Value> {
    let connections = mesh.ztunnel("a").connections().await;
    let source = open.local.to_string();
    list(&connections, of).iter().filter(|c| c["source"] == source.as_str()).cloned().collect()
}

/// Connects until ztunnel is not on the path any more.
pub async fn past(mesh: &Mesh, from: &Host, to: SocketAddr) -> Talk {
    let mut found = None;
    eventually("a connection passes by a verdict", async || {
        let open = talk(from, to).await.unwrap();
        let views = told(mesh, "open", &open).await;
        let passes = !views.is_empty() && views.iter().all(|c| c["carrier"] == "kernel");
        found = Some(open);
        passes
    })
    .await;
    found.unwrap()
}

pub fn of<'a>(views: &'a [Value], direction: &str) -> &'a Value {
    views.iter().find(|c| c["direction"] == direction).unwrap_or_else(|| panic!("{direction}: {views:?}"))
}

/// How many connections of the pod capture gave to ztunnel.
pub async fn captured(mesh: &Mesh, pod: &str) -> u64 {
    let dump = mesh.ztunnel("a").config_dump().await;
    let pods = dump["pods"].as_array().unwrap();
    let pod = pods.iter().find(|p| p["name"] == pod).unwrap();
    pod["captureCounters"]["captured_outbound"].as_u64().unwrap_or_else(|| panic!("{pod}"))
}

#[tokio::test]
async fn later_connections_pass_by_and_are_seen_all_the_same() {
    if !or_skip("nodeLocal: kernel") {
        return;
    }
    let mesh = mesh().await;
    let (client, web, a) = (mesh.pod("client"), mesh.pod("web"), mesh.ztunnel("a"));
    let _server = serve(web, PORT);
    for v6 in [false, true] {
        let pod = SocketAddr::new(web.ip(v6), PORT);
        let service = SocketAddr::new(vips(VIP)[usize::from(v6)], 80);
        for to in [pod, service] {
            // ztunnel carries the first.
            let first = talk(client, to).await.unwrap();
            let views = told(&mesh, "open", &first).await;
            assert!(
                !views.is_empty() && views.iter().all(|c| c["carrier"] == "node-local"),
                "{to}: {views:?}"
            );
            drop(first);
            let mut open = past(&mesh, client, to).await;
            let before = captured(&mesh, "client").await;
            assert_eq!((open.hello.client, open.hello.reached), (open.local, pod), "{to}");
            assert_eq!(net::canonical(open.stream.get_ref().peer_addr().unwrap()), to);
            open.echo().await.unwrap();
            let views = told(&mesh, "open", &open).await;
            for view in ["outbound", "inbound"].map(|direction| of(&views, direction)) {
                assert_eq!(view["source_identity"], "spiffe://cluster.local/ns/shop/sa/client", "{view}");
                assert_eq!(view["destination_identity"], "spiffe://cluster.local/ns/shop/sa/web", "{view}");
                assert_eq!(view["bytes_sent"], 15, "{view}");
            }
            assert_eq!(views.len(), 2, "{views:?}");
            assert_eq!(of(&views, "outbound")["destination"], to.to_string().as_str());
            assert!(of(&views, "inbound")["decision"].as_str().unwrap().starts_with("allowed"), "{views:?}");
            // Others pass too, and none of them came to ztunnel.
            for _ in 0..5 {
                ask(client, to).await.unwrap();
            }
            assert_eq!(captured(&mesh, "client").await, before, "{to}");
        }
    }
    let metrics = a.get(15020, "/metrics").await.unwrap();
    for reporter in ["source", "destination"] {
        let counts = |l: &&str| {
            l.starts_with("istio_tcp_connections_opened_total{")
                && l.contains(&format!("reporter=\"{reporter}\""))
                && l.contains("connection_security_policy=\"node_local\"")
                && l.contains("source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"")
        };
        assert!(metrics.lines().any(|l| counts(&l)), "{reporter}:\n{metrics}");
    }
    a.says(&["connection complete", "src.identity", "kernel's verdict", "bytes_sent=15"]).await;
    eventually("all have ended", async || a.metric("culvert_verdict_sockets_open").await == 0.0).await;
}

#[tokio::test]
async fn bytes_are_counted_exactly() {
    if !or_skip("counts of nodeLocal: kernel") {
        return;
    }
    const UP: usize = 3_000_017;
    const DOWN: usize = 5_000_011;
    let mesh = mesh().await;
    let (client, web, a) = (mesh.pod("client"), mesh.pod("web"), mesh.ztunnel("a"));
    let _server = serve_with(web, BULK, async |mut stream: TcpStream, _| {
        stream.write_all(b"web 0.0.0.0:1 0.0.0.0:1\n").await?;
        let mut got = vec![0; UP];
        stream.read_exact(&mut got).await?;
        stream.write_all(&vec![7; DOWN]).await?;
        stream.shutdown().await
    });
    let hello = b"web 0.0.0.0:1 0.0.0.0:1\n".len();
    let to = SocketAddr::new(web.ipv4.into(), BULK);
    // From the client, as Istio has it.
    let sum = async || a.metric("istio_tcp_received_bytes_total").await;
    let mut open = past(&mesh, client, to).await;
    eventually("the others have ended", async || a.metric("istio_tcp_sockets_open").await == 2.0).await;
    let before = sum().await;
    open.stream.write_all(&vec![1; UP]).await.unwrap();
    let mut got = Vec::new();
    open.stream.read_to_end(&mut got).await.unwrap();
    assert_eq!(got.len(), DOWN);
    open.stream.shutdown().await.unwrap();
    drop(open.stream);
    eventually("it has ended", async || a.metric("istio_tcp_sockets_open").await == 0.0).await;
    let source = open.local.to_string();
    let connections = a.connections().await;
    let views: Vec<_> =
        list(&connections, "ended").iter().filter(|c| c["source"] == source.as_str()).collect();
    assert_eq!(views.len(), 2, "{views:?}");
    for view in views {
        assert_eq!(
            (view["bytes_sent"].as_u64(), view["bytes_received"].as_u64()),
            (Some(UP as u64), Some((DOWN + hello) as u64)),
            "{view}"
        );
        assert!(view["error"].is_null(), "{view}");
    }
    // Both reporters count.
    assert_eq!(sum().await - before, 2.0 * UP as f64);
}

#[tokio::test]
async fn what_is_no_longer_allowed_ends_and_what_is_goes_on() {
    if !or_skip("revocation of nodeLocal: kernel") {
        return;
    }
    let mesh = mesh().await;
    let (client, other, web) = (mesh.pod("client"), mesh.pod("other"), mesh.pod("web"));
    let _server = serve(web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let a = mesh.ztunnel("a");
    let mut allowed = past(&mesh, other, to).await;
    let mut open = past(&mesh, client, to).await;
    let of_client = "from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]";
    mesh.apply("policy", &policy("deny", "DENY", "web", of_client)).await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    allowed.echo().await.unwrap();
    let _ = ask(client, to).await.unwrap_err();
    allowed.echo().await.unwrap();
    eventually("its end is told", async || told(&mesh, "ended", &open).await.len() == 2).await;
    for view in told(&mesh, "ended", &open).await {
        assert!(view["error"].as_str().unwrap().starts_with("cut: denied by policy shop/deny"), "{view}");
        assert_eq!(view["carrier"], "kernel", "{view}");
    }
    let refused = a.last(|c| c["direction"] == "inbound" && c["carrier"] == "node-local").await;
    assert!(refused["error"].as_str().unwrap().starts_with("denied by policy shop/deny"), "{refused}");
    mesh.remove("policy").await;

    // An identity that is another's now.
    let mut open = past(&mesh, client, to).await;
    let mut manifest = mesh.manifest("client");
    manifest.service_account = "second".into();
    mesh.apply("pod-client", &manifest.to_string()).await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    allowed.echo().await.unwrap();
    let open = past(&mesh, client, to).await;
    for view in told(&mesh, "open", &open).await {
        assert_eq!(view["source_identity"], "spiffe://cluster.local/ns/shop/sa/second", "{view}");
    }

    // Who leaves the mesh leaves with what it has.
    let mut open = past(&mesh, client, to).await;
    mesh.apply("pod-client", "").await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    allowed.echo().await.unwrap();
    assert_eq!(a.metric("culvert_verdict_stuck").await, 0.0);
}

#[tokio::test]
async fn the_setting_and_what_is_behind_a_service_decide_what_passes() {
    if !or_skip("settings of nodeLocal: kernel") {
        return;
    }
    let mesh = mesh().await;
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _servers = [serve(web, PORT), serve(mesh.pod("other"), PORT)];
    let [pod, service] = [SocketAddr::new(web.ipv4.into(), PORT), SocketAddr::new(vips(VIP)[0], 80)];
    let carrier = async |to: SocketAddr| {
        let open = talk(client, to).await.unwrap();
        let views = told(&mesh, "open", &open).await;
        (open, of(&views, "outbound")["carrier"].as_str().unwrap().to_owned())
    };
    // Of several endpoints where a client keeps its own, ztunnel knows which. What is open stays.
    let mut open = past(&mesh, client, service).await;
    let mut second = mesh.manifest("other");
    second.app = "web".into();
    let kept = ServiceManifest::new("web", VIP, 80, PORT).spec("sessionAffinity: ClientIP");
    mesh.apply("web", &kept.to_string()).await;
    mesh.apply("pod-other", &second.to_string()).await;
    // The generation is told of a moment before verdicts are judged by it.
    eventually("it is a choice", async || carrier(service).await.1 == "node-local").await;
    for _ in 0..3 {
        assert_eq!(carrier(service).await.1, "node-local");
    }
    open.echo().await.unwrap();
    mesh.apply("pod-other", &mesh.manifest("other").to_string()).await;
    drop(past(&mesh, client, service).await);
    // Less than both want is not done.
    let shop = |mode: &str| {
        let text = namespace("shop", true) + &format!("  annotations: {{culvert.dev/node-local: {mode}}}\n");
        join([text, namespace("outside", false)])
    };
    let mut direct = past(&mesh, client, pod).await;
    mesh.apply("namespaces", &shop("direct")).await;
    eventually("ztunnel carries them", async || carrier(pod).await.1 == "node-local").await;
    for _ in 0..3 {
        assert_eq!(carrier(pod).await.1, "node-local");
    }
    direct.echo().await.unwrap();
    open.echo().await.unwrap();
    mesh.apply("namespaces", &shop("encrypted")).await;
    timeout(CUT, direct.end()).await.expect("it goes on").unwrap_err();
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    assert_eq!(carrier(pod).await.1, "hbone");
    mesh.apply("namespaces", &shop("kernel")).await;
    drop(past(&mesh, client, pod).await);
}

#[tokio::test]
async fn a_ztunnel_that_is_gone_leaves_nothing_that_passes_and_its_successor_begins_anew() {
    if !or_skip("nodeLocal: kernel and kill -9") {
        return;
    }
    let mut mesh = mesh().await;
    let (client, web) = (mesh.pod("client").clone(), mesh.pod("web").clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    // What is left is of a later generation than the one that the successor begins with.
    let mut revoked = past(&mesh, mesh.pod("other"), to).await;
    let of_other = "from: [{source: {principals: [cluster.local/ns/shop/sa/other]}}]";
    mesh.apply("policy", &policy("deny", "DENY", "web", of_other)).await;
    timeout(CUT, revoked.end()).await.expect("it goes on").unwrap_err();
    let mut open = past(&mesh, &client, to).await;
    open.echo().await.unwrap();
    mesh.ztunnel_mut("a").signal(Signal::SIGKILL);
    mesh.ztunnel_mut("a").ended().await;
    sleep(LEASE).await;
    assert!(!matches!(timeout(SOON, open.echo()).await, Ok(Ok(()))), "it outlives the lease");
    let refused = timeout(SOON, ask(&client, to)).await;
    assert!(!matches!(refused, Ok(Ok(_))), "a new connection passes: {refused:?}");
    mesh.run("a", &options()).await;
    // What the old one allowed has ended.
    open.end().await.unwrap_err();
    assert_eq!(ask(&client, to).await.unwrap().client.ip(), client.ipv4);
    let mut open = past(&mesh, &client, to).await;
    open.echo().await.unwrap();
    // One that stops in good order ends what passes.
    mesh.ztunnel_mut("a").signal(Signal::SIGTERM);
    mesh.ztunnel("a").says(&["draining", "SIGTERM"]).await;
    open.echo().await.unwrap();
    drop(open);
    mesh.ztunnel_mut("a").ended().await;
    let _ = timeout(SOON, ask(&client, to)).await.map(|refused| refused.unwrap_err());
}

#[tokio::test]
async fn what_a_ztunnel_left_is_ended_by_a_successor_that_wants_no_verdicts() {
    if !or_skip("nodeLocal: kernel, kill -9 and no more of it") {
        return;
    }
    let mut mesh = mesh().await;
    let (client, web) = (mesh.pod("client").clone(), mesh.pod("web").clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut open = past(&mesh, &client, to).await;
    mesh.ztunnel_mut("a").signal(Signal::SIGKILL);
    mesh.ztunnel_mut("a").ended().await;
    mesh.put("mesh", &node_local("direct"));
    mesh.run("a", &options()).await;
    timeout(CUT, open.end()).await.expect("it goes on").unwrap_err();
    let directory = directory(&mesh);
    eventually("nothing is left", async || !directory.exists()).await;
    // Also where nothing captures: the pair's addresses are free.
    assert_eq!(ask(&client, to).await.unwrap().client.ip(), client.ipv4);
    mesh.apply("pod-client", "").await;
    mesh.remove("mtls").await;
    assert_eq!(ask(&client, to).await.unwrap().client.ip(), client.ipv4);
}

#[tokio::test]
async fn an_address_that_is_not_the_pods_is_no_source_of_a_pair() {
    if !or_skip("spoofing under nodeLocal: kernel") {
        return;
    }
    let mesh = mesh().await;
    let (client, other, web) = (mesh.pod("client"), mesh.pod("other"), mesh.pod("web"));
    let _server = serve(web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut open = past(&mesh, client, to).await;
    let of_client = "from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]";
    mesh.apply("policy", &policy("only", "ALLOW", "web", of_client)).await;
    // With the marks that lead past capture, and as one that is allowed.
    for mark in [None, Some(0x538), Some(0x53a), Some(0x539)] {
        let source = Some(SocketAddr::new(client.ipv4.into(), 0));
        let options = net::ConnectOptions { source, mark, keepalive: None, ..Default::default() };
        if let Ok(mut stream) = net::connect(&other.netns, &options, to, SOON).await {
            let mut hello = [0; 1];
            let said = timeout(SOON, stream.read(&mut hello)).await;
            assert!(!matches!(said, Ok(Ok(1))), "with the mark {mark:?} it was let in");
        }
    }
    open.echo().await.unwrap();
    let _ = ask(other, to).await.unwrap_err();
}

#[tokio::test]
async fn programs_that_nobody_wants_any_more_are_taken_away_once_nothing_passes() {
    if !or_skip("the end of nodeLocal: kernel") {
        return;
    }
    let mesh = mesh().await;
    let (client, web, a) = (mesh.pod("client"), mesh.pod("web"), mesh.ztunnel("a"));
    let _server = serve(web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let is_attached = async || a.config_dump().await["verdicts"]["attached"] == true;
    let mut open = past(&mesh, client, to).await;
    mesh.apply("mesh", &node_local("direct")).await;
    sleep(LEASE).await;
    open.echo().await.unwrap();
    assert!(is_attached().await, "a connection passes by them");
    drop(open);
    forgotten(async || !is_attached().await).await;
    let directory = directory(&mesh);
    assert!(!directory.exists(), "{}", directory.display());
    assert_eq!(ask(client, to).await.unwrap().client.ip(), client.ipv4);
    let mut carried = talk(client, to).await.unwrap();
    mesh.apply("mesh", &node_local("kernel")).await;
    past_again(&mesh, client, to).await;
    assert!(directory.exists());
    carried.echo().await.unwrap();
}

#[tokio::test]
async fn what_could_not_be_taken_away_is_no_obstacle_to_what_comes() {
    if !or_skip("an end of nodeLocal: kernel that fails") {
        return;
    }
    let mesh = mesh().await;
    let (client, web, a) = (mesh.pod("client"), mesh.pod("web"), mesh.ztunnel("a"));
    let _server = serve(web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    drop(past(&mesh, client, to).await);
    // What something is mounted on can't be removed.
    let mounted = Mounted::on(directory(&mesh).join("mounted"));
    mesh.apply("mesh", &node_local("direct")).await;
    forgotten(async || a.log().contains("programs of verdicts can't be taken away")).await;
    assert_eq!(ask(client, to).await.unwrap().client.ip(), client.ipv4);
    drop(mounted);
    mesh.apply("mesh", &node_local("kernel")).await;
    past_again(&mesh, client, to).await;
}

/// A file system that is mounted while this lives.
struct Mounted(PathBuf);

impl Mounted {
    fn on(path: PathBuf) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let mut mount = Command::new("mount");
        assert!(mount.args(["-t", "tmpfs", "none"]).arg(&path).status().unwrap().success());
        Self(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[tokio::test]
async fn a_ztunnel_that_cleans_up_leaves_no_programs() {
    if !or_skip("the clean-up of nodeLocal: kernel") {
        return;
    }
    let mut mesh = mesh_with(&options().argument("--cleanup")).await;
    let (client, web) = (mesh.pod("client").clone(), mesh.pod("web").clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    drop(past(&mesh, &client, to).await);
    assert!(directory(&mesh).exists());
    mesh.ztunnel_mut("a").signal(Signal::SIGTERM);
    mesh.ztunnel_mut("a").ended().await;
    assert!(!directory(&mesh).exists());
    assert_eq!(ask(&client, to).await.unwrap().client.ip(), client.ipv4);
}
