//! Contexts of traces: read from a request, decided over, and passed on (W3C Trace Context, B3).
//!
//! A decision that somebody before us has made is kept, whatever the sampling says. What the client sends is believed as
//! an identifier only: it never makes more than one span a request.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use model::telemetry::{SpanProtocol, Tracing};

use crate::http::head::{Fields, RequestHead};

/// A span that is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// The trace's ID.
    pub trace: u128,
    /// Its own.
    pub id: u64,
    /// That of the span that it is within.
    pub parent: Option<u64>,
    /// Whether it is sent to whoever takes spans.
    pub sampled: bool,
    /// When it began.
    pub started: SystemTime,
}

/// A trace's ID as it is written.
pub(super) struct Id(pub u128);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The context that a request came with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Context {
    trace: u128,
    parent: u64,
    /// `None`: it is ours to decide.
    sampled: Option<bool>,
}

/// Numbers for IDs and shares: well spread, no secrets.
#[derive(Debug)]
pub(super) struct Random(AtomicU64);

impl Random {
    pub fn new() -> Self {
        Self(AtomicU64::new(RandomState::new().hash_one(0)))
    }

    /// SplitMix64.
    pub fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.0.fetch_add(STEP, Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An ID: one that is zero is none.
    fn id(&self) -> u64 {
        self.next().max(1)
    }
}

/// An ID for a request: a random UUID (RFC 9562, version 4).
pub(super) fn request_id(random: &Random) -> String {
    let (high, low) = (random.next(), random.next());
    let third = high & 0x0fff | 0x4000;
    let fourth = low >> 48 & 0x3fff | 0x8000;
    let (first, second, last) = (high >> 32, high >> 16 & 0xffff, low & 0xffff_ffff_ffff);
    format!("{first:08x}-{second:04x}-{third:04x}-{fourth:04x}-{last:012x}")
}

/// Begins the span of a request, and puts its context into the request's head.
pub(super) fn begin(request: &mut RequestHead, tracing: &Tracing, random: &Random) -> Span {
    let came = read(&request.fields);
    let share = u64::from(tracing.sampling.millionths());
    let decide = || random.next() % 1_000_000 < share;
    let span = match came {
        Some(context) => Span {
            trace: context.trace,
            id: random.id(),
            parent: Some(context.parent),
            sampled: context.sampled.unwrap_or_else(decide),
            started: SystemTime::now(),
        },
        None => Span {
            trace: (u128::from(random.next()) << 64) | u128::from(random.id()),
            id: random.id(),
            parent: None,
            sampled: only_decision(&request.fields).unwrap_or_else(decide),
            started: SystemTime::now(),
        },
    };
    if tracing.propagate {
        write(&mut request.fields, &span, matches!(tracing.exporter.protocol, SpanProtocol::Zipkin { .. }));
    }
    span
}

/// The first of the forms that is there and can be read.
fn read(fields: &Fields) -> Option<Context> {
    let value = |name: &'static [u8]| fields.values(name).next().and_then(|v| std::str::from_utf8(v).ok());
    if let Some(context) = value(b"traceparent").and_then(of_w3c) {
        return Some(context);
    }
    if let Some(context) = value(b"b3").and_then(of_b3) {
        return Some(context);
    }
    let (trace, parent) = (value(b"x-b3-traceid")?, value(b"x-b3-spanid")?);
    Some(Context { trace: trace_id(trace)?, parent: hex64(parent)?, sampled: only_decision(fields) })
}

/// What B3 says of sampling without a context.
fn only_decision(fields: &Fields) -> Option<bool> {
    let value = |name: &'static [u8]| fields.values(name).next();
    match (value(b"x-b3-flags"), value(b"x-b3-sampled"), value(b"b3")) {
        (Some(b"1"), ..) | (_, Some(b"1" | b"true"), _) | (.., Some(b"1" | b"d")) => Some(true),
        (_, Some(b"0" | b"false"), _) | (.., Some(b"0")) => Some(false),
        _ => None,
    }
}

/// `00-TRACE-SPAN-FLAGS` (Trace Context, section 3.2). A later version may have more behind it.
fn of_w3c(text: &str) -> Option<Context> {
    let mut parts = text.trim().split('-');
    let (version, trace) = (parts.next()?, parts.next()?);
    let (parent, flags) = (parts.next()?, parts.next()?);
    let is_hex = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let good = is_hex(version) && version != "ff" && (version != "00" || parts.next().is_none());
    if !good || trace.len() != 32 || parent.len() != 16 || !is_hex(flags) {
        return None;
    }
    let flags = u8::from_str_radix(flags, 16).ok()?;
    Some(Context { trace: trace_id(trace)?, parent: hex64(parent)?, sampled: Some(flags & 1 == 1) })
}

/// `TRACE-SPAN-SAMPLED-PARENT`, the last two of which need not be there.
fn of_b3(text: &str) -> Option<Context> {
    let mut parts = text.split('-');
    let (trace, parent) = (trace_id(parts.next()?)?, hex64(parts.next()?)?);
    let sampled = match parts.next() {
        Some("1" | "d") => Some(true),
        Some("0") => Some(false),
        _ => None,
    };
    Some(Context { trace, parent, sampled })
}

/// 32 or, of old, 16 digits; not all of them zero.
fn trace_id(text: &str) -> Option<u128> {
    let good = matches!(text.len(), 16 | 32) && text.bytes().all(|b| b.is_ascii_hexdigit());
    good.then(|| u128::from_str_radix(text, 16).ok()).flatten().filter(|id| *id != 0)
}

/// At most 16 digits, not all of them zero.
fn hex64(text: &str) -> Option<u64> {
    let good = !text.is_empty() && text.len() <= 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
    good.then(|| u64::from_str_radix(text, 16).ok()).flatten().filter(|id| *id != 0)
}

/// Puts the context of `span` in the place of what came: in each form that came, or else in that of whoever takes spans.
fn write(fields: &mut Fields, span: &Span, zipkin: bool) {
    let has = |name: &'static [u8]| fields.values(name).next().is_some();
    let (w3c, single, multiple) = (has(b"traceparent"), has(b"b3"), has(b"x-b3-traceid"));
    let none = !w3c && !single && !multiple;
    let sampled = u8::from(span.sampled);
    if w3c || (none && !zipkin) {
        let value = format!("00-{:032x}-{:016x}-{sampled:02x}", span.trace, span.id);
        fields.set(b"traceparent", value.as_bytes());
    }
    if single {
        let mut value = format!("{:032x}-{:016x}-{sampled}", span.trace, span.id);
        if let Some(parent) = span.parent {
            value.push_str(&format!("-{parent:016x}"));
        }
        fields.set(b"b3", value.as_bytes());
    }
    if multiple || (none && zipkin) {
        fields.set(b"x-b3-traceid", format!("{:032x}", span.trace).as_bytes());
        fields.set(b"x-b3-spanid", format!("{:016x}", span.id).as_bytes());
        match span.parent {
            Some(parent) => fields.set(b"x-b3-parentspanid", format!("{parent:016x}").as_bytes()),
            None => fields.remove(b"x-b3-parentspanid"),
        }
        fields.set(b"x-b3-sampled", format!("{sampled}").as_bytes());
    }
}
