//! Virtual addresses for hosts of ServiceEntries that have none: from 240.240.0.0/16 and 2001:2::/48, as Istio
//! has them.
//!
//! Nodes work them out each for itself and must come to the same ones, whatever the order in which they hear of
//! hosts, and a host should keep its address when others come and go. So a host's name gives, by a hash, the
//! slots that it would take, in order. Of two that want one slot the host first in alphabetical order has it, and
//! the other tries its next. That has one outcome for a set of hosts (it is the stable matching of hosts and slots
//! where every slot prefers the same order), which [`Vips`] maintains: a host that comes or goes moves others only
//! along the chain of collisions that it is part of. Addresses that entries give themselves are taken from the
//! pool first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use model::ServiceKey;

/// The slots, from 1: a prime number of them, so that every step through them comes by all. The last two bytes of
/// the addresses are the slot's number; the first would read as the network's own address and is left out.
const SLOTS: u32 = 65_521;

/// How many slots a host tries. With half of the slots taken, a host fails with a probability of 2^-64.
const TRIES: u32 = 64;

/// Whose address a slot is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Claimant {
    /// An entry that gives the address itself.
    Given,
    /// A host, ordered by name and then namespace.
    Host(String, ServiceKey),
}

/// The assignment of addresses to hosts.
#[derive(Debug, Default)]
pub struct Vips {
    /// For each slot, who wants it, with the number of the try. The first one has it.
    slots: HashMap<u32, BTreeMap<Claimant, u32>>,
    /// The try at which each host has its slot; `None` when all were taken.
    hosts: HashMap<ServiceKey, Option<u32>>,
    /// How many entries give a slot's address themselves.
    given: HashMap<u32, usize>,
}

impl Vips {
    /// The addresses of a host, of each family.
    #[must_use]
    pub fn addresses(&self, host: &ServiceKey) -> Option<[IpAddr; 2]> {
        let attempt = (*self.hosts.get(host)?)?;
        let slot = slot_of(&host.hostname, attempt);
        let [_, _, high, low] = slot.to_be_bytes();
        let v6 = Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, u16::from_be_bytes([high, low]));
        Some([Ipv4Addr::new(240, 240, high, low).into(), v6.into()])
    }

    /// Adds a host. Returns the hosts whose addresses change, itself among them.
    pub fn insert(&mut self, host: &ServiceKey) -> BTreeSet<ServiceKey> {
        let mut moved = BTreeSet::new();
        if !self.hosts.contains_key(host) {
            self.hosts.insert(host.clone(), None);
            self.place(host.clone(), 0, &mut moved);
            moved.insert(host.clone());
        }
        moved
    }

    /// Removes a host. Returns the other hosts whose addresses change.
    pub fn remove(&mut self, host: &ServiceKey) -> BTreeSet<ServiceKey> {
        let mut moved = BTreeSet::new();
        let Some(held) = self.hosts.remove(host) else { return moved };
        let claimant = Claimant::of(host);
        for attempt in 0..held.map_or(TRIES, |h| h + 1) {
            let slot = slot_of(&host.hostname, attempt);
            self.withdraw(slot, &claimant, &mut moved);
        }
        moved
    }

    /// Takes the slot of an address that an entry gives itself out of the pool. Returns whose addresses change.
    pub fn reserve(&mut self, address: IpAddr) -> BTreeSet<ServiceKey> {
        let mut moved = BTreeSet::new();
        let Some(slot) = slot_at(address) else { return moved };
        let count = self.given.entry(slot).or_default();
        *count += 1;
        if *count == 1 {
            let previous =
                self.slots.get(&slot).and_then(|c| c.first_key_value()).map(|(c, n)| (c.clone(), *n));
            self.slots.entry(slot).or_default().insert(Claimant::Given, 0);
            if let Some((Claimant::Host(_, host), attempt)) = previous {
                moved.insert(host.clone());
                self.place(host, attempt + 1, &mut moved);
            }
        }
        moved
    }

    /// Puts it back. Returns whose addresses change.
    pub fn release(&mut self, address: IpAddr) -> BTreeSet<ServiceKey> {
        let mut moved = BTreeSet::new();
        let Some(slot) = slot_at(address) else { return moved };
        let Some(count) = self.given.get_mut(&slot) else { return moved };
        *count -= 1;
        if *count == 0 {
            self.given.remove(&slot);
            self.withdraw(slot, &Claimant::Given, &mut moved);
        }
        moved
    }

    /// Gives `host` the first slot from its try `attempt` on that it may have; whoever has to make room goes on.
    fn place(&mut self, mut host: ServiceKey, mut attempt: u32, moved: &mut BTreeSet<ServiceKey>) {
        loop {
            if attempt >= TRIES {
                self.hosts.insert(host, None);
                return;
            }
            let claimant = Claimant::of(&host);
            let claims = self.slots.entry(slot_of(&host.hostname, attempt)).or_default();
            let holder = claims.first_key_value().map(|(c, n)| (c.clone(), *n));
            claims.insert(claimant.clone(), attempt);
            match holder {
                Some((holder, _)) if holder < claimant => attempt += 1,
                Some((Claimant::Host(_, displaced), at)) => {
                    self.hosts.insert(host, Some(attempt));
                    moved.insert(displaced.clone());
                    (host, attempt) = (displaced, at + 1);
                }
                Some((Claimant::Given, _)) => attempt += 1,
                None => {
                    self.hosts.insert(host, Some(attempt));
                    return;
                }
            }
        }
    }

    /// Takes a claim back; the next one in line, if it is worse off elsewhere, moves in, and so on.
    fn withdraw(&mut self, slot: u32, claimant: &Claimant, moved: &mut BTreeSet<ServiceKey>) {
        let mut work = vec![(slot, claimant.clone())];
        while let Some((slot, claimant)) = work.pop() {
            let Some(claims) = self.slots.get_mut(&slot) else { continue };
            let held = claims.first_key_value().is_some_and(|(first, _)| *first == claimant);
            claims.remove(&claimant);
            let next = claims.first_key_value().map(|(c, n)| (c.clone(), *n));
            if claims.is_empty() {
                self.slots.remove(&slot);
            }
            let (true, Some((next, attempt))) = (held, next) else { continue };
            let Claimant::Host(_, host) = &next else { continue };
            let now = self.hosts.get(host).copied().flatten();
            if now.is_some_and(|now| now <= attempt) {
                continue;
            }
            // It claims nothing beyond the slot that it gets.
            for later in attempt + 1..now.map_or(TRIES, |n| n + 1) {
                work.push((slot_of(&host.hostname, later), next.clone()));
            }
            self.hosts.insert(host.clone(), Some(attempt));
            moved.insert(host.clone());
        }
    }
}

impl Claimant {
    fn of(host: &ServiceKey) -> Self {
        Self::Host(host.hostname.to_string(), host.clone())
    }
}

/// The slot, from 1, that a host wants at a try. Other versions of the mesh must come to the same: never change it.
fn slot_of(hostname: &str, attempt: u32) -> u32 {
    // FNV-1a, 64 bits, and the finalizer of SplitMix64, since the low bits of FNV alone are poor.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in hostname.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    let slots = u64::from(SLOTS);
    let (start, step) = (hash % slots, 1 + (hash >> 32) % (slots - 1));
    u32::try_from((start + step * u64::from(attempt)) % slots).unwrap_or(0) + 1
}

/// The slot of an address of the pool.
fn slot_at(address: IpAddr) -> Option<u32> {
    let slot = match address {
        IpAddr::V4(ip) => match ip.octets() {
            [240, 240, high, low] => u32::from(u16::from_be_bytes([high, low])),
            _ => return None,
        },
        IpAddr::V6(ip) => match ip.segments() {
            [0x2001, 2, 0, 0, 0, 0, 0, last] => u32::from(last),
            _ => return None,
        },
    };
    (1..=SLOTS).contains(&slot).then_some(slot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;

    fn host(number: usize) -> ServiceKey {
        ServiceKey {
            namespace: format!("ns{}", number % 3).into(),
            hostname: format!("h{}.example.com", number / 2).into(),
        }
    }

    fn given(number: usize) -> IpAddr {
        let slot = slot_of(&format!("h{number}.example.com"), u32::try_from(number % 3).unwrap());
        let [_, _, high, low] = slot.to_be_bytes();
        Ipv4Addr::new(240, 240, high, low).into()
    }

    /// What the module says of the outcome, done plainly: the hosts in order take their first free slot.
    fn expected(hosts: &BTreeSet<usize>, reserved: &BTreeSet<usize>) -> BTreeMap<ServiceKey, Option<u32>> {
        let mut taken: BTreeSet<u32> = reserved.iter().filter_map(|n| slot_at(given(*n))).collect();
        let keys: BTreeSet<Claimant> = hosts.iter().map(|n| Claimant::of(&host(*n))).collect();
        let mut outcome = BTreeMap::new();
        for claimant in keys {
            let Claimant::Host(name, key) = claimant else { continue };
            let slot = (0..TRIES).map(|attempt| slot_of(&name, attempt)).find(|slot| taken.insert(*slot));
            outcome.insert(key, slot);
        }
        outcome
    }

    fn check(vips: &Vips, hosts: &BTreeSet<usize>, reserved: &BTreeSet<usize>) {
        for (key, slot) in expected(hosts, reserved) {
            let got = vips.addresses(&key).and_then(|[v4, v6]| {
                assert_eq!(slot_at(v4), slot_at(v6));
                slot_at(v4)
            });
            assert_eq!(got, slot, "{key}");
        }
        for number in (0..40).filter(|n| !hosts.contains(n)) {
            assert!(
                hosts.iter().any(|h| host(*h) == host(number)) || vips.addresses(&host(number)).is_none()
            );
        }
    }

    /// Hosts of one name in several namespaces want the same slots, and given addresses are chosen among these, so
    /// that collisions are the rule.
    fn steps() -> impl Strategy<Value = Vec<(u8, Index)>> {
        proptest::collection::vec((0u8..4, any::<Index>()), 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_outcome_depends_on_what_there_is_and_not_on_how_it_came(steps in steps()) {
            let mut vips = Vips::default();
            let (mut hosts, mut reserved) = (BTreeSet::new(), BTreeSet::new());
            for (step, index) in steps {
                let number = index.index(40);
                let before: BTreeMap<_, _> =
                    hosts.iter().map(|n| (host(*n), vips.addresses(&host(*n)))).collect();
                let moved = match step {
                    0 if hosts.insert(number) => vips.insert(&host(number)),
                    1 if hosts.remove(&number) => vips.remove(&host(number)),
                    2 if reserved.insert(number) => vips.reserve(given(number)),
                    3 if reserved.remove(&number) => vips.release(given(number)),
                    _ => continue,
                };
                check(&vips, &hosts, &reserved);
                for (key, address) in before.iter().filter(|(key, _)| hosts.iter().any(|n| host(*n) == **key)) {
                    prop_assert!(vips.addresses(key) == *address || moved.contains(key), "{} moved", key);
                }
            }
        }
    }

    #[test]
    fn thousands_of_hosts_have_addresses_of_their_own_and_few_move() {
        let key =
            |n: usize| ServiceKey { namespace: "a".into(), hostname: format!("s{n}.example.com").into() };
        let mut vips = Vips::default();
        let moved: usize = (0..10_000).map(|n| vips.insert(&key(n)).len() - 1).sum();
        let addresses: BTreeSet<_> = (0..10_000).filter_map(|n| vips.addresses(&key(n))).collect();
        assert_eq!(addresses.len(), 10_000);
        assert!(moved < 1000, "{moved} hosts moved while 10,000 came");
    }

    /// Nodes of different versions must agree: these never change.
    #[test]
    fn addresses_are_what_they_were() {
        let mut vips = Vips::default();
        let key = ServiceKey { namespace: "a".into(), hostname: "api.example.com".into() };
        vips.insert(&key);
        let [v4, v6] = vips.addresses(&key).unwrap();
        assert_eq!((v4.to_string().as_str(), v6.to_string().as_str()), ("240.240.186.4", "2001:2::ba04"));
    }
}
