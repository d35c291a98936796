//! The servers' side: which endpoints there are, which one takes a request, and connections to them.
//!
//! ```text
//!   clusters   for each destination that requests go to, its Cluster, kept up with the mesh
//!   cluster    the endpoints of one destination: choice (crate balance), ejections, limits
//!   endpoint   one endpoint: how it is reached, what is counted of it
//!   dial, tls  what a connection is made of, where it is not a tunnel's
//!   circuit    limits of a destination's connections and requests     pool   a thread's connections
//! ```

pub mod call;
pub mod circuit;
mod cluster;
pub mod clusters;
mod dial;
pub mod dump;
mod endpoint;
mod hashing;
pub mod metrics;
mod offer;
mod original;
pub mod pool;
pub(crate) mod tls;

pub use clusters::{Backend, ClusterInfo, ClusterLimits, Clusters, Dialers, EndpointInfo, NoCluster};
