//! The decisions over requests that users who come from Istio expect, read from data that lies beside the checkout (or
//! where `CULVERT_PEER_CASES` says). Without that folder the test says that it is skipped.
//!
//! Most of the cases were written for the proxy of the workload that policies select. A policy that would be in force
//! there is given the service as its target; what a proxy for connections alone decides is asked elsewhere.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::fmt::Write as _;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::http::{Claims, Normalization, Request, normalize};
use model::{Connection, Mesh, SpiffeId, decide_request};
use serde_json::{Value, json};

mod peer;

/// Cases that come out otherwise here, each with the reason.
const OTHERWISE: [(&str, &str); 0] = [];

/// The policies of a case, as they are for the service of its destination.
fn targeted(case: &Value) -> Vec<Value> {
    let to = &case["destination"];
    let selects = |policy: &Value| {
        let namespace = policy["metadata"]["namespace"].as_str().unwrap();
        let wanted = policy["spec"]["selector"]["matchLabels"].as_object();
        let here = namespace == to["namespace"].as_str().unwrap() || namespace == "istio-system";
        here && wanted.is_none_or(|w| w.iter().all(|(key, value)| to["labels"][key] == *value))
    };
    let policies = case["policies"].as_array().unwrap().iter();
    let policies = policies.filter(|p| p["kind"] == "AuthorizationPolicy");
    let mut list = Vec::new();
    for (place, policy) in policies.enumerate() {
        let mut policy = policy.clone();
        if policy["spec"]["targetRefs"].is_null() {
            if !selects(&policy) {
                continue;
            }
            let spec = policy["spec"].as_object_mut();
            if let Some(spec) = spec {
                spec.remove("selector");
            } else {
                policy["spec"] = json!({});
            }
            policy["spec"]["targetRefs"] = json!([{ "group": "", "kind": "Service", "name": to["service"] }]);
            // Those of the root namespace hold here too, and two of one name would be one.
            policy["metadata"]["namespace"] = to["namespace"].clone();
            policy["metadata"]["name"] = json!(format!("p{place}"));
        }
        list.push(policy);
    }
    list
}

fn mesh(case: &Value) -> (Mesh, model::ServiceKey, Vec<String>) {
    let to = &case["destination"];
    let (namespace, service) = (to["namespace"].as_str().unwrap(), to["service"].as_str().unwrap());
    let mut objects = vec![
        json!({ "apiVersion": "v1", "kind": "Service",
                "metadata": { "name": service, "namespace": namespace, "labels": { "istio.io/use-waypoint": "waypoint" } },
                "spec": { "clusterIP": "10.200.0.1", "ports": [{ "port": to["port"] }] } }),
        json!({ "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
                "metadata": { "name": "waypoint", "namespace": namespace },
                "spec": { "gatewayClassName": "istio-waypoint",
                          "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }] } }),
    ];
    objects.extend(targeted(case));
    let mut text = String::new();
    for object in &objects {
        writeln!(text, "---\n{object}").unwrap();
    }
    let mut repository = Repository::new(Options::default());
    repository.stage(&"case.yaml".into(), Content::Bytes(text.as_bytes()));
    let outcome = repository.commit();
    let errors =
        repository.diagnostics().into_iter().filter(|d| d.severity == config::diagnostic::Severity::Error);
    let errors = errors.map(|d| d.to_string()).collect();
    let key = model::ServiceKey {
        namespace: namespace.into(),
        hostname: format!("{service}.{namespace}.svc.cluster.local").as_str().into(),
    };
    (Mesh::default().apply(outcome.changes), key, errors)
}

/// The connection that a case is about.
fn connection(case: &Value) -> Connection {
    let peer = &case["source_peer"];
    let identity = peer["identity"].as_object().map(|id| {
        let part = |f: &str| id[f].as_str().unwrap();
        SpiffeId::new(
            part("trustDomain").parse().unwrap(),
            part("namespace").into(),
            part("serviceAccount").into(),
        )
        .unwrap()
    });
    // Where nothing is said of an address, none is looked at.
    let address = |v: &Value| v.as_str().unwrap_or("10.0.0.1").parse().unwrap();
    let port = u16::try_from(case["destination"]["port"].as_u64().unwrap()).unwrap();
    let to = std::net::SocketAddr::new(address(&case["destination"]["ip"]), port);
    Connection::new(identity, address(&peer["ip"]), to)
}

fn decides(case: &Value) -> (bool, String) {
    let (mesh, key, errors) = mesh(case);
    let Some(service) = mesh.http_service(&key) else { return (false, format!("not served: {errors:?}")) };
    let connection = connection(case);
    let wire = &case["request"];
    let text = |f: &str| wire[f].as_str().unwrap_or_default();
    let lower: Vec<(String, String)> = wire["headers"]
        .as_object()
        .into_iter()
        .flatten()
        .flat_map(|(name, value)| {
            let values = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
            let name = name.to_ascii_lowercase();
            values.into_iter().map(move |v| (name.clone(), v.as_str().unwrap().to_owned()))
        })
        .collect();
    let headers: Vec<(&str, &str)> = lower.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let rules = case["policies"].as_array().unwrap().iter().flat_map(|p| p["spec"]["jwtRules"].as_array());
    let delimited = rules.flatten().flat_map(|rule| rule["spaceDelimitedClaims"].as_array()).flatten();
    let delimited: Vec<Box<str>> = delimited.map(|name| name.as_str().unwrap().into()).collect();
    let claims = wire["jwtClaims"].as_object();
    let claims = claims.map(|claims| Claims::new(claims.clone()).with_delimited(&delimited));
    let (raw, query) = text("path").split_once('?').unwrap_or((text("path"), ""));
    let path = if raw.is_empty() { "/".into() } else { normalize(raw, Normalization::Base).unwrap() };
    let forwarded = wire["xForwardedFor"].as_str().and_then(|t| t.rsplit(',').next()?.trim().parse().ok());
    let request = Request {
        query,
        claims: claims.as_ref(),
        sni: wire["sni"].as_str(),
        remote_ip: forwarded.unwrap_or_else(|| connection.source_ip()),
        ..Request::new(text("method"), text("host"), &path, &headers)
    };
    let http = text("protocol") != "tcp";
    let decision = decide_request(&mesh.policies_of(service), &connection, http.then_some(&request));
    let said = decision.outcome.as_ref().map_or_else(ToString::to_string, ToString::to_string);
    (decision.outcome.is_ok() && decision.ask.is_empty(), format!("{said} {errors:?}"))
}

/// What the node of a workload that no waypoint stands before decides of a connection.
fn decides_at_the_node(case: &Value) -> (bool, String) {
    let to = &case["destination"];
    let mut labels = to["labels"].clone();
    labels["istio.io/dataplane-mode"] = json!("ambient");
    let mut objects = case["policies"].as_array().unwrap().clone();
    objects.push(json!({ "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "to", "namespace": to["namespace"], "labels": labels },
        "status": { "podIP": to["ip"] } }));
    let text: String = objects.iter().map(|object| format!("---\n{object}\n")).collect();
    let mut repository = Repository::new(Options::default());
    repository.stage(&"case.yaml".into(), Content::Bytes(text.as_bytes()));
    let mesh = Mesh::default().apply(repository.commit().changes);
    let pod = mesh.workloads().next().unwrap();
    let outcome = mesh.authorize(pod, &connection(case)).outcome;
    (outcome.is_ok(), format!("{outcome:?}"))
}

#[test]
fn requests_are_decided_as_in_istio() {
    let Some(file) = peer::peer_cases("authz-l7.json") else { return };
    let (mut tried, mut wrong) = (0, Vec::new());
    for case in file["cases"].as_array().unwrap() {
        let (allowed, said) = match case["enforcement"].as_str().unwrap() {
            "workload" | "waypoint" | "end-to-end" => decides(case),
            "ztunnel" => decides_at_the_node(case),
            other => panic!("a case for {other}"),
        };
        let id = case["id"].as_str().unwrap();
        tried += 1;
        let otherwise = OTHERWISE.iter().any(|(other, _)| *other == id);
        if (allowed == (case["expect"] == "allow")) == otherwise {
            wrong.push(format!("{id}: expected {}, got {said}", case["expect"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {tried}:\n{}", wrong.len(), wrong.join("\n"));
    let all = file["cases"].as_array().unwrap().len();
    assert!(tried == all && all >= 242, "{tried} of {all}");
}
