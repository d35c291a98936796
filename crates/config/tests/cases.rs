//! Cases as data: each file of `cases/compile/` has steps, each of which changes files and says what is expected then.
//!
//! `expect` is compared with a dump of the model, of the enrolments and of the diagnostics. Mappings are compared
//! for the keys that are expected, where `null` means that the key must not be there; everything else must be
//! equal. A step may also say what the changes of the batch are (`changes`), which diagnostics are new (`news`), and how routes
//! stand with what they hang on (`standing`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::path::Path;

use config::compile::{EnrolmentChange, Judgement, Options};
use config::diagnostic::Diagnostic;
use config::repository::{Content, Repository};
use config::resource::{Kind, ObjectKey};
use config::routes::{ParentKind, ParentRef};
use config::tree::{self, Limits};
use model::http::{BackendRef, HttpService, LedTo, Route, RouteAction, RouteMatch, StreamMatch, StreamRoute};
use model::{Change, GatewayAddress, GatewayTarget, Mesh, PolicyKey, Service, TargetPort, Workload};
use serde_json::{Map, Value as Json, json};

mod yaml;
use yaml::to_json;

fn workload(w: &Workload) -> Json {
    let services: Map<String, Json> = w
        .services
        .iter()
        .map(|m| {
            let ports: Vec<String> =
                m.ports.iter().map(|p| format!("{}:{}", p.service_port, p.target_port)).collect();
            (m.service.to_string(), json!(ports))
        })
        .collect();
    json!({
        "name": w.name(),
        "namespace": &*w.namespace,
        "account": &*w.service_account,
        "addresses": w.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "hostname": &*w.hostname,
        "node": &**w.node(),
        "cluster": &*w.cluster,
        "trust_domain": w.trust_domain.as_str(),
        "tunnel": format!("{:?}", w.tunnel),
        "network_mode": format!("{:?}", w.network_mode),
        "health": format!("{:?}", w.health),
        "locality": format!("{}/{}/{}", w.locality.region, w.locality.zone, w.locality.subzone),
        "canonical": format!("{}/{}", w.canonical_name(), w.canonical_revision),
        "workload": format!("{}/{}", w.workload_kind, w.workload_name()),
        "services": services,
        "policies": w.policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "capacity": w.capacity,
        "waypoint": w.waypoint.as_ref().map(|w| gateway(w)),
    })
}

fn gateway(g: &GatewayAddress) -> String {
    match &g.target {
        GatewayTarget::Service(key) => format!("{key}:{}", g.hbone_mtls_port),
        GatewayTarget::Address(address) => format!("{address:?}:{}", g.hbone_mtls_port),
    }
}

fn service(s: &Service) -> Json {
    let port = |p: &model::ServicePort| {
        let target = match p.target {
            TargetPort::Number(n) => n.to_string(),
            TargetPort::PerEndpoint => "named".to_owned(),
        };
        format!("{}:{}:{}:{}", p.name, p.port, target, p.app_protocol)
    };
    json!({
        "vips": s.vips.iter().map(|v| v.range.to_string()).collect::<Vec<_>>(),
        "ports": s.ports.iter().map(port).collect::<Vec<_>>(),
        "mode": format!("{:?}", s.load_balancing.mode),
        "scopes": s.load_balancing.scopes.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>(),
        "endpoint_health": format!("{:?}", s.load_balancing.health),
        "families": format!("{:?}", s.ip_families),
        "affinity_s": s.session_affinity.map(|d| d.as_secs()),
        "source": format!("{:?}", s.source),
        "waypoint": s.waypoint.as_ref().map(gateway),
        "canonical": s.canonical,
    })
}

/// What a waypoint does for a service: each port's protocol and routes, in order of precedence.
fn http_service(s: &HttpService) -> Json {
    let backend = |b: &model::http::Backend| match &b.to {
        BackendRef::Service { service, port, subset } => {
            let subset = subset.as_ref().map(|s| format!("/{s}")).unwrap_or_default();
            format!("{}%{service}:{port}{subset}", b.weight)
        }
        BackendRef::Original => format!("{}%original", b.weight),
        BackendRef::Unresolved { reason } => format!("{}%500 {reason}", b.weight),
    };
    let route = |(when, route): &(RouteMatch, std::sync::Arc<Route>)| {
        let to = match &route.action {
            RouteAction::Forward(f) => f.backends().iter().map(backend).collect::<Vec<_>>().join(" "),
            RouteAction::Redirect(r) => format!("redirect {r:?}"),
            RouteAction::Respond(r) => format!("respond {}", r.status),
        };
        format!("{when} -> {to} ({})", route.id)
    };
    let ports: Map<String, Json> = s
        .ports
        .iter()
        .map(|p| {
            let routes: Vec<String> = p.routes.entries().iter().map(route).collect();
            (format!("{} {:?}", p.number, p.protocol), json!(routes))
        })
        .collect();
    let policies: Vec<String> = s.policies.iter().map(ToString::to_string).collect();
    let stream = |(when, route): &(StreamMatch, std::sync::Arc<StreamRoute>)| {
        let to = route.to.backends().iter().map(backend).collect::<Vec<_>>().join(" ");
        format!("{when} -> {to} ({})", route.id)
    };
    let streams = s.ports.iter().filter(|p| !p.streams.entries().is_empty());
    let streams: Map<String, Json> = streams
        .map(|p| (p.number.to_string(), json!(p.streams.entries().iter().map(stream).collect::<Vec<_>>())))
        .collect();
    let sets = |selected: &[Box<[PolicyKey]>]| -> Vec<String> {
        selected.iter().map(|set| set.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")).collect()
    };
    let selected = sets(&s.selected);
    let led_to = |led: &LedTo| (led.service.to_string(), json!(sets(&led.selected)));
    json!({
        "waypoint": s.waypoint.to_string(),
        "ports": ports,
        "streams": streams,
        "policies": policies,
        "selected": selected,
        "led_to": s.led_to.iter().map(led_to).collect::<Map<_, _>>(),
    })
}

/// How a service is spoken to: the balancer and the most connections, for each port and subset.
fn traffic(t: &model::http::ServiceTraffic) -> Json {
    let policy = |p: &model::http::TrafficPolicy| {
        let mut text = format!("{:?}", p.load_balancer);
        if let Some(most) = p.pool.max_connections {
            text += &format!(", {most} connections");
        }
        if p.tls.is_some() {
            text += ", TLS";
        }
        text
    };
    let mut all: Map<String, Json> = Map::new();
    let mut put = |name: &str, default: &_, ports: &[(u16, _)]| {
        all.insert(name.to_owned(), json!(policy(default)));
        for (port, p) in ports {
            all.insert(format!("{name}:{port}"), json!(policy(p)));
        }
    };
    put("default", &t.default, &t.ports);
    for subset in &t.subsets {
        let labels: Vec<String> = subset.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        put(&format!("{} {}", subset.name, labels.join(",")), &subset.default, &subset.ports);
    }
    Json::Object(all)
}

fn change(c: &Change) -> String {
    match c {
        Change::SetWorkload(w) => format!("set workload {}", w.uid),
        Change::RemoveWorkload(uid) => format!("remove workload {uid}"),
        Change::SetService(s) => format!("set service {}", s.key()),
        Change::RemoveService(key) => format!("remove service {key}"),
        Change::SetPolicy(p) => format!("set policy {}", p.key),
        Change::RemovePolicy(key) => format!("remove policy {key}"),
        Change::SetHttpService(s) => format!("set HTTP service {}", s.service),
        Change::RemoveHttpService(key) => format!("remove HTTP service {key}"),
        Change::SetHttpPolicy(p) => format!("set HTTP policy {}", p.key),
        Change::RemoveHttpPolicy(key) => format!("remove HTTP policy {key}"),
        Change::SetTraffic(t) => format!("set traffic {}", t.service),
        Change::RemoveTraffic(key) => format!("remove traffic {key}"),
        Change::SetAuthentication(a) => format!("set authentication {}", a.key),
        Change::RemoveAuthentication(key) => format!("remove authentication {key}"),
        Change::SetRateLimit(l) => format!("set rate limit {}", l.key),
        Change::RemoveRateLimit(key) => format!("remove rate limit {key}"),
        Change::SetAuthorizer(a) => format!("set authorizer {}", a.name),
        Change::RemoveAuthorizer(name) => format!("remove authorizer {name}"),
        Change::SetSettings(_) => "set settings".to_owned(),
    }
}

fn diagnostic(d: &Diagnostic) -> String {
    let place = if d.line > 0 { format!("{}:{}:{}", d.file, d.line, d.column) } else { d.file.to_string() };
    format!("{place} {} {}: {}", d.severity, d.code, d.message)
}

fn dump(mesh: &Mesh, enrolments: &BTreeMap<String, Json>, repository: &Repository) -> Json {
    let workloads: Map<String, Json> = mesh.workloads().map(|w| (w.uid.to_string(), workload(w))).collect();
    let services: Map<String, Json> = mesh.services().map(|s| (s.key().to_string(), service(s))).collect();
    let mut policies: Vec<String> = mesh.policies().map(|p| p.key.to_string()).collect();
    policies.sort();
    let found: Vec<String> = repository.diagnostics().iter().map(diagnostic).collect();
    json!({
        "count": { "workloads": workloads.len(), "services": services.len(), "enrolments": enrolments.len() },
        "workloads": workloads,
        "services": services,
        "http": mesh.http_services().map(|s| (s.service.to_string(), http_service(s))).collect::<Map<_, _>>(),
        "traffic": all_traffic(mesh),
        "policies": policies,
        "enrolments": enrolments,
        "diagnostics": found,
        "review": repository.review().iter().map(diagnostic).collect::<Vec<_>>(),
    })
}

fn all_traffic(mesh: &Mesh) -> Map<String, Json> {
    let of = |s: &std::sync::Arc<Service>| Some((s.key().to_string(), traffic(mesh.traffic(&s.key())?)));
    mesh.services().filter_map(of).collect()
}

/// How a route stands with a Service that it names, asked as `KIND NAMESPACE/NAME on NAMESPACE/SERVICE[:PORT]`: the conditions,
/// with the reasons of those that do not hold. How a VirtualService stands with its hosts is asked as `VirtualService NAMESPACE/NAME`.
fn standing(asked: &str, repository: &Repository) -> String {
    let of = |condition: &str, judgement: &Judgement| match judgement.holds {
        true => condition.to_owned(),
        false => format!("{condition} {}", judgement.reason),
    };
    if let Some((namespace, name)) =
        asked.strip_prefix("VirtualService ").map(|key| key.split_once('/').unwrap())
    {
        let key = ObjectKey { kind: Kind::VirtualService, namespace: namespace.into(), name: name.into() };
        let judgement = repository.standing().host_standing(&key);
        return judgement.map_or_else(String::new, |judgement| of("WaypointAccepted", &judgement));
    }
    let (route, service) = asked.split_once(" on ").unwrap();
    let (kind, route) = route.split_once(' ').unwrap();
    let kinds = [Kind::HttpRoute, Kind::GrpcRoute, Kind::TcpRoute, Kind::TlsRoute];
    let kind = kinds.into_iter().find(|known| known.name() == kind).unwrap();
    let (namespace, name) = route.split_once('/').unwrap();
    let key = ObjectKey { kind, namespace: namespace.into(), name: name.into() };
    let (namespace, name) = service.split_once('/').unwrap();
    let (name, port) = name.split_once(':').map_or((name, None), |(name, port)| (name, port.parse().ok()));
    let (namespace, name) = (namespace.into(), name.into());
    let parent = ParentRef { kind: ParentKind::Service, namespace, name, section: None, port };
    let Some(standing) = repository.standing().route_standing(&key, &parent) else { return String::new() };
    let bound = standing.bound.iter().map(|bound| of("WaypointBound", bound));
    let all = [of("Accepted", &standing.accepted), of("ResolvedRefs", &standing.resolved)];
    all.into_iter().chain(bound).collect::<Vec<_>>().join(", ")
}

/// Where `actual` is not as `expected`.
fn differences(path: &str, expected: &Json, actual: Option<&Json>, found: &mut Vec<String>) {
    match (expected, actual) {
        (Json::Null, None | Some(Json::Null)) => {}
        (Json::Object(expected), Some(Json::Object(actual))) => {
            for (key, value) in expected {
                differences(&format!("{path}.{key}"), value, actual.get(key), found);
            }
        }
        (expected, Some(actual)) if expected == actual => {}
        (expected, actual) => {
            let text = actual.map_or("nothing".to_owned(), ToString::to_string);
            found.push(format!("{path}: expected {expected}, got {text}"));
        }
    }
}

fn enrol(enrolments: &mut BTreeMap<String, Json>, change: &EnrolmentChange) {
    match change {
        EnrolmentChange::Set(e) => {
            let value = json!({
                "name": format!("{}/{}", e.namespace, e.name),
                "account": &*e.service_account,
                "netns": e.netns.to_str(),
                "addresses": e.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "exclusions": format!("{:?}", e.exclusions),
                "dns_capture": e.dns_capture,
                "bypass_inbound": e.bypass_inbound,
            });
            enrolments.insert(e.uid.to_string(), value);
        }
        EnrolmentChange::Remove(uid) => {
            assert!(enrolments.remove(&**uid).is_some(), "an enrolment that is not there is removed: {uid}");
        }
    }
}

fn run(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let document = tree::documents(&text).next().unwrap();
    let case = to_json(&tree::parse(document, &Limits::default()).unwrap().unwrap());
    let mut options = Options::default();
    if let Some(node) = case["node"].as_str() {
        options.node = Some(node.into());
    }
    let mut repository = Repository::new(options);
    let (mut mesh, mut enrolments, mut found) = (Mesh::default(), BTreeMap::new(), Vec::new());
    for (index, step) in
        case["steps"].as_array().unwrap_or_else(|| panic!("{}: no steps", path.display())).iter().enumerate()
    {
        for (file, content) in step["files"].as_object().expect("files") {
            let content = match content {
                Json::String(text) => Content::Bytes(text.as_bytes()),
                Json::Null => Content::Gone,
                other => Content::Unreadable(other["unreadable"].as_str().unwrap()),
            };
            repository.stage(&file.as_str().into(), content);
        }
        let outcome = repository.commit();
        let mut changes: Vec<String> = outcome.changes.iter().map(change).collect();
        changes.sort();
        let news: Vec<String> = outcome.diagnostics.iter().map(diagnostic).collect();
        mesh = mesh.apply(outcome.changes);
        outcome.enrolments.iter().for_each(|e| enrol(&mut enrolments, e));
        let actual = dump(&mesh, &enrolments, &repository);
        let at = format!("step {index}");
        if !step["expect"].is_null() {
            differences(&at, &step["expect"], Some(&actual), &mut found);
        }
        for (asked, expected) in step["standing"].as_object().into_iter().flatten() {
            let actual = standing(asked, &repository);
            differences(&format!("{at} {asked}"), expected, Some(&json!(actual)), &mut found);
        }
        if !step["changes"].is_null() {
            differences(&format!("{at} changes"), &step["changes"], Some(&json!(changes)), &mut found);
        }
        if !step["news"].is_null() {
            differences(&format!("{at} news"), &step["news"], Some(&json!(news)), &mut found);
        }
    }
    found
}

#[test]
fn every_case_comes_out_as_it_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/compile");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 10, "the cases are there");
    let only = std::env::var("CASE").unwrap_or_default();
    let mut failed = Vec::new();
    for file in files.iter().filter(|f| f.to_string_lossy().contains(&only)) {
        for difference in run(file) {
            failed.push(format!("{}: {difference}", file.file_stem().unwrap().display()));
        }
    }
    assert!(failed.is_empty(), "\n{}\n", failed.join("\n"));
}
