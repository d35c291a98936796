//! Istio's node agent and CNI plugin: they capture by rules of their own and hand the pods to our ztunnel.

use std::net::SocketAddr;

use serde_json::json;

use crate::control_plane::{all_is_acknowledged, knows_hbone, policy};
use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Cluster, NodeAgent, eventually};

/// A node agent and a ztunnel on each node, and pods that the plugin adds.
async fn start(test: &str, nft: bool) -> Option<(Cluster, [NodeAgent; 2])> {
    let nodes: [(&str, &[&str]); 2] = [("a", &["client", "other"]), ("b", &["web", "outside"])];
    let mut cluster = Cluster::build(test, &nodes)?;
    let agents = ["a", "b"].map(|node| cluster.start_node_agent(node, nft));
    for node in ["a", "b"] {
        cluster.spawn(node);
        cluster.ready(node).await;
    }
    for (agent, pod) in [(&agents[0], "client"), (&agents[0], "other"), (&agents[1], "web")] {
        cluster.make_pod(pod, &json!({}));
        agent.add(cluster.pod(pod)).unwrap_or_else(|error| panic!("{pod}: {error}"));
        cluster.set_running(pod);
    }
    knows_hbone(&cluster, &["client", "other", "web"]).await;
    Some((cluster, agents))
}

async fn pods_are_captured_served_and_guarded(test: &str, nft: bool) {
    let Some((cluster, _agents)) = start(test, nft).await else { return };
    let [client, web, outside] = ["client", "web", "outside"].map(|n| cluster.pod(n));
    let _servers = [serve(web, PORT), serve(outside, PORT)];
    for v6 in [false, true] {
        let to = SocketAddr::new(web.ip(v6), PORT);
        assert_eq!(ask(client, to).await.unwrap().client.ip(), client.ip(v6));
        let tunnel = cluster.ztunnel("b").last(|c| c["destination"] == to.to_string()).await;
        assert_eq!(tunnel["carrier"], "hbone", "{tunnel}");
        assert_eq!(tunnel["source_identity"], "spiffe://cluster.local/ns/shop/sa/client", "{tunnel}");
        assert_eq!(ask(outside, to).await.unwrap().client.ip(), outside.ip(v6));
        let plain = cluster
            .ztunnel("b")
            .last(|c| c["source"].to_string().contains(&outside.ip(v6).to_string()))
            .await;
        assert_eq!(plain["carrier"], "plaintext", "{plain}");
        ask(web, SocketAddr::new(outside.ip(v6), PORT)).await.unwrap();
    }
    let strict = policy("PeerAuthentication", "shop", "default", &json!({ "mtls": { "mode": "STRICT" } }));
    cluster.kubernetes.apply(&[strict]);
    for v6 in [false, true] {
        let to = SocketAddr::new(web.ip(v6), PORT);
        eventually("plaintext is refused", async || ask(outside, to).await.is_err()).await;
        // Istio's control plane may name a policy before it sends it, and until then nobody is let in.
        eventually("a client of the mesh is let in", async || ask(client, to).await.is_ok()).await;
    }
    all_is_acknowledged(&cluster).await;
    for node in ["a", "b"] {
        assert_eq!(cluster.ztunnel(node).metric("culvert_zds_messages_refused_total").await, 0.0);
    }
}

#[tokio::test]
async fn pods_that_istios_plugin_adds_are_served_with_its_nftables_rules() {
    pods_are_captured_served_and_guarded("Istio's node agent, nftables", true).await;
}

#[tokio::test]
async fn pods_that_istios_plugin_adds_are_served_with_its_iptables_rules() {
    pods_are_captured_served_and_guarded("Istio's node agent, iptables", false).await;
}

#[tokio::test]
async fn pods_stay_over_restarts_and_go_when_they_leave() {
    let Some((mut cluster, [agent, _b])) = start("Istio's node agent ends", true).await else { return };
    let [client, other, web] = ["client", "other", "web"].map(|n| cluster.pod(n).clone());
    let _servers = [serve(&web, PORT), serve(&other, PORT)];
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    let mut open = talk(&client, to).await.unwrap();
    let active = async |cluster: &Cluster| cluster.ztunnel("a").metric("istio_active_proxy_count").await;

    // The agent ends, and begins anew without the namespaces' descriptors: it says which pods are to be kept.
    agent.kill();
    cluster.ztunnel("a").says(&["the node agent has gone", "pods=2"]).await;
    open.echo().await.unwrap();
    let agent = cluster.start_node_agent("a", true);
    eventually("it is there again", async || {
        cluster.ztunnel("a").metric("culvert_zds_connections_total").await == 2.0
    })
    .await;
    open.echo().await.unwrap();
    ask(&client, to).await.unwrap();
    assert_eq!(active(&cluster).await, 2.0);

    // A new ztunnel gets all from the agent, which has the descriptors of what is added now.
    agent.add(&client).unwrap();
    agent.add(&other).unwrap();
    open.echo().await.unwrap();
    cluster.spawn("a");
    cluster.ready("a").await;
    ask(&client, to).await.unwrap();
    assert_eq!(active(&cluster).await, 2.0);

    // Out of the mesh by a label, and out of the cluster.
    let label = ["label", "pod", "-n", "shop", "other", "istio.io/dataplane-mode=none"];
    cluster.kubernetes.kubectl(&label, "").unwrap();
    eventually("the pod has left", async || active(&cluster).await == 1.0).await;
    let outside = cluster.pod("outside");
    let direct = talk(outside, SocketAddr::new(other.ipv4.into(), PORT)).await.unwrap();
    assert_eq!(direct.hello.client, direct.local, "it is still captured");
    cluster.kubernetes.delete("pod", "shop", "client");
    eventually("the deleted pod is let go", async || active(&cluster).await == 0.0).await;
    assert_eq!(cluster.ztunnel("a").metric("culvert_zds_messages_refused_total").await, 0.0);
}
