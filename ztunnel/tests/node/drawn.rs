//! Services with several endpoints on the node, one of which the kernel draws for each connection that passes by its verdict.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::timeout;

use crate::lab::manifests::{ServiceManifest, mtls, node_local, policy, vips};
use crate::lab::traffic::{PORT, Server, Talk, serve, talk};
use crate::lab::{Mesh, eventually};
use crate::verdicts::{CUT, VIP, captured, of, options, or_skip, past, told};

const WEBS: [&str; 3] = ["web1", "web2", "web3"];

/// A client and three pods of the service on a node, STRICT; `more` is on another one.
async fn mesh(more: &[&str]) -> (Mesh, Vec<Server>) {
    let mut mesh = Mesh::build(&[("a", &["client", "web1", "web2", "web3"]), ("b", more)]);
    mesh.put("mesh", &node_local("kernel"));
    mesh.put("mtls", &mtls("STRICT", None));
    mesh.put("web", &web().to_string());
    for node in ["a", "b"] {
        mesh.run(node, &options()).await;
    }
    let servers = WEBS.iter().chain(more).map(|pod| serve(mesh.pod(pod), PORT)).collect();
    (mesh, servers)
}

fn web() -> ServiceManifest {
    ServiceManifest::new("web", VIP, 80, PORT)
}

fn service(v6: bool) -> SocketAddr {
    SocketAddr::new(vips(VIP)[usize::from(v6)], 80)
}

/// So many connections, by the pod that took them; `None` where none did.
async fn reached(mesh: &Mesh, v6: bool, connections: usize) -> BTreeMap<Option<String>, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..connections {
        let server = talk(mesh.pod("client"), service(v6)).await.ok().map(|open| open.hello.server);
        *counts.entry(server).or_default() += 1;
    }
    counts
}

/// Whether so many connections in a row pass by ztunnel, to just these.
async fn pass(mesh: &Mesh, v6: bool, wanted: &[&str]) -> bool {
    let before = captured(mesh, "client").await;
    let counts = reached(mesh, v6, 16 * wanted.len()).await;
    let wanted: BTreeSet<_> = wanted.iter().map(|pod| Some((*pod).to_owned())).collect();
    counts.keys().cloned().collect::<BTreeSet<_>>() == wanted && captured(mesh, "client").await == before
}

/// A connection past ztunnel to each pod.
async fn one_each(mesh: &Mesh, v6: bool) -> BTreeMap<String, Talk> {
    let mut found = BTreeMap::new();
    eventually("each has one", async || {
        let open = past(mesh, mesh.pod("client"), service(v6)).await;
        found.insert(open.hello.server.clone(), open);
        found.len() == WEBS.len()
    })
    .await;
    found
}

#[tokio::test]
async fn connections_pass_to_all_endpoints_of_a_service() {
    if !or_skip("several endpoints under nodeLocal: kernel") {
        return;
    }
    let (mesh, _servers) = mesh(&[]).await;
    for v6 in [false, true] {
        eventually("they pass to all", async || pass(&mesh, v6, &WEBS).await).await;
        let counts = reached(&mesh, v6, 150).await;
        // A third each: fewer than 15 is farther off than six standard deviations.
        assert!(counts.len() == 3 && counts.values().all(|count| *count > 15), "{counts:?}");
        let mut open = past(&mesh, mesh.pod("client"), service(v6)).await;
        let pod = mesh.pod(&open.hello.server);
        let to = SocketAddr::new(pod.ip(v6), PORT);
        assert_eq!((open.hello.client, open.hello.reached), (open.local, to));
        assert_eq!(net::canonical(open.stream.get_ref().peer_addr().unwrap()), service(v6));
        open.echo().await.unwrap();
        let views = told(&mesh, "open", &open).await;
        let outbound = of(&views, "outbound");
        assert_eq!(outbound["destination"], service(v6).to_string().as_str());
        assert_eq!(outbound["upstream"], to.to_string().as_str());
        for view in ["outbound", "inbound"].map(|direction| of(&views, direction)) {
            let identity = format!("spiffe://cluster.local/ns/shop/sa/{}", open.hello.server);
            assert_eq!(view["destination_identity"], identity.as_str(), "{view}");
            assert_eq!(
                view["destination_workload"],
                format!("shop/{}", open.hello.server).as_str(),
                "{view}"
            );
            assert_eq!(view["destination_service"], "shop/web.shop.svc.cluster.local", "{view}");
        }
    }
}

#[tokio::test]
async fn an_endpoint_that_may_not_be_reached_any_more_is_taken_out() {
    if !or_skip("endpoints that are revoked under nodeLocal: kernel") {
        return;
    }
    let (mesh, _servers) = mesh(&[]).await;
    for v6 in [false, true] {
        eventually("they pass to all", async || pass(&mesh, v6, &WEBS).await).await;
        let mut open = one_each(&mesh, v6).await;
        // A policy against one: what it has ends, and ztunnel refuses what is led there from now on.
        let of_client = "from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]";
        let mut second = mesh.manifest("web2");
        second.labels.push(("only".into(), "two".into()));
        let deny = policy("deny", "DENY", "web", of_client).replace("{app: web}", "{only: two}");
        mesh.change(|| {
            mesh.put("pod-web2", &second.to_string());
            mesh.put("deny", &deny);
        })
        .await;
        let mut denied = open.remove("web2").unwrap();
        timeout(CUT, denied.end()).await.expect("it goes on").unwrap_err();
        let counts = reached(&mesh, v6, 64).await;
        assert!(!counts.contains_key(&Some("web2".to_owned())), "{counts:?}");
        assert!(counts.contains_key(&None), "ztunnel refuses what it leads there: {counts:?}");
        assert_eq!(counts.len(), 3, "{counts:?}");
        for open in open.values_mut() {
            open.echo().await.unwrap();
        }
        mesh.remove("deny").await;
        eventually("they pass to all again", async || pass(&mesh, v6, &WEBS).await).await;

        // One leaves the mesh.
        mesh.apply("pod-web3", "").await;
        timeout(CUT, open.remove("web3").unwrap().end()).await.expect("it goes on").unwrap_err();
        eventually("they pass to the others", async || pass(&mesh, v6, &["web1", "web2"]).await).await;
        open.get_mut("web1").unwrap().echo().await.unwrap();
        // One that is not ready takes no new connections, and keeps those it has.
        let mut open = past(&mesh, mesh.pod("client"), service(v6)).await;
        let (kept, left) = if open.hello.server == "web1" { ("web1", "web2") } else { ("web2", "web1") };
        mesh.apply(&format!("pod-{kept}"), &mesh.manifest(kept).ready(false).to_string()).await;
        eventually("they pass to the other", async || pass(&mesh, v6, &[left]).await).await;
        open.echo().await.unwrap();
        // And all come again.
        mesh.change(|| {
            for pod in WEBS {
                mesh.put(&format!("pod-{pod}"), &mesh.manifest(pod).to_string());
            }
        })
        .await;
        eventually("they pass to all again", async || pass(&mesh, v6, &WEBS).await).await;
        open.echo().await.unwrap();
    }
    assert_eq!(mesh.ztunnel("a").metric("culvert_verdict_stuck").await, 0.0);
}

#[tokio::test]
async fn an_endpoint_that_takes_no_connections_is_ztunnels_to_find_out() {
    if !or_skip("endpoints that fail under nodeLocal: kernel") {
        return;
    }
    let (mesh, mut servers) = mesh(&[]).await;
    eventually("they pass to all", async || pass(&mesh, false, &WEBS).await).await;
    servers.remove(1).close().await;
    // The first that fails is heard of before long. Then ztunnel tries another endpoint where one refuses.
    eventually("none fails", async || !reached(&mesh, false, 24).await.contains_key(&None)).await;
    let counts = reached(&mesh, false, 24).await;
    assert_eq!(counts.keys().flatten().collect::<Vec<_>>(), ["web1", "web3"], "{counts:?}");
    // It comes again, and so do they all: after a while, as failures are forgotten by a connection that is made.
    servers.push(serve(mesh.pod("web2"), PORT));
    let mut passes = false;
    for _ in 0..30 {
        passes = pass(&mesh, false, &WEBS).await;
        if passes {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(passes, "they pass to all again");
}

#[tokio::test]
async fn endpoints_on_other_nodes_are_ztunnels_to_choose_unless_traffic_is_to_stay() {
    if !or_skip("endpoints elsewhere under nodeLocal: kernel") {
        return;
    }
    let (mesh, _servers) = mesh(&["web9"]).await;
    let all = ["web1", "web2", "web3", "web9"];
    for v6 in [false, true] {
        mesh.apply("web", &web().to_string()).await;
        for _ in 0..3 {
            let before = captured(&mesh, "client").await;
            let counts = reached(&mesh, v6, 16 * all.len()).await;
            assert_eq!(counts.keys().flatten().collect::<Vec<_>>(), all, "{counts:?}");
            assert_eq!(captured(&mesh, "client").await - before, 16 * all.len() as u64);
        }
        for line in ["internalTrafficPolicy: Local", "trafficDistribution: PreferSameNode"] {
            mesh.apply("web", &web().spec(line).to_string()).await;
            eventually(line, async || pass(&mesh, v6, &WEBS).await).await;
        }
    }
}
