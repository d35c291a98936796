//! Pods that end: DEL, GC, and the end of the agent itself.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use capture::Capture;
use net::Netns;
use tokio::time::Instant;

use super::Node;
use super::add::AddRequest;
use super::slot::{Slot, State};
use crate::cluster::Api;
use crate::netns::Processes;
use crate::record::{Entry, Record};

impl Node {
    /// Lets go of a pod whose sandbox ends. Its rules go with its network namespace. Twice is as good as once.
    pub fn del(&self, request: &AddRequest) {
        if let Some(is_ended) = self.adding().get(&request.container_id) {
            // By who adds it.
            is_ended.send_replace(true);
        }
        let netns =
            (!request.netns.is_empty()).then(|| Netns::open(Path::new(&request.netns)).ok()).flatten();
        let is_meant = |slot: &&Arc<Slot>| {
            let inner = slot.inner();
            match (&inner.container, &inner.netns, &netns) {
                // The pod may have another sandbox by now.
                (Some(container), ..) => *container == request.container_id,
                (None, Some(ours), Some(its)) => ours.same(its),
                // Without a namespace it may be of an earlier sandbox of the pod. If not, the API server says when the pod ends.
                (None, Some(_), None) => false,
                (None, None, _) => inner.pod.node_uid() == request.pod_uid,
            }
        };
        if let Some(slot) = self.all_slots().iter().find(is_meant) {
            self.forget(slot, "its sandbox ends");
            self.wake.notify_one();
        }
    }

    /// Lets go of pods whose sandboxes are none of these. Not of one that was added a moment ago: the list was made before.
    pub fn gc(&self, valid: &HashSet<String>) -> usize {
        let now = Instant::now();
        let is_gone = |slot: &&Arc<Slot>| {
            let inner = slot.inner();
            let is_fresh = inner.added.is_some_and(|at| now.duration_since(at) < self.parts.times.fresh);
            !is_fresh && inner.container.as_ref().is_some_and(|id| !valid.contains(id))
        };
        let slots = self.all_slots();
        let gone: Vec<_> = slots.iter().filter(is_gone).collect();
        for slot in &gone {
            self.forget(slot, "the container runtime has no such sandbox");
        }
        gone.len()
    }

    /// Takes out of the mesh a pod that could not be looked at, or not be captured: what stands of rules, which the record
    /// says, goes before it does. The caller holds the slot's work.
    pub(super) async fn let_out(&self, slot: &Arc<Slot>) {
        // It may have been captured since that was seen.
        if !matches!(slot.state(), State::Waiting { .. }) {
            return;
        }
        if let Some(entry) = self.parts.record.get(&slot.uid) {
            let permit = self.at_once.acquire().await;
            let capture = self.parts.capture.clone();
            let removal = tokio::task::spawn_blocking(move || remove_rules(&*capture, &entry));
            let removed = removal.await.map_err(|error| error.to_string()).flatten();
            drop(permit);
            if let Err(error) = removed {
                let note = format!("the pod's traffic should no longer be captured and still is: {error}");
                self.tell(slot, "EnrolmentStuck", note.clone(), true).await;
                let mut inner = slot.inner();
                if let State::Waiting { failures, .. } = inner.state {
                    inner.state = State::failed(failures + 1, note, self.parts.times.tick);
                }
                return;
            }
        }
        self.forget(slot, "it is not to be in the mesh any more");
    }

    /// Has no ztunnel serve the pod any more, and forgets it. What stands of its rules refuses.
    pub(super) fn forget(&self, slot: &Arc<Slot>, why: &str) {
        if !self.is_current(slot) {
            return;
        }
        self.slots().remove(&slot.uid);
        self.parts.ztunnels.withdraw(&slot.uid);
        self.parts.record.remove(&slot.uid);
        self.parts.metrics.event("delete");
        tracing::info!(pod = slot.name(), uid = slot.uid, why, "let go of the pod");
    }
}

/// Removes the redirection of all recorded pods: they are outside the mesh from then on. No agent may be running. Returns
/// how many could not be released.
pub async fn clean_up(record: &Record, capture: Arc<dyn Capture>, api: Option<&impl Api>) -> usize {
    let mut left = 0;
    for entry in record.entries() {
        let name = format!("{}/{}", entry.namespace, entry.name);
        let (capture, searched) = (capture.clone(), entry.clone());
        let removal = tokio::task::spawn_blocking(move || remove_rules(&*capture, &searched));
        match removal.await.map_err(|error| error.to_string()).flatten() {
            Ok(()) => {
                record.remove(&entry.uid);
                tracing::info!(pod = name, "the pod is outside the mesh");
            }
            Err(error) => {
                left += 1;
                tracing::error!(pod = name, error, "the pod's redirection stays, and refuses its traffic");
            }
        }
        if let Some(api) = api
            && let Err(error) = api.annotate(&entry.identity(), None).await
        {
            tracing::warn!(pod = name, %error, "the pod's annotation stays");
        }
    }
    // Of pods that have ended while no agent ran: nobody comes after this one.
    let swept = tokio::task::spawn_blocking(move || capture.sweep()).await.unwrap_or_default();
    if swept > 0 {
        tracing::info!(pods = swept, "what pods that are gone left in the kernel is taken away");
    }
    left
}

fn remove_rules(capture: &dyn Capture, entry: &Entry) -> Result<(), String> {
    let processes = || Processes::scan(Path::new("/proc")).unwrap_or_default();
    let netns = match super::restore::find(entry, &processes()) {
        Ok(netns) => netns,
        Err(super::restore::Found::Unknown(error)) => return Err(error),
        Err(_) => return Ok(()),
    };
    super::restore::remove_other(capture, &entry.backend, &netns)?;
    capture.remove(&netns).map(drop).map_err(|error| error.to_string())
}
