//! A hash map whose clones share what did not change.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashMap};

/// Enough shards that the copy of one is small at 100,000 entries (400 entries), few enough that cloning the map
/// itself, which touches every shard's reference count, stays near a microsecond.
const SHARDS: usize = 256;

/// A hash map for snapshots. `clone` costs 256 reference counts, whatever the map holds; a change to a clone
/// copies the one shard that it touches, and nothing once that shard is no longer shared. So a snapshot of
/// 100,000 workloads is replaced for the cost of a few hundred entries, and the building of the first one, which
/// nobody shares yet, costs no more than an ordinary map.
pub struct CowMap<K, V> {
    shards: Arc<[Arc<HashMap<K, V>>]>,
    hasher: DefaultHashBuilder,
    len: usize,
}

impl<K, V> Default for CowMap<K, V> {
    fn default() -> Self {
        let empty = Arc::new(HashMap::new());
        Self {
            shards: std::iter::repeat_n(empty, SHARDS).collect(),
            hasher: DefaultHashBuilder::default(),
            len: 0,
        }
    }
}

impl<K, V> Clone for CowMap<K, V> {
    fn clone(&self) -> Self {
        Self { shards: self.shards.clone(), hasher: self.hasher.clone(), len: self.len }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for CowMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.shards.iter().flat_map(|s| s.iter())).finish()
    }
}

impl<K: Hash + Eq + Clone, V: Clone> CowMap<K, V> {
    fn shard_index<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The shards' own maps use the low and the top seven bits of their hashes; they have hashers of their
        // own, so any bits do here.
        (self.hasher.hash_one(key) as usize) % SHARDS
    }

    fn shard<Q: Hash + ?Sized>(&self, key: &Q) -> Option<&HashMap<K, V>> {
        self.shards.get(self.shard_index(key)).map(AsRef::as_ref)
    }

    fn shard_mut<Q: Hash + ?Sized>(&mut self, key: &Q) -> Option<&mut HashMap<K, V>> {
        let index = self.shard_index(key);
        Arc::make_mut(&mut self.shards).get_mut(index).map(Arc::make_mut)
    }

    /// The value of `key`.
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shard(key)?.get(key)
    }

    /// The key that is there for `key`, where that holds more than what it is found by.
    pub fn get_key<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&K>
    where
        K: Borrow<Q>,
    {
        self.shard(key)?.get_key_value(key).map(|(key, _)| key)
    }

    /// Whether there is an entry for `key`.
    pub fn contains_key<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// Sets the value of `key`; returns the one that it replaces.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let old = self.shard_mut(&key)?.insert(key, value);
        self.len += usize::from(old.is_none());
        old
    }

    /// Like [`insert`](Self::insert), and the key that is there is replaced, too.
    pub fn replace(&mut self, key: K, value: V) {
        self.remove(&key);
        self.insert(key, value);
    }

    /// Removes `key`; returns its value.
    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        if !self.contains_key(key) {
            return None; // without this, a miss would copy the shard
        }
        let old = self.shard_mut(key)?.remove(key);
        self.len -= usize::from(old.is_some());
        old
    }

    /// The value of `key`, for change; an absent one is made first.
    pub fn entry_or_default(&mut self, key: &K) -> Option<&mut V>
    where
        V: Default,
    {
        if !self.contains_key(key) {
            self.insert(key.clone(), V::default());
        }
        self.get_mut(key)
    }

    /// The value of `key`, for change.
    pub fn get_mut<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        if !self.contains_key(key) {
            return None;
        }
        self.shard_mut(key)?.get_mut(key)
    }

    /// All entries, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|s| s.iter())
    }

    /// All values, in no order that means anything.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, v)| v)
    }

    /// The keys of what came, went or was replaced since `before`. Costs what is in the shards that the two don't share: of
    /// a map and the one that it was cloned from, those that were changed.
    pub fn changed_since(&self, before: &Self, is_same: impl Fn(&V, &V) -> bool) -> Vec<K> {
        let mut keys = Vec::new();
        let shards = self.shards.iter().zip(before.shards.iter());
        for (now, then) in shards.filter(|(now, then)| !Arc::ptr_eq(now, then)) {
            let is_new = |(key, value): &(&K, &V)| !before.get(*key).is_some_and(|old| is_same(old, value));
            keys.extend(now.iter().filter(is_new).map(|(key, _)| key.clone()));
            keys.extend(then.keys().filter(|key| !self.contains_key(*key)).cloned());
        }
        keys
    }

    /// The number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_keeps_what_it_had_when_the_other_changes() {
        let mut a: CowMap<u32, u32> = CowMap::default();
        for i in 0..1000 {
            a.insert(i, i);
        }
        let b = a.clone();
        a.insert(7, 70);
        a.remove(&8);
        assert_eq!((a.get(&7), a.get(&8), a.len()), (Some(&70), None, 999));
        assert_eq!((b.get(&7), b.get(&8), b.len()), (Some(&7), Some(&8), 1000));
    }

    #[test]
    fn what_changed_is_told_of_maps_of_one_descent_and_of_others() {
        let mut a: CowMap<u32, u32> = CowMap::default();
        for i in 0..1000 {
            a.insert(i, i);
        }
        let mut b = a.clone();
        assert_eq!(b.changed_since(&a, PartialEq::eq), [0; 0]);
        b.insert(7, 70);
        b.insert(8, 8);
        b.remove(&9);
        b.insert(1000, 0);
        let changed = |now: &CowMap<u32, u32>, then: &CowMap<u32, u32>| {
            let mut keys = now.changed_since(then, PartialEq::eq);
            keys.sort_unstable();
            keys
        };
        assert_eq!(changed(&b, &a), [7, 9, 1000]);
        // Another map hashes otherwise.
        let mut c: CowMap<u32, u32> = CowMap::default();
        b.iter().for_each(|(key, value)| _ = c.insert(*key, *value));
        assert_eq!(changed(&c, &b), [0; 0]);
        assert_eq!(changed(&c, &a), [7, 9, 1000]);
        assert_eq!(changed(&CowMap::default(), &a).len(), 1000);
    }

    #[test]
    fn a_change_copies_one_shard_only() {
        let mut a: CowMap<u32, u32> = CowMap::default();
        for i in 0..10_000 {
            a.insert(i, i);
        }
        let b = a.clone();
        a.insert(7, 70);
        a.remove(&1_000_000);
        let copied = a.shards.iter().zip(b.shards.iter()).filter(|(x, y)| !Arc::ptr_eq(x, y)).count();
        assert_eq!(copied, 1);
    }
}
