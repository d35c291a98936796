//! The chart's webhooks and rights on a real API server: what is reviewed and put right, what goes on while no control
//! plane answers, the exchange of the root under them, and that the rights are those that are used.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]
#![allow(clippy::disallowed_types, clippy::print_stderr, reason = "runs Helm; says that it was skipped")]

mod apiserver;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use apiserver::rights::compare;
use apiserver::{Cluster, Plane, apply_crds, apply_gateway_api, fill, next, policy};
use serde_json::{Value, json};

const WEBHOOKS: &str = "culvertd-culvert-system";
/// Nobody asks for these by themselves: a patch that makes its object takes `create` as well, and a bundle of a signer
/// `attest`. That both objects are there shows that they are granted.
const IN_OTHERS: [&str; 3] = [
    "/configmaps create",
    "certificates.k8s.io/clustertrustbundles create",
    "certificates.k8s.io/signers attest",
];

const CONFIGURATIONS: [&str; 2] = ["validatingwebhookconfiguration", "mutatingwebhookconfiguration"];

/// A template of the chart, as Helm makes it; `None` where there is no Helm.
fn rendered(cluster: &Cluster, template: &str) -> Option<String> {
    let helm = cluster.programs.join("helm");
    if !helm.exists() {
        assert!(std::env::var_os("CULVERT_REQUIRE_KUBE").is_none(), "there is no {}", helm.display());
        eprintln!("skipped: there is no {}", helm.display());
        return None;
    }
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/culvert");
    let mut command = Command::new(helm);
    command.args(["template", "mesh", "--namespace", "culvert-system", "--kube-version", "1.33.0"]);
    let output = command.arg(chart).args(["-s", template]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Configures the API server to ask a control plane, as the chart does. There is no network of services: the Service's name
/// leads to this machine.
fn configure(cluster: &Cluster, plane: &Plane) -> Option<()> {
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "culvertd", "namespace": "culvert-system" },
        "spec": { "type": "ExternalName", "externalName": "localhost" },
    }));
    let webhooks = rendered(cluster, "templates/webhook.yaml")?;
    let webhooks = webhooks.replace("port: 443", &format!("port: {}", plane.webhook.port()));
    cluster.kubectl(&["apply", "-f", "-"], &webhooks).unwrap();
    Some(())
}

/// What both configurations have at a place, for each of their webhooks that has it.
fn kept(cluster: &Cluster, place: &str) -> Vec<Value> {
    let webhooks = CONFIGURATIONS.iter().flat_map(|kind| {
        let text = cluster.kubectl(&["get", kind, WEBHOOKS, "-o", "json"], "").unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["webhooks"].as_array().unwrap().clone()
    });
    webhooks.filter_map(|webhook| webhook.pointer(place).cloned()).collect()
}

fn roots_are_kept(cluster: &Cluster) -> bool {
    let bundles = kept(cluster, "/clientConfig/caBundle");
    bundles.len() == 11 && bundles.iter().all(|bundle| bundle == &bundles[0])
}

fn create(cluster: &Cluster, object: &Value) -> Result<String, String> {
    cluster.kubectl(&["create", "-f", "-"], &object.to_string())
}

fn delete(cluster: &Cluster, kind: &str, name: &str) {
    let arguments = ["delete", kind, "-n", "shop", name, "--ignore-not-found", "--force", "--grace-period=0"];
    cluster.kubectl(&arguments, "").unwrap();
}

fn field(cluster: &Cluster, kind: &str, name: &str, path: &str) -> String {
    cluster.kubectl(&["get", kind, "-n", "shop", name, "-o", &format!("jsonpath={{{path}}}")], "").unwrap()
}

fn named(name: &str, label: Option<&str>, spec: &Value) -> Value {
    let mut object = policy("DENY");
    object["metadata"]["name"] = json!(name);
    object["metadata"]["labels"] = label.map_or(json!({}), |revision| json!({ "istio.io/rev": revision }));
    object["spec"] = spec.clone();
    object
}

fn restored_pod(name: &str) -> Value {
    let mut pod = apiserver::pod("shop", name, "web");
    pod["metadata"]["annotations"]["kept"] = json!("a");
    pod
}

fn entry(name: &str) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": { "hosts": ["a.example.com"], "ports": [{ "number": 443, "name": "tls", "protocol": "TLS" }] },
    })
}

const REDIRECTION: &str = ".metadata.annotations.ambient\\.istio\\.io/redirection";

/// Until what is asked of the API server is so; its webhooks' configuration takes a moment to be in force.
fn until_refused(cluster: &Cluster, what: &str, object: &Value, words: &str) {
    let name = object["metadata"]["name"].as_str().unwrap().to_owned();
    cluster.until(what, || match create(cluster, object) {
        Ok(_) => {
            delete(cluster, "authorizationpolicy", &name);
            false
        }
        Err(error) => error.contains(words),
    });
}

#[test]
fn objects_are_reviewed_and_put_right_and_only_policies_wait_for_a_control_plane() {
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    apply_crds(&cluster);
    let flags = ["--service", "culvertd", "--webhooks", WEBHOOKS];
    let plane = Plane::launch(&cluster, "culvertd-a", &cluster.kubeconfig(), &flags);
    let Some(()) = configure(&cluster, &plane) else { return };
    cluster.until("the root in all webhooks", || roots_are_kept(&cluster));
    let bad = json!({ "acton": "DENY" });
    until_refused(&cluster, "a review", &named("bad", None, &bad), "did you mean action?");
    put_right(&cluster);
    routes_of_services_and_waypoints_are_reviewed(&cluster);
    tags(&cluster, &plane, &bad);
    drop(plane);
    nobody_answers(&cluster);
    settings_are_waited_for(&cluster);
}

fn put_right(cluster: &Cluster) {
    cluster.until("defaults", || {
        delete(cluster, "authorizationpolicy", "p");
        create(cluster, &named("p", None, &json!({ "rules": [{}] }))).unwrap();
        field(cluster, "authorizationpolicy", "p", ".spec.action") == "ALLOW"
    });
    create(cluster, &entry("e")).unwrap();
    let shown = |path| field(cluster, "serviceentry", "e", path);
    assert_eq!((shown(".spec.location"), shown(".spec.resolution")), ("MESH_EXTERNAL".into(), "NONE".into()));
    create(cluster, &restored_pod("restored")).unwrap();
    let annotation = |path| field(cluster, "pod", "restored", path);
    assert_eq!(
        (annotation(REDIRECTION), annotation(".metadata.annotations.kept")),
        (String::new(), "a".into())
    );
    // What the agent writes later stays.
    let annotate = ["annotate", "pod", "-n", "shop", "restored", "ambient.istio.io/redirection=enabled"];
    cluster.kubectl(&annotate, "").unwrap();
    assert_eq!(annotation(REDIRECTION), "enabled");
}

/// Of the kinds that other controllers read, too, only what is the mesh's is looked at.
fn routes_of_services_and_waypoints_are_reviewed(cluster: &Cluster) {
    if !apply_gateway_api(cluster) {
        return;
    }
    let of = |kind: &str, spec: Value| {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": kind,
            "metadata": { "name": "n", "namespace": "shop" }, "spec": spec,
        })
    };
    let filter =
        json!({ "type": "ExtensionRef", "extensionRef": { "group": "a.example", "kind": "B", "name": "c" } });
    let route = |parent: &str| {
        of(
            "HTTPRoute",
            json!({ "parentRefs": [{ "group": "", "kind": parent, "name": "web" }], "rules": [{ "filters": [filter] }] }),
        )
    };
    let gateway = |class: &str| {
        of(
            "Gateway",
            json!({ "gatewayClassName": class, "listeners": [{ "name": "a", "port": 80, "protocol": "HTTP" }] }),
        )
    };
    for (ours, theirs, words) in [
        (route("Service"), route("Gateway"), "there is no filter that it could refer to"),
        (gateway("culvert-waypoint"), gateway("nginx"), "a waypoint listens for HBONE"),
    ] {
        let kind = ours["kind"].as_str().unwrap();
        cluster.until(&format!("a review of {kind}"), || match create(cluster, &ours) {
            Ok(_) => {
                delete(cluster, kind, "n");
                false
            }
            Err(error) => error.contains(words),
        });
        create(cluster, &theirs).unwrap();
    }
}

fn tags(cluster: &Cluster, plane: &Plane, bad: &Value) {
    let tag = |tags: &str| {
        let patch = json!({ "data": { "revisionTags": tags } }).to_string();
        cluster
            .kubectl(&["patch", "cm", "-n", "culvert-system", "culvert", "--type=merge", "-p", &patch], "")
            .unwrap();
    };
    let selected = |revisions: &Value| {
        let mut all = kept(cluster, "/objectSelector/matchExpressions/0/values");
        all.dedup();
        all == [revisions.clone()]
    };
    let tagged = named("tagged", Some("stable"), bad);
    create(cluster, &tagged).expect("nobody is asked about another revision's objects");
    delete(cluster, "authorizationpolicy", "tagged");
    tag("stable");
    cluster.until("the tag in all webhooks", || selected(&json!(["default", "stable"])));
    until_refused(cluster, "a review of the tag's objects", &tagged, "did you mean action?");
    create(cluster, &named("other", Some("other"), bad)).expect("another revision's");
    // A chart that is applied again, by a Helm that does not ask the cluster, takes roots and tags out for a moment.
    configure(cluster, plane);
    cluster
        .until("roots and tags again", || roots_are_kept(cluster) && selected(&json!(["default", "stable"])));
    tag("");
    cluster.until("the tag is gone", || selected(&json!(["default"])));
}

/// Policies fail closed, and everything else goes on.
fn nobody_answers(cluster: &Cluster) {
    let refused = create(cluster, &named("late", None, &json!({ "rules": [{}] }))).unwrap_err();
    assert!(refused.contains("failed calling webhook \"validation.culvert.dev\""), "{refused}");
    let change = [
        "patch",
        "authorizationpolicy",
        "-n",
        "shop",
        "p",
        "--type=merge",
        "-p",
        "{\"spec\":{\"rules\":[]}}",
    ];
    let refused = cluster.kubectl(&change, "").unwrap_err();
    assert!(refused.contains("failed calling webhook"), "{refused}");
    cluster.kubectl(&["delete", "authorizationpolicy", "-n", "shop", "p"], "").expect("deleting goes on");
    create(cluster, &entry("late")).expect("what restricts nothing is admitted");
    assert_eq!(field(cluster, "serviceentry", "late", ".spec.location"), "");
    create(cluster, &restored_pod("late")).expect("no pod waits for a control plane");
    assert_eq!(field(cluster, "pod", "late", REDIRECTION), "enabled");
    // The definitions' own rules need nobody.
    let mut wrong = entry("wrong");
    wrong["spec"]["hosts"] = json!(["*"]);
    let refused = create(cluster, &wrong).unwrap_err();
    assert!(refused.contains("a host has a name"), "{refused}");
}

/// Settings that were deleted while nobody looked are not taken for the defaults.
fn settings_are_waited_for(cluster: &Cluster) {
    cluster.kubectl(&["delete", "cm", "-n", "culvert-system", "culvert"], "").unwrap();
    let plane = Plane::launch(cluster, "culvertd-b", &cluster.kubeconfig(), &["--service", "culvertd"]);
    let log = || std::fs::read_to_string(cluster.at("culvertd.log")).unwrap();
    let words = "there is no ConfigMap culvert-system/culvert with the mesh's settings: make it";
    cluster.until("the reason", || log().contains(words));
    assert!(!plane.is_ready());
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "culvert", "namespace": "culvert-system" }, "data": { "mesh": "" },
    }));
    cluster.until("the control plane", || plane.is_ready());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_root_is_exchanged_under_the_admission_by_the_charts_rights_and_none_is_unused() {
    let Some(cluster) = Cluster::start() else { return };
    fill(&cluster);
    apply_crds(&cluster);
    let Some(rights) = rendered(&cluster, "templates/control-plane-rbac.yaml") else { return };
    cluster.apply(
        &json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "kube-node-lease" } }),
    );
    cluster.kubectl(&["apply", "-f", "-"], &rights).unwrap();
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": { "name": "culvertd", "namespace": "culvert-system" },
    }));
    a_node_that_is_lost(&cluster);
    cluster.apply(&apiserver::pod("culvert-system", "culvertd-a", "culvertd"));
    let account = cluster.kubeconfig_of("culvertd");
    let flags = ["--service", "culvertd", "--webhooks", WEBHOOKS];
    let plane = Plane::launch(&cluster, "culvertd-a", &account, &flags);
    configure(&cluster, &plane).unwrap();
    cluster.until("the control plane", || plane.is_ready());
    cluster.until("the root in all webhooks", || roots_are_kept(&cluster));
    let bad = named("bad", None, &json!({ "acton": "DENY" }));
    until_refused(&cluster, "a review", &bad, "did you mean action?");
    let before = kept(&cluster, "/clientConfig/caBundle").remove(0);
    objects_of_all_kinds(&cluster);
    let mut updates = plane.proxy(&cluster, "ztunnel-a");
    next(&mut updates).await.ack();
    // What is deleted is looked at after a minute.
    cluster.kubectl(&["delete", "crd", "workloadgroups.networking.istio.io"], "").unwrap();

    let (over, reviews) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (cluster, bad) = (&cluster, &bad);
        let admitting = scope.spawn(|| admit_all_the_while(cluster, bad, &over, &reviews));
        let exchanged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| exchange_the_root(cluster)));
        over.store(true, SeqCst);
        admitting.join().unwrap();
        exchanged.unwrap();
    });
    assert_ne!(kept(&cluster, "/clientConfig/caBundle").remove(0), before);
    assert!(reviews.load(SeqCst) > 10, "{reviews:?}");
    let found = std::cell::RefCell::default();
    let all_are_used = std::panic::AssertUnwindSafe(|| {
        cluster.until("the use of all rights", || {
            *found.borrow_mut() = compare(&cluster, &rights, &IN_OTHERS);
            found.borrow().0.is_empty()
        });
    });
    let all_are_used = std::panic::catch_unwind(all_are_used).is_ok();
    let (unused, forbidden) = found.into_inner();
    assert!(all_are_used, "granted and not used: {unused:#?}\nused and not granted: {forbidden:#?}");
    assert!(forbidden.is_empty(), "used and not granted: {forbidden:#?}");
    cluster.kubectl(&["get", "clustertrustbundle", "istio.io:istiod-ca:root-cert"], "").unwrap();
}

/// A node whose proxy runs, as far as the API server knows, and that nobody hears of.
fn a_node_that_is_lost(cluster: &Cluster) {
    cluster.apply(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node1" } }));
    let ready = json!({ "status": { "conditions": [{
        "type": "Ready", "status": "True", "reason": "Test", "message": "",
        "lastHeartbeatTime": "2026-11-21T10:00:00Z", "lastTransitionTime": "2026-11-21T10:00:00Z",
    }] } });
    let patch = ["patch", "node", "node1", "--subresource", "status", "-p", &ready.to_string()];
    cluster.kubectl(&patch, "").unwrap();
    cluster.apply(&apiserver::pod("culvert-system", "ztunnel-lost", "ztunnel"));
    let running = json!({ "status": { "phase": "Running" } }).to_string();
    let patch =
        ["patch", "pod", "-n", "culvert-system", "ztunnel-lost", "--subresource", "status", "-p", &running];
    cluster.kubectl(&patch, "").unwrap();
}

fn objects_of_all_kinds(cluster: &Cluster) {
    let of = |kind: &str, spec: Value| {
        let group =
            if kind == "PeerAuthentication" { "security.istio.io/v1" } else { "networking.istio.io/v1" };
        json!({ "apiVersion": group, "kind": kind, "metadata": { "name": "one", "namespace": "shop" }, "spec": spec })
    };
    create(cluster, &policy("DENY")).unwrap();
    create(cluster, &entry("one")).unwrap();
    for object in [
        of("PeerAuthentication", json!({ "mtls": { "mode": "STRICT" } })),
        of("WorkloadEntry", json!({ "address": "10.9.0.1" })),
        of("WorkloadGroup", json!({ "template": { "serviceAccount": "web" } })),
    ] {
        create(cluster, &object).unwrap();
    }
}

/// Writes policies until it is over; each is admitted, or refused for its own fault.
fn admit_all_the_while(cluster: &Cluster, bad: &Value, over: &AtomicBool, reviews: &AtomicU64) {
    while !over.load(SeqCst) {
        let count = reviews.fetch_add(1, SeqCst);
        let good = named(&format!("all-the-while-{count}"), None, &json!({ "rules": [{}] }));
        create(cluster, &good).unwrap_or_else(|error| panic!("review {count}: {error}"));
        let refused = create(cluster, bad).unwrap_err();
        assert!(refused.contains("did you mean action?"), "review {count}: {refused}");
    }
}

fn exchange_the_root(cluster: &Cluster) {
    let annotate = |annotation: &str| {
        let arguments =
            ["annotate", "--overwrite", "secret", "-n", "culvert-system", "culvert-ca-secret", annotation];
        cluster.kubectl(&arguments, "").unwrap();
    };
    let stage = || {
        let path = "jsonpath={.metadata.annotations.culvert\\.dev/rotation}";
        cluster
            .kubectl(&["get", "secret", "-n", "culvert-system", "culvert-ca-secret", "-o", path], "")
            .unwrap()
    };
    let roots = || {
        let bundle = kept(cluster, "/clientConfig/caBundle").remove(0);
        let path =
            ["get", "cm", "-n", "shop", "istio-ca-root-cert", "-o", "jsonpath={.data.root-cert\\.pem}"];
        let told = cluster.kubectl(&path, "").unwrap();
        let same = roots_are_kept(cluster)
            && bundle == json!(base64::Engine::encode(&base64::prelude::BASE64_STANDARD, &told));
        if same { told.matches("BEGIN CERTIFICATE").count() } else { 0 }
    };
    annotate("culvert.dev/rotate-root=now");
    cluster.until("both roots in all webhooks", || roots() == 2);
    // Nobody says that the lost node's proxy trusts the new one: it is left out, by its Lease.
    cluster.until("the new root signs", || stage().contains("the new root signs"));
    annotate("culvert.dev/accept-rotation=drop");
    cluster.until("only the new root in all webhooks", || roots() == 1);
}
