//! What the control plane counts, by the names that dashboards for istiod know (`pilot_*`), and some of its own.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use process::metrics::{Counter, Description, Family, Gauge, Handle, Histogram, Kind, Registry};
use tokio::time::Instant;
use xds::server::{Event, Observer};

use crate::push::Exceptions;
use crate::registry::Overview;

type ByType = Family<[(&'static str, &'static str); 1], Counter>;

/// What happens on the streams of proxies.
pub struct Streams {
    connected: Handle<(), Gauge>,
    refused: Handle<(), Counter>,
    pushes: Arc<ByType>,
    resources: Arc<ByType>,
    bytes: Arc<ByType>,
    rejects: Arc<ByType>,
    convergence: Handle<(), Histogram>,
    queued: Handle<(), Histogram>,
    /// When a refusal was logged last.
    said: Mutex<Option<Instant>>,
}

/// Refusals are logged at most so often.
const PAUSE: Duration = Duration::from_secs(1);

impl Streams {
    /// Registers the metrics.
    #[must_use]
    pub fn new(registry: &Registry) -> Arc<Self> {
        let latency = registry
            .latencies::<()>("pilot_proxy_convergence_time", "From a change until a proxy answered for it");
        let queued = registry.latencies::<()>(
            "pilot_proxy_queue_time",
            "From when a change was to be sent until it was to a proxy",
        );
        Arc::new(Self {
            connected: registry.gauge("pilot_xds", "Proxies that are connected"),
            refused: registry.counter("culvertd_xds_refused", "Streams that were refused"),
            pushes: registry.counters("pilot_xds_pushes", "Responses that went to proxies"),
            resources: registry
                .counters("culvertd_xds_resources", "Resources and removals that went to proxies"),
            bytes: registry.counters("culvertd_xds_bytes", "Bytes of resources that went to proxies"),
            rejects: registry.counters("pilot_total_xds_rejects", "Responses that proxies refused"),
            convergence: latency.with(&()),
            queued: queued.with(&()),
            said: Mutex::default(),
        })
    }
}

/// The last part of a type's URL, as istiod's metrics have it.
fn short(type_url: &str) -> &'static str {
    match type_url {
        proto::ADDRESS_TYPE_URL => "istio.workload.Address",
        proto::AUTHORIZATION_TYPE_URL => "istio.security.Authorization",
        proto::MESH_SETTINGS_TYPE_URL => "culvert.wire.v1.MeshSettings",
        proto::HTTP_SERVICE_TYPE_URL => "culvert.waypoint.v1.HttpService",
        proto::HTTP_POLICY_TYPE_URL => "culvert.waypoint.v1.HttpPolicy",
        proto::TRAFFIC_TYPE_URL => "culvert.waypoint.v1.ServiceTraffic",
        proto::AUTHENTICATION_TYPE_URL => "culvert.waypoint.v1.Authentication",
        proto::RATE_LIMIT_TYPE_URL => "culvert.waypoint.v1.RateLimit",
        proto::AUTHORIZER_TYPE_URL => "culvert.waypoint.v1.Authorizer",
        proto::REACHABLE_TYPE_URL => "culvert.waypoint.v1.Reachable",
        _ => "other",
    }
}

impl Observer for Streams {
    fn observe(&self, event: Event<'_>) {
        match event {
            Event::Connected(_) => self.connected.inc(),
            Event::Disconnected(..) => self.connected.dec(),
            Event::Refused(status) => {
                self.refused.inc();
                // Whoever is refused comes back, perhaps with many others.
                let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
                if said.is_none_or(|at| at.elapsed() >= PAUSE) {
                    *said = Some(Instant::now());
                    tracing::warn!(code = ?status.code(), reason = status.message(), "a stream was refused");
                }
            }
            Event::Pushed { type_url, resources, removed, bytes } => {
                let labels = [("type", short(type_url))];
                self.pushes.with(&labels).inc();
                self.resources.with(&labels).add((resources + removed) as u64);
                self.bytes.with(&labels).add(bytes as u64);
            }
            Event::Rejected { type_url, .. } => self.rejects.with(&[("type", short(type_url))]).inc(),
            Event::Queued(time) => self.queued.observe(time.as_secs_f64()),
            Event::Converged(time) => self.convergence.observe(time.as_secs_f64()),
        }
    }
}

/// Registers what is kept elsewhere.
pub fn register(registry: &Registry, overview: &Arc<Mutex<Overview>>, exceptions: &Exceptions) {
    let look = |read: fn(&Overview) -> u64| {
        let overview = overview.clone();
        move || read(&overview.lock().unwrap_or_else(PoisonError::into_inner))
    };
    let number = |name, help, kind, read: fn(&Overview) -> u64| {
        let look = look(read);
        registry.collect(Description { name, help, kind }, move |out| out.integer(&|_| {}, look()));
    };
    number(
        "culvertd_compile_steps",
        "Objects, instances and services looked at: what the changes cost",
        Kind::Counter,
        |o| o.steps,
    );
    number(
        "pilot_total_rejected_configs",
        "Times that an object, or a part of the settings, was found to have errors",
        Kind::Counter,
        |o| o.rejected,
    );
    let triggers = overview.clone();
    let description = Description {
        name: "pilot_push_triggers",
        help: "Commits that had changes of this type",
        kind: Kind::Counter,
    };
    registry.collect(description, move |out| {
        let triggers = triggers.lock().unwrap_or_else(PoisonError::into_inner).triggers.clone();
        for (kind, count) in triggers {
            out.integer(&|labels| labels.pair("type", kind), count);
        }
    });
    let objects = overview.clone();
    let description =
        Description { name: "culvertd_objects", help: "Objects that are read", kind: Kind::Gauge };
    registry.collect(description, move |out| {
        let overview = objects.lock().unwrap_or_else(PoisonError::into_inner).objects.clone();
        for (kind, count) in overview {
            out.integer(&|labels| labels.pair("kind", kind), count);
        }
    });
    let exceptions = exceptions.clone();
    let description = Description {
        name: "culvertd_exceptions",
        help: "Resources that proxies of another make are told otherwise",
        kind: Kind::Gauge,
    };
    registry.collect(description, move |out| out.integer(&|_| {}, exceptions.list().len()));
}
