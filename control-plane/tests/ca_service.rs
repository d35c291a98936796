//! The CA end to end: the client that nodes use, over real TLS on loopback, to the service, with an API server that
//! reviews tokens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod fake_api;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use control_plane::ca::{
    Ca, CaSettings, Fleet, KubeReviewer, PodFacts, Pods, Proxy, ROTATE, TRUSTED_ROOTS, trusted_roots,
};
use control_plane::serve::{Limits, Port, Proving, connections};
use fake_api::FakeApi;
use identity::{
    CaClient, CaClientSettings, CertificateSettings, Certificates, Clock, Issuer, RootId, SigningRequest,
    certificates_from_pem, certificates_to_pem,
};
use model::{SpiffeId, TrustDomain, TrustDomains};
use process::metrics::{Format, Registry};
use proto::wire::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use proto::wire::auth::{IstioCertificateRequest, IstioCertificateResponse};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::{Code, Request, Status};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const OWN: &str = "/api/v1/namespaces/culvert-system/secrets/culvert-ca-secret";
/// After so long, the port closes what nobody known uses.
const UNPROVEN: Duration = Duration::from_secs(2);
const ZTUNNEL: &str = "/api/v1/namespaces/culvert-system/pods/ztunnel-1";

/// One node; its proxy, and pods of the shop.
#[derive(Default)]
struct Store {
    late: AtomicBool,
}

impl Pods for Store {
    fn is_ready(&self) -> bool {
        true
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodFacts> {
        let known = (namespace, name) == ("culvert-system", "ztunnel-1") || namespace == "shop";
        known.then(|| PodFacts {
            uid: format!("uid-{name}"),
            node: Some("node-1".into()),
            service_account: if namespace == "shop" { "cart".into() } else { "ztunnel".into() },
            finished: false,
        })
    }

    fn has_namespace(&self, namespace: &str) -> bool {
        ["shop", "culvert-system"].contains(&namespace)
    }

    fn is_waypoint(&self, namespace: &str, name: &str) -> bool {
        (namespace, name) == ("shop", "waypoint-1")
    }

    fn runs_on(&self, node: &str, namespace: &str, account: &str) -> bool {
        let late = account == "late" && self.late.load(Ordering::SeqCst);
        (node, namespace) == ("node-1", "shop") && (account.starts_with("cart") || late)
    }
}

struct FromPods(FakeApi);

impl Fleet for FromPods {
    fn proxies(&self) -> Option<Vec<Proxy>> {
        let pod = self.0.get(ZTUNNEL)?;
        let annotations = serde_json::from_value(pod["metadata"]["annotations"].clone()).unwrap_or_default();
        Some(vec![Proxy { name: "culvert-system/ztunnel-1".into(), trusts: trusted_roots(&annotations) }])
    }
}

struct Cluster {
    api: FakeApi,
    ca: Ca,
    store: Arc<Store>,
    registry: Registry,
    address: SocketAddr,
    dir: TempDir,
    _senders: (watch::Sender<bool>, watch::Sender<Arc<BTreeSet<String>>>),
}

impl Cluster {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut CaSettings)) -> Self {
        let api = FakeApi::default();
        let registry = Registry::new();
        let domains = TrustDomains::only(TrustDomain::cluster_local());
        let mut settings = CaSettings::new("culvert-system", "Kubernetes");
        settings.serving_names.push("localhost".into());
        change(&mut settings);
        let ca = Ca::new(settings, domains, Clock::system(), &registry);
        api.put(
            ZTUNNEL,
            json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "ztunnel-1", "namespace": "culvert-system", "uid": "uid-ztunnel-1"}}),
        );
        let (leads, leader) = watch::channel(true);
        let (namespaces, receiver) = watch::channel(Arc::default());
        tokio::spawn(ca.clone().run(api.client(), Arc::new(FromPods(api.clone())), receiver, leader));
        ca.wait_ready().await;
        let store = Arc::new(Store::default());
        let port = Port::new(Limits { unproven: UNPROVEN, ..Limits::default() }, &registry);
        let address = serve(&ca, &api, store.clone(), port).await;
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let cluster = Self { api, ca, store, registry, address, dir, _senders: (leads, namespaces) };
        cluster.write_roots();
        let token = cluster.token("culvert-system:ztunnel", Some("ztunnel-1"));
        std::fs::write(cluster.path("token"), token).unwrap();
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the kubelet does some time after the ConfigMap has changed.
    fn write_roots(&self) {
        let next = self.path("next.pem");
        std::fs::write(&next, &self.ca.current().get().unwrap().roots_pem).unwrap();
        std::fs::rename(next, self.path("root-cert.pem")).unwrap();
    }

    /// A token that the API server accepts.
    fn token(&self, account: &str, pod: Option<&str>) -> String {
        let expires = Clock::system().now().as_secs() + 3600;
        let claims = URL_SAFE_NO_PAD.encode(json!({"exp": expires, "for": [account, pod]}).to_string());
        let token = format!("header.{claims}.signature");
        let extra = pod.map(|pod| {
            json!({"authentication.kubernetes.io/pod-name": [pod],
                "authentication.kubernetes.io/pod-uid": [format!("uid-{pod}")],
                "authentication.kubernetes.io/node-name": ["node-1"]})
        });
        let user = json!({"username": format!("system:serviceaccount:{account}"), "extra": extra});
        self.api.accept(&token, json!({"authenticated": true, "audiences": ["istio-ca"], "user": user}));
        token
    }

    fn client_settings(&self, addresses: &[SocketAddr]) -> CaClientSettings {
        let addresses =
            addresses.iter().map(|a| format!("localhost:{}", a.port()).parse().unwrap()).collect();
        CaClientSettings {
            connect_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(3),
            report_spread: Duration::ZERO,
            ..CaClientSettings::new(addresses, self.path("token"), "Kubernetes".into())
        }
    }

    fn client(&self, addresses: &[SocketAddr]) -> CaClient {
        let domains = TrustDomains::only(TrustDomain::cluster_local());
        let settings = self.client_settings(addresses);
        CaClient::start(settings, &self.path("root-cert.pem"), None, domains, Clock::system()).unwrap()
    }

    /// A request as any client may send it.
    async fn ask(
        &self,
        request: IstioCertificateRequest,
        headers: &[(&'static str, &str)],
    ) -> Result<IstioCertificateResponse, Status> {
        let file = identity::RootFile::start(&self.path("root-cert.pem"), Clock::system()).unwrap();
        let address = format!("localhost:{}", self.address.port()).parse().unwrap();
        let channel = identity::Dialer::new(address, file, Duration::from_secs(5)).channel();
        let mut request = Request::new(request);
        for (name, value) in headers {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        let mut client = IstioCertificateServiceClient::new(channel);
        client.create_certificate(request).await.map(tonic::Response::into_inner)
    }

    fn metric(&self, name: &str) -> u64 {
        let text = self.registry.encode(Format::Prometheus);
        let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).expect(name);
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

async fn serve(ca: &Ca, api: &FakeApi, pods: Arc<Store>, port: Port) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = connections(listener, ca.server_config(&[b"h2"]).unwrap(), port.clone());
    let mut server = tonic::transport::Server::builder().layer(Proving(port));
    tokio::spawn(server.add_service(ca.service(api.client(), pods)).serve_with_incoming(incoming));
    address
}

fn spiffe(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn openssl_csr(dir: &Path) -> String {
    let key = dir.join("key.pem");
    let args =
        ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x"];
    let out = Command::new("openssl").args(args).arg("-keyout").arg(key).output().unwrap();
    assert!(out.status.success());
    let text = String::from_utf8(out.stdout).unwrap();
    SigningRequest::from_pem(text.as_bytes()).unwrap();
    text
}

fn metadata(fields: &[(&str, prost_types::value::Kind)]) -> Option<prost_types::Struct> {
    let value = |kind: &prost_types::value::Kind| prost_types::Value { kind: Some(kind.clone()) };
    let fields = fields.iter().map(|(name, kind)| ((*name).to_owned(), value(kind))).collect();
    Some(prost_types::Struct { fields })
}

fn string(text: &str) -> prost_types::value::Kind {
    prost_types::value::Kind::StringValue(text.to_owned())
}

async fn until(mut condition: impl FnMut() -> bool) {
    let patience = tokio::time::timeout(Duration::from_secs(60), async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    patience.await.expect("it does not come");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_the_certificates_of_its_pods_and_openssl_verifies_them() {
    let cluster = Cluster::start().await;
    let client = cluster.client(&[cluster.address]);
    let issued = client.issue(&spiffe(CART)).await.unwrap();
    let leaf = cluster.path("leaf.pem");
    std::fs::write(&leaf, certificates_to_pem(&issued.chain[..1])).unwrap();
    let verified = Command::new("openssl")
        .args(["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile"])
        .args([cluster.path("root-cert.pem"), leaf.clone()])
        .output()
        .unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    let text = Command::new("openssl").args(["x509", "-noout", "-text", "-in"]).arg(&leaf).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains(&format!("URI:{CART}")), "{text}");

    // Looked after as any other issuer's: verified by the bundle, kept, given again.
    let client = Arc::new(client);
    let bundle = client.bundle().clone();
    let certificates = Certificates::new(
        client.clone(),
        bundle.clone(),
        CertificateSettings::default(),
        None,
        Clock::system(),
    );
    let one = certificates.get(&spiffe(CART)).await.unwrap();
    assert_eq!(one.root(), bundle.snapshot().roots()[0].id);
    let denied = certificates.get(&spiffe("spiffe://cluster.local/ns/shop/sa/elsewhere")).await.unwrap_err();
    let denied = denied.to_string();
    assert!(denied.contains("of which no pod runs on that node") && denied.contains("ztunnel-1"), "{denied}");
    // The report and the first request may have come at once.
    assert!((1..=2).contains(&cluster.api.review_count()), "the same token is reviewed once a minute");
    assert!(cluster.metric("citadel_server_csr_count") >= 3);
    assert!(cluster.metric("citadel_server_success_cert_issuance_count") >= 2);
    assert_eq!(cluster.metric("citadel_server_id_extraction_err_count"), 1);
    assert!(cluster.metric("citadel_server_cert_chain_expiry_seconds") > 3000 * 24 * 3600);
}

/// Whether OpenSSL's client gets a connection of this version.
async fn connects(address: SocketAddr, version: &str) -> bool {
    let mut client = tokio::process::Command::new("openssl");
    client.args(["s_client", "-connect", &address.to_string(), version, "-brief"]);
    let out = client.stdin(std::process::Stdio::null()).output().await.unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(said.contains("CONNECTION ESTABLISHED") || said.contains("alert protocol version"), "{said}");
    said.contains("CONNECTION ESTABLISHED")
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_1_2_is_refused_where_proxies_connect_and_by_what_admission_is_configured_with() {
    let cluster = Cluster::start().await;
    // What the port of admission is served with; the port itself is not asked here.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let admission = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(cluster.ca.server_config(&[b"http/1.1"]).unwrap());
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            // A refusal is the client's to tell.
            let _ = acceptor.accept(tcp).await;
        }
    });
    for address in [cluster.address, admission] {
        assert!(connects(address, "-tls1_3").await);
        assert!(!connects(address, "-tls1_2").await);
    }
}

/// A request for an identity with this CSR.
fn request(csr: &str, id: &str) -> IstioCertificateRequest {
    let metadata = metadata(&[("ImpersonatedIdentity", string(id))]);
    IstioCertificateRequest { csr: csr.to_owned(), validity_duration: 3600, metadata }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_known_is_refused_with_the_reason() {
    let cluster = Cluster::start().await;
    let csr = openssl_csr(cluster.dir.path());
    let token = format!("Bearer {}", cluster.token("culvert-system:ztunnel", Some("ztunnel-1")));
    let user = json!({"username": "system:serviceaccount:culvert-system:ztunnel"});
    let status = json!({"authenticated": true, "audiences": ["api"], "user": user});
    cluster.api.accept("other.audience.x", status);
    cluster.api.accept("ex.pi.red", json!({"error": "service account token has expired"}));
    for (what, authorization, cluster_id, says) in [
        ("no token", "", "", "no header authorization"),
        ("no bearer", "Basic eA==", "", "no bearer token"),
        ("a forged token", "Bearer a.b.c", "", "unknown token"),
        ("an expired token", "Bearer ex.pi.red", "", "has expired"),
        ("another audience", "Bearer other.audience.x", "", "istio-ca"),
        ("another cluster", &token, "west", "cluster \"west\""),
    ] {
        let headers = [("authorization", authorization), ("clusterid", cluster_id)];
        let headers: Vec<_> = headers.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        let status = cluster.ask(request(&csr, CART), &headers).await.expect_err(what);
        assert_eq!(status.code(), Code::Unauthenticated, "{what}: {status}");
        assert!(status.message().contains(says), "{what}: {status}");
    }
    assert_eq!(cluster.metric("citadel_server_authentication_failure_count"), 6);
    assert_eq!(cluster.metric("citadel_server_success_cert_issuance_count"), 0);
    let headers = [("authorization", token.as_str()), ("clusterid", "Kubernetes")];
    cluster.ask(request(&csr, CART), &headers).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_what_is_not_his_is_refused_with_the_reason() {
    let cluster = Cluster::start().await;
    let csr = openssl_csr(cluster.dir.path());
    let token = format!("Bearer {}", cluster.token("culvert-system:ztunnel", Some("ztunnel-1")));
    let workload = format!("Bearer {}", cluster.token("shop:cart", Some("cart-1")));
    let deleted = format!("Bearer {}", cluster.token("culvert-system:ztunnel", Some("ztunnel-9")));
    for (what, id, token, says) in [
        ("a proxy that is gone", CART, &deleted, "is not there"),
        ("for another", "spiffe://cluster.local/ns/shop/sa/x", &workload, "no trusted node account"),
        ("for another node's", "spiffe://cluster.local/ns/shop/sa/x", &token, "no pod runs on that node"),
        ("another mesh", "spiffe://evil/ns/shop/sa/cart", &token, "trust domain"),
        ("no namespace", "spiffe://cluster.local/ns/none/sa/x", &token, "namespace is not there"),
        ("no identity", "cart", &token, "not a SPIFFE ID"),
    ] {
        let status = cluster.ask(request(&csr, id), &[("authorization", token)]).await.expect_err(what);
        assert_eq!(status.code(), Code::PermissionDenied, "{what}: {status}");
        assert!(status.message().contains(says), "{what}: {status}");
        assert!(!status.message().contains("signature"), "{what}: a token is told: {status}");
    }
    assert_eq!(cluster.metric("citadel_server_id_extraction_err_count"), 6);
    cluster.ask(request(&csr, CART), &[("authorization", &workload)]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_signed_is_refused_with_the_reason() {
    let cluster = Cluster::start().await;
    let csr = openssl_csr(cluster.dir.path());
    let token = format!("Bearer {}", cluster.token("culvert-system:ztunnel", Some("ztunnel-1")));
    let wrong = |name: &str, kind| IstioCertificateRequest {
        metadata: metadata(&[(name, kind)]),
        ..request(&csr, CART)
    };
    let number = prost_types::value::Kind::NumberValue(1.0);
    let values = vec![prost_types::Value { kind: Some(string("abc")) }];
    let roots = prost_types::value::Kind::ListValue(prost_types::ListValue { values });
    for (what, request, says) in [
        ("garbage", request("hello", CART), "PEM"),
        ("nothing", request("", CART), "PEM"),
        ("too much", request(&"A".repeat(100_000), CART), "at most"),
        ("another signer", wrong("CertSigner", string("x")), "CertSigner"),
        ("an identity of another type", wrong("ImpersonatedIdentity", number), "no text"),
        ("roots that are none", wrong("TrustedRoots", roots), "ids of roots"),
    ] {
        let status = cluster.ask(request, &[("authorization", &token)]).await.expect_err(what);
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status}");
        assert!(status.message().contains(says), "{what}: {status}");
    }
    assert_eq!(cluster.metric("citadel_server_csr_parsing_err_count"), 6);
    let beyond = request(&"A".repeat(200_000), CART);
    let status = cluster.ask(beyond, &[("authorization", &token)]).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    cluster.ask(request(&csr, CART), &[("authorization", &token)]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn lifetimes_are_clamped_and_the_answer_ends_with_the_roots() {
    let hours = |hours: u64| Duration::from_secs(hours * 3600);
    let cluster = Cluster::with(|settings| settings.max_lifetime = hours(48)).await;
    let csr = openssl_csr(cluster.dir.path());
    let token = format!("Bearer {}", cluster.token("shop:cart", Some("cart-1")));
    for (asked, given) in [
        (0, hours(24)),
        (-5, hours(24)),
        (i64::MIN, hours(24)),
        (600, Duration::from_secs(600)),
        (48 * 3600, hours(48)),
        (90 * 24 * 3600, hours(48)),
        (i64::MAX, hours(48)),
    ] {
        let request = IstioCertificateRequest { csr: csr.clone(), validity_duration: asked, metadata: None };
        let answer = cluster.ask(request, &[("authorization", &token)]).await.unwrap();
        assert_eq!(answer.cert_chain.len(), 2, "leaf and root");
        let leaf = certificates_from_pem("leaf", answer.cert_chain[0].as_bytes()).unwrap();
        let file = cluster.path("leaf.pem");
        std::fs::write(&file, certificates_to_pem(&leaf)).unwrap();
        let lives = |seconds: u64| {
            let check = Command::new("openssl")
                .args(["x509", "-noout", "-checkend", &seconds.to_string(), "-in"])
                .arg(&file)
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            check.success()
        };
        assert!(lives(given.as_secs() - 60) && !lives(given.as_secs() + 1), "{asked}");
        let roots = certificates_from_pem("roots", answer.cert_chain[1].as_bytes()).unwrap();
        let ids: Vec<_> = roots.iter().filter_map(RootId::of_certificate).collect();
        assert_eq!(ids, cluster.ca.current().get().unwrap().record.root_ids());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_the_control_plane_hears_of_a_moment_later_is_waited_for() {
    let cluster = Cluster::start().await;
    let client = cluster.client(&[cluster.address]);
    let store = cluster.store.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(400)).await;
        store.late.store(true, Ordering::SeqCst);
    });
    client.issue(&spiffe("spiffe://cluster.local/ns/shop/sa/late")).await.unwrap();
}

/// A clock that is ahead by so many seconds.
#[derive(Debug)]
struct Ahead(i64);

impl rustls::time_provider::TimeProvider for Ahead {
    fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
        let now = Clock::system().now().as_secs().saturating_add_signed(self.0);
        Some(rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(now)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_clock_is_a_little_late_is_served_and_one_that_is_far_off_is_told_so() {
    let cluster = Cluster::start().await;
    let ask = async |ahead: i64| {
        let clock = Clock::new(Arc::new(Ahead(ahead)));
        let domains = TrustDomains::only(TrustDomain::cluster_local());
        let settings = cluster.client_settings(&[cluster.address]);
        let client = CaClient::start(settings, &cluster.path("root-cert.pem"), None, domains, clock.clone());
        let client = Arc::new(client.unwrap());
        let bundle = client.bundle().clone();
        let certificates = Certificates::new(client, bundle, CertificateSettings::default(), None, clock);
        certificates.get(&spiffe(CART)).await.map(drop).map_err(|error| error.to_string())
    };
    // Certificates are valid from two minutes before.
    for ahead in [-90, 0, 3600] {
        ask(ahead).await.unwrap();
    }
    for ahead in [-600, 25 * 3600] {
        let error = ask(ahead).await.unwrap_err();
        assert!(error.contains("compare the clocks"), "{ahead}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waypoint_can_say_which_roots_it_trusts_and_a_workload_can_not() {
    let cluster = Cluster::start().await;
    let path = |pod: &str| format!("/api/v1/namespaces/shop/pods/{pod}");
    let start = |pod: &str| {
        let metadata = json!({"name": pod, "namespace": "shop", "uid": format!("uid-{pod}")});
        cluster.api.put(&path(pod), json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata}));
        std::fs::write(cluster.path("token"), cluster.token("shop:cart", Some(pod))).unwrap();
        cluster.client(&[cluster.address])
    };
    let root = cluster.ca.current().get().unwrap().authority.root();
    for (pod, said) in [("cart-1", false), ("waypoint-1", true)] {
        let client = start(pod);
        // It goes on to say it until it is heard.
        let mut reported = client.reported();
        let heard =
            tokio::time::timeout(Duration::from_secs(60), reported.wait_for(|ids| *ids == [root])).await;
        drop(heard.expect("the report").unwrap());
        client.issue(&spiffe(CART)).await.unwrap();
        let annotation =
            cluster.api.get(&path(pod)).unwrap()["metadata"]["annotations"][TRUSTED_ROOTS].clone();
        assert_eq!(
            annotation.as_str().is_some_and(|text| text == root.to_string()),
            said,
            "{pod}: {annotation}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_asks_after_a_pause_connects_anew() {
    let cluster = Cluster::start().await;
    let client = cluster.client(&[cluster.address]);
    for _ in 0..2 {
        client.issue(&spiffe(CART)).await.unwrap();
        until(|| cluster.metric("culvertd_connections") == 0).await;
    }
    // One that goes on asking is not cut off in between.
    let end = tokio::time::Instant::now() + 2 * UNPROVEN;
    while tokio::time::Instant::now() < end {
        client.issue(&spiffe(CART)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(cluster.metric("culvertd_connections"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_replica_serves_when_one_is_away_and_errors_say_what_to_look_at() {
    let cluster = Cluster::start().await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    // One that takes connections and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = mute.local_addr().unwrap();
    let client = cluster.client(&[free, silent, cluster.address]);
    client.issue(&spiffe(CART)).await.unwrap();
    let begin = tokio::time::Instant::now();
    client.issue(&spiffe(CART)).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(1), "the one that answered is asked first");

    let error = |addresses: &[SocketAddr]| {
        let client = cluster.client(addresses);
        async move { client.issue(&spiffe(CART)).await.unwrap_err().to_string() }
    };
    let text = error(&[free]).await;
    assert!(text.contains("can't be reached") && text.contains(&free.port().to_string()), "{text}");
    let text = error(&[silent]).await;
    assert!(text.contains("does not answer within"), "{text}");

    // The file of roots is another mesh's.
    let other = Cluster::start().await;
    std::fs::copy(other.path("root-cert.pem"), cluster.path("root-cert.pem")).unwrap();
    let text = error(&[cluster.address]).await;
    assert!(text.contains("no root in") && text.contains("istio-ca-root-cert"), "{text}");
    cluster.write_roots();

    std::fs::write(cluster.path("token"), "forged.to.ken\n").unwrap();
    let text = error(&[cluster.address]).await;
    assert!(text.contains("does not accept the token in") && text.contains("unknown token"), "{text}");
    std::fs::write(cluster.path("token"), "").unwrap();
    let text = error(&[cluster.address]).await;
    assert!(text.contains("projected service account token"), "{text}");
    std::fs::remove_file(cluster.path("token")).unwrap();
    let text = error(&[cluster.address]).await;
    assert!(text.contains("No such file"), "{text}");
    // The token is read anew each time.
    let client = cluster.client(&[cluster.address]);
    client.issue(&spiffe(CART)).await.unwrap_err();
    std::fs::write(cluster.path("token"), cluster.token("culvert-system:ztunnel", Some("ztunnel-1")))
        .unwrap();
    client.issue(&spiffe(CART)).await.unwrap();

    // The API server is away: what was reviewed goes on for a while, the rest is told why.
    cluster.api.set_down(true);
    client.issue(&spiffe(CART)).await.unwrap();
    let expires = URL_SAFE_NO_PAD.encode(r#"{"exp": 99999999999}"#);
    std::fs::write(cluster.path("token"), format!("new.{expires}.token")).unwrap();
    let text = client.issue(&spiffe(CART)).await.unwrap_err().to_string();
    assert!(text.contains("could not review the token") && !text.contains(&expires), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_root_signs_when_the_node_has_read_it_and_said_so() {
    let cluster = Cluster::start().await;
    let client = Arc::new(cluster.client(&[cluster.address]));
    let a = cluster.ca.current().get().unwrap().authority.root();
    let reported = || {
        let pod = cluster.api.get(ZTUNNEL).unwrap();
        let annotations = pod["metadata"]["annotations"].clone();
        trusted_roots(&serde_json::from_value(annotations).unwrap_or_default())
    };
    until(|| reported() == [a]).await;
    assert!(cluster.api.get(ZTUNNEL).unwrap()["metadata"]["annotations"][TRUSTED_ROOTS].is_string());

    let mut secret = cluster.api.get(OWN).unwrap();
    secret["metadata"]["annotations"][ROTATE] = json!("1");
    cluster.api.put(OWN, secret);
    until(|| cluster.ca.current().get().unwrap().record.root_ids().len() == 2).await;
    let b = cluster.ca.current().get().unwrap().record.root_ids()[1];
    // An answer tells of the new root before the file does; that is no promise to trust the control plane by it.
    let issued = client.issue(&spiffe(CART)).await.unwrap();
    assert_eq!(client.bundle().snapshot().roots().len(), 2);
    assert_eq!(issued.chain.len(), 1);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(cluster.ca.current().get().unwrap().authority.root(), a, "the gate is shut");
    assert_eq!(reported(), [a]);

    cluster.write_roots();
    until(|| reported() == [a, b]).await;
    until(|| cluster.ca.current().get().unwrap().authority.root() == b).await;
    // The control plane's own certificate is of the new root now, and the node goes on.
    let fresh = cluster.client(&[cluster.address]);
    fresh.issue(&spiffe(CART)).await.unwrap();
    client.issue(&spiffe(CART)).await.unwrap();
    let certificates = Certificates::new(
        client.clone(),
        client.bundle().clone(),
        CertificateSettings::default(),
        None,
        Clock::system(),
    );
    assert_eq!(certificates.get(&spiffe(CART)).await.unwrap().root(), b);
    // A reviewer that is asked directly, as ADS does.
    let reviewer = KubeReviewer::new(cluster.api.client());
    let authenticator = control_plane::ca::Authenticator::new(reviewer, Clock::system());
    let token = std::fs::read_to_string(cluster.path("token")).unwrap();
    let caller = authenticator.caller(Some(&format!("Bearer {token}"))).await.unwrap();
    assert_eq!(caller.pod.unwrap().name, "ztunnel-1");
}
