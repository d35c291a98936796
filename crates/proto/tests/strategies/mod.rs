//! Random objects of the model. Texts come from small vocabularies, so that policies and connections meet.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod checks;
pub mod http;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use model::{
    Action, ApplicationTunnel, Clause, Connection, GatewayAddress, GatewayTarget, Health, HealthPolicy,
    IpFamilies, IpMatch, LoadBalancing, LoadBalancingMode, Locality, LocalityScope, Match, NetworkAddress,
    NetworkMode, Policy, PolicyKey, PortMapping, Profile, Rule, Scope, Service, ServiceAccountMatch,
    ServiceKey, ServiceMembership, ServicePort, ServiceSource, SpiffeId, Str, StringMatch, TargetPort,
    TunnelProtocol, Vip, Workload, WorkloadKind,
};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// Any text, often an empty one.
pub fn text() -> BoxedStrategy<Str> {
    prop_oneof![Just(String::new()), "[a-z0-9.*/-]{0,12}", any::<String>()].prop_map(Str::from).boxed()
}

fn filled() -> BoxedStrategy<Str> {
    prop_oneof!["[a-z0-9-]{1,12}", "\\PC{1,5}"].prop_map(Str::from).boxed()
}

/// A text that may stand before the slash of a name.
fn namespace() -> BoxedStrategy<Str> {
    prop_oneof![Just(String::new()), "[a-z0-9-]{1,8}"].prop_map(Str::from).boxed()
}

fn list<T: std::fmt::Debug + Clone + 'static>(
    item: impl Strategy<Value = T> + 'static,
) -> BoxedStrategy<Box<[T]>> {
    vec(item, 0..4).prop_map(Into::into).boxed()
}

pub fn ip() -> BoxedStrategy<IpAddr> {
    prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(|v6| IpAddr::from(v6).to_canonical()),
        select(vec!["10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1", "fd00::2"])
            .prop_map(|t| t.parse().expect("an address")),
    ]
    .boxed()
}

fn range() -> BoxedStrategy<IpNet> {
    (ip(), any::<u8>())
        .prop_map(|(ip, bits)| {
            let max = if ip.is_ipv4() { 32 } else { 128 };
            IpNet::new(ip, bits % (max + 1)).expect("a prefix length within the address")
        })
        .boxed()
}

fn service_key() -> BoxedStrategy<ServiceKey> {
    (namespace(), filled()).prop_map(|(namespace, hostname)| ServiceKey { namespace, hostname }).boxed()
}

fn policy_key() -> BoxedStrategy<PolicyKey> {
    (namespace(), filled()).prop_map(|(namespace, name)| PolicyKey { namespace, name }).boxed()
}

fn gateway() -> BoxedStrategy<GatewayAddress> {
    let target = prop_oneof![
        service_key().prop_map(GatewayTarget::Service),
        (text(), ip()).prop_map(|(network, ip)| GatewayTarget::Address(NetworkAddress::new(network, ip))),
    ];
    (target, any::<u16>())
        .prop_map(|(target, hbone_mtls_port)| GatewayAddress { target, hbone_mtls_port })
        .boxed()
}

fn locality() -> BoxedStrategy<Arc<Locality>> {
    (text(), text(), text())
        .prop_map(|(region, zone, subzone)| {
            Arc::new(Locality { region, zone, subzone, ..Locality::default() })
        })
        .boxed()
}

fn memberships() -> BoxedStrategy<Box<[ServiceMembership]>> {
    let port = (any::<u16>(), any::<u16>())
        .prop_map(|(service_port, target_port)| PortMapping { service_port, target_port });
    // Sorted by the text of the key and without repetition, which is how they are read.
    btree_map(service_key().prop_map(|k| (k.to_string(), k)), vec(port, 0..3), 0..3)
        .prop_map(|map| {
            map.into_iter()
                .map(|((_, service), ports)| ServiceMembership { service, ports: ports.into() })
                .collect()
        })
        .boxed()
}

pub fn workload() -> BoxedStrategy<Workload> {
    let who = (filled(), text(), text(), filled(), text(), "[a-z0-9.-]{1,9}");
    let place = (list(ip()), text(), text(), filled(), locality(), any::<u32>());
    let how = (
        select(vec![TunnelProtocol::None, TunnelProtocol::Hbone, TunnelProtocol::LegacyIstioMtls]),
        select(vec![NetworkMode::Standard, NetworkMode::HostNetwork]),
        select(vec![Health::Healthy, Health::Unhealthy]),
        option::of(gateway()),
        option::of(gateway()),
        option::of((any::<bool>(), option::of(1u16..))),
    );
    let shown = (
        text(),
        text(),
        text(),
        select(vec![WorkloadKind::Deployment, WorkloadKind::CronJob, WorkloadKind::Pod, WorkloadKind::Job]),
    );
    (who, place, how, shown, memberships(), list(policy_key()))
        .prop_map(|(who, place, how, shown, services, policies)| {
            let profile = Profile {
                namespace: who.2,
                service_account: who.3,
                network: who.4,
                trust_domain: who.5.parse().expect("a trust domain"),
                hostname: place.1,
                cluster: place.3,
                capacity: place.5,
                tunnel: how.0,
                health: how.2,
                network_mode: how.1,
                waypoint: how.3.map(Box::new),
                network_gateway: how.4.map(Box::new),
                application_tunnel: how
                    .5
                    .map(|(proxy_protocol, port)| ApplicationTunnel { proxy_protocol, port }),
                canonical_revision: shown.1,
                workload_kind: shown.3,
                services: services.into(),
                policies,
                ..Profile::default()
            };
            let mut workload = Workload::new(who.0, &who.1, Arc::new(profile));
            workload.set_workload_name(shown.2);
            workload.set_canonical_name(shown.0);
            let locality = Arc::new(Locality { node: place.2, ..Locality::clone(&place.4) });
            Workload { addresses: place.0.into(), locality, ..workload }
        })
        .boxed()
}

fn service_port() -> BoxedStrategy<ServicePort> {
    let target = prop_oneof![(1u16..).prop_map(TargetPort::Number), Just(TargetPort::PerEndpoint)];
    let protocol = prop_oneof![
        select(vec![
            "",
            "http",
            "http2",
            "h2c",
            "grpc",
            "grpc-web",
            "tcp",
            "tls",
            "https",
            "kubernetes.io/ws"
        ])
        .prop_map(Str::from),
        text(),
    ];
    (text(), any::<u16>(), target, protocol)
        .prop_map(|(name, port, target, app_protocol)| ServicePort { name, port, target, app_protocol })
        .boxed()
}

fn load_balancing() -> BoxedStrategy<LoadBalancing> {
    use LocalityScope as S;
    let scopes = list(select(vec![S::Region, S::Zone, S::Subzone, S::Node, S::Cluster, S::Network]));
    let mode = select(vec![LoadBalancingMode::Any, LoadBalancingMode::Strict, LoadBalancingMode::Failover]);
    let health = select(vec![HealthPolicy::OnlyHealthy, HealthPolicy::AllowAll]);
    (scopes, mode, health).prop_map(|(scopes, mode, health)| LoadBalancing { scopes, mode, health }).boxed()
}

pub fn service() -> BoxedStrategy<Service> {
    use ServiceSource as From;
    let vip = (text(), range()).prop_map(|(network, range)| Vip { network, range });
    let families = vec![IpFamilies::Automatic, IpFamilies::V4Only, IpFamilies::V6Only, IpFamilies::Dual];
    let affinity =
        option::of((0..=i64::MAX as u64, 0..1_000_000_000u32).prop_map(|(s, n)| Duration::new(s, n)));
    let sources = vec![From::Kubernetes, From::Static, From::Dns, From::Passthrough];
    let names = (text(), namespace(), filled(), any::<bool>());
    let parts = (list(vip), list(service_port()), list(text()), option::of(gateway()));
    (names, parts, load_balancing(), select(families), affinity, select(sources))
        .prop_map(|(names, parts, load_balancing, ip_families, session_affinity, source)| Service {
            name: names.0,
            namespace: names.1,
            hostname: names.2,
            canonical: names.3,
            vips: parts.0,
            ports: parts.1,
            subject_alt_names: parts.2,
            waypoint: parts.3,
            load_balancing,
            ip_families,
            session_affinity,
            source,
        })
        .boxed()
}

const TRUST_DOMAINS: [&str; 4] = ["td", "td.example", "old", "td-old"];
const NAMESPACES: [&str; 3] = ["shop", "shop-2", "ops"];
const ACCOUNTS: [&str; 3] = ["cart", "cart-2", "default"];

pub fn identity() -> BoxedStrategy<SpiffeId> {
    (select(&TRUST_DOMAINS[..]), select(&NAMESPACES[..]), select(&ACCOUNTS[..]))
        .prop_map(|(td, ns, sa)| {
            SpiffeId::new(td.parse().expect("a trust domain"), ns.into(), sa.into()).expect("an identity")
        })
        .boxed()
}

pub fn connection() -> BoxedStrategy<Connection> {
    (option::weighted(0.8, identity()), ip(), ip(), select(vec![80u16, 443, 8080]))
        .prop_map(|(source, from, to, port)| Connection::new(source, from, SocketAddr::new(to, port)))
        .boxed()
}

/// A pattern cut from one of `texts`; now and then one that can't be in any of them.
fn pattern(texts: Vec<String>) -> BoxedStrategy<StringMatch> {
    (select(texts), any::<prop::sample::Index>(), 0..12u8)
        .prop_map(|(text, cut, kind)| {
            let at = cut.index(text.len() + 1);
            match kind {
                0..=3 => StringMatch::Exact(text.into()),
                4..=6 => StringMatch::Prefix(text[..at].into()),
                7..=8 => StringMatch::Suffix(text[at..].into()),
                9 => StringMatch::Presence,
                10 => StringMatch::Exact("".into()),
                _ => StringMatch::Prefix(format!("{text}/").into()),
            }
        })
        .boxed()
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn principal_texts() -> Vec<String> {
    let mut all = Vec::new();
    for td in TRUST_DOMAINS {
        for ns in NAMESPACES {
            all.extend(ACCOUNTS.iter().map(|sa| format!("{td}/ns/{ns}/sa/{sa}")));
        }
    }
    all
}

/// Mostly empty, so that a match has few fields and sometimes none.
fn few<T: std::fmt::Debug + Clone + 'static>(item: BoxedStrategy<T>) -> BoxedStrategy<Box<[T]>> {
    prop_oneof![4 => Just(Vec::new()), 1 => vec(item, 1..3)].prop_map(Into::into).boxed()
}

/// A field's values, and those of its negation.
type Both<T> = (Box<[T]>, Box<[T]>);

/// Twice the field: as it is, and negated.
fn both<T: std::fmt::Debug + Clone + 'static>(item: BoxedStrategy<T>) -> BoxedStrategy<Both<T>> {
    (few(item.clone()), few(item)).boxed()
}

fn policy_match() -> BoxedStrategy<Match> {
    let account = (select(&NAMESPACES[..]), select(&ACCOUNTS[..]))
        .prop_map(|(ns, sa)| ServiceAccountMatch { namespace: ns.into(), name: sa.into() })
        .boxed();
    let ranges = range().prop_map(IpMatch).boxed();
    (
        both(pattern(texts(&NAMESPACES))),
        both(pattern(principal_texts())),
        both(account),
        both(pattern(texts(&TRUST_DOMAINS))),
        both(ranges.clone()),
        both(ranges),
        both(select(vec![80u16, 443, 8080, 9090]).boxed()),
    )
        .prop_map(|(namespaces, principals, accounts, domains, sources, destinations, ports)| Match {
            namespaces: namespaces.0,
            not_namespaces: namespaces.1,
            principals: principals.0,
            not_principals: principals.1,
            service_accounts: accounts.0,
            not_service_accounts: accounts.1,
            trust_domains: domains.0,
            not_trust_domains: domains.1,
            source_ips: sources.0,
            not_source_ips: sources.1,
            destination_ips: destinations.0,
            not_destination_ips: destinations.1,
            destination_ports: ports.0,
            not_destination_ports: ports.1,
            http: None,
        })
        .boxed()
}

pub fn policy() -> BoxedStrategy<Policy> {
    let clause = vec(policy_match(), 0..3).prop_map(|matches| Clause { matches: matches.into() });
    let rule = vec(clause, 0..3).prop_map(|clauses| Rule { clauses: clauses.into() });
    (
        policy_key(),
        select(vec![Scope::Global, Scope::Namespace, Scope::WorkloadSelector]),
        select(vec![Action::Allow, Action::Deny]),
        vec(rule, 0..3),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(key, scope, action, rules, dry_run)| Policy {
            key,
            scope,
            action,
            rules: rules.into(),
            dry_run,
        })
        .boxed()
}

/// Policies with keys of their own.
pub fn policies() -> BoxedStrategy<Vec<Policy>> {
    vec(policy(), 1..4)
        .prop_map(|list| {
            let by_key: BTreeMap<PolicyKey, Policy> = list.into_iter().map(|p| (p.key.clone(), p)).collect();
            by_key.into_values().collect()
        })
        .boxed()
}
