//! What the status of the mesh's objects says, on a real API server; and how control planes of several revisions find and
//! ask each other, where a script answers for the API server: a real one takes no endpoints on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod apiserver;
mod mesh;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use apiserver::{Cluster, Plane, apply_crds, fill, pod, policy, until_named};
use base64::Engine as _;
use control_plane::registry::ObjectVersion;
use control_plane::status::Followers;
use control_plane::status::exchange::{Exchange, Keys, Question};
use control_plane::status::peers::{Peers, Place, Reach, Stand, ask_one};
use http::{Request, Response};
use http_body_util::Full;
use identity::Clock;
use kube::client::Body;
use mesh::Root;
use proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use xds::server::{Authorizer, Caller, Config, Server};

/// Sets whether a node is ready.
fn set_ready(cluster: &Cluster, node: &str, ready: &str) {
    let status = json!({ "status": { "conditions": [{
        "type": "Ready", "status": ready, "reason": "Test", "message": "",
        "lastHeartbeatTime": "2026-11-21T10:00:00Z", "lastTransitionTime": "2026-11-21T10:00:00Z",
    }] } });
    let patch = ["patch", "node", node, "--subresource", "status", "-p", &status.to_string()];
    cluster.kubectl(&patch, "").unwrap();
}

fn set_running(cluster: &Cluster, pod: &str) {
    let status = json!({ "status": { "phase": "Running" } }).to_string();
    let patch = ["patch", "pod", "-n", "culvert-system", pod, "--subresource", "status", "-p", &status];
    cluster.kubectl(&patch, "").unwrap();
}

/// Who has the CA's key is answered, and nobody else.
async fn tell_each_other(cluster: &Cluster, plane: &Plane) {
    let secret = ["get", "secret", "-n", "culvert-system", "culvert-ca-secret", "-o"];
    let key = [&secret[..], &["jsonpath={.data.ca-key\\.pem}"]].concat();
    let key = base64::engine::general_purpose::STANDARD.decode(cluster.kubectl(&key, "").unwrap()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(&key).unwrap();
    let of = |secret: Vec<u8>| {
        Keys::new(Arc::new(move |take: &mut dyn FnMut(&[u8])| take(&secret)), Clock::system())
    };
    let place =
        Place { address: plane.webhook, server_name: "localhost".to_owned(), revision: "default".into() };
    let roots = CertificateDer::pem_file_iter(cluster.at("root.pem")).unwrap().map(Result::unwrap);
    let mut store = rustls::RootCertStore::empty();
    store.add_parsable_certificates(roots);
    let tls = Arc::new(rustls::ClientConfig::builder().with_root_certificates(store).with_no_client_auth());
    let ask = async |keys: &Keys| ask_one(&place, Some(tls.clone()), keys, &Question::default()).await;
    let answer = ask(&of(key.secret_der().to_vec())).await.unwrap();
    assert_eq!((&*answer.revision, answer.ours, answer.versions.len()), ("default", 1, 1));
    assert_eq!(answer.names.unwrap()[..], ["ztunnel-a.culvert-system".into()]);
    let refused = ask(&of(b"another".to_vec())).await.unwrap_err();
    assert!(refused.contains("403"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_live_ztunnel_without_a_stream_is_named_and_that_of_a_dead_node_is_not_counted() {
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    apply_crds(&cluster);
    for node in ["node1", "node2"] {
        cluster.apply(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node } }));
        set_ready(&cluster, node, "True");
    }
    let mut other = pod("culvert-system", "ztunnel-b", "ztunnel");
    other["spec"]["nodeName"] = json!("node2");
    cluster.apply(&other);
    ["ztunnel-a", "ztunnel-b"].iter().for_each(|pod| set_running(&cluster, pod));
    cluster.apply(&policy("ALLOW"));
    let plane = Plane::start(&cluster, "culvertd-a");
    let root = || cluster.kubectl(&["get", "configmap", "-n", "shop", "istio-ca-root-cert"], "").is_ok();
    cluster.until("the root in every namespace", root);
    let mut updates = plane.proxy(&cluster, "ztunnel-a");
    until_named(&mut updates, AUTHORIZATION_TYPE_URL, "shop/p").await.ack();
    until_named(&mut updates, ADDRESS_TYPE_URL, "Kubernetes//Pod/shop/a").await.ack();
    let enforced = |status: &str, text: &str| {
        let found = cluster.condition("authorizationpolicy", "p", "Enforced");
        found.is_some_and(|(s, _, message)| s == status && message == text)
    };
    let absent = "1/2 proxies enforce it; waiting for ztunnel-b.culvert-system (not connected)";
    cluster.until("ztunnel-b is named", || enforced("False", absent));

    tell_each_other(&cluster, &plane).await;

    set_ready(&cluster, "node2", "Unknown");
    let dead =
        "1/1 proxies enforce it; not counted: ztunnel-b.culvert-system on node2 (its node is not ready)";
    cluster.until("ztunnel-b is not counted", || enforced("True", dead));
    set_ready(&cluster, "node2", "True");
    cluster.until("ztunnel-b is named again", || enforced("False", absent));
    // Nobody renews its Lease: there is none.
    let over = dead.replace("node is not ready", "node's lease is over");
    cluster.until("its Lease is over", || enforced("True", &over));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_are_accepted_or_refused_with_the_reason() {
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    apply_crds(&cluster);
    let _plane = Plane::start(&cluster, "culvertd-a");
    let entry = |name: &str, address: &str| {
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
            "metadata": { "name": name, "namespace": "shop" },
            "spec": {
                "hosts": [format!("{name}.example.org")], "addresses": [address], "resolution": "STATIC",
                "ports": [{ "number": 80, "name": "tcp", "protocol": "TCP" }],
                "endpoints": [{ "address": "192.0.2.7" }],
            },
        })
    };
    cluster.apply(&entry("good", "203.0.113.1"));
    cluster.apply(&entry("bad", "203.0.113.0/99"));
    cluster.apply(&json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": { "name": "vm", "namespace": "shop" }, "spec": { "address": "192.0.2.8" },
    }));
    cluster.apply(&json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadGroup",
        "metadata": { "name": "vms", "namespace": "shop" }, "spec": { "template": { "serviceAccount": "web" } },
    }));
    let accepted = |kind: &str, name: &str| cluster.condition(kind, name, "Accepted");
    for (kind, name) in [("serviceentry", "good"), ("workloadentry", "vm"), ("workloadgroup", "vms")] {
        cluster.until(name, || accepted(kind, name).is_some_and(|(status, ..)| status == "True"));
    }
    cluster.until("bad", || {
        accepted("serviceentry", "bad").is_some_and(|(status, reason, message)| {
            status == "False" && reason == "Invalid" && message.contains("203.0.113.0/99")
        })
    });
    // It is mended: the new version is told of.
    cluster.apply(&entry("bad", "203.0.113.2"));
    cluster.until("mended", || accepted("serviceentry", "bad").is_some_and(|(status, ..)| status == "True"));
    assert_eq!(cluster.condition("serviceentry", "bad", "Enforced"), None);
}

struct Nobody;

#[tonic::async_trait]
impl Authorizer for Nobody {
    async fn authenticate(&self, _: &tonic::Request<()>) -> Result<Caller, tonic::Status> {
        Err(tonic::Status::unauthenticated("nobody"))
    }
}

fn keys() -> Keys {
    Keys::new(Arc::new(|take: &mut dyn FnMut(&[u8])| take(b"the CA's key")), Clock::system())
}

/// A control plane of a revision without proxies, that proves the name of its Service; where it is.
async fn plane(root: &Root, service: &str, revision: &str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::new(Config::default(), Arc::new(Nobody), Arc::new(()));
    let exchange = Exchange::new(Followers::default(), server, revision.to_owned(), keys());
    let routes = exchange.routes(process::http::Routes::new("test"));
    let tls = root.serving_as(&format!("{service}.culvert-system.svc"));
    let acceptor =
        tokio_rustls::TlsAcceptor::from(tls.server_config(&[b"http/1.1"], &Clock::system()).unwrap());
    let secure = move |stream| {
        let acceptor = acceptor.clone();
        async move { acceptor.accept(stream).await }
    };
    tokio::spawn(process::http::serve_secured(listener, secure, routes, process::http::Limits::default()));
    address
}

/// The endpoints of a Service.
fn slice(service: &str, revision: &str, pods: &[(&str, SocketAddr, bool)]) -> Value {
    let endpoint = |(pod, address, serving): &(&str, SocketAddr, bool)| {
        json!({
            "addresses": [address.ip().to_string()], "targetRef": { "kind": "Pod", "name": pod },
            "conditions": { "ready": serving, "serving": serving },
        })
    };
    json!({
        "metadata": { "name": format!("{service}-x"), "namespace": "culvert-system", "labels": {
            "kubernetes.io/service-name": service, "app": "culvertd", "istio.io/rev": revision,
        } },
        "addressType": "IPv4",
        "endpoints": pods.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [
            { "name": "grpc-xds", "port": 1 },
            { "name": "https-webhook", "port": pods[0].1.port() },
        ],
    })
}

#[tokio::test]
async fn control_planes_of_all_revisions_are_found_and_asked() {
    let root = Root::new();
    let (default, next) =
        (plane(&root, "culvertd", "default").await, plane(&root, "culvertd-next", "next").await);
    let slices = Arc::new(Mutex::new(vec![
        slice("culvertd", "default", &[("other", default, true)]),
        slice("culvertd", "default", &[("own", default, true)]),
        slice("culvertd-next", "next", &[("next", next, true), ("gone", next, false)]),
    ]));
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let (served, seen) = (slices.clone(), asked.clone());
    let api = tower::service_fn(move |request: Request<Body>| {
        seen.lock().unwrap().push(request.uri().to_string());
        let items = served.lock().unwrap().clone();
        let list = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "metadata": {}, "items": items,
        });
        async move { Ok::<_, Infallible>(Response::new(Full::new(bytes::Bytes::from(list.to_string())))) }
    });
    let tls = root.client_config();
    let mut peers = Peers::new(Some(Reach {
        client: kube::Client::new(api, "default"),
        namespace: "culvert-system".to_owned(),
        own_pod: "own".to_owned(),
        own_revision: "default".to_owned(),
        tls: Arc::new(move || Some(tls.clone())),
        keys: keys(),
    }));
    assert!(!peers.are_known());
    peers.ask().await;
    assert!(asked.lock().unwrap()[0].contains("labelSelector=app%3Dculvertd"), "{:?}", asked.lock().unwrap());
    let found: Vec<_> =
        peers.all().iter().map(|p| (p.place.address, &*p.place.revision, p.has_said())).collect();
    let mut wanted = vec![(default, "default", true), (next, "next", true)];
    wanted.sort();
    assert!(peers.are_known());
    assert_eq!(found, wanted);
    let version = ObjectVersion { uid: "u".into(), generation: 1, labelled: false, selects: false };
    assert_eq!(peers.all()[0].stand("AuthorizationPolicy/a/b", &version), Stand::Other { knows: false });

    // One that proves the name of another Service is none of them.
    let wrong = plane(&root, "culvertd", "next").await;
    *slices.lock().unwrap() = vec![slice("culvertd-next", "next", &[("next", wrong, true)])];
    let mut peers = Peers::new(Some(Reach {
        client: kube::Client::new(
            tower::service_fn(move |_: Request<Body>| {
                let items = slices.lock().unwrap().clone();
                let list = json!({ "metadata": {}, "items": items }).to_string();
                async move { Ok::<_, Infallible>(Response::new(Full::new(bytes::Bytes::from(list)))) }
            }),
            "default",
        ),
        namespace: "culvert-system".to_owned(),
        own_pod: "own".to_owned(),
        own_revision: "default".to_owned(),
        tls: Arc::new({
            let tls = root.client_config();
            move || Some(tls.clone())
        }),
        keys: keys(),
    }));
    peers.ask().await;
    assert_eq!(peers.all().iter().map(|p| p.has_said()).collect::<Vec<_>>(), [false]);
}
