//! What is known of one pod: what it should be, and what it is.

use std::sync::Arc;
use std::time::Duration;

use capture::{LiveConnection, Rules};
use net::netlink::Devices;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::enrol::EnrolError;
use super::redirection::Verified;
use super::{Enrolment, RECONCILE_INTERVAL};
use crate::proxy::locals::Served;
use crate::proxy::pod::LocalPod;
use crate::proxy::threads::accepting::Accepting;

/// How often the rules of an enrolled pod are compared with what they should be.
pub(super) const VERIFY_INTERVAL: Duration = Duration::from_secs(30);
/// How soon they are compared again when that failed.
const TROUBLE_INTERVAL: Duration = Duration::from_secs(5);
/// How long after its enrolment the redirection that somebody else writes into a pod may not stand yet, and how often it is
/// looked at meanwhile.
const SETTLING: Duration = Duration::from_secs(12);
pub(super) const SETTLING_INTERVAL: Duration = Duration::from_secs(3);
/// For the tasks of listeners to end when they are told to.
const CLOSING_LIMIT: Duration = Duration::from_secs(1);

pub(super) struct Slot {
    pub(super) enrolment: Enrolment,
    pub(super) state: PodState,
}

pub(super) enum PodState {
    Pending { failures: u32, reason: String, retry_at: Instant },
    Enrolled(Box<Enrolled>),
}

/// An enrolled pod. Dropping it closes the listeners; open connections go on.
pub(super) struct Enrolled {
    pub(super) pod: Arc<LocalPod>,
    /// Its place among those that connections of this node's pods may go to as they are; taken once all stands.
    pub(super) served: Option<Served>,
    pub(super) accepting: Vec<Accepting>,
    /// What is installed.
    pub(super) rules: Rules,
    pub(super) ipv6: Option<capture::Ipv6>,
    /// Since when.
    pub(super) since: Instant,
    /// Where rules are for a device each: what changes of the pod's.
    pub(super) devices: Option<Devices>,
    /// When the rules are compared with what they should be.
    pub(super) verify_at: Instant,
    /// Why they can't be.
    pub(super) trouble: Option<String>,
    /// Connections of before the enrolment that are still alive.
    pub(super) adopted: Vec<LiveConnection>,
    pub(super) drifts: u64,
}

impl Enrolled {
    /// Whether what redirects the pod may not stand yet.
    pub(super) fn is_settling(&self) -> bool {
        self.since.elapsed() < SETTLING
    }

    /// Whether the rules are to be compared with what they should be.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        // Asked in any case: it forgets what it tells of, which the look that follows sees.
        self.devices.as_ref().is_some_and(Devices::have_changed) || self.verify_at <= now
    }

    /// Closes the listeners, and waits for it: the ports are free then.
    pub(super) async fn close(self) {
        let tasks = self.accepting.clone();
        drop(self);
        let closed = async {
            while !tasks.iter().all(Accepting::is_over) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        // A thread that hangs is another trouble; binding will say so.
        let _ = tokio::time::timeout(CLOSING_LIMIT, closed).await;
    }
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        self.accepting.iter().for_each(Accepting::stop);
    }
}

impl Slot {
    /// Whether the pod has another network namespace than the one that it is enrolled in.
    pub(super) fn is_elsewhere(&self) -> bool {
        match &self.state {
            PodState::Enrolled(enrolled) => {
                self.enrolment.netns.open().is_ok_and(|now| !now.same(&enrolled.pod.netns))
            }
            PodState::Pending { .. } => false,
        }
    }

    pub(super) fn failed(&mut self, error: &EnrolError) {
        let enrolment = &self.enrolment;
        let failures = match &self.state {
            PodState::Pending { failures, .. } => failures + 1,
            PodState::Enrolled(_) => 1,
        };
        let wait = RECONCILE_INTERVAL * 2_u32.pow(failures.min(6) - 1);
        if failures == 1 {
            let pod = format_args!("{}/{}", enrolment.namespace, enrolment.name);
            tracing::error!(%pod, netns = %enrolment.netns, %error, "the pod is not enrolled; trying again");
        }
        let retry_at = Instant::now() + wait;
        self.state = PodState::Pending { failures, reason: error.to_string(), retry_at };
    }

    /// Notes what came of looking at the pod. What stands stays, whatever went wrong.
    pub(super) fn verified(&mut self, outcome: Result<Verified, EnrolError>) {
        let PodState::Enrolled(enrolled) = &mut self.state else { return };
        enrolled.verify_at = Instant::now() + VERIFY_INTERVAL;
        let trouble = match outcome {
            Ok(Verified::Standing) => None,
            Ok(Verified::Changed(rules, adopted)) => {
                (enrolled.rules, enrolled.adopted) = (*rules, adopted);
                None
            }
            Ok(Verified::LookedAt(adopted)) => {
                enrolled.verify_at = Instant::now() + SETTLING_INTERVAL;
                enrolled.adopted = adopted;
                None
            }
            Ok(Verified::Restored(_, adopted)) => {
                enrolled.drifts += 1;
                enrolled.adopted = adopted;
                None
            }
            Err(error) => {
                enrolled.verify_at = Instant::now() + TROUBLE_INTERVAL;
                Some(error.to_string())
            }
        };
        if trouble != enrolled.trouble {
            let pod = format_args!("{}/{}", self.enrolment.namespace, self.enrolment.name);
            match &trouble {
                Some(error) => {
                    tracing::error!(%pod, error, "the pod's redirection can't be looked at; it stays as it was");
                }
                None => tracing::info!(%pod, "the pod's redirection is as it should be again"),
            }
        }
        enrolled.trouble = trouble;
    }

    pub(super) fn dump(&self, backend: &str) -> Value {
        let e = &self.enrolment;
        let mut pod = json!({
            "uid": &*e.key,
            "namespace": &*e.namespace,
            "name": &*e.name,
            "netns": e.netns.to_string(),
            "addresses": e.addresses.iter().flatten().map(ToString::to_string).collect::<Vec<_>>(),
            "dnsCapture": e.dns_capture,
            "bypassInbound": e.bypass_inbound,
        });
        let state = match &self.state {
            PodState::Pending { failures, reason, .. } => {
                json!({ "state": "pending", "failures": failures, "reason": reason })
            }
            PodState::Enrolled(enrolled) => json!({
                "state": "enrolled",
                "capture": backend,
                "ipv6": enrolled.ipv6.map(|ipv6| format!("{ipv6:?}")),
                "openConnections": enrolled.pod.open(),
                "drifts": enrolled.drifts,
                "trouble": enrolled.trouble,
                "connectionsFromBefore": enrolled.adopted.iter().map(|c| json!({
                    "local": c.connection.local.to_string(),
                    "peer": c.connection.peer.to_string(),
                    "direction": format!("{:?}", c.direction).to_lowercase(),
                })).collect::<Vec<_>>(),
            }),
        };
        if let (Value::Object(pod), Value::Object(state)) = (&mut pod, state) {
            pod.extend(state);
            // What the programs of eBPF count, whoever installed them.
            let counters =
                e.netns.open().ok().and_then(|netns| capture::counters(&netns).ok()).unwrap_or_default();
            if !counters.is_empty() {
                let counters =
                    counters.into_iter().map(|(counter, n)| (counter.as_str().to_owned(), n.into()));
                pod.insert("captureCounters".to_owned(), Value::Object(counters.collect()));
            }
        }
        pod
    }
}
