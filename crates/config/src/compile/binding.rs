//! What is bound to a waypoint: connections to it go there first, and its workloads take them from nobody else.
//!
//! A binding holds whether the waypoint is there or not: what is bound and finds none is refused, and said. It holds
//! for services that have an address; connections to a headless service go to its pods' addresses, where they can't be
//! told from connections to the pods.
//!
//! For each workload behind a bound service there is a DENY policy, on the ports behind the service's, for all but the
//! waypoint's service account, so that every proxy that takes WDS enforces it. Workloads of a namespace share it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::{
    Action, Change, Clause, GatewayAddress, GatewayTarget, Match, Policy, PolicyKey, Rule, Scope,
    ServiceAccountMatch, ServiceKey, Workload,
};

use super::instance::{Definition, Finding};
use super::{Compiler, Record};
use crate::diagnostic::Code;
use crate::policy::selector::{Target, TargetKind};
use crate::policy::{Binding, Waypoint};
use crate::resource::{Kind, ObjectKey, Resource};
use crate::routes::gateway::{Unbound, WaypointSpec};

/// The port that waypoints take HBONE on.
const HBONE: u16 = 15008;
/// The label of what a Gateway was deployed as.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// How the policies' names begin.
const PREFIX: &str = "culvert_waypoint_";

impl Compiler {
    pub(super) fn set_gateway(&mut self, key: &ObjectKey, resource: Option<Resource>) {
        let spec = match resource {
            Some(Resource::Gateway(gateway)) => gateway.waypoint,
            _ => None,
        };
        let waypoint = Waypoint { namespace: key.namespace.clone(), name: key.name.clone() };
        let old = match &spec {
            Some(spec) => self.waypoints.insert(waypoint.clone(), spec.clone()),
            None => self.waypoints.remove(&waypoint),
        };
        if old != spec {
            self.mark_bound(&key.namespace, &Target { kind: TargetKind::Gateway, name: key.name.clone() });
            self.note_gateway(&waypoint);
        }
    }

    /// The waypoint that an object names, itself or by its namespace; never the one that it is a part of.
    pub(super) fn named_waypoint<'a>(
        &'a self,
        owner: &ObjectKey,
        binding: &'a Binding,
    ) -> Option<&'a Waypoint> {
        let inherited = self.areas.get(&owner.namespace).map_or(&Binding::Inherited, |a| &a.waypoint);
        let waypoint = binding.or(inherited)?;
        let itself = owner.kind == Kind::Service
            && owner.namespace == waypoint.namespace
            && owner.name == waypoint.name;
        (!itself).then_some(waypoint)
    }

    fn spec(&self, waypoint: &Waypoint, namespace: &str) -> Result<&WaypointSpec, Unbound> {
        let spec = self.waypoints.get(waypoint).ok_or(Unbound::Missing)?;
        let labels = self.areas.get(namespace).map(|a| &a.labels);
        let allowed = spec.allowed.has(&waypoint.namespace, namespace, labels);
        allowed.then_some(spec).ok_or(Unbound::NotAllowed)
    }

    /// The waypoint that a service is bound to, and why it can't be passed, if so.
    pub(super) fn waypoint_of<'a>(
        &'a self,
        owner: &ObjectKey,
        definition: &'a Definition,
    ) -> Option<(&'a Waypoint, Result<&'a WaypointSpec, Unbound>)> {
        let waypoint = self.named_waypoint(owner, &definition.waypoint)?;
        let has_address = !definition.service.vips.is_empty();
        let spec = self.spec(waypoint, &owner.namespace);
        let spec = spec.and_then(|spec| if spec.services { Ok(spec) } else { Err(Unbound::OtherTraffic) });
        has_address.then_some((waypoint, spec))
    }

    /// Where connections to what is bound to `waypoint` go.
    pub(super) fn gateway_address(&self, waypoint: &Waypoint) -> GatewayAddress {
        let hostname =
            format!("{}.{}.svc.{}", waypoint.name, waypoint.namespace, self.options.cluster_domain);
        let key = ServiceKey { namespace: waypoint.namespace.clone(), hostname: hostname.as_str().into() };
        GatewayAddress { target: GatewayTarget::Service(key), hbone_mtls_port: HBONE }
    }

    /// The waypoint that connections to a workload's own address pass.
    pub(super) fn workload_waypoint(
        &self,
        workload: &Workload,
        record: &Record,
    ) -> Option<(&Waypoint, &WaypointSpec)> {
        if self.waypoints.is_empty() {
            return None;
        }
        let own = Binding::of(&record.labels, &workload.namespace);
        let inherited = self.areas.get(&workload.namespace).map_or(&Binding::Inherited, |a| &a.waypoint);
        let (waypoint, _) = self.waypoints.get_key_value(own.or(inherited)?)?;
        if is_of(workload, record, waypoint) {
            return None;
        }
        let spec = self.spec(waypoint, &workload.namespace).ok()?;
        spec.workloads.then_some((waypoint, spec))
    }

    /// The ports of a workload that only a waypoint may reach; with `true` all of them.
    fn closed_ports(
        &self,
        workload: &Workload,
        record: &Record,
    ) -> BTreeMap<(&Waypoint, bool), BTreeSet<u16>> {
        let mut ports: BTreeMap<(&Waypoint, bool), BTreeSet<u16>> = BTreeMap::new();
        // Whoever may write a service in another namespace must not decide who reaches the workload.
        for membership in workload.services.iter().filter(|m| m.service.namespace == workload.namespace) {
            let definition = self.services.get(&membership.service).and_then(|e| e.definitions.first());
            let Some((owner, definition)) = definition else { continue };
            let Some((waypoint, spec)) = self.waypoint_of(owner, definition) else { continue };
            // The service may lead to no port of this workload; of a policy, no ports would be all of them.
            let is_open = spec.is_ok_and(|spec| spec.permissive) || membership.ports.is_empty();
            if is_open || is_of(workload, record, waypoint) {
                continue;
            }
            let targets = membership.ports.iter().map(|p| p.target_port);
            ports.entry((waypoint, false)).or_default().extend(targets);
        }
        let own = self.workload_waypoint(workload, record).filter(|(_, spec)| !spec.permissive);
        if let Some((waypoint, _)) = own {
            ports.entry((waypoint, true)).or_default();
        }
        ports
    }

    /// The policies that let in nobody but the waypoints that a workload is behind.
    pub(super) fn binding_policies(&self, workload: &Workload, record: &Record) -> Vec<Policy> {
        let ports = self.closed_ports(workload, record);
        ports.iter().map(|((waypoint, all), ports)| policy(workload, waypoint, *all, ports)).collect()
    }

    /// Whether the waypoint that a service is bound to enforces the policies for it.
    pub(super) fn is_served(&self, owner: &ObjectKey, definition: &Definition) -> bool {
        self.waypoint_of(owner, definition).is_some_and(|(_, spec)| spec.is_ok())
    }

    /// What to say of an object that is bound to a waypoint.
    pub(super) fn binding_findings(&self, owner: &ObjectKey, definition: &Definition) -> Option<Finding> {
        let waypoint = self.named_waypoint(owner, &definition.waypoint)?;
        match self.waypoint_of(owner, definition) {
            Some((_, Ok(_))) => None,
            Some((_, Err(why))) => Some(why.finding(&waypoint.namespace, &waypoint.name)),
            None => Some(Finding {
                code: Code::WithoutEffect,
                message: "the binding to a waypoint has no effect: connections to a headless service go to its pods"
                    .to_owned(),
                remedy: "bind the pods to a waypoint for workloads (istio.io/waypoint-for: all)".to_owned(),
            }),
        }
    }

    /// Follows which of the policies are listed, when a workload of the model is replaced.
    pub(super) fn count_bindings(&mut self, old: Option<&Workload>, new: &[Policy]) {
        for policy in new {
            let count = self.bindings.entry(policy.key.clone()).or_default();
            *count += 1;
            if *count == 1 {
                self.changes.push(Change::SetPolicy(Arc::new(policy.clone())));
            }
        }
        let listed = old.into_iter().flat_map(|w| &w.policies).filter(|key| key.name.starts_with(PREFIX));
        for key in listed {
            let Some(count) = self.bindings.get_mut(key) else { continue };
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.bindings.remove(key);
                self.removed.push(Change::RemovePolicy(key.clone()));
            }
        }
    }
}

/// Whether a workload is the waypoint itself.
fn is_of(workload: &Workload, record: &Record, waypoint: &Waypoint) -> bool {
    workload.namespace == waypoint.namespace && record.labels.get(GATEWAY_NAME) == Some(&waypoint.name)
}

fn policy(workload: &Workload, waypoint: &Waypoint, all: bool, ports: &BTreeSet<u16>) -> Policy {
    let shown: Vec<String> = ports.iter().map(u16::to_string).collect();
    let shown = if all { "all".to_owned() } else { shown.join("-") };
    let name = format!("{PREFIX}{}_{}_{shown}", waypoint.namespace, waypoint.name);
    // The service account that a Gateway's pods run under has its name.
    let account = ServiceAccountMatch { namespace: waypoint.namespace.clone(), name: waypoint.name.clone() };
    let others = Match {
        not_service_accounts: [account].into(),
        destination_ports: if all { Box::default() } else { ports.iter().copied().collect() },
        ..Match::default()
    };
    Policy {
        key: PolicyKey { namespace: workload.namespace.clone(), name: name.as_str().into() },
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: [Rule { clauses: [Clause { matches: [others].into() }].into() }].into(),
        dry_run: false,
    }
}
