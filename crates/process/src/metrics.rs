//! Metrics: a registry tuned for a path that opens thousands of connections a second.
//!
//! * A label set is resolved once, to a [`Handle`]; from then on an update is one atomic operation.
//! * A [`Family`] maps label sets to one value of type `M`, which may expose several metrics
//!   ([`tcp::TcpSeries`] has five): the labels are hashed, compared and stored once for all of them.
//! * The number of series of a family is limited. Past the limit new label sets share one series, whose labels
//!   all read `overflow`, so that the sum over the family stays right. When the limit is met, series that nothing
//!   uses any more make room first; what returns later starts from zero, which readers of counters take for a
//!   restart.
//! * A scrape holds no lock while it writes text, and updates take no lock at all.
//!
//! The text is Prometheus 0.0.4 or OpenMetrics 1.0.0, see [`Registry::encode`].

mod family;
pub mod http;
mod process;
pub mod tcp;
mod text;
mod value;

use std::sync::{Arc, Mutex, PoisonError};

pub use family::{Family, Handle, Labels};
pub(crate) use process::Status;
pub use process::{build_info, register_process};
pub use text::{Format, LabelWriter, SampleWriter};
pub use value::{Counter, Gauge, Histogram, Metric};

/// How many series a family may have when nothing else is said: some 10 MB of text in a scrape.
pub const DEFAULT_SERIES_LIMIT: usize = 10_000;

/// What kind of value a metric is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Only grows; its samples' name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations in buckets.
    Histogram,
}

/// A metric's name, meaning and kind.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// The name without the suffixes that kinds add (`_total`, `_bucket`, …).
    pub name: &'static str,
    /// What it counts, one sentence.
    pub help: &'static str,
    /// Its kind.
    pub kind: Kind,
}

/// What writes the samples of one or more metrics during a scrape.
pub(crate) trait Source: Send + Sync {
    /// Appends the metrics' descriptions and samples.
    fn write(&self, out: &mut text::Exposition<'_>);
}

/// All metrics of a process. Cloning shares it.
#[derive(Clone, Default)]
pub struct Registry {
    sources: Arc<Mutex<Vec<Arc<dyn Source>>>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// A registry without metrics.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn add(&self, source: Arc<dyn Source>) {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).push(source);
    }

    /// Registers a family of `M` by labels `L`. `descriptions` name the metrics that an `M` exposes, in the order
    /// of its columns; `limit` is the number of series, the overflow series aside; `make` makes the value of a
    /// new series.
    pub fn family<L: Labels, M: Metric>(
        &self,
        descriptions: &'static [Description],
        limit: usize,
        make: fn() -> M,
    ) -> Arc<Family<L, M>> {
        let family = Arc::new(Family::new(descriptions, limit, make));
        self.add(family.clone());
        family
    }

    /// Registers a family of counters; `name` without `_total`.
    pub fn counters<L: Labels>(&self, name: &'static str, help: &'static str) -> Arc<Family<L, Counter>> {
        let family = Arc::new(Family::of_one(name, help, Kind::Counter, Counter::default));
        self.add(family.clone());
        family
    }

    /// Registers a family of gauges.
    pub fn gauges<L: Labels>(&self, name: &'static str, help: &'static str) -> Arc<Family<L, Gauge>> {
        let family = Arc::new(Family::of_one(name, help, Kind::Gauge, Gauge::default));
        self.add(family.clone());
        family
    }

    /// Registers a family of histograms over seconds with the buckets of [`Histogram::latency`].
    pub fn latencies<L: Labels>(&self, name: &'static str, help: &'static str) -> Arc<Family<L, Histogram>> {
        let family = Arc::new(Family::of_one(name, help, Kind::Histogram, Histogram::latency));
        self.add(family.clone());
        family
    }

    /// Registers one counter without labels; `name` without `_total`.
    pub fn counter(&self, name: &'static str, help: &'static str) -> Handle<(), Counter> {
        self.counters::<()>(name, help).with(&())
    }

    /// Registers one gauge without labels.
    pub fn gauge(&self, name: &'static str, help: &'static str) -> Handle<(), Gauge> {
        self.gauges::<()>(name, help).with(&())
    }

    /// Registers a metric whose samples `collect` writes at each scrape: for values that are kept elsewhere, such
    /// as the ages of certificates. It runs on the scrape's thread and must not block.
    pub fn collect(
        &self,
        description: Description,
        collect: impl Fn(&mut SampleWriter<'_, '_>) + Send + Sync + 'static,
    ) {
        self.add(Arc::new(Collected { description, collect }));
    }

    /// All metrics as text.
    #[must_use]
    pub fn encode(&self, format: Format) -> String {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner).clone();
        text::encode(&sources, format)
    }
}

struct Collected<F> {
    description: Description,
    collect: F,
}

impl<F: Fn(&mut SampleWriter<'_, '_>) + Send + Sync> Source for Collected<F> {
    fn write(&self, out: &mut text::Exposition<'_>) {
        (self.collect)(&mut out.metric(&self.description));
    }
}
