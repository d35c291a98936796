//! Looks whether each of the data plane's threads gets to what it is given, and takes listeners away from one that does not.
//!
//! A thread that is blocked (in a system call that should not wait, on a disk or a page that does not come) uses no
//! processor, so by what it uses it would be the one with the most time: it would be given connections, and whoever
//! accepts on it would let them wait. So each has to answer a mark now and then:
//!
//! ```text
//!   look: a mark is put out ── look: still out ── look: still out ── the thread stands still: others accept, and carry
//!                     └─ answered: the next look puts out another        └─ answered at last: it is as before
//! ```
//!
//! Invariants:
//! * one mark is out for each thread at most;
//! * the looks run on the control plane's runtime, which no connection can block, with a full pause between two: a
//!   machine that stood still as a whole makes nobody suspect;
//! * what a thread was given before it stood still waits for it: a connection stays where it is.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use super::Threads;

/// The pause between two looks: each wakes every thread. It is also over how long it is measured whether a thread is busy while nobody asks.
const LOOK: Duration = Duration::from_secs(1);
/// A mark that is still out at so many looks says that the thread stands still.
const LOOKS: u32 = 2;

/// What a thread has to answer.
#[derive(Default)]
pub(super) struct Mark {
    is_out: AtomicBool,
    /// Looks that found it out.
    looks: AtomicU32,
}

impl Mark {
    /// Whether the thread does not get to what it is given.
    pub(super) fn is_overdue(&self) -> bool {
        self.is_out.load(Ordering::Relaxed) && self.looks.load(Ordering::Relaxed) >= LOOKS
    }

    /// One look. Whether the thread stands still since this one.
    fn look(self: &Arc<Self>, runtime: &Handle) -> bool {
        if self.is_out.swap(true, Ordering::Relaxed) {
            return self.looks.fetch_add(1, Ordering::Relaxed) + 1 == LOOKS;
        }
        self.looks.store(0, Ordering::Relaxed);
        let mark = self.clone();
        runtime.spawn(async move { mark.is_out.store(false, Ordering::Relaxed) });
        false
    }
}

/// What can be taken away from the thread that accepts for it.
pub(super) trait Rescue: Send + Sync {
    /// Has another thread accept if this one stands still. Whether another does now.
    fn rescue(self: Arc<Self>) -> bool;
}

impl Threads {
    /// Looks for ever; of one thread there is nothing to see.
    pub async fn watch(self: Arc<Self>) {
        while self.all.len() > 1 {
            tokio::time::sleep(LOOK).await;
            self.look(Instant::now());
        }
    }

    /// Takes note of what accepts, until it has ended.
    pub(super) fn add(&self, listener: Weak<dyn Rescue>) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if listeners.len() == listeners.capacity() {
            listeners.retain(|known| known.strong_count() > 0);
        }
        listeners.push(listener);
    }

    pub(super) fn look(&self, now: Instant) {
        for (index, thread) in self.all.iter().enumerate() {
            // Asked in any case: so that who asks next is told of the time since this look, and not of a longer one.
            thread.pace(now);
            if thread.mark.look(&thread.runtime) {
                self.stalls.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(
                    thread = index,
                    "a thread of the data plane stands still; others take what is new"
                );
            }
        }
        if self.all.iter().any(|thread| thread.mark.is_overdue()) {
            self.rescue();
        }
    }

    /// At each look while a thread stands still: what could not be taken from it at the first may be by now.
    fn rescue(&self) {
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let rescued = listeners.iter().filter_map(Weak::upgrade).filter(|l| l.clone().rescue()).count();
        self.rescued.fetch_add(rescued as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use net::ThreadClock;
    use process::runtimes::Workers;

    use super::*;

    fn threads() -> (Workers, Arc<Threads>) {
        let workers = Workers::start("2".parse().unwrap()).unwrap();
        let threads = Arc::new(Threads::new(&workers));
        (workers, threads)
    }

    /// Looks that the threads answer, so long after the last ones.
    fn looks(threads: &Threads, now: &mut Instant, count: usize) {
        for _ in 0..count {
            *now += LOOK;
            threads.look(*now);
            while threads.all.iter().any(|thread| thread.mark.is_out.load(Ordering::Relaxed)) {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn a_thread_stands_still_when_it_does_not_answer_at_two_looks() {
        let (_workers, threads) = threads();
        let mut now = Instant::now();
        looks(&threads, &mut now, 3);
        let ((hold, held), (tell, hangs)) = (mpsc::channel::<()>(), mpsc::channel());
        threads.runtime(1).spawn(async move {
            tell.send(()).unwrap();
            let _ = held.recv();
        });
        hangs.recv().unwrap();
        let stalled = || threads.counts().map(|counts| counts.is_stalled).collect::<Vec<_>>();
        for (looks, expected) in [(1, [false; 2]), (2, [false; 2]), (3, [false, true]), (4, [false, true])] {
            threads.look(now);
            while threads.all[0].mark.is_out.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            assert_eq!(stalled(), expected, "at look {looks}");
        }
        assert!(threads.all[1].is_busy(now), "it is given nothing while others have time");
        assert_eq!([(); 3].map(|()| threads.next_first()), [0; 3], "nor is it any pod's first");
        assert_eq!(threads.stalls(), 1);
        drop(hold);
        while threads.all[1].mark.is_overdue() {
            std::thread::yield_now();
        }
        looks(&threads, &mut now, 3);
        assert_eq!((stalled(), threads.stalls()), (vec![false; 2], 1));
    }

    #[test]
    fn a_thread_is_busy_by_what_it_did_of_late_and_not_since_the_last_connection() {
        let (_workers, threads) = threads();
        let mut now = Instant::now();
        threads.all[1].is_busy(now);
        // Minutes in which nobody connects, and then a burst on the connections that are there.
        looks(&threads, &mut now, 600);
        let (tell, worked) = mpsc::channel();
        threads.runtime(1).spawn(async move {
            let (clock, before) = (ThreadClock::of_this_thread(), ThreadClock::of_this_thread().used());
            while clock.used() - before < LOOK {
                std::hint::black_box(before);
            }
            tell.send(()).unwrap();
        });
        worked.recv().unwrap();
        looks(&threads, &mut now, 1);
        assert!(threads.all[1].is_busy(now + Duration::from_millis(1)));
    }

    #[test]
    fn listeners_that_have_ended_are_forgotten() {
        struct Nobody;
        impl Rescue for Nobody {
            fn rescue(self: Arc<Self>) -> bool {
                false
            }
        }
        let (_workers, threads) = threads();
        let there: Vec<Arc<dyn Rescue>> = (0..10).map(|_| Arc::new(Nobody) as _).collect();
        there.iter().for_each(|listener| threads.add(Arc::downgrade(listener)));
        for _ in 0..10_000 {
            let listener: Arc<dyn Rescue> = Arc::new(Nobody);
            threads.add(Arc::downgrade(&listener));
        }
        let listeners = threads.listeners.lock().unwrap();
        assert!(listeners.len() <= 40, "{}", listeners.len());
        assert_eq!(listeners.iter().filter(|listener| listener.strong_count() > 0).count(), 10);
    }
}
