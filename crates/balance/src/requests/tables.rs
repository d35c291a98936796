//! Which endpoint a key goes to: rings and Maglev tables. Both are functions of the endpoints' names and weights alone, in
//! no order, so that every replica of a proxy has the same.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use model::http::HashTable;

use super::hash::derived;

/// The most entries of a ring, as in Envoy.
const MAX_RING: u64 = 8 << 20;
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
                let round = owners.iter().cycle().skip(start % owners.len().max(1)).take(owners.len());
                let mut last = None;
                // What stands beside itself is looked at once.
                let mut fresh = round.filter(move |owner| last.replace(**owner) != Some(**owner));
                fresh.by_ref().take(STEPS).copied().find(|owner| taken(*owner))
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
    let of_lightest = (lightest * minimum).div_ceil(total.max(1)).max(1);
    let most = MAX_RING.max(entries.len() as u64);
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
    let size = size.max(2);
    let mut table = vec![FREE; usize::try_from(size).unwrap_or(0)];
    let heaviest = entries.iter().map(|(_, weight)| u64::from(*weight)).max().unwrap_or(1).max(1);
    let mut next: Vec<(u64, u64)> =
        entries.iter().map(|(hash, _)| (hash % size, derived(*hash, 1) % (size - 1) + 1)).collect();
    // Round, number of the entry, turns so far.
    let first = |(_, weight): &Entry| heaviest.div_ceil(u64::from(*weight).max(1));
    let mut turns: BinaryHeap<Reverse<(u64, u32, u64)>> =
        (0u32..).zip(entries).map(|(number, entry)| Reverse((first(entry), number, 1))).collect();
    for _ in 0..table.len() {
        let Some(Reverse((_, number, taken))) = turns.pop() else { break };
        let Some((place, skip)) = next.get_mut(number as usize) else { break };
        while let Some(slot) = table.get_mut(usize::try_from(*place).unwrap_or(usize::MAX)) {
            *place = (*place + *skip) % size;
            if *slot == FREE {
                *slot = number;
                break;
            }
        }
        let weight = entries.get(number as usize).map_or(1, |(_, weight)| u64::from(*weight).max(1));
        turns.push(Reverse(((heaviest * (taken + 1)).div_ceil(weight), number, taken + 1)));
    }
    table.into()
}
