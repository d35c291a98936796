//! What the agent knows of a pod, and whether the pod is to be in the mesh (facts of compatibility, section 4.4).

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod as KubePod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::zds::PodIdentity;

/// The label that puts pods into the mesh, on a namespace or a pod.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// What [`DATAPLANE_MODE`] says for that.
pub const AMBIENT: &str = "ambient";
/// What tells the control plane that a pod speaks HBONE.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
const SIDECAR: &str = "sidecar.istio.io/status";
/// Of a static pod's mirror: the uid by which the kubelet, the runtime and the control groups know the pod.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Annotations that say what of a pod's traffic is captured, beside those with [`CAPTURE_PREFIX`].
const CAPTURE: [&str; 3] = [
    "ambient.istio.io/bypass-inbound-capture",
    "ambient.istio.io/dns-capture",
    "istio.io/reroute-virtual-interfaces",
];
const CAPTURE_PREFIX: &str = "traffic.sidecar.istio.io/";

/// Ports that one pod's probes may have.
const PROBE_PORTS: usize = 64;

/// A pod of this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    /// Who it is.
    pub identity: PodIdentity,
    /// The uid that the node knows it by, where that is another: of a static pod.
    pub static_uid: Option<String>,
    /// Its own [`DATAPLANE_MODE`].
    pub mode: Option<String>,
    /// Whether it is in the node's network namespace.
    pub host_network: bool,
    /// Whether it has a sidecar proxy of its own.
    pub sidecar: bool,
    /// Whether it is a ztunnel.
    pub ztunnel: bool,
    /// Whether it has ended.
    pub finished: bool,
    /// Its addresses; none before it has a sandbox.
    pub addresses: Vec<IpAddr>,
    /// Those of its annotations that concern capture.
    pub annotations: BTreeMap<String, String>,
    /// Its [`REDIRECTION`].
    pub redirection: Option<String>,
    /// The TCP ports that the kubelet's probes and hooks connect to.
    pub probe_ports: Vec<u16>,
    /// The version of the object, for messages to the API server.
    pub resource_version: String,
}

/// Whether a pod is to be in the mesh.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// It is.
    InMesh,
    /// It isn't; why not.
    Outside(&'static str),
}

impl Pod {
    /// What is known from the API server's object; `None` for one without a uid.
    #[must_use]
    pub fn of(pod: &KubePod) -> Option<Self> {
        let metadata = &pod.metadata;
        let spec = pod.spec.as_ref();
        let status = pod.status.as_ref();
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let labels = metadata.labels.as_ref();
        let label = |name: &str| labels.and_then(|labels| labels.get(name)).cloned();
        let annotations = metadata.annotations.clone().unwrap_or_default();
        let account = spec.and_then(|spec| spec.service_account_name.clone()).filter(|name| !name.is_empty());
        let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or_default();
        let mut addresses: Vec<IpAddr> = status
            .and_then(|status| status.pod_ips.as_ref())
            .into_iter()
            .flatten()
            .filter_map(|ip| ip.ip.parse().ok())
            .collect();
        if addresses.is_empty() {
            addresses.extend(status.and_then(|status| status.pod_ip.as_ref()?.parse::<IpAddr>().ok()));
        }
        Some(Self {
            identity: PodIdentity {
                uid: metadata.uid.clone()?,
                namespace: text(&metadata.namespace),
                name: text(&metadata.name),
                service_account: account.unwrap_or_else(|| "default".to_owned()),
            },
            static_uid: annotations.get(MIRROR).cloned(),
            mode: label(DATAPLANE_MODE),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            sidecar: annotations.contains_key(SIDECAR),
            ztunnel: label("app").as_deref() == Some("ztunnel"),
            finished: matches!(phase, "Succeeded" | "Failed"),
            addresses,
            redirection: annotations.get(REDIRECTION).cloned(),
            annotations: annotations
                .into_iter()
                .filter(|(key, _)| CAPTURE.contains(&key.as_str()) || key.starts_with(CAPTURE_PREFIX))
                .collect(),
            probe_ports: spec.map(probe_ports).unwrap_or_default(),
            resource_version: text(&metadata.resource_version),
        })
    }

    /// Whether the pod is to be in the mesh, where its namespace has this mode.
    #[must_use]
    pub fn standing(&self, namespace_mode: Option<&str>, places: &Places) -> Standing {
        let own = self.mode.as_deref();
        let PodIdentity { namespace, .. } = &self.identity;
        if own == Some("none") {
            Standing::Outside("its label istio.io/dataplane-mode is none")
        } else if own != Some(AMBIENT) && namespace_mode != Some(AMBIENT) {
            Standing::Outside("neither it nor its namespace is labelled istio.io/dataplane-mode=ambient")
        } else if places.excluded.contains(namespace) {
            Standing::Outside("its namespace is excluded (--exclude-namespaces)")
        } else if self.host_network {
            Standing::Outside("it is in the node's network (hostNetwork)")
        } else if self.sidecar {
            Standing::Outside("it has a sidecar proxy (sidecar.istio.io/status)")
        } else if self.ztunnel && *namespace == places.system {
            Standing::Outside("it is a ztunnel")
        } else {
            Standing::InMesh
        }
    }

    /// The uid that the kubelet and the container runtime know it by.
    #[must_use]
    pub fn node_uid(&self) -> &str {
        self.static_uid.as_deref().unwrap_or(&self.identity.uid)
    }

    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.identity.namespace, self.identity.name)
    }
}

/// Namespaces that matter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Places {
    /// Where the mesh itself lives.
    pub system: String,
    /// Whose pods are never in the mesh.
    pub excluded: Vec<String>,
}

/// The ports of all probes and hooks that connect to the pod's own addresses.
fn probe_ports(spec: &k8s_openapi::api::core::v1::PodSpec) -> Vec<u16> {
    let mut ports = Vec::new();
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    for container in containers {
        let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
        for probe in probes.into_iter().flatten() {
            ports.extend(ports_of(probe, container));
        }
        let hooks = container.lifecycle.iter().flat_map(|l| [&l.post_start, &l.pre_stop]).flatten();
        for hook in hooks {
            let http = hook.http_get.as_ref().filter(|get| get.host.as_deref().is_none_or(str::is_empty));
            ports.extend(http.and_then(|get| number(&get.port, container)));
            let tcp = hook.tcp_socket.as_ref().filter(|get| get.host.as_deref().is_none_or(str::is_empty));
            ports.extend(tcp.and_then(|get| number(&get.port, container)));
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports.truncate(PROBE_PORTS);
    ports
}

/// A probe with a host of its own goes elsewhere.
fn ports_of(probe: &Probe, container: &Container) -> Option<u16> {
    if let Some(get) = probe.http_get.as_ref().filter(|get| get.host.as_deref().is_none_or(str::is_empty)) {
        return number(&get.port, container);
    }
    if let Some(tcp) = probe.tcp_socket.as_ref().filter(|tcp| tcp.host.as_deref().is_none_or(str::is_empty)) {
        return number(&tcp.port, container);
    }
    u16::try_from(probe.grpc.as_ref()?.port).ok()
}

fn number(port: &IntOrString, container: &Container) -> Option<u16> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).ok().filter(|port| *port > 0),
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name));
            match named {
                Some(port) => u16::try_from(port.container_port).ok(),
                None => name.parse().ok(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(value: serde_json::Value) -> Pod {
        Pod::of(&serde_json::from_value(value).unwrap()).unwrap()
    }

    #[test]
    fn labels_of_pod_and_namespace_decide() {
        let places = Places { system: "culvert-system".to_owned(), excluded: vec!["kube-system".to_owned()] };
        let inside = |mode: Option<&str>, namespace_mode, change: fn(&mut Pod)| {
            let mut pod = pod(json!({ "metadata": { "uid": "u", "name": "web", "namespace": "shop" } }));
            pod.mode = mode.map(str::to_owned);
            change(&mut pod);
            pod.standing(namespace_mode, &places) == Standing::InMesh
        };
        for (own, namespace, expected) in [
            (None, None, false),
            (None, Some("ambient"), true),
            (Some("ambient"), None, true),
            (Some("none"), Some("ambient"), false),
            (Some("other"), None, false),
            (Some("other"), Some("ambient"), true),
            (None, Some("none"), false),
            (Some("ambient"), Some("none"), true),
        ] {
            assert_eq!(inside(own, namespace, |_| ()), expected, "{own:?} {namespace:?}");
        }
        let labelled = Some("ambient");
        assert!(!inside(None, labelled, |pod| pod.host_network = true));
        assert!(!inside(None, labelled, |pod| pod.sidecar = true));
        assert!(!inside(None, labelled, |pod| pod.identity.namespace = "kube-system".to_owned()));
        assert!(inside(None, labelled, |pod| pod.ztunnel = true), "an app of that name elsewhere");
        assert!(!inside(None, labelled, |pod| {
            pod.ztunnel = true;
            pod.identity.namespace = "culvert-system".to_owned();
        }));
    }

    #[test]
    fn probes_lead_to_ports_by_number_and_name() {
        let pod = pod(json!({
            "metadata": {
                "uid": "u", "name": "web", "namespace": "shop",
                "annotations": {
                    "ambient.istio.io/redirection": "enabled", "ambient.istio.io/dns-capture": "false",
                    "traffic.sidecar.istio.io/excludeOutboundPorts": "3306", "prometheus.io/port": "1",
                },
            },
            "spec": {
                "containers": [{
                    "name": "a",
                    "ports": [{ "name": "http", "containerPort": 8080 }],
                    "livenessProbe": { "httpGet": { "port": "http" } },
                    "readinessProbe": { "tcpSocket": { "port": 9090 } },
                    "startupProbe": { "grpc": { "port": 7070 } },
                    "lifecycle": { "preStop": { "httpGet": { "port": 6060 } },
                                   "postStart": { "exec": { "command": ["x"] } } },
                }],
                "initContainers": [{ "name": "b", "startupProbe": { "httpGet": { "port": "5050" } } }, {
                    "name": "c",
                    "livenessProbe": { "httpGet": { "port": 1, "host": "192.0.2.1" } },
                    "readinessProbe": { "tcpSocket": { "port": 0 } },
                }],
            },
            "status": { "phase": "Running", "podIP": "10.0.0.2",
                        "podIPs": [{ "ip": "10.0.0.2" }, { "ip": "fd00::2" }] },
        }));
        assert_eq!(pod.probe_ports, [5050, 6060, 7070, 8080, 9090]);
        assert_eq!(pod.addresses.len(), 2);
        assert_eq!(pod.redirection.as_deref(), Some("enabled"));
        let kept: Vec<_> = pod.annotations.keys().map(String::as_str).collect();
        assert_eq!(kept, ["ambient.istio.io/dns-capture", "traffic.sidecar.istio.io/excludeOutboundPorts"]);
        assert_eq!(pod.identity.service_account, "default");
    }
}
