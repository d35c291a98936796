//! The indexes by which a change finds what it touches.

use std::hash::BuildHasher;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashMap, HashSet, HashTable};
use model::{Locality, NetworkAddress, ServiceKey, Str};

use super::ids::{Id, Ids};
use crate::kinds::service::Distribution;
use crate::labels::{Labels, Selector};
use crate::policy::Binding;

/// A set of instances; most sets have one.
#[derive(Debug, Clone)]
pub(super) enum Members {
    One(Id),
    Many(Box<Ids>),
}

impl Members {
    fn insert(&mut self, id: Id) {
        match self {
            Self::One(one) if *one == id => {}
            Self::One(one) => *self = Self::Many(Box::new(Ids::of([*one, id]))),
            Self::Many(many) => many.insert(id),
        }
    }

    /// Whether the set is empty afterwards.
    fn remove(&mut self, id: Id) -> bool {
        match self {
            Self::One(one) => *one == id,
            Self::Many(many) => {
                many.remove(id);
                many.is_empty()
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Many(many) => many.len(),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Id> {
        let (one, many) = match self {
            Self::One(one) => (Some(*one), None),
            Self::Many(many) => (None, Some(many.iter())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

/// A namespace: what it says, and what is in it.
#[derive(Debug, Default)]
pub(super) struct Area {
    /// Whether its pods are in the mesh, where they don't say it themselves.
    pub(super) ambient: bool,
    /// Which endpoints its services prefer, where they don't say it themselves.
    pub(super) distribution: Option<Distribution>,
    /// Which waypoint its traffic is meant to pass, where its objects don't say it themselves.
    pub(super) waypoint: Binding,
    /// Its labels.
    pub(super) labels: Labels,
    pub(super) instances: Ids,
    pub(super) services: HashSet<ServiceKey>,
    by_label: HashMap<(Str, Str), Members>,
    /// Each service's selector stands under one of its labels.
    selectors: HashMap<(Str, Str), Vec<(Selector, ServiceKey)>>,
}

impl Area {
    pub(super) fn insert_instance(&mut self, id: Id, labels: &Labels) {
        self.instances.insert(id);
        for pair in labels.iter() {
            if let Some(members) = self.by_label.get_mut(pair) {
                members.insert(id);
            } else {
                self.by_label.insert(pair.clone(), Members::One(id));
            }
        }
    }

    pub(super) fn remove_instance(&mut self, id: Id, labels: &Labels) {
        self.instances.remove(id);
        for pair in labels.iter() {
            if self.by_label.get_mut(pair).is_some_and(|members| members.remove(id)) {
                self.by_label.remove(pair);
            }
        }
    }

    /// The instances with a label.
    pub(super) fn labelled(&self, key: &Str, value: &Str) -> impl Iterator<Item = Id> {
        self.by_label.get(&(key.clone(), value.clone())).into_iter().flat_map(Members::iter)
    }

    /// Instances that may have the labels of `selector`: those that have its rarest one.
    pub(super) fn candidates(&self, selector: &Selector) -> Option<&Members> {
        let mut rarest: Option<&Members> = None;
        for pair in selector.iter() {
            let members = self.by_label.get(pair)?;
            if rarest.is_none_or(|r| members.len() < r.len()) {
                rarest = Some(members);
            }
        }
        rarest
    }

    pub(super) fn insert_selector(&mut self, selector: &Selector, service: &ServiceKey) {
        let taken = |pair: &(Str, Str)| self.selectors.get(pair).map_or(0, Vec::len);
        let Some(pair) = selector.iter().min_by_key(|pair| taken(pair)).cloned() else { return };
        self.selectors.entry(pair).or_default().push((selector.clone(), service.clone()));
    }

    pub(super) fn remove_selector(&mut self, selector: &Selector, service: &ServiceKey) {
        for pair in selector.iter() {
            let Some(list) = self.selectors.get_mut(pair) else { continue };
            list.retain(|(_, key)| key != service);
            if list.is_empty() {
                self.selectors.remove(pair);
            }
        }
    }

    /// The services that may select `labels`, with their selectors.
    pub(super) fn selecting(&self, labels: &Labels) -> impl Iterator<Item = &(Selector, ServiceKey)> {
        labels.iter().filter_map(|pair| self.selectors.get(pair)).flatten()
    }

    pub(super) fn is_unused(&self) -> bool {
        !self.ambient
            && self.distribution.is_none()
            && self.waypoint == Binding::Inherited
            && self.labels == Labels::default()
            && self.instances.is_empty()
            && self.services.is_empty()
            && self.selectors.is_empty()
    }
}

/// A node: where it is, and what runs on it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) here: Arc<Locality>,
    /// Whether the node itself is known, and not only named.
    pub(super) is_known: bool,
    pub(super) instances: Ids,
}

impl Place {
    /// A node of which only its name is known.
    pub(super) fn new(node: &Str) -> Self {
        let here = Locality { node: node.clone(), ..Locality::default() };
        Self { here: Arc::new(here), is_known: false, instances: Ids::default() }
    }
}

/// Instances by their uids, which are read where they are: the table holds numbers alone.
#[derive(Debug, Default)]
pub(super) struct Uids {
    ids: HashTable<Id>,
    hasher: DefaultHashBuilder,
}

impl Uids {
    /// The instance of `uid`.
    pub(super) fn get<'u>(&self, uid: &str, uid_of: impl Fn(Id) -> Option<&'u str>) -> Option<Id> {
        self.ids.find(self.hasher.hash_one(uid), |id| uid_of(*id) == Some(uid)).copied()
    }

    /// Adds an instance, of whose uid there is none.
    pub(super) fn insert<'u>(&mut self, uid: &str, id: Id, uid_of: impl Fn(Id) -> Option<&'u str>) {
        let hasher = &self.hasher;
        let again = |id: &Id| uid_of(*id).map_or(0, |uid| hasher.hash_one(uid));
        self.ids.insert_unique(hasher.hash_one(uid), id, again);
    }

    /// Takes the instance of `uid` out.
    pub(super) fn remove(&mut self, uid: &str, id: Id) {
        if let Ok(found) = self.ids.find_entry(self.hasher.hash_one(uid), |other| *other == id) {
            found.remove();
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Id> {
        self.ids.iter().copied()
    }
}

/// Who has which address, the one in force first. Nearly always that is one, so that costs no more than a number.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    single: HashMap<Str, Singles>,
    shared: HashMap<NetworkAddress, Box<[Id]>>,
}

/// The addresses of a network that one instance has. In a table for both families each of IPv4 would take the room of
/// one of IPv6.
#[derive(Debug, Default)]
struct Singles {
    v4: HashMap<Ipv4Addr, Id>,
    v6: HashMap<Ipv6Addr, Id>,
}

impl Singles {
    fn get(&self, ip: &IpAddr) -> Option<&Id> {
        match ip {
            IpAddr::V4(ip) => self.v4.get(ip),
            IpAddr::V6(ip) => self.v6.get(ip),
        }
    }

    fn insert(&mut self, ip: IpAddr, id: Id) {
        match ip {
            IpAddr::V4(ip) => self.v4.insert(ip, id),
            IpAddr::V6(ip) => self.v6.insert(ip, id),
        };
    }

    fn remove(&mut self, ip: &IpAddr) {
        match ip {
            IpAddr::V4(ip) => self.v4.remove(ip),
            IpAddr::V6(ip) => self.v6.remove(ip),
        };
    }

    fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

impl Addresses {
    /// Who has an address.
    pub(super) fn holders(&self, address: &NetworkAddress) -> &[Id] {
        let single = self.single.get(&address.network).and_then(|n| n.get(&address.ip));
        match single {
            Some(id) => std::slice::from_ref(id),
            None => self.shared.get(address).map_or(&[], |list| list),
        }
    }

    /// Gives an address to `id` too, behind all for which `before` holds.
    pub(super) fn insert(&mut self, address: &NetworkAddress, id: Id, before: impl Fn(Id) -> bool) {
        let mut list = self.holders(address).to_vec();
        if !list.contains(&id) {
            let at = list.iter().position(|other| !before(*other)).unwrap_or(list.len());
            list.insert(at, id);
            self.set(address, &list);
        }
    }

    /// Takes an address from `id`.
    pub(super) fn remove(&mut self, address: &NetworkAddress, id: Id) {
        let list: Vec<Id> = self.holders(address).iter().copied().filter(|other| *other != id).collect();
        self.set(address, &list);
    }

    fn set(&mut self, address: &NetworkAddress, list: &[Id]) {
        if let [one] = list {
            self.single.entry(address.network.clone()).or_default().insert(address.ip, *one);
        } else if let Some(network) = self.single.get_mut(&address.network) {
            network.remove(&address.ip);
            if network.is_empty() {
                self.single.remove(&address.network);
            }
        }
        if list.len() > 1 {
            self.shared.insert(address.clone(), list.into());
        } else {
            self.shared.remove(address);
        }
    }
}
