//! How often one caller may ask: a bucket of tokens for each, and never more buckets than [`MAX_CALLERS`].

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

/// So many callers are told apart.
const MAX_CALLERS: usize = 16_384;
/// So many requests a caller may make at once: a node's proxy that starts asks for each account of its pods.
const BURST: f64 = 500.0;
/// So many more each second.
const REFILL: f64 = 20.0;

/// The buckets.
#[derive(Debug, Default)]
pub struct CallerLimits(Mutex<HashMap<String, (f64, Instant)>>);

impl CallerLimits {
    /// Whether the caller may ask once more now.
    pub fn admit(&self, caller: &str) -> bool {
        let now = Instant::now();
        let refilled =
            |(left, at): &(f64, Instant)| (left + now.duration_since(*at).as_secs_f64() * REFILL).min(BURST);
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_CALLERS && !buckets.contains_key(caller) {
            // A full bucket says no more than none.
            buckets.retain(|_, bucket| refilled(bucket) < BURST);
            if buckets.len() >= MAX_CALLERS {
                return false;
            }
        }
        let bucket = buckets.entry(caller.to_owned()).or_insert((BURST, now));
        let left = refilled(bucket);
        let admitted = left >= 1.0;
        *bucket = (if admitted { left - 1.0 } else { left }, now);
        admitted
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_held_back_and_nobody_else_is() {
        let limits = CallerLimits::default();
        let admitted = (0..1000).filter(|_| limits.admit("a")).count();
        assert_eq!(admitted, 500);
        assert!(limits.admit("b"));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((0..100).filter(|_| limits.admit("a")).count(), 20);
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_callers_is_limited() {
        let limits = CallerLimits::default();
        let admitted = (0..MAX_CALLERS + 10).filter(|index| limits.admit(&index.to_string())).count();
        assert_eq!(admitted, MAX_CALLERS);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(limits.admit("one more"), "the others' buckets are full again");
    }
}
