//! Workloads: what has an address and an identity.

use std::net::IpAddr;
use std::sync::Arc;

use crate::{InvalidIdentity, NetworkAddress, PolicyKey, ServiceKey, SpiffeId, Str, TrustDomain};

/// One instance of an application: a pod, a machine, or an endpoint that a ServiceEntry lists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Workload {
    /// Unique in the mesh: `cluster/group/kind/namespace/name/section` (WDS).
    pub uid: Str,
    /// The pod's or entry's name.
    pub name: Str,
    /// The namespace of the workload and of its service account.
    pub namespace: Str,
    /// The service account, `default` when the resource names none.
    pub service_account: Str,
    /// The trust domain of its identity.
    pub trust_domain: TrustDomain,
    /// The network that the addresses are on; empty for the default one.
    pub network: Str,
    /// Its addresses, never IPv4-mapped; empty for a workload that is known by a host name only.
    pub addresses: Box<[IpAddr]>,
    /// The name to resolve when there is no address; else empty.
    pub hostname: Str,
    /// The node that it runs on; empty when unknown.
    pub node: Str,
    /// The cluster that it runs in.
    pub cluster: Str,
    /// How connections to it are carried.
    pub tunnel: TunnelProtocol,
    /// Whether its addresses are its own or the node's.
    pub network_mode: NetworkMode,
    /// Whether it is ready for traffic.
    pub health: Health,
    /// Where it runs.
    pub locality: Arc<Locality>,
    /// For telemetry: the application that it is an instance of.
    pub canonical_name: Str,
    /// For telemetry: the version of that application.
    pub canonical_revision: Str,
    /// For telemetry: the name of the object that made it.
    pub workload_name: Str,
    /// For telemetry: the kind of the object that made it.
    pub workload_kind: WorkloadKind,
    /// The services that it is an endpoint of. Shared between equal workloads.
    pub services: Arc<[ServiceMembership]>,
    /// The policies that select it; namespace-wide and mesh-wide ones are found by their scope.
    pub policies: Box<[PolicyKey]>,
    /// The waypoint that its traffic passes first.
    pub waypoint: Option<Box<GatewayAddress>>,
    /// The east-west gateway through which other networks reach it.
    pub network_gateway: Option<Box<GatewayAddress>>,
    /// Set when the application itself takes tunnelled traffic on a port of its own.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Its weight among the endpoints of a service; 1 when nothing else is said, 0 takes no traffic.
    pub capacity: u32,
    /// Its labels, sorted by key, where whoever tells of it knows them (WDS does not): what subsets and `sourceLabels` ask
    /// for. Shared between equal workloads.
    pub labels: Arc<[(Str, Str)]>,
}

impl Workload {
    /// Its SPIFFE identity.
    ///
    /// # Errors
    /// Namespace or service account hold a character that a SPIFFE ID may not.
    pub fn identity(&self) -> Result<SpiffeId, InvalidIdentity> {
        SpiffeId::new(self.trust_domain.clone(), self.namespace.clone(), self.service_account.clone())
    }

    /// The value of a label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&Str> {
        let at = self.labels.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        self.labels.get(at).map(|(_, value)| value)
    }

    /// The keys that it is found by.
    pub fn network_addresses(&self) -> impl Iterator<Item = NetworkAddress> {
        self.addresses.iter().map(|ip| NetworkAddress::new(self.network.clone(), *ip))
    }
}

/// How connections to a workload are carried.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TunnelProtocol {
    /// As plain TCP: the workload is not in the mesh.
    #[default]
    None,
    /// In an HBONE tunnel to port 15008.
    Hbone,
    /// Mutual TLS as sidecars of Istio speak it; we pass it through as plain TCP and report it.
    LegacyIstioMtls,
}

/// Whose addresses a workload has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum NetworkMode {
    /// Its own.
    #[default]
    Standard,
    /// Its node's (`hostNetwork`), shared with others: such an address identifies no workload.
    HostNetwork,
}

/// Whether a workload takes traffic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Health {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready, or terminating.
    Unhealthy,
}

/// Where a workload runs. Empty parts are unknown.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: Str,
    /// `topology.kubernetes.io/zone`.
    pub zone: Str,
    /// `topology.istio.io/subzone`.
    pub subzone: Str,
}

/// The kind of object that made a workload.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum WorkloadKind {
    /// A Deployment.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A pod without an owner.
    #[default]
    Pod,
    /// A Job.
    Job,
}

/// That a workload is an endpoint of a service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ServiceMembership {
    /// The service.
    pub service: ServiceKey,
    /// Which port of the workload serves which port of the service. Shared between equal workloads.
    pub ports: Arc<[PortMapping]>,
}

/// A service's port and the workload's port behind it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PortMapping {
    /// The service's port.
    pub service_port: u16,
    /// The workload's port.
    pub target_port: u16,
}

/// A gateway or waypoint.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct GatewayAddress {
    /// What to resolve it by.
    pub target: GatewayTarget,
    /// Its HBONE port, 15008 as a rule.
    pub hbone_mtls_port: u16,
}

/// How a gateway is found.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum GatewayTarget {
    /// A service, by namespace and host name.
    Service(ServiceKey),
    /// A workload or service, by address.
    Address(NetworkAddress),
}

/// An application that takes tunnelled traffic itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ApplicationTunnel {
    /// Whether the PROXY protocol precedes the data.
    pub proxy_protocol: bool,
    /// The port it listens on for that; `None` for the port that was asked for.
    pub port: Option<u16>,
}
