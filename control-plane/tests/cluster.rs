//! The program on a real API server: from `kubectl apply` to a proxy, to the policy's status, through the API server's
//! death.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod apiserver;

use std::time::Duration;

use apiserver::{Cluster, Plane, apply_crds, fill, next, pod, policy, set_address, until_named};
use base64::Engine as _;
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_kubectl_to_a_proxy_to_the_policys_status_and_through_the_api_servers_death() {
    let Some(mut cluster) = Cluster::start() else { return };
    fill(&cluster);
    // The CRDs come later than the control plane.
    let plane = Plane::start(&cluster, "culvertd-a");
    let root = || cluster.kubectl(&["get", "configmap", "-n", "shop", "istio-ca-root-cert"], "").is_ok();
    cluster.until("the root in every namespace", root);
    let mut updates = plane.proxy(&cluster, "ztunnel-a");
    until_named(&mut updates, ADDRESS_TYPE_URL, "Kubernetes//Pod/shop/a").await.ack();
    apply_crds(&cluster);
    let manifest = policy("ALLOW").to_string();
    cluster.until("the CRD", || cluster.kubectl(&["apply", "-f", "-"], &manifest).is_ok());
    until_named(&mut updates, AUTHORIZATION_TYPE_URL, "shop/p").await.ack();
    until_named(&mut updates, ADDRESS_TYPE_URL, "Kubernetes//Pod/shop/a").await.ack();
    let enforced = |status: &str, reason: &str, text: &str| {
        let found = cluster.condition("authorizationpolicy", "p", "Enforced");
        found.is_some_and(|(s, r, message)| s == status && r == reason && message.contains(text))
    };
    cluster.until("Enforced", || enforced("True", "AllProxies", "1/1"));
    assert_eq!(cluster.condition("authorizationpolicy", "p", "ZtunnelAccepted").unwrap().1, "Accepted");

    // A proxy that has a new version and has not said that it is in force is named.
    cluster.apply(&policy("DENY"));
    let update = until_named(&mut updates, AUTHORIZATION_TYPE_URL, "shop/p").await;
    cluster.until("Pending", || enforced("False", "Pending", "waiting for ztunnel-a.culvert-system"));
    update.ack();
    cluster.until("Enforced again", || enforced("True", "AllProxies", "1/1"));

    // The API server dies: the proxy keeps its stream. It comes back, and only what changed is sent.
    cluster.api = None;
    std::thread::sleep(Duration::from_secs(3));
    assert!(plane.is_ready());
    cluster.start_api();
    cluster.until("the API server again", || cluster.kubectl(&["get", "--raw", "/readyz"], "").is_ok());
    cluster.apply(&pod("shop", "b", "web"));
    set_address(&cluster, "b", "10.1.0.2");
    let update = next(&mut updates).await;
    let names: Vec<&str> = update.resources.iter().map(|r| &*r.name).collect();
    assert_eq!((update.type_url, names), (ADDRESS_TYPE_URL, vec!["Kubernetes//Pod/shop/b"]));
    assert!(update.removed.is_empty());
    update.ack();
}

/// Has the API server ask a control plane about policies.
fn configure_webhook(cluster: &Cluster, plane: &Plane) {
    let root =
        ["get", "configmap", "-n", "shop", "istio-ca-root-cert", "-o", "jsonpath={.data.root-cert\\.pem}"];
    let root = cluster.kubectl(&root, "").unwrap();
    let bundle = base64::engine::general_purpose::STANDARD.encode(root);
    cluster.apply(&json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": { "name": "culvert-validator" },
        "webhooks": [{
            "name": "validation.culvert.dev", "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "failurePolicy": "Fail", "timeoutSeconds": 5,
            "clientConfig": {
                "url": format!("https://localhost:{}/validate", plane.webhook.port()), "caBundle": bundle,
            },
            "rules": [{
                "apiGroups": ["security.istio.io"], "apiVersions": ["*"], "operations": ["CREATE", "UPDATE"],
                "resources": ["*"],
            }],
        }],
    }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_leads_and_the_webhook_fails_closed_when_it_is_gone() {
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    apply_crds(&cluster);
    let first = Plane::start(&cluster, "culvertd-a");
    let root = || cluster.kubectl(&["get", "configmap", "-n", "shop", "istio-ca-root-cert"], "").is_ok();
    cluster.until("the root in every namespace", root);
    let second = Plane::start(&cluster, "culvertd-b");
    let leader = || {
        let lease = [
            "get",
            "lease",
            "-n",
            "culvert-system",
            "culvertd-leader",
            "-o",
            "jsonpath={.spec.holderIdentity}",
        ];
        cluster.kubectl(&lease, "").unwrap_or_default()
    };
    assert!(leader().starts_with("culvertd-a_"), "{}", leader());

    configure_webhook(&cluster, &first);
    let mut bad = policy("DENY");
    bad["spec"]["rules"] = json!([{ "from": [{ "source": { "ipBlocks": ["10.0.0.0/99"] } }] }]);
    let refused = || cluster.kubectl(&["apply", "-f", "-"], &bad.to_string()).unwrap_err();
    // The configuration takes a moment to be in force.
    cluster.until("a refusal", || {
        let admitted = cluster.kubectl(&["apply", "-f", "-"], &bad.to_string()).is_ok();
        if admitted {
            cluster.kubectl(&["delete", "authorizationpolicy", "-n", "shop", "p"], "").unwrap();
        }
        !admitted
    });
    assert!(refused().contains("is neither an IP address nor a range"), "{}", refused());
    cluster.apply(&policy("ALLOW"));

    // The one that leads dies. What it reviewed can't be changed; the other takes over, and writes.
    drop(first);
    let gone = cluster.kubectl(&["apply", "-f", "-"], &policy("DENY").to_string()).unwrap_err();
    assert!(gone.contains("failed calling webhook"), "{gone}");
    cluster.until("another leader", || leader().starts_with("culvertd-b_"));
    configure_webhook(&cluster, &second);
    let manifest = policy("DENY").to_string();
    cluster.until("the other's review", || cluster.kubectl(&["apply", "-f", "-"], &manifest).is_ok());
    let mut updates = second.proxy(&cluster, "ztunnel-a");
    until_named(&mut updates, AUTHORIZATION_TYPE_URL, "shop/p").await.ack();
    until_named(&mut updates, ADDRESS_TYPE_URL, "Kubernetes//Pod/shop/a").await.ack();
    let enforced = || {
        cluster.condition("authorizationpolicy", "p", "Enforced").is_some_and(|(status, ..)| status == "True")
    };
    cluster.until("Enforced", enforced);
}
