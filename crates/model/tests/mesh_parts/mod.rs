//! Parts of a mesh for tests, with every field that a test does not care about at its plainest.
#![allow(dead_code, reason = "each test binary uses some of them")]
#![allow(clippy::expect_used)]

use std::net::IpAddr;
use std::sync::Arc;

use model::{
    PortMapping, Profile, Service, ServiceKey, ServiceMembership, ServicePort, ServiceSource, TargetPort,
    TunnelProtocol, Vip, Workload,
};

/// A pod of namespace `default` without an address.
pub fn workload(uid: &str) -> Workload {
    let profile =
        Profile { namespace: "default".into(), tunnel: TunnelProtocol::Hbone, ..Profile::default() };
    Workload::new(uid.into(), uid, Arc::new(profile))
}

/// The same with addresses.
pub fn workload_at(uid: &str, addresses: &[&str]) -> Workload {
    let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().expect("an address")).collect();
    Workload { addresses: addresses.into(), ..workload(uid) }
}

/// A membership that maps `service_port` to `target_port`.
pub fn member_of(service: &ServiceKey, service_port: u16, target_port: u16) -> ServiceMembership {
    ServiceMembership { service: service.clone(), ports: [PortMapping { service_port, target_port }].into() }
}

/// A service of port 80 with virtual addresses or ranges.
pub fn service(namespace: &str, hostname: &str, vips: &[&str]) -> Service {
    let vip = |range: &&str| Vip { network: "".into(), range: range.parse().expect("a range") };
    Service {
        name: hostname.into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        vips: vips.iter().map(vip).collect(),
        ports: [ServicePort {
            name: "http".into(),
            port: 80,
            target: TargetPort::Number(80),
            app_protocol: "".into(),
        }]
        .into(),
        subject_alt_names: Box::new([]),
        waypoint: None,
        load_balancing: model::LoadBalancing::default(),
        ip_families: model::IpFamilies::Automatic,
        session_affinity: None,
        source: ServiceSource::Kubernetes,
        canonical: false,
    }
}
