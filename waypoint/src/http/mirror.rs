//! Copies of requests for others to look at. What becomes of a copy touches nobody: it has a task, time limits and a place of
//! its own, gets the body as the request gets it ([`super::copies`]), and its response is read and dropped.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use crate::http::alarm::Alarm;
use crate::http::channel::Channel;
use crate::http::copies::{self, Cut, Fed, Feed, Piece};
use crate::http::decide::{Call, Connection, Endpoints, Mirror, Outcome};
use crate::http::h1::Framing;
use crate::http::head::{RequestHead, ResponseHead};
use crate::http::hygiene;
use crate::http::wire::{Frame, ReadError};
use crate::http::worker::Worker;
use crate::upstream::pool::PoolError;

/// For a connection; and for what is left of a copy when all of the request has come, its response included.
const LIMIT: Duration = Duration::from_secs(15);
/// Informational responses that are passed over.
const MAX_INFORMATIONAL: u32 = 16;

/// Begins the copies that a route asks for of a request that is sent on now; where its body is to be put for them.
pub(crate) fn begin(
    worker: &Arc<Worker>,
    (request, framing): (&RequestHead, Framing),
    connection: &Connection,
    mirrors: &[Mirror],
) -> Vec<Feed> {
    let mut feeds = Vec::with_capacity(mirrors.len());
    for mirror in mirrors {
        let stats = &worker.stats;
        if stats.mirrors_now.get() >= worker.settings.max_mirrors {
            stats.mirrors_dropped.inc();
            continue;
        }
        stats.mirrored.inc();
        stats.mirrors_now.inc();
        let (feed, body) = copies::body(worker.settings.mirror_limit, &worker.held);
        let copy = Copying {
            worker: Arc::clone(worker),
            request: mirror.request.as_deref().unwrap_or(request).clone(),
            framing,
            connection: connection.clone(),
            endpoints: Arc::clone(&mirror.endpoints),
            body,
            pending: Bytes::new(),
            sent: false,
            alarm: Alarm::default(),
            late: None,
        };
        tokio::spawn(copy.run());
        feeds.push(feed);
    }
    feeds
}

/// Why a copy comes to nothing.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("there is no endpoint: {0}")]
    NoEndpoint(&'static str),
    #[error("no connection: {0}")]
    Pool(#[from] PoolError),
    #[error("no connection in time")]
    Connecting,
    #[error("{0}")]
    Read(#[from] ReadError),
    #[error("its destination takes no more: {0}")]
    Write(#[from] io::Error),
    #[error("its destination takes it too slowly")]
    Slow,
    #[error("the request was not whole")]
    Unfinished,
    #[error("it took too long")]
    Late,
    #[error("its destination answers with nothing but informational responses")]
    Informational,
}

impl From<Cut> for CopyError {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Slow => Self::Slow,
            Cut::Unfinished | Cut::Gone => Self::Unfinished,
        }
    }
}

/// A copy under way.
struct Copying {
    worker: Arc<Worker>,
    request: RequestHead,
    framing: Framing,
    connection: Connection,
    endpoints: Arc<dyn Endpoints>,
    body: Fed,
    /// What is being sent of the body.
    pending: Bytes,
    /// All of it was sent.
    sent: bool,
    alarm: Alarm,
    /// When it has to be over, once all of the request has come.
    late: Option<Instant>,
}

impl Copying {
    async fn run(mut self) {
        let sent = self.send().await;
        let stats = &self.worker.stats;
        match sent {
            Ok(()) => {}
            // That is told of the request.
            Err(CopyError::Unfinished) => {}
            Err(CopyError::Slow) => stats.mirrors_cut.inc(),
            Err(error) => {
                tracing::debug!(%error, "a copy of a request failed");
                stats.mirrors_failed.inc();
            }
        }
        stats.mirrors_now.dec();
    }

    /// Sends it to an endpoint and reads the response.
    async fn send(&mut self) -> Result<(), CopyError> {
        let call =
            Call { request: &self.request, connection: &self.connection, tried: &[], elsewhere: false };
        let picked = self.endpoints.pick(&call).map_err(|none| CopyError::NoEndpoint(none.detail))?;
        let getting = self.worker.pool.get(&picked.target, &self.request, self.framing, false);
        let mut lease = timeout(LIMIT, getting).await.map_err(|_| CopyError::Connecting)??;
        let channel = &mut lease.channel;
        channel.send_request(&self.request, self.framing);
        let mut head = ResponseHead::default();
        let framing = poll_fn(|cx| self.poll_head(cx, channel, &mut head)).await?;
        picked.report(Outcome::Status(head.status));
        poll_fn(|cx| self.poll_rest(cx, channel)).await?;
        let ends = hygiene::response(&mut head, true) || framing == Framing::UntilClose;
        if self.sent && !ends {
            self.worker.pool.put(lease);
        }
        Ok(())
    }

    /// Fails when it is to be given up.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<CopyError> {
        if let Err(cut) = ready!(self.body.poll_end(cx)) {
            return Poll::Ready(cut.into());
        }
        let late = *self.late.get_or_insert_with(|| Instant::now() + LIMIT);
        self.alarm.poll(cx, late).map(|()| CopyError::Late)
    }

    /// Sends what there is of the body. Ready when all of it is sent.
    fn poll_body(&mut self, cx: &mut Context<'_>, to: &mut Channel) -> Poll<Result<(), CopyError>> {
        loop {
            if !self.pending.is_empty() {
                let room = ready!(to.poll_room(cx, self.pending.len()))?;
                to.send(self.pending.split_to(room))?;
                continue;
            }
            if self.sent {
                return to.poll_flush(cx).map_err(CopyError::Write);
            }
            match self.body.poll_next(cx) {
                Poll::Ready(Ok(Piece::Data(data))) => self.pending = data,
                Poll::Ready(Ok(Piece::End(trailers))) => {
                    if self.framing != Framing::None {
                        to.send_end(trailers.as_deref())?;
                    }
                    self.sent = true;
                }
                Poll::Ready(Err(cut)) => return Poll::Ready(Err(cut.into())),
                Poll::Pending => {
                    ready!(to.poll_flush(cx))?;
                    return Poll::Pending;
                }
            }
        }
    }

    /// One step towards the response's head.
    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        channel: &mut Channel,
        head: &mut ResponseHead,
    ) -> Poll<Result<Framing, CopyError>> {
        if let Poll::Ready(error) = self.poll_end(cx) {
            return Poll::Ready(Err(error));
        }
        // An endpoint that takes no more has answered, perhaps: reading tells.
        let _ = self.poll_body(cx, channel);
        let to_head = self.request.method() == "HEAD";
        for _ in 0..MAX_INFORMATIONAL {
            let framing = ready!(channel.poll_response(cx, head, to_head))?;
            match head.status {
                200.. => return Poll::Ready(Ok(framing)),
                101 => break,
                _ => head.clear(),
            }
        }
        Poll::Ready(Err(CopyError::Informational))
    }

    /// One step towards the response's end. A copy that was answered before it was sent needs no more of the body.
    fn poll_rest(&mut self, cx: &mut Context<'_>, channel: &mut Channel) -> Poll<Result<(), CopyError>> {
        if let Poll::Ready(error) = self.poll_end(cx) {
            return Poll::Ready(Err(error));
        }
        let _ = self.poll_body(cx, channel);
        loop {
            match ready!(channel.poll_frame(cx))? {
                Frame::Data(data) => channel.consumed(data.len()),
                Frame::End(_) => return Poll::Ready(Ok(())),
            }
        }
    }
}
