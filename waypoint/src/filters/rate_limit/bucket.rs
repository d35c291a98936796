//! Buckets of tokens, one for each value that is counted. A bucket is one number: the time at which it would be full
//! again (the "generic cell rate algorithm"), so that nothing has to be filled in the background.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use model::http::Bucket;

use super::{LimitStats, Mark};

const SHARDS: usize = 16;

/// The buckets of a limit.
pub(super) struct Buckets {
    /// A token is added in so many nanoseconds.
    step: u64,
    /// How far ahead of now a bucket may be when it has a token left.
    ahead: u64,
    /// Where all requests share one.
    one: Mark,
    shards: [Mutex<HashMap<u64, u64>>; SHARDS],
    /// Of a shard.
    room: usize,
    swept: AtomicU64,
    /// For what finds no room.
    beyond: Mark,
    /// Nobody can know which values fall together.
    hasher: RandomState,
    stats: Arc<LimitStats>,
}

/// What became of a request's token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Taken {
    /// It was there.
    Within {
        /// So many are left.
        left: u32,
        /// Until the bucket is full.
        reset: Duration,
    },
    /// It was not; there will be one after this time.
    Over {
        /// See above.
        after: Duration,
    },
}

impl Drop for Buckets {
    fn drop(&mut self) {
        for shard in &mut self.shards {
            let keys = shard.get_mut().unwrap_or_else(PoisonError::into_inner).len();
            self.stats.keys.add(-i64::try_from(keys).unwrap_or(0));
        }
    }
}

impl Buckets {
    pub(super) fn new(bucket: Bucket, stats: Arc<LimitStats>) -> Self {
        let per = u64::try_from(bucket.per.as_nanos()).unwrap_or(u64::MAX);
        // A rate of more than one in a nanosecond is as good as none.
        let step = (per / u64::from(bucket.requests.max(1))).max(1);
        let ahead = step.saturating_mul(u64::from(bucket.burst.max(1)) - 1);
        Self {
            step,
            ahead,
            one: Mark::default(),
            shards: Default::default(),
            room: usize::try_from(bucket.max_keys).unwrap_or(usize::MAX).div_ceil(SHARDS).max(1),
            swept: AtomicU64::new(0),
            beyond: Mark::default(),
            hasher: RandomState::new(),
            stats,
        }
    }

    /// Takes a token of the bucket of `values` at `now`, in nanoseconds.
    pub(super) fn take(&self, values: &[String], now: u64) -> Taken {
        if values.is_empty() {
            return self.take_of(&self.one, now);
        }
        let hash = self.hasher.hash_one(values);
        let shard = usize::try_from(hash >> 60).unwrap_or(0);
        let Some(shard) = self.shards.get(shard) else { return self.take_of(&self.beyond, now) };
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(full_at) = shard.get_mut(&hash) {
            let (taken, next) = self.taken(*full_at, now);
            *full_at = next.unwrap_or(*full_at);
            return taken;
        }
        if shard.len() >= self.room {
            self.sweep(&mut shard, now);
        }
        if shard.len() >= self.room {
            drop(shard);
            self.stats.shared.inc();
            return self.take_of(&self.beyond, now);
        }
        let (taken, next) = self.taken(0, now);
        shard.insert(hash, next.unwrap_or(now));
        self.stats.keys.inc();
        taken
    }

    /// Forgets buckets that are full: a new one is the same. Not at each request, when there is nothing to forget.
    fn sweep(&self, shard: &mut HashMap<u64, u64>, now: u64) {
        let last = self.swept.load(Relaxed);
        if last > 0 && now.saturating_sub(last) < 100_000_000 {
            return;
        }
        self.swept.store(now.max(1), Relaxed);
        let before = shard.len();
        shard.retain(|_, full_at| *full_at > now);
        self.stats.keys.add(-i64::try_from(before - shard.len()).unwrap_or(0));
    }

    fn take_of(&self, mark: &Mark, now: u64) -> Taken {
        match mark.update(|full_at| self.taken(full_at, now).1) {
            Ok(full_at) | Err(full_at) => self.taken(full_at, now).0,
        }
    }

    /// What becomes of a token, and when the bucket is full again; `None` where that does not change.
    fn taken(&self, full_at: u64, now: u64) -> (Taken, Option<u64>) {
        let from = full_at.max(now);
        let ahead = from - now;
        if ahead > self.ahead {
            return (Taken::Over { after: Duration::from_nanos(ahead - self.ahead) }, None);
        }
        let next = from.saturating_add(self.step);
        let left = u32::try_from((self.ahead - ahead) / self.step).unwrap_or(u32::MAX);
        let reset = Duration::from_nanos(next.saturating_sub(now));
        (Taken::Within { left, reset }, Some(next))
    }
}
