//! GRPCRoute (`gateway.networking.k8s.io`): a call is a POST to `/SERVICE/METHOD`, so its rules are rules of HTTP.

use model::Str;
use model::http::{PathMatch, Pattern, Regex, Route, RouteAction, RouteId, RouteKind, RouteMatch};

use super::filters::{self, GRPC, GRPC_FILTER};
use super::http_route::{NAMED, RuleDraft, read, read_backends, read_headers};
use super::reference::PARENT;
use super::value::word;
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, refused, silent};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::GrpcRoute,
    group: "gateway.networking.k8s.io",
    versions: &["v1"],
    name: "GRPCRoute",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "GRPCRoute",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};
static SPEC: Schema = Schema {
    name: "GRPCRoute.spec",
    fields: &[
        nested("parentRefs", &PARENT),
        nested("rules", &RULE),
        enforced("hostnames"),
        refused("useDefaultGateways", "there are no default gateways", "name the parents in parentRefs"),
    ],
};
static RULE: Schema = Schema {
    name: "GRPCRoute.spec.rules[]",
    fields: &[
        enforced("name"),
        nested("matches", &MATCH),
        nested("filters", &GRPC_FILTER),
        nested("backendRefs", &BACKEND),
        refused(
            "sessionPersistence",
            "sessions are kept by consistent hashing",
            "use a DestinationRule with loadBalancer.consistentHash",
        ),
    ],
};
static MATCH: Schema = Schema {
    name: "GRPCRoute.spec.rules[].matches[]",
    fields: &[nested("method", &METHOD), nested("headers", &NAMED)],
};
static METHOD: Schema =
    Schema { name: "GRPCMethodMatch", fields: &[enforced("type"), enforced("service"), enforced("method")] };
static BACKEND: Schema = Schema {
    name: "GRPCBackendRef",
    fields: &[
        enforced("group"),
        enforced("kind"),
        enforced("name"),
        enforced("namespace"),
        enforced("port"),
        enforced("weight"),
        nested("filters", &GRPC_FILTER),
    ],
};

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    read(fields, metadata, RouteKind::GrpcRoute, read_rule)
}

fn read_rule(rule: &mut Fields<'_, '_>, id: RouteId, namespace: &Str) -> RuleDraft {
    let mut matches = Vec::new();
    rule.each("matches", |item| matches.extend(read_match(item)));
    if matches.is_empty() {
        matches.push(RouteMatch::default());
    }
    let filters = filters::read(rule, namespace, &GRPC);
    let backends = read_backends(rule, namespace, &GRPC);
    let mut route = Route::new(RouteAction::default());
    route.id = id;
    route.request_headers = filters.request_headers.unwrap_or_default();
    route.response_headers = filters.response_headers.unwrap_or_default();
    RuleDraft { matches: matches.into(), route, backends, mirrors: filters.mirrors.into() }
}

fn read_match(cursor: Cursor<'_, '_>) -> Option<RouteMatch> {
    let mut fields = cursor.fields()?;
    let path = fields.object("method").and_then(|mut method| read_method(&mut method));
    let headers = read_headers(&mut fields);
    let method = path.is_some().then(|| Pattern::Exact("POST".into()));
    Some(RouteMatch { path, method, headers, ..RouteMatch::default() })
}

fn read_method(fields: &mut Fields<'_, '_>) -> Option<PathMatch> {
    let by_regex = match fields.take("type") {
        Some(cursor) => word(cursor, &[("Exact", false), ("RegularExpression", true)])?,
        None => false,
    };
    let service = fields.string("service").filter(|t| !t.is_empty());
    let method = fields.string("method").filter(|t| !t.is_empty());
    if service.is_none() && method.is_none() {
        fields.report(Code::MissingField, "one of service and method is needed", "");
        return None;
    }
    if !by_regex {
        return Some(match (service, method) {
            (Some(service), Some(method)) => PathMatch::Exact(format!("/{service}/{method}").as_str().into()),
            (Some(service), None) => PathMatch::Prefix(format!("/{service}/").as_str().into()),
            (None, method) => {
                let method = regex_escape(method.unwrap_or_default());
                PathMatch::Regex(Regex::new(&format!("/[^/]+/{method}")).ok()?)
            }
        });
    }
    let (service, method) = (service.unwrap_or("[^/]+"), method.unwrap_or("[^/]+"));
    match Regex::new(&format!("/(?:{service})/(?:{method})")) {
        Ok(regex) => Some(PathMatch::Regex(regex)),
        Err(error) => {
            fields.report(Code::InvalidValue, error.to_string(), "");
            None
        }
    }
}

/// The text as an expression for itself. Names of methods have letters, digits, dots and underscores.
fn regex_escape(text: &str) -> String {
    text.chars().flat_map(|c| [(!c.is_ascii_alphanumeric()).then_some('\\'), Some(c)]).flatten().collect()
}
