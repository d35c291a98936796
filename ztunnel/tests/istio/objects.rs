//! What istiod makes of all kinds of objects, and that it is read as it is meant.

use serde_json::{Value, json};

use crate::control_plane::{all_is_acknowledged, knows_hbone, named, policy};
use crate::lab::Cluster;

fn object(api: &str, kind: &str, name: &str, more: &Value) -> Value {
    let mut object =
        json!({ "apiVersion": api, "kind": kind, "metadata": { "namespace": "shop", "name": name } });
    for (key, value) in more.as_object().unwrap() {
        if key == "metadata" {
            for (field, value) in value.as_object().unwrap() {
                object["metadata"][field] = value.clone();
            }
        } else {
            object[key] = value.clone();
        }
    }
    object
}

fn services() -> Vec<Value> {
    let service = |name, more: Value| object("v1", "Service", name, &more);
    let ports =
        json!([{ "name": "http", "port": 80, "targetPort": "http" }, { "name": "raw", "port": 9090 }]);
    vec![
        service(
            "web",
            json!({ "spec": {
                "selector": { "app": "web" }, "ports": ports,
                "ipFamilyPolicy": "RequireDualStack", "clusterIPs": ["10.96.0.10", "fd10:96::10"], "clusterIP": "10.96.0.10",
                "sessionAffinity": "ClientIP",
            } }),
        ),
        service(
            "headless",
            json!({ "spec": { "selector": { "app": "web" }, "ports": ports, "clusterIP": "None" } }),
        ),
        service(
            "near",
            json!({ "spec": {
                "selector": { "app": "web" }, "ports": ports, "clusterIP": "10.96.0.11", "trafficDistribution": "PreferClose",
            } }),
        ),
        service(
            "local",
            json!({ "spec": {
                "selector": { "app": "web" }, "ports": ports, "clusterIP": "10.96.0.12", "internalTrafficPolicy": "Local",
                "publishNotReadyAddresses": true,
            } }),
        ),
        service(
            "waited",
            json!({
                "metadata": { "labels": { "istio.io/use-waypoint": "way" } },
                "spec": { "selector": { "app": "web" }, "ports": ports, "clusterIP": "10.96.0.13" },
            }),
        ),
        service(
            "way",
            json!({ "spec": {
            "selector": { "app": "other" }, "clusterIP": "10.96.0.14",
            "ports": [{ "name": "mesh", "port": 15008, "appProtocol": "hbone" }],
        } }),
        ),
        service("elsewhere", json!({ "spec": { "type": "ExternalName", "externalName": "example.com" } })),
    ]
}

fn of_istio() -> Vec<Value> {
    let entry =
        |name, spec: Value| object("networking.istio.io/v1", "ServiceEntry", name, &json!({ "spec": spec }));
    let ports = json!([{ "number": 443, "name": "tls", "protocol": "TLS" }]);
    vec![
        entry(
            "static",
            json!({
                "hosts": ["static.example.com"], "addresses": ["240.1.0.1"], "location": "MESH_EXTERNAL", "resolution": "STATIC",
                "ports": [{ "number": 443, "name": "tls", "protocol": "TLS", "targetPort": 8443 }],
                "endpoints": [{ "address": "192.0.2.7", "ports": { "tls": 9443 }, "locality": "moon/a/x", "weight": 3 },
                              { "address": "192.0.2.8" }],
                "subjectAltNames": ["spiffe://cluster.local/ns/x/sa/y"],
            }),
        ),
        entry("dns", json!({ "hosts": ["dns.example.com"], "resolution": "DNS", "ports": ports })),
        entry("wide", json!({ "hosts": ["*.wide.example.com"], "resolution": "NONE", "ports": ports })),
        entry(
            "passed",
            json!({
                "hosts": ["passed.example.com"], "addresses": ["198.51.100.0/24"], "resolution": "NONE", "ports": ports,
            }),
        ),
        entry(
            "chosen",
            json!({
                "hosts": ["chosen.example.com"], "location": "MESH_INTERNAL", "resolution": "STATIC",
                "workloadSelector": { "labels": { "app": "machine" } }, "ports": ports,
            }),
        ),
        object(
            "networking.istio.io/v1",
            "WorkloadEntry",
            "machine",
            &json!({ "spec": {
            "address": "192.0.2.20", "labels": { "app": "machine" }, "serviceAccount": "machine", "weight": 2,
        } }),
        ),
        object(
            "gateway.networking.k8s.io/v1",
            "Gateway",
            "way",
            &json!({ "spec": {
            "gatewayClassName": "istio-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        } }),
        ),
    ]
}

fn policies() -> Vec<Value> {
    vec![
        policy(
            "PeerAuthentication",
            "shop",
            "ports",
            &json!({
                "selector": { "matchLabels": { "app": "web" } },
                "mtls": { "mode": "STRICT" }, "portLevelMtls": { "9090": { "mode": "PERMISSIVE" } },
            }),
        ),
        policy(
            "AuthorizationPolicy",
            "shop",
            "everything",
            &json!({
                "selector": { "matchLabels": { "app": "client" } },
                "rules": [{
                    "from": [{ "source": {
                        "principals": ["cluster.local/ns/shop/*", "*"], "notPrincipals": ["*/sa/bad"],
                        "namespaces": ["shop", "x*"], "notNamespaces": ["*y"],
                        "ipBlocks": ["10.0.0.0/8", "fd00::/8", "192.0.2.1"], "notIpBlocks": ["10.1.0.0/16"],
                    } }, { "source": { "serviceAccounts": ["shop/client", "web"], "notServiceAccounts": ["other/x"] } }],
                    "to": [{ "operation": { "ports": ["8080"], "notPorts": ["9090"] } }],
                    "when": [{ "key": "destination.port", "notValues": ["1"] },
                             { "key": "source.principal", "values": ["*"] },
                             { "key": "destination.ip", "values": ["10.244.0.0/16"] }],
                }],
            }),
        ),
        policy(
            "AuthorizationPolicy",
            "shop",
            "of-requests",
            &json!({
                "action": "DENY", "selector": { "matchLabels": { "app": "client" } },
                "rules": [{ "to": [{ "operation": { "methods": ["POST"], "ports": ["8080"] } }] }],
            }),
        ),
    ]
}

#[tokio::test]
async fn all_kinds_of_objects_are_read_as_istiod_means_them() {
    let nodes: [(&str, &[&str]); 2] = [("a", &["client", "other"]), ("b", &["web", "outside"])];
    let Some(mut cluster) = Cluster::build("what istiod makes of objects", &nodes) else { return };
    cluster.run_with_stand_in("a").await;
    cluster.run_with_stand_in("b").await;
    cluster.kubernetes.apply(&services());
    cluster.kubernetes.apply(&of_istio());
    cluster.kubernetes.apply(&policies());
    // That a waypoint is there. istiod would deploy it, had it the chart's templates.
    let way = object("gateway.networking.k8s.io/v1", "Gateway", "way", &json!({}));
    let address = json!({ "type": "Hostname", "value": "way.shop.svc.cluster.local" });
    cluster.kubernetes.set_status(&way, &json!({ "addresses": [address] }));
    knows_hbone(&cluster, &["client", "other", "web"]).await;
    let last = |dump: &Value| {
        !named(dump, "policies", "of-requests").is_null()
            && !named(dump, "services", "chosen").is_null()
            && !named(dump, "services", "waited")["waypoint"].is_null()
    };
    cluster.everywhere("the last of the objects", last).await;
    all_is_acknowledged(&cluster).await;
    for node in ["a", "b"] {
        let dump = cluster.ztunnel(node).config_dump().await;
        services_are_as_meant(&dump);
        policies_are_as_meant(&dump);
        for (workload, field, meant) in [
            ("machine", "addresses", json!(["192.0.2.20"])),
            ("machine", "identity", json!("spiffe://cluster.local/ns/shop/sa/machine")),
            ("machine", "capacity", json!(2)),
            ("dns", "hostname", json!("dns.example.com")),
            ("web", "node", json!("b")),
            ("web", "locality", json!({ "region": "moon", "zone": "b", "subzone": "" })),
            ("web", "authorizationPolicies", json!(["shop/converted_peer_authentication_ports"])),
        ] {
            assert_eq!(named(&dump, "workloads", workload)[field], meant, "{workload} {field}");
        }
    }
}

fn services_are_as_meant(dump: &Value) {
    let endpoints = |ports: Value| json!([{ "workload": "Kubernetes//Pod/shop/web", "ports": ports }]);
    let of_web = endpoints(json!({ "80": 8080, "9090": 9090 }));
    for (service, field, meant) in [
        ("web", "vips", json!(["/10.96.0.10/32", "/fd10:96::10/128"])),
        ("web", "endpoints", of_web.clone()),
        ("headless", "vips", json!([])),
        ("headless", "endpoints", of_web),
        ("near", "loadBalancing", json!("failover")),
        ("local", "loadBalancing", json!("strict")),
        (
            "waited",
            "waypoint",
            json!({ "destination": "shop/way.shop.svc.cluster.local", "hboneMtlsPort": 15008 }),
        ),
        ("static", "subjectAltNames", json!(["spiffe://cluster.local/ns/x/sa/y"])),
        ("passed", "vips", json!(["/198.51.100.0/24"])),
        ("passed", "source", json!("ServiceEntry/NONE")),
        ("wide", "hostname", json!("*.wide.example.com")),
    ] {
        assert_eq!(named(dump, "services", service)[field], meant, "{service} {field}");
    }
    let ports = |service: &str| {
        let endpoints = named(dump, "services", service)["endpoints"].as_array().unwrap().clone();
        let mut ports: Vec<_> = endpoints.iter().map(|e| e["ports"]["443"].as_u64().unwrap()).collect();
        ports.sort_unstable();
        ports
    };
    assert_eq!(ports("static"), [8443, 9443]);
    assert_eq!(ports("chosen"), [443]);
    // istiod gives them addresses of its own.
    assert_eq!(named(dump, "services", "dns")["vips"].as_array().unwrap().len(), 2);
}

/// The rules of each: any of them; all clauses of one; any match of a clause; all fields of a match.
fn policies_are_as_meant(dump: &Value) {
    for (policy, action, rules) in [
        (
            "converted_peer_authentication_ports",
            "Deny",
            json!([[
                [{ "notPrincipals": ["*"] }], [{ "notDestinationPorts": ["9090"] }],
            ]]),
        ),
        ("of-requests", "Deny", json!([[[{ "destinationPorts": ["8080"] }]]])),
        (
            "everything",
            "Allow",
            json!([[
                [{ "destinationPorts": ["8080"], "notDestinationPorts": ["9090"] }],
                [{ "principals": ["cluster.local/ns/shop/*", "*"], "notPrincipals": ["*/sa/bad"],
                   "namespaces": ["shop", "x*"], "notNamespaces": ["*y"],
                   "sourceIps": ["10.0.0.0/8", "fd00::/8", "192.0.2.1/32"], "notSourceIps": ["10.1.0.0/16"] },
                 { "serviceAccounts": ["shop/client", "shop/web"], "notServiceAccounts": ["other/x"] }],
                [{ "notDestinationPorts": ["1"] }], [{ "principals": ["*"] }], [{ "destinationIps": ["10.244.0.0/16"] }],
            ]]),
        ),
    ] {
        let read = named(dump, "policies", policy);
        assert_eq!((&read["action"], &read["rules"]), (&json!(action), &rules), "{policy}");
        assert_eq!(read["scope"], "WorkloadSelector", "{policy}");
    }
}
