//! Sets of instances by their numbers, in order.
//!
//! Half of what a hash set takes, and nearly always one is added at the end, since numbers are given in order. One that comes or
//! leaves elsewhere moves those behind it, so no list is longer than [`CHUNK`]: a namespace of 100,000 pods that goes, or
//! comes with numbers of those that went, costs what they are and not the square of it.

use std::mem;

/// An instance's number in the compiler's table.
pub(super) type Id = u32;

/// Longer sets are in several lists.
const CHUNK: usize = 1024;
/// Lists that together have no more are made one, when one of them is half as long.
const SHORT: usize = CHUNK / 2;

/// A set of instances.
#[derive(Debug, Clone)]
pub(super) enum Ids {
    Few(Vec<Id>),
    Many(Box<Chunks>),
}

/// Lists that are not empty, one behind the other.
#[derive(Debug, Clone)]
pub(super) struct Chunks {
    lists: Vec<Vec<Id>>,
    len: usize,
}

impl Default for Ids {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl Ids {
    pub(super) fn of<const N: usize>(mut ids: [Id; N]) -> Self {
        ids.sort_unstable();
        Self::Few(ids.into())
    }

    pub(super) fn insert(&mut self, id: Id) {
        if let Self::Few(list) = self
            && list.len() == CHUNK
        {
            *self = Self::Many(Box::new(Chunks { len: CHUNK, lists: vec![mem::take(list)] }));
        }
        match self {
            Self::Few(list) => _ = insert(list, id),
            Self::Many(chunks) => chunks.insert(id),
        }
    }

    pub(super) fn remove(&mut self, id: Id) {
        match self {
            Self::Few(list) => _ = remove(list, id),
            Self::Many(chunks) => {
                chunks.remove(id);
                if chunks.len <= SHORT {
                    *self = Self::Few(chunks.lists.concat());
                }
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Few(list) => list.len(),
            Self::Many(chunks) => chunks.len,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Id> {
        let (few, many) = match self {
            Self::Few(list) => (list.as_slice(), &[][..]),
            Self::Many(chunks) => (&[][..], chunks.lists.as_slice()),
        };
        few.iter().chain(many.iter().flatten()).copied()
    }
}

impl Chunks {
    /// The place of the list that has a number, if any has.
    fn place(&self, id: Id) -> usize {
        self.lists.partition_point(|list| list.first().is_some_and(|first| *first <= id)).saturating_sub(1)
    }

    fn insert(&mut self, id: Id) {
        let mut place = self.place(id);
        let is_last = place + 1 == self.lists.len();
        let Some(list) = self.lists.get_mut(place) else { return };
        if list.len() >= CHUNK {
            let is_behind_all = is_last && list.last().is_some_and(|last| *last < id);
            let second = list.split_off(if is_behind_all { CHUNK } else { SHORT });
            list.shrink_to_fit();
            let goes_there = is_behind_all || second.first().is_some_and(|first| *first <= id);
            self.lists.insert(place + 1, second);
            place += usize::from(goes_there);
        }
        let is_new = self.lists.get_mut(place).is_some_and(|list| insert(list, id));
        self.len += usize::from(is_new);
    }

    fn remove(&mut self, id: Id) {
        let place = self.place(id);
        let Some(list) = self.lists.get_mut(place) else { return };
        if !remove(list, id) {
            return;
        }
        self.len -= 1;
        if list.is_empty() {
            self.lists.remove(place);
        } else if list.len() <= SHORT / 2 {
            self.join(place);
            self.join(place.wrapping_sub(1));
        }
    }

    /// Makes a list one with the next, where both are short.
    fn join(&mut self, place: usize) {
        let Some(next) = self.lists.get(place.wrapping_add(1)).map(Vec::len) else { return };
        let Some(list) = self.lists.get(place).filter(|list| list.len() + next <= SHORT) else { return };
        let mut joined = Vec::with_capacity(list.len() + next);
        self.lists.drain(place..place + 2).for_each(|list| joined.extend(list));
        self.lists.insert(place, joined);
    }
}

/// Whether it was not there.
fn insert(list: &mut Vec<Id>, id: Id) -> bool {
    let place = match list.last() {
        Some(last) if *last >= id => list.binary_search(&id),
        _ => Err(list.len()),
    };
    if let Err(place) = place {
        if list.len() == list.capacity() {
            list.reserve_exact((list.len() / 8).max(4)); // an eighth more, not twice as much
        }
        list.insert(place, id);
    }
    place.is_err()
}

/// Whether it was there.
fn remove(list: &mut Vec<Id>, id: Id) -> bool {
    list.binary_search(&id).map(|place| list.remove(place)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn lists(ids: &Ids) -> Vec<&[Id]> {
        match ids {
            Ids::Few(list) => vec![list],
            Ids::Many(chunks) => chunks.lists.iter().map(Vec::as_slice).collect(),
        }
    }

    /// What one change costs at most: as many numbers are looked at or moved.
    fn steps(ids: &Ids) -> usize {
        lists(ids).iter().map(|list| list.len()).max().unwrap_or_default() + lists(ids).len()
    }

    /// All numbers below a power of two, in an order that jumps about.
    fn scattered(count: Id) -> impl Iterator<Item = Id> {
        assert!(count.is_power_of_two());
        (0..count).map(move |n| n.wrapping_mul(2_654_435_761) % count)
    }

    #[test]
    fn it_holds_what_a_set_holds() {
        const COUNT: Id = 1 << 13;
        let (mut ids, mut set) = (Ids::default(), BTreeSet::new());
        let mut check = |id: Id, inserts: bool| {
            if inserts {
                ids.insert(id);
                set.insert(id);
            } else {
                ids.remove(id);
                set.remove(&id);
            }
            if id.is_multiple_of(37) {
                assert!(ids.iter().eq(set.iter().copied()), "after {id}");
            }
            assert_eq!((ids.len(), ids.is_empty()), (set.len(), set.is_empty()));
            assert!(lists(&ids).len() <= 8 * set.len() / CHUNK + 2);
        };
        (0..COUNT / 2).for_each(|id| check(id, true));
        scattered(COUNT).for_each(|id| check(id, true));
        scattered(COUNT).filter(|id| id % 11 > 0).for_each(|id| check(id, false));
        scattered(COUNT).filter(|id| id.is_multiple_of(3)).for_each(|id| check(id, true));
        scattered(COUNT).for_each(|id| check(id, false));
        (0..COUNT).rev().for_each(|id| check(id, true));
        // Numbers that were given back come in the other order, here between lists that are full.
        (CHUNK as Id..COUNT - 1).for_each(|id| check(id, false));
        (CHUNK as Id..COUNT - 1).rev().for_each(|id| check(id, true));
        (0..COUNT).for_each(|id| check(id, false));
        (0..CHUNK as Id).chain([COUNT]).for_each(|id| check(id, true));
        (CHUNK as Id..COUNT).rev().for_each(|id| check(id, true));
        (0..=COUNT).for_each(|id| check(id, false));
        assert!(ids.is_empty());
    }

    #[test]
    fn what_comes_and_goes_costs_as_much_in_a_long_set() {
        const COUNT: Id = 1 << 17;
        let mut ids = Ids::default();
        let mut most = 0;
        for id in 0..COUNT {
            ids.insert(id);
            most = most.max(if id.is_multiple_of(64) { steps(&ids) } else { 0 });
        }
        for id in scattered(COUNT) {
            ids.remove(id);
            most = most.max(if id.is_multiple_of(64) { steps(&ids) } else { 0 });
        }
        for id in (0..COUNT).rev() {
            ids.insert(id);
            most = most.max(if id.is_multiple_of(64) { steps(&ids) } else { 0 });
        }
        // In one list each would have moved half of all: 65,536.
        assert!(most <= 2 * CHUNK, "{most} steps for one number");
    }

    #[test]
    fn an_empty_one_is_small() {
        assert_eq!(size_of::<Ids>(), size_of::<Vec<Id>>());
    }
}
