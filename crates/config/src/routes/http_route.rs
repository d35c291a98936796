//! HTTPRoute (`gateway.networking.k8s.io`): reading it with every upstream field.

use std::time::Duration;

use model::Str;
use model::http::{
    HeaderMatch, PathMatch, Pattern, Percent, QueryMatch, Respond, Retry, RetryOn, Route, RouteAction,
    RouteId, RouteKind, RouteMatch, Timeouts,
};

use super::filters::{self, FILTER, HTTP, Type};
use super::reference::{BackendDraft, PARENT, ParentRef, read_parents, read_weighted};
use super::value::{duration, header_name, path, regex, word};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, refused, silent};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::HttpRoute,
    group: "gateway.networking.k8s.io",
    versions: &["v1", "v1beta1"],
    name: "HTTPRoute",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "HTTPRoute",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};

static SPEC: Schema = Schema {
    name: "HTTPRoute.spec",
    fields: &[
        nested("parentRefs", &PARENT),
        nested("rules", &RULE),
        enforced("hostnames"),
        refused("useDefaultGateways", "there are no default gateways", "name the parents in parentRefs"),
    ],
};

static RULE: Schema = Schema {
    name: "HTTPRoute.spec.rules[]",
    fields: &[
        enforced("name"),
        nested("matches", &MATCH),
        nested("filters", &FILTER),
        nested("backendRefs", &BACKEND),
        nested("timeouts", &TIMEOUTS),
        nested("retry", &RETRY),
        refused(
            "sessionPersistence",
            "sessions are kept by consistent hashing",
            "use a DestinationRule with loadBalancer.consistentHash",
        ),
    ],
};
static MATCH: Schema = Schema {
    name: "HTTPRoute.spec.rules[].matches[]",
    fields: &[
        nested("path", &PATH),
        nested("headers", &NAMED),
        nested("queryParams", &NAMED),
        enforced("method"),
    ],
};
static PATH: Schema = Schema { name: "HTTPPathMatch", fields: &[enforced("type"), enforced("value")] };
pub(super) static NAMED: Schema =
    Schema { name: "HTTPHeaderMatch", fields: &[enforced("type"), enforced("name"), enforced("value")] };
static BACKEND: Schema = Schema {
    name: "HTTPBackendRef",
    fields: &[
        enforced("group"),
        enforced("kind"),
        enforced("name"),
        enforced("namespace"),
        enforced("port"),
        enforced("weight"),
        nested("filters", &FILTER),
    ],
};
static TIMEOUTS: Schema =
    Schema { name: "HTTPRouteTimeouts", fields: &[enforced("request"), enforced("backendRequest")] };
static RETRY: Schema = Schema {
    name: "HTTPRouteRetry",
    fields: &[enforced("codes"), enforced("attempts"), enforced("backoff")],
};

/// An HTTPRoute.
#[derive(Clone, PartialEq, Debug)]
pub struct HttpRoute {
    /// What it hangs on.
    pub parents: Box<[ParentRef]>,
    /// The host names of its requests, in lower case. They mean nothing on a service (Gateway API, "hostnames").
    pub hostnames: Box<[Str]>,
    /// The rules.
    pub rules: Box<[RuleDraft]>,
    /// When it was made (RFC 3339), empty when not said: the older of two alike wins.
    pub created: Str,
}

/// A rule, of which the back ends are not looked up yet.
#[derive(Clone, PartialEq, Debug)]
pub struct RuleDraft {
    /// What it asks of a request; one must hold.
    pub matches: Box<[RouteMatch]>,
    /// What it does, but for where the request goes, if it is forwarded.
    pub route: Route,
    /// Where it goes.
    pub backends: Box<[BackendDraft]>,
    /// Who gets copies.
    pub mirrors: Box<[(BackendDraft, Percent)]>,
}

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    read(fields, metadata, RouteKind::HttpRoute, read_rule)
}

/// Reads a route of either kind, its rules by `read_rule`.
pub(super) fn read(
    fields: &mut Fields<'_, '_>,
    metadata: &Metadata<'_>,
    kind: RouteKind,
    read_rule: fn(&mut Fields<'_, '_>, RouteId, &Str) -> RuleDraft,
) -> Option<Resource> {
    let pool = &mut fields.context().pool;
    let (namespace, name) = (pool.string(metadata.namespace), pool.string(metadata.name));
    let created = pool.string(metadata.created);
    let mut spec = fields.required("spec")?.fields()?;
    let parents = read_parents(&mut spec, &namespace);
    let hostnames = read_hostnames(&mut spec);
    let mut rules: Vec<RuleDraft> = Vec::new();
    let (mut broken, mut dropped) = (0, Vec::new());
    let id =
        |rule, rule_name| RouteId { kind, namespace: namespace.clone(), name: name.clone(), rule, rule_name };
    let mut place = 0;
    spec.each("rules", |mut item| {
        let (errors, said) = (item.context().errors(), item.context().said());
        let Some(mut rule) = item.fields() else { return };
        let rule_name: Option<Str> = rule.string("name").map(Into::into);
        let mut draft = read_rule(&mut rule, id(place, rule_name.clone()), &namespace);
        let context = rule.context();
        let wrong = context.errors() - errors;
        if wrong > 0 {
            broken += wrong;
            dropped.push(place);
            draft = draft.refusing(context.said_of(said).any(|field| field.contains("].matches")));
        }
        if rule_name.is_some() && rules.iter().any(|other| other.route.id.rule_name == rule_name) {
            rule.report(Code::InvalidValue, "another rule has this name", "give it one of its own");
        }
        place += 1;
        rules.push(draft);
    });
    if place == 0 {
        // The CRD's default.
        rules.push(RuleDraft::for_all(id(0, None)));
    } else if !dropped.is_empty() && dropped.len() < rules.len() && spec.context().errors() == broken {
        let list = dropped.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let message = format!(
            "Dropped Rule {list}: requests are answered with 500 where its matches can be read, and are other \
                               rules' where not"
        );
        spec.report(Code::RuleDropped, message, "correct its errors");
        spec.forgive(broken);
    }
    let route = HttpRoute { parents, hostnames, rules: rules.into(), created };
    Some(Resource::HttpRoute(Box::new(route)))
}

impl RuleDraft {
    /// A rule that takes every request, and leads nowhere.
    fn for_all(id: RouteId) -> Self {
        let matches = [RouteMatch { path: Some(PathMatch::segments("/")), ..RouteMatch::default() }];
        let route = Route { id, ..Route::new(RouteAction::default()) };
        Self { matches: matches.into(), route, backends: Box::default(), mirrors: Box::default() }
    }

    /// What becomes of a rule with errors: what it asks for is answered with 500, or, where that can't be told, nothing is
    /// its own.
    fn refusing(self, of_matches: bool) -> Self {
        let refuse =
            RouteAction::Respond(Box::new(Respond { status: 500, body: Box::default(), content_type: None }));
        Self {
            matches: if of_matches { Box::default() } else { self.matches },
            route: Route { id: self.route.id, ..Route::new(refuse) },
            backends: Box::default(),
            mirrors: Box::default(),
        }
    }
}

/// Reads `hostnames`, in lower case.
pub(super) fn read_hostnames(spec: &mut Fields<'_, '_>) -> Box<[Str]> {
    let mut hostnames = Vec::new();
    spec.each("hostnames", |mut item| {
        let node = item.node();
        match node.as_str() {
            Some(text) if crate::metadata::is_subdomain(text.strip_prefix("*.").unwrap_or(text)) => {
                hostnames.push(item.context().pool.string(&text.to_ascii_lowercase()));
            }
            Some(text) => item.invalid(format_args!("{text:?} is no host name"), ""),
            None => {
                item.string();
            }
        }
    });
    hostnames.into()
}

fn read_rule(rule: &mut Fields<'_, '_>, id: RouteId, namespace: &Str) -> RuleDraft {
    let mut matches = Vec::new();
    rule.each("matches", |item| matches.extend(read_match(item)));
    if matches.is_empty() {
        // The CRD's default: all paths.
        matches.push(RouteMatch { path: Some(PathMatch::segments("/")), ..RouteMatch::default() });
    }
    let filters = filters::read(rule, namespace, &HTTP);
    let backends = read_backends(rule, namespace, &HTTP);
    if filters.redirect.is_some() && !backends.is_empty() {
        rule.report(Code::InvalidValue, "a rule that redirects has no back ends", "remove one of both");
    }
    let prefixes = matches.iter().all(|m| matches!(m.path, Some(PathMatch::Segments(_))));
    let by_prefix =
        |p: &Option<model::http::PathRewrite>| matches!(p, Some(model::http::PathRewrite::Segments(_)));
    if !prefixes
        && (by_prefix(&filters.path) || filters.redirect.as_ref().is_some_and(|r| by_prefix(&r.path)))
    {
        let message = "ReplacePrefixMatch needs matches of the type PathPrefix";
        rule.report(Code::InvalidValue, message, "use ReplaceFullPath, or match by prefix");
    }
    let action = match filters.redirect {
        Some(redirect) => RouteAction::Redirect(Box::new(redirect)),
        None => RouteAction::default(),
    };
    let mut route = Route::new(action);
    route.id = id;
    route.request_headers = filters.request_headers.unwrap_or_default();
    route.response_headers = filters.response_headers.unwrap_or_default();
    route.path = filters.path;
    route.host = filters.host;
    route.cors = filters.cors.map(Box::new);
    route.timeouts = read_timeouts(rule);
    route.retry = rule.object("retry").map(|mut retry| read_retry(&mut retry));
    RuleDraft { matches: matches.into(), route, backends, mirrors: filters.mirrors.into() }
}

/// Reads `backendRefs` of a rule.
pub(super) fn read_backends(
    rule: &mut Fields<'_, '_>,
    namespace: &Str,
    types: &[(&str, Type)],
) -> Box<[BackendDraft]> {
    let mut backends = Vec::new();
    rule.each("backendRefs", |item| {
        let Some(mut fields) = item.fields() else { return };
        let Some(mut backend) = read_weighted(&mut fields, namespace) else { return };
        let of_backend = filters::read(&mut fields, namespace, types);
        let only_headers = of_backend.mirrors.is_empty()
            && of_backend.redirect.is_none()
            && of_backend.path.is_none()
            && of_backend.host.is_none()
            && of_backend.cors.is_none();
        if !only_headers {
            let message = "a back end's filters may change headers, and nothing else";
            fields.report(Code::FieldRefused, message, "move the filter to the rule");
        }
        backend.request_headers = of_backend.request_headers.unwrap_or_default();
        backend.response_headers = of_backend.response_headers.unwrap_or_default();
        backends.push(backend);
    });
    backends.into()
}

fn read_match(cursor: Cursor<'_, '_>) -> Option<RouteMatch> {
    let mut fields = cursor.fields()?;
    let wanted = match fields.object("path") {
        Some(mut wanted) => read_path(&mut wanted)?,
        None => PathMatch::segments("/"),
    };
    let headers = read_headers(&mut fields);
    let mut query: Vec<QueryMatch> = Vec::new();
    fields.each("queryParams", |item| {
        let Some(mut parameter) = item.fields() else { return };
        let name = parameter.required("name").and_then(Cursor::string);
        let value = read_pattern(&mut parameter);
        let (Some(name), Some(value)) = (name, value) else { return };
        if !query.iter().any(|q| *q.name == *name) {
            query.push(QueryMatch { name: parameter.context().pool.string(name), value });
        }
    });
    let method = fields.take("method").and_then(|c| word(c, &METHODS)).map(|m| Pattern::Exact(m.into()));
    Some(RouteMatch { path: Some(wanted), method, headers, query: query.into(), ..RouteMatch::default() })
}

/// Reads `headers` of a match. Of equal names only the first counts (Gateway API, HTTPHeaderMatch.name).
pub(super) fn read_headers(fields: &mut Fields<'_, '_>) -> Box<[HeaderMatch]> {
    let mut headers: Vec<HeaderMatch> = Vec::new();
    fields.each("headers", |item| {
        let Some(mut header) = item.fields() else { return };
        let name = header.required("name").and_then(header_name);
        let value = read_pattern(&mut header);
        let (Some(name), Some(value)) = (name, value) else { return };
        if !headers.iter().any(|h| *h.name == *name.as_str()) {
            headers.push(HeaderMatch { name: name.as_str().into(), value, negated: false });
        }
    });
    headers.into()
}

const METHODS: [(&str, &str); 9] = [
    ("GET", "GET"),
    ("HEAD", "HEAD"),
    ("POST", "POST"),
    ("PUT", "PUT"),
    ("DELETE", "DELETE"),
    ("CONNECT", "CONNECT"),
    ("OPTIONS", "OPTIONS"),
    ("TRACE", "TRACE"),
    ("PATCH", "PATCH"),
];

#[derive(Clone, Copy)]
enum By {
    Exact,
    Prefix,
    Regex,
}

fn read_path(fields: &mut Fields<'_, '_>) -> Option<PathMatch> {
    let types = [("PathPrefix", By::Prefix), ("Exact", By::Exact), ("RegularExpression", By::Regex)];
    let by = match fields.take("type") {
        Some(cursor) => word(cursor, &types)?,
        None => By::Prefix,
    };
    let Some(mut cursor) = fields.take("value") else { return Some(PathMatch::segments("/")) };
    match by {
        By::Exact => path(cursor).map(PathMatch::Exact),
        By::Prefix => path(cursor).map(|text| PathMatch::segments(&text)),
        By::Regex => {
            let node = cursor.node();
            match node.as_str() {
                Some(text) => regex(&mut cursor, text).map(PathMatch::Regex),
                None => {
                    cursor.string();
                    None
                }
            }
        }
    }
}

fn read_pattern(fields: &mut Fields<'_, '_>) -> Option<Pattern> {
    let by = match fields.take("type") {
        Some(cursor) => word(cursor, &[("Exact", By::Exact), ("RegularExpression", By::Regex)])?,
        None => By::Exact,
    };
    let mut cursor = fields.required("value")?;
    let node = cursor.node();
    let Some(text) = node.as_str() else {
        cursor.string();
        return None;
    };
    match by {
        By::Exact | By::Prefix => Some(Pattern::Exact(cursor.context().pool.string(text))),
        By::Regex => regex(&mut cursor, text).map(Pattern::Regex),
    }
}

fn read_timeouts(rule: &mut Fields<'_, '_>) -> Timeouts {
    let Some(mut fields) = rule.object("timeouts") else { return Timeouts::default() };
    // Zero is without limit (Gateway API, HTTPRouteTimeouts).
    let limited = |d: &Duration| !d.is_zero();
    let request = fields.take("request").and_then(duration).filter(limited);
    let per_try = fields.take("backendRequest").and_then(duration).filter(limited);
    if request.zip(per_try).is_some_and(|(whole, part)| part > whole) {
        let message = "one try may not take longer than the whole request";
        fields.report(Code::InvalidValue, message, "make backendRequest shorter, or request longer");
    }
    Timeouts { request, per_try }
}

/// Tries again, if nothing is said of how often.
const ATTEMPTS: u32 = 2;

fn read_retry(fields: &mut Fields<'_, '_>) -> Retry {
    let mut statuses = Vec::new();
    fields.each("codes", |item| statuses.extend(item.integer(400..=599_u16)));
    let attempts = fields.integer("attempts", 0..=100).unwrap_or(ATTEMPTS);
    let backoff = fields.take("backoff").and_then(duration);
    let on = RetryOn::CONNECT_FAILURE.and(RetryOn::REFUSED_STREAM).and(RetryOn::RESET_BEFORE_REQUEST);
    Retry {
        attempts,
        on: if statuses.is_empty() { on } else { on.and(RetryOn::STATUSES).and(RetryOn::RESET) },
        statuses: statuses.into(),
        backoff,
        remote_localities: true,
        other_hosts: true,
    }
}
