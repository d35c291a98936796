//! Opening one tunnel over a pool: the request, its response, and what is sent ahead of it.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode};
use tokio::time::{Instant, timeout_at};

use crate::authority::Authority;
use crate::headers::TunnelHeaders;
use crate::link::Link;
use crate::memory::{Holding, Memory};
use crate::pool::{ConnectError, Connector, Pool, Reserved};
use crate::pump::{AppIo, read_at_most};
use crate::tunnel::{Ticket, Tunnel, TunnelError};

/// How often a request is sent before it counts as failed.
pub(crate) const TRIES: u32 = 3;

/// Early data up to this size is not noted in [`Memory`]: it is what a request takes, and noting it costs more than it does.
const UNNOTED: usize = 4 * 1024;

/// What is asked of the peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConnectRequest {
    /// Where the tunnel is to lead.
    pub authority: Authority,
    /// What travels with the request.
    pub headers: TunnelHeaders,
}

/// An open tunnel and what is known of its other end.
#[derive(Debug)]
pub struct Opened<P> {
    /// The tunnel.
    pub tunnel: Tunnel,
    /// What the connector said of the connection's peer.
    pub peer: P,
    /// The response's headers.
    pub headers: TunnelHeaders,
}

/// Why no tunnel was opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError<E: std::error::Error + 'static> {
    /// There is no connection to the peer.
    #[error("no connection to the peer: {0}")]
    Connect(#[source] Arc<ConnectError<E>>),
    /// As many callers wait for this peer as may.
    #[error("{0} callers wait for a connection to this peer already")]
    Overloaded(usize),
    /// All streams to the peer stayed taken.
    #[error("no stream to the peer became free in time")]
    QueueTimeout,
    /// The peer did not answer in time.
    #[error("the peer did not answer the request in time")]
    ResponseTimeout,
    /// The peer answered with another status than 200.
    #[error("the peer refused the tunnel with status {0}")]
    Refused(StatusCode),
    /// The peer, or the connection, ended before there was an answer.
    #[error("no answer to the request: {0}")]
    Lost(#[source] TunnelError),
    /// The application failed before there was an answer.
    #[error("the application's connection: {0}")]
    App(#[source] io::Error),
    /// The request can't be written as HTTP.
    #[error("{0} can't be sent as :authority")]
    Unsendable(Authority),
}

/// A request under way.
struct Pending<P> {
    response: ResponseFuture,
    send: SendStream<Bytes>,
    link: Arc<Link<P>>,
    reused: bool,
    ticket: Ticket,
}

impl<C: Connector> Pool<C> {
    /// Opens a tunnel and waits for the peer's consent. Nothing of the application is sent before that, so after an
    /// error another endpoint may be tried.
    ///
    /// Cancel-safe: dropping the future withdraws the request.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(
        &self,
        key: &C::Key,
        request: &ConnectRequest,
    ) -> Result<Opened<C::Peer>, OpenError<C::Error>> {
        self.exchange(key, request, &mut BytesMut::new(), None).await
    }

    /// Opens a tunnel, and sends ahead of the peer's consent what the application sends meanwhile: one round trip
    /// less where the client speaks first. What is sent this way (64 KiB at most) is kept until the consent comes.
    ///
    /// `early` is what is sent first: what an earlier call that failed has left in it. Afterwards it is all that was sent
    /// so, for the next endpoint or for whoever counts.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open_early<A: AppIo>(
        &self,
        key: &C::Key,
        request: &ConnectRequest,
        app: &mut A,
        early: &mut BytesMut,
    ) -> Result<Opened<C::Peer>, OpenError<C::Error>> {
        self.exchange(key, request, early, Some(app)).await
    }

    async fn exchange(
        &self,
        key: &C::Key,
        request: &ConnectRequest,
        early: &mut BytesMut,
        mut app: Option<&mut dyn AppIo>,
    ) -> Result<Opened<C::Peer>, OpenError<C::Error>> {
        let mut deadline = None;
        let mut ahead = Ahead {
            most: self.settings().early_data,
            memory: self.settings().transport.memory,
            holding: Holding::default(),
        };
        for tried in 1..=TRIES {
            let mut pending = self.request(key, request, tried).await?;
            if !early.is_empty() {
                // A failure shows as the response's.
                let _ = pending.send.send_data(Bytes::copy_from_slice(early), false);
            }
            // The time for the response does not include the time for the connection.
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + self.settings().response_timeout);
            let response = poll_fn(|cx| {
                let response = Pin::new(&mut pending.response).poll(cx);
                if response.is_pending()
                    && let Some(app) = &mut app
                    && let Err(error) = ahead.send(*app, &mut pending.send, early, cx)
                {
                    return Poll::Ready(Err(error));
                }
                response.map(Ok)
            });
            match timeout_at(deadline, response).await {
                // Dropping the request resets it: what was sent must not pass for all that there was to say.
                Ok(Err(error)) => return Err(OpenError::App(error)),
                Ok(Ok(Ok(response))) => return self.answered(pending, response),
                Ok(Ok(Err(error))) => {
                    let again =
                        is_unprocessed(&error) || (pending.reused && error.is_io() && early.is_empty());
                    if error.is_go_away() {
                        self.going_away(&pending.link);
                    }
                    if !again || tried == TRIES {
                        return Err(OpenError::Lost(error.into()));
                    }
                    self.counters().retried.up();
                }
                Err(_) => {
                    // A peer answers within its own time limits. If it doesn't, the next request had better go over
                    // a new connection.
                    pending.link.retire();
                    self.counters().responses_timed_out.up();
                    return Err(OpenError::ResponseTimeout);
                }
            }
        }
        Err(OpenError::ResponseTimeout)
    }

    /// Sends the request's headers on a link of the pool.
    async fn request(
        &self,
        key: &C::Key,
        request: &ConnectRequest,
        tried: u32,
    ) -> Result<Pending<C::Peer>, OpenError<C::Error>> {
        for _ in tried..=TRIES {
            let Reserved { link, ticket, reused } = self.link(key).await?;
            // Not before: while it waits for a connection, a caller is to hold little.
            let message = message(request).ok_or_else(|| OpenError::Unsendable(request.authority.clone()))?;
            match link.send(message) {
                Ok((response, send)) => {
                    self.counters().streams.up();
                    if reused {
                        self.counters().reused.up();
                    }
                    return Ok(Pending { response, send, link, reused, ticket });
                }
                // The link has ended, or its peer said that it will: nothing was sent.
                Err(_) => {
                    self.going_away(&link);
                    self.counters().retried.up();
                }
            }
        }
        Err(OpenError::Lost(TunnelError::Connection("each connection ended before the request".into())))
    }

    fn answered(
        &self,
        pending: Pending<C::Peer>,
        response: Response<RecvStream>,
    ) -> Result<Opened<C::Peer>, OpenError<C::Error>> {
        let (mut parts, recv) = response.into_parts();
        if parts.status != StatusCode::OK {
            self.counters().refused.up();
            return Err(OpenError::Refused(parts.status));
        }
        let tunnel = Tunnel::new(pending.send, recv, pending.ticket);
        let headers = TunnelHeaders::take(&mut parts.headers);
        Ok(Opened { tunnel, peer: pending.link.peer.clone(), headers })
    }
}

/// The request's headers; `None` if they can't be written as HTTP.
fn message(request: &ConnectRequest) -> Option<Request<()>> {
    let mut message = Request::new(());
    *message.method_mut() = Method::CONNECT;
    *message.uri_mut() = request.authority.to_uri()?;
    request.headers.put(message.headers_mut());
    Some(message)
}

/// Whether the peer said that it has not processed the request: it refused the stream, or left it out of those that
/// it answers before it goes away (RFC 9113 section 8.7).
fn is_unprocessed(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM))
}

/// What is sent ahead of an answer: how much at the most, and what is held for it.
struct Ahead {
    most: usize,
    memory: Memory,
    holding: Holding,
}

impl Ahead {
    /// Sends and keeps what the application has to say. Its end shows again when it is pumped.
    ///
    /// # Errors
    /// The application's connection has failed, which it says once only; or what is held has to be given back.
    fn send(
        &mut self,
        app: &mut dyn AppIo,
        send: &mut SendStream<Bytes>,
        early: &mut BytesMut,
        cx: &mut Context<'_>,
    ) -> io::Result<()> {
        while early.len() < self.most && self.memory.held() <= self.memory.limit() / 8 {
            let Poll::Ready(data) = read_at_most(app, cx, self.most - early.len()) else { break };
            let data = data?;
            if data.is_empty() {
                break;
            }
            early.extend_from_slice(&data);
            // A copy: a piece of a thread's buffer would keep all of it.
            if send.send_data(Bytes::copy_from_slice(&data), false).is_err() {
                break;
            }
        }
        if early.len() > UNNOTED && self.holding.note(self.memory, early.len(), 0, cx).is_err() {
            return Err(io::Error::other("there is no memory for what it says before the peer answers"));
        }
        Ok(())
    }
}
