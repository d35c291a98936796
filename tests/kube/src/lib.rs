//! A real Kubernetes on this machine, and the scenarios that are run on it.
//!
//! ```text
//!   culvert-kube-cp: etcd, API server,      culvert-kube-node1            culvert-kube-node2
//!   controller manager, scheduler           containerd, kubelet,          the same
//!                                           kube-proxy, pods
//!        172.30.0.1  br0                         eth0 172.30.0.11              eth0 172.30.0.12
//!                     ├───────────────────────────┘                             │
//!                     └─────────────────────────────────────────────────────────┘
//! ```
//!
//! The control plane has a network namespace, each node one of each kind but users'; what Kubernetes keeps below
//! `/var`, `/etc`, `/opt` and `/run` is private to a node. [`tools`] builds the programs from Go modules, [`image`]
//! makes images without a container daemon, [`cluster`] starts and stops it all, and [`scenario`] has the
//! scenarios. Everything is kept below `target/kube`. Two more clusters may be beside the first, in namespaces of their own.
//!
//! Whatever is started is recorded first with its process id and start time ([`process`]), and only what is
//! recorded is ever ended: an `up` that is killed half way is cleared by the next `down`.
#![forbid(unsafe_code)]
// Of objects of JSON, which give null for what is not there.
#![allow(clippy::indexing_slicing)]

pub mod api;
pub mod capture;
pub mod cluster;
pub mod conformance;
pub mod control_plane;
pub mod image;
pub mod interrupt;
pub mod kubectl;
pub mod lab;
pub mod lab_images;
pub mod mesh;
pub mod network_policy;
pub mod node;
pub mod node_init;
pub mod owner;
pub mod pki;
pub mod process;
pub mod report;
pub mod scenario;
pub mod tools;
