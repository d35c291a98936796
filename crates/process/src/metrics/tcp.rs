//! The L4 metrics of connections, with the names and labels that Istio's dashboards and Kiali read (facts 4.12).
//!
//! `istio_tcp_received_bytes_total` counts what the client sent and the proxy received ("during request"),
//! `istio_tcp_sent_bytes_total` what the server sent ("during response"), whichever side reports. Seen from a
//! source workload the two are therefore the wrong way round. That is how Istio's metrics have always been
//! (istio/istio#32399), and readers rely on it; the access log has them the workload's way. [`TcpSeries`] takes
//! the bytes by their direction on the connection, so that callers need not know.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};

use super::{
    Counter, Description, Family, Handle, Kind, LabelWriter, Labels, Metric, Registry, SampleWriter,
};

/// Which end of a connection reports it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reporter {
    /// The proxy of the client.
    Source,
    /// The proxy of the server.
    Destination,
    /// A waypoint between them.
    Waypoint,
}

impl Reporter {
    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Waypoint => "waypoint",
        }
    }
}

/// How a connection was protected on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ConnectionSecurity {
    /// TLS with both identities proved.
    MutualTls,
    /// Both identities are known, but nothing was encrypted: the connection never left the node.
    NodeLocal,
    /// Plaintext, or nothing is known.
    Unknown,
}

impl ConnectionSecurity {
    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::NodeLocal => "node_local",
            Self::Unknown => "unknown",
        }
    }
}

/// Why a connection failed: the label `response_flags` of `istio_tcp_connections_failed_total`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FailureFlag {
    /// A policy refused it.
    Deny,
    /// The endpoint could not be reached.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// The HTTP/2 handshake failed.
    H2HandshakeFailure,
    /// Something on the network, as a rule a NetworkPolicy, swallows the tunnel's packets.
    NetworkPolicy,
    /// An identity is missing, invalid or not the expected one.
    IdentityError,
    /// The peer's certificate is revoked.
    CertRevoked,
}

impl FailureFlag {
    /// The label's value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

/// What the labels say of one end of a connection. Empty texts read `unknown`. Make it once for a workload and
/// share it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Party {
    /// `…_workload`: the name of the object that made it.
    pub workload: Arc<str>,
    /// `…_canonical_service`, and `…_app`.
    pub canonical_service: Arc<str>,
    /// `…_canonical_revision`, and `…_version`.
    pub canonical_revision: Arc<str>,
    /// `…_workload_namespace`.
    pub namespace: Arc<str>,
    /// `…_principal`: the SPIFFE ID; of a source only when it was proved.
    pub principal: Arc<str>,
    /// `…_cluster`.
    pub cluster: Arc<str>,
    /// `…_region`.
    pub region: Arc<str>,
    /// `…_zone`.
    pub zone: Arc<str>,
}

static EMPTY: LazyLock<Arc<str>> = LazyLock::new(|| "".into());
static UNKNOWN: LazyLock<Arc<Party>> = LazyLock::new(|| Arc::new(Party::default()));

impl Default for Party {
    fn default() -> Self {
        let empty = || EMPTY.clone();
        Self {
            workload: empty(),
            canonical_service: empty(),
            canonical_revision: empty(),
            namespace: empty(),
            principal: empty(),
            cluster: empty(),
            region: empty(),
            zone: empty(),
        }
    }
}

impl Party {
    /// One of whom nothing is known.
    #[must_use]
    pub fn unknown() -> Arc<Self> {
        UNKNOWN.clone()
    }

    /// Without what no label shows that is left when labels are hidden; `None` when that is all of it.
    pub(super) fn without(&self, end: &str, hidden: &dyn Fn(&str) -> bool) -> Option<Self> {
        let all = |labels: &[&str]| labels.iter().all(|label| hidden(&format!("{end}_{label}")));
        let mut left = self.clone();
        for (field, labels) in [
            (&mut left.workload, &["workload"][..]),
            (&mut left.canonical_service, &["canonical_service", "app"]),
            (&mut left.canonical_revision, &["canonical_revision", "version"]),
            (&mut left.namespace, &["workload_namespace"]),
            (&mut left.principal, &["principal"]),
            (&mut left.cluster, &["cluster"]),
            (&mut left.region, &["region"]),
            (&mut left.zone, &["zone"]),
        ] {
            if all(labels) {
                *field = EMPTY.clone();
            }
        }
        (left != *self).then_some(left)
    }
}

/// The service that a connection was made to. Empty texts read `unknown`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ServiceLabels {
    /// `destination_service`: the host name.
    pub hostname: Arc<str>,
    /// `destination_service_name`.
    pub name: Arc<str>,
    /// `destination_service_namespace`.
    pub namespace: Arc<str>,
}

impl Default for ServiceLabels {
    fn default() -> Self {
        Self { hostname: EMPTY.clone(), name: EMPTY.clone(), namespace: EMPTY.clone() }
    }
}

/// The labels of a connection.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TcpLabels {
    /// Who reports.
    pub reporter: Reporter,
    /// The client.
    pub source: Arc<Party>,
    /// The server.
    pub destination: Arc<Party>,
    /// The service it was reached by.
    pub service: ServiceLabels,
    /// How it was protected.
    pub security: ConnectionSecurity,
    /// What differs from the standard labels.
    pub custom: Option<Arc<CustomLabels>>,
}

/// Labels that differ from the standard ones. They are part of what tells series apart.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct CustomLabels {
    /// Standard labels that are left out.
    pub hidden: Box<[Arc<str>]>,
    /// Labels that are there besides, or in the place of hidden ones. Valid names.
    pub added: Box<[(Arc<str>, Arc<str>)]>,
}

impl CustomLabels {
    /// Whether a label is left out.
    #[must_use]
    pub fn hides(&self, name: &str) -> bool {
        self.hidden.iter().any(|hidden| **hidden == *name)
    }

    /// Forgets what hidden labels would have told of two ends and a service.
    pub(super) fn forget(
        &self,
        (source, destination): (&mut Arc<Party>, &mut Arc<Party>),
        service: &mut ServiceLabels,
        security: &mut ConnectionSecurity,
    ) {
        let hidden = |name: &str| self.hides(name);
        for (end, party) in [("source", source), ("destination", destination)] {
            if let Some(less) = party.without(end, &hidden) {
                *party = Arc::new(less);
            }
        }
        let unknown = ServiceLabels::default();
        for (name, field, none) in [
            ("destination_service", &mut service.hostname, unknown.hostname),
            ("destination_service_name", &mut service.name, unknown.name),
            ("destination_service_namespace", &mut service.namespace, unknown.namespace),
        ] {
            if hidden(name) {
                *field = none;
            }
        }
        if hidden("connection_security_policy") {
            *security = ConnectionSecurity::Unknown;
        }
    }
}

fn known(value: &str) -> &str {
    if value.is_empty() { "unknown" } else { value }
}

/// Writes the labels that connections and requests share, but for the protocol, the flags, how it was protected, and
/// where the two ends are.
pub(super) fn write_parties(
    reporter: Reporter,
    (source, destination): (&Party, &Party),
    service: &ServiceLabels,
    pair: &mut dyn FnMut(&str, &str),
) {
    pair("reporter", reporter.as_str());
    pair("source_workload", known(&source.workload));
    pair("source_canonical_service", known(&source.canonical_service));
    pair("source_canonical_revision", known(&source.canonical_revision));
    pair("source_workload_namespace", known(&source.namespace));
    pair("source_principal", known(&source.principal));
    pair("source_app", known(&source.canonical_service));
    pair("source_version", known(&source.canonical_revision));
    pair("source_cluster", known(&source.cluster));
    pair("destination_service", known(&service.hostname));
    pair("destination_service_namespace", known(&service.namespace));
    pair("destination_service_name", known(&service.name));
    pair("destination_workload", known(&destination.workload));
    pair("destination_canonical_service", known(&destination.canonical_service));
    pair("destination_canonical_revision", known(&destination.canonical_revision));
    pair("destination_workload_namespace", known(&destination.namespace));
    pair("destination_principal", known(&destination.principal));
    pair("destination_app", known(&destination.canonical_service));
    pair("destination_version", known(&destination.canonical_revision));
    pair("destination_cluster", known(&destination.cluster));
}

/// Writes the labels of where the two ends are.
pub(super) fn write_localities((source, destination): (&Party, &Party), pair: &mut dyn FnMut(&str, &str)) {
    pair("source_region", known(&source.region));
    pair("source_zone", known(&source.zone));
    pair("destination_region", known(&destination.region));
    pair("destination_zone", known(&destination.zone));
}

impl TcpLabels {
    /// Forgets what the hidden labels would have told, so that what differs in nothing else is one series.
    pub fn hide(&mut self, custom: Arc<CustomLabels>) {
        custom.forget((&mut self.source, &mut self.destination), &mut self.service, &mut self.security);
        self.custom = Some(custom);
    }

    fn write_with(&self, out: &mut LabelWriter<'_>, flags: &str) {
        let custom = self.custom.as_deref();
        let mut pair = |name: &str, value: &str| {
            if !custom.is_some_and(|custom| custom.hides(name)) {
                out.pair(name, value);
            }
        };
        let ends = (&*self.source, &*self.destination);
        write_parties(self.reporter, ends, &self.service, &mut pair);
        pair("request_protocol", "tcp");
        pair("response_flags", flags);
        pair("connection_security_policy", self.security.as_str());
        write_localities(ends, &mut pair);
        for (name, value) in custom.iter().flat_map(|custom| &custom.added) {
            out.pair(name, value);
        }
    }
}

impl Labels for TcpLabels {
    fn write(&self, out: &mut LabelWriter<'_>) {
        self.write_with(out, "-");
    }
}

/// The labels of a connection that failed.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct FailedLabels {
    labels: TcpLabels,
    flag: FailureFlag,
}

impl Labels for FailedLabels {
    fn write(&self, out: &mut LabelWriter<'_>) {
        self.labels.write_with(out, self.flag.as_str());
    }
}

/// What is counted for connections of one label set.
#[derive(Debug, Default)]
pub struct TcpSeries {
    opened: Counter,
    closed: Counter,
    received: Counter,
    sent: Counter,
    /// The metrics that connections count in, a bit each.
    shown: AtomicU8,
}

/// The metrics that a connection counts in: a set of these.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TcpColumns(u8);

impl TcpColumns {
    /// `istio_tcp_connections_opened_total`
    pub const OPENED: Self = Self(1);
    /// `istio_tcp_connections_closed_total`
    pub const CLOSED: Self = Self(1 << 1);
    /// `istio_tcp_received_bytes_total`
    pub const RECEIVED: Self = Self(1 << 2);
    /// `istio_tcp_sent_bytes_total`
    pub const SENT: Self = Self(1 << 3);
    /// All of them.
    pub const ALL: Self = Self(0b1111);

    /// With `other`.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl TcpSeries {
    /// A connection was opened.
    pub fn opened(&self) {
        self.opened_in(TcpColumns::ALL);
    }

    /// A connection was opened of which no more than these metrics are kept.
    pub fn opened_in(&self, columns: TcpColumns) {
        if self.shown.load(Relaxed) & columns.0 != columns.0 {
            self.shown.fetch_or(columns.0, Relaxed);
        }
        self.opened.inc();
    }

    /// A connection ended.
    pub fn closed(&self) {
        self.closed.inc();
    }

    /// The client sent `bytes`.
    pub fn from_client(&self, bytes: u64) {
        self.received.add(bytes);
    }

    /// The server sent `bytes`.
    pub fn from_server(&self, bytes: u64) {
        self.sent.add(bytes);
    }

    /// How many connections are open.
    #[must_use]
    pub fn open(&self) -> u64 {
        // `closed` first: read the other way round, one that opens and closes in between would count as minus one.
        let closed = self.closed.get();
        self.opened.get().saturating_sub(closed)
    }
}

impl Metric for TcpSeries {
    fn write(&self, column: usize, out: &mut SampleWriter<'_, '_>, labels: &dyn Fn(&mut LabelWriter<'_>)) {
        if self.shown.load(Relaxed) >> column & 1 == 0 {
            return;
        }
        let counter = match column {
            0 => &self.opened,
            1 => &self.closed,
            2 => &self.received,
            _ => &self.sent,
        };
        counter.write(0, out, labels);
    }
}

const CONNECTIONS: &[Description] = &[
    Description {
        name: "istio_tcp_connections_opened",
        help: "The total number of TCP connections opened",
        kind: Kind::Counter,
    },
    Description {
        name: "istio_tcp_connections_closed",
        help: "The total number of TCP connections closed",
        kind: Kind::Counter,
    },
    Description {
        name: "istio_tcp_received_bytes",
        help: "The total number of bytes that clients sent",
        kind: Kind::Counter,
    },
    Description {
        name: "istio_tcp_sent_bytes",
        help: "The total number of bytes that servers sent",
        kind: Kind::Counter,
    },
];

const FAILED: &[Description] = &[Description {
    name: "istio_tcp_connections_failed",
    help: "The total number of TCP connections that failed, by reason",
    kind: Kind::Counter,
}];

/// The handle of a connection's metrics.
pub type TcpHandle = Handle<TcpLabels, TcpSeries>;

/// The L4 metrics.
#[derive(Clone, Debug)]
pub struct TcpMetrics {
    connections: Arc<Family<TcpLabels, TcpSeries>>,
    failed: Arc<Family<FailedLabels, Counter>>,
}

impl TcpMetrics {
    /// Registers the metrics, with at most `limit` series each.
    #[must_use]
    pub fn new(registry: &Registry, limit: usize) -> Self {
        Self {
            connections: registry.family(CONNECTIONS, limit, TcpSeries::default),
            failed: registry.family(FAILED, limit, Counter::default),
        }
    }

    /// The metrics of connections with these labels: ask once for a connection and keep the handle.
    #[must_use]
    pub fn connection(&self, labels: &TcpLabels) -> TcpHandle {
        self.connections.with(labels)
    }

    /// Counts a connection that failed.
    pub fn failed(&self, labels: &TcpLabels, flag: FailureFlag) {
        self.failed.with(&FailedLabels { labels: labels.clone(), flag }).inc();
    }

    /// How many series of connections there are.
    #[must_use]
    pub fn series(&self) -> usize {
        self.connections.len()
    }
}
