//! A snapshot of the mesh with all that is made of it once, so that a request costs look-ups.
//!
//! Invariants:
//! * a request is decided by one snapshot, whole;
//! * what did not change from one snapshot to the next is shared, and not made anew.

use std::net::SocketAddr;
use std::sync::Arc;

use hashbrown::HashMap;
use model::http::{HttpPort, HttpService, Protocol, WaypointKey};
use model::{Destination, GatewayTarget, Mesh, OriginalDst, Policy, PolicyKey, ServiceKey, Str, Workload};

use crate::filters::authorize::Policies;
use crate::filters::route::PortRules;

/// See the module.
#[derive(Debug, Default)]
pub struct Rules {
    /// The mesh.
    pub mesh: Arc<Mesh>,
    own: Option<WaypointKey>,
    services: HashMap<ServiceKey, Arc<ServiceRules>>,
}

/// What is done for a service that is bound to this waypoint.
#[derive(Debug)]
pub struct ServiceRules {
    /// What was asked for.
    pub http: Arc<HttpService>,
    /// The policies for what reaches it.
    pub policies: Policies,
    ports: Box<[PortRules]>,
}

/// What an address is that a client wants to reach through this waypoint.
#[derive(Clone, Debug)]
pub enum Served {
    /// A service that is bound to it.
    Service(Arc<ServiceRules>),
    /// A workload that is.
    Workload(Arc<Workload>),
}

impl Rules {
    /// What is made of `mesh`, for the waypoint `own`; what is the same as `before` is kept.
    #[must_use]
    pub fn new(mesh: Arc<Mesh>, own: &WaypointKey, before: &Self) -> Self {
        let ours = mesh.http_services().filter(|http| http.waypoint == *own);
        let services = ours
            .map(|http| {
                let old = before.services.get(&http.service);
                let policies = policies(&mesh, http);
                let rules = match old {
                    Some(old) if Arc::ptr_eq(&old.http, http) && old.policies == policies => old.clone(),
                    _ => Arc::new(ServiceRules::new(http, policies, old)),
                };
                (http.service.clone(), rules)
            })
            .collect();
        Self { mesh, own: Some(own.clone()), services }
    }

    /// What is done for a service.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<ServiceRules>> {
        self.services.get(key)
    }

    /// Whether policies, tokens or limits hold for what reaches a service, beside the policies of its workloads.
    #[must_use]
    pub fn is_guarded(&self, key: &ServiceKey) -> bool {
        self.services.get(key).is_some_and(|rules| {
            let http = &rules.http;
            !(http.policies.is_empty() && http.authentication.is_empty() && http.rate_limits.is_empty())
        })
    }

    /// All services that something is done for.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceRules>> {
        self.services.values()
    }

    /// Whether `target` is this waypoint: its Service has its name.
    #[must_use]
    pub fn is_own(&self, target: &GatewayTarget) -> bool {
        let Some(own) = &self.own else { return false };
        match target {
            GatewayTarget::Service(key) => {
                let domain = &self.mesh.settings().cluster_domain;
                let rest = key.hostname.strip_prefix(&*own.name).and_then(|r| r.strip_prefix('.'));
                let rest = rest.and_then(|r| r.strip_prefix(&*own.namespace));
                key.namespace == own.namespace
                    && rest.and_then(|r| r.strip_prefix(".svc.")).is_some_and(|rest| *rest == **domain)
            }
            GatewayTarget::Address(address) => self
                .mesh
                .service_at(address)
                .is_some_and(|s| s.namespace == own.namespace && s.name == own.name),
        }
    }

    /// What is done for the service that has the address `to`. An address of a workload is the workload's, as it is for the node that
    /// sent the client here, also where it lies in the range of a ServiceEntry.
    #[must_use]
    pub fn service_at(&self, network: &Str, to: SocketAddr) -> Option<&Arc<ServiceRules>> {
        match self.mesh.destination(network, OriginalDst::new(to)) {
            Destination::Service(service) => self.services.get(&service.key()),
            Destination::Workload(_) | Destination::Unknown => None,
        }
    }
}

/// The policies of the service, and the sets of its workloads.
fn policies(mesh: &Mesh, http: &HttpService) -> Policies {
    let held = |keys: &[PolicyKey]| -> Vec<Result<Arc<Policy>, PolicyKey>> {
        keys.iter().map(|key| mesh.http_policy(key).cloned().ok_or_else(|| key.clone())).collect()
    };
    let sets = http.selected.iter().map(|set| held(set));
    Policies(std::iter::once(held(&http.policies)).chain(sets).collect())
}

impl ServiceRules {
    fn new(http: &Arc<HttpService>, policies: Policies, before: Option<&Arc<Self>>) -> Self {
        let port = |port: &HttpPort| {
            let before = before.and_then(|before| before.port(port.number));
            PortRules::new(&http.service, port, before)
        };
        Self { http: http.clone(), policies, ports: http.ports.iter().map(port).collect() }
    }

    /// The rules of the port `number`.
    #[must_use]
    pub fn port(&self, number: u16) -> Option<&PortRules> {
        self.ports.iter().find(|rules| rules.port.number == number)
    }

    /// What is spoken at the port `number`; `None` if there is no such port.
    #[must_use]
    pub fn protocol(&self, number: u16) -> Option<Protocol> {
        self.port(number).map(|rules| rules.port.protocol)
    }
}
