//! Which endpoint a key goes to: rings and Maglev tables. Both are functions of the endpoints' names and weights alone, in
//! no order, so that every replica of a proxy has the same.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use model::http::HashTable;

use super::hash::derived;

/// The most entries of a ring for the sake of weights, unless its minimum is more.
const MAX_RING: u64 = 1 << 16;
/// The most entries of a ring, as in Envoy.
const LIMIT: u64 = 8 << 20;
/// How many entries are looked at for one that may be taken.
const STEPS: usize = 256;

/// An endpoint, by the hash of its name, with its weight. A table numbers them as they come.
pub(crate) type Entry = (u64, u32);

/// A ring or a Maglev table over entries that are sorted.
#[derive(Debug)]
pub(crate) struct Table {
    kind: HashTable,
    entries: Box<[Entry]>,
    places: Places,
}

#[derive(Debug)]
enum Places {
    /// Where the entries are on the ring, in its order.
    Ring {
        hashes: Box<[u64]>,
        owners: Box<[u32]>,
    },
    Maglev(Box<[u32]>),
}

impl Table {
    /// Takes time in proportion to its size.
    pub(crate) fn new(kind: HashTable, entries: &[Entry]) -> Self {
        let places = match kind {
            HashTable::Ring(minimum) => ring(entries, minimum),
            HashTable::Maglev(size) => Places::Maglev(maglev(entries, size)),
        };
        Self { kind, entries: entries.into(), places }
    }

    /// Whether it is the table of these.
    pub(crate) fn is_of(&self, kind: HashTable, entries: &[Entry]) -> bool {
        self.kind == kind && *self.entries == *entries
    }

    /// The first entry for `key` that may be `taken`, of those that come in turn for it.
    pub(crate) fn find(&self, key: u64, mut taken: impl FnMut(u32) -> bool) -> Option<u32> {
        match &self.places {
            Places::Ring { hashes, owners } => {
                let start = hashes.partition_point(|hash| *hash < key);
                let (before, after) = owners.split_at_checked(start)?;
                let mut last = None;
                // What stands beside itself is looked at once.
                let round = after.iter().chain(before).filter(|owner| last.replace(**owner) != Some(**owner));
                round.take(STEPS).copied().find(|owner| taken(*owner))
            }
            Places::Maglev(table) => (0..STEPS as u64).find_map(|step| {
                let key = if step == 0 { key } else { derived(key, step) };
                let at = usize::try_from(key.checked_rem(table.len() as u64)?).ok()?;
                table.get(at).copied().filter(|owner| taken(*owner))
            }),
        }
    }
}

/// Each entry as often as it weighs, the lightest at least once; `minimum` in all at least (as Envoy scales its rings).
fn ring(entries: &[Entry], minimum: u64) -> Places {
    let total: u64 = entries.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let lightest = entries.iter().map(|(_, weight)| u64::from(*weight)).min().unwrap_or(0).max(1);
    // So many for the lightest that the others come to the minimum.
    let minimum = minimum.min(LIMIT);
    let of_lightest = (lightest * minimum).div_ceil(total.max(1)).max(1);
    let most = MAX_RING.max(2 * minimum).max(entries.len() as u64);
    let size = (u128::from(of_lightest) * u128::from(total) / u128::from(lightest)).min(u128::from(most));
    let mut places: Vec<(u64, u64, u32)> = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    for (number, (hash, weight)) in (0u32..).zip(entries) {
        let share = (size * u128::from(*weight)).div_ceil(u128::from(total.max(1)));
        let copies = u64::try_from(share).unwrap_or(1).max(1);
        places.extend((0..copies).map(|copy| (derived(*hash, copy), *hash, number)));
    }
    places.sort_unstable();
    let hashes = places.iter().map(|(at, _, _)| *at).collect();
    Places::Ring { hashes, owners: places.iter().map(|(_, _, number)| *number).collect() }
}

/// Fills a table in turns, each entry in the order of its own permutation (D. Eisenbud et al., "Maglev: A Fast and Reliable
/// Software Network Load Balancer", NSDI 2016, section 3.4); an entry's n-th turn comes in the round that its weight says.
fn maglev(entries: &[Entry], size: u64) -> Box<[u32]> {
    const FREE: u32 = u32::MAX;
    if entries.is_empty() {
        return Box::default();
    }
    let size = size.max(2);
    let mut table = vec![FREE; usize::try_from(size).unwrap_or(0)];
    let mut fill = |number: u32, (place, skip): &mut (u64, u64)| {
        while let Some(slot) = table.get_mut(usize::try_from(*place).unwrap_or(usize::MAX)) {
            *place = (*place + *skip) % size;
            if *slot == FREE {
                *slot = number;
                break;
            }
        }
    };
    let heaviest = entries.iter().map(|(_, weight)| u64::from(*weight)).max().unwrap_or(1).max(1);
    let mut next: Vec<(u64, u64)> =
        entries.iter().map(|(hash, _)| (hash % size, derived(*hash, 1) % (size - 1) + 1)).collect();
    if entries.iter().all(|(_, weight)| u64::from(*weight) == heaviest) {
        // One turn each, round by round.
        let count = next.len();
        for (turn, number) in (0..size).zip((0u32..).take(count).cycle()) {
            let at = usize::try_from(turn).unwrap_or(0) % count;
            if let Some(next) = next.get_mut(at) {
                fill(number, next);
            }
        }
        return table.into();
    }
    // Round, number of the entry, turns so far.
    let first = |(_, weight): &Entry| heaviest.div_ceil(u64::from(*weight).max(1));
    let mut turns: BinaryHeap<Reverse<(u64, u32, u64)>> =
        (0u32..).zip(entries).map(|(number, entry)| Reverse((first(entry), number, 1))).collect();
    for _ in 0..size {
        let Some(Reverse((_, number, taken))) = turns.pop() else { break };
        let Some(next) = next.get_mut(number as usize) else { break };
        fill(number, next);
        let weight = entries.get(number as usize).map_or(1, |(_, weight)| u64::from(*weight).max(1));
        turns.push(Reverse(((heaviest * (taken + 1)).div_ceil(weight), number, taken + 1)));
    }
    table.into()
}

#[cfg(test)]
mod tests {
    use super::super::hash::hash;
    use super::*;
    use proptest::prelude::*;

    fn entries(weights: &[u32]) -> Vec<Entry> {
        let named = |(at, weight): (usize, &u32)| (hash(format!("10.0.0.{at}:80").as_bytes()), *weight);
        let mut entries: Vec<Entry> = weights.iter().enumerate().map(named).collect();
        entries.sort_unstable();
        entries
    }

    fn counts(table: &Table, keys: u64) -> Vec<u64> {
        let mut counts = vec![0; table.entries.len()];
        for key in 0..keys {
            counts[table.find(derived(key, 99), |_| true).unwrap() as usize] += 1;
        }
        counts
    }

    /// Maglev as the paper has it, with weights in rounds, one after the other.
    fn naive_maglev(entries: &[Entry], size: u64) -> Vec<u32> {
        let most = u64::from(entries.iter().map(|(_, w)| *w).max().unwrap());
        let mut table = vec![None; size as usize];
        let mut next = vec![0; entries.len()];
        let mut target = vec![0; entries.len()];
        let mut filled = 0;
        for round in 1.. {
            for (at, (name, weight)) in entries.iter().enumerate() {
                if round * u64::from(*weight) < target[at] + most {
                    continue;
                }
                target[at] += most;
                let (offset, skip) = (name % size, derived(*name, 1) % (size - 1) + 1);
                let free = |n: &u64| table[((offset + n * skip) % size) as usize].is_none();
                let place = (next[at]..).find(free).unwrap();
                table[((offset + place * skip) % size) as usize] = Some(at as u32);
                next[at] = place + 1;
                filled += 1;
                if filled == size {
                    return table.into_iter().flatten().collect();
                }
            }
        }
        unreachable!()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn maglev_is_the_papers(weights in prop::collection::vec(1..30u32, 1..12)) {
            let entries = entries(&weights);
            let table = maglev(&entries, 251);
            prop_assert_eq!(table.to_vec(), naive_maglev(&entries, 251));
        }

        #[test]
        fn a_ring_gives_a_key_to_the_next_entry_on_it(
            weights in prop::collection::vec(1..30u32, 1..12),
            key in any::<u64>(),
            refused in prop::collection::btree_set(0..12u32, 0..4),
        ) {
            let entries = entries(&weights);
            let table = Table::new(HashTable::Ring(64), &entries);
            let Places::Ring { hashes, owners } = &table.places else { unreachable!() };
            prop_assert!(hashes.is_sorted() && hashes.len() >= 64);
            let mut order: Vec<(u64, u32)> = hashes
                .iter()
                .zip(owners)
                .map(|(at, owner)| (at.wrapping_sub(key), *owner))
                .collect();
            order.sort_unstable();
            let naive = order.iter().map(|(_, owner)| *owner).find(|owner| !refused.contains(owner));
            prop_assert_eq!(table.find(key, |owner| !refused.contains(&owner)), naive);
        }
    }

    #[test]
    fn shares_are_as_weights_are() {
        for (kind, off) in [(HashTable::Maglev(65_537), 0.02), (HashTable::Ring(65_536), 0.10)] {
            let table = Table::new(kind, &entries(&[1, 1, 2, 4]));
            let counts = counts(&table, 400_000);
            for ((_, weight), count) in table.entries.iter().zip(counts) {
                let share = count as f64 / 400_000.0 * 8.0 / f64::from(*weight);
                assert!((share - 1.0).abs() < off, "{kind:?}: weight {weight} has {share} of its share");
            }
        }
        // Every entry has some of Maglev's, the fewest at most 1 in 100 fewer than the most.
        let table = Table::new(HashTable::Maglev(65_537), &entries(&[1; 100]));
        let Places::Maglev(slots) = &table.places else { unreachable!() };
        let mut of = [0; 100];
        slots.iter().for_each(|owner| of[*owner as usize] += 1);
        assert!(of.iter().max().unwrap() - of.iter().min().unwrap() <= 1, "{of:?}");
    }

    #[test]
    fn an_entry_that_goes_takes_few_keys_of_others_with_it() {
        for (kind, most) in [(HashTable::Maglev(65_537), 0.05), (HashTable::Ring(1024), 0.0)] {
            let (before, mut after) = (entries(&[1; 50]), entries(&[1; 50]));
            let gone = after.remove(17);
            let [old, new] = [&before, &after].map(|entries| Table::new(kind, entries));
            let (mut moved, mut others) = (0, 0);
            for key in 0..100_000 {
                let name =
                    |table: &Table| table.entries[table.find(derived(key, 5), |_| true).unwrap() as usize];
                if name(&old) != gone {
                    others += 1;
                    moved += u32::from(name(&old) != name(&new));
                }
            }
            let share = f64::from(moved) / f64::from(others);
            assert!(share <= most, "{kind:?}: {share} of the keys of others have moved");
        }
    }

    #[test]
    fn odd_tables_are_tables() {
        for kind in
            [HashTable::Maglev(2), HashTable::Maglev(0), HashTable::Ring(0), HashTable::Ring(u64::MAX)]
        {
            let table = Table::new(kind, &[]);
            assert_eq!(table.find(7, |_| true), None, "{kind:?}");
        }
        let table = Table::new(HashTable::Maglev(2), &entries(&[1; 10]));
        assert!(table.find(7, |_| true).is_some());
        let table = Table::new(HashTable::Ring(1), &entries(&[1, u32::MAX]));
        let Places::Ring { owners, .. } = &table.places else { unreachable!() };
        assert!(owners.len() <= 65_538, "{} entries", owners.len());
    }
}
