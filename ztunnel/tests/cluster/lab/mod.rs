//! Nodes with pods, a control plane, and on each node an agent and a real `ztunnel`.

pub mod agent;
pub mod control_plane;
#[path = "../../istio/lab/kubernetes.rs"]
pub mod kubernetes;
#[path = "../../node/lab/traffic.rs"]
pub mod traffic;
#[path = "../../node/lab/ztunnel.rs"]
mod ztunnel;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent::Agent;
use control_plane::{Authority, ControlPlane};
use harness::netns::{Host, Lab};
use model::{Locality, Policy, Profile, Settings, TunnelProtocol, Workload};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

pub use ztunnel::{Options, Ztunnel};

/// Whatever should happen has happened by then, on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long one waits to see that something does not happen.
pub const MOMENT: Duration = Duration::from_millis(400);

/// A cluster. Dropping it ends and removes all of it.
pub struct Cluster {
    // In the order in which they have to go.
    ztunnels: BTreeMap<String, Ztunnel>,
    pub agents: BTreeMap<String, Agent>,
    pub control_plane: ControlPlane,
    pub authority: Arc<Authority>,
    /// How ztunnels are started.
    pub options: Options,
    lab: Lab,
    dir: TempDir,
}

impl Cluster {
    /// Nodes with pods, of which the control plane tells all (in the namespace `shop`, each its own service account) and
    /// the agents those that aren't named `outside…`; a ztunnel on each node that is ready.
    pub async fn start(nodes: &[(&str, &[&str])]) -> Self {
        let mut cluster = Self::build(nodes);
        cluster.tell_all();
        cluster.control_plane.server.ready();
        for (node, _) in nodes {
            cluster.run(node).await;
        }
        cluster
    }

    /// The same, before the control plane tells anything, and before any ztunnel runs.
    pub fn build(nodes: &[(&str, &[&str])]) -> Self {
        let dir = tempfile::Builder::new().prefix("culvert-cluster-").tempdir_in("/dev/shm").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let mut builder = Lab::builder();
        for (node, pods) in nodes {
            builder = builder.node(node, pods);
        }
        let lab = builder.build().unwrap();
        let authority = Arc::new(Authority::new());
        control_plane::write_files(dir.path(), &authority);
        let control_plane = ControlPlane::new(authority.clone());
        let mut agents = BTreeMap::new();
        for node in lab.nodes() {
            control_plane.listen(&node.host);
            let name = node.host.name.clone();
            agents.insert(name.clone(), Agent::new(&dir.path().join(format!("zds-{name}"))));
        }
        let options = Options::default();
        Self { ztunnels: BTreeMap::new(), agents, control_plane, authority, options, lab, dir }
    }

    /// Has the control plane know all pods.
    pub fn tell_all(&self) {
        self.control_plane.settings(&Settings::default());
        for node in self.lab.nodes() {
            for pod in &node.pods {
                self.control_plane.workload(&self.workload(&pod.name));
            }
        }
    }

    /// Ends the control plane.
    pub fn kill_control_plane(&mut self) {
        self.control_plane = ControlPlane::new(self.authority.clone());
    }

    /// Has the control plane that is there listen on all nodes.
    pub fn listen(&self) {
        for node in self.lab.nodes() {
            self.control_plane.listen(&node.host);
        }
    }

    /// A pod as a control plane tells of it.
    pub fn workload(&self, name: &str) -> Workload {
        let pod = self.pod(name);
        let node = self.lab.nodes().iter().find(|n| n.pods.iter().any(|p| p.name == name)).unwrap();
        let tunnel = if name.starts_with("outside") { TunnelProtocol::None } else { TunnelProtocol::Hbone };
        let profile = Profile {
            namespace: "shop".into(),
            service_account: name.into(),
            cluster: "Kubernetes".into(),
            tunnel,
            canonical_name: None,
            canonical_revision: "latest".into(),
            workload_name: None,
            ..Profile::default()
        };
        let locality = Locality { node: node.host.name.as_str().into(), ..Locality::default() };
        Workload {
            addresses: [pod.ipv4.into(), pod.ipv6.into()].into(),
            locality: Arc::new(locality),
            ..Workload::new(format!("Kubernetes//Pod/shop/{name}").into(), name, Arc::new(profile))
        }
    }

    /// Starts a node's ztunnel, which nobody tells of any pod yet.
    pub fn launch(&mut self, node: &str) {
        self.ztunnels.remove(node); // it must be gone before its successor starts
        let started = self.another(node, &self.options);
        self.ztunnels.insert(node.to_owned(), started);
    }

    /// Starts a node's ztunnel and tells it of the node's pods; it need not become ready.
    pub async fn spawn(&mut self, node: &str) {
        self.launch(node);
        self.tell_pods(node).await;
    }

    /// Waits for a node's ztunnel and tells it of the node's pods.
    pub async fn tell_pods(&mut self, node: &str) {
        let agent = self.agents.get_mut(node).unwrap();
        agent.meet().await;
        for pod in self.lab.node(node).pods.iter().filter(|pod| !pod.name.starts_with("outside")) {
            agent.add(pod).await;
        }
        agent.snapshot_sent().await;
    }

    /// The same, and waits until it is ready.
    pub async fn run(&mut self, node: &str) {
        self.spawn(node).await;
        self.ztunnel_mut(node).ready().await;
    }

    /// A ztunnel on a node, beside what may run there.
    pub fn another(&self, node: &str, options: &Options) -> Ztunnel {
        let (host, dir) = (&self.lab.node(node).host, self.dir.path());
        let keys = dir.join(format!("keys-{node}"));
        fs::create_dir_all(&keys).unwrap();
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o700)).unwrap();
        let text = |text: &str| PathBuf::from(OsStr::new(text));
        let flags = [
            ("--xds-address", text(&format!("https://{}", control_plane::ADDRESS))),
            ("--token-file", dir.join("token")),
            ("--root-file", dir.join("root-cert.pem")),
            ("--zds-socket", dir.join(format!("zds-{node}"))),
            ("--key-dir", keys),
            ("--state-dir", dir.join(format!("state-{node}"))),
            ("--pod-name", text(&format!("ztunnel-{node}"))),
            ("--pod-namespace", text("culvert-system")),
            ("--instance-ip", text(&host.ipv4.to_string())),
        ];
        let options = options.clone().environment("TERMINATION_GRACE_PERIOD", "30s");
        Ztunnel::start(host, &dir.join(format!("ztunnel-{node}.log")), &flags, &options)
    }

    pub fn ztunnel(&self, node: &str) -> &Ztunnel {
        &self.ztunnels[node]
    }

    pub fn ztunnel_mut(&mut self, node: &str) -> &mut Ztunnel {
        self.ztunnels.get_mut(node).unwrap()
    }

    /// The node's own namespace, and what it is called.
    pub fn node(&self, name: &str) -> &Host {
        &self.lab.node(name).host
    }

    pub fn pod(&self, name: &str) -> &Host {
        self.lab.pod(name)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Puts a policy in force on every node.
    pub async fn enforce(&self, policy: &Policy) {
        self.control_plane.policy(policy);
        self.in_force().await;
    }

    /// Waits until every ztunnel has acknowledged all that the control plane has.
    pub async fn in_force(&self) {
        let clients = self.ztunnels.len();
        eventually("all is acknowledged", async || self.control_plane.all_have_all(clients)).await;
    }
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
