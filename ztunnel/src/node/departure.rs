//! Pods that leave the mesh, and what earlier processes left behind.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use capture::Rules;
use net::Netns;
use net::netns::OpenError;
use tokio::time::Instant;

use super::enrol::flatten;
use super::slot::{PodState, Slot};
use super::{Node, RECONCILE_INTERVAL};
use crate::proxy::peers::Peers;
use crate::proxy::pod::{LocalPod, Subject};

/// A pod that left the mesh and still has our redirection.
pub(super) struct Leaving {
    /// `namespace/name`.
    pub(super) pod: Arc<str>,
    pub(super) netns: Netns,
    /// With the open connections that go on.
    pub(super) local: Option<Arc<LocalPod>>,
    /// Why the redirection is still there, if it should not be.
    pub(super) trouble: Option<String>,
    failures: u32,
    retry_at: Instant,
}

impl Leaving {
    fn new(pod: Arc<str>, netns: Netns, local: Option<Arc<LocalPod>>) -> Self {
        Self { pod, netns, local, trouble: None, failures: 0, retry_at: Instant::now() }
    }

    fn is_due(&self, now: Instant, peers: &Peers) -> bool {
        let is_over = |local: &Arc<LocalPod>| local.open() == 0 && peers.of(number(&self.netns)) == 0;
        self.retry_at <= now && self.local.as_ref().is_none_or(is_over)
    }
}

/// What [`Peers`] know a pod by.
fn number(netns: &Netns) -> u64 {
    netns.id().inode()
}

impl Node {
    /// Takes a pod out of the mesh: no more redirection, then no more listeners. Open connections go on.
    pub(super) async fn un_enrol(&self, slot: Slot) {
        let Slot { enrolment, state } = slot;
        let pod: Arc<str> = format!("{}/{}", enrolment.namespace, enrolment.name).into();
        let mut enrolled = match state {
            PodState::Enrolled(enrolled) => enrolled,
            PodState::Pending { .. } => {
                // A namespace that is gone has no rules either.
                if let Ok(netns) = enrolment.netns.open() {
                    self.release(Leaving::new(pod, netns, None)).await;
                }
                return;
            }
        };
        self.stopped.fetch_add(1, Ordering::Relaxed);
        // What goes past this process ends here, while all that refuses it still stands.
        drop(enrolled.served.take());
        self.proxy.verdicts.recheck().await;
        let (local, rules) = (enrolled.pod.clone(), Rules { leaving: true, ..enrolled.rules.clone() });
        self.proxy.tunnels.retire(|key| key.netns == local.netns);
        // Even if there are none: one that was accepted a moment ago is not counted yet, and would lose its way back
        // with the rules.
        let leaving = Leaving::new(pod, local.netns.clone(), Some(local.clone()));
        self.leave(leaving, rules, local.open()).await;
        enrolled.close().await;
        // What is accepted from here on sees for itself that the pod has left.
        self.proxy.peers.leave(number(&local.netns));
    }

    /// Captures nothing new of a pod that left, and keeps up what its open connections need. The redirection is removed
    /// after a while, when there are none.
    async fn leave(&self, mut leaving: Leaving, rules: Rules, connections: usize) {
        if self.is_claimed(&leaving.netns).is_ok_and(|claimed| !claimed) {
            let (redirection, netns, pod) = (self.redirection.clone(), leaving.netns.clone(), &leaving.pod);
            match flatten(tokio::task::spawn_blocking(move || redirection.leave(&netns, &rules)).await) {
                Ok(()) => tracing::info!(%pod, connections, "pod leaves; its connections go on"),
                Err(error) => tracing::error!(%pod, %error, "the pod's new connections are refused"),
            }
        }
        leaving.retry_at = Instant::now() + RECONCILE_INTERVAL;
        self.leaving().push(leaving);
    }

    /// The pod as it was before it left, if it has open connections of that time.
    pub(super) fn returning(&self, subject: &Subject, netns: &Netns) -> Option<Arc<LocalPod>> {
        let leaving = self.leaving();
        let locals = leaving.iter().filter_map(|leaving| leaving.local.as_ref());
        locals.into_iter().find(|local| local.subject == *subject && local.netns.same(netns)).cloned()
    }

    /// The pod is back.
    pub(super) fn returned(&self, netns: &Netns) {
        self.leaving().retain(|leaving| !leaving.netns.same(netns));
    }

    /// Removes the redirection of a namespace, unless it is another pod's by now: removed, it would leave that one
    /// open until it is restored. What fails is tried again.
    async fn release(&self, mut leaving: Leaving) {
        let pod = leaving.pod.clone();
        let error = match self.is_claimed(&leaving.netns) {
            Ok(true) => {
                tracing::info!(%pod, netns = %leaving.netns, "pod un-enrolled; another has its network namespace");
                return;
            }
            Ok(false) => {
                let (redirection, netns) = (self.redirection.clone(), leaving.netns.clone());
                let removal = tokio::task::spawn_blocking(move || redirection.end(&netns));
                match flatten(removal.await) {
                    Ok(()) => {
                        tracing::info!(%pod, "pod un-enrolled");
                        return;
                    }
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        if leaving.failures == 0 {
            tracing::error!(
                %pod, error,
                "the pod's redirection could not be removed: its traffic is refused; trying again"
            );
        }
        leaving.retry_at = Instant::now() + RECONCILE_INTERVAL * 2_u32.pow(leaving.failures.min(6));
        leaving.failures += 1;
        leaving.trouble = Some(error);
        self.leaving().push(leaving);
    }

    /// Removes what is left of the redirection of pods that left the mesh and have no open connections any more.
    pub(super) async fn release_left(&self) {
        self.end_cut_off().await;
        let (now, peers) = (Instant::now(), &self.proxy.peers);
        let over: Vec<_> = self.leaving().extract_if(.., |leaving| leaving.is_due(now, peers)).collect();
        for leaving in over {
            self.release(leaving).await;
        }
    }

    /// Ends what is left of connections in namespaces that have lost their devices, as those of pods that have ended do. Nobody can
    /// be told any more; the kernel would try for minutes, and keep each of the namespaces for as long.
    async fn end_cut_off(&self) {
        let left: Vec<(Arc<str>, Netns)> =
            self.leaving().iter().map(|leaving| (leaving.pod.clone(), leaving.netns.clone())).collect();
        if left.is_empty() {
            return;
        }
        let look = tokio::task::spawn_blocking(move || {
            let is_cut_off = |(_, netns): &(_, Netns)| net::is_cut_off(netns).unwrap_or(false);
            let ended = |(pod, netns): (Arc<str>, Netns)| {
                let outcome = net::sock_diag::destroy_all(&netns);
                (pod, netns, outcome)
            };
            left.into_iter().filter(is_cut_off).map(ended).collect::<Vec<_>>()
        });
        for (pod, netns, outcome) in look.await.unwrap_or_default() {
            match outcome {
                Ok(0) => {}
                Ok(connections) => {
                    tracing::info!(%pod, connections, "the pod is gone; what was open of it has ended");
                }
                // Those of this process end below, and the kernel forgets them in its own time.
                Err(error) => {
                    tracing::debug!(%pod, %error, "the pod is gone; its connections can't be ended at once");
                }
            }
            self.proxy.peers.abort(number(&netns));
            self.proxy.tunnels.abort(|key| key.netns == netns);
        }
    }

    /// Removes what is left of pods that have ended while no ztunnel ran.
    async fn sweep(&self) {
        let redirection = self.redirection.clone();
        let swept = tokio::task::spawn_blocking(move || redirection.sweep()).await.unwrap_or_default();
        if swept > 0 {
            tracing::info!(pods = swept, "what pods that are gone left in the kernel is taken away");
        }
    }

    /// Removes the redirection that an earlier process has left in pods which are not in the mesh any more, or are no more.
    pub(super) async fn release_unclaimed(&self) {
        self.sweep().await;
        let redirection = self.redirection.clone();
        let standing = tokio::task::spawn_blocking(move || redirection.standing()).await.unwrap_or_default();
        for (netns, entry) in standing {
            if self.is_claimed(&netns).is_ok_and(|claimed| claimed) {
                continue;
            }
            tracing::info!(pod = entry.pod, "left the mesh while no ztunnel ran");
            let (redirection, target, other) = (self.redirection.clone(), netns.clone(), entry.clone());
            let removal = tokio::task::spawn_blocking(move || redirection.end_other(&target, &other));
            if let Err(error) = flatten(removal.await) {
                let (pod, backend) = (entry.pod, entry.backend);
                tracing::error!(pod, backend, %error, "the redirection of another back-end stays");
                continue;
            }
            self.release(Leaving::new(entry.pod.into(), netns, None)).await;
        }
    }

    /// Whether a pod that is or should be enrolled has this namespace.
    ///
    /// # Errors
    /// The namespace of some pod can't be seen: it could be this one.
    fn is_claimed(&self, netns: &Netns) -> Result<bool, OpenError> {
        for slot in self.pods().values() {
            if let PodState::Enrolled(enrolled) = &slot.state
                && enrolled.pod.netns.same(netns)
            {
                return Ok(true);
            }
            match slot.enrolment.netns.open() {
                Ok(its) if its.same(netns) => return Ok(true),
                Ok(_) | Err(OpenError::Vanished { .. } | OpenError::NotANamespace { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Removes the redirection from all pods: they are outside the mesh from then on. Verdicts have been taken back by then.
    pub async fn clean_up(&self) {
        let slots: Vec<Slot> = self.pods().drain().map(|(_, slot)| slot).collect();
        for slot in slots {
            self.un_enrol(slot).await;
        }
        let left = std::mem::take(&mut *self.leaving());
        for leaving in left {
            self.release(leaving).await;
        }
        let redirection = self.redirection.clone();
        match flatten(tokio::task::spawn_blocking(move || redirection.end_verdicts()).await) {
            Ok(true) => tracing::info!("the programs of verdicts are taken away"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "what is left of verdicts stays, without a lease"),
        }
        self.sweep().await;
    }
}
