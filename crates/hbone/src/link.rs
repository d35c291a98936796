//! One connection of a pool: the HTTP/2 client and the task that drives it.
//!
//! ```text
//!   usable ── retire (key, GOAWAY, idle) ──▶ retired: open streams finish ──▶ ended
//!      └────────── abort, dead peer, transport error ───────────────────────▶ ended
//! ```

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::SendStream;
use h2::client::{Connection, ResponseFuture, SendRequest};
use net::Io;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep};

use crate::control::{Control, Order};
use crate::counters::PoolCounters;
use crate::flood::{Flood, FrameWatch};
use crate::keepalive::Keepalive;
use crate::memory::Memory;
use crate::settings::{PoolSettings, RESET_MEMORY, SMALL_FRAMES, Transport};
use crate::tunnel::Owner;
use crate::wire::Wire;

/// For the last frames of a connection that has no streams any more.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What opens streams on a connection. The driver holds the connection itself.
pub(crate) struct Link<P> {
    /// `None` once no new stream may be opened; then `h2` ends the connection after its last stream.
    requests: Mutex<Option<SendRequest<Bytes>>>,
    pub(crate) peer: P,
    open: AtomicUsize,
    opened: AtomicU64,
    bytes: AtomicU64,
    control: Control,
    memory: (Memory, u32),
    /// Told whenever a stream ends.
    freed: Arc<Notify>,
    counters: Arc<PoolCounters>,
}

impl<P> Link<P> {
    /// Whether new streams may be opened.
    pub(crate) fn is_usable(&self) -> bool {
        self.requests().is_some()
    }

    /// Streams that are open or about to be.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    /// All bytes of tunnels so far, both ways.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether a stream was ever opened.
    pub(crate) fn was_used(&self) -> bool {
        self.opened.load(Ordering::Relaxed) > 0
    }

    /// Streams that the peer and `most` allow.
    pub(crate) fn limit(&self, most: usize) -> usize {
        self.requests().as_ref().map_or(0, |requests| requests.current_max_send_streams().min(most))
    }

    /// Counts a stream that is about to be opened; its [`crate::tunnel::Ticket`] counts it down. Returns whether the
    /// connection had been used before.
    pub(crate) fn reserve(&self) -> bool {
        self.open.fetch_add(1, Ordering::AcqRel);
        self.counters.streams_now.up();
        self.opened.fetch_add(1, Ordering::Relaxed) > 0
    }

    /// Sends a request's headers; what `h2` says if no stream can be opened any more.
    pub(crate) fn send(
        &self,
        request: http::Request<()>,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), Option<h2::Error>> {
        let mut requests = self.requests().clone().ok_or(None)?;
        requests.send_request(request, false).map_err(Some)
    }

    /// Opens no more streams; those that are open may finish. Returns whether it was usable until now.
    pub(crate) fn retire(&self) -> bool {
        let retired = self.requests().take().is_some();
        // The driver, which itself retires the link at each look at it, must not wake itself for ever.
        if retired {
            self.control.wake();
        }
        retired
    }

    /// Ends the connection with all its streams.
    pub(crate) fn abort(&self) {
        self.requests().take();
        self.control.abort();
    }

    fn requests(&self) -> std::sync::MutexGuard<'_, Option<SendRequest<Bytes>>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<P: Send + Sync> Owner for Link<P> {
    fn ended(&self) {
        self.counters.streams_now.down();
        if self.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            // The driver notes since when the connection is idle.
            self.control.wake();
        }
        self.freed.notify_one();
    }

    fn carried(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn memory(&self) -> (Memory, u32) {
        self.memory
    }
}

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("finished")]
    Finished,
    #[error("aborted")]
    Aborted,
    #[error("the peer did not answer a ping")]
    PingTimeout,
    #[error("the peer sent {0}")]
    Flood(Flood),
    #[error("the connection failed: {0}")]
    Io(io::Error),
    #[error("{0}")]
    Failed(h2::Error),
}

/// Begins HTTP/2 on a secured connection. Returns at once: requests may be sent before the peer's SETTINGS come.
pub(crate) async fn begin<T: Io, P>(
    io: T,
    peer: P,
    settings: &PoolSettings,
    freed: Arc<Notify>,
    counters: Arc<PoolCounters>,
) -> Result<(Arc<Link<P>>, Driver<T>), h2::Error> {
    let transport = &settings.transport;
    let wire = Wire::new(io, FrameWatch::of_server());
    let mut builder = h2::client::Builder::new();
    builder
        .max_frame_size(transport.frame_size())
        .initial_window_size(Transport::window(transport.stream_window))
        .initial_connection_window_size(Transport::window(transport.connection_window))
        .data_frame_budget(SMALL_FRAMES)
        .max_send_buffer_size(transport.send_buffer)
        .max_header_list_size(transport.header_list)
        .max_concurrent_reset_streams(1024)
        .reset_stream_duration(RESET_MEMORY)
        .max_local_error_reset_streams(None)
        .enable_push(false);
    let mut handshake = pin!(builder.handshake(wire.clone()));
    let (requests, mut connection) = poll_fn(|cx| handshake.as_mut().poll(cx)).await?;
    let control = Control::default();
    let keepalive = connection.ping_pong().map(|ping| Keepalive::new(ping, transport));
    let link = Arc::new(Link {
        requests: Mutex::new(Some(requests)),
        peer,
        open: AtomicUsize::new(0),
        opened: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
        control: control.clone(),
        memory: transport.memory(settings.max_streams),
        freed,
        counters,
    });
    let timer = Box::pin(sleep(settings.idle_timeout));
    let idle_timeout = settings.idle_timeout;
    let driver =
        Driver { connection, wire, keepalive, control, timer, idle_timeout, idle_since: None, over: false };
    Ok((link, driver))
}

/// Drives the connection of a [`Link`].
pub(crate) struct Driver<T: Io> {
    connection: Connection<Wire<T>, Bytes>,
    wire: Wire<T>,
    keepalive: Option<Keepalive>,
    control: Control,
    timer: Pin<Box<Sleep>>,
    idle_timeout: Duration,
    idle_since: Option<Instant>,
    /// No streams and no new ones: only the last frames are left to send.
    over: bool,
}

impl<T: Io> Driver<T> {
    /// Runs the connection until it ends. `on_idle` is called when it had no streams for `idle_timeout`; it retires
    /// the link unless a stream was opened meanwhile.
    pub(crate) async fn run<P>(mut self, link: &Link<P>, on_idle: impl Fn() -> bool) -> Ended {
        poll_fn(|cx| self.poll(cx, link, &on_idle)).await
    }

    fn poll<P>(&mut self, cx: &mut Context<'_>, link: &Link<P>, on_idle: &impl Fn() -> bool) -> Poll<Ended> {
        loop {
            if self.control.poll_order(cx) == Order::Abort {
                return Poll::Ready(Ended::Aborted);
            }
            let polled = Pin::new(&mut self.connection).poll(cx);
            let seen = self.wire.seen();
            // First: a peer that goes away may end the connection in the same breath.
            if seen.goaway && link.retire() {
                link.counters.going_away.up();
            }
            match polled {
                Poll::Ready(Ok(())) => return Poll::Ready(Ended::Finished),
                Poll::Ready(Err(error)) => return Poll::Ready(Ended::Failed(error)),
                Poll::Pending => {}
            }
            if let Some(flood) = seen.flood {
                return Poll::Ready(Ended::Flood(flood));
            }
            if let Poll::Ready(Err(error)) = self.wire.poll_flush_now(cx) {
                return Poll::Ready(Ended::Io(error));
            }
            if let Some(keepalive) = &mut self.keepalive
                && keepalive.poll_dead(cx, seen.progress).is_ready()
            {
                return Poll::Ready(Ended::PingTimeout);
            }
            std::task::ready!(self.poll_timer(cx, link, on_idle));
            if self.over {
                return Poll::Ready(Ended::Finished);
            }
            self.over = true;
            self.timer.as_mut().reset(Instant::now() + LAST_WORDS);
        }
    }

    /// Ready when the connection is over: idle for long and retired for it, or over before and out of time.
    fn poll_timer<P>(
        &mut self,
        cx: &mut Context<'_>,
        link: &Link<P>,
        on_idle: &impl Fn() -> bool,
    ) -> Poll<()> {
        if !self.over {
            match (link.open() == 0, self.idle_since) {
                (true, None) => {
                    let now = Instant::now();
                    self.idle_since = Some(now);
                    self.timer.as_mut().reset(now + self.idle_timeout);
                }
                (false, Some(_)) => self.idle_since = None,
                _ => {}
            }
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            if self.over || (self.idle_since.is_some() && on_idle()) {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(Instant::now() + self.idle_timeout);
        }
        Poll::Pending
    }
}
