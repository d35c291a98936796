//! What is known of one pod: who it is, where, and how far it is.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use capture::Rules;
use net::Netns;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::pod::Pod;

/// One pod.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) uid: String,
    /// Held by the task that works on the pod.
    pub(super) work: Arc<tokio::sync::Mutex<()>>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    /// As it was when it was last worked on.
    pub(super) pod: Pod,
    /// The id of its sandbox, where the container runtime told it.
    pub(super) container: Option<String>,
    /// When it was added, where the container runtime did.
    pub(super) added: Option<Instant>,
    pub(super) netns: Option<Netns>,
    /// Its addresses, by whoever told them.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// What is installed.
    pub(super) rules: Rules,
    pub(super) state: State,
    /// Since when the API server does not name it.
    pub(super) absent: Option<Instant>,
    /// What users were told last, and when.
    pub(super) told: Option<(String, Instant)>,
    /// The task that waits for changes of its devices, where that is of interest. It ends with this.
    pub(super) watch: JoinSet<()>,
}

/// How far a pod is, see the diagram of [`super`].
#[derive(Clone, Debug)]
pub(super) enum State {
    /// It runs and should be in the mesh; nothing of ours is in its namespace.
    Waiting { failures: u32, reason: String, retry_at: Instant },
    /// Its rules stand and refuse: no ztunnel serves it.
    Closed { reason: String, verify_at: Instant },
    /// It is captured, and a ztunnel has taken it.
    Enrolled { verify_at: Instant, trouble: Option<String> },
    /// It has left; its open connections go on.
    Leaving { connections: usize, look_at: Instant },
}

impl State {
    /// Something has gone wrong for a pod without rules: again soon, and later and later.
    pub(super) fn failed(failures: u32, reason: String, first: std::time::Duration) -> Self {
        let wait = first * 2_u32.pow(failures.saturating_sub(1).min(5));
        Self::Waiting { failures, reason, retry_at: Instant::now() + wait }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Waiting { .. } => "waiting",
            Self::Closed { .. } => "closed",
            Self::Enrolled { .. } => "enrolled",
            Self::Leaving { .. } => "leaving",
        }
    }

    /// Whether rules of ours capture the pod's traffic.
    pub(super) fn is_captured(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Enrolled { .. })
    }
}

impl Slot {
    pub(super) fn new(pod: Pod, state: State) -> Self {
        Self {
            uid: pod.identity.uid.clone(),
            work: Arc::default(),
            inner: Mutex::new(Inner {
                addresses: pod.addresses.iter().copied().collect(),
                pod,
                container: None,
                added: None,
                netns: None,
                rules: Rules::default(),
                state,
                absent: None,
                told: None,
                watch: JoinSet::new(),
            }),
        }
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> State {
        self.inner().state.clone()
    }

    /// Has the rules looked at then, where they stand.
    pub(super) fn verify_at(&self, time: Instant) {
        if let State::Closed { verify_at, .. } | State::Enrolled { verify_at, .. } = &mut self.inner().state {
            *verify_at = time;
        }
    }

    pub(super) fn name(&self) -> String {
        self.inner().pod.full_name()
    }

    /// As JSON. `end` is whether it may be an end of connections that no proxy carries, where that is known.
    pub(super) fn dump(&self, unserved: Option<String>, end: Option<Result<(), String>>) -> Value {
        let inner = self.inner();
        let mut value = json!({
            "uid": self.uid,
            "namespace": inner.pod.identity.namespace,
            "name": inner.pod.identity.name,
            "netns": inner.netns.as_ref().map(ToString::to_string),
            "container": inner.container,
            "addresses": inner.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "probePorts": inner.pod.probe_ports,
            "state": inner.state.name(),
            "ztunnel": unserved.unwrap_or_else(|| "serves it".to_owned()),
        });
        let more = match &inner.state {
            State::Waiting { failures, reason, .. } => json!({ "failures": failures, "reason": reason }),
            State::Closed { reason, .. } => json!({ "reason": reason }),
            State::Enrolled { trouble, .. } => json!({ "trouble": trouble }),
            State::Leaving { connections, .. } => json!({ "openConnections": connections }),
        };
        if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
            value.extend(more);
            if let Some(end) = end {
                let said =
                    end.err().unwrap_or_else(|| "passes ztunnel by where verdicts allow it".to_owned());
                value.insert("kernelVerdicts".to_owned(), said.into());
            }
        }
        value
    }
}
