//! Which of the data plane's threads carries a connection that a pod's listener accepts, and which of them accepts it.
//!
//! Few connections are cheapest on one thread: they share one HBONE connection to each peer and one handshake, and the
//! records, writes and wake-ups of moments in which several have something to say. Many need all threads. So
//!
//! ```text
//!   the pod's first thread ── has its share ──▶ the next ── … ──▶ all have theirs: the one with the fewest
//!          └──────────────── is busy: those that are not, in the same order ───────────────┘
//! ```
//!
//! HBONE connections, each of which carries many others, go to the thread with the fewest of the pod, of these to the one that has the
//! fewest of all: so a tunnel within the node ends, as a rule, on another thread than the one that its connections are on.
//!
//! Which thread is the first differs from pod to pod. One thread accepts for all ([`accepting`]), the first that is not
//! busy: known to all threads, a listener would wake each of them for every connection. A thread that stands still counts as busy,
//! and has what accepts on it taken away ([`watch`]).
//!
//! Invariants:
//! * a connection stays where it is. So those that were opened while their thread had time share one processor, also when each of
//!   them comes to need one: as few as a share, of a pod that opens no new ones;
//! * a thread that lags behind is given no more than [`WAITING`]: what is more stays with the thread that accepted it;
//! * what is counted here decides where something runs, never whether, so no order between threads is needed.

pub mod accepting;
mod watch;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use net::ThreadClock;
use process::runtimes::Workers;
use tokio::runtime::Handle;
use tokio::time::Instant;

use watch::{Mark, Rescue};

/// A pod with so many connections has all threads: each has an equal share of these, but no less than the other.
const ON_ALL: usize = 48;
const LEAST_SHARE: usize = 4;
/// Over how long at least it is measured whether a thread is busy, and what of a processor it uses then, in percent.
const MEASURED: Duration = Duration::from_millis(20);
const BUSY_PERCENT: u32 = 70;
/// For how long it counts as busy, so that it and the others do not take turns in having all or nothing to do.
const BUSY_FOR: Duration = Duration::from_secs(1);
/// So much may wait for a thread that another one has given it.
const WAITING: usize = 256;

/// The data plane's threads.
pub struct Threads {
    all: Box<[Thread]>,
    /// Whose turn it is to be a pod's first.
    turn: AtomicUsize,
    kept: AtomicU64,
    moved: AtomicU64,
    stalls: AtomicU64,
    rescued: AtomicU64,
    /// What accepts on a thread, and what may have ended since it was noted.
    listeners: Mutex<Vec<Weak<dyn Rescue>>>,
}

struct Thread {
    runtime: Handle,
    /// There as soon as the thread has run something.
    clock: Arc<OnceLock<ThreadClock>>,
    pace: Mutex<Pace>,
    mark: Arc<Mark>,
    /// Connections of all pods.
    open: AtomicUsize,
}

/// A thread in numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ThreadCounts {
    /// Connections that it carries.
    pub open: usize,
    /// What other threads have given it and it has not looked at.
    pub waiting: usize,
    /// Whether it does not get to that.
    pub is_stalled: bool,
}

impl Threads {
    /// Those of `workers`.
    pub fn new(workers: &Workers) -> Self {
        let thread = |runtime: &Handle| {
            let clock = Arc::new(OnceLock::new());
            let own = clock.clone();
            runtime.spawn(async move { own.get_or_init(ThreadClock::of_this_thread).used() });
            Thread {
                runtime: runtime.clone(),
                clock,
                pace: Mutex::default(),
                mark: Arc::default(),
                open: AtomicUsize::new(0),
            }
        };
        Self {
            all: workers.handles().iter().map(thread).collect(),
            turn: AtomicUsize::new(0),
            kept: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            stalls: AtomicU64::new(0),
            rescued: AtomicU64::new(0),
            listeners: Mutex::default(),
        }
    }

    /// The thread that is to be a pod's first: each in turn, but for those that stand still.
    pub fn next_first(&self) -> usize {
        let (turn, count) = (self.turn.fetch_add(1, Ordering::Relaxed), self.all.len().max(1));
        let moves = |thread: &usize| !self.thread(*thread).mark.is_overdue();
        (0..count).map(|next| turn.wrapping_add(next) % count).find(moves).unwrap_or(turn % count)
    }

    /// The runtime of a thread.
    pub fn runtime(&self, thread: usize) -> &Handle {
        &self.thread(thread).runtime
    }

    /// How many connections of a pod its first thread takes before others do.
    pub fn share(&self) -> usize {
        (ON_ALL / self.all.len().max(1)).max(LEAST_SHARE)
    }

    /// Each thread in numbers.
    pub fn counts(&self) -> impl Iterator<Item = ThreadCounts> {
        self.all.iter().map(|thread| ThreadCounts {
            open: thread.open.load(Ordering::Relaxed),
            waiting: thread.waiting(),
            is_stalled: thread.mark.is_overdue(),
        })
    }

    /// Connections that stayed where they were accepted, since too much waited for the thread that they were for.
    pub fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    /// How often another thread went on to accept a pod's connections.
    pub fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// How often a thread was found to stand still.
    pub fn stalls(&self) -> u64 {
        self.stalls.load(Ordering::Relaxed)
    }

    /// Listeners that were taken from a thread that stood still.
    pub fn rescued(&self) -> u64 {
        self.rescued.load(Ordering::Relaxed)
    }

    // There is at least one thread, by construction of `Workers`.
    #[allow(clippy::indexing_slicing)]
    fn thread(&self, thread: usize) -> &Thread {
        &self.all[thread % self.all.len()]
    }
}

impl Thread {
    /// Whether others are to be asked first.
    fn is_busy(&self, now: Instant) -> bool {
        self.mark.is_overdue() || self.pace(now)
    }

    /// Whether it has used much of a processor of late.
    fn pace(&self, now: Instant) -> bool {
        let used = || self.clock.get().map_or(Duration::ZERO, |clock| clock.used());
        self.pace.lock().unwrap_or_else(PoisonError::into_inner).is_busy(now, used)
    }

    fn waiting(&self) -> usize {
        self.runtime.metrics().global_queue_depth()
    }
}

/// How much of a processor a thread uses.
#[derive(Default)]
struct Pace {
    /// When it was measured last, and what the thread had used by then.
    measured: Option<(Instant, Duration)>,
    busy_until: Option<Instant>,
}

impl Pace {
    /// Whether the thread was busy of late. `used`, what it has used so far, is asked now and then only.
    ///
    /// Processor time and not how long it runs at a stretch: where others have the processors, to wake more threads helps
    /// nobody.
    fn is_busy(&mut self, now: Instant, used: impl FnOnce() -> Duration) -> bool {
        let passed = self.measured.map(|(at, _)| now.saturating_duration_since(at));
        if passed.is_none_or(|passed| passed >= MEASURED) {
            let used = used();
            let before = self.measured.replace((now, used)).map_or(used, |(_, before)| before);
            // Whatever clocks say: some jump.
            let (used, passed) = (used.saturating_sub(before), passed.unwrap_or_default());
            if used.saturating_mul(100) > passed.saturating_mul(BUSY_PERCENT) {
                self.busy_until = Some(now + BUSY_FOR);
            }
        }
        self.busy_until.is_some_and(|until| now < until)
    }
}

/// The connections of one listener on the threads, which have ranks here: in the order in which they take their share.
#[derive(Clone)]
pub struct Shares(Arc<Listener>);

struct Listener {
    threads: Arc<Threads>,
    /// The thread of rank 0.
    first: usize,
    share: usize,
    /// How many each has, by rank.
    open: Box<[AtomicUsize]>,
}

impl Shares {
    /// None yet, of a listener whose connections the thread `first` takes first, up to `share`.
    pub fn new(threads: Arc<Threads>, first: usize, share: usize) -> Self {
        let open = threads.all.iter().map(|_| AtomicUsize::new(0)).collect();
        Self(Arc::new(Listener { threads, first, share, open }))
    }

    /// A place for the next connection, which the thread of rank `here` accepts.
    pub fn place(&self, here: usize) -> OnThread {
        let listener = &*self.0;
        let mut rank = listener.choose();
        if rank != here && listener.thread(rank).waiting() >= WAITING {
            listener.threads.kept.fetch_add(1, Ordering::Relaxed);
            rank = here;
        }
        let place = OnThread { listener: self.0.clone(), rank };
        place.count(|open| _ = open.fetch_add(1, Ordering::Relaxed));
        place
    }

    /// The rank of the thread that is to accept what comes after this; `here` is that of the one that did so far.
    pub fn accepts_next(&self, here: usize) -> usize {
        let now = Instant::now();
        let mut ranks = self.0.ranks();
        if let Some(rank) = ranks.find(|rank| !self.0.is_busy(*rank, now)) {
            return rank;
        }
        let moves = |rank: &usize| !self.0.is_stalled(*rank);
        Some(here).filter(moves).or_else(|| self.0.ranks().find(moves)).unwrap_or(here)
    }

    /// The runtime of a thread.
    pub fn runtime(&self, rank: usize) -> &Handle {
        &self.0.thread(rank).runtime
    }
}

impl Listener {
    fn ranks(&self) -> std::ops::Range<usize> {
        0..self.open.len()
    }

    fn thread(&self, rank: usize) -> &Thread {
        self.threads.thread(self.first + rank)
    }

    /// A thread that is the only one is never asked.
    fn is_busy(&self, rank: usize, now: Instant) -> bool {
        self.open.len() > 1 && self.thread(rank).is_busy(now)
    }

    fn is_stalled(&self, rank: usize) -> bool {
        self.thread(rank).mark.is_overdue()
    }

    fn choose(&self) -> usize {
        let now = Instant::now();
        let open = |rank: usize| self.open.get(rank).map_or(0, |open| open.load(Ordering::Relaxed));
        let of_all = |rank: usize| self.thread(rank).open.load(Ordering::Relaxed);
        choose(self.ranks(), self.share, |rank| (open(rank), of_all(rank)), |rank| self.is_busy(rank, now))
    }
}

/// Who takes the next connection, where threads have so many `open` of the listener, and of all.
fn choose(
    ranks: std::ops::Range<usize>,
    share: usize,
    open: impl Fn(usize) -> (usize, usize),
    is_busy: impl Fn(usize) -> bool,
) -> usize {
    let with_room = ranks.clone().find(|rank| open(*rank).0 < share && !is_busy(*rank));
    with_room.or_else(|| ranks.min_by_key(|rank| (is_busy(*rank), open(*rank)))).unwrap_or(0)
}

/// A connection's place on its thread, given back when dropped.
pub struct OnThread {
    listener: Arc<Listener>,
    rank: usize,
}

impl OnThread {
    fn count(&self, change: impl Fn(&AtomicUsize)) {
        if let Some(open) = self.listener.open.get(self.rank) {
            change(open);
        }
        change(&self.listener.thread(self.rank).open);
    }
}

impl AsRef<Handle> for OnThread {
    fn as_ref(&self) -> &Handle {
        &self.listener.thread(self.rank).runtime
    }
}

impl Drop for OnThread {
    fn drop(&mut self) {
        self.count(|open| _ = open.fetch_sub(1, Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn threads(count: usize) -> (Workers, Arc<Threads>) {
        let workers = Workers::start(count.to_string().parse().unwrap()).unwrap();
        let threads = Arc::new(Threads::new(&workers));
        (workers, threads)
    }

    #[test]
    fn threads_take_their_shares_in_turn_and_what_is_more_evenly() {
        for (open, busy, rank) in [
            ([0, 0, 0], "", 0),
            ([23, 0, 0], "", 0),
            ([24, 0, 0], "", 1),
            ([23, 24, 0], "", 0),
            ([24, 24, 0], "", 2),
            ([24, 24, 24], "", 0),
            ([25, 24, 24], "", 1),
            ([0, 5, 5], "0", 1),
            ([0, 24, 5], "0", 2),
            ([0, 25, 24], "0", 2),
            ([0, 3, 0], "0 2", 1),
            ([3, 2, 2], "0 1 2", 1),
        ] {
            let is_busy = |rank: usize| busy.contains(&rank.to_string());
            assert_eq!(choose(0..3, 24, |rank| (open[rank], 0), is_busy), rank, "{open:?}, busy: {busy}");
        }
        assert_eq!(choose(0..1, 24, |_| (1000, 1000), |_| true), 0);
    }

    #[test]
    fn of_threads_that_have_as_many_of_a_listener_the_one_with_the_fewest_of_all_takes_the_next() {
        for (open, busy, rank) in [
            ([(0, 0), (0, 0), (0, 0)], "", 0),
            // A tunnel of this node to this node: whose thread has the connections that it carries is not the one.
            ([(0, 16), (0, 0), (0, 0)], "", 1),
            ([(0, 16), (1, 0), (0, 3)], "", 2),
            ([(0, 16), (0, 0), (0, 3)], "1", 2),
            ([(2, 2), (1, 30), (2, 2)], "", 1),
        ] {
            let is_busy = |rank: usize| busy.contains(&rank.to_string());
            assert_eq!(choose(0..3, 0, |rank| open[rank], is_busy), rank, "{open:?}, busy: {busy}");
        }
    }

    #[test]
    fn a_share_is_of_what_all_threads_have_together() {
        for (count, share) in [(1, 48), (2, 24), (4, 12), (12, 4), (20, 4)] {
            assert_eq!(threads(count).1.share(), share, "{count} threads");
        }
        let (_workers, threads) = threads(3);
        assert_eq!([(); 4].map(|()| threads.next_first()), [0, 1, 2, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_thread_is_busy_for_a_while_after_it_was() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        let mut at = |millis, used| {
            pace.is_busy(start + Duration::from_millis(millis), || Duration::from_millis(used))
        };
        assert!(!at(0, 500), "what it had used before says nothing");
        assert!(!at(10, 510), "too soon to tell");
        assert!(!at(20, 514), "70 percent of the time");
        assert!(at(40, 529));
        assert!(at(60, 529) && at(1039, 529));
        assert!(!at(1040, 529));
        assert!(!at(9040, 1529), "a second of eight");
        assert!(at(9060, 1549));
        assert!(at(20_000, u64::MAX) && !at(40_000, 0), "clocks that jump");
    }

    #[test]
    fn places_count_until_they_are_dropped() {
        let (_workers, threads) = threads(2);
        let shares = Shares::new(threads.clone(), 1, 1);
        let open = || threads.counts().map(|counts| counts.open).collect::<Vec<_>>();
        let first = shares.place(0);
        let second = shares.place(0);
        assert_eq!((first.rank, second.rank, open()), (0, 1, vec![1, 1]), "the second thread is the first");
        drop(first);
        assert_eq!(shares.place(0).rank, 0);
        assert_eq!(open(), [1, 0]);
        drop(second);
        assert_eq!((open(), threads.kept()), (vec![0, 0], 0));
    }

    #[test]
    fn a_thread_that_lags_behind_is_given_no_more() {
        let (_workers, threads) = threads(2);
        let shares = Shares::new(threads.clone(), 0, 0);
        let ((hold, held), (tell, hangs)) = (mpsc::channel::<()>(), mpsc::channel());
        threads.runtime(1).spawn(async move {
            tell.send(()).unwrap();
            let _ = held.recv();
        });
        hangs.recv().unwrap();
        let first = shares.place(0);
        for _ in 0..WAITING {
            assert_eq!(shares.place(0).rank, 1, "it has the fewest");
            threads.runtime(1).spawn(async {});
        }
        assert_eq!((shares.place(0).rank, threads.kept()), (0, 1));
        assert_eq!((shares.place(1).rank, threads.kept()), (1, 1), "it may still take what it accepts");
        drop((hold, first));
    }
}
