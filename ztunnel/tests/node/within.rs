//! Connections that stay on a node, not encrypted since the settings want it so: all else is as with a tunnel.

use std::net::SocketAddr;

use harness::netns::root_or_skip;
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lab::manifests::{ServiceManifest, join, mtls, namespace, node_local, policy, vips};
use crate::lab::traffic::{PORT, ask, dial, serve, serve_with, talk};
use crate::lab::{Mesh, Options, PATIENCE, eventually};

const VIP: u8 = 1;
const BULK: u16 = 9003;

/// Two pods on one node and one on another, STRICT, with what `options` add.
async fn mesh(options: &Options) -> Mesh {
    let nodes = [("a", &["client", "other", "web"][..]), ("b", &["far", "outside/old"])];
    let mut mesh = Mesh::build(&nodes);
    mesh.put("mesh", &node_local("direct"));
    mesh.put("mtls", &mtls("STRICT", None));
    mesh.put("web", &ServiceManifest::new("web", VIP, 80, PORT).to_string());
    for (node, _) in &nodes {
        mesh.run(node, options).await;
    }
    mesh
}

#[tokio::test]
async fn both_ends_see_and_tell_what_they_do_with_a_tunnel() {
    if root_or_skip("nodeLocal: direct") {
        as_with_a_tunnel(&Options::default()).await;
    }
}

#[tokio::test]
async fn captured_by_ebpf_they_do_too() {
    if !root_or_skip("nodeLocal: direct with eBPF") {
        return;
    }
    if let Err(missing) = capture::probe(capture::Backend::Ebpf, &capture::Tools::default()) {
        println!("skipped: {missing}");
        return;
    }
    as_with_a_tunnel(&Options::default().argument("--capture").argument("ebpf")).await;
}

#[tokio::test]
async fn an_address_that_is_not_the_pods_is_no_source() {
    if !root_or_skip("nodeLocal: direct from odd addresses") {
        return;
    }
    if let Err(missing) = capture::probe(capture::Backend::Ebpf, &capture::Tools::default()) {
        println!("skipped: {missing}");
        return;
    }
    let mesh = mesh(&Options::default().argument("--capture").argument("ebpf")).await;
    let _server = serve(mesh.pod("web"), PORT);
    let client = mesh.pod("client");
    // Capture's route leads to this device, so the kernel lets a pod come from there, where it would refuse otherwise.
    for (from, v6) in [("127.0.0.1:0", false), ("[::1]:0", true)] {
        let source = Some(from.parse().unwrap());
        let options = net::ConnectOptions { source, mark: None, keepalive: None, ..Default::default() };
        let to = SocketAddr::new(mesh.pod("web").ip(v6), PORT);
        if let Ok(mut open) = net::connect(&client.netns, &options, to, PATIENCE).await {
            let mut hello = [0; 1];
            let said = open.read(&mut hello).await;
            assert!(matches!(said, Ok(0) | Err(_)), "from {from} it was let in");
        }
    }
    let list = mesh.ztunnel("a").connections().await;
    let all = ["open", "ended"].iter().flat_map(|of| list[of].as_array().unwrap());
    assert!(all.clone().all(|c| c["carrier"] != "node-local"), "{list}");
    // From its own address it is.
    ask(client, SocketAddr::new(mesh.pod("web").ipv4.into(), PORT)).await.unwrap();
    mesh.ztunnel("a").last(|c| c["carrier"] == "node-local").await;
}

async fn as_with_a_tunnel(options: &Options) {
    let mesh = mesh(options).await;
    let _servers = ["web", "far"].map(|name| serve(mesh.pod(name), PORT));
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let a = mesh.ztunnel("a");
    let before = a.metric("istio_tcp_sent_bytes_total").await;
    for v6 in [false, true] {
        let pod = SocketAddr::new(web.ip(v6), PORT);
        let service = SocketAddr::new(vips(VIP)[usize::from(v6)], 80);
        for to in [pod, service] {
            let mut open = talk(client, to).await.unwrap();
            assert_eq!((open.hello.client.ip(), open.hello.reached), (client.ip(v6), pod), "{to}");
            open.echo().await.unwrap();
            let list = a.connections().await;
            let list = list["open"].as_array().unwrap();
            let of = |direction: &str| list.iter().find(|c| c["direction"] == direction).unwrap();
            for view in ["outbound", "inbound"].map(of) {
                assert_eq!(view["carrier"], "node-local", "{view}");
                assert_eq!(view["source_identity"], "spiffe://cluster.local/ns/shop/sa/client", "{view}");
                assert_eq!(view["destination_identity"], "spiffe://cluster.local/ns/shop/sa/web", "{view}");
            }
            assert!(of("inbound")["decision"].as_str().unwrap().starts_with("allowed"), "{list:?}");
            assert_eq!(list.len(), 2, "{list:?}");
            drop(open);
            eventually("it has ended", async || a.metric("istio_tcp_sockets_open").await == 0.0).await;
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
    assert!(!metrics.contains("connection_security_policy=\"mutual_tls\""), "{metrics}");
    assert!(a.metric("istio_tcp_sent_bytes_total").await > before);
    let words =
        ["connection complete", "src.identity", "dst.identity", "node, not encrypted", "bytes_sent=15"];
    a.says(&words).await;
    // To the other node it is a tunnel still.
    ask(client, SocketAddr::new(mesh.pod("far").ipv4.into(), PORT)).await.unwrap();
    a.last(|c| c["carrier"] == "hbone").await;
}

#[tokio::test]
async fn what_is_no_longer_allowed_is_cut_while_it_flows() {
    if !root_or_skip("nodeLocal: direct and policies") {
        return;
    }
    let mesh = mesh(&Options::default()).await;
    let web = mesh.pod("web");
    let _server = serve(web, PORT);
    // Sends for as long as it is taken.
    let _source = serve_with(web, BULK, async |mut stream: tokio::net::TcpStream, _| {
        loop {
            stream.write_all(&[7; 64 << 10]).await?;
        }
    });
    let (client, other) = (mesh.pod("client"), mesh.pod("other"));
    let [to, bulk] = [PORT, BULK].map(|port| SocketAddr::new(web.ipv4.into(), port));
    let mut allowed = talk(other, to).await.unwrap();
    let mut flowing = dial(client, bulk).await.unwrap();
    flowing.read_exact(&mut vec![0; 8 << 20]).await.unwrap();

    let of_client = "from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]";
    mesh.apply("policy", &policy("deny", "DENY", "web", of_client)).await;
    let error = tokio::io::copy(&mut flowing, &mut tokio::io::sink()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    allowed.echo().await.unwrap();
    let _ = ask(client, to).await.unwrap_err();
    let a = mesh.ztunnel("a");
    for direction in ["inbound", "outbound"] {
        let cut =
            a.last(|c| c["direction"] == direction && c["bytes_received"].as_u64() > Some(1 << 20)).await;
        assert!(cut["error"].as_str().unwrap().starts_with("cut: denied by policy shop/deny"), "{cut}");
        let refused = a.last(|c| c["direction"] == direction && c["bytes_received"] == 0).await;
        assert!(refused["error"].as_str().unwrap().starts_with("denied by policy shop/deny"), "{refused}");
        assert_eq!(refused["carrier"], "node-local", "{refused}");
    }
    assert!(a.metric("istio_tcp_connections_failed_total").await >= 2.0);
    mesh.remove("policy").await;

    // An identity that is another's now.
    let mut open = talk(client, to).await.unwrap();
    let mut manifest = mesh.manifest("client");
    manifest.service_account = "second".into();
    mesh.apply("pod-client", &manifest.to_string()).await;
    open.end().await.unwrap_err();
    allowed.echo().await.unwrap();
    let now = talk(client, to).await;
    drop(now);
    a.last(|c| c["source_identity"] == "spiffe://cluster.local/ns/shop/sa/second").await;
}

#[tokio::test]
async fn the_setting_holds_from_when_it_is_made_and_for_whom_it_is() {
    if !root_or_skip("nodeLocal") {
        return;
    }
    let mesh = mesh(&Options::default()).await;
    let _server = serve(mesh.pod("web"), PORT);
    let client = mesh.pod("client");
    let to = SocketAddr::new(mesh.pod("web").ipv4.into(), PORT);
    let shop = |mode: &str| {
        let text = namespace("shop", true) + &format!("  annotations: {{culvert.dev/node-local: {mode}}}\n");
        join([text, namespace("outside", false)])
    };
    let a = mesh.ztunnel("a");
    let carrier = async || {
        let mut open = talk(client, to).await.unwrap();
        open.echo().await.unwrap();
        let list = a.connections().await;
        let last = list["open"].as_array().unwrap().iter().max_by_key(|c| c["id"].as_u64()).unwrap().clone();
        (open, last["carrier"].as_str().unwrap().to_owned())
    };
    let (mut open, how) = carrier().await;
    assert_eq!(how, "node-local");
    // The namespace's word goes before the mesh's, and ends what went as it was.
    mesh.apply("namespaces", &shop("encrypted")).await;
    open.end().await.unwrap_err();
    let cut = a.last(|c| c["carrier"] == "node-local").await;
    assert!(cut["error"].as_str().unwrap().contains("to be encrypted now"), "{cut}");
    let (mut tunnelled, how) = carrier().await;
    assert_eq!(how, "hbone");
    // What is encrypted may stay so.
    mesh.apply("namespaces", &shop("direct")).await;
    tunnelled.echo().await.unwrap();
    assert_eq!(carrier().await.1, "node-local");
    mesh.apply("mesh", &node_local("encrypted")).await;
    assert_eq!(carrier().await.1, "node-local");
    // A value that can't be read is said, and opens nothing: not even where the mesh's word is to go directly.
    let (mut open, _) = carrier().await;
    mesh.apply("mesh", &node_local("direct")).await;
    mesh.put("namespaces", &shop("maybe"));
    eventually("it is said", async || {
        let dump = a.config_dump().await;
        dump["diagnostics"]
            .as_array()
            .unwrap()
            .iter()
            .any(|d| d["message"].as_str().unwrap().contains("node-local"))
    })
    .await;
    open.end().await.unwrap_err();
    assert_eq!(carrier().await.1, "hbone");
    let dump = a.config_dump().await;
    assert_eq!(dump["settings"]["nodeLocal"], "direct");
    assert_eq!(dump["settings"]["nodeLocalOfNamespaces"]["shop"], "encrypted");
}

#[tokio::test]
async fn killed_it_fails_closed_and_its_successor_joins_again() {
    if !root_or_skip("nodeLocal: direct and kill -9") {
        return;
    }
    let mut mesh = mesh(&Options::default()).await;
    let (client, web) = (mesh.pod("client").clone(), mesh.pod("web").clone());
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut open = talk(&client, to).await.unwrap();
    mesh.ztunnel_mut("a").signal(Signal::SIGKILL);
    mesh.ztunnel_mut("a").ended().await;
    let _ = open.end().await;
    assert!(open.echo().await.is_err());
    let _ = ask(&client, to).await.unwrap_err();
    mesh.run("a", &Options::default()).await;
    assert_eq!(ask(&client, to).await.unwrap().client.ip(), client.ipv4);
    mesh.ztunnel("a").last(|c| c["carrier"] == "node-local").await;
}

#[tokio::test]
async fn an_application_that_is_not_there_refuses_and_another_endpoint_is_tried() {
    if !root_or_skip("nodeLocal: direct without a server") {
        return;
    }
    let mesh = mesh(&Options::default()).await;
    let client = mesh.pod("client");
    let _ = ask(client, SocketAddr::new(mesh.pod("web").ipv4.into(), PORT)).await.unwrap_err();
    let a = mesh.ztunnel("a");
    for direction in ["inbound", "outbound"] {
        let refused = a.last(|c| c["direction"] == direction).await;
        assert!(refused["error"].as_str().unwrap().contains("refused"), "{refused}");
    }
    // The service has a second one, on the other node.
    let mut far = mesh.manifest("far");
    far.app = "web".into();
    mesh.apply("pod-far", &far.to_string()).await;
    let _server = serve(mesh.pod("far"), PORT);
    for _ in 0..8 {
        let hello = ask(client, SocketAddr::new(vips(VIP)[0], 80)).await.unwrap();
        assert_eq!(hello.server, "far");
    }
}
