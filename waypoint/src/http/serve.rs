//! Clients' connections: one after the other of HTTP/1.1's requests, all of HTTP/2's at a time.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::http::alarm::Alarm;
use crate::http::channel::{Channel, Stream};
use crate::http::decide::Connection;
use crate::http::exchange::{After, exchange};
use crate::http::h1::{Framing, Refusal};
use crate::http::h2_heads;
use crate::http::h2_input::{HeadTooLate, Input, PREFACE};
use crate::http::head::{MAX_HEAD, RequestHead, ResponseHead};
use crate::http::held::OfClient;
use crate::http::io::Io;
use crate::http::wire::{ReadError, Wire};
use crate::http::worker::Worker;

/// What is read and dropped of a request whose response was given without it.
const LINGER_BYTES: usize = 256 * 1024;

/// Counts a connection as long as it is there.
struct Counted<'a>(&'a Worker);

impl<'a> Counted<'a> {
    /// `None` if there are too many.
    fn new(worker: &'a Worker) -> Option<Self> {
        worker.stats.connections.inc();
        if usize::try_from(worker.stats.connections_now.get()).unwrap_or(0) >= worker.settings.max_connections
        {
            worker.stats.connections_refused.inc();
            return None;
        }
        worker.stats.connections_now.inc();
        Some(Self(worker))
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.stats.connections_now.dec();
    }
}

/// Serves one connection to its end. Whether it is HTTP/1.1 or HTTP/2 its first bytes tell.
pub async fn serve(worker: Arc<Worker>, io: Io, connection: Connection) {
    serve_begun(worker, io, BytesMut::new(), connection).await;
}

/// The same for a connection of which `input` has been read already.
pub async fn serve_begun(worker: Arc<Worker>, io: Io, input: BytesMut, connection: Connection) {
    let Some(_counted) = Counted::new(&worker) else { return };
    let mut wire = Wire::begun(io, input, &worker.buffers);
    let mut alarm = Alarm::default();
    let late = Instant::now() + worker.settings.head_timeout;
    let preface = poll_fn(|cx| {
        if let Poll::Ready(found) = wire.poll_preface(cx, PREFACE) {
            return Poll::Ready(found.ok());
        }
        // A connection on which nothing comes is one that is kept ready: that may take longer.
        if wire.has_input() { alarm.poll(cx, late).map(|()| None) } else { Poll::Pending }
    });
    let idle = tokio::time::timeout(worker.settings.idle_timeout, preface).await;
    match idle.ok().flatten() {
        Some(true) => {
            let (io, input) = wire.into_parts();
            let input = Input::new(io, input, worker.settings.head_timeout);
            Box::pin(serve_h2(&worker, input, connection)).await;
        }
        Some(false) => {
            let mut session = Session {
                held: worker.held.of(&connection),
                worker: &worker,
                client: Channel::H1(wire),
                request: RequestHead::default(),
                alarm,
                drained: Box::pin(worker.drain.clone().cancelled_owned()),
            };
            session.run(&connection).await;
        }
        None => worker.stats.idle_closed.inc(),
    }
}

/// A connection of HTTP/1.1.
struct Session<'a> {
    worker: &'a Arc<Worker>,
    held: Arc<OfClient>,
    client: Channel,
    request: RequestHead,
    alarm: Alarm,
    drained: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// What comes next on a connection.
enum Next {
    Request(Framing),
    Refuse(Refusal),
    /// The head did not come in time.
    Late,
    End,
}

impl Session<'_> {
    async fn run(&mut self, connection: &Connection) {
        loop {
            match self.next().await {
                Next::Request(framing) => {
                    let after = Box::pin(exchange(
                        self.worker,
                        (connection, &self.held),
                        &mut self.client,
                        &mut self.request,
                        &mut self.alarm,
                        framing,
                    ));
                    match after.await {
                        After::Next => self.worker.heads.put(std::mem::take(&mut self.request)),
                        After::Close => return self.linger().await,
                        After::Abort => return,
                    }
                }
                Next::Refuse(refusal) => {
                    self.worker.stats.requests_refused.inc();
                    tracing::debug!(%refusal, client = %connection.client, "refused a request");
                    self.worker.decide.refused(connection, refusal.status(), &refusal);
                    return self.refuse(refusal.status()).await;
                }
                Next::Late => {
                    self.worker.stats.heads_timed_out.inc();
                    self.worker.decide.refused(connection, 408, &"the head did not come in time");
                    return self.refuse(408).await;
                }
                // In good order also in a tunnel, where what is only dropped is taken for broken, with what was sent last.
                Next::End => return self.linger().await,
            }
        }
    }

    /// Waits for a request's head. The time for it runs from its first byte.
    async fn next(&mut self) -> Next {
        let settings = &self.worker.settings;
        let idle = Instant::now() + settings.idle_timeout;
        let mut late = None;
        let Channel::H1(wire) = &mut self.client else { return Next::End };
        wire.begin_message();
        poll_fn(|cx| {
            if wire.poll_input(cx).is_ready() {
                if self.request.is_empty() {
                    self.request = self.worker.heads.take();
                }
                match wire.poll_request(cx, &mut self.request) {
                    Poll::Ready(Ok(framing)) => return Poll::Ready(Next::Request(framing)),
                    Poll::Ready(Err(ReadError::Refused(refusal))) => {
                        return Poll::Ready(Next::Refuse(refusal));
                    }
                    Poll::Ready(Err(_)) => return Poll::Ready(Next::End),
                    Poll::Pending => {
                        let late = *late.get_or_insert_with(|| Instant::now() + settings.head_timeout);
                        return self.alarm.poll(cx, late).map(|()| Next::Late);
                    }
                }
            }
            ready!(first_of(self.drained.as_mut().poll(cx), self.alarm.poll(cx, idle)));
            self.worker.stats.idle_closed.inc();
            Poll::Ready(Next::End)
        })
        .await
    }

    /// Answers what is no request, and ends the connection.
    async fn refuse(&mut self, status: u16) {
        let mut head = ResponseHead { status, ..ResponseHead::default() };
        let date = httpdate::fmt_http_date(std::time::SystemTime::now());
        head.fields.push(b"date", date.as_bytes());
        let sent = self.client.send_response(&head, Framing::None, true, true, false);
        let flushed = poll_fn(|cx| self.client.poll_flush(cx));
        let flushed = tokio::time::timeout(self.worker.settings.head_timeout, flushed).await;
        if sent.is_ok() && matches!(flushed, Ok(Ok(()))) {
            self.linger().await;
        }
    }

    /// Ends a connection on which more may come: closed at once, TCP would reset it, and the client might lose the
    /// response (RFC 9112 section 9.6).
    async fn linger(&mut self) {
        let Channel::H1(wire) = &mut self.client else { return };
        let io = wire.io();
        // In a tunnel that waits for the client to take what was sent.
        let shut = tokio::time::timeout(self.worker.settings.stream_idle_timeout, io.shutdown()).await;
        if !matches!(shut, Ok(Ok(()))) {
            return;
        }
        let rest = async {
            let mut dropped = 0;
            let mut buffer = self.worker.buffers.take();
            while dropped < LINGER_BYTES {
                buffer.clear();
                match io.read_buf(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(count) => dropped += count,
                }
            }
            self.worker.buffers.put(buffer);
        };
        // That it takes longer is the client's affair.
        let _ = tokio::time::timeout(self.worker.settings.linger, rest).await;
    }
}

fn first_of(a: Poll<()>, b: Poll<()>) -> Poll<()> {
    if a.is_ready() { a } else { b }
}

/// Serves a connection of HTTP/2: each stream is a task of its own.
async fn serve_h2(worker: &Arc<Worker>, io: Input, connection: Connection) {
    let settings = &worker.settings;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_concurrent_streams(settings.max_streams)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .max_send_buffer_size(256 * 1024)
        .max_pending_accept_reset_streams(64)
        .max_concurrent_reset_streams(256)
        .enable_connect_protocol();
    let handshake = tokio::time::timeout(settings.head_timeout, builder.handshake::<_, Bytes>(io)).await;
    let Ok(Ok(mut server)) = handshake else { return };
    let connection = Arc::new((worker.held.of(&connection), connection));
    let mut drained = Box::pin(worker.drain.clone().cancelled_owned());
    let (mut alarm, mut leaving) = (Alarm::default(), false);
    let mut idle = Instant::now() + settings.idle_timeout;
    loop {
        let accepted = poll_fn(|cx| {
            if !leaving && drained.as_mut().poll(cx).is_ready() {
                leaving = true;
                idle = Instant::now() + settings.head_timeout;
                server.graceful_shutdown();
            }
            let accepted = server.poll_accept(cx);
            if accepted.is_ready() || alarm.poll(cx, idle).is_pending() {
                return accepted;
            }
            // The streams hold the connection's facts.
            let is_quiet = Arc::strong_count(&connection) == 1;
            if is_quiet && leaving {
                // It does not answer the ping that goes before the end.
                return Poll::Ready(None);
            }
            let next = if is_quiet || leaving { settings.head_timeout } else { settings.idle_timeout };
            idle = Instant::now() + next;
            let _ = alarm.poll(cx, idle);
            if is_quiet {
                worker.stats.idle_closed.inc();
                leaving = true;
                server.graceful_shutdown();
                return server.poll_accept(cx);
            }
            accepted
        });
        match accepted.await {
            Some(Ok((request, respond))) => {
                tokio::spawn(serve_stream(Arc::clone(worker), Arc::clone(&connection), request, respond));
            }
            Some(Err(error)) => {
                if error.get_io().is_some_and(HeadTooLate::is) {
                    worker.stats.heads_timed_out.inc();
                    worker.decide.refused(&connection.1, 408, &HeadTooLate);
                }
                tracing::debug!(%error, client = %connection.1.client, "a connection of HTTP/2 failed");
                return;
            }
            None => return,
        }
    }
}

async fn serve_stream(
    worker: Arc<Worker>,
    connection: Arc<(Arc<OfClient>, Connection)>,
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
) {
    let (held, connection) = &*connection;
    let (parts, recv) = request.into_parts();
    let mut head = worker.heads.take();
    match h2_heads::request(&parts, recv.is_end_stream(), &mut head) {
        Ok(framing) => {
            drop(parts);
            let mut client = Channel::H2(Stream::of_client(recv, respond));
            let mut alarm = Alarm::default();
            exchange(&worker, (connection, held), &mut client, &mut head, &mut alarm, framing).await;
        }
        Err(refusal) => {
            worker.stats.requests_refused.inc();
            tracing::debug!(%refusal, client = %connection.client, "refused a request");
            worker.decide.refused(connection, refusal.status(), &refusal);
            let mut response = http::Response::new(());
            *response.status_mut() =
                http::StatusCode::from_u16(refusal.status()).unwrap_or(http::StatusCode::BAD_REQUEST);
            // An error means that the stream is gone.
            let _ = respond.send_response(response, true);
        }
    }
    worker.heads.put(head);
}
