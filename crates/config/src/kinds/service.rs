//! `v1 Service`: a name and virtual addresses for pods.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use model::{IpFamilies, Str, canonical_ip};

use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, not_applicable, silent};
use crate::labels::Selector;
use crate::metadata::{METADATA, Metadata, is_label};
use crate::policy::Binding;
use crate::resource::{Kind, KindSpec, Resource};
use crate::tree::Value;

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// What kind of service.
    pub service_type: ServiceType,
    /// Which pods are its endpoints; `None` for a service whose endpoints are in slices.
    pub selector: Option<Selector>,
    /// The virtual addresses: of the cluster, and of its load balancers. Empty for a headless service.
    pub addresses: Box<[IpAddr]>,
    /// The TCP ports.
    pub ports: Box<[Port]>,
    /// Which families it has addresses of.
    pub families: IpFamilies,
    /// Whether endpoints that are not ready take traffic too.
    pub publish_not_ready: bool,
    /// How long one client keeps one endpoint.
    pub affinity: Option<Duration>,
    /// Whether only endpoints on the client's node take traffic.
    pub local_only: bool,
    /// Which endpoints it prefers; `None` where it does not say.
    pub distribution: Option<Distribution>,
    /// Which waypoint its traffic is meant to pass.
    pub waypoint: Binding,
}

/// What kind of service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServiceType {
    /// With virtual addresses: ClusterIP, NodePort and LoadBalancer.
    ClusterIp,
    /// `clusterIP: None`: its name stands for its pods' addresses.
    Headless,
    /// Its name is an alias of another; no traffic is its own.
    ExternalName,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name, empty when it has none.
    pub name: Str,
    /// Its number.
    pub port: u16,
    /// The pods' port behind it.
    pub target: Target,
    /// The application protocol, empty when nothing says it.
    pub app_protocol: Str,
}

/// The port behind a service's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A number.
    Number(u16),
    /// The name of a container's port.
    Name(Str),
}

/// Which endpoints are preferred.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Distribution {
    /// None before others.
    Any,
    /// Those of the client's zone, then region.
    SameZone,
    /// Those of the client's node, then subzone, zone, region.
    SameNode,
}

const NODES_WORK: &str = "it concerns connections from outside that come through nodes' ports";
const BALANCER: &str = "the load balancer's business";

static SCHEMA: Schema = Schema {
    name: "Service",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        nested("status", &STATUS),
    ],
};

static SPEC: Schema = Schema {
    name: "Service.spec",
    fields: &[
        nested("ports", &PORT),
        enforced("selector"),
        enforced("clusterIP"),
        enforced("clusterIPs"),
        enforced("type"),
        enforced("ipFamilies"),
        enforced("sessionAffinity"),
        nested("sessionAffinityConfig", &AFFINITY),
        enforced("internalTrafficPolicy"),
        enforced("trafficDistribution"),
        enforced("publishNotReadyAddresses"),
        enforced("externalName"),
        silent("ipFamilyPolicy", "ipFamilies has its result"),
        not_applicable(
            "externalIPs",
            "connections to these addresses are not recognised as the service's and pass through unchanged",
        ),
        silent("externalTrafficPolicy", NODES_WORK),
        silent("healthCheckNodePort", NODES_WORK),
        silent("allocateLoadBalancerNodePorts", NODES_WORK),
        silent("loadBalancerClass", BALANCER),
        silent("loadBalancerIP", BALANCER),
        not_applicable(
            "loadBalancerSourceRanges",
            "the load balancer enforces it; inside the mesh use an AuthorizationPolicy with ipBlocks",
        ),
    ],
};

static PORT: Schema = Schema {
    name: "Service.spec.ports",
    fields: &[
        enforced("name"),
        enforced("port"),
        enforced("targetPort"),
        enforced("protocol"),
        enforced("appProtocol"),
        silent("nodePort", NODES_WORK),
    ],
};

static AFFINITY: Schema =
    Schema { name: "Service.spec.sessionAffinityConfig", fields: &[nested("clientIP", &CLIENT_IP)] };

static CLIENT_IP: Schema =
    Schema { name: "Service.spec.sessionAffinityConfig.clientIP", fields: &[enforced("timeoutSeconds")] };

static STATUS: Schema = Schema {
    name: "Service.status",
    fields: &[nested("loadBalancer", &LOAD_BALANCER), silent("conditions", "other controllers' reports")],
};

static LOAD_BALANCER: Schema =
    Schema { name: "Service.status.loadBalancer", fields: &[nested("ingress", &INGRESS)] };

static INGRESS: Schema = Schema {
    name: "Service.status.loadBalancer.ingress",
    fields: &[
        enforced("ip"),
        enforced("ipMode"),
        silent("hostname", "a name outside the cluster is resolved there"),
        silent("ports", BALANCER),
    ],
};

/// How the kind is read.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::Service,
    group: "",
    versions: &["v1"],
    name: "Service",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

/// What Kubernetes sets when nothing is said (core/v1 DefaultClientIPServiceAffinitySeconds).
const DEFAULT_AFFINITY: Duration = Duration::from_secs(10_800);

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    if !is_label(metadata.name) {
        fields.report(Code::InvalidValue, "a service's name is a DNS label of at most 63 characters", "");
    }
    let annotated = distribution_annotation(fields, metadata);
    let namespace = fields.context().pool.string(metadata.namespace);
    let waypoint = Binding::of(&metadata.labels, &namespace);
    let balancers = fields.object("status").map(|mut s| balancer_addresses(&mut s)).unwrap_or_default();
    let mut spec = fields.required("spec")?.fields()?;
    let (service_type, mut addresses) = addresses(&mut spec)?;
    if service_type == ServiceType::ClusterIp {
        addresses.extend(balancers);
    }
    let selector = selector(&mut spec);
    let ports = ports(&mut spec);
    let publish_not_ready = spec.boolean("publishNotReadyAddresses").unwrap_or(false);
    let families = families(&mut spec);
    let affinity = affinity(&mut spec);
    let local_only = choice(&mut spec, "internalTrafficPolicy", &["Cluster", "Local"]) == Some("Local");
    let distributions = ["PreferClose", "PreferSameZone", "PreferSameNode"];
    let distribution = choice(&mut spec, "trafficDistribution", &distributions);
    let service = Service {
        service_type,
        selector,
        addresses: addresses.into(),
        ports: ports.into(),
        families,
        publish_not_ready,
        affinity,
        local_only,
        distribution: distribution.and_then(read_distribution).or(annotated),
        waypoint,
    };
    Some(Resource::Service(Box::new(service)))
}

/// A string that must be one of `allowed`.
fn choice<'n>(spec: &mut Fields<'_, 'n>, name: &'static str, allowed: &[&str]) -> Option<&'n str> {
    let mut cursor = spec.take(name)?;
    let node = cursor.node();
    if let Some(text) = node.as_str()
        && !allowed.contains(&text)
    {
        cursor.invalid(format_args!("{text:?} is none of {}", allowed.join(", ")), "");
        return None;
    }
    cursor.string()
}

fn read_distribution(text: &str) -> Option<Distribution> {
    match text.to_ascii_lowercase().as_str() {
        "preferclose" | "prefersamezone" => Some(Distribution::SameZone),
        "prefersamenode" => Some(Distribution::SameNode),
        "any" => Some(Distribution::Any),
        _ => None,
    }
}

/// `networking.istio.io/traffic-distribution`, on a service or a namespace.
pub(crate) fn distribution_annotation(
    fields: &mut Fields<'_, '_>,
    metadata: &Metadata<'_>,
) -> Option<Distribution> {
    let annotation = metadata.annotation("networking.istio.io/traffic-distribution")?;
    let found = read_distribution(annotation.value);
    if found.is_none() {
        let message = "none of Any, PreferClose, PreferSameZone and PreferSameNode";
        annotation.invalid(fields, message, "");
    }
    found
}

fn addresses(spec: &mut Fields<'_, '_>) -> Option<(ServiceType, Vec<IpAddr>)> {
    let kind = choice(spec, "type", &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]);
    let name = spec.string("externalName");
    let one = spec.take("clusterIP").and_then(Cursor::string);
    let mut all = Vec::new();
    let (mut headless, mut valid) = (one == Some("None"), true);
    spec.each("clusterIPs", |item| match item.node().as_str() {
        Some("None") => headless = true,
        _ => match address(item) {
            Some(ip) => all.push(ip),
            None => valid = false,
        },
    });
    if kind == Some("ExternalName") {
        let target = name.unwrap_or_default();
        let message =
            format!("a service of type ExternalName is an alias ({target:?}) and carries no traffic");
        spec.report(Code::ExternalName, message, "what connects to it is treated by the name it resolves to");
        return Some((ServiceType::ExternalName, Vec::new()));
    }
    if headless {
        if !all.is_empty() {
            spec.report(Code::InvalidValue, "clusterIPs mixes None with addresses", "");
        }
        return valid.then_some((ServiceType::Headless, Vec::new()));
    }
    if let Some(text) = one.filter(|t| !t.is_empty()) {
        let ip = text.parse::<IpAddr>().map(canonical_ip);
        match (ip, all.first()) {
            (Ok(ip), None) => all.push(ip),
            (Ok(ip), Some(first)) if ip == *first => {}
            (Ok(ip), Some(first)) => {
                let message = format!("clusterIP is {ip}, and the first of clusterIPs is {first}");
                spec.report(Code::InvalidValue, message, "make them equal");
            }
            (Err(_), _) => {
                valid = false;
                let message = format!("clusterIP: {text:?} is neither an address nor None");
                spec.report(Code::InvalidValue, message, "");
            }
        }
    }
    if all.is_empty() && valid {
        let message = "the service has no clusterIP, so no connection can be recognised as its own";
        spec.report(Code::ServiceWithoutAddress, message, "set clusterIP to an address, or to None");
    }
    Some((ServiceType::ClusterIp, all))
}

fn address(mut cursor: Cursor<'_, '_>) -> Option<IpAddr> {
    let Some(text) = cursor.node().as_str() else {
        cursor.string();
        return None;
    };
    match text.parse::<IpAddr>().map(canonical_ip) {
        Ok(ip) if !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast() => Some(ip),
        _ => {
            cursor.invalid(format_args!("{text:?} is no address that a service can have"), "");
            None
        }
    }
}

/// The load balancers' addresses that nodes treat as the service's own (`ipMode: VIP`, the default).
fn balancer_addresses(status: &mut Fields<'_, '_>) -> Vec<IpAddr> {
    let mut found = Vec::new();
    if let Some(mut balancer) = status.object("loadBalancer") {
        balancer.each("ingress", |item| {
            let Some(mut ingress) = item.fields() else { return };
            let ip = ingress.take("ip").and_then(address);
            let proxied = ingress.string("ipMode") == Some("Proxy");
            found.extend(ip.filter(|_| !proxied));
        });
    }
    found
}

fn selector(spec: &mut Fields<'_, '_>) -> Option<Selector> {
    let pairs = spec.string_map("selector");
    let pool = &mut spec.context().pool;
    Selector::new(pairs.into_iter().map(|(k, v)| (pool.string(k), pool.string(v))).collect())
}

fn families(spec: &mut Fields<'_, '_>) -> IpFamilies {
    let (mut v4, mut v6) = (false, false);
    spec.each("ipFamilies", |mut item| match item.node().as_str() {
        Some("IPv4") => v4 = true,
        Some("IPv6") => v6 = true,
        _ => item.invalid("neither IPv4 nor IPv6", ""),
    });
    match (v4, v6) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::V4Only,
        (false, true) => IpFamilies::V6Only,
        (false, false) => IpFamilies::Automatic,
    }
}

fn affinity(spec: &mut Fields<'_, '_>) -> Option<Duration> {
    let on = choice(spec, "sessionAffinity", &["None", "ClientIP"]) == Some("ClientIP");
    let mut timeout = None;
    if let Some(mut config) = spec.object("sessionAffinityConfig")
        && let Some(mut client) = config.object("clientIP")
    {
        timeout = client.integer::<u32>("timeoutSeconds", 1..=86_400);
    }
    on.then(|| timeout.map_or(DEFAULT_AFFINITY, |seconds| Duration::from_secs(seconds.into())))
}

fn ports(spec: &mut Fields<'_, '_>) -> Vec<Port> {
    let (mut ports, mut seen, mut names) = (Vec::new(), HashSet::new(), HashSet::new());
    spec.each("ports", |item| {
        let Some(mut port) = item.fields() else { return };
        let number = port.required("port").and_then(|c| c.integer(1..=u16::MAX));
        let name = port.string("name").unwrap_or_default();
        let protocol = choice(&mut port, "protocol", &["TCP", "UDP", "SCTP"]).unwrap_or("TCP");
        let app_protocol = port.string("appProtocol");
        let target = port.take("targetPort").and_then(target);
        let Some(number) = number else { return };
        if !seen.insert((number, protocol)) {
            port.report(Code::InvalidValue, format!("port {number}/{protocol} is there already"), "");
        }
        if !name.is_empty() && names.contains(name) {
            port.report(Code::InvalidValue, format!("a port is named {name:?} already"), "");
        }
        if protocol != "TCP" {
            return; // not carried by the mesh: such packets go as they went before
        }
        names.insert(name);
        let pool = &mut port.context().pool;
        ports.push(Port {
            name: pool.string(name),
            port: number,
            target: target.unwrap_or(Target::Number(number)),
            app_protocol: pool.string(app_protocol.unwrap_or_else(|| protocol_of(name))),
        });
    });
    ports
}

/// A number, or a name; 0 stands for the port itself.
fn target(mut cursor: Cursor<'_, '_>) -> Option<Target> {
    match &cursor.node().value {
        Value::Int(0) => None,
        Value::Int(_) => cursor.integer(1..=u16::MAX).map(Target::Number),
        Value::String(text) if is_label(text) => {
            let name = cursor.context().pool.string(text);
            Some(Target::Name(name))
        }
        Value::String(text) if text.is_empty() => None,
        _ => {
            cursor.invalid("neither a port's number nor the name of a container's port", "");
            None
        }
    }
}

/// The protocol that a port's name begins with, `http` in `http-web` (Istio's protocol selection).
#[must_use]
pub fn protocol_of(port_name: &str) -> &str {
    const KNOWN: [&str; 13] = [
        "grpc-web",
        "grpc",
        "http2",
        "http",
        "https",
        "hbone",
        "mongo",
        "mysql",
        "redis",
        "tcp",
        "tls",
        "udp",
        "double-hbone",
    ];
    let named = |protocol: &&&str| {
        port_name.strip_prefix(**protocol).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    KNOWN.iter().find(named).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_is_what_a_ports_name_begins_with() {
        for (name, protocol) in [
            ("http", "http"),
            ("http-web", "http"),
            ("https", "https"),
            ("httpd", ""),
            ("grpc-web-1", "grpc-web"),
            ("x-http", ""),
        ] {
            assert_eq!(protocol_of(name), protocol, "{name}");
        }
    }
}
