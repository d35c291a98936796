//! AuthorizationPolicies, as text, against an evaluator that knows requests and was written from what Istio says of
//! the fields. A policy without parts that need requests decides at L4 as the evaluator does; one with such parts
//! never lets in at L4 what some request would be refused for. Where a waypoint stands before the workload, what it
//! decides and what the node decides come to the whole.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::net::IpAddr;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::http::{Claims, Request as HttpRequest};
use model::{Connection, Mesh, PolicyKey, SpiffeId, decide_request};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

const OURS: [&str; 2] = ["example.org", "old.org"];

#[derive(Clone, Copy, Debug)]
struct Caller {
    identity: Option<(&'static str, &'static str, &'static str)>,
    ip: &'static str,
    port: u16,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    method: &'static str,
    principal: Option<&'static str>,
}

const REQUESTS: [Request; 4] = [
    Request { method: "GET", principal: None },
    Request { method: "GET", principal: Some("issuer/user") },
    Request { method: "POST", principal: None },
    Request { method: "POST", principal: Some("issuer/user") },
];

// ---- the evaluator -------------------------------------------------------------------------------------------

fn glob(pattern: &str, text: &str) -> bool {
    if pattern == "*" {
        return !text.is_empty();
    }
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => text.ends_with(end),
        (_, Some(start)) => text.starts_with(start),
        _ => pattern == text,
    }
}

fn ours(domain: &str) -> bool {
    domain == "cluster.local" || OURS.contains(&domain)
}

/// Ours are one: a pattern that names one of them means the account in each.
fn principal(pattern: &str, caller: &Caller) -> bool {
    let Some((domain, namespace, account)) = caller.identity else { return false };
    let path = format!("ns/{namespace}/sa/{account}");
    match pattern.split_once('/') {
        Some((named, rest)) if ours(named) => OURS.contains(&domain) && glob(rest, &path),
        // `*end-of-a-domain/ns/…`, which means ours if one of ours ends so.
        Some((end, rest)) if end.len() > 1 && end.starts_with('*') && OURS.iter().any(|d| glob(end, d)) => {
            (OURS.contains(&domain) && rest == path) || glob(pattern, &format!("{domain}/{path}"))
        }
        _ => glob(pattern, &format!("{domain}/{path}")),
    }
}

fn field(field: &str, value: &str, caller: &Caller, request: &Request) -> bool {
    let identity = caller.identity;
    match field {
        "principals" | "source.principal" => principal(value, caller),
        "namespaces" | "source.namespace" => identity.is_some_and(|(_, ns, _)| glob(value, ns)),
        "serviceAccounts" | "source.serviceAccount" => {
            let (namespace, account) = value.split_once('/').unwrap_or(("here", value));
            identity.is_some_and(|(_, ns, sa)| (ns, sa) == (namespace, account))
        }
        "trustDomains" | "source.trustDomain" => identity.is_some_and(|(domain, ..)| {
            glob(value, domain)
                || (OURS.contains(&domain)
                    && (ours(value) || OURS.iter().any(|d| value.contains('*') && glob(value, d))))
        }),
        "ipBlocks" | "source.ip" => {
            let range: ipnet::IpNet =
                value.parse().unwrap_or_else(|_| value.parse::<IpAddr>().unwrap().into());
            range.contains(&caller.ip.parse::<IpAddr>().unwrap())
        }
        "ports" | "destination.port" => value == caller.port.to_string(),
        "methods" => glob(value, request.method),
        "requestPrincipals" | "request.auth.principal" => request.principal.is_some_and(|p| glob(value, p)),
        other => panic!("{other}"),
    }
}

fn any_of(name: &str, values: &Value, caller: &Caller, request: &Request) -> bool {
    values.as_array().unwrap().iter().any(|v| field(name, v.as_str().unwrap(), caller, request))
}

/// A source or an operation: every field that is there.
fn part(part: &Value, caller: &Caller, request: &Request) -> bool {
    part.as_object().unwrap().iter().all(|(name, values)| match name.strip_prefix("not") {
        Some(rest) => {
            let name = format!("{}{}", rest[..1].to_lowercase(), &rest[1..]);
            !any_of(&name, values, caller, request)
        }
        None => any_of(name, values, caller, request),
    })
}

fn rule(rule: &Value, caller: &Caller, request: &Request) -> bool {
    let alternatives = |list: &str, inner: &str| {
        rule[list].as_array().is_none_or(|all| all.iter().any(|item| part(&item[inner], caller, request)))
    };
    let condition = |c: &Value| {
        let key = c["key"].as_str().unwrap();
        (c["values"].is_null() || any_of(key, &c["values"], caller, request))
            && (c["notValues"].is_null() || !any_of(key, &c["notValues"], caller, request))
    };
    alternatives("from", "source")
        && alternatives("to", "operation")
        && rule["when"].as_array().is_none_or(|all| all.iter().all(condition))
}

fn allowed(policies: &[Value], caller: &Caller, request: &Request) -> bool {
    let matches = |p: &Value| p["spec"]["rules"].as_array().unwrap().iter().any(|r| rule(r, caller, request));
    let of = |action: &'static str| policies.iter().filter(move |p| p["spec"]["action"] == action);
    !of("DENY").any(matches) && (of("ALLOW").count() == 0 || of("ALLOW").any(matches))
}

// ---- what is tried -------------------------------------------------------------------------------------------

fn values(name: &str) -> Vec<&'static str> {
    match name {
        "principals" | "source.principal" => vec![
            "example.org/ns/a/sa/x",
            "cluster.local/ns/b/*",
            "old.org/ns/a/sa/y",
            "foreign.org/ns/a/sa/x",
            "*/sa/y",
            "*ign.org/ns/b/sa/x",
            "*old.org/ns/b/sa/x",
            "*",
        ],
        "namespaces" | "source.namespace" => vec!["a", "b", "h*", "*e", "*"],
        "serviceAccounts" | "source.serviceAccount" => vec!["a/x", "y", "here/x"],
        "trustDomains" | "source.trustDomain" => {
            vec!["example.org", "cluster.local", "foreign.org", "o*", "*"]
        }
        "ipBlocks" | "source.ip" => vec!["10.0.0.1", "10.0.0.0/24", "fd00::/64", "::/0"],
        "ports" | "destination.port" => vec!["80", "443"],
        "methods" => vec!["GET", "P*"],
        "requestPrincipals" | "request.auth.principal" => vec!["*", "issuer/*", "other/user"],
        other => panic!("{other}"),
    }
}

/// Some of the fields of `names`, positive or negated; never none.
fn fields(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
    let one =
        select(names).prop_flat_map(|name| (Just(name), any::<bool>(), vec(select(values(name)), 1..3)));
    vec(one, 1..3).prop_map(|list| {
        let mut map = Map::new();
        for (name, negated, values) in list {
            let key = if negated {
                format!("not{}{}", name[..1].to_uppercase(), &name[1..])
            } else {
                name.to_owned()
            };
            map.insert(key, json!(values));
        }
        Value::Object(map)
    })
}

fn source() -> impl Strategy<Value = Value> {
    prop_oneof![
        6 => fields(&["principals", "namespaces", "ipBlocks", "trustDomains"]),
        2 => fields(&["serviceAccounts", "ipBlocks", "trustDomains"]),
        2 => fields(&["principals", "requestPrincipals"]),
    ]
}

fn operation() -> impl Strategy<Value = Value> {
    prop_oneof![3 => fields(&["ports"]), 1 => fields(&["ports", "methods"])]
}

fn condition() -> impl Strategy<Value = Value> {
    const KEYS: [&str; 7] = [
        "source.principal",
        "source.namespace",
        "source.serviceAccount",
        "source.trustDomain",
        "source.ip",
        "destination.port",
        "request.auth.principal",
    ];
    select(&KEYS[..])
        .prop_flat_map(|key| {
            (Just(key), 0..3, vec(select(values(key)), 1..3), vec(select(values(key)), 1..3))
        })
        .prop_map(|(key, form, values, not_values)| match form {
            0 => json!({"key": key, "values": values}),
            1 => json!({"key": key, "notValues": not_values}),
            _ => json!({"key": key, "values": values, "notValues": not_values}),
        })
}

fn policy() -> impl Strategy<Value = Value> {
    let from = prop::option::of(vec(source(), 1..3));
    let to = prop::option::of(vec(operation(), 1..3));
    let rule = (from, to, vec(condition(), 0..2)).prop_map(|(from, to, when)| {
        let mut map = Map::new();
        let wrapped =
            |list: Vec<Value>, key: &str| Value::Array(list.into_iter().map(|v| json!({ key: v })).collect());
        map.extend(from.map(|f| ("from".to_owned(), wrapped(f, "source"))));
        map.extend(to.map(|t| ("to".to_owned(), wrapped(t, "operation"))));
        if !when.is_empty() {
            map.insert("when".to_owned(), Value::Array(when));
        }
        Value::Object(map)
    });
    (any::<bool>(), vec(rule, 1..3)).prop_map(|(deny, rules)| {
        json!({
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"namespace": "here"},
            "spec": {"action": if deny { "DENY" } else { "ALLOW" }, "rules": rules},
        })
    })
}

fn callers() -> Vec<Caller> {
    let mut identities = vec![None];
    for domain in ["example.org", "old.org", "foreign.org"] {
        for namespace in ["a", "b", "here"] {
            identities.extend(["x", "y"].map(|account| Some((domain, namespace, account))));
        }
    }
    let places = [("10.0.0.1", 80), ("10.0.0.7", 443), ("10.1.0.1", 8080), ("fd00::1", 80)];
    let with = |identity| places.map(|(ip, port)| Caller { identity, ip, port });
    identities.into_iter().flat_map(with).collect()
}

fn mesh(policies: &[Value]) -> Mesh {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "namespace": "here"},
        "status": {"podIP": "10.9.0.1"},
    });
    let config = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
        "data": {"mesh": "trustDomain: example.org\ntrustDomainAliases: [old.org]\n"},
    });
    let text: String = policies.iter().chain([&pod, &config]).map(|p| format!("---\n{p}\n")).collect();
    let mut repository = Repository::new(Options::default());
    let outcome = repository.apply(&"case.yaml".into(), Content::Bytes(text.as_bytes()));
    assert!(!repository.has_bad_files(), "{:#?}", repository.diagnostics());
    Mesh::default().apply(outcome.changes)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn l4_decides_as_the_whole_or_refuses(mut policies in vec(policy(), 1..4)) {
        for (number, policy) in policies.iter_mut().enumerate() {
            policy["metadata"]["name"] = format!("p{number}").into();
        }
        let mesh = mesh(&policies);
        let pod = mesh.workloads().next().unwrap();
        let text = Value::Array(policies.clone()).to_string();
        let needs_requests = ["ethods\"", "equestPrincipals\"", "request.auth"].iter().any(|word| text.contains(word));
        for caller in callers() {
            let identity = caller.identity.map(|(td, ns, sa)| format!("spiffe://{td}/ns/{ns}/sa/{sa}").parse().unwrap());
            let to = ("10.9.0.1".parse::<IpAddr>().unwrap(), caller.port);
            let connection = Connection::new(identity, caller.ip.parse().unwrap(), to.into());
            let decision = mesh.authorize(pod, &connection).outcome;
            for request in &REQUESTS {
                let whole = allowed(&policies, &caller, request);
                let sound = if needs_requests { whole || decision.is_err() } else { whole == decision.is_ok() };
                prop_assert!(sound, "{:?} {:?}: {} at L7, {:?}\n{}", caller, request, whole, decision, text);
            }
        }
    }
}

// ---- behind a waypoint ---------------------------------------------------------------------------------------

/// The ports that the waypoint stands before.
const BOUND: [u16; 2] = [80, 443];

fn mesh_behind_a_waypoint(policies: &[Value]) -> Mesh {
    let others = [
        json!({ "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": "here", "labels": {"istio.io/dataplane-mode": "ambient"}} }),
        json!({ "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "pod", "namespace": "here", "labels": {"app": "web"}},
                "status": {"podIP": "10.9.0.1"} }),
        json!({ "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": "web", "namespace": "here", "labels": {"istio.io/use-waypoint": "gate"}},
                "spec": {"clusterIP": "10.200.0.1", "selector": {"app": "web"},
                         "ports": BOUND.map(|port| json!({"port": port, "name": format!("p{port}")})) } }),
        json!({ "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
                "metadata": {"name": "gate", "namespace": "here"},
                "spec": {"gatewayClassName": "culvert-waypoint",
                         "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]} }),
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
                "data": {"mesh": "trustDomain: example.org\ntrustDomainAliases: [old.org]\n"} }),
    ];
    let text: String = policies.iter().chain(&others).map(|p| format!("---\n{p}\n")).collect();
    let mut repository = Repository::new(Options::default());
    let outcome = repository.apply(&"case.yaml".into(), Content::Bytes(text.as_bytes()));
    assert!(!repository.has_bad_files(), "{:#?}", repository.diagnostics());
    Mesh::default().apply(outcome.changes)
}

fn needs_requests(policy: &Value) -> bool {
    let text = policy.to_string();
    ["ethods\"", "equestPrincipals\"", "request.auth"].iter().any(|word| text.contains(word))
}

fn identity(caller: &Caller) -> Option<SpiffeId> {
    caller.identity.map(|(td, ns, sa)| format!("spiffe://{td}/ns/{ns}/sa/{sa}").parse().unwrap())
}

/// Whether the waypoint lets in a request to the service.
fn at_the_waypoint(mesh: &Mesh, caller: &Caller, request: &Request) -> bool {
    let service = mesh.http_services().next().unwrap();
    let to = ("10.200.0.1".parse::<IpAddr>().unwrap(), caller.port);
    let connection = Connection::new(identity(caller), caller.ip.parse().unwrap(), to.into());
    let claims = request.principal.map(|_| {
        let payload = json!({"iss": "issuer", "sub": "user"});
        Claims::new(payload.as_object().unwrap().clone())
    });
    let headers: Vec<(&str, &str)> = Vec::new();
    let request =
        HttpRequest { claims: claims.as_ref(), ..HttpRequest::new(request.method, "web", "/", &headers) };
    let held = |keys: &[PolicyKey]| {
        let held: Vec<_> = keys.iter().map(|key| mesh.http_policy(key).ok_or(key)).collect();
        decide_request(&held, &connection, Some(&request)).outcome.is_ok()
    };
    held(&service.policies) && service.selected.iter().all(|set| held(set))
}

/// Whether the node lets in the waypoint, or, without one, the caller.
fn at_the_node(mesh: &Mesh, caller: &Caller, through: bool) -> bool {
    let pod = mesh.workloads().next().unwrap();
    let source = if through {
        Some("spiffe://example.org/ns/here/sa/gate".parse().unwrap())
    } else {
        identity(caller)
    };
    let ip = if through { "10.8.0.1" } else { caller.ip };
    let to = ("10.9.0.1".parse::<IpAddr>().unwrap(), caller.port);
    mesh.authorize(pod, &Connection::new(source, ip.parse().unwrap(), to.into())).outcome.is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_halves_together_decide_as_the_whole(mut policies in vec((policy(), any::<bool>()), 1..4)) {
        for (number, (policy, selects)) in policies.iter_mut().enumerate() {
            policy["metadata"]["name"] = format!("p{number}").into();
            if *selects {
                policy["spec"]["selector"] = json!({"matchLabels": {"app": "web"}});
            }
        }
        let policies: Vec<Value> = policies.into_iter().map(|(policy, _)| policy).collect();
        let mesh = mesh_behind_a_waypoint(&policies);
        let of = |action: &'static str| policies.iter().filter(move |p| p["spec"]["action"] == action);
        let denies: Vec<Value> = of("DENY").cloned().collect();
        // ALLOW policies that ask nothing of requests, and no other, are for the peer of the node, as in Istio; so are
        // DENY policies, beside what they refuse at the waypoint.
        let allows_are_halved = of("ALLOW").count() == 0 || of("ALLOW").any(needs_requests);
        let denies_are_halved = of("DENY").all(needs_requests);
        let judged = if allows_are_halved { &policies } else { &denies };
        for caller in callers() {
            let through = BOUND.contains(&caller.port);
            let node = at_the_node(&mesh, &caller, through);
            if through {
                prop_assert!(!at_the_node(&mesh, &caller, false), "past the waypoint: {caller:?}");
            }
            for request in &REQUESTS {
                let whole = allowed(judged, &caller, request);
                let halves = if through { node && at_the_waypoint(&mesh, &caller, request) } else { node };
                let text = || format!("{caller:?} {request:?}: the whole {whole}, halves {halves}, node {node}\n{policies:?}");
                prop_assert!(whole || !halves, "{}", text());
                if through && allows_are_halved && denies_are_halved {
                    prop_assert!(whole == halves, "{}", text());
                }
            }
        }
    }
}

/// Guards the test itself: what it tries is let in and refused, with and without parts that need requests.
#[test]
fn the_tried_policies_decide_both_ways() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut counts, callers) = ([[0; 2]; 2], callers());
    for _ in 0..100 {
        let mut policies = vec(policy(), 1..4).new_tree(&mut runner).unwrap().current();
        for (number, policy) in policies.iter_mut().enumerate() {
            policy["metadata"]["name"] = format!("p{number}").into();
        }
        let text = Value::Array(policies.clone()).to_string();
        let needs_requests =
            ["ethods\"", "equestPrincipals\"", "request.auth"].iter().any(|word| text.contains(word));
        for caller in &callers {
            let whole = allowed(&policies, caller, &REQUESTS[0]);
            counts[usize::from(needs_requests)][usize::from(whole)] += 1;
        }
    }
    assert!(counts.iter().flatten().all(|n| *n > 300), "{counts:?}");
}
