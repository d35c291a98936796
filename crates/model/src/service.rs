//! Services: names and virtual addresses for sets of workloads.

use std::fmt;
use std::time::Duration;

use ipnet::IpNet;

use crate::{GatewayAddress, Str};

/// A service's name in the mesh. Two namespaces may define the same host name (ServiceEntry), so both belong to
/// the key.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ServiceKey {
    /// The namespace of the resource.
    pub namespace: Str,
    /// The fully qualified host name.
    pub hostname: Str,
}

impl fmt::Display for ServiceKey {
    /// `namespace/hostname`, the form of WDS names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// A service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// The resource's name.
    pub name: Str,
    /// The resource's namespace.
    pub namespace: Str,
    /// The fully qualified host name; may start with `*.` where a ServiceEntry says so.
    pub hostname: Str,
    /// The virtual addresses. Empty for a headless service.
    pub vips: Box<[Vip]>,
    /// The ports.
    pub ports: Box<[ServicePort]>,
    /// Identities accepted from endpoints beside their own; full SPIFFE IDs.
    pub subject_alt_names: Box<[Str]>,
    /// The waypoint that its traffic passes first.
    pub waypoint: Option<GatewayAddress>,
    /// How an endpoint is chosen.
    pub load_balancing: LoadBalancing,
    /// Which families the service has addresses of.
    pub ip_families: IpFamilies,
    /// How long one client keeps one endpoint (`sessionAffinity: ClientIP`); `None` for no affinity.
    pub session_affinity: Option<Duration>,
    /// Where the service comes from and how its endpoints are found.
    pub source: ServiceSource,
    /// Whether this one answers for the host name where several namespaces define it.
    pub canonical: bool,
}

impl Service {
    /// The service's key.
    #[must_use]
    pub fn key(&self) -> ServiceKey {
        ServiceKey { namespace: self.namespace.clone(), hostname: self.hostname.clone() }
    }

    /// The port `number`, if the service has it.
    #[must_use]
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == number)
    }
}

/// A virtual address of a service, or a range of them (a ServiceEntry's CIDR).
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Vip {
    /// The network that it is on; empty for the default one.
    pub network: Str,
    /// The address or range; a single address has the full prefix length.
    pub range: IpNet,
}

/// A port of a service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ServicePort {
    /// The port's name, empty when it has none.
    pub name: Str,
    /// The port that clients dial.
    pub port: u16,
    /// The port behind it.
    pub target: TargetPort,
    /// The application protocol (`appProtocol`, or the port name's prefix), empty when nothing says it.
    pub app_protocol: Str,
}

/// The port behind a service's port.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum TargetPort {
    /// The same for all endpoints.
    Number(u16),
    /// A container port's name: each endpoint's [`crate::PortMapping`] has the number.
    PerEndpoint,
}

/// Where a service comes from and how its endpoints are found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ServiceSource {
    /// A Kubernetes Service: endpoints are workloads.
    #[default]
    Kubernetes,
    /// A ServiceEntry with listed or selected endpoints.
    Static,
    /// A ServiceEntry whose endpoints are host names, resolved by the proxy.
    Dns,
    /// A ServiceEntry without endpoints: connections go to the address that was dialled.
    Passthrough,
}

/// How an endpoint is chosen.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct LoadBalancing {
    /// The properties that client and endpoint are compared by, the most important first.
    pub scopes: Box<[LocalityScope]>,
    /// What the comparison means.
    pub mode: LoadBalancingMode,
    /// Which endpoints are eligible.
    pub health: HealthPolicy,
}

/// What the comparison of localities means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum LoadBalancingMode {
    /// No preference.
    #[default]
    Any,
    /// Only endpoints that agree in every scope (`internalTrafficPolicy: Local`).
    Strict,
    /// Endpoints that agree in more scopes first, others when there are none.
    Failover,
}

/// A property of a locality.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LocalityScope {
    /// The region.
    Region,
    /// The zone.
    Zone,
    /// The subzone.
    Subzone,
    /// The node.
    Node,
    /// The cluster.
    Cluster,
    /// The network.
    Network,
}

/// Which endpoints are eligible.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum HealthPolicy {
    /// Ready ones only.
    #[default]
    OnlyHealthy,
    /// All of them (`publishNotReadyAddresses`).
    AllowAll,
}

/// The address families of a service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum IpFamilies {
    /// Not stated: whatever the addresses are.
    #[default]
    Automatic,
    /// IPv4 only.
    V4Only,
    /// IPv6 only.
    V6Only,
    /// Both.
    Dual,
}
