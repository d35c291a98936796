//! A real API server and etcd on loopback, and the program beside them. Their programs are those that the scenarios'
//! cluster builds (`target/kube/bin`); without them a test says so and passes, unless `CULVERT_REQUIRE_KUBE` is set.
#![allow(dead_code, reason = "each test uses a part")]
#![allow(
    clippy::print_stderr,
    clippy::disallowed_types,
    reason = "says that it was skipped; waits for other processes"
)]

pub mod rights;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use xds::client::{Client, NodeInfo, Settings, Update, Updates};

/// A process that ends with the test.
pub struct Process(pub Child);

impl Process {
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let command = command.stdout(log.try_clone().unwrap()).stderr(log).stdin(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// etcd and an API server on loopback.
pub struct Cluster {
    pub programs: PathBuf,
    pub files: TempDir,
    pub port: u16,
    pub etcd_port: u16,
    pub api: Option<Process>,
    _etcd: Process,
}

impl Cluster {
    pub fn start() -> Option<Self> {
        let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kube/bin");
        if !["etcd", "kube-apiserver", "kubectl"].iter().all(|program| programs.join(program).exists()) {
            let missing =
                format!("no Kubernetes in {} (cargo run -p kube-tests -- cluster build)", programs.display());
            assert!(std::env::var_os("CULVERT_REQUIRE_KUBE").is_none(), "{missing}");
            eprintln!("skipped: {missing}");
            return None;
        }
        let files = TempDir::new().unwrap();
        let at = |name: &str| files.path().join(name);
        let (client, peer) = (harness::port::free(), harness::port::free());
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let mut etcd = Command::new(programs.join("etcd"));
        etcd.arg("--data-dir").arg(at("etcd")).args(["--log-level", "error", "--name", "one"]);
        etcd.args(["--listen-client-urls", &url(client), "--advertise-client-urls", &url(client)]);
        etcd.args(["--listen-peer-urls", &url(peer), "--initial-advertise-peer-urls", &url(peer)]);
        etcd.args(["--initial-cluster", &format!("one={}", url(peer))]);
        let etcd = Process::start(&mut etcd, &at("etcd.log"));
        let key = rcgen::KeyPair::generate().unwrap();
        std::fs::write(at("sa.key"), key.serialize_pem()).unwrap();
        std::fs::write(at("sa.pub"), key.public_key_pem()).unwrap();
        std::fs::write(at("tokens.csv"), "admintoken,admin,1,system:masters\n").unwrap();
        let asked = json!({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
            "rules": [{ "level": "Metadata", "userGroups": ["system:serviceaccounts"] }, { "level": "None" }],
        });
        std::fs::write(at("audit.yaml"), asked.to_string()).unwrap();
        let mut cluster =
            Self { programs, files, port: harness::port::free(), etcd_port: client, api: None, _etcd: etcd };
        cluster.start_api();
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{ "name": "c", "cluster": {
                "server": format!("https://127.0.0.1:{}", cluster.port), "insecure-skip-tls-verify": true,
            } }],
            "users": [{ "name": "u", "user": { "token": "admintoken" } }],
            "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        });
        std::fs::write(cluster.kubeconfig(), config.to_string()).unwrap();
        cluster.until("the API server", || cluster.kubectl(&["get", "--raw", "/readyz"], "").is_ok());
        Some(cluster)
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.at("kubeconfig")
    }

    /// A kubeconfig with the token of an account of the control plane's namespace.
    pub fn kubeconfig_of(&self, account: &str) -> PathBuf {
        let token = self.kubectl(&["create", "token", account, "-n", "culvert-system"], "").unwrap();
        let admin = std::fs::read_to_string(self.kubeconfig()).unwrap();
        let path = self.at(account);
        std::fs::write(&path, admin.replace("admintoken", token.trim())).unwrap();
        path
    }

    pub fn start_api(&mut self) {
        let mut api = Command::new(self.programs.join("kube-apiserver"));
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.at(name).display());
        api.args([
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            format!("--secure-port={}", self.port),
            file("cert-dir", "certs"),
            file("service-account-key-file", "sa.pub"),
            file("service-account-signing-key-file", "sa.key"),
            file("token-auth-file", "tokens.csv"),
            file("audit-policy-file", "audit.yaml"),
            file("audit-log-path", "audit.log"),
        ]);
        api.args([
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--api-audiences=https://kubernetes.default.svc,istio-ca",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--runtime-config=certificates.k8s.io/v1beta1/clustertrustbundles=true",
            "--feature-gates=ClusterTrustBundle=true",
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",
        ]);
        self.api = Some(Process::start(&mut api, &self.at("apiserver.log")));
    }

    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut kubectl = Command::new(self.programs.join("kubectl"));
        kubectl.arg("--kubeconfig").arg(self.kubeconfig()).args(arguments).arg("--request-timeout=20s");
        kubectl.env("HOME", self.files.path());
        let piped = kubectl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    pub fn apply(&self, object: &Value) {
        let applied = self.kubectl(&["apply", "-f", "-"], &object.to_string());
        applied.unwrap_or_else(|error| panic!("{error}\n{object}"));
    }

    pub fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let since = Instant::now();
        while !holds() {
            if since.elapsed() > Duration::from_secs(90) {
                for log in ["apiserver.log", "culvertd.log"] {
                    let text = std::fs::read_to_string(self.at(log)).unwrap_or_default();
                    let lines: Vec<&str> = text.lines().rev().take(40).collect();
                    eprintln!("== {log}\n{}", lines.into_iter().rev().collect::<Vec<_>>().join("\n"));
                }
                panic!("waited in vain for: {what}");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Status, reason and message of a condition of an object in the namespace `shop`, for its newest version.
    pub fn condition(&self, of: &str, name: &str, kind: &str) -> Option<(String, String, String)> {
        let text = self.kubectl(&["get", of, "-n", "shop", name, "-o", "json"], "").ok()?;
        let object: Value = serde_json::from_str(&text).unwrap();
        let conditions = object["status"]["conditions"].as_array()?;
        let condition = conditions.iter().find(|c| c["type"] == kind)?;
        let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
        (condition["observedGeneration"] == object["metadata"]["generation"])
            .then(|| (text("status"), text("reason"), text("message")))
    }
}

/// A control plane.
pub struct Plane {
    _process: Process,
    server_name: String,
    pub grpc: SocketAddr,
    pub webhook: SocketAddr,
    pub readiness: SocketAddr,
}

impl Plane {
    pub fn start(cluster: &Cluster, pod: &str) -> Self {
        // The Service's name is in the certificate: the API server calls the webhook by it.
        let plane = Self::launch(cluster, pod, &cluster.kubeconfig(), &["--service", "localhost"]);
        cluster.until("the control plane", || plane.is_ready());
        plane
    }

    /// Starts one with a kubeconfig and further flags, and does not wait.
    pub fn launch(cluster: &Cluster, pod: &str, kubeconfig: &Path, flags: &[&str]) -> Self {
        let ports: Vec<SocketAddr> =
            (0..5).map(|_| SocketAddr::from(([127, 0, 0, 1], harness::port::free()))).collect();
        let mut culvertd = Command::new(env!("CARGO_BIN_EXE_culvertd"));
        culvertd.arg("--kubeconfig").arg(kubeconfig).args(["--namespace", "culvert-system"]);
        for (flag, port) in ["grpc", "webhook", "admin", "metrics", "readiness"].iter().zip(&ports) {
            culvertd.arg(format!("--{flag}-address={port}"));
        }
        culvertd.args(["--pod-name", pod, "--log", "info"]).args(flags);
        let process = Process::start(&mut culvertd, &cluster.at("culvertd.log"));
        let service = flags.iter().skip_while(|flag| **flag != "--service").nth(1);
        let server_name = match service.copied().unwrap_or("culvertd") {
            "localhost" => "localhost".to_owned(),
            service => format!("{service}.culvert-system.svc"),
        };
        Self { _process: process, server_name, grpc: ports[0], webhook: ports[1], readiness: ports[4] }
    }

    pub fn is_ready(&self) -> bool {
        let Ok(mut stream) = std::net::TcpStream::connect(self.readiness) else { return false };
        stream
            .write_all(b"GET /healthz/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text.starts_with("HTTP/1.1 200")
    }

    /// A proxy with a token that is bound to a pod.
    pub fn proxy(&self, cluster: &Cluster, pod: &str) -> Updates {
        let token = ["create", "token", "ztunnel", "-n", "culvert-system", "--audience", "istio-ca"];
        let bound = ["--bound-object-kind", "Pod", "--bound-object-name", pod];
        let token = cluster.kubectl(&[&token[..], &bound[..]].concat(), "").unwrap();
        std::fs::write(cluster.at("token"), token.trim()).unwrap();
        let root = [
            "get",
            "configmap",
            "-n",
            "shop",
            "istio-ca-root-cert",
            "-o",
            "jsonpath={.data.root-cert\\.pem}",
        ];
        std::fs::write(cluster.at("root.pem"), cluster.kubectl(&root, "").unwrap()).unwrap();
        let node = NodeInfo {
            ip: "10.0.0.9".parse().unwrap(),
            name: pod.to_owned(),
            namespace: "culvert-system".to_owned(),
            node_name: "node1".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            version: "0.1.0".to_owned(),
        };
        let settings = Settings {
            addresses: vec![format!("https://{}", self.grpc)],
            root_file: Some(cluster.at("root.pem")),
            server_name: Some(self.server_name.clone()),
            token_file: Some(cluster.at("token")),
            node: node.node(),
            types: vec![
                proto::MESH_SETTINGS_TYPE_URL,
                proto::AUTHORIZATION_TYPE_URL,
                proto::ADDRESS_TYPE_URL,
            ],
            ..Settings::default()
        };
        let (client, updates) = Client::new(settings, Arc::new(())).unwrap();
        tokio::spawn(client.run());
        updates
    }
}

pub async fn next(updates: &mut Updates) -> Update {
    tokio::time::timeout(Duration::from_secs(30), updates.next()).await.expect("no update").unwrap()
}

/// Answers all until one of this type names this.
pub async fn until_named(updates: &mut Updates, type_url: &str, name: &str) -> Update {
    loop {
        let update = next(updates).await;
        if update.type_url == type_url && update.resources.iter().any(|r| *r.name == *name) {
            return update;
        }
        update.ack();
    }
}

pub fn pod(namespace: &str, name: &str, account: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": namespace, "labels": { "app": "web" },
            "annotations": { "ambient.istio.io/redirection": "enabled" },
        },
        "spec": { "serviceAccountName": account, "nodeName": "node1", "containers": [{ "name": "a", "image": "a" }] },
    })
}

pub fn policy(action: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "p", "namespace": "shop" },
        "spec": {
            "selector": { "matchLabels": { "app": "web" } }, "action": action,
            "rules": [{ "from": [{ "source": { "namespaces": ["shop"] } }] }],
        },
    })
}

pub fn set_address(cluster: &Cluster, pod: &str, ip: &str) {
    let status = json!({ "status": {
        "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
        "conditions": [{ "type": "Ready", "status": "True" }],
    } });
    let patch = ["patch", "pod", "-n", "shop", pod, "--subresource", "status", "-p", &status.to_string()];
    cluster.kubectl(&patch, "").unwrap();
}

pub fn fill(cluster: &Cluster) {
    for namespace in ["culvert-system", "shop"] {
        cluster.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } }));
    }
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "culvert", "namespace": "culvert-system" }, "data": { "mesh": "" },
    }));
    for (namespace, name) in [("culvert-system", "ztunnel"), ("shop", "web")] {
        cluster.apply(&json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name, "namespace": namespace },
        }));
    }
    cluster.apply(&pod("culvert-system", "ztunnel-a", "ztunnel"));
    cluster.apply(&pod("shop", "a", "web"));
    set_address(cluster, "a", "10.1.0.1");
}

pub fn apply_crds(cluster: &Cluster) {
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/culvert/crds");
    let security = ["authorizationpolicies", "peerauthentications"].map(|crd| format!("{crd}.security"));
    let networking = ["serviceentries", "workloadentries", "workloadgroups"];
    for crd in security.into_iter().chain(networking.map(|crd| format!("{crd}.networking"))) {
        let file = crds.join(format!("{crd}.istio.io.yaml"));
        cluster.kubectl(&["apply", "--server-side", "-f", file.to_str().unwrap()], "").unwrap();
    }
}

/// The definitions of the Gateway API, of the Go module that the scenarios or the tests with Istio's programs fetched;
/// whether they are there.
pub fn apply_gateway_api(cluster: &Cluster) -> bool {
    const GATEWAYS: &str = "gateway.networking.k8s.io_gateways.yaml";
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let places = [target.join("kube/crds"), target.join("interop/istio/crds")];
    let Some(place) = places.into_iter().find(|place| place.join(GATEWAYS).exists()) else {
        let missing =
            "the definitions of the Gateway API are not there (cargo run -p kube-tests -- cluster build)";
        assert!(std::env::var_os("CULVERT_REQUIRE_KUBE").is_none(), "{missing}");
        eprintln!("skipped: {missing}");
        return false;
    };
    cluster.kubectl(&["apply", "--server-side", "-f", place.to_str().unwrap()], "").unwrap();
    true
}
