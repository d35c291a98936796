//! What waypoints do to requests beside the policies: RequestAuthentications and RateLimits, and what follows for the
//! model when one of them changes.

use std::collections::HashMap;
use std::sync::Arc;

use model::http::{RateLimit as CompiledLimit, RequestAuthentication as CompiledAuthentication};
use model::{Change, PolicyKey, Str};

use super::attachments::{Attachments, affected};
use super::authorization::PolicyScope;
use super::rate_limit::RateLimit;
use super::request_authentication::RequestAuthentication;
use super::selector::Target;
use super::waypoint::Waypoint;
use crate::compile::{Affected, Effects};
use crate::labels::Labels;
use crate::resource::{Kind, ObjectKey};

/// A kind of resource that services list and waypoints are sent.
trait Guard: PartialEq {
    fn scope(&self) -> &PolicyScope;
    /// What waypoints are sent of it; `None` if it has errors: it is listed and not known, which refuses.
    fn change(&self, key: &PolicyKey) -> Option<Change>;
    fn removal(key: &PolicyKey) -> Change;
}

impl Guard for RequestAuthentication {
    fn scope(&self) -> &PolicyScope {
        &self.scope
    }

    fn change(&self, key: &PolicyKey) -> Option<Change> {
        let rules = self.rules.clone()?;
        let compiled = CompiledAuthentication { key: key.clone(), rules };
        Some(Change::SetAuthentication(Arc::new(compiled)))
    }

    fn removal(key: &PolicyKey) -> Change {
        Change::RemoveAuthentication(key.clone())
    }
}

impl Guard for RateLimit {
    fn scope(&self) -> &PolicyScope {
        &self.scope
    }

    fn change(&self, key: &PolicyKey) -> Option<Change> {
        let limits = self.limits.clone()?;
        let compiled = CompiledLimit { key: key.clone(), limits, headers: self.headers };
        Some(Change::SetRateLimit(Arc::new(compiled)))
    }

    fn removal(key: &PolicyKey) -> Change {
        Change::RemoveRateLimit(key.clone())
    }
}

/// The resources of a kind.
#[derive(Debug)]
struct Guarding<G> {
    all: HashMap<PolicyKey, G>,
    attached: Attachments,
}

impl<G> Default for Guarding<G> {
    fn default() -> Self {
        Self { all: HashMap::new(), attached: Attachments::default() }
    }
}

impl<G: Guard> Guarding<G> {
    fn set(&mut self, key: &PolicyKey, new: Option<G>, root: &str, effects: &mut Effects) {
        let is_root = *key.namespace == *root;
        let old = self.all.remove(key);
        if old == new {
            self.all.extend(new.map(|new| (key.clone(), new)));
            return;
        }
        let known = old.as_ref().is_some_and(|old| old.change(key).is_some());
        match new.as_ref().and_then(|new| new.change(key)) {
            Some(change) => effects.changes.push(change),
            None if known => effects.changes.push(G::removal(key)),
            None => {}
        }
        if old.as_ref().map(G::scope) != new.as_ref().map(G::scope) {
            if let Some(old) = &old {
                self.attached.remove(key, old.scope(), is_root);
                effects.affected.extend(affected(key, old.scope(), is_root));
            }
            if let Some(new) = &new {
                self.attached.insert(key, new.scope(), is_root);
                effects.affected.extend(affected(key, new.scope(), is_root));
            }
        }
        self.all.extend(new.map(|new| (key.clone(), new)));
    }

    fn index(&mut self, root: &str) {
        self.attached = Attachments::default();
        for (key, guard) in &self.all {
            self.attached.insert(key, guard.scope(), *key.namespace == *root);
        }
    }
}

fn of_kind(kind: Kind) -> impl Fn(&PolicyKey) -> ObjectKey {
    move |key| ObjectKey { kind, namespace: key.namespace.clone(), name: key.name.clone() }
}

/// All of both kinds.
#[derive(Debug, Default)]
pub(super) struct Guards {
    authentications: Guarding<RequestAuthentication>,
    limits: Guarding<RateLimit>,
}

impl Guards {
    pub(super) fn set_authentication(
        &mut self,
        key: &PolicyKey,
        new: Option<RequestAuthentication>,
        root: &str,
        effects: &mut Effects,
    ) {
        self.authentications.set(key, new, root, effects);
    }

    pub(super) fn set_limit(
        &mut self,
        key: &PolicyKey,
        new: Option<RateLimit>,
        root: &str,
        effects: &mut Effects,
    ) {
        self.limits.set(key, new, root, effects);
    }

    /// Follows a change of the root namespace.
    pub(super) fn set_root(&mut self, root: &str, effects: &mut Effects) {
        if self.authentications.all.is_empty() && self.limits.all.is_empty() {
            return;
        }
        self.authentications.index(root);
        self.limits.index(root);
        effects.affected.push(Affected::Services(None));
    }

    /// The RequestAuthentications for what reaches an object through its waypoint, without those that select workloads
    /// behind it.
    pub(super) fn authentications(
        &self,
        object: &ObjectKey,
        waypoint: &Waypoint,
        root: &str,
    ) -> Vec<PolicyKey> {
        self.authentications.attached.through(object, waypoint, root).into_iter().collect()
    }

    /// What a resource of one of the kinds names by `targetRefs`.
    pub(super) fn targets_of(&self, kind: Kind, key: &PolicyKey) -> Option<&[Target]> {
        let scope = match kind {
            Kind::RequestAuthentication => &self.authentications.all.get(key)?.scope,
            Kind::RateLimit => &self.limits.all.get(key)?.scope,
            _ => return None,
        };
        scope.targets()
    }

    /// What names a Service or ServiceEntry.
    pub(super) fn naming(&self, object: &ObjectKey) -> impl Iterator<Item = ObjectKey> {
        let tokens = self.authentications.attached.naming(object);
        let limits = self.limits.attached.naming(object);
        tokens.map(of_kind(Kind::RequestAuthentication)).chain(limits.map(of_kind(Kind::RateLimit)))
    }

    /// What names a waypoint, or its class.
    pub(super) fn for_waypoint(&self, waypoint: &Waypoint) -> impl Iterator<Item = ObjectKey> {
        let tokens = self.authentications.attached.for_waypoint(waypoint);
        let limits = self.limits.attached.for_waypoint(waypoint);
        tokens.map(of_kind(Kind::RequestAuthentication)).chain(limits.map(of_kind(Kind::RateLimit)))
    }

    /// The RequestAuthentications that select a workload by its labels, sorted.
    pub(super) fn authenticating(&self, namespace: &Str, labels: &Labels) -> Vec<PolicyKey> {
        self.authentications.attached.selecting(namespace, labels)
    }

    /// A RateLimit.
    pub(super) fn limit(&self, key: &PolicyKey) -> Option<&RateLimit> {
        self.limits.all.get(key)
    }

    /// The RateLimits for what reaches an object through its waypoint, sorted.
    pub(super) fn limits(&self, object: &ObjectKey, waypoint: &Waypoint, root: &str) -> Vec<PolicyKey> {
        self.limits.attached.through(object, waypoint, root).into_iter().collect()
    }
}
