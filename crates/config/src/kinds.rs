//! The kinds of Kubernetes, as far as the mesh reads them: one module each, with its type and its table of fields.

pub mod capture;
pub mod endpoint_slice;
pub mod foreign;
pub mod namespace;
pub mod node;
pub mod pod;
pub mod service;
pub mod service_account;

pub use capture::{Capture, Exclusions, PortRange};
pub use endpoint_slice::EndpointSlice;
pub use namespace::Namespace;
pub use node::Node;
pub use pod::Pod;
pub use service::{Service, ServiceType};
pub use service_account::ServiceAccount;
