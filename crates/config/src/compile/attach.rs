//! Which policies a workload lists, and which workloads a change of policies, waypoints or owners concerns.

use model::{
    GatewayAddress, PolicyKey, ServiceKey, ServiceMembership, ServiceSource, Str, TunnelProtocol, Workload,
};

use super::ids::Id;
use super::join::key_of;
use super::{Compiler, Definition, Record};
use crate::policy::selector::{Target, TargetKind};
use crate::policy::waypoint::USE_WAYPOINT;
use crate::policy::{Binding, Subject, Waypoint};
use crate::resource::{Kind, ObjectKey};

impl Compiler {
    /// The policies that a workload lists, given its services. Of these only those of its own namespace count: whoever
    /// may write a service in another one, and name its address there, must not decide who reaches it.
    pub(super) fn policies_of(&self, workload: &Workload, record: &Record) -> Box<[PolicyKey]> {
        let own_services = workload.services.iter().filter(|m| m.service.namespace == workload.namespace);
        let in_force = |m: &ServiceMembership| self.services.get(&m.service)?.definitions.first();
        // What a waypoint enforces needs no stand-in here: nobody but the waypoint is let in.
        let definitions: Vec<&(ObjectKey, Definition)> =
            own_services.filter_map(in_force).filter(|(by, d)| !self.is_served(by, d)).collect();
        let behind: Vec<ObjectKey> = definitions.iter().map(|(by, _)| by.clone()).collect();
        let inherited = self.areas.get(&workload.namespace).map(|a| &a.waypoint);
        let inherited = inherited.unwrap_or(&Binding::Inherited);
        let own = Binding::of(&record.labels, &workload.namespace);
        let bindings = definitions.iter().map(|(_, d)| &d.waypoint);
        let own = own.or(inherited).filter(|waypoint| !self.waypoints.contains_key(*waypoint));
        let waypoints: Vec<&Waypoint> =
            bindings.filter_map(|binding| binding.or(inherited)).chain(own).collect();
        let subject = Subject {
            namespace: &workload.namespace,
            labels: &record.labels,
            behind: &behind,
            waypoints: &waypoints,
        };
        let mut keys = self.policies.attached(&subject);
        self.halve(workload, &mut keys);
        keys.extend(self.stand_ins(workload, record, &keys));
        keys.extend(self.binding_policies(workload, record).into_iter().map(|policy| policy.key));
        keys.sort_unstable();
        keys.into()
    }

    /// The policies for the services and waypoints of a workload in whose place connections to its own address have a
    /// stand-in: those pass a waypoint, too, which enforces the policies only for what comes to the services.
    pub(super) fn passed_by(&self, workload: &Workload, record: &Record) -> Vec<PolicyKey> {
        let Some((own, spec)) = self.workload_waypoint(workload, record) else { return Vec::new() };
        if spec.permissive {
            return Vec::new();
        }
        let services = workload.services.iter().filter(|m| m.service.namespace == workload.namespace);
        let served: Vec<(&ObjectKey, &Waypoint)> = services
            .filter_map(|m| self.in_force(&m.service))
            .filter_map(|(by, d)| self.waypoint_of(by, d).filter(|(_, s)| s.is_ok()).map(|(w, _)| (by, w)))
            .collect();
        let behind: Vec<ObjectKey> = served.iter().map(|(by, _)| (*by).clone()).collect();
        let waypoints: Vec<&Waypoint> = served.iter().map(|(_, waypoint)| *waypoint).chain([own]).collect();
        self.policies.targeting(&behind, &waypoints)
    }

    /// Counts the endpoints that don't enforce the policies for their services, when a workload of the model is
    /// replaced.
    pub(super) fn count_unguarded(&mut self, old: Option<&Workload>, new: Option<&Workload>) {
        for key in new.into_iter().flat_map(unguarded) {
            let count = self.unguarded.entry(key.clone()).or_default();
            *count += 1;
            if *count == 1 {
                self.dirty_services.insert(key.clone());
            }
        }
        for key in old.into_iter().flat_map(unguarded) {
            let Some(count) = self.unguarded.get_mut(key) else { continue };
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.unguarded.remove(key);
                self.dirty_services.insert(key.clone());
            }
        }
    }

    /// The services that an instance names. A ServiceEntry's endpoints are those of its hosts as far as it is the
    /// one in force: else it could add endpoints to a Service by giving itself its name.
    pub(super) fn named<'r>(&'r self, record: &'r Record) -> impl Iterator<Item = &'r ServiceMembership> {
        let maker = record.workload().map(|w| key_of(record.maker, w));
        record.services.iter().filter(move |membership| {
            let owner = self.services.get(&membership.service).and_then(|e| e.definitions.first());
            record.maker != Kind::ServiceEntry || owner.map(|(by, _)| by) == maker.as_ref()
        })
    }

    /// Where connections to a service have to go: to the waypoint that it is bound to. One that is bound to none goes
    /// nowhere if only a waypoint could enforce the policies for it, since not all that is behind it enforces them.
    pub(super) fn passes(&self, owner: &ObjectKey, definition: &Definition) -> Option<GatewayAddress> {
        if let Some((waypoint, _)) = self.waypoint_of(owner, definition) {
            return Some(self.gateway_address(waypoint));
        }
        let inherited = self.areas.get(&owner.namespace).map(|a| &a.waypoint);
        let waypoint = definition.waypoint.or(inherited.unwrap_or(&Binding::Inherited));
        let guarded = !definition.external
            && definition.service.source != ServiceSource::Passthrough
            && !self.unguarded.contains_key(&definition.service.key());
        if guarded || !self.policies.guards(owner, waypoint) {
            return None;
        }
        let nowhere = Waypoint { namespace: owner.namespace.clone(), name: "waypoint".into() };
        Some(self.gateway_address(waypoint.unwrap_or(&nowhere)))
    }

    /// Marks the instances that are bound to a waypoint that policies of `namespace` mean by `target`.
    pub(super) fn mark_bound(&mut self, namespace: &str, target: &Target) {
        let bound = |binding: &Binding| matches!(binding, Binding::To(w) if w.is_target(namespace, target));
        let mut ids: Vec<Id> = Vec::new();
        let label: Str = USE_WAYPOINT.into();
        for area in self.areas.values() {
            let any = target.kind == TargetKind::GatewayClass;
            if any || bound(&area.waypoint) {
                ids.extend(area.instances.iter());
            } else {
                ids.extend(area.labelled(&label, &target.name));
            }
        }
        let defined = self.services.values().filter_map(|entry| entry.definitions.first());
        let defined = defined.filter(|(by, d)| {
            let inherited = self.areas.get(&by.namespace).map_or(&Binding::Inherited, |a| &a.waypoint);
            d.waypoint.or(inherited).is_some_and(|w| w.is_target(namespace, target))
        });
        let makers: Vec<ObjectKey> = defined.map(|(by, _)| by.clone()).collect();
        ids.into_iter().for_each(|id| self.mark(id));
        makers.iter().for_each(|by| self.mark_behind(by));
    }

    /// Marks the endpoints of the services that `object` defines.
    pub(super) fn mark_behind(&mut self, object: &ObjectKey) {
        let services = self.made_services.get(object).cloned().unwrap_or_default();
        self.dirty_services.extend(services.iter().cloned());
        for service in services {
            let definition = self.services.get(&service).and_then(|e| e.definitions.first());
            let selector = definition.and_then(|(_, d)| d.selector.clone());
            if let Some(selector) = selector {
                self.mark_selected(&service.namespace, &selector);
            }
            let makers = self.slices_of.get(&service).into_iter().flatten().chain([object]);
            let listed = makers.filter_map(|maker| self.made_instances.get(maker)).flatten();
            let listed: Vec<Id> = listed.copied().collect();
            listed.into_iter().for_each(|id| self.mark_with_holders(id));
        }
    }

    /// Has the endpoints that entries name looked at again when another definition of a service is in force.
    /// Whether one is.
    pub(super) fn change_owner(&mut self, key: &ServiceKey, old: Option<ObjectKey>) -> bool {
        let new = self.services.get(key).and_then(|e| e.definitions.first()).map(|(by, _)| by.clone());
        if old == new {
            return false;
        }
        let entries = old.into_iter().chain(new).filter(|by| by.kind == Kind::ServiceEntry);
        let made: Vec<Id> =
            entries.filter_map(|by| self.made_instances.get(&by)).flatten().copied().collect();
        made.into_iter().for_each(|id| self.mark_with_holders(id));
        true
    }

    /// Marks an instance and those that share an address with it: the one that has it takes over its services.
    fn mark_with_holders(&mut self, id: Id) {
        let addresses = self.record(id).map(Record::addresses).unwrap_or_default();
        addresses.iter().for_each(|address| self.mark_holders(address));
        self.mark(id);
    }
}

/// The services whose policies a workload does not enforce though it is an endpoint of them: it is not in the mesh,
/// or they are another namespace's.
fn unguarded(workload: &Workload) -> impl Iterator<Item = &ServiceKey> {
    let outside = workload.tunnel != TunnelProtocol::Hbone;
    let services = workload.services.iter().map(|m| &m.service);
    services.filter(move |service| outside || service.namespace != workload.namespace)
}
