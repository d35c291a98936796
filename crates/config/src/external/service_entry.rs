//! ServiceEntry (`networking.istio.io`): services outside Kubernetes' registry.
//!
//! What the node proxy can do with one depends on addresses alone: it sees where a connection goes, not which host
//! the request in it names. So hosts without addresses get virtual ones (see [`super::vip`]), and what can only be
//! told by a host's name is refused or said to have no effect.

use ipnet::IpNet;
use model::{SpiffeId, Str};

use super::endpoint::{ENDPOINT, EntryEndpoint, read as read_endpoint};
use super::host::{Address, is_host, is_host_pattern};
use crate::diagnostic::Code;
use crate::fields::{Fields, Schema, enforced, nested, silent};
use crate::kinds::service::{Distribution, distribution_annotation};
use crate::labels::Selector;
use crate::metadata::{METADATA, Metadata, is_label};
use crate::policy::Binding;
use crate::policy::pattern::parse_range;
use crate::policy::selector::read_labels;
use crate::resource::{Kind, KindSpec, Resource};
use crate::tree::Value;

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::ServiceEntry,
    group: "networking.istio.io",
    versions: &["v1", "v1beta1", "v1alpha3"],
    name: "ServiceEntry",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "ServiceEntry",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent(
            "status",
            "addresses that a cluster allocated are not taken over: every node works out its own",
        ),
    ],
};

static SPEC: Schema = Schema {
    name: "ServiceEntry.spec",
    fields: &[
        enforced("hosts"),
        nested("ports", &PORT),
        enforced("resolution"),
        enforced("location"),
        enforced("addresses"),
        nested("endpoints", &ENDPOINT),
        nested("workloadSelector", &SELECTOR),
        enforced("exportTo"),
        enforced("subjectAltNames"),
    ],
};

static PORT: Schema = Schema {
    name: "ServiceEntry.spec.ports",
    fields: &[enforced("number"), enforced("name"), enforced("protocol"), enforced("targetPort")],
};

static SELECTOR: Schema =
    Schema { name: "ServiceEntry.spec.workloadSelector", fields: &[enforced("labels")] };

/// The label that keeps a ServiceEntry from getting virtual addresses, with the value `false`.
const AUTO_ALLOCATE: &str = "networking.istio.io/enable-autoallocate-ip";

/// A ServiceEntry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceEntry {
    /// The host names, in lower case; some may start with `*.`.
    pub hosts: Box<[Str]>,
    /// The virtual addresses and ranges.
    pub addresses: Box<[IpNet]>,
    /// The ports.
    pub ports: Box<[EntryPort]>,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// The endpoints that it lists.
    pub endpoints: Box<[EntryEndpoint]>,
    /// Which pods and WorkloadEntries of its namespace are endpoints.
    pub selector: Option<Selector>,
    /// Whether it is outside the mesh (`location: MESH_EXTERNAL`), where nothing enforces policies.
    pub external: bool,
    /// Identities accepted from endpoints beside their own.
    pub identities: Box<[SpiffeId]>,
    /// Whether it gets virtual addresses when it has none.
    pub auto_allocate: bool,
    /// Which endpoints it prefers; `None` where it does not say.
    pub distribution: Option<Distribution>,
    /// Which waypoint its traffic is meant to pass.
    pub waypoint: Binding,
    /// When it was made (RFC 3339), empty when not said.
    pub created: Str,
}

/// A port of a ServiceEntry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EntryPort {
    /// Its name.
    pub name: Str,
    /// The port that clients dial.
    pub number: u16,
    /// The endpoints' port, where they don't say another.
    pub target: u16,
    /// The application protocol in lower case, empty when not said.
    pub protocol: Str,
}

/// `spec.resolution`. DNS_ROUND_ROBIN is DNS: the difference is how many addresses Envoy keeps, and the node proxy
/// asks again when answers expire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Resolution {
    /// Connections go to the address that was dialled.
    None,
    /// Endpoints are listed or selected.
    Static,
    /// Endpoints are names that are looked up; without any, the hosts themselves.
    Dns,
}

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let distribution = distribution_annotation(fields, metadata);
    let namespace = fields.context().pool.string(metadata.namespace);
    let waypoint = Binding::of(&metadata.labels, &namespace);
    let allocate = metadata.labels.get(AUTO_ALLOCATE).is_none_or(|v| !v.eq_ignore_ascii_case("false"));
    let created = fields.context().pool.string(metadata.created);
    let mut spec = fields.required("spec")?.fields()?;
    let (resolution, most_endpoints) = read_resolution(&mut spec)?;
    let hosts = read_hosts(&mut spec);
    let addresses = read_addresses(&mut spec, resolution);
    let ports = read_ports(&mut spec);
    let endpoints = read_endpoints(&mut spec, resolution, &ports);
    if endpoints.len() > most_endpoints && resolution == Resolution::Dns {
        let message = format!("DNS_ROUND_ROBIN has one endpoint, and {} are listed", endpoints.len());
        spec.report(Code::InvalidValue, message, "set the resolution to DNS");
    }
    let selector = read_selector(&mut spec, resolution, !endpoints.is_empty());
    let external = read_location(&mut spec);
    check_export(&mut spec);
    let identities = read_identities(&mut spec);
    let auto_allocate = allocate && addresses.is_empty() && resolution != Resolution::None;
    let entry = ServiceEntry {
        hosts,
        addresses,
        ports,
        resolution,
        endpoints,
        selector,
        external,
        identities,
        auto_allocate,
        distribution,
        waypoint,
        created,
    };
    check_whole(&mut spec, &entry);
    Some(Resource::ServiceEntry(Box::new(entry)))
}

/// The resolution, and how many endpoints it may have.
fn read_resolution(spec: &mut Fields<'_, '_>) -> Option<(Resolution, usize)> {
    let Some(mut cursor) = spec.take("resolution") else { return Some((Resolution::None, 0)) };
    let node = cursor.node();
    match node.as_str() {
        Some("NONE") => Some((Resolution::None, 0)),
        Some("STATIC") => Some((Resolution::Static, usize::MAX)),
        Some("DNS") => Some((Resolution::Dns, usize::MAX)),
        Some("DNS_ROUND_ROBIN") => Some((Resolution::Dns, 1)),
        Some("DYNAMIC_DNS") => {
            cursor.report(
                Code::FieldRefused,
                "DYNAMIC_DNS looks up the host that each request names, which the node proxy does not see",
                "list the hosts, with resolution DNS",
            );
            None
        }
        Some(other) => {
            let remedy = "write NONE, STATIC, DNS or DNS_ROUND_ROBIN";
            cursor.invalid(format_args!("{other:?} is no way to find endpoints"), remedy);
            None
        }
        None => {
            cursor.string();
            None
        }
    }
}

fn read_hosts(spec: &mut Fields<'_, '_>) -> Box<[Str]> {
    let mut hosts: Vec<Str> = Vec::new();
    if let Some(cursor) = spec.required("hosts") {
        cursor.each(|mut item| {
            let node = item.node();
            let Some(text) = node.as_str() else {
                item.string();
                return;
            };
            let host = text.trim_end_matches('.').to_ascii_lowercase();
            if !is_host_pattern(&host) {
                item.invalid(
                    format_args!("{text:?} is not a host name"),
                    "write a name such as db.example.com, or *.example.com",
                );
            } else if hosts.iter().any(|h| **h == *host) {
                item.invalid(format_args!("{text:?} is listed twice"), "remove it");
            } else {
                hosts.push(item.context().pool.string(&host));
            }
        });
        // The limit is the one of Istio's CRD.
        if hosts.is_empty() || hosts.len() > 256 {
            let message = format!("spec.hosts has {} names; from 1 to 256", hosts.len());
            spec.report(Code::InvalidValue, message, "");
        }
    }
    hosts.into()
}

fn read_addresses(spec: &mut Fields<'_, '_>, resolution: Resolution) -> Box<[IpNet]> {
    let mut addresses = Vec::new();
    spec.each("addresses", |mut item| {
        let node = item.node();
        let Some(text) = node.as_str() else {
            item.string();
            return;
        };
        match parse_range(text) {
            None => item.invalid(format_args!("{text:?} is neither an IP address nor a range"), ""),
            Some(range) if text.contains('/') && resolution == Resolution::Dns => item.invalid(
                format_args!("{range}: a range means nothing where hosts are looked up"),
                "give single addresses, or set the resolution to NONE or STATIC",
            ),
            Some(range) => addresses.push(range),
        }
    });
    addresses.into()
}

const PROTOCOLS: [&str; 12] = [
    "HTTP",
    "HTTPS",
    "GRPC",
    "GRPC-WEB",
    "HTTP2",
    "MONGO",
    "TCP",
    "TLS",
    "REDIS",
    "MYSQL",
    "UDP",
    "HTTP_PROXY",
];

fn read_ports(spec: &mut Fields<'_, '_>) -> Box<[EntryPort]> {
    let mut ports: Vec<EntryPort> = Vec::new();
    spec.each("ports", |item| {
        let Some(mut port) = item.fields() else { return };
        let number = port.required("number").and_then(|c| c.integer(1..=u16::MAX));
        let target = port.take("targetPort").and_then(|c| match c.node().value {
            Value::Int(0) => None, // protobuf's form of "not set"
            _ => c.integer(1..=u16::MAX),
        });
        let name = port.required("name").and_then(|mut name| {
            if name.node().as_str().is_some_and(|t| t.is_empty() || !is_label(&t.to_ascii_lowercase())) {
                name.invalid("is not a name of letters, digits and '-'", "");
            }
            name.string()
        });
        let protocol = port.take("protocol").and_then(|mut protocol| {
            let node = protocol.node();
            let text = node.as_str().map(str::to_ascii_uppercase);
            if text.as_ref().is_some_and(|t| !t.is_empty() && !PROTOCOLS.contains(&t.as_str())) {
                protocol.invalid("is no protocol", format!("write one of {}", PROTOCOLS.join(", ")));
            }
            protocol.string()
        });
        let (Some(number), Some(name)) = (number, name) else { return };
        if ports.iter().any(|p| p.number == number) {
            port.report(Code::InvalidValue, format!("port {number} is there already"), "");
        }
        if ports.iter().any(|p| *p.name == *name) {
            port.report(Code::InvalidValue, format!("a port is named {name:?} already"), "");
        }
        let pool = &mut port.context().pool;
        ports.push(EntryPort {
            name: pool.string(name),
            number,
            target: target.unwrap_or(number),
            protocol: pool.string(&protocol.unwrap_or_default().to_ascii_lowercase()),
        });
    });
    ports.retain(|p| &*p.protocol != "udp"); // not carried by the mesh: such packets go as they went before
    ports.into()
}

fn read_endpoints(
    spec: &mut Fields<'_, '_>,
    resolution: Resolution,
    ports: &[EntryPort],
) -> Box<[EntryEndpoint]> {
    let mut endpoints = Vec::new();
    if let Some(mut cursor) = spec.take("endpoints") {
        let is_empty = cursor.node().value == Value::Sequence(Vec::new());
        if resolution == Resolution::None && !is_empty {
            let message = "with resolution NONE connections go where they were dialled, not to endpoints";
            cursor.invalid(message, "set the resolution to STATIC or DNS, or remove the endpoints");
        }
        cursor.each(|item| {
            let Some(mut fields) = item.fields() else { return };
            let endpoint = read_endpoint(&mut fields, false);
            check_endpoint(&mut fields, &endpoint, resolution, ports);
            endpoints.push(endpoint);
        });
    }
    endpoints.into()
}

fn check_endpoint(
    fields: &mut Fields<'_, '_>,
    endpoint: &EntryEndpoint,
    resolution: Resolution,
    ports: &[EntryPort],
) {
    if let (Some(Address::Name(name)), Resolution::Static) = (&endpoint.address, resolution) {
        let message = format!("{name:?} is a name, and STATIC endpoints have addresses");
        fields.report(Code::InvalidValue, message, "set the resolution to DNS");
    }
    for (name, _) in endpoint.ports.iter().filter(|(name, _)| !ports.iter().any(|p| p.name == *name)) {
        let message = format!("{name:?} is the name of no port of the entry");
        fields.report(Code::InvalidValue, message, "name it as in spec.ports");
    }
}

fn read_selector(spec: &mut Fields<'_, '_>, resolution: Resolution, has_endpoints: bool) -> Option<Selector> {
    let selector =
        spec.take("workloadSelector")?.fields().and_then(|mut f| f.take("labels").and_then(read_labels));
    if has_endpoints {
        spec.report(
            Code::InvalidValue,
            "workloadSelector and endpoints are both set; only one may be",
            "remove one of them",
        );
    }
    if resolution == Resolution::None {
        spec.report(
            Code::WithoutEffect,
            "workloadSelector has no effect with resolution NONE: connections go where they were dialled",
            "set the resolution to STATIC",
        );
        return None;
    }
    if selector.is_none() {
        spec.report(
            Code::FieldRefused,
            "a workloadSelector without labels would make every workload of the namespace an endpoint",
            "name the labels of those that are",
        );
    }
    selector
}

/// Whether it is outside the mesh.
fn read_location(spec: &mut Fields<'_, '_>) -> bool {
    let Some(mut cursor) = spec.take("location") else { return true };
    let known = |t: &str| matches!(t, "MESH_EXTERNAL" | "MESH_INTERNAL");
    if cursor.node().as_str().is_some_and(|t| !known(t)) {
        cursor.invalid("is neither MESH_EXTERNAL nor MESH_INTERNAL", "");
    }
    cursor.string() != Some("MESH_INTERNAL")
}

fn check_export(spec: &mut Fields<'_, '_>) {
    let mut everywhere = true;
    let valid = |t: &str| matches!(t, "*" | "." | "~") || is_label(t);
    spec.each("exportTo", |mut item| {
        let node = item.node();
        let Some(text) = node.as_str() else {
            item.string();
            return;
        };
        if !valid(text) {
            item.invalid(format_args!("{text:?} is neither a namespace, nor '.', '*' or '~'"), "");
        }
        everywhere &= text == "*";
    });
    if !everywhere {
        let message = "spec.exportTo has no effect: the node proxy serves every service to every namespace";
        spec.report(
            Code::FieldNotApplicable,
            message,
            "restrict who may connect with an AuthorizationPolicy",
        );
    }
}

fn read_identities(spec: &mut Fields<'_, '_>) -> Box<[SpiffeId]> {
    let mut identities = Vec::new();
    spec.each("subjectAltNames", |mut item| {
        let node = item.node();
        match node.as_str() {
            Some(text) if text.starts_with("spiffe://") => match text.parse() {
                Ok(identity) => identities.push(identity),
                Err(error) => item.invalid(error, ""),
            },
            Some(text) => {
                let message =
                    format!("the name {text:?} is not checked: the node proxy does not start TLS to hosts");
                item.report(Code::FieldNotApplicable, message, "the application checks it");
            }
            None => {
                item.string();
            }
        }
    });
    identities.into()
}

/// What can only be said of all fields together.
fn check_whole(spec: &mut Fields<'_, '_>, entry: &ServiceEntry) {
    let listed = !entry.endpoints.is_empty() || entry.selector.is_some();
    let unresolvable = entry.hosts.iter().find(|h| !is_host(h));
    if let (Resolution::Dns, false, Some(host)) = (entry.resolution, listed, unresolvable)
        && let Some(mut hosts) = spec.take("hosts")
    {
        let remedy = "list endpoints, or name the hosts in full";
        hosts.invalid(format_args!("{host:?} cannot be looked up, and there are no endpoints"), remedy);
    }
    if entry.resolution == Resolution::Static && !listed {
        let message = "there is neither an endpoint nor a workloadSelector: connections to it fail";
        spec.report(Code::WithoutEffect, message, "list endpoints, or select workloads");
    }
    if entry.addresses.is_empty() && !entry.auto_allocate {
        let message = "without addresses no connection is recognised as the service's: the node proxy does not see \
                       which host a request names";
        let remedy = if entry.resolution == Resolution::None {
            "give addresses, or set the resolution to DNS so that the hosts get some"
        } else {
            "give addresses, or remove the label that keeps it from getting some"
        };
        spec.report(Code::WithoutEffect, message, remedy);
    } else if entry.addresses.is_empty() && entry.hosts.iter().any(|h| h.starts_with("*.")) {
        let message =
            "a host with a wildcard gets no address of its own, so connections to it are not recognised";
        spec.report(Code::WithoutEffect, message, "name the hosts in full, or give addresses");
    }
    if entry.hosts.len() > 1 && !entry.addresses.is_empty() && entry.resolution != Resolution::None {
        let first = entry.hosts.iter().min().map_or("", |h| h);
        let message = format!("the hosts share the addresses, so connections to them all go to {first}");
        spec.report(Code::AmbiguousAddress, message, "write an entry for each host, or give no addresses");
    }
}
