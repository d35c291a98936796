//! The JSON of `/config_dump`: the snapshot that decisions are made by, as it is.

use std::sync::Arc;

use model::{
    Action, Clause, GatewayAddress, GatewayTarget, LoadBalancingMode, Match, Mesh, Policy, Rule, Scope,
    Service, ServiceSource, TargetPort, TunnelProtocol, Workload,
};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

/// The whole snapshot, and more. Its serialisation makes one object after the other: that of a large mesh as a whole
/// would take many times the memory that the mesh does.
pub struct Dump {
    /// The snapshot.
    pub mesh: Arc<Mesh>,
    /// What else there is to say, by its name in the dump.
    pub more: Vec<(&'static str, Value)>,
}

impl Serialize for Dump {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mesh = &self.mesh;
        let mut workloads: Vec<&Workload> = mesh.workloads().map(AsRef::as_ref).collect();
        workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
        let mut services: Vec<&Service> = mesh.services().map(AsRef::as_ref).collect();
        services.sort_by_key(|s| s.key());
        let mut policies: Vec<&Policy> = mesh.policies().map(AsRef::as_ref).collect();
        policies.sort_by(|a, b| a.key.cmp(&b.key));
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("generation", &mesh.generation())?;
        map.serialize_entry("settings", &settings(mesh))?;
        map.serialize_entry("workloads", &Each { list: workloads, describe: workload })?;
        map.serialize_entry("services", &Each { list: services, describe: |s: &Service| service(mesh, s) })?;
        map.serialize_entry("policies", &Each { list: policies, describe: policy })?;
        for (name, value) in &self.more {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// A list that is described item by item.
struct Each<'a, T, F> {
    list: Vec<&'a T>,
    describe: F,
}

impl<T, F: Fn(&T) -> Value> Serialize for Each<'_, T, F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.list.iter().map(|item| (self.describe)(item)))
    }
}

fn settings(mesh: &Mesh) -> Value {
    let settings = mesh.settings();
    json!({
        "meshId": settings.mesh_id(),
        "trustDomain": settings.trust_domains.own.as_str(),
        "trustDomainAliases": settings.trust_domains.aliases.iter().map(model::TrustDomain::as_str).collect::<Vec<_>>(),
        "rootNamespace": &*settings.root_namespace,
        "clusterDomain": &*settings.cluster_domain,
        "outboundTrafficPolicy": match settings.outbound {
            model::OutboundMode::AllowAny => "ALLOW_ANY",
            model::OutboundMode::RegistryOnly => "REGISTRY_ONLY",
        },
        "nodeLocal": settings.node_local.mesh.as_str(),
        "nodeLocalOfNamespaces": settings.node_local.namespaces.iter()
            .map(|(name, mode)| (name.to_string(), mode.as_str().into()))
            .collect::<serde_json::Map<_, Value>>(),
    })
}

fn workload(w: &Workload) -> Value {
    json!({
        "uid": &*w.uid,
        "name": w.name(),
        "namespace": &*w.namespace,
        "serviceAccount": &*w.service_account,
        "identity": w.identity().map(|i| i.to_string()).ok(),
        "addresses": w.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "hostname": &*w.hostname,
        "network": &*w.network,
        "node": &**w.node(),
        "cluster": &*w.cluster,
        "protocol": match w.tunnel {
            TunnelProtocol::Hbone => "HBONE",
            TunnelProtocol::None => "TCP",
            TunnelProtocol::LegacyIstioMtls => "LEGACY_ISTIO_MTLS",
        },
        "networkMode": match w.network_mode {
            model::NetworkMode::Standard => "Standard",
            model::NetworkMode::HostNetwork => "HostNetwork",
        },
        "status": match w.health {
            model::Health::Healthy => "Healthy",
            model::Health::Unhealthy => "Unhealthy",
        },
        "locality": { "region": &*w.locality.region, "zone": &*w.locality.zone, "subzone": &*w.locality.subzone },
        "canonicalName": w.canonical_name(),
        "canonicalRevision": &*w.canonical_revision,
        "workloadName": w.workload_name(),
        "workloadType": w.workload_kind.to_string(),
        "services": w.services.iter().map(|m| m.service.to_string()).collect::<Vec<_>>(),
        "authorizationPolicies": w.policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "waypoint": w.waypoint.as_deref().map(gateway),
        "capacity": w.capacity,
    })
}

fn gateway(g: &GatewayAddress) -> Value {
    let destination = match &g.target {
        GatewayTarget::Service(key) => key.to_string(),
        GatewayTarget::Address(address) => address.to_string(),
    };
    json!({ "destination": destination, "hboneMtlsPort": g.hbone_mtls_port })
}

fn service(mesh: &Mesh, s: &Service) -> Value {
    let set = mesh.endpoints(&s.key()).cloned().unwrap_or_default();
    let endpoints: Vec<_> = set
        .as_slice()
        .iter()
        .map(|e| {
            let ports: Map<String, Value> =
                set.ports(e).iter().map(|p| (p.service_port.to_string(), p.target_port.into())).collect();
            json!({ "workload": &*e.workload.uid, "ports": ports })
        })
        .collect();
    json!({
        "name": &*s.name,
        "namespace": &*s.namespace,
        "hostname": &*s.hostname,
        "vips": s.vips.iter().map(|v| format!("{}/{}", v.network, v.range)).collect::<Vec<_>>(),
        "ports": s.ports.iter().map(|p| json!({
            "name": &*p.name,
            "port": p.port,
            "targetPort": match p.target { TargetPort::Number(n) => json!(n), TargetPort::PerEndpoint => json!("per endpoint") },
            "appProtocol": &*p.app_protocol,
        })).collect::<Vec<_>>(),
        "source": match s.source {
            ServiceSource::Kubernetes => "Kubernetes",
            ServiceSource::Static => "ServiceEntry/STATIC",
            ServiceSource::Dns => "ServiceEntry/DNS",
            ServiceSource::Passthrough => "ServiceEntry/NONE",
        },
        "subjectAltNames": s.subject_alt_names.iter().map(|n| &**n).collect::<Vec<_>>(),
        "loadBalancing": match s.load_balancing.mode {
            LoadBalancingMode::Any => "any",
            LoadBalancingMode::Strict => "strict",
            LoadBalancingMode::Failover => "failover",
        },
        "sessionAffinitySeconds": s.session_affinity.map(|d| d.as_secs()),
        "waypoint": s.waypoint.as_ref().map(gateway),
        "endpoints": endpoints,
    })
}

fn policy(p: &Policy) -> Value {
    json!({
        "name": &*p.key.name,
        "namespace": &*p.key.namespace,
        "scope": match p.scope {
            Scope::Global => "Global",
            Scope::Namespace => "Namespace",
            Scope::WorkloadSelector => "WorkloadSelector",
        },
        "action": match p.action { Action::Allow => "Allow", Action::Deny => "Deny", Action::Custom(_) => "Custom" },
        "dryRun": p.dry_run,
        "rules": p.rules.iter().map(rule).collect::<Vec<_>>(),
    })
}

fn rule(r: &Rule) -> Value {
    let clause = |c: &Clause| Value::from(c.matches.iter().map(matches).collect::<Vec<_>>());
    Value::from(r.clauses.iter().map(clause).collect::<Vec<_>>())
}

/// The fields that are set.
fn matches(m: &Match) -> Value {
    fn texts<T: ToString>(list: &[T]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }
    let fields = [
        ("namespaces", texts(&m.namespaces)),
        ("notNamespaces", texts(&m.not_namespaces)),
        ("principals", texts(&m.principals)),
        ("notPrincipals", texts(&m.not_principals)),
        ("serviceAccounts", texts(&m.service_accounts)),
        ("notServiceAccounts", texts(&m.not_service_accounts)),
        ("trustDomains", texts(&m.trust_domains)),
        ("notTrustDomains", texts(&m.not_trust_domains)),
        ("sourceIps", texts(&m.source_ips)),
        ("notSourceIps", texts(&m.not_source_ips)),
        ("destinationIps", texts(&m.destination_ips)),
        ("notDestinationIps", texts(&m.not_destination_ips)),
        ("destinationPorts", texts(&m.destination_ports)),
        ("notDestinationPorts", texts(&m.not_destination_ports)),
    ];
    fields.into_iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.to_owned(), Value::from(v))).collect()
}
