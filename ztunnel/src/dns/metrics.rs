//! The metrics of the DNS proxy, with Istio's names and labels (facts 4.12).

use std::sync::Arc;

use process::metrics::{Counter, Family, Gauge, Handle, Histogram, LabelWriter, Labels, Registry};

use super::wire::kind;

/// How a query came.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// Who asked what.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct QueryLabels {
    kind: &'static str,
    transport: Transport,
    service: Arc<str>,
    revision: Arc<str>,
}

impl QueryLabels {
    /// Of a query of the type `kind` from a pod of this application and version.
    pub(super) fn new(kind: u16, transport: Transport, service: &Arc<str>, revision: &Arc<str>) -> Self {
        Self { kind: kind_name(kind), transport, service: service.clone(), revision: revision.clone() }
    }
}

impl Labels for QueryLabels {
    fn write(&self, out: &mut LabelWriter<'_>) {
        let known = |text: &Arc<str>| if text.is_empty() { "unknown".to_owned() } else { text.to_string() };
        out.pair("request_query_type", self.kind);
        out.pair("request_protocol", if self.transport == Transport::Udp { "udp" } else { "tcp" });
        out.pair("source_canonical_service", &known(&self.service));
        out.pair("source_canonical_revision", &known(&self.revision));
    }
}

/// A type's name; one for all that are rare, because a client can ask for 65,536 of them.
fn kind_name(number: u16) -> &'static str {
    match number {
        kind::A => "a",
        2 => "ns",
        5 => "cname",
        kind::SOA => "soa",
        12 => "ptr",
        15 => "mx",
        16 => "txt",
        kind::AAAA => "aaaa",
        kind::SRV => "srv",
        35 => "naptr",
        64 => "svcb",
        65 => "https",
        kind::ANY => "any",
        _ => "other",
    }
}

type Reason = [(&'static str, &'static str); 1];

/// The metrics.
#[derive(Clone, Debug)]
pub struct DnsMetrics {
    pub(super) requests: Arc<Family<QueryLabels, Counter>>,
    pub(super) upstream_requests: Arc<Family<QueryLabels, Counter>>,
    pub(super) upstream_failures: Arc<Family<QueryLabels, Counter>>,
    pub(super) upstream_duration: Arc<Family<QueryLabels, Histogram>>,
    dropped: Arc<Family<Reason, Counter>>,
    pub(super) from_cache: Handle<(), Counter>,
    pub(super) joined: Handle<(), Counter>,
    pub(super) stale: Handle<(), Counter>,
    pub(super) paused: Handle<(), Counter>,
    pub(super) mismatched: Handle<(), Counter>,
    pub(super) cache_entries: Handle<(), Gauge>,
    pub(super) cache_bytes: Handle<(), Gauge>,
}

impl DnsMetrics {
    /// Registers the metrics.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        Self {
            requests: registry.counters("istio_dns_requests", "DNS queries of pods"),
            upstream_requests: registry
                .counters("istio_dns_upstream_requests", "DNS queries that upstream resolvers were asked"),
            upstream_failures: registry
                .counters("istio_dns_upstream_failures", "DNS queries that no upstream resolver answered"),
            upstream_duration: registry.latencies(
                "istio_dns_upstream_request_duration_seconds",
                "Time that upstream resolvers took",
            ),
            dropped: registry.counters("culvert_dns_dropped", "DNS queries that got no or a refusing answer"),
            from_cache: registry.counter("culvert_dns_cache_hits", "DNS queries that the cache answered"),
            joined: registry
                .counter("culvert_dns_joined", "DNS queries that waited for the answer to an equal one"),
            stale: registry
                .counter("culvert_dns_stale_answers", "DNS queries answered by a record that had expired"),
            paused: registry.counter(
                "culvert_dns_paused",
                "Times that a pod's DNS queries waited because it had used up its share of a thread",
            ),
            mismatched: registry.counter(
                "culvert_dns_mismatched_responses",
                "Datagrams from upstream resolvers that answered no query: late, broken or forged",
            ),
            cache_entries: registry.gauge("culvert_dns_cache_entries", "Responses in the DNS cache"),
            cache_bytes: registry.gauge("culvert_dns_cache_bytes", "Memory of the DNS cache"),
        }
    }

    /// Counts a query that got no proper answer.
    pub(super) fn dropped(&self, reason: &'static str) {
        self.dropped.with(&[("reason", reason)]).inc();
    }
}
