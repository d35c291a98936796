//! The policies of users and the settings of the mesh: reading, checking, and compiling to [`model::Policy`].
//!
//! What L4 cannot enforce as it is written is never a weakened rule (design.md): it fails closed for exactly the
//! scope that the policy names, and says so. How, for each kind of policy, stands in [`l4`].

pub mod age;
mod attachments;
pub mod authorization;
pub mod discovery;
mod embedded;
mod guards;
pub mod halves;
pub mod l4;
mod l7;
pub mod mesh_config;
pub mod mode;
mod node_local;
pub mod pattern;
pub mod peer_authentication;
pub mod providers;
pub mod rate_limit;
pub mod request_authentication;
mod requests;
pub mod review;
pub mod selector;
pub mod state;
pub mod telemetry;
mod telling;
pub mod waypoint;

pub use authorization::AuthorizationPolicy;
pub use discovery::NamespaceSelector;
pub use halves::Covered;
pub use mesh_config::MeshConfig;
pub use node_local::annotation as node_local_annotation;
pub use peer_authentication::PeerAuthentication;
pub use providers::Providers;
pub use rate_limit::RateLimit;
pub use request_authentication::RequestAuthentication;
pub use state::{Policies, Subject};
pub use telemetry::Telemetry;
pub use waypoint::{Binding, Waypoint};
