//! Pods come into the mesh and leave it while their connections live.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;

use harness::netns::{Host, root_or_skip};
use net::sock_diag;
use nix::sys::signal::Signal;

use crate::lab::manifests::{mtls, namespace};
use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Mesh, Options, eventually};

const MODE: &str = "istio.io/dataplane-mode";

fn address(host: &Host, port: u16) -> SocketAddr {
    SocketAddr::new(host.ipv4.into(), port)
}

/// All that the network of a pod can be told apart by. But for link-local addresses: the kernel may add them late.
fn network(host: &Host) -> String {
    let all = host.shell("nft list ruleset; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip addr; sysctl -a 2>/dev/null | grep '^net' | grep -v -e rss_key -e nf_conntrack_count -e stable_secret").unwrap();
    all.lines().filter(|line| !line.contains("fe80:")).map(|line| format!("{line}\n")).collect()
}

#[tokio::test]
async fn connections_from_before_the_enrolment_go_on_until_strict() {
    if !root_or_skip("connections from before the enrolment") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web", "outside/old"])]).await;
    let _servers = [serve(mesh.pod("web"), PORT), serve(mesh.pod("old"), PORT)];
    let (web, old) = (mesh.pod("web"), mesh.pod("old"));
    let out = mesh.manifest("web").label(MODE, "none").to_string();
    let enrolled = async |so: bool| {
        eventually("the pod's capture is as its manifest says", async || {
            // Under STRICT it is refused then.
            let direct = talk(old, address(web, PORT)).await;
            direct.is_ok_and(|talk| talk.hello.client == talk.local) != so
        })
        .await;
    };
    for v6 in [false, true] {
        mesh.apply("pod-web", &out).await;
        enrolled(false).await;
        let mut inbound = talk(old, SocketAddr::new(web.ip(v6), PORT)).await.unwrap();
        let mut outbound = talk(web, SocketAddr::new(old.ip(v6), PORT)).await.unwrap();
        assert_eq!(inbound.hello.client, inbound.local, "ztunnel is not on the way");

        mesh.apply("pod-web", &mesh.manifest("web").to_string()).await;
        enrolled(true).await;
        for talk in [&mut inbound, &mut outbound] {
            talk.echo().await.unwrap();
        }
        // The redirection is there a moment before it is listed.
        eventually("the pod is listed as enrolled", async || {
            mesh.ztunnel("b").capture("web").await["state"] == "enrolled"
        })
        .await;
        let capture = mesh.ztunnel("b").capture("web").await;
        for (direction, peer) in [("inbound", inbound.local), ("outbound", outbound.hello.reached)] {
            let listed = capture["connectionsFromBefore"].as_array().unwrap();
            let found = listed.iter().any(|c| c["direction"] == direction && c["peer"] == peer.to_string());
            assert!(found, "{direction} with {peer} is not in {listed:?}");
        }
        // The last connection that asked whether the capture is off may be listed, and end in between.
        eventually("those that are listed are counted", async || {
            let capture = mesh.ztunnel("b").capture("web").await;
            let listed = capture["connectionsFromBefore"].as_array().map_or(0, Vec::len);
            let counted = mesh.ztunnel("b").metric("culvert_connections_before_enrolment").await;
            listed >= 2 && counted == listed as f64
        })
        .await;

        mesh.apply("mtls", &mtls("STRICT", None)).await;
        inbound.end().await.unwrap_err();
        // Where it goes to is outside the mesh, and takes plaintext.
        outbound.echo().await.unwrap();

        // Enrolled into STRICT, it is cut at once.
        mesh.apply("pod-web", &out).await;
        enrolled(false).await;
        let mut inbound = talk(old, SocketAddr::new(web.ip(v6), PORT)).await.unwrap();
        mesh.apply("pod-web", &mesh.manifest("web").to_string()).await;
        inbound.end().await.unwrap_err();
        mesh.remove("mtls").await;
    }
}

#[tokio::test]
async fn excluded_traffic_goes_past() {
    if !root_or_skip("exclusions") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web", "outside/old", "outside/older"])]).await;
    let (client, web, old, older) = (mesh.pod("client"), mesh.pod("web"), mesh.pod("old"), mesh.pod("older"));
    let _servers =
        [serve(web, PORT), serve(web, 9090), serve(old, PORT), serve(old, 9091), serve(older, PORT)];
    let annotate = |name: &str, list: &[(&str, String)]| {
        let prefix = "traffic.sidecar.istio.io/";
        let manifest = list
            .iter()
            .fold(mesh.manifest(name), |m, (key, value)| m.annotation(&format!("{prefix}{key}"), value));
        manifest.to_string()
    };
    mesh.apply("pod-web", &annotate("web", &[("excludeInboundPorts", "9000-9100".into())])).await;
    let ranges = format!("{}/32", old.ipv4);
    let list = [
        ("excludeOutboundPorts", "9090".into()),
        ("excludeOutboundIPRanges", ranges),
        ("includeOutboundPorts", "9091".into()),
    ];
    mesh.apply("pod-client", &annotate("client", &list)).await;
    mesh.apply("mtls", &mtls("STRICT", None)).await;
    // A connection that ztunnel carries has another port of the client's address at the server.
    let past = async |from: &Host, to: SocketAddr| {
        let talk = talk(from, to).await.ok()?;
        assert_eq!(talk.hello.client.ip(), talk.local.ip());
        Some(talk.hello.client == talk.local)
    };
    // The redirection is replaced in place; until then it is the old one.
    eventually("the new exclusions hold", async || past(client, address(old, PORT)).await == Some(true))
        .await;
    eventually("the new exclusions hold", async || past(old, address(web, 9090)).await == Some(true)).await;
    assert_eq!(past(client, address(web, 9090)).await, Some(true), "both leave it alone");
    assert_eq!(past(client, address(old, 9091)).await, Some(false), "included by its port");
    assert_eq!(past(client, address(older, PORT)).await, Some(false), "nothing excludes it");
    assert_eq!(past(client, address(web, PORT)).await, Some(false), "nothing excludes it");
    assert_eq!(past(old, address(web, PORT)).await, None, "STRICT, and nothing excludes it");
}

#[tokio::test]
async fn a_pod_that_leaves_keeps_its_open_connections() {
    if !root_or_skip("un-enrolment") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web", "outside/old"])]).await;
    let (client, web, old) = (mesh.pod("client"), mesh.pod("web"), mesh.pod("old"));
    let _server = serve(web, PORT);
    let mut open =
        [talk(client, address(web, PORT)).await.unwrap(), talk(old, address(web, PORT)).await.unwrap()];

    for round in ["once", "again"] {
        mesh.apply("namespaces", &namespace("shop", false)).await;
        for from in [client, old] {
            eventually("new connections go past ztunnel", async || {
                talk(from, address(web, PORT)).await.is_ok_and(|talk| talk.hello.client == talk.local)
            })
            .await;
        }
        for talk in &mut open {
            talk.echo().await.unwrap_or_else(|e| panic!("{round}: {:?} is lost: {e}", talk.hello));
        }
        if round == "again" {
            break;
        }
        mesh.apply("namespaces", &namespace("shop", true)).await;
        eventually("both are in the mesh again", async || {
            talk(client, address(web, PORT)).await.is_ok_and(|talk| talk.hello.client != talk.local)
                && talk(old, address(web, PORT)).await.is_ok_and(|talk| talk.hello.client != talk.local)
        })
        .await;
        for talk in &mut open {
            talk.echo().await.unwrap();
        }
    }
    // What they need is there as long as they are.
    drop(open);
    for host in [client, web] {
        eventually("nothing of the redirection is left", async || {
            host.shell("nft list ruleset").unwrap().is_empty()
        })
        .await;
    }
}

/// The HBONE connections of a namespace, in its state, whoever holds them.
fn tunnels_at(host: &Host) -> Vec<sock_diag::Connection> {
    let all = sock_diag::connections(&host.netns).unwrap();
    all.into_iter().filter(|c| c.local.port() == 15008 || c.peer.port() == 15008).collect()
}

#[tokio::test]
async fn peers_of_a_pod_that_leaves_give_up_their_tunnels() {
    if !root_or_skip("tunnels of a pod that leaves") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client"]), ("b", &["web"])]).await;
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _server = serve(web, PORT);
    let mut open = talk(client, address(web, PORT)).await.unwrap();
    assert_eq!((tunnels_at(client).len(), tunnels_at(web).len()), (1, 1));
    mesh.apply("pod-web", &mesh.manifest("web").label(MODE, "none").to_string()).await;
    mesh.ztunnel("b").says(&["pod leaves", "shop/web"]).await;
    open.echo().await.unwrap();
    assert_eq!(tunnels_at(web).len(), 1, "the tunnel of what is open goes on");
    drop(open);
    eventually("the tunnel is gone at both ends", async || {
        tunnels_at(client).is_empty() && tunnels_at(web).is_empty()
    })
    .await;
}

#[tokio::test]
async fn nothing_of_a_pod_that_is_gone_keeps_its_namespace() {
    if !root_or_skip("connections of a pod that is gone") {
        return;
    }
    let mesh = Mesh::start(&[("a", &["client", "near"]), ("b", &["web"])]).await;
    let (client, near, web) = (mesh.pod("client"), mesh.pod("near"), mesh.pod("web"));
    let servers = [serve(web, PORT), serve(client, PORT)];
    // In and out, over tunnels; one that is idle.
    ask(near, address(web, PORT)).await.unwrap();
    let _open =
        [talk(client, address(web, PORT)).await.unwrap(), talk(web, address(client, PORT)).await.unwrap()];
    assert_eq!(tunnels_at(web).len(), 3);
    // Its processes end, its device goes, and then the mesh hears of it.
    web.shell("ip link del eth0").unwrap();
    drop(servers);
    mesh.remove("pod-web").await;
    eventually("no connection holds the namespace", async || {
        sock_diag::connections(&web.netns).unwrap().is_empty()
    })
    .await;
    let left = mesh.ztunnel("b").metric("istio_tcp_sockets_open").await;
    assert!(left == 0.0, "{left} are open");
}

#[tokio::test]
async fn a_stop_with_cleanup_leaves_nothing_behind() {
    if !root_or_skip("clean-up") {
        return;
    }
    for backend in ["nftables", "iptables-nft", "iptables-legacy"] {
        let mut mesh = Mesh::build(&[("a", &["client", "web", "outside/old"])]);
        let pods = ["client", "web", "old"].map(|name| mesh.pod(name).clone());
        let _server = serve(&pods[1], PORT);
        let before = pods.clone().map(|pod| network(&pod));
        mesh.run("a", &Options::default().argument("--capture").argument(backend).argument("--cleanup"))
            .await;
        let through = talk(&pods[0], address(&pods[1], PORT)).await.unwrap();
        assert_ne!(through.hello.client, through.local, "{backend}: it is not captured");
        drop(through);
        for (pod, before) in pods.iter().zip(&before) {
            if pod.name == "old" {
                assert_same(&network(pod), before, "a pod outside the mesh");
            } else {
                assert_ne!(network(pod), *before, "{backend}: {}", pod.name);
            }
        }
        let ztunnel = mesh.ztunnel_mut("a");
        ztunnel.signal(Signal::SIGTERM);
        assert!(ztunnel.ended().await.success(), "{backend}");
        for (pod, before) in pods.iter().zip(&before) {
            let listed = if backend == "iptables-legacy" {
                pod.shell("iptables-legacy-save; ip6tables-legacy-save").unwrap()
            } else {
                String::new()
            };
            assert!(!listed.contains("-A "), "{backend}: {}: {listed}", pod.name);
            // iptables leaves the empty tables that it made, as it does for everybody.
            if backend == "nftables" {
                assert_same(&network(pod), before, &pod.name);
            }
        }
        let direct = talk(&pods[0], address(&pods[1], PORT)).await.unwrap();
        assert_eq!(direct.hello.client, direct.local, "{backend}: ztunnel is still on the way");
    }
}

/// As `assert_eq`, but shows only the lines that differ.
fn assert_same(after: &str, before: &str, what: &str) {
    let more: Vec<_> = after.lines().filter(|line| !before.lines().any(|l| l == *line)).collect();
    let less: Vec<_> = before.lines().filter(|line| !after.lines().any(|l| l == *line)).collect();
    assert!(more.is_empty() && less.is_empty(), "{what}: new {more:#?}, gone {less:#?}");
}

#[tokio::test]
async fn a_pod_whose_namespace_appears_later_is_enrolled_then() {
    if !root_or_skip("a late namespace") {
        return;
    }
    let mut mesh = Mesh::build(&[("a", &["client"]), ("b", &["web"])]);
    let late = mesh.dir().join("late");
    let mut manifest = mesh.manifest("web");
    let real = std::mem::replace(&mut manifest.netns, late.clone());
    mesh.put("pod-web", &manifest.to_string());
    mesh.run("a", &Options::default()).await;
    mesh.spawn("b", &Options::default());
    let (client, web) = (mesh.pod("client"), mesh.pod("web"));
    let _server = serve(web, PORT);
    let b = mesh.ztunnel("b");
    b.says(&["shop/web", "does not exist"]).await;
    let why = b.get(15021, "/healthz/ready").await.unwrap_err().to_string();
    assert!(why.contains("503") && why.contains("shop/web"), "{why}");
    let capture = b.capture("web").await;
    assert_eq!(capture["state"], "pending", "{capture}");
    // The client's node takes the pod for one of the mesh, and sends nothing in plaintext.
    let _ = ask(client, address(web, PORT)).await.unwrap_err();

    // What is there is no namespace yet: a file that a mount is to come over.
    fs::write(&late, "").unwrap();
    eventually("the reason is the new one", async || {
        b.capture("web").await["reason"].as_str().is_some_and(|r| r.contains("not a namespace"))
    })
    .await;
    fs::remove_file(&late).unwrap();
    symlink(real, &late).unwrap();
    eventually("the pod is enrolled", async || b.get(15021, "/healthz/ready").await.is_ok()).await;
    eventually("it is served", async || ask(client, address(web, PORT)).await.is_ok()).await;
}
