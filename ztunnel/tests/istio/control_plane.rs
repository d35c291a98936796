//! istiod as the control plane and the CA: certificates, workloads, services, policies.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::lab::traffic::{PORT, ask, serve, talk};
use crate::lab::{Cluster, eventually};

/// A policy of a kind of `security.istio.io`.
pub fn policy(kind: &str, namespace: &str, name: &str, spec: &Value) -> Value {
    let metadata = json!({ "name": name, "namespace": namespace });
    json!({ "apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec })
}

/// The object of a list of `/config_dump` that has this name.
pub fn named<'a>(dump: &'a Value, list: &str, name: &str) -> &'a Value {
    dump[list].as_array().unwrap().iter().find(|o| o["name"] == name).unwrap_or(&Value::Null)
}

async fn has_policies(cluster: &Cluster, names: &[&str]) {
    let has = |dump: &Value| {
        let policies = dump["policies"].as_array().unwrap();
        policies.len() == names.len() && names.iter().all(|n| !named(dump, "policies", n).is_null())
    };
    cluster.everywhere(&format!("the policies {names:?}"), has).await;
}

pub async fn knows_hbone(cluster: &Cluster, pods: &[&str]) {
    let has = |dump: &Value| pods.iter().all(|pod| named(dump, "workloads", pod)["protocol"] == "HBONE");
    cluster.everywhere(&format!("the pods {pods:?} in the mesh"), has).await;
}

/// Every ztunnel has read all that it was sent, and istiod knows that.
pub async fn all_is_acknowledged(cluster: &Cluster) {
    let types =
        ["type.googleapis.com/istio.security.Authorization", "type.googleapis.com/istio.workload.Address"];
    let synced = async || {
        let clients = cluster.ask_istiod("/debug/syncz");
        let clients = clients.as_array().unwrap();
        clients.len() == 2
            && clients.iter().all(|client| {
                let resources = client["resources"].as_object().unwrap();
                // Nothing but these is asked for: istiod would answer for other types with each of its pushes.
                resources.keys().eq(types)
                    && resources.values().all(|r| r["sent"] == r["acked"] && r["lastError"].is_null())
            })
    };
    eventually("istiod has the acknowledgements of both ztunnels", synced).await;
    for node in ["a", "b"] {
        let dump = cluster.ztunnel(node).config_dump().await;
        assert_eq!(dump["diagnostics"], json!([]));
        assert_eq!(dump["cluster"]["controlPlane"]["rejected"], 0);
    }
}

fn only_client_at_8080() -> Value {
    policy(
        "AuthorizationPolicy",
        "shop",
        "only-client",
        &json!({
            "selector": { "matchLabels": { "app": "web" } },
            "rules": [{ "from": [{ "source": { "principals": ["cluster.local/ns/shop/sa/client"] } }],
                        "to": [{ "operation": { "ports": ["8080"] } }] }],
        }),
    )
}

#[tokio::test]
async fn pods_of_two_nodes_talk_and_policies_hold_as_istiod_says() {
    let nodes: [(&str, &[&str]); 2] = [("a", &["client", "other"]), ("b", &["web", "outside"])];
    let Some(mut cluster) = Cluster::build("istiod as the control plane", &nodes) else { return };
    cluster.run_with_stand_in("a").await;
    cluster.run_with_stand_in("b").await;
    knows_hbone(&cluster, &["client", "other", "web"]).await;
    let [client, other, web, outside] = ["client", "other", "web", "outside"].map(|n| cluster.pod(n));
    let _servers = [serve(web, PORT), serve(web, 9090), serve(outside, PORT)];
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    for v6 in [false, true] {
        let to = SocketAddr::new(web.ip(v6), PORT);
        assert_eq!(ask(client, to).await.unwrap().client.ip(), client.ip(v6));
        let tunnel = cluster.ztunnel("b").last(|c| c["destination"] == to.to_string()).await;
        assert_eq!(tunnel["carrier"], "hbone", "{tunnel}");
        assert_eq!(tunnel["source_identity"], "spiffe://cluster.local/ns/shop/sa/client", "{tunnel}");
        ask(web, SocketAddr::new(outside.ip(v6), PORT)).await.unwrap();
    }
    // Of the mesh, of a namespace, of a workload; of the peer and of none; the port.
    let mut plain = talk(outside, to).await.unwrap();
    let strict =
        policy("PeerAuthentication", "istio-system", "default", &json!({ "mtls": { "mode": "STRICT" } }));
    cluster.kubernetes.apply(&[strict]);
    has_policies(&cluster, &["istio_converted_static_strict"]).await;
    let _ = plain.end().await;
    ask(client, to).await.unwrap();
    // istiod attaches it by the workloads' own lists.
    let refused = async || ask(outside, to).await.is_err();
    eventually("plaintext is refused", refused).await;

    cluster.kubernetes.apply(&[only_client_at_8080()]);
    // Until it has the policy that the workload names, a ztunnel refuses everybody.
    has_policies(&cluster, &["istio_converted_static_strict", "only-client"]).await;
    eventually("the policy is in force", async || ask(other, to).await.is_err()).await;
    let mut open = talk(client, to).await.unwrap();
    ask(client, SocketAddr::new(web.ipv4.into(), 9090)).await.unwrap_err();
    all_is_acknowledged(&cluster).await;

    cluster.kubernetes.apply(&[policy(
        "AuthorizationPolicy",
        "shop",
        "not-client",
        &json!({
            "action": "DENY", "rules": [{ "from": [{ "source": { "principals": ["*/sa/client"] } }] }],
        }),
    )]);
    eventually("the open connection is cut", async || open.echo().await.is_err()).await;
    ask(client, to).await.unwrap_err();
    let refusal = cluster.ztunnel("b").last(|c| c.to_string().contains("not-client")).await;
    assert_eq!(refusal["source_identity"], "spiffe://cluster.local/ns/shop/sa/client", "{refusal}");

    for (kind, namespace, name) in [
        ("authorizationpolicy", "shop", "not-client"),
        ("authorizationpolicy", "shop", "only-client"),
        ("peerauthentication", "istio-system", "default"),
    ] {
        cluster.kubernetes.delete(kind, namespace, name);
    }
    has_policies(&cluster, &[]).await;
    ask(other, to).await.unwrap();
    eventually("plaintext is let in", async || ask(outside, to).await.is_ok()).await;
    all_is_acknowledged(&cluster).await;
}

#[tokio::test]
async fn what_changes_while_istiod_is_away_is_there_once_it_is_back() {
    let nodes: [(&str, &[&str]); 2] = [("a", &["client", "other"]), ("b", &["web", "outside"])];
    let Some(mut cluster) = Cluster::build("istiod is away", &nodes) else { return };
    cluster.run_with_stand_in("a").await;
    cluster.run_with_stand_in("b").await;
    knows_hbone(&cluster, &["client", "other", "web"]).await;
    let allow = json!({ "rules": [{ "from": [{ "source": { "namespaces": ["shop"] } }] }] });
    let of = |name: &str| policy("AuthorizationPolicy", "shop", name, &allow);
    cluster.kubernetes.apply(&[of("stays"), of("changes"), of("goes")]);
    has_policies(&cluster, &["stays", "changes", "goes"]).await;
    all_is_acknowledged(&cluster).await;

    cluster.kill_istiod();
    cluster.ztunnel("a").says(&["no connection to the control plane"]).await;
    let web = cluster.pod("web").clone();
    let _server = serve(&web, PORT);
    let to = SocketAddr::new(web.ipv4.into(), PORT);
    ask(cluster.pod("client"), to).await.unwrap();
    cluster.kubernetes.delete("authorizationpolicy", "shop", "goes");
    let deny =
        json!({ "action": "DENY", "rules": [{ "from": [{ "source": { "principals": ["*/sa/client"] } }] }] });
    cluster.kubernetes.apply(&[
        policy("AuthorizationPolicy", "shop", "changes", &deny),
        policy("AuthorizationPolicy", "shop", "comes", &allow),
    ]);
    cluster.kubernetes.delete("pod", "shop", "other");
    cluster.start_istiod();
    has_policies(&cluster, &["stays", "changes", "comes"]).await;
    cluster
        .everywhere("no more of the deleted pod", |dump| named(dump, "workloads", "other").is_null())
        .await;
    eventually("the changed policy is in force", async || ask(cluster.pod("client"), to).await.is_err())
        .await;
    all_is_acknowledged(&cluster).await;

    // One that starts while it is away works by what was kept, and gets the rest later.
    cluster.kill_istiod();
    cluster.spawn_with_stand_in("b").await;
    cluster.kubernetes.delete("authorizationpolicy", "shop", "changes");
    assert_eq!(cluster.ztunnel("b").metric("culvert_xds_kept_state").await, 1.0);
    ask(cluster.pod("client"), to).await.unwrap_err();
    cluster.start_istiod();
    eventually("the deleted policy is no more", async || ask(cluster.pod("client"), to).await.is_ok()).await;
    all_is_acknowledged(&cluster).await;
}
