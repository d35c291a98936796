//! What is told of requests and of connections of bytes: metrics, log lines, spans, and why the last of them went as they
//! did.
//!
//! ```text
//!   decide ─▶ request_started   the trace's context: read, decided over, passed on
//!   ended  ─▶ request_ended     one look-up and six counters; the lines of logs; the span; the record of the decision
//!   refused ─▶ request_refused  what could not be read has a line and a reason too
//! ```
//!
//! Invariants:
//! * nothing here waits: lines and spans go to queues with a limit, and what is dropped is counted;
//! * label sets are limited, see [`process::metrics::Family`], and a thread remembers those it sees often;
//! * what is told of a service is resolved once, by its [`model::telemetry::Telemetry`].

mod collectors;
mod ended;
mod engine;
mod export;
mod log;
mod log_service;
mod named;
mod plan;
mod recent;
mod series;
mod streams;
mod trace;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use model::http::HttpService;
use model::{Mesh, Str};
use process::logs::{Format, LogWriter};
use process::metrics::http::{HttpMetrics, HttpObservation};
use process::metrics::tcp::TcpMetrics;
use process::metrics::{Counter, DEFAULT_SERIES_LIMIT, Description, Family, Kind, Registry};

use self::ended::Ended;
use self::log::{Log, Sinks};
use self::plan::Plan;
use self::series::Memory;
use crate::http::decide::{Connection, Decided, Flag, Record};
use crate::http::head::{Fields, RequestHead};

pub use self::collectors::ThroughMesh;
pub use self::engine::register_engine;
pub use self::export::{Connect, Connecting, Exporters};
pub use self::named::Named;
pub use self::recent::Recent;
pub use self::streams::{Carried, Counted};
pub use self::trace::Span;

/// As many services' settings a thread remembers.
const RESOLVED: usize = 4096;

/// What telemetry is told of the program.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The network that addresses are on.
    pub network: Str,
    /// Whether, and how, requests are logged where no resource says anything of logs.
    pub access_log: Option<Format>,
    /// Label sets that are kept of each metric.
    pub series: usize,
    /// The waypoint's own name, which spans have as that of the service.
    pub name: Str,
    /// Its namespace.
    pub namespace: Str,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            network: "".into(),
            access_log: None,
            series: DEFAULT_SERIES_LIMIT,
            name: "waypoint".into(),
            namespace: "default".into(),
        }
    }
}

/// Counts by the policy and what it would have done.
type DryRuns = Arc<Family<[(&'static str, Arc<str>); 2], Counter>>;

/// What is told of requests. One for the program.
#[derive(Debug)]
pub struct Telemetry {
    /// Tells this one from others in the memory of threads.
    id: u64,
    settings: Settings,
    metrics: HttpMetrics,
    tcp: TcpMetrics,
    refused: Arc<Family<[(&'static str, &'static str); 1], Counter>>,
    dry_runs: DryRuns,
    sinks: Sinks,
    exporters: Arc<Exporters>,
    random: trace::Random,
    recent: Recent,
    plain: Arc<model::telemetry::Telemetry>,
}

/// What is told of the requests of one service, with everything looked up.
struct Resolved {
    /// [`Sinks::changes`] as its logs were opened.
    since: u64,
    plan: Plan,
    logs: Box<[Log]>,
}

/// What one thread remembers.
#[derive(Default)]
struct Local {
    of: u64,
    /// By the address of the settings, which stays theirs while this refers to them, also when nobody has them any more.
    resolved: HashMap<usize, (Weak<model::telemetry::Telemetry>, Arc<Resolved>)>,
    memory: Memory,
}

thread_local! {
    static LOCAL: RefCell<Local> = RefCell::default();
}

impl Telemetry {
    /// Registers the metrics. `output` is what lines go through, `exporters` are what takes spans.
    #[must_use]
    pub fn new(
        registry: &Registry,
        settings: Settings,
        output: LogWriter,
        exporters: Arc<Exporters>,
    ) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let metrics = HttpMetrics::new(registry, settings.series);
        let tcp = TcpMetrics::new(registry, settings.series);
        let refused = registry.counters(
            "culvert_requests_refused",
            "Requests that could not be read, by the status that they were answered with",
        );
        let dry_runs = registry.counters(
            "culvert_dry_run_changes",
            "Requests that a dry-run policy would have decided otherwise, by the policy and what it would have done",
        );
        let telemetry = Arc::new(Self {
            id: NEXT.fetch_add(1, Relaxed),
            settings,
            metrics,
            tcp,
            refused,
            dry_runs,
            sinks: Sinks::new(output),
            exporters,
            random: trace::Random::new(),
            recent: Recent::default(),
            plain: Arc::default(),
        });
        telemetry.register(registry);
        telemetry
    }

    fn register(self: &Arc<Self>, registry: &Registry) {
        let counter = |name, help, read: fn(&Self) -> u64| {
            let telemetry = self.clone();
            registry.collect(Description { name, help, kind: Kind::Counter }, move |out| {
                out.integer(&|_| {}, read(&telemetry));
            });
        };
        let help = "Access logs that are not written because there are too many of them";
        counter("culvert_access_logs_refused", help, |t| t.sinks.refused());
        let help = "Lines of access logs in files of their own that could not be written";
        counter("culvert_access_log_lines_dropped", help, |t| t.sinks.dropped());
        counter("culvert_spans", "Spans that were handed to an exporter", |t| t.exporters.counts().taken);
        let help = "Spans that were dropped because their exporter's queue was full, or there was none";
        counter("culvert_spans_dropped", help, |t| t.exporters.counts().dropped);
        counter("culvert_spans_sent", "Spans that a collector took", |t| t.exporters.counts().sent);
        let help = "Spans that no collector took";
        counter("culvert_spans_failed", help, |t| t.exporters.counts().failed);
        self.register_entries(registry);
    }

    /// The metrics of services that take access logs, and of what is kept for `culvert why`.
    fn register_entries(self: &Arc<Self>, registry: &Registry) {
        let number = |name, help, kind, read: fn(&Self) -> u64| {
            let telemetry = self.clone();
            registry.collect(Description { name, help, kind }, move |out| {
                out.integer(&|_| {}, read(&telemetry));
            });
        };
        let counter = |name, help, read| number(name, help, Kind::Counter, read);
        let help = "Entries that were handed to the queue of a service that takes access logs";
        counter("culvert_access_log_entries", help, |t| t.exporters.entries().taken.load(Relaxed));
        let help = "Entries that were dropped because their service's queue was full";
        counter("culvert_access_log_entries_dropped", help, |t| t.exporters.entries().dropped.load(Relaxed));
        let help = "Entries that were sent to their service";
        counter("culvert_access_log_entries_sent", help, |t| t.exporters.entries().sent.load(Relaxed));
        let help = "Entries that their service did not take";
        counter("culvert_access_log_entries_failed", help, |t| t.exporters.entries().failed.load(Relaxed));
        let help = "Streams and connections that were opened to services that take access logs";
        counter("culvert_access_log_streams", help, |t| t.exporters.entries().streams.load(Relaxed));
        let help = "Requests and connections of which no record was kept for culvert why, because there were too many";
        counter("culvert_decisions_passed_over", help, |t| t.recent.passed_over());
        let gauge = |name, help, read| number(name, help, Kind::Gauge, read);
        let help = "Entries that wait for services that take access logs";
        gauge("culvert_access_log_entries_waiting", help, |t| t.exporters.entries().waiting.load(Relaxed));
        let help = "Requests and connections of which a record is kept for culvert why";
        gauge("culvert_decisions_kept", help, |t| t.recent.kept());
        let help = "Files that access logs are written to, those included that no settings name any more";
        gauge("culvert_access_log_files", help, |t| t.sinks.count() as u64);
    }

    /// Says what the settings in force name: files that they do not are closed, and what was refused for want of room is tried
    /// again.
    pub fn in_force(&self, named: &Named) {
        // First: logs are opened anew once the sinks know.
        self.exporters.in_force(named);
        self.sinks.in_force(named);
    }

    /// Has the files of access logs opened again: log rotation has renamed them.
    pub fn reopen_logs(&self) {
        self.sinks.reopen();
    }

    /// Why the last requests and connections went as they did.
    #[must_use]
    pub fn recent(&self) -> &Recent {
        &self.recent
    }

    fn with_local<T>(&self, work: impl FnOnce(&mut Local) -> T) -> T {
        LOCAL.with_borrow_mut(|local| {
            if local.of != self.id {
                *local = Local { of: self.id, ..Local::default() };
            }
            work(local)
        })
    }

    /// Begins the request's span, if somebody takes spans of its service: to be called once `decided.service` is known,
    /// before the request is sent. The context goes into the request's head, and an ID by which logs and `culvert why` find
    /// it, if it has none.
    pub fn request_started(&self, request: &mut RequestHead, decided: &mut Decided) {
        if request.fields.values(b"x-request-id").next().is_none() {
            request.fields.push(b"x-request-id", trace::request_id(&self.random).as_bytes());
        }
        let tracing = decided.service.as_ref().and_then(|service| service.telemetry.tracing.as_deref());
        if let Some(tracing) = tracing {
            decided.trace = Some(Box::new(trace::begin(request, tracing, &self.random)));
        }
    }

    /// A request has ended: `response` are the fields of what the client was sent.
    pub fn request_ended(
        &self,
        mesh: &Mesh,
        (request, response): (&RequestHead, &Fields),
        connection: &Connection,
        decided: &Decided,
        record: &Record,
    ) {
        let place = (mesh, &self.settings.network);
        let ended = Ended::new(place, (request, response), connection, decided, record);
        let told = decided.service.as_ref().map_or(&self.plain, |service| &service.telemetry);
        self.with_local(|local| {
            let resolved = self.resolved(local, told);
            let what = HttpObservation {
                duration: ended.duration,
                request_bytes: record.received,
                response_bytes: record.sent,
                request_messages: record.request_messages,
                response_messages: record.response_messages,
            };
            local.memory.count(&self.metrics, &resolved.plan, &ended, &what);
            for log in &resolved.logs {
                log.write(&ended);
            }
        });
        self.recent.keep(&ended);
        for dry_run in decided.verdict.iter().flat_map(|verdict| &verdict.dry_run) {
            let would = if dry_run.would.is_ok() { "allow" } else { "deny" };
            let labels = [("policy", dry_run.policy.to_string().into()), ("would", would.into())];
            self.dry_runs.with(&labels).inc();
        }
        if let (Some(span), Some(tracing)) = (&decided.trace, &told.tracing)
            && span.sampled
            && tracing.report
        {
            self.exporters.take(tracing, export::finished(span, tracing, &ended));
        }
    }

    /// A request for `service`, as far as that is known, could not be read, and was answered with `status`.
    pub fn request_refused(
        &self,
        mesh: &Mesh,
        service: Option<Arc<HttpService>>,
        connection: &Connection,
        status: u16,
    ) {
        let (label, detail) = match status {
            400 => ("400", "malformed"),
            408 => ("408", "request_head_timeout"),
            426 => ("426", "low_version"),
            431 => ("431", "request_headers_too_large"),
            501 => ("501", "unknown_transfer_coding"),
            505 => ("505", "unknown_version"),
            _ => ("other", "refused"),
        };
        self.refused.with(&[("status", label)]).inc();
        let decided = Decided { service, port: connection.destination.port(), ..Decided::default() };
        let started = tokio::time::Instant::now();
        let record = Record { status, flag: Flag::DownstreamProtocolError, detail, ..Record::begun(started) };
        let (request, response) = (RequestHead::default(), Fields::default());
        self.request_ended(mesh, (&request, &response), connection, &decided, &record);
    }

    /// How many label sets of requests there are.
    #[must_use]
    pub fn series(&self) -> usize {
        self.metrics.series()
    }

    fn resolved(&self, local: &mut Local, told: &Arc<model::telemetry::Telemetry>) -> Arc<Resolved> {
        let key = Arc::as_ptr(told).addr();
        let since = self.sinks.changes();
        if let Some((_, resolved)) = local.resolved.get(&key).filter(|(_, known)| known.since == since) {
            return Arc::clone(resolved);
        }
        local.resolved.retain(|_, (told, _)| told.strong_count() > 0);
        if local.resolved.len() >= RESOLVED {
            local.resolved.clear();
        }
        let logs = match &told.logs {
            Some(logs) => logs.iter().filter_map(|log| self.sinks.open(log, &self.exporters)).collect(),
            None => self.settings.access_log.iter().map(|format| self.sinks.own(*format)).collect(),
        };
        let resolved = Arc::new(Resolved { since, plan: Plan::of(&told.metrics), logs });
        local.resolved.insert(key, (Arc::downgrade(told), Arc::clone(&resolved)));
        resolved
    }
}
