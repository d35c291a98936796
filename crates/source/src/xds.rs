//! The configuration of a cluster: what a control plane sends over delta ADS, or sent to the process before this one.
//!
//! ```text
//!   update --read--> changes --> the snapshot is swapped, connections are looked at again --> acknowledged
//!              |
//!              +--> what can't be read is refused by name; its last good version stays in force
//! ```
//!
//! Invariants:
//! * nothing is acknowledged before it is in force: an acknowledgement means that this node enforces it;
//! * the snapshot may be worked by only once all that is followed (policies and workloads, and what a waypoint does for
//!   services) has come whole (from the kept state, or from the control plane); settings of the mesh come before the workloads where the control plane has any;
//! * a policy that can't be read and has no last good version refuses, for as many workloads as it could concern: to
//!   leave it out could let in what it denies.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ::xds::client::{Link, Origin, Rejection, Resource, Update as Batch, Updates};
use model::{Action, Change, Mesh, Policy, PolicyKey, Rule, Scope, Settings, Workload};
use prost::Message;
use proto::wire::workload::address::Type;
use proto::wire::{culvert, security, waypoint as culvert_waypoint, workload};
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, Decoded, Decoder, Elided, MESH_SETTINGS_NAME,
    MESH_SETTINGS_TYPE_URL, REACHABLE_TYPE_URL, ResourceName, waypoint_part,
};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{Place, State, Update, waypoint};

/// Changes that are worth a look for what is no longer shared.
const SWEEP_LEAST: usize = 1000;
/// Reasons for refusals that are kept for the admin page; more are counted.
const SHOWN: usize = 100;

/// How it goes with the control plane, for metrics and the admin page.
pub struct XdsStatus {
    link: watch::Receiver<Link>,
    /// Whether all of the snapshot came from the control plane in this process's life, and nothing is left of the kept state.
    is_fresh: AtomicBool,
    is_complete: AtomicBool,
    updates: AtomicU64,
    resources: AtomicU64,
    rejected: AtomicU64,
}

impl XdsStatus {
    /// Whether a control plane is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(&*self.link.borrow(), Link::Connected { .. })
    }

    /// Whether this node works by what an earlier process kept, because no control plane is there.
    #[must_use]
    pub fn runs_from_kept_state(&self) -> bool {
        let is_fresh = self.is_fresh.load(Ordering::Relaxed) || self.is_connected();
        self.is_complete.load(Ordering::Relaxed) && !is_fresh
    }

    /// Notes what the control plane has told: with a part of a state the rest of it is still an older one.
    fn came(&self, stale: &mut Missing, type_url: &str, complete: bool) {
        if complete {
            stale.came(type_url);
        }
        self.is_fresh.store(stale.0.is_empty(), Ordering::Relaxed);
    }

    /// Updates that were put in force.
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.updates.load(Ordering::Relaxed)
    }

    /// Resources that came in them.
    #[must_use]
    pub fn resources(&self) -> u64 {
        self.resources.load(Ordering::Relaxed)
    }

    /// Resources that could not be read.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    /// As JSON, for `/config_dump`.
    #[must_use]
    pub fn dump(&self) -> Value {
        let (state, address, error) = match &*self.link.borrow() {
            Link::Starting => ("starting", None, None),
            Link::Connected { address, .. } => ("connected", Some(address.to_string()), None),
            Link::Away { error, .. } => ("away", None, Some(error.to_string())),
        };
        json!({
            "state": state,
            "address": address,
            "error": error,
            "keptState": self.runs_from_kept_state(),
            "updates": self.updates(),
            "resources": self.resources(),
            "rejected": self.rejected(),
        })
    }
}

/// A control plane that is followed.
pub struct Xds {
    updates: Updates,
    /// Where it is kept; nobody else may have it meanwhile.
    _place: Option<Place>,
    state: Arc<State>,
    status: Arc<XdsStatus>,
    decoder: Decoder,
    /// Resources that were read or removed since what the decoder shares was last looked through.
    unswept: usize,
    /// What holds where the control plane says nothing of the mesh's settings.
    defaults: Settings,
    missing: Missing,
    /// The same, of the control plane in this process's life.
    stale: Missing,
    /// The update that is being put in force, and what of it is refused.
    open: Option<(Batch, Vec<Rejection>)>,
    /// Resources whose last version could not be read, and why.
    unread: BTreeMap<Arc<str>, String>,
}

/// Which types have yet to come whole: all that are followed but for the mesh's settings, which an istiod does not have.
struct Missing(Vec<&'static str>);

impl Missing {
    fn of(types: &[&'static str]) -> Self {
        Self(types.iter().copied().filter(|t| *t != MESH_SETTINGS_TYPE_URL).collect())
    }

    fn came(&mut self, type_url: &str) {
        self.0.retain(|missing| *missing != type_url);
    }
}

impl Xds {
    /// Follows `updates` of these types, which are kept in `place`. `state` is the snapshot that they are put into; `defaults` hold until settings arrive.
    pub(crate) fn new(
        updates: Updates,
        types: &[&'static str],
        place: Option<Place>,
        link: watch::Receiver<Link>,
        state: Arc<State>,
        defaults: Settings,
        elided: Elided,
    ) -> Self {
        let status = XdsStatus {
            link,
            is_fresh: AtomicBool::new(false),
            is_complete: AtomicBool::new(false),
            updates: AtomicU64::new(0),
            resources: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
        };
        Self {
            updates,
            _place: place,
            state,
            status: Arc::new(status),
            decoder: Decoder::new(elided),
            unswept: 0,
            defaults,
            missing: Missing::of(types),
            stale: Missing::of(types),
            open: None,
            unread: BTreeMap::new(),
        }
    }

    /// How it goes.
    #[must_use]
    pub fn status(&self) -> Arc<XdsStatus> {
        self.status.clone()
    }

    /// The next update, read; `None` when the client has ended.
    pub async fn next(&mut self) -> Option<Update> {
        let mut batch = self.updates.next().await?;
        let mesh = self.state.mesh_owned();
        let mut reading = Reading {
            decoder: &mut self.decoder,
            mesh: &mesh,
            changes: Vec::new(),
            rejections: Vec::new(),
            // What is in force of policies and settings must not be older after a crash of the node.
            must_last: ![ADDRESS_TYPE_URL, REACHABLE_TYPE_URL].contains(&batch.type_url),
        };
        // What is removed and set in one update is there, as the client and what it keeps on disk have it.
        for name in &batch.removed {
            reading.removed(batch.type_url, name, &self.defaults);
        }
        for resource in &batch.resources {
            reading.resource(batch.type_url, resource);
        }
        let Reading { changes, rejections, must_last, .. } = reading;
        if must_last {
            batch.must_last();
        }
        self.note(&batch, &rejections);
        if batch.complete {
            self.missing.came(batch.type_url);
        }
        self.open = Some((batch, rejections));
        Some(Update { changes, enrolments: Vec::new(), complete: self.missing.0.is_empty() })
    }

    /// The last update is in force: says so to the control plane, or what of it is not.
    pub fn applied(&mut self) {
        let Some((batch, rejections)) = self.open.take() else { return };
        self.unswept += batch.resources.len() + batch.removed.len();
        // It looks through all that is shared: as often as a good part of it may have gone.
        if self.unswept > SWEEP_LEAST.max(self.state.mesh().workload_count() / 4) {
            self.decoder.sweep();
            self.unswept = 0;
        }
        self.status.updates.fetch_add(1, Ordering::Relaxed);
        let is_complete = self.missing.0.is_empty();
        let began = is_complete && !self.status.is_complete.swap(is_complete, Ordering::Relaxed);
        let is_of_server = matches!(batch.origin, Origin::Server);
        if is_of_server {
            self.status.came(&mut self.stale, batch.type_url, batch.complete);
        }
        if began && !is_of_server {
            tracing::warn!(
                "the configuration that an earlier process kept is in force until the control plane is there"
            );
        }
        if rejections.is_empty() {
            batch.ack();
        } else {
            batch.nack(rejections);
        }
    }

    /// Counts, and logs what can't be read.
    fn note(&mut self, batch: &Batch, rejections: &[Rejection]) {
        self.status.resources.fetch_add(batch.resources.len() as u64, Ordering::Relaxed);
        self.status.rejected.fetch_add(rejections.len() as u64, Ordering::Relaxed);
        if !self.unread.is_empty() {
            let gone =
                batch.resources.iter().map(|r| &*r.name).chain(batch.removed.iter().map(String::as_str));
            gone.for_each(|name| drop(self.unread.remove(name)));
        }
        for Rejection { name, reason } in rejections {
            tracing::error!(resource = %name, r#type = batch.type_url, %reason, "refused; what was in force of it stays");
            if self.unread.len() < SHOWN {
                self.unread.insert(name.clone(), reason.clone());
            }
        }
    }

    /// What could not be read, and is not in force.
    #[must_use]
    pub fn diagnostics(&self) -> Value {
        let one = |(name, reason): (&Arc<str>, &String)| json!({ "severity": "error", "code": "refused-resource", "resource": **name, "message": reason });
        self.unread.iter().map(one).collect()
    }
}

/// An update that is being read.
struct Reading<'a> {
    decoder: &'a mut Decoder,
    mesh: &'a Mesh,
    changes: Vec<Change>,
    rejections: Vec<Rejection>,
    /// Whether it has to be on the disk before it is acknowledged.
    must_last: bool,
}

impl Reading<'_> {
    fn resource(&mut self, type_url: &str, resource: &Resource) {
        let read = match type_url {
            AUTHORIZATION_TYPE_URL => self.policy(resource),
            ADDRESS_TYPE_URL => self.address(resource),
            REACHABLE_TYPE_URL => self.reachable(resource),
            MESH_SETTINGS_TYPE_URL => self.settings(resource),
            other => self.of_waypoints(other, resource),
        };
        if let Err(reason) = read {
            self.rejections.push(Rejection { name: resource.name.clone(), reason });
        }
    }

    fn of_waypoints(&mut self, type_url: &str, resource: &Resource) -> Result<(), String> {
        let read = waypoint::read(self.decoder, self.mesh, type_url, resource);
        let read = read.ok_or_else(|| format!("the type {type_url} was not asked for"))?;
        self.changes.extend(read.change);
        read.refusal.map_or(Ok(()), Err)
    }

    fn address(&mut self, resource: &Resource) -> Result<(), String> {
        let message: workload::Address = message(resource)?;
        match self.decoder.address(&message).map_err(|e| e.to_string())? {
            Decoded::Workload(mut workload) => {
                named(resource, &workload.uid)?;
                // One text for all who have it, the client's table of what is held among them.
                workload.uid = resource.name.clone();
                self.workload(workload);
            }
            Decoded::Service(service) => {
                named(resource, &service.key().to_string())?;
                self.changes.push(Change::SetService(Arc::new(service)));
            }
        }
        Ok(())
    }

    /// A workload that a waypoint is sent under a name of its own.
    fn reachable(&mut self, resource: &Resource) -> Result<(), String> {
        let workload = message::<culvert_waypoint::Reachable>(resource)?.workload.map(Type::Workload);
        match self.decoder.address(&workload::Address { r#type: workload }).map_err(|e| e.to_string())? {
            Decoded::Workload(workload) => {
                if waypoint_part(&resource.name) != Some(&*workload.uid) {
                    return Err(format!("it holds {:?}, and is named {:?}", workload.uid, resource.name));
                }
                self.workload(workload);
                Ok(())
            }
            Decoded::Service(_) => Err("it is no workload".to_owned()),
        }
    }

    fn workload(&mut self, mut workload: Workload) {
        let old = self.mesh.workload(&workload.uid);
        workload.uid = old.map_or(&workload.uid, |old| &old.uid).clone();
        // By its list a policy is enforced.
        self.must_last |= *workload.policies != *old.map_or(&[][..], |old| &old.policies);
        self.changes.push(Change::SetWorkload(Arc::new(workload)));
    }

    fn policy(&mut self, resource: &Resource) -> Result<(), String> {
        let message = message::<security::Authorization>(resource);
        let read = message.as_ref().map_err(Clone::clone).and_then(|message| {
            let policy = self.decoder.policy(message).map_err(|e| e.to_string())?;
            named(resource, &policy.key.to_string())?;
            Ok(policy)
        });
        match read {
            Ok(policy) => {
                self.changes.push(Change::SetPolicy(Arc::new(policy)));
                Ok(())
            }
            Err(reason) => {
                let key = policy_key(&resource.name).ok_or_else(|| reason.clone())?;
                if self.mesh.policy(&key).is_some() {
                    return Err(reason);
                }
                let Some(instead) = closed(key, message.ok().as_ref(), self.mesh) else { return Err(reason) };
                self.changes.push(Change::SetPolicy(Arc::new(instead)));
                Err(format!(
                    "{reason}. Until it can be read, connections to what it could concern are refused"
                ))
            }
        }
    }

    fn settings(&mut self, resource: &Resource) -> Result<(), String> {
        named(resource, MESH_SETTINGS_NAME)?;
        let message: culvert::MeshSettings = message(resource)?;
        let settings = self.decoder.settings(&message).map_err(|e| e.to_string())?;
        if *self.mesh.settings() != settings {
            self.changes.push(Change::SetSettings(settings.into()));
        }
        Ok(())
    }

    fn removed(&mut self, type_url: &str, name: &str, defaults: &Settings) {
        match type_url {
            AUTHORIZATION_TYPE_URL => {
                self.changes.extend(policy_key(name).map(Change::RemovePolicy));
            }
            ADDRESS_TYPE_URL => {
                match ResourceName::parse(name) {
                    ResourceName::Service(key) if self.mesh.service(&key).is_some() => {
                        self.changes.push(Change::RemoveService(key));
                    }
                    ResourceName::Wildcard => {}
                    // Whatever form a uid has.
                    _ => self.changes.push(Change::RemoveWorkload(name.into())),
                }
            }
            REACHABLE_TYPE_URL => {
                self.changes.extend(waypoint_part(name).map(|uid| Change::RemoveWorkload(uid.into())));
            }
            MESH_SETTINGS_TYPE_URL if name == MESH_SETTINGS_NAME => {
                self.changes.push(Change::SetSettings(defaults.clone().into()));
            }
            other => self.changes.extend(waypoint::removed(other, name)),
        }
    }
}

fn message<M: Message + Default>(resource: &Resource) -> Result<M, String> {
    M::decode(resource.body.clone()).map_err(|error| format!("its bytes can't be read: {error}"))
}

/// What is removed later is removed by the resource's name, so that must be the object's.
fn named(resource: &Resource, name: &str) -> Result<(), String> {
    if *resource.name == *name {
        return Ok(());
    }
    Err(format!("it holds {name:?}, and is named {:?}", resource.name))
}

fn policy_key(name: &str) -> Option<PolicyKey> {
    let (namespace, name) = name.split_once('/')?;
    Some(PolicyKey { namespace: namespace.into(), name: name.into() })
}

/// What stands for a policy that can't be read: it lets in no more than that one could. `None` where its absence does the
/// same: a workload that lists a policy which is not known refuses.
fn closed(key: PolicyKey, message: Option<&security::Authorization>, mesh: &Mesh) -> Option<Policy> {
    let known = message.and_then(|m| Some((m, security::Scope::try_from(m.scope).ok()?)));
    let scope = match known {
        Some((message, _)) if message.dry_run => return None,
        Some((_, security::Scope::WorkloadSelector)) => return None,
        Some((_, security::Scope::Global)) => Scope::Global,
        Some((_, security::Scope::Namespace)) => Scope::Namespace,
        None if key.namespace == mesh.settings().root_namespace => Scope::Global,
        None => Scope::Namespace,
    };
    let allows = known.is_some_and(|(m, _)| m.action == i32::from(security::Action::Allow));
    // An ALLOW policy without rules matches nothing, so that what no other one allows is refused.
    let (action, rules) =
        if allows { (Action::Allow, Box::default()) } else { (Action::Deny, [Rule::default()].into()) };
    Some(Policy { key, scope, action, rules, dry_run: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_kept_until_all_of_it_has_come_anew() {
        let link = watch::Sender::new(Link::Starting);
        let status = XdsStatus {
            link: link.subscribe(),
            is_fresh: AtomicBool::new(false),
            is_complete: AtomicBool::new(true),
            updates: AtomicU64::new(0),
            resources: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
        };
        let mut stale = Missing::of(&crate::NODE_TYPES);
        for (type_url, complete) in
            [(AUTHORIZATION_TYPE_URL, false), (AUTHORIZATION_TYPE_URL, true), (ADDRESS_TYPE_URL, false)]
        {
            status.came(&mut stale, type_url, complete);
            assert!(status.runs_from_kept_state(), "{type_url}, {complete}");
        }
        status.came(&mut stale, ADDRESS_TYPE_URL, true);
        assert!(!status.runs_from_kept_state());
        status.came(&mut stale, ADDRESS_TYPE_URL, false);
        assert!(!status.runs_from_kept_state(), "what comes now changes a state of this process's life");
    }
}
