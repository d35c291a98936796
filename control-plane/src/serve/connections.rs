//! The connections of the gRPC port, and what each source of them may take up.
//!
//! Whoever reaches the port can open connections before anybody knows who he is. So that no pod keeps proxies out:
//! * one source (address) has so many connections, handshakes and undecided requests, and no more: what is above is
//!   closed or refused at once, and waits nowhere;
//! * a handshake has little time;
//! * a connection that has no stream whose sender is known, and had none for [`Limits::unproven`], is closed. Clients
//!   of the CA that come back after a pause connect anew.
//!
//! Addresses of this host are not limited by source: a port-forward carries the connections of many.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use process::metrics::{Counter, Description, Family, Kind, Registry};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

/// What the port may be made to hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections: one for each node, and some more.
    pub connections: usize,
    /// TLS handshakes at a time.
    pub handshakes: usize,
    /// What one source may have.
    pub of_one_source: OfOneSource,
    /// How long a handshake may take.
    pub handshake_time: Duration,
    /// How long a connection may be without a stream whose sender is known.
    pub unproven: Duration,
    /// Whether addresses of this host are limited by source, too.
    pub loopback: bool,
}

/// What one source may have at a time.
#[derive(Clone, Copy, Debug)]
pub struct OfOneSource {
    /// Connections; many, since an address may be of a gateway with nodes behind it.
    pub connections: u32,
    /// TLS handshakes.
    pub handshakes: u32,
    /// Requests of which it is not decided yet who sent them: each may cost a review of a token.
    pub requests: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 12_000,
            handshakes: 512,
            of_one_source: OfOneSource { connections: 500, handshakes: 16, requests: 64 },
            handshake_time: Duration::from_secs(10),
            unproven: Duration::from_secs(30),
            loopback: false,
        }
    }
}

/// What a source has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum What {
    Connection,
    Handshake,
    Request,
}

impl What {
    fn reason(self) -> &'static str {
        match self {
            Self::Connection => "connections of one source",
            Self::Handshake => "handshakes of one source",
            Self::Request => "requests of one source",
        }
    }
}

/// How much a source has of each.
type Counts = [u32; 3];

/// The port's books. Clones share them.
#[derive(Clone)]
pub struct Port(Arc<Books>);

struct Books {
    limits: Limits,
    /// Sources that have something; no more than there are connections.
    sources: Mutex<HashMap<IpAddr, Counts>>,
    closed: Arc<Family<[(&'static str, &'static str); 1], Counter>>,
    open: AtomicU64,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("limits", &self.0.limits).finish_non_exhaustive()
    }
}

impl Port {
    /// Registers the metrics.
    #[must_use]
    pub fn new(limits: Limits, metrics: &Registry) -> Self {
        let books = Arc::new(Books {
            limits,
            sources: Mutex::default(),
            closed: metrics.counters(
                "culvertd_connections_refused",
                "Connections closed, and requests refused, before anybody knew whose they were",
            ),
            open: AtomicU64::new(0),
        });
        let read = books.clone();
        let description = Description {
            name: "culvertd_connections",
            help: "Connections of the port for xDS and the CA",
            kind: Kind::Gauge,
        };
        metrics.collect(description, move |out| out.integer(&|_| {}, read.open.load(Ordering::Relaxed)));
        Self(books)
    }

    /// Takes one more of something for a source, until it is dropped; `None`, and counted, if it has all that it may
    /// have.
    pub(super) fn take(&self, source: IpAddr, what: What) -> Option<Held> {
        let books = &self.0;
        let source = source.to_canonical();
        let most = match what {
            What::Connection => books.limits.of_one_source.connections,
            What::Handshake => books.limits.of_one_source.handshakes,
            What::Request => books.limits.of_one_source.requests,
        };
        let limited = books.limits.loopback || !source.is_loopback();
        let mut sources = books.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = sources.entry(source).or_default();
        let count = counts.get_mut(what as usize)?;
        if limited && *count >= most {
            drop(sources);
            self.note(what.reason());
            return None;
        }
        *count += 1;
        drop(sources);
        Some(Held { port: self.clone(), source, what })
    }

    fn note(&self, reason: &'static str) {
        self.0.closed.with(&[("reason", reason)]).inc();
    }
}

/// Something that a source has.
pub(super) struct Held {
    port: Port,
    source: IpAddr,
    what: What,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut sources = self.port.0.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(counts) = sources.get_mut(&self.source) else { return };
        if let Some(count) = counts.get_mut(self.what as usize) {
            *count = count.saturating_sub(1);
        }
        if counts.iter().all(|count| *count == 0) {
            sources.remove(&self.source);
        }
    }
}

/// Whether a connection has streams whose senders are known.
#[derive(Debug)]
pub(super) struct Proof(Mutex<(u32, Instant)>);

impl Proof {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new((0, Instant::now()))))
    }

    /// One more, until it is dropped.
    pub(super) fn stream(self: &Arc<Self>) -> Proven {
        self.change(1);
        Proven(self.clone())
    }

    fn change(&self, by: i32) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (state.0.saturating_add_signed(by), Instant::now());
    }

    /// When it is to be closed if nothing changes; `None` while it has such streams.
    fn end(&self, unproven: Duration) -> Option<Instant> {
        let (streams, since) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (streams == 0).then(|| since + unproven)
    }
}

/// A stream whose sender is known.
pub(super) struct Proven(Arc<Proof>);

impl Drop for Proven {
    fn drop(&mut self) {
        self.0.change(-1);
    }
}

/// Who is at the other end of a connection, as requests carry it.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The address.
    pub address: SocketAddr,
    pub(super) proof: Arc<Proof>,
}

/// A connection that is secured.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    port: Port,
    look: Pin<Box<Sleep>>,
    _held: Held,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    /// Whether it has been without a known sender for too long. Wakes the task when it may be so.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        let unproven = self.port.0.limits.unproven;
        while self.look.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            match self.peer.proof.end(unproven) {
                Some(end) if end <= now => return true,
                end => self.look.as_mut().reset(end.unwrap_or(now + unproven)),
            }
        }
        false
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.port.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_over(cx) {
            self.port.note("no known sender");
            // Reads as the client's end, upon which HTTP/2 closes it.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The connections of a listener, once they are secured. Handshakes go on beside each other.
pub fn connections(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    port: Port,
) -> impl Stream<Item = io::Result<Connection>> {
    let (out, accepted) = mpsc::channel(16);
    let acceptor = TlsAcceptor::from(tls);
    tokio::spawn(async move {
        let limits = port.0.limits;
        let (places, handshakes) =
            (Arc::new(Semaphore::new(limits.connections)), Arc::new(Semaphore::new(limits.handshakes)));
        loop {
            // Beyond the limit of all, connections wait in the kernel's queue.
            let (Ok(place), Ok(handshake)) =
                (places.clone().acquire_owned().await, handshakes.clone().acquire_owned().await)
            else {
                return;
            };
            let (stream, address) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "accept failed");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                () = out.closed() => return,
            };
            let (Some(held), Some(shaking)) =
                (port.take(address.ip(), What::Connection), port.take(address.ip(), What::Handshake))
            else {
                tracing::debug!(peer = %address, "closed: its source has all the connections that it may have");
                continue;
            };
            let _ = stream.set_nodelay(true); // only a matter of speed
            let (out, acceptor, port) = (out.clone(), acceptor.clone(), port.clone());
            tokio::spawn(async move {
                let secured = tokio::time::timeout(limits.handshake_time, acceptor.accept(stream)).await;
                drop((handshake, shaking));
                match secured {
                    Ok(Ok(stream)) => {
                        let connection = secured_connection(stream, address, port, held, place);
                        // Closed when the process ends.
                        let _ = out.send(Ok(connection)).await;
                    }
                    Ok(Err(error)) => {
                        port.note("no handshake");
                        tracing::debug!(peer = %address, error = &error as &dyn std::error::Error, "no handshake");
                    }
                    Err(_) => {
                        port.note("no handshake in time");
                        tracing::debug!(peer = %address, "no handshake in time");
                    }
                }
            });
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(accepted)
}

fn secured_connection(
    stream: TlsStream<TcpStream>,
    address: SocketAddr,
    port: Port,
    held: Held,
    place: OwnedSemaphorePermit,
) -> Connection {
    port.0.open.fetch_add(1, Ordering::Relaxed);
    let look = Box::pin(sleep_until(Instant::now() + port.0.limits.unproven));
    let peer = Peer { address, proof: Proof::new() };
    Connection { stream, peer, port, look, _held: held, _place: place }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(loopback: bool) -> Port {
        let of_one_source = OfOneSource { connections: 3, handshakes: 2, requests: 1 };
        Port::new(Limits { of_one_source, loopback, ..Limits::default() }, &Registry::new())
    }

    #[test]
    fn a_source_has_no_more_than_it_may_have_and_keeps_nobody_else_out() {
        let port = port(false);
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut held: Vec<_> = (0..3).map(|_| port.take(a, What::Connection).unwrap()).collect();
        assert!(port.take(a, What::Connection).is_none());
        // As a listener of both families says the same address.
        assert!(port.take("::ffff:10.0.0.1".parse().unwrap(), What::Connection).is_none());
        let _shaking = [port.take(a, What::Handshake).unwrap(), port.take(a, What::Handshake).unwrap()];
        assert!(port.take(a, What::Handshake).is_none(), "counted apart");
        assert!(port.take(b, What::Connection).is_some());
        held.pop();
        assert!(port.take(a, What::Connection).is_some());
        assert_eq!(port.0.closed.with(&[("reason", What::Connection.reason())]).get(), 2);
    }

    #[test]
    fn what_nobody_has_is_not_remembered() {
        let port = port(true);
        let held = port.take(IpAddr::from([127, 0, 0, 1]), What::Request);
        assert!(port.take(IpAddr::from([127, 0, 0, 1]), What::Request).is_none());
        drop(held);
        assert!(port.0.sources.lock().unwrap().is_empty());
    }

    #[test]
    fn this_host_is_not_limited_unless_it_is_said() {
        let port = port(false);
        let held: Vec<_> =
            (0..100).filter_map(|_| port.take(IpAddr::from([127, 0, 0, 1]), What::Connection)).collect();
        assert_eq!(held.len(), 100);
    }
}
