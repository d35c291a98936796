//! The custom resource definitions on a real API server, without anybody who reviews objects: what they refuse by
//! themselves, and which of another mesh, or another version, an installation leaves alone.

use serde_json::{Value, json};

use super::{Server, policy};

pub fn are_held_to_their_rules(server: &Server) {
    server
        .apply(&json!({"apiVersion": "v1", "kind": "Namespace",
                         "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}}))
        .unwrap();
    // A field that nobody knows is kept, so that it can be refused by name.
    let typo = json!({"rules": [{"from": [{"source": {"principal": ["a"]}}]}]});
    server.apply(&policy("typo", &typo)).unwrap();
    let stored = server.kubectl(&["-n", "shop", "get", "ap", "typo", "-o", "jsonpath={.spec}"]);
    assert!(String::from_utf8_lossy(&stored.stdout).contains("principal"), "the field was pruned");
    rules(server);
}

fn object(version: &str, kind: &str, spec: &Value) -> Value {
    json!({"apiVersion": version, "kind": kind, "metadata": {"name": "tried", "namespace": "shop"}, "spec": spec})
}

/// For every kind what is refused, with words of the refusal, and the same put right.
fn rules(server: &Server) {
    let cases: Vec<Value> = serde_json::from_str(include_str!("cases/definitions.json")).unwrap();
    let text = |case: &Value, field: &str| case[field].as_str().unwrap().to_owned();
    let mut kinds: Vec<_> = cases.iter().map(|case| text(case, "kind")).collect();
    kinds.dedup();
    assert_eq!(kinds.len(), 15, "every kind has a rule");
    for case in &cases {
        let (version, kind, words) = (text(case, "version"), text(case, "kind"), text(case, "words"));
        let error = server.apply(&object(&version, &kind, &case["wrong"])).expect_err(&kind);
        assert!(error.contains(&words), "{kind}: {error}");
        server
            .apply(&object(&version, &kind, &case["right"]))
            .unwrap_or_else(|error| panic!("{kind}: {error}"));
        let plural = kind.to_lowercase();
        let group = version.split('/').next().unwrap();
        let output = server.kubectl(&["-n", "shop", "delete", &format!("{plural}.{group}"), "tried"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn definition(server: &Server, name: &str) -> Value {
    let output = server.kubectl(&["get", "crd", name, "-o", "json"]);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn replace(server: &Server, definition: &Value) {
    let file = server.path("definition.json");
    std::fs::write(&file, definition.to_string()).unwrap();
    let output = server.kubectl(&["replace", "-f", &file]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn each_version(definition: &mut Value, mut change: impl FnMut(&mut Value)) {
    let versions = definition["spec"]["versions"].as_array_mut().unwrap();
    versions
        .iter_mut()
        .for_each(|version| change(&mut version["schema"]["openAPIV3Schema"]["properties"]["spec"]));
}

/// As an upstream definition has it: fields that it does not know are dropped.
fn pruning(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("x-kubernetes-preserve-unknown-fields");
            map.values_mut().for_each(pruning);
        }
        Value::Array(all) => all.iter_mut().for_each(pruning),
        _ => {}
    }
}

pub fn of_other_versions_are_left_alone(server: &Server) {
    // One of ours that is newer stays as it is, with what it has and this version does not know; an older one goes.
    let mut newer = definition(server, "sidecars.networking.istio.io");
    newer["metadata"]["annotations"]["culvert.dev/crd-version"] = "99".into();
    each_version(&mut newer, |spec| spec["properties"]["fromTheFuture"] = json!({"type": "string"}));
    replace(server, &newer);
    let mut older = definition(server, "gateways.networking.istio.io");
    older["metadata"]["annotations"]["culvert.dev/crd-version"] = "1".into();
    each_version(&mut older, |spec| {
        spec["properties"].as_object_mut().unwrap().remove("servers");
    });
    replace(server, &older);
    // Another mesh's: a newer one, with a field that nobody here knows, and one that is old, and loses nothing that counts.
    let mut foreign = definition(server, "authorizationpolicies.security.istio.io");
    foreign["metadata"]["annotations"].as_object_mut().unwrap().remove("culvert.dev/crd-version");
    each_version(&mut foreign, |spec| {
        pruning(spec);
        spec["properties"]["fromTheFuture"] = json!({"type": "string"});
    });
    replace(server, &foreign);
    let mut telemetry = definition(server, "telemetries.telemetry.istio.io");
    telemetry["metadata"]["annotations"].as_object_mut().unwrap().remove("culvert.dev/crd-version");
    replace(server, &telemetry);
    let words = [
        "left sidecars.networking.istio.io as it is: newer",
        "left authorizationpolicies.security.istio.io as it is",
        "left telemetries.telemetry.istio.io",
        "applied 1 custom",
    ];
    server.expect(1, &words, &["upgrade", "--timeout", "1s"]);
    for name in ["sidecars.networking.istio.io", "authorizationpolicies.security.istio.io"] {
        let text = definition(server, name)["spec"].to_string();
        assert!(text.contains("fromTheFuture"), "{name} was replaced");
    }
    let gateways = definition(server, "gateways.networking.istio.io");
    assert!(gateways["spec"].to_string().contains("credentialName"), "the older one was left");
    a_policy_of_the_future_is_not_read_as_one_of_today(server);

    // Too old for a restriction: it would vanish when it is written.
    let whole = definition(server, "authorizationpolicies.security.istio.io");
    let mut old = whole.clone();
    each_version(&mut old, |spec| {
        let source =
            &mut spec["properties"]["rules"]["items"]["properties"]["from"]["items"]["properties"]["source"];
        for field in ["serviceAccounts", "notServiceAccounts"] {
            source["properties"].as_object_mut().unwrap().remove(field);
        }
        source.as_object_mut().unwrap().remove("x-kubernetes-validations");
    });
    replace(server, &old);
    let words =
        ["spec.rules.from.source.serviceAccounts", "drops", "update them with the mesh that they belong to"];
    server.expect(2, &words, &["upgrade", "--timeout", "1s"]);
    let after = definition(server, "authorizationpolicies.security.istio.io");
    assert!(!after["spec"].to_string().contains("notServiceAccounts"), "it was replaced");
    let mut whole = whole;
    whole["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    whole["metadata"]["annotations"]["culvert.dev/crd-version"] = "1".into();
    replace(server, &whole);
    server.expect(1, &["applied 1 custom"], &["upgrade", "--timeout", "1s"]);
}

/// The API server takes a field that its newer definition has; who reads the object says that it is not known.
fn a_policy_of_the_future_is_not_read_as_one_of_today(server: &Server) {
    let mut known = false;
    for _ in 0..100 {
        // A definition that has changed takes a moment to be in force.
        server.apply(&policy("future", &json!({"fromTheFuture": "a", "rules": [{}]}))).unwrap_or_default();
        let output =
            server.kubectl(&["-n", "shop", "get", "ap", "future", "-o", "jsonpath={.spec.fromTheFuture}"]);
        known = output.stdout == b"a";
        if known {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(known, "the newer definition is not in force");
    server.expect(1, &["unknown-field", "fromTheFuture", "AuthorizationPolicy shop/future"], &["analyze"]);
    let output = server.kubectl(&["-n", "shop", "delete", "ap", "future"]);
    assert!(output.status.success());
}
