//! TCPRoute and TLSRoute (`gateway.networking.k8s.io`): routes of connections, reading them with every upstream field.

use model::Str;
use model::http::{RouteId, RouteKind, ServerName};

use super::http_route::read_hostnames;
use super::reference::{BackendDraft, PARENT, ParentRef, read_parents, read_weighted};
use crate::diagnostic::Code;
use crate::fields::{Fields, Schema, enforced, nested, refused, silent};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// TCPRoute.
pub static TCP: KindSpec = KindSpec {
    kind: Kind::TcpRoute,
    group: "gateway.networking.k8s.io",
    versions: &["v1", "v1alpha2"],
    name: "TCPRoute",
    namespaced: true,
    schema: &TCP_SCHEMA,
    parse: parse_tcp,
};

/// TLSRoute.
pub static TLS: KindSpec = KindSpec {
    kind: Kind::TlsRoute,
    group: "gateway.networking.k8s.io",
    versions: &["v1", "v1alpha3", "v1alpha2"],
    name: "TLSRoute",
    namespaced: true,
    schema: &TLS_SCHEMA,
    parse: parse_tls,
};

static TCP_SCHEMA: Schema = Schema {
    name: "TCPRoute",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &TCP_SPEC),
        silent("status", "it is written by the control plane"),
    ],
};
static TLS_SCHEMA: Schema = Schema {
    name: "TLSRoute",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &TLS_SPEC),
        silent("status", "it is written by the control plane"),
    ],
};
static TCP_SPEC: Schema = Schema {
    name: "TCPRoute.spec",
    fields: &[
        nested("parentRefs", &PARENT),
        nested("rules", &RULE),
        refused("useDefaultGateways", "there are no default gateways", "name the parents in parentRefs"),
    ],
};
static TLS_SPEC: Schema = Schema {
    name: "TLSRoute.spec",
    fields: &[
        nested("parentRefs", &PARENT),
        enforced("hostnames"),
        nested("rules", &RULE),
        refused("useDefaultGateways", "there are no default gateways", "name the parents in parentRefs"),
    ],
};
static RULE: Schema =
    Schema { name: "TCPRoute.spec.rules[]", fields: &[enforced("name"), nested("backendRefs", &BACKEND)] };
static BACKEND: Schema = Schema {
    name: "BackendRef",
    fields: &[
        enforced("group"),
        enforced("kind"),
        enforced("name"),
        enforced("namespace"),
        enforced("port"),
        enforced("weight"),
    ],
};

/// A TCPRoute or TLSRoute.
#[derive(Clone, PartialEq, Debug)]
pub struct StreamRoute {
    /// What it hangs on.
    pub parents: Box<[ParentRef]>,
    /// The server names of its connections; without any, all. Of a TCPRoute there are none.
    pub names: Box<[ServerName]>,
    /// Its rule; of further ones it is said that they take nothing.
    pub rule: Option<StreamRule>,
    /// When it was made (RFC 3339), empty when not said: the older of two alike wins.
    pub created: Str,
}

/// A rule, of which the back ends are not looked up yet.
#[derive(Clone, PartialEq, Debug)]
pub struct StreamRule {
    /// Where it is written.
    pub id: RouteId,
    /// Where connections go.
    pub backends: Box<[BackendDraft]>,
}

fn parse_tcp(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    parse(fields, metadata, RouteKind::TcpRoute)
}

fn parse_tls(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    parse(fields, metadata, RouteKind::TlsRoute)
}

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>, kind: RouteKind) -> Option<Resource> {
    let pool = &mut fields.context().pool;
    let (namespace, name) = (pool.string(metadata.namespace), pool.string(metadata.name));
    let created = pool.string(metadata.created);
    let mut spec = fields.required("spec")?.fields()?;
    let parents = read_parents(&mut spec, &namespace);
    let hosts = if kind == RouteKind::TlsRoute { read_hostnames(&mut spec) } else { Box::default() };
    let names = hosts.iter().filter_map(|host| ServerName::parse(host)).collect();
    if kind == RouteKind::TlsRoute && hosts.is_empty() {
        spec.report(Code::MissingField, "a TLSRoute needs hostnames", "name the servers that it is for");
    }
    let (mut rule, mut place) = (None, 0);
    spec.each("rules", |item| {
        let Some(mut fields) = item.fields() else { return };
        let rule_name = fields.string("name").map(Into::into);
        let id = RouteId { kind, namespace: namespace.clone(), name: name.clone(), rule: place, rule_name };
        let mut backends = Vec::new();
        fields.each("backendRefs", |item| {
            backends.extend(item.fields().and_then(|mut fields| read_weighted(&mut fields, &namespace)));
        });
        if backends.is_empty() {
            fields.report(Code::MissingField, "a rule needs backendRefs", "");
        }
        if place > 0 {
            let message = "rules have no matches, so the first takes every connection";
            fields.report(Code::InvalidValue, message, "put all back ends into one rule");
        }
        place += 1;
        rule.get_or_insert(StreamRule { id, backends: backends.into() });
    });
    if rule.is_none() {
        spec.report(Code::MissingField, "a route needs a rule", "");
    }
    Some(Resource::StreamRoute(Box::new(StreamRoute { parents, names, rule, created })))
}
