//! `Mesh::authorize` against a second evaluator, written from the semantics alone and as plainly as can be:
//! policies are OR-ed rules of AND-ed clauses of OR-ed matches; in a match the fields are AND-ed and the values
//! OR-ed; DENY goes before ALLOW, and without any ALLOW policy a connection is allowed. The reference shares no
//! code with the model: it has its own policy types and does its own pattern and range matching.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use model::{
    Action, Allow, Change, Clause, Connection, Deny, IpMatch, Match, Mesh, Policy, PolicyKey, Rule, RuleRef,
    Scope, ServiceAccountMatch, SpiffeId, StringMatch, Workload,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

mod mesh_parts;
use mesh_parts::workload;

// ---- the reference -------------------------------------------------------------------------------------------

#[derive(Clone, Debug)]
struct PlainPolicy {
    namespace: &'static str,
    name: String,
    scope: Scope,
    deny: bool,
    dry_run: bool,
    /// rules, clauses, matches
    rules: Vec<Vec<Vec<PlainMatch>>>,
}

/// Each field with its positive and its negated values.
#[derive(Clone, Debug, Default)]
struct PlainMatch {
    namespaces: [Vec<&'static str>; 2],
    principals: [Vec<&'static str>; 2],
    accounts: [Vec<(&'static str, &'static str)>; 2],
    domains: [Vec<&'static str>; 2],
    sources: [Vec<&'static str>; 2],
    destinations: [Vec<&'static str>; 2],
    ports: [Vec<u16>; 2],
}

#[derive(Clone, Debug)]
struct PlainConnection {
    /// trust domain, namespace, service account
    identity: Option<(&'static str, &'static str, &'static str)>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}

fn plain_pattern(pattern: &str, text: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(""), _) => !text.is_empty(),
        (_, Some(start)) => text.len() >= start.len() && &text.as_bytes()[..start.len()] == start.as_bytes(),
        (Some(end), None) => {
            text.len() >= end.len() && &text.as_bytes()[text.len() - end.len()..] == end.as_bytes()
        }
        (None, None) => pattern == text,
    }
}

/// Bit by bit.
fn plain_range(range: &str, ip: IpAddr) -> bool {
    fn bits(ip: IpAddr) -> String {
        match ip {
            IpAddr::V4(ip) => ip.octets().iter().map(|b| format!("{b:08b}")).collect(),
            IpAddr::V6(ip) => ip.octets().iter().map(|b| format!("{b:08b}")).collect(),
        }
    }
    let (base, length) = range.split_once('/').unwrap();
    let (base, length): (IpAddr, usize) = (base.parse().unwrap(), length.parse().unwrap());
    let (base, ip) = (bits(base), bits(ip));
    base.len() == ip.len() && base[..length] == ip[..length]
}

fn plain_match(m: &PlainMatch, c: &PlainConnection) -> bool {
    let text = |patterns: &[&'static str], value: Option<String>| {
        value.is_some_and(|v| patterns.iter().any(|p| plain_pattern(p, &v)))
    };
    let field = |is_set: [bool; 2], hits: [bool; 2]| {
        (is_set[0] || is_set[1], (!is_set[0] || hits[0]) && (!is_set[1] || !hits[1]))
    };
    let principal = c.identity.map(|(td, ns, sa)| format!("{td}/ns/{ns}/sa/{sa}"));
    let fields = [
        field(
            [0, 1].map(|i| !m.namespaces[i].is_empty()),
            [0, 1].map(|i| text(&m.namespaces[i], c.identity.map(|(_, ns, _)| ns.to_owned()))),
        ),
        field(
            [0, 1].map(|i| !m.principals[i].is_empty()),
            [0, 1].map(|i| text(&m.principals[i], principal.clone())),
        ),
        field(
            [0, 1].map(|i| !m.accounts[i].is_empty()),
            [0, 1].map(|i| c.identity.is_some_and(|(_, ns, sa)| m.accounts[i].contains(&(ns, sa)))),
        ),
        field(
            [0, 1].map(|i| !m.domains[i].is_empty()),
            [0, 1].map(|i| text(&m.domains[i], c.identity.map(|(td, _, _)| td.to_owned()))),
        ),
        field(
            [0, 1].map(|i| !m.sources[i].is_empty()),
            [0, 1].map(|i| m.sources[i].iter().any(|r| plain_range(r, c.source))),
        ),
        field(
            [0, 1].map(|i| !m.destinations[i].is_empty()),
            [0, 1].map(|i| m.destinations[i].iter().any(|r| plain_range(r, c.destination))),
        ),
        field([0, 1].map(|i| !m.ports[i].is_empty()), [0, 1].map(|i| m.ports[i].contains(&c.port))),
    ];
    fields.iter().any(|(is_set, _)| *is_set) && fields.iter().all(|(_, holds)| *holds)
}

fn plain_clause(clause: &[PlainMatch], c: &PlainConnection) -> bool {
    clause.is_empty() || clause.iter().any(|m| plain_match(m, c))
}

fn plain_rule(rule: &[Vec<PlainMatch>], c: &PlainConnection) -> bool {
    rule.iter().all(|clause| plain_clause(clause, c))
}

fn plain_policy(policy: &PlainPolicy, c: &PlainConnection) -> bool {
    policy.rules.iter().any(|rule| plain_rule(rule, c))
}

/// What the policies decide, when `trial` (an index) counts as enforced although it is a dry run.
fn plain_decision(policies: &[&PlainPolicy], trial: Option<&str>, c: &PlainConnection) -> bool {
    let in_force: Vec<_> =
        policies.iter().filter(|p| !p.dry_run || trial.is_some_and(|t| t == p.name)).collect();
    if in_force.iter().any(|p| p.deny && plain_policy(p, c)) {
        return false;
    }
    in_force.iter().all(|p| p.deny) || in_force.iter().any(|p| !p.deny && plain_policy(p, c))
}

// ---- the same, as the model has it ---------------------------------------------------------------------------

fn to_model(p: &PlainPolicy) -> Policy {
    let texts = |list: &[&'static str]| list.iter().map(|t| StringMatch::parse(t)).collect();
    let ranges = |list: &[&'static str]| list.iter().map(|t| IpMatch(t.parse().unwrap())).collect();
    let accounts = |list: &[(&'static str, &'static str)]| {
        list.iter()
            .map(|(ns, sa)| ServiceAccountMatch { namespace: (*ns).into(), name: (*sa).into() })
            .collect()
    };
    let to_match = |m: &PlainMatch| Match {
        namespaces: texts(&m.namespaces[0]),
        not_namespaces: texts(&m.namespaces[1]),
        principals: texts(&m.principals[0]),
        not_principals: texts(&m.principals[1]),
        service_accounts: accounts(&m.accounts[0]),
        not_service_accounts: accounts(&m.accounts[1]),
        trust_domains: texts(&m.domains[0]),
        not_trust_domains: texts(&m.domains[1]),
        source_ips: ranges(&m.sources[0]),
        not_source_ips: ranges(&m.sources[1]),
        destination_ips: ranges(&m.destinations[0]),
        not_destination_ips: ranges(&m.destinations[1]),
        destination_ports: m.ports[0].clone().into(),
        not_destination_ports: m.ports[1].clone().into(),
        http: None,
    };
    let to_clause = |c: &Vec<PlainMatch>| Clause { matches: c.iter().map(to_match).collect() };
    let to_rule = |r: &Vec<Vec<PlainMatch>>| Rule { clauses: r.iter().map(to_clause).collect() };
    Policy {
        key: PolicyKey { namespace: p.namespace.into(), name: p.name.as_str().into() },
        scope: p.scope,
        action: if p.deny { Action::Deny } else { Action::Allow },
        rules: p.rules.iter().map(to_rule).collect(),
        dry_run: p.dry_run,
    }
}

fn to_connection(c: &PlainConnection, mapped: bool) -> Connection {
    let identity =
        c.identity.map(|(td, ns, sa)| SpiffeId::new(td.parse().unwrap(), ns.into(), sa.into()).unwrap());
    // What a v6 socket reports of a v4 peer must decide the same.
    let map = |ip: IpAddr| match ip {
        IpAddr::V4(v4) if mapped => IpAddr::V6(v4.to_ipv6_mapped()),
        other => other,
    };
    Connection::new(identity, map(c.source), SocketAddr::new(map(c.destination), c.port))
}

// ---- what is tried: few values, so that they meet ------------------------------------------------------------

const NAMESPACES: [&str; 3] = ["a", "ab", "b"];
const ACCOUNTS: [&str; 2] = ["x", "y"];
const DOMAINS: [&str; 2] = ["td", "td.b"];
const RANGES: [&str; 9] = [
    "10.0.0.1/32",
    "10.0.0.0/31",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "10.0.0.3/32",
    "fd00::1/128",
    "fd00::/64",
    "::/0",
    "10.0.0.2/24",
];

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u8..4).prop_map(|n| IpAddr::V4(Ipv4Addr::new(10, 0, 0, n))),
        (0u16..3).prop_map(|n| IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n))),
        Just(IpAddr::V4(Ipv4Addr::new(192, 168, 0, 1))),
    ]
}

fn connection() -> impl Strategy<Value = PlainConnection> {
    let identity = (select(&DOMAINS[..]), select(&NAMESPACES[..]), select(&ACCOUNTS[..]));
    (prop::option::weighted(0.8, identity), ip(), ip(), select(&[80u16, 81, 443][..])).prop_map(
        |(identity, source, destination, port)| PlainConnection { identity, source, destination, port },
    )
}

/// Mostly unset, so that other fields get to decide; rarely both forms.
fn field<T: Clone + std::fmt::Debug + 'static>(values: Vec<T>) -> impl Strategy<Value = [Vec<T>; 2]> {
    let one = vec(select(values), 1..3);
    prop_oneof![
        6 => Just([vec![], vec![]]),
        2 => one.clone().prop_map(|v| [v, vec![]]),
        1 => one.clone().prop_map(|v| [vec![], v]),
        1 => (one.clone(), one).prop_map(|(a, b)| [a, b]),
    ]
}

fn plain_match_strategy() -> impl Strategy<Value = PlainMatch> {
    let namespaces = vec!["a", "ab", "a*", "*b", "*", "", "B"];
    let principals = vec!["td/ns/a/sa/x", "td/ns/a*", "*/sa/y", "*", "td.b/ns/b/sa/x", ""];
    let accounts = vec![("a", "x"), ("a", "y"), ("b", "x"), ("ab", "x")];
    let domains = vec!["td", "td.b", "td*", "*.b", "*"];
    (
        field(namespaces),
        field(principals),
        field(accounts),
        field(domains),
        field(RANGES.to_vec()),
        field(RANGES.to_vec()),
        field(vec![80u16, 81, 443]),
    )
        .prop_map(|(namespaces, principals, accounts, domains, sources, destinations, ports)| {
            PlainMatch { namespaces, principals, accounts, domains, sources, destinations, ports }
        })
}

fn policies() -> impl Strategy<Value = Vec<PlainPolicy>> {
    let scope = select(&[Scope::Global, Scope::Namespace, Scope::WorkloadSelector][..]);
    let rules = vec(vec(vec(plain_match_strategy(), 0..3), 0..3), 0..3);
    let policy = (select(&["here", "elsewhere"][..]), scope, any::<bool>(), prop::bool::weighted(0.2), rules);
    vec(policy, 0..5).prop_map(|list| {
        list.into_iter()
            .enumerate()
            .map(|(i, (namespace, scope, deny, dry_run, rules))| PlainPolicy {
                namespace,
                name: format!("p{i}"),
                scope,
                deny,
                dry_run,
                rules,
            })
            .collect()
    })
}

fn mesh_of(policies: &[PlainPolicy]) -> Mesh {
    Mesh::default().apply(policies.iter().map(|p| Change::SetPolicy(Arc::new(to_model(p)))))
}

/// A workload of namespace `here` that every selector policy of `here` selects.
fn selected_workload(policies: &[PlainPolicy]) -> Workload {
    let selecting = policies.iter().filter(|p| p.scope == Scope::WorkloadSelector && p.namespace == "here");
    let keys = selecting.map(|p| PolicyKey { namespace: p.namespace.into(), name: p.name.as_str().into() });
    workload("pod").with(|w| {
        w.namespace = "here".into();
        w.policies = keys.collect();
    })
}

fn holding(policies: &[PlainPolicy]) -> Vec<&PlainPolicy> {
    policies.iter().filter(|p| p.scope == Scope::Global || p.namespace == "here").collect()
}

/// The explanation names a rule that matches indeed, and in each clause the first match that holds.
fn check_rule(rule: &RuleRef, deny: bool, policies: &[PlainPolicy], c: &PlainConnection) {
    let policy = policies.iter().find(|p| p.name == *rule.policy.name).unwrap();
    assert_eq!((policy.deny, policy.namespace), (deny, &*rule.policy.namespace));
    let clauses = &policy.rules[rule.rule];
    assert!(plain_rule(clauses, c));
    let first: Vec<_> = clauses.iter().map(|cl| cl.iter().position(|m| plain_match(m, c))).collect();
    assert_eq!(*rule.matches, *first);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_evaluator_agrees_with_the_reference(
        policies in policies(), c in connection(), mapped in any::<bool>(),
    ) {
        let mesh = mesh_of(&policies);
        let decision = mesh.authorize(&selected_workload(&policies), &to_connection(&c, mapped));
        let holding = holding(&policies);
        let expected = plain_decision(&holding, None, &c);
        prop_assert_eq!(decision.outcome.is_ok(), expected, "{:?}", decision.outcome);

        let in_force_allow: Vec<_> =
            holding.iter().filter(|p| !p.deny && !p.dry_run).map(|p| p.name.as_str()).collect();
        match decision.outcome {
            Ok(permit) => {
                prop_assert_eq!(permit.connection(), &to_connection(&c, false));
                match permit.reason() {
                    Allow::NoAllowPolicies => prop_assert!(in_force_allow.is_empty()),
                    Allow::Matched(rule) => check_rule(rule, false, &policies, &c),
                }
            }
            Err(Deny::Matched(rule)) => check_rule(&rule, true, &policies, &c),
            Err(Deny::NoneMatched { considered, closest }) => {
                let mut names: Vec<_> = considered.iter().map(|k| k.name.to_string()).collect();
                names.sort();
                prop_assert_eq!(names, in_force_allow);
                let closest = closest.unwrap();
                let policy = policies.iter().find(|p| p.name == *closest.policy.name).unwrap();
                match closest.clause {
                    Some(clause) => prop_assert!(!plain_clause(&policy.rules[closest.rule][clause], &c)),
                    None => prop_assert!(policy.rules.is_empty()),
                }
            }
            Err(Deny::UnknownPolicy(key)) => prop_assert!(false, "{} is known", key),
        }
        let mut reported: Vec<_> =
            decision.dry_run.iter().map(|d| (d.policy.name.to_string(), d.would.is_ok())).collect();
        reported.sort();
        let trials: Vec<_> = holding
            .iter()
            .filter(|p| p.dry_run)
            .map(|p| (p.name.clone(), plain_decision(&holding, Some(&p.name), &c)))
            .filter(|(_, would)| *would != expected)
            .collect();
        prop_assert_eq!(reported, trials);
    }

    #[test]
    fn a_listed_but_unknown_policy_refuses_whatever_the_others_say(policies in policies(), c in connection()) {
        let mesh = mesh_of(&policies);
        let missing = PolicyKey { namespace: "here".into(), name: "missing".into() };
        let listed = selected_workload(&policies);
        let with_missing: Vec<_> = listed.policies.iter().cloned().chain([missing.clone()]).collect();
        let workload = listed.with(|w| w.policies = with_missing.into());
        let decision = mesh.authorize(&workload, &to_connection(&c, false));
        prop_assert_eq!(decision.outcome.unwrap_err(), Deny::UnknownPolicy(missing));
    }

    #[test]
    fn the_order_of_arrival_changes_nothing(
        (policies, shuffled) in policies().prop_flat_map(|p| (Just(p.clone()), Just(p).prop_shuffle())),
        c in connection(),
    ) {
        let workload = selected_workload(&policies);
        let connection = to_connection(&c, false);
        prop_assert_eq!(
            mesh_of(&policies).authorize(&workload, &connection),
            mesh_of(&shuffled).authorize(&workload, &connection)
        );
    }
}

/// Guards the test itself: the generated cases reach every outcome often enough to mean something.
#[test]
fn the_generated_cases_reach_every_outcome() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let (mut no_policy, mut allowed, mut denied, mut none_matched, mut dry) = (0, 0, 0, 0, 0);
    for _ in 0..1000 {
        let (policies, c) = (policies(), connection()).new_tree(&mut runner).unwrap().current();
        let decision = mesh_of(&policies).authorize(&selected_workload(&policies), &to_connection(&c, false));
        dry += decision.dry_run.len();
        match decision.outcome {
            Ok(permit) if *permit.reason() == Allow::NoAllowPolicies => no_policy += 1,
            Ok(_) => allowed += 1,
            Err(Deny::Matched(_)) => denied += 1,
            Err(_) => none_matched += 1,
        }
    }
    let counts = [no_policy, allowed, denied, none_matched, dry];
    assert!(counts.iter().all(|n| *n >= 50), "no policy, allowed, denied, none matched, dry run: {counts:?}");
}
