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
    while devices.changed().await.is_ok() {
        let (Some(node), Some(slot)) = (node.upgrade(), slot.upgrade()) else { return };
        slot.verify_at(Instant::now());
        node.wake.notify_one();
        drop((node, slot));
        tokio::time::sleep(TOGETHER).await;
    }
}
