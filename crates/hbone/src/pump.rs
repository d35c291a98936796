//! Copies between an application's connection and a tunnel until both directions have ended.
//!
//! ```text
//!   application ── read ──▶ DATA ──▶ tunnel        end of stream ──▶ END_STREAM
//!   application ◀─ write ── DATA ◀── tunnel        END_STREAM    ──▶ shutdown(SHUT_WR)
//!                                                  a reset of one side ──▶ a reset of the other
//! ```
//!
//! A reset that follows the peer's END_STREAM takes back nothing of what came before it (RFC 9113 section 8.1): that is
//! delivered first. With NO_ERROR the peer only says that it reads no more, and the connection ends in good order.
//!
//! An idle pump holds no buffer: reads go into a slab that all pumps of a thread share, and only what was read is
//! kept. A side that doesn't take data stops the other: nothing is read from the application while the tunnel's window
//! is used up, and the tunnel's window is opened only for what the application has taken. What waits on either side is
//! counted in the connection's [`crate::Memory`]: a tunnel that holds too much for too long is cut when that is short.

use std::borrow::Borrow;
use std::cell::RefCell;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use net::Io;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::io::poll_read_buf;

use crate::backlog::{Backlog, PIECES};
use crate::settings::FRAME_SIZE;
use crate::tunnel::{ErrorCode, Tunnel, TunnelError};

/// The most that is read from the application at once: whole frames.
const READ: usize = 2 * FRAME_SIZE as usize;
/// What pumps of one thread read into. Read data stays in it until it is sent.
const SLAB: usize = 256 * 1024;
/// Less than this is copied out of the slab, so that little data on a slow tunnel can't keep a slab alive.
const COPY: usize = 4 * 1024;
/// And less than this, once it has to wait for the tunnel.
const COPY_WAITING: usize = 64 * 1024;
/// How often it is looked whether an application has got the last bytes of a tunnel that is gone: at first, and at last.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// What one poll takes from the tunnel, or reads from the application, before others get their turn.
const TURN: usize = 1 << 20;

thread_local! {
    static SLAB_OF_THREAD: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// An application's connection.
pub trait AppIo: Io {
    /// Makes the close that follows a reset, where the transport has one.
    fn abort(&mut self);

    /// Bytes that were written and that a reset, or a close before all was read, would take back.
    fn undelivered(&self) -> usize {
        0
    }

    /// Whether the close says in good order that nothing more comes, once the application has ended and all of it was read.
    fn ends_by_close(&self) -> bool {
        false
    }
}

impl AppIo for TcpStream {
    fn abort(&mut self) {
        let _ = self.set_zero_linger();
    }

    fn undelivered(&self) -> usize {
        net::unacknowledged(self).unwrap_or(0)
    }

    fn ends_by_close(&self) -> bool {
        true
    }
}

impl AppIo for tokio::io::DuplexStream {
    fn abort(&mut self) {}
}

impl AppIo for Tunnel {
    fn abort(&mut self) {
        self.reset(ErrorCode::CONNECT_ERROR);
    }
}

/// Bytes that went each way, counted as they go.
#[derive(Debug, Default)]
pub struct Traffic {
    to_tunnel: AtomicU64,
    from_tunnel: AtomicU64,
}

impl Traffic {
    /// Bytes read from the application and handed to the tunnel.
    #[must_use]
    pub fn to_tunnel(&self) -> u64 {
        self.to_tunnel.load(Ordering::Relaxed)
    }

    /// Bytes received from the tunnel and written to the application.
    #[must_use]
    pub fn from_tunnel(&self) -> u64 {
        self.from_tunnel.load(Ordering::Relaxed)
    }

    /// Counts what was read from the application and sent ahead, before the tunnel was open.
    pub fn count_early(&self, bytes: u64) {
        self.to_tunnel.fetch_add(bytes, Ordering::Relaxed);
    }

    fn total(&self) -> u64 {
        self.to_tunnel().wrapping_add(self.from_tunnel())
    }
}

/// Limits of one pump.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PumpLimits {
    /// Reset both sides when no byte went either way for this long; `None` for never.
    pub idle_timeout: Option<Duration>,
}

/// How a pump ended.
#[derive(Debug, thiserror::Error)]
pub enum Outcome {
    /// Both directions ended in good order; who ended first is told.
    #[error("finished, {0} first")]
    Finished(Side),
    /// The tunnel failed; the application's connection was reset.
    #[error("the tunnel failed: {0}")]
    Tunnel(#[source] TunnelError),
    /// The application's connection failed; the tunnel was reset.
    #[error("the application's connection failed: {0}")]
    App(#[source] io::Error),
    /// Nothing went either way for as long as allowed; both sides were reset.
    #[error("idle for too long")]
    Idle,
}

impl Outcome {
    /// Whether all bytes were delivered.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self, Self::Finished(_))
    }
}

/// A side of a pump.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The application.
    App,
    /// The tunnel.
    Tunnel,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::App => "the application",
            Self::Tunnel => "the tunnel",
        })
    }
}

/// Copies both ways until both have ended, and closes the application's connection. Dropping the future before that resets
/// both sides.
pub fn pump<A: AppIo, T: Borrow<Traffic> + Send + Unpin>(
    tunnel: Tunnel,
    app: A,
    traffic: T,
    limits: PumpLimits,
) -> impl Future<Output = Outcome> + Send {
    let idle = limits.idle_timeout.map(|timeout| {
        let seen = traffic.borrow().total();
        Box::new(Idle { timer: Box::pin(sleep(timeout)), timeout, seen })
    });
    Pump {
        tunnel,
        app,
        traffic,
        up: Up::default(),
        down: Down::default(),
        first_end: None,
        gone: None,
        idle,
        ended: false,
    }
}

struct Pump<A: AppIo, T> {
    tunnel: Tunnel,
    app: A,
    traffic: T,
    up: Up,
    down: Down,
    first_end: Option<Side>,
    /// The tunnel takes nothing more, whatever the application sends.
    gone: Option<Box<Gone>>,
    idle: Option<Box<Idle>>,
    ended: bool,
}

/// From the application to the tunnel.
#[derive(Default)]
struct Up {
    /// Read and not sent yet, for want of window.
    pending: Bytes,
    /// Sent in this turn, which is no more than [`TURN`] and [`READ`].
    sent: u32,
    /// `pending` is a copy already.
    copied: bool,
    done: bool,
}

/// From the tunnel to the application.
#[derive(Default)]
struct Down {
    /// Received and not yet taken by the application. The tunnel's window bounds it.
    backlog: Backlog,
    /// Taken by the application in this turn, which is no more than a window.
    taken: u32,
    unflushed: bool,
    /// The tunnel had nothing more when it was last asked.
    dry: bool,
    /// The tunnel has ended; what is queued is the last.
    last: bool,
    done: bool,
}

/// A tunnel that was reset, or whose connection has ended, with what it brought still to be delivered.
struct Gone {
    why: TunnelError,
    timer: Pin<Box<Sleep>>,
    pause: Duration,
}

struct Idle {
    timer: Pin<Box<Sleep>>,
    timeout: Duration,
    seen: u64,
}

enum Failure {
    Tunnel(TunnelError),
    App(io::Error),
}

// A future of its own and no async function: one of these lives as long as each tunnel, and an async function would
// hold its arguments twice.
impl<A: AppIo, T: Borrow<Traffic> + Unpin> Future for Pump<A, T> {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let pump = self.get_mut();
        let outcome = match pump.poll_both(cx) {
            Ok(Poll::Ready(())) => Outcome::Finished(pump.first_end.unwrap_or(Side::App)),
            Ok(Poll::Pending) => {
                ready!(pump.poll_idle(cx));
                Outcome::Idle
            }
            Err(Failure::Tunnel(error)) => Outcome::Tunnel(error),
            Err(Failure::App(error)) => Outcome::App(error),
        };
        pump.end(outcome.is_finished());
        Poll::Ready(outcome)
    }
}

impl<A: AppIo, T: Borrow<Traffic>> Pump<A, T> {
    fn poll_both(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Failure> {
        let up = self.poll_up(cx)?;
        let down = self.poll_down(cx)?;
        self.settle(cx)?;
        match (up, down) {
            (Poll::Ready(()), Poll::Ready(())) => Ok(Poll::Ready(())),
            (Poll::Pending, Poll::Ready(())) => self.poll_gone(cx),
            // What the tunnel brought before it failed is told by its receiving side, and that comes to an end of its
            // own, unless nothing was lost there.
            (_, Poll::Pending) => match &self.gone {
                Some(gone) if self.down.dry && !self.down.last => Err(Failure::Tunnel(gone.why.clone())),
                _ => Ok(Poll::Pending),
            },
        }
    }

    /// Counts what waits on either side, and lets the peer send more for what was delivered.
    fn settle(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        let (taken, sent) = (std::mem::take(&mut self.down.taken), std::mem::take(&mut self.up.sent));
        let waiting = self.down.backlog.len() + self.up.pending.len();
        self.tunnel.settle(cx, waiting, taken, sent).map_err(Failure::Tunnel)
    }

    /// Once the peer has finished sending and the application has all of it, only this tells that the peer is gone.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Failure> {
        if self.gone.is_none() {
            let Poll::Ready(why) = self.tunnel.poll_reset(cx) else { return Ok(Poll::Pending) };
            self.tunnel_gone(why);
        }
        let Some(gone) = &mut self.gone else { return Ok(Poll::Pending) };
        while self.app.undelivered() > 0 {
            if gone.timer.as_mut().poll(cx).is_pending() {
                return Ok(Poll::Pending);
            }
            gone.timer.as_mut().reset(Instant::now() + gone.pause);
            gone.pause = LOOK_AGAIN.1.min(gone.pause * 2);
        }
        match &gone.why {
            TunnelError::Reset(ErrorCode::NO_ERROR) => Ok(Poll::Ready(())),
            why => Err(Failure::Tunnel(why.clone())),
        }
    }

    fn tunnel_gone(&mut self, why: TunnelError) {
        let timer = Box::pin(sleep(LOOK_AGAIN.0));
        self.gone.get_or_insert_with(|| Box::new(Gone { why, timer, pause: LOOK_AGAIN.0 }));
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Failure> {
        let mut budget = TURN;
        while !self.up.done && self.gone.is_none() {
            if !self.poll_send(cx) {
                return Ok(Poll::Pending);
            }
            if budget == 0 {
                cx.waker().wake_by_ref();
                return Ok(Poll::Pending);
            }
            let Poll::Ready(read) = read_at_most(&mut self.app, cx, READ) else { return Ok(Poll::Pending) };
            let data = read.map_err(Failure::App)?;
            if data.is_empty() {
                if let Err(error) = self.tunnel.finish() {
                    self.send_failed(cx, error);
                    return Ok(Poll::Pending);
                }
                self.up.done = true;
                self.first_end.get_or_insert(Side::App);
            }
            budget = budget.saturating_sub(data.len());
            self.up.pending = data;
            self.up.copied = false;
        }
        Ok(if self.up.done { Poll::Ready(()) } else { Poll::Pending })
    }

    /// Sends what was read. Whether all of it went.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> bool {
        while !self.up.pending.is_empty() {
            let wanted = self.up.pending.len();
            let Poll::Ready(capacity) = self.tunnel.poll_capacity(cx, wanted) else {
                self.up.wait();
                return false;
            };
            let sent = capacity.and_then(|capacity| {
                let part = self.up.pending.split_to(capacity.min(wanted));
                self.traffic.borrow().to_tunnel.fetch_add(part.len() as u64, Ordering::Relaxed);
                self.tunnel.send(part)
            });
            if let Err(error) = sent {
                self.send_failed(cx, error);
                return false;
            }
        }
        true
    }

    /// The tunnel takes nothing more. If it was reset, that says more than what `h2` calls the error.
    fn send_failed(&mut self, cx: &mut Context<'_>, error: TunnelError) {
        self.up.pending = Bytes::new();
        let why = match self.tunnel.poll_reset(cx) {
            Poll::Ready(why) => why,
            Poll::Pending => error,
        };
        self.tunnel_gone(why);
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Failure> {
        let mut budget = TURN;
        while !self.down.done {
            budget = budget.saturating_sub(self.receive(cx, budget)?);
            if self.down.backlog.is_empty() {
                if self.down.unflushed {
                    let Poll::Ready(flushed) = Pin::new(&mut self.app).poll_flush(cx) else {
                        return Ok(Poll::Pending);
                    };
                    flushed.map_err(Failure::App)?;
                    self.down.unflushed = false;
                }
                if self.down.last {
                    // Where this is the end of both directions, the close that follows says it, too.
                    if !(self.up.done && self.app.ends_by_close()) {
                        let Poll::Ready(shut) = Pin::new(&mut self.app).poll_shutdown(cx) else {
                            return Ok(Poll::Pending);
                        };
                        // The application may be gone already, with all that was for it.
                        shut.or_else(ignore_not_connected).map_err(Failure::App)?;
                    }
                    self.first_end.get_or_insert(Side::Tunnel);
                    self.down.done = true;
                    break;
                }
                if budget == 0 {
                    cx.waker().wake_by_ref();
                }
                return Ok(Poll::Pending);
            }
            let Poll::Ready(written) = self.down.poll_write(&mut self.app, cx) else {
                self.down.backlog.wait();
                if budget == 0 {
                    // There may be more in the tunnel, its end or its failure too.
                    cx.waker().wake_by_ref();
                }
                return Ok(Poll::Pending);
            };
            let written = written.map_err(Failure::App)?;
            self.traffic.borrow().from_tunnel.fetch_add(written as u64, Ordering::Relaxed);
            self.down.taken = self.down.taken.saturating_add(u32::try_from(written).unwrap_or(u32::MAX));
        }
        Ok(Poll::Ready(()))
    }

    /// Takes up to `budget` bytes from the tunnel into the queue.
    fn receive(&mut self, cx: &mut Context<'_>, budget: usize) -> Result<usize, Failure> {
        let mut received = 0;
        self.down.dry = false;
        while !self.down.last && received < budget {
            match self.tunnel.poll_data(cx) {
                Poll::Pending => {
                    self.down.dry = true;
                    break;
                }
                Poll::Ready(Some(Ok(data))) => {
                    received += data.len();
                    self.down.backlog.push(data);
                }
                // What was received before the tunnel failed is lost with it, as it is when TCP resets.
                Poll::Ready(Some(Err(error))) => return Err(Failure::Tunnel(error)),
                Poll::Ready(None) => self.down.last = true,
            }
        }
        Ok(received)
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(idle) = &mut self.idle else { return Poll::Pending };
        while idle.timer.as_mut().poll(cx).is_ready() {
            let total = self.traffic.borrow().total();
            if total == idle.seen {
                return Poll::Ready(());
            }
            idle.seen = total;
            idle.timer.as_mut().reset(Instant::now() + idle.timeout);
        }
        Poll::Pending
    }
}

impl<A: AppIo, T> Pump<A, T> {
    /// Ends both sides once. A tunnel that has finished is left alone: its last bytes may still be on their way.
    fn end(&mut self, finished: bool) {
        if !self.ended && !finished {
            self.tunnel.reset(ErrorCode::CONNECT_ERROR);
            self.app.abort();
        }
        self.ended = true;
    }
}

impl<A: AppIo, T> Drop for Pump<A, T> {
    fn drop(&mut self) {
        self.end(false);
    }
}

impl Up {
    /// What must wait no longer keeps the slab that it was read into.
    fn wait(&mut self) {
        if !self.copied && self.pending.len() < COPY_WAITING {
            self.pending = Bytes::copy_from_slice(&self.pending);
            self.copied = true;
        }
    }
}

impl Down {
    fn poll_write<A: AppIo>(&mut self, app: &mut A, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut pieces = [IoSlice::new(&[]); PIECES];
        let used = self.backlog.slices(&mut pieces);
        let written = match pieces.get(..used).unwrap_or_default() {
            [one] => ready!(Pin::new(app).poll_write(cx, one))?,
            many => ready!(Pin::new(app).poll_write_vectored(cx, many))?,
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.unflushed = true;
        self.backlog.advance(written);
        Poll::Ready(Ok(written))
    }
}

fn ignore_not_connected(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) }
}

/// Reads what is there, up to `most` bytes; empty at the end of the stream.
pub(crate) fn read_at_most<A: AppIo + ?Sized>(
    app: &mut A,
    cx: &mut Context<'_>,
    most: usize,
) -> Poll<io::Result<Bytes>> {
    // Taken out, so that an application's stream may be a pump's end itself.
    let mut slab = SLAB_OF_THREAD.take();
    if slab.capacity() < READ {
        slab.reserve(SLAB);
    }
    let result = poll_read_buf(Pin::new(app), cx, &mut (&mut slab).limit(most)).map_ok(|length| {
        if length < COPY {
            let copy = Bytes::copy_from_slice(&slab);
            slab.clear();
            copy
        } else {
            slab.split_to(length).freeze()
        }
    });
    SLAB_OF_THREAD.set(slab);
    result
}
