//! Time limits of a request.

use std::time::Duration;

use tokio::time::Instant;

use crate::http::decide::{Measured, Timeouts};
use crate::http::failure::Failure;
use crate::http::head::{Fields, RequestHead};

/// A time limit.
#[derive(Clone, Copy, Default)]
pub(super) struct Limit {
    /// Whether it is the client of gRPC that has set it.
    of_client: bool,
    /// What is left from when all of the request has come, which it has not.
    after_request: Option<Duration>,
    pub(super) deadline: Option<Instant>,
}

impl Limit {
    /// One of `limit`, which begins at `from`, or when all of the request has come.
    pub(super) fn new(limit: Option<Duration>, from: Instant, measured: Measured) -> Self {
        match measured {
            Measured::Whole => Self { deadline: limit.map(|limit| from + limit), ..Self::default() },
            Measured::Response => Self { after_request: limit, ..Self::default() },
        }
    }

    /// That of a request as a whole, which began at `from`: its route's, or the one that a call of gRPC has brought with it if
    /// that is shorter.
    pub(super) fn of_call(timeouts: Timeouts, request: &RequestHead, from: Instant) -> Self {
        let own = if request.is_grpc() { grpc_timeout(&request.fields) } else { None };
        let shorter = own.filter(|own| timeouts.request.is_none_or(|limit| *own < limit));
        let limit = Self::new(shorter.or(timeouts.request), from, timeouts.measured);
        Self { of_client: shorter.is_some(), ..limit }
    }

    /// What it comes to when it is over.
    pub(super) fn failure(self) -> Failure {
        if self.of_client { Failure::DEADLINE } else { Failure::TIMEOUT }
    }

    /// All of the request has come.
    pub(super) fn begin(&mut self) {
        if let Some(limit) = self.after_request.take() {
            self.deadline = Some(Instant::now() + limit);
        }
    }

    pub(super) fn is_over_at(self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}

/// What a client of gRPC says that a call may take: up to eight digits and a unit. None is none, as with Envoy.
fn grpc_timeout(fields: &Fields) -> Option<Duration> {
    let (unit, digits) = fields.values(b"grpc-timeout").next()?.split_last()?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let timeout = match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    };
    (!timeout.is_zero()).then_some(timeout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_of_grpc_says_is_read_as_the_protocol_has_it() {
        for (said, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("40m", Some(Duration::from_millis(40))),
            ("50u", Some(Duration::from_micros(50))),
            ("60n", Some(Duration::from_nanos(60))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("0S", None),
            ("100000000n", None),
            ("1", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1s", None),
            ("1 S", None),
        ] {
            let mut fields = Fields::default();
            fields.push(b"grpc-timeout", said.as_bytes());
            assert_eq!(grpc_timeout(&fields), expected, "{said}");
        }
    }

    #[test]
    fn the_shorter_of_a_calls_own_limit_and_its_routes_counts() {
        let from = Instant::now();
        let second = Some(Duration::from_secs(1));
        for (route, is_grpc, said, expected) in [
            (second, true, "100m", (true, Some(100))),
            (second, true, "2S", (false, Some(1000))),
            (None, true, "2S", (true, Some(2000))),
            (second, false, "100m", (false, Some(1000))),
            (None, false, "100m", (false, None)),
        ] {
            let mut request = RequestHead::default();
            let media = if is_grpc { "application/grpc" } else { "text/plain" };
            request.set_method("POST");
            request.fields.push(b"content-type", media.as_bytes());
            request.fields.push(b"grpc-timeout", said.as_bytes());
            let timeouts = Timeouts { request: route, ..Timeouts::default() };
            let limit = Limit::of_call(timeouts, &request, from);
            let left = limit.deadline.map(|deadline| (deadline - from).as_millis());
            assert_eq!((limit.of_client, left), expected, "{route:?} {is_grpc} {said}");
        }
    }
}
