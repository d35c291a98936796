//! Reading services.

use std::time::Duration;

use model::{
    HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, LocalityScope, Service, ServicePort,
    ServiceSource, TargetPort, Vip,
};

use super::{DecodeError, Decoder, Fault, Problem, cut, each, port, range};
use crate::wire::{culvert, workload as wire};

impl Decoder {
    /// Reads a service.
    ///
    /// # Errors
    /// A field has no meaning in the model; the error names it.
    pub fn service(&mut self, service: &wire::Service) -> Result<Service, DecodeError> {
        self.read_service(service).map_err(|fault| {
            fault.of("service", format_args!("{}/{}", cut(&service.namespace), service.hostname))
        })
    }

    fn read_service(&mut self, s: &wire::Service) -> Result<Service, Fault> {
        if s.hostname.is_empty() {
            return Err(Fault::new("hostname", Problem::Missing));
        }
        let (load_balancing, passthrough) = s
            .load_balancing
            .as_ref()
            .map_or_else(|| Ok(Default::default()), load_balancing)
            .map_err(|f| f.within("load_balancing"))?;
        let source = source(s.culvert.as_ref()).map_err(|f| f.within("culvert"))?;
        Ok(Service {
            name: self.text(&s.name),
            namespace: self.text(&s.namespace),
            hostname: self.text(&s.hostname),
            vips: each(&s.addresses, "addresses", |a| {
                Ok(Vip { network: self.text(&a.network), range: range(&a.address, a.length)? })
            })?,
            ports: each(&s.ports, "ports", |p| self.service_port(p))?,
            subject_alt_names: self.texts(&s.subject_alt_names),
            waypoint: self.gateway(s.waypoint.as_ref(), "waypoint")?,
            load_balancing,
            ip_families: ip_families(s.ip_families)?,
            session_affinity: affinity(s.culvert.as_ref()).map_err(|f| f.within("culvert"))?,
            source: if passthrough { ServiceSource::Passthrough } else { source },
            canonical: s.canonical,
        })
    }

    fn service_port(&mut self, p: &wire::Port) -> Result<ServicePort, Fault> {
        let known = match wire::AppProtocol::try_from(p.app_protocol) {
            Ok(known) => protocol_text(known),
            Err(_) => "", // newer than we are, and nothing here depends on it
        };
        let (name, exact) = p.culvert.as_ref().map_or(("", ""), |c| (&*c.name, &*c.app_protocol));
        Ok(ServicePort {
            name: self.text(name),
            port: port(p.service_port, "service_port")?,
            target: match port(p.target_port, "target_port")? {
                0 => TargetPort::PerEndpoint,
                number => TargetPort::Number(number),
            },
            app_protocol: self.text(if exact.is_empty() { known } else { exact }),
        })
    }
}

/// How a port's protocol is written in a resource.
pub(crate) fn protocol_text(protocol: wire::AppProtocol) -> &'static str {
    match protocol {
        wire::AppProtocol::Unknown => "",
        wire::AppProtocol::Http11 => "http",
        wire::AppProtocol::Http2 => "http2",
        wire::AppProtocol::Grpc => "grpc",
        wire::AppProtocol::Tcp => "tcp",
        wire::AppProtocol::Tls => "tls",
    }
}

/// The second value says that there is no choice at all (PASSTHROUGH).
fn load_balancing(lb: &wire::LoadBalancing) -> Result<(LoadBalancing, bool), Fault> {
    use wire::load_balancing::{HealthPolicy as Wanted, Mode};
    let (mode, passthrough) = match Mode::try_from(lb.mode) {
        Ok(Mode::UnspecifiedMode) => (LoadBalancingMode::Any, false),
        Ok(Mode::Strict) => (LoadBalancingMode::Strict, false),
        Ok(Mode::Failover) => (LoadBalancingMode::Failover, false),
        Ok(Mode::Passthrough) => (LoadBalancingMode::Any, true),
        Err(_) => return Err(Fault::new("mode", Problem::Enum(lb.mode))),
    };
    let health = match Wanted::try_from(lb.health_policy) {
        Ok(Wanted::OnlyHealthy) => HealthPolicy::OnlyHealthy,
        Ok(Wanted::AllowAll) => HealthPolicy::AllowAll,
        Err(_) => return Err(Fault::new("health_policy", Problem::Enum(lb.health_policy))),
    };
    let scopes = each(&lb.routing_preference, "routing_preference", |s| scope(*s))?;
    Ok((LoadBalancing { scopes, mode, health }, passthrough))
}

fn scope(value: i32) -> Result<LocalityScope, Fault> {
    use wire::load_balancing::Scope;
    match Scope::try_from(value) {
        Ok(Scope::Region) => Ok(LocalityScope::Region),
        Ok(Scope::Zone) => Ok(LocalityScope::Zone),
        Ok(Scope::Subzone) => Ok(LocalityScope::Subzone),
        Ok(Scope::Node) => Ok(LocalityScope::Node),
        Ok(Scope::Cluster) => Ok(LocalityScope::Cluster),
        Ok(Scope::Network) => Ok(LocalityScope::Network),
        Ok(Scope::UnspecifiedScope) | Err(_) => Err(Fault::new("value", Problem::Enum(value))),
    }
}

fn ip_families(value: i32) -> Result<IpFamilies, Fault> {
    match wire::IpFamilies::try_from(value) {
        Ok(wire::IpFamilies::Automatic) => Ok(IpFamilies::Automatic),
        Ok(wire::IpFamilies::Ipv4Only) => Ok(IpFamilies::V4Only),
        Ok(wire::IpFamilies::Ipv6Only) => Ok(IpFamilies::V6Only),
        Ok(wire::IpFamilies::Dual) => Ok(IpFamilies::Dual),
        Err(_) => Err(Fault::new("ip_families", Problem::Enum(value))),
    }
}

fn source(extension: Option<&culvert::ServiceExtension>) -> Result<ServiceSource, Fault> {
    use culvert::service_extension::Source;
    let value = extension.map_or(0, |e| e.source);
    match Source::try_from(value) {
        Ok(Source::Kubernetes) => Ok(ServiceSource::Kubernetes),
        Ok(Source::Static) => Ok(ServiceSource::Static),
        Ok(Source::Dns) => Ok(ServiceSource::Dns),
        Ok(Source::Passthrough) => Ok(ServiceSource::Passthrough),
        Err(_) => Err(Fault::new("source", Problem::Enum(value))),
    }
}

fn affinity(extension: Option<&culvert::ServiceExtension>) -> Result<Option<Duration>, Fault> {
    let Some(wanted) = extension.and_then(|e| e.session_affinity) else { return Ok(None) };
    // prost's own conversion carries excess nanoseconds over into seconds, and may overflow there.
    let parts = (u64::try_from(wanted.seconds), u32::try_from(wanted.nanos));
    match parts {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Some(Duration::new(seconds, nanos))),
        _ => Err(Fault::new("session_affinity", Problem::Duration)),
    }
}

impl wire::Service {
    /// The fields that are set and have no place in the model, by name.
    #[must_use]
    pub fn not_applied(&self) -> Vec<&'static str> {
        let fields = [
            ("extensions", !self.extensions.is_empty()),
            ("ingress_use_waypoint", self.ingress_use_waypoint),
            ("weighted_waypoints", !self.weighted_waypoints.is_empty()),
            ("visibility", self.visibility != 0),
        ];
        fields.into_iter().filter_map(|(name, set)| set.then_some(name)).collect()
    }
}
