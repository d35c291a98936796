//! One endpoint of a cluster.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock, Weak};

use balance::requests::{Event, Load, Strikes, hash};
use model::{HboneAddr, Service, SpiffeId, TunnelProtocol, Workload};

use crate::http::decide::{About, Carrier, Dial, Outcome, Protocol, Target, Watch};
use crate::upstream::cluster::Cluster;
use crate::upstream::clusters::Shared;
use crate::upstream::dial::{Keepalive, ToAddress, ToName};
use crate::upstream::tls::{Origination, Secured};

/// The port that the proxies of nodes take HBONE on.
const HBONE_PORT: u16 = 15008;

/// An endpoint, with what lasts from one mesh to the next while it stays the same.
pub(crate) struct Endpoint {
    pub(crate) workload: Arc<Workload>,
    /// The hash of its address, by which all replicas of a waypoint know it.
    pub(crate) name: u64,
    pub(crate) load: Arc<Load>,
    pub(crate) strikes: Arc<Strikes>,
    target: Arc<Target>,
    /// The same by the other protocol, where clients' protocols tell.
    other: OnceLock<Arc<Target>>,
    /// What carries TLS, where that is begun here.
    inner: Option<(Arc<Origination>, Arc<dyn Dial>)>,
    cluster: Weak<Cluster>,
}

impl Endpoint {
    /// One that is reached by `target`. What was counted of `before`, which is the same endpoint, is kept.
    pub(crate) fn new(
        workload: Arc<Workload>,
        mut target: Target,
        tls: Option<(&Arc<Origination>, bool)>,
        cluster: Weak<Cluster>,
        (load, strikes): (Arc<Load>, Arc<Strikes>),
    ) -> Self {
        let mut inner = None;
        if let Some((origination, tells)) = tls {
            let keepalive = target.circuit.as_ref().and_then(|circuit| circuit.settings().keepalive);
            let base = match &target.carrier {
                Carrier::Tcp => Arc::new(ToAddress { keepalive }) as Arc<dyn Dial>,
                Carrier::Via(dial) => Arc::clone(dial),
            };
            let inside = tells.then_some(target.protocol);
            target.carrier = secured(origination, &base, inside);
            inner = Some((Arc::clone(origination), base));
        }
        let name = match &workload.hostname {
            host if workload.addresses.is_empty() => {
                hash(format!("{host}:{}", target.address.port()).as_bytes())
            }
            _ => hash(target.address.to_string().as_bytes()),
        };
        let (target, other) = (Arc::new(target), OnceLock::new());
        Self { workload, name, load, strikes, target, other, inner, cluster }
    }

    /// The same, of which other things are known than how it is reached.
    pub(crate) fn renewed(&self, workload: Arc<Workload>) -> Self {
        let renewed = |target: &Arc<Target>| {
            let about = target.about.as_ref().map(|about| {
                Arc::new(About { workload: Some(Arc::clone(&workload)), ..About::clone(about) })
            });
            Arc::new(Target { about, ..Target::clone(target) })
        };
        Self {
            name: self.name,
            load: Arc::clone(&self.load),
            strikes: Arc::clone(&self.strikes),
            target: renewed(&self.target),
            other: self.other.get().map(renewed).map_or_else(OnceLock::new, OnceLock::from),
            inner: self.inner.clone(),
            cluster: Weak::clone(&self.cluster),
            workload,
        }
    }

    pub(crate) fn target(&self, protocol: Protocol) -> &Arc<Target> {
        if self.target.protocol == protocol {
            return &self.target;
        }
        self.other.get_or_init(|| {
            let mut target = Target { protocol, ..Target::clone(&self.target) };
            if let Some((origination, base)) = &self.inner {
                target.carrier = secured(origination, base, Some(protocol));
            }
            Arc::new(target)
        })
    }

    /// Its target, for those who only look.
    pub(crate) fn shown(&self) -> &Arc<Target> {
        &self.target
    }
}

pub(crate) fn secured(
    origination: &Arc<Origination>,
    base: &Arc<dyn Dial>,
    inside: Option<Protocol>,
) -> Carrier {
    let (origination, base) = (Arc::clone(origination), Arc::clone(base));
    Carrier::Via(Arc::new(Secured { origination, base, inside }))
}

impl Watch for Endpoint {
    fn reported(&self, outcome: Outcome) {
        let Some(cluster) = self.cluster.upgrade() else { return };
        let event = match outcome {
            Outcome::Status(status) => Event::Status(status),
            Outcome::Failed => Event::Failed,
            Outcome::TimedOut => Event::TimedOut,
        };
        cluster.reported(self, event);
    }

    fn ended(&self) {
        self.load.end();
        if let Some(circuit) = &self.target.circuit {
            circuit.request_ended();
        }
    }
}

/// Whether connections to one are as good as connections to the other.
pub(crate) fn is_reached_alike(a: &Workload, b: &Workload) -> bool {
    a.addresses == b.addresses
        && a.hostname == b.hostname
        && a.tunnel == b.tunnel
        && a.trust_domain == b.trust_domain
        && a.namespace == b.namespace
        && a.service_account == b.service_account
}

/// How the port `port` of a workload is reached; `None` if it has no address, or no identity that it could prove.
pub(crate) fn reach(
    shared: &Arc<Shared>,
    workload: &Arc<Workload>,
    port: u16,
    service: Option<&Service>,
    keepalive: Keepalive,
) -> Option<(SocketAddr, Carrier)> {
    let Some(ip) = address(workload, shared.origin.load().client.address) else {
        let host = Some(&workload.hostname).filter(|host| !host.is_empty())?.clone();
        let unknown = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
        let name = ToName { shared: Arc::clone(shared), host, keepalive };
        return Some((unknown, Carrier::Via(Arc::new(name))));
    };
    let address = SocketAddr::new(ip, port);
    if workload.tunnel != TunnelProtocol::Hbone {
        return Some((address, Carrier::Tcp));
    }
    let own = match workload.identity() {
        Ok(own) => own,
        Err(error) => {
            tracing::debug!(workload = %workload.uid, %error, "an endpoint has no identity");
            return None;
        }
    };
    let sans = service.map_or(&[][..], |service| &service.subject_alt_names);
    let more = sans.iter().filter_map(|san| san.parse().ok());
    let expected: Arc<[SpiffeId]> = std::iter::once(own).chain(more).collect();
    let to = HboneAddr::new(SocketAddr::new(ip, HBONE_PORT));
    Some((address, Carrier::Via(shared.dialers.tunnel(to, expected))))
}

/// Of our own family where the workload has one.
fn address(workload: &Workload, own: IpAddr) -> Option<IpAddr> {
    let same = |ip: &&IpAddr| own == IpAddr::V4(Ipv4Addr::UNSPECIFIED) || ip.is_ipv4() == own.is_ipv4();
    workload.addresses.iter().find(same).or_else(|| workload.addresses.first()).copied()
}

/// What is said of a workload's port.
pub(crate) fn about(
    backend: Option<&super::Backend>,
    port: u16,
    workload: Option<Arc<Workload>>,
    carrier: &Carrier,
) -> Arc<About> {
    let tunnelled = workload.as_ref().is_some_and(|w| w.tunnel == TunnelProtocol::Hbone)
        && matches!(carrier, Carrier::Via(_));
    Arc::new(About {
        service: backend.map(|backend| backend.service.clone()),
        port,
        subset: backend.and_then(|backend| backend.subset.clone()),
        workload,
        tunnelled,
    })
}
