//! `discovery.k8s.io/v1 EndpointSlice`: endpoints of a service that its selector does not find.

use std::net::IpAddr;

use model::{Str, canonical_ip};

use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, not_applicable, silent};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// Endpoints of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The service's name, in the slice's namespace; `None` for a slice of no service.
    pub service: Option<Str>,
    /// Whether the cluster's controller makes it from the service's selector: then the pods say the same.
    pub derived: bool,
    /// The endpoints.
    pub endpoints: Box<[SliceEndpoint]>,
    /// The TCP ports, by the names of the service's ports. `None` for a port that any number stands for.
    pub ports: Box<[(Str, Option<u16>)]>,
}

/// An endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its address. Of several in one entry, which are the same endpoint, the first, as kube-proxy has it.
    pub address: IpAddr,
    /// Whether it takes new connections.
    pub ready: bool,
    /// The node that it is on, empty when not said.
    pub node: Str,
    /// The zone that it is in, empty when not said.
    pub zone: Str,
}

const BY_READY: &str = "'ready' decides";

static SCHEMA: Schema = Schema {
    name: "EndpointSlice",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        enforced("addressType"),
        nested("endpoints", &ENDPOINT),
        nested("ports", &PORT),
    ],
};

static ENDPOINT: Schema = Schema {
    name: "EndpointSlice.endpoints",
    fields: &[
        enforced("addresses"),
        nested("conditions", &CONDITIONS),
        enforced("nodeName"),
        enforced("zone"),
        silent("targetRef", "an address finds its pod"),
        not_applicable("hostname", "only pods have names of their own under a headless service"),
        silent("hints", "trafficDistribution and the nodes' localities decide"),
        silent("deprecatedTopology", "nodeName and zone say it"),
    ],
};

static CONDITIONS: Schema = Schema {
    name: "EndpointSlice.endpoints.conditions",
    fields: &[
        enforced("ready"),
        silent("serving", BY_READY),
        silent("terminating", "an endpoint that terminates is not ready"),
    ],
};

static PORT: Schema = Schema {
    name: "EndpointSlice.ports",
    fields: &[
        enforced("name"),
        enforced("port"),
        enforced("protocol"),
        silent("appProtocol", "the service's port says it"),
    ],
};

/// How the kind is read.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::EndpointSlice,
    group: "discovery.k8s.io",
    versions: &["v1"],
    name: "EndpointSlice",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let service = metadata.labels.get("kubernetes.io/service-name").cloned();
    let manager = metadata.labels.get("endpointslice.kubernetes.io/managed-by");
    let derived = manager.is_some_and(|m| m.ends_with("-controller.k8s.io"));
    if service.is_none() {
        let message = "the slice belongs to no service";
        let remedy = "label it kubernetes.io/service-name: <service>";
        fields.report(Code::SliceUnused, message, remedy);
    }
    let v6 = match fields.required("addressType")?.string()? {
        "IPv4" => false,
        "IPv6" => true,
        "FQDN" => {
            let message = "endpoints that are host names are not used (addressType FQDN is deprecated)";
            fields.report(Code::SliceUnused, message, "use a ServiceEntry with resolution DNS");
            take_rest(fields);
            return Some(slice(service, derived, Vec::new(), Vec::new()));
        }
        other => {
            let message = format!("{other:?} is none of IPv4, IPv6 and FQDN");
            fields.take("addressType")?.invalid(message, "");
            return None;
        }
    };
    let mut endpoints = Vec::new();
    fields.each("endpoints", |item| endpoints.extend(endpoint(item, v6)));
    let mut ports = Vec::new();
    fields.each("ports", |item| ports.extend(port(item)));
    Some(slice(service, derived, endpoints, ports))
}

fn slice(
    service: Option<Str>,
    derived: bool,
    endpoints: Vec<SliceEndpoint>,
    ports: Vec<(Str, Option<u16>)>,
) -> Resource {
    let (endpoints, ports) = (endpoints.into(), ports.into());
    Resource::EndpointSlice(Box::new(EndpointSlice { service, derived, endpoints, ports }))
}

fn take_rest(fields: &mut Fields<'_, '_>) {
    fields.take("endpoints");
    fields.take("ports");
}

fn endpoint(item: Cursor<'_, '_>, v6: bool) -> Option<SliceEndpoint> {
    let mut fields = item.fields()?;
    let mut address = None;
    fields.required("addresses")?.each(|mut item| {
        let ip = item.node().as_str().and_then(|text| text.parse::<IpAddr>().ok());
        match ip {
            Some(ip) if ip.is_ipv6() == v6 => address = address.or(Some(canonical_ip(ip))),
            _ => item.invalid(if v6 { "not an IPv6 address" } else { "not an IPv4 address" }, ""),
        }
    });
    let node = fields.string("nodeName").unwrap_or_default();
    let zone = fields.string("zone").unwrap_or_default();
    // Absent means ready.
    let ready = fields.object("conditions").and_then(|mut c| c.boolean("ready")).unwrap_or(true);
    let pool = &mut fields.context().pool;
    Some(SliceEndpoint { address: address?, ready, node: pool.string(node), zone: pool.string(zone) })
}

fn port(item: Cursor<'_, '_>) -> Option<(Str, Option<u16>)> {
    let mut fields = item.fields()?;
    let name = fields.string("name").unwrap_or_default();
    let port = fields.integer("port", 1..=u16::MAX);
    let tcp = fields.string("protocol").is_none_or(|p| p == "TCP");
    tcp.then(|| (fields.context().pool.string(name), port))
}
