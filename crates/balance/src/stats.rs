//! What the balancer counts, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since the start, and two sizes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Choices that were made.
    pub picks: u64,
    /// Choices that had nothing to choose.
    pub refused: u64,
    /// Endpoints that were looked at for the choices.
    pub inspected: u64,
    /// How often a set of endpoints was sorted.
    pub partitions_built: u64,
    /// Partitions that had to go because a service had too many.
    pub partitions_evicted: u64,
    /// Endpoints put last after a failure.
    pub ejections: u64,
    /// Endpoints back in their place after a success.
    pub restorations: u64,
    /// Connections that tried an endpoint whose time was over.
    pub trials: u64,
    /// Choices of an ejected endpoint because there was no other.
    pub last_resorts: u64,
    /// Choices that session affinity made.
    pub affinity_hits: u64,
    /// Clients whose endpoint was forgotten because there were too many.
    pub affinity_evicted: u64,
    /// Services that had to go because there were too many.
    pub services_evicted: u64,
    /// Services that something is kept of.
    pub services: u64,
    /// Clients whose endpoint is remembered.
    pub affinities: u64,
}

/// The counters behind [`Stats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) picks: Counter,
    pub(crate) refused: Counter,
    pub(crate) inspected: Counter,
    pub(crate) partitions_built: Counter,
    pub(crate) partitions_evicted: Counter,
    pub(crate) ejections: Counter,
    pub(crate) restorations: Counter,
    pub(crate) trials: Counter,
    pub(crate) last_resorts: Counter,
    pub(crate) affinity_hits: Counter,
    pub(crate) affinity_evicted: Counter,
    pub(crate) services_evicted: Counter,
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(crate) fn stats(&self, [services, affinities]: [u64; 2]) -> Stats {
        Stats {
            picks: self.picks.get(),
            refused: self.refused.get(),
            inspected: self.inspected.get(),
            partitions_built: self.partitions_built.get(),
            partitions_evicted: self.partitions_evicted.get(),
            ejections: self.ejections.get(),
            restorations: self.restorations.get(),
            trials: self.trials.get(),
            last_resorts: self.last_resorts.get(),
            affinity_hits: self.affinity_hits.get(),
            affinity_evicted: self.affinity_evicted.get(),
            services_evicted: self.services_evicted.get(),
            services,
            affinities,
        }
    }
}
