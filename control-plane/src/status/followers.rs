//! The objects whose status is written, as they stand: filled by who commits, read by who counts.
//!
//! Each change of an object has a number of its own, so that who has seen all up to one asks for what came after. A policy
//! also has the generation of the proxies' resources that it is in since its last change; it may change without a new
//! version of its own, by other objects or the mesh's settings.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use config::policy::mode::CONVERTED;
use config::resource::Kind;
use model::{Change, PolicyKey};
use tokio::sync::watch;
use tokio::time::Instant;
use xds::server::{Generation, Server};

use super::proxies::Proxies;
use super::{PolicyAnswer, is_policy};
use crate::push::Enforcers;
use crate::registry::{ObjectName, ObjectState, Report};

/// How many removals are remembered for who asks what came after a change.
const MOST_GONE: usize = 10_000;

/// An object as it is followed.
#[derive(Clone, Debug)]
pub struct Followed {
    /// The object.
    pub state: ObjectState,
    /// A proxy that has answered for this generation has it.
    pub generation: Generation,
    /// When this version of it came.
    pub since: Instant,
    number: u64,
}

/// All of them. The lock of [`Followers`] is around it.
#[derive(Default)]
pub struct Table {
    objects: HashMap<ObjectName, Followed>,
    /// Policies by generation.
    generations: BTreeMap<Generation, BTreeSet<ObjectName>>,
    /// The last change of each object, also of some that are gone.
    numbers: BTreeMap<u64, ObjectName>,
    gone: HashMap<ObjectName, u64>,
    /// Removals up to this number may be forgotten.
    forgotten: u64,
    last: u64,
    root_namespace: Arc<str>,
    /// Policies that node proxies have, and those that waypoints have.
    at_nodes: HashSet<ObjectName>,
    at_waypoints: HashSet<ObjectName>,
    /// Which waypoints have which of these.
    enforcers: Enforcers,
}

/// The objects that are followed. Cloning shares them.
#[derive(Clone)]
pub struct Followers {
    table: Arc<Mutex<Table>>,
    changed: watch::Sender<u64>,
    /// Which process's numbers these are.
    epoch: u64,
}

impl Default for Followers {
    fn default() -> Self {
        let epoch = std::hash::RandomState::new().build_hasher().finish();
        Self { table: Arc::default(), changed: watch::Sender::new(0), epoch }
    }
}

impl std::fmt::Debug for Followers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Followers").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl Followers {
    /// The table, locked: commits wait for it.
    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which process's numbers these are; another for each.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Tells which waypoints enforce which policies.
    #[must_use]
    pub fn enforced_by(self, enforcers: &Enforcers) -> Self {
        self.lock().enforcers = enforcers.clone();
        self
    }

    /// Changes whenever something is taken.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Takes what a commit came to, and the generation in which proxies are told.
    pub fn take(&self, reports: Vec<Report>, changes: &[Change], generation: Generation) {
        let before;
        let after = {
            let mut table = self.lock();
            before = table.last;
            reports.into_iter().for_each(|report| table.report(report, generation));
            changes.iter().for_each(|change| table.change(change, generation));
            table.last
        };
        if after > before {
            self.changed.send_replace(after);
        }
    }

    /// How the proxies of `server` stand with each policy, by its name.
    #[must_use]
    pub fn local(&self, server: &Server) -> BTreeMap<String, PolicyAnswer> {
        let proxies = Proxies::of(server);
        let table = self.lock();
        let policies = table.objects.iter().filter(|(name, _)| is_policy(name.kind));
        let answer = |(name, followed): (&ObjectName, &Followed)| {
            let answer = PolicyAnswer {
                uid: followed.state.version.uid.to_string(),
                generation: followed.state.version.generation,
                tally: proxies.tally(name, followed, &table),
            };
            (name.to_string(), answer)
        };
        policies.map(answer).collect()
    }
}

impl Table {
    /// An object.
    pub(super) fn get(&self, name: &ObjectName) -> Option<&Followed> {
        self.objects.get(name)
    }

    /// All objects.
    pub(super) fn names(&self) -> impl Iterator<Item = &ObjectName> {
        self.objects.keys()
    }

    /// The number of the last change.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// Whether all removals after a change are known.
    pub(super) fn reaches(&self, number: u64) -> bool {
        number >= self.forgotten && number <= self.last
    }

    /// What changed after one change up to another; `None` for what is gone.
    pub(super) fn between(
        &self,
        after: u64,
        to: u64,
    ) -> impl Iterator<Item = (&ObjectName, Option<&Followed>)> {
        let range = (after < to).then(|| self.numbers.range(after + 1..=to));
        range.into_iter().flatten().map(|(_, name)| (name, self.objects.get(name)))
    }

    /// The policies that changed after a generation; all for `None`.
    pub(super) fn newer(&self, than: Option<Generation>) -> impl Iterator<Item = &ObjectName> {
        let from = than.map_or(Generation(0), |generation| Generation(generation.0.saturating_add(1)));
        self.generations.range(from..).flat_map(|(_, names)| names)
    }

    /// Whether node proxies enforce a policy: all but what only requests can be held against.
    pub(super) fn is_at_nodes(&self, policy: &ObjectName) -> bool {
        self.at_nodes.contains(policy) || !self.at_waypoints.contains(policy)
    }

    /// The policies that are not enforced by all node proxies and by these alone.
    pub(super) fn at_waypoints(&self) -> impl Iterator<Item = &ObjectName> {
        let all = self.at_waypoints.iter();
        all.filter(|name| !self.is_at_nodes(name) || !self.enforcers.of(&resource_of(name)).is_empty())
    }

    /// The waypoints that are to enforce a policy, `NAMESPACE/NAME`.
    pub(super) fn waypoints_of(&self, policy: &ObjectName) -> BTreeSet<Arc<str>> {
        if !self.at_waypoints.contains(policy) {
            return BTreeSet::new();
        }
        self.enforcers.of(&resource_of(policy))
    }

    /// The namespace whose policies hold for the whole mesh.
    pub(super) fn root_namespace(&self) -> &str {
        &self.root_namespace
    }

    fn report(&mut self, Report { name, state }: Report, generation: Generation) {
        let old = self.remove(&name);
        match state {
            None => self.bury(name),
            Some(state) => {
                let now = Instant::now();
                // Of the same version only what is said is new: proxies have it since then.
                let same = old.filter(|old| old.state.version == state.version);
                let (generation, since) = same.map_or((generation, now), |old| (old.generation, old.since));
                self.insert(name, Followed { state, generation, since, number: 0 });
            }
        }
    }

    fn change(&mut self, change: &Change, generation: Generation) {
        let name = match change {
            Change::SetPolicy(policy) => noted(&mut self.at_nodes, object_of(&policy.key)),
            Change::SetHttpPolicy(policy) => noted(&mut self.at_waypoints, object_of(&policy.key)),
            Change::RemovePolicy(key) => forgotten(&mut self.at_nodes, object_of(key)),
            Change::RemoveHttpPolicy(key) => forgotten(&mut self.at_waypoints, object_of(key)),
            Change::SetSettings(settings) => {
                self.root_namespace = settings.root_namespace.clone();
                return;
            }
            _ => return,
        };
        if let Some(followed) = self.remove(&name) {
            self.insert(name, Followed { generation: followed.generation.max(generation), ..followed });
        }
    }

    fn insert(&mut self, name: ObjectName, mut followed: Followed) {
        self.last += 1;
        followed.number = self.last;
        if let Some(number) = self.gone.remove(&name) {
            self.numbers.remove(&number);
        }
        self.numbers.insert(self.last, name.clone());
        if is_policy(name.kind) {
            self.generations.entry(followed.generation).or_default().insert(name.clone());
        }
        self.objects.insert(name, followed);
    }

    fn remove(&mut self, name: &ObjectName) -> Option<Followed> {
        let followed = self.objects.remove(name)?;
        self.numbers.remove(&followed.number);
        if let Some(names) = self.generations.get_mut(&followed.generation) {
            names.remove(name);
            if names.is_empty() {
                self.generations.remove(&followed.generation);
            }
        }
        Some(followed)
    }

    /// Remembers that an object is gone, for a while.
    fn bury(&mut self, name: ObjectName) {
        self.last += 1;
        self.numbers.insert(self.last, name.clone());
        if let Some(number) = self.gone.insert(name, self.last) {
            self.numbers.remove(&number);
        }
        if self.gone.len() > MOST_GONE {
            // All at once, so that this costs little for each.
            self.forgotten = self.last;
            for (_, number) in self.gone.drain() {
                self.numbers.remove(&number);
            }
        }
    }
}

fn noted(set: &mut HashSet<ObjectName>, name: ObjectName) -> ObjectName {
    set.insert(name.clone());
    name
}

fn forgotten(set: &mut HashSet<ObjectName>, name: ObjectName) -> ObjectName {
    set.remove(&name);
    name
}

/// The name of the resource that proxies know a policy by.
#[must_use]
pub(super) fn resource_of(policy: &ObjectName) -> String {
    let converted = if policy.kind == Kind::PeerAuthentication { CONVERTED } else { "" };
    format!("{}/{converted}{}", policy.namespace, policy.name)
}

/// The policy that a resource is of.
fn object_of(key: &PolicyKey) -> ObjectName {
    let converted = key.name.strip_prefix(CONVERTED);
    let kind = if converted.is_some() { Kind::PeerAuthentication } else { Kind::AuthorizationPolicy };
    let name = converted.map_or_else(|| key.name.clone(), Arc::from);
    ObjectName { kind, namespace: key.namespace.clone(), name }
}

/// The policy that a resource of this name is of.
pub(super) fn object_of_resource(name: &str) -> Option<ObjectName> {
    let (namespace, name) = name.split_once('/')?;
    Some(object_of(&PolicyKey { namespace: namespace.into(), name: name.into() }))
}
