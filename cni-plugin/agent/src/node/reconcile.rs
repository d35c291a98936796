//! The regular look at all pods: what is to be, what is, and what to do about it.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use capture::Rules;
use tokio::time::Instant;

use super::Node;
use super::slot::{Slot, State};
use crate::cluster::{Notice, View};
use crate::netns::Processes;
use crate::pod::{Pod, Standing};
use crate::rules;

/// The same is not said again before this.
const REPEAT: Duration = Duration::from_secs(300);
/// Between looks for what pods left that are gone. A namespace outlives its pod by a moment.
const SWEEP: Duration = Duration::from_secs(5);
/// For what was written to come back through the watch, and for a failed attempt to be repeated.
const REWRITE: Duration = Duration::from_secs(5);

/// An annotation that was written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Writing {
    again_at: Instant,
    failures: u32,
}

impl Node {
    /// Looks after the pods for ever; `done` is called after each round.
    pub async fn run(self: Arc<Self>, done: impl Fn(&Self)) {
        let mut tick = tokio::time::interval(self.parts.times.tick);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut sweep_at = Instant::now();
        loop {
            self.reconcile().await;
            done(&self);
            if sweep_at <= Instant::now() {
                self.sweep().await;
                sweep_at = Instant::now() + SWEEP;
            }
            tokio::select! {
                _ = tick.tick() => {}
                () = self.parts.cluster.changed() => {}
                () = self.wake.notified() => {}
            }
        }
    }

    /// Takes away what pods left outside of their namespaces, which are gone.
    async fn sweep(&self) {
        let capture = self.parts.capture.clone();
        match tokio::task::spawn_blocking(move || capture.sweep()).await {
            Ok(0) | Err(_) => {}
            Ok(pods) => tracing::debug!(pods, "removed what pods that are gone left"),
        }
    }

    /// One look.
    pub async fn reconcile(self: &Arc<Self>) {
        let view = self.parts.cluster.view();
        let now = Instant::now();
        if view.is_complete() {
            self.follow(&view, now).await;
            self.let_go_of_absent(&view, now);
            self.annotate(&view, now);
        }
        for slot in self.all_slots() {
            self.look_after(&slot, now);
        }
        self.sync_probes().await;
        // Said when it fails and when it no longer does.
        let _ = self.parts.record.settle();
    }

    /// Follows labels and annotations.
    async fn follow(self: &Arc<Self>, view: &View, now: Instant) {
        let mut to_adopt = Vec::new();
        self.said_excluded().retain(|namespace| view.namespaces.contains_key(namespace));
        for pod in view.pods.values() {
            let Some(wanted) = self.wanted(pod, view) else { continue };
            let slot = self.slot(&pod.identity.uid);
            match (wanted, slot) {
                (true, None) if !pod.addresses.is_empty() => {
                    let state = State::Waiting { failures: 0, reason: "not yet".to_owned(), retry_at: now };
                    // One that is being added, or let go of, is looked at after that.
                    if let Ok(slot) = self.new_slot(pod, state) {
                        self.slots().insert(slot.uid.clone(), slot.clone());
                        to_adopt.push((slot, pod.clone()));
                    }
                }
                (true, Some(slot)) => match slot.state() {
                    State::Waiting { retry_at, .. } if retry_at <= now && !pod.addresses.is_empty() => {
                        to_adopt.push((slot, pod.clone()));
                    }
                    State::Leaving { .. } => to_adopt.push((slot, pod.clone())),
                    State::Waiting { .. } => {}
                    State::Closed { .. } | State::Enrolled { .. } => self.keep_in_step(&slot, pod),
                },
                (false, Some(slot)) if pod.finished => self.forget(&slot, "it has ended"),
                (false, Some(slot)) => match slot.state() {
                    State::Waiting { retry_at, .. }
                        if retry_at <= now || self.parts.record.get(&slot.uid).is_none() =>
                    {
                        self.work(&slot, |node, slot| async move { node.let_out(&slot).await });
                    }
                    State::Waiting { .. } => {}
                    State::Closed { .. } | State::Enrolled { .. } => {
                        let pod = pod.clone();
                        self.work(&slot, |node, slot| async move { node.leave(&slot, pod).await });
                    }
                    State::Leaving { .. } => {}
                },
                (false, None) => self.say_excluded(pod, view),
                (true, None) => {}
            }
        }
        if to_adopt.is_empty() {
            return;
        }
        let proc = self.parts.proc.clone();
        let scanned = tokio::task::spawn_blocking(move || Processes::scan(&proc)).await;
        let processes = Arc::new(scanned.ok().and_then(Result::ok).unwrap_or_default());
        for (slot, pod) in to_adopt {
            let processes = processes.clone();
            self.work(&slot, |node, slot| async move { node.adopt(&slot, pod, processes).await });
        }
    }

    /// A label in an excluded namespace does nothing, which is said once for each namespace.
    fn say_excluded(self: &Arc<Self>, pod: &Pod, view: &View) {
        let namespace = &pod.identity.namespace;
        let is_labelled = pod.mode.as_deref() == Some("ambient") || view.mode(namespace) == Some("ambient");
        if !is_labelled || pod.host_network || !self.parts.places.excluded.contains(namespace) {
            return;
        }
        if self.said_excluded().insert(namespace.clone()) {
            let note = "labelled istio.io/dataplane-mode=ambient, and not in the mesh: its namespace is excluded \
                        (--exclude-namespaces of culvert-node)";
            tracing::warn!(pod = pod.full_name(), note);
            let notice = Notice { reason: "NamespaceExcluded", note: note.to_owned(), warning: true };
            let (node, identity) = (self.clone(), pod.identity.clone());
            tokio::spawn(async move { node.parts.api.notify(&identity, notice).await });
        }
    }

    fn said_excluded(&self) -> std::sync::MutexGuard<'_, std::collections::HashSet<String>> {
        self.said_excluded.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Runs `task` for a pod, unless another task works on it: whether it does. Whoever works has all pods looked at afterwards.
    fn work<F>(self: &Arc<Self>, slot: &Arc<Slot>, task: impl FnOnce(Arc<Self>, Arc<Slot>) -> F) -> bool
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Ok(guard) = slot.work.clone().try_lock_owned() else { return false };
        let (node, task) = (self.clone(), task(self.clone(), slot.clone()));
        tokio::spawn(async move {
            task.await;
            drop(guard);
            node.wake.notify_one();
        });
        true
    }

    /// Whether the pod should be in the mesh, by what is known now.
    pub(super) fn is_wanted(&self, uid: &str) -> bool {
        let view = self.parts.cluster.view();
        view.pods.get(uid).and_then(|pod| self.wanted(pod, &view)).unwrap_or(false)
    }

    /// Whether the pod should be in the mesh. `None` while that is not known: the watch of namespaces may be behind that of
    /// pods, and what is captured must not be let go of for that.
    fn wanted(&self, pod: &Pod, view: &View) -> Option<bool> {
        let namespace = &pod.identity.namespace;
        if !view.namespaces.contains_key(namespace) && !pod.finished {
            return None;
        }
        let standing = pod.standing(view.mode(namespace), &self.parts.places);
        Some(!pod.finished && standing == Standing::InMesh)
    }

    /// Brings what is known of a captured pod, and its rules, in step with its object.
    fn keep_in_step(self: &Arc<Self>, slot: &Arc<Slot>, pod: &Pod) {
        let changed = {
            let mut inner = slot.inner();
            inner.absent = None;
            let known = inner.addresses.len();
            inner.addresses.extend(&pod.addresses);
            if inner.addresses.len() > known
                && let Some(entry) = self.parts.record.get(&slot.uid)
            {
                let addresses = inner.addresses.iter().copied().collect();
                self.parts.record.put(crate::record::Entry { addresses, ..entry });
            }
            let changed = inner.pod.annotations != pod.annotations;
            if !changed {
                inner.pod = pod.clone();
            }
            changed
        };
        if changed {
            let pod = pod.clone();
            self.work(slot, |node, slot| async move { node.change_rules(&slot, pod).await });
        }
    }

    /// Other annotations: other rules, which replace the old ones without a gap. What can't be read changes nothing.
    async fn change_rules(&self, slot: &Arc<Slot>, pod: Pod) {
        let Some(netns) = slot.inner().netns.clone() else { return };
        let wanted = match rules::of(&pod.annotations, self.parts.probes.is_some()) {
            Ok(wanted) => wanted,
            Err(error) => {
                let note = format!("annotation {error}; the pod's traffic is captured as before");
                self.tell(slot, "AnnotationInvalid", note, true).await;
                // Looked at again when they change.
                slot.inner().pod = pod;
                return;
            }
        };
        match self.install(&netns, &wanted).await {
            Ok(_) => {
                tracing::info!(pod = pod.full_name(), "the pod's redirection follows its annotations");
                self.parts.metrics.event("update");
                let (addresses, container) = {
                    let mut inner = slot.inner();
                    (inner.rules, inner.pod) = (wanted, pod.clone());
                    (inner.addresses.clone(), inner.container.clone())
                };
                self.parts.record.put(self.entry(&pod, &netns, &addresses, container));
            }
            Err(error) => {
                tracing::error!(pod = pod.full_name(), %error, "the pod's redirection could not be changed");
            }
        }
    }

    /// Pods that the API server does not name any more. Not at once: an answer of it may be older than the pod.
    fn let_go_of_absent(&self, view: &View, now: Instant) {
        for slot in self.all_slots().iter().filter(|slot| !view.pods.contains_key(&slot.uid)) {
            let absent = *slot.inner().absent.get_or_insert(now);
            if now.duration_since(absent) >= self.parts.times.absent {
                self.forget(slot, "the API server does not name it any more");
            }
        }
    }

    /// Looks after what stands.
    fn look_after(self: &Arc<Self>, slot: &Arc<Slot>, now: Instant) {
        let served = self.parts.ztunnels.served(&slot.uid);
        let mut inner = slot.inner();
        match &mut inner.state {
            State::Waiting { .. } => {}
            State::Closed { verify_at, .. } if served.is_ok() => {
                let verify_at = *verify_at;
                inner.state = State::Enrolled { verify_at, trouble: None };
                tracing::info!(pod = inner.pod.full_name(), "a ztunnel serves the pod: it is in the mesh");
            }
            State::Closed { verify_at, .. } | State::Enrolled { verify_at, .. } => {
                if *verify_at <= now {
                    *verify_at = now + self.parts.times.verify;
                    drop(inner);
                    if !self.work(slot, |node, slot| async move { node.verify(&slot).await }) {
                        slot.verify_at(now);
                    }
                }
            }
            State::Leaving { look_at, .. } if *look_at <= now => {
                drop(inner);
                self.work(slot, |node, slot| async move { node.look_at_leaving(&slot).await });
            }
            State::Leaving { .. } => {}
        }
    }

    /// Compares a pod's rules with what they should be, and restores them. What stands stays, whatever goes wrong.
    async fn verify(&self, slot: &Arc<Slot>) {
        let (netns, installed, name) = {
            let inner = slot.inner();
            (inner.netns.clone(), inner.rules.clone(), inner.pod.full_name())
        };
        let Some(netns) = netns else { return };
        let _permit = self.at_once.acquire().await;
        let (capture, metrics) = (self.parts.capture.clone(), self.parts.metrics.clone());
        let looked = tokio::task::spawn_blocking(move || restore_drift(&*capture, &netns, &installed));
        let trouble = match looked.await.map_err(|error| error.to_string()).flatten() {
            Ok(None) => None,
            Ok(Some(drift)) => {
                metrics.event("repair");
                tracing::warn!(pod = name, drift, "somebody changed the pod's redirection; it is restored");
                None
            }
            Err(error) => Some(error),
        };
        if let State::Enrolled { trouble: old, .. } = &mut slot.inner().state {
            if trouble != *old
                && let Some(error) = &trouble
            {
                tracing::error!(
                    pod = name,
                    error,
                    "the pod's redirection can't be looked at; it stays as it was"
                );
            }
            *old = trouble;
        }
    }

    /// Writes what pods' annotations should say, where they say something else.
    fn annotate(self: &Arc<Self>, view: &View, now: Instant) {
        let mut writings = self.annotations.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        writings.retain(|uid, _| view.pods.contains_key(uid));
        for pod in view.pods.values() {
            let uid = &pod.identity.uid;
            let Some(is_wanted) = self.wanted(pod, view) else { continue };
            let state = self.slot(uid).map(|slot| slot.state());
            // Who is to leave is no longer announced, though it is captured for a moment yet.
            let wanted = match state.filter(|_| is_wanted) {
                // Being looked for: it may be captured since an earlier agent, and others must not hear that it isn't.
                Some(State::Waiting { failures: 0, .. }) => continue,
                Some(State::Enrolled { .. }) => Some("enabled"),
                Some(State::Closed { .. }) => Some("pending"),
                Some(State::Waiting { .. } | State::Leaving { .. }) | None => None,
            };
            // A sidecar's pod may have it from a mesh of another make.
            if pod.redirection.as_deref() == wanted || (wanted.is_none() && pod.sidecar) {
                writings.remove(uid);
                continue;
            }
            let failures = match writings.get(uid) {
                Some(writing) if writing.again_at > now => continue,
                Some(writing) => writing.failures,
                None => 0,
            };
            let wait = REWRITE * 2_u32.pow(failures.min(4));
            writings.insert(uid.clone(), Writing { again_at: now + wait, failures: failures + 1 });
            let (node, pod) = (self.clone(), pod.clone());
            tokio::spawn(async move {
                if let Err(error) = node.parts.api.annotate(&pod.identity, wanted).await {
                    tracing::warn!(pod = pod.full_name(), ?wanted, %error, "the pod's annotation is not written yet");
                }
            });
        }
    }

    /// Brings the exemption of probes in step with the pods.
    pub(super) async fn sync_probes(&self) {
        let Some(probes) = &self.parts.probes else { return };
        let mut targets = Vec::new();
        for slot in self.all_slots() {
            let inner = slot.inner();
            if inner.state.is_captured() {
                for address in &inner.addresses {
                    let ports = inner.pod.probe_ports.iter();
                    targets.extend(ports.map(|port| SocketAddr::new(*address, *port)));
                }
            }
        }
        probes.sync(targets).await;
    }

    /// Tells users of the pod, not the same over and over.
    pub(super) async fn tell(&self, slot: &Arc<Slot>, reason: &'static str, note: String, warning: bool) {
        let identity = {
            let mut inner = slot.inner();
            let now = Instant::now();
            if inner.told.as_ref().is_some_and(|(text, at)| *text == note && now.duration_since(*at) < REPEAT)
            {
                return;
            }
            inner.told = Some((note.clone(), now));
            inner.pod.identity.clone()
        };
        tracing::warn!(
            pod = format_args!("{}/{}", identity.namespace, identity.name).to_string(),
            reason,
            note
        );
        self.parts.api.notify(&identity, Notice { reason, note, warning }).await;
    }
}

/// Installs the rules again if they are not as they should be; what was different.
fn restore_drift(
    capture: &dyn capture::Capture,
    netns: &net::Netns,
    rules: &Rules,
) -> Result<Option<String>, String> {
    let drift = capture.verify(netns, rules).map_err(|error| error.to_string())?;
    if drift.is_none() {
        return Ok(None);
    }
    capture.install(netns, rules).map_err(|error| error.to_string())?;
    Ok(Some(drift.to_string()))
}
