//! Random objects of what waypoints are told.

use std::sync::Arc;
use std::time::Duration;

use ::http::{HeaderName, HeaderValue};
use model::http::{
    Abort, Attribute, AttributeMatch, Authority, Backend, BackendRef, ConnectionPool, Cors, Distribution,
    Fault, Forward, HashKey, HashTable, HeaderEdit, HeaderEdits, HeaderMatch, HostRewrite, HttpMatch,
    HttpPort, HttpService, LedTo, LoadBalancer, LocalitySetting, Mirror, Origin, Outliers, PathMatch,
    PathPattern, PathRewrite, Pattern, Percent, Protocol, QueryMatch, Redirect, Regex, Respond, Retry,
    RetryBudget, RetryOn, Route, RouteAction, RouteId, RouteKind, RouteMatch, RouteTable, ServerName,
    ServiceTraffic, SourceMatch, StreamMatch, StreamRoute, StreamTable, Subset, Substitution, Template,
    Timeouts, TlsOrigination, TrafficPolicy, Warmup, WaypointKey,
};
use model::{Action, Clause, Policy, PolicyKey, Rule, Str, StringMatch};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::{few, filled, list, policy, policy_key, range, service_key, text};

pub fn strs(list: &'static [&'static str]) -> BoxedStrategy<Str> {
    select(list).prop_map(Str::from).boxed()
}

fn paths() -> BoxedStrategy<Str> {
    strs(&["/", "/a", "/a/b", "/ab", "/A/b", "/a/b/c", ""])
}

fn regex() -> BoxedStrategy<Regex> {
    select(vec!["", "a.*", "(a|b)+", "/a/[0-9]+", "é"]).prop_map(|r| Regex::new(r).unwrap()).boxed()
}

fn pattern() -> BoxedStrategy<Pattern> {
    prop_oneof![
        text().prop_map(Pattern::Exact),
        strs(&["GET", "POST", "1", "2", "shop.example"]).prop_map(Pattern::Exact),
        text().prop_map(Pattern::ExactIgnoringCase),
        text().prop_map(Pattern::Prefix),
        regex().prop_map(Pattern::Regex),
        Just(Pattern::Present),
    ]
    .boxed()
}

fn path_match() -> BoxedStrategy<PathMatch> {
    prop_oneof![
        paths().prop_map(PathMatch::Exact),
        paths().prop_map(|p| PathMatch::segments(&p)),
        paths().prop_map(PathMatch::Prefix),
        regex().prop_map(PathMatch::Regex),
        paths().prop_map(PathMatch::ExactIgnoringCase),
        paths().prop_map(PathMatch::PrefixIgnoringCase),
    ]
    .boxed()
}

pub fn header_key() -> BoxedStrategy<Str> {
    strs(&["x", "y", "host", ":authority", ":path", "x-version"])
}

fn labels() -> BoxedStrategy<Box<[(Str, Str)]>> {
    list((strs(&["app", "version"]), strs(&["a", "v1", "v2"])))
}

fn source_match() -> BoxedStrategy<SourceMatch> {
    (option::of(strs(&["shop", "ops"])), labels())
        .prop_map(|(namespace, labels)| SourceMatch { namespace, labels })
        .boxed()
}

pub fn route_match() -> BoxedStrategy<RouteMatch> {
    let header = (header_key(), pattern(), any::<bool>()).prop_map(|(name, value, negated)| HeaderMatch {
        name,
        value,
        negated,
    });
    let query = (strs(&["q", "p"]), pattern()).prop_map(|(name, value)| QueryMatch { name, value });
    (
        option::of(path_match()),
        option::weighted(0.3, pattern()),
        option::weighted(0.1, pattern()),
        option::weighted(0.1, pattern()),
        few(header.boxed()),
        few(query.boxed()),
        option::weighted(0.2, source_match()),
    )
        .prop_map(|(path, method, scheme, authority, headers, query, source)| RouteMatch {
            path,
            method,
            scheme,
            authority,
            headers,
            query,
            source: source.map(Box::new),
        })
        .boxed()
}

pub fn percent() -> BoxedStrategy<Percent> {
    (0..=1_000_000u32).prop_map(|p| Percent::of(p, 1_000_000)).boxed()
}

pub fn duration() -> BoxedStrategy<Duration> {
    (any::<u64>(), 0..1_000_000_000u32).prop_map(|(s, n)| Duration::new(s, n)).boxed()
}

fn header_value() -> BoxedStrategy<HeaderValue> {
    select(vec![&b""[..], b"a", b"%REQ(:path)%", b"\xfc\xff"])
        .prop_map(|v| HeaderValue::from_bytes(v).unwrap())
        .boxed()
}

fn edits() -> BoxedStrategy<HeaderEdits> {
    let name = || select(vec!["x-a", "via", "accept"]).prop_map(HeaderName::from_static);
    let edit = prop_oneof![
        name().prop_map(HeaderEdit::Remove),
        (name(), header_value()).prop_map(|(n, v)| HeaderEdit::Set(n, v)),
        (name(), header_value()).prop_map(|(n, v)| HeaderEdit::Add(n, v)),
    ];
    few(edit.boxed()).prop_map(HeaderEdits).boxed()
}

fn backend_ref() -> BoxedStrategy<BackendRef> {
    prop_oneof![
        (service_key(), any::<u16>(), option::of(text()))
            .prop_map(|(service, port, subset)| BackendRef::Service { service, port, subset }),
        Just(BackendRef::Original),
        text().prop_map(|reason| BackendRef::Unresolved { reason }),
    ]
    .boxed()
}

fn forward() -> BoxedStrategy<Forward> {
    let backend = (backend_ref(), any::<u32>(), edits(), edits()).prop_map(
        |(to, weight, request_headers, response_headers)| Backend {
            to,
            weight,
            request_headers,
            response_headers,
        },
    );
    vec(backend, 0..4).prop_map(Forward::new).boxed()
}

fn path_rewrite() -> BoxedStrategy<PathRewrite> {
    let found = select(vec![("a", "b"), ("/(.*)/x", "\\1$/\\\\"), ("", "")]);
    prop_oneof![
        text().prop_map(PathRewrite::Full),
        text().prop_map(PathRewrite::Segments),
        text().prop_map(PathRewrite::Prefix),
        found.prop_map(|(p, r)| PathRewrite::Regex(Substitution::new(p, r).unwrap())),
    ]
    .boxed()
}

fn action() -> BoxedStrategy<RouteAction> {
    let redirect = (
        any::<u16>(),
        option::of(text()),
        option::of(text()),
        option::of(any::<u16>()),
        option::of(path_rewrite()),
    );
    let respond = (any::<u16>(), vec(any::<u8>(), 0..9), option::of(header_value()));
    prop_oneof![
        3 => forward().prop_map(RouteAction::Forward),
        1 => redirect.prop_map(|(status, scheme, host, port, path)| {
            RouteAction::Redirect(Box::new(Redirect { status, scheme, host, port, path }))
        }),
        1 => respond.prop_map(|(status, body, content_type)| {
            RouteAction::Respond(Box::new(Respond { status, body: body.into(), content_type }))
        }),
    ]
    .boxed()
}

fn cors() -> BoxedStrategy<Cors> {
    let origin = prop_oneof![
        pattern().prop_map(Origin::Text),
        (text(), text()).prop_map(|(before, after)| Origin::Wildcard { before, after }),
    ];
    let flags = (any::<bool>(), any::<bool>());
    (list(origin), list(text()), list(text()), list(text()), option::of(duration()), flags)
        .prop_map(|(origins, methods, headers, expose, max_age, flags)| Cors {
            origins,
            methods,
            headers,
            expose,
            max_age,
            credentials: flags.0,
            forward_unmatched: flags.1,
        })
        .boxed()
}

fn retry() -> BoxedStrategy<Retry> {
    let flags = (any::<bool>(), any::<bool>());
    (any::<u32>(), 0..1u16 << 14, list(any::<u16>()), option::of(duration()), flags)
        .prop_map(|(attempts, on, statuses, backoff, flags)| Retry {
            attempts,
            on: RetryOn(on),
            statuses,
            backoff,
            remote_localities: flags.0,
            other_hosts: flags.1,
        })
        .boxed()
}

fn route_id() -> BoxedStrategy<RouteId> {
    use RouteKind as K;
    let kinds = vec![K::Default, K::HttpRoute, K::GrpcRoute, K::VirtualService, K::TcpRoute, K::TlsRoute];
    (select(kinds), text(), text(), any::<u32>(), option::of(text()))
        .prop_map(|(kind, namespace, name, rule, rule_name)| RouteId {
            kind,
            namespace,
            name,
            rule,
            rule_name,
        })
        .boxed()
}

fn route() -> BoxedStrategy<Route> {
    let status = prop_oneof![any::<u16>().prop_map(Abort::Http), any::<u8>().prop_map(Abort::Grpc)];
    let fault = (option::of((duration(), percent())), option::of((status, percent())));
    let mirror = (backend_ref(), percent()).prop_map(|(to, share)| Mirror { to, share });
    let host = "[a-z0-9.:-]{1,12}".prop_filter_map("none", |text| Authority::new(&text));
    let host = prop_oneof![host.prop_map(HostRewrite::To), Just(HostRewrite::Backend)];
    let changes = (edits(), edits(), option::of(path_rewrite()), option::of(host), few(mirror.boxed()));
    let timeouts = (option::of(duration()), option::of(duration()));
    (route_id(), action(), changes, fault, option::of(cors()), timeouts, option::of(retry()))
        .prop_map(|(id, action, changes, (delay, abort), cors, (request, per_try), retry)| Route {
            id,
            action,
            request_headers: changes.0,
            response_headers: changes.1,
            path: changes.2,
            host: changes.3,
            mirrors: changes.4,
            fault: Fault { delay, abort },
            cors: cors.map(Box::new),
            timeouts: Timeouts { request, per_try },
            retry,
        })
        .boxed()
}

/// Entries of which several may lead to one route.
fn routes() -> BoxedStrategy<RouteTable> {
    (vec(route(), 1..3), vec((route_match(), any::<prop::sample::Index>()), 0..6))
        .prop_map(|(routes, entries)| {
            let routes: Vec<_> = routes.into_iter().map(Arc::new).collect();
            let entry = |(when, to): (_, prop::sample::Index)| (when, to.get(&routes).clone());
            RouteTable::new(entries.into_iter().map(entry).collect())
        })
        .boxed()
}

fn streams() -> BoxedStrategy<StreamTable> {
    let name = prop_oneof![
        strs(&["a.example.com", "b"]).prop_map(ServerName::Exact),
        strs(&[".example.com"]).prop_map(ServerName::Below),
    ];
    let when = (any::<bool>(), few(name.boxed()), few(range()), option::weighted(0.2, source_match()))
        .prop_map(|(tls, names, destinations, source)| StreamMatch {
            tls,
            names,
            destinations,
            source: source.map(Box::new),
        });
    let route = (route_id(), forward()).prop_map(|(id, to)| Arc::new(StreamRoute { id, to }));
    vec((when, route), 0..3).prop_map(StreamTable::new).boxed()
}

pub fn http_service() -> BoxedStrategy<HttpService> {
    use Protocol as P;
    let protocol = select(vec![P::Detect, P::Http, P::Http2, P::Tcp, P::Tls]);
    let port =
        (any::<u16>(), protocol, routes(), streams()).prop_map(|(number, protocol, routes, streams)| {
            HttpPort { number, protocol, routes: Arc::new(routes), streams: Arc::new(streams) }
        });
    let keys = || list(policy_key());
    let led_to = (service_key(), list(keys())).prop_map(|(service, selected)| LedTo { service, selected });
    let policies = (keys(), list(keys()), keys(), keys(), list(led_to.boxed()));
    (service_key(), text(), filled(), list(port), policies, super::checks::telemetry())
        .prop_map(|(service, namespace, name, ports, policies, telemetry)| HttpService {
            service,
            waypoint: WaypointKey { namespace, name },
            ports,
            policies: policies.0,
            selected: policies.1,
            authentication: policies.2,
            rate_limits: policies.3,
            led_to: policies.4,
            telemetry: Arc::new(telemetry),
        })
        .boxed()
}

type Both<T> = (Box<[T]>, Box<[T]>);

fn both<T: std::fmt::Debug + Clone + 'static>(item: BoxedStrategy<T>) -> BoxedStrategy<Both<T>> {
    (few(item.clone()), few(item)).boxed()
}

pub fn words(list: &'static [&'static str]) -> BoxedStrategy<StringMatch> {
    (strs(list), 0..5u8)
        .prop_map(|(text, kind)| match kind {
            0 | 1 => StringMatch::Exact(text),
            2 => StringMatch::Prefix(text),
            3 => StringMatch::Suffix(text),
            _ => StringMatch::Presence,
        })
        .boxed()
}

pub fn path_pattern() -> BoxedStrategy<PathPattern> {
    let template = strs(&["/a/{*}", "/{**}/c", "/{*}/b/{**}"])
        .prop_map(|t| PathPattern::Template(Template::parse(&t).unwrap().unwrap()));
    prop_oneof![words(&["/a", "/a/b", "/"]).prop_map(PathPattern::Text), template].boxed()
}

pub fn http_match() -> BoxedStrategy<HttpMatch> {
    let path = path_pattern();
    let attribute = prop_oneof![
        header_key().prop_map(Attribute::Header),
        list(strs(&["groups", "iss"])).prop_map(Attribute::Claim),
        Just(Attribute::Sni),
    ];
    let values = words(&["1", "admin", "shop.example"]);
    let condition = (attribute, few(values.clone()), few(values))
        .prop_map(|(attribute, values, not_values)| AttributeMatch { attribute, values, not_values });
    (
        both(words(&["shop.example", "ops"])),
        both(words(&["GET", "POST"])),
        both(path),
        both(range().prop_map(model::IpMatch).boxed()),
        both(words(&["issuer/alice", "issuer/"])),
        option::weighted(0.3, condition),
    )
        .prop_map(|(hosts, methods, paths, ips, principals, attribute)| HttpMatch {
            hosts: hosts.0,
            not_hosts: hosts.1,
            methods: methods.0,
            not_methods: methods.1,
            paths: paths.0,
            not_paths: paths.1,
            remote_ips: ips.0,
            not_remote_ips: ips.1,
            request_principals: principals.0,
            not_request_principals: principals.1,
            attribute,
        })
        .boxed()
}

/// A policy of which some matches ask for requests.
pub fn http_policy() -> BoxedStrategy<Policy> {
    let action = option::weighted(0.2, filled().prop_map(Action::Custom));
    (policy(), action, vec(option::of(http_match()), 8))
        .prop_map(|(policy, custom, mut matches)| {
            let mut asked = |clause: &Clause| {
                let with = |m: &model::Match| model::Match {
                    http: matches.pop().flatten().map(Box::new),
                    ..m.clone()
                };
                Clause { matches: clause.matches.iter().map(with).collect() }
            };
            let rules = policy
                .rules
                .iter()
                .map(|rule| Rule { clauses: rule.clauses.iter().map(&mut asked).collect() })
                .collect();
            Policy { rules, action: custom.unwrap_or(policy.action), ..policy }
        })
        .boxed()
}

/// Policies with these keys.
pub fn http_policies(keys: Vec<PolicyKey>) -> BoxedStrategy<Vec<Policy>> {
    vec(http_policy(), keys.len())
        .prop_map(move |list| {
            let keyed = keys.iter().zip(list);
            keyed.map(|(key, policy)| Policy { key: key.clone(), ..policy }).collect()
        })
        .boxed()
}

fn load_balancer() -> BoxedStrategy<LoadBalancer> {
    let cookie = (text(), option::of(text()), option::of(duration()))
        .prop_map(|(name, path, ttl)| HashKey::Cookie { name, path, ttl });
    let key = prop_oneof![
        header_key().prop_map(HashKey::Header),
        cookie,
        text().prop_map(HashKey::Query),
        Just(HashKey::SourceIp),
    ];
    let table = prop_oneof![any::<u64>().prop_map(HashTable::Ring), any::<u64>().prop_map(HashTable::Maglev)];
    prop_oneof![
        Just(LoadBalancer::LeastRequest),
        Just(LoadBalancer::RoundRobin),
        Just(LoadBalancer::Random),
        Just(LoadBalancer::Passthrough),
        (key, table, option::of(any::<u32>())).prop_map(|(key, table, bound)| LoadBalancer::Hash {
            key,
            table,
            bound
        }),
    ]
    .boxed()
}

fn locality() -> BoxedStrategy<LocalitySetting> {
    let to = list((text(), any::<u32>()));
    let distribution = (text(), to).prop_map(|(from, to)| Distribution { from, to });
    (list(distribution), list((text(), text())), list(text()), any::<bool>())
        .prop_map(|(distribute, failover, failover_priority, disabled)| LocalitySetting {
            distribute,
            failover,
            failover_priority,
            disabled,
        })
        .boxed()
}

fn pool() -> BoxedStrategy<ConnectionPool> {
    let number = || option::of(any::<u32>());
    let time = || option::of(duration());
    let keepalive = option::of((duration(), duration(), any::<u32>()));
    let numbers = (number(), number(), number(), number(), number(), number());
    (numbers, (time(), time(), time(), keepalive), option::of(any::<bool>()), any::<bool>())
        .prop_map(|(numbers, times, h2_upgrade, use_client_protocol)| ConnectionPool {
            max_connections: numbers.0,
            max_pending_requests: numbers.1,
            max_requests: numbers.2,
            max_requests_per_connection: numbers.3,
            max_retries: numbers.4,
            max_concurrent_streams: numbers.5,
            connect_timeout: times.0,
            max_connection_duration: times.1,
            idle_timeout: times.2,
            keepalive: times.3,
            h2_upgrade,
            use_client_protocol,
        })
        .boxed()
}

fn outliers() -> BoxedStrategy<Outliers> {
    let counts = (any::<u32>(), any::<u32>(), any::<u32>(), any::<bool>());
    (counts, duration(), duration(), percent(), percent())
        .prop_map(|(counts, interval, base_ejection, max_ejection, min_health)| Outliers {
            consecutive_5xx: counts.0,
            consecutive_gateway_errors: counts.1,
            consecutive_local_origin_failures: counts.2,
            split_local_origin: counts.3,
            interval,
            base_ejection,
            max_ejection,
            min_health,
        })
        .boxed()
}

fn tls() -> BoxedStrategy<TlsOrigination> {
    let name = || option::of(text());
    (name(), list(text()), name(), option::of((name(), name(), name())), any::<bool>())
        .prop_map(|(sni, subject_alt_names, credential, files, insecure_skip_verify)| TlsOrigination {
            sni,
            subject_alt_names,
            credential,
            files,
            insecure_skip_verify,
        })
        .boxed()
}

fn traffic_policy() -> BoxedStrategy<TrafficPolicy> {
    let warmup = (duration(), 0.0..1e9f64, 0.0..100.0f64)
        .prop_map(|(duration, minimum_percent, aggression)| Warmup { duration, minimum_percent, aggression });
    let budget = (percent(), any::<u32>(), option::of(duration()))
        .prop_map(|(share, min_concurrency, interval)| RetryBudget { share, min_concurrency, interval });
    (
        load_balancer(),
        option::of(warmup),
        option::of(locality()),
        pool(),
        option::of(outliers()),
        option::of(budget),
        option::of(tls()),
    )
        .prop_map(|(load_balancer, warmup, locality, pool, outliers, retry_budget, tls)| TrafficPolicy {
            load_balancer,
            warmup,
            locality,
            pool,
            outliers,
            retry_budget,
            tls: tls.map(Box::new),
        })
        .boxed()
}

pub fn traffic() -> BoxedStrategy<ServiceTraffic> {
    let ports = || vec((any::<u16>(), traffic_policy()), 0..3).prop_map(Box::from);
    let subset = (text(), labels(), traffic_policy(), ports())
        .prop_map(|(name, labels, default, ports)| Subset { name, labels, default, ports });
    (service_key(), traffic_policy(), ports(), vec(subset, 0..3))
        .prop_map(|(service, default, ports, subsets)| ServiceTraffic {
            service,
            default,
            ports,
            subsets: subsets.into(),
        })
        .boxed()
}

/// Method, path, authority and fields of a request that routes and policies may meet.
type Asked = (&'static str, &'static str, &'static str, Vec<(&'static str, &'static str)>);

pub fn request() -> BoxedStrategy<Asked> {
    let field = (select(vec!["x", "y", "x-version"]), select(vec!["1", "2", "admin"]));
    (
        select(vec!["GET", "POST"]),
        select(vec!["/", "/a", "/a/b", "/A/b", "/a/b/c", "/ab", "/b/c"]),
        select(vec!["shop.example", "ops", "SHOP.example:80"]),
        vec(field, 0..3),
    )
        .boxed()
}
