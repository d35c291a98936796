//! The commands that need no ztunnel, run as a user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

const MESH: &str = r#"apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: web, labels: {app: web}}
spec: {nodeName: node-1, serviceAccountName: web, containers: [{name: main, image: web}]}
status: {podIP: 10.0.0.2, phase: Running, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: batch, namespace: shop, uid: batch}
spec: {nodeName: node-1, serviceAccountName: batch, containers: [{name: main, image: batch}]}
status: {podIP: 10.0.0.3, phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: legacy, namespace: outside, uid: legacy}
spec: {nodeName: node-1, containers: [{name: main, image: legacy}]}
status: {podIP: 10.0.0.4, phase: Running}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.21, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"#;

const STRICT: &str = "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
";

/// Two versions of one policy.
fn policy(account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: web, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  rules: [{{from: [{{source: {{principals: [cluster.local/ns/shop/sa/{account}]}}}}]}}]
"
    )
}

struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        Self(dir)
    }

    fn dir(&self) -> String {
        self.0.path().to_string_lossy().into_owned()
    }

    fn file(&self, name: &str) -> String {
        self.0.path().join(name).to_string_lossy().into_owned()
    }
}

fn culvert(args: &[&str]) -> Output {
    Command::new(PathBuf::from(env!("CARGO_BIN_EXE_culvert"))).args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn what_if(dir: &str, source: &str, destination: &str, port: &str, more: &[&str]) -> (i32, Vec<Value>) {
    let mut args = vec!["what-if", dir, "--source", source, "--destination", destination, "--port", port];
    args.extend(["-o", "json"]);
    args.extend(more);
    let output = culvert(&args);
    let code = output.status.code().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    (code, serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {text}")))
}

#[test]
fn what_if_resolves_every_way_to_name_an_end() {
    let files = Files::new(&[("mesh.yaml", MESH), ("policy.yaml", &policy("batch"))]);
    let batch = ["shop/batch", "10.0.0.3", "spiffe://cluster.local/ns/shop/sa/batch"];
    let web = [
        ("shop/web", "80"),
        ("shop/web", "8080"),
        ("web.shop.svc.cluster.local", "80"),
        ("10.96.0.21", "80"),
        ("10.0.0.2", "8080"),
    ];
    for source in batch {
        for (destination, port) in web {
            let (code, answers) = what_if(&files.dir(), source, destination, port, &[]);
            assert_eq!(code, 0, "{source} {destination}: {answers:?}");
            let endpoint = &answers[0]["endpoints"][0];
            assert_eq!(endpoint["address"], "10.0.0.2:8080");
            assert_eq!(endpoint["policy"], "shop/web");
            assert_eq!(endpoint["carried"], "hbone");
        }
    }
    for source in ["outside/legacy", "10.9.9.9", "spiffe://cluster.local/ns/shop/sa/other"] {
        assert_eq!(what_if(&files.dir(), source, "shop/web", "80", &[]).0, 1, "{source}");
    }
}

#[test]
fn what_a_pod_leaves_alone_is_not_said_to_be_refused() {
    for (annotation, port, alone) in [
        ("ambient.istio.io/bypass-inbound-capture: 'true'", "8080", true),
        ("traffic.sidecar.istio.io/excludeInboundPorts: '8000-8100'", "8080", true),
        ("traffic.sidecar.istio.io/excludeInboundPorts: '8000-8100'", "9090", false),
        ("traffic.sidecar.istio.io/includeInboundPorts: '9090'", "8080", true),
        ("traffic.sidecar.istio.io/includeInboundPorts: '9090'", "9090", false),
        ("traffic.sidecar.istio.io/includeInboundPorts: '*'", "8080", false),
    ] {
        let mesh = MESH.replace("uid: web,", &format!("uid: web, annotations: {{{annotation}}},"));
        let files = Files::new(&[("mesh.yaml", &mesh), ("strict.yaml", STRICT)]);
        let (code, answers) = what_if(&files.dir(), "outside/legacy", "10.0.0.2", port, &[]);
        assert_eq!(code == 0, alone, "{annotation} {port}: {answers:?}");
        let reason = answers[0]["endpoints"][0]["reason"].as_str().unwrap();
        assert_eq!(reason.contains("not captured"), alone, "{reason}");
        let (code, _) = what_if(&files.dir(), "shop/batch", "10.0.0.2", port, &[]);
        assert_eq!(code, 0, "in the mesh there is an identity");
        let output = culvert(&["analyze", &files.dir()]);
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said.contains("outside-the-mesh"), !annotation.ends_with("'*'"), "{annotation}: {said}");
    }
}

#[test]
fn what_if_refuses_what_ztunnel_refuses_for_want_of_a_waypoint() {
    let closed = "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: db, namespace: shop}
spec: {hosts: [db.example.com], ports: [{number: 5432, name: tcp}], resolution: STATIC, endpoints: [{address: 192.0.2.1}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: db, namespace: shop}
spec: {action: DENY, rules: [{}], targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: db}]}
";
    let files = Files::new(&[("mesh.yaml", MESH), ("closed.yaml", closed)]);
    let (code, answers) = what_if(&files.dir(), "shop/web", "db.example.com", "5432", &[]);
    let reason = answers[0]["endpoints"][0]["reason"].as_str().unwrap();
    assert!(code == 1 && reason.contains("waypoint"), "{answers:?}");
    // Nobody leads others to a waypoint: they dial the address behind it.
    let (code, answers) = what_if(&files.dir(), "outside/legacy", "db.example.com", "5432", &[]);
    assert_eq!((code, &answers[0]["endpoints"][0]["address"]), (0, &"192.0.2.1:5432".into()));
    let open = Files::new(&[("mesh.yaml", MESH), ("open.yaml", closed.split("---").next().unwrap())]);
    assert_eq!(what_if(&open.dir(), "shop/web", "db.example.com", "5432", &[]).0, 0);
}

const ROUTED: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gate, namespace: shop}
spec: {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop, labels: {istio.io/use-waypoint: gate}}
spec: {clusterIP: 10.96.0.200, ports: [{name: http, port: 80}, {name: tcp, port: 90}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: front, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: front}]
  rules:
  - {name: canary, matches: [{headers: [{name: X-Canary, value: 'yes'}]}], backendRefs: [{name: web, port: 80}]}
  - {matches: [{path: {value: /old}}], filters: [{type: RequestRedirect, requestRedirect: {statusCode: 301}}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: front, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: front}]
  rules:
  - to: [{operation: {methods: [GET]}}]
  - {from: [{source: {requestPrincipals: [issuer/admin]}}], to: [{operation: {paths: [/old]}}]}
";

#[test]
fn what_if_decides_over_requests_where_a_waypoint_does() {
    let files = Files::new(&[("mesh.yaml", MESH), ("routed.yaml", ROUTED)]);
    let ask = |more: &[&str]| what_if(&files.dir(), "shop/batch", "shop/front", "80", more);
    let (code, answers) = ask(&["--header", "x-canary: yes", "--path", "/any?x=1"]);
    let hops = answers[0]["endpoints"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    assert_eq!((code, text(&hops[0]["workload"])), (0, "waypoint shop/gate".to_owned()), "{answers:?}");
    assert!(
        text(&hops[0]["reason"]).contains("allowed by policy shop/front rule 0 clause 0.0"),
        "{answers:?}"
    );
    assert!(text(&hops[0]["route"]).contains("HTTPRoute shop/front rule 0 (canary)"), "{answers:?}");
    // The node decides over the waypoint.
    assert_eq!((hops.len(), text(&hops[1]["workload"])), (2, "shop/web".to_owned()));
    assert!(text(&hops[1]["route"]).contains("1 of 1"), "{answers:?}");
    // No route, another method, a redirect, a token.
    let refused = |more: &[&str], why: &str| {
        let (code, answers) = ask(more);
        assert!(code == 1 && answers[0].to_string().contains(why), "{more:?}: {answers:?}");
    };
    refused(&[], "404");
    refused(&["--method", "POST", "--path", "/old"], "no ALLOW policy matched (shop/front)");
    let claims = ["--method", "POST", "--path", "/old", "--claims", r#"{"iss": "issuer", "sub": "admin"}"#];
    let (code, answers) = ask(&claims);
    assert!(code == 0 && answers[0].to_string().contains("redirects: 301"), "{answers:?}");
    // Bytes show no request.
    let (code, answers) = what_if(&files.dir(), "shop/batch", "shop/front", "90", &["--tcp"]);
    assert!(code == 1 && answers[0].to_string().contains("no ALLOW policy matched"), "{answers:?}");
}

#[test]
fn what_if_tells_tls_that_a_waypoint_begins_from_plaintext() {
    let outside = "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: front, namespace: shop, labels: {istio.io/use-waypoint: gate}}
spec:
  hosts: [front.example]
  addresses: [10.96.0.201]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 443}, {number: 81, name: http-b, protocol: HTTP}]
  endpoints: [{address: 192.0.2.9}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: front, namespace: shop}
spec:
  host: front.example
  trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {mode: SIMPLE}}]}
";
    let files = Files::new(&[("mesh.yaml", MESH), ("routed.yaml", ROUTED), ("outside.yaml", outside)]);
    for (port, carried, to) in [("80", "tls", "192.0.2.9:443"), ("81", "plaintext", "192.0.2.9:81")] {
        let (code, answers) = what_if(&files.dir(), "shop/batch", "front.example", port, &["--path", "/"]);
        let hop = answers[0]["endpoints"].as_array().unwrap().last().unwrap();
        assert_eq!((code, &hop["address"], &hop["carried"]), (0, &to.into(), &carried.into()), "{answers:?}");
    }
}

#[test]
fn what_if_says_what_a_changed_file_changes() {
    let files = Files::new(&[("mesh.yaml", MESH), ("policy.yaml", &policy("batch"))]);
    // The same object in a file of another name takes its place; so does a file of the same name.
    for name in ["other.yaml", "policy.yaml"] {
        let changed = Files::new(&[(name, &policy("frontend"))]);
        let more = ["--with", &changed.file(name)];
        let (code, answers) = what_if(&files.dir(), "shop/batch", "shop/web", "80", &more);
        assert_eq!((code, answers.len()), (1, 2));
        assert_eq!((&answers[0]["allowed"], &answers[1]["allowed"]), (&true.into(), &false.into()));
        let reason = answers[1]["endpoints"][0]["reason"].as_str().unwrap();
        assert!(reason.contains("sa/frontend") && reason.contains("sa/batch"), "{reason}");
    }
    let strict = Files::new(&[("strict.yaml", STRICT)]);
    let open = Files::new(&[("mesh.yaml", MESH)]);
    let more = ["--with", &strict.file("strict.yaml")];
    let (code, answers) = what_if(&open.dir(), "outside/legacy", "shop/web", "80", &more);
    assert_eq!((code, &answers[0]["allowed"], &answers[1]["allowed"]), (1, &true.into(), &false.into()));
    let (code, _) = what_if(&open.dir(), "shop/batch", "shop/web", "80", &more);
    assert_eq!(code, 0);
}

#[test]
fn what_if_takes_a_deployment_for_its_pods() {
    let pod = |end: &str, ip: u8| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: api-5dc6c6bd59-{end}\n  namespace: shop\n  uid: {end}\n  \
             labels: {{pod-template-hash: 5dc6c6bd59}}\n  ownerReferences: [{{apiVersion: apps/v1, kind: ReplicaSet, name: \
             api-5dc6c6bd59, uid: r, controller: true}}]\nspec: {{nodeName: node-1, serviceAccountName: api, containers: \
             [{{name: main, image: api}}]}}\nstatus: {{podIP: 10.0.0.{ip}, phase: Running}}\n"
        )
    };
    let files = Files::new(&[("mesh.yaml", &format!("{MESH}{}{}", pod("v8fkf", 5), pod("xfhmd", 6)))]);
    let (code, answers) = what_if(&files.dir(), "shop/api", "shop/web", "80", &[]);
    assert_eq!(code, 0);
    let source = answers[0]["source"].as_str().unwrap();
    assert!(source.contains("api-5dc6c6bd59-v8fkf") && source.contains("sa/api"), "{source}");
    let (code, answers) = what_if(&files.dir(), "shop/batch", "shop/api", "8080", &[]);
    let endpoints = answers[0]["endpoints"].as_array().unwrap();
    assert_eq!((code, endpoints.len()), (0, 2), "{answers:?}");
    // A pod is itself.
    let (_, answers) = what_if(&files.dir(), "shop/batch", "shop/api-5dc6c6bd59-xfhmd", "8080", &[]);
    assert_eq!(answers[0]["endpoints"].as_array().unwrap().len(), 1);

    // A service of that name is meant first.
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: api, namespace: shop}\nspec: {clusterIP: \
                   10.96.0.99, ports: [{port: 80}]}\n";
    let files = Files::new(&[("mesh.yaml", &format!("{MESH}{}{service}", pod("v8fkf", 5)))]);
    let asks = ["--source", "shop/batch", "--destination", "shop/api", "--port", "81"];
    let output = culvert(&[&["what-if", &files.dir()], &asks[..]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("has no port 81: it has 80"), "{output:?}");
}

#[test]
fn what_if_does_not_guess() {
    let files = Files::new(&[("mesh.yaml", MESH)]);
    for (source, destination, port, says) in [
        ("shop/nobody", "shop/web", "80", "no workload shop/nobody"),
        ("shop/batch", "shop/nowhere", "80", "no service or workload shop/nowhere"),
        ("shop/batch", "web.shop.svc.cluster.local", "81", "has no port 81: it has 80"),
    ] {
        let args =
            ["what-if", &files.dir(), "--source", source, "--destination", destination, "--port", port];
        let output = culvert(&args);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains(says), "{output:?}");
    }
}

#[test]
fn analyze_fails_from_the_threshold_on_and_says_where() {
    let bad = MESH
        .replace("nodeName: node-1, serviceAccountName: web", "nodename: node-1, serviceAccountName: web");
    let files = Files::new(&[("a.yaml", &bad), ("b.yaml", "kind: [\n")]);
    let output = culvert(&["analyze", &files.dir()]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains("a.yaml:8:8: error[unknown-field]: Pod shop/web"), "{text}");
    assert!(text.contains("did you mean nodeName?") && text.contains("b.yaml"), "{text}");

    let json: Value =
        serde_json::from_slice(&culvert(&["analyze", "-o", "json", &files.dir()]).stdout).unwrap();
    assert_eq!((&json["failed"], &json["files"]), (&true.into(), &2.into()));
    let fields = ["code", "severity", "file", "line", "column", "text", "message", "remedy"];
    let first = &json["diagnostics"][0];
    assert!(fields.iter().all(|f| first.get(f).is_some()), "{first}");

    let of = |form: &str| String::from_utf8(culvert(&["analyze", "-o", form, &files.dir()]).stdout).unwrap();
    assert!(of("yaml").contains("\nfailed: true\n"), "{}", of("yaml"));
    assert_eq!(of("wide"), of("text"));
    let sarif: Value =
        serde_json::from_slice(&culvert(&["analyze", "-o", "sarif", &files.dir()]).stdout).unwrap();
    let results = sarif["runs"][0]["results"].as_array().unwrap();
    assert_eq!(results.len(), json["diagnostics"].as_array().unwrap().len());

    // What is only a warning, and what is only a note, fails from its own threshold on.
    let kinds = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: shop}\nspec: {}\n";
    let files = Files::new(&[("mesh.yaml", MESH), ("kinds.yaml", kinds)]);
    let json: Value =
        serde_json::from_slice(&culvert(&["analyze", "-o", "json", &files.dir()]).stdout).unwrap();
    let severities: Vec<_> =
        json["diagnostics"].as_array().unwrap().iter().map(|d| d["severity"].clone()).collect();
    for (threshold, fails) in [
        ("error", severities.contains(&"error".into())),
        ("warning", severities.iter().any(|s| s != "info")),
        ("info", !severities.is_empty()),
    ] {
        let output = culvert(&["analyze", "--failure-threshold", threshold, &files.dir()]);
        assert_eq!(output.status.code(), Some(i32::from(fails)), "{threshold}: {severities:?}");
    }
}

#[test]
fn analyze_of_a_namespace_that_is_not_there_is_an_error() {
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: here}
spec: {rules: [{nosuch: 1}]}
";
    let files = Files::new(&[("mesh.yaml", MESH), ("policy.yaml", policy)]);
    let of = |namespace: &str| {
        let output = culvert(&["analyze", "-n", namespace, &files.dir()]);
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    // A namespace is there by its objects, too.
    assert_eq!((of("shop").0, of("outside").0, of("default").0), (0, 0, 1));
    let (code, said) = of("shpo");
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("no namespace shpo") && said.contains("default, outside, shop"), "{said}");
    // What is not read may be of it.
    let broken = Files::new(&[("mesh.yaml", MESH), ("broken.yaml", "a: [")]);
    let output = culvert(&["analyze", "-n", "shpo", &broken.dir()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().contains("broken.yaml"));
}

#[test]
fn analyze_says_which_policies_are_for_nothing() {
    let policies = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: typo, namespace: shop}
spec: {selector: {matchLabels: {app: wbe}}, rules: [{from: [{source: {namespaces: [shpo]}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: useless, namespace: outside}
spec: {mtls: {mode: STRICT}}
";
    let files = Files::new(&[("mesh.yaml", MESH), ("policies.yaml", policies)]);
    let output = culvert(&["analyze", &files.dir()]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}");
    for (place, code) in [("1:1", "no-workload"), ("1:1", "names-nothing"), ("6:1", "outside-the-mesh")] {
        assert!(text.contains(&format!("policies.yaml:{place}: warning[{code}]")), "{code}: {text}");
    }
}

#[test]
fn what_is_not_there_is_an_error_with_a_way_out() {
    let empty = Files::new(&[]);
    for (args, says) in [
        (vec!["analyze", "/does/not/exist"], "cannot read /does/not/exist"),
        (vec!["analyze", &empty.dir()], "no .yaml, .yml or .json file"),
        (vec!["why"], "--source and --destination"),
        (vec!["why", "7", "--admin", "127.0.0.1:1"], "--netns"),
        (vec!["why", "7", "--netns", "no-such-namespace"], "no-such-namespace"),
        (vec!["ca", "--ca-dir", "/does/not/exist", "status"], "--ca-dir"),
    ] {
        let output = culvert(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(says), "{args:?}: {output:?}");
    }
}

#[test]
fn completion_knows_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = culvert(&["completion", shell]);
        assert!(output.status.success());
        for command in ["analyze", "what-if", "why", "ztunnel-config", "demo"] {
            assert!(stdout(&output).contains(command), "{shell} {command}");
        }
    }
}
