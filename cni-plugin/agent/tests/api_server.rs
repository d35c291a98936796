//! The agent's part of the API, on a real API server and with no more permissions than the chart gives: etcd and
//! kube-apiserver on loopback, of the binaries that `make e2e` builds. Without them it says so and tests nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use node_agent::cluster::{Api, Cluster, Notice, View};
use node_agent::kubernetes::Kubernetes;
use node_agent::zds::PodIdentity;
use serde_json::{Value, json};
use tempfile::TempDir;

const SYSTEM: &str = "culvert-system";
const TAINT: &str = "culvert.dev/agent-not-ready";

/// A process that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Server {
    binaries: PathBuf,
    directory: TempDir,
    url: String,
    _processes: Vec<Running>,
}

impl Server {
    fn start() -> Option<Self> {
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kube/bin");
        let binaries = std::env::var_os("KUBE_BIN").map_or(built, PathBuf::from);
        let needed = ["etcd", "kube-apiserver", "kubectl", "helm"];
        if needed.iter().any(|name| !binaries.join(name).exists()) {
            let _ = writeln!(
                std::io::stderr(),
                "skipped: no API server in {}: make e2e builds it",
                binaries.display()
            );
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let (client, peer, port) = (harness::port::free(), harness::port::free(), harness::port::free());
        let url = format!("https://127.0.0.1:{port}");
        let mut server = Self { binaries, directory, url, _processes: Vec::new() };
        let key = server.at("sa.key");
        let made = Command::new("openssl")
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", &key])
            .output();
        assert!(made.unwrap().status.success());
        std::fs::write(server.at("tokens"), "admin-token,admin,admin,system:masters\n").unwrap();
        server.spawn(
            "etcd",
            &[
                format!("--data-dir={}", server.at("etcd")),
                format!("--listen-client-urls=http://127.0.0.1:{client}"),
                format!("--advertise-client-urls=http://127.0.0.1:{client}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                "--unsafe-no-fsync".to_owned(),
            ],
        );
        server.spawn(
            "kube-apiserver",
            &[
                format!("--etcd-servers=http://127.0.0.1:{client}"),
                "--bind-address=127.0.0.1".to_owned(),
                format!("--secure-port={port}"),
                format!("--cert-dir={}", server.at("certs")),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                format!("--service-account-key-file={key}"),
                format!("--service-account-signing-key-file={key}"),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
                "--authorization-mode=RBAC".to_owned(),
                "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition".to_owned(),
                format!("--token-auth-file={}", server.at("tokens")),
            ],
        );
        for _ in 0..240 {
            if server.try_kubectl(&["get", "--raw", "/readyz"], "").is_ok() {
                return Some(server);
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        panic!("{}", std::fs::read_to_string(server.at("kube-apiserver.log")).unwrap_or_default());
    }

    fn at(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn spawn(&mut self, name: &str, arguments: &[String]) {
        let log = File::create(self.at(&format!("{name}.log"))).unwrap();
        let mut command = Command::new(self.binaries.join(name));
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self._processes.push(Running(command.spawn().unwrap()));
    }

    fn try_kubectl(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        std::fs::write(self.at("input"), input).unwrap();
        let output = Command::new(self.binaries.join("kubectl"))
            .args(["--server", &self.url, "--token", "admin-token", "--insecure-skip-tls-verify"])
            .args(["--cache-dir", &self.at("cache")])
            .args(arguments)
            .stdin(File::open(self.at("input")).unwrap())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments, "").unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
    }

    fn apply(&self, text: &str) {
        let applied = self.try_kubectl(&["apply", "--validate=false", "-f", "-"], text);
        applied.unwrap_or_else(|error| panic!("{error}\n{text}"));
    }

    fn get(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.kubectl(&[&["get", "-o", "json"], arguments].concat())).unwrap()
    }

    /// What the chart gives the agent, and a token of its account.
    fn client(&self) -> kube::Client {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/charts/culvert");
        let output = Command::new(self.binaries.join("helm"))
            .args(["template", "culvert", chart.to_str().unwrap(), "--namespace", SYSTEM])
            .args(["--show-only", "templates/node.yaml", "--show-only", "templates/node-admission.yaml"])
            .env("HELM_CACHE_HOME", self.at("helm"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.apply(&String::from_utf8(output.stdout).unwrap());
        let token = self.kubectl(&["create", "token", "culvert-node", "-n", SYSTEM]);
        let mut config = kube::Config::new(self.url.parse().unwrap());
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(token.trim().to_owned().into());
        kube::Client::try_from(config).unwrap()
    }

    fn pod(&self, name: &str, node: &str) -> PodIdentity {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "shop", "annotations": { "of-users": "stays" } },
            "spec": { "nodeName": node, "containers": [{ "name": "a", "image": "none" }] },
        });
        self.apply(&pod.to_string());
        PodIdentity {
            uid: self.get(&["pod", name, "-n", "shop"])["metadata"]["uid"].as_str().unwrap().to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            service_account: "default".to_owned(),
        }
    }
}

async fn until(cluster: &Cluster, what: &str, done: impl Fn(&View) -> bool) {
    for _ in 0..1000 {
        if done(&cluster.view()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{what}: {:#?}", cluster.view());
}

async fn annotates(server: &Server, api: &Kubernetes, cluster: &Cluster, pod: &PodIdentity) {
    api.annotate(pod, Some("enabled")).await.unwrap();
    let seen = |value: Option<&str>| {
        let value = value.map(str::to_owned);
        move |view: &View| view.pods[&pod.uid].redirection == value
    };
    until(cluster, "annotated", seen(Some("enabled"))).await;
    let annotations = &server.get(&["pod", "web", "-n", "shop"])["metadata"]["annotations"];
    assert_eq!(annotations["of-users"], "stays");
    let earlier = PodIdentity { uid: "00000000-0000-0000-0000-000000000000".to_owned(), ..pod.clone() };
    let error = api.annotate(&earlier, None).await.unwrap_err();
    assert!(error.to_string().contains("(422)"), "an earlier pod of that name: {error}");
    assert_eq!(cluster.view().pods[&pod.uid].redirection.as_deref(), Some("enabled"));
    api.annotate(pod, None).await.unwrap();
    until(cluster, "removed", seen(None)).await;
}

async fn taints(server: &Server, api: &Kubernetes) {
    let keys = || -> Vec<String> {
        let node = server.get(&["node", "n1"]);
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        taints.iter().map(|taint| taint["key"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(keys(), ["other", TAINT]);
    assert_eq!(api.taint("n1", &[], &[TAINT]).await, Ok(true));
    assert_eq!(keys(), ["other"], "those of others stay");
    assert_eq!(api.taint("n1", &[], &[TAINT]).await, Ok(false));
    assert_eq!(api.taint("n1", &[TAINT], &[]).await, Ok(true));
    assert_eq!(api.taint("n1", &[TAINT], &[]).await, Ok(false));
    assert_eq!(keys(), ["other", TAINT]);
    assert!(api.taint("none", &[], &[TAINT]).await.unwrap_err().to_string().contains("404"));
}

/// What RBAC lets the agent change and admission does not: its token in the wrong hands deletes no pod and holds none.
async fn is_held(server: &Server, client: &kube::Client) {
    use k8s_openapi::api::core::v1::{Node, Pod};
    use kube::api::{Api, Patch, PatchParams};
    let (pods, nodes) = (Api::<Pod>::namespaced(client.clone(), "shop"), Api::<Node>::all(client.clone()));
    let owner = json!([{ "apiVersion": "v1", "kind": "ConfigMap", "name": "none",
                         "uid": "00000000-0000-0000-0000-000000000000" }]);
    for changed in [
        json!({ "ownerReferences": owner }),
        json!({ "finalizers": ["example.com/held"] }),
        json!({ "labels": { "app": "another" } }),
        json!({ "annotations": { "of-users": "changed" } }),
    ] {
        let patch = Patch::Merge(json!({ "metadata": changed }));
        let parameters = PatchParams::default();
        let mut outcomes = Vec::new();
        // A new policy is in force a moment after it was made.
        for _ in 0..500 {
            outcomes.clear();
            outcomes.push(pods.patch("web", &parameters, &patch).await.map(drop));
            outcomes.push(nodes.patch("n1", &parameters, &patch).await.map(drop));
            let refused = |outcome: &Result<(), kube::Error>| {
                outcome.as_ref().is_err_and(|error| error.to_string().contains("and nothing else"))
            };
            if outcomes.iter().all(refused) {
                outcomes.clear();
                break;
            }
            let undo = json!({ "metadata": { "ownerReferences": null, "finalizers": null,
                                             "labels": null, "annotations": { "of-users": "stays" } } });
            for kind in ["pod/web", "node/n1"] {
                let text = undo.to_string();
                let _ = server.try_kubectl(&["patch", "-n", "shop", kind, "--type=merge", "-p", &text], "");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(outcomes.is_empty(), "{changed}: {outcomes:?}");
    }
}

/// Each reason is an event of its own, and the same again is counted: what is read last is what is so.
async fn says(server: &Server, api: &Kubernetes, pod: &PodIdentity) {
    let notice = |note: &str| Notice { reason: "EnrolmentFailed", note: note.to_owned(), warning: true };
    let long = format!("{} more", "it is said; ".repeat(200));
    for note in [long.as_str(), "no ztunnel is connected", "ztunnel refuses it", "no ztunnel is connected"] {
        api.notify(pod, notice(note)).await;
    }
    let events = server.get(&["events", "-n", "shop"]);
    let mut said: Vec<_> = events["items"].as_array().unwrap().iter().collect();
    said.sort_by_key(|event| event["eventTime"].as_str().unwrap().to_owned());
    for event in &said {
        assert_eq!(event["reason"], "EnrolmentFailed");
        assert_eq!(event["involvedObject"]["uid"], pod.uid);
    }
    let told: Vec<_> = said
        .iter()
        .map(|event| (event["message"].as_str().unwrap(), event["series"]["count"].as_u64()))
        .collect();
    assert!(told[0].0.len() <= 1000 && long.starts_with(told[0].0), "{told:?}");
    assert_eq!(told[1..], [("no ztunnel is connected", Some(2)), ("ztunnel refuses it", None)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_does_with_the_charts_permissions_what_it_has_to() {
    let Some(server) = Server::start() else { return };
    for name in [SYSTEM, "shop"] {
        server.kubectl(&["create", "namespace", name]);
    }
    let taint = |key: &str| json!({ "key": key, "effect": "NoSchedule" });
    let node = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "n1" },
                       "spec": { "taints": [taint("other"), taint(TAINT)] } });
    server.apply(&node.to_string());
    let client = server.client();
    let api = Kubernetes::new(client.clone(), "n1");
    let cluster = Arc::new(Cluster::default());
    let (pods, namespaces) = (cluster.clone(), cluster.clone());
    let (watching, also) = (api.clone(), api.clone());
    tokio::spawn(async move { watching.follow_pods("n1".to_owned(), &pods).await });
    tokio::spawn(async move { also.follow_namespaces(&namespaces).await });
    until(&cluster, "all is known", |view| view.is_complete() && view.namespaces.contains_key("shop")).await;

    let (web, elsewhere) = (server.pod("web", "n1"), server.pod("elsewhere", "n2"));
    until(&cluster, "the pod", |view| view.pods.contains_key(&web.uid)).await;
    assert!(!cluster.view().pods.contains_key(&elsewhere.uid), "of another node");
    assert_eq!(api.pod("shop", "web").await.unwrap().unwrap().identity, web);
    assert_eq!(api.pod("shop", "none").await, Ok(None));
    server.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"]);
    until(&cluster, "the label", |view| view.mode("shop") == Some("ambient")).await;
    assert_eq!(api.namespace("shop").await, Ok(Some(Some("ambient".to_owned()))));
    assert_eq!(api.namespace("none").await, Ok(None));

    is_held(&server, &client).await;
    annotates(&server, &api, &cluster, &web).await;
    taints(&server, &api).await;
    says(&server, &api, &web).await;

    server.kubectl(&["delete", "pod", "web", "-n", "shop", "--force", "--grace-period=0"]);
    until(&cluster, "gone", |view| !view.pods.contains_key(&web.uid)).await;
}
