//! The names of resources in WDS (facts: names and aliases of the Address type).

use std::net::IpAddr;

use model::http::WaypointKey;
use model::{NetworkAddress, NetworkMode, PolicyKey, Service, ServiceKey, Workload};

/// The type of workloads and services.
pub const ADDRESS_TYPE_URL: &str = "type.googleapis.com/istio.workload.Address";
/// The older type of workloads alone.
pub const WORKLOAD_TYPE_URL: &str = "type.googleapis.com/istio.workload.Workload";
/// The type of policies.
pub const AUTHORIZATION_TYPE_URL: &str = "type.googleapis.com/istio.security.Authorization";

/// The type of the mesh's settings; Culvert's own, see `culvert/wire.proto`.
pub const MESH_SETTINGS_TYPE_URL: &str = "type.googleapis.com/culvert.wire.v1.MeshSettings";
/// The name of the only resource of that type.
pub const MESH_SETTINGS_NAME: &str = "mesh";

/// The type of what waypoints do for services; Culvert's own, as the next ones, see `culvert/waypoint.proto`.
pub const HTTP_SERVICE_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.HttpService";
/// The type of what waypoints enforce of policies.
pub const HTTP_POLICY_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.HttpPolicy";
/// The type of how services are spoken to.
pub const TRAFFIC_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.ServiceTraffic";

/// The type of whose tokens are taken.
pub const AUTHENTICATION_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.Authentication";
/// The type of rate limits.
pub const RATE_LIMIT_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.RateLimit";
/// The type of external authorizers.
pub const AUTHORIZER_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.Authorizer";

/// The type of the workloads that a waypoint is sent.
pub const REACHABLE_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.Reachable";

/// Whether resources of a type are to be put in force all at once: each changes what the others mean. An ALLOW without the
/// DENY that was sent with it lets in what neither the state before nor the one after does.
#[must_use]
pub fn belongs_together(type_url: &str) -> bool {
    [AUTHORIZATION_TYPE_URL, HTTP_POLICY_TYPE_URL].contains(&type_url)
}

/// What a waypoint is interested in: `namespace/name`. Namespaces, which other resources have, have no slash.
#[must_use]
pub fn waypoint_scope(waypoint: &WaypointKey) -> String {
    waypoint.to_string()
}

/// The name of a resource that several waypoints may have, as this one has it: what comes behind its own.
///
/// ```text
///   WAYPOINT-NAMESPACE/WAYPOINT/NAMESPACE/NAME
/// ```
#[must_use]
pub fn waypoint_part(name: &str) -> Option<&str> {
    name.splitn(3, '/').nth(2)
}

/// The primary name of a workload: its uid.
#[must_use]
pub fn workload_name(workload: &Workload) -> &str {
    &workload.uid
}

/// The names by which a workload may be asked for beside its uid: `network/ip` for each of its addresses, none
/// for one in the host's network, whose address is not its own.
pub fn workload_aliases(workload: &Workload) -> impl Iterator<Item = String> {
    let own = workload.network_mode == NetworkMode::Standard;
    own.then(|| workload.network_addresses().map(|a| a.to_string())).into_iter().flatten()
}

/// The primary name of a service: `namespace/hostname`.
#[must_use]
pub fn service_name(key: &ServiceKey) -> String {
    key.to_string()
}

/// The names by which a service may be asked for beside its primary one: `network/ip` for each single virtual
/// address. Ranges have none: nobody asks for a whole range.
pub fn service_aliases(service: &Service) -> impl Iterator<Item = String> {
    service
        .vips
        .iter()
        .filter(|v| v.range.prefix_len() == v.range.max_prefix_len())
        .map(|v| NetworkAddress::new(v.network.clone(), v.range.addr()).to_string())
}

/// The name of a policy: `namespace/name`.
#[must_use]
pub fn policy_name(key: &PolicyKey) -> String {
    key.to_string()
}

/// What a name of the Address type asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ResourceName {
    /// Everything (`*`).
    Wildcard,
    /// Whatever has this address.
    Address(NetworkAddress),
    /// The service of this key.
    Service(ServiceKey),
    /// The workload of this uid.
    Workload(Box<str>),
}

impl ResourceName {
    /// Reads a name. Names are told apart by form: `network/ip` has an address behind its only slash,
    /// `namespace/hostname` has one slash, and everything else is a uid.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        if name == "*" {
            return Self::Wildcard;
        }
        match name.split_once('/') {
            Some((first, rest)) if !rest.contains('/') => match rest.parse::<IpAddr>() {
                Ok(ip) => Self::Address(NetworkAddress::new(first.into(), ip)),
                Err(_) => Self::Service(ServiceKey { namespace: first.into(), hostname: rest.into() }),
            },
            _ => Self::Workload(name.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart_by_their_form() {
        let address = |network: &str, ip: &str| {
            ResourceName::Address(NetworkAddress::new(network.into(), ip.parse().unwrap()))
        };
        let service = |namespace: &str, hostname: &str| {
            ResourceName::Service(ServiceKey { namespace: namespace.into(), hostname: hostname.into() })
        };
        for (name, wanted) in [
            ("*", ResourceName::Wildcard),
            ("/10.0.0.1", address("", "10.0.0.1")),
            ("west/fd00::1", address("west", "fd00::1")),
            ("/::ffff:10.0.0.1", address("", "10.0.0.1")),
            ("shop/cart.shop.svc.cluster.local", service("shop", "cart.shop.svc.cluster.local")),
            ("shop/*.example.com", service("shop", "*.example.com")),
            ("cluster1//Pod/shop/cart-1", ResourceName::Workload("cluster1//Pod/shop/cart-1".into())),
            ("0ae5c03d", ResourceName::Workload("0ae5c03d".into())),
            ("", ResourceName::Workload("".into())),
        ] {
            assert_eq!(ResourceName::parse(name), wanted, "{name}");
        }
    }
}
