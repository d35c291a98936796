//! Enrolment: ztunnel's listeners, then rules.

use std::net::IpAddr;
use std::sync::Arc;

use capture::{Ipv6, Rules, replace};
use net::Netns;
use tokio::time::Instant;

use super::Node;
use super::slot::{Slot, State};
use crate::netns::{self, NetnsError};
use crate::pod::Pod;
use crate::record::Entry;
use crate::rules::{self, BadAnnotation};
use crate::zds::NotServed;

/// Why a pod is not in the mesh.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnrolError {
    #[error("network namespace: {0}")]
    Netns(#[from] NetnsError),
    #[error("annotation {0}")]
    Annotation(#[from] BadAnnotation),
    #[error("{0}")]
    NotServed(#[from] NotServed),
    #[error("redirection: {0}")]
    Capture(#[from] capture::Error),
    #[error("its network namespace is that of pod {0}")]
    Claimed(String),
    #[error("the task of the enrolment failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Whether a pod's containers run already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Manner {
    /// They wait for us: what fails leaves nothing.
    Starting,
    /// They do: what can't be served is closed.
    Running,
}

/// A pod and where it is.
pub(super) struct Target {
    pub(super) pod: Pod,
    pub(super) netns: Netns,
    /// As the container runtime told them; empty if it didn't.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) container: Option<String>,
}

/// When dropped: as if nothing had been tried, for a pod that does not start now.
struct Undo<'n> {
    node: &'n Node,
    uid: &'n str,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        self.node.parts.ztunnels.withdraw(self.uid);
        self.node.parts.record.remove(self.uid);
        self.node.slots().remove(self.uid);
    }
}

impl Node {
    /// Puts a pod into the mesh. The caller holds the slot's work.
    pub(super) async fn enrol(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        target: Target,
        manner: Manner,
    ) -> Result<(), EnrolError> {
        let Target { pod, netns, addresses, container } = target;
        let wanted = rules::of(&pod.annotations, self.parts.probes.is_some())?;
        self.unclaimed(&slot.uid, &netns)?;
        let mut known: std::collections::BTreeSet<IpAddr> = addresses.into_iter().collect();
        known.extend(&pod.addresses);
        let entry = self.entry(&pod, &netns, &known, container.clone());
        self.parts.record.put(entry);
        // Whatever fails from here on, the pod does not start; also when the time is up, and this future is dropped.
        let undo = (manner == Manner::Starting).then(|| Undo { node: self, uid: &slot.uid });
        self.parts.ztunnels.serve_as(pod.identity.clone(), Some(netns.clone()), pod.annotations.clone());
        let served = self.parts.ztunnels.wait_served(&slot.uid, self.parts.times.served).await;
        if manner == Manner::Starting {
            served.clone()?;
        }
        self.watch_devices(slot, &netns);
        // What stands of the rules when this fails refuses; a pod that runs is tried again until all of them stand.
        let ipv6 = self.install(&netns, &wanted).await?;
        self.replace_other(&slot.uid, &netns, &wanted).await?;
        std::mem::forget(undo);
        let times = &self.parts.times;
        // A device may have come while the rules were written.
        let soon = if self.parts.capture.is_by_device() { times.tick } else { times.verify };
        let verify_at = Instant::now() + soon;
        let state = match &served {
            Ok(()) => State::Enrolled { verify_at, trouble: None },
            Err(error) => State::Closed { reason: error.to_string(), verify_at },
        };
        tracing::info!(
            pod = pod.full_name(), uid = slot.uid, %netns, state = state.name(), ?ipv6, starting = manner == Manner::Starting,
            "the pod's traffic is captured"
        );
        self.parts.metrics.event("add");
        let mut inner = slot.inner();
        (inner.pod, inner.netns, inner.addresses) = (pod, Some(netns), known);
        if container.is_some() {
            (inner.container, inner.added) = (container, Some(Instant::now()));
        }
        (inner.rules, inner.state) = (wanted, state);
        Ok(())
    }

    pub(super) async fn install(&self, netns: &Netns, rules: &Rules) -> Result<Ipv6, EnrolError> {
        // The semaphore is never closed.
        let _permit = self.at_once.acquire().await;
        let (capture, netns, rules) = (self.parts.capture.clone(), netns.clone(), rules.clone());
        Ok(tokio::task::spawn_blocking(move || capture.install(&netns, &rules)).await??.ipv6)
    }

    /// Removes what another back-end has written for the pod by its record, which says so until then.
    async fn replace_other(&self, uid: &str, netns: &Netns, rules: &Rules) -> Result<(), EnrolError> {
        let Some(entry) = self.parts.record.get(uid).filter(|entry| entry.backend != self.backend()) else {
            return Ok(());
        };
        if let Ok(before) = entry.backend.parse() {
            let _permit = self.at_once.acquire().await;
            let (capture, netns, rules) = (self.parts.capture.clone(), netns.clone(), rules.clone());
            tokio::task::spawn_blocking(move || replace(&*capture, before, &netns, &rules)).await??;
        }
        self.parts.record.put(Entry { backend: self.backend(), ..entry });
        Ok(())
    }

    /// As the record calls it.
    pub(super) fn backend(&self) -> String {
        self.parts.capture.backend().as_str().to_owned()
    }

    pub(super) fn entry(
        &self,
        pod: &Pod,
        netns: &Netns,
        addresses: &std::collections::BTreeSet<IpAddr>,
        container: Option<String>,
    ) -> Entry {
        let identity = pod.identity.clone();
        let known = self.parts.record.get(&identity.uid).filter(|known| known.inode == netns.id().inode());
        Entry {
            uid: identity.uid,
            static_uid: pod.static_uid.clone(),
            namespace: identity.namespace,
            name: identity.name,
            service_account: identity.service_account,
            container,
            netns: netns.name().to_owned(),
            inode: netns.id().inode(),
            addresses: addresses.iter().copied().collect(),
            annotations: pod.annotations.clone(),
            probe_ports: pod.probe_ports.clone(),
            // Another one until what it wrote is removed.
            backend: known.map_or_else(|| self.backend(), |known| known.backend),
            leaving: false,
        }
    }

    /// Refuses a namespace that another pod is enrolled in: one of the two is not where it seems to be.
    fn unclaimed(&self, uid: &str, netns: &Netns) -> Result<(), EnrolError> {
        let claims = |slot: &&Arc<Slot>| {
            slot.uid != uid && slot.inner().netns.as_ref().is_some_and(|other| other.same(netns))
        };
        match self.all_slots().iter().find(claims) {
            Some(other) => Err(EnrolError::Claimed(other.name())),
            None => Ok(()),
        }
    }

    /// Finds a pod that runs already, and puts it into the mesh. The caller holds the slot's work.
    pub(super) async fn adopt(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        pod: Pod,
        processes: Arc<netns::Processes>,
    ) {
        let known = slot.inner().netns.clone();
        let (uid, addresses) = (pod.node_uid().to_owned(), pod.addresses.clone());
        let found = tokio::task::spawn_blocking(move || match known {
            Some(netns) if netns::check(&netns, &addresses).is_ok() => Ok(netns),
            _ => processes.netns_of(&uid, &addresses),
        });
        let outcome = match found.await {
            Ok(Ok(netns)) => {
                let container = slot.inner().container.clone();
                let target = Target { pod: pod.clone(), netns, addresses: Vec::new(), container };
                self.enrol(slot, target, Manner::Running).await
            }
            Ok(Err(error)) => Err(error.into()),
            Err(error) => Err(error.into()),
        };
        if !self.is_current(slot) {
            // The pod ended while it was worked on.
            self.parts.ztunnels.withdraw(&slot.uid);
            self.parts.record.remove(&slot.uid);
            return;
        }
        match outcome {
            Ok(()) => {
                if let State::Closed { reason, .. } = slot.state() {
                    self.tell_closed(slot, &reason).await;
                }
            }
            Err(error) => self.failed(slot, pod, &error).await,
        }
    }

    /// Notes that a pod that should be in the mesh is not, and says so.
    async fn failed(&self, slot: &Arc<Slot>, pod: Pod, error: &EnrolError) {
        let reason = error.to_string();
        let failures = {
            let mut inner = slot.inner();
            let failures = match &inner.state {
                State::Waiting { failures, .. } => failures + 1,
                _ => 1,
            };
            inner.pod = pod;
            if !inner.state.is_captured() {
                inner.state = State::failed(failures, reason.clone(), self.parts.times.tick);
            } else if let State::Closed { reason: old, .. } = &mut inner.state {
                old.clone_from(&reason);
            }
            failures
        };
        // A pod that is about to start or to end has an address and no processes for a moment.
        let is_passing = matches!(error, EnrolError::Netns(_)) && failures < 3;
        if !is_passing {
            let note = format!(
                "the pod is labelled for the mesh and its traffic is not captured: {reason}; it is tried again"
            );
            self.tell(slot, "EnrolmentFailed", note, true).await;
        }
    }

    pub(super) async fn tell_closed(&self, slot: &Arc<Slot>, reason: &str) {
        let note = format!("the pod is in the mesh and its connections are refused: {reason}");
        self.tell(slot, "EnrolmentPending", note, true).await;
    }
}
