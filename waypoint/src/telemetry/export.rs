//! Spans on their way to who takes them: a queue for each collector, batches, OTLP over gRPC and HTTP, Zipkin's JSON.
//!
//! A request never waits for a collector. What finds a queue full is dropped and counted; a batch that is not taken is
//! not sent again, since whoever takes spans would rather miss some than get them late and all at once.

pub(super) mod otlp;
pub(super) mod send;
mod zipkin;

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use model::telemetry::{Collector, Exporter, Facts, Headers, LogService, SpanProtocol, SpanTag, Tracing};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::ended::{Ended, protocol};
use super::log_service::{Queue, Queues};
use super::named::{Named, Names, SpansTo};
use super::trace::Span;
use super::{log, log_service};

/// Spans that wait for one collector.
const QUEUE: usize = 4096;
/// Spans of one batch.
const BATCH: usize = 512;
/// So long the first span of a batch waits for others.
const GATHER: Duration = Duration::from_secs(1);
/// Collectors that there may be at a time; more than these get nothing until one of them is not named any more.
const COLLECTORS: usize = 16;

/// A connection that is being made to a collector.
pub type Connecting = Pin<Box<dyn Future<Output = std::io::Result<Box<dyn net::Io>>> + Send>>;

/// Makes connections to collectors: through the mesh, or past it.
pub trait Connect: Send + Sync + 'static {
    /// Connects. The caller limits the time.
    fn connect(&self, collector: &Collector) -> Connecting;
}

/// A span that has ended.
#[derive(Clone, Debug)]
pub(super) struct Finished {
    pub span: Span,
    pub duration: Duration,
    pub name: String,
    pub failed: bool,
    pub attributes: Vec<(String, Attribute)>,
}

/// What a span's attribute is.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Attribute {
    Text(String),
    Int(i64),
}

/// What was done with spans.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub taken: u64,
    pub dropped: u64,
    pub sent: u64,
    pub failed: u64,
}

#[derive(Debug, Default)]
struct Counters {
    taken: AtomicU64,
    dropped: AtomicU64,
    sent: AtomicU64,
    failed: AtomicU64,
}

/// Who the spans are of.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub name: String,
    pub namespace: String,
}

#[derive(Default)]
struct SpanQueues {
    /// `None` of those for which there is no room.
    all: HashMap<SpansTo, Option<mpsc::Sender<Finished>>>,
    open: usize,
    /// What settings in force name; `None` where nobody says.
    named: Option<Names<SpansTo>>,
}

impl SpanQueues {
    /// Lets go of queues for those that nobody names any more: what is in them is still sent.
    fn make_room(&mut self) {
        if let Some(named) = &self.named {
            self.all.retain(|to, _| named.contains(to));
            self.open = self.all.values().flatten().count();
        }
    }
}

/// The exporters: one for each collector that services name. They run on a runtime that is not the data plane's.
pub struct Exporters {
    queues: RwLock<SpanQueues>,
    connect: Arc<dyn Connect>,
    runtime: Option<Handle>,
    origin: Origin,
    counters: Arc<Counters>,
    logs: Queues,
}

impl fmt::Debug for Exporters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporters").field("counters", &self.counters).finish_non_exhaustive()
    }
}

struct Nowhere;

impl Connect for Nowhere {
    fn connect(&self, _: &Collector) -> Connecting {
        Box::pin(async { Err(std::io::Error::other("there is nobody to connect to")) })
    }
}

impl Exporters {
    /// Exporters that run on `runtime` and reach collectors by `connect`. Spans are of `name` in `namespace`.
    #[must_use]
    pub fn new(runtime: Handle, connect: Arc<dyn Connect>, name: &str, namespace: &str) -> Arc<Self> {
        Self::with(Some(runtime), connect, name, namespace)
    }

    /// None: spans are dropped, and counted.
    #[must_use]
    pub fn none() -> Arc<Self> {
        Self::with(None, Arc::new(Nowhere), "", "")
    }

    fn with(runtime: Option<Handle>, connect: Arc<dyn Connect>, name: &str, namespace: &str) -> Arc<Self> {
        Arc::new(Self {
            queues: RwLock::default(),
            connect,
            runtime,
            origin: Origin { name: name.to_owned(), namespace: namespace.to_owned() },
            counters: Arc::default(),
            logs: Queues::default(),
        })
    }

    /// The way to a service that takes logs, `None` if there is none.
    pub(super) fn log_service(&self, service: &LogService) -> Option<Queue> {
        self.logs.open(service, self.runtime.as_ref()?, &self.connect, &self.origin)
    }

    /// Says what settings in force name.
    pub(super) fn in_force(&self, named: &Named) {
        self.logs.in_force(&named.services);
        let is_same = |queues: &SpanQueues| queues.named.as_ref() == Some(&named.spans);
        if !is_same(&self.queues.read().unwrap_or_else(PoisonError::into_inner)) {
            let mut queues = self.queues.write().unwrap_or_else(PoisonError::into_inner);
            queues.named = Some(named.spans.clone());
            // They are asked about again.
            queues.all.retain(|_, queue| queue.is_some());
        }
    }

    /// What was done with the entries of services that take logs.
    pub(super) fn entries(&self) -> &log_service::Counters {
        &self.logs.counters
    }

    pub(super) fn counts(&self) -> Counts {
        let Counters { taken, dropped, sent, failed } = &*self.counters;
        Counts {
            taken: taken.load(Relaxed),
            dropped: dropped.load(Relaxed),
            sent: sent.load(Relaxed),
            failed: failed.load(Relaxed),
        }
    }

    /// Hands a span to the exporter of its collector.
    pub(super) fn take(&self, tracing: &Tracing, span: Finished) {
        let taken = self.queue(tracing).is_some_and(|queue| queue.try_send(span).is_ok());
        let counter = if taken { &self.counters.taken } else { &self.counters.dropped };
        counter.fetch_add(1, Relaxed);
    }

    fn queue(&self, tracing: &Tracing) -> Option<mpsc::Sender<Finished>> {
        let runtime = self.runtime.as_ref()?;
        let key = (tracing.collector.clone(), tracing.exporter.clone());
        if let Some(queue) = self.queues.read().unwrap_or_else(PoisonError::into_inner).all.get(&key) {
            return queue.clone();
        }
        let mut queues = self.queues.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.all.get(&key) {
            return queue.clone();
        }
        if queues.open >= COLLECTORS {
            queues.make_room();
        }
        if queues.open >= COLLECTORS {
            // Said once, and not again before other settings are in force.
            if queues.named.as_ref().is_some_and(|named| named.contains(&key)) {
                tracing::error!(host = &*key.0.host, COLLECTORS, "too many collectors of spans");
                queues.all.insert(key, None);
            }
            return None;
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        let work = Work {
            collector: key.0.clone(),
            exporter: key.1.clone(),
            connect: Arc::clone(&self.connect),
            origin: self.origin.clone(),
            counters: Arc::clone(&self.counters),
        };
        runtime.spawn(work.run(receiver));
        queues.all.insert(key, Some(sender.clone()));
        queues.open += 1;
        Some(sender)
    }
}

/// One exporter.
struct Work {
    collector: Collector,
    exporter: Exporter,
    connect: Arc<dyn Connect>,
    origin: Origin,
    counters: Arc<Counters>,
}

impl Work {
    /// Ends when nobody sends any more.
    async fn run(self, mut spans: mpsc::Receiver<Finished>) {
        let mut failing = false;
        let mut batch = Vec::with_capacity(BATCH);
        while let Some(first) = spans.recv().await {
            batch.push(first);
            let gathered = tokio::time::sleep(GATHER);
            tokio::pin!(gathered);
            while batch.len() < BATCH {
                let more = tokio::select! {
                    more = spans.recv() => more,
                    () = &mut gathered => None,
                };
                let Some(span) = more else { break };
                batch.push(span);
            }
            let count = batch.len() as u64;
            let sent = tokio::time::timeout(self.exporter.timeout, self.send(&batch)).await;
            let sent = sent.unwrap_or_else(|_| Err(send::SendError::Timeout));
            match &sent {
                Ok(()) => self.counters.sent.fetch_add(count, Relaxed),
                Err(_) => self.counters.failed.fetch_add(count, Relaxed),
            };
            // Once for each time that it begins to fail.
            if let (Err(error), false) = (&sent, failing) {
                let provider = &*self.collector.provider;
                tracing::warn!(provider, host = &*self.collector.host, %error, "spans are not taken");
            }
            failing = sent.is_err();
            batch.clear();
        }
    }

    async fn send(&self, batch: &[Finished]) -> Result<(), send::SendError> {
        let io = self.connect.connect(&self.collector).await.map_err(send::SendError::Connect)?;
        let target = send::Target {
            authority: format!("{}:{}", self.collector.host, self.collector.port),
            headers: &self.exporter.headers,
        };
        match &self.exporter.protocol {
            SpanProtocol::OtlpGrpc => {
                send::grpc(io, &target, otlp::METHOD, otlp::encode(batch, &self.origin)).await
            }
            SpanProtocol::OtlpHttp { path } => {
                let body = otlp::encode(batch, &self.origin);
                send::post(io, &target, path, "application/x-protobuf", body).await
            }
            SpanProtocol::Zipkin { path } => {
                let body = zipkin::encode(batch, &self.origin);
                send::post(io, &target, path, "application/json", body).await
            }
        }
    }
}

/// What a request's span tells. The names of attributes are those of Envoy, which Istio's users know.
pub(super) fn finished(span: &Span, tracing: &Tracing, ended: &Ended<'_>) -> Finished {
    let (request, record) = (ended.request, ended.record);
    let longest = tracing.max_tag_length as usize;
    let cut = |text: &str| text.get(..text.floor_char_boundary(longest)).unwrap_or_default().to_owned();
    let service = ended.service();
    let mut attributes = vec![
        ("component".to_owned(), Attribute::Text("proxy".to_owned())),
        ("http.method".to_owned(), Attribute::Text(request.method().to_owned())),
        (
            "http.url".to_owned(),
            Attribute::Text(cut(&format!(
                "{}://{}{}",
                request.scheme(),
                request.authority(),
                request.target()
            ))),
        ),
        ("http.protocol".to_owned(), Attribute::Text(protocol(request.version).to_owned())),
        ("http.status_code".to_owned(), Attribute::Int(record.status.into())),
        ("response_flags".to_owned(), Attribute::Text(ended.flags().into_owned())),
        ("response_code_details".to_owned(), Attribute::Text(ended.details().to_owned())),
        ("peer.address".to_owned(), Attribute::Text(ended.connection.client.ip().to_string())),
        ("request_size".to_owned(), number(record.received)),
        ("response_size".to_owned(), number(record.sent)),
    ];
    let mut add = |name: &str, value: Option<String>| {
        attributes.extend(value.map(|value| (name.to_owned(), Attribute::Text(value))));
    };
    let field = |name| ended.header(Headers::Request, name).ok().map(std::borrow::Cow::into_owned);
    add("guid:x-request-id", field("x-request-id"));
    add("user_agent", field("user-agent").map(|agent| cut(&agent)));
    add("upstream_address", record.target.as_ref().map(|target| target.address.to_string()));
    add("upstream_cluster", ended.cluster());
    add("route", ended.route());
    add("istio.destination_service", service.map(|service| service.hostname.to_string()));
    add("istio.source_workload", ended.source().map(|workload| workload.workload_name().to_owned()));
    add("istio.source_namespace", ended.source().map(|workload| workload.namespace.to_string()));
    add("istio.source_principal", ended.connection.identity.as_ref().map(ToString::to_string));
    for (name, tag) in &tracing.tags {
        add(name, tag_value(tag, ended).map(|value| cut(&value)));
    }
    if let Some(status) = record.grpc_status {
        attributes.push(("grpc.status_code".to_owned(), Attribute::Int(status.into())));
    }
    Finished {
        span: *span,
        duration: ended.duration,
        name: service.map_or_else(
            || request.authority().to_owned(),
            |s| format!("{}:{}/*", s.hostname, ended.decided.port),
        ),
        failed: record.status >= 500 || record.status == 0,
        attributes,
    }
}

fn number(bytes: u64) -> Attribute {
    Attribute::Int(i64::try_from(bytes).unwrap_or(i64::MAX))
}

fn tag_value(tag: &SpanTag, ended: &Ended<'_>) -> Option<String> {
    match tag {
        SpanTag::Literal(text) => Some(text.to_string()),
        SpanTag::Environment { name, default } => {
            let value = std::env::var(&**name).unwrap_or_else(|_| default.to_string());
            (!value.is_empty()).then_some(value)
        }
        SpanTag::Header { name, default } => {
            let value = ended.header(Headers::Request, name).map_or_else(|_| default.to_string(), Into::into);
            (!value.is_empty()).then_some(value)
        }
        SpanTag::Format(format) => {
            let mut text = String::new();
            log::of_format(&mut text, format, ended);
            Some(text)
        }
    }
}

/// Nanoseconds since 1970.
pub(super) fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use model::http::Percent;
    use model::telemetry::{AccessLog, LogEntries, LogSink, Telemetry};

    use super::*;

    /// What a service tells two others.
    fn told(host: usize) -> Telemetry {
        let collector = |kind: &str| Collector {
            provider: kind.into(),
            namespace: None,
            host: format!("{kind}-{host}.test").as_str().into(),
            port: 4317,
        };
        let service =
            LogService { collector: collector("logs"), name: "all".into(), entries: LogEntries::Connections };
        let log = AccessLog { sink: LogSink::Service(Box::new(service)), filter: None };
        let exporter = Exporter {
            protocol: SpanProtocol::OtlpGrpc,
            timeout: Duration::from_secs(1),
            headers: Box::default(),
        };
        let tracing = Tracing {
            collector: collector("spans"),
            exporter,
            sampling: Percent::of(1, 1),
            report: true,
            propagate: true,
            tags: Box::default(),
            max_tag_length: 256,
        };
        Telemetry { logs: Some([log].into()), tracing: Some(Box::new(tracing)), ..Telemetry::default() }
    }

    #[tokio::test]
    async fn those_who_take_logs_and_spans_make_room_once_nobody_names_them() {
        let exporters = Exporters::new(Handle::current(), Arc::new(Nowhere), "waypoint", "shop");
        let opens = |told: &Telemetry| {
            let LogSink::Service(service) = &told.logs.as_ref().unwrap()[0].sink else {
                return (false, false);
            };
            let spans = exporters.queue(told.tracing.as_ref().unwrap()).is_some();
            (exporters.log_service(service).is_some(), spans)
        };
        let all: Vec<Telemetry> = (0..=COLLECTORS).map(told).collect();
        let (last, others) = all.split_last().unwrap();
        let mut named = Named::default();
        all.iter().for_each(|told| named.follow(None, Some(told)));
        exporters.in_force(&named);
        for told in others {
            assert_eq!(opens(told), (true, true));
        }
        assert_eq!((opens(last), opens(last)), ((false, false), (false, false)), "one too many");
        // Those who are there stay: their queues are not thrown away for one that finds no room.
        let queue = |told: &Telemetry| exporters.queue(told.tracing.as_ref().unwrap()).unwrap();
        let first = queue(&all[0]);
        assert_eq!(opens(last), (false, false));
        assert!(first.same_channel(&queue(&all[0])));
        // Two services name it, then one, then none.
        named.follow(None, Some(&all[1]));
        named.follow(Some(&all[1]), None);
        exporters.in_force(&named);
        assert_eq!(opens(last), (false, false));
        named.follow(Some(&all[1]), None);
        exporters.in_force(&named);
        assert_eq!(opens(last), (true, true));
        assert_eq!(opens(&all[1]), (false, false), "there is no room for what nobody names");
    }
}
