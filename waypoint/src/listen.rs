//! Tunnels in: port 15008.
//!
//! ```text
//! accepted -> secured (the peer's identity) -> CONNECT -> addressed (a service or workload of ours)
//!          -> by the port's protocol: requests (http) | the first bytes tell (detect) | bytes (streams)
//! ```
//!
//! The client is who has proved an identity on the connection that carries the tunnel, at the address that the connection
//! comes from. What `Forwarded` says of a client beside that is believed of other waypoints only, which carry what their
//! clients send.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hbone::{
    Authority, Closed, Control, Host, Incoming, ServerCounters, ServerSettings, StatusCode, TunnelHeaders,
};
use identity::{PeerInfo, TlsStream};
use model::http::Protocol;
use model::{Destination, Locality, OriginalDst, Profile, Str, TunnelProtocol, Workload};
use net::{AcceptLoop, AcceptStats};
use process::metrics::Counter;
use process::shutdown::{Phase, Shutdown};
use source::{State, Tls};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::deciding::Deciding;
use crate::detect::{self, Spoken};
use crate::http::decide::Connection;
use crate::http::io::Io;
use crate::http::{Worker, serve, serve_begun};
use crate::rules::Served;
use crate::{streams, tunnels};

/// A drain that waits for the tunnels, not for a deadline.
const UNTIL_THEY_END: Duration = Duration::from_secs(365 * 24 * 3600);
/// TLS handshakes under way.
const HANDSHAKES: usize = 1024;
/// How long a connection waits for what the control plane has not told yet.
const KNOWN_WITHIN: Duration = Duration::from_secs(10);

/// What all connections share.
pub struct Front {
    /// The snapshot's source.
    pub state: Arc<State>,
    /// What decides.
    pub deciding: Deciding,
    /// TLS, as the waypoint.
    pub tls: Tls,
    /// What peers may do on a connection.
    pub server: ServerSettings,
    /// Counters of connections that peers opened.
    pub counters: Arc<ServerCounters>,
    /// Counters of the accept loops.
    pub accepts: Arc<AcceptStats>,
    /// Counters of what was refused.
    pub refused: Refused,
    /// For the first bytes of a connection of which nothing is known.
    pub detect_timeout: Duration,
    /// For connections of bytes on which nothing passes, where their destination says nothing of it.
    pub idle_timeout: Option<Duration>,
    /// Those that were ended for it.
    pub idle_connections: Counter,
    /// Room for peers' connections.
    peers: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    /// When to end.
    pub shutdown: Shutdown,
    /// When connections are not taken any more: some time after the drain has begun.
    pub closed: tokio_util::sync::CancellationToken,
}

/// Connections and tunnels that were refused.
#[derive(Debug, Default)]
pub struct Refused {
    /// Connections, because there were too many.
    pub connections: AtomicU64,
    /// Connections whose handshake failed.
    pub handshakes: AtomicU64,
    /// Tunnels to what is not served here.
    pub destinations: AtomicU64,
    /// Tunnels of peers that are not trusted any more, and tunnels to what nobody has told of yet.
    pub tunnels: AtomicU64,
}

impl Front {
    /// See the fields.
    #[must_use]
    pub fn new(
        state: Arc<State>,
        deciding: Deciding,
        tls: Tls,
        shutdown: Shutdown,
        flags: &crate::settings::Flags,
    ) -> Self {
        Self {
            state,
            deciding,
            tls,
            server: ServerSettings { transport: tunnels::transport(), ..ServerSettings::default() },
            counters: Arc::default(),
            accepts: Arc::default(),
            refused: Refused::default(),
            detect_timeout: flags.detect_timeout,
            idle_timeout: Some(flags.tcp_idle_timeout),
            idle_connections: Counter::default(),
            peers: Arc::new(Semaphore::new(flags.max_peers.min(Semaphore::MAX_PERMITS))),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES)),
            shutdown,
            closed: tokio_util::sync::CancellationToken::new(),
        }
    }

    /// Accepts connections on the thread of `worker` until the listener is closed.
    pub async fn accept(self: Arc<Self>, listener: TcpListener, worker: Arc<Worker>) {
        let mut accepting = AcceptLoop::new(listener, self.accepts.clone());
        loop {
            let (stream, peer) = tokio::select! {
                biased;
                () = self.closed.cancelled() => return,
                accepted = accepting.next() => accepted,
            };
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            let Ok(room) = self.peers.clone().try_acquire_owned() else {
                self.refused.connections.fetch_add(1, Ordering::Relaxed);
                net::reset(stream);
                continue;
            };
            tokio::spawn(self.clone().connection(stream, peer, worker.clone(), room));
        }
    }

    /// Serves one connection of a peer, and all tunnels in it, to its end.
    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        worker: Arc<Worker>,
        _room: OwnedSemaphorePermit,
    ) {
        let _hold = self.shutdown.hold();
        let Some(tls) = Box::pin(self.secure(stream, peer)).await else {
            self.refused.handshakes.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let info = Arc::new(tls.peer().clone());
        let control = Control::default();
        let session = Arc::new(Session { front: self.clone(), worker, peer, info: info.clone() });
        let serving = hbone::serve(tls, &self.server, &control, &self.counters, |incoming| {
            tokio::spawn(session.clone().tunnel(incoming));
        });
        let closed = self.attend(serving, &control, &info, peer).await;
        tracing::debug!(%peer, reason = %closed, "an HBONE connection ended");
    }

    /// Ends a connection in good order when the process drains, or when its peer is no longer trusted.
    async fn attend(
        &self,
        serving: impl Future<Output = Closed>,
        control: &Control,
        info: &PeerInfo,
        peer: SocketAddr,
    ) -> Closed {
        let mut serving = std::pin::pin!(serving);
        let mut roots = self.tls.bundle().subscribe();
        loop {
            tokio::select! {
                closed = &mut serving => return closed,
                () = self.closed.cancelled() => break,
                changed = roots.changed() => {
                    if changed.is_ok() && self.tls.bundle().still_trusts(info).is_ok() {
                        continue;
                    }
                }
            }
            // New tunnels only over a connection that is secured anew. Those that are open may go on if their peer has
            // proved itself by such a one in time.
            control.drain(UNTIL_THEY_END);
            tokio::select! {
                closed = &mut serving => return closed,
                () = tokio::time::sleep(source::REAUTHENTICATION) => {}
            }
            if let Err(distrust) = self.tls.trusts(info, peer.ip()) {
                tracing::warn!(%peer, reason = %distrust, "cut a connection");
                control.abort();
            }
            tokio::select! {
                closed = &mut serving => return closed,
                () = self.closed.cancelled() => break,
            }
        }
        // No new tunnels, and the peer's pool goes elsewhere; those that are open have the grace period.
        control.drain(self.patience());
        serving.await
    }

    /// How long open tunnels may go on during a drain.
    fn patience(&self) -> Duration {
        match self.shutdown.phase() {
            Phase::Draining { deadline } => deadline.saturating_duration_since(Instant::now()),
            Phase::Running => UNTIL_THEY_END,
            Phase::Aborting => Duration::ZERO,
        }
    }

    async fn secure(&self, stream: TcpStream, peer: SocketAddr) -> Option<TlsStream<TcpStream>> {
        if !self.state.until(KNOWN_WITHIN, |_| true).await {
            return None;
        }
        let own = self.deciding.identity(&self.state.mesh())?;
        let _place = self.handshakes.acquire().await.ok()?;
        match self.tls.accept(stream, peer.ip(), &own).await {
            Ok(tls) => Some(tls),
            Err(error) => {
                tracing::info!(%peer, %error, "a TLS handshake failed");
                None
            }
        }
    }
}

/// A secured connection of a peer.
struct Session {
    front: Arc<Front>,
    worker: Arc<Worker>,
    peer: SocketAddr,
    info: Arc<PeerInfo>,
}

impl Session {
    /// Serves one tunnel to its end. No async function, which would hold the request for as long.
    fn tunnel(self: Arc<Self>, incoming: Incoming) -> impl Future<Output = ()> + Send {
        // Boxed: what serves it needs kilobytes, and is of one kind or another.
        Box::pin(async move {
            if let Err((incoming, status, reason)) = self.serve(incoming).await {
                tracing::debug!(peer = %self.peer, authority = %incoming.authority, reason, "refused a tunnel");
                incoming.refuse(status, &TunnelHeaders::default());
            }
        })
    }

    async fn serve(&self, incoming: Incoming) -> Result<(), (Incoming, StatusCode, &'static str)> {
        let front = &self.front;
        if front.tls.trusts(&self.info, self.peer.ip()).is_err() || front.tls.is_expired(&self.info) {
            front.refused.tunnels.fetch_add(1, Ordering::Relaxed);
            return Err((incoming, StatusCode::SERVICE_UNAVAILABLE, "the peer is not trusted any more"));
        }
        let Some((served, to)) = self.addressed(&incoming.authority) else {
            front.refused.destinations.fetch_add(1, Ordering::Relaxed);
            return Err((
                incoming,
                StatusCode::BAD_REQUEST,
                "nothing of this address is bound to this waypoint",
            ));
        };
        let protocol = match &served {
            Served::Service(rules) => rules.protocol(to.port()),
            Served::Workload(_) => Some(Protocol::Detect),
        };
        let Some(protocol) = protocol else {
            front.refused.destinations.fetch_add(1, Ordering::Relaxed);
            return Err((incoming, StatusCode::BAD_REQUEST, "the service has no such port"));
        };
        let connection = Connection {
            client: self.client(&incoming.headers),
            destination: to,
            identity: Some(Arc::new(self.info.id.clone())),
            server_name: None,
            secure: false,
            said: self.said(&incoming.headers),
        };
        let Ok(tunnel) = incoming.accept(&TunnelHeaders::default()) else { return Ok(()) };
        let worker = self.worker.clone();
        match protocol {
            Protocol::Http | Protocol::Http2 => {
                serve(worker, Io::Tunnel(Box::new(tunnel)), connection).await;
            }
            Protocol::Detect => {
                let limit = front.detect_timeout;
                let Some((spoken, input, tunnel)) = detect::first_bytes(tunnel, limit).await else {
                    return Ok(());
                };
                match spoken {
                    Spoken::Http => {
                        serve_begun(worker, Io::Tunnel(Box::new(tunnel)), input, connection).await;
                    }
                    Spoken::Tls | Spoken::Other => {
                        streams::carry(front, tunnel, input, connection).await;
                    }
                }
            }
            Protocol::Tcp | Protocol::Tls => {
                streams::carry(front, tunnel, bytes::BytesMut::new(), connection).await;
            }
        }
        Ok(())
    }

    /// What of ours has the address that a tunnel is opened to.
    fn addressed(&self, authority: &Authority) -> Option<(Served, SocketAddr)> {
        let rules = self.front.deciding.rules();
        let (mesh, network) = (&rules.mesh, self.front.deciding.network());
        match authority.host() {
            Host::Ip(ip) => {
                let to = SocketAddr::new(*ip, authority.port());
                match mesh.destination(network, OriginalDst::new(to)) {
                    Destination::Service(service) => {
                        Some((Served::Service(rules.service(&service.key())?.clone()), to))
                    }
                    Destination::Workload(workload) => {
                        let bound = workload.waypoint.as_ref().is_some_and(|w| rules.is_own(&w.target));
                        bound.then_some((Served::Workload(workload), to))
                    }
                    Destination::Unknown => None,
                }
            }
            Host::Name(name) => {
                let services = mesh.services_named(name).iter();
                let (service, bound) = services.filter_map(|s| Some((s, rules.service(&s.key())?))).next()?;
                let vip = service.vips.iter().find(|vip| vip.network == *network)?;
                Some((Served::Service(bound.clone()), SocketAddr::new(vip.range.addr(), authority.port())))
            }
        }
    }

    /// The client's address. A waypoint before us carries what its clients send; of anybody else, `Forwarded` only adds the
    /// port to an address that the connection shows.
    fn client(&self, headers: &TunnelHeaders) -> SocketAddr {
        let Some(client) = headers.parse_forwarded().and_then(|forwarded| forwarded.client) else {
            return self.peer;
        };
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        let believed =
            client.ip() == self.peer.ip() || self.front.deciding.rules().is_waypoint(&self.info.id);
        if believed { client } else { self.peer }
    }

    /// What the client's node says of it, within what its identity has proved. Only what waypoints send to, and the like, is
    /// known here of the mesh.
    fn said(&self, headers: &TunnelHeaders) -> Option<Arc<Workload>> {
        let baggage = headers.parse_baggage()?;
        let (id, network) = (&self.info.id, self.front.deciding.network());
        let (kind, name) = baggage.workload.unwrap_or_default();
        let profile = Profile {
            namespace: id.namespace().clone(),
            service_account: id.service_account().clone(),
            network: network.clone(),
            cluster: baggage.cluster.unwrap_or_default(),
            canonical_name: Some(baggage.service_name.unwrap_or_default()),
            canonical_revision: baggage.service_version.unwrap_or_default(),
            workload_name: Some(name),
            workload_kind: kind,
            trust_domain: id.trust_domain().clone(),
            tunnel: TunnelProtocol::Hbone,
            ..Profile::default()
        };
        let locality = Locality {
            region: baggage.region.unwrap_or_default(),
            zone: baggage.zone.unwrap_or_default(),
            ..Locality::default()
        };
        let workload = Workload::new(Str::default(), "", Arc::new(profile));
        Some(Arc::new(Workload { locality: Arc::new(locality), ..workload }))
    }
}
