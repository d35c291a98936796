//! From the address that an application dialled to where its connection goes.
//!
//! Reads a snapshot and decides; dials nothing. A refusal is a value with its reason, and there is no default: an
//! address that nothing is known of is passed through only where the settings say so.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use balance::{Balancer, Candidate, Client, NoEndpoint, Picked, Request};
use model::{
    Destination, GatewayAddress, GatewayTarget, HboneAddr, Mesh, OriginalDst, OutboundMode, Service,
    ServiceSource, SpiffeId, Str, TunnelProtocol, Workload,
};

use super::within::Destined;

/// The port that ztunnel and waypoints take HBONE on.
pub const HBONE_PORT: u16 = 15008;

/// Where a connection goes.
#[derive(Debug)]
pub enum Route {
    /// In a tunnel.
    Tunnel {
        /// What to dial.
        hbone: HboneAddr,
        /// What to ask the peer for: the workload's own address, or the service's towards a waypoint.
        authority: SocketAddr,
        /// The identities that the peer may prove.
        expected: Arc<[SpiffeId]>,
        /// Whether a waypoint is dialled, and not the destination.
        waypoint: bool,
        /// What is behind the address.
        target: Target,
    },
    /// To a pod of this node as it is, since both namespaces want that. Made of a tunnel's, see [`super::within`].
    Within {
        /// The pod.
        destination: Destined,
        /// What is behind the address.
        target: Target,
    },
    /// As plain TCP.
    Plain {
        /// What to dial.
        to: SocketAddr,
        /// Why without a tunnel.
        why: NoTunnel,
        /// What is behind the address.
        target: Target,
    },
    /// As plain TCP to one of the addresses of a host name.
    PlainHost {
        /// The name to resolve.
        host: Str,
        /// The port to dial.
        port: u16,
        /// What is behind the name.
        target: Target,
    },
}

impl Route {
    /// What is behind the address.
    pub fn target(&self) -> &Target {
        match self {
            Self::Tunnel { target, .. }
            | Self::Within { target, .. }
            | Self::Plain { target, .. }
            | Self::PlainHost { target, .. } => target,
        }
    }

    /// The balancer's count of this connection.
    pub fn into_picked(self) -> Option<Picked> {
        match self {
            Self::Tunnel { target, .. }
            | Self::Within { target, .. }
            | Self::Plain { target, .. }
            | Self::PlainHost { target, .. } => target.picked,
        }
    }
}

/// What is known of a connection's destination.
#[derive(Debug, Default)]
pub struct Target {
    /// The workload, if it is one.
    pub workload: Option<Arc<Workload>>,
    /// The service that it was reached by.
    pub service: Option<Arc<Service>>,
    /// The balancer's count of this connection; dropped with it.
    pub picked: Option<Picked>,
}

/// Why a connection goes without a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoTunnel {
    /// The destination is not in the mesh.
    NotInMesh,
    /// Nothing is known of the destination, and the settings let such connections pass.
    UnknownAddress,
    /// A ServiceEntry without endpoints: the address itself is the endpoint.
    PassthroughService,
}

impl NoTunnel {
    /// The reason in words, for `/connections`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotInMesh => "passed through: the destination is not in the mesh",
            Self::UnknownAddress => {
                "passed through: the address is unknown and outbound traffic is ALLOW_ANY"
            }
            Self::PassthroughService => "passed through: the ServiceEntry has resolution NONE",
        }
    }
}

/// Why a connection goes nowhere.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Outbound traffic is restricted to what the mesh knows.
    #[error("{0} belongs to no workload, service or ServiceEntry, and outbound traffic is REGISTRY_ONLY")]
    RegistryOnly(OriginalDst),
    /// The service exists, its port doesn't.
    #[error("service {service} has no port {port}")]
    NoSuchPort {
        /// The service.
        service: model::ServiceKey,
        /// The port that was dialled.
        port: u16,
    },
    /// No endpoint can be chosen.
    #[error("service {service} port {port}: {reason}")]
    NoEndpoint {
        /// The service.
        service: model::ServiceKey,
        /// The port that was dialled.
        port: u16,
        /// Why not.
        reason: NoEndpoint,
    },
    /// The chosen endpoint has neither address nor host name.
    #[error("workload {0} has no address")]
    NoAddress(Str),
    /// The workload's names make no identity, so its peer can't be verified.
    #[error("workload {0} has no valid identity: {1}")]
    NoIdentity(Str, model::InvalidIdentity),
    /// A waypoint is bound and can't be reached.
    #[error("the destination is bound to a waypoint that is not ready: {0}")]
    WaypointNotReady(String),
}

/// What a resolution needs beside the address.
pub struct Context<'a> {
    /// The snapshot.
    pub mesh: &'a Mesh,
    /// Endpoint choice, shared by all connections of the node.
    pub balancer: &'a Balancer,
    /// The workload that dials.
    pub source: &'a Workload,
    /// Its address on this connection.
    pub source_ip: IpAddr,
    /// Endpoints that this connection tried already.
    pub tried: &'a [Str],
    /// Time since the process started.
    pub now: std::time::Duration,
    /// A fresh random number.
    pub random: u64,
}

impl Context<'_> {
    /// Where the connection to `dialled` goes.
    ///
    /// # Errors
    /// It goes nowhere, for the reason in the [`Refusal`].
    pub fn resolve(&self, dialled: OriginalDst) -> Result<Route, Refusal> {
        match self.mesh.destination(&self.source.network, dialled) {
            Destination::Service(service) => self.service(dialled, service),
            Destination::Workload(workload) => {
                if let Some(waypoint) = &workload.waypoint
                    && !self.is_waypoint(waypoint)
                {
                    let target = Target { workload: Some(workload.clone()), ..Target::default() };
                    return self.waypoint(waypoint, dialled.socket_addr(), target);
                }
                self.workload(&workload, dialled.socket_addr(), &[], Target::default())
            }
            Destination::Unknown => match self.mesh.settings().outbound {
                OutboundMode::AllowAny => Ok(Route::Plain {
                    to: dialled.socket_addr(),
                    why: NoTunnel::UnknownAddress,
                    target: Target::default(),
                }),
                OutboundMode::RegistryOnly => Err(Refusal::RegistryOnly(dialled)),
            },
        }
    }

    fn service(&self, dialled: OriginalDst, service: Arc<Service>) -> Result<Route, Refusal> {
        let port = dialled.port();
        if let Some(waypoint) = &service.waypoint
            && !self.is_waypoint(waypoint)
        {
            let target = Target { service: Some(service.clone()), ..Target::default() };
            return self.waypoint(waypoint, dialled.socket_addr(), target);
        }
        if service.port(port).is_none() {
            return Err(Refusal::NoSuchPort { service: service.key(), port });
        }
        if service.source == ServiceSource::Passthrough {
            let target = Target { service: Some(service), ..Target::default() };
            let why = NoTunnel::PassthroughService;
            return Ok(Route::Plain { to: dialled.socket_addr(), why, target });
        }
        let picked = self.pick(&service, port)?;
        let (workload, target_port) = (picked.workload().clone(), picked.target_port());
        let target = Target { service: Some(service.clone()), picked: Some(picked), workload: None };
        self.endpoint(&service, workload, target_port, target)
    }

    fn endpoint(
        &self,
        service: &Service,
        workload: Arc<Workload>,
        target_port: u16,
        target: Target,
    ) -> Result<Route, Refusal> {
        let Some(ip) = self.address_of(&workload) else {
            if workload.hostname.is_empty() {
                return Err(Refusal::NoAddress(workload.uid.clone()));
            }
            let host = workload.hostname.clone();
            let target = Target { workload: Some(workload), ..target };
            return Ok(Route::PlainHost { host, port: target_port, target });
        };
        let sans = &service.subject_alt_names;
        self.workload(&workload, SocketAddr::new(ip, target_port), sans, target)
    }

    fn pick(&self, service: &Arc<Service>, port: u16) -> Result<Picked, Refusal> {
        let refusal = |reason| Refusal::NoEndpoint { service: service.key(), port, reason };
        self.asked(service, port, |request| self.balancer.pick(request)).map_err(refusal)
    }

    /// What the balancer answers.
    fn asked<T>(&self, service: &Service, port: u16, answer: impl FnOnce(&Request<'_>) -> T) -> T {
        let set = self.mesh.endpoints(&service.key()).cloned().unwrap_or_default();
        answer(&Request {
            service,
            set: &set,
            client: &Client::new(self.source, self.source_ip),
            port,
            exclude: self.tried,
            now: self.now,
            random: self.random,
        })
    }

    /// All the routes that [`Context::resolve`] may take for `dialled` for a while, with their weights, where it does no more
    /// than draw of at most `limit` endpoints by these: see [`Balancer::candidates`]. Nothing is counted.
    pub fn alternatives(&self, dialled: OriginalDst, limit: usize) -> Option<Vec<(Route, u32)>> {
        let Destination::Service(service) = self.mesh.destination(&self.source.network, dialled) else {
            return Some(vec![(self.resolve(dialled).ok()?, 1)]);
        };
        let is_drawn = service.source != ServiceSource::Passthrough
            && service.waypoint.as_ref().is_none_or(|waypoint| self.is_waypoint(waypoint));
        if !is_drawn {
            return None;
        }
        let found =
            self.asked(&service, dialled.port(), |request| self.balancer.candidates(request, limit))?;
        let route = |candidate: Candidate| {
            let target = Target { service: Some(service.clone()), ..Target::default() };
            let route = self.endpoint(&service, candidate.workload, candidate.target_port, target).ok()?;
            Some((route, candidate.weight))
        };
        found.into_iter().map(route).collect()
    }

    fn workload(
        &self,
        workload: &Arc<Workload>,
        to: SocketAddr,
        sans: &[Str],
        target: Target,
    ) -> Result<Route, Refusal> {
        let target = Target { workload: Some(workload.clone()), ..target };
        if workload.tunnel != TunnelProtocol::Hbone {
            return Ok(Route::Plain { to, why: NoTunnel::NotInMesh, target });
        }
        let expected = expected_identities(workload, sans)?;
        let hbone = HboneAddr::new(SocketAddr::new(to.ip(), HBONE_PORT));
        Ok(Route::Tunnel { hbone, authority: to, expected, waypoint: false, target })
    }

    /// Of the family of the client's own address where the workload has one: then the source can be preserved.
    fn address_of(&self, workload: &Workload) -> Option<IpAddr> {
        let same = |ip: &&IpAddr| ip.is_ipv4() == self.source_ip.is_ipv4();
        workload.addresses.iter().find(same).or_else(|| workload.addresses.first()).copied()
    }

    /// Whether the dialling workload is an instance of this waypoint: it is not sent to itself.
    fn is_waypoint(&self, waypoint: &GatewayAddress) -> bool {
        match &waypoint.target {
            GatewayTarget::Service(key) => self.source.services.iter().any(|m| m.service == *key),
            GatewayTarget::Address(address) => {
                self.source.network_addresses().any(|own| own == *address)
                    || self
                        .mesh
                        .service_at(address)
                        .is_some_and(|s| self.source.services.iter().any(|m| m.service == s.key()))
            }
        }
    }

    fn waypoint(
        &self,
        waypoint: &GatewayAddress,
        authority: SocketAddr,
        target: Target,
    ) -> Result<Route, Refusal> {
        let service = match &waypoint.target {
            GatewayTarget::Service(key) => self.mesh.service(key),
            GatewayTarget::Address(address) => self.mesh.service_at(address),
        };
        let (gateway, picked) = match (service, &waypoint.target) {
            (Some(service), _) => {
                let picked = self
                    .pick(service, waypoint.hbone_mtls_port)
                    .map_err(|e| Refusal::WaypointNotReady(e.to_string()))?;
                (picked.workload().clone(), Some(picked))
            }
            (None, GatewayTarget::Address(address)) => {
                let found = self.mesh.workload_at(address).cloned();
                (found.ok_or_else(|| Refusal::WaypointNotReady(format!("nothing has {address}")))?, None)
            }
            (None, GatewayTarget::Service(key)) => {
                return Err(Refusal::WaypointNotReady(format!("there is no service {key}")));
            }
        };
        let ip = self.address_of(&gateway).ok_or_else(|| Refusal::NoAddress(gateway.uid.clone()))?;
        let port = picked.as_ref().map_or(waypoint.hbone_mtls_port, Picked::target_port);
        let hbone = HboneAddr::new(SocketAddr::new(ip, port));
        let expected = expected_identities(&gateway, &[])?;
        let target = Target { picked, ..target };
        Ok(Route::Tunnel { hbone, authority, expected, waypoint: true, target })
    }
}

/// The workload's own identity, and those that the service names beside it.
fn expected_identities(workload: &Workload, sans: &[Str]) -> Result<Arc<[SpiffeId]>, Refusal> {
    let own = workload.identity().map_err(|e| Refusal::NoIdentity(workload.uid.clone(), e))?;
    if sans.is_empty() {
        return Ok(Arc::new([own]));
    }
    Ok(std::iter::once(own).chain(sans.iter().filter_map(|s| s.parse().ok())).collect())
}
