//! Where calls go that Istio's own simulation of its proxies makes, read from data that lies beside the checkout.
//!
//! Three kinds of proxies are asked there. A sidecar's way out is compared with what an address is to a node proxy; its way in
//! with the policies that the node has for a connection. What a gateway at the edge does is asked of a waypoint: each
//! host that it serves becomes a service of the mesh, and the VirtualServices for the gateway are for the mesh. Each call has to
//! come out as there, or is in [`DIFFERENCES`].
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use config::compile::Options;
use config::repository::{Content, Repository};
use config::tree::{Limits, documents, parse};
use model::http::{BackendRef, Request, RouteAction, SourceFacts};
use model::{Connection, Destination, Mesh, OriginalDst, OutboundMode};
use serde_json::{Value, json};

mod peer;
mod yaml;

/// The calls that come out otherwise here: how the case's name begins, the call's name or `*` for all, what it comes to, and why.
const DIFFERENCES: &[(&str, &str, &str, &str)] = &[
    ("TestHTTPGateway/no virtual services", "*", "nothing there", NO_ROUTES),
    ("TestHTTPGateway/httpsRedirect with routes", "*", "to b.default:80", REDIRECT),
    ("TestHTTPGateway/mixed httpsRedirect with routes", "*", "to b.default:80", REDIRECT),
    ("TestGatewayConflicts/multiple virtual services that should", "foo", "404", ONE_FOR_A_HOST),
    ("TestGatewayConflicts/multiple virtual services that should", "bar", "404", ONE_FOR_A_HOST),
    ("TestIngress/", "*", "nothing there", "Ingress is for controllers at the edge, and says so"),
    (
        "TestGatewayServices/multiple overlapping services wildcard",
        "port 8080 from 81",
        "nothing there",
        ONE_PORT,
    ),
    (
        "TestServiceEntry/overlapping_CIDR_with_SNI",
        "Mismatch IP and SNI match: longer IP",
        "to blah2.somedomain:9999",
        BY_ADDRESS,
    ),
    (
        "TestServiceEntry/overlapping_CIDR_with_SNI",
        "Mismatch IP and SNI match: shorter IP",
        "to blah1.somedomain:9999",
        BY_ADDRESS,
    ),
    ("TestInbound/Disable", "tls to http", "let in", BYTES),
    ("TestInbound/Disable", "https to http", "let in", BYTES),
    ("TestInbound/Disable", "mtls to http", "let in", BYTES),
    ("TestInbound/Disable", "tcp to http", "let in", BYTES),
    (
        "TestLoop/",
        "*",
        "passes",
        "which ports are the proxy's own is known to the node proxy, whose tests dial them",
    ),
    ("TestInboundSidecarTLSModes/", "plaintext", "let in", SIDECAR),
    ("TestInboundSidecarTLSModes/sidecar TCP over TLS simple", "tcp over mTLS", "let in", SIDECAR),
    ("TestInboundSidecarTLSModes/sidecar http over mTLS", "http over tls", "let in", SIDECAR),
];
const ONE_PORT: &str = "that two ports of a gateway's Services lead to one listener is a gateway's; in the mesh each port is its own";
const NO_ROUTES: &str = "a host that no service has is none: there is no listener that could answer 404";
const REDIRECT: &str = "httpsRedirect is a gateway's; within the mesh a redirect is a route";
const ONE_FOR_A_HOST: &str =
    "within the mesh one VirtualService is in force for a host, in Istio too; only gateways merge them";
const BY_ADDRESS: &str = "a service that is bound to no waypoint is found by its address alone";
const BYTES: &str =
    "a node proxy delivers bytes, and leaves it to the server to refuse a protocol that it doesn't speak";
const SIDECAR: &str =
    "TLS of a Sidecar's ingress is that of a proxy in the pod; the kind is not acted on, and says so";

/// The objects of a case, with a namespace each.
fn objects(case: &Value) -> Vec<Value> {
    let mut list = Vec::new();
    for field in ["istioConfig", "kubeConfig"] {
        let text = case[field].as_str().unwrap_or_default();
        for document in documents(text) {
            if let Some(node) = parse(document, &Limits::default()).unwrap() {
                list.push(yaml::to_json(&node));
            }
        }
    }
    list.retain(Value::is_object);
    for object in &mut list {
        if object["metadata"]["namespace"].is_null() {
            object["metadata"]["namespace"] = json!("default");
        }
        // The API server lets in no slice without it.
        if kind(object) == "EndpointSlice" && object["addressType"].is_null() {
            object["addressType"] = json!("IPv4");
        }
    }
    list
}

fn kind(object: &Value) -> &str {
    object["kind"].as_str().unwrap()
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn mesh_of(objects: &[Value]) -> Mesh {
    let mut text = String::new();
    for object in objects {
        writeln!(text, "---\n{object}").unwrap();
    }
    let mut repository = Repository::new(Options::default());
    repository.stage(&"case.yaml".into(), Content::Bytes(text.as_bytes()));
    Mesh::default().apply(repository.commit().changes)
}

/// The objects of a case for a gateway, as they are for a waypoint before the hosts that it serves.
fn at_a_waypoint(case: &Value) -> Vec<Value> {
    let all = objects(case);
    let gateways = || all.iter().filter(|o| kind(o) == "Gateway");
    let servers = || gateways().flat_map(|g| g["spec"]["servers"].as_array().into_iter().flatten());
    let ports: BTreeSet<u64> = servers().filter_map(|s| s["port"]["number"].as_u64()).collect();
    let served: Vec<String> = servers()
        .flat_map(|server| strings(&server["hosts"]))
        .map(|host| host.rsplit('/').next().unwrap().to_owned())
        .collect();
    let mut list: Vec<Value> = all.iter().filter(|o| kind(o) == "VirtualService").cloned().collect();
    let mut backends: BTreeMap<(String, String), BTreeSet<u64>> = BTreeMap::new();
    for service in &mut list {
        let spec = service["spec"].as_object_mut().unwrap();
        spec.remove("gateways");
        if strings(&spec["hosts"]).contains(&"*".to_owned()) {
            spec["hosts"] = json!(served);
        }
        let namespace = service["metadata"]["namespace"].as_str().unwrap().to_owned();
        let routes = service["spec"]["http"].as_array().into_iter().flatten();
        for to in routes.flat_map(|route| route["route"].as_array().into_iter().flatten()) {
            let host = to["destination"]["host"].as_str().unwrap();
            let (name, namespace) = host
                .split_once('.')
                .map_or((host, &*namespace), |(n, rest)| (n, rest.split('.').next().unwrap()));
            let ports = backends.entry((namespace.to_owned(), name.to_owned())).or_default();
            ports.insert(to["destination"]["port"]["number"].as_u64().unwrap_or(80));
        }
    }
    let calls = case["calls"].as_array().unwrap().iter();
    let called: BTreeSet<&str> = calls.filter_map(|call| call["call"]["host"].as_str()).collect();
    let hosts: Vec<String> = list.iter().flat_map(|service| strings(&service["spec"]["hosts"])).collect();
    let has = |called: &str| {
        hosts
            .iter()
            .any(|host| host == called || host.strip_prefix('*').is_some_and(|end| called.ends_with(end)))
    };
    let ports: Vec<Value> =
        ports.iter().map(|n| json!({ "name": format!("http-{n}"), "number": n })).collect();
    for (number, host) in called.iter().filter(|host| has(host)).enumerate() {
        list.push(json!({ "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
            "metadata": { "name": format!("called-{number}"), "namespace": "default",
                          "labels": { "istio.io/use-waypoint": "gate" } },
            "spec": { "hosts": [host], "addresses": [format!("10.9.0.{}", number + 1)], "resolution": "STATIC",
                      "ports": ports } }));
    }
    for (number, ((namespace, name), ports)) in backends.iter().enumerate() {
        let ports: Vec<Value> =
            ports.iter().map(|n| json!({ "name": format!("http-{n}"), "port": n })).collect();
        list.push(json!({ "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": name, "namespace": namespace },
            "spec": { "clusterIP": format!("10.8.0.{}", number + 1), "ports": ports } }));
    }
    list.push(json!({ "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": { "name": "gate", "namespace": "default" },
        "spec": { "gatewayClassName": "istio-waypoint",
                  "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }] } }));
    list
}

/// The port of the gateway's service that leads to the port that is called.
fn service_port(case: &Value, called: u64) -> u16 {
    let all = objects(case);
    let entries = all.iter().filter(|o| kind(o) == "ServiceEntry");
    let ports = entries.flat_map(|o| o["spec"]["ports"].as_array().into_iter().flatten());
    let mut ports = ports.filter(|port| port["targetPort"].as_u64() == Some(called));
    let number = ports.next().and_then(|port| port["number"].as_u64()).unwrap_or(called);
    u16::try_from(number).unwrap()
}

fn short(host: &str) -> &str {
    host.strip_suffix(".svc.cluster.local").unwrap_or(host)
}

/// Whether a gateway has the host at the port.
fn is_served(case: &Value, host: &str, port: u16) -> bool {
    let all = objects(case);
    let gateways = all.iter().filter(|o| kind(o) == "Gateway");
    let servers = gateways.flat_map(|g| g["spec"]["servers"].as_array().into_iter().flatten());
    let mut at_port = servers.filter(|server| server["port"]["number"] == port);
    at_port.any(|server| {
        strings(&server["hosts"]).iter().any(|known| {
            let known = known.rsplit('/').next().unwrap();
            known == host || known.strip_prefix('*').is_some_and(|end| host.ends_with(end))
        })
    })
}

/// Where a request to a gateway goes.
fn through(mesh: &Mesh, call: &Value, port: u16) -> String {
    let host = call["host"].as_str().unwrap_or_default();
    let Some(service) = mesh.services_named(host).first().cloned() else { return "nothing there".into() };
    let Some(http) = mesh.http_service(&service.key()) else { return "nothing there".into() };
    let Some(rules) = http.ports.iter().find(|p| p.number == port) else { return "nothing there".into() };
    let path = call["path"].as_str().unwrap_or("/");
    let headers: Vec<(&str, &str)> = Vec::new();
    let request = Request::new("GET", host, path, &headers);
    let source = SourceFacts::default();
    let Some(selected) = rules.routes.select(&request, &source) else { return "404".into() };
    let RouteAction::Forward(forward) = &selected.route.action else { return "answered".into() };
    match &forward.choose(0).unwrap().to {
        BackendRef::Service { service, port, .. } => format!("to {}:{port}", short(&service.hostname)),
        other => format!("{other:?}"),
    }
}

/// Where a sidecar's connection goes.
fn out(mesh: &Mesh, call: &Value) -> String {
    // Nobody has the address of those that name none.
    let address: IpAddr = call["address"].as_str().unwrap_or("203.0.113.9").parse().unwrap();
    let port = u16::try_from(call["port"].as_u64().unwrap()).unwrap();
    let to = OriginalDst::new(SocketAddr::new(address, port));
    match mesh.destination(&"".into(), to) {
        Destination::Service(service) => format!("to {}:{port}", short(&service.hostname)),
        Destination::Workload(workload) => match workload.services.first() {
            Some(membership) => format!("to {}:{port}", short(&membership.service.hostname)),
            None => "passes".to_owned(),
        },
        Destination::Unknown if mesh.settings().outbound == OutboundMode::RegistryOnly => {
            "refused".to_owned()
        }
        Destination::Unknown => "passes".to_owned(),
    }
}

/// Whether a pod's node lets a connection in.
fn inbound(mesh: &Mesh, call: &Value) -> String {
    let pod = mesh.workloads().find(|workload| workload.name() == "foo").unwrap();
    let mutual = call["tls"] == "mtls";
    let client = mutual.then(|| "spiffe://cluster.local/ns/default/sa/client".parse().unwrap());
    let to = SocketAddr::new(pod.addresses[0], u16::try_from(call["port"].as_u64().unwrap()).unwrap());
    let allowed =
        mesh.authorize(pod, &Connection::new(client, "10.0.0.9".parse().unwrap(), to)).outcome.is_ok();
    if allowed { "let in".to_owned() } else { "refused".to_owned() }
}

/// What the case says, in the same words.
fn expected(call: &Value) -> String {
    let expect = &call["expect"];
    if let Some(error) = expect["error"].as_str() {
        let known = [
            ("no route matched", "404"),
            ("no virtual host matched", "nothing there"),
            ("no listener matched", "nothing there"),
            ("tls required, sending 301", "301"),
            ("no filter chains matched", "refused"),
            ("invalid mTLS", "refused"),
            ("protocol error", "refused"),
        ];
        return known.iter().find(|(text, _)| *text == error).expect(error).1.to_owned();
    }
    if expect["virtualHost"] == "block_all" {
        return "refused".to_owned();
    }
    let cluster = expect["cluster"].as_str().expect("what is expected");
    match *cluster.split('|').collect::<Vec<_>>() {
        ["outbound", port, _, host] => format!("to {}:{port}", short(host)),
        ["inbound", ..] | ["InboundPassthroughCluster"] => "let in".to_owned(),
        ["PassthroughCluster"] => "passes".to_owned(),
        ["BlackHoleCluster"] => "refused".to_owned(),
        _ => panic!("a cluster {cluster}"),
    }
}

/// What all calls of a case come to.
fn outcomes(case: &Value) -> Vec<String> {
    let calls = case["calls"].as_array().unwrap().iter().map(|call| &call["call"]);
    if case["proxy"]["type"] == "router" {
        let mesh = mesh_of(&at_a_waypoint(case));
        let outcome = |call: &Value| {
            let port = service_port(case, call["port"].as_u64().unwrap());
            let served = is_served(case, call["host"].as_str().unwrap_or_default(), port);
            if served { through(&mesh, call, port) } else { "nothing there".to_owned() }
        };
        return calls.map(outcome).collect();
    }
    let mut all = objects(case);
    if let Some(outbound) = case["meshConfig"]["outboundTrafficPolicy"].as_object() {
        // The first value of the enumeration is the one that JSON of protobuf leaves out.
        let mode = outbound.get("mode").cloned().unwrap_or(json!("REGISTRY_ONLY"));
        let config = json!({ "outboundTrafficPolicy": { "mode": mode } }).to_string();
        all.push(json!({ "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": "istio", "namespace": "istio-system" }, "data": { "mesh": config } }));
    }
    all.push(json!({ "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "foo", "namespace": "default",
                      "labels": { "app": "foo", "istio.io/dataplane-mode": "ambient" } },
        "status": { "podIP": "1.1.1.1" } }));
    // The pod's address is that of a service in some cases of ways out, which are not about a pod.
    if case["calls"].as_array().unwrap().iter().all(|call| call["call"]["mode"] != "inbound") {
        all.pop();
    }
    let mesh = mesh_of(&all);
    calls
        .map(|call| if call["mode"] == "inbound" { inbound(&mesh, call) } else { out(&mesh, call) })
        .collect()
}

#[test]
fn calls_go_where_they_go_in_istio() {
    let Some(file) = peer::peer_cases("traffic-simulation.json") else { return };
    let cases = file["cases"].as_array().unwrap();
    let (mut wrong, mut tried, mut met) = (Vec::new(), 0, BTreeSet::new());
    for case in cases {
        let id = case["id"].as_str().unwrap();
        let calls = case["calls"].as_array().unwrap();
        for (call, got) in calls.iter().zip(outcomes(case)) {
            tried += 1;
            let name = call["name"].as_str().unwrap();
            let listed = DIFFERENCES
                .iter()
                .position(|(start, which, ..)| id.starts_with(start) && (*which == "*" || *which == name));
            let wanted = expected(call);
            let wanted = match listed {
                // A list entry for all calls of a case covers those that agree.
                Some(place) if got != wanted => {
                    met.insert(place);
                    DIFFERENCES[place].2.to_owned()
                }
                _ => wanted,
            };
            if got != wanted {
                wrong.push(format!("{id} / {name}: {got:?} instead of {wanted:?}"));
            }
        }
    }
    let unmet: Vec<_> =
        (0..DIFFERENCES.len()).filter(|place| !met.contains(place)).map(|place| DIFFERENCES[place]).collect();
    assert!(wrong.is_empty(), "{} of {tried}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(unmet.is_empty(), "listed as differences, and none: {unmet:?}");
    let all: usize = cases.iter().map(|case| case["calls"].as_array().unwrap().len()).sum();
    assert!(
        tried == all && cases.len() >= 36 && tried >= 180,
        "{tried} of {all} calls in {} cases",
        cases.len()
    );
}
