//! Families: the series of a metric by their labels.

use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hashbrown::{DefaultHashBuilder, HashTable};
use tokio::time::Instant;

use super::text::{Exposition, LabelWriter};
use super::{Counter, Description, Kind, Metric, Source};

/// A series that nobody holds a handle of is kept this long, so that every reader (they come each minute or
/// oftener) has seen its last value.
const KEPT_UNUSED: Duration = Duration::from_secs(15 * 60);

/// When nothing could be evicted, the search for unused series is not repeated before this has passed: it walks
/// the whole family.
const EVICTION_PAUSE: Duration = Duration::from_secs(5);

/// A set of labels. Two sets that are equal must write the same pairs, and all sets of one type the same names in
/// the same order.
pub trait Labels: Clone + Eq + Hash + Send + Sync + 'static {
    /// Writes the pairs.
    fn write(&self, out: &mut LabelWriter<'_>);
}

impl Labels for () {
    fn write(&self, _: &mut LabelWriter<'_>) {}
}

impl<const N: usize> Labels for [(&'static str, &'static str); N] {
    fn write(&self, out: &mut LabelWriter<'_>) {
        for (name, value) in self {
            out.pair(name, value);
        }
    }
}

impl<const N: usize> Labels for [(&'static str, Arc<str>); N] {
    fn write(&self, out: &mut LabelWriter<'_>) {
        for (name, value) in self {
            out.pair(name, value);
        }
    }
}

struct Series<L, M> {
    labels: L,
    hash: u64,
    value: M,
    /// When a handle was last asked for or seen alive by a scrape: seconds since the family was made.
    last_used_s: AtomicU64,
}

/// One series. While a handle lives its series is not forgotten. Cloning shares it; it derefs to the value.
pub struct Handle<L, M>(Arc<Series<L, M>>);

impl<L, M> Clone for Handle<L, M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<L, M> Deref for Handle<L, M> {
    type Target = M;
    fn deref(&self) -> &M {
        &self.0.value
    }
}

impl<L, M: fmt::Debug> fmt::Debug for Handle<L, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.value.fmt(f)
    }
}

struct Table<L, M> {
    series: HashTable<Arc<Series<L, M>>>,
    overflow: Option<Arc<Series<L, M>>>,
    evicted_at: Option<Instant>,
}

/// The series of one or more metrics by their labels. See the module's invariants.
pub struct Family<L, M> {
    descriptions: Descriptions,
    limit: usize,
    make: fn() -> M,
    born: Instant,
    hasher: DefaultHashBuilder,
    table: RwLock<Table<L, M>>,
    /// How often a label set was answered with the overflow series.
    overflowed: Counter,
    evicted: Counter,
}

enum Descriptions {
    One([Description; 1]),
    Static(&'static [Description]),
}

impl Descriptions {
    fn as_slice(&self) -> &[Description] {
        match self {
            Self::One(one) => one,
            Self::Static(list) => list,
        }
    }
}

impl<L, M> fmt::Debug for Family<L, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.descriptions.as_slice().iter().map(|d| d.name)).finish()
    }
}

impl<L: Labels, M: Metric> Family<L, M> {
    pub(super) fn new(descriptions: &'static [Description], limit: usize, make: fn() -> M) -> Self {
        Self::with_descriptions(Descriptions::Static(descriptions), limit, make)
    }

    pub(super) fn of_one(name: &'static str, help: &'static str, kind: Kind, make: fn() -> M) -> Self {
        let descriptions = Descriptions::One([Description { name, help, kind }]);
        Self::with_descriptions(descriptions, super::DEFAULT_SERIES_LIMIT, make)
    }

    fn with_descriptions(descriptions: Descriptions, limit: usize, make: fn() -> M) -> Self {
        Self {
            descriptions,
            limit,
            make,
            born: Instant::now(),
            hasher: DefaultHashBuilder::default(),
            table: RwLock::new(Table { series: HashTable::new(), overflow: None, evicted_at: None }),
            overflowed: Counter::default(),
            evicted: Counter::default(),
        }
    }

    /// The series of `labels`, made when there is none. Costs one hash and a shared lock; hold on to the handle.
    #[must_use]
    pub fn with(&self, labels: &L) -> Handle<L, M> {
        let hash = self.hasher.hash_one(labels);
        let now_s = self.born.elapsed().as_secs();
        let same = |series: &Arc<Series<L, M>>| series.labels == *labels;
        if let Some(series) =
            self.table.read().unwrap_or_else(PoisonError::into_inner).series.find(hash, same)
        {
            series.last_used_s.store(now_s, Relaxed);
            return Handle(series.clone());
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = table.series.find(hash, same) {
            return Handle(series.clone());
        }
        if table.series.len() >= self.limit {
            self.evict(&mut table, now_s);
        }
        let make = || {
            let value = (self.make)();
            Arc::new(Series { labels: labels.clone(), hash, value, last_used_s: AtomicU64::new(now_s) })
        };
        if table.series.len() >= self.limit {
            self.overflowed.inc();
            return Handle(table.overflow.get_or_insert_with(make).clone());
        }
        let series = make();
        table.series.insert_unique(hash, series.clone(), |s| s.hash);
        Handle(series)
    }

    /// The number of series, the overflow series included.
    #[must_use]
    pub fn len(&self) -> usize {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.series.len() + usize::from(table.overflow.is_some())
    }

    /// Whether there is no series.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `each` with the values of all series.
    pub fn for_each(&self, mut each: impl FnMut(&L, &M)) {
        let (series, overflow) = self.snapshot();
        for one in series.iter().chain(&overflow) {
            each(&one.labels, &one.value);
        }
    }

    /// Forgets the series that have been without a handle for [`KEPT_UNUSED`].
    fn evict(&self, table: &mut Table<L, M>, now_s: u64) {
        if table.evicted_at.is_some_and(|at| at.elapsed() < EVICTION_PAUSE) {
            return;
        }
        table.evicted_at = Some(Instant::now());
        let before = table.series.len();
        table.series.retain(|series| {
            // Handles are only made under the lock that is held here, so a count of one stays one.
            let unused_s = now_s.saturating_sub(series.last_used_s.load(Relaxed));
            Arc::strong_count(series) > 1 || unused_s < KEPT_UNUSED.as_secs() || !series.value.is_disposable()
        });
        self.evicted.add((before - table.series.len()) as u64);
    }

    #[allow(clippy::type_complexity, reason = "named nowhere else")]
    fn snapshot(&self) -> (Vec<Arc<Series<L, M>>>, Option<Arc<Series<L, M>>>) {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let now_s = self.born.elapsed().as_secs();
        for series in &table.series {
            if Arc::strong_count(series) > 1 {
                series.last_used_s.store(now_s, Relaxed);
            }
        }
        (table.series.iter().cloned().collect(), table.overflow.clone())
    }
}

impl<L: Labels, M: Metric> Source for Family<L, M> {
    fn write(&self, out: &mut Exposition<'_>) {
        let (series, overflow) = self.snapshot();
        for (column, description) in self.descriptions.as_slice().iter().enumerate() {
            let mut samples = out.metric(description);
            for one in &series {
                one.value.write(column, &mut samples, &|pairs| one.labels.write(pairs));
            }
            if let Some(one) = &overflow {
                one.value.write(column, &mut samples, &|pairs| {
                    pairs.overflowing(|pairs| one.labels.write(pairs));
                });
            }
        }
        let name = self.descriptions.as_slice().first().map_or("", |d| d.name);
        out.note_series(name, series.len(), self.overflowed.get(), self.evicted.get());
    }
}
