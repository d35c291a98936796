//! After a start: what the record says comes first, before anything is asked of anybody.

use std::sync::Arc;

use capture::{Backend, Capture, Rules};
use net::Netns;
use net::netns::OpenError;
use tokio::time::Instant;

use super::Node;
use super::slot::State;
use crate::netns::{self, NetnsError, Processes};
use crate::pod::Pod;
use crate::record::Entry;
use crate::rules;

/// What is found of a pod that is recorded.
pub(super) enum Found {
    /// Its namespace, in which the rules stand.
    There(Netns, Box<Rules>),
    /// The namespace is gone, and the pod with it.
    Gone,
    /// It can't be looked at now.
    Unknown(String),
}

impl Node {
    /// Takes up the pods that are recorded: their rules stand again, whoever removed them meanwhile, and refuse until a
    /// ztunnel is there; then it is handed those pods. Comes before ztunnels may connect.
    pub async fn restore(self: &Arc<Self>) {
        let proc = self.parts.proc.clone();
        let scanned = tokio::task::spawn_blocking(move || Processes::scan(&proc)).await;
        let processes = Arc::new(scanned.ok().and_then(Result::ok).unwrap_or_default());
        let mut tasks = tokio::task::JoinSet::new();
        for entry in self.parts.record.entries() {
            let (node, processes) = (self.clone(), processes.clone());
            tasks.spawn(async move {
                let _permit = node.at_once.acquire().await;
                let (capture, probes) = (node.parts.capture.clone(), node.parts.probes.is_some());
                let searched = entry.clone();
                let found = tokio::task::spawn_blocking(move || {
                    find(&searched, &processes).map_or_else(
                        |found| found,
                        |netns| match stand(&*capture, &searched, &netns, probes) {
                            Ok(rules) => Found::There(netns, Box::new(rules)),
                            Err(error) => Found::Unknown(error),
                        },
                    )
                });
                let found = found.await.unwrap_or_else(|error| Found::Unknown(error.to_string()));
                node.take_up(entry, found);
            });
        }
        while tasks.join_next().await.is_some() {}
        self.sync_probes().await;
    }

    fn take_up(self: &Arc<Self>, entry: Entry, found: Found) {
        let name = format!("{}/{}", entry.namespace, entry.name);
        let now = Instant::now();
        let identity = entry.identity();
        let (netns, rules, state) = match found {
            Found::Gone => {
                tracing::info!(pod = name, "ended while no agent ran");
                self.parts.record.remove(&entry.uid);
                return;
            }
            Found::There(netns, rules) if entry.leaving => {
                (Some(netns), *rules, State::Leaving { connections: 0, look_at: now })
            }
            Found::There(netns, rules) => {
                let verify_at = now + self.parts.times.verify;
                (Some(netns), *rules, State::Enrolled { verify_at, trouble: None })
            }
            Found::Unknown(reason) => {
                tracing::error!(pod = name, reason, "a captured pod can't be looked at; trying again");
                (None, Rules::default(), State::Waiting { failures: 0, reason, retry_at: now })
            }
        };
        if netns.is_some() {
            self.parts.record.put(Entry { backend: self.backend(), ..entry.clone() });
        }
        if !entry.leaving {
            // Without a namespace: who serves the pod goes on.
            self.parts.ztunnels.serve_as(identity.clone(), netns.clone(), entry.annotations.clone());
        }
        self.parts.metrics.event("restore");
        let pod = Pod {
            identity,
            static_uid: entry.static_uid.clone(),
            mode: None,
            host_network: false,
            sidecar: false,
            ztunnel: false,
            finished: false,
            addresses: entry.addresses.clone(),
            annotations: entry.annotations.clone(),
            redirection: None,
            probe_ports: entry.probe_ports.clone(),
            resource_version: String::new(),
        };
        let slot = self.new_slot(&pod, state).unwrap_or_else(|known| known);
        if let Some(netns) = &netns {
            self.watch_devices(&slot, netns);
        }
        {
            let mut inner = slot.inner();
            (inner.netns, inner.rules, inner.container) = (netns, rules, entry.container);
        }
        self.slots().insert(entry.uid, slot);
    }
}

/// The namespace of a recorded pod, if it is still that and still the pod's.
pub(super) fn find(entry: &Entry, processes: &Processes) -> Result<Netns, Found> {
    let by_path = match netns::open(&entry.netns) {
        Ok(netns) if netns.id().inode() == entry.inode => Some(netns),
        Ok(_) | Err(OpenError::Vanished { .. } | OpenError::NotANamespace { .. }) => None,
        Err(error) => return Err(Found::Unknown(error.to_string())),
    };
    let by_process = || {
        let netns =
            processes.netns_of(entry.static_uid.as_ref().unwrap_or(&entry.uid), &entry.addresses).ok()?;
        (netns.id().inode() == entry.inode).then_some(netns)
    };
    let netns = by_path.or_else(by_process).ok_or(Found::Gone)?;
    match netns::check(&netns, &entry.addresses) {
        Ok(()) => Ok(netns),
        // The number was used again, or the pod's device is gone already.
        Err(NetnsError::NotThePods { .. } | NetnsError::Nodes(_)) => Err(Found::Gone),
        Err(error) => Err(Found::Unknown(error.to_string())),
    }
}

/// Removes what the back-end of this name wrote, if it is another one than `capture`.
pub(super) fn remove_other(capture: &dyn Capture, name: &str, netns: &Netns) -> Result<(), String> {
    let Some(other) = name.parse::<Backend>().ok().filter(|backend| *backend != capture.backend()) else {
        return Ok(());
    };
    let failed = |error: &dyn std::fmt::Display| format!("what {other} wrote can't be removed: {error}");
    let backend = capture::probe(other, &capture::Tools::default()).map_err(|error| failed(&error))?;
    backend.remove(netns).map(drop).map_err(|error| failed(&error))
}

/// Sees to it that the rules stand, and no others.
fn stand(capture: &dyn Capture, entry: &Entry, netns: &Netns, probes: bool) -> Result<Rules, String> {
    let rules = rules::of(&entry.annotations, probes).map_err(|error| error.to_string())?;
    let rules = Rules { leaving: entry.leaving, ..rules };
    let before = entry.backend.parse().unwrap_or(capture.backend());
    let installed = capture::replace(capture, before, netns, &rules).map_err(|error| error.to_string())?;
    if before != capture.backend() {
        tracing::info!(pod = entry.name, %before, "the pod is captured by another back-end now");
    } else if installed.changed {
        tracing::warn!(pod = entry.name, "the pod's rules were not as they were; they are restored");
    }
    Ok(rules)
}
