//! A thread's connections to endpoints. HTTP/1.1 connections that are idle wait here, the one used last first; those of
//! HTTP/2 are shared by the requests on them.
//!
//! Invariants:
//! * an idle connection that its peer has ended is seen before it is used;
//! * connections to one endpoint are limited, and so are the streams of each; what is beyond is refused, never queued;
//! * a slot is there only while it has connections.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use std::{fmt, io};

use bytes::Bytes;
use h2::client::SendRequest;
use hashbrown::HashMap;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::http::channel::{Channel, Stream};
use crate::http::decide::{Carrier, Protocol, Target};
use crate::http::h1::Framing;
use crate::http::h2_heads;
use crate::http::head::{MAX_HEAD, RequestHead};
use crate::http::io::{Buffers, Io};
use crate::http::stats::Stats;
use crate::http::wire::Wire;

/// Limits of a pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolSettings {
    /// Connections of a thread to one endpoint.
    pub max_connections: usize,
    /// Idle ones of them that are kept.
    pub max_idle: usize,
    /// How long.
    pub idle_timeout: Duration,
    /// To connect, with TLS and tunnel.
    pub connect_timeout: Duration,
    /// Streams on one connection of HTTP/2, unless the server allows fewer.
    pub max_streams: usize,
    /// What a server may send ahead on a stream.
    pub stream_window: u32,
    /// What a server may send ahead on a connection.
    pub connection_window: u32,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            max_idle: 1024,
            idle_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(10),
            max_streams: 100,
            stream_window: 1 << 20,
            connection_window: 16 << 20,
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// As many are open as may be.
    #[error("{0} connections to this endpoint are open already")]
    Overflow(usize),
    /// It took too long.
    #[error("no connection within {0:?}")]
    Timeout(Duration),
    /// It was refused, or failed.
    #[error("connecting failed: {0}")]
    Connect(#[from] io::Error),
    /// HTTP/2 did not begin, or has no room.
    #[error("HTTP/2 failed: {0}")]
    Http2(#[from] h2::Error),
    /// What is asked for can't be said in HTTP/2.
    #[error("the request can't be sent by HTTP/2")]
    Unsendable,
}

/// A thread's connections. Clones share them.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    slots: Mutex<HashMap<Arc<Target>, Slot>>,
    settings: PoolSettings,
    buffers: Buffers,
    stats: Arc<Stats>,
}

#[derive(Default)]
struct Slot {
    /// Connections in use, being made and idle.
    open: usize,
    idle: Vec<Idle>,
    shared: Vec<Shared>,
    /// Held by whoever makes a connection of HTTP/2, so that others wait for it.
    making: Arc<tokio::sync::Mutex<()>>,
}

struct Idle {
    wire: Wire,
    since: Instant,
    seat: Seat,
}

/// A connection of HTTP/2.
#[derive(Clone)]
struct Shared {
    send: SendRequest<Bytes>,
    streams: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
}

/// A place among an endpoint's connections, free again when dropped.
struct Seat {
    pool: Weak<Inner>,
    target: Arc<Target>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Some(pool) = self.pool.upgrade() else { return };
        pool.stats.upstream_connections_now.dec();
        let mut slots = pool.slots();
        if let Some(slot) = slots.get_mut(&self.target) {
            slot.open -= 1;
            if slot.open == 0 {
                slots.remove(&self.target);
            }
        }
    }
}

/// What keeps a [`Lease`]'s connection counted.
enum Hold {
    Seat(Seat),
    Stream { streams: Arc<AtomicUsize> },
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Self::Stream { streams } = self {
            streams.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A way to an endpoint, for one request.
pub struct Lease {
    /// The connection or stream.
    pub channel: Channel,
    /// Whether the connection has carried requests before.
    pub reused: bool,
    hold: Hold,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("reused", &self.reused).finish_non_exhaustive()
    }
}

impl Inner {
    fn slots(&self) -> MutexGuard<'_, HashMap<Arc<Target>, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place, if there is one.
    fn seat(self: &Arc<Self>, target: &Arc<Target>) -> Result<Seat, PoolError> {
        let mut slots = self.slots();
        let slot = slots.entry(Arc::clone(target)).or_default();
        if slot.open >= self.settings.max_connections {
            self.stats.pool_overflows.inc();
            return Err(PoolError::Overflow(slot.open));
        }
        slot.open += 1;
        self.stats.upstream_connections.inc();
        self.stats.upstream_connections_now.inc();
        Ok(Seat { pool: Arc::downgrade(self), target: Arc::clone(target) })
    }

    /// Drops what has been idle for too long or has ended.
    fn sweep(&self) {
        let limit = self.settings.idle_timeout;
        let mut gone = Vec::new();
        for slot in self.slots().values_mut() {
            let stale = |idle: &mut Idle| idle.since.elapsed() >= limit || !idle.wire.is_quiet();
            gone.extend(slot.idle.extract_if(.., stale));
        }
        // Their seats take the lock.
        drop(gone);
    }
}

impl Pool {
    /// An empty one. Must be made on the thread's runtime.
    #[must_use]
    pub fn new(settings: PoolSettings, buffers: Buffers, stats: Arc<Stats>) -> Self {
        let inner = Arc::new(Inner { slots: Mutex::default(), settings, buffers, stats });
        let weak = Arc::downgrade(&inner);
        let every = (settings.idle_timeout / 4).clamp(Duration::from_millis(10), Duration::from_secs(5));
        tokio::spawn(async move {
            loop {
                sleep(every).await;
                let Some(inner) = weak.upgrade() else { return };
                inner.sweep();
            }
        });
        Self(inner)
    }

    /// An idle connection of HTTP/1.1, if there is one.
    #[must_use]
    pub fn idle(&self, target: &Arc<Target>) -> Option<Lease> {
        let mut gone = Vec::new();
        let found = {
            let mut slots = self.0.slots();
            let idle = &mut slots.get_mut(target)?.idle;
            loop {
                let Some(mut last) = idle.pop() else { break None };
                if last.wire.is_quiet() {
                    break Some(last);
                }
                gone.push(last);
            }
        };
        drop(gone);
        let Idle { wire, seat, .. } = found?;
        Some(Lease { channel: Channel::H1(wire), reused: true, hold: Hold::Seat(seat) })
    }

    /// Keeps a connection of HTTP/1.1 on which nothing is under way.
    pub fn put(&self, lease: Lease) {
        let Lease { channel: Channel::H1(wire), mut hold, .. } = lease else { return };
        let Hold::Seat(seat) = &mut hold else { return };
        let nobody = Seat { pool: Weak::new(), target: Arc::clone(&seat.target) };
        let seat = std::mem::replace(seat, nobody);
        let mut slots = self.0.slots();
        let target = Arc::clone(&seat.target);
        let idle = Idle { wire, since: Instant::now(), seat };
        let Some(slot) = slots.get_mut(&target) else { return };
        if slot.idle.len() < self.0.settings.max_idle {
            slot.idle.push(idle);
        } else {
            // Its seat takes the lock.
            drop(slots);
            drop(idle);
        }
    }

    /// A way to `target` for `request`, which is sent at once where that is HTTP/2. `fresh` is for a request that found
    /// an idle connection dead.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub async fn get(
        &self,
        target: &Arc<Target>,
        request: &RequestHead,
        framing: Framing,
        fresh: bool,
    ) -> Result<Lease, PoolError> {
        if target.protocol == Protocol::Http2 {
            return self.stream(target, request, framing).await;
        }
        if !fresh && let Some(lease) = self.idle(target) {
            return Ok(lease);
        }
        let seat = self.0.seat(target)?;
        let io = self.connect(target).await?;
        let wire = Wire::new(io, &self.0.buffers);
        Ok(Lease { channel: Channel::H1(wire), reused: false, hold: Hold::Seat(seat) })
    }

    async fn connect(&self, target: &Target) -> Result<Io, PoolError> {
        let limit = self.0.settings.connect_timeout;
        let connected = async {
            match &target.carrier {
                Carrier::Tcp => {
                    let stream = TcpStream::connect(target.address).await?;
                    stream.set_nodelay(true)?;
                    Ok(Io::Tcp(stream))
                }
                Carrier::Via(dial) => dial.dial(target.address).await.map(Io::Layered),
            }
        };
        let connected =
            timeout(limit, connected).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        connected.map_err(|error| {
            self.0.stats.connects_failed.inc();
            match error.kind() {
                io::ErrorKind::TimedOut => PoolError::Timeout(limit),
                _ => PoolError::Connect(error),
            }
        })
    }

    /// A stream on a connection of HTTP/2, which is made if there is none with room.
    async fn stream(
        &self,
        target: &Arc<Target>,
        request: &RequestHead,
        framing: Framing,
    ) -> Result<Lease, PoolError> {
        let message = h2_heads::to_request(request, framing).ok_or(PoolError::Unsendable)?;
        loop {
            let (mut shared, reused) = match self.with_room(target) {
                Some(shared) => (shared, true),
                None => (self.share(target).await?, false),
            };
            let hold = Hold::Stream { streams: Arc::clone(&shared.streams) };
            let ready = std::future::poll_fn(|cx| shared.send.poll_ready(cx)).await;
            match ready.and_then(|()| shared.send.send_request(message.clone(), framing == Framing::None)) {
                Ok((response, send)) => {
                    return Ok(Lease {
                        channel: Channel::H2(Stream::of_server(response, send)),
                        reused,
                        hold,
                    });
                }
                // It has ended, or its server said that it will: nothing was sent, another will do.
                Err(error) if reused => {
                    tracing::debug!(%error, "a connection of HTTP/2 takes no more requests");
                    shared.ended.store(true, Ordering::Relaxed);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A connection with a free stream, which is taken.
    fn with_room(&self, target: &Arc<Target>) -> Option<Shared> {
        let mut slots = self.0.slots();
        let slot = slots.get_mut(target)?;
        slot.shared.retain(|shared| !shared.ended.load(Ordering::Relaxed));
        let most = self.0.settings.max_streams;
        let found = slot.shared.iter().find(|shared| {
            shared.streams.load(Ordering::Relaxed) < most.min(shared.send.current_max_send_streams())
        })?;
        found.streams.fetch_add(1, Ordering::Relaxed);
        Some(found.clone())
    }

    /// Makes a connection, or waits for one that another request makes; with a stream on it taken.
    async fn share(&self, target: &Arc<Target>) -> Result<Shared, PoolError> {
        let seat = self.0.seat(target)?;
        let making = self.0.slots().get(target).map(|slot| Arc::clone(&slot.making)).unwrap_or_default();
        let _turn = making.lock().await;
        if let Some(shared) = self.with_room(target) {
            return Ok(shared);
        }
        let io = self.connect(target).await?;
        let settings = &self.0.settings;
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
            .enable_push(false)
            .max_concurrent_reset_streams(256);
        let begun = timeout(settings.connect_timeout, builder.handshake(io)).await;
        let (send, connection) = begun.map_err(|_| PoolError::Timeout(settings.connect_timeout))??;
        let shared = Shared { send, streams: Arc::new(AtomicUsize::new(1)), ended: Arc::default() };
        if let Some(slot) = self.0.slots().get_mut(target) {
            slot.shared.push(shared.clone());
        }
        let ended = Arc::clone(&shared.ended);
        let pool = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "an upstream connection of HTTP/2 ended");
            }
            ended.store(true, Ordering::Relaxed);
            if let Some(pool) = pool.upgrade()
                && let Some(slot) = pool.slots().get_mut(&seat.target)
            {
                slot.shared.retain(|shared| !shared.ended.load(Ordering::Relaxed));
            }
            drop(seat);
        });
        Ok(shared)
    }
}
