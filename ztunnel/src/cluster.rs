//! What a cluster adds to the proxy: how it goes with the control plane and the node agent.

use std::sync::Arc;

use process::metrics::{Description, Kind, Registry};
use serde_json::{Value, json};
use source::XdsStatus;

use crate::zds::ZdsStatus;

/// What is known of the control plane and the node agent, for metrics and the admin page.
#[derive(Clone)]
pub struct ClusterStatus {
    /// The control plane.
    pub xds: Arc<XdsStatus>,
    /// The node agent.
    pub zds: Arc<ZdsStatus>,
}

impl ClusterStatus {
    /// Registers the metrics of a cluster.
    pub fn register(&self, registry: &Registry) {
        self.xds.register(registry);
        let number = |name, help, kind, read: fn(&ZdsStatus) -> u64| {
            let status = self.zds.clone();
            registry
                .collect(Description { name, help, kind }, move |out| out.integer(&|_| {}, read(&status)));
        };
        number("culvert_zds_connected", "Whether the node agent is connected", Kind::Gauge, |s| {
            s.is_connected().into()
        });
        number(
            "culvert_zds_connections",
            "Connections made to the node agent",
            Kind::Counter,
            ZdsStatus::connections,
        );
        number("culvert_zds_messages", "Messages of the node agent", Kind::Counter, ZdsStatus::messages);
        number(
            "culvert_zds_messages_refused",
            "Messages of the node agent that were answered with an error",
            Kind::Counter,
            ZdsStatus::refused,
        );
        number("culvert_zds_pods", "Pods that the node agent has told of", Kind::Gauge, |s| s.pods() as u64);
    }

    /// As JSON, for `/config_dump`.
    pub fn dump(&self) -> Value {
        let zds = &self.zds;
        json!({
            "controlPlane": self.xds.dump(),
            "nodeAgent": {
                "connected": zds.is_connected(),
                "connections": zds.connections(),
                "messages": zds.messages(),
                "refused": zds.refused(),
                "pods": zds.pods(),
            },
        })
    }
}
