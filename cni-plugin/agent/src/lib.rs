//! The node agent: puts this node's pods into the mesh, when they start and while they run.
//!
//! It hears of a pod that starts from the CNI plugin, which waits for the answer, and of the others from the API server. It
//! has rules written into the pod's network namespace (`capture`), and hands the namespace to ztunnel ([`zds`]), which
//! listens in there.
//!
//! Invariants:
//! * a pod that is to be in the mesh is captured before its first process runs, or does not start;
//! * whatever ends and starts again, this process, ztunnel, the kubelet or the node: what was captured stays captured, and
//!   is refused until a ztunnel serves it;
//! * a namespace is used only as the pod's that has the pod's address.
#![forbid(unsafe_code)]

pub mod chain;
pub mod cluster;
pub mod install;
pub mod kubernetes;
pub mod metrics;
pub mod netns;
pub mod node;
pub mod plugin;
pub mod pod;
pub mod probes;
pub mod record;
pub mod rules;
pub mod settings;
pub mod start;
pub mod zds;
