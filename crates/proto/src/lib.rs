//! The wire types of the protocols that the parts of a mesh speak to each other, and their conversion from and to
//! the model.
//!
//! Invariants of the crate:
//! * the messages of [`wire`] are Istio's, field by field; what Istio lacks travels in fields of our own, which
//!   are written only on request ([`Extensions::Culvert`]), that is to a peer which said that it knows them;
//! * nothing that is read panics, and nothing that decides over traffic is guessed: an address of a wrong
//!   length, a port over 65535 or an unknown action is a [`DecodeError`] that names resource and field, never a
//!   match that silently became wider; a message of what waypoints are told is refused for a field that is not known;
//! * nothing is weakened when it is written: what a peer could not enforce is an [`EncodeError`], and what it
//!   can enforce in another form is brought into that form (see `lower.rs`).
#![forbid(unsafe_code)]

mod decode;
mod encode;
mod features;
mod lower;
mod names;

pub use decode::{DecodeError, Decoded, Decoder, Elided, Problem};
pub use encode::{
    EncodeError, Extensions, Obstacle, Reason, encode_authentication, encode_authorizer, encode_http_policy,
    encode_http_service, encode_policy, encode_rate_limit, encode_service, encode_settings, encode_traffic,
    encode_workload, with_labels,
};
pub use features::Features;
pub use names::{
    ADDRESS_TYPE_URL, AUTHENTICATION_TYPE_URL, AUTHORIZATION_TYPE_URL, AUTHORIZER_TYPE_URL,
    HTTP_POLICY_TYPE_URL, HTTP_SERVICE_TYPE_URL, MESH_SETTINGS_NAME, MESH_SETTINGS_TYPE_URL,
    RATE_LIMIT_TYPE_URL, REACHABLE_TYPE_URL, ResourceName, TRAFFIC_TYPE_URL, WORKLOAD_TYPE_URL,
    belongs_together, policy_name, service_aliases, service_name, waypoint_part, waypoint_scope,
    workload_aliases, workload_name,
};

/// The messages, generated from the `.proto` files of this crate, and the gRPC services: each in modules of its
/// client and its server, [`wire::discovery::aggregated_discovery_service_client`] and `_server`,
/// [`wire::auth::istio_certificate_service_client`] and `_server`.
pub mod wire {
    /// The generated modules, nested as the packages are.
    #[allow(missing_docs, clippy::all, rust_2018_idioms)]
    mod generated {
        include!(concat!(env!("OUT_DIR"), "/wire.rs"));
    }

    pub use generated::culvert::waypoint::v1 as waypoint;
    pub use generated::culvert::wire::v1 as culvert;
    pub use generated::envoy::config::core::v3 as core;
    pub use generated::envoy::service::auth::v3 as ext_authz;
    pub use generated::envoy::service::discovery::v3 as discovery;
    pub use generated::envoy::service::ratelimit::v3 as rate_limit;
    pub use generated::google::rpc;
    pub use generated::istio::security;
    pub use generated::istio::v1::auth;
    pub use generated::istio::workload;
    pub use generated::istio::workload::zds;
}
