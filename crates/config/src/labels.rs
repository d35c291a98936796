//! Labels, what selects by them, and the strings and label sets that objects share.

use std::collections::HashSet;
use std::sync::Arc;

use model::{Interner, Locality, PortMapping, Profile, Profiles, ServiceMembership, Str};

/// An object's labels, sorted by key. Equal sets of one source are one allocation: the pods of a Deployment
/// have one set between them.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Labels(Arc<[(Str, Str)]>);

impl Default for Labels {
    fn default() -> Self {
        Self(Arc::new([]))
    }
}

impl Labels {
    /// The value of a label.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Str> {
        let index = self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        self.0.get(index).map(|(_, value)| value)
    }

    /// All labels, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = &(Str, Str)> {
        self.0.iter()
    }

    /// The same, as the model has them.
    #[must_use]
    pub fn shared(&self) -> Arc<[(Str, Str)]> {
        self.0.clone()
    }
}

/// What selects objects by labels that they must have, all of them (`matchLabels`). Never empty: an empty
/// selector means something else in each kind that has one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Selector(Box<[(Str, Str)]>);

impl Selector {
    /// The selector of these labels; `None` when there are none.
    #[must_use]
    pub fn new(mut wanted: Vec<(Str, Str)>) -> Option<Self> {
        wanted.sort();
        wanted.dedup();
        (!wanted.is_empty()).then(|| Self(wanted.into()))
    }

    /// Whether `labels` has all that is wanted.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(key, value)| labels.get(key) == Some(value))
    }

    /// The labels that are wanted, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = &(Str, Str)> {
        self.0.iter()
    }
}

/// Makes equal strings, label sets, port mappings, memberships and profiles of a source share their allocations.
///
/// Everything it holds is held weakly in effect: [`Pool::sweep`], after each batch of changes, drops what
/// nothing else uses.
#[derive(Debug, Default)]
pub struct Pool {
    strings: Interner,
    labels: HashSet<Labels>,
    mappings: HashSet<Arc<[PortMapping]>>,
    memberships: HashSet<Arc<[ServiceMembership]>>,
    names: HashSet<Arc<[(Str, u16)]>>,
    profiles: Profiles,
    localities: HashSet<Arc<Locality>>,
    swept_at: usize,
}

impl Pool {
    /// The shared form of a string. For strings that many objects have; a pod's own name is not one.
    pub fn string(&mut self, text: &str) -> Str {
        self.strings.intern(text)
    }

    /// The shared form of a label set.
    pub fn labels(&mut self, mut pairs: Vec<(&str, &str)>) -> Labels {
        pairs.sort_unstable();
        let labels: Arc<[(Str, Str)]> =
            pairs.into_iter().map(|(k, v)| (self.strings.intern(k), self.strings.intern(v))).collect();
        let labels = Labels(labels);
        if let Some(known) = self.labels.get(&labels) {
            return known.clone();
        }
        self.labels.insert(labels.clone());
        labels
    }

    /// The shared form of port mappings.
    pub fn mappings(&mut self, mappings: &[PortMapping]) -> Arc<[PortMapping]> {
        if let Some(known) = self.mappings.get(mappings) {
            return known.clone();
        }
        let shared: Arc<[PortMapping]> = mappings.into();
        self.mappings.insert(shared.clone());
        shared
    }

    /// The shared form of what services a workload is of.
    pub fn memberships(&mut self, memberships: &[ServiceMembership]) -> Arc<[ServiceMembership]> {
        if let Some(known) = self.memberships.get(memberships) {
            return known.clone();
        }
        let shared: Arc<[ServiceMembership]> = memberships.into();
        self.memberships.insert(shared.clone());
        shared
    }

    /// Puts the shared form of what a workload has in common with others in its place.
    pub fn share(&mut self, profile: &mut Arc<Profile>) {
        self.profiles.share(profile);
    }

    /// The shared form of where workloads run.
    pub fn locality(&mut self, locality: Locality) -> Arc<Locality> {
        if let Some(known) = self.localities.get(&locality) {
            return known.clone();
        }
        let shared = Arc::new(locality);
        self.localities.insert(shared.clone());
        shared
    }

    /// The shared form of named ports.
    pub fn named_ports(&mut self, ports: &[(&str, u16)]) -> Arc<[(Str, u16)]> {
        let ports: Arc<[(Str, u16)]> = ports.iter().map(|(n, p)| (self.strings.intern(n), *p)).collect();
        if let Some(known) = self.names.get(&ports) {
            return known.clone();
        }
        self.names.insert(ports.clone());
        ports
    }

    /// Drops what nothing else uses. Costs what the pool holds, so it does its work only when the pool has
    /// doubled since the last time.
    pub fn sweep(&mut self) {
        if self.len() < self.swept_at.saturating_mul(2).max(1024) {
            return;
        }
        self.profiles.sweep(); // first, since it holds the others
        self.memberships.retain(|m| Arc::strong_count(m) > 1);
        self.localities.retain(|l| Arc::strong_count(l) > 1);
        self.labels.retain(|l| Arc::strong_count(&l.0) > 1);
        self.mappings.retain(|m| Arc::strong_count(m) > 1);
        self.names.retain(|n| Arc::strong_count(n) > 1);
        self.strings.sweep();
        self.swept_at = self.len();
    }

    /// How many distinct things it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.strings.len()
            + self.labels.len()
            + self.mappings.len()
            + self.memberships.len()
            + self.names.len()
            + self.profiles.len()
            + self.localities.len()
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_wants_all_its_labels() {
        let mut pool = Pool::default();
        let labels = pool.labels(vec![("b", "2"), ("a", "1")]);
        let selector = |pairs: &[(&str, &str)]| {
            Selector::new(pairs.iter().map(|(k, v)| (Str::from(*k), Str::from(*v))).collect())
        };
        assert!(selector(&[("a", "1"), ("b", "2")]).unwrap().matches(&labels));
        assert!(!selector(&[("a", "1"), ("b", "3")]).unwrap().matches(&labels));
        assert!(!selector(&[("c", "")]).unwrap().matches(&labels));
        assert!(selector(&[]).is_none());
    }

    #[test]
    fn equal_sets_are_shared_and_swept_when_unused() {
        let mut pool = Pool::default();
        let a = pool.labels(vec![("a", "1"), ("b", "2")]);
        let b = pool.labels(vec![("b", "2"), ("a", "1")]);
        assert!(Arc::ptr_eq(&a.0, &b.0));
        drop((a, b));
        for i in 0..2000 {
            pool.string(&i.to_string());
        }
        pool.sweep();
        assert!(pool.is_empty(), "{}", pool.len());
    }
}
