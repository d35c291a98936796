//! The indexes by which a change finds what it touches.

use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use model::{Locality, ServiceKey, Str};

use crate::kinds::service::Distribution;
use crate::labels::{Labels, Selector};
use crate::policy::Binding;

/// An instance's number in the compiler's table.
pub(super) type Id = u32;

/// A set of instances; most sets have one.
#[derive(Debug, Clone)]
pub(super) enum Members {
    One(Id),
    Many(Box<HashSet<Id>>),
}

impl Members {
    fn insert(&mut self, id: Id) {
        match self {
            Self::One(one) if *one == id => {}
            Self::One(one) => *self = Self::Many(Box::new(HashSet::from_iter([*one, id]))),
            Self::Many(many) => {
                many.insert(id);
            }
        }
    }

    /// Whether the set is empty afterwards.
    fn remove(&mut self, id: Id) -> bool {
        match self {
            Self::One(one) => *one == id,
            Self::Many(many) => {
                many.remove(&id);
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
            Self::Many(many) => (None, Some(many.iter().copied())),
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
    pub(super) instances: HashSet<Id>,
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
        self.instances.remove(&id);
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
            && self.instances.is_empty()
            && self.services.is_empty()
            && self.selectors.is_empty()
    }
}

/// A node: where it is, and what runs on it.
#[derive(Debug, Default)]
pub(super) struct Place {
    pub(super) locality: Option<Arc<Locality>>,
    pub(super) instances: HashSet<Id>,
}

/// Who has an address, the one in force first.
#[derive(Debug)]
pub(super) enum Holders {
    One(Id),
    Many(Box<[Id]>),
}

impl Holders {
    pub(super) fn as_slice(&self) -> &[Id] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    /// Adds `id` behind all for which `before` holds.
    pub(super) fn insert(&mut self, id: Id, before: impl Fn(Id) -> bool) {
        let mut list = self.as_slice().to_vec();
        if list.contains(&id) {
            return;
        }
        let at = list.iter().position(|other| !before(*other)).unwrap_or(list.len());
        list.insert(at, id);
        *self = Self::Many(list.into());
    }

    /// Whether nobody has the address afterwards.
    pub(super) fn remove(&mut self, id: Id) -> bool {
        let list: Vec<Id> = self.as_slice().iter().copied().filter(|other| *other != id).collect();
        match list.as_slice() {
            [] => return true,
            [one] => *self = Self::One(*one),
            _ => *self = Self::Many(list.into()),
        }
        false
    }
}
