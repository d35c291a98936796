//! The values: counters, gauges, histograms.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

use super::SampleWriter;

/// A value of a series, or several that share their labels.
pub trait Metric: Send + Sync + 'static {
    /// Writes the samples of the metric `column`, an index into the family's descriptions.
    fn write(
        &self,
        column: usize,
        out: &mut SampleWriter<'_, '_>,
        labels: &dyn Fn(&mut super::LabelWriter<'_>),
    );

    /// Whether the series may be forgotten while nothing holds a handle of it. A gauge that is not zero still
    /// says something.
    fn is_disposable(&self) -> bool {
        true
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`; wraps at 2^64.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The count.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Metric for Counter {
    fn write(&self, _: usize, out: &mut SampleWriter<'_, '_>, labels: &dyn Fn(&mut super::LabelWriter<'_>)) {
        out.integer(labels, self.get());
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Sets it.
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    /// Adds `n`, which may be negative.
    pub fn add(&self, n: i64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one away.
    pub fn dec(&self) {
        self.add(-1);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

impl Metric for Gauge {
    fn write(&self, _: usize, out: &mut SampleWriter<'_, '_>, labels: &dyn Fn(&mut super::LabelWriter<'_>)) {
        out.integer(labels, self.get());
    }

    fn is_disposable(&self) -> bool {
        self.get() == 0
    }
}

/// Counts observations in buckets by size.
#[derive(Debug)]
pub struct Histogram {
    /// Upper bounds, ascending; the last bucket, without a bound, comes after them.
    bounds: &'static [f64],
    buckets: Box<[AtomicU64]>,
    /// The bits of an `f64`.
    sum: AtomicU64,
}

/// Seconds, from a tenth of a millisecond to ten seconds.
const LATENCY_BOUNDS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

impl Histogram {
    /// A histogram whose buckets hold observations up to each of `bounds` (ascending), and one for the rest.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum: AtomicU64::new(0f64.to_bits()) }
    }

    /// A histogram for seconds, from 0.1 ms to 10 s.
    #[must_use]
    pub fn latency() -> Self {
        Self::new(LATENCY_BOUNDS)
    }

    /// Counts `value`; one that is not a number is ignored.
    pub fn observe(&self, value: f64) {
        if value.is_nan() {
            return;
        }
        let index = self.bounds.partition_point(|bound| *bound < value);
        if let Some(bucket) = self.buckets.get(index) {
            bucket.fetch_add(1, Relaxed);
        }
        let add = |bits| Some((f64::from_bits(bits) + value).to_bits());
        let _ = self.sum.fetch_update(Relaxed, Relaxed, add); // never `Err`: the closure returns `Some`
    }

    /// How many observations there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Relaxed)).sum()
    }
}

impl Metric for Histogram {
    fn write(&self, _: usize, out: &mut SampleWriter<'_, '_>, labels: &dyn Fn(&mut super::LabelWriter<'_>)) {
        let mut cumulative = 0;
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        for (bound, bucket) in bounds.zip(&self.buckets) {
            cumulative += bucket.load(Relaxed);
            out.bucket(labels, bound, cumulative);
        }
        // The count is that of the buckets just written, so that the two agree under concurrent updates.
        out.sum_and_count(labels, f64::from_bits(self.sum.load(Relaxed)), cumulative);
    }
}
