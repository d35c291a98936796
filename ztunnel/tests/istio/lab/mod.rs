//! A cluster whose control plane and node agents are Istio's, and whose ztunnels are ours.

#[path = "../../cluster/lab/agent.rs"]
pub mod agent;
mod cni;
mod kubernetes;
#[path = "../../node/lab/traffic.rs"]
pub mod traffic;
#[path = "../../node/lab/ztunnel.rs"]
mod ztunnel;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use agent::Agent;
pub use cni::NodeAgent;
use harness::netns::{Host, Lab, Process, root_or_skip};
use kubernetes::{Kubernetes, last_lines, logged};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

pub use ztunnel::{Options, Ztunnel};

/// Whatever should happen has happened by then, on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The node that has the API server and the control plane.
const CONTROL: &str = "control";
const ISTIOD: &str = "istiod.istio-system.svc";

/// Dropping it ends and removes all of it.
pub struct Cluster {
    // In the order in which they have to go.
    ztunnels: BTreeMap<String, Ztunnel>,
    pub agents: BTreeMap<String, Agent>,
    istiod: Option<Process>,
    pub kubernetes: Kubernetes,
    lab: Lab,
    dir: TempDir,
    programs: PathBuf,
}

impl Cluster {
    /// Nodes with pods in the namespace `shop`, each of its own service account, which is in the mesh; those named
    /// `outside…` are in the namespace `outside`, which isn't. No ztunnel runs yet. `None` where it can't be, which is said.
    pub fn build(test: &str, nodes: &[(&str, &[&str])]) -> Option<Self> {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        let [programs, kube] = ["interop/istio", "kube/bin"].map(|p| target.join(p));
        let needed = Kubernetes::PROGRAMS.iter().map(|p| kube.join(p));
        let needed = needed.chain(["pilot-discovery", "install-cni", "istio-cni"].map(|p| programs.join(p)));
        if let Some(missing) = needed.into_iter().find(|p| !p.exists()) {
            let missing = format!("{test}: there is no {} (make interop builds it)", missing.display());
            assert!(std::env::var_os("CULVERT_REQUIRE_ISTIO").is_none(), "{missing}");
            eprintln!("skipped: {missing}");
            return None;
        }
        if !root_or_skip(test) {
            return None;
        }
        let dir = tempfile::Builder::new().prefix("culvert-istio-").tempdir_in("/dev/shm").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let mut builder = Lab::builder().node(CONTROL, &[]);
        for (node, pods) in nodes {
            builder = builder.node(node, pods);
        }
        let lab = builder.build().unwrap();
        let control = &lab.node(CONTROL).host;
        let kubernetes = Kubernetes::start(control, dir.path(), &kube);
        fs::write(dir.path().join("hosts"), format!("127.0.0.1 localhost\n{} {ISTIOD}\n", control.ipv4))
            .unwrap();
        let (ztunnels, agents) = (BTreeMap::new(), BTreeMap::new());
        let mut cluster = Self { ztunnels, agents, istiod: None, kubernetes, lab, dir, programs };
        cluster.fill();
        cluster.start_istiod();
        Some(cluster)
    }

    /// The objects that there are from the beginning.
    fn fill(&self) {
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/culvert/crds");
        for crds in [crds, self.programs.join("crds")] {
            let crds = crds.to_str().unwrap();
            self.kubernetes.kubectl(&["apply", "--server-side", "-f", crds], "").unwrap();
        }
        let mut objects = Vec::new();
        for (namespace, mode) in [("istio-system", "none"), ("shop", "ambient"), ("outside", "none")] {
            let labels = json!({ "istio.io/dataplane-mode": mode });
            let metadata = json!({ "name": namespace, "labels": labels });
            objects.push(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }));
        }
        objects.push(account("istio-system", "ztunnel"));
        for node in self.lab.nodes().iter().filter(|n| n.host.name != CONTROL) {
            let labels = json!({
                "topology.kubernetes.io/region": "moon", "topology.kubernetes.io/zone": node.host.name,
            });
            let metadata = json!({ "name": node.host.name, "labels": labels });
            objects.push(json!({ "apiVersion": "v1", "kind": "Node", "metadata": metadata }));
            let ztunnel = format!("ztunnel-{}", node.host.name);
            objects.push(pod("istio-system", &ztunnel, "ztunnel", &node.host.name));
        }
        self.kubernetes.apply(&objects);
        for node in self.lab.nodes().iter().filter(|n| n.host.name != CONTROL) {
            let ztunnel = pod("istio-system", &format!("ztunnel-{}", node.host.name), "ztunnel", "");
            self.kubernetes.set_status(&ztunnel, &running(&node.host, &node.host));
            for pod in node.pods.iter().filter(|p| namespace_of(&p.name) == "outside") {
                self.make_pod(&pod.name, &json!({}));
                self.set_running(&pod.name);
            }
        }
    }

    /// Makes a pod of the lab one of the cluster, with further labels.
    pub fn make_pod(&self, name: &str, labels: &Value) {
        let object = self.pod_object(name, labels);
        self.kubernetes.apply(&[account(namespace_of(name), name), object]);
    }

    /// Says of a pod what the kubelet does once its containers run.
    pub fn set_running(&self, name: &str) {
        let status = running(self.pod(name), self.node_of(name));
        self.kubernetes.set_status(&self.pod_object(name, &json!({})), &status);
    }

    fn pod_object(&self, name: &str, labels: &Value) -> Value {
        let mut object = pod(namespace_of(name), name, name, &self.node_of(name).name);
        for (key, value) in labels.as_object().unwrap() {
            object["metadata"]["labels"][key] = value.clone();
        }
        object
    }

    /// Starts the control plane, and waits until it is ready.
    pub fn start_istiod(&mut self) {
        let control = self.lab.node(CONTROL).host.clone();
        // It looks for optional files below where it runs.
        let room = self.dir.path().join("istiod");
        fs::create_dir_all(&room).unwrap();
        let mut istiod = Command::new(self.programs.join("pilot-discovery"));
        istiod.arg("discovery").arg("--kubeconfig").arg(self.kubernetes.kubeconfig()).current_dir(room);
        istiod.args(["--domain", "cluster.local", "--log_output_level", "default:info"]);
        istiod.env_clear().envs([
            ("PATH", "/usr/bin:/bin"),
            ("POD_NAME", "istiod-1"),
            ("POD_NAMESPACE", "istio-system"),
            ("CLUSTER_ID", "Kubernetes"),
            ("PILOT_ENABLE_AMBIENT", "true"),
            ("CA_TRUSTED_NODE_ACCOUNTS", "istio-system/ztunnel"),
            ("VALIDATION_WEBHOOK_CONFIG_NAME", ""),
            ("INJECTION_WEBHOOK_CONFIG_NAME", ""),
        ]);
        self.istiod = Some(logged(&control, &mut istiod, &self.dir.path().join("istiod.log")));
        self.kubernetes
            .until("istiod", |_| control.shell("curl -fsS -m 5 http://127.0.0.1:8080/ready").is_ok());
        self.kubernetes.until("the root of istiod's CA", |k| {
            k.get("configmap", "istio-system", "istio-ca-root-cert").is_some()
        });
        let root = self.kubernetes.get("configmap", "istio-system", "istio-ca-root-cert").unwrap();
        fs::write(self.dir.path().join("root-cert.pem"), root["data"]["root-cert.pem"].as_str().unwrap())
            .unwrap();
    }

    /// A page of istiod's debugging port.
    pub fn ask_istiod(&self, path: &str) -> Value {
        let ask = format!("curl -fsS -m 5 'http://127.0.0.1:8080{path}'");
        serde_json::from_str(&self.lab.node(CONTROL).host.shell(&ask).unwrap()).unwrap()
    }

    /// Ends the control plane.
    pub fn kill_istiod(&mut self) {
        self.istiod = None;
    }

    /// Makes the node's pods of `shop`, takes them into the mesh, and starts its ztunnel with a stand-in of the node agent.
    pub async fn run_with_stand_in(&mut self, node: &str) {
        for pod in self.pods_of(node) {
            self.make_pod(&pod.name, &json!({}));
            self.set_running(&pod.name);
            let enabled = "ambient.istio.io/redirection=enabled";
            self.kubernetes.kubectl(&["annotate", "pod", "-n", "shop", &pod.name, enabled], "").unwrap();
        }
        self.spawn_with_stand_in(node).await;
    }

    /// Starts a node's ztunnel with a stand-in of the node agent.
    pub async fn spawn_with_stand_in(&mut self, node: &str) {
        self.agents.remove(node);
        let mut agent = Agent::new(&self.zds(node));
        self.spawn(node);
        agent.meet().await;
        for pod in self.pods_of(node) {
            agent.add(&pod).await;
        }
        agent.snapshot_sent().await;
        self.agents.insert(node.to_owned(), agent);
        self.ready(node).await;
    }

    /// The pods of a node that are in the mesh.
    fn pods_of(&self, node: &str) -> Vec<Host> {
        let pods = self.lab.node(node).pods.iter();
        pods.filter(|pod| namespace_of(&pod.name) == "shop").cloned().collect()
    }

    /// Starts Istio's node agent on a node.
    pub fn start_node_agent(&self, node: &str, nft: bool) -> NodeAgent {
        let dir = self.dir.path().join(format!("cni-{node}"));
        NodeAgent::start(&self.kubernetes, self.node(node), &dir, &self.zds(node), &self.programs, nft)
    }

    /// Starts a node's ztunnel.
    pub fn spawn(&mut self, node: &str) {
        self.ztunnels.remove(node); // it must be gone before its successor starts
        let (host, dir) = (self.node(node).clone(), self.dir.path());
        let token = self.kubernetes.token("istio-system", "ztunnel", &format!("ztunnel-{node}"));
        fs::write(dir.join(format!("token-{node}")), token).unwrap();
        let text = |text: &str| PathBuf::from(OsStr::new(text));
        let flags = [
            ("--xds-address", text(&format!("https://{ISTIOD}:15012"))),
            ("--token-file", dir.join(format!("token-{node}"))),
            ("--root-file", dir.join("root-cert.pem")),
            ("--zds-socket", self.zds(node)),
            ("--state-dir", dir.join(format!("state-{node}"))),
            ("--pod-name", text(&format!("ztunnel-{node}"))),
            ("--pod-namespace", text("istio-system")),
            ("--instance-ip", text(&host.ipv4.to_string())),
        ];
        let hosts = format!("mount --bind {} /etc/hosts && exec \"$@\"", dir.join("hosts").display());
        let options = Options::default().wrapper(&["unshare", "--mount", "sh", "-c", &hosts, "sh"]);
        let log = dir.join(format!("ztunnel-{node}.log"));
        self.ztunnels.insert(node.to_owned(), Ztunnel::start(&host, &log, &flags, &options));
    }

    /// Where the agent of a node listens for its ztunnel.
    pub fn zds(&self, node: &str) -> PathBuf {
        self.dir.path().join(format!("zds-{node}"))
    }

    pub async fn ready(&mut self, node: &str) {
        self.ztunnels.get_mut(node).unwrap().ready().await;
    }

    pub fn ztunnel(&self, node: &str) -> &Ztunnel {
        &self.ztunnels[node]
    }

    pub fn pod(&self, name: &str) -> &Host {
        self.lab.pod(name)
    }

    pub fn node(&self, name: &str) -> &Host {
        &self.lab.node(name).host
    }

    pub fn node_of(&self, pod: &str) -> &Host {
        let node = self.lab.nodes().iter().find(|n| n.pods.iter().any(|p| p.name == pod));
        &node.unwrap().host
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What every ztunnel has of a kind of object, by name, once `holds` of it.
    pub async fn everywhere(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        for (node, ztunnel) in &self.ztunnels {
            let what = format!("ztunnel of {node} has {what}");
            if !within(PATIENCE, async || holds(&ztunnel.config_dump().await)).await {
                panic!("not so: {what}: {:#}", ztunnel.config_dump().await);
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            last_lines(self.dir.path());
        }
    }
}

fn namespace_of(pod: &str) -> &'static str {
    if pod.starts_with("outside") { "outside" } else { "shop" }
}

fn account(namespace: &str, name: &str) -> Value {
    let metadata = json!({ "name": name, "namespace": namespace });
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata })
}

fn pod(namespace: &str, name: &str, account: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "labels": { "app": name } },
        "spec": {
            "serviceAccountName": account, "nodeName": node,
            "containers": [{ "name": "a", "image": "a", "ports": [{ "name": "http", "containerPort": 8080 }] }],
        },
    })
}

fn running(pod: &Host, node: &Host) -> Value {
    json!({
        "phase": "Running", "hostIP": node.ipv4, "hostIPs": [{ "ip": node.ipv4 }],
        "podIP": pod.ipv4, "podIPs": [{ "ip": pod.ipv4 }, { "ip": pod.ipv6 }],
        "conditions": [{ "type": "Ready", "status": "True" }],
    })
}

/// Waits until `check` holds.
pub async fn eventually(what: &str, check: impl AsyncFnMut() -> bool) {
    assert!(within(PATIENCE, check).await, "after {PATIENCE:?} it is still not so that {what}");
}

/// Whether `check` comes to hold in time.
pub async fn within(limit: Duration, mut check: impl AsyncFnMut() -> bool) -> bool {
    let until = Instant::now() + limit;
    loop {
        if check().await {
            return true;
        }
        if Instant::now() > until {
            return false;
        }
        sleep(Duration::from_millis(20)).await;
    }
}
