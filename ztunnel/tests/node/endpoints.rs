//! Which endpoint serves a connection: none that is dead, none that is not ready, near ones first.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use harness::netns::{Host, root_or_skip};
use tokio::task::JoinSet;

use crate::lab::manifests::{PodManifest, ServiceManifest, vips};
use crate::lab::traffic::{PORT, ask, serve};
use crate::lab::{Mesh, Options};

const WEB: u8 = 1;

fn web() -> ServiceManifest {
    ServiceManifest::new("web", WEB, 80, PORT)
}

/// Who answers, of so many connections one after the other.
async fn answering(client: &Host, times: usize) -> BTreeSet<String> {
    let to = SocketAddr::new(vips(WEB)[0], 80);
    let mut servers = BTreeSet::new();
    for _ in 0..times {
        servers.insert(ask(client, to).await.map_or_else(|e| e.kind().to_string(), |hello| hello.server));
    }
    servers
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

#[tokio::test]
async fn a_dead_endpoint_is_replaced_by_one_that_lives() {
    if !root_or_skip("dead endpoints") {
        return;
    }
    // No ztunnel runs on node c: what is there refuses tunnels.
    let mut mesh = Mesh::build(&[("a", &["client"]), ("b", &["web-1"]), ("c", &["web-2"])]);
    let hole: std::net::Ipv4Addr = [192, 0, 2, 1].into();
    // What the node forwards there vanishes without a word.
    mesh.node("a").shell(&format!("ip route add blackhole {hole}")).unwrap();
    mesh.put("services", &web().to_string());
    for node in ["a", "b"] {
        mesh.run(node, &Options::default()).await;
    }
    let _server = serve(mesh.pod("web-1"), PORT);
    let client = mesh.pod("client");
    assert_eq!(answering(client, 12).await, set(["web-1"]), "one of two refuses");

    let lost = PodManifest { name: "web-3".into(), addresses: vec![hole.into()], ..mesh.manifest("web-2") };
    mesh.apply("pod-web-3", &lost.to_string()).await;
    let mut clients = JoinSet::new();
    for _ in 0..12 {
        let client = client.clone();
        clients.spawn(async move { answering(&client, 1).await });
    }
    for servers in clients.join_all().await {
        assert_eq!(servers, set(["web-1"]), "one of three refuses and one is silent");
    }
    // The failures are remembered: nobody waits for it again and again.
    assert_eq!(answering(client, 12).await, set(["web-1"]));
}

#[tokio::test]
async fn only_ready_endpoints_serve() {
    if !root_or_skip("readiness of endpoints") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web-1", "web-2"])]).await;
    let _servers = [serve(mesh.pod("web-1"), PORT), serve(mesh.pod("web-2"), PORT)];
    mesh.apply("services", &web().to_string()).await;
    let client = mesh.pod("client");
    let ready = async |one: bool, two: bool| {
        for (name, ready) in [("web-1", one), ("web-2", two)] {
            mesh.apply(&format!("pod-{name}"), &mesh.manifest(name).ready(ready).to_string()).await;
        }
        answering(client, 20).await
    };
    assert_eq!(ready(true, true).await, set(["web-1", "web-2"]));
    assert_eq!(ready(true, false).await, set(["web-1"]));
    assert_eq!(ready(false, true).await, set(["web-2"]));
    assert_eq!(ready(false, false).await, set(["connection reset"]));
    let refused = mesh.ztunnel("a").last(|c| c["error"].is_string()).await;
    assert!(
        refused["error"].as_str().unwrap().contains("none of the service's 2 endpoints is ready"),
        "{refused}"
    );
    mesh.apply("services", &web().spec("publishNotReadyAddresses: true").to_string()).await;
    assert_eq!(answering(client, 20).await, set(["web-1", "web-2"]));
    // By its own address a pod is reached all the same.
    assert_eq!(
        ask(client, SocketAddr::new(mesh.pod("web-1").ipv4.into(), PORT)).await.unwrap().server,
        "web-1"
    );
}

#[tokio::test]
async fn near_endpoints_come_first_and_clients_stay_with_theirs() {
    if !root_or_skip("locality and affinity") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client", "web-1"]), ("b", &["web-2", "web-3", "distant"])]).await;
    let _servers = ["web-1", "web-2", "web-3"].map(|name| serve(mesh.pod(name), PORT));
    let (client, distant) = (mesh.pod("client"), mesh.pod("distant"));
    mesh.apply("services", &web().to_string()).await;
    assert_eq!(answering(client, 30).await, set(["web-1", "web-2", "web-3"]));

    mesh.apply("services", &web().spec("trafficDistribution: PreferClose").to_string()).await;
    assert_eq!(answering(client, 10).await, set(["web-1"]), "PreferClose");
    assert_eq!(answering(distant, 20).await, set(["web-2", "web-3"]), "PreferClose");
    mesh.apply("pod-web-1", &mesh.manifest("web-1").ready(false).to_string()).await;
    assert_eq!(answering(client, 20).await, set(["web-2", "web-3"]), "none is close");

    mesh.apply("services", &web().spec("internalTrafficPolicy: Local").to_string()).await;
    assert_eq!(answering(client, 5).await, set(["connection reset"]), "Local, and none is ready");
    mesh.apply("pod-web-1", &mesh.manifest("web-1").to_string()).await;
    assert_eq!(answering(client, 10).await, set(["web-1"]), "Local");

    mesh.apply("services", &web().spec("sessionAffinity: ClientIP").to_string()).await;
    let first = answering(client, 20).await;
    assert_eq!(first.len(), 1, "ClientIP: {first:?}");
    assert_eq!(answering(client, 20).await, first);
    let theirs = first.first().unwrap();
    mesh.apply(&format!("pod-{theirs}"), &mesh.manifest(theirs).ready(false).to_string()).await;
    let second = answering(client, 20).await;
    assert!(second.len() == 1 && second != first, "{first:?}, then {second:?}");
}

#[tokio::test]
async fn a_pod_whose_application_is_down_is_told_apart() {
    if !root_or_skip("a dead application") {
        return;
    }
    // The tunnel stands, the application does not listen: its node says so, and another pod serves.
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web-1", "web-2"])]).await;
    let _server = serve(mesh.pod("web-2"), PORT);
    mesh.apply("services", &web().to_string()).await;
    let client = mesh.pod("client");
    assert_eq!(answering(client, 12).await, set(["web-2"]));
    let direct = SocketAddr::new(mesh.pod("web-1").ipv4.into(), PORT);
    let _ = ask(client, direct).await.unwrap_err();
    let (a, b) = (mesh.ztunnel("a"), mesh.ztunnel("b"));
    let to = direct.to_string();
    let said = a.last(|c| c["destination"] == to.as_str()).await;
    assert!(said["error"].as_str().unwrap().contains("503"), "{said}");
    let said = b.last(|c| c["destination"] == to.as_str()).await;
    assert!(said["error"].as_str().unwrap().contains("refused"), "{said}");
}
