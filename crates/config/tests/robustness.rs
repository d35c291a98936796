//! Whatever a file holds, nothing panics, what was in force stays, and when it is gone nothing of it is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::Arc;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::Mesh;
use proptest::prelude::*;

/// One object of every kind with most of its fields, to be damaged.
const MANIFESTS: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: a
  namespace: ns
  labels: {app: a, istio.io/dataplane-mode: ambient}
  annotations:
    culvert.dev/netns: /run/netns/a
    traffic.sidecar.istio.io/excludeInboundPorts: 80,90-100
    traffic.sidecar.istio.io/includeOutboundIPRanges: 10.0.0.0/8
  ownerReferences: [{kind: ReplicaSet, name: a-1, controller: true}]
spec:
  nodeName: n1
  hostNetwork: false
  containers: [{name: c, ports: [{name: web, containerPort: 80}]}]
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}], conditions: [{type: Ready, status: \"True\"}]}
---
apiVersion: v1
kind: Service
metadata: {name: s, namespace: ns}
spec:
  selector: {app: a}
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1]
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 10}}
  ports: [{name: http, port: 80, targetPort: web}, {name: x, port: 81, targetPort: 8081, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: e, namespace: ns, labels: {kubernetes.io/service-name: s}}
addressType: IPv4
ports: [{name: http, port: 90}]
endpoints: [{addresses: [10.0.0.9], conditions: {ready: true}, nodeName: n1, zone: z}]
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: ns, labels: {istio.io/dataplane-mode: ambient}}}
- {apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/zone: z}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: ns, annotations: {istio.io/dry-run: \"true\"}}
spec:
  selector: {matchLabels: {app: a}}
  action: DENY
  rules:
  - from: [{source: {principals: [\"*/sa/x\"], notNamespaces: [ns], ipBlocks: [10.0.0.0/8]}}]
    to: [{operation: {ports: [\"80\"], notPorts: [\"81\"]}}]
    when: [{key: source.ip, values: [10.0.0.1]}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: q, namespace: ns}
spec: {selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: PERMISSIVE}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: x, namespace: ns}
spec:
  hosts: [x.example.com]
  addresses: [198.51.100.1, 198.51.100.128/25]
  ports: [{name: tcp, number: 90, protocol: TCP, targetPort: 91}]
  resolution: STATIC
  endpoints: [{address: 203.0.113.1, ports: {tcp: 92}, labels: {a: b}, locality: r/z}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: w, namespace: ns}
spec: {address: 203.0.113.7, ports: {web: 80}, labels: {app: a}, serviceAccount: sa, weight: 3}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomain: td
    trustDomainAliases: [old]
    outboundTrafficPolicy: {mode: REGISTRY_ONLY}
";

fn describe(mesh: &Mesh) -> Vec<String> {
    let mut all: Vec<String> = mesh.workloads().map(|w| format!("{w:?}")).collect();
    all.extend(mesh.services().map(|s| format!("{s:?}")));
    all.extend(mesh.policies().map(|p| format!("{p:?}")));
    all.push(format!("{:?}", mesh.settings()));
    all.sort();
    all
}

/// Takes `content` in after a good file, and out again.
fn survives(content: &[u8]) {
    let options = Options { node: Some("n1".into()), ..Options::default() };
    let mut repository = Repository::new(options);
    let (good, bad): (Arc<str>, Arc<str>) = ("good.yaml".into(), "worse.yaml".into());
    let pod =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: good, labels: {app: a}}\nstatus: {podIP: 10.9.9.9}\n";
    let mut mesh = Mesh::default().apply(repository.apply(&good, Content::Bytes(pod.as_bytes())).changes);
    let before = describe(&mesh);
    mesh = mesh.apply(repository.apply(&bad, Content::Bytes(content)).changes);
    assert!(mesh.workload("Kubernetes//Pod/default/good").is_some());
    for diagnostic in repository.diagnostics() {
        assert!(diagnostic.to_string().len() < 20_000);
    }
    mesh = mesh.apply(repository.apply(&bad, Content::Gone).changes);
    assert_eq!(describe(&mesh), before);
    assert!(repository.diagnostics().is_empty());
}

#[test]
fn the_undamaged_manifests_are_good() {
    let mut repository = Repository::new(Options::default());
    let outcome = repository.apply(&"a.yaml".into(), Content::Bytes(MANIFESTS.as_bytes()));
    assert!(!repository.has_bad_files(), "{:?}", repository.diagnostics());
    assert!(outcome.changes.len() >= 9, "{:?}", outcome.changes);
    survives(MANIFESTS.as_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        survives(&bytes);
    }

    #[test]
    fn a_damaged_manifest_does_no_harm(
        edits in proptest::collection::vec(
            (0..MANIFESTS.len(), 0..12usize, "[ -~\n]{0,4}|\\{|\\}|\\[|\\]|: |\n- |null|-1|0|99999999999999999999|\"\"|\\*|é|~|\\{\\}|\\[\\]"),
            1..6,
        )
    ) {
        let mut text = MANIFESTS.to_owned();
        for (at, cut, insert) in edits {
            let at = (0..=at.min(text.len())).rev().find(|i| text.is_char_boundary(*i)).unwrap();
            let end = (at + cut..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
            text.replace_range(at..end, &insert);
        }
        survives(text.as_bytes());
    }

    #[test]
    fn a_value_in_the_place_of_another_does_no_harm(
        line in 0..MANIFESTS.lines().count(),
        value in "null|[0-9]{1,6}|\\[\\]|\\{\\}|\\[null\\]|\"\"|[a-z*./:-]{1,12}|\\[[a-z*./0-9-]{1,8}\\]|\\{a: b\\}|true",
    ) {
        let lines = MANIFESTS.lines().enumerate().map(|(i, l)| match l.split_once(": ") {
            Some((key, _)) if i == line => format!("{key}: {value}"),
            _ => l.to_owned(),
        });
        survives(lines.collect::<Vec<_>>().join("\n").as_bytes());
    }
}
