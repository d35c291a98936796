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
