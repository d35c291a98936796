//! From the model to the wire.

mod checks;
mod http;
mod http_policy;
mod policy;
mod service;
mod settings;
mod telemetry;
mod traffic;
mod workload;

use std::net::IpAddr;

use ipnet::IpNet;
use model::{GatewayAddress, GatewayTarget, Str};

pub use checks::{encode_authentication, encode_authorizer, encode_rate_limit};
pub use http::encode_http_service;
pub use http_policy::encode_http_policy;
pub use policy::encode_policy;
pub use service::encode_service;
pub use settings::encode_settings;
pub use traffic::encode_traffic;
pub use workload::{encode_workload, with_labels};

use crate::wire::{security, workload as wire};

/// What the receiver knows beyond Istio's wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Extensions {
    /// Nothing: what Istio's wire lacks is brought into a form that it has, or refused.
    None,
    /// The fields of our own: reading gives back what was written.
    Culvert,
}

/// An object that can't be written so that the receiver would act on it as it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource} can't be sent: {}", listed(.obstacles))]
pub struct EncodeError {
    /// The kind and name, like `policy shop/only-cart`.
    pub resource: String,
    /// What stands in the way; not empty. To send the object all the same, take this out of it, and say so.
    pub obstacles: Vec<Obstacle>,
}

/// One part of an object that can't be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Obstacle {
    /// The path of the model's field, like `rules[0].clauses[1].matches[0].trust_domains`.
    pub field: String,
    /// Why.
    #[source]
    pub reason: Reason,
}

/// Why a part of an object can't be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Session affinity is not in Istio's wire.
    #[error("session affinity is not known to the receiver")]
    SessionAffinity,
    /// A trust domain by its end has no form as a principal.
    #[error("the trust domain pattern {0:?} has no equivalent among principals")]
    TrustDomainSuffix(String),
    /// A policy for requests was to go to a proxy for connections.
    #[error("is about requests, and the receiver sees connections")]
    NeedsRequests,
    /// The equivalent has too many rules.
    #[error("would come to {wanted} rules, more than {limit}")]
    TooManyRules {
        /// How many, at least.
        wanted: usize,
        /// How many are written at most.
        limit: usize,
    },
    /// A slash in a part of a name that ends at the first slash.
    #[error("{0:?} holds a slash, which separates it from the rest of the name")]
    Slash(String),
    /// The wire reads an empty value as something else.
    #[error("is empty")]
    Empty,
    /// The wire reads port 0 as no port.
    #[error("is port 0")]
    PortZero,
    /// Too long for the wire.
    #[error("is too long a time")]
    Duration,
}

fn listed(obstacles: &[Obstacle]) -> String {
    obstacles.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Collects what stands in the way of one object.
#[derive(Default)]
struct Obstacles(Vec<Obstacle>);

impl Obstacles {
    fn add(&mut self, field: impl Into<String>, reason: Reason) {
        self.0.push(Obstacle { field: field.into(), reason });
    }

    /// A namespace that is written before a slash.
    fn no_slash(&mut self, field: &str, namespace: &str) {
        if namespace.contains('/') {
            self.add(field, Reason::Slash(namespace.to_owned()));
        }
    }

    fn not_empty(&mut self, field: &str, text: &str) {
        if text.is_empty() {
            self.add(field, Reason::Empty);
        }
    }

    fn result<T>(self, kind: &str, name: &str, value: T) -> Result<T, EncodeError> {
        if self.0.is_empty() {
            return Ok(value);
        }
        Err(EncodeError { resource: format!("{kind} {name}"), obstacles: self.0 })
    }
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn texts(list: &[Str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn network(range: IpNet) -> security::Address {
    security::Address { address: bytes(range.addr()), length: range.prefix_len().into() }
}

fn gateway(gateway: &GatewayAddress) -> wire::GatewayAddress {
    use wire::gateway_address::Destination;
    let destination = match &gateway.target {
        GatewayTarget::Service(key) => Destination::Hostname(wire::NamespacedHostname {
            namespace: key.namespace.to_string(),
            hostname: key.hostname.to_string(),
        }),
        GatewayTarget::Address(address) => Destination::Address(wire::NetworkAddress {
            network: address.network.to_string(),
            address: bytes(address.ip),
            length: None,
        }),
    };
    wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: gateway.hbone_mtls_port.into() }
}
