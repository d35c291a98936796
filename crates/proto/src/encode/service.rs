//! Writing services.

use std::time::Duration;

use model::{
    HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, LocalityScope, Service, ServicePort,
    ServiceSource, TargetPort, Vip,
};

use super::{EncodeError, Extensions, Obstacles, Reason, bytes, gateway};
use crate::decode::protocol_text;
use crate::wire::{culvert, workload as wire};

/// Writes a service.
///
/// Without extensions, ports lose their names, and application protocols and sources of services are told apart
/// only as far as Istio does: no proxy decides by the rest. A passthrough service becomes PASSTHROUGH.
///
/// # Errors
/// Session affinity, towards a receiver that does not know it; a name or port that would be read as something
/// else.
pub fn encode_service(service: &Service, extensions: Extensions) -> Result<wire::Service, EncodeError> {
    let s = service;
    let mut obstacles = Obstacles::default();
    obstacles.not_empty("hostname", &s.hostname);
    obstacles.no_slash("namespace", &s.namespace);
    if s.ports.iter().any(|p| p.target == TargetPort::Number(0)) {
        obstacles.add("ports.target", Reason::PortZero);
    }
    let extension = match extensions {
        Extensions::Culvert => extension(s, &mut obstacles),
        Extensions::None => {
            if s.session_affinity.is_some() {
                obstacles.add("session_affinity", Reason::SessionAffinity);
            }
            None
        }
    };
    let passthrough = extensions == Extensions::None && s.source == ServiceSource::Passthrough;
    let message = wire::Service {
        name: s.name.to_string(),
        namespace: s.namespace.to_string(),
        hostname: s.hostname.to_string(),
        addresses: s.vips.iter().map(address).collect(),
        ports: s.ports.iter().map(|p| port(p, extensions)).collect(),
        subject_alt_names: s.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: s.waypoint.as_ref().map(gateway),
        load_balancing: load_balancing(&s.load_balancing, passthrough),
        ip_families: ip_families(s.ip_families).into(),
        canonical: s.canonical,
        culvert: extension,
        ..wire::Service::default()
    };
    obstacles.result("service", &s.key().to_string(), message)
}

fn extension(s: &Service, obstacles: &mut Obstacles) -> Option<culvert::ServiceExtension> {
    use culvert::service_extension::Source;
    let source = match s.source {
        ServiceSource::Kubernetes => Source::Kubernetes,
        ServiceSource::Static => Source::Static,
        ServiceSource::Dns => Source::Dns,
        ServiceSource::Passthrough => Source::Passthrough,
    };
    let session_affinity = s.session_affinity.and_then(|timeout| {
        let written = duration(timeout);
        if written.is_none() {
            obstacles.add("session_affinity", Reason::Duration);
        }
        written
    });
    let message = culvert::ServiceExtension { session_affinity, source: source.into() };
    (message != culvert::ServiceExtension::default()).then_some(message)
}

fn duration(duration: Duration) -> Option<prost_types::Duration> {
    let seconds = i64::try_from(duration.as_secs()).ok()?;
    let nanos = i32::try_from(duration.subsec_nanos()).ok()?;
    Some(prost_types::Duration { seconds, nanos })
}

fn address(vip: &Vip) -> wire::NetworkAddress {
    let single = vip.range.prefix_len() == vip.range.max_prefix_len();
    wire::NetworkAddress {
        network: vip.network.to_string(),
        address: bytes(vip.range.addr()),
        length: (!single).then_some(vip.range.prefix_len().into()),
    }
}

fn port(port: &ServicePort, extensions: Extensions) -> wire::Port {
    let known = protocol(&port.app_protocol);
    let exact = if protocol_text(known) == &*port.app_protocol { "" } else { &port.app_protocol };
    let extension = culvert::PortExtension { name: port.name.to_string(), app_protocol: exact.to_owned() };
    let wanted = extensions == Extensions::Culvert && extension != culvert::PortExtension::default();
    wire::Port {
        service_port: port.port.into(),
        target_port: match port.target {
            TargetPort::Number(number) => number.into(),
            TargetPort::PerEndpoint => 0,
        },
        app_protocol: known.into(),
        culvert: wanted.then_some(extension),
    }
}

/// Reads the words of `appProtocol` and of port names (Kubernetes: standard application protocols; Istio:
/// protocol selection).
fn protocol(text: &str) -> wire::AppProtocol {
    match text {
        "http" => wire::AppProtocol::Http11,
        "http2" | "h2c" | "kubernetes.io/h2c" => wire::AppProtocol::Http2,
        "grpc" | "grpc-web" => wire::AppProtocol::Grpc,
        "tcp" => wire::AppProtocol::Tcp,
        "tls" | "https" => wire::AppProtocol::Tls,
        _ => wire::AppProtocol::Unknown,
    }
}

fn load_balancing(lb: &LoadBalancing, passthrough: bool) -> Option<wire::LoadBalancing> {
    use wire::load_balancing::{HealthPolicy as Wanted, Mode, Scope};
    let mode = match lb.mode {
        _ if passthrough => Mode::Passthrough,
        LoadBalancingMode::Any => Mode::UnspecifiedMode,
        LoadBalancingMode::Strict => Mode::Strict,
        LoadBalancingMode::Failover => Mode::Failover,
    };
    let health = match lb.health {
        HealthPolicy::OnlyHealthy => Wanted::OnlyHealthy,
        HealthPolicy::AllowAll => Wanted::AllowAll,
    };
    let scope = |scope: &LocalityScope| match scope {
        LocalityScope::Region => Scope::Region,
        LocalityScope::Zone => Scope::Zone,
        LocalityScope::Subzone => Scope::Subzone,
        LocalityScope::Node => Scope::Node,
        LocalityScope::Cluster => Scope::Cluster,
        LocalityScope::Network => Scope::Network,
    };
    let message = wire::LoadBalancing {
        routing_preference: lb.scopes.iter().map(|s| scope(s).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    };
    (message != wire::LoadBalancing::default()).then_some(message)
}

fn ip_families(families: IpFamilies) -> wire::IpFamilies {
    match families {
        IpFamilies::Automatic => wire::IpFamilies::Automatic,
        IpFamilies::V4Only => wire::IpFamilies::Ipv4Only,
        IpFamilies::V6Only => wire::IpFamilies::Ipv6Only,
        IpFamilies::Dual => wire::IpFamilies::Dual,
    }
}
