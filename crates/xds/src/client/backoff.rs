//! How long to wait between attempts.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Even a wait of nothing is this long: a server that ends each stream at once must not keep a processor busy.
const SHORTEST: Duration = Duration::from_millis(10);

/// Exponential, with full jitter: each wait is random, between nothing and a limit that doubles.
#[derive(Debug)]
pub(super) struct Backoff {
    base: Duration,
    max: Duration,
    attempt: u32,
    state: u64,
}

impl Backoff {
    pub(super) fn new(base: Duration, max: Duration) -> Self {
        Self { base, max, attempt: 0, state: RandomState::new().hash_one(0) | 1 }
    }

    /// It worked.
    pub(super) fn reset(&mut self) {
        self.attempt = 0;
    }

    /// The next wait.
    pub(super) fn next(&mut self) -> Duration {
        let limit = self.base.saturating_mul(2_u32.saturating_pow(self.attempt)).min(self.max);
        self.attempt = self.attempt.saturating_add(1);
        let millis = usize::try_from(limit.as_millis()).unwrap_or(usize::MAX);
        Duration::from_millis(self.below(millis.saturating_add(1)) as u64).max(SHORTEST)
    }

    /// A random number below a limit; 0 for a limit of 0. Not for secrets.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) as usize % limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_limit_and_are_spread() {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
        let mut longest = [Duration::ZERO; 8];
        for _ in 0..500 {
            backoff.reset();
            for longest in &mut longest {
                *longest = backoff.next().max(*longest);
            }
        }
        for (attempt, longest) in longest.iter().enumerate() {
            let limit = Duration::from_millis(500 * 2_u64.pow(attempt as u32)).min(Duration::from_secs(15));
            assert!(
                *longest <= limit && *longest > limit * 9 / 10,
                "attempt {attempt}: {longest:?}, limit {limit:?}"
            );
        }
    }

    #[test]
    fn a_thousand_clients_do_not_come_at_once() {
        let mut counts = [0; 10];
        for _ in 0..1000 {
            let wait = Backoff::new(Duration::from_secs(10), Duration::from_secs(10)).next();
            counts[(wait.as_millis() as usize / 1000).min(9)] += 1;
        }
        assert!(counts.iter().all(|c| (50..200).contains(c)), "{counts:?}");
    }
}
