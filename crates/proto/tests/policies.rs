//! Policies without our extensions: whatever was written decides as the original does, here and in a proxy of
//! Istio's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod strategies;

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use model::{
    Action, Change, Clause, Connection, Match, Mesh, Policy, PolicyKey, Rule, Scope, StringMatch, Workload,
};
use proptest::prelude::*;
use prost::Message;
use proto::wire::security as wire;
use proto::{Decoder, Extensions, Reason, encode_policy};

/// A workload that all of `policies` hold for.
fn target(policies: &[Policy]) -> Workload {
    let elided = wire_workload();
    let mut workload = Decoder::default().workload(&elided).unwrap();
    workload.policies = policies.iter().map(|p| p.key.clone()).collect();
    workload
}

fn wire_workload() -> proto::wire::workload::Workload {
    proto::wire::workload::Workload { uid: "w".into(), namespace: "shop".into(), ..Default::default() }
}

fn authorize(policies: &[Policy], connection: &Connection) -> bool {
    // All as selector policies of the one workload, so that every one of them counts.
    let selecting = policies.iter().map(|p| Policy { scope: Scope::WorkloadSelector, ..p.clone() });
    let mesh = Mesh::default().apply(selecting.map(|p| Change::SetPolicy(Arc::new(p))));
    mesh.authorize(&target(policies), connection).outcome.is_ok()
}

/// What a proxy of Istio's makes of the messages, written from its documented rules and as naively as it goes.
mod istio {
    use super::*;

    pub fn allows(policies: &[wire::Authorization], c: &Connection) -> bool {
        let in_force = |action: wire::Action| {
            policies.iter().filter(move |p| p.action == i32::from(action) && !p.dry_run)
        };
        if in_force(wire::Action::Deny).any(|p| holds(p, c)) {
            return false;
        }
        in_force(wire::Action::Allow).next().is_none() || in_force(wire::Action::Allow).any(|p| holds(p, c))
    }

    fn holds(policy: &wire::Authorization, c: &Connection) -> bool {
        policy.groups.iter().any(|g| {
            g.rules.iter().all(|r| r.matches.is_empty() || r.matches.iter().any(|m| match_holds(m, c)))
        })
    }

    fn match_holds(m: &wire::Match, c: &Connection) -> bool {
        // Fields that it does not know are not there for it.
        let known = wire::Match {
            trust_domains: Vec::new(),
            not_trust_domains: Vec::new(),
            extensions: Vec::new(),
            ..m.clone()
        };
        if known == wire::Match::default() {
            return false;
        }
        // A source without identity has an empty namespace, and no principal.
        let namespace = c.source().map_or("", |s| s.namespace());
        let principal = c.source().map(model::SpiffeId::principal);
        let account = |a: &wire::ServiceAccountMatch| {
            c.source().is_some_and(|s| {
                **s.namespace() == *a.namespace && **s.service_account() == *a.service_account
            })
        };
        let port = |p: &u32| *p == u32::from(c.destination().port());
        field(&m.namespaces, &m.not_namespaces, |p| text(p, namespace))
            && field(&m.principals, &m.not_principals, |p| principal.as_ref().is_some_and(|t| text(p, t)))
            && field(&m.service_accounts, &m.not_service_accounts, account)
            && field(&m.source_ips, &m.not_source_ips, |r| inside(r, c.source_ip()))
            && field(&m.destination_ips, &m.not_destination_ips, |r| inside(r, c.destination().ip()))
            && field(&m.destination_ports, &m.not_destination_ports, port)
    }

    fn field<T>(positive: &[T], negative: &[T], hit: impl Fn(&T) -> bool) -> bool {
        (positive.is_empty() || positive.iter().any(&hit)) && !negative.iter().any(&hit)
    }

    fn text(pattern: &wire::StringMatch, text: &str) -> bool {
        use wire::string_match::MatchType;
        match pattern.match_type.as_ref().unwrap() {
            MatchType::Exact(t) => text == t,
            MatchType::Prefix(t) => text.starts_with(t),
            MatchType::Suffix(t) => text.ends_with(t),
            MatchType::Presence(()) => !text.is_empty(),
        }
    }

    fn inside(range: &wire::Address, ip: IpAddr) -> bool {
        let start: IpAddr = match range.address.len() {
            4 => <[u8; 4]>::try_from(&*range.address).unwrap().into(),
            _ => <[u8; 16]>::try_from(&*range.address).unwrap().into(),
        };
        IpNet::new(start, u8::try_from(range.length).unwrap()).unwrap().contains(&ip)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn what_istio_is_sent_decides_as_the_original(
        policies in strategies::policies(),
        connections in prop::collection::vec(strategies::connection(), 8),
    ) {
        // Those that can be written, as a control plane would send them.
        let (originals, messages): (Vec<_>, Vec<_>) = policies
            .iter()
            .filter_map(|p| Some((p.clone(), encode_policy(p, Extensions::None).ok()?)))
            .unzip();
        let read: Vec<_> = messages
            .iter()
            .map(|m| wire::Authorization::decode(m.encode_to_vec().as_slice()).unwrap())
            .map(|m| Decoder::default().policy(&m).unwrap())
            .collect();
        for c in &connections {
            let wanted = authorize(&originals, c);
            prop_assert_eq!(authorize(&read, c), wanted, "read back, {:?}", c);
            prop_assert_eq!(istio::allows(&messages, c), wanted, "Istio's reading, {:?}", c);
        }
    }

    /// Only what has no equivalent is refused.
    #[test]
    fn what_is_refused_names_a_trust_domain_by_its_end(policy in strategies::policy()) {
        let Err(error) = encode_policy(&policy, Extensions::None) else { return Ok(()) };
        for obstacle in &error.obstacles {
            let is_suffix = matches!(&obstacle.reason, Reason::TrustDomainSuffix(s) if s.len() > 1);
            prop_assert!(is_suffix, "{error}");
            prop_assert!(obstacle.field.ends_with("trust_domains"), "{error}");
        }
    }
}

fn policy(matches: impl Into<Box<[Match]>>) -> Policy {
    let clause = Clause { matches: matches.into() };
    Policy {
        key: PolicyKey { namespace: "shop".into(), name: "p".into() },
        scope: Scope::Namespace,
        action: Action::Allow,
        rules: Box::new([Rule { clauses: Box::new([clause]) }]),
        dry_run: false,
    }
}

fn patterns(list: &[&str]) -> Box<[StringMatch]> {
    list.iter().map(|p| StringMatch::parse(p)).collect()
}

#[test]
fn a_trust_domain_becomes_a_prefix_of_principals() {
    let m = Match { trust_domains: patterns(&["td", "old*", "*"]), ..Match::default() };
    let message = encode_policy(&policy([m]), Extensions::None).unwrap();
    let read = Decoder::default().policy(&message).unwrap();
    let wanted = Match { principals: patterns(&["td/*", "old*", "*"]), ..Match::default() };
    assert_eq!(read, policy([wanted]));
}

#[test]
fn a_trust_domain_beside_principals_becomes_a_clause_and_splits_the_rule() {
    let ops = Match { namespaces: patterns(&["ops"]), ..Match::default() };
    let cart =
        Match { principals: patterns(&["*/sa/cart"]), trust_domains: patterns(&["td"]), ..Match::default() };
    let message = encode_policy(&policy([ops.clone(), cart]), Extensions::None).unwrap();
    let read = Decoder::default().policy(&message).unwrap();
    let clause = |m: Match| Clause { matches: Box::new([m]) };
    let principals = |p: &str| Match { principals: patterns(&[p]), ..Match::default() };
    let split = Rule { clauses: Box::new([clause(principals("*/sa/cart")), clause(principals("td/*"))]) };
    let plain = Rule { clauses: Box::new([clause(ops)]) };
    assert_eq!(*read.rules, [split, plain]);
}

#[test]
fn a_match_that_nothing_satisfies_stays_one() {
    // Without its only pattern, the match would hold of everything that its other field lets through.
    let m = Match {
        trust_domains: patterns(&["no/domain"]),
        destination_ports: Box::new([80]),
        ..Match::default()
    };
    let message = encode_policy(&policy([m]), Extensions::None).unwrap();
    assert_eq!(message.groups[0].rules[0].matches, [wire::Match::default()]);
}

#[test]
fn a_trust_domain_by_its_end_is_refused_by_name() {
    let m = Match { not_trust_domains: patterns(&["*.example"]), ..Match::default() };
    let error = encode_policy(&policy([m]), Extensions::None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "policy shop/p can't be sent: rules[0].clauses[0].matches[0].not_trust_domains: \
         the trust domain pattern \"*.example\" has no equivalent among principals"
    );
}

#[test]
fn rules_do_not_multiply_without_limit() {
    let both = Match { principals: patterns(&["a*"]), trust_domains: patterns(&["td"]), ..Match::default() };
    let clause = Clause { matches: vec![both; 3].into() };
    let mut policy = policy([]);
    policy.rules = Box::new([Rule { clauses: vec![clause; 4].into() }]); // 3^4 = 81
    let error = encode_policy(&policy, Extensions::None).unwrap_err();
    assert_eq!(error.obstacles[0].reason, Reason::TooManyRules { wanted: 81, limit: 64 });
    assert_eq!(error.obstacles[0].field, "rules[0]");
}
