//! The services by their host names, and by what these end with.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use model::ServiceKey;

use crate::routes::Concerned;

/// Host names from their last letter to the first, so that those with one end stand together.
#[derive(Debug, Default)]
pub(super) struct Hosts(BTreeMap<Box<str>, BTreeSet<ServiceKey>>);

fn reversed(host: &str) -> Box<str> {
    host.chars().rev().collect::<String>().into()
}

impl Hosts {
    pub(super) fn insert(&mut self, key: &ServiceKey) {
        self.0.entry(reversed(&key.hostname)).or_default().insert(key.clone());
    }

    pub(super) fn remove(&mut self, key: &ServiceKey) {
        let host = reversed(&key.hostname);
        if let Some(set) = self.0.get_mut(&host) {
            set.remove(key);
            if set.is_empty() {
                self.0.remove(&host);
            }
        }
    }

    /// The services of a host name, by namespace.
    pub(super) fn named(&self, host: &str) -> impl Iterator<Item = &ServiceKey> {
        self.0.get(&reversed(host)).into_iter().flatten()
    }

    /// The services that a change concerns.
    pub(super) fn concerned(&self, by: &Concerned) -> Vec<ServiceKey> {
        if !by.0.is_empty() && !by.0.starts_with('.') {
            return self.named(&by.0).cloned().collect();
        }
        let end = reversed(&by.0);
        let from = self.0.range::<str, _>((Bound::Included(&*end), Bound::Unbounded));
        from.take_while(|(host, _)| host.starts_with(&*end)).flat_map(|(_, keys)| keys).cloned().collect()
    }
}
