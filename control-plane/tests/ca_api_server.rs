//! The CA against a real API server, with no more permissions than the chart gives: etcd and kube-apiserver on loopback,
//! of the binaries that `make e2e` builds. Without them, or without Helm, it says so and tests nothing.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use control_plane::ca::{Ca, CaSettings, Fleet, PodFacts, Pods, Proxy, trusted_roots};
use identity::{CaClient, CaClientSettings, Clock, Issuer, RootId};
use model::{TrustDomain, TrustDomains};
use process::metrics::Registry;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;

const NAMESPACE: &str = "culvert-system";

/// A process that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct ApiServer {
    bin: PathBuf,
    dir: TempDir,
    url: String,
    _processes: [Running; 2],
}

impl ApiServer {
    /// `None` if the binaries are not there.
    fn start() -> Option<Self> {
        let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kube/bin");
        let bin = std::env::var_os("KUBE_BIN").map_or(bin, PathBuf::from);
        if ["etcd", "kube-apiserver", "kubectl", "helm"].iter().any(|name| !bin.join(name).exists()) {
            eprintln!(
                "SKIPPED: no etcd, kube-apiserver, kubectl and helm in {}; make e2e builds them",
                bin.display()
            );
            return None;
        }
        let dir = tempfile::Builder::new().prefix("culvert-api-").tempdir().unwrap();
        let key = dir.path().join("sa.key");
        let made = Command::new("openssl")
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"])
            .arg(&key)
            .output()
            .unwrap();
        assert!(made.status.success());
        std::fs::write(dir.path().join("tokens"), "admin-token,admin,admin,system:masters\n").unwrap();
        let (client, peer, port) = (harness::port::free(), harness::port::free(), harness::port::free());
        let spawn = |name: &str, args: &[String]| {
            let log = std::fs::File::create(dir.path().join(format!("{name}.log"))).unwrap();
            let child = Command::new(bin.join(name))
                .args(args)
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            Running(child)
        };
        let at = |name: &str| dir.path().join(name).display().to_string();
        let etcd = spawn(
            "etcd",
            &[
                format!("--data-dir={}", at("etcd")),
                format!("--listen-client-urls=http://127.0.0.1:{client}"),
                format!("--advertise-client-urls=http://127.0.0.1:{client}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                "--unsafe-no-fsync".into(),
            ],
        );
        let server = spawn(
            "kube-apiserver",
            &[
                format!("--etcd-servers=http://127.0.0.1:{client}"),
                "--bind-address=127.0.0.1".into(),
                format!("--secure-port={port}"),
                format!("--cert-dir={}", at("certs")),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                format!("--service-account-key-file={}", at("sa.key")),
                format!("--service-account-signing-key-file={}", at("sa.key")),
                "--service-cluster-ip-range=10.96.0.0/16".into(),
                "--authorization-mode=RBAC".into(),
                format!("--token-auth-file={}", at("tokens")),
            ],
        );
        let url = format!("https://127.0.0.1:{port}");
        let api = Self { bin, dir, url, _processes: [etcd, server] };
        api.wait();
        Some(api)
    }

    fn wait(&self) {
        for _ in 0..240 {
            if self.try_kubectl(&["get", "--raw", "/readyz"], "").is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        let log = std::fs::read_to_string(self.dir.path().join("kube-apiserver.log")).unwrap_or_default();
        panic!("the API server does not get ready: {}", &log[log.len().saturating_sub(3000)..]);
    }

    fn try_kubectl(&self, args: &[&str], input: &str) -> Result<String, String> {
        let file = self.dir.path().join("input");
        std::fs::write(&file, input).unwrap();
        let out = Command::new(self.bin.join("kubectl"))
            .args(["--server", &self.url, "--token", "admin-token", "--insecure-skip-tls-verify"])
            .args(["--cache-dir", self.dir.path().join("cache").to_str().unwrap()])
            .args(args)
            .stdin(std::fs::File::open(file).unwrap())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
    }

    fn kubectl(&self, args: &[&str]) -> String {
        self.try_kubectl(args, "").unwrap_or_else(|e| panic!("kubectl {args:?}: {e}"))
    }

    fn apply(&self, text: &str) {
        self.try_kubectl(&["apply", "--validate=false", "-f", "-"], text)
            .unwrap_or_else(|e| panic!("{e}\n{text}"));
    }

    fn object(&self, args: &[&str]) -> Option<Value> {
        let text = self.try_kubectl(&[&["get", "-o", "json"], args].concat(), "").ok()?;
        serde_json::from_str(&text).ok()
    }

    fn client(&self, token: &str) -> kube::Client {
        let mut config = kube::Config::new(self.url.parse().unwrap());
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(token.to_owned().into());
        kube::Client::try_from(config).unwrap()
    }

    /// What the chart gives the control plane.
    fn apply_permissions(&self) {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/culvert");
        let out = Command::new(self.bin.join("helm"))
            .args(["template", "culvert", chart.to_str().unwrap(), "--namespace", NAMESPACE])
            .args(["--show-only", "templates/control-plane-rbac.yaml"])
            .env("HELM_CACHE_HOME", self.dir.path())
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        self.apply(&String::from_utf8(out.stdout).unwrap());
    }

    fn pod(&self, namespace: &str, name: &str, account: &str, node: &str) {
        self.apply(
            &json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace},
                "spec": {"serviceAccountName": account, "nodeName": node,
                    "containers": [{"name": "a", "image": "none"}]}})
            .to_string(),
        );
    }

    /// A token as the kubelet projects it.
    fn token(&self, namespace: &str, account: &str, pod: &str, audience: &str) -> String {
        let args = ["create", "token", account, "-n", namespace, "--audience", audience];
        let bound = ["--bound-object-kind", "Pod", "--bound-object-name", pod];
        self.kubectl(&[&args[..], &bound[..]].concat()).trim().to_owned()
    }
}

/// The pods as they were listed last.
#[derive(Default)]
struct Listed(Mutex<Vec<Value>>);

impl Listed {
    fn read(&self, api: &ApiServer) {
        let list = api.object(&["pods", "-A"]).unwrap();
        *self.0.lock().unwrap() = list["items"].as_array().unwrap().clone();
    }
}

impl Pods for Listed {
    fn is_ready(&self) -> bool {
        true
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodFacts> {
        let pods = self.0.lock().unwrap();
        let named =
            |pod: &&Value| pod["metadata"]["namespace"] == namespace && pod["metadata"]["name"] == name;
        let pod = pods.iter().find(named)?;
        Some(PodFacts {
            uid: pod["metadata"]["uid"].as_str()?.to_owned(),
            node: pod["spec"]["nodeName"].as_str().map(str::to_owned),
            service_account: pod["spec"]["serviceAccountName"].as_str()?.to_owned(),
            finished: false,
        })
    }

    fn has_namespace(&self, _: &str) -> bool {
        true
    }

    fn runs_on(&self, node: &str, namespace: &str, account: &str) -> bool {
        let pods = self.0.lock().unwrap();
        pods.iter().any(|pod| {
            pod["spec"]["nodeName"] == node
                && pod["metadata"]["namespace"] == namespace
                && pod["spec"]["serviceAccountName"] == account
        })
    }
}

/// The one proxy, by what its pod says.
struct Annotated(Arc<ApiServer>);

impl Fleet for Annotated {
    fn proxies(&self) -> Option<Vec<Proxy>> {
        let pod = self.0.object(&["pod", "-n", NAMESPACE, "ztunnel-1"])?;
        let said = serde_json::from_value(pod["metadata"]["annotations"].clone()).unwrap_or_default();
        Some(vec![Proxy { name: "culvert-system/ztunnel-1".into(), trusts: trusted_roots(&said) }])
    }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(tokio::time::Instant::now() < end, "{what} does not come");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn serve(ca: &Ca, client: kube::Client, pods: Arc<Listed>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(ca.server_config(&[b"h2"]).unwrap());
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            if let Ok(tls) = acceptor.accept(tcp).await {
                let _ = sender.send(Ok::<_, std::io::Error>(tls)).await;
            }
        }
    });
    let incoming = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let server = tonic::transport::Server::builder().add_service(ca.service(client, pods));
    tokio::spawn(server.serve_with_incoming(incoming));
    address
}

fn replica(
    api: &Arc<ApiServer>,
    client: &kube::Client,
    leads: &watch::Sender<bool>,
    namespaces: &watch::Sender<Arc<BTreeSet<String>>>,
) -> Ca {
    let mut settings = CaSettings::new(NAMESPACE, "Kubernetes");
    settings.serving_names.push("localhost".into());
    let domains = TrustDomains::only(TrustDomain::cluster_local());
    let ca = Ca::new(settings, domains, Clock::system(), &Registry::new());
    let fleet = Arc::new(Annotated(api.clone()));
    tokio::spawn(ca.clone().run(client.clone(), fleet, namespaces.subscribe(), leads.subscribe()));
    ca
}

fn roots_in(text: &str) -> Vec<RootId> {
    let roots = identity::certificates_from_pem("text", text.as_bytes()).unwrap_or_default();
    roots.iter().filter_map(RootId::of_certificate).collect()
}

/// Two replicas on an API server with a few pods, and a node of which the files are.
struct Lab {
    api: Arc<ApiServer>,
    ca: Ca,
    other: Ca,
    address: SocketAddr,
    dir: TempDir,
    first_root: RootId,
    _leads: [watch::Sender<bool>; 2],
    _namespaces: watch::Sender<Arc<BTreeSet<String>>>,
}

impl Lab {
    async fn start(api: Arc<ApiServer>) -> Self {
        for namespace in [NAMESPACE, "shop"] {
            api.kubectl(&["create", "namespace", namespace]);
        }
        for (namespace, account) in
            [(NAMESPACE, "ztunnel"), (NAMESPACE, "culvertd"), ("shop", "cart"), ("shop", "far")]
        {
            api.kubectl(&["create", "serviceaccount", account, "-n", namespace]);
        }
        api.apply_permissions();
        api.pod(NAMESPACE, "ztunnel-1", "ztunnel", "node-1");
        api.pod(NAMESPACE, "ztunnel-2", "ztunnel", "node-1");
        api.pod("shop", "cart-1", "cart", "node-1");
        api.pod("shop", "far-1", "far", "node-2");
        let pods = Arc::new(Listed::default());
        pods.read(&api);
        let own = api.kubectl(&["create", "token", "culvertd", "-n", NAMESPACE]);
        let client = api.client(own.trim());

        // Both think at first that they lead; they have one root.
        let leads = [watch::channel(true).0, watch::channel(true).0];
        let names = BTreeSet::from(["shop".to_owned(), NAMESPACE.to_owned()]);
        let (namespaces, _) = watch::channel(Arc::new(names));
        let ca = replica(&api, &client, &leads[0], &namespaces);
        let other = replica(&api, &client, &leads[1], &namespaces);
        for ca in [&ca, &other] {
            tokio::time::timeout(Duration::from_secs(30), ca.wait_ready()).await.expect("ready");
        }
        let roots = |ca: &Ca| ca.current().get().unwrap().record.root_ids();
        assert_eq!(roots(&ca), roots(&other));
        leads[1].send_replace(false);
        let address = serve(&ca, client.clone(), pods).await;
        let first_root = signing_root(&ca);
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        Self { api, ca, other, address, dir, first_root, _leads: leads, _namespaces: namespaces }
    }

    /// The roots in the ConfigMap.
    fn held(&self) -> String {
        let map = self.api.object(&["configmap", "-n", "shop", "istio-ca-root-cert"]);
        map.and_then(|map| Some(map["data"]["root-cert.pem"].as_str()?.to_owned())).unwrap_or_default()
    }

    /// The roots in the ClusterTrustBundle.
    fn bundle(&self) -> Vec<RootId> {
        let bundle = self.api.object(&["clustertrustbundle", "istio.io:istiod-ca:root-cert"]);
        let text = bundle.and_then(|bundle| Some(bundle["spec"]["trustBundle"].as_str()?.to_owned()));
        roots_in(&text.unwrap_or_default())
    }

    /// What the node's proxy has said to trust.
    fn said(&self) -> Vec<RootId> {
        let pod = self.api.object(&["pod", "-n", NAMESPACE, "ztunnel-1"]).unwrap();
        let annotations = pod["metadata"]["annotations"].clone();
        trusted_roots(&serde_json::from_value(annotations).unwrap_or_default())
    }

    fn status(&self) -> String {
        let secret = self.api.object(&["secret", "-n", NAMESPACE, "culvert-ca-secret"]).unwrap();
        secret["metadata"]["annotations"]["culvert.dev/rotation"].as_str().unwrap_or_default().to_owned()
    }

    fn write_token(&self, token: &str) {
        std::fs::write(self.dir.path().join("token"), token).unwrap();
    }

    /// As the kubelet does from the ConfigMap.
    fn write_roots(&self) {
        std::fs::write(self.dir.path().join("roots"), self.held()).unwrap();
    }

    fn node(&self) -> CaClient {
        let address = format!("localhost:{}", self.address.port()).parse().unwrap();
        let token = self.dir.path().join("token");
        let settings = CaClientSettings {
            report_spread: Duration::ZERO,
            ..CaClientSettings::new(vec![address], token, "Kubernetes".into())
        };
        let domains = TrustDomains::only(TrustDomain::cluster_local());
        CaClient::start(settings, &self.dir.path().join("roots"), None, domains, Clock::system()).unwrap()
    }

    async fn tells_and_repairs(&self) {
        let a = self.first_root;
        until("the ConfigMap", || roots_in(&self.held()) == [a]).await;
        until("the ClusterTrustBundle", || self.bundle() == [a]).await;
        let map = ["configmap", "-n", "shop", "istio-ca-root-cert"];
        let edit = ["-p", r#"{"data":{"root-cert.pem":"x"}}"#];
        self.api.kubectl(&[&["patch"], &map[..], &edit].concat());
        until("the repair", || roots_in(&self.held()) == [a]).await;
        self.api.kubectl(&[&["delete"], &map[..]].concat());
        until("the ConfigMap, again,", || roots_in(&self.held()) == [a]).await;
        // An istiod's, by the name of its field manager, is left alone, and made anew when it is gone.
        let theirs = ["--field-manager=pilot-discovery", "-p", r#"{"data":{"root-cert.pem":"theirs"}}"#];
        self.api.kubectl(&[&["patch"], &map[..], &theirs].concat());
        until("whose it is", || self.ca.current().status().of_others.contains_key("pilot-discovery")).await;
        assert_eq!(self.held(), "theirs");
        self.api.kubectl(&[&["delete"], &map[..]].concat());
        until("the ConfigMap of ours", || roots_in(&self.held()) == [a]).await;
        let own = || {
            let map = self.api.object(&["configmap", "-n", NAMESPACE, "culvert-ca-root-cert"]);
            map.and_then(|map| Some(roots_in(map["data"]["root-cert.pem"].as_str()?))).unwrap_or_default()
        };
        until("the one of our own pods", || own() == [a]).await;
    }

    async fn gives_a_node_its_pods_certificates(&self) {
        self.write_roots();
        self.write_token(&self.api.token(NAMESPACE, "ztunnel", "ztunnel-1", "istio-ca"));
        let node = self.node();
        node.issue(&spiffe("cart")).await.unwrap();
        let denied = node.issue(&spiffe("far")).await.unwrap_err().to_string();
        assert!(denied.contains("on node node-1") && denied.contains("no pod runs"), "{denied}");
        until("the report", || self.said() == [self.first_root]).await;
    }

    async fn refuses_other_tokens(&self) {
        let refused = async |token: &str| {
            self.write_token(token);
            self.node().issue(&spiffe("cart")).await.unwrap_err().to_string()
        };
        let text = refused(&self.api.token(NAMESPACE, "ztunnel", "ztunnel-1", "other")).await;
        assert!(text.contains("audience"), "{text}");
        let text = refused(&self.api.token("shop", "far", "far-1", "istio-ca")).await;
        assert!(text.contains("no trusted node account"), "{text}");
        let gone = self.api.token(NAMESPACE, "ztunnel", "ztunnel-2", "istio-ca");
        self.api.kubectl(&["delete", "pod", "-n", NAMESPACE, "ztunnel-2", "--grace-period=0", "--force"]);
        let text = refused(&gone).await;
        assert!(text.contains("does not accept the token"), "{text}");
    }

    async fn exchanges_its_root(&self) {
        let a = self.first_root;
        self.write_token(&self.api.token(NAMESPACE, "ztunnel", "ztunnel-1", "istio-ca"));
        let node = self.node();
        let secret = ["secret", "-n", NAMESPACE, "culvert-ca-secret"];
        self.api.kubectl(&[&["annotate"], &secret[..], &["culvert.dev/rotate-root=1"]].concat());
        until("both roots", || roots_in(&self.held()).len() == 2).await;
        let b = roots_in(&self.held())[1];
        until("both roots in the bundle", || self.bundle() == [a, b]).await;
        until("the status", || self.status().contains("culvert-system/ztunnel-1")).await;
        assert_eq!(signing_root(&self.ca), a);
        self.write_roots();
        until("the new report", || self.said() == [a, b]).await;
        until("the new signer", || signing_root(&self.ca) == b).await;
        until("the other replica's", || signing_root(&self.other) == b).await;
        assert!(self.status().contains("the new root signs"), "{}", self.status());
        node.issue(&spiffe("cart")).await.unwrap();
        self.node().issue(&spiffe("cart")).await.unwrap();
    }
}

fn signing_root(ca: &Ca) -> RootId {
    ca.current().get().unwrap().authority.root()
}

fn spiffe(account: &str) -> model::SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_api_server_reviews_keeps_and_tells_with_the_permissions_of_the_chart() {
    let Some(api) = ApiServer::start() else { return };
    let lab = Lab::start(Arc::new(api)).await;
    lab.tells_and_repairs().await;
    lab.gives_a_node_its_pods_certificates().await;
    lab.refuses_other_tokens().await;
    lab.exchanges_its_root().await;
    assert_eq!(lab.ca.current().status().error, None);
}
