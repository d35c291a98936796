//! The data plane: what happens to a connection between the moment it is accepted and its line in the access log.
//!
//! * [`outbound`]: from a pod of this node, captured on port 15001;
//! * [`inbound`]: from a tunnel, on port 15008;
//! * [`plaintext`]: from outside the mesh, captured on port 15006;
//! * [`within`]: from a pod of this node to another, not encrypted, where the settings ask for it.
//!
//! Each is one file that reads from top to bottom. What they share is here: how a connection is entered in the
//! registry, carried, cut, counted and logged; and in [`threads`]: which thread it is on.

pub mod deliver;
pub mod dialer;
pub mod failure;
pub mod handshakes;
pub mod hosts;
pub mod inbound;
pub mod locals;
pub mod outbound;
pub mod peers;
pub mod plaintext;
pub mod pod;
pub mod resolve;
pub mod threads;
pub mod within;

use std::borrow::Borrow;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ::telemetry::Meter;
use balance::Balancer;
use futures_util::FutureExt;
use hbone::PumpLimits;
use identity::PeerInfo;
use model::{Connection, Mesh, NetworkAddress, OriginalDst, SpiffeId, Str, Workload};
use net::AcceptStats;
use process::logs::{AccessLog, AccessRecord, Refusal};
use process::metrics::tcp::TcpMetrics;
use process::shutdown::Shutdown;
use source::{State, Tls};
use tokio::net::TcpStream;
use tokio::time::Instant;

use self::dialer::Tunnels;
use self::failure::Failure;
use self::pod::LocalPod;
use self::resolve::Route;
use crate::connections::{Carrier, Direction, Entered, Open, Recheck, Registry, Story};
use crate::settings::Limits;
use crate::telemetry;
use crate::verdicts::Verdicts;

/// The port that outbound connections are redirected to.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port that inbound plaintext connections are redirected to.
pub const PLAINTEXT_PORT: u16 = 15006;
/// The port that tunnels come to.
pub const HBONE_PORT: u16 = resolve::HBONE_PORT;
/// The port that DNS queries are redirected to.
pub const DNS_PORT: u16 = 15053;

/// How long a connection waits for what the control plane has not told yet.
const KNOWN_WITHIN: Duration = Duration::from_secs(10);

/// Whether `port` is one of ztunnel's own inside a pod: never a destination.
pub fn is_listener_port(port: u16) -> bool {
    matches!(port, OUTBOUND_PORT | PLAINTEXT_PORT | HBONE_PORT | DNS_PORT)
}

/// All that connections share.
pub struct Proxy {
    /// The snapshot of the mesh.
    pub state: Arc<State>,
    /// Open and ended connections.
    pub registry: Arc<Registry>,
    /// The L4 metrics.
    pub metrics: TcpMetrics,
    /// What of them connections of a moment ago counted in.
    pub handles: telemetry::Handles,
    /// The access log.
    pub access: Arc<AccessLog>,
    /// Tunnels to peers.
    pub tunnels: Tunnels,
    /// Endpoint choice.
    pub balancer: Balancer,
    /// Host names of endpoints.
    pub hosts: hosts::Hosts,
    /// Limits and times.
    pub limits: Limits,
    /// TLS, as one of this node's pods.
    pub tls: Tls,
    /// What peers may do on a connection.
    pub server: hbone::ServerSettings,
    /// Counters of connections that peers opened.
    pub server_counters: Arc<hbone::ServerCounters>,
    /// This node's pods.
    pub locals: Arc<locals::Locals>,
    /// Secured connections that peers opened.
    pub peers: Arc<peers::Peers>,
    /// Room for connections that are carried.
    pub room: Arc<pod::Room>,
    /// Inbound TLS handshakes under way.
    pub handshakes: handshakes::Handshakes,
    /// Which thread carries what.
    pub threads: Arc<threads::Threads>,
    /// Counters of the accept loops.
    pub accepts: Arc<AcceptStats>,
    /// Verdicts in the kernel.
    pub verdicts: Verdicts,
    /// When to end.
    pub shutdown: Shutdown,
    /// The process's own clock starts here.
    pub started: Instant,
}

/// The two ends of a connection, and how they are joined.
pub enum Carried {
    /// TCP on both sides.
    Plain {
        /// Who connected.
        client: TcpStream,
        /// What was dialled.
        server: TcpStream,
        /// Bytes of the client that the server has got already.
        ahead: u64,
    },
    /// The same, where this process is the proxy of both ends.
    Within {
        /// Who connected.
        client: TcpStream,
        /// What was dialled.
        server: TcpStream,
        /// Bytes of the client that the server has got already.
        ahead: u64,
        /// The destination's view, and whether it still allows it.
        seen: Box<(Story, Recheck)>,
    },
    /// A tunnel on one side.
    Tunnelled {
        /// The tunnel.
        tunnel: hbone::Tunnel,
        /// The application's end.
        tcp: TcpStream,
        /// Bytes of the application that were sent already.
        ahead: u64,
    },
}

/// A connection that is carried, to its end.
pub type Carrying = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Proxy {
    /// Where a captured connection was meant to go.
    ///
    /// # Errors
    /// The kernel doesn't say, or it was one of our own listeners that was dialled.
    pub fn captured(&self, client: &TcpStream, peer: SocketAddr) -> Result<OriginalDst, Failure> {
        let dialled = net::original_dst(client, peer).map_err(Failure::OriginalDst)?;
        // A connection that was not redirected has its own address as the original one. To carry it would be to
        // dial ourselves, for ever. Any other address asks for no further system call.
        if is_listener_port(dialled.port()) {
            let local = client.local_addr().map_err(Failure::OriginalDst)?;
            if dialled == net::canonical(local) {
                return Err(Failure::Loop(dialled));
            }
        }
        Ok(OriginalDst::new(dialled))
    }

    /// Waits for a while until the source of configuration has told what there is, so that a connection from the
    /// pod can be decided on.
    ///
    /// # Errors
    /// It has not.
    pub async fn may_connect(&self) -> Result<(), Failure> {
        let known = self.state.until(KNOWN_WITHIN, |_| true).await;
        if known { Ok(()) } else { Err(Failure::NothingKnownYet) }
    }

    /// The same for a connection to the pod at `local`, whose policies have to be known.
    ///
    /// # Errors
    /// They are not.
    pub async fn may_serve(&self, pod: &LocalPod, local: IpAddr) -> Result<(), Failure> {
        let subject = &pod.subject;
        // In file mode a pod without a manifest won't get one.
        let known = |mesh: &Mesh| subject.claim.is_none() || subject.destination(mesh, local).is_ok();
        if self.state.until(KNOWN_WITHIN, known).await {
            Ok(())
        } else if self.state.is_complete() {
            Err(Failure::NotKnownYet(subject.uid.clone()))
        } else {
            Err(Failure::NothingKnownYet)
        }
    }

    /// The workload that has `ip`.
    pub fn workload_of(&self, mesh: &Mesh, network: &Str, ip: IpAddr) -> Option<Arc<Workload>> {
        mesh.workload_at(&NetworkAddress::new(network.clone(), ip)).cloned()
    }

    /// A number that nobody can foresee well enough to steer endpoint choice by.
    pub fn random(&self) -> u64 {
        use std::hash::{BuildHasher, RandomState};
        thread_local! {
            static SEED: (RandomState, std::cell::Cell<u64>) = (RandomState::new(), std::cell::Cell::new(0));
        }
        SEED.with(|(state, count)| {
            count.set(count.get().wrapping_add(1));
            state.hash_one(count.get())
        })
    }

    /// Resolves an endpoint's host name.
    ///
    /// # Errors
    /// It can't be resolved.
    pub async fn resolve_host(&self, host: &str, port: u16, client: IpAddr) -> Result<SocketAddr, Failure> {
        self.hosts.resolve(host, port, client, self.random()).await
    }

    /// Tells the balancer that the route's endpoint works.
    pub fn reached(&self, route: &Route) {
        if let Some(picked) = &route.target().picked {
            picked.report_success();
        }
    }

    /// Tells the balancer that the route's endpoint did not answer. Returns it when another one is to be tried.
    ///
    /// `ahead`: whether something was sent to it.
    pub fn not_reached(&self, route: &Route, failure: &Failure, ahead: bool) -> Option<Str> {
        if !failure.worth_another_endpoint() {
            return None;
        }
        let picked = route.target().picked.as_ref()?;
        picked.report_failure(self.started.elapsed());
        let waypoint = matches!(route, Route::Tunnel { waypoint: true, .. });
        failure.elsewhere(ahead, waypoint).then(|| picked.workload().uid.clone())
    }

    /// Whether an inbound connection may still go on: its policy, and the root that its peer's certificate hangs on.
    pub fn recheck_inbound(
        &self,
        pod: &Arc<LocalPod>,
        connection: Connection,
        peer: Option<Arc<PeerInfo>>,
    ) -> Recheck {
        let (state, tls, pod) = (self.state.clone(), self.tls.clone(), pod.clone());
        Box::new(move || {
            let trust = peer.as_ref().map_or(Ok(()), |peer| tls.trusts(peer, connection.source_ip()));
            if let Err(distrust) = trust {
                return Some(distrust.to_string());
            }
            let mesh = state.mesh();
            // A pod whose manifest is gone is un-enrolled in good order, or is about to end.
            let workload = pod.subject.known(&mesh)?;
            mesh.authorize(workload, &connection).outcome.err().map(|deny| deny.to_string())
        })
    }

    /// Whether an outbound connection may still go on: the settings may have come to forbid unknown addresses,
    /// or the source's identity may have changed. `identity` is the one that it was opened with.
    pub fn recheck_outbound(
        &self,
        pod: &Arc<LocalPod>,
        identity: SpiffeId,
        dialled: OriginalDst,
        route: &Route,
        peer: Option<Arc<PeerInfo>>,
    ) -> Recheck {
        let (state, tls, pod) = (self.state.clone(), self.tls.clone(), pod.clone());
        let unknown = matches!(route, Route::Plain { why: resolve::NoTunnel::UnknownAddress, .. });
        let peer = peer.and_then(|peer| match route {
            Route::Tunnel { hbone, .. } => Some((peer, hbone.ip())),
            _ => None,
        });
        Box::new(move || {
            let trust = peer.as_ref().map_or(Ok(()), |(peer, ip)| tls.trusts(peer, *ip));
            if let Err(distrust) = trust {
                return Some(distrust.to_string());
            }
            let mesh = state.mesh();
            let source = pod.subject.source(&mesh).ok()?;
            if source.identity().as_ref() != Ok(&identity) {
                return Some("the pod's identity changed".to_owned());
            }
            let refused = unknown
                && mesh.settings().outbound == model::OutboundMode::RegistryOnly
                && matches!(mesh.destination(&source.network, dialled), model::Destination::Unknown);
            refused.then(|| resolve::Refusal::RegistryOnly(dialled).to_string())
        })
    }

    /// Carries a connection to its end: until both sides closed it, one broke, or it is cut. `held` is dropped
    /// when it is over.
    ///
    /// Boxed: whoever awaits it would have room for it twice, once where it comes from and once where it is awaited.
    pub fn carry<T: Send + 'static>(
        self: &Arc<Self>,
        story: Story,
        recheck: Recheck,
        carried: Carried,
        held: T,
    ) -> Carrying {
        Box::pin(self.carrying(story, recheck, carried, held))
    }

    /// No async function: its future lives as long as the connection, and would hold all arguments beside what is made
    /// of them.
    fn carrying<T: Send + 'static>(
        self: &Arc<Self>,
        story: Story,
        recheck: Recheck,
        carried: Carried,
        held: T,
    ) -> impl Future<Output = ()> + Send + use<T> {
        let started = Instant::now();
        let mut entered = self.enter(story, recheck, None);
        let (carried, other) = match carried {
            Carried::Within { client, server, ahead, seen } => {
                let (story, allowed) = *seen;
                let other = self.enter(story, allowed, Some(entered.open.clone()));
                (Carried::Plain { client, server, ahead }, Some(other))
            }
            carried => (carried, None),
        };
        let mut transfer = transfer(carried, entered.open.clone());
        let proxy = self.clone();
        async move {
            let end = tokio::select! {
                biased;
                reason = entered.open.cut() => Err(format!("cut: {reason}")),
                end = &mut transfer => end,
            };
            drop((transfer, held));
            // First, for it is another view of the other.
            if let Some(mut other) = other {
                proxy.ended(&mut other, end.clone(), started.elapsed());
            }
            proxy.ended(&mut entered, end, started.elapsed());
        }
    }

    /// Enters a connection in the registry. With `of`, it is another view of that one.
    fn enter(&self, story: Story, recheck: Recheck, of: Option<Arc<Open>>) -> Entered {
        let meter = Meter::open(self.handles.of(&story));
        let entered = self.registry.enter(story, meter, recheck, of);
        // The policy may have changed between its evaluation and the entry, and nobody saw this connection then.
        if let Some(reason) = entered.open.recheck() {
            entered.open.cut_now(reason);
        }
        entered
    }

    fn ended(&self, entered: &mut Entered, end: Result<(), String>, duration: Duration) {
        if let Err(error) = &end {
            entered.failed(error.clone());
        }
        let error = end.err();
        self.log(&entered.open, duration, error.as_ref());
    }

    /// Logs a connection that has ended.
    pub fn log(&self, open: &Open, duration: Duration, error: Option<&String>) {
        self.log_story(&open.story, open.carried(), duration, error);
    }

    /// The same of one that is not in the registry, with its bytes from the client and from the server.
    pub fn log_story(&self, story: &Story, bytes: (u64, u64), duration: Duration, error: Option<&String>) {
        self.access.complete(&record(story, bytes, duration, error));
    }

    /// Asks again of all that is open, carried here or past this process, and cuts what is no longer allowed.
    pub async fn recheck(&self) -> usize {
        let cut = self.registry.recheck();
        self.verdicts.recheck().await;
        cut
    }

    /// Refuses a connection of which all is known: counted, remembered, logged, and reset.
    pub fn refuse(&self, client: TcpStream, story: Story, failure: &Failure) {
        net::reset(client);
        self.refused(story, failure);
    }

    /// The part of [`Proxy::refuse`] after the reset, for connections that are refused in another way.
    pub fn refused(&self, story: Story, failure: &Failure) {
        self.metrics.failed(&telemetry::labels(&story), failure.flag());
        let error = failure.to_string();
        self.access.complete(&record(&story, (0, 0), Duration::ZERO, Some(&error)));
        self.registry.refused(story, error);
    }

    /// Refuses a connection of which only the addresses are known.
    pub fn refuse_early(&self, client: TcpStream, direction: Direction, peer: SocketAddr, failure: &Failure) {
        let local = client.local_addr().map_or(peer, net::canonical);
        net::reset(client);
        self.refused_early(direction, peer, local, failure);
    }

    /// The part of [`Proxy::refuse_early`] after the reset.
    pub fn refused_early(
        &self,
        direction: Direction,
        peer: SocketAddr,
        local: SocketAddr,
        failure: &Failure,
    ) {
        self.metrics.failed(&telemetry::unknown_labels(direction), failure.flag());
        self.access.refused(&Refusal {
            src_addr: peer,
            dst_addr: local,
            direction: direction.into(),
            error: failure,
        });
    }
}

/// Copies until both sides have ended, or one fails.
fn transfer(carried: Carried, open: Arc<Open>) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> {
    match carried {
        Carried::Plain { client, server, ahead } | Carried::Within { client, server, ahead, .. } => {
            Box::pin(async move {
                open.bytes.to_server.fetch_add(ahead, Ordering::Relaxed);
                match net::copy(client, server, &open.bytes).await {
                    net::End::Finished(_) => Ok(()),
                    net::End::Reset(side) => Err(format!("reset by the {side}")),
                    net::End::Failed(side, error) => Err(format!("connection of the {side}: {error}")),
                }
            })
        }
        Carried::Tunnelled { tunnel, tcp, ahead } => {
            open.traffic.count_early(ahead);
            let pump = hbone::pump(tunnel, tcp, Counted(open), PumpLimits::default());
            Box::pin(pump.map(|end| if end.is_finished() { Ok(()) } else { Err(end.to_string()) }))
        }
    }
}

/// Counts the bytes of a tunnel where they are looked up.
struct Counted(Arc<Open>);

impl Borrow<hbone::Traffic> for Counted {
    fn borrow(&self) -> &hbone::Traffic {
        &self.0.traffic
    }
}

fn record<'a>(
    story: &'a Story,
    (from_client, from_server): (u64, u64),
    duration: Duration,
    error: Option<&'a String>,
) -> AccessRecord<'a> {
    let (source, destination) = (story.source_workload.as_deref(), story.destination_workload.as_deref());
    let tunnelled = story.carrier == Carrier::Hbone;
    let proved = story.carrier != Carrier::Plaintext;
    AccessRecord {
        src_addr: story.source,
        src_workload: source.map_or("", |w| w.name()),
        src_namespace: source.map_or("", |w| &w.namespace),
        src_identity: story.source_identity.as_ref().filter(|_| proved).map(|i| i as _),
        src_cluster: source.map_or("", |w| &w.cluster),
        dst_addr: story.upstream.unwrap_or(story.destination),
        dst_hbone_addr: tunnelled.then_some(story.destination),
        dst_service: story.destination_service.as_ref().map_or("", |s| &s.hostname),
        dst_workload: destination.map_or("", |w| w.name()),
        dst_namespace: destination.map_or("", |w| &w.namespace),
        dst_identity: story.destination_identity.as_ref().filter(|_| proved).map(|i| i as _),
        dst_cluster: destination.map_or("", |w| &w.cluster),
        direction: story.direction.into(),
        bytes_from_client: from_client,
        bytes_from_server: from_server,
        duration,
        error: error.map(|e| e as _),
        policy: story.verdict.policy().map(|p| p as _),
        reason: Some(&story.verdict),
        id: Some(&story.id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size of the future that a handler of connections returns.
    fn future_size<H, Fut>(_handler: H) -> usize
    where
        H: Fn(Arc<Proxy>, Arc<LocalPod>, TcpStream, SocketAddr) -> Fut,
        Fut: Future,
    {
        size_of::<Fut>()
    }

    fn carrying_size<F: Future>(
        _carry: impl Fn(&Arc<Proxy>, Story, Recheck, Carried, pod::Place) -> F,
    ) -> usize {
        size_of::<F>()
    }

    /// A connection's task is as large as its future, for as long as the connection lives: what is needed only
    /// while it is opened belongs in a box that is dropped then.
    #[test]
    fn the_tasks_of_connections_are_small() {
        let sizes = [future_size(outbound::handle), future_size(plaintext::handle)];
        assert!(sizes.iter().all(|size| *size <= 160), "{sizes:?} bytes: outbound, plaintext");
        let carrying = carrying_size(|proxy, story, recheck, carried, held| {
            proxy.carrying(story, recheck, carried, held)
        });
        assert!(carrying <= 400, "{carrying} bytes: a connection that is carried");
        // What opens one is gone then, but a thousand that open at once leave holes of its size, which are kept where they
        // are no whole pages.
        let opening = [future_size(outbound::begin), inbound::opening_size()];
        assert!(
            opening.iter().all(|size| *size <= 2000),
            "{opening:?} bytes: outbound, inbound, while they open"
        );
        let inbound = future_size(inbound::handle);
        assert!(inbound <= 3500, "{inbound} bytes: an HBONE connection");
    }
}
