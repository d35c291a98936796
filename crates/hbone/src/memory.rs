//! The memory that data waits in for those who don't take it.
//!
//! A connection's window is that of all its streams, so that tunnels whose readers are slow never hold up the others;
//! each may hold what its own window lets its peer send. What all of them hold together is counted here:
//!
//! ```text
//!   0 ─────────── 1/8 of the limit ──────────────────── limit ──▶
//!     all windows      as readers take what is there,         tunnels are cut, those first that
//!     are given back   windows shrink to shares of 1/4        hold much for long
//! ```
//!
//! Invariants:
//! * a tunnel that holds nothing costs nothing here;
//! * a window never shrinks below a share of 64 KiB, so a tunnel never waits for others to be read.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Context;

use futures_util::task::AtomicWaker;
use tokio::time::Instant;

use crate::counters::Counter;

/// What is used of the memory that the process may have: this part, within these bounds.
const PART: u64 = 4;
const LEAST: u64 = 64 << 20;
const MOST: u64 = 1 << 30;
/// A window that a tunnel has in any case.
const LEAST_SHARE: usize = 64 * 1024;

/// A limit for the bytes that tunnels received and could not deliver yet, and who holds them. It lives as long as the
/// process; copies are handles to the same.
#[derive(Clone, Copy)]
pub struct Memory(&'static Budget);

struct Budget {
    limit: usize,
    /// Always the sum of all holders' bytes.
    held: AtomicUsize,
    holders: AtomicUsize,
    peaks: Peaks,
    all: Mutex<HashMap<usize, Arc<Holder>>>,
    cut: Counter,
    /// Holders' times are milliseconds since then.
    start: Instant,
}

/// The most that was held of late, and by how many. Readers that take all there is at once would otherwise open all
/// windows to the full together, only to be cut for what comes then.
///
/// The two are consistent: where each of the most holders has a share of a quarter of the limit, more than an eighth of
/// it is held.
#[derive(Default)]
struct Peaks {
    /// When this period ends.
    until: AtomicU64,
    /// Of this period and of the one before.
    bytes: [AtomicUsize; 2],
    holders: [AtomicUsize; 2],
}

impl Peaks {
    const PERIOD_MS: u64 = 2_000;

    fn note(&self, now: u64, bytes: usize, holders: usize) {
        let until = self.until.load(Ordering::Relaxed);
        let next = now + Self::PERIOD_MS;
        let over = now >= until;
        if over && self.until.compare_exchange(until, next, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            let recent = now < until + Self::PERIOD_MS;
            for ([this, last], value) in [(&self.bytes, bytes), (&self.holders, holders)] {
                let ended = this.swap(value, Ordering::Relaxed);
                last.store(if recent { ended } else { value }, Ordering::Relaxed);
            }
            return;
        }
        let ([this_bytes, _], [this_holders, _]) = (&self.bytes, &self.holders);
        this_bytes.fetch_max(bytes, Ordering::Relaxed);
        this_holders.fetch_max(holders, Ordering::Relaxed);
    }

    fn bytes(&self) -> usize {
        self.bytes.iter().map(|peak| peak.load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    fn holders(&self) -> usize {
        self.holders.iter().map(|peak| peak.load(Ordering::Relaxed)).max().unwrap_or(0)
    }
}

/// A tunnel that holds bytes.
struct Holder {
    memory: Memory,
    bytes: AtomicUsize,
    /// When all bytes were held that are in front of the last `to_go`: none that is held now is older than from then
    /// back to the time before. Only the tunnel itself writes these two.
    since: AtomicU64,
    to_go: AtomicUsize,
    cut: AtomicBool,
    waker: AtomicWaker,
}

impl Memory {
    /// The one that all connections share unless they are given another: a quarter of what the process may use, at least
    /// 64 MiB and at most 1 GiB.
    #[must_use]
    pub fn of_process() -> Self {
        static OF_PROCESS: OnceLock<Memory> = OnceLock::new();
        *OF_PROCESS.get_or_init(|| {
            let limit = net::limits::memory().map_or(LEAST, |bytes| (bytes / PART).clamp(LEAST, MOST));
            Self::with_limit(usize::try_from(limit).unwrap_or(usize::MAX))
        })
    }

    /// One of its own, for up to `limit` bytes. It is never freed.
    #[must_use]
    pub fn with_limit(limit: usize) -> Self {
        Self(Box::leak(Box::new(Budget {
            limit,
            held: AtomicUsize::new(0),
            holders: AtomicUsize::new(0),
            peaks: Peaks::default(),
            all: Mutex::default(),
            cut: Counter::default(),
            start: Instant::now(),
        })))
    }

    /// The limit, in bytes.
    #[must_use]
    pub fn limit(self) -> usize {
        self.0.limit
    }

    /// Bytes held now.
    #[must_use]
    pub fn held(self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }

    /// Tunnels that hold any.
    #[must_use]
    pub fn holders(self) -> usize {
        self.0.holders.load(Ordering::Relaxed)
    }

    /// Tunnels that were cut so far, to stay within the limit.
    #[must_use]
    pub fn cut(self) -> u64 {
        self.0.cut.get()
    }

    /// How much of its window a tunnel may not give back, because many hold much.
    pub(crate) fn withheld(self, window: u32) -> u32 {
        let (peaks, limit) = (&self.0.peaks, self.0.limit);
        if peaks.bytes() <= limit / 8 {
            return 0;
        }
        // That may have been long ago.
        peaks.note(self.now(), self.held(), self.holders());
        if peaks.bytes() <= limit / 8 {
            return 0;
        }
        let share = limit / 4 / peaks.holders().max(1);
        window.saturating_sub(u32::try_from(share.max(LEAST_SHARE)).unwrap_or(u32::MAX))
    }

    fn all(self) -> MutexGuard<'static, HashMap<usize, Arc<Holder>>> {
        self.0.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(self) -> u64 {
        let since = Instant::now().saturating_duration_since(self.0.start);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn enter(self) -> Arc<Holder> {
        let holder = Arc::new(Holder {
            memory: self,
            bytes: AtomicUsize::new(0),
            since: AtomicU64::new(0),
            to_go: AtomicUsize::new(0),
            cut: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        self.0.holders.fetch_add(1, Ordering::Relaxed);
        self.all().insert(holder.key(), Arc::clone(&holder));
        holder
    }

    /// Cuts tunnels until all is well within the limit: not one at each byte, since it has to look at all of them.
    fn make_room(self) {
        let mut all = self.all();
        if self.held() <= self.0.limit {
            return;
        }
        let now = self.now();
        let mut order: Vec<_> = all.iter().map(|(key, holder)| (holder.weight(now), *key)).collect();
        order.sort_unstable_by(|one, other| other.cmp(one));
        let goal = self.0.limit - self.0.limit / 16;
        for (_, key) in order {
            if self.held() <= goal {
                break;
            }
            if let Some(holder) = all.remove(&key) {
                self.0.holders.fetch_sub(1, Ordering::Relaxed);
                self.0.cut.up();
                holder.set(0);
                holder.cut.store(true, Ordering::Release);
                holder.waker.wake();
            }
        }
    }
}

impl Holder {
    fn key(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self).addr()
    }

    fn set(&self, bytes: usize) {
        let before = self.bytes.swap(bytes, Ordering::Relaxed);
        let held = &self.memory.0.held;
        if bytes >= before {
            held.fetch_add(bytes - before, Ordering::Relaxed);
        } else {
            held.fetch_sub(before - bytes, Ordering::Relaxed);
        }
    }

    fn note(&self, bytes: usize, moved: usize) {
        let now = self.memory.now();
        let to_go = self.to_go.load(Ordering::Relaxed);
        if moved >= to_go {
            self.since.store(now, Ordering::Relaxed);
            self.to_go.store(bytes, Ordering::Relaxed);
        } else {
            self.to_go.store(to_go - moved, Ordering::Relaxed);
        }
        self.set(bytes);
        self.memory.0.peaks.note(now, self.memory.held(), self.memory.holders());
    }

    /// How much it holds, for how long. A reader that takes a byte now and then is no better than one that takes none:
    /// what counts is when that was received which it has not taken yet.
    fn weight(&self, now: u64) -> u128 {
        let age = now.saturating_sub(self.since.load(Ordering::Relaxed));
        u128::from(age + 1) * self.bytes.load(Ordering::Relaxed) as u128
    }
}

/// What one tunnel holds.
#[derive(Default)]
pub(crate) struct Holding(Option<Arc<Holder>>);

/// The tunnel must go, and give back what it holds.
#[derive(Debug)]
pub(crate) struct Cut;

impl Holding {
    /// Notes that `bytes` are held now, and that `moved` were delivered since it was noted last. The task is woken if
    /// the tunnel is cut later.
    pub(crate) fn note(
        &mut self,
        memory: Memory,
        bytes: usize,
        moved: u32,
        cx: &mut Context<'_>,
    ) -> Result<(), Cut> {
        if bytes == 0 {
            self.leave();
            return Ok(());
        }
        let holder = self.0.get_or_insert_with(|| memory.enter());
        holder.waker.register(cx.waker());
        if !holder.cut.load(Ordering::Acquire) {
            holder.note(bytes, moved as usize);
            if memory.held() > memory.limit() {
                memory.make_room();
            }
        }
        if holder.cut.load(Ordering::Acquire) { Err(Cut) } else { Ok(()) }
    }

    fn leave(&mut self) {
        if let Some(holder) = self.0.take() {
            if holder.memory.all().remove(&holder.key()).is_some() {
                holder.memory.0.holders.fetch_sub(1, Ordering::Relaxed);
            }
            holder.set(0);
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::of_process()
    }
}

impl PartialEq for Memory {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("limit", &self.limit())
            .field("held", &self.held())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    fn note(holding: &mut Holding, memory: Memory, bytes: usize, moved: u32) -> bool {
        holding.note(memory, bytes, moved, &mut Context::from_waker(Waker::noop())).is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_held_longest_and_most_goes_first() {
        let memory = Memory::with_limit(1000);
        let mut holdings: Vec<_> = (0..4).map(|_| Holding::default()).collect();
        // One that trickles, one that is stuck with less, one that reads on, one that has just begun.
        assert!(note(&mut holdings[0], memory, 400, 0));
        assert!(note(&mut holdings[1], memory, 100, 0));
        for _ in 0..100 {
            advance(Duration::from_millis(100)).await;
            assert!(note(&mut holdings[0], memory, 400, 1));
            assert!(note(&mut holdings[2], memory, 400, 400));
        }
        assert_eq!((memory.held(), memory.holders()), (900, 3));
        assert!(note(&mut holdings[3], memory, 300, 0));
        assert_eq!((memory.held(), memory.holders(), memory.cut()), (800, 3, 1));
        assert!(!note(&mut holdings[0], memory, 1, 399), "it trickled for ten seconds and was spared");
        assert!(note(&mut holdings[1], memory, 100, 0));
        assert!(note(&mut holdings[2], memory, 500, 400));
        assert_eq!((memory.held(), memory.cut()), (900, 1));
        drop(holdings);
        assert_eq!((memory.held(), memory.holders()), (0, 0));
        assert!(memory.all().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn windows_shrink_to_equal_shares() {
        let memory = Memory::with_limit(64 << 20);
        let window = 4 << 20;
        let mut holdings: Vec<_> = (0..8).map(|_| Holding::default()).collect();
        assert!(holdings.iter_mut().take(2).all(|holding| note(holding, memory, 4 << 20, 0)));
        assert_eq!(memory.withheld(window), 0);
        assert!(holdings.iter_mut().all(|holding| note(holding, memory, 4 << 20, 0)));
        assert_eq!(memory.withheld(window), 2 << 20);
        assert_eq!(memory.withheld(1 << 20), 0);
        // All that is there was taken; what comes next would be as much.
        for holding in &mut holdings {
            assert!(note(holding, memory, 0, 4 << 20));
        }
        advance(Duration::from_secs(1)).await;
        assert_eq!(memory.withheld(window), 2 << 20);
        advance(Duration::from_secs(1)).await;
        assert_eq!(memory.withheld(window), 2 << 20);
        advance(Duration::from_secs(2)).await;
        assert_eq!(memory.withheld(window), 0);
    }

    #[test]
    fn the_process_has_a_limit() {
        let of_process = Memory::of_process();
        assert!((64 << 20..=1 << 30).contains(&of_process.limit()));
        assert_eq!(of_process, Memory::default());
    }
}
