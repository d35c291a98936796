//! Connections between two pods of this node that are not encrypted: `nodeLocal: direct`.
//!
//! ```text
//! resolved (to a pod of this node) -> both namespaces want it -> both identities vouched for -> permitted -> delivered
//! ```
//!
//! This process is the proxy of both ends, so it asks itself what the two proxies of a tunnel ask each other, and what a
//! handshake would prove is what it could prove: it has the CA's certificates for both. All the rest is as with a tunnel:
//! the destination's policies decide, and again whenever they change; each end has an entry in the registry, metrics, and a
//! line in the log.
//!
//! Invariants:
//! * what goes to a waypoint, or is not known to be a pod that is served here, goes in a tunnel;
//! * so does what comes from an address that is not the source's own. In a tunnel the way there and back proves that address;
//!   here the destination's policies and its application would believe whatever a process in the pod has bound to;
//! * nothing goes this way that either namespace's setting, read from the snapshot of the moment, does not allow.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use futures_util::FutureExt;
use identity::RootId;
use model::{Connection, Mesh, NodeLocal, OriginalDst, Permit, SpiffeId, Workload};
use tokio::net::TcpStream;

use super::failure::Failure;
use super::pod::{LocalPod, Place};
use super::resolve::{Context, Route, Target};
use super::{Proxy, is_listener_port};
use crate::connections::{Carrier, Direction, Recheck, Story, Verdict};
use crate::verdicts::kernel::{ENDPOINTS, Pair, Way};
use crate::verdicts::{Ends, Offer};

/// A pod with the identity that it has on a connection, and the root by which that is vouched for.
#[derive(Clone)]
struct End {
    pod: Arc<LocalPod>,
    identity: SpiffeId,
    root: RootId,
}

/// The source of a connection.
pub struct Source<'a> {
    /// The pod.
    pub pod: &'a Arc<LocalPod>,
    /// Its workload.
    pub workload: &'a Arc<Workload>,
    /// Its identity.
    pub identity: &'a SpiffeId,
    /// Its end of the connection.
    pub peer: SocketAddr,
    /// What it dialled.
    pub dialled: SocketAddr,
    /// When it was accepted, milliseconds since the epoch.
    pub opened_ms: u64,
}

/// The pod of this node that a connection goes to.
#[derive(Clone, Debug)]
pub struct Destined {
    pod: Arc<LocalPod>,
    identity: SpiffeId,
    /// Its own address.
    pub to: SocketAddr,
}

impl Destined {
    /// The pod.
    pub fn pod(&self) -> &Arc<LocalPod> {
        &self.pod
    }
}

/// A pod of this node that is drawn for a connection.
pub struct Drawn {
    /// The pod.
    pub destination: Destined,
    /// What is behind the address.
    pub target: Target,
    /// How often it is drawn beside the others.
    pub weight: u32,
}

/// A connection to the application of the other pod.
pub struct Within {
    /// The connection.
    pub server: TcpStream,
    /// The destination's view of it.
    pub story: Story,
    /// Whether the destination still allows it.
    pub allowed: Recheck,
    /// Whether it may still go as it is.
    pub direct: Recheck,
    /// The destination's place among its connections.
    pub place: Place,
}

impl Proxy {
    /// The same route, but for a tunnel to a pod of this node where both namespaces want none.
    /// `from` is the source, with the address that the connection comes from.
    pub fn shortened(&self, mesh: &Mesh, from: (&Workload, IpAddr), route: Route) -> Route {
        match (self.destined(mesh, from, &route), route) {
            (Some(destination), Route::Tunnel { target, .. }) => Route::Within { destination, target },
            (_, route) => route,
        }
    }

    fn destined(&self, mesh: &Mesh, (source, from): (&Workload, IpAddr), route: &Route) -> Option<Destined> {
        let Route::Tunnel { authority, target, waypoint: false, .. } = route else { return None };
        let workload = target.workload.as_ref()?;
        if mesh.settings().node_local.between(&source.namespace, &workload.namespace) == NodeLocal::Encrypted
        {
            return None;
        }
        let to = net::canonical(*authority);
        if !source.addresses.contains(&from) || from.is_ipv4() != to.is_ipv4() {
            return None;
        }
        let pod = self.locals.find(mesh, workload, to.ip())?;
        Some(Destined { pod, identity: workload.identity().ok()?, to })
    }

    /// Connects to the other pod's application, as its policies allow.
    ///
    /// # Errors
    /// They don't, an identity is not vouched for, or the application does not take the connection.
    pub async fn join(
        &self,
        source: &Source<'_>,
        destination: &Destined,
        target: &Target,
    ) -> Result<Within, Failure> {
        // First, since it may wait: what was decided before would be old.
        let ends = self.ends(source, destination).await;
        let (mut story, decision) = self.decide_within(source, destination, target)?;
        match self.deliver_within(ends, destination.to, decision).await {
            Ok((server, allowed, direct, place)) => {
                let identities = [source.identity, &destination.identity];
                let way = Way { netns: source.pod.netns.id(), dialled: source.dialled };
                if self.verdicts.wants(self, identities, &way) {
                    self.verdicts.offer(self, way, self.offered(source));
                }
                Ok(Within { server, story, allowed, direct, place })
            }
            Err(failure) => {
                if !matches!(failure, Failure::Denied(_)) {
                    story.verdict = Verdict::proxy(failure.to_string());
                }
                self.refused(story, &failure);
                Err(failure.of_other_end(&destination.identity))
            }
        }
    }

    /// Asks the destination's policies.
    fn decide_within(
        &self,
        source: &Source<'_>,
        Destined { pod, identity, to }: &Destined,
        target: &Target,
    ) -> Result<(Story, Result<Permit, Failure>), Failure> {
        let connection = Connection::new(Some(source.identity.clone()), source.peer.ip(), *to);
        let mesh = self.state.mesh();
        let workload = pod.subject.destination(&mesh, to.ip())?;
        let decision = mesh.authorize(&workload, &connection);
        let story = Story {
            id: self.registry.next_id(),
            direction: Direction::Inbound,
            carrier: Carrier::NodeLocal,
            opened_ms: source.opened_ms,
            source: source.peer,
            source_workload: Some(source.workload.clone()),
            source_identity: Some(source.identity.clone()),
            destination: *to,
            upstream: None,
            destination_identity: Some(identity.clone()),
            destination_service: target.service.clone(),
            destination_workload: Some(workload),
            verdict: Verdict::of(&decision),
        };
        Ok((story, decision.outcome.map_err(Failure::Denied)))
    }

    async fn ends(
        &self,
        source: &Source<'_>,
        Destined { pod, identity, .. }: &Destined,
    ) -> Result<(End, End), Failure> {
        let source = self.vouched(source.pod.clone(), source.identity.clone()).await?;
        Ok((source, self.vouched(pod.clone(), identity.clone()).await?))
    }

    async fn deliver_within(
        &self,
        ends: Result<(End, End), Failure>,
        to: SocketAddr,
        decision: Result<Permit, Failure>,
    ) -> Result<(TcpStream, Recheck, Recheck, Place), Failure> {
        if is_listener_port(to.port()) {
            return Err(Failure::ListenerPort(to.port()));
        }
        let permit = decision?;
        let (source, destination) = ends?;
        // Both descriptors are counted where the source has its place.
        let place = destination.pod.place(&self.room, 0)?;
        // Others of the pair may pass by a verdict, with the client's own ports.
        let is_beside = {
            let (one, other) = (source.identity.namespace(), destination.identity.namespace());
            self.state.mesh().settings().node_local.between(one, other) == NodeLocal::Kernel
        };
        let server = super::deliver::deliver_beside(self, &destination.pod, &permit, is_beside).await?;
        let allowed = self.recheck_inbound(&destination.pod, permit.connection().clone(), None);
        Ok((server, allowed, self.recheck_within(source, destination), place))
    }

    /// The pods of this node that a connection to `dialled` may be led to, where one of them is drawn by their weights and
    /// nothing else is to be decided.
    pub fn drawn(
        &self,
        mesh: &Mesh,
        (source, source_ip): (&Workload, IpAddr),
        dialled: SocketAddr,
    ) -> Option<Vec<Drawn>> {
        let context = Context {
            mesh,
            balancer: &self.balancer,
            source,
            source_ip,
            tried: &[],
            now: self.started.elapsed(),
            random: 0,
        };
        let alternatives = context.alternatives(OriginalDst::new(dialled), ENDPOINTS)?;
        let within = |(route, weight)| match self.shortened(mesh, (source, source_ip), route) {
            Route::Within { destination, target } => Some(Drawn { destination, target, weight }),
            _ => None,
        };
        alternatives.into_iter().map(within).collect()
    }

    /// What later connections of the source are offered for what this one dialled: that they pass by the kernel's verdict to one
    /// of these, of each of which is decided as if this one had gone there. `None` where each is a decision of its own.
    fn offered(&self, source: &Source<'_>) -> Option<Vec<Offer>> {
        let mesh = self.state.mesh();
        let from = (&**source.workload, source.peer.ip().to_canonical());
        let drawn = self.drawn(&mesh, from, source.dialled)?;
        let one = self.vouched(source.pod.clone(), source.identity.clone()).now_or_never()?.ok()?;
        drawn.into_iter().map(|drawn| self.offered_to(source, &one, &drawn)).collect()
    }

    fn offered_to(&self, source: &Source<'_>, one: &End, drawn: &Drawn) -> Option<Offer> {
        let Drawn { destination, target, weight } = drawn;
        let Destined { pod, identity, to } = destination;
        if is_listener_port(to.port()) {
            return None;
        }
        let other = self.vouched(pod.clone(), identity.clone()).now_or_never()?.ok()?;
        let (inbound, decision) = self.decide_within(source, destination, target).ok()?;
        let permit = decision.ok()?;
        let connection = permit.connection();
        let ends = Ends {
            source: one.pod.clone(),
            source_identity: one.identity.clone(),
            destination: other.pod.clone(),
            destination_identity: other.identity.clone(),
            allowed: self.recheck_inbound(&other.pod, connection.clone(), None),
            direct: self.recheck_within(one.clone(), other.clone()),
        };
        let inbound = Story { carrier: Carrier::Kernel, ..inbound };
        let outbound = Story {
            direction: Direction::Outbound,
            destination: source.dialled,
            upstream: Some(*to).filter(|to| *to != source.dialled),
            verdict: Verdict::proxy("passed within the node by the kernel's verdict (nodeLocal: kernel)"),
            ..inbound.clone()
        };
        let pair = Pair { source: connection.source_ip(), to: connection.destination() };
        Some(Offer { pair, weight: *weight, ends, outbound, inbound })
    }

    async fn vouched(&self, pod: Arc<LocalPod>, identity: SpiffeId) -> Result<End, Failure> {
        match self.tls.vouched(&identity).await {
            Ok(root) => Ok(End { pod, identity, root }),
            Err(error) => Err(Failure::Identity(identity, error.to_string())),
        }
    }

    /// Whether a connection may still go as it is: both namespaces want it, and both ends are who they were.
    fn recheck_within(&self, source: End, destination: End) -> Recheck {
        let (state, tls) = (self.state.clone(), self.tls.clone());
        Box::new(move || {
            let mesh = state.mesh();
            let between = |one: &SpiffeId, other: &SpiffeId| {
                mesh.settings().node_local.between(one.namespace(), other.namespace())
            };
            if between(&source.identity, &destination.identity) == NodeLocal::Encrypted {
                return Some("connections within the node are to be encrypted now".to_owned());
            }
            [&source, &destination].into_iter().find_map(|End { pod, identity, root }| {
                if !tls.is_still_vouched(identity, root) {
                    return Some(format!("the CA that vouched for {identity} is not trusted any more"));
                }
                // A pod whose manifest is gone is un-enrolled in good order, or is about to end.
                let now = pod.subject.source(&mesh).ok()?.identity();
                (now.as_ref() != Ok(identity))
                    .then(|| format!("{identity} is not the pod's identity any more"))
            })
        })
    }
}
