//! What changes cost when there is a lot, and what reading a lot costs.
//!
//! `cargo test --release -p config --test scale -- --ignored --nocapture` prints time and memory for 100,000 pods.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use config::compile::Options;
use config::directory::{self, Directory};
use config::repository::{Content, Repository};
use model::Mesh;
use tempfile::TempDir;

/// A pod of one of a hundred Deployments in one of twenty namespaces, as a cluster would show it in short.
fn pod(number: usize, ready: bool) -> String {
    let (app, namespace) = (number % 100, number % 20);
    format!(
        "---
apiVersion: v1
kind: Pod
metadata:
  name: app-{app}-5d8f7c9b6-{number:05x}
  namespace: ns-{namespace}
  labels:
    app: app-{app}
    version: v1
    pod-template-hash: 5d8f7c9b6
  ownerReferences:
  - apiVersion: apps/v1
    kind: ReplicaSet
    name: app-{app}-5d8f7c9b6
    uid: 8b0f3f2e-7a61-4a58-9d3c-000000000000
    controller: true
spec:
  nodeName: node-{node}
  serviceAccountName: app-{app}
  containers:
  - name: main
    image: registry.example.com/app-{app}:v1
    ports:
    - name: http
      containerPort: 8080
status:
  phase: Running
  podIP: 10.{a}.{b}.{c}
  podIPs:
  - ip: 10.{a}.{b}.{c}
  conditions:
  - type: Ready
    status: \"{status}\"
",
        node = number % 500,
        a = 1 + number / 65_536,
        b = number / 256 % 256,
        c = number % 256,
        status = if ready { "True" } else { "False" },
    )
}

fn surroundings() -> String {
    let mut text = String::new();
    for n in 0..20 {
        writeln!(
            text,
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: ns-{n}, labels: {{istio.io/dataplane-mode: \
             ambient}}}}"
        )
        .unwrap();
    }
    for app in 0..100 {
        writeln!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: app-{app}, namespace: ns-{}}}\nspec: \
             {{clusterIP: 10.96.0.{app}, selector: {{app: app-{app}}}, ports: [{{port: 80, targetPort: http}}]}}",
            app % 20
        )
        .unwrap();
    }
    for node in 0..500 {
        writeln!(
            text,
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-{node}, labels: \
             {{topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z{}}}}}",
            node % 3
        )
        .unwrap();
    }
    text
}

fn file(first: usize, count: usize) -> String {
    (first..first + count).map(|n| pod(n, true)).collect()
}

/// What one pod's change costs in a repository of `count` pods.
fn steps_of_one_change(count: usize) -> u64 {
    let mut repository = Repository::new(Options::default());
    repository.stage(&"a.yaml".into(), Content::Bytes(surroundings().as_bytes()));
    let path: Arc<str> = "pods.yaml".into();
    let text = file(0, count);
    repository.stage(&path, Content::Bytes(text.as_bytes()));
    let outcome = repository.commit();
    let mesh = Mesh::default().apply(outcome.changes);
    assert_eq!(mesh.workload_count(), count);
    let before = repository.steps();
    let changed = text.replace(&pod(count / 2, true), &pod(count / 2, false));
    let outcome = repository.apply(&path, Content::Bytes(changed.as_bytes()));
    assert_eq!(outcome.changes.len(), 1);
    repository.steps() - before
}

#[test]
fn one_pods_change_costs_the_same_however_many_there_are() {
    let (few, many) = (steps_of_one_change(100), steps_of_one_change(10_000));
    assert_eq!(few, many);
    assert!(many < 10, "{many} steps");
}

#[test]
fn a_policys_change_costs_what_it_selects() {
    let mut repository = Repository::new(Options::default());
    let text = surroundings() + &file(0, 5000);
    repository.apply(&"a.yaml".into(), Content::Bytes(text.as_bytes()));
    let before = repository.steps();
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: \
                  ns-7}\nspec: {selector: {matchLabels: {app: app-7, version: v1}}, action: DENY, rules: [{}]}\n";
    let outcome = repository.apply(&"p.yaml".into(), Content::Bytes(policy.as_bytes()));
    // 50 of the 5000 are selected: each is found, marked and compiled. The policy comes in two forms, for nodes and for
    // waypoints.
    assert_eq!(outcome.changes.len(), 52, "{:?}", outcome.diagnostics);
    let steps = repository.steps() - before;
    assert!(steps < 200, "{steps} steps");
}

/// Services that a waypoint stands before, each with a route of its own, every second one of the Gateway API.
fn routed(count: usize) -> String {
    let mut text = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: gate, namespace: shop}\nspec: \
                    {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n---\n\
                    apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/use-waypoint: gate}}\n"
        .to_owned();
    for n in 0..count {
        let (a, b) = (n / 256, n % 256);
        writeln!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: shop}}\nspec: {{clusterIP: \
             10.{}.{a}.{b}, ports: [{{name: http, port: 80}}]}}",
            100
        )
        .unwrap();
        text += &route(n, "/");
    }
    text
}

fn route(n: usize, path: &str) -> String {
    let next = n / 2 * 2;
    if n.is_multiple_of(2) {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r{n}, namespace: shop}}\nspec: \
             {{parentRefs: [{{group: '', kind: Service, name: s{n}}}], rules: [{{matches: [{{path: {{value: {path}}}}}], \
             backendRefs: [{{name: s{next}, port: 80}}]}}]}}\n"
        )
    } else {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: r{n}, namespace: shop}}\nspec: \
             {{hosts: [s{n}], http: [{{match: [{{uri: {{prefix: {path}}}}}], route: [{{destination: {{host: s{next}}}}}]}}]}}\n"
        )
    }
}

/// What the change of an HTTPRoute and of a VirtualService costs among `count` services with routes.
fn steps_of_one_route(count: usize) -> [u64; 2] {
    let mut repository = Repository::new(Options::default());
    let made = repository.apply(&"all.yaml".into(), Content::Bytes(routed(count).as_bytes())).changes;
    assert_eq!(Mesh::default().apply(made).http_services().count(), count);
    [10, 11].map(|service| {
        let path: Arc<str> = format!("{service}.yaml").into();
        let text = |path: &str| route(service, path).replace(&format!("name: r{service},"), "name: another,");
        repository.apply(&path, Content::Bytes(text("/").as_bytes()));
        let before = repository.steps();
        // The VirtualService is the second for its host, and not in force.
        let outcome = repository.apply(&path, Content::Bytes(text("/other").as_bytes()));
        assert!(outcome.changes.len() <= 1, "{:?}", outcome.diagnostics);
        repository.steps() - before
    })
}

#[test]
fn one_routes_change_costs_the_same_however_many_there_are() {
    let (few, many) = (steps_of_one_route(20), steps_of_one_route(10_000));
    assert_eq!(few, many);
    assert!(many.iter().all(|steps| *steps < 6), "{many:?} steps");
}

#[test]
#[ignore = "a measurement: run it alone, in a release build"]
fn time_of_10_000_routes() {
    let text = routed(10_000);
    let (rss, cpu) = (status("VmRSS"), cpu_ms());
    let mut repository = Repository::new(Options::default());
    let outcome = repository.apply(&"all.yaml".into(), Content::Bytes(text.as_bytes()));
    println!("10,000 services and routes: {} ms CPU, {} MB", cpu_ms() - cpu, status("VmRSS") - rss);
    let (mut mesh, cpu) = (Mesh::default().apply(outcome.changes), cpu_ms());
    let texts = ["/", "/other"].map(|path| route(10, path));
    let path: Arc<str> = "one.yaml".into();
    for n in 0..200 {
        let outcome = repository.apply(&path, Content::Bytes(texts[n % 2].replace("r10", "one").as_bytes()));
        mesh = mesh.apply(outcome.changes);
    }
    println!("a change of one of them: {} us CPU", (cpu_ms() - cpu) * 1000 / 200);
}

/// One object with a list of `count` things: a policy, a service, a slice, an entry.
fn large_objects(count: usize) -> [String; 4] {
    let list = |item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(", ");
    let ip = |n: usize| format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255);
    let header = |api: &str, kind: &str| {
        format!(
            "apiVersion: {api}\nkind: {kind}\nmetadata: {{name: x, namespace: a, labels: {{kubernetes.io/service-name: x}}}}\n"
        )
    };
    let principals = list(&|n| format!("cluster.local/ns/a/sa/s{n}"));
    let ports = list(&|n| format!("{{name: p{n}, port: {}}}", n + 1));
    let slice = list(&|n| format!("{{addresses: [{}]}}", ip(n)));
    let entry = list(&|n| format!("{{address: {}}}", ip(n)));
    [
        header("security.istio.io/v1", "AuthorizationPolicy")
            + &format!("spec: {{rules: [{{from: [{{source: {{principals: [{principals}]}}}}]}}]}}\n"),
        header("v1", "Service") + &format!("spec: {{clusterIP: 10.96.0.1, ports: [{ports}]}}\n"),
        header("v1", "Service")
            + "spec: {clusterIP: 10.96.0.1, ports: [{port: 80, name: p}]}\n---\n"
            + &header("discovery.k8s.io/v1", "EndpointSlice")
            + &format!("addressType: IPv4\nports: [{{name: p, port: 80}}]\nendpoints: [{slice}]\n"),
        header("networking.istio.io/v1", "ServiceEntry")
            + &format!(
                "spec: {{hosts: [a.b], resolution: STATIC, ports: [{{name: tcp, number: 80}}], endpoints: [{entry}]}}\n"
            ),
    ]
}

/// The time that this thread ran.
fn thread_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// The milliseconds of processor time to read a text, to change it and to remove it; of two times the shorter.
fn time_of(text: &str) -> u64 {
    let changed = format!("{text}# changed\n").replace("a.b", "a.c");
    let once = |_| {
        let start = thread_ns();
        let mut repository = Repository::new(Options::default());
        for text in [text, &changed, ""] {
            let outcome = repository.apply(&"a.yaml".into(), Content::Bytes(text.as_bytes()));
            assert!(
                outcome.diagnostics.iter().all(|d| d.code.as_str() == "needs-waypoint"),
                "{:?}",
                outcome.diagnostics
            );
        }
        (thread_ns() - start) / 1_000_000
    };
    (0..2).map(once).min().unwrap()
}

#[test]
fn one_large_object_costs_what_it_holds_and_not_its_square() {
    for (few, many) in large_objects(4000).iter().zip(large_objects(16_000)) {
        let (short, long) = (time_of(few), time_of(&many));
        // Four times as much; the square would be sixteen.
        assert!(long < short * 10, "{short} ms and {long} ms: {}", &few[..120]);
    }
    let key = |n: usize| format!("traffic.sidecar.istio.io/{}{n}: x", "a".repeat(900));
    let keys: Vec<String> = (0..300).map(key).collect();
    let text = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: a, annotations: {{{}}}}}\n",
        keys.join(", ")
    );
    let time = time_of(&text);
    assert!(time < 2000, "{time} ms");
}

fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// User and system time in milliseconds.
fn cpu_ms() -> u64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    10 * (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap())
}

fn write_directory(path: &Path, pods: usize) -> u64 {
    std::fs::write(path.join("0.yaml"), surroundings()).unwrap();
    let mut size = 0;
    for n in 0..pods / 1000 {
        let text = file(n * 1000, 1000);
        size += text.len() as u64;
        std::fs::write(path.join(format!("pods-{n:03}.yaml")), text).unwrap();
    }
    size >> 20
}

#[test]
#[ignore = "a measurement: run it alone, in a release build"]
fn time_and_memory_of_100_000_pods() {
    let dir = TempDir::new().unwrap();
    let megabytes = write_directory(dir.path(), 100_000);
    let (rss, cpu) = (status("VmRSS"), cpu_ms());
    let (directory, outcome) = Directory::open(dir.path(), directory::Options::default()).unwrap();
    let read = cpu_ms();
    let (changes, after_read) = (outcome.changes.len(), status("VmRSS"));
    let mesh = Mesh::default().apply(outcome.changes);
    println!(
        "{megabytes} MB of YAML, {changes} changes, {} workloads: {} ms CPU to read and compile, {} ms to apply; \
         resident {rss} MB before, {after_read} MB after reading, {} MB after applying, peak {} MB",
        mesh.workload_count(),
        read - cpu,
        cpu_ms() - read,
        status("VmRSS"),
        status("VmHWM"),
    );
    drop((directory, mesh));
    println!("resident {} MB after dropping everything", status("VmRSS"));
}

#[test]
#[ignore = "a measurement: run it alone, in a release build"]
fn time_of_one_change_among_100_000_pods() {
    let mut repository = Repository::new(Options::default());
    repository.stage(&"0.yaml".into(), Content::Bytes(surroundings().as_bytes()));
    for n in 0..100 {
        let path: Arc<str> = format!("pods-{n}.yaml").into();
        repository.stage(&path, Content::Bytes(file(n * 1000, 1000).as_bytes()));
    }
    let mut mesh = Mesh::default().apply(repository.commit().changes);
    let texts = [true, false].map(|ready| file(50_000, 999) + &pod(50_999, ready));
    let cpu = cpu_ms();
    for n in 0..200 {
        let outcome = repository.apply(&"pods-50.yaml".into(), Content::Bytes(texts[(n + 1) % 2].as_bytes()));
        assert_eq!(outcome.changes.len(), 1);
        mesh = mesh.apply(outcome.changes);
    }
    println!("a change of one pod in a file of 1000: {} us CPU", (cpu_ms() - cpu) * 1000 / 200);
}
