//! Admission reviews: what is refused and why, what is admitted with a warning, and the port that answers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod mesh;

use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
use config::compile::Options;
use config::policy::MeshConfig;
use control_plane::in_force::InForce;
use control_plane::webhook::{MUTATION_PATH, PATH, Webhook, limits, mutate, review};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use mesh::Root;
use process::http::{Routes, serve_secured};
use process::metrics::Registry as Metrics;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};

fn ask(operation: &str, group: &str, kind: &str, object: &Value, old: &Value) -> Vec<u8> {
    serde_json::to_vec(&json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "42", "kind": { "group": group, "version": "v1", "kind": kind },
            "resource": { "group": group, "version": "v1", "resource": "x" },
            "operation": operation, "namespace": "shop", "name": "p", "object": object, "oldObject": old,
            "userInfo": { "username": "somebody" }, "dryRun": false,
        },
    }))
    .unwrap()
}

fn policy(spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "p", "namespace": "shop" }, "spec": spec,
    })
}

fn review(operation: &str, object: &Value, old: &Value) -> Value {
    let body = ask(operation, "security.istio.io", "AuthorizationPolicy", object, old);
    let reviewed = review::answer(&body, &Options::default(), None).unwrap();
    let answer: Value = serde_json::from_slice(&reviewed.body).unwrap();
    assert_eq!(answer["kind"], "AdmissionReview");
    assert_eq!(answer["response"]["uid"], "42");
    assert_eq!(answer["response"]["allowed"], reviewed.allowed);
    answer["response"].clone()
}

fn message(response: &Value) -> &str {
    response["status"]["message"].as_str().unwrap_or_default()
}

#[test]
fn what_no_state_of_the_cluster_could_enforce_is_refused_with_reason_and_remedy() {
    let typo = review("CREATE", &policy(&json!({ "acton": "DENY", "rules": [{}] })), &Value::Null);
    assert_eq!(typo["allowed"], false);
    assert_eq!((&typo["status"]["code"], &typo["status"]["reason"]), (&json!(422), &json!("Invalid")));
    assert!(message(&typo).contains("spec.acton"), "{typo}");
    assert!(message(&typo).contains("did you mean action?"), "{typo}");
    let bad = policy(&json!({ "rules": [{ "from": [{ "source": { "ipBlocks": ["10.0.0.0/99"] } }] }] }));
    let bad = review("CREATE", &bad, &Value::Null);
    assert_eq!(bad["allowed"], false);
    assert!(message(&bad).contains("ipBlocks"), "{bad}");
    // What follows from the errors is not said again.
    assert!(!message(&bad).contains("fails-closed"), "{bad}");
}

#[test]
fn what_waits_for_something_is_admitted_with_a_warning() {
    let http = policy(&json!({ "rules": [{ "to": [{ "operation": { "methods": ["GET"] } }] }] }));
    let response = review("CREATE", &http, &Value::Null);
    assert_eq!(response["allowed"], true);
    assert!(response["warnings"][0].as_str().unwrap().contains("waypoint"), "{response}");
    let plain = policy(&json!({ "rules": [{ "from": [{ "source": { "namespaces": ["a"] } }] }] }));
    let response = review("CREATE", &plain, &Value::Null);
    assert_eq!(response["allowed"], true);
    assert_eq!(response.get("warnings"), None, "{response}");
}

#[test]
fn a_name_that_the_server_makes_later_is_no_error() {
    let mut object = policy(&json!({ "rules": [{}] }));
    object["metadata"] = json!({ "generateName": "p-" });
    assert_eq!(review("CREATE", &object, &Value::Null)["allowed"], true);
}

#[test]
fn what_was_bad_before_may_be_labelled_and_deleted() {
    let mut bad = policy(&json!({ "acton": "DENY", "rules": [{}] }));
    let old = bad.clone();
    bad["metadata"]["labels"] = json!({ "a": "b" });
    let response = review("UPDATE", &bad, &old);
    assert_eq!(response["allowed"], true);
    assert!(response["warnings"][0].as_str().unwrap().contains("spec.acton"), "{response}");
    bad["spec"]["another"] = json!(1);
    assert_eq!(review("UPDATE", &bad, &old)["allowed"], false);
    bad["metadata"]["deletionTimestamp"] = json!("2026-11-20T10:00:00Z");
    assert_eq!(review("UPDATE", &bad, &policy(&json!({})))["allowed"], true);
    assert_eq!(review("DELETE", &Value::Null, &bad)["allowed"], true);
}

#[test]
fn kinds_that_are_not_acted_on_are_admitted_and_told() {
    let body = ask("CREATE", "networking.istio.io", "Sidecar", &json!({}), &Value::Null);
    let reviewed = review::answer(&body, &Options::default(), None).unwrap();
    assert!(reviewed.allowed);
    assert!(String::from_utf8(reviewed.body).unwrap().contains("Sidecar is not acted on"));
}

#[test]
fn kinds_that_nothing_could_enforce_are_refused_with_what_does_their_job() {
    for (group, kind) in [("networking.istio.io", "EnvoyFilter"), ("extensions.istio.io", "WasmPlugin")] {
        let body = ask("CREATE", group, kind, &json!({}), &Value::Null);
        let reviewed = review::answer(&body, &Options::default(), None).unwrap();
        assert!(!reviewed.allowed);
        assert!(String::from_utf8(reviewed.body).unwrap().contains("CUSTOM"));
    }
}

#[test]
fn what_is_no_review_is_answered_as_such() {
    for body in [
        &b"{"[..],
        b"{}",
        b"[]",
        br#"{"apiVersion": "admission.k8s.io/v1beta1"}"#,
        b"\xff",
        br#"{"apiVersion": "admission.k8s.io/v1", "request": {"uid": 3}}"#,
    ] {
        assert!(review::answer(body, &Options::default(), None).is_err());
    }
    // An object of a strange form is refused, not an error of ours.
    for object in
        [json!(null), json!([]), json!("text"), json!({ "metadata": 3 }), json!({ "spec": [[[[]]]] })]
    {
        assert_eq!(review("CREATE", &object, &Value::Null)["allowed"], false, "{object}");
    }
}

/// What an object is after the changes, and what was said of them.
fn mutated(operation: &str, group: &str, kind: &str, object: &Value) -> (Value, Value) {
    let answer = mutate::answer(&ask(operation, group, kind, object, &Value::Null)).unwrap();
    let review: Value = serde_json::from_slice(&answer.body).unwrap();
    let response = &review["response"];
    assert_eq!((&response["uid"], &response["allowed"]), (&json!("42"), &json!(true)));
    let mut object = object.clone();
    assert_eq!(answer.changed.is_some(), response.get("patch").is_some());
    if let Some(patch) = response["patch"].as_str() {
        assert_eq!(response["patchType"], "JSONPatch");
        let patch = base64::engine::general_purpose::STANDARD.decode(patch).unwrap();
        for step in serde_json::from_slice::<Value>(&patch).unwrap().as_array().unwrap() {
            let (above, name) = step["path"].as_str().unwrap().rsplit_once('/').unwrap();
            let above = object.pointer_mut(above).unwrap().as_object_mut().unwrap();
            let name = name.replace("~1", "/").replace("~0", "~");
            match step["op"].as_str().unwrap() {
                "add" => assert_eq!(above.insert(name, step["value"].clone()), None),
                "remove" => assert!(above.remove(&name).is_some()),
                other => panic!("{other}"),
            }
        }
    }
    (object, response["warnings"].clone())
}

#[test]
fn a_pod_that_is_made_of_another_is_not_taken_for_captured() {
    let annotation = "ambient.istio.io/redirection";
    let restored = json!({ "metadata": { "annotations": { annotation: "enabled", "kept": "a" } } });
    let (pod, said) = mutated("CREATE", "", "Pod", &restored);
    assert_eq!(pod, json!({ "metadata": { "annotations": { "kept": "a" } } }));
    assert!(said[0].as_str().unwrap().contains("agent"), "{said}");
    // The agent's own writing stays, and pods without it are as they are.
    assert_eq!(mutated("UPDATE", "", "Pod", &restored).0, restored);
    for plain in [json!({}), json!({ "metadata": { "annotations": { "kept": "a" } } })] {
        assert_eq!(mutated("CREATE", "", "Pod", &plain), (plain.clone(), Value::Null));
    }
}

#[test]
fn defaults_are_written_in_where_nothing_is_set_and_nowhere_else() {
    let policies = ("security.istio.io", "AuthorizationPolicy");
    for operation in ["CREATE", "UPDATE"] {
        let (object, said) = mutated(operation, policies.0, policies.1, &policy(&json!({ "rules": [{}] })));
        assert_eq!(object["spec"], json!({ "rules": [{}], "action": "ALLOW" }));
        assert_eq!(said, Value::Null);
    }
    let entry = json!({ "spec": { "hosts": ["a.example"], "resolution": "DNS" } });
    let (entry, _) = mutated("CREATE", "networking.istio.io", "ServiceEntry", &entry);
    let whole = json!({ "hosts": ["a.example"], "resolution": "DNS", "location": "MESH_EXTERNAL" });
    assert_eq!(entry["spec"], whole);
    // What is set stays, also if it is wrong; half an object is not filled; others are left alone.
    for (group, kind, object) in [
        (policies.0, policies.1, policy(&json!({ "action": "MAYBE" }))),
        (policies.0, policies.1, policy(&json!({ "action": null }))),
        (policies.0, policies.1, json!({ "metadata": {} })),
        (policies.0, policies.1, json!({ "spec": [] })),
        (policies.0, "PeerAuthentication", json!({ "spec": {} })),
        ("other.example", "AuthorizationPolicy", json!({ "spec": {} })),
    ] {
        assert_eq!(mutated("CREATE", group, kind, &object).0, object, "{group} {kind}");
    }
    // What is put right means the same: the review finds the same in it.
    let bare = policy(&json!({ "rules": [{ "to": [{ "operation": { "methods": ["GET"] } }] }] }));
    let (filled, _) = mutated("CREATE", policies.0, policies.1, &bare);
    assert_eq!(review("CREATE", &filled, &Value::Null), review("CREATE", &bare, &Value::Null));
}

#[test]
fn objects_are_reviewed_by_the_settings_in_force() {
    let custom = policy(&json!({ "action": "CUSTOM", "provider": { "name": "opa" }, "rules": [{}] }));
    let warnings = |settings: Option<&MeshConfig>| {
        let body = ask("CREATE", "security.istio.io", "AuthorizationPolicy", &custom, &Value::Null);
        let reviewed = review::answer(&body, &Options::default(), settings).unwrap();
        assert!(reviewed.allowed);
        let answer: Value = serde_json::from_slice(&reviewed.body).unwrap();
        answer["response"]["warnings"].to_string()
    };
    assert!(warnings(None).contains("no provider opa"), "{}", warnings(None));
    let text = "extensionProviders: [{name: opa, envoyExtAuthzGrpc: {service: opa.a.svc.cluster.local, port: 9191}}]";
    let (mut registry, _) = mesh::registry();
    mesh::first_lists(&mut registry, &[], Some(text));
    let in_force = registry.in_force().borrow().clone();
    let said = warnings(in_force.settings.as_deref());
    assert!(said.contains("waypoint") && !said.contains("no provider"), "{said}");
}

#[tokio::test]
async fn the_port_answers_over_tls_under_the_meshs_root() {
    let (root, metrics) = (Root::new(), Metrics::new());
    let routes = Arc::new(Webhook::new(Options::default(), watch::channel(InForce::default()).1, &metrics))
        .routes(Routes::new("test"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(root.server_config(&[b"http/1.1"]));
    let secure = move |stream| {
        let acceptor = acceptor.clone();
        async move { acceptor.accept(stream).await }
    };
    tokio::spawn(serve_secured(listener, secure, routes, limits()));
    let post_to = async |path: &str, body: Vec<u8>| {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = TlsConnector::from(root.client_config()).connect(name, stream).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::post(format!("{path}?timeout=10s")).header("host", "x");
        let response =
            sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    };
    let post = async |body| post_to(PATH, body).await;
    let bad = policy(&json!({ "acton": "DENY" }));
    let body = ask("CREATE", "security.istio.io", "AuthorizationPolicy", &bad, &Value::Null);
    let (status, answer) = post(body).await;
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_slice::<Value>(&answer).unwrap()["response"]["allowed"], false);
    assert_eq!(post(b"nonsense".to_vec()).await.0, 400);
    assert_eq!(post(vec![b' '; 9 << 20]).await.0, 413);
    let bare = ask("CREATE", "security.istio.io", "AuthorizationPolicy", &policy(&json!({})), &Value::Null);
    let (status, answer) = post_to(MUTATION_PATH, bare).await;
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_slice::<Value>(&answer).unwrap()["response"]["patchType"], "JSONPatch");
    assert_eq!(post_to(MUTATION_PATH, b"nonsense".to_vec()).await.0, 400);
    let text = metrics.encode(process::metrics::Format::negotiate(None));
    assert!(text.contains(r#"galley_validation_failed_total{resource="AuthorizationPolicy"} 1"#), "{text}");
    // In plaintext there is no answer.
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}
