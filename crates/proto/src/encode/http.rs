//! Writing what a waypoint does for a service: its ports, routes, and the policies that hold for it.
//!
//! All of it has a form on the wire, and reading gives back what was written. A structure is taken apart by name, so that
//! a field that is added to the model has to be given its form before this compiles.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use model::http::{
    Abort, Backend, BackendRef, Cors, Fault, HeaderEdit, HeaderEdits, HeaderMatch, HostRewrite, HttpPort,
    HttpService, LedTo, Mirror, Origin, PathMatch, PathRewrite, Pattern, Protocol, QueryMatch, Redirect,
    Respond, Retry, Route, RouteAction, RouteId, RouteKind, RouteMatch, RouteTable, ServerName, SourceMatch,
    StreamMatch, StreamRoute, StreamTable, Timeouts,
};
use model::{PolicyKey, ServiceKey, Str};

use super::{network, texts};
use crate::wire::waypoint as wire;

/// Writes what a waypoint does for a service.
#[must_use]
pub fn encode_http_service(service: &HttpService) -> wire::HttpService {
    let HttpService {
        service,
        waypoint,
        ports,
        policies,
        selected,
        led_to,
        authentication,
        rate_limits,
        telemetry,
    } = service;
    wire::HttpService {
        service: Some(service_key(service)),
        waypoint: Some(wire::Name {
            namespace: waypoint.namespace.to_string(),
            name: waypoint.name.to_string(),
        }),
        ports: ports.iter().map(port).collect(),
        policies: policies.iter().map(policy_key).collect(),
        selected: sets(selected),
        led_to: led_to
            .iter()
            .map(|LedTo { service, selected }| wire::LedTo {
                service: Some(service_key(service)),
                selected: sets(selected),
            })
            .collect(),
        authentication: authentication.iter().map(policy_key).collect(),
        rate_limits: rate_limits.iter().map(policy_key).collect(),
        telemetry: Some(super::telemetry::telemetry(telemetry)),
    }
}

fn sets(all: &[Box<[PolicyKey]>]) -> Vec<wire::Policies> {
    all.iter().map(|set| wire::Policies { policies: set.iter().map(policy_key).collect() }).collect()
}

pub(super) fn service_key(key: &ServiceKey) -> wire::ServiceKey {
    wire::ServiceKey { namespace: key.namespace.to_string(), hostname: key.hostname.to_string() }
}

pub(super) fn policy_key(key: &PolicyKey) -> wire::Name {
    wire::Name { namespace: key.namespace.to_string(), name: key.name.to_string() }
}

pub(super) fn duration(duration: Duration) -> wire::Duration {
    wire::Duration { seconds: duration.as_secs(), nanos: duration.subsec_nanos() }
}

pub(super) fn text(text: &Option<Str>) -> Option<String> {
    text.as_ref().map(ToString::to_string)
}

pub(super) fn labels(labels: &[(Str, Str)]) -> Vec<wire::Label> {
    let label = |(key, value): &(Str, Str)| wire::Label { key: key.to_string(), value: value.to_string() };
    labels.iter().map(label).collect()
}

fn port(port: &HttpPort) -> wire::Port {
    use wire::port::Protocol as Wire;
    let HttpPort { number, protocol, routes, streams } = port;
    let protocol = match protocol {
        Protocol::Detect => Wire::Detect,
        Protocol::Http => Wire::Http,
        Protocol::Http2 => Wire::Http2,
        Protocol::Tcp => Wire::Tcp,
        Protocol::Tls => Wire::Tls,
    };
    let (entries, routes) = table(routes);
    let (stream_entries, stream_routes) = stream_table(streams);
    wire::Port {
        number: (*number).into(),
        protocol: protocol.into(),
        entries,
        routes,
        stream_entries,
        stream_routes,
    }
}

/// Values that several point to, each written once.
struct Once<T, W> {
    places: HashMap<*const T, u32>,
    written: Vec<W>,
}

impl<T, W> Once<T, W> {
    fn new() -> Self {
        Self { places: HashMap::new(), written: Vec::new() }
    }

    fn place(&mut self, value: &Arc<T>, write: impl FnOnce(&T) -> W) -> u32 {
        // As many as fit in memory.
        let next = u32::try_from(self.written.len()).unwrap_or(u32::MAX);
        *self.places.entry(Arc::as_ptr(value)).or_insert_with(|| {
            self.written.push(write(value));
            next
        })
    }
}

fn table(table: &RouteTable) -> (Vec<wire::Entry>, Vec<wire::Route>) {
    let mut routes = Once::new();
    let entry = |(when, to): &(RouteMatch, Arc<Route>)| wire::Entry {
        when: Some(route_match(when)),
        route: routes.place(to, route),
    };
    (table.entries().iter().map(entry).collect(), routes.written)
}

fn stream_table(table: &StreamTable) -> (Vec<wire::StreamEntry>, Vec<wire::StreamRoute>) {
    let mut routes = Once::new();
    let entry = |(when, to): &(StreamMatch, Arc<StreamRoute>)| {
        let StreamMatch { tls, names, destinations, source } = when;
        wire::StreamEntry {
            tls: *tls,
            names: names.iter().map(server_name).collect(),
            destinations: destinations.iter().map(|range| network(*range)).collect(),
            source: source.as_deref().map(source_match),
            route: routes.place(to, stream_route),
        }
    };
    (table.entries().iter().map(entry).collect(), routes.written)
}

fn server_name(name: &ServerName) -> wire::ServerName {
    use wire::server_name::Kind;
    let kind = match name {
        ServerName::Exact(name) => Kind::Exact(name.to_string()),
        ServerName::Below(domain) => Kind::Below(domain.to_string()),
    };
    wire::ServerName { kind: Some(kind) }
}

fn stream_route(route: &StreamRoute) -> wire::StreamRoute {
    let StreamRoute { id, to } = route;
    wire::StreamRoute { id: Some(route_id(id)), backends: to.backends().iter().map(backend).collect() }
}

fn route_match(when: &RouteMatch) -> wire::RouteMatch {
    let RouteMatch { path, method, scheme, authority, headers, query, source } = when;
    let header = |HeaderMatch { name, value, negated }: &HeaderMatch| wire::HeaderMatch {
        name: name.to_string(),
        value: Some(pattern(value)),
        negated: *negated,
    };
    let parameter = |QueryMatch { name, value }: &QueryMatch| wire::QueryMatch {
        name: name.to_string(),
        value: Some(pattern(value)),
    };
    wire::RouteMatch {
        path: path.as_ref().map(path_match),
        method: method.as_ref().map(pattern),
        scheme: scheme.as_ref().map(pattern),
        authority: authority.as_ref().map(pattern),
        headers: headers.iter().map(header).collect(),
        query: query.iter().map(parameter).collect(),
        source: source.as_deref().map(source_match),
    }
}

fn source_match(source: &SourceMatch) -> wire::SourceMatch {
    let SourceMatch { namespace, labels: wanted } = source;
    wire::SourceMatch { namespace: text(namespace), labels: labels(wanted) }
}

fn pattern(pattern: &Pattern) -> wire::Pattern {
    use wire::pattern::Kind;
    let kind = match pattern {
        Pattern::Exact(text) => Kind::Exact(text.to_string()),
        Pattern::ExactIgnoringCase(text) => Kind::ExactIgnoringCase(text.to_string()),
        Pattern::Prefix(text) => Kind::Prefix(text.to_string()),
        Pattern::Regex(regex) => Kind::Regex(regex.source().to_string()),
        Pattern::Present => Kind::Present(()),
    };
    wire::Pattern { kind: Some(kind) }
}

fn path_match(path: &PathMatch) -> wire::PathMatch {
    use wire::path_match::Kind;
    let kind = match path {
        PathMatch::Exact(text) => Kind::Exact(text.to_string()),
        PathMatch::Segments(text) => Kind::Segments(text.to_string()),
        PathMatch::Prefix(text) => Kind::Prefix(text.to_string()),
        PathMatch::Regex(regex) => Kind::Regex(regex.source().to_string()),
        PathMatch::ExactIgnoringCase(text) => Kind::ExactIgnoringCase(text.to_string()),
        PathMatch::PrefixIgnoringCase(text) => Kind::PrefixIgnoringCase(text.to_string()),
    };
    wire::PathMatch { kind: Some(kind) }
}

fn route(route: &Route) -> wire::Route {
    let Route {
        id,
        action,
        request_headers,
        response_headers,
        path,
        host,
        mirrors,
        fault: Fault { delay, abort },
        cors: allowed,
        timeouts: Timeouts { request, per_try },
        retry,
    } = route;
    let mirror =
        |Mirror { to, share }: &Mirror| wire::Mirror { to: Some(backend_ref(to)), share: share.millionths() };
    wire::Route {
        id: Some(route_id(id)),
        action: Some(route_action(action)),
        request_headers: edits(request_headers),
        response_headers: edits(response_headers),
        path: path.as_ref().map(path_rewrite),
        host: host.as_ref().map(host_rewrite),
        mirrors: mirrors.iter().map(mirror).collect(),
        delay: delay
            .as_ref()
            .map(|(time, share)| wire::Delay { duration: Some(duration(*time)), share: share.millionths() }),
        abort: abort.as_ref().map(|(answer, share)| wire::Abort {
            share: share.millionths(),
            answer: Some(match answer {
                Abort::Http(status) => wire::abort::Answer::Http((*status).into()),
                Abort::Grpc(status) => wire::abort::Answer::Grpc((*status).into()),
            }),
        }),
        cors: allowed.as_deref().map(cors),
        timeout: request.map(duration),
        per_try_timeout: per_try.map(duration),
        retry: retry.as_ref().map(retries),
    }
}

fn route_id(id: &RouteId) -> wire::RouteId {
    use wire::route_id::Kind;
    let RouteId { kind, namespace, name, rule, rule_name } = id;
    let kind = match kind {
        RouteKind::Default => Kind::Default,
        RouteKind::HttpRoute => Kind::HttpRoute,
        RouteKind::GrpcRoute => Kind::GrpcRoute,
        RouteKind::VirtualService => Kind::VirtualService,
        RouteKind::TcpRoute => Kind::TcpRoute,
        RouteKind::TlsRoute => Kind::TlsRoute,
    };
    wire::RouteId {
        kind: kind.into(),
        namespace: namespace.to_string(),
        name: name.to_string(),
        rule: *rule,
        rule_name: text(rule_name),
    }
}

fn route_action(action: &RouteAction) -> wire::route::Action {
    use wire::route::Action;
    match action {
        RouteAction::Forward(forward) => {
            Action::Forward(wire::Forward { backends: forward.backends().iter().map(backend).collect() })
        }
        RouteAction::Redirect(redirect) => {
            let Redirect { status, scheme, host, port, path } = &**redirect;
            Action::Redirect(wire::Redirect {
                status: (*status).into(),
                scheme: text(scheme),
                host: text(host),
                port: port.map(u32::from),
                path: path.as_ref().map(path_rewrite),
            })
        }
        RouteAction::Respond(respond) => {
            let Respond { status, body, content_type } = &**respond;
            Action::Respond(wire::Respond {
                status: (*status).into(),
                body: body.to_vec(),
                content_type: content_type.as_ref().map(|value| value.as_bytes().to_vec()),
            })
        }
    }
}

fn backend(backend: &Backend) -> wire::Backend {
    let Backend { to, weight, request_headers, response_headers } = backend;
    wire::Backend {
        to: Some(backend_ref(to)),
        weight: *weight,
        request_headers: edits(request_headers),
        response_headers: edits(response_headers),
    }
}

fn backend_ref(to: &BackendRef) -> wire::BackendRef {
    use wire::backend_ref::{Kind, ServicePort};
    let kind = match to {
        BackendRef::Service { service, port, subset } => Kind::Service(ServicePort {
            service: Some(service_key(service)),
            port: (*port).into(),
            subset: text(subset),
        }),
        BackendRef::Original => Kind::Original(()),
        BackendRef::Unresolved { reason } => Kind::Unresolved(reason.to_string()),
    };
    wire::BackendRef { kind: Some(kind) }
}

fn edits(HeaderEdits(edits): &HeaderEdits) -> Vec<wire::HeaderEdit> {
    use wire::header_edit::Kind;
    let field = |name: &http::HeaderName, value: &http::HeaderValue| wire::Field {
        name: name.as_str().to_owned(),
        value: value.as_bytes().to_vec(),
    };
    let edit = |edit: &HeaderEdit| wire::HeaderEdit {
        kind: Some(match edit {
            HeaderEdit::Remove(name) => Kind::Remove(name.as_str().to_owned()),
            HeaderEdit::Set(name, value) => Kind::Set(field(name, value)),
            HeaderEdit::Add(name, value) => Kind::Add(field(name, value)),
        }),
    };
    edits.iter().map(edit).collect()
}

fn path_rewrite(rewrite: &PathRewrite) -> wire::PathRewrite {
    use wire::path_rewrite::{Kind, Substitution};
    let kind = match rewrite {
        PathRewrite::Full(text) => Kind::Full(text.to_string()),
        PathRewrite::Segments(text) => Kind::Segments(text.to_string()),
        PathRewrite::Prefix(text) => Kind::Prefix(text.to_string()),
        PathRewrite::Regex(found) => Kind::Regex(Substitution {
            pattern: found.pattern().to_string(),
            replacement: found.replacement().to_string(),
        }),
    };
    wire::PathRewrite { kind: Some(kind) }
}

fn host_rewrite(rewrite: &HostRewrite) -> wire::HostRewrite {
    use wire::host_rewrite::Kind;
    let kind = match rewrite {
        HostRewrite::To(host) => Kind::To(host.to_string()),
        HostRewrite::Backend => Kind::Backend(()),
    };
    wire::HostRewrite { kind: Some(kind) }
}

fn cors(cors: &Cors) -> wire::Cors {
    use wire::origin::{Kind, Wildcard};
    let Cors { origins, methods, headers, expose, max_age, credentials, forward_unmatched } = cors;
    let origin = |origin: &Origin| wire::Origin {
        kind: Some(match origin {
            Origin::Text(text) => Kind::Text(pattern(text)),
            Origin::Wildcard { before, after } => {
                Kind::Wildcard(Wildcard { before: before.to_string(), after: after.to_string() })
            }
        }),
    };
    wire::Cors {
        origins: origins.iter().map(origin).collect(),
        methods: texts(methods),
        headers: texts(headers),
        expose: texts(expose),
        max_age: max_age.map(duration),
        credentials: *credentials,
        forward_unmatched: *forward_unmatched,
    }
}

fn retries(retry: &Retry) -> wire::Retry {
    let Retry { attempts, on, statuses, backoff, remote_localities, other_hosts } = retry;
    wire::Retry {
        attempts: *attempts,
        on: on.0.into(),
        statuses: statuses.iter().map(|status| (*status).into()).collect(),
        backoff: backoff.map(duration),
        remote_localities: *remote_localities,
        other_hosts: *other_hosts,
    }
}
