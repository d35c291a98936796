//! Policies for workloads that waypoints stand before: which sets of them a service's waypoint enforces, and what is left
//! to the node. See [`crate::policy::halves`].

use std::collections::BTreeMap;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use model::{Change, Policy, PolicyKey, ServiceKey, Str, TunnelProtocol, Workload};

use super::ids::Id;
use super::{Compiler, Definition, Record};
use crate::policy::Covered;
use crate::policy::selector::{Target, TargetKind};
use crate::resource::{Kind, ObjectKey};

/// How the names of the policies begin that are the node's half of another.
const PREFIX: &str = "culvert_half_";

/// The policies that select a workload, and its namespace, whose policies are for it too.
pub(super) type Selection = (Str, Box<[PolicyKey]>);

/// A workload's services, and what selects it, as far as that was counted. Most workloads share it with the one before.
pub(super) type Counted = Arc<(Box<[ServiceKey]>, Selection)>;

/// What is known of halves.
#[derive(Debug, Default)]
pub(super) struct Halves {
    /// For each service, since routes of one behind a waypoint may lead to any, how many of its workloads there are of each
    /// selection.
    selections: HashMap<ServiceKey, BTreeMap<Selection, u32>>,
    /// What was counted last.
    counted: Option<Counted>,
    /// The halves at nodes, by the policy that they are of, each with how many workloads list it.
    of: HashMap<PolicyKey, BTreeMap<PolicyKey, Half>>,
    /// Which policy a half is of.
    whole: HashMap<PolicyKey, PolicyKey>,
    /// Policies of the batch that is being made of which the halves have to be made again.
    rewritten: HashSet<PolicyKey>,
}

#[derive(Debug)]
struct Half {
    listed: u32,
    covered: Box<[Covered]>,
}

/// The name of a policy's half for a workload of `namespace`.
fn name(namespace: &Str, key: &PolicyKey, covered: &[Covered]) -> PolicyKey {
    let mut name = format!("{PREFIX}{}_{}", key.namespace, key.name);
    for Covered { waypoint, ports } in covered {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        name += &format!("_{}_{}_{}", waypoint.namespace, waypoint.name, ports.join("-"));
    }
    PolicyKey { namespace: namespace.clone(), name: name.as_str().into() }
}

impl Compiler {
    /// The waypoints that stand before ports of a workload: those of its own namespace's services. Whoever may write a
    /// service in another one must not decide who reaches the workload.
    fn covered(&self, workload: &Workload) -> Box<[Covered]> {
        let mut found: BTreeMap<_, std::collections::BTreeSet<u16>> = BTreeMap::new();
        let own = workload.services.iter().filter(|m| m.service.namespace == workload.namespace);
        // A service may lead to no port of this workload; of a policy, no ports would be all of them.
        for membership in own.filter(|m| !m.ports.is_empty()) {
            let waypoint = self.in_force(&membership.service).and_then(|(by, d)| self.waypoint_of(by, d));
            if let Some((waypoint, Ok(_))) = waypoint {
                found.entry(waypoint).or_default().extend(membership.ports.iter().map(|p| p.target_port));
            }
        }
        found.into_iter().map(|(waypoint, ports)| Covered { waypoint: waypoint.clone(), ports }).collect()
    }

    pub(super) fn in_force(&self, service: &ServiceKey) -> Option<&(ObjectKey, Definition)> {
        self.services.get(service)?.definitions.first()
    }

    /// Puts the halves of policies in their place, in the list of a workload.
    pub(super) fn halve(&self, workload: &Workload, keys: &mut [PolicyKey]) {
        let halved: Vec<usize> = keys
            .iter()
            .enumerate()
            .filter(|(_, key)| self.policies.is_halved(key))
            .map(|(place, _)| place)
            .collect();
        if halved.is_empty() {
            return;
        }
        let covered = self.covered(workload);
        if covered.is_empty() {
            return;
        }
        for place in halved {
            if let Some(key) = keys.get_mut(place) {
                *key = name(&workload.namespace, key, &covered);
            }
        }
    }

    /// The stand-ins of the policies that connections to a workload's own address would pass by, beside those that it
    /// lists: of each the half that lets in the waypoint, on the ports where it enforces the whole.
    pub(super) fn stand_ins(
        &self,
        workload: &Workload,
        record: &Record,
        listed: &[PolicyKey],
    ) -> Vec<PolicyKey> {
        let passed_by = self.passed_by(workload, record);
        let missing = passed_by.into_iter().filter(|key| !listed.contains(key));
        let covered = self.covered(workload);
        let half =
            |key: PolicyKey| if covered.is_empty() { key } else { name(&workload.namespace, &key, &covered) };
        missing.map(half).collect()
    }

    /// Whether all workloads in the mesh that a policy is for, and that ask for a waypoint to enforce it, are behind one.
    fn is_halved_everywhere(&self, key: &PolicyKey) -> bool {
        if !self.policies.is_halved(key) || !self.halves.of.contains_key(key) {
            return false;
        }
        let compiled = self.records.iter().flatten().filter(|r| r.emitted).filter_map(Record::compiled);
        !compiled.filter(|w| w.tunnel == TunnelProtocol::Hbone).any(|w| w.policies.contains(key))
    }

    /// Whether a policy that needs a waypoint has one, for all that it is for.
    #[must_use]
    pub(crate) fn has_waypoint(&self, key: &ObjectKey) -> bool {
        let policy = PolicyKey { namespace: key.namespace.clone(), name: key.name.clone() };
        // A policy for a class names waypoints that may not be there yet.
        let any = |targets: &[Target]| {
            !self.waypoints.is_empty() || targets.iter().all(|t| t.kind != TargetKind::GatewayClass)
        };
        let targets = || {
            self.policies.targets_of(key).is_some_and(any)
                && self.target_standing(key).is_some_and(|judgement| judgement.holds)
        };
        key.kind == Kind::AuthorizationPolicy && (self.is_halved_everywhere(&policy) || targets())
    }

    /// Notes that it may be said otherwise whether policies that a workload lists, or listed, have a waypoint.
    fn note_halved(&mut self, old: Option<&Workload>, new: Option<&Workload>) {
        let old = old.map(|w| &*w.policies).unwrap_or_default();
        let new = new.map(|w| &*w.policies).unwrap_or_default();
        let changed = new.iter().filter(|k| !old.contains(k)).chain(old.iter().filter(|k| !new.contains(k)));
        let wholes = changed.filter_map(|key| {
            let whole = self.halves.whole.get(key).unwrap_or(key);
            self.policies.is_halved(whole).then(|| ObjectKey {
                kind: Kind::AuthorizationPolicy,
                namespace: whole.namespace.clone(),
                name: whole.name.clone(),
            })
        });
        let wholes: Vec<ObjectKey> = wholes.collect();
        self.found.extend(wholes);
    }

    /// Follows which halves are listed, when a workload of the model is replaced.
    pub(super) fn count_halves(&mut self, old: Option<&Workload>, new: Option<&Workload>, id: Id) {
        let lists = |w: &Workload| w.policies.iter().any(|key| key.name.starts_with(PREFIX));
        if let Some(workload) = new.filter(|w| lists(w)) {
            let covered = self.covered(workload);
            for key in self.record(id).map(|r| self.halved(workload, r)).unwrap_or_default() {
                let half = name(&workload.namespace, &key, &covered);
                let known = self.halves.of.entry(key.clone()).or_default();
                let entry =
                    known.entry(half.clone()).or_insert_with(|| Half { listed: 0, covered: covered.clone() });
                entry.listed += 1;
                if entry.listed == 1 {
                    let made = self.policies.half(&key, half.clone(), &covered);
                    self.changes.extend(made.map(|policy| Change::SetPolicy(Arc::new(policy))));
                    self.halves.whole.insert(half, key);
                }
            }
        }
        self.note_halved(old, new);
        let listed = old.into_iter().flat_map(|w| &w.policies).filter(|key| key.name.starts_with(PREFIX));
        for half in listed {
            let Some(key) = self.halves.whole.get(half) else { continue };
            let Some(known) = self.halves.of.get_mut(key) else { continue };
            let Some(entry) = known.get_mut(half) else { continue };
            entry.listed = entry.listed.saturating_sub(1);
            if entry.listed == 0 {
                known.remove(half);
                if known.is_empty() {
                    self.halves.of.remove(key);
                }
                self.halves.whole.remove(half);
                self.removed.push(Change::RemovePolicy(half.clone()));
            }
        }
    }

    /// The policies of which a workload lists halves.
    fn halved(&self, workload: &Workload, record: &Record) -> Vec<PolicyKey> {
        let keys = self.policies.listed(&workload.namespace, &record.labels);
        let halved = keys.into_iter().filter(|key| self.policies.is_halved(key));
        let passed_by = self.passed_by(workload, record);
        halved.chain(passed_by.into_iter().filter(|key| !workload.policies.contains(key))).collect()
    }

    /// Has the halves of a policy, which says something else now, made again.
    pub(super) fn rewrite(&mut self, key: &PolicyKey) {
        self.halves.rewritten.insert(key.clone());
    }

    /// Makes the halves again of the policies that say something else now, as far as they are still listed.
    pub(super) fn settle_halves(&mut self) {
        for key in std::mem::take(&mut self.halves.rewritten) {
            for (half, Half { covered, .. }) in self.halves.of.get(&key).into_iter().flatten() {
                let made: Option<Policy> = self.policies.half(&key, half.clone(), covered);
                self.changes.extend(made.map(|policy| Change::SetPolicy(Arc::new(policy))));
            }
        }
    }

    /// Follows which policies select a workload that is behind services. `None` where it is gone.
    pub(super) fn count_selection(&mut self, id: Id, new: Option<&Workload>) {
        let Some(record) = self.record(id) else { return };
        let next = new.filter(|workload| !workload.services.is_empty()).map(|workload| {
            let selecting = self.policies.selecting(&workload.namespace, &record.labels);
            let services: Box<[ServiceKey]> = workload.services.iter().map(|m| m.service.clone()).collect();
            (services, (workload.namespace.clone(), selecting))
        });
        if record.selection.as_deref() == next.as_ref() {
            return;
        }
        let next = next.map(|next| match &self.halves.counted {
            Some(counted) if **counted == next => counted.clone(),
            _ => self.halves.counted.insert(Arc::new(next)).clone(),
        });
        let mut changed = Vec::new();
        if let Some((services, selection)) = next.as_deref() {
            for service in services {
                let count =
                    self.halves.selections.entry(service.clone()).or_default().entry(selection.clone());
                let count = count.or_default();
                *count += 1;
                if *count == 1 {
                    changed.push(service.clone());
                }
            }
        }
        changed.iter().for_each(|service| self.touch_asking(service));
        let record = self.records.get_mut(id as usize).and_then(Option::as_mut);
        let old = record.and_then(|record| record.set_selection(next, &mut self.natures));
        self.forget_selection(old);
    }

    /// Takes back what was counted for a workload.
    pub(super) fn forget_selection(&mut self, old: Option<Counted>) {
        let Some(old) = old else { return };
        let (services, selection) = &*old;
        for service in services {
            let Some(counts) = self.halves.selections.get_mut(service) else { continue };
            let Some(count) = counts.get_mut(selection) else { continue };
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(selection);
                if counts.is_empty() {
                    self.halves.selections.remove(service);
                }
                self.touch_asking(service);
            }
        }
    }

    /// Has what asks the policies for a service's workloads compiled: the service, where it is behind a waypoint, and those
    /// whose routes lead to it. What the service itself asks need not change with them: its own routes may have led it there.
    fn touch_asking(&mut self, service: &ServiceKey) {
        if self.waypoints.is_empty() && self.http_services.is_empty() {
            return;
        }
        if self.in_force(service).is_some_and(|(by, d)| self.is_served(by, d)) {
            self.dirty_services.insert(service.clone());
        }
        self.touch_leading_to(service);
    }

    /// The sets of policies of workloads that the waypoint of a service enforces: of the workloads behind it, and behind
    /// the services that its routes lead to, which the waypoint reaches without asking theirs.
    pub(super) fn selected<'a>(
        &self,
        services: impl Iterator<Item = &'a ServiceKey>,
    ) -> Box<[Box<[PolicyKey]>]> {
        let selections = services.filter_map(|key| self.halves.selections.get(key)).flat_map(BTreeMap::keys);
        let mut sets: Vec<_> = selections
            .map(|(namespace, selecting)| self.policies.through_workloads(namespace, selecting))
            .filter(|set| !set.is_empty())
            .collect();
        sets.sort_unstable();
        sets.dedup();
        sets.into()
    }

    /// Has the services compiled whose waypoints ask the policies for workloads of `namespace`, or of any.
    pub(super) fn touch_covered(&mut self, namespace: Option<&Str>) {
        let concerned = self.halves.selections.iter().filter(|(_, counts)| {
            namespace.is_none_or(|wanted| counts.keys().any(|(namespace, _)| namespace == wanted))
        });
        let keys: Vec<ServiceKey> = concerned.map(|(key, _)| key.clone()).collect();
        keys.iter().for_each(|key| self.touch_asking(key));
    }
}
