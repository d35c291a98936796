//! `v1 Pod`: a workload, and how its traffic is captured.

use std::net::IpAddr;
use std::sync::Arc;

use model::{Str, WorkloadKind, canonical_ip};

use super::capture;
use super::capture::Capture;
use super::namespace::report_mode;
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, silent};
use crate::labels::Labels;
use crate::metadata::{METADATA, Metadata, Owner, is_subdomain};
use crate::resource::{Kind, KindSpec, Resource};

/// A pod.
#[derive(Debug)]
pub struct Pod {
    /// Its labels.
    pub labels: Labels,
    /// Its service account.
    pub service_account: Str,
    /// The node that it runs on, empty before it is scheduled.
    pub node: Str,
    /// Whether it shares the node's addresses.
    pub host_network: bool,
    /// Its addresses; empty before it has any.
    pub addresses: Box<[IpAddr]>,
    /// Whether it has ended: it keeps its object, and no longer its addresses.
    pub finished: bool,
    /// Whether it takes traffic.
    pub ready: bool,
    /// The named TCP ports of its containers.
    pub ports: Arc<[(Str, u16)]>,
    /// The name of the object that made it; `None` for its own, when nothing did.
    pub workload_name: Option<Str>,
    /// The kind of that object.
    pub workload_kind: WorkloadKind,
    /// Whether it has a sidecar proxy of its own.
    pub sidecar: bool,
    /// Whether its node's agent says that its traffic is captured (`ambient.istio.io/redirection: enabled`).
    pub redirected: bool,
    /// How its traffic is captured, where that is said.
    pub capture: Option<Box<Capture>>,
}

/// What a node's agent says of a pod's traffic: `enabled` when it is captured, `pending` while it is about to be.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

const NODES_WORK: &str = "the kubelet's business";
const SCHEDULING: &str = "the scheduler's business";
const REPORT: &str = "the kubelet's report";

static SCHEMA: Schema = Schema {
    name: "Pod",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        nested("status", &STATUS),
    ],
};

static SPEC: Schema = Schema {
    name: "Pod.spec",
    fields: &[
        nested("containers", &CONTAINER),
        enforced("serviceAccountName"),
        enforced("nodeName"),
        enforced("hostNetwork"),
        nested("initContainers", &CONTAINER),
        enforced("serviceAccount"),
        silent("volumes", NODES_WORK),
        silent("restartPolicy", NODES_WORK),
        silent("terminationGracePeriodSeconds", NODES_WORK),
        silent("dnsPolicy", NODES_WORK),
        silent("securityContext", NODES_WORK),
        silent("schedulerName", SCHEDULING),
        silent("tolerations", SCHEDULING),
        silent("priority", SCHEDULING),
        silent("enableServiceLinks", NODES_WORK),
        silent("preemptionPolicy", SCHEDULING),
        silent("ephemeralContainers", "they share the pod's network and have no ports"),
        silent("activeDeadlineSeconds", NODES_WORK),
        silent("nodeSelector", SCHEDULING),
        silent("automountServiceAccountToken", "identities are not made from tokens in pods"),
        silent("hostPID", NODES_WORK),
        silent("hostIPC", NODES_WORK),
        silent("hostUsers", NODES_WORK),
        silent("shareProcessNamespace", NODES_WORK),
        silent("imagePullSecrets", NODES_WORK),
        enforced("hostname"),
        silent("subdomain", "a headless service's pods are found whether they name it or not"),
        silent("setHostnameAsFQDN", NODES_WORK),
        silent("hostnameOverride", NODES_WORK),
        silent("affinity", SCHEDULING),
        silent("hostAliases", NODES_WORK),
        silent("priorityClassName", SCHEDULING),
        silent("dnsConfig", NODES_WORK),
        silent("readinessGates", "the Ready condition has their result"),
        silent("runtimeClassName", NODES_WORK),
        silent("overhead", SCHEDULING),
        silent("topologySpreadConstraints", SCHEDULING),
        silent("os", SCHEDULING),
        silent("schedulingGates", SCHEDULING),
        silent("resourceClaims", SCHEDULING),
        silent("resources", SCHEDULING),
        silent("workloadRef", SCHEDULING),
    ],
};

static CONTAINER: Schema = Schema {
    name: "Pod.spec.containers",
    fields: &[
        silent("name", NODES_WORK),
        silent("image", NODES_WORK),
        nested("ports", &PORT),
        enforced("restartPolicy"),
        silent("env", NODES_WORK),
        silent("resources", SCHEDULING),
        silent("volumeMounts", NODES_WORK),
        silent("imagePullPolicy", NODES_WORK),
        silent("terminationMessagePath", NODES_WORK),
        silent("terminationMessagePolicy", NODES_WORK),
        silent("securityContext", NODES_WORK),
        silent("command", NODES_WORK),
        silent("args", NODES_WORK),
        silent("workingDir", NODES_WORK),
        silent("envFrom", NODES_WORK),
        silent("resizePolicy", NODES_WORK),
        silent("restartPolicyRules", NODES_WORK),
        silent("volumeDevices", NODES_WORK),
        silent(
            "livenessProbe",
            "the kubelet's probes are connections like any other of the node, until a node agent marks them",
        ),
        silent(
            "readinessProbe",
            "the kubelet's probes are connections like any other of the node, until a node agent marks them",
        ),
        silent(
            "startupProbe",
            "the kubelet's probes are connections like any other of the node, until a node agent marks them",
        ),
        silent("lifecycle", NODES_WORK),
        silent("stdin", NODES_WORK),
        silent("stdinOnce", NODES_WORK),
        silent("tty", NODES_WORK),
    ],
};

static PORT: Schema = Schema {
    name: "Pod.spec.containers.ports",
    fields: &[
        enforced("containerPort"),
        enforced("name"),
        enforced("protocol"),
        silent("hostPort", "a connection through the node arrives as one from outside the mesh"),
        silent("hostIP", "a connection through the node arrives as one from outside the mesh"),
    ],
};

static STATUS: Schema = Schema {
    name: "Pod.status",
    fields: &[
        enforced("phase"),
        enforced("podIP"),
        nested("podIPs", &POD_IP),
        nested("conditions", &CONDITION),
        silent("hostIP", REPORT),
        silent("hostIPs", REPORT),
        silent("startTime", REPORT),
        silent("containerStatuses", REPORT),
        silent("initContainerStatuses", REPORT),
        silent("ephemeralContainerStatuses", REPORT),
        silent("qosClass", REPORT),
        silent("message", REPORT),
        silent("reason", REPORT),
        silent("observedGeneration", REPORT),
        silent("nominatedNodeName", REPORT),
        silent("resize", REPORT),
        silent("resourceClaimStatuses", REPORT),
        silent("extendedResourceClaimStatus", REPORT),
        silent("allocatedResources", REPORT),
        silent("resources", REPORT),
    ],
};

static POD_IP: Schema = Schema { name: "Pod.status.podIPs", fields: &[enforced("ip")] };

static CONDITION: Schema = Schema {
    name: "Pod.status.conditions",
    fields: &[
        enforced("type"),
        enforced("status"),
        silent("lastProbeTime", REPORT),
        silent("lastTransitionTime", REPORT),
        silent("reason", REPORT),
        silent("message", REPORT),
        silent("observedGeneration", REPORT),
    ],
};

/// How the kind is read.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::Pod,
    group: "",
    versions: &["v1"],
    name: "Pod",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    report_mode(fields, metadata);
    let spec = fields.object("spec").map(|mut spec| read_spec(&mut spec, metadata.name)).unwrap_or_default();
    let status = fields.object("status").map(|mut status| read_status(&mut status)).unwrap_or_default();
    let sidecar = metadata.annotation("sidecar.istio.io/status").is_some();
    let redirection = metadata.annotation(REDIRECTION);
    // What these annotations ask for is then the sidecar's to do.
    let capture = if sidecar { None } else { capture::read(fields, metadata) };
    let (maker, workload_kind) = maker(metadata);
    let name = match metadata.labels.get("service.istio.io/workload-name") {
        Some(label) => Some(label.clone()),
        None => maker.map(|name| fields.context().pool.string(name)),
    };
    let name = name.filter(|name| **name != *metadata.name);
    let pool = &mut fields.context().pool;
    Some(Resource::Pod(Box::new(Pod {
        labels: metadata.labels.clone(),
        service_account: pool.string(if spec.account.is_empty() { "default" } else { spec.account }),
        node: pool.string(spec.node),
        host_network: spec.host_network,
        finished: matches!(status.phase, "Succeeded" | "Failed"),
        ready: status.is_ready() && !metadata.terminating,
        addresses: status.addresses.into(),
        ports: pool.named_ports(&spec.ports),
        workload_name: name,
        workload_kind,
        sidecar,
        redirected: redirection.is_some_and(|annotation| annotation.value == "enabled"),
        capture,
    })))
}

#[derive(Default)]
struct Spec<'n> {
    account: &'n str,
    node: &'n str,
    host_network: bool,
    ports: Vec<(&'n str, u16)>,
}

fn read_spec<'n>(spec: &mut Fields<'_, 'n>, name: &str) -> Spec<'n> {
    // A StatefulSet sets it to the pod's own name.
    if let Some(mut cursor) = spec.take("hostname") {
        match cursor.node().as_str() {
            Some(hostname) if hostname == name => {}
            Some(_) => {
                let message = "spec.hostname has no effect: a headless service's pods have their own names";
                cursor.report(Code::FieldNotApplicable, message, "");
            }
            None => {
                cursor.string();
            }
        }
    }
    let mut read = Spec { host_network: spec.boolean("hostNetwork").unwrap_or(false), ..Spec::default() };
    // The older field is a copy; the API server keeps them equal.
    for name in ["serviceAccount", "serviceAccountName"] {
        if let Some(mut cursor) = spec.take(name) {
            if cursor.node().as_str().is_some_and(|n| !n.is_empty() && !is_subdomain(n)) {
                cursor.invalid("not the name of a service account", "");
            }
            read.account = cursor.string().filter(|n| !n.is_empty()).unwrap_or(read.account);
        }
    }
    read.node = spec.string("nodeName").unwrap_or_default();
    spec.each("containers", |item| read_container(item, false, &mut read.ports));
    spec.each("initContainers", |item| read_container(item, true, &mut read.ports));
    read
}

/// The named TCP ports. Of the init containers only those that go on running beside the others count.
fn read_container<'n>(item: Cursor<'_, 'n>, init: bool, ports: &mut Vec<(&'n str, u16)>) {
    let Some(mut container) = item.fields() else { return };
    let runs_on = container.string("restartPolicy") == Some("Always") || !init;
    container.each("ports", |item| {
        let Some(mut port) = item.fields() else { return };
        let number = port.required("containerPort").and_then(|c| c.integer(1..=u16::MAX));
        let name = port.string("name");
        let tcp = port.string("protocol").is_none_or(|p| p == "TCP");
        if let (Some(number), Some(name), true, true) = (number, name, tcp, runs_on)
            && !ports.iter().any(|(n, _)| *n == name)
        {
            ports.push((name, number));
        }
    });
}

#[derive(Default)]
struct Status<'n> {
    phase: &'n str,
    addresses: Vec<IpAddr>,
    ready: Option<bool>,
}

impl Status<'_> {
    /// The Ready condition decides. Files that people write have none: then a pod that runs, or says nothing of
    /// its phase, is ready.
    fn is_ready(&self) -> bool {
        match self.ready {
            Some(ready) => ready && matches!(self.phase, "" | "Running"),
            None => matches!(self.phase, "" | "Running"),
        }
    }
}

fn read_status<'n>(status: &mut Fields<'_, 'n>) -> Status<'n> {
    let mut read = Status::default();
    if let Some(mut cursor) = status.take("phase") {
        let phase = cursor.node().as_str().unwrap_or_default();
        if !matches!(phase, "" | "Pending" | "Running" | "Succeeded" | "Failed" | "Unknown") {
            cursor.invalid(format_args!("{phase:?} is no phase of a pod"), "");
        }
        read.phase = cursor.string().unwrap_or_default();
    }
    let main = status.take("podIP").and_then(address);
    let mut all = Vec::new();
    status.each("podIPs", |item| {
        if let Some(ip) = item.fields().and_then(|mut f| f.take("ip").and_then(address)) {
            all.push(ip);
        }
    });
    if let (Some(main), Some(first)) = (main, all.first())
        && main != *first
    {
        let message = format!("status.podIP is {main}, and the first of status.podIPs is {first}");
        status.report(Code::InvalidValue, message, "make them equal");
    }
    read.addresses = if all.is_empty() { main.into_iter().collect() } else { all };
    status.each("conditions", |item| {
        let Some(mut condition) = item.fields() else { return };
        let kind = condition.string("type");
        let holds = condition.string("status") == Some("True");
        if kind == Some("Ready") {
            read.ready = Some(holds);
        }
    });
    read
}

/// An address that a pod can have.
fn address(mut cursor: Cursor<'_, '_>) -> Option<IpAddr> {
    let text = cursor.node().as_str();
    let Some(text) = text else {
        cursor.string();
        return None;
    };
    if text.is_empty() {
        return None; // as the kubelet reports it before there is one
    }
    match text.parse::<IpAddr>().map(canonical_ip) {
        Ok(ip) if !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast() => Some(ip),
        _ => {
            cursor.invalid(format_args!("{text:?} is no address that a pod can have"), "");
            None
        }
    }
}

/// The name and kind of what made a pod; no name for one that stands for itself. A ReplicaSet of a Deployment and a Job of
/// a CronJob are named after what made them.
fn maker<'n>(metadata: &Metadata<'n>) -> (Option<&'n str>, WorkloadKind) {
    let Some(Owner { kind, name }) = metadata.owner else { return (None, WorkloadKind::Pod) };
    match kind {
        "ReplicaSet" => {
            let hash = metadata.labels.get("pod-template-hash");
            let stem = hash.and_then(|h| name.strip_suffix(&**h)).and_then(|n| n.strip_suffix('-'));
            match stem {
                Some(stem) => (Some(stem), WorkloadKind::Deployment),
                None => (None, WorkloadKind::Pod),
            }
        }
        "Job" => match cron_job(name) {
            Some(stem) => (Some(stem), WorkloadKind::CronJob),
            None => (Some(name), WorkloadKind::Job),
        },
        "CronJob" => (Some(name), WorkloadKind::CronJob),
        "Deployment" => (Some(name), WorkloadKind::Deployment),
        // WDS has no kinds for the rest; their pods stand for themselves.
        _ => (None, WorkloadKind::Pod),
    }
}

/// A CronJob names its jobs after itself and the minute that they are due, eight digits in our days.
fn cron_job(job: &str) -> Option<&str> {
    let (stem, minute) = job.rsplit_once('-')?;
    (minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit()) && !stem.is_empty()).then_some(stem)
}
