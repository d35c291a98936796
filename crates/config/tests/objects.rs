//! Objects of a server: decoding only what is read of them, and staging them one by one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::cell::RefCell;
use std::sync::Arc;

use config::compile::{Options, Origin};
use config::diagnostic::Code;
use config::json::{Decoded, ObjectSeed};
use config::repository::{Content, ObjectContent, Outcome, Repository};
use config::resource::Kind;
use model::{Change, TunnelProtocol};
use serde::de::DeserializeSeed;
use serde_json::{Value, json};

fn decode(kind: Kind, object: &Value) -> (Decoded, Vec<String>) {
    let unknown = RefCell::new(Vec::new());
    let note = |schema: &'static str, key: &str| unknown.borrow_mut().push(format!("{schema}.{key}"));
    let decoded = ObjectSeed { kind, unknown: &note }.deserialize(object).unwrap();
    (decoded, unknown.into_inner())
}

fn options(origin: Origin) -> Options {
    Options { origin, ..Options::default() }
}

/// A repository, and a step of it with one object.
struct Server(Repository);

impl Server {
    fn new() -> Self {
        Self(Repository::new(options(Origin::Cluster)))
    }

    fn stage(&mut self, kind: Kind, object: &Value) -> Arc<str> {
        let (decoded, _) = decode(kind, object);
        let name = format!("{} {}/{}", kind.name(), decoded.metadata("namespace"), decoded.metadata("name"));
        let origin: Arc<str> = name.into();
        let version = &decoded.bookkeeping.resource_version;
        self.0.stage_object(&origin, ObjectContent::Node { node: &decoded.node, version, text: "" });
        origin
    }

    fn set(&mut self, kind: Kind, object: &Value) -> Outcome {
        self.stage(kind, object);
        self.0.commit()
    }

    fn remove(&mut self, origin: &str) -> Outcome {
        self.0.stage_object(&origin.into(), ObjectContent::Gone);
        self.0.commit()
    }

    fn codes(&self, origin: &str) -> Vec<Code> {
        self.0.about(origin).iter().map(|d| d.code).collect()
    }
}

/// A pod as an API server writes it, with all that nobody reads.
fn pod(name: &str, redirection: &str, version: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "generateName": "web-",
            "namespace": "shop",
            "uid": "b0a6a0a8-1111-4222-8333-444455556666",
            "resourceVersion": version,
            "generation": 1,
            "creationTimestamp": "2026-11-20T10:00:00Z",
            "labels": { "app": "web", "pod-template-hash": "5f6d8", "istio.io/dataplane-mode": "ambient" },
            "annotations": { "ambient.istio.io/redirection": redirection, "example.org/large": "x".repeat(5000) },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5f6d8", "uid": "1",
                "controller": true, "blockOwnerDeletion": true,
            }],
            "managedFields": [{ "manager": "kubelet", "fieldsV1": { "f:status": { "f:phase": {} } } }],
        },
        "spec": {
            "volumes": [{ "name": "token", "projected": { "sources": [{ "serviceAccountToken": {} }] } }],
            "containers": [{
                "name": "web", "image": "web:1", "env": [{ "name": "A", "value": "b" }],
                "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" }],
                "resources": { "limits": { "cpu": "1" } },
                "livenessProbe": { "httpGet": { "path": "/", "port": 8080 } },
            }],
            "serviceAccountName": "web", "serviceAccount": "web", "nodeName": "node1",
            "tolerations": [{ "key": "a", "operator": "Exists", "tolerationSeconds": 300 }],
            "priority": 0,
        },
        "status": {
            "phase": "Running", "podIP": "10.0.0.7", "podIPs": [{ "ip": "10.0.0.7" }],
            "conditions": [{ "type": "Ready", "status": "True", "lastProbeTime": null }],
            "containerStatuses": [{ "name": "web", "ready": true, "state": { "running": {} } }],
        },
    })
}

/// One object of each kind of Kubernetes, and a policy, with what nobody reads.
fn objects() -> Vec<(Kind, Value)> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "web", "namespace": "shop", "resourceVersion": "5", "managedFields": [] },
        "spec": {
            "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5"], "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster", "type": "ClusterIP",
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": { "clientIP": { "timeoutSeconds": 60 } },
            "selector": { "app": "web" },
            "ports": [{ "name": "http", "port": 80, "targetPort": "http", "protocol": "TCP" }],
        },
        "status": { "loadBalancer": {} },
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": "ext-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" },
        },
        "addressType": "IPv4",
        "endpoints": [{
            "addresses": ["192.0.2.1"], "conditions": { "ready": true, "serving": true, "terminating": false },
            "nodeName": "node1", "zone": "z1",
        }],
        "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
    });
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": "node1", "labels": { "topology.kubernetes.io/zone": "z1" } },
        "spec": { "podCIDR": "10.0.0.0/24" },
        "status": {
            "capacity": { "cpu": "4" },
            "conditions": [{ "type": "Ready", "status": "True", "lastHeartbeatTime": "2026-11-21T10:00:00Z" }],
        },
    });
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": "shop", "labels": { "istio.io/dataplane-mode": "ambient" } },
        "spec": { "finalizers": ["kubernetes"] }, "status": { "phase": "Active" },
    });
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "p", "namespace": "shop", "generation": 4, "managedFields": [{ "manager": "x" }] },
        "spec": {
            "selector": { "matchLabels": { "app": "web" } }, "action": "DENY",
            "rules": [{ "from": [{ "source": { "namespaces": ["a"], "notIpBlocks": ["10.0.0.0/8"] } }],
                        "to": [{ "operation": { "ports": ["8080"] } }] }],
        },
        "status": { "conditions": [{ "type": "Enforced" }] },
    });
    vec![
        (Kind::Namespace, namespace),
        (Kind::Node, node),
        (Kind::Service, service),
        (Kind::EndpointSlice, slice),
        (Kind::AuthorizationPolicy, policy),
        (Kind::Pod, pod("web-1", "enabled", "7")),
    ]
}

#[test]
fn what_is_pruned_changes_nothing_of_what_is_read() {
    let objects = objects();
    let (mut pruned, mut whole) = (Server::new(), Repository::new(options(Origin::Cluster)));
    for (kind, object) in &objects {
        let (_, unknown) = decode(*kind, object);
        assert!(unknown.is_empty(), "{unknown:?}");
        pruned.stage(*kind, object);
        let path: Arc<str> = format!("{}.json", kind.name()).into();
        whole.stage(&path, Content::Bytes(&serde_json::to_vec(object).unwrap()));
    }
    let (pruned, whole) = (pruned.0.commit(), whole.commit());
    let text = |outcome: &Outcome| {
        let mut lines: Vec<String> = outcome.changes.iter().map(|c| format!("{c:?}")).collect();
        lines.sort();
        lines
    };
    assert_eq!(text(&pruned), text(&whole));
    let said = |outcome: &Outcome| {
        let mut said: Vec<_> =
            outcome.diagnostics.iter().map(|d| (d.code, d.field.clone(), d.message.clone())).collect();
        said.sort();
        said
    };
    assert_eq!(said(&pruned), said(&whole));
    assert!(pruned.changes.len() >= 4);
}

#[test]
fn what_nobody_reads_is_not_kept() {
    let (decoded, _) = decode(Kind::Pod, &pod("web-1", "enabled", "7"));
    let kept = format!("{:?}", decoded.node);
    for dropped in ["managedFields", "volumes", "livenessProbe", "containerStatuses", "tolerations", "env"] {
        assert!(!kept.contains(dropped), "{dropped}");
    }
    assert_eq!(decoded.bookkeeping.resource_version, "7");
    assert_eq!(decoded.bookkeeping.generation, 1);
    assert!(decoded.bookkeeping.uid.starts_with("b0a6"));
    assert_eq!(decoded.label("app"), Some("web"));
}

#[test]
fn items_of_lists_get_their_type() {
    let mut item = pod("web-1", "enabled", "7");
    item.as_object_mut().unwrap().remove("kind");
    item.as_object_mut().unwrap().remove("apiVersion");
    let mut server = Server::new();
    let outcome = server.set(Kind::Pod, &item);
    assert!(outcome.diagnostics.is_empty(), "{:?}", outcome.diagnostics);
    assert_eq!(server.0.object_count(), 1);
}

#[test]
fn a_newer_servers_fields_are_told_and_left_out_but_not_of_policies() {
    let mut newer = pod("web-1", "enabled", "7");
    newer["spec"]["teleport"] = json!({ "to": "mars" });
    newer["metadata"]["shard"] = json!(3);
    let (_, unknown) = decode(Kind::Pod, &newer);
    assert_eq!(unknown, ["metadata.shard", "Pod.spec.teleport"]);
    let mut server = Server::new();
    assert!(server.set(Kind::Pod, &newer).diagnostics.is_empty());
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "p", "namespace": "shop", "shard": 3 },
        "spec": { "action": "ALLOW", "rules": [], "onlyOnSundays": true },
    });
    let outcome = server.set(Kind::AuthorizationPolicy, &policy);
    assert_eq!(outcome.diagnostics[0].code, Code::UnknownField);
    assert!(outcome.diagnostics[0].message.contains("onlyOnSundays"));
}

#[test]
fn the_nodes_agent_decides_whether_a_pod_is_in_the_mesh() {
    let mut server = Server::new();
    let tunnel = |outcome: &Outcome| {
        outcome.changes.iter().find_map(|change| match change {
            Change::SetWorkload(workload) => Some(workload.tunnel),
            _ => None,
        })
    };
    assert_eq!(tunnel(&server.set(Kind::Pod, &pod("a", "pending", "1"))), Some(TunnelProtocol::None));
    assert_eq!(tunnel(&server.set(Kind::Pod, &pod("a", "enabled", "2"))), Some(TunnelProtocol::Hbone));
    assert_eq!(tunnel(&server.set(Kind::Pod, &pod("a", "", "3"))), Some(TunnelProtocol::None));
}

#[test]
fn a_version_that_was_taken_costs_nothing() {
    let mut server = Server::new();
    server.set(Kind::Pod, &pod("a", "enabled", "1"));
    let steps = server.0.steps();
    let outcome = server.set(Kind::Pod, &pod("a", "enabled", "1"));
    assert!(outcome.changes.is_empty() && server.0.steps() == steps);
    // Another version with the same content compiles, and changes nothing.
    let outcome = server.set(Kind::Pod, &pod("a", "enabled", "2"));
    assert!(outcome.changes.is_empty() && server.0.steps() > steps);
}

fn policy(rules: &Value, version: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "p", "namespace": "shop", "resourceVersion": version },
        "spec": { "action": "ALLOW", "rules": rules },
    })
}

#[test]
fn a_policy_with_errors_keeps_its_last_good_version_and_fails_closed_without_one_at_any_time() {
    let good = json!([{ "from": [{ "source": { "namespaces": ["a"] } }] }]);
    let bad = json!([{ "form": [] }]);
    let mut server = Server::new();
    server.set(Kind::Pod, &pod("a", "enabled", "1"));
    let origin = "AuthorizationPolicy shop/p";
    // New and bad, long after the first batch: refused is everything in its scope.
    let outcome = server.set(Kind::AuthorizationPolicy, &policy(&bad, "1"));
    let Some(Change::SetPolicy(closed)) = outcome.changes.first() else { panic!("{:?}", outcome.changes) };
    assert_eq!((&closed.action, closed.rules.len()), (&model::Action::Deny, 1));
    assert!(server.codes(origin).contains(&Code::FailsClosed));
    let outcome = server.set(Kind::AuthorizationPolicy, &policy(&good, "2"));
    assert_eq!(outcome.changes.len(), 2);
    assert!(server.codes(origin).is_empty());
    assert!(outcome.touched.contains(origin));
    let outcome = server.set(Kind::AuthorizationPolicy, &policy(&bad, "3"));
    assert!(outcome.changes.is_empty(), "the last good one stays");
    assert!(server.codes(origin).contains(&Code::LastGoodVersion));
    let outcome = server.remove(origin);
    assert!(
        matches!(outcome.changes[..], [Change::RemovePolicy(_), Change::RemoveHttpPolicy(_)]),
        "{:?}",
        outcome.changes
    );
    assert!(server.codes(origin).is_empty());
}

#[test]
fn what_is_deleted_is_gone_whatever_else_cannot_be_taken() {
    let mut server = Server::new();
    server.set(Kind::Pod, &pod("a", "enabled", "1"));
    let settings: Arc<str> = "ConfigMap culvert-system/culvert".into();
    server.0.stage_object(&settings, ObjectContent::Refused(Code::MalformedYaml, "no YAML"));
    let outcome = server.remove("Pod shop/a");
    assert!(outcome.changes.iter().any(|c| matches!(c, Change::RemoveWorkload(_))));
    assert_eq!(server.codes(&settings), [Code::MalformedYaml]);
    server.0.stage_object(&settings, ObjectContent::Gone);
    server.0.commit();
    assert!(server.0.diagnostics().is_empty());
}

#[test]
fn namespaces_are_selected_by_their_labels() {
    let settings = |selectors: &Value| {
        json!({
            "apiVersion": "mesh.istio.io/v1alpha1", "kind": "MeshConfig", "metadata": { "name": "mesh" },
            "spec": { "discoverySelectors": selectors },
        })
    };
    let selectors = json!([
        { "matchLabels": { "mesh": "on" } },
        { "matchExpressions": [
            { "key": "env", "operator": "In", "values": ["prod", "test"] },
            { "key": "off", "operator": "DoesNotExist" },
            { "key": "team", "operator": "Exists" },
            { "key": "kind", "operator": "NotIn", "values": ["toy"] },
        ] },
    ]);
    let mut server = Server::new();
    server.set(Kind::MeshConfig, &settings(&selectors));
    let selected = |labels: &[(&str, &'static str)]| {
        let label = |key: &str| labels.iter().find(|(k, _)| *k == key).map(|(_, v)| *v);
        server.0.discovery().iter().any(|selector| selector.matches(label))
    };
    assert!(selected(&[("mesh", "on")]));
    assert!(!selected(&[("mesh", "off")]));
    assert!(selected(&[("env", "prod"), ("team", "a")]));
    assert!(!selected(&[("env", "prod"), ("team", "a"), ("off", "")]));
    assert!(!selected(&[("env", "prod"), ("team", "a"), ("kind", "toy")]));
    assert!(!selected(&[("env", "dev"), ("team", "a")]));
    let expression = |expression: Value| json!([{ "matchExpressions": [expression] }]);
    for wrong in [
        expression(json!({ "key": "a", "operator": "In" })),
        expression(json!({ "key": "a", "operator": "NotIn", "values": [] })),
        expression(json!({ "key": "a", "operator": "Exists", "values": ["b"] })),
        expression(json!({ "key": "a", "operator": "DoesNotExist", "values": ["b"] })),
        expression(json!({ "key": "a", "operator": "Like", "values": ["b"] })),
        expression(json!({ "operator": "Exists" })),
        json!([{ "matchLabel": {} }]),
    ] {
        let mut server = Server::new();
        let outcome = server.set(Kind::MeshConfig, &settings(&wrong));
        assert!(!outcome.diagnostics.is_empty(), "{wrong}");
    }
    // Where the objects come from a directory it is said that nothing is left out.
    let mut files = Repository::new(options(Origin::Files));
    let text = serde_json::to_vec(&settings(&selectors)).unwrap();
    let outcome = files.apply(&"mesh.json".into(), Content::Bytes(&text));
    assert_eq!(outcome.diagnostics[0].code, Code::FieldNotApplicable);
}

fn mesh_config(version: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "mesh.istio.io/v1alpha1", "kind": "MeshConfig",
        "metadata": { "name": "mesh", "resourceVersion": version }, "spec": spec,
    })
}

#[test]
fn what_a_file_leaves_out_of_an_object_is_what_the_server_gave_it() {
    let text = "\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: web, namespace: shop}
  spec: {selector: {app: web}, ports: [{port: 80}]}
- apiVersion: v1
  kind: Service
  metadata: {name: alias, namespace: shop}
  spec: {type: ExternalName, externalName: a.example}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: web}]}
";
    let service = |name: &str, ip: &str| {
        json!({
            "metadata": { "name": name, "namespace": "shop", "resourceVersion": "1" },
            "spec": { "clusterIP": ip, "clusterIPs": [ip], "ports": [{ "port": 81 }] },
        })
    };
    let mut repository = Repository::new(options(Origin::Cluster));
    for (kind, object) in [
        (Kind::Service, service("web", "10.9.0.1")),
        (Kind::Service, service("alias", "10.9.0.2")),
        (Kind::Pod, pod("web", "enabled", "1")),
    ] {
        repository.assign(decode(kind, &object).0.node);
    }
    let outcome = repository.apply(&"shop.yaml".into(), Content::Bytes(text.as_bytes()));
    let said: Vec<_> = outcome.diagnostics.iter().map(|d| d.code).collect();
    assert_eq!(said, [Code::ExternalName]);
    let mesh = model::Mesh::default().apply(outcome.changes);
    let services: Vec<_> = mesh.services().collect();
    assert_eq!(services.len(), 1, "{services:?}");
    // The address is the server's, the port that of the file.
    assert_eq!(services[0].ports[0].port, 80);
    assert!(format!("{:?}", services[0].vips).contains("10.9.0.1"), "{:?}", services[0].vips);
    assert_eq!(mesh.workloads().count(), 1);
}

#[test]
fn a_policy_learns_that_its_provider_is_defined_and_that_it_is_gone() {
    let mut server = Server::new();
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "p", "namespace": "shop" },
        "spec": { "action": "CUSTOM", "provider": { "name": "opa" }, "rules": [{}] },
    });
    server.set(Kind::AuthorizationPolicy, &policy);
    let origin = "AuthorizationPolicy shop/p";
    assert!(server.codes(origin).contains(&Code::NamesNothing));
    let opa = json!({ "name": "opa", "envoyExtAuthzGrpc": { "service": "opa.shop.svc.cluster.local", "port": 9191 } });
    let outcome = server.set(Kind::MeshConfig, &mesh_config("1", &json!({ "extensionProviders": [opa] })));
    assert!(outcome.touched.contains(origin), "its condition is written anew");
    assert!(!server.codes(origin).contains(&Code::NamesNothing));
    // The settings have it for who asks requests.
    let providers = server.0.mesh_config().unwrap().providers();
    let backend = providers.get("opa").unwrap().backend.as_ref().unwrap();
    assert_eq!((&*backend.host, backend.port), ("opa.shop.svc.cluster.local", 9191));
    // On request it is said that nobody is there.
    let nobody =
        |server: &Server| server.0.review().iter().any(|d| d.message.contains("no service opa.shop.svc"));
    assert!(nobody(&server));
    let service = json!({
        "metadata": { "name": "opa", "namespace": "shop" },
        "spec": { "clusterIP": "10.9.0.1", "clusterIPs": ["10.9.0.1"], "ports": [{ "port": 9191 }] },
    });
    server.set(Kind::Service, &service);
    assert!(!nobody(&server));
    server.set(Kind::MeshConfig, &mesh_config("2", &json!({})));
    assert!(server.codes(origin).contains(&Code::NamesNothing));
}

/// What a review says of a VirtualService without hosts that leads to services of one port and of two.
fn of_a_delegate(route: &str) -> Vec<String> {
    let service = |name: &str, ip: &str, ports: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{clusterIP: {ip}, ports: {ports}}}\n"
        )
    };
    let text = [
        service("web", "10.9.0.1", "[{port: 80}]"),
        service("two", "10.9.0.2", "[{name: a, port: 80}, {name: b, port: 81}]"),
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: part, namespace: shop}\n".into(),
        format!("spec: {{http: [{{route: [{{destination: {route}}}]}}]}}\n"),
    ]
    .concat();
    let mut repository = Repository::new(options(Origin::Files));
    repository.apply(&"shop.yaml".into(), Content::Bytes(text.as_bytes()));
    let said = repository.review().into_iter().filter(|d| d.code == Code::NamesNothing);
    said.map(|d| d.message).collect()
}

#[test]
fn a_delegate_without_a_port_has_that_of_the_request_whatever_it_is() {
    for fine in ["{host: web}", "{host: two}", "{host: two, port: {number: 81}}"] {
        assert!(of_a_delegate(fine).is_empty(), "{fine}: {:?}", of_a_delegate(fine));
    }
    for (wrong, words) in [
        ("{host: none}", "there is no service shop/none.shop.svc.cluster.local"),
        ("{host: two, port: {number: 82}}", "has no port 82"),
        ("{host: two, subset: v1}", "no DestinationRule makes the subset v1"),
    ] {
        assert!(
            of_a_delegate(wrong).iter().any(|m| m.contains(words)),
            "{wrong}: {:?}",
            of_a_delegate(wrong)
        );
    }
}

#[test]
fn the_name_of_the_mesh_is_that_of_its_trust_domain_unless_it_has_its_own() {
    let mut server = Server::new();
    server.set(Kind::MeshConfig, &mesh_config("3", &json!({ "trustDomain": "example.org" })));
    assert_eq!(server.0.settings().mesh_id(), "example.org");
    for (version, field) in [("a", "meshId"), ("b", "mesh_id")] {
        let config =
            json!({ "trustDomain": "example.org", "defaultConfig": { field: "mesh-1", "concurrency": 2 } });
        let outcome = server.set(Kind::MeshConfig, &mesh_config(version, &config));
        assert_eq!(server.0.settings().mesh_id(), "mesh-1", "{:?}", outcome.diagnostics);
        server.set(Kind::MeshConfig, &mesh_config("5", &json!({ "trustDomain": "example.org" })));
    }
    let outcome =
        server.set(Kind::MeshConfig, &mesh_config("6", &json!({ "defaultConfig": { "meshId": "a b" } })));
    assert_eq!(outcome.diagnostics[0].code, Code::InvalidValue);
}

#[test]
fn the_least_version_of_tls_with_others_is_a_setting_of_the_mesh() {
    let mut server = Server::new();
    let mut set = |version: &str, least: &str| {
        let config =
            json!({ "tlsDefaults": { "minProtocolVersion": least, "cipherSuites": ["AES128-SHA"] } });
        let outcome = server.set(Kind::MeshConfig, &mesh_config(version, &config));
        (server.0.settings().tls_minimum, outcome.diagnostics.iter().map(|d| d.code).collect::<Vec<_>>())
    };
    assert_eq!(set("1", "TLS_AUTO"), (model::TlsVersion::V1_2, vec![Code::FieldNotApplicable]));
    assert_eq!(set("2", "TLSV1_3"), (model::TlsVersion::V1_3, vec![]));
    // What can't be done leaves what was in force.
    let (least, codes) = set("3", "TLSV1_1");
    assert_eq!(least, model::TlsVersion::V1_3);
    assert!(codes.contains(&Code::InvalidValue), "{codes:?}");
}

#[test]
fn an_object_that_nests_without_end_is_one_bad_object_and_not_a_list_that_cannot_be_read() {
    let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
    let text = format!(
        r#"{{"metadata": {{"name": "deep", "namespace": "shop", "resourceVersion": "1", "labels": {{"a": {deep}}}}},
            "spec": {{"nobody": {deep}}}, "status": {deep}}}"#
    );
    let seed = ObjectSeed { kind: Kind::AuthorizationPolicy, unknown: &|_, _| () };
    let decoded = seed.deserialize(&mut serde_json::Deserializer::from_str(&text)).unwrap();
    let mut server = Server::new();
    let origin: Arc<str> = "AuthorizationPolicy shop/deep".into();
    let content = ObjectContent::Node { node: &decoded.node, version: "1", text: "" };
    server.0.stage_object(&origin, content);
    let outcome = server.0.commit();
    assert!(server.codes(&origin).contains(&Code::UnknownField), "{:?}", outcome.diagnostics);
    assert!(server.codes(&origin).contains(&Code::FailsClosed), "{:?}", outcome.diagnostics);
}

#[test]
fn a_bound_service_lists_what_its_waypoint_is_to_enforce() {
    let mut server = Server::new();
    let mut mesh = model::Mesh::default();
    let key = model::ServiceKey { namespace: "shop".into(), hostname: "web.shop.svc.cluster.local".into() };
    let mut set = |server: &mut Server, kind, object: &Value| {
        mesh = mesh.apply(server.set(kind, object).changes);
        let service = mesh.http_service(&key);
        let names = |keys: &[model::PolicyKey]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
        let listed = service.map(|s| (names(&s.authentication), names(&s.rate_limits))).unwrap_or_default();
        (listed, mesh.clone())
    };
    let service = json!({
        "metadata": { "name": "web", "namespace": "shop", "labels": { "istio.io/use-waypoint": "waypoint" } },
        "spec": { "clusterIP": "10.9.0.1", "clusterIPs": ["10.9.0.1"], "selector": { "app": "web" },
                  "ports": [{ "port": 80 }] },
    });
    let gateway = json!({
        "metadata": { "name": "waypoint", "namespace": "shop" },
        "spec": { "gatewayClassName": "istio-waypoint",
                  "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }] },
    });
    set(&mut server, Kind::Service, &service);
    set(&mut server, Kind::Gateway, &gateway);
    set(&mut server, Kind::Pod, &pod("web-1", "enabled", "1"));
    let tokens = |namespace: &str, name: &str, version: &str, scope: Value| {
        let mut spec = json!({ "jwtRules": [{ "issuer": "i", "jwksUri": "https://i/keys" }] });
        spec.as_object_mut().unwrap().extend(scope.as_object().unwrap().clone());
        json!({ "metadata": { "name": name, "namespace": namespace, "resourceVersion": version }, "spec": spec })
    };
    let kind = Kind::RequestAuthentication;
    let selecting = json!({ "selector": { "matchLabels": { "app": "web" } } });
    let ((listed, _), after) = set(&mut server, kind, &tokens("shop", "by-label", "1", selecting.clone()));
    assert_eq!(listed, ["shop/by-label"]);
    assert_eq!(after.authentications().count(), 1);
    // Those of the namespace, of the mesh, and for the object; none of another namespace's.
    set(&mut server, kind, &tokens("shop", "all", "1", json!({})));
    set(&mut server, kind, &tokens("istio-system", "mesh", "1", json!({})));
    set(&mut server, kind, &tokens("other", "all", "1", json!({})));
    let to = json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": "web" }] });
    let ((listed, _), _) = set(&mut server, kind, &tokens("shop", "named", "1", to.clone()));
    assert_eq!(listed, ["istio-system/mesh", "shop/all", "shop/by-label", "shop/named"]);
    // The pod's labels change, and the policy's selector.
    let mut other = pod("web-1", "enabled", "2");
    other["metadata"]["labels"]["app"] = json!("else");
    let ((listed, _), _) = set(&mut server, Kind::Pod, &other);
    assert!(!listed.contains(&"shop/by-label".to_owned()), "{listed:?}");
    set(&mut server, Kind::Pod, &pod("web-1", "enabled", "3"));
    let elsewhere = json!({ "selector": { "matchLabels": { "app": "else" } } });
    let ((listed, _), _) = set(&mut server, kind, &tokens("shop", "by-label", "2", elsewhere));
    assert_eq!(listed, ["istio-system/mesh", "shop/all", "shop/named"]);
    // One with errors of which nothing is known is listed and not sent: the waypoint refuses.
    let mut broken = tokens("shop", "broken", "1", to.clone());
    broken["spec"]["jwtRules"][0]["jwksUri"] = json!("ftp://i");
    let ((listed, _), after) = set(&mut server, kind, &broken);
    assert!(listed.contains(&"shop/broken".to_owned()), "{listed:?}");
    assert!(after.authentications().all(|a| &*a.key.name != "broken"));
    let limit = json!({
        "metadata": { "name": "limit", "namespace": "shop" },
        "spec": { "targetRefs": to["targetRefs"],
                  "limits": [{ "name": "all", "local": { "requests": 5, "per": "1s" } }] },
    });
    let ((_, limits), after) = set(&mut server, Kind::RateLimit, &limit);
    assert_eq!((limits, after.rate_limits().count()), (vec!["shop/limit".to_owned()], 1));
    let after = after.apply(server.remove("RateLimit shop/limit").changes);
    assert!(after.http_service(&key).unwrap().rate_limits.is_empty());
    assert_eq!(after.rate_limits().count(), 0);
    what_is_before_nothing_says_so(&server);
}

fn what_is_before_nothing_says_so(server: &Server) {
    let unused = |d: &config::diagnostic::Diagnostic| {
        d.code == Code::WithoutEffect && d.message.contains("nobody looks at tokens")
    };
    let said = server.0.review();
    let about: Vec<_> = said.iter().filter(|d| unused(d)).map(ToString::to_string).collect();
    assert!(about.iter().any(|text| text.contains("other/all")), "{about:?} {said:#?}");
    assert!(about.iter().all(|text| !text.contains("shop/named")), "{about:?}");
}

#[test]
fn a_rate_limit_says_what_is_wrong_with_it() {
    let mut server = Server::new();
    let spec = |limit: Value, global: Value| {
        json!({
            "metadata": { "name": "limit", "namespace": "shop" },
            "spec": { "targetRefs": [{ "kind": "Service", "name": "web" }], "limits": [limit], "global": global },
        })
    };
    let service =
        json!({ "service": "rls.infra.svc.cluster.local", "port": 8081, "domain": "d", "onFailure": "Deny" });
    let local = json!({ "requests": 1, "per": "1s" });
    let by = json!([{ "type": "Path" }]);
    let cases = [
        (json!({ "name": "a", "local": local }), Value::Null, None),
        (json!({ "name": "a", "by": by, "global": {} }), service.clone(), None),
        (json!({ "name": "a" }), Value::Null, Some(Code::InvalidValue)),
        (json!({ "name": "a", "local": local, "global": {} }), service.clone(), Some(Code::InvalidValue)),
        (json!({ "name": "a", "by": by, "global": {} }), Value::Null, Some(Code::MissingField)),
        (json!({ "name": "a", "global": {} }), service.clone(), Some(Code::MissingField)),
        (json!({ "name": "A b", "local": local }), Value::Null, Some(Code::InvalidValue)),
        (
            json!({ "name": "a", "local": { "requests": 0, "per": "1s" } }),
            Value::Null,
            Some(Code::InvalidValue),
        ),
        (
            json!({ "name": "a", "local": { "requests": 1, "per": "0s" } }),
            Value::Null,
            Some(Code::InvalidValue),
        ),
        (
            json!({ "name": "a", "local": local, "by": [{ "type": "Header" }] }),
            Value::Null,
            Some(Code::MissingField),
        ),
        (
            json!({ "name": "a", "local": local, "by": [{ "type": "Path", "name": "x" }] }),
            Value::Null,
            Some(Code::InvalidValue),
        ),
        (
            json!({ "name": "a", "local": local, "by": [{ "type": "Body" }] }),
            Value::Null,
            Some(Code::InvalidValue),
        ),
        (json!({ "name": "a", "local": local, "when": {} }), Value::Null, Some(Code::UnknownField)),
        (
            json!({ "name": "a", "local": local }),
            json!({ "service": "rls", "port": 1, "domain": "d" }),
            Some(Code::MissingField),
        ),
    ];
    for (version, (limit, global, wanted)) in cases.into_iter().enumerate() {
        let mut object = spec(limit.clone(), global.clone());
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        if global.is_null() {
            object["spec"].as_object_mut().unwrap().remove("global");
        }
        server.set(Kind::RateLimit, &object);
        let about = server.codes("RateLimit shop/limit").into_iter();
        let errors = about.filter(|code| code.severity() == config::diagnostic::Severity::Error);
        let codes: Vec<Code> = errors.filter(|code| *code != Code::FailsClosed).collect();
        assert_eq!(codes.first().copied(), wanted, "{limit} {global}: {codes:?}");
    }
}
