//! An instance in the compiler's table: small, since there is one for each workload of the mesh.

use std::ops::Deref;
use std::sync::Arc;

use hashbrown::HashSet;
use model::{NetworkAddress, NetworkMode, PolicyKey, ServiceKey, ServiceMembership, Str, Workload};

use super::halves::Counted;
use super::instance::{Instance, Membership, Names, Rank};
use super::{Capture, Enrolment};
use crate::labels::Labels;
use crate::resource::Kind;

/// An instance in the compiler's table. The fields of its [`Nature`] are read as if they were its own.
pub(super) struct Record {
    /// What the resource says, until it is compiled; then what it was compiled to.
    workload: Option<Arc<Workload>>,
    is_draft: bool,
    arrival: Arrival,
    nature: Arc<Nature>,
    rare: Option<Box<Rare>>,
    /// Whether the model has it.
    pub(super) emitted: bool,
    pub(super) dirty: bool,
}

/// A number of 40 bits: a hundred a second for three hundred years.
#[derive(Clone, Copy, Default)]
struct Arrival([u8; 5]);

/// What an instance has in common with others, most often with all of its application.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Nature {
    pub(super) labels: Labels,
    pub(super) ports: Arc<[(Str, u16)]>,
    pub(super) names: Names,
    pub(super) rank: Rank,
    /// The kind of the resource that made it, whose name the workload has.
    pub(super) maker: Kind,
    pub(super) membership: Membership,
    pub(super) fixed_locality: bool,
    pub(super) services: Box<[ServiceMembership]>,
    /// Its services behind waypoints, and which policies select it, as far as that was counted.
    pub(super) selection: Option<Counted>,
}

/// What few instances have.
#[derive(Default)]
struct Rare {
    capture: Option<Box<Capture>>,
    enrolment: Option<Box<Enrolment>>,
    authenticated: Box<[(ServiceKey, PolicyKey)]>,
    /// What it was compiled to before there was the draft.
    compiled: Option<Arc<Workload>>,
    displaced: bool,
}

impl Rare {
    fn is_empty(&self) -> bool {
        self.capture.is_none()
            && self.enrolment.is_none()
            && self.authenticated.is_empty()
            && self.compiled.is_none()
            && !self.displaced
    }
}

impl Deref for Record {
    type Target = Nature;

    fn deref(&self) -> &Nature {
        &self.nature
    }
}

impl Record {
    /// An instance that was set, in the place of `old`.
    pub(super) fn new(maker: Kind, instance: Instance, old: Option<Self>, natures: &mut Natures) -> Self {
        let nature = natures.share(Nature {
            labels: instance.labels,
            ports: instance.ports,
            names: instance.names,
            rank: instance.rank,
            maker,
            membership: instance.membership,
            fixed_locality: instance.fixed_locality,
            services: instance.services,
            selection: old.as_ref().and_then(|old| old.selection.clone()),
        });
        let draft = Some(Arc::new(instance.workload));
        let mut record = match old {
            Some(mut old) => {
                let compiled = old.compiled().cloned();
                if compiled.is_some() {
                    old.change_rare(|rare| rare.compiled = compiled);
                }
                Self { workload: draft, is_draft: true, nature, ..old }
            }
            None => Self {
                workload: draft,
                is_draft: true,
                arrival: Arrival::default(),
                nature,
                rare: None,
                emitted: false,
                dirty: false,
            },
        };
        if instance.capture.is_some() || record.rare.is_some() {
            record.change_rare(|rare| rare.capture = instance.capture);
        }
        record
    }

    /// What is known of the workload: as the resource says, or as it was compiled.
    pub(super) fn workload(&self) -> Option<&Workload> {
        self.workload.as_deref()
    }

    /// What it was compiled to.
    pub(super) fn compiled(&self) -> Option<&Arc<Workload>> {
        if self.is_draft { self.rare.as_ref()?.compiled.as_ref() } else { self.workload.as_ref() }
    }

    /// What the resource says, if it is not compiled. What it was compiled to before is in its place then.
    pub(super) fn take_draft(&mut self) -> Option<Arc<Workload>> {
        if !std::mem::take(&mut self.is_draft) {
            return None;
        }
        let compiled = self.rare.is_some().then(|| self.change_rare(|rare| rare.compiled.take())).flatten();
        std::mem::replace(&mut self.workload, compiled)
    }

    /// It was compiled to this, of which there is no draft. Gives what it was compiled to before.
    pub(super) fn set_compiled(&mut self, workload: Arc<Workload>) -> Option<Arc<Workload>> {
        self.workload.replace(workload)
    }

    /// Its place among those that have an address too, of its rank.
    pub(super) fn arrival(&self) -> u64 {
        let [a, b, c, d, e] = self.arrival.0;
        u64::from_be_bytes([0, 0, 0, a, b, c, d, e])
    }

    /// Sets [`Record::arrival`].
    pub(super) fn set_arrival(&mut self, arrival: u64) {
        let [_, _, _, a, b, c, d, e] = arrival.to_be_bytes();
        self.arrival = Arrival([a, b, c, d, e]);
    }

    /// Whether another that is in force has one of its addresses.
    pub(super) fn displaced(&self) -> bool {
        self.rare.as_ref().is_some_and(|rare| rare.displaced)
    }

    /// Sets [`Record::displaced`]; gives what it was.
    pub(super) fn set_displaced(&mut self, displaced: bool) -> bool {
        if self.displaced() == displaced {
            return displaced;
        }
        self.change_rare(|rare| rare.displaced = displaced);
        !displaced
    }

    /// The addresses that it is found by: a node's are not its own.
    pub(super) fn addresses(&self) -> Vec<NetworkAddress> {
        match self.workload() {
            Some(w) if w.network_mode == NetworkMode::Standard => w.network_addresses().collect(),
            _ => Vec::new(),
        }
    }

    /// Sets what was counted; gives what it was.
    pub(super) fn set_selection(&mut self, next: Option<Counted>, natures: &mut Natures) -> Option<Counted> {
        let old = self.nature.selection.clone();
        self.nature = natures.share(Nature { selection: next, ..Nature::clone(&self.nature) });
        old
    }

    /// How a pod's traffic is captured.
    pub(super) fn capture(&self) -> Option<&Capture> {
        self.rare.as_ref()?.capture.as_deref()
    }

    /// What the node's capture was told of it.
    pub(super) fn enrolment(&self) -> Option<&Enrolment> {
        self.rare.as_ref()?.enrolment.as_deref()
    }

    /// Sets [`Record::enrolment`].
    pub(super) fn set_enrolment(&mut self, enrolment: Option<Box<Enrolment>>) {
        self.change_rare(|rare| rare.enrolment = enrolment);
    }

    /// The RequestAuthentications that were counted for its services.
    pub(super) fn authenticated(&self) -> &[(ServiceKey, PolicyKey)] {
        self.rare.as_ref().map_or(&[], |rare| &rare.authenticated)
    }

    /// Sets [`Record::authenticated`]; gives what it was.
    pub(super) fn set_authenticated(
        &mut self,
        pairs: Box<[(ServiceKey, PolicyKey)]>,
    ) -> Box<[(ServiceKey, PolicyKey)]> {
        self.change_rare(|rare| std::mem::replace(&mut rare.authenticated, pairs))
    }

    fn change_rare<T>(&mut self, change: impl FnOnce(&mut Rare) -> T) -> T {
        let rare = self.rare.get_or_insert_default();
        let result = change(rare);
        self.rare.take_if(|rare| rare.is_empty());
        result
    }
}

/// Makes equal natures one.
#[derive(Default)]
pub(super) struct Natures {
    known: HashSet<Arc<Nature>>,
    swept_at: usize,
}

impl Natures {
    fn share(&mut self, nature: Nature) -> Arc<Nature> {
        if let Some(known) = self.known.get(&nature) {
            return known.clone();
        }
        let shared = Arc::new(nature);
        self.known.insert(shared.clone());
        shared
    }

    /// Drops what nothing else uses. Costs what there is, so it does its work only when that has doubled since the last
    /// time.
    pub(super) fn sweep(&mut self) {
        if self.known.len() >= self.swept_at.saturating_mul(2).max(1024) {
            self.known.retain(|nature| Arc::strong_count(nature) > 1);
            self.swept_at = self.known.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_takes_little() {
        assert!(size_of::<Option<Record>>() <= 32, "{}", size_of::<Option<Record>>());
    }
}
