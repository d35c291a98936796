//! Copies of requests for others to look at. What becomes of a copy touches nobody: it has a task, a time limit and a
//! place of its own, and its response is read and dropped.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use crate::http::decide::{Call, Connection, Endpoints, Mirror, Outcome, Picked};
use crate::http::h1::Framing;
use crate::http::head::{RequestHead, ResponseHead};
use crate::http::pump::Pump;
use crate::http::wire::{Frame, ReadError};
use crate::http::worker::Worker;

/// For a copy and its response.
const LIMIT: Duration = Duration::from_secs(15);

/// Sends the copies that a route asks for of a request whose body was kept.
pub(crate) fn send(
    worker: &Arc<Worker>,
    request: &RequestHead,
    connection: &Connection,
    upload: &Pump,
    mirrors: &[Mirror],
) {
    for mirror in mirrors {
        let body = if upload.bytes == 0 && upload.is_read() { Some(Vec::new()) } else { upload.whole() };
        let stats = &worker.stats;
        let (Some(body), true) = (body, stats.mirrors_now.get() < worker.settings.max_mirrors) else {
            stats.mirrors_dropped.inc();
            continue;
        };
        stats.mirrored.inc();
        stats.mirrors_now.inc();
        let request = mirror.request.as_deref().unwrap_or(request).clone();
        let connection = connection.clone();
        let copy = copy(Arc::clone(worker), request, connection, body, Arc::clone(&mirror.endpoints));
        let worker = Arc::clone(worker);
        tokio::spawn(async move {
            match timeout(LIMIT, copy).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a copy of a request failed"),
                Err(_) => tracing::debug!("a copy of a request took too long"),
            }
            worker.stats.mirrors_now.dec();
        });
    }
}

async fn copy(
    worker: Arc<Worker>,
    request: RequestHead,
    connection: Connection,
    body: Vec<Bytes>,
    endpoints: Arc<dyn Endpoints>,
) -> Result<(), ReadError> {
    let call = Call { request: &request, connection: &connection, tried: &[], elsewhere: false };
    let Ok(picked) = endpoints.pick(&call) else { return Ok(()) };
    exchange(&worker, &request, body, &picked).await
}

/// Sends a copy to an endpoint and reads the response.
async fn exchange(
    worker: &Worker,
    request: &RequestHead,
    body: Vec<Bytes>,
    picked: &Picked,
) -> Result<(), ReadError> {
    let length: usize = body.iter().map(Bytes::len).sum();
    let framing = if length == 0 { Framing::None } else { Framing::Length(length as u64) };
    let lease = worker.pool.get(&picked.target, request, framing, false).await;
    let mut lease = lease.map_err(std::io::Error::other)?;
    let channel = &mut lease.channel;
    channel.send_request(request, framing);
    for mut data in body {
        while !data.is_empty() {
            let room = poll_fn(|cx| channel.poll_room(cx, data.len())).await?;
            channel.send(data.split_to(room))?;
        }
    }
    if framing != Framing::None {
        channel.send_end(None)?;
    }
    let mut head = ResponseHead::default();
    let to_head = request.method() == "HEAD";
    poll_fn(|cx| {
        ready!(channel.poll_flush(cx))?;
        channel.poll_response(cx, &mut head, to_head)
    })
    .await?;
    picked.report(Outcome::Status(head.status));
    poll_fn(|cx| {
        loop {
            match ready!(channel.poll_frame(cx))? {
                Frame::Data(data) => channel.consumed(data.len()),
                Frame::End(_) => return Poll::Ready(Ok(())),
            }
        }
    })
    .await
}
