//! How many of something there may be at a time: connections, requests, retries.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use model::http::RetryBudget;

/// Counts what is there, up to a limit.
#[derive(Debug)]
pub struct Gate {
    limit: u32,
    now: AtomicU32,
    refused: AtomicU64,
}

impl Gate {
    /// At most `limit` at a time.
    #[must_use]
    pub fn new(limit: u32) -> Self {
        Self { limit, now: AtomicU32::new(0), refused: AtomicU64::new(0) }
    }

    /// Counts one more, if there may be one. Each is to [`Gate::leave`].
    pub fn enter(&self) -> bool {
        self.enter_up_to(self.limit)
    }

    /// The same with another limit, for this one.
    pub fn enter_up_to(&self, limit: u32) -> bool {
        let before = self.now.fetch_add(1, Ordering::Relaxed);
        if before < limit {
            return true;
        }
        self.now.fetch_sub(1, Ordering::Relaxed);
        self.refused.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// Counts one more, whatever the limit.
    pub fn force(&self) {
        self.now.fetch_add(1, Ordering::Relaxed);
    }

    /// One of those counted is gone.
    pub fn leave(&self) {
        self.now.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many there are.
    #[must_use]
    pub fn now(&self) -> u32 {
        self.now.load(Ordering::Relaxed)
    }

    /// How many were refused so far.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// How many retries there may be, by the number of requests.
#[derive(Debug)]
pub struct Budget {
    settings: RetryBudget,
    /// Requests of the interval that this one is in, and of the one before.
    interval: AtomicU64,
    current: AtomicU64,
    previous: AtomicU64,
}

impl Budget {
    /// A budget of which nothing is spent.
    #[must_use]
    pub fn new(settings: RetryBudget) -> Self {
        let zero = || AtomicU64::new(0);
        Self { settings, interval: zero(), current: zero(), previous: zero() }
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> RetryBudget {
        self.settings
    }

    /// Counts a request. `now` is the time since any fixed moment.
    pub fn request(&self, now: Duration) {
        if self.turn(now).is_some() {
            self.current.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many retries there may be, with so many requests under way: the share of these or, where the budget has an
    /// interval, of those that began within it, if they are more.
    #[must_use]
    pub fn allowed(&self, now: Duration, under_way: u32) -> u32 {
        let mut requests = u64::from(under_way);
        if let Some(part) = self.turn(now) {
            // Of the interval before, the part that lies within one interval from now.
            let before = self.previous.load(Ordering::Relaxed);
            let before = before.saturating_mul(1000 - part.min(1000)) / 1000;
            requests = requests.max(self.current.load(Ordering::Relaxed).saturating_add(before));
        }
        let share = requests.saturating_mul(u64::from(self.settings.share.millionths())) / 1_000_000;
        u32::try_from(share).unwrap_or(u32::MAX).max(self.settings.min_concurrency)
    }

    /// Begins the interval that `now` is in, and says how much of it is over, in thousandths. A request that is counted
    /// by another thread at that moment may be counted for the wrong one.
    fn turn(&self, now: Duration) -> Option<u64> {
        let length = self.settings.interval.filter(|length| !length.is_zero())?;
        let length = u64::try_from(length.as_micros()).unwrap_or(u64::MAX).max(1);
        let now = u64::try_from(now.as_micros()).unwrap_or(u64::MAX);
        let (number, part) = (now / length, now % length);
        let seen = self.interval.load(Ordering::Relaxed);
        let is_mine = seen < number
            && self.interval.compare_exchange(seen, number, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if is_mine {
            let last = self.current.swap(0, Ordering::Relaxed);
            self.previous.store(if seen + 1 == number { last } else { 0 }, Ordering::Relaxed);
        }
        Some(u64::try_from(u128::from(part) * 1000 / u128::from(length)).unwrap_or(1000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::http::Percent;

    #[test]
    fn a_gate_takes_up_to_its_limit() {
        let gate = Gate::new(2);
        assert!(gate.enter() && gate.enter() && !gate.enter());
        gate.leave();
        assert!(gate.enter());
        gate.force();
        assert!(!gate.enter());
        assert_eq!((gate.now(), gate.refused()), (3, 2));
    }

    #[test]
    fn a_budget_is_a_share_of_what_is_under_way_and_of_the_interval() {
        let at = Duration::from_millis;
        let settings = RetryBudget { share: Percent::of(20, 100), min_concurrency: 3, interval: None };
        let budget = Budget::new(settings);
        assert_eq!([0, 10, 15, 100].map(|n| budget.allowed(at(0), n)), [3, 3, 3, 20]);
        let budget = Budget::new(RetryBudget { interval: Some(at(1000)), ..settings });
        for _ in 0..100 {
            budget.request(at(500));
        }
        assert_eq!(budget.allowed(at(999), 0), 20);
        assert_eq!(budget.allowed(at(1500), 0), 10, "half of the interval before is within the last second");
        assert_eq!(budget.allowed(at(1500), 100), 20, "those under way count too");
        assert_eq!(budget.allowed(at(2500), 0), 3, "nothing was asked for two intervals");
    }
}
