//! The decisions over tokens that users who come from Istio expect, read from data that lies beside the checkout (or where
//! `CULVERT_PEER_CASES` says). Without that folder the test says that it is skipped.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use config::compile::Options;
use config::repository::{Content, Repository};
use model::{Mesh, ServiceKey, SpiffeId};
use serde_json::{Value, json};
use waypoint::filters::authorize::{self, Policies};
use waypoint::filters::jwt::{Authenticator, Outcome, Patience};
use waypoint::http::decide::{Connection, Decided};
use waypoint::http::head::RequestHead;
use waypoint::providers::fetch::{Fetch, FetchError, Fetching};
use waypoint::providers::jwks::Jwks;

/// Gives out the keys of the cases, but at the address that has none.
struct Keys(Bytes);

impl Fetch for Keys {
    fn fetch(&self, url: &str, _: Duration) -> Fetching {
        let found = if url.ends_with("/jwks.json") { Ok(self.0.clone()) } else { Err(url.to_owned()) };
        Box::pin(async move { found.map_err(FetchError::Url) })
    }
}

/// A service `b`, its pod, its waypoint, and the policies of a case, which select the pod.
fn mesh(case: &Value) -> Mesh {
    let mut objects = vec![
        json!({ "apiVersion": "v1", "kind": "Service",
                "metadata": { "name": "b", "namespace": "ns1", "labels": { "istio.io/use-waypoint": "waypoint" } },
                "spec": { "clusterIP": "10.200.0.1", "selector": { "app": "b" }, "ports": [{ "port": 80 }] } }),
        json!({ "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
                "metadata": { "name": "waypoint", "namespace": "ns1" },
                "spec": { "gatewayClassName": "istio-waypoint",
                          "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }] } }),
        json!({ "apiVersion": "v1", "kind": "Pod",
                "metadata": { "name": "b-1", "namespace": "ns1",
                              "labels": { "app": "b", "istio.io/dataplane-mode": "ambient" } },
                "spec": { "nodeName": "node-1", "containers": [{ "name": "b" }] },
                "status": { "phase": "Running", "podIP": "10.0.0.9", "podIPs": [{ "ip": "10.0.0.9" }],
                            "conditions": [{ "type": "Ready", "status": "True" }] } }),
    ];
    objects.extend(case["policies"].as_array().unwrap().iter().cloned());
    let mut text = String::new();
    for object in &objects {
        writeln!(text, "---\n{object}").unwrap();
    }
    let mut repository = Repository::new(Options::default());
    repository.stage(&"case.yaml".into(), Content::Bytes(text.as_bytes()));
    Mesh::default().apply(repository.commit().changes)
}

/// The policies for what reaches the service, with those of its workloads.
fn policies(mesh: &Mesh, service: &model::http::HttpService) -> Policies {
    let held = |keys: &[model::PolicyKey]| {
        keys.iter().map(|key| mesh.http_policy(key).cloned().ok_or_else(|| key.clone())).collect()
    };
    let sets = service.selected.iter().map(|set| held(set));
    Policies(std::iter::once(held(&service.policies)).chain(sets).collect())
}

/// The status, and what of the request reaches the service.
fn answered(
    case: &Value,
    jwks: &Value,
    runtime: &tokio::runtime::Runtime,
) -> (u16, BTreeMap<String, String>) {
    let mesh = mesh(case);
    let key = ServiceKey { namespace: "ns1".into(), hostname: "b.ns1.svc.cluster.local".into() };
    let service = mesh.http_service(&key).expect("the service is bound to the waypoint");
    let keys = Arc::new(Jwks::new(Arc::new(Keys(jwks.to_string().into())), runtime.handle().clone()));
    keys.follow(&mesh);
    runtime.block_on(keys.tried());
    let authenticator = Authenticator::new(keys, 16);
    let wire = &case["request"];
    let mut head = RequestHead::default();
    head.set_method(wire["method"].as_str().unwrap());
    head.set_authority("b");
    head.set_target(wire["path"].as_str().unwrap());
    for (name, value) in wire["headers"].as_object().unwrap() {
        head.fields.push(name.as_bytes(), value.as_str().unwrap().as_bytes());
    }
    let client: SpiffeId = "spiffe://cluster.local/ns/ns1/sa/a".parse().unwrap();
    let connection = Connection {
        client: "10.0.0.8:4000".parse().unwrap(),
        destination: "10.200.0.1:80".parse().unwrap(),
        identity: Some(Arc::new(client)),
        server_name: None,
        secure: false,
        said: None,
    };
    let mut decided = Decided::default();
    match authenticator.authenticate(&mesh, service, &mut head, Patience::Spent) {
        Outcome::Passed(claims) => decided.claims = claims,
        Outcome::Refused(response, _) => return (response.status, BTreeMap::new()),
        Outcome::Wait(_) => panic!("it waits"),
    }
    if let Err(response) = authorize::apply(&policies(&mesh, service), &head, &connection, &mut decided) {
        return (response.status, BTreeMap::new());
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (200, head.fields.iter().map(|(name, value)| (text(name).to_ascii_lowercase(), text(value))).collect())
}

#[test]
fn tokens_are_taken_and_refused_as_in_istio() {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/peer-cases");
    let folder = std::env::var_os("CULVERT_PEER_CASES").map_or(beside, PathBuf::from);
    if !folder.is_dir() {
        eprintln!("skipped: no peer cases (set CULVERT_PEER_CASES to their folder)");
        return;
    }
    let file: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("requestauthn.json")).unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (mut tried, mut wrong) = (0, Vec::new());
    for case in file["cases"].as_array().unwrap() {
        tried += 1;
        let (status, headers) = answered(case, &file["jwks"], &runtime);
        if case["expectStatus"] != status {
            wrong.push(format!("{}: {status} instead of {}", case["id"], case["expectStatus"]));
        }
        for (name, wanted) in case["expectUpstreamHeaders"].as_object().into_iter().flatten() {
            let got = headers.get(name).map_or("", String::as_str);
            if *wanted != got {
                wrong.push(format!("{}: {name} is {got:?} instead of {wanted}", case["id"]));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {tried}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(tried >= 18);
}
