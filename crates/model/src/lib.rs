//! The language that all crates speak: identities, addresses, workloads, services, routes and policies,
//! and the pure decisions over them.
//!
//! Invariants of the crate:
//! * types can only be built valid: an unparsable SPIFFE ID or trust domain never exists as a value;
//! * no I/O, no clock, no randomness: a decision is a function of a [`Mesh`] snapshot and a [`Connection`];
//! * a snapshot is immutable; [`Mesh::apply`] makes the next one and shares all that did not change.
#![forbid(unsafe_code)]

mod address;
mod cow_map;
mod holders;
pub mod http;
mod identity;
mod mesh;
mod name;
mod policy;
mod service;
mod settings;
pub mod telemetry;
mod verdict;
mod workload;

pub use address::{HboneAddr, NetworkAddress, OriginalDst, PodAddr, ServiceAddr, canonical_ip};
pub use cow_map::CowMap;
pub use identity::{InvalidIdentity, SpiffeId, TrustDomain, TrustDomains};
pub use mesh::{Change, Destination, Endpoint, EndpointSet, Mesh};
pub use name::{Interner, Str};
pub use policy::{
    Action, Clause, IpMatch, Match, Policy, PolicyKey, Rule, Scope, ServiceAccountMatch, StringMatch,
};
pub use service::{
    HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, LocalityScope, Service, ServiceKey,
    ServicePort, ServiceSource, TargetPort, Vip,
};
pub use settings::{NodeLocal, NodeLocalModes, OutboundMode, Settings, TlsVersion};
pub use verdict::{
    Allow, Connection, Decision, Deny, DryRun, Field, Held, NearMiss, Permit, RequestDecision, RuleRef,
    decide_request,
};
pub use workload::{
    Addresses, ApplicationTunnel, GatewayAddress, GatewayTarget, Health, Locality, NameIn, NetworkMode,
    PortMapping, Profile, Profiles, ServiceMembership, TunnelProtocol, Workload, WorkloadKind,
};
