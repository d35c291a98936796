//! Devices that pods get while they run.
//!
//! Rules of netfilter are for all devices of a namespace, those of eBPF for one each. A device that is added to a pod is guarded
//! as soon as the kernel tells of it, and not only at the next look at the pod's rules.

use std::sync::{Arc, Weak};
use std::time::Duration;

use net::Netns;
use net::netlink::Devices;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Node;
use super::slot::Slot;

/// A device comes with addresses and routes, each a change: the first is looked at at once, the others together.
const TOGETHER: Duration = Duration::from_millis(50);
/// Who may change devices may do so all the time, and each look is at the node's cost: the time between looks doubles up to this
/// while changes keep coming, and begins anew after none came for as long.
const LONGEST: Duration = Duration::from_secs(2);

impl Node {
    /// From now on, changes of the devices in the pod's namespace have its rules looked at.
    pub(super) fn watch_devices(self: &Arc<Self>, slot: &Arc<Slot>, netns: &Netns) {
        if !self.parts.capture.is_by_device() {
            return;
        }
        let devices = match Devices::open(netns) {
            Ok(devices) => devices,
            Err(error) => {
                let seconds = self.parts.times.verify.as_secs();
                tracing::warn!(pod = slot.name(), %error, seconds, "a device that is added is guarded after so long only");
                return;
            }
        };
        let mut watch = JoinSet::new();
        watch.spawn(look(Arc::downgrade(self), Arc::downgrade(slot), devices));
        // An earlier one, of another sandbox maybe, ends here.
        slot.inner().watch = watch;
    }
}

async fn look(node: Weak<Node>, slot: Weak<Slot>, devices: Devices) {
    let mut pause = Duration::ZERO;
    loop {
        let quiet_since = Instant::now();
        if devices.changed().await.is_err() {
            return;
        }
        pause = next_pause(pause, quiet_since.elapsed());
        let (Some(node), Some(slot)) = (node.upgrade(), slot.upgrade()) else { return };
        slot.verify_at(Instant::now());
        node.wake.notify_one();
        drop((node, slot));
        tokio::time::sleep(pause).await;
    }
}

/// For how long nothing is looked at from now on, by the last such time and how long it has been quiet since.
fn next_pause(last: Duration, quiet: Duration) -> Duration {
    if quiet >= LONGEST { TOGETHER } else { (last * 2).clamp(TOGETHER, LONGEST) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_rarer_while_changes_keep_coming() {
        let moment = Duration::from_millis(1);
        let mut pause = next_pause(Duration::ZERO, moment);
        let mut pauses = vec![pause.as_millis()];
        for _ in 0..7 {
            pause = next_pause(pause, moment);
            pauses.push(pause.as_millis());
        }
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        // Whoever waits for as long as that gains nothing by it.
        assert_eq!(next_pause(pause, LONGEST - moment), LONGEST);
        assert_eq!(next_pause(pause, LONGEST), TOGETHER);
    }
}
