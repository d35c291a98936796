//! Where everything is, and the addresses.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// The control plane's address on the nodes' link.
pub const CONTROL_PLANE_IP: &str = "172.30.0.1";
/// The same in IPv6.
pub const CONTROL_PLANE_IP6: &str = "fd00:30::1";
/// The API server's port.
pub const API_PORT: u16 = 6443;
/// All pods' addresses: each has one of both.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16,fd00:10:244::/56";
/// All services' addresses; the first is the API server's. A service has one of the first, unless it asks for both.
pub const SERVICE_CIDR: &str = "10.96.0.0/16,fd00:10:96::/112";
/// The API server's address as a service.
pub const API_SERVICE_IP: &str = "10.96.0.1";
/// The cluster's DNS.
pub const DNS_IP: &str = "10.96.0.10";

/// A machine of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// As Kubernetes knows it.
    pub name: &'static str,
    /// On the nodes' link.
    pub ip: &'static str,
    /// The same in IPv6.
    pub ip6: &'static str,
    /// Its pods' addresses.
    pub pod_cidr: &'static str,
    /// The same in IPv6.
    pub pod_cidr6: &'static str,
    /// Its end of the link in the control plane's namespace, where captures are made.
    pub link: &'static str,
}

/// The nodes.
pub const NODES: [Node; 2] = [
    Node {
        name: "node1",
        ip: "172.30.0.11",
        ip6: "fd00:30::11",
        pod_cidr: "10.244.1.0/24",
        pod_cidr6: "fd00:10:244:1::/64",
        link: "node1",
    },
    Node {
        name: "node2",
        ip: "172.30.0.12",
        ip6: "fd00:30::12",
        pod_cidr: "10.244.2.0/24",
        pod_cidr6: "fd00:10:244:2::/64",
        link: "node2",
    },
];

impl Node {
    /// The node of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<&'static Self> {
        NODES.iter().find(|n| n.name == name).with_context(|| {
            let known: Vec<&str> = NODES.iter().map(|n| n.name).collect();
            format!("there is no node {name:?}; there are {}", known.join(", "))
        })
    }
}

/// How many clusters there may be beside each other.
pub const CLUSTERS: u8 = 3;

/// What a cluster's things are called, and its directories, below `target/kube`. There may be others beside the
/// first: their addresses are the same, in namespaces of their own.
#[derive(Clone, Debug)]
pub struct Lab {
    /// The workspace.
    pub workspace: PathBuf,
    /// `target/kube`.
    pub root: PathBuf,
    /// Which of the clusters, from 1.
    pub number: u8,
}

impl Lab {
    /// That of the workspace which this program lies in, or is run in, or was built in: in this order, so that a
    /// checkout can be moved, and cargo's directory be elsewhere.
    ///
    /// # Errors
    /// There is no workspace in any of them.
    pub fn find() -> Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        let here = std::env::current_dir().context("finding the current directory")?;
        let places = [program.as_path(), &here, Path::new(env!("CARGO_MANIFEST_DIR"))];
        let Some(workspace) = places.iter().find_map(|place| workspace_of(place)) else {
            let tried: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
            bail!("none of {} is in Culvert's workspace: run it there", tried.join(", "));
        };
        let workspace =
            workspace.canonicalize().with_context(|| format!("finding {}", workspace.display()))?;
        Ok(Self { root: workspace.join("target/kube"), workspace, number: 1 })
    }

    /// That of the cluster with this number.
    #[must_use]
    pub fn nth(&self, number: u8) -> Self {
        Self { number, ..self.clone() }
    }

    /// Those of all clusters that there may be, the first one first.
    pub fn all(&self) -> impl DoubleEndedIterator<Item = Self> {
        (1..=CLUSTERS).map(|number| self.nth(number))
    }

    /// What all of the cluster's things on the machine begin with.
    fn prefix(&self) -> String {
        if self.number == 1 { "culvert-kube-".to_owned() } else { format!("culvert-kube{}-", self.number) }
    }

    /// The directory of what is this cluster's alone.
    fn own(&self) -> PathBuf {
        if self.number == 1 { self.root.clone() } else { self.root.join(format!("cluster{}", self.number)) }
    }

    /// A node's network namespace.
    #[must_use]
    pub fn netns(&self, node: &Node) -> String {
        format!("{}{}", self.prefix(), node.name)
    }

    /// A node's part of every cgroup tree, from the root.
    #[must_use]
    pub fn cgroup(&self, node: &Node) -> String {
        format!("{}{}", self.prefix(), node.name)
    }

    /// The control plane's network namespace.
    #[must_use]
    pub fn control_plane_netns(&self) -> String {
        format!("{}cp", self.prefix())
    }

    /// Programs: Kubernetes, etcd, CoreDNS, Helm, the applications.
    #[must_use]
    pub fn bin(&self, name: &str) -> PathBuf {
        self.root.join("bin").join(name)
    }

    /// Keys, certificates and kubeconfigs.
    #[must_use]
    pub fn pki(&self, file: &str) -> PathBuf {
        self.own().join("pki").join(file)
    }

    /// The cluster's own images.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The product's images, as `make images` writes them.
    #[must_use]
    pub fn product_images(&self) -> PathBuf {
        self.workspace.join("target/images")
    }

    /// What lives as long as the cluster.
    #[must_use]
    pub fn run(&self, path: &str) -> PathBuf {
        self.own().join("run").join(path)
    }

    /// What a node keeps on its disk.
    #[must_use]
    pub fn disk(&self, node: &Node) -> PathBuf {
        self.run(node.name).join("disk")
    }

    /// What programs wrote, kept after the cluster.
    #[must_use]
    pub fn log(&self, file: &str) -> PathBuf {
        self.own().join("log").join(file)
    }

    /// Writes a file below the lab, with its directories.
    ///
    /// # Errors
    /// With the path.
    pub fn write(&self, path: &Path, text: &str) -> Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

/// The workspace that a path is in: it has this crate's module of Go.
fn workspace_of(path: &Path) -> Option<&Path> {
    path.ancestors().find(|at| at.join("tests/kube/tools/go.mod").is_file())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_workspace_is_found_from_below_it_wherever_it_is() {
        let moved = tempfile::tempdir().unwrap();
        let program = moved.path().join("target/debug/kube-tests");
        assert_eq!(workspace_of(&program), None);
        let module = moved.path().join("tests/kube/tools");
        fs::create_dir_all(&module).unwrap();
        fs::write(module.join("go.mod"), "").unwrap();
        assert_eq!(workspace_of(&program), Some(moved.path()));
        assert!(Lab::find().unwrap().workspace.join("Cargo.toml").is_file());
    }
}
