//! The pods of this node: each is enrolled (listeners, then redirection), kept so, and let go.
//!
//! ```text
//!            netns, listeners, rules        manifest gone, or no longer in the mesh
//!   Pending ------------------------> Enrolled ------------------------------------> gone
//!      ^  | failed: say why, try again   |
//!      |  +------------------------------+ the namespace is another one, or what listens changes
//! ```
//!
//! Order matters. Listeners stand before the redirection does, so that no connection meets a closed port; on a
//! restart the redirection stands already, and refuses until the listeners are there. A pod whose listeners can't be
//! had is redirected all the same: it is closed, not open. A pod keeps what it has when something fails: neither a
//! rule nor a listener goes because of that.
//!
//! One task does all the work on pods.

mod adopted;
mod departure;
mod enrol;
mod enrolment;
mod record;
mod redirection;
mod slot;
mod work;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::{SpiffeId, Str};
use serde_json::{Value, json};
use tokio::time::Instant;

use self::departure::Leaving;
pub use self::enrolment::{Enrolment, EnrolmentChange, Place};
pub use self::record::Record;
pub use self::redirection::Redirection;
use self::redirection::Verified;
use self::slot::{PodState, Slot};
use self::work::Wanted;
pub use self::work::Work;
use crate::dns::{DnsProxy, Upstreams};
use crate::proxy::Proxy;

/// How often failed enrolments are tried again, and standing ones looked at.
pub const RECONCILE_INTERVAL: Duration = Duration::from_secs(1);

/// This node's pods.
pub struct Node {
    proxy: Arc<Proxy>,
    redirection: Redirection,
    dns: Arc<DnsProxy>,
    upstreams: Arc<Upstreams>,
    pods: Mutex<HashMap<Str, Slot>>,
    /// Pods that left the mesh and still have our redirection.
    leaving: Mutex<Vec<Leaving>>,
    started: AtomicU64,
    stopped: AtomicU64,
    /// Connections of before an enrolment wait to be judged.
    put_off: AtomicBool,
    diagnostics: Mutex<Value>,
}

impl Node {
    /// A node without pods.
    pub fn new(
        proxy: Arc<Proxy>,
        redirection: Redirection,
        dns: Arc<DnsProxy>,
        upstreams: Arc<Upstreams>,
    ) -> Self {
        Self {
            proxy,
            redirection,
            dns,
            upstreams,
            pods: Mutex::default(),
            leaving: Mutex::default(),
            started: AtomicU64::new(0),
            stopped: AtomicU64::new(0),
            put_off: AtomicBool::new(false),
            diagnostics: Mutex::new(Value::Array(Vec::new())),
        }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<Str, Slot>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<Leaving>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what has to be done, until the work is closed. `done` is called after each round.
    pub async fn run(self: Arc<Self>, work: Arc<Work>, done: impl Fn(&Self)) {
        let mut reconcile = tokio::time::interval(RECONCILE_INTERVAL);
        let mut is_first = true;
        loop {
            tokio::select! {
                todo = work.next() => {
                    let Some(todo) = todo else { return };
                    self.apply(todo.changes).await;
                    if todo.recheck {
                        self.recheck_adopted().await;
                    }
                    if std::mem::take(&mut is_first) {
                        self.release_unclaimed().await;
                    }
                }
                _ = reconcile.tick() => self.reconcile().await,
            }
            done(&self);
        }
    }

    /// Follows changes of the configuration.
    async fn apply(self: &Arc<Self>, changes: Vec<Wanted>) {
        if changes.is_empty() {
            return;
        }
        let (mut left, mut asked) = (Vec::new(), Vec::new());
        for Wanted { change, reply } in changes {
            asked.extend(reply.map(|reply| (change.key().clone(), reply)));
            match change {
                EnrolmentChange::Set(enrolment) => left.extend(self.set(*enrolment)),
                EnrolmentChange::Remove(key) => left.extend(self.pods().remove(&key)),
            }
        }
        for slot in left {
            self.un_enrol(slot).await;
        }
        self.reconcile().await;
        self.forget_certificates();
        for (key, reply) in asked {
            let outcome = match self.pods().get(&key).map(|slot| &slot.state) {
                Some(PodState::Pending { reason, .. }) => Err(reason.clone()),
                Some(PodState::Enrolled(_)) | None => Ok(()),
            };
            // Whoever asked may no longer wait.
            let _ = reply.send(outcome);
        }
    }

    /// Lets go of the certificates of pods that are no longer here.
    fn forget_certificates(&self) {
        let mesh = self.proxy.state.mesh_owned();
        let identity = |slot: &Slot| slot.enrolment.subject.source(&mesh).ok()?.identity().ok();
        let wanted: HashSet<SpiffeId> = self.pods().values().filter_map(identity).collect();
        self.proxy.tls.certificates().retain(|id| wanted.contains(id));
    }

    /// Notes what is to be. Returns what has to go first.
    fn set(&self, enrolment: Enrolment) -> Option<Slot> {
        let mut pods = self.pods();
        let now = Instant::now();
        let pending = || PodState::Pending { failures: 0, reason: "new".into(), retry_at: now };
        let Some(slot) = pods.get_mut(&enrolment.key) else {
            pods.insert(enrolment.key.clone(), Slot { enrolment, state: pending() });
            return None;
        };
        if slot.enrolment == enrolment {
            // Who asks again does not want to wait.
            if let PodState::Pending { retry_at, .. } = &mut slot.state {
                *retry_at = now;
            }
            return None;
        }
        let old = std::mem::replace(&mut slot.enrolment, enrolment);
        let new = &slot.enrolment;
        let listens_alike = old.netns == new.netns
            && old.dns_capture == new.dns_capture
            && old.addresses == new.addresses
            && old.namespace == new.namespace
            && old.subject == new.subject;
        match &mut slot.state {
            // Other rules, which replace the old ones without a gap.
            PodState::Enrolled(enrolled) if listens_alike => {
                enrolled.verify_at = now;
                None
            }
            state => Some(Slot { enrolment: old, state: std::mem::replace(state, pending()) }),
        }
    }

    /// Enrols what is not, and looks after what is.
    async fn reconcile(self: &Arc<Self>) {
        self.release_left().await;
        let now = Instant::now();
        let is_due = |slot: &&Slot| match &slot.state {
            PodState::Pending { retry_at, .. } => *retry_at <= now,
            // A pod that began anew under its name must not wait long: it is not captured yet.
            PodState::Enrolled(enrolled) => enrolled.is_due(now) || slot.is_elsewhere(),
        };
        let due: Vec<Enrolment> =
            self.pods().values().filter(is_due).map(|slot| slot.enrolment.clone()).collect();
        let mut tasks = tokio::task::JoinSet::new();
        for enrolment in due {
            let node = self.clone();
            tasks.spawn(async move { node.look_after(enrolment).await });
        }
        let mut found_connections = false;
        while let Some(found) = tasks.join_next().await {
            found_connections |= found.unwrap_or(false);
        }
        if found_connections || self.put_off.swap(false, Ordering::Relaxed) {
            // What a pod's policies refuse they refuse from its first moment in the mesh.
            self.recheck_adopted().await;
        }
    }

    /// Whether connections may have come to light that policies have not seen.
    async fn look_after(self: Arc<Self>, enrolment: Enrolment) -> bool {
        let standing = match self.pods().get(&enrolment.key) {
            Some(slot) if slot.is_elsewhere() => None,
            Some(Slot { state: PodState::Enrolled(e), .. }) => {
                Some((e.pod.clone(), e.rules.clone(), e.is_settling()))
            }
            _ => None,
        };
        if let Some((pod, installed, is_new)) = standing {
            let outcome = self.verify(&enrolment, &pod.netns, installed, is_new).await;
            let found = matches!(
                &outcome,
                Ok(Verified::Changed(..) | Verified::LookedAt(_) | Verified::Restored(..))
            );
            if let Some(slot) = self.pods().get_mut(&enrolment.key) {
                slot.verified(outcome);
            }
            return found;
        }
        let outcome = self.enrol(&enrolment).await;
        let found = outcome.is_ok();
        if let Some(slot) = self.pods().get_mut(&enrolment.key) {
            match outcome {
                Ok(enrolled) => slot.state = PodState::Enrolled(Box::new(enrolled)),
                Err(error) => slot.failed(&error),
            }
        }
        found
    }

    /// Has what redirects the enrolled pods looked at in the next round.
    pub fn verify_soon(&self) {
        let now = Instant::now();
        for slot in self.pods().values_mut() {
            if let PodState::Enrolled(enrolled) = &mut slot.state {
                enrolled.verify_at = now;
            }
        }
    }

    /// Whether all pods are enrolled; else the first that isn't, and why.
    ///
    /// # Errors
    /// Not all are.
    pub fn ready(&self) -> Result<(), String> {
        let pods = self.pods();
        let pending = pods.values().find_map(|slot| match &slot.state {
            PodState::Pending { reason, .. } => Some((&slot.enrolment, reason)),
            PodState::Enrolled(_) => None,
        });
        pending.map_or(Ok(()), |(e, reason)| Err(format!("pod {}/{}: {reason}", e.namespace, e.name)))
    }

    /// How many pods are enrolled, and how many should be and are not.
    pub fn counts(&self) -> (usize, usize) {
        let pods = self.pods();
        let enrolled = pods.values().filter(|s| matches!(s.state, PodState::Enrolled(_))).count();
        (enrolled, pods.len() - enrolled)
    }

    /// How many pods were enrolled, and un-enrolled, since the start.
    pub fn totals(&self) -> (u64, u64) {
        (self.started.load(Ordering::Relaxed), self.stopped.load(Ordering::Relaxed))
    }

    /// Connections of before the enrolment that were alive when they were last looked at.
    pub fn adopted(&self) -> usize {
        let alive = |slot: &Slot| match &slot.state {
            PodState::Enrolled(enrolled) => enrolled.adopted.len(),
            PodState::Pending { .. } => 0,
        };
        self.pods().values().map(alive).sum()
    }

    /// The diagnostics of the configuration, as the admin page shows them.
    pub fn set_diagnostics(&self, diagnostics: Value) {
        *self.diagnostics.lock().unwrap_or_else(PoisonError::into_inner) = diagnostics;
    }

    /// See [`Node::set_diagnostics`].
    pub fn diagnostics(&self) -> Value {
        self.diagnostics.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Pods that left the mesh and still have our redirection: for their open connections, and in spite of us.
    pub fn leaving_counts(&self) -> (usize, usize) {
        let leaving = self.leaving();
        let stuck = leaving.iter().filter(|leaving| leaving.trouble.is_some()).count();
        (leaving.len() - stuck, stuck)
    }

    /// Those pods as JSON.
    pub fn dump_leaving(&self) -> Value {
        let describe = |leaving: &Leaving| {
            json!({
                "pod": &*leaving.pod,
                "netns": leaving.netns.to_string(),
                "openConnections": leaving.local.as_ref().map_or(0, |local| local.open()),
                "trouble": leaving.trouble,
            })
        };
        self.leaving().iter().map(describe).collect()
    }

    /// Tells what the programs of eBPF count: a pod's namespace and name, counter, and number. Nothing with other back-ends.
    pub fn capture_counters(&self, mut each: impl FnMut(&str, &str, capture::Counter, u64)) {
        let pods: Vec<_> = {
            let pods = self.pods();
            let all = pods.values().map(|slot| &slot.enrolment);
            all.map(|e| (e.namespace.clone(), e.name.clone(), e.netns.clone())).collect()
        };
        for (namespace, name, place) in pods {
            let counters = place.open().ok().and_then(|netns| capture::counters(&netns).ok());
            for (counter, number) in counters.unwrap_or_default() {
                each(&namespace, &name, counter, number);
            }
        }
    }

    /// The capture state of each pod as JSON.
    pub fn dump(&self) -> Value {
        let pods = self.pods();
        let mut list: Vec<_> = pods.values().collect();
        list.sort_by(|a, b| a.enrolment.key.cmp(&b.enrolment.key));
        list.into_iter().map(|slot| slot.dump(self.redirection.name())).collect()
    }
}
