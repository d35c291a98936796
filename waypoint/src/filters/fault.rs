//! Faults on purpose: a delay, and an answer instead of the service's, each for a share of the requests.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use model::http::{Abort, Fault};

use super::Refusal;
use crate::http::decide::{Flag, Response};

/// Fields of an answer.
type Named = Box<[(Box<str>, Box<str>)]>;

/// The text of an aborted request's answer, as Envoy has it.
const TEXT: &[u8] = b"fault filter abort";

/// How long the request waits, by `random`.
#[must_use]
pub fn delay(fault: &Fault, random: u64) -> Option<Duration> {
    let (delay, share) = fault.delay?;
    share.takes(random).then_some(delay)
}

/// What the request is answered, by `random`.
#[must_use]
pub fn abort(fault: &Fault, random: u64) -> Option<Refusal> {
    let (abort, share) = fault.abort?;
    if !share.takes(random) {
        return None;
    }
    let (status, fields): (u16, Named) = match abort {
        Abort::Http(status) => (status, Box::default()),
        Abort::Grpc(code) => {
            let field = |name: &str, value: String| (Box::from(name), value.into_boxed_str());
            let kind = field("content-type", "application/grpc".to_owned());
            (200, [kind, field("grpc-status", code.to_string())].into())
        }
    };
    let body = if fields.is_empty() { Bytes::from_static(TEXT) } else { Bytes::new() };
    Some(Arc::new(Response { status, fields, body, flag: Flag::Decided("FI") }))
}
