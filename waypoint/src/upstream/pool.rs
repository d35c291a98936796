//! A thread's connections to endpoints. HTTP/1.1 connections that are idle wait here, the one used last first; those of
//! HTTP/2 are shared by the requests on them.
//!
//! Invariants:
//! * an idle connection that its peer has ended is seen before it is used;
//! * connections to one endpoint are limited, and so are the streams of each; what is beyond is refused;
//! * where the destination has a limit of its own ([`Circuit`]), requests wait for a connection of this thread to become
//!   free, as many as may; who waits limits the time;
//! * a slot is there only while it has connections, or requests that wait.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use std::{fmt, io};

use bytes::Bytes;
use h2::client::SendRequest;
use hashbrown::HashMap;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use crate::http::channel::{Channel, Stream};
use crate::http::decide::{Carrier, Protocol, Target};
use crate::http::h1::Framing;
use crate::http::h2_heads;
use crate::http::head::{MAX_HEAD, RequestHead};
use crate::http::io::{Buffers, Io};
use crate::http::stats::Stats;
use crate::http::wire::Wire;
use crate::upstream::circuit::{Circuit, Entered};
use crate::upstream::dial::tcp;
use crate::upstream::offer::{Offer, Unknown};

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
    /// As many requests wait as may.
    #[error("as many requests wait for a connection as may")]
    Pending,
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
    /// The server of HTTP/2 takes no WebSocket (RFC 8441).
    #[error("the server takes no WebSocket by HTTP/2")]
    NoSwitch,
}

thread_local! {
    static HERE: RefCell<Weak<Inner>> = const { RefCell::new(Weak::new()) };
}

/// The pool of this thread, the one that was made last; `None` on a thread without one.
#[must_use]
pub fn here() -> Option<Pool> {
    HERE.with_borrow(Weak::upgrade).map(Pool)
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
    /// Requests that wait for one of them.
    waiting: usize,
    /// Told when one is free.
    freed: Arc<Notify>,
    idle: Vec<Idle>,
    shared: Vec<Shared>,
    /// Held by whoever makes a connection of HTTP/2, so that others wait for it.
    making: Arc<tokio::sync::Mutex<()>>,
}

impl Slot {
    fn is_unused(&self) -> bool {
        self.open == 0 && self.waiting == 0
    }
}

struct Idle {
    wire: Wire,
    since: Instant,
    age: Age,
    seat: Seat,
}

/// What a connection has behind it.
#[derive(Clone, Copy)]
struct Age {
    made: Instant,
    requests: u32,
}

impl Age {
    fn new() -> Self {
        Self { made: Instant::now(), requests: 1 }
    }

    /// Whether it carries another request.
    fn may_go_on(self, circuit: Option<&Arc<Circuit>>) -> bool {
        let Some(pool) = circuit.map(|circuit| circuit.settings()) else { return true };
        let most = pool.max_requests_per_connection.filter(|most| *most > 0);
        most.is_none_or(|most| self.requests < most)
            && pool.max_connection_duration.is_none_or(|most| self.made.elapsed() < most)
    }
}

fn idle_timeout(target: &Target, default: Duration) -> Duration {
    let circuit = target.circuit.as_ref();
    circuit.and_then(|circuit| circuit.settings().idle_timeout).unwrap_or(default)
}

/// A connection of HTTP/2.
#[derive(Clone)]
struct Shared {
    send: SendRequest<Bytes>,
    streams: Arc<Streams>,
    ended: Arc<AtomicBool>,
}

/// What is counted of a connection of HTTP/2.
struct Streams {
    now: AtomicUsize,
    opened: AtomicU64,
    made: Instant,
    /// When the last one ended, in milliseconds from then.
    idle_since: AtomicU64,
    /// The slot's.
    freed: Arc<Notify>,
    offer: Offer,
}

impl Streams {
    /// With one.
    fn new(freed: Arc<Notify>, offer: Offer) -> Arc<Self> {
        let (now, opened) = (AtomicUsize::new(1), AtomicU64::new(1));
        Arc::new(Self { now, opened, made: Instant::now(), idle_since: AtomicU64::new(0), freed, offer })
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn is_idle_for(&self, limit: Duration) -> bool {
        let idle = self.millis().saturating_sub(self.idle_since.load(Ordering::Relaxed));
        self.now.load(Ordering::Relaxed) == 0 && u128::from(idle) >= limit.as_millis()
    }

    fn age(&self) -> Age {
        let requests = u32::try_from(self.opened.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        Age { made: self.made, requests }
    }
}

/// A place among an endpoint's connections, free again when dropped.
struct Seat {
    pool: Weak<Inner>,
    target: Arc<Target>,
    entered: Option<Entered>,
}

/// A request that waits at a slot.
struct Waiting<'a> {
    pool: &'a Inner,
    target: &'a Arc<Target>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut slots = self.pool.slots();
        let Some(slot) = slots.get_mut(self.target) else { return };
        slot.waiting -= 1;
        if slot.is_unused() {
            slots.remove(self.target);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // Before somebody who waits looks whether there is room.
        self.entered = None;
        let Some(pool) = self.pool.upgrade() else { return };
        pool.stats.upstream_connections_now.dec();
        let mut slots = pool.slots();
        if let Some(slot) = slots.get_mut(&self.target) {
            slot.open -= 1;
            slot.freed.notify_one();
            if slot.is_unused() {
                slots.remove(&self.target);
            }
        }
    }
}

/// What keeps a [`Lease`]'s connection counted.
enum Hold {
    Seat(Seat),
    Stream { streams: Arc<Streams> },
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Self::Stream { streams } = self {
            streams.idle_since.store(streams.millis(), Ordering::Relaxed);
            streams.now.fetch_sub(1, Ordering::Relaxed);
            streams.freed.notify_one();
        }
    }
}

/// A way to an endpoint, for one request.
pub struct Lease {
    /// The connection or stream.
    pub channel: Channel,
    /// Whether the connection has carried requests before.
    pub reused: bool,
    /// Whether it is a stream on which the server was asked for WebSocket.
    pub switches: bool,
    age: Age,
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

    /// Takes a place; `None` where the destination has as many connections as it may, and this thread has one of them to
    /// wait for.
    fn seat(self: &Arc<Self>, target: &Arc<Target>) -> Result<Option<Seat>, PoolError> {
        let mut slots = self.slots();
        let slot = slots.entry(Arc::clone(target)).or_default();
        if slot.open >= self.settings.max_connections {
            self.stats.pool_overflows.inc();
            return Err(PoolError::Overflow(slot.open));
        }
        let entered = match &target.circuit {
            Some(circuit) => match circuit.connection(slot.open == 0) {
                Some(entered) => Some(entered),
                None => return Ok(None),
            },
            None => None,
        };
        slot.open += 1;
        self.stats.upstream_connections.inc();
        self.stats.upstream_connections_now.inc();
        Ok(Some(Seat { pool: Arc::downgrade(self), target: Arc::clone(target), entered }))
    }

    /// Drops what has been idle for too long or has ended.
    fn sweep(&self) {
        let mut gone = Vec::new();
        for (target, slot) in self.slots().iter_mut() {
            let limit = idle_timeout(target, self.settings.idle_timeout);
            let circuit = target.circuit.as_ref();
            let stale = |idle: &mut Idle| {
                idle.since.elapsed() >= limit || !idle.age.may_go_on(circuit) || !idle.wire.is_quiet()
            };
            gone.extend(slot.idle.extract_if(.., stale));
            // One that nobody holds ends when its streams have.
            slot.shared.retain(|shared| {
                !shared.streams.is_idle_for(limit) && shared.streams.age().may_go_on(circuit)
            });
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
        HERE.with_borrow_mut(|here| here.clone_from(&weak));
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
            let limit = idle_timeout(target, self.0.settings.idle_timeout);
            loop {
                let Some(mut last) = idle.pop() else { break None };
                let goes_on = last.since.elapsed() < limit && last.age.may_go_on(target.circuit.as_ref());
                if goes_on && last.wire.is_quiet() {
                    break Some(last);
                }
                gone.push(last);
            }
        };
        drop(gone);
        let Idle { wire, seat, mut age, .. } = found?;
        age.requests = age.requests.saturating_add(1);
        let channel = Channel::H1(wire);
        Some(Lease { channel, reused: true, switches: false, age, hold: Hold::Seat(seat) })
    }

    /// Keeps a connection of HTTP/1.1 on which nothing is under way.
    pub fn put(&self, lease: Lease) {
        let Lease { channel: Channel::H1(wire), mut hold, age, .. } = lease else { return };
        // An endpoint that has answered may not have read all of the request: the next head would get into its body.
        if wire.held() > 0 {
            return;
        }
        let Hold::Seat(seat) = &mut hold else { return };
        if !age.may_go_on(seat.target.circuit.as_ref()) {
            return;
        }
        let nobody = Seat { pool: Weak::new(), target: Arc::clone(&seat.target), entered: None };
        let seat = std::mem::replace(seat, nobody);
        let mut slots = self.0.slots();
        let target = Arc::clone(&seat.target);
        let idle = Idle { wire, since: Instant::now(), age, seat };
        let Some(slot) = slots.get_mut(&target) else { return };
        if slot.idle.len() < self.0.settings.max_idle {
            slot.idle.push(idle);
            slot.freed.notify_one();
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
            let message = h2_heads::to_request(request, framing).ok_or(PoolError::Unsendable)?;
            return self.stream(target, message, framing == Framing::None).await;
        }
        if !fresh && let Some(lease) = self.idle(target) {
            return Ok(lease);
        }
        let _pending = pending(target)?;
        let seat = loop {
            if let Some(seat) = self.0.seat(target)? {
                break seat;
            }
            self.freed(target).await;
            if let Some(lease) = self.idle(target) {
                return Ok(lease);
            }
        };
        let io = self.connect(target).await?;
        let channel = Channel::H1(Wire::new(io, &self.0.buffers));
        Ok(Lease { channel, reused: false, switches: false, age: Age::new(), hold: Hold::Seat(seat) })
    }

    /// A stream of HTTP/2 to `target`, on which it is asked for WebSocket by `request`, in the form of HTTP/1.1's.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub async fn websocket(&self, target: &Arc<Target>, request: &RequestHead) -> Result<Lease, PoolError> {
        let message = h2_heads::to_switch(request).ok_or(PoolError::Unsendable)?;
        self.stream(target, message, false).await
    }

    /// Waits until a connection to `target` is idle or has ended.
    async fn freed(&self, target: &Arc<Target>) {
        let freed = {
            let mut slots = self.0.slots();
            let Some(slot) = slots.get_mut(target).filter(|slot| slot.open > 0) else { return };
            slot.waiting += 1;
            Arc::clone(&slot.freed)
        };
        let _waiting = Waiting { pool: &self.0, target };
        freed.notified().await;
    }

    async fn connect(&self, target: &Target) -> Result<Io, PoolError> {
        let settings = target.circuit.as_ref().map(|circuit| circuit.settings());
        let limit = self.connect_timeout(target);
        let connected = async {
            match &target.carrier {
                Carrier::Tcp => {
                    tcp(target.address, settings.and_then(|settings| settings.keepalive)).await.map(Io::Tcp)
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

    fn connect_timeout(&self, target: &Target) -> Duration {
        let own = target.circuit.as_ref().and_then(|circuit| circuit.settings().connect_timeout);
        own.unwrap_or(self.0.settings.connect_timeout)
    }

    /// A stream on a connection of HTTP/2, which is made if there is none with room.
    async fn stream(
        &self,
        target: &Arc<Target>,
        message: http::Request<()>,
        ends: bool,
    ) -> Result<Lease, PoolError> {
        let switches = message.method() == http::Method::CONNECT;
        loop {
            let (mut shared, reused) = match self.with_room(target) {
                Some(shared) => (shared, true),
                None => (self.share(target).await?, false),
            };
            let hold = Hold::Stream { streams: Arc::clone(&shared.streams) };
            if switches {
                let limit = self.connect_timeout(target);
                match shared.streams.offer.is_made(&shared.send, limit).await {
                    Ok(true) => {}
                    Ok(false) => return Err(PoolError::NoSwitch),
                    Err(Unknown::Silent) => return Err(PoolError::Timeout(limit)),
                    Err(Unknown::Ended) => {
                        shared.ended.store(true, Ordering::Relaxed);
                        if reused {
                            continue;
                        }
                        return Err(PoolError::Connect(io::ErrorKind::ConnectionReset.into()));
                    }
                }
            }
            let ready = std::future::poll_fn(|cx| shared.send.poll_ready(cx)).await;
            match ready.and_then(|()| shared.send.send_request(message.clone(), ends)) {
                Ok((response, send)) => {
                    let channel = Channel::H2(Stream::of_server(response, send));
                    return Ok(Lease { channel, reused, switches, age: Age::new(), hold });
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
        let circuit = target.circuit.as_ref();
        slot.shared.retain(|shared| {
            !shared.ended.load(Ordering::Relaxed) && shared.streams.age().may_go_on(circuit)
        });
        let own = circuit.and_then(|circuit| circuit.settings().max_concurrent_streams);
        let own = own.map_or(usize::MAX, |own| usize::try_from(own).unwrap_or(usize::MAX));
        let most = self.0.settings.max_streams.min(own);
        let found = slot.shared.iter().find(|shared| {
            shared.streams.now.load(Ordering::Relaxed) < most.min(shared.send.current_max_send_streams())
        })?;
        found.streams.now.fetch_add(1, Ordering::Relaxed);
        found.streams.opened.fetch_add(1, Ordering::Relaxed);
        Some(found.clone())
    }

    /// Makes a connection, or waits for one that another request makes; with a stream on it taken.
    async fn share(&self, target: &Arc<Target>) -> Result<Shared, PoolError> {
        let _pending = pending(target)?;
        // There is a slot from here on, so that all who come meanwhile wait for the one connection.
        let making = {
            let mut slots = self.0.slots();
            let slot = slots.entry(Arc::clone(target)).or_default();
            slot.waiting += 1;
            Arc::clone(&slot.making)
        };
        let _waiting = Waiting { pool: &self.0, target };
        let _turn = making.lock().await;
        if let Some(shared) = self.with_room(target) {
            return Ok(shared);
        }
        // Held by the task that drives the connection: while none has room, and there may be no more, streams wait.
        let seat = loop {
            if let Some(seat) = self.0.seat(target)? {
                break seat;
            }
            self.freed(target).await;
            if let Some(shared) = self.with_room(target) {
                return Ok(shared);
            }
        };
        let io = self.connect(target).await?;
        let settings = &self.0.settings;
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
            .enable_push(false)
            .max_concurrent_reset_streams(256);
        let limit = self.connect_timeout(target);
        let begun = timeout(limit, builder.handshake(io)).await;
        let (send, mut connection) = begun.map_err(|_| PoolError::Timeout(limit))??;
        let freed = self.0.slots().get(target).map(|slot| Arc::clone(&slot.freed)).unwrap_or_default();
        let streams = Streams::new(freed, Offer::new(connection.ping_pong()));
        let shared = Shared { send, streams, ended: Arc::default() };
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

/// A connection whose bytes are nobody's here, counted while it is there.
pub struct Opened {
    /// The connection.
    pub io: Box<dyn net::Io>,
    entered: Option<Entered>,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("counted", &self.entered.is_some()).finish_non_exhaustive()
    }
}

/// Opens a connection for bytes to `target`, within `limit` unless its destination says otherwise.
///
/// # Errors
/// It could not be opened in time, or its destination has as many as it may.
pub async fn open(target: &Target, limit: Duration) -> Result<Opened, PoolError> {
    let entered = match &target.circuit {
        Some(circuit) => {
            let overflow = || PoolError::Overflow(circuit.counts().connections as usize);
            Some(circuit.connection(false).ok_or_else(overflow)?)
        }
        None => None,
    };
    let settings = target.circuit.as_ref().map(|circuit| circuit.settings());
    let limit = settings.and_then(|settings| settings.connect_timeout).unwrap_or(limit);
    let connecting = async {
        match &target.carrier {
            Carrier::Tcp => {
                let keepalive = settings.and_then(|settings| settings.keepalive);
                tcp(target.address, keepalive).await.map(|stream| Box::new(stream) as Box<dyn net::Io>)
            }
            Carrier::Via(dial) => dial.dial(target.address).await,
        }
    };
    let io = timeout(limit, connecting).await.map_err(|_| PoolError::Timeout(limit))??;
    Ok(Opened { io, entered })
}

/// Counts a request that has to wait for a connection, or for one to be made.
fn pending(target: &Target) -> Result<Option<Entered>, PoolError> {
    match &target.circuit {
        Some(circuit) => circuit.pending().map(Some).ok_or(PoolError::Pending),
        None => Ok(None),
    }
}
