//! Joining instances with services, policies, nodes and namespaces.

use std::sync::Arc;

use model::{
    Change, Health, LoadBalancingMode, LocalityScope, NetworkAddress, PortMapping, ServiceKey,
    ServiceMembership, Str, TunnelProtocol, Vip, Workload,
};

use super::enrolment::{self, EnrolmentChange, Verdict};
use super::ids::Id;
use super::index::Place;
use super::instance::{Definition, Finding, Instance, Membership, Names, PortRule, Rank, RuleTarget};
use super::record::Record;
use super::{Compiler, Source};
use crate::diagnostic::Code;
use crate::kinds::namespace::DATAPLANE_MODE;
use crate::kinds::service::Distribution;
use crate::labels::{Pool, Selector};
use crate::resource::{Kind, ObjectKey};

impl Compiler {
    pub(super) fn record(&self, id: Id) -> Option<&Record> {
        self.records.get(usize::try_from(id).ok()?)?.as_ref()
    }

    pub(super) fn record_mut(&mut self, id: Id) -> Option<&mut Record> {
        self.records.get_mut(usize::try_from(id).ok()?)?.as_mut()
    }

    /// Has an instance compiled by the next commit.
    pub(super) fn mark(&mut self, id: Id) {
        self.steps += 1;
        if let Some(record) = self.record_mut(id)
            && !record.dirty
        {
            record.dirty = true;
            self.dirty.push(id);
        }
    }

    /// Marks the instances that `selector` selects.
    pub(super) fn mark_selected(&mut self, namespace: &str, selector: &Selector) {
        let Some(members) = self.areas.get(namespace).and_then(|a| a.candidates(selector)) else { return };
        let candidates: Vec<Id> = members.iter().collect();
        for id in candidates {
            self.steps += 1;
            if self.record(id).is_some_and(|r| selector.matches(&r.labels)) {
                self.mark(id);
            }
        }
    }

    /// Adds an instance or replaces the one of its uid.
    pub(super) fn put_instance(&mut self, maker: Kind, instance: Instance) -> Id {
        let known = self.id_of(&instance.workload.uid);
        let id = known.unwrap_or_else(|| self.free.pop().unwrap_or_else(|| self.grow()));
        let old = self.records.get_mut(id as usize).and_then(Option::take);
        let old_addresses = old.as_ref().map(Record::addresses).unwrap_or_default();
        if let Some(old) = &old {
            self.unindex(id, old);
        }
        let uid = instance.workload.uid.clone();
        let mut record = Record::new(maker, instance, old, &mut self.natures);
        let addresses = record.addresses();
        let comes_anew = self.comes_anew(&old_addresses, &addresses);
        if known.is_none() || comes_anew {
            self.arrivals += 1;
            record.set_arrival(self.arrivals);
        }
        self.index(id, &record);
        if known.is_none() {
            let records = &self.records;
            self.by_uid.insert(&uid, id, |id| uid_in(records, id));
        }
        if let Some(slot) = self.records.get_mut(id as usize) {
            *slot = Some(record);
        }
        for address in old_addresses.iter().filter(|a| comes_anew || !addresses.contains(a)) {
            self.leave_address(id, address);
        }
        for address in addresses {
            self.join_address(id, &address);
        }
        self.mark(id);
        id
    }

    fn grow(&mut self) -> Id {
        if self.records.len() == self.records.capacity() {
            // An eighth more, not twice as much.
            self.records.reserve_exact((self.records.len() / 8).max(64));
        }
        self.records.push(None);
        Id::try_from(self.records.len() - 1).unwrap_or(Id::MAX)
    }

    fn id_of(&self, uid: &str) -> Option<Id> {
        self.by_uid.get(uid, |id| uid_in(&self.records, id))
    }

    pub(super) fn remove_uid(&mut self, uid: &str) {
        if let Some(id) = self.id_of(uid) {
            self.remove_instance(id);
        }
    }

    pub(super) fn remove_instance(&mut self, id: Id) {
        self.steps += 1;
        let Some(record) = self.records.get_mut(id as usize).and_then(Option::take) else { return };
        self.unindex(id, &record);
        self.forget_authenticated(record.authenticated());
        self.forget_selection(record.selection.clone());
        for address in record.addresses() {
            self.leave_address(id, &address);
        }
        if let Some(workload) = record.workload() {
            self.by_uid.remove(&workload.uid, id);
            if record.emitted {
                self.count_unguarded(record.compiled().map(AsRef::as_ref), None);
                self.count_bindings(record.compiled().map(AsRef::as_ref), &[]);
                self.count_halves(record.compiled().map(AsRef::as_ref), None, id);
                self.removed.push(Change::RemoveWorkload(workload.uid.clone()));
            }
            if record.enrolment().is_some() {
                self.enrolments.push(EnrolmentChange::Remove(workload.uid.clone()));
            }
            let key = key_of(record.maker, workload);
            let namespace = workload.namespace.clone();
            self.set_findings(&key, &Source::Instance, Vec::new());
            self.drop_unused_area(&namespace);
        }
        // A dirty id may still be in the list; compiling it finds nothing, or its successor.
        self.free.push(id);
    }

    fn index(&mut self, id: Id, record: &Record) {
        let Some(workload) = record.workload() else { return };
        self.area(&workload.namespace).insert_instance(id, &record.labels);
        let node = workload.node();
        if !node.is_empty() {
            self.places.entry(node.clone()).or_insert_with(|| Place::new(node)).instances.insert(id);
        }
    }

    fn unindex(&mut self, id: Id, record: &Record) {
        let Some(workload) = record.workload() else { return };
        self.area(&workload.namespace).remove_instance(id, &record.labels);
        if let Some(place) = self.places.get_mut(workload.node()) {
            place.instances.remove(id);
            if place.instances.is_empty() && !place.is_known {
                self.places.remove(workload.node());
            }
        }
    }

    /// Compiles an instance; gives the change that this makes, if any.
    pub(super) fn compile_instance(&mut self, id: Id, pool: &mut Pool) -> Option<Change> {
        self.steps += 1;
        let record = self.record(id).filter(|r| r.dirty)?;
        let displacer = if record.displaced() { self.displacer(id) } else { None };
        let key = key_of(record.maker, record.workload()?);
        if record.displaced() && record.rank == Rank::Endpoint {
            return self.withdraw(id);
        }
        let workload = self.join(id, pool)?;
        let record = self.record(id)?;
        let verdict = match record.rank {
            Rank::Pod => enrolment::decide(&workload, record.capture(), self.options.node.as_ref()),
            Rank::Entry | Rank::Endpoint => Verdict::Leave,
        };
        let mut findings: Vec<Finding> =
            displacer.iter().map(|(holder, address)| self.conflict(*holder, address)).collect();
        findings.extend(matches!(verdict, Verdict::NoNetns).then(|| no_netns(&workload)));
        self.set_findings(&key, &Source::Instance, findings);
        // A pod that lost its address stays captured: unknown to the mesh, its traffic is refused. Left alone, it
        // would pass what its policies refuse.
        self.enrol(id, verdict);
        if displacer.is_some() {
            return self.withdraw(id);
        }
        let record = self.record_mut(id)?;
        record.dirty = false;
        let draft = record.take_draft();
        self.count_authenticated(id, Some(&workload));
        self.count_selection(id, Some(&workload));
        let record = self.record_mut(id)?;
        if record.emitted && record.workload() == Some(&workload) {
            return None;
        }
        let workload = in_place_of(draft, workload);
        let record = self.record(id)?;
        let bindings = self.binding_policies(&workload, record);
        let record = self.record_mut(id)?;
        let old = record.set_compiled(workload.clone()).filter(|_| record.emitted);
        record.emitted = true;
        self.count_unguarded(old.as_deref(), Some(&workload));
        self.count_bindings(old.as_deref(), &bindings);
        self.count_halves(old.as_deref(), Some(&workload), id);
        Some(Change::SetWorkload(workload))
    }

    /// Takes an instance that lost its address out of the model; it stays in the table.
    fn withdraw(&mut self, id: Id) -> Option<Change> {
        let record = self.record_mut(id)?;
        record.dirty = false;
        let uid = record.workload()?.uid.clone();
        if !std::mem::take(&mut record.emitted) {
            return None;
        }
        let old = record.compiled().cloned();
        self.count_authenticated(id, None);
        self.count_selection(id, None);
        self.count_unguarded(old.as_deref(), None);
        self.count_bindings(old.as_deref(), &[]);
        self.count_halves(old.as_deref(), None, id);
        Some(Change::RemoveWorkload(uid))
    }

    fn enrol(&mut self, id: Id, verdict: Verdict) {
        let Some(record) = self.record_mut(id) else { return };
        let new = match verdict {
            Verdict::Enrol(enrolment) => Some(enrolment),
            Verdict::NoNetns | Verdict::Leave => None,
        };
        if record.enrolment() == new.as_deref() {
            return;
        }
        let change = match (&new, record.enrolment()) {
            (Some(enrolment), _) => EnrolmentChange::Set(enrolment.clone()),
            (None, Some(old)) => EnrolmentChange::Remove(old.uid.clone()),
            (None, None) => return,
        };
        record.set_enrolment(new);
        self.enrolments.push(change);
    }

    /// The workload that an instance is in the light of everything else.
    fn join(&self, id: Id, pool: &mut Pool) -> Option<Workload> {
        let record = self.record(id)?;
        let mut workload = record.workload()?.clone();
        let area = self.areas.get(&workload.namespace);
        workload.trust_domain = self.settings().trust_domains.own.clone();
        workload.tunnel = match record.membership {
            Membership::Fixed(tunnel) => tunnel,
            Membership::Labelled => {
                let label = record.labels.get(DATAPLANE_MODE).map(|mode| &**mode);
                let ambient = match label {
                    Some("ambient") => true,
                    Some("none") => false,
                    _ => area.is_some_and(|a| a.ambient),
                };
                if ambient { TunnelProtocol::Hbone } else { TunnelProtocol::None }
            }
        };
        if let (false, Some(place)) = (record.fixed_locality, self.places.get(workload.node())) {
            workload.locality = place.here.clone();
        }
        let label = |names: &[&str]| names.iter().find_map(|name| record.labels.get(name)).cloned();
        workload.canonical_name = None;
        if let Some(name) = label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]) {
            workload.set_canonical_name(name);
        }
        workload.canonical_revision =
            label(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
                .unwrap_or_else(|| self.shared.latest.clone());
        workload.services = self.memberships(id, record, pool);
        workload.policies = self.policies_of(&workload, record);
        let waypoint = self.workload_waypoint(&workload, record);
        workload.waypoint = waypoint.map(|(waypoint, _)| Box::new(self.gateway_address(waypoint)));
        pool.share(&mut workload.profile);
        Some(workload)
    }

    /// The services that an instance is an endpoint of: those that select it, those that it names, and those that
    /// list its address.
    fn memberships(&self, id: Id, record: &Record, pool: &mut Pool) -> Arc<[ServiceMembership]> {
        let mut found: Vec<ServiceMembership> = self.named(record).cloned().collect();
        let area = record.workload().and_then(|w| self.areas.get(&w.namespace));
        if let (Some(area), true) = (area, record.rank != Rank::Endpoint) {
            for (selector, key) in area.selecting(&record.labels) {
                let definition = self.services.get(key).and_then(|e| e.definitions.first());
                if let (Some((_, definition)), true) = (definition, selector.matches(&record.labels)) {
                    let ports = pool.mappings(&port_mappings(&definition.ports, record));
                    found.push(ServiceMembership { service: key.clone(), ports });
                }
            }
        }
        for address in record.addresses() {
            for other in self.by_address.holders(&address).iter().filter(|other| **other != id) {
                let taken = |other: &&Record| other.rank == Rank::Endpoint && record.takes_from(other);
                let Some(other) = self.record(*other).filter(taken) else { continue };
                if other.workload().is_some_and(|w| w.health == Health::Healthy) {
                    found.extend(self.named(other).cloned());
                }
            }
        }
        found.sort_by(|a, b| a.service.cmp(&b.service));
        found.dedup_by(|a, b| a.service == b.service);
        pool.memberships(&found)
    }

    /// What to say of an instance that another displaces.
    fn conflict(&self, holder: Id, address: &NetworkAddress) -> Finding {
        let holder = self.record(holder);
        let name = holder.and_then(|r| Some(key_of(r.maker, r.workload()?).resource_name().to_string()));
        Finding {
            code: Code::AddressConflict,
            message: format!("{} is the address of {} already", address.ip, name.unwrap_or_default()),
            remedy: "the other stays in force until it is gone or has another address".to_owned(),
        }
    }
}

/// The uid of an instance, read where it is.
fn uid_in(records: &[Option<Record>], id: Id) -> Option<&str> {
    let record = records.get(usize::try_from(id).ok()?)?.as_ref()?;
    record.workload().map(|workload| &*workload.uid)
}

/// `workload` in the memory of the draft that it was made of: with another block for each of 100,000, what the drafts had
/// would stay as so many holes.
fn in_place_of(draft: Option<Arc<Workload>>, workload: Workload) -> Arc<Workload> {
    let Some(mut draft) = draft else { return Arc::new(workload) };
    match Arc::get_mut(&mut draft) {
        Some(place) => *place = workload,
        None => return Arc::new(workload),
    }
    draft
}

fn no_netns(workload: &Workload) -> Finding {
    let message =
        format!("the pod is in the mesh on this node ({}), and nothing captures it", workload.node());
    let remedy = "name its network namespace: annotation culvert.dev/netns: /run/netns/NAME".to_owned();
    Finding { code: Code::NetnsMissing, message, remedy }
}

pub(super) fn key_of(maker: Kind, workload: &Workload) -> ObjectKey {
    ObjectKey { kind: maker, namespace: workload.namespace.clone(), name: workload.name().into() }
}

fn port_mappings(rules: &[PortRule], record: &Record) -> Vec<PortMapping> {
    let named = |name: &Str| record.ports.iter().find(|(n, _)| n == name).map(|(_, port)| *port);
    let mapping = |rule: &PortRule| {
        let target_port = match &rule.target {
            RuleTarget::Number(number) => *number,
            RuleTarget::Name(name) => named(name)?,
            RuleTarget::NameOr(name, number) => match record.names {
                Names::Entry => named(name).unwrap_or(*number),
                Names::Containers => *number,
            },
        };
        Some(PortMapping { service_port: rule.service_port, target_port })
    };
    rules.iter().filter_map(mapping).collect()
}

impl Compiler {
    /// Sets, or with `None` removes, what `by` says of a service.
    pub(super) fn change_service(
        &mut self,
        key: &ServiceKey,
        by: &ObjectKey,
        definition: Option<Definition>,
        pool: &mut Pool,
    ) {
        self.steps += 1;
        let entry = self.services.entry(key.clone()).or_default();
        let old = entry.definitions.first().map(|(_, d)| d.clone());
        let old_owner = entry.definitions.first().map(|(by, _)| by.clone());
        if entry.definitions.is_empty() && definition.is_some() {
            entry.definitions.reserve_exact(1); // nearly always there is one, of half a kilobyte
        }
        let known = entry.definitions.iter_mut().find(|(owner, _)| owner == by);
        match (known, definition) {
            (Some(slot), Some(definition)) => slot.1 = definition,
            (None, Some(definition)) if by.kind == Kind::Service => {
                entry.definitions.insert(0, (by.clone(), definition));
            }
            (None, Some(definition)) => entry.definitions.push((by.clone(), definition)),
            (_, None) => {
                entry.definitions.retain(|(owner, _)| owner != by);
                self.set_findings(by, &Source::Service(key.hostname.clone()), Vec::new());
            }
        }
        let new = self.services.get(key).and_then(|e| e.definitions.first()).map(|(_, d)| d.clone());
        let owner_changed = self.change_owner(key, old_owner);
        let area = self.area(&key.namespace);
        if new.is_some() {
            area.services.insert(key.clone());
            self.hosts.insert(key);
        } else {
            area.services.remove(key);
            self.hosts.remove(key);
        }
        self.dirty_services.insert(key.clone());
        self.reselect(key, old.as_ref(), new.as_ref(), owner_changed);
        self.readdress(key, old.as_ref(), new.as_ref());
        let slices: Vec<ObjectKey> = self.slices_of.get(key).into_iter().flatten().cloned().collect();
        for slice in slices {
            self.derive_slice(&slice, key, pool);
        }
        self.drop_unused_area(&key.namespace);
    }

    /// Follows a change of which instances a service selects, and of what follows for these: their ports, and the
    /// policies for the service, which are those for its owner and its waypoint.
    fn reselect(
        &mut self,
        key: &ServiceKey,
        old: Option<&Definition>,
        new: Option<&Definition>,
        owner_changed: bool,
    ) {
        let indexed = |d: &Definition| (d.selector.clone(), d.ports.clone());
        let reindex = old.map(indexed) != new.map(indexed);
        if !reindex && !owner_changed && old.map(|d| &d.waypoint) == new.map(|d| &d.waypoint) {
            return;
        }
        let (old, new) = (old.and_then(|d| d.selector.as_ref()), new.and_then(|d| d.selector.as_ref()));
        if reindex {
            let area = self.area(&key.namespace);
            old.into_iter().for_each(|selector| area.remove_selector(selector, key));
            new.into_iter().for_each(|selector| area.insert_selector(selector, key));
        }
        for selector in old.into_iter().chain(new.filter(|new| old != Some(new))) {
            self.mark_selected(&key.namespace, selector);
        }
    }

    fn readdress(&mut self, key: &ServiceKey, old: Option<&Definition>, new: Option<&Definition>) {
        let vips = |d: Option<&Definition>| d.map(|d| d.service.vips.clone()).unwrap_or_default();
        let (old, new) = (vips(old), vips(new));
        for vip in old.iter().filter(|vip| !new.contains(vip)) {
            let Some(list) = self.by_vip.get_mut(vip) else { continue };
            list.retain(|other| other != key);
            self.dirty_services.extend(list.iter().cloned());
            if list.is_empty() {
                self.by_vip.remove(vip);
            }
        }
        for vip in new.iter().filter(|vip| !old.contains(vip)) {
            let list = self.by_vip.entry(vip.clone()).or_default();
            if !list.contains(key) {
                list.push(key.clone());
            }
        }
        for vip in &new {
            self.rank_holders(vip);
        }
    }

    /// Puts the services of an address in order, the one that has it first. The order must be the same on every
    /// node, whatever came first there, and nobody who may write a ServiceEntry may take a Service's address.
    fn rank_holders(&mut self, vip: &Vip) {
        let services = &self.services;
        let rank = |key: &ServiceKey| {
            let owner = services.get(key).and_then(|e| e.definitions.first());
            (owner.is_none_or(|(by, _)| by.kind != Kind::Service), key.clone())
        };
        let Some(list) = self.by_vip.get_mut(vip).filter(|list| list.len() > 1) else { return };
        list.sort_by_cached_key(rank);
        self.dirty_services.extend(list.iter().cloned());
    }

    /// Who has a virtual address that a service asks for: another service, or a pod of another namespace. What may
    /// write a ServiceEntry must not take a pod's address, by which headless services are reached.
    fn holder_of_vip(&self, key: &ServiceKey, owner: &ObjectKey, vip: &Vip) -> Option<String> {
        let service = self.by_vip.get(vip).and_then(|list| list.first()).filter(|holder| *holder != key);
        if let Some(service) = service {
            return Some(format!("the service {service}"));
        }
        if owner.kind == Kind::Service || vip.range.prefix_len() != vip.range.max_prefix_len() {
            return None;
        }
        let address = NetworkAddress::new(vip.network.clone(), vip.range.addr());
        let holders = self.by_address.holders(&address).iter().filter_map(|id| self.record(*id));
        let pods =
            holders.filter(|r| r.rank == Rank::Pod).filter_map(|r| Some(key_of(r.maker, r.workload()?)));
        let mut others = pods.filter(|pod| pod.namespace != key.namespace);
        others.next().map(|pod| pod.resource_name().to_string())
    }

    pub(super) fn compile_service(&mut self, key: &ServiceKey) {
        self.steps += 1;
        let Some(entry) = self.services.get(key) else { return };
        let Some((owner, definition)) = entry.definitions.first() else {
            if entry.emitted.is_some() {
                self.removed.push(Change::RemoveService(key.clone()));
            }
            self.services.remove(key);
            self.follow_http(key, None);
            self.follow_traffic(key, false);
            self.touch_leading_to(key);
            return;
        };
        let http = self.http_service(owner, definition);
        let mut service = definition.service.clone();
        let area = self.areas.get(&key.namespace);
        service.waypoint = self.passes(owner, definition);
        let distribution = definition.distribution.or(area.and_then(|a| a.distribution));
        (service.load_balancing.mode, service.load_balancing.scopes) =
            preference(definition.local_only, distribution);
        let mut findings: Vec<Finding> = self.binding_findings(owner, definition).into_iter().collect();
        let holder = |vip: &Vip| self.holder_of_vip(key, owner, vip);
        service.vips = service.vips.iter().filter(|vip| holder(vip).is_none()).cloned().collect();
        for vip in &definition.service.vips {
            if let Some(holder) = holder(vip) {
                let message = format!("{} is the address of {holder} already", vip.range);
                let remedy = "the other keeps it until it is gone or has another address".to_owned();
                findings.push(Finding { code: Code::AddressConflict, message, remedy });
            }
        }
        let others = entry.definitions.iter().skip(1).map(|(by, _)| {
            let message =
                format!("the host {} is defined by {} already", key.hostname, owner.resource_name());
            let remedy = "the other stays in force until it is gone".to_owned();
            (by.clone(), vec![Finding { code: Code::HostConflict, message, remedy }])
        });
        let others: Vec<_> = others.collect();
        let owner = owner.clone();
        let changed = entry.emitted.as_deref() != Some(&service);
        let source = Source::Service(key.hostname.clone());
        self.set_findings(&owner, &source, findings);
        for (by, findings) in others {
            self.set_findings(&by, &source, findings);
        }
        if changed && let Some(entry) = self.services.get_mut(key) {
            let service = Arc::new(service);
            entry.emitted = Some(service.clone());
            self.changes.push(Change::SetService(service));
            self.touch_leading_to(key);
        }
        self.follow_http(key, http);
        self.follow_traffic(key, true);
        self.note_standing(&owner);
    }
}

/// facts.md 4.7: what the presets stand for.
fn preference(
    local_only: bool,
    distribution: Option<Distribution>,
) -> (LoadBalancingMode, Box<[LocalityScope]>) {
    use LocalityScope::{Network, Node, Region, Subzone, Zone};
    match distribution {
        _ if local_only => (LoadBalancingMode::Strict, Box::new([Node])),
        Some(Distribution::SameZone) => (LoadBalancingMode::Failover, Box::new([Network, Region, Zone])),
        Some(Distribution::SameNode) => {
            (LoadBalancingMode::Failover, Box::new([Network, Region, Zone, Subzone, Node]))
        }
        Some(Distribution::Any) | None => (LoadBalancingMode::Any, Box::new([])),
    }
}
