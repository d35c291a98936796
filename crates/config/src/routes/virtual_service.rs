//! VirtualService (`networking.istio.io`): reading it with every upstream field.

use std::time::Duration;

use http::HeaderValue;
use model::Str;
use model::http::{
    Abort, Authority, Cors, Fault, HeaderEdit, HeaderEdits, HeaderMatch, HostRewrite, Origin, PathMatch,
    PathRewrite, Pattern, Percent, QueryMatch, Redirect, Respond, Retry, RetryOn, Route, RouteAction,
    RouteId, RouteKind, RouteMatch, SourceMatch, Substitution,
};

use super::destination_rule::read_export;
use super::http_route::RuleDraft;
use super::reference::{BackendDraft, Reference};
use super::value::{go_duration, is_field_name, listed, number, regex, some_time, word};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, refused, silent};
use crate::metadata::{METADATA, Metadata};
use crate::policy::selector::non_empty;
use crate::resource::{Kind, KindSpec, Resource};
use crate::tree::Value;

mod hosts;
mod streams;

pub use hosts::SetHosts;
pub use streams::{StreamEntry, StreamMatchDraft};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::VirtualService,
    group: "networking.istio.io",
    versions: &["v1", "v1beta1", "v1alpha3"],
    name: "VirtualService",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "VirtualService",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};
static SPEC: Schema = Schema {
    name: "VirtualService.spec",
    fields: &[
        enforced("hosts"),
        enforced("gateways"),
        nested("http", &HTTP),
        nested("tls", &streams::TLS),
        nested("tcp", &streams::TCP),
        enforced("exportTo"),
    ],
};
static HTTP: Schema = Schema {
    name: "VirtualService.spec.http[]",
    fields: &[
        enforced("name"),
        nested("match", &MATCH),
        nested("route", &HTTP_DESTINATION),
        nested("redirect", &REDIRECT),
        nested("directResponse", &RESPONSE),
        nested("delegate", &DELEGATE),
        nested("rewrite", &REWRITE),
        enforced("timeout"),
        nested("retries", &RETRIES),
        nested("fault", &FAULT),
        nested("mirror", &DESTINATION),
        nested("mirrors", &MIRROR),
        enforced("mirrorPercent"),
        enforced("mirror_percent"),
        nested("mirrorPercentage", &PERCENT),
        nested("corsPolicy", &CORS),
        nested("headers", &HEADERS),
    ],
};
static MATCH: Schema = Schema {
    name: "HTTPMatchRequest",
    fields: &[
        nested("uri", &TEXT),
        enforced("headers"),
        nested("method", &TEXT),
        nested("authority", &TEXT),
        nested("scheme", &TEXT),
        enforced("queryParams"),
        enforced("withoutHeaders"),
        enforced("port"),
        enforced("sourceLabels"),
        enforced("sourceNamespace"),
        enforced("gateways"),
        enforced("ignoreUriCase"),
        silent("name", "logs name the route"),
        silent("statPrefix", "it names Envoy's own statistics"),
    ],
};
static TEXT: Schema =
    Schema { name: "StringMatch", fields: &[enforced("exact"), enforced("prefix"), enforced("regex")] };
static DESTINATION: Schema =
    Schema { name: "Destination", fields: &[enforced("host"), enforced("subset"), nested("port", &PORT)] };
static PORT: Schema = Schema { name: "PortSelector", fields: &[enforced("number")] };
static HTTP_DESTINATION: Schema = Schema {
    name: "HTTPRouteDestination",
    fields: &[nested("destination", &DESTINATION), enforced("weight"), nested("headers", &HEADERS)],
};
static HEADERS: Schema =
    Schema { name: "Headers", fields: &[nested("request", &OPERATIONS), nested("response", &OPERATIONS)] };
static OPERATIONS: Schema =
    Schema { name: "HeaderOperations", fields: &[enforced("set"), enforced("add"), enforced("remove")] };
static REDIRECT: Schema = Schema {
    name: "HTTPRedirect",
    fields: &[
        enforced("uri"),
        enforced("authority"),
        enforced("port"),
        enforced("derivePort"),
        enforced("scheme"),
        enforced("redirectCode"),
        enforced("prefixRewrite"),
    ],
};
static RESPONSE: Schema =
    Schema { name: "HTTPDirectResponse", fields: &[enforced("status"), nested("body", &BODY)] };
static BODY: Schema = Schema { name: "HTTPBody", fields: &[enforced("string"), enforced("bytes")] };
static DELEGATE: Schema = Schema { name: "Delegate", fields: &[enforced("name"), enforced("namespace")] };
static REWRITE: Schema = Schema {
    name: "HTTPRewrite",
    fields: &[enforced("uri"), enforced("authority"), nested("uriRegexRewrite", &SUBSTITUTION)],
};
static SUBSTITUTION: Schema =
    Schema { name: "RegexRewrite", fields: &[enforced("match"), enforced("rewrite")] };
/// `retries`, and `defaultHttpRetryPolicy` of the mesh's settings.
pub static RETRIES: Schema = Schema {
    name: "HTTPRetry",
    fields: &[
        enforced("attempts"),
        enforced("perTryTimeout"),
        enforced("retryOn"),
        enforced("retryRemoteLocalities"),
        enforced("retryIgnorePreviousHosts"),
        enforced("backoff"),
    ],
};
static FAULT: Schema =
    Schema { name: "HTTPFaultInjection", fields: &[nested("delay", &DELAY), nested("abort", &ABORT)] };
static DELAY: Schema = Schema {
    name: "Delay",
    fields: &[
        enforced("fixedDelay"),
        nested("percentage", &PERCENT),
        enforced("percent"),
        refused("exponentialDelay", "delays are fixed", "use fixedDelay"),
    ],
};
static ABORT: Schema = Schema {
    name: "Abort",
    fields: &[
        enforced("httpStatus"),
        enforced("grpcStatus"),
        nested("percentage", &PERCENT),
        refused("http2Error", "a request is aborted by a status", "use httpStatus or grpcStatus"),
    ],
};
static PERCENT: Schema = Schema { name: "Percent", fields: &[enforced("value")] };
static MIRROR: Schema = Schema {
    name: "HTTPMirrorPolicy",
    fields: &[nested("destination", &DESTINATION), nested("percentage", &PERCENT)],
};
static CORS: Schema = Schema {
    name: "CorsPolicy",
    fields: &[
        nested("allowOrigins", &TEXT),
        enforced("allowOrigin"),
        enforced("allowMethods"),
        enforced("allowHeaders"),
        enforced("exposeHeaders"),
        enforced("maxAge"),
        enforced("allowCredentials"),
        enforced("unmatchedPreflights"),
    ],
};
/// A VirtualService.
#[derive(Clone, PartialEq, Debug)]
pub struct VirtualService {
    /// The hosts, in lower case; none for one that others delegate to. A short name is one of its own namespace.
    pub hosts: Box<[Str]>,
    /// The routes of HTTP requests, in order.
    pub http: Box<[HttpEntry]>,
    /// The routes of TLS connections and of others, in order.
    pub streams: Box<[StreamEntry]>,
    /// The namespaces that it is for: `None` is all.
    pub export_to: Option<Box<[Str]>>,
    /// When it was made (RFC 3339), empty when not said.
    pub created: Str,
}

/// An entry of `http`.
#[derive(Clone, PartialEq, Debug)]
pub struct HttpEntry {
    /// The port that each match of `rule` asks for.
    pub ports: Box<[Option<u16>]>,
    /// What it asks and does.
    pub rule: RuleDraft,
    /// Whose routes take the requests, rather than `rule`: namespace and name.
    pub delegate: Option<(Str, Str)>,
    /// Which of [`INHERITED`] are written.
    pub written: Box<[&'static str]>,
    /// What the host becomes.
    pub hosts: SetHosts,
}

/// What of an entry is as the one has it that delegates to it, where it is not written.
const INHERITED: [&str; 5] = ["rewrite", "timeout", "retries", "fault", "headers"];

/// The gateway that stands for all proxies of the mesh.
const MESH: &str = "mesh";

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let pool = &mut fields.context().pool;
    let (namespace, name) = (pool.string(metadata.namespace), pool.string(metadata.name));
    let created = pool.string(metadata.created);
    let mut spec = fields.required("spec")?.fields()?;
    let hosts = read_hosts(&mut spec);
    let mesh = is_for_the_mesh(&mut spec);
    if mesh && hosts.iter().any(|host| &**host == "*") {
        let message = "the host * would be every service's, whoever owns it";
        spec.report(Code::InvalidValue, message, "name the hosts, or *. and a domain");
    }
    if !mesh {
        let message = "it is for gateways only, and has no effect on traffic within the mesh";
        spec.report(Code::WithoutEffect, message, "add the gateway mesh for that");
    }
    let mut http = Vec::new();
    let mut place = 0;
    spec.each("http", |item| {
        let Some(mut entry) = item.fields() else { return };
        let id = RouteId {
            kind: RouteKind::VirtualService,
            namespace: namespace.clone(),
            name: name.clone(),
            rule: place,
            rule_name: entry.string("name").filter(|n| !n.is_empty()).map(Into::into),
        };
        place += 1;
        http.extend(read_http(&mut entry, id, &namespace, mesh));
    });
    let mut stream_entries = Vec::new();
    for kind in ["tls", "tcp"] {
        let mut place = 0;
        spec.each(kind, |item| {
            let Some(mut entry) = item.fields() else { return };
            let id = RouteId {
                kind: RouteKind::VirtualService,
                namespace: namespace.clone(),
                name: name.clone(),
                rule: place,
                rule_name: Some(kind.into()),
            };
            place += 1;
            stream_entries.extend(streams::read(&mut entry, id, &namespace, kind == "tls", mesh));
        });
    }
    if hosts.is_empty() && http.iter().any(|entry: &HttpEntry| entry.delegate.is_some()) {
        let message = "without hosts it is one that others delegate to, and may not delegate on";
        spec.report(Code::InvalidValue, message, "");
    }
    if http.is_empty() && stream_entries.is_empty() && mesh {
        spec.report(Code::WithoutEffect, "it has no routes for the mesh", "");
    }
    let export_to = read_export(&mut spec, metadata.namespace);
    let service = VirtualService {
        hosts: hosts.into(),
        http: http.into(),
        streams: stream_entries.into(),
        export_to,
        created,
    };
    Some(Resource::VirtualService(Box::new(service)))
}

/// The hosts, in lower case.
fn read_hosts(spec: &mut Fields<'_, '_>) -> Vec<Str> {
    let mut hosts: Vec<Str> = Vec::new();
    spec.each("hosts", |mut item| {
        let node = item.node();
        let Some(text) = node.as_str() else {
            item.string();
            return;
        };
        let host = text.to_ascii_lowercase();
        let plain = host.strip_prefix("*.").unwrap_or(&host);
        if host != "*" && !crate::metadata::is_subdomain(plain) && host.parse::<std::net::IpAddr>().is_err() {
            item.invalid(format_args!("{text:?} is no host name"), "");
        } else {
            hosts.push(item.context().pool.string(&host));
        }
    });
    hosts
}

/// Whether it is for the mesh: no gateway is named, or that one.
fn is_for_the_mesh(spec: &mut Fields<'_, '_>) -> bool {
    let mut gateways = Vec::new();
    spec.each("gateways", |mut item| {
        let Some(text) = item.node().as_str() else {
            item.string();
            return;
        };
        if !text.split('/').all(crate::metadata::is_subdomain) || text.split('/').count() > 2 {
            item.invalid(
                format_args!("{text:?} is no name of a gateway"),
                "write NAMESPACE/NAME, NAME or mesh",
            );
        }
        gateways.push(text);
    });
    gateways.is_empty() || gateways.contains(&MESH)
}

/// Reads an entry of `http`; `None` when none of its matches is for the mesh.
fn read_http(entry: &mut Fields<'_, '_>, id: RouteId, namespace: &Str, mesh: bool) -> Option<HttpEntry> {
    let (mut matches, mut ports, mut any) = (Vec::new(), Vec::new(), false);
    entry.each("match", |item| {
        any = true;
        let Some((when, port, for_mesh)) = read_match(item, mesh) else { return };
        if for_mesh {
            matches.push(when);
            ports.push(port);
        }
    });
    if !any && mesh {
        (matches, ports) = (vec![RouteMatch::default()], vec![None]);
    }
    let mut backends = Vec::new();
    entry.each("route", |item| {
        let Some(mut fields) = item.fields() else { return };
        let backend = fields.required("destination").and_then(|c| destination(c, namespace));
        let weight = fields.integer("weight", 0..=i32::MAX.unsigned_abs());
        let (request_headers, response_headers, authority) = headers(&mut fields);
        if authority.is_some() {
            let message = "the authority is that of a route, not of one of its destinations";
            fields.report(Code::FieldRefused, message, "use rewrite.authority of the route");
        }
        backends.extend(backend.map(|backend| {
            (
                weight,
                BackendDraft { weight: weight.unwrap_or(0), request_headers, response_headers, ..backend },
            )
        }));
    });
    let backends = weighted(entry, backends);
    let redirect = entry.object("redirect").map(|mut f| read_redirect(&mut f));
    let respond = entry.object("directResponse").and_then(|mut f| read_response(&mut f));
    let delegate = entry.object("delegate").and_then(|mut f| {
        let name = f.required("name").and_then(non_empty);
        let to = f.string("namespace").filter(|n| !n.is_empty()).unwrap_or(namespace);
        let pool = &mut f.context().pool;
        Some((pool.string(to), pool.string(name?)))
    });
    let ways = [!backends.is_empty(), redirect.is_some(), respond.is_some(), delegate.is_some()];
    if ways.iter().filter(|w| **w).count() != 1 {
        let message = "an HTTP route has one of route, redirect, directResponse and delegate";
        entry.report(Code::InvalidValue, message, "");
    }
    let action = match (redirect, respond) {
        (Some(redirect), _) => RouteAction::Redirect(Box::new(redirect)),
        (None, Some(respond)) => RouteAction::Respond(Box::new(respond)),
        (None, None) => RouteAction::default(),
    };
    let mut route = Route::new(action);
    route.id = id;
    let authority;
    (route.request_headers, route.response_headers, authority) = headers(entry);
    let rewrite;
    (route.path, rewrite) = read_rewrite(entry);
    let hosts = SetHosts { rewrite, headers: authority.map(HostRewrite::To) };
    route.host = hosts.in_force();
    route.fault = read_fault(entry);
    route.cors = entry.object("corsPolicy").map(|mut f| Box::new(read_cors(&mut f)));
    route.timeouts.request = entry.take("timeout").and_then(go_duration).filter(|d| !d.is_zero());
    let retries = entry.object("retries").map(|mut f| read_retries(&mut f));
    (route.retry, route.timeouts.per_try) =
        retries.map_or((None, None), |(retry, limit)| (Some(retry), limit));
    let mirrors = read_mirrors(entry, namespace);
    let rule = RuleDraft { matches: matches.into(), route, backends, mirrors };
    let written = INHERITED.into_iter().filter(|name| entry.take(name).is_some()).collect();
    (!rule.matches.is_empty()).then(|| HttpEntry { ports: ports.into(), rule, delegate, written, hosts })
}

/// The back ends: a single one needs no weight, and of several those without one get nothing (Istio).
fn weighted(entry: &mut Fields<'_, '_>, backends: Vec<(Option<u32>, BackendDraft)>) -> Box<[BackendDraft]> {
    let single = backends.len() == 1;
    let total: u64 = backends.iter().map(|(weight, _)| u64::from(weight.unwrap_or(0))).sum();
    if !single && !backends.is_empty() && total == 0 {
        entry.report(Code::InvalidValue, "the weights of all destinations are zero", "give them weights");
    }
    let weigh = |(_, backend): (_, BackendDraft)| BackendDraft {
        weight: if single { 1 } else { backend.weight },
        ..backend
    };
    backends.into_iter().map(weigh).collect()
}

fn destination(cursor: Cursor<'_, '_>, namespace: &Str) -> Option<BackendDraft> {
    let mut fields = cursor.fields()?;
    let host = fields.required("host").and_then(non_empty).map(str::to_ascii_lowercase);
    let subset = fields.string("subset").filter(|s| !s.is_empty());
    let port = fields.object("port").and_then(|mut port| port.integer("number", 1..=u16::MAX));
    let host = host?;
    let pool = &mut fields.context().pool;
    let subset = subset.map(|s| pool.string(s));
    let to = if host.contains('.') {
        Reference::Host(pool.string(&host))
    } else {
        Reference::Service { namespace: namespace.clone(), name: pool.string(&host) }
    };
    Some(BackendDraft {
        to,
        port,
        subset,
        weight: 1,
        request_headers: HeaderEdits::default(),
        response_headers: HeaderEdits::default(),
    })
}

/// Changes of a request's and of a response's fields, and what the request's authority is set to.
fn headers(owner: &mut Fields<'_, '_>) -> (HeaderEdits, HeaderEdits, Option<Authority>) {
    let Some(mut fields) = owner.object("headers") else { return Default::default() };
    let mut authority = None;
    let request = fields.object("request").map(|mut f| operations(&mut f, Some(&mut authority)));
    let response = fields.object("response").map(|mut f| operations(&mut f, None));
    (request.unwrap_or_default(), response.unwrap_or_default(), authority)
}

fn operations(fields: &mut Fields<'_, '_>, mut authority: Option<&mut Option<Authority>>) -> HeaderEdits {
    let mut edits = Vec::new();
    fields.each("remove", |item| edits.extend(super::value::edited_name(item).map(HeaderEdit::Remove)));
    for (list, make) in [("set", HeaderEdit::Set as fn(_, _) -> _), ("add", HeaderEdit::Add)] {
        let Some(cursor) = fields.take(list) else { continue };
        cursor.entries(|key, mut value| {
            let is_authority = key.eq_ignore_ascii_case(":authority") || key.eq_ignore_ascii_case("host");
            if let (true, "set", Some(authority)) = (is_authority, list, authority.as_deref_mut()) {
                *authority = super::value::authority(value);
                return;
            }
            let is_request = authority.is_some();
            if super::value::is_unchangeable(&mut value, key)
                || (is_request && super::value::is_the_clients(&mut value, key))
            {
                return;
            }
            let name = http::HeaderName::from_bytes(key.as_bytes());
            if name.is_err() {
                value.invalid(format_args!("{key:?} is no name of a header field"), "");
            }
            let value = super::value::edited_value(value);
            edits.extend(name.ok().zip(value).map(|(name, value)| make(name, value)));
        });
    }
    HeaderEdits(edits.into())
}

/// A match, its port, and whether it is for the mesh.
fn read_match(cursor: Cursor<'_, '_>, mesh: bool) -> Option<(RouteMatch, Option<u16>, bool)> {
    let mut fields = cursor.fields()?;
    let fold = fields.boolean("ignoreUriCase").unwrap_or(false);
    let path = fields.take("uri").and_then(text).map(|pattern| as_path(pattern, fold));
    let mut one = |name| fields.take(name).and_then(text);
    let (method, authority, scheme) = (one("method"), one("authority"), one("scheme"));
    let mut headers = Vec::new();
    for (list, negated) in [("headers", false), ("withoutHeaders", true)] {
        let Some(cursor) = fields.take(list) else { continue };
        cursor.entries(|key, mut value| {
            if !is_field_name(key, &mut value) {
                return;
            }
            let name = Str::from(key.to_ascii_lowercase().as_str());
            headers.extend(text_or_present(value).map(|value| HeaderMatch { name, value, negated }));
        });
    }
    let mut query = Vec::new();
    if let Some(cursor) = fields.take("queryParams") {
        cursor.entries(|key, value| {
            query.extend(text_or_present(value).map(|value| QueryMatch { name: key.into(), value }));
        });
    }
    let port = fields.integer("port", 1..=u16::MAX);
    let source = read_source(&mut fields);
    let gateways = fields.string_list("gateways");
    let for_mesh = if gateways.is_empty() { mesh } else { gateways.contains(&MESH) };
    let when =
        RouteMatch { path, method, scheme, authority, headers: headers.into(), query: query.into(), source };
    Some((when, port, for_mesh))
}

fn read_source(fields: &mut Fields<'_, '_>) -> Option<Box<SourceMatch>> {
    let labels = fields.string_map("sourceLabels");
    let namespace = fields.string("sourceNamespace").filter(|n| !n.is_empty());
    let pool = &mut fields.context().pool;
    let labels: Box<[(Str, Str)]> =
        labels.into_iter().map(|(k, v)| (pool.string(k), pool.string(v))).collect();
    let namespace = namespace.map(|n| pool.string(n));
    (namespace.is_some() || !labels.is_empty()).then(|| Box::new(SourceMatch { namespace, labels }))
}

/// A StringMatch; an empty one means nothing where a text is always there.
fn text(cursor: Cursor<'_, '_>) -> Option<Pattern> {
    let mut fields = cursor.fields()?;
    let read = read_text(&mut fields);
    if fields.is_empty() {
        fields.report(Code::MissingField, "one of exact, prefix and regex is needed", "");
    }
    read
}

/// A StringMatch; an empty one asks that something is there.
fn text_or_present(cursor: Cursor<'_, '_>) -> Option<Pattern> {
    let Value::Mapping(entries) = &cursor.node().value else {
        cursor.fields();
        return None;
    };
    if entries.is_empty() {
        return Some(Pattern::Present);
    }
    // The map's keys are the user's; the values have a schema of their own.
    let (mut found, several) = (None, entries.len() > 1);
    cursor.entries(|kind, mut value| {
        if several {
            value.invalid("stands beside another one", "write one of exact, prefix and regex");
        }
        let node = value.node();
        let Some(text) = node.as_str() else {
            value.string();
            return;
        };
        found = match kind {
            "exact" => Some(Pattern::Exact(text.into())),
            "prefix" => Some(Pattern::Prefix(text.into())),
            "regex" => regex(&mut value, text).map(Pattern::Regex),
            _ => {
                value.invalid("is not known", "write exact, prefix or regex");
                None
            }
        };
    });
    found
}

fn read_text(fields: &mut Fields<'_, '_>) -> Option<Pattern> {
    let exact = fields.string("exact").map(|t| Pattern::Exact(t.into()));
    let prefix = fields.string("prefix").map(|t| Pattern::Prefix(t.into()));
    let expression = fields.take("regex").and_then(|mut cursor| {
        let node = cursor.node();
        match node.as_str() {
            Some(text) => regex(&mut cursor, text).map(Pattern::Regex),
            None => {
                cursor.string();
                None
            }
        }
    });
    let all = [exact, prefix, expression];
    if all.iter().flatten().count() > 1 {
        fields.report(Code::InvalidValue, "only one of exact, prefix and regex may be set", "");
    }
    all.into_iter().flatten().next()
}

fn as_path(pattern: Pattern, fold: bool) -> PathMatch {
    let lower = |text: &Str| Str::from(text.to_ascii_lowercase().as_str());
    match pattern {
        Pattern::Exact(t) | Pattern::ExactIgnoringCase(t) if fold => PathMatch::ExactIgnoringCase(lower(&t)),
        Pattern::Exact(t) | Pattern::ExactIgnoringCase(t) => PathMatch::Exact(t),
        Pattern::Prefix(t) if fold => PathMatch::PrefixIgnoringCase(lower(&t)),
        Pattern::Prefix(t) => PathMatch::Prefix(t),
        Pattern::Regex(r) => PathMatch::Regex(r),
        Pattern::Present => PathMatch::Prefix("".into()),
    }
}

fn read_redirect(fields: &mut Fields<'_, '_>) -> Redirect {
    let uri = fields.string("uri").filter(|u| !u.is_empty());
    let prefix = fields.string("prefixRewrite").filter(|u| !u.is_empty());
    let host = fields.take("authority").filter(|cursor| cursor.node().as_str() != Some(""));
    let host = host.and_then(super::value::authority);
    let scheme = fields.string("scheme").filter(|s| !s.is_empty()).map(Str::from);
    let number = fields.integer("port", 0..=u16::MAX).filter(|p| *p > 0);
    let words = [("FROM_PROTOCOL_DEFAULT", Some(0)), ("FROM_REQUEST_PORT", None)];
    let derived = fields.take("derivePort").and_then(|c| word(c, &words));
    let status = fields.integer("redirectCode", 0..=399_u16).filter(|s| *s > 0).unwrap_or(301);
    if ![301, 302, 303, 307, 308].contains(&status) {
        let message = format!("{status} is no status of a redirect");
        fields.report(Code::InvalidValue, message, "write 301, 302, 303, 307 or 308");
    }
    if number.is_some() && derived.is_some() {
        fields.report(Code::InvalidValue, "port and derivePort are both set", "remove one");
    }
    if uri.is_some() && prefix.is_some() {
        fields.report(Code::InvalidValue, "uri and prefixRewrite are both set", "remove one");
    }
    // As in Envoy: who names another host, and no port, means the one that the scheme implies, or the one that is written with
    // the host.
    let elsewhere = scheme.is_some() || host.is_some();
    let port = number.or(derived.unwrap_or_else(|| elsewhere.then_some(0)));
    if host.as_deref().is_some_and(super::value::has_port) && port != Some(0) {
        let message = "a port is written with the authority, and another one is asked for";
        fields.report(Code::InvalidValue, message, "write one of them");
    }
    let path =
        uri.map(|u| PathRewrite::Full(u.into())).or_else(|| prefix.map(|p| PathRewrite::Prefix(p.into())));
    Redirect { status, scheme, host: host.as_deref().map(Str::from), port, path }
}

/// Bytes of a body that is answered; Envoy's limit is 4 KiB, Istio's 1 MiB.
const MAX_BODY: usize = 1 << 20;

fn read_response(fields: &mut Fields<'_, '_>) -> Option<Respond> {
    let status = fields.required("status").and_then(|c| c.integer(200..=599_u16));
    let mut body: Box<[u8]> = Box::default();
    if let Some(mut written) = fields.object("body") {
        let text = written.string("string");
        let encoded = written.take("bytes").and_then(|mut cursor| {
            use base64::Engine as _;
            let node = cursor.node();
            let Some(text) = node.as_str() else {
                cursor.string();
                return None;
            };
            let decoded = base64::engine::general_purpose::STANDARD.decode(text).ok();
            if decoded.is_none() {
                cursor.invalid("is no Base64", "");
            }
            decoded
        });
        if text.is_some() && encoded.is_some() {
            written.report(Code::InvalidValue, "string and bytes are both set", "remove one");
        }
        body = text.map(|t| t.as_bytes().into()).or(encoded.map(Into::into)).unwrap_or_default();
        if body.len() > MAX_BODY {
            written.report(Code::InvalidValue, format!("the body is longer than {MAX_BODY} bytes"), "");
        }
    }
    let content_type = (!body.is_empty()).then(|| HeaderValue::from_static("text/plain"));
    Some(Respond { status: status?, body, content_type })
}

fn read_rewrite(entry: &mut Fields<'_, '_>) -> (Option<PathRewrite>, Option<HostRewrite>) {
    let Some(mut fields) = entry.object("rewrite") else { return (None, None) };
    let uri = fields.string("uri").filter(|u| !u.is_empty());
    let host = fields.take("authority").filter(|cursor| cursor.node().as_str() != Some(""));
    let host = host.and_then(super::value::authority).map(HostRewrite::To);
    let substitution = fields.object("uriRegexRewrite").and_then(|mut f| {
        let pattern = f.required("match").and_then(non_empty);
        let replacement = f.required("rewrite").and_then(Cursor::string);
        match Substitution::new(pattern?, replacement?) {
            Ok(substitution) => Some(substitution),
            Err(error) => {
                f.report(Code::InvalidValue, error.to_string(), "");
                None
            }
        }
    });
    if uri.is_some() && substitution.is_some() {
        fields.report(Code::InvalidValue, "uri and uriRegexRewrite are both set", "remove one");
    }
    let path = uri.map(|u| PathRewrite::Prefix(u.into())).or(substitution.map(PathRewrite::Regex));
    (path, host)
}

fn percentage(fields: &mut Fields<'_, '_>, name: &'static str) -> Option<Percent> {
    let value = fields.object(name)?.take("value").and_then(|c| number(c, 0.0, 100.0)).unwrap_or(0.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 1,000,000")]
    Some(Percent::of((value * 10_000.0).round() as u32, 1_000_000))
}

fn read_fault(entry: &mut Fields<'_, '_>) -> Fault {
    let Some(mut fields) = entry.object("fault") else { return Fault::default() };
    let delay = fields.object("delay").and_then(|mut delay| {
        let fixed = delay.required("fixedDelay").and_then(some_time);
        let share = percentage(&mut delay, "percentage");
        let old = delay.integer("percent", 0..=100_u32).map(|p| Percent::of(p, 100));
        Some((fixed?, share.or(old).unwrap_or_else(|| of_none(&mut delay))))
    });
    let abort = fields.object("abort").and_then(|mut abort| {
        let status = abort.integer("httpStatus", 200..=599_u16).map(Abort::Http);
        let grpc = abort.take("grpcStatus").and_then(|c| word(c, &GRPC)).map(Abort::Grpc);
        if status.is_some() == grpc.is_some() {
            abort.report(Code::InvalidValue, "one of httpStatus and grpcStatus is needed", "");
        }
        let share = percentage(&mut abort, "percentage").unwrap_or_else(|| of_none(&mut abort));
        Some((status.or(grpc)?, share))
    });
    Fault { delay, abort }
}

/// The share of a fault that says none, as upstream has it.
fn of_none(fault: &mut Fields<'_, '_>) -> Percent {
    let message = "without a percentage the fault is that of no request";
    fault.report(Code::WithoutEffect, message, "set percentage.value, to 100 for all requests");
    Percent::default()
}

const GRPC: [(&str, u8); 17] = [
    ("OK", 0),
    ("CANCELLED", 1),
    ("UNKNOWN", 2),
    ("INVALID_ARGUMENT", 3),
    ("DEADLINE_EXCEEDED", 4),
    ("NOT_FOUND", 5),
    ("ALREADY_EXISTS", 6),
    ("PERMISSION_DENIED", 7),
    ("RESOURCE_EXHAUSTED", 8),
    ("FAILED_PRECONDITION", 9),
    ("ABORTED", 10),
    ("OUT_OF_RANGE", 11),
    ("UNIMPLEMENTED", 12),
    ("INTERNAL", 13),
    ("UNAVAILABLE", 14),
    ("DATA_LOSS", 15),
    ("UNAUTHENTICATED", 16),
];

fn read_mirrors(entry: &mut Fields<'_, '_>, namespace: &Str) -> Box<[(BackendDraft, Percent)]> {
    let mut mirrors = Vec::new();
    let single = entry.take("mirror").and_then(|c| destination(c, namespace));
    let share = percentage(entry, "mirrorPercentage");
    let old = ["mirrorPercent", "mirror_percent"].map(|name| entry.integer(name, 0..=100_u32));
    let old = old.into_iter().flatten().next().map(|p| Percent::of(p, 100));
    let has_single = single.is_some();
    mirrors.extend(single.map(|to| (to, share.or(old).unwrap_or(Percent::ALL))));
    entry.each("mirrors", |item| {
        let Some(mut fields) = item.fields() else { return };
        let to = fields.required("destination").and_then(|c| destination(c, namespace));
        let share = percentage(&mut fields, "percentage").unwrap_or(Percent::ALL);
        mirrors.extend(to.map(|to| (to, share)));
    });
    if has_single && mirrors.len() > 1 {
        entry.report(Code::InvalidValue, "mirror and mirrors are both set", "remove one");
    }
    mirrors.into()
}

fn read_cors(fields: &mut Fields<'_, '_>) -> Cors {
    let mut origins: Vec<Origin> = Vec::new();
    // What matches an asterisk is any, as in Envoy: that is how all are written.
    let any_or = |pattern: Pattern| if pattern.matches(b"*") { Pattern::Present } else { pattern };
    fields.each("allowOrigins", |item| origins.extend(text(item).map(|p| Origin::Text(any_or(p)))));
    for old in fields.string_list("allowOrigin") {
        let any = old == "*";
        origins.push(Origin::Text(if any { Pattern::Present } else { Pattern::Exact(old.into()) }));
    }
    let mut list = |name| listed(fields, name).into();
    let (methods, headers, expose) = (list("allowMethods"), list("allowHeaders"), list("exposeHeaders"));
    let max_age = fields.take("maxAge").and_then(go_duration);
    let credentials = fields.boolean("allowCredentials").unwrap_or(false);
    let words = [("UNSPECIFIED", true), ("FORWARD", true), ("IGNORE", false)];
    let forward_unmatched = fields.take("unmatchedPreflights").and_then(|c| word(c, &words)).unwrap_or(true);
    Cors { origins: origins.into(), methods, headers, expose, max_age, credentials, forward_unmatched }
}

/// What Istio tries again where `retryOn` says nothing. It names no status, so that no answer of an application is.
const RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";

/// Reads `retries`: when a request is tried again, and how long a try may take.
pub(crate) fn read_retries(fields: &mut Fields<'_, '_>) -> (Retry, Option<Duration>) {
    let per_try = fields.take("perTryTimeout").and_then(go_duration).filter(|d| !d.is_zero());
    let attempts = fields.integer("attempts", 0..=100).unwrap_or(0);
    let (mut on, mut statuses) = (RetryOn::default(), Vec::new());
    let cursor = fields.take("retryOn");
    let written = cursor.as_ref().and_then(|c| c.node().as_str()).filter(|t| !t.is_empty());
    let words = written.unwrap_or(RETRY_ON);
    let mut unknown = Vec::new();
    for item in words.split(',').map(str::trim) {
        match (RetryOn::parse(item), item.parse::<u16>()) {
            (Some(kind), _) => on = on.and(kind),
            (None, Ok(status)) if (100..=599).contains(&status) => {
                on = on.and(RetryOn::STATUSES);
                statuses.push(status);
            }
            _ => unknown.push(item),
        }
    }
    if let (Some(mut cursor), false) = (cursor, unknown.is_empty()) {
        let message = format!("{} is nothing that could be tried again", unknown.join(", "));
        let known = RetryOn::words().collect::<Vec<_>>().join(", ");
        cursor.invalid(message, format!("write some of {known}, and statuses, separated by commas"));
    }
    let remote_localities = fields.boolean("retryRemoteLocalities").unwrap_or(false);
    let other_hosts = fields.boolean("retryIgnorePreviousHosts").unwrap_or(true);
    let backoff = fields.take("backoff").and_then(go_duration);
    (Retry { attempts, on, statuses: statuses.into(), backoff, remote_localities, other_hosts }, per_try)
}
