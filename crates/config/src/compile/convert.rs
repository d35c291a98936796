//! Kubernetes' own kinds as instances and definitions.

use std::sync::Arc;

use hashbrown::HashSet;
use model::{
    Health, HealthPolicy, LoadBalancing, Locality, NetworkMode, PortMapping, Profile, ServiceKey,
    ServiceMembership, ServicePort, ServiceSource, Str, TargetPort, TunnelProtocol, Vip, Workload,
};

use super::instance::{Definition, Instance, Membership, Names, PortRule, Rank, RuleTarget};
use super::{Context, Options, Origin};
use crate::kinds::endpoint_slice::SliceEndpoint;
use crate::kinds::service::{Port, Target};
use crate::kinds::{EndpointSlice, Pod, Service, ServiceType};
use crate::labels::Labels;
use crate::resource::ObjectKey;

/// The uid of a pod's workload, as Istio's control plane has it.
pub(super) fn pod_uid(options: &Options, key: &ObjectKey) -> Str {
    format!("{}//Pod/{}/{}", options.cluster, key.namespace, key.name).into()
}

/// The key of a Service's service.
pub(super) fn service_key(options: &Options, key: &ObjectKey) -> ServiceKey {
    let hostname = format!("{}.{}.svc.{}", key.name, key.namespace, options.cluster_domain);
    ServiceKey { namespace: key.namespace.clone(), hostname: hostname.into() }
}

/// A pod as an instance. `None` for one that is no workload: without addresses, or at its end.
pub(super) fn pod(key: &ObjectKey, uid: Str, pod: Pod, context: &mut Context<'_>) -> Option<Instance> {
    if pod.finished || pod.addresses.is_empty() {
        return None;
    }
    let outside = pod.host_network || pod.sidecar;
    let membership = match context.options.origin {
        _ if outside => Membership::Fixed(TunnelProtocol::None),
        Origin::Files => Membership::Labelled,
        Origin::Cluster if pod.redirected => Membership::Fixed(TunnelProtocol::Hbone),
        Origin::Cluster => Membership::Fixed(TunnelProtocol::None),
    };
    let profile = Profile {
        namespace: key.namespace.clone(),
        service_account: pod.service_account,
        health: if pod.ready { Health::Healthy } else { Health::Unhealthy },
        network_mode: if pod.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard },
        workload_name: pod.workload_name,
        workload_kind: pod.workload_kind,
        labels: pod.labels.shared(),
        ..context.profile()
    };
    Some(Instance {
        workload: Workload {
            addresses: pod.addresses.into(),
            locality: context.at(&pod.node),
            ..context.workload(uid, &key.name, profile)
        },
        labels: pod.labels,
        ports: pod.ports,
        names: Names::Containers,
        rank: Rank::Pod,
        membership,
        fixed_locality: false,
        services: Box::new([]),
        capture: pod.capture,
    })
}

/// A Service's definition. `None` for one that is an alias.
pub(super) fn service(key: &ObjectKey, service: Service, context: &Context<'_>) -> Option<Definition> {
    if service.service_type == ServiceType::ExternalName {
        return None;
    }
    let ServiceKey { namespace, hostname } = service_key(context.options, key);
    let vip = |ip: &std::net::IpAddr| Vip { network: context.options.network.clone(), range: (*ip).into() };
    let health = if service.publish_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    Some(Definition {
        service: model::Service {
            name: key.name.clone(),
            namespace,
            hostname,
            vips: service.addresses.iter().map(vip).collect(),
            ports: service.ports.iter().map(service_port).collect(),
            subject_alt_names: Box::new([]),
            waypoint: None,
            load_balancing: LoadBalancing { health, ..LoadBalancing::default() },
            ip_families: service.families,
            session_affinity: service.affinity,
            source: ServiceSource::Kubernetes,
            canonical: true,
        },
        selector: service.selector,
        ports: service.ports.iter().map(port_rule).collect(),
        distribution: service.distribution,
        local_only: service.local_only,
        waypoint: service.waypoint,
        external: false,
    })
}

fn service_port(port: &Port) -> ServicePort {
    ServicePort {
        name: port.name.clone(),
        port: port.port,
        target: match &port.target {
            Target::Number(number) => TargetPort::Number(*number),
            Target::Name(_) => TargetPort::PerEndpoint,
        },
        app_protocol: port.app_protocol.clone(),
    }
}

fn port_rule(port: &Port) -> PortRule {
    PortRule {
        service_port: port.port,
        target: match &port.target {
            Target::Number(number) => RuleTarget::Number(*number),
            Target::Name(name) => RuleTarget::Name(name.clone()),
        },
    }
}

/// The endpoints of a slice, given its service. None where the slice repeats what the service's selector finds.
pub(super) fn slice(
    key: &ObjectKey,
    slice: &EndpointSlice,
    service: &Definition,
    context: &mut Context<'_>,
) -> Vec<Instance> {
    if slice.derived && service.selector.is_some() {
        return Vec::new();
    }
    let port = |port: &ServicePort| {
        let (_, number) = slice.ports.iter().find(|(name, _)| *name == port.name)?;
        Some(PortMapping { service_port: port.port, target_port: number.unwrap_or(port.port) })
    };
    let ports: Vec<PortMapping> = service.service.ports.iter().filter_map(port).collect();
    let ports = context.pool.mappings(&ports);
    let membership = ServiceMembership { service: service.service.key(), ports };
    let mut seen = HashSet::with_capacity(slice.endpoints.len());
    let endpoints = slice.endpoints.iter().filter(|endpoint| seen.insert(endpoint.address));
    endpoints.map(|endpoint| slice_endpoint(key, endpoint, membership.clone(), context)).collect()
}

fn slice_endpoint(
    key: &ObjectKey,
    endpoint: &SliceEndpoint,
    membership: ServiceMembership,
    context: &mut Context<'_>,
) -> Instance {
    let cluster = &context.options.cluster;
    let uid = format!(
        "{cluster}/discovery.k8s.io/EndpointSlice/{}/{}/{}",
        key.namespace, key.name, endpoint.address
    );
    let fixed_locality = endpoint.node.is_empty() && !endpoint.zone.is_empty();
    let locality = if fixed_locality {
        let locality = Locality { zone: endpoint.zone.clone(), ..Locality::default() };
        context.pool.locality(locality)
    } else {
        context.at(&endpoint.node)
    };
    let profile = Profile {
        namespace: key.namespace.clone(),
        health: if endpoint.ready { Health::Healthy } else { Health::Unhealthy },
        ..context.profile()
    };
    Instance {
        workload: Workload {
            addresses: [endpoint.address].into(),
            locality,
            ..context.workload(uid.into(), &key.name, profile)
        },
        labels: Labels::default(),
        ports: Arc::new([]),
        names: Names::Containers,
        rank: Rank::Endpoint,
        membership: Membership::Fixed(TunnelProtocol::None),
        fixed_locality,
        services: Box::new([membership]),
        capture: None,
    }
}

impl Context<'_> {
    /// What a workload has in common with others of which nothing is known but where they are: what a resource does not
    /// say.
    pub fn profile(&self) -> Profile {
        let empty = &self.empty;
        Profile {
            namespace: empty.clone(),
            service_account: self.default_account.clone(),
            trust_domain: self.trust_domain.clone(),
            network: self.options.network.clone(),
            hostname: empty.clone(),
            cluster: self.options.cluster.clone(),
            canonical_name: None,
            canonical_revision: empty.clone(),
            workload_name: None,
            ..Profile::default()
        }
    }

    /// A workload of a profile, which it shares with those that have the same.
    pub fn workload(&mut self, uid: Str, name: &str, profile: Profile) -> Workload {
        let mut workload = Workload::new(uid, name, Arc::new(profile));
        self.pool.share(&mut workload.profile);
        workload.locality = self.no_locality.clone();
        workload
    }

    /// Where the node is, as far as it is told by its name.
    fn at(&mut self, node: &Str) -> Arc<Locality> {
        if node.is_empty() {
            return self.no_locality.clone();
        }
        self.pool.locality(Locality { node: node.clone(), ..Locality::default() })
    }
}
