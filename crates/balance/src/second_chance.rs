//! A map with a limit.

use std::collections::VecDeque;
use std::hash::Hash;

use hashbrown::HashMap;

/// How many entries that are in use an insertion passes over before it takes the next one all the same.
const CHANCES: usize = 8;

/// A map that, when it is full, lets an entry go that was not looked at since its turn came last (the clock
/// algorithm). Nearly the oldest, at a constant cost.
#[derive(Debug)]
pub(crate) struct SecondChance<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// Every key once.
    turns: VecDeque<K>,
    limit: usize,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    used: bool,
}

impl<K: Hash + Eq + Clone, V> SecondChance<K, V> {
    /// A map of at most `limit` entries, at least one.
    pub(crate) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), turns: VecDeque::new(), limit: limit.max(1) }
    }

    /// The value of `key`, which counts as used.
    pub(crate) fn get(&mut self, key: &K) -> Option<&mut V> {
        let entry = self.entries.get_mut(key)?;
        entry.used = true;
        Some(&mut entry.value)
    }

    /// Sets the value of `key`; says whether another entry had to go.
    pub(crate) fn insert(&mut self, key: K, value: V) -> bool {
        if let Some(entry) = self.entries.get_mut(&key) {
            *entry = Entry { value, used: true };
            return false;
        }
        let full = self.entries.len() >= self.limit;
        if full {
            self.make_room();
        }
        self.turns.push_back(key.clone());
        self.entries.insert(key, Entry { value, used: true });
        full
    }

    fn make_room(&mut self) {
        for _ in 0..CHANCES {
            let Some(key) = self.turns.pop_front() else { return };
            match self.entries.get_mut(&key) {
                Some(entry) if entry.used => {
                    entry.used = false;
                    self.turns.push_back(key);
                }
                _ => {
                    self.entries.remove(&key);
                    return;
                }
            }
        }
        if let Some(key) = self.turns.pop_front() {
            self.entries.remove(&key);
        }
    }

    /// Keeps what `keep` says; it is given the key, the value and whether the entry was used since the last call.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&K, &V, bool) -> bool) {
        self.entries.retain(|key, entry| keep(key, &entry.value, std::mem::take(&mut entry.used)));
        let entries = &self.entries;
        self.turns.retain(|key| entries.contains_key(key));
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unused_go_first_and_the_limit_holds() {
        let mut map = SecondChance::new(4);
        for i in 0..4 {
            assert!(!map.insert(i, i));
        }
        assert!(map.insert(4, 4)); // all were new, so the first goes after one round
        assert!(map.get(&0).is_none());
        assert!(map.get(&1).is_some());
        assert!(map.insert(5, 5));
        assert!(map.get(&1).is_some(), "it was used");
        assert!(map.get(&2).is_none());
        for i in 100..10_000 {
            map.insert(i, i);
        }
        assert_eq!((map.len(), map.turns.len()), (4, 4));
    }

    #[test]
    fn retain_forgets_the_turns_too() {
        let mut map = SecondChance::new(4);
        map.insert("a", 1);
        map.insert("b", 2);
        map.retain(|key, _, _| *key == "b");
        assert_eq!((map.len(), map.turns.len()), (1, 1));
        map.retain(|_, _, used| used);
        assert_eq!(map.len(), 0);
    }
}
