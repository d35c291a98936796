//! Calls of our own: a small request to a service of the mesh, whose whole answer is wanted, by the same connections
//! that requests of clients take. External authorizers and rate-limit services are asked so, over HTTP or by gRPC.
//!
//! A call is made on a thread that has a [`crate::http::Worker`], with its pool. It has a time limit, and its answer a
//! size limit.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use tokio::time::timeout;

use crate::http::channel::Channel;
use crate::http::decide::{Call, Connection, Endpoints, NoEndpoint, Outcome, Picked, Protocol, Target};
use crate::http::h1::Framing;
use crate::http::head::{Fields, RequestHead, ResponseHead};
use crate::http::hygiene;
use crate::http::wire::{Frame, ReadError};
use crate::upstream::pool::{self, Pool, PoolError};

/// The largest answer that is read.
const MAX_ANSWER: usize = 256 * 1024;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is nobody to ask.
    #[error("no endpoint: {}", .0.detail)]
    NoEndpoint(NoEndpoint),
    /// It is no thread of the data plane.
    #[error("there are no connections on this thread")]
    NoPool,
    /// It took too long.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// No connection.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The answer broke off, or is no HTTP.
    #[error("the answer did not come whole: {0}")]
    Read(#[from] ReadError),
    /// The request could not be sent.
    #[error("the request could not be sent: {0}")]
    Send(#[from] io::Error),
    /// It is larger than is read.
    #[error("the answer has more than {MAX_ANSWER} bytes")]
    TooLarge,
    /// A gRPC service refused the call.
    #[error("the service answered with the gRPC status {0}")]
    Grpc(u8),
    /// What came is no answer of gRPC.
    #[error("the answer is no message of the service: {0}")]
    Message(String),
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Its head.
    pub head: ResponseHead,
    /// Its body.
    pub body: Bytes,
    /// Its trailers.
    pub trailers: Option<Box<Fields>>,
}

/// Sends `request` with `body` to one of `endpoints`, for the client of `connection`, and reads the answer. On a
/// connection of HTTP/1.1 that turns out to be dead it is sent once more, and where a server of HTTP/2 says that it has not
/// looked at it: what is counted there is counted once.
///
/// # Errors
/// See [`CallError`].
pub async fn call(
    endpoints: &dyn Endpoints,
    connection: &Connection,
    request: &RequestHead,
    body: Bytes,
    limit: Duration,
) -> Result<Answer, CallError> {
    let picked = pick(endpoints, connection, request)?;
    let target = Arc::clone(&picked.target);
    within(limit, &picked, send(&target, request, body)).await
}

/// Calls a method of gRPC, `/package.Service/Method`, and reads the one message that it answers with.
///
/// # Errors
/// See [`CallError`].
pub async fn call_grpc<Q: Message, A: Message + Default>(
    endpoints: &dyn Endpoints,
    connection: &Connection,
    (authority, method): (&str, &str),
    message: &Q,
    limit: Duration,
) -> Result<A, CallError> {
    let mut head = RequestHead::default();
    head.set_method("POST");
    head.set_authority(authority);
    head.set_target(method);
    head.fields.push(b"content-type", b"application/grpc");
    head.fields.push(b"te", b"trailers");
    let millis = limit.as_millis().min(99_999_999);
    head.fields.push(b"grpc-timeout", format!("{millis}m").as_bytes());
    let picked = pick(endpoints, connection, &head)?;
    // gRPC is HTTP/2, whatever the service's port says.
    let target = Target { protocol: Protocol::Http2, ..Target::clone(&picked.target) };
    let answer = within(limit, &picked, send(&Arc::new(target), &head, framed(message))).await?;
    unframed(&answer)
}

fn pick(
    endpoints: &dyn Endpoints,
    connection: &Connection,
    request: &RequestHead,
) -> Result<Picked, CallError> {
    let call = Call { request, connection, tried: &[], elsewhere: false };
    endpoints.pick(&call).map_err(CallError::NoEndpoint)
}

async fn within(
    limit: Duration,
    picked: &Picked,
    sent: impl Future<Output = Result<Answer, CallError>>,
) -> Result<Answer, CallError> {
    let result = timeout(limit, sent).await.unwrap_or(Err(CallError::Timeout(limit)));
    picked.report(match &result {
        Ok(answer) => Outcome::Status(answer.head.status),
        Err(CallError::Timeout(_)) => Outcome::TimedOut,
        Err(_) => Outcome::Failed,
    });
    result
}

async fn send(target: &Arc<Target>, request: &RequestHead, body: Bytes) -> Result<Answer, CallError> {
    let pool = pool::here().ok_or(CallError::NoPool)?;
    match exchange(&pool, target, request, body.clone(), false).await {
        Err((CallError::Read(_) | CallError::Send(_), true)) => {
            exchange(&pool, target, request, body, true).await.map_err(|(error, _)| error)
        }
        result => result.map_err(|(error, _)| error),
    }
}

/// An error comes with whether nobody has seen the request: as far as can be told, where the connection had been used before
/// and ended without a byte.
async fn exchange(
    pool: &Pool,
    target: &Arc<Target>,
    request: &RequestHead,
    mut body: Bytes,
    fresh: bool,
) -> Result<Answer, (CallError, bool)> {
    let framing = if body.is_empty() { Framing::None } else { Framing::Length(body.len() as u64) };
    let lease = pool.get(target, request, framing, fresh).await;
    let mut lease = lease.map_err(|error| (error.into(), false))?;
    let reused = lease.reused;
    let channel = &mut lease.channel;
    channel.send_request(request, framing);
    let mut head = ResponseHead::default();
    let begun = async {
        while !body.is_empty() {
            let room = poll_fn(|cx| channel.poll_room(cx, body.len())).await?;
            let part = body.split_to(room);
            if body.is_empty() { channel.send_last(part)? } else { channel.send(part)? }
        }
        let to_head = request.method() == "HEAD";
        loop {
            head.clear();
            let framing = poll_fn(|cx| {
                ready!(channel.poll_flush(cx))?;
                channel.poll_response(cx, &mut head, to_head)
            })
            .await?;
            if head.status >= 200 {
                return Ok(framing);
            }
        }
    };
    let begun: Result<Framing, CallError> = begun.await;
    let framing = begun.map_err(|error| {
        let unseen = match channel {
            Channel::H1(wire) => reused && !wire.has_received(),
            Channel::H2(_) => matches!(&error, CallError::Read(error) if error.is_unseen()),
        };
        (error, unseen)
    })?;
    let mut whole = BytesMut::new();
    let trailers = poll_fn(|cx| {
        loop {
            match ready!(channel.poll_frame(cx)).map_err(CallError::Read)? {
                Frame::Data(data) if whole.len() + data.len() > MAX_ANSWER => {
                    return Poll::Ready(Err(CallError::TooLarge));
                }
                Frame::Data(data) => {
                    channel.consumed(data.len());
                    whole.extend_from_slice(&data);
                }
                Frame::End(trailers) => return Poll::Ready(Ok(trailers)),
            }
        }
    });
    let trailers = trailers.await.map_err(|error| (error, false))?;
    let ends = hygiene::response(&mut head, false);
    if !ends && framing != Framing::UntilClose {
        pool.put(lease);
    }
    Ok(Answer { head, body: whole.freeze(), trailers })
}

/// A message as gRPC has it: not compressed, its length, itself.
fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut out = BytesMut::with_capacity(5 + length);
    out.put_u8(0);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // Fails for want of room only, which a growing buffer has.
    let _ = message.encode(&mut out);
    out.freeze()
}

fn unframed<A: Message + Default>(answer: &Answer) -> Result<A, CallError> {
    if answer.head.status != 200 {
        return Err(CallError::Message(format!("it has the status {}", answer.head.status)));
    }
    let of = |fields: &Fields| {
        let text = fields.values(b"grpc-status").next().map(<[u8]>::to_vec)?;
        std::str::from_utf8(&text).ok()?.parse::<u8>().ok()
    };
    let status = answer.trailers.as_deref().and_then(of).or_else(|| of(&answer.head.fields));
    match status {
        Some(0) => {}
        Some(code) => return Err(CallError::Grpc(code)),
        None => return Err(CallError::Message("it has no status of gRPC".to_owned())),
    }
    let mut body = answer.body.clone();
    if body.len() < 5 {
        return Err(CallError::Message("there is no message".to_owned()));
    }
    let (compressed, length) = (body.get_u8(), body.get_u32());
    if compressed != 0 || usize::try_from(length).ok() != Some(body.len()) {
        return Err(CallError::Message("it is compressed, or not one message".to_owned()));
    }
    A::decode(body).map_err(|error| CallError::Message(error.to_string()))
}
