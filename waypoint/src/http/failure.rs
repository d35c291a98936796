//! Why a try of a request comes to nothing, what the client and the log are told of it, and when it is worth another try.

use std::time::Duration;

use bytes::Bytes;

use crate::http::decide::{Flag, Outcome, Response, Retries};
use crate::http::h1::Framing;
use crate::http::head::ResponseHead;
use crate::http::messages::{self, grpc_status, http_of};
use crate::http::wire::ReadError;
use crate::upstream::pool::{Lease, PoolError};

/// What the log says where a connection was not made in time.
const CONNECT_TIMEOUT: &str = "connection_timeout";

/// How long the first pause is at most, where nothing is said (Envoy's `base_interval`).
const BACKOFF: Duration = Duration::from_millis(25);
/// No clock counts to what durations can be; no request lives so long.
const LONGEST_PAUSE: Duration = Duration::from_secs(86_400);

/// Why a try came to nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    /// 0 where there is nobody to answer.
    pub(super) status: u16,
    pub(super) flag: Flag,
    pub(super) detail: &'static str,
    pub(super) class: Class,
}

/// What retries distinguish.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    Final,
    Connect,
    /// The connection of HTTP/1.1 that it was sent on was used before and ended without a byte: it may have ended before the
    /// request.
    Stale,
    Reset,
    Refused,
    TryTimeout,
}

impl Failure {
    pub(super) const fn new(status: u16, flag: Flag, detail: &'static str, class: Class) -> Self {
        Self { status, flag, detail, class }
    }

    pub(super) const CLIENT_GONE: Self =
        Self::new(0, Flag::DownstreamConnectionTermination, "the client has gone", Class::Final);
    pub(super) const TIMEOUT: Self =
        Self::new(504, Flag::UpstreamRequestTimeout, "response_timeout", Class::Final);
    /// The client's own limit for a call of gRPC.
    pub(super) const DEADLINE: Self =
        Self::new(504, Flag::UpstreamRequestTimeout, "grpc_timeout", Class::Final);
    pub(super) const TRY_TIMEOUT: Self =
        Self::new(504, Flag::UpstreamRequestTimeout, "upstream_per_try_timeout", Class::TryTimeout);
    pub(super) const HELD: Self = Self::new(503, Flag::Decided("OM"), "too_much_is_held", Class::Final);
    /// A client of HTTP/2 asked for a switch that was not made: what is no error would be one to it (RFC 8441 section 5).
    pub(super) const NO_SWITCH: Self =
        Self::new(501, Flag::DownstreamProtocolError, "no_switch_of_protocols", Class::Final);
    pub(super) const IDLE: Self =
        Self::new(504, Flag::StreamIdleTimeout, "stream_idle_timeout", Class::Final);

    pub(super) fn of_pool(error: &PoolError) -> Self {
        tracing::debug!(%error, "no connection to an endpoint");
        match error {
            PoolError::Overflow(_) | PoolError::Pending => {
                Self::new(503, Flag::UpstreamOverflow, "overflow", Class::Final)
            }
            PoolError::Timeout(_) => {
                Self::new(503, Flag::UpstreamConnectionFailure, CONNECT_TIMEOUT, Class::Connect)
            }
            PoolError::Connect(_) | PoolError::Http2(_) => {
                Self::new(503, Flag::UpstreamConnectionFailure, "connection_failure", Class::Connect)
            }
            PoolError::NoSwitch => Self::NO_SWITCH,
            PoolError::Unsendable => {
                Self::new(400, Flag::DownstreamProtocolError, "unsendable", Class::Final)
            }
        }
    }

    /// The response's head did not come.
    pub(super) fn of_response(error: &ReadError, stale: bool) -> Self {
        tracing::debug!(%error, "no response from an endpoint");
        let ended = Self::new(
            503,
            Flag::UpstreamConnectionTermination,
            "upstream_reset_before_response_started{connection_termination}",
            if stale { Class::Stale } else { Class::Reset },
        );
        match error {
            ReadError::Refused(_) => {
                Self::new(502, Flag::UpstreamProtocolError, "protocol_error", Class::Final)
            }
            error if error.is_unseen() => {
                Self::new(503, Flag::UpstreamRemoteReset, "remote_refused_stream", Class::Refused)
            }
            ReadError::Stream(error) if error.is_reset() => {
                Self::new(503, Flag::UpstreamRemoteReset, "remote_reset", Class::Reset)
            }
            ReadError::Ended | ReadError::Truncated | ReadError::Io(_) | ReadError::Stream(_) => ended,
        }
    }

    /// The request's body did not come.
    pub(super) fn of_request(error: &ReadError) -> Self {
        match error {
            ReadError::Refused(_) => Self::new(400, Flag::DownstreamProtocolError, "bad_body", Class::Final),
            _ => Self::CLIENT_GONE,
        }
    }

    /// The answer to the client.
    pub(super) fn response(self, fields: Box<[(Box<str>, Box<str>)]>) -> Response {
        let body = Bytes::from_static(self.detail.as_bytes());
        let mut fields = fields.into_vec();
        if self.detail == Self::DEADLINE.detail {
            // What the client says itself then (DEADLINE_EXCEEDED), not that something is unavailable and worth another try.
            fields.push(("grpc-status".into(), "4".into()));
        }
        Response { status: self.status, fields: fields.into_boxed_slice(), body, flag: self.flag }
    }

    /// What the endpoint says is no HTTP, or not what was asked for.
    pub(super) const fn of_protocol(detail: &'static str) -> Self {
        Self::new(502, Flag::UpstreamProtocolError, detail, Class::Final)
    }
}

impl Retries {
    /// The pause before the next try, after `tries` of them. `random` is any number.
    pub(super) fn pause(&self, tries: u32, random: u64) -> Duration {
        let (base, most) = self.backoff.map_or((BACKOFF, 10), |least| (least, 9));
        let times = (1_u32 << tries.saturating_sub(1).min(10)).min(most);
        let range = u64::try_from(base.saturating_mul(times).as_nanos()).unwrap_or(u64::MAX).max(1);
        let part = Duration::from_nanos(random % range);
        self.backoff.unwrap_or_default().saturating_add(part).min(LONGEST_PAUSE)
    }

    pub(super) fn take(&self, class: Class) -> bool {
        match class {
            Class::Final => false,
            Class::Connect => self.connect_failure,
            Class::Stale | Class::Reset | Class::TryTimeout => self.reset,
            Class::Refused => self.refused_stream || self.reset,
        }
    }

    pub(super) fn take_response(&self, reply: &ResponseHead) -> bool {
        // What is too much already gets no more of it, unless that is said (as Envoy has it).
        if reply.fields.values(b"x-envoy-ratelimited").next().is_some() {
            return self.rate_limited;
        }
        let status = reply.status;
        (self.server_errors && status >= 500)
            || (self.gateway_errors && matches!(status, 502..=504))
            || self.statuses.contains(&status)
            || (!self.grpc_codes.is_empty()
                && grpc_status(&reply.fields).is_some_and(|code| self.grpc_codes.contains(&code)))
    }
}

/// What a try says of its endpoint.
pub(super) fn outcome(result: &Result<(Lease, Framing), Failure>, reply: &ResponseHead) -> Option<Outcome> {
    match result {
        Ok(_) => Some(Outcome::Status(grpc_status(&reply.fields).map_or(reply.status, http_of))),
        // How long a client waits says nothing of who answers: with short limits one could have endpoints ejected for all.
        Err(failure) if failure.detail == Failure::DEADLINE.detail => None,
        Err(Failure { flag: Flag::UpstreamRequestTimeout, .. }) => Some(Outcome::TimedOut),
        Err(failure) if failure.detail == CONNECT_TIMEOUT => Some(Outcome::TimedOut),
        Err(Failure { class: Class::Stale, .. }) => None,
        Err(failure) if failure.class != Class::Final || failure.status == 502 => Some(Outcome::Failed),
        Err(_) => None,
    }
}

/// Whether a try has come to what it was made for.
pub(super) fn is_good(result: &Result<(Lease, Framing), Failure>, reply: &ResponseHead) -> bool {
    result.is_ok() && reply.status < 500
}

/// Makes the head of an answer of our own; returns its body. What goes to gRPC is a status of gRPC.
pub(super) fn local_head(head: &mut ResponseHead, response: &Response, grpc: bool) -> Bytes {
    head.status = response.status;
    for (name, value) in &response.fields {
        head.fields.push(name.as_bytes(), value.as_bytes());
    }
    let date = httpdate::fmt_http_date(std::time::SystemTime::now());
    head.fields.push(b"date", date.as_bytes());
    if grpc {
        head.status = 200;
        head.fields.set(b"content-type", b"application/grpc");
        messages::put_status(&mut head.fields, response.status, &response.body);
        return Bytes::new();
    }
    if !response.body.is_empty() && head.fields.values(b"content-type").next().is_none() {
        head.fields.push(b"content-type", b"text/plain");
    }
    response.body.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_long_a_client_waits_is_not_its_endpoints_fault() {
        let reply = ResponseHead::default();
        for (failure, expected) in [
            (Failure::DEADLINE, None),
            (Failure::TIMEOUT, Some(Outcome::TimedOut)),
            (Failure::TRY_TIMEOUT, Some(Outcome::TimedOut)),
            (Failure::CLIENT_GONE, None),
            (Failure::of_protocol("no HTTP"), Some(Outcome::Failed)),
        ] {
            assert_eq!(outcome(&Err(failure), &reply), expected, "{failure:?}");
        }
    }

    fn pauses(backoff: Option<Duration>, tries: u32) -> (Duration, Duration) {
        let retries = Retries { backoff, ..Retries::default() };
        let all: Vec<Duration> =
            (0..10_000_u64).map(|n| retries.pause(tries, n.wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
        (all.iter().copied().min().unwrap_or_default(), all.iter().copied().max().unwrap_or_default())
    }

    #[test]
    fn no_pause_is_shorter_than_was_written_and_each_may_be_longer_than_the_one_before() {
        let millis = Duration::from_millis;
        for (tries, most) in [(1, 200), (2, 300), (3, 500), (4, 900), (5, 1_000), (50, 1_000)] {
            let (least, longest) = pauses(Some(millis(100)), tries);
            assert!(least >= millis(100) && least < millis(110), "{tries}: {least:?}");
            assert!(longest < millis(most) && longest > millis(most * 9 / 10), "{tries}: {longest:?}");
        }
        for (tries, most) in [(1, 25), (2, 50), (4, 200), (5, 250), (50, 250)] {
            let (least, longest) = pauses(None, tries);
            assert!(least < millis(1), "{tries}: {least:?}");
            assert!(longest < millis(most) && longest > millis(most * 9 / 10), "{tries}: {longest:?}");
        }
        assert_eq!(pauses(Some(Duration::MAX), 3), (LONGEST_PAUSE, LONGEST_PAUSE));
    }
}
