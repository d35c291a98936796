//! Istio's own L4 decisions, from AuthorizationPolicies as its users write them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::net::SocketAddr;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::{Connection, Mesh, SpiffeId};
use serde_json::{Value, json};

mod peer;
use peer::peer_cases;

/// The cases that cannot be written as resources, and why.
const LEFT_OUT: &[(&str, &str)] =
    &[("rbac_empty_policy-0", "a match without fields: an empty source or operation is no valid resource")];

/// The one case of an identity that no API server would let in has a `=` in it, and our identities neither.
fn text(value: &Value) -> String {
    value.as_str().unwrap().replace('=', "-")
}

fn connection(c: &Value) -> Connection {
    let identity = c["srcIdentity"].as_object().map(|id| {
        SpiffeId::new(
            text(&id["trustDomain"]).parse().unwrap(),
            text(&id["namespace"]).into(),
            text(&id["serviceAccount"]).into(),
        )
        .unwrap()
    });
    let address = |f: &str| c[f].as_str().unwrap().parse::<SocketAddr>().unwrap();
    Connection::new(identity, address("src").ip(), address("dst"))
}

#[test]
fn policies_decide_as_in_istio() {
    let Some(file) = peer_cases("authz-l4.json") else { return };
    let (mut tried, mut wrong, mut left_out) = (0, Vec::new(), 0);
    for case in file["cases"].as_array().unwrap() {
        let id = case["id"].as_str().unwrap();
        let Some(policies) = case["authorizationPolicies"].as_array() else {
            assert!(LEFT_OUT.iter().any(|(l, _)| *l == id), "{id} has no resources");
            left_out += 1;
            continue;
        };
        let connection = connection(&case["connection"]);
        let namespace = case["destinationWorkload"]["namespace"].as_str().unwrap_or("namespace");
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "to", "namespace": namespace},
            // A loopback address, which some cases have, is no pod's; no policy of theirs asks for it.
            "status": {"podIP": "10.255.0.1"},
        });
        let document = |resource: &Value| {
            let mut resource = resource.clone();
            // The cases' names have characters that Kubernetes allows in no name.
            resource["metadata"]["name"] = text(&resource["metadata"]["name"]).replace('_', "-").into();
            format!("---\n{}\n", resource.to_string().replace('=', "-"))
        };
        let documents: Vec<String> = policies.iter().chain([&pod]).map(document).collect();
        let mut repository = Repository::new(Options::default());
        let outcome = repository.apply(&"case.yaml".into(), Content::Bytes(documents.concat().as_bytes()));
        assert!(!repository.has_bad_files(), "{id}: {:?}", repository.diagnostics());
        let mesh = Mesh::default().apply(outcome.changes);
        let to = mesh.workloads().next().unwrap();
        let got = mesh.authorize(to, &connection).outcome;
        let expected = match &case["expect"] {
            Value::Bool(matches) => *matches,
            text => text == "allow",
        };
        tried += 1;
        if got.is_ok() != expected {
            wrong.push(format!("{id}: expected {expected}, got {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried > 20 && left_out == LEFT_OUT.len(), "{tried} tried, {left_out} left out");
}
