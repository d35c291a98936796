//! A client for one watch, which tells when the API server answers, and does not wait for ever.
//!
//! The library that follows a kind says nothing of an answer without events, and waits for the head of an answer as long
//! as the connection lasts: a server that takes requests and says no more, or a network that swallows packets, would
//! leave a kind as it was with nobody knowing. Here
//! * the head of an answer has so long to come, and its body to go on ([`SILENCE`], if nothing else is said). The server sends a bookmark each minute or so
//!   where nothing happens; a body that stays silent ends, and the watch is asked for again from where it was;
//! * each good answer is told;
//! * the server's clock is compared with ours by the date that each answer carries.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use hyper::body::{Body as HttpBody, Frame};
use kube::Client;
use kube::client::Body;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep};
use tower::BoxError;

/// So long a server may say nothing, unless something else is said.
pub const SILENCE: Duration = Duration::from_secs(120);
/// A difference of the clocks that is told. Certificates are valid two minutes before they are made.
const TOLD: i64 = 30;

/// How far the API server's clock is ahead of ours, in seconds.
#[derive(Debug, Default)]
pub struct ClockSkew(AtomicI64);

impl ClockSkew {
    /// The difference; negative if the server's clock is behind.
    #[must_use]
    pub fn seconds(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Compares the date of an answer that just came with a clock that says `now`.
    fn note(&self, headers: &HeaderMap, now: SystemTime) {
        let date = headers.get(http::header::DATE).and_then(|date| date.to_str().ok());
        let Some(date) = date.and_then(|date| httpdate::parse_http_date(date).ok()) else { return };
        let ahead = match date.duration_since(now) {
            Ok(ahead) => i64::try_from(ahead.as_secs()).unwrap_or(i64::MAX),
            // A date has whole seconds, cut off.
            Err(behind) => -i64::try_from(behind.duration().as_secs().saturating_sub(1)).unwrap_or(i64::MAX),
        };
        let before = self.0.swap(ahead, Ordering::Relaxed);
        if ahead.abs() >= TOLD && before.abs() < TOLD {
            let (seconds, how) = (ahead.abs(), if ahead > 0 { "behind" } else { "ahead of" });
            tracing::error!(
                seconds,
                "the clock of this control plane is {how} the API server's by {seconds} s: tokens are judged by the one, \
                 certificates are made by the other; have both follow the same time (NTP)"
            );
        } else if ahead.abs() < TOLD && before.abs() >= TOLD {
            tracing::info!("the clocks of this control plane and of the API server agree again");
        }
    }
}

/// The client, and a count of its good answers.
pub(super) fn attentive(
    client: &Client,
    skew: &Arc<ClockSkew>,
    silence: Duration,
) -> (Client, watch::Receiver<u64>) {
    let (answered, answers) = watch::channel(0u64);
    let (inner, skew, answered) = (client.clone(), skew.clone(), Arc::new(answered));
    let service = tower::service_fn(move |request: Request<Body>| {
        let (inner, skew, answered) = (inner.clone(), skew.clone(), answered.clone());
        async move {
            let answer = tokio::time::timeout(silence, inner.send(request)).await;
            let response: Response<Body> = answer.map_err(|_| silent(silence))??;
            skew.note(response.headers(), SystemTime::now());
            if response.status().is_success() {
                answered.send_modify(|count| *count += 1);
            }
            Ok::<_, BoxError>(response.map(|body| Patient::new(body, silence)))
        }
    });
    (Client::new(service, client.default_namespace().to_owned()), answers)
}

fn silent(silence: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", silence.as_secs()))
}

/// A body that ends when it is silent for too long.
struct Patient {
    body: Body,
    limit: Duration,
    silence: Pin<Box<Sleep>>,
}

impl Patient {
    fn new(body: Body, limit: Duration) -> Self {
        Self { body, limit, silence: Box::pin(sleep(limit)) }
    }
}

impl HttpBody for Patient {
    type Data = Bytes;
    type Error = <Body as HttpBody>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            let end = Instant::now() + self.limit;
            self.silence.as_mut().reset(end);
            return Poll::Ready(frame);
        }
        // The end of a watch is nothing unusual; that of a list leaves it incomplete, which is an error.
        self.silence.as_mut().poll(cx).map(|()| None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_of_clocks_is_known_by_the_date_of_an_answer() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let skew = ClockSkew::default();
        let note = |date: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(http::header::DATE, date.parse().unwrap());
            skew.note(&headers, now);
            skew.seconds()
        };
        assert_eq!(note(&httpdate::fmt_http_date(now)), 0);
        assert_eq!(note(&httpdate::fmt_http_date(now + Duration::from_secs(90))), 90);
        assert_eq!(note("nonsense"), 90, "as it was");
        assert_eq!(note(&httpdate::fmt_http_date(now - Duration::from_secs(61))), -60);
    }
}
