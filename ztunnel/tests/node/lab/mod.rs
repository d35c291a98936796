//! Nodes with pods, a directory of manifests, and a real `ztunnel` on each node.

pub mod manifests;
pub mod peer;
pub mod traffic;
pub mod waypoint;
mod ztunnel;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::netns::{Host, Lab};
use manifests::PodManifest;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

pub use ztunnel::{Options, Ztunnel};

/// Whatever should happen has happened by then, on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long one waits to see that something does not happen.
pub const MOMENT: Duration = Duration::from_millis(400);

/// A mesh of one or more nodes. Dropping it ends and removes all of it.
pub struct Mesh {
    // In the order in which they have to go.
    ztunnels: BTreeMap<String, Ztunnel>,
    lab: Lab,
    dir: TempDir,
    pods: BTreeMap<String, (String, String)>,
}

impl Mesh {
    /// Nodes with pods, their manifests, and a ztunnel on each node that is ready.
    pub async fn start(nodes: &[(&str, &[&str])]) -> Self {
        let mut mesh = Self::build(nodes);
        for (node, _) in nodes {
            mesh.spawn(node, &Options::default());
        }
        for (node, _) in nodes {
            mesh.ztunnel_mut(node).ready().await;
        }
        mesh
    }

    /// The same before any ztunnel runs. A pod named `outside/NAME` is in a namespace that is not in the mesh,
    /// others are in `shop`, which is.
    pub fn build(nodes: &[(&str, &[&str])]) -> Self {
        let dir = tempfile::Builder::new().prefix("culvert-node-").tempdir_in("/dev/shm").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::create_dir(dir.path().join("manifests")).unwrap();
        let mut builder = Lab::builder();
        let mut pods = BTreeMap::new();
        for (node, names) in nodes {
            let plain: Vec<&str> = names.iter().map(|n| n.rsplit('/').next().unwrap()).collect();
            for (full, name) in names.iter().zip(&plain) {
                let namespace = full.split_once('/').map_or("shop", |(namespace, _)| namespace);
                pods.insert((*name).to_owned(), ((*node).to_owned(), namespace.to_owned()));
            }
            builder = builder.node(node, &plain);
        }
        let lab = builder.build().unwrap();
        let mesh = Self { ztunnels: BTreeMap::new(), lab, dir, pods };
        mesh.put(
            "namespaces",
            &manifests::join([manifests::namespace("shop", true), manifests::namespace("outside", false)]),
        );
        for node in mesh.lab.nodes() {
            mesh.put(&format!("node-{}", node.host.name), &manifests::node(&node.host));
        }
        for name in mesh.pods.keys() {
            mesh.put(&format!("pod-{name}"), &mesh.manifest(name).to_string());
        }
        mesh
    }

    /// Starts a node's ztunnel; it need not become ready.
    pub fn spawn(&mut self, node: &str, options: &Options) {
        self.ztunnels.remove(node); // it must be gone before its successor starts
        let host = self.lab.node(node).host.clone();
        let started = Ztunnel::spawn(&host, self.dir.path(), options);
        self.ztunnels.insert(node.to_owned(), started);
    }

    /// Starts a node's ztunnel and waits until it is ready.
    pub async fn run(&mut self, node: &str, options: &Options) {
        self.spawn(node, options);
        self.ztunnel_mut(node).ready().await;
    }

    /// A node's ztunnel.
    pub fn ztunnel(&self, node: &str) -> &Ztunnel {
        &self.ztunnels[node]
    }

    pub fn ztunnel_mut(&mut self, node: &str) -> &mut Ztunnel {
        self.ztunnels.get_mut(node).unwrap()
    }

    /// A pod.
    pub fn pod(&self, name: &str) -> &Host {
        self.lab.pod(name)
    }

    /// A node.
    pub fn node(&self, name: &str) -> &Host {
        &self.lab.node(name).host
    }

    /// Where the ztunnels' files are; in memory, and root's alone.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn manifests(&self) -> PathBuf {
        self.dir.path().join("manifests")
    }

    /// What a pod's manifest is at first.
    pub fn manifest(&self, name: &str) -> PodManifest {
        let (node, namespace) = &self.pods[name];
        PodManifest::new(self.pod(name), namespace, node)
    }

    /// Puts a file into the directory in one step.
    pub fn put(&self, name: &str, text: &str) {
        let next = self.dir.path().join(format!("next-{name}"));
        fs::write(&next, text).unwrap();
        fs::rename(&next, self.manifests().join(format!("{name}.yaml"))).unwrap();
    }

    /// Puts a file into the directory and waits until it is in force on every node.
    pub async fn apply(&self, name: &str, text: &str) {
        self.change(|| self.put(name, text)).await;
    }

    /// Takes a file out of the directory and waits until that is in force on every node.
    pub async fn remove(&self, name: &str) {
        self.change(|| fs::remove_file(self.manifests().join(format!("{name}.yaml"))).unwrap()).await;
    }

    /// Changes the directory and waits until every ztunnel has taken it.
    pub async fn change(&self, change: impl FnOnce()) {
        let mut before = Vec::new();
        for ztunnel in self.ztunnels.values() {
            before.push(ztunnel.generation().await);
        }
        change();
        for (ztunnel, before) in self.ztunnels.values().zip(before) {
            eventually("the change is in force", async || ztunnel.generation().await > before).await;
        }
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
