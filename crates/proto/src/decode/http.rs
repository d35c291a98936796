//! Reading what a waypoint does for a service.
//!
//! All of it decides over requests, so nothing is left out and nothing guessed: see [`super::strict`].

use std::sync::Arc;
use std::time::Duration;

use ::http::{HeaderName, HeaderValue};
use model::http::{
    Abort, Authority, Backend, BackendRef, Cors, Fault as Faults, Forward, HeaderEdit, HeaderEdits,
    HeaderMatch, HostRewrite, HttpPort, HttpService, LedTo, Mirror, Origin, PathMatch, PathRewrite, Pattern,
    Percent, Protocol, QueryMatch, Redirect, Regex, Respond, Retry, RetryOn, Route, RouteAction, RouteId,
    RouteKind, RouteMatch, RouteTable, ServerName, SourceMatch, StreamMatch, StreamRoute, StreamTable,
    Substitution, Timeouts, WaypointKey,
};
use model::{PolicyKey, ServiceKey, Str};

use super::strict::{needed, strict};
use super::{DecodeError, Decoder, Fault, Problem, cut, each, port, range};
use crate::wire::waypoint as wire;

/// What `RetryOn` has bits for.
const RETRY_ON: u16 = (1 << 14) - 1;

impl Decoder {
    /// Reads what a waypoint does for a service.
    ///
    /// # Errors
    /// These are no bytes of such a message, a field has no meaning in the model, or there is one that this version does
    /// not know. What was in force of it must then stay.
    pub fn http_service(&mut self, bytes: &[u8]) -> Result<HttpService, DecodeError> {
        let message: wire::HttpService =
            strict(bytes).map_err(|problem| Fault::new("message", problem).of("http service", ""))?;
        self.read_http_service(&message).map_err(|fault| {
            let key = message.service.unwrap_or_default();
            fault.of("http service", format_args!("{}/{}", cut(&key.namespace), key.hostname))
        })
    }

    fn read_http_service(&mut self, s: &wire::HttpService) -> Result<HttpService, Fault> {
        let service = self.service_key(s.service.as_ref(), "service")?;
        let (namespace, name) = self.name(s.waypoint.as_ref(), "waypoint")?;
        Ok(HttpService {
            service,
            waypoint: WaypointKey { namespace, name },
            ports: each(&s.ports, "ports", |p| self.http_port(p))?,
            policies: self.policy_keys(&s.policies, "policies")?,
            selected: self.sets(&s.selected)?,
            led_to: each(&s.led_to, "led_to", |led| {
                let service = self.service_key(led.service.as_ref(), "service")?;
                Ok(LedTo { service, selected: self.sets(&led.selected)? })
            })?,
            authentication: self.policy_keys(&s.authentication, "authentication")?,
            rate_limits: self.policy_keys(&s.rate_limits, "rate_limits")?,
            telemetry: {
                let telemetry = needed(s.telemetry.as_ref(), "telemetry")?;
                self.telemetry(telemetry).map_err(|f| f.within("telemetry"))?
            },
        })
    }

    pub(super) fn service_key(
        &mut self,
        key: Option<&wire::ServiceKey>,
        field: &str,
    ) -> Result<ServiceKey, Fault> {
        let key = needed(key, field)?;
        if key.hostname.is_empty() {
            return Err(Fault::new("hostname", Problem::Missing).within(field));
        }
        Ok(ServiceKey { namespace: self.text(&key.namespace), hostname: self.text(&key.hostname) })
    }

    pub(super) fn name(&mut self, name: Option<&wire::Name>, field: &str) -> Result<(Str, Str), Fault> {
        let name = needed(name, field)?;
        if name.name.is_empty() {
            return Err(Fault::new("name", Problem::Missing).within(field));
        }
        Ok((self.text(&name.namespace), self.text(&name.name)))
    }

    fn sets(&mut self, all: &[wire::Policies]) -> Result<Box<[Box<[PolicyKey]>]>, Fault> {
        each(all, "selected", |set| self.policy_keys(&set.policies, "policies"))
    }

    fn policy_keys(&mut self, keys: &[wire::Name], field: &str) -> Result<Box<[PolicyKey]>, Fault> {
        each(keys, field, |key| {
            let (namespace, name) = self.name(Some(key), "key")?;
            Ok(PolicyKey { namespace, name })
        })
    }

    pub(super) fn optional(&mut self, text: Option<&String>) -> Option<Str> {
        text.map(|text| self.text(text))
    }

    pub(super) fn labels(&mut self, labels: &[wire::Label]) -> Box<[(Str, Str)]> {
        labels.iter().map(|label| (self.text(&label.key), self.text(&label.value))).collect()
    }

    fn http_port(&mut self, p: &wire::Port) -> Result<HttpPort, Fault> {
        use wire::port::Protocol as Wire;
        let protocol = match Wire::try_from(p.protocol) {
            Ok(Wire::Detect) => Protocol::Detect,
            Ok(Wire::Http) => Protocol::Http,
            Ok(Wire::Http2) => Protocol::Http2,
            Ok(Wire::Tcp) => Protocol::Tcp,
            Ok(Wire::Tls) => Protocol::Tls,
            Err(_) => return Err(Fault::new("protocol", Problem::Enum(p.protocol))),
        };
        Ok(HttpPort {
            number: port(p.number, "number")?,
            protocol,
            routes: Arc::new(self.route_table(p)?),
            streams: Arc::new(self.stream_table(p)?),
        })
    }

    fn route_table(&mut self, p: &wire::Port) -> Result<RouteTable, Fault> {
        let routes = each(&p.routes, "routes", |route| self.route(route).map(Arc::new))?;
        let entries = each(&p.entries, "entries", |entry| {
            let when = needed(entry.when.as_ref(), "when")?;
            let when = self.route_match(when).map_err(|f| f.within("when"))?;
            Ok((when, pointed(&routes, entry.route)?))
        })?;
        Ok(RouteTable::new(entries.into_vec()))
    }

    fn stream_table(&mut self, p: &wire::Port) -> Result<StreamTable, Fault> {
        let routes = each(&p.stream_routes, "stream_routes", |route| {
            let to = Forward::new(each(&route.backends, "backends", |b| self.backend(b))?.into_vec());
            let id = self.route_id(needed(route.id.as_ref(), "id")?)?;
            Ok(Arc::new(StreamRoute { id, to }))
        })?;
        let entries = each(&p.stream_entries, "stream_entries", |entry| {
            let when = StreamMatch {
                tls: entry.tls,
                names: each(&entry.names, "names", |name| self.server_name(name))?,
                destinations: each(&entry.destinations, "destinations", |a| {
                    range(&a.address, Some(a.length))
                })?,
                source: entry.source.as_ref().map(|s| Box::new(self.source_match(s))),
            };
            Ok((when, pointed(&routes, entry.route)?))
        })?;
        Ok(StreamTable::new(entries.into_vec()))
    }

    fn server_name(&mut self, name: &wire::ServerName) -> Result<ServerName, Fault> {
        use wire::server_name::Kind;
        match needed(name.kind.as_ref(), "kind")? {
            Kind::Exact(name) => Ok(ServerName::Exact(self.text(name))),
            Kind::Below(domain) => Ok(ServerName::Below(self.text(domain))),
        }
    }

    fn route_match(&mut self, m: &wire::RouteMatch) -> Result<RouteMatch, Fault> {
        let mut pattern = |pattern: Option<&wire::Pattern>, field: &str| {
            pattern.map(|p| self.pattern(p)).transpose().map_err(|f| f.within(field))
        };
        let method = pattern(m.method.as_ref(), "method")?;
        let scheme = pattern(m.scheme.as_ref(), "scheme")?;
        let authority = pattern(m.authority.as_ref(), "authority")?;
        Ok(RouteMatch {
            path: m.path.as_ref().map(|p| self.path_match(p)).transpose().map_err(|f| f.within("path"))?,
            method,
            scheme,
            authority,
            headers: each(&m.headers, "headers", |h| {
                Ok(HeaderMatch {
                    name: self.header_key(&h.name)?,
                    value: self.needed_pattern(h.value.as_ref())?,
                    negated: h.negated,
                })
            })?,
            query: each(&m.query, "query", |q| {
                Ok(QueryMatch { name: self.text(&q.name), value: self.needed_pattern(q.value.as_ref())? })
            })?,
            source: m.source.as_ref().map(|s| Box::new(self.source_match(s))),
        })
    }

    /// The name of a field that is looked for: in capitals it would never be found, and its negation always hold.
    pub(super) fn header_key(&mut self, name: &str) -> Result<Str, Fault> {
        if name.is_empty() || name.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(Fault::new("name", Problem::HeaderName(cut(name))));
        }
        Ok(self.text(name))
    }

    fn needed_pattern(&mut self, pattern: Option<&wire::Pattern>) -> Result<Pattern, Fault> {
        self.pattern(needed(pattern, "value")?).map_err(|f| f.within("value"))
    }

    fn source_match(&mut self, s: &wire::SourceMatch) -> SourceMatch {
        SourceMatch { namespace: self.optional(s.namespace.as_ref()), labels: self.labels(&s.labels) }
    }

    fn pattern(&mut self, pattern: &wire::Pattern) -> Result<Pattern, Fault> {
        use wire::pattern::Kind;
        Ok(match needed(pattern.kind.as_ref(), "kind")? {
            Kind::Exact(text) => Pattern::Exact(self.text(text)),
            Kind::ExactIgnoringCase(text) => Pattern::ExactIgnoringCase(self.text(text)),
            Kind::Prefix(text) => Pattern::Prefix(self.text(text)),
            Kind::Regex(source) => Pattern::Regex(regex(source)?),
            Kind::Present(()) => Pattern::Present,
        })
    }

    fn path_match(&mut self, path: &wire::PathMatch) -> Result<PathMatch, Fault> {
        use wire::path_match::Kind;
        Ok(match needed(path.kind.as_ref(), "kind")? {
            Kind::Exact(text) => PathMatch::Exact(self.text(text)),
            // `/a/` would not hold for `/a`.
            Kind::Segments(text) if text.ends_with('/') => {
                return Err(Fault::new("segments", Problem::TrailingSlash(cut(text))));
            }
            Kind::Segments(text) => PathMatch::Segments(self.text(text)),
            Kind::Prefix(text) => PathMatch::Prefix(self.text(text)),
            Kind::Regex(source) => PathMatch::Regex(regex(source)?),
            Kind::ExactIgnoringCase(text) => PathMatch::ExactIgnoringCase(self.text(text)),
            Kind::PrefixIgnoringCase(text) => PathMatch::PrefixIgnoringCase(self.text(text)),
        })
    }

    fn route(&mut self, r: &wire::Route) -> Result<Route, Fault> {
        Ok(Route {
            id: self.route_id(needed(r.id.as_ref(), "id")?)?,
            action: self.route_action(needed(r.action.as_ref(), "action")?)?,
            request_headers: edits(&r.request_headers, "request_headers")?,
            response_headers: edits(&r.response_headers, "response_headers")?,
            path: self.path_rewrite(r.path.as_ref())?,
            host: r.host.as_ref().map(|h| self.host_rewrite(h)).transpose()?,
            mirrors: each(&r.mirrors, "mirrors", |mirror| {
                let to = self.backend_ref(needed(mirror.to.as_ref(), "to")?)?;
                Ok(Mirror { to, share: share(mirror.share, "share")? })
            })?,
            fault: Faults {
                delay: r.delay.as_ref().map(delay).transpose().map_err(|f| f.within("delay"))?,
                abort: r.abort.as_ref().map(abort).transpose().map_err(|f| f.within("abort"))?,
            },
            cors: r
                .cors
                .as_ref()
                .map(|c| self.cors(c).map(Box::new))
                .transpose()
                .map_err(|f| f.within("cors"))?,
            timeouts: Timeouts {
                request: duration(r.timeout.as_ref(), "timeout")?,
                per_try: duration(r.per_try_timeout.as_ref(), "per_try_timeout")?,
            },
            retry: r.retry.as_ref().map(retry).transpose().map_err(|f| f.within("retry"))?,
        })
    }

    fn route_id(&mut self, id: &wire::RouteId) -> Result<RouteId, Fault> {
        use wire::route_id::Kind;
        let kind = match Kind::try_from(id.kind) {
            Ok(Kind::Default) => RouteKind::Default,
            Ok(Kind::HttpRoute) => RouteKind::HttpRoute,
            Ok(Kind::GrpcRoute) => RouteKind::GrpcRoute,
            Ok(Kind::VirtualService) => RouteKind::VirtualService,
            Ok(Kind::TcpRoute) => RouteKind::TcpRoute,
            Ok(Kind::TlsRoute) => RouteKind::TlsRoute,
            Err(_) => return Err(Fault::new("id.kind", Problem::Enum(id.kind))),
        };
        Ok(RouteId {
            kind,
            namespace: self.text(&id.namespace),
            name: self.text(&id.name),
            rule: id.rule,
            rule_name: self.optional(id.rule_name.as_ref()),
        })
    }

    fn route_action(&mut self, action: &wire::route::Action) -> Result<RouteAction, Fault> {
        use wire::route::Action;
        match action {
            Action::Forward(forward) => {
                let backends = each(&forward.backends, "backends", |b| self.backend(b));
                let backends = backends.map_err(|f| f.within("forward"))?;
                Ok(RouteAction::Forward(Forward::new(backends.into_vec())))
            }
            Action::Redirect(r) => {
                let number = r.port.map(|p| port(p, "port")).transpose();
                Ok(RouteAction::Redirect(Box::new(Redirect {
                    status: port(r.status, "status").map_err(|f| f.within("redirect"))?,
                    scheme: self.optional(r.scheme.as_ref()),
                    host: self.optional(r.host.as_ref()),
                    port: number.map_err(|f| f.within("redirect"))?,
                    path: self.path_rewrite(r.path.as_ref())?,
                })))
            }
            Action::Respond(r) => {
                let content_type = r.content_type.as_deref().map(|v| value(v, "content_type"));
                Ok(RouteAction::Respond(Box::new(Respond {
                    status: port(r.status, "status").map_err(|f| f.within("respond"))?,
                    body: r.body.as_slice().into(),
                    content_type: content_type.transpose().map_err(|f| f.within("respond"))?,
                })))
            }
        }
    }

    fn backend(&mut self, b: &wire::Backend) -> Result<Backend, Fault> {
        Ok(Backend {
            to: self.backend_ref(needed(b.to.as_ref(), "to")?)?,
            weight: b.weight,
            request_headers: edits(&b.request_headers, "request_headers")?,
            response_headers: edits(&b.response_headers, "response_headers")?,
        })
    }

    fn backend_ref(&mut self, to: &wire::BackendRef) -> Result<BackendRef, Fault> {
        use wire::backend_ref::Kind;
        Ok(match needed(to.kind.as_ref(), "to.kind")? {
            Kind::Service(to) => BackendRef::Service {
                service: self.service_key(to.service.as_ref(), "to.service")?,
                port: port(to.port, "to.port")?,
                subset: self.optional(to.subset.as_ref()),
            },
            Kind::Original(()) => BackendRef::Original,
            Kind::Unresolved(reason) => BackendRef::Unresolved { reason: self.text(reason) },
        })
    }

    fn path_rewrite(&mut self, rewrite: Option<&wire::PathRewrite>) -> Result<Option<PathRewrite>, Fault> {
        use wire::path_rewrite::Kind;
        let Some(rewrite) = rewrite else { return Ok(None) };
        Ok(Some(match needed(rewrite.kind.as_ref(), "path.kind")? {
            Kind::Full(text) => PathRewrite::Full(self.text(text)),
            Kind::Segments(text) => PathRewrite::Segments(self.text(text)),
            Kind::Prefix(text) => PathRewrite::Prefix(self.text(text)),
            Kind::Regex(found) => PathRewrite::Regex(
                Substitution::new(&found.pattern, &found.replacement)
                    .map_err(|invalid| Fault::new("path.regex", invalid))?,
            ),
        }))
    }

    fn host_rewrite(&mut self, rewrite: &wire::HostRewrite) -> Result<HostRewrite, Fault> {
        use wire::host_rewrite::Kind;
        Ok(match needed(rewrite.kind.as_ref(), "host.kind")? {
            Kind::To(host) => HostRewrite::To(
                Authority::new(host).ok_or_else(|| Fault::new("host.to", Problem::Authority(cut(host))))?,
            ),
            Kind::Backend(()) => HostRewrite::Backend,
        })
    }

    fn cors(&mut self, c: &wire::Cors) -> Result<Cors, Fault> {
        use wire::origin::Kind;
        Ok(Cors {
            origins: each(&c.origins, "origins", |origin| {
                Ok(match needed(origin.kind.as_ref(), "kind")? {
                    Kind::Text(text) => Origin::Text(self.pattern(text)?),
                    Kind::Wildcard(w) => {
                        Origin::Wildcard { before: self.text(&w.before), after: self.text(&w.after) }
                    }
                })
            })?,
            methods: self.texts(&c.methods),
            headers: self.texts(&c.headers),
            expose: self.texts(&c.expose),
            max_age: duration(c.max_age.as_ref(), "max_age")?,
            credentials: c.credentials,
            forward_unmatched: c.forward_unmatched,
        })
    }
}

/// What an entry points to.
fn pointed<T>(list: &[Arc<T>], place: u32) -> Result<Arc<T>, Fault> {
    let found = usize::try_from(place).ok().and_then(|place| list.get(place));
    found.cloned().ok_or_else(|| Fault::new("route", Problem::NoRoute(place)))
}

fn regex(source: &str) -> Result<Regex, Fault> {
    Regex::new(source).map_err(|invalid| Fault::new("regex", invalid))
}

pub(super) fn duration(time: Option<&wire::Duration>, field: &str) -> Result<Option<Duration>, Fault> {
    time.map(|time| needed_duration(Some(time), field)).transpose()
}

pub(super) fn needed_duration(time: Option<&wire::Duration>, field: &str) -> Result<Duration, Fault> {
    let wire::Duration { seconds, nanos } = *needed(time, field)?;
    if nanos >= 1_000_000_000 {
        return Err(Fault::new(field, Problem::Duration));
    }
    Ok(Duration::new(seconds, nanos))
}

/// A share in millionths.
pub(super) fn share(millionths: u32, field: &str) -> Result<Percent, Fault> {
    let all = Percent::ALL.millionths();
    if millionths > all {
        return Err(Fault::new(field, Problem::Share(millionths)));
    }
    Ok(Percent::of(millionths, all))
}

fn delay(delay: &wire::Delay) -> Result<(Duration, Percent), Fault> {
    Ok((needed_duration(delay.duration.as_ref(), "duration")?, share(delay.share, "share")?))
}

fn abort(abort: &wire::Abort) -> Result<(Abort, Percent), Fault> {
    use wire::abort::Answer;
    let answer = match needed(abort.answer.as_ref(), "answer")? {
        Answer::Http(status) => Abort::Http(port(*status, "http")?),
        Answer::Grpc(status) => {
            Abort::Grpc(u8::try_from(*status).map_err(|_| Fault::new("grpc", Problem::Number(*status)))?)
        }
    };
    Ok((answer, share(abort.share, "share")?))
}

fn retry(r: &wire::Retry) -> Result<Retry, Fault> {
    let on = u16::try_from(r.on).ok().filter(|on| on & !RETRY_ON == 0);
    Ok(Retry {
        attempts: r.attempts,
        // What is not known could be all that was asked for.
        on: RetryOn(on.ok_or_else(|| Fault::new("on", Problem::Number(r.on)))?),
        statuses: each(&r.statuses, "statuses", |status| port(*status, "value"))?,
        backoff: duration(r.backoff.as_ref(), "backoff")?,
        remote_localities: r.remote_localities,
        other_hosts: r.other_hosts,
    })
}

fn edits(edits: &[wire::HeaderEdit], field: &str) -> Result<HeaderEdits, Fault> {
    use wire::header_edit::Kind;
    let pair = |f: &wire::Field| Ok((header(&f.name)?, value(&f.value, "value")?));
    let edits = each(edits, field, |edit| {
        Ok(match needed(edit.kind.as_ref(), "kind")? {
            Kind::Remove(name) => HeaderEdit::Remove(header(name)?),
            Kind::Set(field) => pair(field).map(|(name, value)| HeaderEdit::Set(name, value))?,
            Kind::Add(field) => pair(field).map(|(name, value)| HeaderEdit::Add(name, value))?,
        })
    })?;
    Ok(HeaderEdits(edits))
}

fn header(name: &str) -> Result<HeaderName, Fault> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| Fault::new("name", Problem::HeaderName(cut(name))))
}

fn value(bytes: &[u8], field: &str) -> Result<HeaderValue, Fault> {
    HeaderValue::from_bytes(bytes).map_err(|_| Fault::new(field, Problem::HeaderValue))
}
