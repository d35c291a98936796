//! The server's side: CONNECT requests on one connection that is already secured.
//!
//! One task drives a connection: [`serve`]. It hands each valid request to the handler as an [`Incoming`] and
//! answers invalid ones itself. The handler must not block; it spawns what takes time.
//!
//! Invariants:
//! * no more than `max_streams` requests and tunnels of a connection are in the handler's hands, also when the peer
//!   resets streams as fast as it opens them;
//! * whatever a peer sends, its connection ends with a reason, and no other connection notices.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Method, Request, Response, StatusCode};
use net::Io;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::authority::{Authority, InvalidAuthority};
use crate::backlog::Backlog;
use crate::control::{Control, Order};
use crate::counters::ServerCounters;
use crate::flood::{Allowance, Flood, FrameWatch};
use crate::headers::TunnelHeaders;
use crate::keepalive::Keepalive;
use crate::memory::{Holding, Memory};
use crate::settings::{RESET_MEMORY, SMALL_FRAMES, ServerSettings, Transport};
use crate::tunnel::{ErrorCode, Owner, Ticket, Tunnel, TunnelError};
use crate::wire::Wire;

/// How a served connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// The peer ended it in good order, or it was idle, or drained with all streams finished.
    #[error("closed")]
    Finished,
    /// The peer did not speak HTTP/2 after the handshake of the secure channel.
    #[error("the peer did not begin HTTP/2: {0}")]
    NotHttp2(String),
    /// The peer did not send its preface in time.
    #[error("the peer did not begin HTTP/2 in time")]
    HandshakeTimeout,
    /// It was drained, and streams were still open at the deadline.
    #[error("drained; streams that had not finished in time were reset")]
    DrainDeadline,
    /// It was aborted by [`Control::abort`].
    #[error("aborted")]
    Aborted,
    /// The peer did not answer a PING.
    #[error("the peer did not answer a ping")]
    PingTimeout,
    /// The peer sent more of something than any working peer does.
    #[error("the peer sent {0}")]
    Flood(Flood),
    /// The peer broke the protocol, or ended the connection with an error.
    #[error("HTTP/2 failed: {0}")]
    Protocol(String),
    /// The transport failed.
    #[error("the connection failed: {0}")]
    Io(#[source] io::Error),
}

/// Serves one connection until it ends. `io` is the secure channel, its handshake done.
///
/// `handler` gets each valid CONNECT request. It runs in this task, so it must return at once.
pub async fn serve<T: Io, H: FnMut(Incoming)>(
    io: T,
    settings: &ServerSettings,
    control: &Control,
    counters: &Arc<ServerCounters>,
    mut handler: H,
) -> Closed {
    let wire = Wire::new(io, FrameWatch::of_client());
    let connection = match begin(&wire, settings, control).await {
        Ok(connection) => connection,
        Err(closed) => {
            counters.handshakes_failed.up();
            return closed;
        }
    };
    counters.connections.up();
    counters.connections_now.up();
    let shared = Arc::new(Shared {
        streams: AtomicUsize::new(0),
        early_resets: AtomicUsize::new(0),
        memory: settings.transport.memory(settings.max_streams as usize),
        counters: Arc::clone(counters),
    });
    let mut driver = Driver::new(connection, wire, *settings, control.clone(), shared);
    let closed = poll_fn(|cx| driver.poll(cx, &mut handler)).await;
    counters.connections_now.down();
    match closed {
        Closed::Flood(_) => counters.floods.up(),
        Closed::Protocol(_) => counters.protocol_errors.up(),
        Closed::PingTimeout => counters.ping_timeouts.up(),
        _ => {}
    }
    closed
}

/// Exchanges prefaces.
async fn begin<T: Io>(
    wire: &Wire<T>,
    settings: &ServerSettings,
    control: &Control,
) -> Result<Connection<Wire<T>, Bytes>, Closed> {
    let transport = &settings.transport;
    let mut builder = h2::server::Builder::new();
    builder
        .max_frame_size(transport.frame_size())
        .initial_window_size(Transport::window(transport.stream_window))
        .initial_connection_window_size(Transport::window(transport.connection_window))
        .data_frame_budget(SMALL_FRAMES)
        .max_send_buffer_size(transport.send_buffer)
        .max_header_list_size(transport.header_list)
        .max_concurrent_streams(settings.max_streams)
        .max_pending_accept_reset_streams(64)
        .max_concurrent_reset_streams(1024)
        .reset_stream_duration(RESET_MEMORY)
        .max_local_error_reset_streams(None);
    let mut handshake = pin!(builder.handshake(wire.clone()));
    let handshake = poll_fn(|cx| {
        if control.poll_ended(cx).is_ready() {
            return Poll::Ready(Err(Closed::Aborted));
        }
        let result = handshake.as_mut().poll(cx);
        // Our SETTINGS go out whether or not the peer has begun; if it has, with what the driver has to say.
        if result.is_pending()
            && let Poll::Ready(Err(error)) = wire.poll_flush_now(cx)
        {
            return Poll::Ready(Err(Closed::Io(error)));
        }
        result.map_err(|error| Closed::NotHttp2(error.to_string()))
    });
    timeout(settings.handshake_timeout, handshake).await.unwrap_or(Err(Closed::HandshakeTimeout))
}

/// What the connection's task and its streams share.
struct Shared {
    /// Requests and tunnels in the handler's hands.
    streams: AtomicUsize,
    /// Requests that the peer reset before they were answered, or that were too many because of such, since the driver
    /// looked last.
    early_resets: AtomicUsize,
    memory: (Memory, u32),
    counters: Arc<ServerCounters>,
}

impl Owner for Shared {
    fn ended(&self) {
        self.streams.fetch_sub(1, Ordering::AcqRel);
        self.counters.streams_now.down();
    }

    fn carried(&self, _: usize) {}

    fn memory(&self) -> (Memory, u32) {
        self.memory
    }
}

/// What the driver is about, and what its timer runs to.
///
/// ```text
///   Serving (idle deadline) ─▶ Draining (deadline of the drain) ─▶ Ending (to send the last GOAWAY)
///        │                       ▲                               ▲
///        └ idle, retired ▶ Leaving (looks again for streams) ── none ─┤
///        └────────────────────────── abort, flood ───────────────┘
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// GOAWAY is sent, because nothing went on or somebody else needs the place. A stream that was on its way by then was accepted like any other, so
    /// it may take its time.
    Leaving,
    Draining,
    Ending,
}

/// A peer that doesn't read must not keep a connection that is over.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// For a client to acknowledge that an idle connection ends, each time that it has no streams.
const IDLE_PATIENCE: Duration = Duration::from_secs(5);

enum Step {
    Again,
    Wait,
    Done(Closed),
}

/// Drives one connection.
struct Driver<T: Io> {
    connection: Connection<Wire<T>, Bytes>,
    wire: Wire<T>,
    keepalive: Option<Keepalive>,
    settings: ServerSettings,
    control: Control,
    shared: Arc<Shared>,
    early_resets: Allowance,
    phase: Phase,
    timer: Pin<Box<Sleep>>,
    /// Since when there are no streams.
    idle_since: Option<Instant>,
    /// Why we end the connection; it stands over what `h2` says at the end.
    verdict: Option<Closed>,
    /// Nothing was sent yet.
    silent: bool,
}

impl<T: Io> Driver<T> {
    fn new(
        mut connection: Connection<Wire<T>, Bytes>,
        wire: Wire<T>,
        settings: ServerSettings,
        control: Control,
        shared: Arc<Shared>,
    ) -> Self {
        let keepalive = connection.ping_pong().map(|ping| Keepalive::new(ping, &settings.transport));
        let (burst, per_second) = settings.early_resets;
        Self {
            connection,
            wire,
            keepalive,
            settings,
            control,
            shared,
            early_resets: Allowance::new(burst, per_second),
            phase: Phase::Serving,
            timer: Box::pin(sleep(settings.idle_timeout)),
            idle_since: None,
            verdict: None,
            silent: true,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, handler: &mut impl FnMut(Incoming)) -> Poll<Closed> {
        loop {
            match self.step(cx, handler) {
                Step::Again => {}
                Step::Wait => return Poll::Pending,
                Step::Done(closed) => return Poll::Ready(self.verdict.take().unwrap_or(closed)),
            }
        }
    }

    fn step(&mut self, cx: &mut Context<'_>, handler: &mut impl FnMut(Incoming)) -> Step {
        self.obey(cx);
        let mut accepted = false;
        loop {
            match self.connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    self.accept(request, respond, handler);
                    accepted = true;
                }
                Poll::Ready(Some(Err(error))) => return Step::Done(closed_by(error)),
                Poll::Ready(None) => return Step::Done(Closed::Finished),
                Poll::Pending => break,
            }
        }
        if std::mem::take(&mut self.silent) && accepted {
            // The first answer, which as a rule is there as soon as its task has run, goes with the first words.
            cx.waker().wake_by_ref();
            return Step::Wait;
        }
        if self.phase != Phase::Ending
            && let Some(flood) = self.flood()
        {
            self.end(Reason::ENHANCE_YOUR_CALM, Closed::Flood(flood));
            return Step::Again;
        }
        if let Poll::Ready(Err(error)) = self.wire.poll_flush_now(cx) {
            return Step::Done(Closed::Io(error));
        }
        let progress = self.wire.seen().progress;
        if let Some(keepalive) = &mut self.keepalive
            && keepalive.poll_dead(cx, progress).is_ready()
        {
            return Step::Done(Closed::PingTimeout);
        }
        self.poll_timer(cx)
    }

    /// Follows the orders of the connection's [`Control`].
    fn obey(&mut self, cx: &mut Context<'_>) {
        match (self.control.poll_order(cx), self.phase) {
            (Order::Run, _) | (_, Phase::Ending) => {}
            (Order::Abort, _) => self.end(Reason::CANCEL, Closed::Aborted),
            (Order::Retire, Phase::Serving) => self.leave(),
            (Order::Retire, _) => {}
            (Order::Drain { deadline }, Phase::Serving | Phase::Leaving) => self.drain(deadline),
            (Order::Drain { deadline }, Phase::Draining) => {
                if deadline < self.timer.deadline() {
                    self.timer.as_mut().reset(deadline);
                }
            }
        }
    }

    fn drain(&mut self, deadline: Instant) {
        if self.phase == Phase::Serving {
            self.connection.graceful_shutdown();
        }
        self.phase = Phase::Draining;
        self.timer.as_mut().reset(deadline);
    }

    fn leave(&mut self) {
        self.phase = Phase::Leaving;
        self.timer.as_mut().reset(Instant::now() + IDLE_PATIENCE);
        self.connection.graceful_shutdown();
    }

    fn end(&mut self, reason: Reason, verdict: Closed) {
        self.phase = Phase::Ending;
        self.timer.as_mut().reset(Instant::now() + LAST_WORDS);
        self.verdict = Some(verdict);
        self.connection.abrupt_shutdown(reason);
    }

    fn flood(&mut self) -> Option<Flood> {
        for _ in 0..self.shared.early_resets.swap(0, Ordering::Relaxed) {
            if !self.early_resets.draw() {
                return Some(Flood::EarlyResets);
            }
        }
        self.wire.seen().flood
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Step {
        let idle = self.shared.streams.load(Ordering::Acquire) == 0;
        match (idle, self.idle_since) {
            (true, None) => self.idle_since = Some(Instant::now()),
            (false, Some(_)) => self.idle_since = None,
            _ => {}
        }
        if self.timer.as_mut().poll(cx).is_pending() {
            return Step::Wait;
        }
        match self.phase {
            Phase::Serving => {
                let now = Instant::now();
                let end = self.idle_since.unwrap_or(now) + self.settings.idle_timeout;
                if end > now {
                    self.timer.as_mut().reset(end);
                } else {
                    self.shared.counters.idle_closed.up();
                    self.leave();
                }
            }
            Phase::Leaving => {
                let now = Instant::now();
                let end = self.idle_since.unwrap_or(now) + IDLE_PATIENCE;
                if end > now {
                    self.timer.as_mut().reset(end);
                } else {
                    self.end(Reason::NO_ERROR, Closed::Finished);
                }
            }
            Phase::Draining => self.end(Reason::CANCEL, Closed::DrainDeadline),
            Phase::Ending => return Step::Done(Closed::Aborted),
        }
        Step::Again
    }

    /// Answers a request that can't be one for a tunnel, hands any other on.
    fn accept(
        &mut self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        handler: &mut impl FnMut(Incoming),
    ) {
        let counters = &self.shared.counters;
        if self.shared.streams.load(Ordering::Acquire) >= self.settings.max_streams as usize {
            // A client keeps to the limit, unless it resets streams that the handler has not let go of yet.
            counters.over_limit.up();
            self.shared.early_resets.fetch_add(1, Ordering::Relaxed);
            respond.send_reset(Reason::REFUSED_STREAM);
            return;
        }
        let (mut parts, recv) = request.into_parts();
        let authority = match destination(&parts.method, &parts.uri) {
            Ok(authority) => authority,
            Err(reason) => {
                counters.bad_requests.up();
                tracing::debug!(%reason, "refused a request with 400");
                // An error means that the stream is gone already.
                let _ = respond.send_response(response(StatusCode::BAD_REQUEST), true);
                return;
            }
        };
        let headers = TunnelHeaders::take(&mut parts.headers);
        counters.requests.up();
        counters.streams_now.up();
        self.shared.streams.fetch_add(1, Ordering::AcqRel);
        let ticket = Ticket::new(Arc::clone(&self.shared) as Arc<dyn Owner>);
        let stream = Stream { respond, recv, ticket, early: Backlog::default(), holding: Holding::default() };
        handler(Incoming { authority, headers, stream: Some(stream), shared: Arc::clone(&self.shared) });
    }
}

fn closed_by(error: h2::Error) -> Closed {
    match error.reason() {
        Some(Reason::NO_ERROR) => Closed::Finished,
        _ if error.is_io() => Closed::Io(error.into_io().unwrap_or_else(|| io::ErrorKind::Other.into())),
        _ => Closed::Protocol(error.to_string()),
    }
}

/// Why a request is answered with 400 here.
#[derive(Debug, thiserror::Error)]
enum BadRequest {
    #[error("the method is {0}, expected CONNECT")]
    Method(Method),
    #[error(transparent)]
    Authority(#[from] InvalidAuthority),
}

fn destination(method: &Method, uri: &http::Uri) -> Result<Authority, BadRequest> {
    if method != Method::CONNECT {
        return Err(BadRequest::Method(method.clone()));
    }
    let text = uri.authority().map_or("", http::uri::Authority::as_str);
    Ok(Authority::parse(text)?)
}

fn response(status: StatusCode) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    response
}

struct Stream {
    respond: SendResponse<Bytes>,
    recv: RecvStream,
    ticket: Ticket,
    /// What the peer sent without waiting for the answer.
    early: Backlog,
    holding: Holding,
}

impl Stream {
    /// Ready when the request can't be answered any more.
    fn poll_given_up(&mut self, cx: &mut Context<'_>, (memory, _): (Memory, u32)) -> Poll<TunnelError> {
        loop {
            match self.recv.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => self.early.push(data),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(error.into()),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        self.early.wait();
        let bytes = self.early.len();
        if self.holding.note(memory, bytes, 0, cx).is_err() {
            return Poll::Ready(TunnelError::NotTaken { bytes, limit: memory.limit() });
        }
        Poll::Ready(match ready!(self.respond.poll_reset(cx)) {
            Ok(reason) => TunnelError::Reset(ErrorCode(reason.into())),
            Err(error) => error.into(),
        })
    }
}

/// A request to open a tunnel. Dropping it unanswered resets the stream.
pub struct Incoming {
    /// Where the tunnel is to lead.
    pub authority: Authority,
    /// What came with the request.
    pub headers: TunnelHeaders,
    /// There until the request is answered.
    stream: Option<Stream>,
    shared: Arc<Shared>,
}

impl Incoming {
    /// Opens the tunnel: answers 200, with `headers`.
    ///
    /// # Errors
    /// The peer has given the tunnel up, or the connection has ended.
    pub fn accept(mut self, headers: &TunnelHeaders) -> Result<Tunnel, TunnelError> {
        let mut stream = self.take()?;
        let mut response = response(StatusCode::OK);
        headers.put(response.headers_mut());
        let send = stream.respond.send_response(response, false)?;
        Ok(Tunnel::new(send, stream.recv, stream.ticket).with_early(stream.early, stream.holding))
    }

    /// Refuses the tunnel. As Istio has it: 400 for a destination that isn't served here, 401 for one that policy
    /// denies, 503 for one that can't be reached.
    pub fn refuse(mut self, status: StatusCode, headers: &TunnelHeaders) {
        if let Ok(mut stream) = self.take() {
            let mut response = response(status);
            headers.put(response.headers_mut());
            // An error means that the peer no longer waits for the answer.
            let _ = stream.respond.send_response(response, true);
        }
    }

    /// Returns when the peer has given the request up, or has sent more ahead of the answer than there is room for:
    /// what is done for it can stop. To be awaited while the answer takes time, since what the peer sends meanwhile is
    /// counted here.
    pub async fn given_up(&mut self) -> TunnelError {
        let memory = self.shared.memory;
        poll_fn(|cx| self.stream.as_mut().map_or(Poll::Pending, |stream| stream.poll_given_up(cx, memory)))
            .await
    }

    /// The stream to answer on, unless the peer has given it up: then that is counted.
    fn take(&mut self) -> Result<Stream, TunnelError> {
        let gone = || TunnelError::ResetHere(ErrorCode::CANCEL);
        let mut stream = self.stream.take().ok_or_else(gone)?;
        match stream.respond.poll_reset(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending => Ok(stream),
            Poll::Ready(Err(error)) => Err(error.into()),
            Poll::Ready(Ok(reason)) => {
                self.shared.early_resets.fetch_add(1, Ordering::Relaxed);
                self.shared.counters.early_resets.up();
                Err(TunnelError::Reset(ErrorCode(reason.into())))
            }
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // Counts the request if the peer has given it up.
        let _ = self.take();
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("authority", &self.authority).finish_non_exhaustive()
    }
}
