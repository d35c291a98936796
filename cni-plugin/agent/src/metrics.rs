//! The agent's metrics (names: facts of compatibility, section 4.12).

use std::sync::Arc;

use process::metrics::{Counter, Description, Family, Gauge, Kind, LabelWriter, Labels, Registry};

use crate::node::Node;
use crate::zds::Ztunnels;

/// Labels of one pair each.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Event {
    kind: &'static str,
}

impl Labels for Event {
    fn write(&self, out: &mut LabelWriter<'_>) {
        out.pair("type", self.kind);
    }
}

/// How an installation of the plugin went.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Outcome {
    result: &'static str,
}

impl Labels for Outcome {
    fn write(&self, out: &mut LabelWriter<'_>) {
        out.pair("result", self.result);
    }
}

/// A request of the plugin.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PluginRequest {
    command: &'static str,
    result: &'static str,
}

impl Labels for PluginRequest {
    fn write(&self, out: &mut LabelWriter<'_>) {
        out.pair("command", self.command);
        out.pair("result", self.result);
    }
}

/// Counters. Cloning shares them.
#[derive(Clone)]
pub struct Metrics {
    events: Arc<Family<Event, Counter>>,
    installs: Arc<Family<Outcome, Counter>>,
    requests: Arc<Family<PluginRequest, Counter>>,
    warnings: Arc<Family<(), Gauge>>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Registers the counters.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        Self {
            events: registry
                .counters("nodeagent_reconcile_events", "Pods added, changed, repaired and let go"),
            installs: registry.counters("istio_cni_installs", "Times that the CNI plugin was put in place"),
            requests: registry.counters("istio_cni_plugin_requests", "Requests of the CNI plugin"),
            warnings: registry.gauges(
                "culvert_cni_configuration_warnings",
                "What is wrong with the node's CNI configuration though the plugin is in place: see the log",
            ),
        }
    }

    /// Something was done to a pod: `add`, `update`, `repair`, `restore`, `delete`.
    pub fn event(&self, kind: &'static str) {
        self.events.with(&Event { kind }).inc();
    }

    /// The plugin or its configuration was written: `SUCCESS` or what failed.
    pub fn install(&self, result: &'static str) {
        self.installs.with(&Outcome { result }).inc();
    }

    /// What is wrong with the node's CNI configuration though the plugin is in place.
    pub fn cni_warnings(&self, number: usize) {
        self.warnings.with(&()).set(i64::try_from(number).unwrap_or(i64::MAX));
    }

    /// The plugin asked for something.
    pub fn request(&self, command: &'static str, result: &'static str) {
        self.requests.with(&PluginRequest { command, result }).inc();
    }
}

/// Registers what is read when somebody scrapes.
pub fn register(registry: &Registry, node: &Arc<Node>, ztunnels: &Ztunnels) {
    let gauge = |name, help, read: Box<dyn Fn() -> usize + Send + Sync>| {
        registry.collect(Description { name, help, kind: Kind::Gauge }, move |out| {
            out.integer(&|_| {}, read());
        });
    };
    let connected = ztunnels.clone();
    gauge("ztunnel_connected", "Ztunnels that are connected", Box::new(move || connected.connected()));
    let (counted, served) = (node.clone(), ztunnels.clone());
    gauge(
        "culvert_pods_not_captured",
        "Pods that should be in the mesh and are not: labelled and running, without redirection",
        Box::new(move || counted.counts().not_captured),
    );
    gauge(
        "culvert_pods_refused",
        "Pods whose traffic is captured and refused, because no ztunnel serves them",
        Box::new(move || served.unserved()),
    );
    let node = node.clone();
    registry.collect(
        Description { name: "culvert_pods", help: "Pods of this node by capture state", kind: Kind::Gauge },
        move |out| {
            let counts = node.counts();
            for (state, number) in [
                ("enrolled", counts.enrolled),
                ("closed", counts.closed),
                ("waiting", counts.not_captured),
                ("leaving", counts.leaving),
            ] {
                out.integer(&|labels| labels.pair("state", state), number);
            }
        },
    );
}
