//! Pods that leave the mesh while they run.

use std::sync::Arc;
use std::time::Duration;

use capture::Rules;
use net::{Netns, ZTUNNEL_MARK, sock_diag};
use tokio::time::Instant;

use super::Node;
use super::slot::{Slot, State};
use crate::pod::Pod;

/// For all ztunnels to acknowledge.
const WITHDRAWAL: Duration = Duration::from_secs(5);
/// Between looks at what is still open.
const LOOK: Duration = Duration::from_secs(1);

impl Node {
    /// Takes a pod that runs out of the mesh: others hear that it no longer speaks HBONE, then nothing new is captured,
    /// then ztunnel's listeners close. What is open goes on. The caller holds the slot's work.
    pub(super) async fn leave(&self, slot: &Arc<Slot>, pod: Pod) {
        if let Err(error) = self.parts.api.annotate(&pod.identity, None).await {
            tracing::warn!(pod = pod.full_name(), %error, "others are not told that the pod leaves the mesh");
        }
        tokio::time::sleep(self.parts.times.leave).await;
        if self.is_wanted(&slot.uid) {
            return;
        }
        let (netns, rules) = {
            let inner = slot.inner();
            (inner.netns.clone(), Rules { leaving: true, ..inner.rules.clone() })
        };
        let Some(netns) = netns else {
            self.forget(slot, "it left the mesh");
            return;
        };
        if let Err(error) = self.install(&netns, &rules).await {
            tracing::error!(pod = pod.full_name(), %error, "the pod can't leave the mesh; trying again");
            let note = format!("the pod's traffic should no longer be captured and still is: {error}");
            self.tell(slot, "EnrolmentStuck", note, true).await;
            return;
        }
        if let Some(entry) = self.parts.record.get(&slot.uid) {
            self.parts.record.put(crate::record::Entry { leaving: true, ..entry });
        }
        self.parts.ztunnels.withdraw(&slot.uid);
        if !self.parts.ztunnels.wait_withdrawn(&slot.uid, WITHDRAWAL).await {
            tracing::warn!(pod = pod.full_name(), "not every ztunnel has let go of the pod yet");
        }
        {
            let mut inner = slot.inner();
            inner.rules = rules;
            inner.pod = pod;
            inner.state = State::Leaving { connections: 0, look_at: Instant::now() };
        }
        self.parts.metrics.event("delete");
        self.look_at_leaving(slot).await;
    }

    /// Removes the last rules of a pod that left, once nothing needs them any more. The caller holds the slot's work.
    pub(super) async fn look_at_leaving(&self, slot: &Arc<Slot>) {
        let Some(netns) = slot.inner().netns.clone() else { return };
        let (capture, name) = (self.parts.capture.clone(), slot.name());
        let ports = slot.inner().rules.ports;
        let looked = tokio::task::spawn_blocking(move || {
            let open = carried(&netns, &ports).map_err(|error| error.to_string())?;
            if open == 0 {
                capture.remove(&netns).map_err(|error| error.to_string())?;
            }
            Ok::<_, String>(open)
        });
        match looked.await.map_err(|error| error.to_string()).flatten() {
            Ok(0) => self.forget(slot, "it left the mesh"),
            Ok(connections) => {
                slot.inner().state = State::Leaving { connections, look_at: Instant::now() + LOOK };
                tracing::debug!(pod = name, connections, "the pod has left; its connections go on");
            }
            Err(error) => {
                tracing::warn!(
                    pod = name,
                    error,
                    "the pod has left, and its rules can't be removed; trying again"
                );
                let look_at = Instant::now() + 30 * LOOK;
                slot.inner().state = State::Leaving { connections: 0, look_at };
            }
        }
    }
}

/// How many connections of the namespace pass ztunnel.
fn carried(netns: &Netns, ports: &capture::Ports) -> std::io::Result<usize> {
    let own = [ports.outbound, ports.inbound_plaintext, ports.inbound_hbone, ports.dns];
    let is_carried = |connection: &&sock_diag::Connection| {
        connection.mark == Some(ZTUNNEL_MARK) || own.contains(&connection.local.port())
    };
    Ok(sock_diag::connections(netns)?.iter().filter(is_carried).count())
}
