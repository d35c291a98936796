//! Tokens that were verified, so that one that comes again costs a hash and a look-up. Bounded: what was not used since
//! the last turn of generations is forgotten when a generation is full.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashMap;
use model::http::{Claims, TokenRule};

use super::token::Validity;
use crate::providers::keys::KeySet;

const SHARDS: usize = 16;

/// SHA-256 of a token. Of those that are kept nobody can make a second one.
pub(super) type Digest = [u8; 32];

pub(super) fn digest(token: &str) -> Digest {
    let mut digest = [0; 32];
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes());
    for (to, from) in digest.iter_mut().zip(hash.as_ref()) {
        *to = *from;
    }
    digest
}

/// What is kept of a token: what it says, for whom it was verified, and by which keys.
#[derive(Clone)]
pub(super) struct Kept {
    pub rule: Arc<TokenRule>,
    pub keys: Arc<KeySet>,
    pub claims: Arc<Claims>,
    pub validity: Validity,
}

/// The verdicts, by token and rule.
pub(super) struct Cache {
    shards: [Mutex<Generations>; SHARDS],
    /// Of a generation of a shard.
    room: usize,
}

#[derive(Default)]
struct Generations {
    young: HashMap<(Digest, usize), Kept>,
    old: HashMap<(Digest, usize), Kept>,
}

impl Cache {
    /// With room for about `size` tokens; none with 0.
    pub(super) fn new(size: usize) -> Self {
        Self { shards: Default::default(), room: size.div_ceil(2 * SHARDS) }
    }

    fn shard(&self, digest: &Digest) -> Option<MutexGuard<'_, Generations>> {
        let shard = self.shards.get(usize::from(digest.first()? % 16))?;
        Some(shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn len(&self) -> usize {
        let of = |shard: &Mutex<Generations>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.young.len() + shard.old.len()
        };
        self.shards.iter().map(of).sum()
    }

    /// What is kept of a token for `rule`, if it was verified by `keys`.
    pub(super) fn get(&self, digest: &Digest, rule: &Arc<TokenRule>, keys: &Arc<KeySet>) -> Option<Kept> {
        let slot = (*digest, Arc::as_ptr(rule).addr());
        let mut shard = self.shard(digest)?;
        let holds = |kept: &Kept| Arc::ptr_eq(&kept.rule, rule) && Arc::ptr_eq(&kept.keys, keys);
        if let Some(kept) = shard.young.get(&slot) {
            return holds(kept).then(|| kept.clone());
        }
        let kept = shard.old.remove(&slot).filter(holds)?;
        self.insert(&mut shard, slot, kept.clone());
        Some(kept)
    }

    pub(super) fn put(&self, digest: Digest, kept: Kept) {
        if self.room == 0 {
            return;
        }
        let slot = (digest, Arc::as_ptr(&kept.rule).addr());
        if let Some(mut shard) = self.shard(&digest) {
            self.insert(&mut shard, slot, kept);
        }
    }

    fn insert(&self, shard: &mut Generations, slot: (Digest, usize), kept: Kept) {
        if shard.young.len() >= self.room && !shard.young.contains_key(&slot) {
            shard.old = std::mem::take(&mut shard.young);
        }
        shard.young.insert(slot, kept);
    }
}
