//! Outbound connections: captured in a pod on port 15001.
//!
//! ```text
//! accepted -> captured (the dialled address) -> resolved (a Route) -> dialled (tunnel or TCP) -> carried -> ended
//!                                                   ^                    |
//!                                                   +---- next endpoint -+   while nothing was sent
//! ```

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use hbone::{Authority, ConnectRequest, Forwarded, HeaderValue, TunnelHeaders};
use identity::PeerInfo;
use model::{OriginalDst, SpiffeId, Workload};
use net::ConnectOptions;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use super::dialer::TunnelKey;
use super::failure::Failure;
use super::pod::{LocalPod, Place};
use super::resolve::{Context, Route, Target};
use super::within::{Destined, Source, Within};
use super::{Carried, Carrying, Proxy};
use crate::connections::{Carrier, Direction, Recheck, Story, Verdict, now_ms};

/// Carries one captured connection of the application at `peer` to its end.
pub async fn handle(proxy: Arc<Proxy>, pod: Arc<LocalPod>, client: TcpStream, peer: SocketAddr) {
    let _hold = proxy.shutdown.hold();
    // Boxed: dialling needs kilobytes, and the task lives as long as the connection.
    if let Some(carrying) = Box::pin(begin(proxy, pod, client, peer)).await {
        carrying.await;
    }
}

/// Opens the connection; what carries it, if it could be opened.
pub(super) async fn begin(
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    mut client: TcpStream,
    peer: SocketAddr,
) -> Option<Carrying> {
    let prepared = match proxy.may_connect().await {
        Ok(()) => {
            proxy.captured(&client, peer).and_then(|dialled| Outbound::new(&proxy, &pod, peer, dialled))
        }
        Err(failure) => Err(failure),
    };
    let mut outbound = match prepared {
        Ok(outbound) => outbound,
        Err(failure) => {
            proxy.refuse_early(client, Direction::Outbound, peer, &failure);
            return None;
        }
    };
    // What the application says first goes with the CONNECT, or right behind it.
    let mut ahead = BytesMut::new();
    match outbound.open((&mut client, &mut ahead)).await {
        Ok((route, upstream)) => {
            let story = outbound.story(Some(&route), route_words(&route));
            let identity = outbound.identity.clone();
            let recheck = proxy.recheck_outbound(&pod, identity, outbound.dialled, &route, upstream.peer());
            if matches!(upstream, Upstream::Tunnel(..)) {
                outbound.place.keep(1);
            }
            let (carried, recheck, place) = upstream.with(client, &ahead, recheck);
            let held = (outbound.place, place, route.into_picked());
            Some(proxy.carry(story, recheck, carried, held))
        }
        Err((route, failure)) => {
            let story = outbound.story(route.as_ref(), Verdict::proxy(failure.to_string()));
            proxy.refuse(client, story, &failure);
            None
        }
    }
}

fn route_words(route: &Route) -> Verdict {
    match route {
        Route::Tunnel { .. } => Verdict::proxy("sent in a tunnel; the destination's node decides"),
        Route::Within { .. } => Verdict::proxy("joined within the node, not encrypted (nodeLocal: direct)"),
        Route::Plain { why, .. } => Verdict::proxy(why.as_str()),
        Route::PlainHost { .. } => Verdict::proxy("sent to a host of a ServiceEntry"),
    }
}

/// What a connection was opened to.
pub enum Upstream {
    /// The application of another pod of this node, which is not sent to in a tunnel.
    Within(Box<Within>),
    /// A tunnel, and who is at its other end.
    Tunnel(hbone::Tunnel, Arc<PeerInfo>),
    /// A plain connection.
    Plain(TcpStream),
}

impl Upstream {
    fn peer(&self) -> Option<Arc<PeerInfo>> {
        match self {
            Self::Tunnel(_, peer) => Some(peer.clone()),
            Self::Plain(_) | Self::Within(_) => None,
        }
    }

    /// What is carried, on which condition, and what is held meanwhile.
    /// `ahead` is what it has got of the client already.
    fn with(self, client: TcpStream, ahead: &[u8], recheck: Recheck) -> (Carried, Recheck, Option<Place>) {
        let ahead = ahead.len() as u64;
        match self {
            Self::Tunnel(tunnel, _) => (Carried::Tunnelled { tunnel, tcp: client, ahead }, recheck, None),
            Self::Plain(server) => (Carried::Plain { client, server, ahead }, recheck, None),
            Self::Within(within) => {
                let Within { server, story, allowed, direct, place } = *within;
                let seen = Box::new((story, allowed));
                (Carried::Within { client, server, ahead, seen }, direct, Some(place))
            }
        }
    }
}

/// The application's end, and what was read from it and sent ahead of an answer.
type Ahead<'a> = (&'a mut TcpStream, &'a mut BytesMut);

struct Outbound<'a> {
    proxy: &'a Arc<Proxy>,
    pod: &'a Arc<LocalPod>,
    id: u64,
    opened_ms: u64,
    peer: SocketAddr,
    dialled: OriginalDst,
    source: Arc<Workload>,
    identity: SpiffeId,
    place: Place,
}

/// A value of one connection alone, which HPACK is not to keep: in its table it would displace what comes again.
fn passing(mut value: HeaderValue) -> HeaderValue {
    value.set_sensitive(true);
    value
}

impl<'a> Outbound<'a> {
    fn new(
        proxy: &'a Arc<Proxy>,
        pod: &'a Arc<LocalPod>,
        peer: SocketAddr,
        dialled: OriginalDst,
    ) -> Result<Self, Failure> {
        let source = pod.subject.source(&proxy.state.mesh())?;
        let identity =
            source.identity().map_err(|e| super::resolve::Refusal::NoIdentity(source.uid.clone(), e))?;
        let place = pod.place(&proxy.room, 2)?;
        let (id, opened_ms) = (proxy.registry.next_id(), now_ms());
        Ok(Self { proxy, pod, id, opened_ms, peer, dialled, source, identity, place })
    }

    /// Resolves and dials, and tries other endpoints while that may help: none has got anything yet.
    async fn open(&self, (client, ahead): Ahead<'_>) -> Result<(Route, Upstream), (Option<Route>, Failure)> {
        let mut tried = Vec::new();
        let mut last: Option<Box<(Option<Route>, Failure)>> = None;
        for attempt in 1..=self.proxy.limits.attempts {
            let route = match self.resolve(&tried) {
                Ok(route) => route,
                // No endpoint is left: the failure of the last one says more than that.
                Err(refusal) => return Err(last.map_or_else(|| (None, refusal.into()), |last| *last)),
            };
            match self.dial(&route, (client, ahead)).await {
                Ok(upstream) => {
                    self.proxy.reached(&route);
                    return Ok((route, upstream));
                }
                Err(failure) => {
                    let Some(endpoint) = self.proxy.not_reached(&route, &failure, !ahead.is_empty()) else {
                        return Err((Some(route), failure));
                    };
                    tracing::debug!(id = self.id, attempt, %endpoint, %failure, "trying another endpoint");
                    tried.push(endpoint);
                    last = Some(Box::new((Some(route), failure)));
                }
            }
        }
        Err(last.map_or((None, Failure::Draining), |last| *last))
    }

    fn resolve(&self, tried: &[model::Str]) -> Result<Route, super::resolve::Refusal> {
        let mesh = self.proxy.state.mesh();
        let context = Context {
            mesh: &mesh,
            balancer: &self.proxy.balancer,
            source: &self.source,
            source_ip: self.peer.ip().to_canonical(),
            tried,
            now: self.proxy.started.elapsed(),
            random: self.proxy.random(),
        };
        let route = context.resolve(self.dialled)?;
        Ok(self.proxy.shortened(&mesh, (&self.source, context.source_ip), route))
    }

    /// What is no tunnel is boxed: a thousand connections that open at one moment would each hold room for all ways, and leave
    /// it in holes that are no whole pages.
    async fn dial(&self, route: &Route, (client, ahead): Ahead<'_>) -> Result<Upstream, Failure> {
        match route {
            Route::Tunnel { hbone, authority, expected, waypoint, .. } => {
                let key = TunnelKey {
                    netns: self.pod.netns.clone(),
                    source: self.identity.clone(),
                    source_ip: self.peer.ip().to_canonical(),
                    expected: expected.clone(),
                    to: *hbone,
                };
                let authority = Authority::from_addr(*authority)
                    .ok_or_else(|| Failure::Connect { to: *authority, reason: "port 0".into() })?;
                let request = ConnectRequest { authority, headers: self.headers(route) };
                if self.proxy.limits.early_data.to(*waypoint) {
                    let (tunnel, peer) =
                        self.proxy.open_tunnel(&key, &request, (Some(client), ahead)).await?;
                    return Ok(Upstream::Tunnel(tunnel, peer));
                }
                let nothing = (None, &mut BytesMut::new());
                let (mut tunnel, peer) = self.proxy.open_tunnel(&key, &request, nothing).await?;
                Box::pin(self.hand_over(&mut tunnel, hbone.socket_addr(), ahead)).await?;
                Ok(Upstream::Tunnel(tunnel, peer))
            }
            Route::Within { destination, target } => Box::pin(self.within(destination, target, ahead)).await,
            Route::Plain { to, .. } => Box::pin(self.plain(*to, ahead)).await,
            Route::PlainHost { host, port, .. } => Box::pin(self.plain_host(host, *port, ahead)).await,
        }
    }

    async fn within(
        &self,
        destination: &Destined,
        target: &Target,
        ahead: &[u8],
    ) -> Result<Upstream, Failure> {
        let source = Source {
            pod: self.pod,
            workload: &self.source,
            identity: &self.identity,
            peer: self.peer,
            dialled: self.dialled.socket_addr(),
            opened_ms: self.opened_ms,
        };
        let mut within = self.proxy.join(&source, destination, target).await?;
        if let Err(failure) = self.hand_over(&mut within.server, destination.to, ahead).await {
            within.story.verdict = Verdict::proxy(failure.to_string());
            self.proxy.refused(within.story, &failure);
            return Err(failure);
        }
        Ok(Upstream::Within(Box::new(within)))
    }

    /// What the peer is told of us, for its telemetry and log only.
    fn headers(&self, route: &Route) -> TunnelHeaders {
        let host = route.target().service.as_ref().map(|s| s.hostname.clone());
        TunnelHeaders {
            baggage: self.pod.baggage(&self.source),
            forwarded: Forwarded { client: Some(self.peer), host }.encode().map(passing),
            ..TunnelHeaders::default()
        }
    }

    async fn plain_host(&self, host: &str, port: u16, ahead: &[u8]) -> Result<Upstream, Failure> {
        let to = self.proxy.resolve_host(host, port, self.peer.ip()).await?;
        self.plain(to, ahead).await
    }

    async fn plain(&self, to: SocketAddr, ahead: &[u8]) -> Result<Upstream, Failure> {
        let ip = self.peer.ip().to_canonical();
        let source = (ip.is_ipv4() == to.is_ipv4()).then(|| SocketAddr::new(ip, 0));
        let options = ConnectOptions { source, ..ConnectOptions::default() };
        let connected = net::connect(&self.pod.netns, &options, to, self.proxy.limits.connect_timeout).await;
        let mut server = connected.map_err(|e| Failure::Connect { to, reason: e.source.to_string() })?;
        self.hand_over(&mut server, to, ahead).await?;
        Ok(Upstream::Plain(server))
    }

    /// Sends what was meant for a tunnel that was refused.
    async fn hand_over(
        &self,
        server: &mut (impl AsyncWrite + Unpin),
        to: SocketAddr,
        ahead: &[u8],
    ) -> Result<(), Failure> {
        if ahead.is_empty() {
            return Ok(());
        }
        let sent = tokio::time::timeout(self.proxy.limits.connect_timeout, server.write_all(ahead)).await;
        sent.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
            .map_err(|e| Failure::Ahead { to, reason: e.to_string() })
    }

    fn story(&self, route: Option<&Route>, verdict: Verdict) -> Story {
        let target = route.map(Route::target);
        let workload = target.and_then(|t| t.workload.clone());
        let other = |to: SocketAddr| Some(to).filter(|to| *to != self.dialled.socket_addr());
        let (carrier, upstream) = match route {
            Some(Route::Tunnel { hbone, .. }) => (Carrier::Hbone, Some(hbone.socket_addr())),
            Some(Route::Within { destination, .. }) => (Carrier::NodeLocal, other(destination.to)),
            Some(Route::Plain { to, .. }) => (Carrier::Plaintext, other(*to)),
            Some(Route::PlainHost { .. }) | None => (Carrier::Plaintext, None),
        };
        Story {
            id: self.id,
            direction: Direction::Outbound,
            carrier,
            opened_ms: self.opened_ms,
            source: self.peer,
            source_workload: Some(self.source.clone()),
            source_identity: Some(self.identity.clone()),
            destination: self.dialled.socket_addr(),
            upstream,
            destination_identity: match carrier {
                Carrier::Hbone | Carrier::NodeLocal | Carrier::Kernel => {
                    workload.as_ref().and_then(|w| w.identity().ok())
                }
                Carrier::Plaintext => None,
            },
            destination_workload: workload,
            destination_service: target.and_then(|t| t.service.clone()),
            verdict,
        }
    }
}
