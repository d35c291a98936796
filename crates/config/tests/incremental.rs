//! However the resources came about, what they compile to is the same: random edits, one after the other, leave
//! the model that the final files make when they are read at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::sync::Arc;

use config::compile::{EnrolmentChange, Options};
use config::diagnostic::Code;
use config::repository::{Content, Outcome, Repository};
use model::Mesh;
use proptest::prelude::*;

/// An object of a few, in one of its versions; every file holds one object, so that no history shows.
fn object() -> impl Strategy<Value = (String, String)> {
    let ns = || 0..2usize;
    let app = || 0..3usize;
    prop_oneof![
        2 => (ns(), 0..4usize).prop_map(|(n, v)| namespace(n, v)),
        6 => (ns(), 0..5usize, app(), 0..6usize).prop_map(|(n, i, a, v)| pod(n, i, a, v)),
        4 => (ns(), 0..3usize, app(), 0..6usize).prop_map(|(n, i, a, v)| service(n, i, a, v)),
        2 => (ns(), 0..3usize, 0..5usize, any::<bool>()).prop_map(|(n, s, p, r)| slice(n, s, p, r)),
        1 => (0..2usize, 0..2usize).prop_map(|(i, zone)| node(i, zone)),
        2 => (ns(), app(), 0..3usize).prop_map(|(n, a, v)| policy(n, a, v)),
        1 => (ns(), app(), 0..3usize).prop_map(|(n, a, v)| authentication(n, a, v)),
        2 => (ns(), app(), 0..3usize).prop_map(|(n, a, v)| service_entry(n, a, v)),
        1 => (ns(), app()).prop_map(|(n, a)| workload_entry(n, a)),
    ]
}

fn file(kind: &str, name: &str, text: String) -> (String, String) {
    (format!("{kind}-{name}.yaml"), text)
}

fn namespace(n: usize, version: usize) -> (String, String) {
    let label = ["", "labels: {istio.io/dataplane-mode: ambient}", "labels: {a: b}", ""][version];
    let annotation = if version == 3 {
        "annotations: {networking.istio.io/traffic-distribution: PreferClose}"
    } else {
        ""
    };
    let fields = [format!("name: n{n}"), label.to_owned(), annotation.to_owned()];
    let fields: Vec<_> = fields.into_iter().filter(|f| !f.is_empty()).collect();
    file(
        "namespace",
        &n.to_string(),
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{{}}}\n", fields.join(", ")),
    )
}

fn pod(n: usize, i: usize, app: usize, version: usize) -> (String, String) {
    let extra =
        ["", ", v: x", ", istio.io/dataplane-mode: none", ", istio.io/dataplane-mode: ambient", "", ""]
            [version];
    let host = version == 4;
    let phase = if version == 5 { "Succeeded" } else { "Running" };
    let text = format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: p{i}
  namespace: n{n}
  labels: {{app: a{app}{extra}}}
  annotations: {{culvert.dev/netns: /run/netns/p{i}}}
spec:
  nodeName: node{}
  hostNetwork: {host}
  containers: [{{name: c, ports: [{{name: web, containerPort: {}}}]}}]
status: {{podIP: 10.0.{n}.{i}, phase: {phase}}}
",
        i % 2,
        8000 + version,
    );
    file("pod", &format!("{n}-{i}"), text)
}

fn service(n: usize, i: usize, app: usize, version: usize) -> (String, String) {
    let selector = if version == 0 { String::new() } else { format!("selector: {{app: a{app}}}, ") };
    let target = if version == 2 { ", targetPort: web" } else { "" };
    let more =
        ["", "", "", "trafficDistribution: PreferSameNode, ", "internalTrafficPolicy: Local, ", ""][version];
    let ip = if version == 5 { "None".to_owned() } else { format!("10.96.{n}.{i}") };
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: n{n}}}\nspec: {{{selector}{more}clusterIP: \
         {ip}, ports: [{{name: http, port: 80{target}}}]}}\n"
    );
    file("service", &format!("{n}-{i}"), text)
}

/// Endpoints at a pod's address, and at one that nobody has.
fn slice(n: usize, service: usize, pod: usize, ready: bool) -> (String, String) {
    let text = format!(
        "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: e{service}, namespace: n{n}, labels: {{kubernetes.io/service-name: s{service}}}}}
addressType: IPv4
ports: [{{name: http, port: 9000}}]
endpoints:
- {{addresses: [10.0.{n}.{pod}], conditions: {{ready: {ready}}}}}
- {{addresses: [192.0.2.{service}], nodeName: node0}}
"
    );
    file("slice", &format!("{n}-{service}"), text)
}

fn node(i: usize, zone: usize) -> (String, String) {
    let text = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: node{i}, labels: {{topology.kubernetes.io/zone: z{zone}}}}}\n"
    );
    file("node", &i.to_string(), text)
}

fn policy(n: usize, app: usize, version: usize) -> (String, String) {
    let spec = [
        format!("{{selector: {{matchLabels: {{app: a{app}}}}}, action: DENY, rules: [{{}}]}}"),
        "{}".to_owned(),
        format!(
            "{{selector: {{matchLabels: {{app: a{app}, v: x}}}}, rules: [{{from: [{{source: {{namespaces: [n0]}}}}]}}]}}"
        ),
    ];
    let text = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: z{app}, namespace: \
         n{n}}}\nspec: {}\n",
        spec[version]
    );
    file("policy", &format!("{n}-{app}"), text)
}

fn authentication(n: usize, app: usize, version: usize) -> (String, String) {
    let (name, namespace, spec) = match version {
        0 => (
            format!("w{app}"),
            format!("n{n}"),
            format!("{{selector: {{matchLabels: {{app: a{app}}}}}, mtls: {{mode: STRICT}}}}"),
        ),
        1 => ("default".to_owned(), format!("n{n}"), "{mtls: {mode: STRICT}}".to_owned()),
        _ => ("default".to_owned(), "istio-system".to_owned(), "{mtls: {mode: STRICT}}".to_owned()),
    };
    let text = format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: \
         {namespace}}}\nspec: {spec}\n"
    );
    file("authentication", &format!("{namespace}-{name}"), text)
}

fn service_entry(n: usize, app: usize, version: usize) -> (String, String) {
    let members = [
        format!("resolution: STATIC, workloadSelector: {{labels: {{app: a{app}}}}}"),
        format!("resolution: STATIC, endpoints: [{{address: 203.0.113.{app}}}, {{address: 10.0.{n}.{app}}}]"),
        "resolution: NONE, addresses: [198.51.100.0/24]".to_owned(),
    ];
    let text = format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: e{app}, namespace: n{n}}}\nspec: \
         {{hosts: [e{app}.example.com], location: MESH_EXTERNAL, ports: [{{name: tcp, number: 90, protocol: TCP}}], \
         {}}}\n",
        members[version]
    );
    file("entry", &format!("{n}-{app}"), text)
}

fn workload_entry(n: usize, app: usize) -> (String, String) {
    let text = format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: v{app}, namespace: n{n}, labels: \
         {{app: a{app}}}}}\nspec: {{address: 172.16.{n}.{app}, labels: {{app: a{app}}}}}\n"
    );
    file("machine", &format!("{n}-{app}"), text)
}

/// The model, the enrolments and what is said, in words.
#[derive(Default)]
struct State {
    mesh: Mesh,
    enrolments: BTreeMap<String, String>,
}

impl State {
    fn take(&mut self, outcome: Outcome) {
        self.mesh = self.mesh.apply(outcome.changes);
        for change in outcome.enrolments {
            match change {
                EnrolmentChange::Set(e) => {
                    self.enrolments.insert(e.uid.to_string(), format!("{e:?}"));
                }
                EnrolmentChange::Remove(uid) => {
                    self.enrolments.remove(&*uid).expect("only what is there is removed");
                }
            }
        }
    }

    fn describe(&self, repository: &Repository) -> Vec<String> {
        let mut all: Vec<String> = self.mesh.workloads().map(|w| format!("{w:?}")).collect();
        all.extend(self.mesh.services().map(|s| format!("{s:?}")));
        all.extend(self.mesh.policies().map(|p| format!("{p:?}")));
        all.extend(self.enrolments.values().cloned());
        all.extend(repository.diagnostics().iter().map(ToString::to_string));
        all.push(format!("{:?}", self.mesh.settings()));
        all.sort();
        all
    }
}

fn repository() -> Repository {
    Repository::new(Options { node: Some("node0".into()), ..Options::default() })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn edits_one_by_one_come_to_the_same_as_the_files_at_once(
        edits in proptest::collection::vec((object(), 0..4u8, 0..3u8), 1..60)
    ) {
        let mut files: BTreeMap<Arc<str>, String> = BTreeMap::new();
        let (mut edited, mut state) = (repository(), State::default());
        for ((path, text), kind, more) in edits {
            let path: Arc<str> = path.into();
            if kind == 0 {
                files.remove(&path);
                edited.stage(&path, Content::Gone);
            } else {
                edited.stage(&path, Content::Bytes(text.as_bytes()));
                files.insert(path, text);
            }
            if more > 0 {
                continue; // one batch with the next
            }
            state.take(edited.commit());
        }
        state.take(edited.commit());
        let (mut fresh, mut expected) = (repository(), State::default());
        for (path, text) in &files {
            fresh.stage(path, Content::Bytes(text.as_bytes()));
        }
        expected.take(fresh.commit());
        prop_assert_eq!(state.describe(&edited), expected.describe(&fresh));
        // And nothing is left when all is gone.
        for path in files.keys() {
            edited.stage(path, Content::Gone);
        }
        state.take(edited.commit());
        prop_assert_eq!(state.mesh.workload_count(), 0);
        prop_assert_eq!(state.mesh.services().count() + state.mesh.policies().count(), 0);
        prop_assert!(state.enrolments.is_empty() && edited.diagnostics().is_empty());
    }
}

/// A pod of this node with some of a few addresses, an IPv4 and an IPv6 one.
fn crowded(pod: usize, v4: Option<usize>, v6: Option<usize>) -> Option<String> {
    let v4 = v4.map(|n| format!("{{ip: 10.0.0.{n}}}"));
    let v6 = v6.map(|n| format!("{{ip: 'fd00::a{n}'}}"));
    let ips: Vec<String> = v4.into_iter().chain(v6).collect();
    (!ips.is_empty()).then(|| {
        format!(
            "apiVersion: v1
kind: Pod
metadata:
  name: p{pod}
  namespace: n0
  labels: {{istio.io/dataplane-mode: ambient}}
  annotations: {{culvert.dev/netns: /run/netns/p{pod}}}
spec: {{nodeName: node0}}
status: {{podIPs: [{}]}}
",
            ips.join(", ")
        )
    })
}

type Crowd = Vec<(usize, Option<usize>, Option<usize>, bool)>;

fn crowd() -> impl Strategy<Value = Crowd> {
    let address = || proptest::option::weighted(0.7, 0..4usize);
    proptest::collection::vec((0..7usize, address(), address(), any::<bool>()), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever came when: no two pods in force share an address, none gives way to one that is not in force, and
    /// all that are there are captured.
    #[test]
    fn pods_that_share_addresses_give_way_to_pods_in_force_only(edits in crowd()) {
        let (mut repository, mut state) = (repository(), State::default());
        let mut pods: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (pod, v4, v6, commit) in edits {
            let text = crowded(pod, v4, v6);
            let path: Arc<str> = format!("p{pod}.yaml").into();
            repository.stage(&path, text.as_ref().map_or(Content::Gone, |t| Content::Bytes(t.as_bytes())));
            let ips: Vec<String> =
                v4.map(|n| format!("10.0.0.{n}")).into_iter().chain(v6.map(|n| format!("fd00::a{n}"))).collect();
            pods.remove(&format!("p{pod}"));
            if !ips.is_empty() {
                pods.insert(format!("p{pod}"), ips);
            }
            if !commit {
                continue;
            }
            state.take(repository.commit());
            let in_force: Vec<&String> = pods.keys().filter(|name| state.mesh.workloads().any(|w| *w.name() == ***name)).collect();
            let shares = |a: &String, b: &String| pods[a].iter().any(|ip| pods[b].contains(ip));
            for name in pods.keys() {
                let other = in_force.iter().find(|other| **other != name && shares(name, other));
                let said = repository.diagnostics();
                prop_assert!(said.iter().all(|d| d.code == Code::AddressConflict), "{said:?}");
                prop_assert_eq!(in_force.contains(&name), other.is_none(), "{} and {:?} of {:?}", name, other, pods);
            }
            prop_assert_eq!(state.mesh.workload_count(), in_force.len());
            prop_assert_eq!(state.enrolments.len(), pods.len(), "all are captured: {:?}", pods);
        }
    }
}
