//! Which services resources are for that only waypoints enforce: those of a namespace or of the mesh, those with
//! workloads that a selector selects, and those that `targetRefs` name.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use model::{PolicyKey, Str};

use super::authorization::PolicyScope;
use super::selector::{Target, TargetKind};
use super::state::BySelector;
use super::waypoint::Waypoint;
use crate::compile::Affected;
use crate::labels::Labels;
use crate::resource::ObjectKey;

/// The resources of one kind, by what they are for.
#[derive(Debug, Default)]
pub(super) struct Attachments {
    /// For all services of their namespace; of the mesh, if it is the root namespace.
    whole: BTreeSet<PolicyKey>,
    by_selector: BySelector,
    by_target: HashMap<(Str, Target), BTreeSet<PolicyKey>>,
    for_waypoints: BTreeMap<PolicyKey, Box<[Target]>>,
}

impl Attachments {
    /// Adds a resource. `is_root` says that its namespace is the root namespace.
    pub(super) fn insert(&mut self, key: &PolicyKey, scope: &PolicyScope, is_root: bool) {
        match scope {
            PolicyScope::Namespace => {
                self.whole.insert(key.clone());
            }
            PolicyScope::Selector(selector) => {
                self.by_selector.insert((!is_root).then_some(&key.namespace), selector, key);
            }
            PolicyScope::Targets(targets) => {
                for target in targets.iter().filter(|target| !target.is_gateway()) {
                    let slot = (key.namespace.clone(), target.clone());
                    self.by_target.entry(slot).or_default().insert(key.clone());
                }
                // One for a class is for the whole mesh, and holds in the root namespace only.
                let counts = |t: &&Target| t.kind == TargetKind::Gateway || (is_root && t.is_gateway());
                let gateways: Box<[Target]> = targets.iter().filter(counts).cloned().collect();
                if !gateways.is_empty() {
                    self.for_waypoints.insert(key.clone(), gateways);
                }
            }
        }
    }

    /// Removes a resource that was added so.
    pub(super) fn remove(&mut self, key: &PolicyKey, scope: &PolicyScope, is_root: bool) {
        match scope {
            PolicyScope::Namespace => {
                self.whole.remove(key);
            }
            PolicyScope::Selector(selector) => {
                self.by_selector.remove((!is_root).then_some(&key.namespace), selector, key);
            }
            PolicyScope::Targets(targets) => {
                self.for_waypoints.remove(key);
                for target in targets {
                    let slot = (key.namespace.clone(), target.clone());
                    if let Some(keys) = self.by_target.get_mut(&slot) {
                        keys.remove(key);
                        if keys.is_empty() {
                            self.by_target.remove(&slot);
                        }
                    }
                }
            }
        }
    }

    /// What is for `object` and passes `waypoint`, without what is for workloads behind it.
    pub(super) fn through(&self, object: &ObjectKey, waypoint: &Waypoint, root: &str) -> BTreeSet<PolicyKey> {
        let holds = |key: &&PolicyKey| key.namespace == object.namespace || *key.namespace == *root;
        let named = self.naming(object);
        let all = self.for_waypoint(waypoint);
        self.whole.iter().filter(holds).chain(named).chain(all).cloned().collect()
    }

    /// What names a Service or ServiceEntry.
    pub(super) fn naming(&self, object: &ObjectKey) -> impl Iterator<Item = &PolicyKey> {
        let target = Target::of(object).and_then(|t| self.by_target.get(&(object.namespace.clone(), t)));
        target.into_iter().flatten()
    }

    /// What names a waypoint, or its class.
    pub(super) fn for_waypoint(&self, waypoint: &Waypoint) -> impl Iterator<Item = &PolicyKey> {
        let meant = move |key: &PolicyKey, targets: &[Target]| {
            targets.iter().any(|target| waypoint.is_target(&key.namespace, target))
        };
        self.for_waypoints.iter().filter(move |(key, targets)| meant(key, targets)).map(|(key, _)| key)
    }

    /// What selects a workload of these labels, sorted.
    pub(super) fn selecting(&self, namespace: &Str, labels: &Labels) -> Vec<PolicyKey> {
        let own = self.by_selector.attached(Some(namespace), labels);
        let mut keys: Vec<PolicyKey> = own.chain(self.by_selector.attached(None, labels)).cloned().collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

/// What has to be looked at again when a resource of this scope comes, changes or goes.
pub(super) fn affected(key: &PolicyKey, scope: &PolicyScope, is_root: bool) -> Vec<Affected> {
    match scope {
        PolicyScope::Namespace => vec![Affected::Services((!is_root).then(|| key.namespace.clone()))],
        PolicyScope::Selector(selector) if is_root => vec![Affected::SelectedAnywhere(selector.clone())],
        PolicyScope::Selector(selector) => {
            vec![Affected::Selected(key.namespace.clone(), selector.clone())]
        }
        PolicyScope::Targets(targets) => {
            let one = |target: &Target| match target.object(&key.namespace) {
                Some(object) => Affected::Behind(object),
                None => Affected::Bound(key.namespace.clone(), target.clone()),
            };
            targets.iter().map(one).collect()
        }
    }
}
