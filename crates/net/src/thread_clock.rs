//! How much of a processor a thread has used.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

/// The clock of one thread, which runs while the thread does. Any thread of the process may read it.
#[derive(Clone, Copy, Debug)]
pub struct ThreadClock(ClockId);

impl ThreadClock {
    /// That of the calling thread.
    #[must_use]
    pub fn of_this_thread() -> Self {
        // As pthread_getcpuclockid(3) puts it together: kernel include/linux/posix-timers.h, `make_thread_cpuclock`.
        const PER_THREAD: libc::clockid_t = 4;
        const SCHEDULER: libc::clockid_t = 2;
        Self(ClockId::from_raw((!gettid().as_raw() << 3) | PER_THREAD | SCHEDULER))
    }

    /// The processor time that the thread has used so far; zero once it has ended.
    #[must_use]
    pub fn used(self) -> Duration {
        clock_gettime(self.0).map_or(Duration::ZERO, Duration::from)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_thread_that_works_uses_time_and_one_that_sleeps_does_not() {
        let (clocks, worked) = (mpsc::channel(), mpsc::channel());
        let (begin, begins) = mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            let own = ThreadClock::of_this_thread();
            clocks.0.send(own).unwrap();
            begins.recv().unwrap();
            let (before, mut sum) = (own.used(), 0_u64);
            while own.used() - before < Duration::from_millis(5) {
                sum = std::hint::black_box(sum.wrapping_add(1));
            }
            worked.0.send(()).unwrap();
            begins.recv().unwrap_err();
        });
        let clock = clocks.1.recv().unwrap();
        let idle = clock.used();
        std::thread::sleep(Duration::from_millis(100));
        let slept = clock.used() - idle;
        assert!(slept < Duration::from_millis(90), "{slept:?} used in a wait of 100 ms");
        begin.send(()).unwrap();
        worked.1.recv().unwrap();
        assert!(clock.used() - idle >= Duration::from_millis(5));
        drop(begin);
        other.join().unwrap();
        assert_eq!(clock.used(), Duration::ZERO);
    }
}
