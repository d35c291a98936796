//! Which workloads each waypoint is sent, so that a pod that does not concern a waypoint costs it nothing.
//!
//! A waypoint has all services, since which of them has an address is decided among all, and there are few. Of the
//! workloads it is sent those that its decisions can ask for:
//!
//! * the endpoints of services that are bound to it, that its routes and mirrors lead to, and of the hosts of providers;
//! * those that are themselves bound to it, and its own pods, by which it knows where it is;
//! * those that have a label that its routes ask of clients;
//! * those that lie in a range of addresses of a service of its own: an address of a workload is the workload's, and
//!   must not be served as one of the range;
//! * those that share an address with one of these: whose it is, is decided among all who have it.
//!
//! Nothing else is looked up there. Who a client is says its certificate; by what name it is counted, its node.
//!
//! A changed workload costs what it is a member of. A service that becomes one of a waypoint's, or no longer is, costs its
//! endpoints; new labels or ranges cost a look at all workloads, and what comes of it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use model::{GatewayTarget, NetworkMode, Service, ServiceKey, Str, Vip, Workload};
use proto::{Features, REACHABLE_TYPE_URL};
use xds::server::{Change as Update, Resource};

/// The label of a Gateway's pods.
const GATEWAY: &str = "gateway.networking.k8s.io/gateway-name";

/// The name of a waypoint: `NAMESPACE/NAME`.
type Name = Arc<str>;

/// A workload, and who has it.
struct Known {
    workload: Arc<Workload>,
    sent: BTreeSet<Name>,
    /// It is another one than was sent.
    changed: bool,
}

/// What waypoints ask for beside the endpoints of services.
#[derive(Clone, PartialEq, Default)]
pub(super) struct Wishes {
    /// The labels that the routes of each ask of clients. Every waypoint has an entry.
    pub(super) labels: BTreeMap<Name, BTreeSet<Str>>,
    /// The hosts of providers, whose endpoints all have.
    pub(super) providers: BTreeSet<Str>,
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Reach {
    workloads: HashMap<Str, Known>,
    by_service: HashMap<ServiceKey, HashSet<Str>>,
    by_address: BTreeSet<(IpAddr, Str)>,
    /// Which waypoints want the endpoints of a service.
    wanting: HashMap<ServiceKey, BTreeSet<Name>>,
    /// Services that have ranges of addresses.
    ranged: HashMap<ServiceKey, Box<[Vip]>>,
    wishes: Wishes,
    due: BTreeSet<Str>,
    /// All are to be looked at.
    all: bool,
    looks: u64,
}

impl Reach {
    /// How many workloads were looked at so far.
    pub(super) fn looks(&self) -> u64 {
        self.looks
    }

    /// A workload is this now.
    pub(super) fn set(&mut self, workload: &Arc<Workload>) {
        let uid = &workload.uid;
        let sent = self.forget(uid, Some(workload));
        for membership in &*workload.services {
            self.by_service.entry(membership.service.clone()).or_default().insert(uid.clone());
        }
        for address in own_addresses(workload) {
            self.by_address.insert((*address, uid.clone()));
        }
        self.note(workload);
        self.workloads.insert(uid.clone(), Known { workload: workload.clone(), sent, changed: true });
    }

    /// A workload is gone; who had it is told so.
    pub(super) fn remove(&mut self, uid: &Str, updates: &mut Vec<Update>) {
        let sent = self.forget(uid, None);
        updates.extend(sent.iter().map(|waypoint| removal(waypoint, uid)));
    }

    /// A service is this now, or gone.
    pub(super) fn service(&mut self, key: &ServiceKey, service: Option<&Service>) {
        let vips = service.into_iter().flat_map(|service| &service.vips);
        let ranges: Box<[Vip]> =
            vips.filter(|vip| vip.range.prefix_len() != vip.range.max_prefix_len()).cloned().collect();
        let had = match ranges.is_empty() {
            true => self.ranged.remove(key),
            false => self.ranged.insert(key.clone(), ranges),
        };
        self.all |= self.ranged.get(key) != had.as_ref() && self.wanting.contains_key(key);
    }

    /// A waypoint wants the endpoints of a service, or no longer.
    pub(super) fn want(&mut self, waypoint: &Name, key: &ServiceKey, wants: bool) {
        let of = self.wanting.entry(key.clone()).or_default();
        let changed = if wants { of.insert(waypoint.clone()) } else { of.remove(waypoint) };
        if of.is_empty() {
            self.wanting.remove(key);
        }
        if changed {
            let members = self.by_service.get(key).into_iter().flatten();
            let members: Vec<Arc<Workload>> =
                members.filter_map(|uid| Some(self.workloads.get(uid)?.workload.clone())).collect();
            members.iter().for_each(|member| self.note(member));
            self.all |= self.ranged.contains_key(key);
        }
    }

    /// What waypoints ask for now.
    pub(super) fn wish(&mut self, wishes: Wishes) {
        self.all |= wishes != self.wishes;
        self.wishes = wishes;
    }

    /// Labels are sent now that were not, or the other way round.
    pub(super) fn relabel(&mut self, labels: &BTreeSet<Str>) {
        for (uid, known) in &mut self.workloads {
            if labels.iter().any(|label| known.workload.label(label).is_some()) {
                known.changed = true;
                self.due.insert(uid.clone());
            }
        }
    }

    /// What follows for the waypoints. `encoded` is what is sent of a workload, `None` of one that can't be.
    pub(super) fn settle(
        &mut self,
        encoded: impl Fn(&Workload) -> Option<Bytes>,
        updates: &mut Vec<Update>,
    ) -> usize {
        let before = updates.len();
        let mut due = std::mem::take(&mut self.due);
        if std::mem::take(&mut self.all) {
            due.extend(self.workloads.keys().cloned());
        }
        for uid in due {
            self.looks += 1;
            let Some(known) = self.workloads.get(&uid) else { continue };
            let mut wanted = self.wanted(&known.workload);
            if wanted.is_empty() && known.sent.is_empty() {
                continue;
            }
            let body = encoded(&known.workload);
            if body.is_none() {
                wanted.clear();
            }
            for (waypoint, body) in wanted.iter().zip(body.iter().cycle()) {
                if known.changed || !known.sent.contains(waypoint) {
                    updates.push(Update::Set(resource(waypoint, &uid, body)));
                }
            }
            updates.extend(known.sent.difference(&wanted).map(|waypoint| removal(waypoint, &uid)));
            if let Some(known) = self.workloads.get_mut(&uid) {
                (known.sent, known.changed) = (wanted, false);
            }
        }
        updates.len() - before
    }

    /// Has a workload looked at, and those that share an address with it.
    fn note(&mut self, workload: &Workload) {
        self.due.insert(workload.uid.clone());
        for address in own_addresses(workload) {
            let others: Vec<Str> = self.at(*address).filter(|uid| **uid != workload.uid).cloned().collect();
            self.due.extend(others);
        }
    }

    /// Takes a workload out of the indexes, where `next` does not stand in the same place; who had it.
    fn forget(&mut self, uid: &Str, next: Option<&Workload>) -> BTreeSet<Name> {
        let Some(old) = self.workloads.remove(uid) else { return BTreeSet::new() };
        self.note(&old.workload);
        for membership in &*old.workload.services {
            let stays = |next: &Workload| next.services.iter().any(|m| m.service == membership.service);
            if !next.is_some_and(stays)
                && let Some(members) = self.by_service.get_mut(&membership.service)
            {
                members.remove(uid);
                if members.is_empty() {
                    self.by_service.remove(&membership.service);
                }
            }
        }
        for address in own_addresses(&old.workload) {
            self.by_address.remove(&(*address, uid.clone()));
        }
        old.sent
    }

    fn at(&self, address: IpAddr) -> impl Iterator<Item = &Str> {
        let from = (address, Str::default());
        self.by_address.range(from..).take_while(move |(at, _)| *at == address).map(|(_, uid)| uid)
    }

    /// Who is to have a workload.
    fn wanted(&self, workload: &Workload) -> BTreeSet<Name> {
        let mut found = self.asked_for(workload);
        for uid in own_addresses(workload).iter().flat_map(|address| self.at(*address)) {
            if let Some(other) = self.workloads.get(uid).filter(|_| *uid != workload.uid) {
                found.extend(self.asked_for(&other.workload));
            }
        }
        found
    }

    fn asked_for(&self, workload: &Workload) -> BTreeSet<Name> {
        let mut found = BTreeSet::new();
        for membership in &*workload.services {
            found.extend(self.wanting.get(&membership.service).into_iter().flatten().cloned());
            if self.wishes.providers.contains(&membership.service.hostname) {
                found.extend(self.wishes.labels.keys().cloned());
            }
        }
        found.extend(workload.waypoint.as_ref().and_then(|waypoint| bound_to(&waypoint.target)));
        found.extend(workload.label(GATEWAY).map(|name| named(&workload.namespace, name)));
        let asks = self
            .wishes
            .labels
            .iter()
            .filter(|(_, labels)| labels.iter().any(|label| workload.label(label).is_some()));
        found.extend(asks.map(|(waypoint, _)| waypoint.clone()));
        for (key, ranges) in &self.ranged {
            let lies = |vip: &Vip| {
                vip.network == workload.network && workload.addresses.iter().any(|ip| vip.range.contains(ip))
            };
            if let Some(waypoints) = self.wanting.get(key).filter(|_| ranges.iter().any(lies)) {
                found.extend(waypoints.iter().cloned());
            }
        }
        found
    }
}

/// The addresses that say who has them. A node's, which its pods may share, are looked up nowhere.
fn own_addresses(workload: &Workload) -> &[IpAddr] {
    match workload.network_mode {
        NetworkMode::Standard => &workload.addresses,
        NetworkMode::HostNetwork => &[],
    }
}

fn named(namespace: &str, name: &str) -> Name {
    format!("{namespace}/{name}").into()
}

/// The waypoint that something is bound to: its Service has its name.
fn bound_to(target: &GatewayTarget) -> Option<Name> {
    match target {
        GatewayTarget::Service(key) => Some(named(&key.namespace, key.hostname.split('.').next()?)),
        // What is compiled names services.
        GatewayTarget::Address(_) => None,
    }
}

fn resource_name(waypoint: &str, uid: &str) -> Arc<str> {
    format!("{waypoint}/{uid}").into()
}

fn removal(waypoint: &str, uid: &str) -> Update {
    Update::Remove { type_url: REACHABLE_TYPE_URL, name: resource_name(waypoint, uid) }
}

fn resource(waypoint: &Name, uid: &str, body: &Bytes) -> Resource {
    Resource {
        type_url: REACHABLE_TYPE_URL,
        name: resource_name(waypoint, uid),
        aliases: Vec::new(),
        scope: Some(waypoint.clone()),
        plain: None,
        culvert: Some(body.clone()),
        needs: Features::NONE,
    }
}

#[cfg(test)]
#[path = "reach_tests.rs"]
mod tests;
