//! Responses of upstream resolvers, kept for as long as they hold, and beyond that for when no upstream answers
//! (RFC 8767).
//!
//! Bounded in bytes. There are two generations: what is used moves to the young one; when that is half of the
//! limit, it becomes the old one, and what was old and unused is forgotten. So what is used stays, as with a list
//! by last use, but nothing is kept in order.

use std::time::Duration;

use hashbrown::HashMap;
use tokio::time::Instant;

use super::wire;

/// The time to live that a stale answer is given (RFC 8767, section 4).
const STALE_TTL: u32 = 30;

/// No answer counts as fresh for longer (RFC 8767, section 4, allows a week).
const LONGEST_TTL: u32 = 86_400;

/// What an entry takes beside its key and bytes: the table's slot, allocations.
const ENTRY_OVERHEAD: usize = 160;

struct Entry {
    bytes: Box<[u8]>,
    ttls_at: Box<[u16]>,
    stored: Instant,
    expires: Instant,
    /// When a stale answer is given, the upstreams are not asked again before this.
    recheck_at: Instant,
}

impl Entry {
    fn size(&self, key: &[u8]) -> usize {
        key.len() + self.bytes.len() + 2 * self.ttls_at.len() + ENTRY_OVERHEAD
    }
}

#[derive(Default)]
struct Generation {
    entries: HashMap<Box<[u8]>, Entry>,
    bytes: usize,
}

/// What the cache says of a query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Cached {
    /// Nothing.
    No,
    /// A response that holds; its times to live are what is left of them.
    Fresh(Vec<u8>),
    /// A response that held once.
    Stale {
        /// The response, with short times to live.
        response: Vec<u8>,
        /// Whether upstreams may be asked now: not so soon after they failed.
        ask: bool,
    },
}

/// The cache.
pub(super) struct Cache {
    limit: usize,
    stale_limit: Duration,
    young: Generation,
    old: Generation,
}

impl Cache {
    /// A cache of at most `limit` bytes, whose entries may be used for `stale_limit` after they expire.
    pub(super) fn new(limit: usize, stale_limit: Duration) -> Self {
        Self { limit, stale_limit, young: Generation::default(), old: Generation::default() }
    }

    /// What it takes, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.young.bytes + self.old.bytes
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.young.entries.len() + self.old.entries.len()
    }

    pub(super) fn get(&mut self, key: &[u8]) -> Cached {
        if !self.young.entries.contains_key(key)
            && let Some((key, entry)) = self.old.entries.remove_entry(key)
        {
            self.old.bytes -= entry.size(&key);
            self.insert(key, entry);
        }
        let Some(entry) = self.young.entries.get(key) else { return Cached::No };
        let now = Instant::now();
        let mut response = entry.bytes.to_vec();
        if now < entry.expires {
            let age = u32::try_from((now - entry.stored).as_secs()).unwrap_or(u32::MAX);
            wire::change_ttls(&mut response, &entry.ttls_at, |ttl| ttl.saturating_sub(age));
            return Cached::Fresh(response);
        }
        if now < entry.expires + self.stale_limit {
            wire::change_ttls(&mut response, &entry.ttls_at, |_| STALE_TTL);
            return Cached::Stale { response, ask: now >= entry.recheck_at };
        }
        if let Some((key, entry)) = self.young.entries.remove_entry(key) {
            self.young.bytes -= entry.size(&key);
        }
        Cached::No
    }

    /// Keeps `response`, when it is one to be kept.
    pub(super) fn put(&mut self, key: Box<[u8]>, response: &[u8], parsed: &wire::Response) {
        let Some(ttl) = parsed.ttl.filter(|ttl| *ttl > 0) else { return };
        let now = Instant::now();
        let entry = Entry {
            bytes: response.into(),
            ttls_at: parsed.ttls_at.as_slice().into(),
            stored: now,
            expires: now + Duration::from_secs(ttl.min(LONGEST_TTL).into()),
            recheck_at: now,
        };
        if entry.size(&key) > self.limit / 8 {
            return; // one large answer is not worth many small ones
        }
        if let Some((key, old)) = self.old.entries.remove_entry(&key) {
            self.old.bytes -= old.size(&key);
        }
        self.insert(key, entry);
    }

    /// Upstreams failed to answer this: a stale answer serves without asking them again for `pause`.
    pub(super) fn failed(&mut self, key: &[u8], pause: Duration) {
        for generation in [&mut self.young, &mut self.old] {
            if let Some(entry) = generation.entries.get_mut(key) {
                entry.recheck_at = Instant::now() + pause;
            }
        }
    }

    fn insert(&mut self, key: Box<[u8]>, entry: Entry) {
        let size = entry.size(&key);
        if self.young.bytes + size > self.limit / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        let key_len = key.len();
        self.young.bytes += size;
        if let Some(replaced) = self.young.entries.insert(key, entry) {
            // Of the same key, so only its length counts.
            self.young.bytes -= replaced.bytes.len() + 2 * replaced.ttls_at.len() + ENTRY_OVERHEAD + key_len;
        }
    }
}
