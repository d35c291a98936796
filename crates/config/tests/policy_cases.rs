//! The tables in `tests/cases/policy-*.yaml`: what a directory of resources decides and says.
//!
//! A file's first document says what is expected, the others are the resources. `decisions` says of connections
//! what the evaluator's own explanation starts with; `from` is `NAMESPACE/ACCOUNT`, in another trust domain
//! `DOMAIN/ns/NAMESPACE/sa/ACCOUNT`, or `nobody` for a connection without an identity. `says` lists all diagnostics
//! as `LINE:COLUMN code`; `workloads` and `services` parts of what these are compiled to; `nodeLocal` how connections
//! from one namespace to another are carried within a node.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use config::compile::Options;
use config::repository::{Content, Repository};
use config::tree::{Limits, Node, Value, documents, parse};
use model::{Connection, Destination, GatewayAddress, GatewayTarget, Mesh, OriginalDst, SpiffeId, Workload};

fn case_files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|f| f.file_name().unwrap().to_str().unwrap().starts_with("policy-"));
    files.sort();
    files
}

fn text_of(node: &Node<'_>, key: &str) -> Option<String> {
    match &node.get(key)?.value {
        Value::String(text) => Some(text.to_string()),
        Value::Int(number) => Some(number.to_string()),
        Value::Null => None,
        other => panic!("{key} is {}", other.kind()),
    }
}

fn items<'a>(node: &'a Node<'a>, key: &str) -> &'a [Node<'a>] {
    match node.get(key).map(|n| &n.value) {
        Some(Value::Sequence(items)) => items,
        None => &[],
        Some(other) => panic!("{key} is {}", other.kind()),
    }
}

fn identity(text: &str) -> Option<SpiffeId> {
    match text.split('/').collect::<Vec<_>>()[..] {
        ["nobody"] => None,
        [namespace, account] => {
            Some(format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().unwrap())
        }
        _ => Some(format!("spiffe://{text}").parse().unwrap()),
    }
}

fn pod<'m>(mesh: &'m Mesh, name: &str) -> &'m Workload {
    let (namespace, name) = name.split_once('/').unwrap();
    mesh.workloads()
        .find(|w| &*w.namespace == namespace && w.name() == name)
        .unwrap_or_else(|| panic!("no workload {namespace}/{name}"))
}

struct Case {
    name: String,
    wrong: Vec<String>,
}

impl Case {
    fn compare(&mut self, what: &str, expected: &str, got: &str) {
        if !got.starts_with(expected) {
            self.wrong.push(format!("{}: {what}\n    expected {expected}\n    got      {got}", self.name));
        }
    }

    fn same(&mut self, what: &str, expected: &[String], got: &[String]) {
        if expected != got {
            self.wrong
                .push(format!("{}: {what}\n    expected {expected:?}\n    got      {got:?}", self.name));
        }
    }
}

fn list(node: &Node<'_>, key: &str) -> Vec<String> {
    items(node, key).iter().map(|n| n.as_str().unwrap().to_owned()).collect()
}

fn check_decision(case: &mut Case, mesh: &Mesh, expected: &Node<'_>) {
    let to = pod(mesh, &text_of(expected, "to").unwrap());
    let port = text_of(expected, "port").map_or(8080, |p| p.parse().unwrap());
    let from = text_of(expected, "from").unwrap();
    let ip: IpAddr = text_of(expected, "ip").map_or("10.9.9.9".parse().unwrap(), |ip| ip.parse().unwrap());
    let connection = Connection::new(identity(&from), ip, (to.addresses[0], port).into());
    let decision = mesh.authorize(to, &connection);
    let got = match &decision.outcome {
        Ok(permit) => permit.reason().to_string(),
        Err(deny) => deny.to_string(),
    };
    let what = format!("{from} ({ip}) to {} {port}", to.name());
    case.compare(&what, &text_of(expected, "is").unwrap(), &got);
    if expected.get("would").is_some() {
        let would: Vec<_> = decision
            .dry_run
            .iter()
            .map(|d| format!("{}: {}", d.policy, if d.would.is_ok() { "allowed" } else { "denied" }))
            .collect();
        case.same(&format!("{what}: dry run"), &list(expected, "would"), &would);
    }
}

fn check_service(case: &mut Case, mesh: &Mesh, expected: &Node<'_>) {
    let host = text_of(expected, "host").unwrap();
    let found: Vec<String> = mesh
        .services_named(&host)
        .iter()
        .map(|s| {
            let vips = s.vips.iter().map(|v| v.range.to_string()).collect::<Vec<_>>().join(" ");
            let mut endpoints: Vec<String> = mesh
                .endpoints(&s.key())
                .map(|set| set.as_slice().iter().map(|e| endpoint(set, e)).collect())
                .unwrap_or_default();
            endpoints.sort();
            format!("{} {:?} [{vips}] [{}]", s.namespace, s.source, endpoints.join(" "))
        })
        .collect();
    case.same(&format!("service {host}"), &list(expected, "is"), &found);
}

fn endpoint(set: &model::EndpointSet, endpoint: &model::Endpoint) -> String {
    let w = &endpoint.workload;
    let place = w.addresses.first().map_or_else(|| w.hostname.to_string(), ToString::to_string);
    let ports: Vec<_> =
        set.ports(endpoint).iter().map(|p| format!("{}>{}", p.service_port, p.target_port)).collect();
    format!("{place}({})", ports.join(","))
}

fn check_dialled(case: &mut Case, mesh: &Mesh, expected: &Node<'_>) {
    let address = text_of(expected, "address").unwrap();
    let got = match mesh.destination(&"".into(), OriginalDst::new(address.parse().unwrap())) {
        Destination::Service(s) => format!("service {}", s.key()),
        Destination::Workload(w) => format!("workload {}/{}", w.namespace, w.name()),
        Destination::Unknown => "unknown".to_owned(),
    };
    case.compare(&format!("dialling {address}"), &text_of(expected, "is").unwrap(), &got);
}

fn run(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
    let first = documents(&text).next().unwrap();
    let expected = parse(first, &Limits::default()).unwrap().unwrap();
    // The lines stay where they are, so that positions are those of the file.
    let lines = first.text.matches('\n').count();
    let resources = "\n".repeat(lines) + &text[first.text.len()..];
    let mut case = Case { name, wrong: Vec::new() };
    let mut repository = Repository::new(Options::default());
    let file = "case.yaml".into();
    let outcome = repository.apply(&file, Content::Bytes(resources.as_bytes()));
    let mesh = Mesh::default().apply(outcome.changes);

    let said: Vec<String> = repository
        .diagnostics()
        .iter()
        .map(|d| format!("{}:{} {}", d.line, d.column, d.code))
        .filter(|said| !said.ends_with("netns-missing"))
        .collect();
    case.same("diagnostics", &list(&expected, "says"), &said);
    for decision in items(&expected, "decisions") {
        check_decision(&mut case, &mesh, decision);
    }
    for service in items(&expected, "services") {
        check_service(&mut case, &mesh, service);
    }
    for dialled in items(&expected, "dialled") {
        check_dialled(&mut case, &mesh, dialled);
    }
    for expected in items(&expected, "workloads") {
        let name = text_of(expected, "name").unwrap();
        let policies: Vec<_> = pod(&mesh, &name).policies.iter().map(ToString::to_string).collect();
        case.same(&format!("policies of {name}"), &list(expected, "policies"), &policies);
    }
    for expected in items(&expected, "egress") {
        let host = text_of(expected, "host").unwrap();
        let through = match &mesh.services_named(&host)[0].waypoint {
            Some(GatewayAddress { target: GatewayTarget::Service(key), .. }) => key.hostname.to_string(),
            other => format!("{other:?}").replace("None", ""),
        };
        case.same(&format!("waypoint of {host}"), &[text_of(expected, "through").unwrap()], &[through]);
    }
    for expected in items(&expected, "nodeLocal") {
        let [from, to, is] = ["from", "to", "is"].map(|key| text_of(expected, key).unwrap());
        let got = mesh.settings().node_local.between(&from, &to).as_str().to_owned();
        case.same(&format!("from {from} to {to} on one node"), &[is], &[got]);
    }
    let known = ["nodeLocal", "egress", "says", "decisions", "services", "dialled", "workloads", "settings"];
    if let Value::Mapping(entries) = &expected.value {
        for entry in entries {
            assert!(known.contains(&&*entry.key), "{}: {} is not checked", case.name, entry.key);
        }
    }
    if let Some(expected) = text_of(&expected, "settings") {
        let s = repository.settings();
        let aliases: Vec<_> = s.trust_domains.aliases.iter().map(ToString::to_string).collect();
        let got = format!(
            "{} [{}] {} {} {:?}",
            s.trust_domains.own,
            aliases.join(" "),
            s.root_namespace,
            s.cluster_domain,
            s.outbound
        );
        case.same("settings", &[expected], &[got]);
        assert_eq!(s, mesh.settings(), "the model has the settings that are in force");
    }
    case.wrong
}

#[test]
fn every_case_decides_and_says_what_it_should() {
    let files = case_files();
    let wrong: Vec<String> = files.iter().flat_map(|f| run(f)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(files.len() >= 15, "{} cases", files.len());
}
