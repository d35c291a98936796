//! What is wrong around the control plane, on a real API server: one that answers after seconds, is silent, or has
//! forgotten; tokens that are missing, old, young, or of others; broken Secrets, at the start and later; a proxy that is
//! gone. Without its programs a test says so and passes (see `apiserver`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod apiserver;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use apiserver::{Cluster, Plane, next, until_named};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use identity::{CaClient, CaClientSettings, Clock, Issuer};
use model::{TrustDomain, TrustDomains};
use proto::ADDRESS_TYPE_URL;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The name in the certificate.
const LOCAL: &[&str] = &["--service", "localhost"];

/// How connections to the API server go on.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Mode {
    Pass,
    /// Each answer comes so much later.
    Slow(Duration),
    /// Connections are taken, and nothing ever comes; those of this time stay so.
    Silent,
    /// There are none.
    Gone,
}

/// Between a control plane and its API server.
struct Relay {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
}

impl Relay {
    async fn start(server: u16, first: Mode) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, view) = watch::channel(first);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let mode = view.clone();
                tokio::spawn(async move {
                    if *mode.borrow() == Mode::Gone {
                        return;
                    }
                    let Ok(far) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::select! {
                        () = pump(near_in, far_out, mode.clone(), false) => {}
                        () = pump(far_in, near_out, mode, true) => {}
                    }
                });
            }
        });
        Self { address, mode }
    }

    fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    fn kubeconfig(&self, cluster: &Cluster) -> PathBuf {
        let text = std::fs::read_to_string(cluster.kubeconfig()).unwrap();
        let (from, to) = (format!("127.0.0.1:{}", cluster.port), self.address.to_string());
        let path = cluster.at("by-relay");
        std::fs::write(&path, text.replace(&from, &to)).unwrap();
        path
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut mode: watch::Receiver<Mode>, slows: bool) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => Some(read.unwrap_or(0)),
            _ = mode.changed() => None,
        };
        let now = *mode.borrow_and_update();
        match now {
            Mode::Gone => return,
            Mode::Silent => return std::future::pending().await,
            Mode::Slow(by) if slows && read.is_some() => tokio::time::sleep(by).await,
            _ => {}
        }
        let Some(read) = read else { continue };
        if read == 0 {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

fn pod(cluster: &Cluster, namespace: &str, name: &str, account: &str, node: &str) {
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": namespace, "labels": { "app": "web" },
            "annotations": { "ambient.istio.io/redirection": "enabled" },
        },
        "spec": { "serviceAccountName": account, "nodeName": node, "containers": [{ "name": "a", "image": "a" }] },
    }));
}

/// A pod of the shop with an address, so that proxies are told of it.
fn web(cluster: &Cluster, name: &str, ip: &str) {
    pod(cluster, "shop", name, "web", "node1");
    let status = json!({ "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
        "conditions": [{ "type": "Ready", "status": "True" }] } });
    let patch = ["patch", "pod", "-n", "shop", name, "--subresource", "status", "-p", &status.to_string()];
    cluster.kubectl(&patch, "").unwrap();
}

fn workload(name: &str) -> String {
    format!("Kubernetes//Pod/shop/{name}")
}

/// Two nodes: a proxy and pods of the shop on the first, a pod of another account on the second.
fn fill(cluster: &Cluster) {
    for namespace in ["culvert-system", "shop"] {
        cluster.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } }));
    }
    let metadata = json!({ "name": "culvert", "namespace": "culvert-system" });
    let settings = json!({ "mesh": "" });
    cluster
        .apply(&json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": settings }));
    for (namespace, name) in [("culvert-system", "ztunnel"), ("shop", "web"), ("shop", "far")] {
        let metadata = json!({ "name": name, "namespace": namespace });
        cluster.apply(&json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata }));
    }
    pod(cluster, "culvert-system", "ztunnel-a", "ztunnel", "node1");
    pod(cluster, "shop", "far", "far", "node2");
    web(cluster, "a", "10.1.0.1");
}

fn root_of(cluster: &Cluster) -> Option<String> {
    let map = ["get", "configmap", "-n", "culvert-system", "culvert-ca-root-cert", "-o", "json"];
    let map: Value = serde_json::from_str(&cluster.kubectl(&map, "").ok()?).unwrap();
    Some(map["data"]["root-cert.pem"].as_str()?.to_owned())
}

fn bound_token(cluster: &Cluster, namespace: &str, account: &str, pod: &str, audience: &str) -> String {
    let token = ["create", "token", account, "-n", namespace, "--audience", audience];
    let bound = ["--bound-object-kind", "Pod", "--bound-object-name", pod];
    cluster.kubectl(&[&token[..], &bound[..]].concat(), "").unwrap().trim().to_owned()
}

/// What the node's proxy gets with a token when it asks for a certificate of an account of the shop.
async fn ask(cluster: &Cluster, plane: &Plane, token: Option<&str>, account: &str) -> Result<(), String> {
    let files = tempfile::tempdir_in("/dev/shm").unwrap();
    let (token_file, roots) = (files.path().join("token"), files.path().join("roots"));
    if let Some(token) = token {
        std::fs::write(&token_file, token).unwrap();
    }
    std::fs::write(&roots, root_of(cluster).unwrap()).unwrap();
    let address = format!("localhost:{}", plane.grpc.port()).parse().unwrap();
    let settings = CaClientSettings {
        connect_timeout: Duration::from_secs(20),
        request_timeout: Duration::from_secs(30),
        ..CaClientSettings::new(vec![address], token_file, "Kubernetes".to_owned())
    };
    let domains = TrustDomains::only(TrustDomain::cluster_local());
    let client = CaClient::start(settings, &roots, None, domains, Clock::system()).unwrap();
    let id = format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap();
    client.issue(&id).await.map(drop).map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_api_server_that_is_slow_then_silent_then_has_forgotten_and_a_proxy_that_is_gone() {
    let Some(mut cluster) = Cluster::start() else { return };
    fill(&cluster);
    let relay = Relay::start(cluster.port, Mode::Slow(Duration::from_secs(2))).await;
    let kubeconfig = relay.kubeconfig(&cluster);
    let plane = Plane::launch(
        &cluster,
        "culvertd-a",
        &kubeconfig,
        &["--service", "localhost", "--api-server-silence", "6"],
    );
    cluster.until("the control plane", || plane.is_ready());
    cluster.until("the root", || {
        cluster.kubectl(&["get", "configmap", "-n", "shop", "istio-ca-root-cert"], "").is_ok()
    });
    let mut updates = plane.proxy(&cluster, "ztunnel-a");
    until_named(&mut updates, ADDRESS_TYPE_URL, &workload("a")).await.ack();
    web(&cluster, "b", "10.1.0.2");
    until_named(&mut updates, ADDRESS_TYPE_URL, &workload("b")).await.ack();
    let token = bound_token(&cluster, "culvert-system", "ztunnel", "ztunnel-a", "istio-ca");
    ask(&cluster, &plane, Some(&token), "web").await.unwrap();

    // It takes connections, and says nothing: neither an error nor an end.
    relay.set(Mode::Silent);
    web(&cluster, "c", "10.1.0.3");
    let fresh = bound_token(&cluster, "culvert-system", "ztunnel", "ztunnel-a", "istio-ca");
    let error = ask(&cluster, &plane, Some(&fresh), "web").await.unwrap_err();
    assert!(error.contains("could not review the token") && error.contains("in time"), "{error}");
    assert!(plane.is_ready(), "proxies keep what they have");
    relay.set(Mode::Pass);
    until_named(&mut updates, ADDRESS_TYPE_URL, &workload("c")).await.ack();
    let since_then = || async {
        let end = tokio::time::Instant::now() + Duration::from_secs(90);
        while let Err(error) = ask(&cluster, &plane, Some(&fresh), "web").await {
            assert!(tokio::time::Instant::now() < end, "{error}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    since_then().await;

    // It is away, and comes back without the history of before (410): what changed is told, and nothing else.
    relay.set(Mode::Gone);
    cluster.kubectl(&["delete", "pod", "-n", "shop", "b", "--grace-period=0", "--force"], "").unwrap();
    web(&cluster, "d", "10.1.0.4");
    cluster.api = None;
    cluster.start_api();
    cluster.until("the API server again", || cluster.kubectl(&["get", "--raw", "/readyz"], "").is_ok());
    relay.set(Mode::Pass);
    let (mut set, mut removed) = (Vec::new(), Vec::new());
    while set.is_empty() || removed.is_empty() {
        let update = next(&mut updates).await;
        set.extend(update.resources.iter().map(|r| r.name.to_string()));
        removed.extend(update.removed.iter().map(ToString::to_string));
        update.ack();
    }
    assert_eq!((set, removed), (vec![workload("d")], vec![workload("b")]));

    // The proxy's pod is deleted: its stream ends, although its token was good when it began.
    tokio::spawn(async move {
        while let Some(update) = updates.next().await {
            update.ack();
        }
    });
    let gone = ["delete", "pod", "-n", "culvert-system", "ztunnel-a", "--grace-period=0", "--force"];
    cluster.kubectl(&gone, "").unwrap();
    let log = || std::fs::read_to_string(cluster.at("culvertd.log")).unwrap();
    cluster.until("the end of its stream", || log().contains("not there any more is ended"));
    cluster.until("its refusal", || log().contains("a stream was refused"));
}

/// A token as another one, with other claims, signed by the API server's key for service accounts.
fn minted(cluster: &Cluster, like: &str, change: impl FnOnce(&mut Value)) -> String {
    let payload = URL_SAFE_NO_PAD.decode(like.split('.').nth(1).unwrap()).unwrap();
    let mut claims: Value = serde_json::from_slice(&payload).unwrap();
    change(&mut claims);
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", encode(&json!({ "alg": "ES256" })), encode(&claims));
    let key =
        identity::key_from_pem("sa.key", &std::fs::read(cluster.at("sa.key")).unwrap()).unwrap().unwrap();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.secret_der()).unwrap();
    let signature = key.sign(&SystemRandom::new(), text.as_bytes()).unwrap();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tokens_that_are_missing_old_young_or_of_others_get_no_certificate() {
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    let plane = Plane::start(&cluster, "culvertd-a");
    cluster.until("the root", || root_of(&cluster).is_some());
    let good = bound_token(&cluster, "culvert-system", "ztunnel", "ztunnel-a", "istio-ca");
    let now = Clock::system().now().as_secs();
    let with = |from: i64, until: i64| {
        minted(&cluster, &good, |claims| {
            for (claim, by) in [("iat", from), ("nbf", from), ("exp", until)] {
                claims[claim] = json!(now.saturating_add_signed(by));
            }
        })
    };
    ask(&cluster, &plane, Some(&with(-10, 600)), "web").await.unwrap();
    let unbound = ["create", "token", "ztunnel", "-n", "culvert-system", "--audience", "istio-ca"];
    let unbound = cluster.kubectl(&unbound, "").unwrap().trim().to_owned();
    // The signature's first character; of the last one, only two bits count.
    let (claims, signature) = good.rsplit_once('.').unwrap();
    let first = if signature.starts_with('A') { 'B' } else { 'A' };
    let forged = format!("{claims}.{first}{}", &signature[1..]);
    let other = bound_token(&cluster, "culvert-system", "ztunnel", "ztunnel-a", "elsewhere");
    let far = bound_token(&cluster, "shop", "far", "far", "istio-ca");
    for (what, token, account, says) in [
        ("none", None, "web", "No such file"),
        ("forged", Some(forged), "web", "does not accept the token"),
        ("of another audience", Some(other), "web", "audience"),
        ("expired", Some(with(-7200, -3600)), "web", "renews the token's file"),
        ("too young", Some(with(1800, 3600)), "web", "who issued it is ahead"),
        ("bound to no pod", Some(unbound), "web", "not bound to a pod"),
        ("of no proxy", Some(far), "web", "no trusted node account"),
        ("for another node's pod", Some(good.clone()), "far", "no pod runs on that node"),
    ] {
        let error = ask(&cluster, &plane, token.as_deref(), account).await.expect_err(what);
        assert!(error.contains(says), "{what}: {error}");
        assert!(token.is_none_or(|token| !error.contains(&token)), "{what}: the token is told");
    }
    ask(&cluster, &plane, Some(&good), "web").await.unwrap();
}

fn secret(cluster: &Cluster, name: &str, data: &Value) {
    let metadata = json!({ "name": name, "namespace": "culvert-system" });
    cluster.apply(&json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_secret_with_a_broken_key_is_named_at_the_start_and_while_running() {
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    let log = || std::fs::read_to_string(cluster.at("culvertd.log")).unwrap_or_default();
    let broken = STANDARD.encode("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    let own = "Secret culvert-system/culvert-ca-secret, key ca-key.pem";
    let given = "Secret culvert-system/cacerts, key";
    let patch = |data: Value| {
        let data = json!({ "data": data }).to_string();
        cluster
            .kubectl(&["patch", "secret", "-n", "culvert-system", "culvert-ca-secret", "-p", &data], "")
            .unwrap();
    };
    let key = || {
        let get = [
            "get",
            "secret",
            "-n",
            "culvert-system",
            "culvert-ca-secret",
            "-o",
            "jsonpath={.data.ca-key\\.pem}",
        ];
        cluster.kubectl(&get, "").unwrap_or_default()
    };

    // A given authority that can't be used: no other one is made in its place.
    secret(
        &cluster,
        "cacerts",
        &json!({ "ca-cert.pem": broken, "ca-key.pem": broken, "root-cert.pem": broken }),
    );
    let first = Plane::launch(&cluster, "culvertd-a", &cluster.kubeconfig(), LOCAL);
    cluster.until("the reason", || log().contains(given));
    assert!(!first.is_ready() && key().is_empty());
    cluster.kubectl(&["delete", "secret", "-n", "culvert-system", "cacerts"], "").unwrap();
    cluster.until("a root", || first.is_ready() && root_of(&cluster).is_some());

    // While it runs: the last good one signs, and a second control plane does not start with the broken one.
    let token = bound_token(&cluster, "culvert-system", "ztunnel", "ztunnel-a", "istio-ca");
    let good = key();
    patch(json!({ "ca-key.pem": broken }));
    cluster.until("the reason", || log().contains(own) && log().contains("last_good_in_force"));
    ask(&cluster, &first, Some(&token), "web").await.unwrap();
    let reasons = log().matches(own).count();
    let second = Plane::launch(&cluster, "culvertd-b", &cluster.kubeconfig(), LOCAL);
    cluster.until("the second's reason", || log().matches(own).count() > reasons);
    assert!(!second.is_ready());
    patch(json!({ "ca-key.pem": good }));
    cluster.until("the second", || second.is_ready());
    ask(&cluster, &second, Some(&token), "web").await.unwrap();

    // A given authority that is broken when it comes: the one in force stays.
    let before = log().matches(given).count();
    secret(
        &cluster,
        "cacerts",
        &json!({ "ca-cert.pem": broken, "ca-key.pem": broken, "root-cert.pem": broken }),
    );
    cluster.until("the reason", || log().matches(given).count() > before);
    assert_eq!(key(), good);
    ask(&cluster, &first, Some(&token), "web").await.unwrap();
    cluster.kubectl(&["delete", "secret", "-n", "culvert-system", "culvert-ca-secret"], "").unwrap();
    cluster.until("the Secret as it was", || key() == good);
}
