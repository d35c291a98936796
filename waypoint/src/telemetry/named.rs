//! What the telemetry of services names: where logs go, and who takes spans. Of each there may be a number at a time: what
//! nobody names any more makes room for others.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use model::Str;
use model::telemetry::{Collector, Exporter, LogService, LogSink, Telemetry};

use super::log::OUTPUT;

/// Who takes spans, and how.
pub(super) type SpansTo = (Collector, Exporter);

/// Names, each with the number of those who say it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Names<K: Eq + Hash>(Arc<HashMap<K, usize>>);

impl<K: Eq + Hash> Default for Names<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Clone + Eq + Hash> Names<K> {
    /// Whether anybody says it.
    pub fn contains(&self, name: &K) -> bool {
        self.0.contains_key(name)
    }

    fn follow<'a>(&mut self, then: impl Iterator<Item = &'a K>, now: impl Iterator<Item = &'a K>)
    where
        K: 'a,
    {
        for name in now {
            *Arc::make_mut(&mut self.0).entry(name.clone()).or_default() += 1;
        }
        for name in then {
            let names = Arc::make_mut(&mut self.0);
            if let Some(count) = names.get_mut(name) {
                *count -= 1;
                if *count == 0 {
                    names.remove(name);
                }
            }
        }
    }
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Named {
    /// The files of logs; the program's own output is none.
    pub(super) files: Names<Str>,
    /// The services that take logs.
    pub(super) services: Names<LogService>,
    /// Those who take spans.
    pub(super) spans: Names<SpansTo>,
}

impl Named {
    /// Follows what is told of a service: what was, and what is now.
    pub fn follow(&mut self, then: Option<&Telemetry>, now: Option<&Telemetry>) {
        self.files.follow(files(then), files(now));
        self.services.follow(services(then), services(now));
        let [then, now] = [then, now].map(|told| {
            let tracing = told.and_then(|told| told.tracing.as_deref());
            tracing.map(|tracing| (tracing.collector.clone(), tracing.exporter.clone()))
        });
        self.spans.follow(then.iter(), now.iter());
    }
}

fn sinks(told: Option<&Telemetry>) -> impl Iterator<Item = &LogSink> {
    let logs = told.and_then(|told| told.logs.as_deref()).unwrap_or_default();
    logs.iter().map(|log| &log.sink)
}

fn files(told: Option<&Telemetry>) -> impl Iterator<Item = &Str> {
    sinks(told).filter_map(|sink| match sink {
        LogSink::File { path, .. } => Some(path).filter(|path| &***path != OUTPUT),
        LogSink::Service(_) => None,
    })
}

fn services(told: Option<&Telemetry>) -> impl Iterator<Item = &LogService> {
    sinks(told).filter_map(|sink| match sink {
        LogSink::Service(service) => Some(&**service),
        LogSink::File { .. } => None,
    })
}
