//! What a decision says of itself: users read these words in the access log, `culvert why` and `what-if`.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Arc;

use model::{Action, Change, Clause, Connection, Match, Mesh, Policy, PolicyKey, Rule, Scope, StringMatch};

mod mesh_parts;
use mesh_parts::workload;

fn policy(name: &str, action: Action, rules: Vec<Vec<Vec<Match>>>) -> Policy {
    let clause = |matches: Vec<Match>| Clause { matches: matches.into() };
    let rule = |clauses: Vec<Vec<Match>>| Rule { clauses: clauses.into_iter().map(clause).collect() };
    Policy {
        key: PolicyKey { namespace: "shop".into(), name: name.into() },
        scope: Scope::Namespace,
        action,
        rules: rules.into_iter().map(rule).collect(),
        dry_run: false,
    }
}

fn from(principal: &str) -> Match {
    Match { principals: [StringMatch::parse(principal)].into(), ..Match::default() }
}

fn to(ports: &[u16]) -> Match {
    Match { destination_ports: ports.into(), ..Match::default() }
}

/// What is said of a connection from shop's `web` to port 8080.
fn said(policies: Vec<Policy>, source: Option<&str>, lists: Option<&str>) -> String {
    let mesh = Mesh::default().apply(policies.into_iter().map(|p| Change::SetPolicy(Arc::new(p))));
    let listed = lists.map(|name| PolicyKey { namespace: "shop".into(), name: name.into() });
    let pod = workload("pod").with(|w| {
        w.namespace = "shop".into();
        w.policies = listed.into_iter().collect();
    });
    let connection = Connection::new(
        source.map(|s| s.parse().unwrap()),
        "10.0.0.1".parse().unwrap(),
        "10.0.0.2:8080".parse().unwrap(),
    );
    match mesh.authorize(&pod, &connection).outcome {
        Ok(permit) => permit.reason().to_string(),
        Err(deny) => deny.to_string(),
    }
}

const WEB: Option<&str> = Some("spiffe://td/ns/shop/sa/web");

#[test]
fn a_permission_names_the_rule_and_the_match_of_each_clause() {
    let rules = vec![
        vec![vec![from("td/ns/other/*")]],
        vec![vec![from("td/ns/x/sa/x"), from("td/ns/shop/*")], vec![], vec![to(&[8080])]],
    ];
    let text = said(vec![policy("allow-web", Action::Allow, rules)], WEB, None);
    assert_eq!(text, "allowed by policy shop/allow-web rule 1 clause 0.1 clause 2.0");
    assert_eq!(said(vec![], WEB, None), "allowed: no ALLOW policy holds for the workload");
}

#[test]
fn a_refusal_names_the_rule_that_refused() {
    let deny = policy("deny-8080", Action::Deny, vec![vec![vec![to(&[8080])]]]);
    let allow = policy("allow-all", Action::Allow, vec![vec![]]);
    assert_eq!(said(vec![allow, deny], WEB, None), "denied by policy shop/deny-8080 rule 0 clause 0.0");
}

#[test]
fn a_refusal_for_want_of_permission_names_what_came_closest_and_what_it_lacked() {
    let far = policy("far", Action::Allow, vec![vec![vec![from("td/ns/a/sa/a")], vec![to(&[1])]]]);
    let near =
        policy("near", Action::Allow, vec![vec![vec![from("td/ns/shop/*")], vec![to(&[80]), to(&[81])]]]);
    assert_eq!(
        said(vec![far, near], WEB, None),
        "denied: no ALLOW policy matched (shop/far, shop/near); closest: policy shop/near rule 0 clause 1: \
         destination.port must be one of [80, 81] and is 8080"
    );
}

#[test]
fn a_missing_identity_is_said_to_be_missing() {
    let allow = policy("allow-web", Action::Allow, vec![vec![vec![from("td/ns/shop/sa/web")]]]);
    assert_eq!(
        said(vec![allow], None, None),
        "denied: no ALLOW policy matched (shop/allow-web); closest: policy shop/allow-web rule 0 clause 0: \
         source.principal must be one of [td/ns/shop/sa/web] and is none"
    );
}

#[test]
fn what_can_never_match_is_said_to_match_nothing() {
    let nothing = policy("default-deny", Action::Allow, vec![]);
    assert_eq!(
        said(vec![nothing], WEB, None),
        "denied: no ALLOW policy matched (shop/default-deny); closest: policy shop/default-deny has no rules"
    );
    let never = policy("never", Action::Allow, vec![vec![vec![Match::default()]]]);
    assert_eq!(
        said(vec![never], WEB, None),
        "denied: no ALLOW policy matched (shop/never); closest: policy shop/never rule 0 clause 0 matches nothing"
    );
}

#[test]
fn a_negated_field_is_told_apart() {
    let not_web = Match { not_principals: [StringMatch::parse("*/sa/web")].into(), ..Match::default() };
    let allow = policy("not-web", Action::Allow, vec![vec![vec![not_web]]]);
    assert_eq!(
        said(vec![allow], WEB, None),
        "denied: no ALLOW policy matched (shop/not-web); closest: policy shop/not-web rule 0 clause 0: \
         source.principal must not be one of [*/sa/web] and is td/ns/shop/sa/web"
    );
}

#[test]
fn a_policy_that_has_not_arrived_is_named() {
    let text = said(vec![], WEB, Some("late"));
    assert_eq!(text, "denied: policy shop/late selects the workload but has not arrived");
}
