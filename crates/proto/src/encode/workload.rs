//! Writing workloads. All that the model has of them is in Istio's wire, but for their labels.

use std::collections::BTreeMap;

use model::{ApplicationTunnel, Health, NetworkMode, Str, TunnelProtocol, Workload, WorkloadKind};

use super::{EncodeError, Obstacles, Reason, bytes, gateway};
use crate::wire::{culvert, workload as wire};

/// Writes a workload. The trust domain is always written out, since a receiver may have another default; a
/// service that the workload lists twice becomes one with the ports of both.
///
/// # Errors
/// A part is empty that would be read as something else, or a name holds the separator of names.
pub fn encode_workload(workload: &Workload) -> Result<wire::Workload, EncodeError> {
    let w = workload;
    let mut obstacles = Obstacles::default();
    obstacles.not_empty("uid", &w.uid);
    obstacles.not_empty("service_account", &w.service_account);
    obstacles.not_empty("cluster", &w.cluster);
    for policy in &w.policies {
        obstacles.no_slash("policies.namespace", &policy.namespace);
    }
    for membership in &*w.services {
        obstacles.no_slash("services.namespace", &membership.service.namespace);
    }
    if w.application_tunnel.is_some_and(|t| t.port == Some(0)) {
        obstacles.add("application_tunnel.port", Reason::PortZero);
    }
    let message = wire::Workload {
        uid: w.uid.to_string(),
        name: w.name().to_owned(),
        namespace: w.namespace.to_string(),
        addresses: w.addresses.iter().map(|ip| bytes(*ip)).collect(),
        hostname: w.hostname.to_string(),
        network: w.network.to_string(),
        tunnel_protocol: tunnel(w.tunnel).into(),
        trust_domain: w.trust_domain.to_string(),
        service_account: if &*w.service_account == "default" {
            String::new()
        } else {
            w.service_account.to_string()
        },
        waypoint: w.waypoint.as_deref().map(gateway),
        network_gateway: w.network_gateway.as_deref().map(gateway),
        node: w.node().to_string(),
        canonical_name: w.canonical_name().to_owned(),
        canonical_revision: w.canonical_revision.to_string(),
        workload_type: kind(w.workload_kind).into(),
        workload_name: w.workload_name().to_owned(),
        native_tunnel: false,
        application_tunnel: w.application_tunnel.map(application_tunnel),
        services: services(w),
        authorization_policies: w.policies.iter().map(ToString::to_string).collect(),
        status: health(w.health).into(),
        cluster_id: w.cluster.to_string(),
        locality: locality(w),
        network_mode: network_mode(w.network_mode).into(),
        extensions: Vec::new(),
        capacity: (w.capacity != 1).then_some(w.capacity),
        culvert: None,
    };
    obstacles.result("workload", &w.uid, message)
}

/// Adds the labels that `wanted` holds for to a workload that is sent to a proxy of ours. Without this none are sent: a
/// pod has many, and few are asked for.
#[must_use]
pub fn with_labels(
    message: wire::Workload,
    labels: &[(Str, Str)],
    wanted: impl Fn(&str) -> bool,
) -> wire::Workload {
    let asked = labels.iter().filter(|(key, _)| wanted(key));
    let labels: BTreeMap<_, _> = asked.map(|(key, value)| (key.to_string(), value.to_string())).collect();
    let extension = culvert::WorkloadExtension { labels };
    wire::Workload { culvert: (!extension.labels.is_empty()).then_some(extension), ..message }
}

fn services(workload: &Workload) -> BTreeMap<String, wire::PortList> {
    let mut services: BTreeMap<String, wire::PortList> = BTreeMap::new();
    for membership in &*workload.services {
        let list = services.entry(membership.service.to_string()).or_default();
        list.ports.extend(membership.ports.iter().map(|p| wire::Port {
            service_port: p.service_port.into(),
            target_port: p.target_port.into(),
            ..wire::Port::default()
        }));
    }
    services
}

fn locality(workload: &Workload) -> Option<wire::Locality> {
    let l = &workload.locality;
    let message = wire::Locality {
        region: l.region.to_string(),
        zone: l.zone.to_string(),
        subzone: l.subzone.to_string(),
    };
    (message != wire::Locality::default()).then_some(message)
}

fn tunnel(tunnel: TunnelProtocol) -> wire::TunnelProtocol {
    match tunnel {
        TunnelProtocol::None => wire::TunnelProtocol::None,
        TunnelProtocol::Hbone => wire::TunnelProtocol::Hbone,
        TunnelProtocol::LegacyIstioMtls => wire::TunnelProtocol::LegacyIstioMtls,
    }
}

fn network_mode(mode: NetworkMode) -> wire::NetworkMode {
    match mode {
        NetworkMode::Standard => wire::NetworkMode::Standard,
        NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
    }
}

fn health(health: Health) -> wire::WorkloadStatus {
    match health {
        Health::Healthy => wire::WorkloadStatus::Healthy,
        Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
    }
}

fn kind(kind: WorkloadKind) -> wire::WorkloadType {
    match kind {
        WorkloadKind::Deployment => wire::WorkloadType::Deployment,
        WorkloadKind::CronJob => wire::WorkloadType::Cronjob,
        WorkloadKind::Pod => wire::WorkloadType::Pod,
        WorkloadKind::Job => wire::WorkloadType::Job,
    }
}

fn application_tunnel(tunnel: ApplicationTunnel) -> wire::ApplicationTunnel {
    use wire::application_tunnel::Protocol;
    let protocol = if tunnel.proxy_protocol { Protocol::Proxy } else { Protocol::None };
    wire::ApplicationTunnel { protocol: protocol.into(), port: tunnel.port.unwrap_or_default().into() }
}
