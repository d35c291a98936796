//! The metrics of requests, with the names and labels that Istio's dashboards and Kiali read (facts 4.12).
//!
//! A request counts in six metrics that share their labels, so one look-up serves all of them. Each thread adds to a
//! part of a series of its own: threads that count the same requests share no cache line.

use std::cell::Cell;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::tcp::{
    ConnectionSecurity, CustomLabels, Party, Reporter, ServiceLabels, write_localities, write_parties,
};
use super::{Description, Family, Handle, Kind, LabelWriter, Labels, Metric, Registry, SampleWriter};

/// What a request is, by its content type.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RequestProtocol {
    /// HTTP.
    Http,
    /// gRPC.
    Grpc,
}

/// The labels of a request.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HttpLabels {
    /// Who reports.
    pub reporter: Reporter,
    /// The client.
    pub source: Arc<Party>,
    /// The server.
    pub destination: Arc<Party>,
    /// The service it was sent to.
    pub service: ServiceLabels,
    /// How the client's connection was protected.
    pub security: ConnectionSecurity,
    /// What it is.
    pub protocol: RequestProtocol,
    /// The status that the client was sent; 0 if none was.
    pub response_code: u16,
    /// Envoy's response flags, `-` without any.
    pub response_flags: Arc<str>,
    /// The status of gRPC, where there was one.
    pub grpc_status: Option<u8>,
    /// What differs from the standard labels.
    pub custom: Option<Arc<CustomLabels>>,
}

impl HttpLabels {
    /// Forgets what the hidden labels would have told, so that what differs in nothing else is one series.
    pub fn hide(&mut self, custom: Arc<CustomLabels>) {
        let hidden = |name: &str| custom.hides(name);
        custom.forget((&mut self.source, &mut self.destination), &mut self.service, &mut self.security);
        if hidden("request_protocol") {
            self.protocol = RequestProtocol::Http;
        }
        if hidden("response_code") {
            self.response_code = 0;
        }
        if hidden("response_flags") {
            self.response_flags = "".into();
        }
        if hidden("grpc_response_status") {
            self.grpc_status = None;
        }
        self.custom = Some(custom);
    }
}

impl Labels for HttpLabels {
    fn write(&self, out: &mut LabelWriter<'_>) {
        let custom = self.custom.as_deref();
        let mut pair = |name: &str, value: &str| {
            if !custom.is_some_and(|custom| custom.hides(name)) {
                out.pair(name, value);
            }
        };
        let ends = (&*self.source, &*self.destination);
        write_parties(self.reporter, ends, &self.service, &mut pair);
        pair(
            "request_protocol",
            match self.protocol {
                RequestProtocol::Http => "http",
                RequestProtocol::Grpc => "grpc",
            },
        );
        pair("response_code", &self.response_code.to_string());
        // A label without a value is one that is not there.
        if let Some(status) = self.grpc_status {
            pair("grpc_response_status", &status.to_string());
        }
        pair("response_flags", &self.response_flags);
        pair("connection_security_policy", self.security.as_str());
        write_localities(ends, &mut pair);
        for (name, value) in custom.iter().flat_map(|custom| &custom.added) {
            out.pair(name, value);
        }
    }
}

/// Upper bounds of buckets, those of Envoy: of milliseconds, and of bytes too.
const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Observations of whole numbers, in parts of which `SCALE` make one of the metric's unit.
#[derive(Debug)]
struct Buckets {
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum: AtomicU64,
}

impl Default for Buckets {
    fn default() -> Self {
        Self { counts: std::array::from_fn(|_| AtomicU64::new(0)), sum: AtomicU64::new(0) }
    }
}

impl Buckets {
    fn observe(&self, value: f64, exact: u64) {
        let index = BOUNDS.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get(index) {
            count.fetch_add(1, Relaxed);
        }
        self.sum.fetch_add(exact, Relaxed);
    }
}

/// How many parts a series has.
const SHARDS: usize = 8;

/// What one thread, or several of many, has counted of a series.
#[derive(Debug, Default)]
struct Shard {
    requests: AtomicU64,
    duration_us: Buckets,
    request: Buckets,
    response: Buckets,
    request_messages: AtomicU64,
    response_messages: AtomicU64,
}

/// What is counted of requests of one label set.
#[derive(Debug, Default)]
pub struct HttpSeries {
    shards: [OnceLock<Box<Shard>>; SHARDS],
    /// The metrics that something was counted for, a bit each.
    shown: AtomicU8,
}

/// The metrics that a request counts in: a set of these.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Columns(u8);

impl Columns {
    /// `istio_requests_total`
    pub const REQUESTS: Self = Self(1);
    /// `istio_request_duration_milliseconds`
    pub const DURATION: Self = Self(1 << 1);
    /// `istio_request_bytes`
    pub const REQUEST_BYTES: Self = Self(1 << 2);
    /// `istio_response_bytes`
    pub const RESPONSE_BYTES: Self = Self(1 << 3);
    /// `istio_request_messages_total`
    pub const REQUEST_MESSAGES: Self = Self(1 << 4);
    /// `istio_response_messages_total`
    pub const RESPONSE_MESSAGES: Self = Self(1 << 5);
    /// Those of every request.
    pub const ALL: Self = Self(0b1111);
    /// Those of gRPC.
    pub const MESSAGES: Self = Self(0b11_0000);

    /// Whether `other` is in it.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// With `other`.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct HttpObservation {
    /// How long it took.
    pub duration: Duration,
    /// Bytes of its body.
    pub request_bytes: u64,
    /// Bytes of its response's body.
    pub response_bytes: u64,
    /// Messages of gRPC in it.
    pub request_messages: u64,
    /// Messages of gRPC in its response.
    pub response_messages: u64,
}

/// The part of each series that this thread adds to.
fn own_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    OWN.with(|own| {
        if own.get() == usize::MAX {
            own.set(NEXT.fetch_add(1, Relaxed) % SHARDS);
        }
        own.get()
    })
}

impl HttpSeries {
    /// Counts a request in the metrics of `columns`.
    pub fn observe(&self, what: &HttpObservation, columns: Columns) {
        let Some(shard) = self.shards.get(own_shard()) else { return };
        let shard = shard.get_or_init(Box::default);
        if columns.has(Columns::REQUESTS) {
            shard.requests.fetch_add(1, Relaxed);
        }
        if columns.has(Columns::DURATION) {
            let micros = u64::try_from(what.duration.as_micros()).unwrap_or(u64::MAX);
            shard.duration_us.observe(micros as f64 / 1000.0, micros);
        }
        if columns.has(Columns::REQUEST_BYTES) {
            shard.request.observe(what.request_bytes as f64, what.request_bytes);
        }
        if columns.has(Columns::RESPONSE_BYTES) {
            shard.response.observe(what.response_bytes as f64, what.response_bytes);
        }
        if columns.has(Columns::MESSAGES) {
            if columns.has(Columns::REQUEST_MESSAGES) {
                shard.request_messages.fetch_add(what.request_messages, Relaxed);
            }
            if columns.has(Columns::RESPONSE_MESSAGES) {
                shard.response_messages.fetch_add(what.response_messages, Relaxed);
            }
        }
        if self.shown.load(Relaxed) & columns.0 != columns.0 {
            self.shown.fetch_or(columns.0, Relaxed);
        }
    }

    /// How many requests were counted.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.sum(|shard| &shard.requests)
    }

    fn parts(&self) -> impl Iterator<Item = &Shard> {
        self.shards.iter().filter_map(OnceLock::get).map(|shard| &**shard)
    }

    fn sum(&self, of: fn(&Shard) -> &AtomicU64) -> u64 {
        self.parts().map(|shard| of(shard).load(Relaxed)).sum()
    }

    fn histogram(
        &self,
        of: fn(&Shard) -> &Buckets,
        scale: f64,
        out: &mut SampleWriter<'_, '_>,
        labels: &dyn Fn(&mut LabelWriter<'_>),
    ) {
        let mut cumulative = 0;
        for (place, bound) in BOUNDS.iter().copied().chain([f64::INFINITY]).enumerate() {
            let of_bucket = self.parts().filter_map(|shard| of(shard).counts.get(place));
            cumulative += of_bucket.map(|count| count.load(Relaxed)).sum::<u64>();
            out.bucket(labels, bound, cumulative);
        }
        let sum: u64 = self.parts().map(|shard| of(shard).sum.load(Relaxed)).sum();
        out.sum_and_count(labels, sum as f64 / scale, cumulative);
    }
}

impl Metric for HttpSeries {
    fn write(&self, column: usize, out: &mut SampleWriter<'_, '_>, labels: &dyn Fn(&mut LabelWriter<'_>)) {
        if self.shown.load(Relaxed) >> column & 1 == 0 {
            return;
        }
        match column {
            0 => out.integer(labels, self.requests()),
            1 => self.histogram(|shard| &shard.duration_us, 1000.0, out, labels),
            2 => self.histogram(|shard| &shard.request, 1.0, out, labels),
            3 => self.histogram(|shard| &shard.response, 1.0, out, labels),
            4 => out.integer(labels, self.sum(|shard| &shard.request_messages)),
            _ => out.integer(labels, self.sum(|shard| &shard.response_messages)),
        }
    }
}

const REQUESTS: &[Description] = &[
    Description { name: "istio_requests", help: "The total number of requests", kind: Kind::Counter },
    Description {
        name: "istio_request_duration_milliseconds",
        help: "How long requests took, to the end of the response",
        kind: Kind::Histogram,
    },
    Description { name: "istio_request_bytes", help: "Bytes of requests' bodies", kind: Kind::Histogram },
    Description { name: "istio_response_bytes", help: "Bytes of responses' bodies", kind: Kind::Histogram },
    Description {
        name: "istio_request_messages",
        help: "The total number of gRPC messages that clients sent",
        kind: Kind::Counter,
    },
    Description {
        name: "istio_response_messages",
        help: "The total number of gRPC messages that servers sent",
        kind: Kind::Counter,
    },
];

/// The handle of one label set's metrics.
pub type HttpHandle = Handle<HttpLabels, HttpSeries>;

/// The metrics of requests.
#[derive(Clone, Debug)]
pub struct HttpMetrics(Arc<Family<HttpLabels, HttpSeries>>);

impl HttpMetrics {
    /// Registers the metrics, with at most `limit` series each.
    #[must_use]
    pub fn new(registry: &Registry, limit: usize) -> Self {
        Self(registry.family(REQUESTS, limit, HttpSeries::default))
    }

    /// The metrics of requests with these labels.
    #[must_use]
    pub fn requests(&self, labels: &HttpLabels) -> HttpHandle {
        self.0.with(labels)
    }

    /// How many label sets there are.
    #[must_use]
    pub fn series(&self) -> usize {
        self.0.len()
    }
}
