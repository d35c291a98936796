//! Which mode of PeerAuthentication holds for which workload, and the policies that enforce it.
//!
//! A workload in mode STRICT, without exceptions for ports, lists the one policy [`STATIC_STRICT`] of the root
//! namespace. A policy with exceptions becomes one of its own, in its own namespace, named after it with the prefix
//! [`CONVERTED`]. (Underscores stand in no Kubernetes name, so neither is ever the name of an
//! AuthorizationPolicy.) Both are Istio's names, which its tools know.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use model::{Action, Change, Clause, Match, Policy, PolicyKey, Rule, Scope, Str, StringMatch};

use super::age::Age;
use super::peer_authentication::{Mode, PeerAuthentication};
use crate::compile::{Affected, Effects, Finding};
use crate::diagnostic::Code;
use crate::labels::{Labels, Selector};
use crate::resource::{Kind, ObjectKey};

/// The policy of workloads that take connections with an identity only.
pub const STATIC_STRICT: &str = "istio_converted_static_strict";

/// What the names of policies start with that a PeerAuthentication with modes for ports is compiled to.
pub const CONVERTED: &str = "converted_peer_authentication_";

/// The PeerAuthentications of one namespace, the oldest first.
#[derive(Debug, Default)]
struct InNamespace {
    /// Those for all of the namespace.
    wide: BTreeMap<Age, Arc<PeerAuthentication>>,
    /// Those with a selector.
    selecting: BTreeMap<Age, Arc<PeerAuthentication>>,
    /// The ages of all, by name.
    ages: HashMap<Str, Age>,
}

/// All PeerAuthentications, and what follows from them.
#[derive(Debug)]
pub struct Modes {
    root: Str,
    namespaces: HashMap<Str, InNamespace>,
    /// The policies with exceptions for ports that were given out, by namespace.
    given: HashMap<Str, HashMap<PolicyKey, Arc<Policy>>>,
    /// The policy without exceptions that was given out.
    given_static: Option<PolicyKey>,
}

/// How the mode of a workload that a policy selects is enforced.
enum Enforcement {
    /// There is nothing to enforce.
    Nothing,
    /// By the policy that all share.
    Static,
    /// By a policy of its own, because of ports with another mode.
    Own(Arc<Policy>),
}

impl Modes {
    /// No policies, with `root` as the root namespace.
    #[must_use]
    pub fn new(root: Str) -> Self {
        Self { root, namespaces: HashMap::new(), given: HashMap::new(), given_static: None }
    }

    /// Sets, replaces or (`None`) removes the policy of a key.
    pub fn set(&mut self, key: &ObjectKey, policy: Option<Arc<PeerAuthentication>>, effects: &mut Effects) {
        let namespace = &key.namespace;
        let mode_before = self.mode_of_namespace(namespace);
        let before = self.remove(key);
        let after = policy.map(|p| (Age::new(&p.created, namespace.clone(), key.name.clone()), p));
        if let Some((age, policy)) = &after {
            let here = self.namespaces.entry(namespace.clone()).or_default();
            let list = if policy.selector.is_some() { &mut here.selecting } else { &mut here.wide };
            list.insert(age.clone(), policy.clone());
            here.ages.insert(key.name.clone(), age.clone());
        }
        let mode_after = self.mode_of_namespace(namespace);
        let wide_changed = mode_before != mode_after;
        if wide_changed && *namespace == self.root {
            effects.affected.push(Affected::Mesh);
            self.give_all(effects);
        } else if wide_changed {
            effects.affected.push(Affected::Namespace(namespace.clone()));
            self.give_policies(namespace, effects);
        } else {
            self.affected_by_selecting(namespace, before.as_ref(), after.as_ref(), mode_after, effects);
            self.give_policies(namespace, effects);
        }
        self.find_conflicts(key, effects);
    }

    /// Makes another namespace the root namespace. Every workload has to be looked at afterwards.
    pub fn set_root(&mut self, root: Str, effects: &mut Effects) {
        self.root = root;
        self.give_all(effects);
    }

    /// The policy that enforces the mode of a workload with these labels.
    #[must_use]
    pub fn attached(&self, namespace: &Str, labels: &Labels) -> Option<PolicyKey> {
        let inherited = self.mode_of_namespace(namespace);
        let here = self.namespaces.get(namespace);
        let selects = |p: &PeerAuthentication| p.selector.as_ref().is_some_and(|s| s.matches(labels));
        let own = here.and_then(|h| h.selecting.iter().find(|(_, p)| selects(p)));
        match own.map(|(age, policy)| enforcement(age, policy, inherited)) {
            None if inherited == Mode::Strict => Some(self.static_strict()),
            Some(Enforcement::Static) => Some(self.static_strict()),
            Some(Enforcement::Own(policy)) => Some(policy.key.clone()),
            None | Some(Enforcement::Nothing) => None,
        }
    }

    /// The selector of a policy, if there is the policy.
    pub(super) fn selector_of(&self, key: &ObjectKey) -> Option<Option<&Selector>> {
        let here = self.namespaces.get(&key.namespace)?;
        let age = here.ages.get(&key.name)?;
        let policy = here.wide.get(age).or_else(|| here.selecting.get(age))?;
        Some(policy.selector.as_ref())
    }

    fn static_strict(&self) -> PolicyKey {
        PolicyKey { namespace: self.root.clone(), name: STATIC_STRICT.into() }
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<(Age, Arc<PeerAuthentication>)> {
        let here = self.namespaces.get_mut(&key.namespace)?;
        let age = here.ages.remove(&key.name)?;
        let policy = here.wide.remove(&age).or_else(|| here.selecting.remove(&age))?;
        if here.ages.is_empty() {
            self.namespaces.remove(&key.namespace);
        }
        Some((age, policy))
    }

    /// The mode of workloads that no policy selects.
    fn mode_of_namespace(&self, namespace: &str) -> Mode {
        let wide = |namespace: &str| {
            self.namespaces.get(namespace).and_then(|h| h.wide.first_key_value()).and_then(|(_, p)| p.mode)
        };
        wide(namespace).or_else(|| wide(&self.root)).unwrap_or(Mode::Permissive)
    }

    /// Which workloads a change of a policy with a selector concerns: none, when they list the same as before.
    fn affected_by_selecting(
        &self,
        namespace: &Str,
        before: Option<&(Age, Arc<PeerAuthentication>)>,
        after: Option<&(Age, Arc<PeerAuthentication>)>,
        inherited: Mode,
        effects: &mut Effects,
    ) {
        let seen = |policy: Option<&(Age, Arc<PeerAuthentication>)>| {
            let (age, policy) = policy?;
            let key = match enforcement(age, policy, inherited) {
                Enforcement::Nothing => None,
                Enforcement::Static => Some(self.static_strict()),
                Enforcement::Own(own) => Some(own.key.clone()),
            };
            policy.selector.clone().map(|selector| (age.clone(), selector, key))
        };
        let (before, after) = (seen(before), seen(after));
        if before == after {
            return;
        }
        let selectors: BTreeSet<Vec<(Str, Str)>> =
            [before, after].into_iter().flatten().map(|(_, s, _)| s.iter().cloned().collect()).collect();
        let selectors = selectors.into_iter().filter_map(Selector::new);
        effects.affected.extend(selectors.map(|s| Affected::Selected(namespace.clone(), s)));
    }

    /// Gives out the policies as they have to be now, as far as they are not.
    fn give_policies(&mut self, namespace: &Str, effects: &mut Effects) {
        self.give_static(effects);
        let inherited = self.mode_of_namespace(namespace);
        let here = self.namespaces.get(namespace);
        let with_ports = here.into_iter().flat_map(|h| &h.selecting).filter(|(_, p)| !p.ports.is_empty());
        let wanted: HashMap<PolicyKey, Arc<Policy>> = with_ports
            .filter_map(|(age, policy)| match enforcement(age, policy, inherited) {
                Enforcement::Own(policy) => Some((policy.key.clone(), policy)),
                Enforcement::Nothing | Enforcement::Static => None,
            })
            .collect();
        let given = self.given.remove(namespace).unwrap_or_default();
        let gone = given.keys().filter(|key| !wanted.contains_key(*key));
        effects.changes.extend(gone.cloned().map(Change::RemovePolicy));
        let new = wanted.iter().filter(|(key, policy)| given.get(*key) != Some(*policy));
        effects.changes.extend(new.map(|(_, policy)| Change::SetPolicy(policy.clone())));
        if !wanted.is_empty() {
            self.given.insert(namespace.clone(), wanted);
        }
    }

    fn give_all(&mut self, effects: &mut Effects) {
        self.give_static(effects);
        let namespaces: BTreeSet<Str> = self.namespaces.keys().chain(self.given.keys()).cloned().collect();
        for namespace in namespaces {
            self.give_policies(&namespace, effects);
        }
    }

    /// The policy that all share is there while there is any PeerAuthentication.
    fn give_static(&mut self, effects: &mut Effects) {
        let wanted = (!self.namespaces.is_empty()).then(|| self.static_strict());
        if self.given_static == wanted {
            return;
        }
        if let Some(key) = &wanted {
            let plaintext = Match { not_principals: [StringMatch::Presence].into(), ..Match::default() };
            effects.changes.push(Change::SetPolicy(denying(key.clone(), plaintext)));
        }
        let old = std::mem::replace(&mut self.given_static, wanted);
        effects.changes.extend(old.map(Change::RemovePolicy));
    }

    /// Says of each policy of a namespace whether an older one takes its place.
    fn find_conflicts(&self, changed: &ObjectKey, effects: &mut Effects) {
        effects.findings.push((changed.clone(), Vec::new()));
        let Some(here) = self.namespaces.get(&changed.namespace) else { return };
        let object = |age: &Age| ObjectKey {
            kind: Kind::PeerAuthentication,
            namespace: changed.namespace.clone(),
            name: age.name.clone(),
        };
        let mut find = |age: &Age, older: Option<&Age>, message: &dyn Fn(&str) -> String| {
            let finding = older.map(|older| Finding {
                code: Code::PolicyConflict,
                message: message(&older.name),
                remedy: "keep one of them".to_owned(),
            });
            effects.findings.push((object(age), finding.into_iter().collect()));
        };
        let first = here.wide.first_key_value().map(|(age, _)| age);
        for age in here.wide.keys() {
            let older = first.filter(|first| *first != age);
            find(age, older, &|older| {
                format!(
                    "has no effect: {older} is for all of the namespace too, and older or the first by name"
                )
            });
        }
        for (age, policy) in &here.selecting {
            let overlaps = |other: &PeerAuthentication| match (&policy.selector, &other.selector) {
                (Some(a), Some(b)) => compatible(a, b),
                _ => false,
            };
            let older = here.selecting.range(..age).take(COMPARED).find(|(_, p)| overlaps(p)).map(|(a, _)| a);
            find(age, older, &|older| {
                format!(
                    "has no effect on workloads that {older} selects too: it is older or the first by name"
                )
            });
        }
    }
}

/// With how many older policies of its namespace each is compared, to find conflicts.
const COMPARED: usize = 256;

/// Whether a workload can have the labels of both.
fn compatible(a: &Selector, b: &Selector) -> bool {
    !a.iter().any(|(key, value)| b.iter().any(|(k, v)| k == key && v != value))
}

/// How a policy with a selector is enforced in a namespace whose mode is `inherited`.
fn enforcement(age: &Age, policy: &PeerAuthentication, inherited: Mode) -> Enforcement {
    let mode = policy.mode.unwrap_or(inherited);
    let exceptions: Box<[u16]> =
        policy.ports.iter().filter(|(_, m)| **m != mode).map(|(port, _)| *port).collect();
    if exceptions.is_empty() {
        return if mode == Mode::Strict { Enforcement::Static } else { Enforcement::Nothing };
    }
    let key = PolicyKey { namespace: age.namespace.clone(), name: format!("{CONVERTED}{}", age.name).into() };
    let plaintext = Match { not_principals: [StringMatch::Presence].into(), ..Match::default() };
    let refused = match mode {
        Mode::Strict => Match { not_destination_ports: exceptions, ..plaintext },
        Mode::Permissive => Match { destination_ports: exceptions, ..plaintext },
    };
    Enforcement::Own(denying(key, refused))
}

fn denying(key: PolicyKey, refused: Match) -> Arc<Policy> {
    let rule = Rule { clauses: [Clause { matches: [refused].into() }].into() };
    Arc::new(Policy {
        key,
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: [rule].into(),
        dry_run: false,
    })
}
