//! Which series a request counts in.
//!
//! A label set has some thirty texts. It is looked up by what those come from, which a request has at hand: the client's
//! workload and identity, the endpoint, how it went. Each thread remembers the series of what it saw, so that a
//! request costs one look-up in a table that nobody else has, and the texts are looked at again only now and then.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};
use model::http::HttpService;
use model::{SpiffeId, Workload};
use process::metrics::http::{
    Columns, HttpHandle, HttpLabels, HttpMetrics, HttpObservation, RequestProtocol,
};
use process::metrics::tcp::{ConnectionSecurity, Reporter};
use telemetry::{party, service_labels};
use tokio::time::{Duration, Instant};

use super::ended::Ended;
use super::plan::{Group, Plan};
use crate::http::decide::{About, Flag};

/// As many label sets a thread remembers.
const REMEMBERED: usize = 4096;
/// So long it remembers them, so that workloads that have gone are let go of.
const KEPT: Duration = Duration::from_secs(60);

/// What tells label sets apart, beside what the two ends are.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Outcome {
    status: u16,
    flag: Flag,
    exhausted: bool,
    delayed: bool,
    grpc_status: Option<u8>,
    protocol: RequestProtocol,
}

/// What a series is remembered by. What is compared by its address is kept alive here.
struct Known {
    hash: u64,
    outcome: Outcome,
    source: Option<Arc<Workload>>,
    identity: Option<Arc<SpiffeId>>,
    service: Option<Arc<HttpService>>,
    about: Option<Arc<About>>,
    series: Box<[(HttpHandle, Columns)]>,
}

/// The series that one thread remembers.
pub(super) struct Memory {
    known: HashTable<Known>,
    hasher: DefaultHashBuilder,
    since: Instant,
    /// Look-ups since the clock was last looked at.
    lookups: u32,
}

impl Default for Memory {
    fn default() -> Self {
        let (hasher, since) = (DefaultHashBuilder::default(), Instant::now());
        Self { known: HashTable::new(), hasher, since, lookups: 0 }
    }
}

fn address<T>(of: Option<&Arc<T>>) -> usize {
    of.map_or(0, |of| Arc::as_ptr(of).addr())
}

impl Memory {
    /// Counts a request.
    pub fn count(&mut self, metrics: &HttpMetrics, plan: &Plan, ended: &Ended<'_>, what: &HttpObservation) {
        let outcome = Outcome {
            status: ended.record.status,
            flag: ended.record.flag,
            exhausted: ended.record.retries_exhausted,
            delayed: ended.decided.delayed,
            grpc_status: ended.record.grpc_status,
            protocol: if ended.request.is_grpc() { RequestProtocol::Grpc } else { RequestProtocol::Http },
        };
        let messages = outcome.protocol == RequestProtocol::Grpc;
        let columns = if messages { Columns::ALL.with(Columns::MESSAGES) } else { Columns::ALL };
        if plan.per_request {
            for group in &plan.groups {
                let labels = labels(ended, outcome, group);
                metrics.requests(&labels).observe(what, group.columns.and(columns));
            }
            return;
        }
        self.forget();
        let (source, about) = (ended.source(), ended.about());
        let (identity, service) = (ended.connection.identity.as_ref(), ended.decided.service.as_ref());
        let mut hasher = std::hash::BuildHasher::build_hasher(&self.hasher);
        (outcome, address(source), address(about), address(service), identity).hash(&mut hasher);
        let hash = hasher.finish();
        let same = |k: &Known| {
            k.outcome == outcome
                && address(k.source.as_ref()) == address(source)
                && address(k.about.as_ref()) == address(about)
                && address(k.service.as_ref()) == address(service)
                && k.identity == ended.connection.identity
        };
        if let Some(known) = self.known.find(hash, same) {
            for (series, columns) in &known.series {
                series.observe(what, *columns);
            }
            return;
        }
        let series = plan
            .groups
            .iter()
            .map(|group| (metrics.requests(&labels(ended, outcome, group)), group.columns.and(columns)));
        let known = Known {
            hash,
            outcome,
            source: source.cloned(),
            identity: identity.cloned(),
            service: service.cloned(),
            about: about.cloned(),
            series: series.collect(),
        };
        for (series, columns) in &known.series {
            series.observe(what, *columns);
        }
        self.known.insert_unique(hash, known, |k| k.hash);
    }

    fn forget(&mut self) {
        self.lookups += 1;
        if self.known.len() >= REMEMBERED || (self.lookups >= 4096 && self.since.elapsed() > KEPT) {
            self.known.clear();
            self.since = Instant::now();
        }
        if self.lookups >= 4096 {
            self.lookups = 0;
        }
    }
}

fn labels(ended: &Ended<'_>, outcome: Outcome, group: &Group) -> HttpLabels {
    let about = ended.about();
    // What it was sent to; of what was not sent, what it was for.
    let service = ended.service().and_then(|key| ended.mesh.service(key));
    let workload = about.and_then(|about| about.workload.as_ref());
    let proved = about.filter(|about| about.tunnelled).and(workload).and_then(|w| w.identity().ok());
    let mut labels = HttpLabels {
        reporter: Reporter::Waypoint,
        source: party(ended.source(), ended.connection.identity.as_deref()),
        destination: party(workload, proved.as_ref()),
        service: service_labels(service),
        security: if ended.connection.identity.is_some() {
            ConnectionSecurity::MutualTls
        } else {
            ConnectionSecurity::Unknown
        },
        protocol: outcome.protocol,
        response_code: outcome.status,
        response_flags: ended.flags().as_ref().into(),
        grpc_status: outcome.grpc_status,
        custom: None,
    };
    if let Some(custom) = group.labels.custom(ended) {
        labels.hide(custom);
    }
    labels
}
