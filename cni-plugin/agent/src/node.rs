//! The pods of this node: put into the mesh, kept in it, and let go.
//!
//! ```text
//!            ADD: listeners, rules              label gone
//!   (new) ------------------------> Enrolled --------------> Leaving --> (gone)
//!     |                              ^    ^                   rules for what is open,
//!     | runs already, labelled now   |    | ztunnel           until it has ended
//!     v                              |    | acknowledges
//!   Waiting ------ found, served ----+    |
//!     |  ^ failed: say why, try again     |
//!     |  +--------------------------------+
//!     +---- no ztunnel, or it refuses --> Closed: rules stand, and refuse
//! ```
//!
//! Order: what is about to be done is recorded; ztunnel's listeners stand before the rules do, so that no connection
//! meets a closed port; only what is captured is annotated. A pod that can't be served by a ztunnel does not start, and
//! one that runs already is closed after a while, not open. What stands stays when something fails.
//!
//! Work on one pod is done by one task at a time; several pods are worked on at once, within a limit.

mod add;
mod devices;
mod enrol;
mod leave;
mod reconcile;
mod release;
mod restore;
mod slot;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use capture::Capture;
use serde_json::{Value, json};
use tokio::sync::{Notify, Semaphore, watch};

pub use self::add::{AddRequest, Answer, Refusal};
pub use self::release::clean_up;
use self::slot::{Slot, State};
use crate::cluster::{Api, Cluster};
use crate::metrics::Metrics;
use crate::pod::{Places, Pod};
use crate::probes::KubeletProbes;
use crate::record::Record;
use crate::zds::Ztunnels;

/// Pods that are worked on at once: programs run for each.
const AT_ONCE: u32 = 8;

/// Times, which tests shorten.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// For a ztunnel to serve a pod that starts, or that runs already and joins.
    pub served: Duration,
    /// For a pod that starts, all in all: the plugin waits longer.
    pub add: Duration,
    /// Between looks at all pods.
    pub tick: Duration,
    /// Between comparisons of a pod's rules with what they should be.
    pub verify: Duration,
    /// From the moment that a pod is said to leave until it does: for others to hear of it.
    pub leave: Duration,
    /// A pod that the API server does not name is gone after this.
    pub absent: Duration,
    /// GC does not end what is younger: the runtime's list may be older.
    pub fresh: Duration,
    /// A pod that is known for as long is not of a namespace that was labelled before it: the watch of namespaces, which
    /// the API server ends every few minutes, has said so.
    pub trust: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            served: Duration::from_secs(10),
            add: Duration::from_secs(25),
            tick: Duration::from_secs(1),
            verify: Duration::from_secs(30),
            leave: Duration::from_secs(2),
            absent: Duration::from_secs(15),
            fresh: Duration::from_secs(60),
            trust: Duration::from_secs(300),
        }
    }
}

/// What a [`Node`] works with.
pub struct Parts {
    /// Writes rules.
    pub capture: Arc<dyn Capture>,
    /// Serve pods.
    pub ztunnels: Ztunnels,
    /// Remembers them.
    pub record: Record,
    /// What is known of the cluster.
    pub cluster: Arc<Cluster>,
    /// The API server.
    pub api: Arc<dyn Api>,
    /// Who is never in the mesh.
    pub places: Places,
    /// The exemption of probes; `None` where it can't be had.
    pub probes: Option<KubeletProbes>,
    /// Counters.
    pub metrics: Metrics,
    /// `/proc` of the node.
    pub proc: PathBuf,
    /// Times.
    pub times: Times,
}

/// This node's pods.
pub struct Node {
    parts: Parts,
    slots: Mutex<HashMap<String, Arc<Slot>>>,
    /// These and those that somebody still works on, by uid: what is forgotten meanwhile, or is not among them yet. So all who
    /// work on a pod take turns.
    living: Mutex<HashMap<String, Weak<Slot>>>,
    /// The sandboxes that are being added, by id, and whether they have ended meanwhile.
    adding: Mutex<HashMap<String, Arc<watch::Sender<bool>>>>,
    /// When annotations are written again, by uid.
    annotations: Mutex<HashMap<String, reconcile::Writing>>,
    /// Excluded namespaces with labels, which users were told of.
    said_excluded: Mutex<HashSet<String>>,
    at_once: Arc<Semaphore>,
    wake: Notify,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("slots", &self.slots().len()).finish_non_exhaustive()
    }
}

impl Node {
    /// A node without pods; [`Node::restore`] comes first.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            slots: Mutex::default(),
            living: Mutex::default(),
            adding: Mutex::default(),
            annotations: Mutex::default(),
            said_excluded: Mutex::default(),
            at_once: Arc::new(Semaphore::new(AT_ONCE as usize)),
            wake: Notify::new(),
        }
    }

    /// Ends the work on pods' rules, for good: what is being written is written first. What clears them away comes after.
    pub async fn stop(&self) {
        // Whoever writes needs one of these.
        if let Ok(all) = self.at_once.acquire_many(AT_ONCE).await {
            all.forget();
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn adding(&self) -> MutexGuard<'_, HashMap<String, Arc<watch::Sender<bool>>>> {
        self.adding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_slots(&self) -> Vec<Arc<Slot>> {
        self.slots().values().cloned().collect()
    }

    fn slot(&self, uid: &str) -> Option<Arc<Slot>> {
        self.slots().get(uid).cloned()
    }

    /// A slot for a pod that has none, unless somebody still works on one: then that.
    fn new_slot(&self, pod: &Pod, state: State) -> Result<Arc<Slot>, Arc<Slot>> {
        let mut living = self.living.lock().unwrap_or_else(PoisonError::into_inner);
        living.retain(|_, slot| slot.strong_count() > 0);
        if let Some(slot) = living.get(&pod.identity.uid).and_then(Weak::upgrade) {
            return Err(slot);
        }
        let slot = Arc::new(Slot::new(pod.clone(), state));
        living.insert(slot.uid.clone(), Arc::downgrade(&slot));
        Ok(slot)
    }

    /// Whether this is what is known of its pod, and has not been let go of.
    fn is_current(&self, slot: &Arc<Slot>) -> bool {
        self.slots().get(&slot.uid).is_some_and(|current| Arc::ptr_eq(current, slot))
    }

    /// How many pods are enrolled; closed or waiting, that is, should be in the mesh and are not; and leaving.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for slot in self.all_slots() {
            match slot.state() {
                State::Waiting { .. } => counts.not_captured += 1,
                State::Closed { .. } => counts.closed += 1,
                State::Enrolled { .. } => counts.enrolled += 1,
                State::Leaving { .. } => counts.leaving += 1,
            }
        }
        counts
    }

    /// The state of each pod as JSON.
    #[must_use]
    pub fn dump(&self) -> Value {
        let mut slots = self.all_slots();
        slots.sort_by_key(|slot| slot.name());
        let pods: Vec<Value> = slots
            .iter()
            .map(|slot| {
                let unserved = self.parts.ztunnels.served(&slot.uid).err().map(|e| e.to_string());
                let netns = slot.inner().netns.clone();
                let end = netns.and_then(|netns| self.parts.capture.verdict_end(&netns));
                slot.dump(unserved, end)
            })
            .collect();
        json!({
            "capture": self.parts.capture.backend().as_str(),
            "probes": self.parts.probes.as_ref().map_or_else(|| "none".to_owned(), KubeletProbes::describe),
            "ztunnels": self.parts.ztunnels.connected(),
            "pods": pods,
        })
    }
}

/// Numbers of pods by state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Captured and acknowledged.
    pub enrolled: usize,
    /// Captured, and refused until a ztunnel serves them.
    pub closed: usize,
    /// Labelled and running, and not captured.
    pub not_captured: usize,
    /// Left the mesh, with connections that go on.
    pub leaving: usize,
}
