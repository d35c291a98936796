//! Policies, settings and external services, changed step by step: what comes of it is what the resources come to
//! when they are read at once, and a change costs what it touches.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use config::compile::Options;
use config::repository::{Content, Repository};
use model::{Change, Mesh};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

fn of_group(group: &str, kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: {group}/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

fn security(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    of_group("security.istio.io", kind, namespace, name, spec)
}

fn networking(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    of_group("networking.istio.io", kind, namespace, name, spec)
}

fn labelled(kind: &str, namespace: &str, name: &str, labels: &str, rest: &str) -> String {
    let place = if kind == "Namespace" { String::new() } else { format!("namespace: {namespace}, ") };
    format!("apiVersion: v1\nkind: {kind}\nmetadata: {{{place}name: {name}, labels: {{{labels}}}}}\n{rest}\n")
}

/// Each file with its versions. Addresses are shared only where what wins does not depend on who came first.
fn files() -> Vec<Vec<String>> {
    let mut files = inventory();
    for namespace in ["a", "istio-system"] {
        files.extend(authorization_policies(namespace));
        files.extend(peer_authentications(namespace));
    }
    files.extend(external());
    files.push(settings());
    files
}

/// Namespaces, pods and a service.
fn inventory() -> Vec<Vec<String>> {
    let mut files = Vec::new();
    for namespace in ["a", "b", "istio-system"] {
        let mode = "istio.io/dataplane-mode: ambient";
        files.push(
            [
                mode,
                "x: z",
                "istio.io/use-waypoint: gate",
                "istio.io/use-waypoint: gate, istio.io/use-waypoint-namespace: b",
            ]
            .iter()
            .map(|labels| labelled("Namespace", "", namespace, labels, ""))
            .chain(["direct", "encrypted", "kernel"].map(|mode| {
                format!(
                    "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, annotations: {{culvert.dev/node-local: {mode}}}}}\n"
                )
            }))
            .collect(),
        );
    }
    for (number, namespace) in ["a", "a", "a", "b", "b", "istio-system"].iter().enumerate() {
        let pod = |labels: &str| {
            let status = format!("status: {{podIP: 10.0.0.{number}}}");
            labelled("Pod", namespace, &format!("pod-{number}"), labels, &status)
        };
        files.push(vec![
            pod("app: x"),
            pod("app: w, tier: t"),
            pod("app: x, istio.io/use-waypoint: none"),
            pod("tier: t"),
        ]);
    }
    files.push(
        ["app: x", "app: w", "app: x, tier: t"]
            .iter()
            .map(|s| {
                labelled(
                    "Service",
                    "a",
                    "svc",
                    "",
                    &format!("spec: {{clusterIP: 10.1.0.1, selector: {{{s}}}, ports: [{{port: 80}}]}}"),
                )
            })
            .chain([labelled(
                "Service",
                "a",
                "svc",
                "istio.io/use-waypoint: gate",
                "spec: {clusterIP: 10.1.0.1, selector: {app: x}, ports: [{port: 81, targetPort: http}]}",
            )])
            .collect(),
    );
    files
}

fn authorization_policies(namespace: &str) -> Vec<Vec<String>> {
    let rule = "rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/z]}}]}]";
    let service_entry = "{targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: se0}]}";
    ["", "selector: {matchLabels: {app: x}}, ", "selector: {matchLabels: {app: x, tier: t}}, "]
        .iter()
        .enumerate()
        .map(|(number, selector)| {
            let policy = |spec: &str| security("AuthorizationPolicy", namespace, &format!("p{number}"), spec);
            vec![
                policy(&format!("{{{selector}{rule}}}")),
                policy(&format!("{{{selector}action: DENY, {rule}}}")),
                policy(&format!("{{{selector}action: AUDIT, {rule}}}")),
                policy("{targetRefs: [{group: '', kind: Service, name: svc}]}"),
                policy(service_entry),
                policy(service_entry)
                    .replace("metadata: {", "metadata: {annotations: {istio.io/dry-run: 'true'}, "),
                policy("{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gate}]}"),
                policy("{targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: c}]}"),
            ]
        })
        .collect()
}

fn peer_authentications(namespace: &str) -> Vec<Vec<String>> {
    let mut files = Vec::new();
    for name in ["m0", "m1", "m2"] {
        let pa = |spec: &str| security("PeerAuthentication", namespace, name, spec);
        files.push(vec![
            pa("{mtls: {mode: STRICT}}"),
            pa("{mtls: {mode: PERMISSIVE}}"),
            pa("{}"),
            pa("{selector: {matchLabels: {app: x}}, mtls: {mode: STRICT}, portLevelMtls: {80: {mode: PERMISSIVE}}}"),
            pa("{selector: {matchLabels: {app: x}}, portLevelMtls: {80: {mode: STRICT}, 81: {mode: PERMISSIVE}}}"),
            pa("{selector: {matchLabels: {tier: t}}, mtls: {mode: PERMISSIVE}}"),
            pa("{selector: {matchLabels: {tier: t}}}").replace(&format!("name: {name},"), &format!("name: {name}, creationTimestamp: '2026-01-01T00:00:00Z',")),
        ]);
    }
    files
}

/// What lies outside the mesh.
fn external() -> Vec<Vec<String>> {
    let mut files = Vec::new();
    for name in ["se0", "se1", "se2"] {
        let ports = "ports: [{number: 80, name: http, targetPort: 8080}]";
        files.push(vec![
            networking("ServiceEntry", "a", name, &format!("{{hosts: [h.example.com], {ports}, resolution: DNS}}")),
            networking("ServiceEntry", "a", name, &format!("{{hosts: [{name}.example.com, h.example.com], {ports}, resolution: STATIC, endpoints: [{{address: 10.0.0.1}}, {{address: 192.0.2.1, labels: {{app: x}}}}]}}")),
            networking("ServiceEntry", "a", name, &format!("{{hosts: [svc.a.svc.cluster.local], addresses: [10.1.0.1], {ports}, resolution: STATIC, endpoints: [{{address: 192.0.2.2}}]}}")),
            networking("ServiceEntry", "a", name, &format!("{{hosts: [{name}.example.com], addresses: [240.240.186.4, 10.7.0.0/16], {ports}, resolution: STATIC, workloadSelector: {{labels: {{app: x}}}}}}")),
            networking("ServiceEntry", "a", name, "{hosts: [api.example.com], ports: [{number: 443, name: tls}], resolution: DNS}"),
        ]);
    }
    files.push(vec![
        networking(
            "WorkloadEntry",
            "a",
            "vm",
            "{address: 192.0.2.50, labels: {app: x}, ports: {http: 9090}}",
        ),
        networking("WorkloadEntry", "a", "vm", "{address: vm.example.com, labels: {app: w, tier: t}}"),
    ]);
    files
}

fn settings() -> Vec<String> {
    let config = |mesh: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: '{mesh}'}}\n"
        )
    };
    vec![
        config("rootNamespace: a"),
        config("trustDomain: other.org"),
        config("clusterDomain: example"),
        config("outboundTrafficPolicy: {mode: REGISTRY_ONLY}"),
        config("nodeLocal: direct"),
    ]
}

fn path(number: usize) -> Arc<str> {
    format!("{number:02}.yaml").into()
}

/// Everything, in an order that does not depend on how it came.
fn dump(mesh: &Mesh, repository: &Repository) -> BTreeSet<String> {
    let workloads = mesh.workloads().map(|w| format!("{w:?}"));
    let services = mesh.services().map(|s| {
        let mut endpoints: Vec<_> = mesh
            .endpoints(&s.key())
            .map(|set| {
                set.as_slice().iter().map(|e| format!("{} {:?}", e.workload.uid, set.ports(e))).collect()
            })
            .unwrap_or_default();
        endpoints.sort();
        format!("{s:?} {endpoints:?}")
    });
    let holders = mesh.workloads().flat_map(|w| {
        w.network_addresses()
            .map(|address| format!("{address:?} {}", mesh.workload_at(&address).unwrap().uid))
            .collect::<Vec<_>>()
    });
    let policies = mesh.policies().map(|p| format!("{p:?}"));
    let said = repository.diagnostics().into_iter().map(|d| format!("{d}"));
    let settings = [format!("{:?}", mesh.settings())];
    workloads.chain(services).chain(holders).chain(policies).chain(said).chain(settings).collect()
}

/// Few files that are all about the same: two entries of one host, selector and ports, of which the older decides
/// whose policies hold for the pods.
fn one_host() -> Vec<Vec<String>> {
    let mut files = Vec::new();
    for (name, years) in [("se0", ["2020", "2022"]), ("se1", ["2021", "2023"])] {
        let spec = "{hosts: [same.example.com], ports: [{number: 80, name: http}], resolution: STATIC, \
                    workloadSelector: {labels: {app: x}}}";
        let entry = |year: &str, labels: &str| {
            let metadata = format!("name: {name}, creationTimestamp: '{year}-01-01T00:00:00Z', {labels}");
            networking("ServiceEntry", "a", name, spec).replace(&format!("name: {name}, "), &metadata)
        };
        let bound = "labels: {istio.io/use-waypoint: gate}, ";
        files.push(years.iter().flat_map(|year| [entry(year, ""), entry(year, bound)]).collect());
    }
    for name in ["se0", "se1", "gate"] {
        let (group, kind) = match name {
            "gate" => ("gateway.networking.k8s.io", "Gateway"),
            _ => ("networking.istio.io", "ServiceEntry"),
        };
        let target = format!("targetRefs: [{{group: {group}, kind: {kind}, name: {name}}}]");
        files.push(vec![
            security("AuthorizationPolicy", "a", name, &format!("{{action: DENY, rules: [{{}}], {target}}}")),
            security(
                "AuthorizationPolicy",
                "a",
                name,
                &format!("{{action: AUDIT, rules: [{{}}], {target}}}"),
            ),
        ]);
    }
    let listed = "{hosts: [same.example.com, more.example.com], ports: [{number: 80, name: http}], resolution: STATIC, \
                  location: MESH_INTERNAL, endpoints: [{address: 10.0.0.1}, {address: 10.0.0.2}]}";
    files.push(vec![
        networking("ServiceEntry", "a", "gate", listed),
        networking("ServiceEntry", "b", "gate", listed),
    ]);
    for namespace in ["a", "b"] {
        let at = |spec: &str| {
            networking("WorkloadEntry", namespace, "vm", &format!("{{address: {spec}, labels: {{app: x}}}}"))
        };
        files.push(vec![at("10.0.0.1, weight: 7"), at("10.0.0.3, serviceAccount: vm")]);
        let at = |spec: &str| {
            networking(
                "ServiceEntry",
                namespace,
                "vm",
                &format!(
                    "{{hosts: [vm.example.com], ports: [{{number: 80, name: http}}], resolution: STATIC, endpoints: [{{address: {spec}}}]}}"
                ),
            )
        };
        files.push(vec![
            at("10.0.0.3").replace("resolution", "addresses: [10.0.0.1], resolution"),
            at("10.0.0.2, weight: 3"),
            at("10.0.0.3, labels: {networking.istio.io/tunnel: http}"),
        ]);
    }
    for (namespace, ip) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
        let pod =
            |labels: &str| labelled("Pod", namespace, "pod", labels, &format!("status: {{podIP: {ip}}}"));
        files.push(vec![pod("app: x"), pod("app: w"), pod("app: x, istio.io/dataplane-mode: none")]);
        let ambient = "istio.io/dataplane-mode: ambient";
        let bound = format!("{ambient}, istio.io/use-waypoint: gate");
        files.push(
            [ambient, "x: z", &bound].map(|labels| labelled("Namespace", "", namespace, labels, "")).to_vec(),
        );
    }
    files
}

/// Files by number, changed in batches: which file, to which version, and whether (0) it goes.
type Batches = Vec<Vec<(Index, Index, u8)>>;

fn batches() -> impl Strategy<Value = Batches> {
    vec(vec((any::<Index>(), any::<Index>(), 0u8..4), 1..6), 1..14)
}

fn same_as_at_once(files: &[Vec<String>], batches: Batches) -> Result<(), TestCaseError> {
    let (mut repository, mut mesh) = (Repository::new(Options::default()), Mesh::default());
    let mut held: BTreeMap<usize, String> = BTreeMap::new();
    for batch in batches {
        for (file, version, gone) in batch {
            let number = file.index(files.len());
            if gone == 0 {
                held.remove(&number);
                repository.stage(&path(number), Content::Gone);
            } else {
                let text = version.get(&files[number]);
                held.insert(number, text.clone());
                repository.stage(&path(number), Content::Bytes(text.as_bytes()));
            }
        }
        mesh = mesh.apply(repository.commit().changes);
    }
    let mut fresh = Repository::new(Options::default());
    for (number, text) in &held {
        fresh.stage(&path(*number), Content::Bytes(text.as_bytes()));
    }
    let at_once = Mesh::default().apply(fresh.commit().changes);
    let (expected, got) = (dump(&at_once, &fresh), dump(&mesh, &repository));
    let missing: Vec<_> = expected.difference(&got).collect();
    let extra: Vec<_> = got.difference(&expected).collect();
    prop_assert!(
        missing.is_empty() && extra.is_empty(),
        "missing {:#?}\nextra {:#?}\nof {:#?}",
        missing,
        extra,
        held
    );
    prop_assert!(fresh.diagnostics().iter().all(|d| d.code.as_str() != "unread-field"));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn step_by_step_comes_to_the_same_as_at_once(batches in batches()) {
        same_as_at_once(&files(), batches)?;
    }

    #[test]
    fn what_shares_hosts_and_addresses_comes_to_the_same_in_any_order(batches in batches()) {
        same_as_at_once(&one_host(), batches)?;
    }
}

/// A mesh of `pods` pods in ten namespaces, of which every tenth in each is labelled `app: x`.
fn large(pods: usize) -> (Repository, Mesh) {
    let mut repository = Repository::new(Options::default());
    let text: Vec<String> = (0..pods)
        .map(|n| {
            let (namespace, app) = (n % 10, if n / 10 % 10 == 0 { "x" } else { "w" });
            let status = format!("status: {{podIP: 10.{}.{}.{}}}", 10 + n / 65_536, n / 256 % 256, n % 256);
            labelled("Pod", &format!("ns{namespace}"), &format!("pod-{n}"), &format!("app: {app}"), &status)
        })
        .collect();
    let outcome = repository.apply(&"pods.yaml".into(), Content::Bytes(text.join("---\n").as_bytes()));
    let mesh = Mesh::default().apply(outcome.changes);
    assert_eq!(mesh.workload_count(), pods);
    (repository, mesh)
}

/// What a file's new content changes and costs: workloads, policies, steps.
fn cost(repository: &mut Repository, file: &str, text: &str) -> (usize, usize, u64) {
    let before = repository.steps();
    let changes = repository.apply(&file.into(), Content::Bytes(text.as_bytes())).changes;
    let workloads = changes.iter().filter(|c| matches!(c, Change::SetWorkload(_))).count();
    let policies =
        changes.iter().filter(|c| matches!(c, Change::SetPolicy(_) | Change::RemovePolicy(_))).count();
    // The form for waypoints comes and goes with the other.
    let forms = changes
        .iter()
        .filter(|c| matches!(c, Change::SetHttpPolicy(_) | Change::RemoveHttpPolicy(_)))
        .count();
    assert_eq!(changes.len(), workloads + policies + forms, "{changes:?}");
    assert!(forms <= policies.max(1), "{changes:?}");
    (workloads, policies, repository.steps() - before)
}

#[test]
fn a_change_touches_the_pods_that_it_is_for() {
    let (mut repository, _) = large(2000);
    let mut touched = |file: &str, text: &str| {
        let (workloads, policies, steps) = cost(&mut repository, file, text);
        assert!(steps < 20 + 4 * workloads as u64, "{steps} steps for {workloads} workloads: {text}");
        (workloads, policies)
    };
    let ap = |spec: &str| security("AuthorizationPolicy", "ns1", "p", spec);
    let selector = "selector: {matchLabels: {app: x}}";
    assert_eq!(touched("ap.yaml", &ap(&format!("{{{selector}}}"))), (20, 1), "20 of 200 pods of ns1 are x");
    let deny = format!("{{{selector}, action: DENY, rules: [{{}}]}}");
    assert_eq!(touched("ap.yaml", &ap(&deny)), (0, 1), "its rules change, and who lists it does not");
    assert_eq!(touched("ap.yaml", &format!("# moved\n{}", ap(&deny))), (0, 0));
    assert_eq!(touched("ap.yaml", &ap("{}")), (20, 1), "a policy for the namespace is listed by nobody");
    assert_eq!(touched("ap.yaml", ""), (0, 1));

    let root = |spec: &str| security("AuthorizationPolicy", "istio-system", "r", spec);
    assert_eq!(touched("root.yaml", &root("{action: DENY, rules: [{}]}")), (0, 1));
    assert_eq!(touched("root.yaml", &root(&format!("{{{selector}}}"))), (200, 1), "x of all namespaces");
    assert_eq!(touched("root.yaml", ""), (200, 1));

    let pa = |spec: &str| security("PeerAuthentication", "ns2", "m", spec);
    // The policy that STRICT workloads list comes with the first of them.
    assert_eq!(touched("pa.yaml", &pa("{mtls: {mode: STRICT}}")), (200, 1));
    assert_eq!(touched("pa.yaml", &pa(&format!("{{{selector}, mtls: {{mode: STRICT}}}}"))), (180, 0));
    let ports =
        format!("{{{selector}, mtls: {{mode: STRICT}}, portLevelMtls: {{80: {{mode: PERMISSIVE}}}}}}");
    assert_eq!(touched("pa.yaml", &pa(&ports)), (20, 1));
    assert_eq!(touched("pa.yaml", &pa(&ports.replace("80:", "81:"))), (0, 1), "other ports, the same policy");
    assert_eq!(touched("pa.yaml", ""), (20, 2), "with the last of them the policy that they share goes too");
}

#[test]
fn a_change_of_the_whole_mesh_touches_what_it_changes() {
    let (mut repository, mesh) = large(500);
    let strict = security("PeerAuthentication", "istio-system", "default", "{mtls: {mode: STRICT}}");
    let open = security("PeerAuthentication", "ns3", "open", "{mtls: {mode: PERMISSIVE}}");
    cost(&mut repository, "open.yaml", &open);
    let (workloads, ..) = cost(&mut repository, "strict.yaml", &strict);
    assert_eq!(workloads, 450, "all but those of ns3, which says otherwise");
    drop(mesh);
}
