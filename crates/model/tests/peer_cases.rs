//! The L4 decisions that users who come from Istio expect, read from data that lies beside the checkout (or where
//! `CULVERT_PEER_CASES` says). Without that folder the tests say that they are skipped.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, clippy::indexing_slicing)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use model::{
    Action, Change, Clause, Connection, IpMatch, Match, Mesh, Policy, PolicyKey, Rule, Scope,
    ServiceAccountMatch, SpiffeId, StringMatch,
};
use serde_json::Value;

mod mesh_parts;
use mesh_parts::workload;

/// The document of a name; `None`, said aloud, when there is no such folder.
fn peer_cases(name: &str) -> Option<Value> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/peer-cases");
    let folder = std::env::var_os("CULVERT_PEER_CASES").map_or(beside, PathBuf::from);
    if !folder.is_dir() {
        eprintln!("skipped: no peer cases (set CULVERT_PEER_CASES to their folder)");
        return None;
    }
    Some(serde_json::from_str(&std::fs::read_to_string(folder.join(name)).unwrap()).unwrap())
}

fn texts(field: &Value) -> Vec<&str> {
    field.as_array().map(|list| list.iter().map(|t| t.as_str().unwrap()).collect()).unwrap_or_default()
}

fn string_match(m: &Value) -> StringMatch {
    let (kind, text) = m.as_object().unwrap().iter().next().unwrap();
    // A service account with '=' in it exists in one case; no API server would let it in, and SpiffeId neither.
    let text = || text.as_str().unwrap().replace('=', "-").into();
    match kind.as_str() {
        "exact" => StringMatch::Exact(text()),
        "prefix" => StringMatch::Prefix(text()),
        "suffix" => StringMatch::Suffix(text()),
        "presence" => StringMatch::Presence,
        other => panic!("a matcher {other}"),
    }
}

fn match_of(m: &Value) -> Match {
    let known = [
        "namespaces",
        "notNamespaces",
        "principals",
        "notPrincipals",
        "serviceAccounts",
        "notServiceAccounts",
        "sourceIps",
        "notSourceIps",
        "destinationIps",
        "notDestinationIps",
        "destinationPorts",
        "notDestinationPorts",
    ];
    for field in m.as_object().unwrap().keys() {
        assert!(known.contains(&field.as_str()), "field {field} would be dropped");
    }
    let strings = |f: &str| m[f].as_array().map(|l| l.iter().map(string_match).collect()).unwrap_or_default();
    let ranges = |f: &str| texts(&m[f]).iter().map(|t| IpMatch(range(t))).collect();
    let accounts = |f: &str| {
        let account = |a: &Value| ServiceAccountMatch {
            namespace: a["namespace"].as_str().unwrap().into(),
            name: a["serviceAccount"].as_str().unwrap().into(),
        };
        m[f].as_array().map(|l| l.iter().map(account).collect()).unwrap_or_default()
    };
    let ports = |f: &str| {
        let port = |p: &Value| u16::try_from(p.as_u64().unwrap()).unwrap();
        m[f].as_array().map(|l| l.iter().map(port).collect()).unwrap_or_default()
    };
    Match {
        namespaces: strings("namespaces"),
        not_namespaces: strings("notNamespaces"),
        principals: strings("principals"),
        not_principals: strings("notPrincipals"),
        service_accounts: accounts("serviceAccounts"),
        not_service_accounts: accounts("notServiceAccounts"),
        source_ips: ranges("sourceIps"),
        not_source_ips: ranges("notSourceIps"),
        destination_ips: ranges("destinationIps"),
        not_destination_ips: ranges("notDestinationIps"),
        destination_ports: ports("destinationPorts"),
        not_destination_ports: ports("notDestinationPorts"),
        http: None,
        ..Match::default()
    }
}

fn range(text: &str) -> ipnet::IpNet {
    text.parse().unwrap_or_else(|_| text.parse::<std::net::IpAddr>().unwrap().into())
}

fn policy(p: &Value) -> Policy {
    let clause = |c: &Value| Clause { matches: c.as_array().unwrap().iter().map(match_of).collect() };
    let rule = |r: &Value| Rule { clauses: r.as_array().unwrap().iter().map(clause).collect() };
    let text = |field: &str| p[field].as_str().unwrap();
    Policy {
        key: PolicyKey { namespace: text("namespace").into(), name: text("name").into() },
        scope: match text("scope") {
            "GLOBAL" => Scope::Global,
            "NAMESPACE" => Scope::Namespace,
            "WORKLOAD_SELECTOR" => Scope::WorkloadSelector,
            other => panic!("scope {other}"),
        },
        action: match text("action") {
            "ALLOW" => Action::Allow,
            "DENY" => Action::Deny,
            other => panic!("action {other}"),
        },
        rules: p["rules"].as_array().unwrap().iter().map(rule).collect(),
        dry_run: p["dryRun"].as_bool().unwrap(),
    }
}

fn connection(c: &Value) -> Connection {
    let identity = c["srcIdentity"].as_object().map(|id| {
        let part = |f: &str| id[f].as_str().unwrap().replace('=', "-");
        SpiffeId::new(
            part("trustDomain").parse().unwrap(),
            part("namespace").into(),
            part("serviceAccount").into(),
        )
        .unwrap()
    });
    let address = |f: &str| c[f].as_str().unwrap().parse::<SocketAddr>().unwrap();
    Connection::new(identity, address("src").ip(), address("dst"))
}

#[test]
fn decisions_are_those_that_istio_makes() {
    let Some(file) = peer_cases("authz-l4.json") else { return };
    let (mut tried, mut wrong) = (0, Vec::new());
    for case in file["cases"].as_array().unwrap() {
        let policies: Vec<Policy> = case["wds"].as_array().unwrap().iter().map(policy).collect();
        let destination = &case["destinationWorkload"];
        let keys = texts(&destination["authorizationPolicies"]);
        let keys = keys.iter().map(|k| {
            let (namespace, name) = k.split_once('/').unwrap();
            PolicyKey { namespace: namespace.into(), name: name.into() }
        });
        let namespace = destination["namespace"].as_str().unwrap_or("namespace");
        let to = workload("to").with(|w| {
            w.namespace = namespace.into();
            w.policies = keys.collect();
        });
        let mesh = Mesh::default().apply(policies.iter().map(|p| Change::SetPolicy(Arc::new(p.clone()))));
        let decision = mesh.authorize(&to, &connection(&case["connection"]));
        // A `policy-match` case asks whether its one policy, an ALLOW, matches.
        let expected = match &case["expect"] {
            Value::Bool(matches) => {
                assert!(policies.len() == 1 && policies[0].action == Action::Allow, "{}", case["id"]);
                *matches
            }
            text => text == "allow",
        };
        tried += 1;
        if decision.outcome.is_ok() != expected {
            wrong.push(format!("{}: expected {expected}, got {:?}", case["id"], decision.outcome));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried >= 29, "{tried}");
}

#[test]
fn patterns_match_what_they_match_in_istio() {
    let Some(file) = peer_cases("authz-l4.json") else { return };
    for case in file["stringMatch"].as_array().unwrap() {
        let matches = string_match(&case["matcher"]).matches(case["value"].as_str().unwrap());
        assert_eq!(matches, case["expect"].as_bool().unwrap(), "{}", case["id"]);
    }
}

/// Where we decide otherwise on purpose: input, and why.
const OTHERWISE: [(&str, &str); 1] =
    [("/app#foo", "a fragment is never sent by a client that means well; Envoy itself answers 400")];

#[test]
fn paths_are_normalised_as_in_istio() {
    use model::http::{Normalization, normalize};
    let Some(file) = peer_cases("path-normalization.json") else { return };
    let (mut tried, mut wrong) = (0, Vec::new());
    for case in file["cases"].as_array().unwrap() {
        let how = match case["normalization"].as_str().unwrap() {
            "NONE" => Normalization::None,
            "BASE" => Normalization::Base,
            "MERGE_SLASHES" => Normalization::MergeSlashes,
            "DECODE_AND_MERGE_SLASHES" => Normalization::DecodeAndMergeSlashes,
            other => panic!("a normalization {other}"),
        };
        let (path, expected) = (case["in"].as_str().unwrap(), case["expectPath"].as_str().unwrap());
        let got = normalize(path, how);
        tried += 1;
        if OTHERWISE.iter().any(|(p, _)| *p == path) {
            assert!(got.is_err(), "{path}");
        } else if got.as_deref() != Ok(expected) {
            wrong.push(format!("{path} by {how:?}: expected {expected}, got {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried >= 192, "{tried}");
}
