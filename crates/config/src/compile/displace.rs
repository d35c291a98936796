//! Who has an address that several instances have.
//!
//! All instances stand in one order ([`Record::order`]): pods before WorkloadEntries before endpoints, those that came
//! first before others, and endpoints by uid, since they need not come in one order on every node. An instance is
//! in force unless one before it that is in force itself has one of its addresses. So nobody gives way to one that
//! gives way to another, and what is in force does not depend on the order in which changes are looked at.
//!
//! All give way to pods. Entries and their endpoints give way to others of their own namespace only: another one's
//! say nothing of what is at the address for them, neither its identity and tunnel nor its weight.

use std::collections::BTreeSet;

use model::{NetworkAddress, Str, Vip};

use super::ids::Id;
use super::{Compiler, Rank, Record};

/// See the module's documentation.
type Order = (Rank, u64, Option<Str>);

impl Record {
    /// Whether one that has an address of both in its place is what is there for both.
    pub(super) fn takes_from(&self, other: &Self) -> bool {
        let namespaces = (self.workload().map(|w| &w.namespace), other.workload().map(|w| &w.namespace));
        self.rank == Rank::Pod || namespaces.0 == namespaces.1
    }

    fn order(&self) -> Order {
        match self.rank {
            Rank::Pod | Rank::Entry => (self.rank, self.arrival(), None),
            Rank::Endpoint => (self.rank, 0, self.workload().map(|w| w.uid.clone())),
        }
    }
}

impl Compiler {
    /// Whether an instance that gets other addresses takes its place anew: one of them is somebody's already, who
    /// was there first.
    pub(super) fn comes_anew(&self, old: &[NetworkAddress], new: &[NetworkAddress]) -> bool {
        new.iter().any(|address| !old.contains(address) && !self.by_address.holders(address).is_empty())
    }

    pub(super) fn join_address(&mut self, id: Id, address: &NetworkAddress) {
        let Some(own) = self.record(id).map(Record::order) else { return };
        let mut by_address = std::mem::take(&mut self.by_address);
        by_address.insert(address, id, |other| self.record(other).is_some_and(|record| record.order() < own));
        self.by_address = by_address;
        // Also where it was there before: what it is an endpoint of may have changed for the one in force.
        self.mark_holders(address);
        self.mark_service_at(address);
    }

    pub(super) fn leave_address(&mut self, id: Id, address: &NetworkAddress) {
        self.by_address.remove(address, id);
        self.mark_holders(address);
        self.mark_service_at(address);
    }

    /// Has the services looked at again that have an address as a virtual one: they can't have it while a pod has it.
    fn mark_service_at(&mut self, address: &NetworkAddress) {
        let vip = Vip { network: address.network.clone(), range: address.ip.into() };
        if let Some(services) = self.by_vip.get(&vip) {
            self.dirty_services.extend(services.iter().cloned());
        }
    }

    /// Marks who has an address.
    pub(super) fn mark_holders(&mut self, address: &NetworkAddress) {
        for id in self.by_address.holders(address).to_vec() {
            self.mark(id);
        }
    }

    /// Who has one of an instance's addresses in its place, and which address that is.
    pub(super) fn displacer(&self, id: Id) -> Option<(Id, NetworkAddress)> {
        let record = self.record(id)?;
        record.addresses().into_iter().find_map(|address| {
            let before = self.by_address.holders(&address).iter().take_while(|other| **other != id);
            let in_force = |other: &&Id| {
                self.record(**other).is_some_and(|other| !other.displaced() && other.takes_from(record))
            };
            let first = *before.into_iter().find(in_force)?;
            Some((first, address))
        })
    }

    /// Decides anew who is in force, for all that is marked and all that this concerns; marks these too.
    ///
    /// What is looked at is taken in order. So all that can displace an instance is settled when its turn comes, and
    /// each is looked at once.
    pub(super) fn settle_addresses(&mut self) {
        let open = |id: &Id| {
            let record = self.record(*id)?;
            let shared = |address: &NetworkAddress| self.by_address.holders(address).len() > 1;
            (record.displaced() || record.addresses().iter().any(shared)).then(|| (record.order(), *id))
        };
        let mut queue: BTreeSet<(Order, Id)> = self.dirty.iter().filter_map(open).collect();
        while let Some((order, id)) = queue.pop_first() {
            self.steps += 1;
            let displaced = self.displacer(id).is_some();
            let Some(record) = self.record_mut(id) else { continue };
            if record.set_displaced(displaced) == displaced {
                continue;
            }
            let addresses = record.addresses();
            for other in
                addresses.iter().flat_map(|a| self.by_address.holders(a).to_vec()).collect::<Vec<_>>()
            {
                self.mark(other);
                let place = self.record(other).map(Record::order).filter(|place| *place > order);
                queue.extend(place.map(|place| (place, other)));
            }
        }
    }
}
