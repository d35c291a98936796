//! Inbound tunnels: port 15008 of a pod.
//!
//! ```text
//! accepted -> secured (the peer's identity) -> CONNECT -> addressed (to this pod) -> permitted -> delivered -> carried
//! ```
//!
//! A connection carries many tunnels; each of them is decided for itself, by the policies of the moment it is
//! opened, and again whenever they change.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hbone::{Closed, Control, Incoming, StatusCode, TunnelHeaders};
use identity::{PeerInfo, TlsStream};
use model::{Connection, Permit};
use process::shutdown::Phase;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::failure::Failure;
use super::peers::Seat;
use super::pod::LocalPod;
use super::{Carried, Carrying, Proxy, is_listener_port};
use crate::connections::{Carrier, Direction, Story, Verdict, now_ms};

/// A drain that waits for the tunnels, not for a deadline.
const UNTIL_THEY_END: Duration = Duration::from_secs(365 * 24 * 3600);

/// Serves one connection of a peer, and all tunnels in it, to its end.
pub async fn handle(proxy: Arc<Proxy>, pod: Arc<LocalPod>, stream: TcpStream, peer: SocketAddr) {
    let _hold = proxy.shutdown.hold();
    let local = match stream.local_addr() {
        Ok(local) => net::canonical(local),
        Err(error) => {
            return proxy.refuse_early(stream, Direction::Inbound, peer, &Failure::OriginalDst(error));
        }
    };
    let tls = match Box::pin(secure(&proxy, &pod, stream, (peer, local))).await {
        Ok(secured) => secured,
        Err(failure) => return proxy.refused_early(Direction::Inbound, peer, local, &failure),
    };
    let info = Arc::new(tls.peer().clone());
    let control = Control::default();
    let seat = match proxy.peers.admit(pod.netns.id().inode(), peer.ip(), control.clone()) {
        Ok(seat) => Arc::new(seat),
        Err(no_room) => {
            return proxy.refused_early(Direction::Inbound, peer, local, &Failure::NoRoom(no_room));
        }
    };
    if !proxy.locals.serves(&pod) {
        // It left during the handshake, or is about to be enrolled; its peers are told as those of before are.
        control.retire();
    }
    let session = Arc::new(Session { proxy: proxy.clone(), pod, peer, local, info: info.clone(), seat });
    let serving = hbone::serve(tls, &proxy.server, &control, &proxy.server_counters, |incoming| {
        tokio::spawn(session.clone().tunnel(incoming));
    });
    let mut serving = std::pin::pin!(serving);
    let mut roots = proxy.tls.bundle().subscribe();
    let closed = loop {
        tokio::select! {
            closed = &mut serving => break closed,
            () = proxy.shutdown.draining() => {
                // No new tunnels, and the peer's pool goes elsewhere; those that are open have the grace period.
                control.drain(patience(&proxy));
                break serving.await;
            }
            changed = roots.changed() => {
                // New tunnels only over a connection that is secured anew. Whether those that are open may go on
                // is asked for each of them.
                if changed.is_err() || proxy.tls.bundle().still_trusts(&info).is_err() {
                    control.drain(UNTIL_THEY_END);
                    break serving.await;
                }
            }
        }
    };
    match closed {
        Closed::Finished | Closed::DrainDeadline | Closed::Aborted => {}
        closed => tracing::info!(%peer, %local, reason = %closed, "HBONE connection ended"),
    }
}

/// How long open tunnels may go on during a drain.
fn patience(proxy: &Proxy) -> Duration {
    match proxy.shutdown.phase() {
        Phase::Draining { deadline } => deadline.saturating_duration_since(Instant::now()),
        Phase::Running | Phase::Aborting => Duration::ZERO,
    }
}

/// The TLS handshake, as the pod.
async fn secure(
    proxy: &Proxy,
    pod: &LocalPod,
    stream: TcpStream,
    (peer, local): (SocketAddr, SocketAddr),
) -> Result<TlsStream<TcpStream>, Failure> {
    proxy.may_serve(pod, local.ip()).await?;
    let workload = pod.subject.destination(&proxy.state.mesh(), local.ip())?;
    let own =
        workload.identity().map_err(|e| super::resolve::Refusal::NoIdentity(workload.uid.clone(), e))?;
    let place = proxy.handshakes.place(peer.ip()).await;
    let _place = place.map_err(|e| Failure::Tls { to: peer, reason: e.to_string() })?;
    let accepted = proxy.tls.accept(stream, peer.ip(), &own).await;
    accepted.map_err(|e| Failure::of_handshake(peer, &own, &e))
}

/// A secured connection of a peer.
struct Session {
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    peer: SocketAddr,
    local: SocketAddr,
    info: Arc<PeerInfo>,
    seat: Arc<Seat>,
}

/// A tunnel's decision: what is known of it, and the permission or the reason against it.
type Decided = (Story, Result<Permit, Failure>);

impl Session {
    /// Carries one tunnel to its end. No async function, which would hold the request for as long.
    fn tunnel(self: Arc<Self>, incoming: Incoming) -> impl Future<Output = ()> + Send {
        let busy = self.seat.busy();
        // Boxed: delivering needs kilobytes, and the task lives as long as the tunnel.
        let beginning = Box::pin(self.begin(Box::new(incoming)));
        async move {
            if let Some(carrying) = beginning.await {
                carrying.await;
            }
            drop(busy);
        }
    }

    /// Delivers what is permitted; what carries it, if it could be delivered.
    async fn begin(self: Arc<Self>, incoming: Box<Incoming>) -> Option<Carrying> {
        let hold = self.proxy.shutdown.hold();
        let (story, decision) = match self.decide(&incoming) {
            Ok(decided) => decided,
            Err(failure) => {
                self.proxy.refused_early(Direction::Inbound, self.peer, self.local, &failure);
                refuse(*incoming, &failure);
                return None;
            }
        };
        let opened = match decision.and_then(|permit| Ok((permit, self.pod.place(&self.proxy.room, 1)?))) {
            Ok((permit, place)) => {
                let opened = self.open(incoming, &permit).await;
                opened.map(|(tunnel, tcp)| (tunnel, tcp, permit, place))
            }
            Err(failure) => {
                refuse(*incoming, &failure);
                Err(failure)
            }
        };
        match opened {
            Ok((tunnel, tcp, permit, place)) => {
                let peer = Some(self.info.clone());
                let recheck = self.proxy.recheck_inbound(&self.pod, permit.connection().clone(), peer);
                let held = (place, hold);
                Some(self.proxy.carry(story, recheck, Carried::Tunnelled { tunnel, tcp, ahead: 0 }, held))
            }
            Err(failure) => {
                self.proxy.refused(story, &failure);
                None
            }
        }
    }

    /// Reads the request and asks the policies.
    fn decide(&self, incoming: &Incoming) -> Result<Decided, Failure> {
        let to = self.addressed(incoming)?;
        let mesh = self.proxy.state.mesh();
        let workload = self.pod.subject.destination(&mesh, self.local.ip())?;
        // The connection is being drained then; for a moment its peer may not know yet.
        if let Err(distrust) = self.proxy.tls.trusts(&self.info, self.peer.ip()) {
            return Err(Failure::Tls { to: self.peer, reason: distrust.to_string() });
        }
        if self.proxy.tls.is_expired(&self.info) {
            let reason = "the certificate that the connection was secured with has expired".to_owned();
            return Err(Failure::Tls { to: self.peer, reason });
        }
        let connection = Connection::new(Some(self.info.id.clone()), self.peer.ip(), to);
        let decision = mesh.authorize(&workload, &connection);
        let service = incoming.headers.parse_forwarded().and_then(|f| f.host);
        let story = Story {
            id: self.proxy.registry.next_id(),
            direction: Direction::Inbound,
            carrier: Carrier::Hbone,
            opened_ms: now_ms(),
            source: self.peer,
            source_workload: self.proxy.workload_of(&mesh, &workload.network, self.peer.ip()),
            source_identity: Some(self.info.id.clone()),
            destination: to,
            upstream: None,
            destination_identity: workload.identity().ok(),
            // Named by the peer, so believed only when it is a service of this workload.
            destination_service: service.and_then(|host| {
                let known = |s: &&Arc<model::Service>| workload.services.iter().any(|m| m.service == s.key());
                mesh.services_named(&host).iter().find(known).cloned()
            }),
            destination_workload: Some(workload),
            verdict: Verdict::of(&decision),
        };
        Ok((story, decision.outcome.map_err(Failure::Denied)))
    }

    /// A tunnel ends at the pod that it was opened to, at a port of its application.
    fn addressed(&self, incoming: &Incoming) -> Result<SocketAddr, Failure> {
        let wrong =
            || Failure::WrongAddress { authority: incoming.authority.to_string(), local: self.local.ip() };
        let to = incoming.authority.socket_addr().map(net::canonical).ok_or_else(wrong)?;
        if to.ip() != self.local.ip() {
            return Err(wrong());
        }
        if is_listener_port(to.port()) {
            return Err(Failure::ListenerPort(to.port()));
        }
        Ok(to)
    }

    /// Delivers what is permitted, and answers the request.
    async fn open(
        &self,
        mut incoming: Box<Incoming>,
        permit: &Permit,
    ) -> Result<(hbone::Tunnel, TcpStream), Failure> {
        let http2 = |reason: String| Failure::Http2 { to: self.peer, reason };
        let delivered = tokio::select! {
            delivered = super::deliver::deliver(&self.proxy, &self.pod, permit) => delivered,
            gone = incoming.given_up() => return Err(http2(format!("given up: {gone}"))),
        };
        match delivered {
            Ok(tcp) => {
                let accepted = incoming.accept(&TunnelHeaders::default());
                accepted.map(|tunnel| (tunnel, tcp)).map_err(|e| http2(e.to_string()))
            }
            Err(failure) => {
                refuse(*incoming, &failure);
                Err(failure)
            }
        }
    }
}

fn refuse(incoming: Incoming, failure: &Failure) {
    let status = StatusCode::from_u16(failure.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    incoming.refuse(status, &TunnelHeaders::default());
}

#[cfg(test)]
pub(super) fn opening_size() -> usize {
    fn size<Fut: Future>(_begin: impl Fn(Arc<Session>, Box<Incoming>) -> Fut) -> usize {
        size_of::<Fut>()
    }
    size(Session::begin)
}
