//! Gateways of the waypoint class on a real API server: deployed, changed, refused, scaled and let go; and the status of
//! routes, services and policies, all by the rights that the chart gives.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]
#![allow(clippy::print_stderr, reason = "tests say why they are skipped")]

mod apiserver;

use std::path::{Path, PathBuf};
use std::process::Command;

use apiserver::rights::compare;
use apiserver::{Cluster, Plane, apply_crds, apply_gateway_api as apply_definitions, fill};
use serde_json::{Value, json};

/// The definitions of the Gateway API, and those of the chart that go with waypoints.
fn apply_gateway_api(cluster: &Cluster) -> bool {
    if !apply_definitions(cluster) {
        return false;
    }
    for crd in [
        "virtualservices.networking.istio.io",
        "destinationrules.networking.istio.io",
        "requestauthentications.security.istio.io",
        "telemetries.telemetry.istio.io",
        "ratelimits.culvert.dev",
    ] {
        let file = format!("../deploy/charts/culvert/crds/{crd}.yaml");
        let file: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        cluster.kubectl(&["apply", "--server-side", "-f", file.to_str().unwrap()], "").unwrap();
    }
    true
}

/// What nobody is seen to use here: the CA says elsewhere what a waypoint's pod trusts, and a definition that is deleted is
/// looked at after a minute; a patch that makes its object takes `create` as well, and that the objects are there shows
/// that it is granted.
const UNSEEN: [&str; 7] = [
    "/pods/status patch",
    "apiextensions.k8s.io/customresourcedefinitions get",
    "/serviceaccounts create",
    "/services create",
    "apps/deployments create",
    "autoscaling/horizontalpodautoscalers create",
    "policy/poddisruptionbudgets create",
];

/// Gives the control plane's account what the chart gives it; its kubeconfig, and what it is given for waypoints.
fn account(cluster: &Cluster) -> Option<(PathBuf, String)> {
    let mut rights = String::new();
    let helm = cluster.programs.join("helm");
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/charts/culvert");
    cluster.apply(
        &json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "kube-node-lease" } }),
    );
    for template in ["control-plane-rbac", "control-plane-waypoints"] {
        let out = Command::new(&helm)
            .args(["template", "culvert", chart.to_str()?, "--namespace", "culvert-system"])
            .args(["--show-only", &format!("templates/{template}.yaml")])
            .env("HELM_CACHE_HOME", cluster.files.path())
            .output()
            .ok()?;
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        rights = String::from_utf8(out.stdout).unwrap();
        cluster.kubectl(&["apply", "-f", "-"], &rights).unwrap();
    }
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": { "name": "culvertd", "namespace": "culvert-system" },
    }));
    Some((cluster.kubeconfig_of("culvertd"), rights))
}

fn gateway(name: &str, more: &Value) -> Value {
    let mut gateway = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": {
            "gatewayClassName": "culvert-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        },
    });
    for (key, value) in more.as_object().unwrap() {
        gateway["spec"][key] = value.clone();
    }
    gateway
}

fn get(cluster: &Cluster, kind: &str, name: &str) -> Option<Value> {
    let text = cluster.kubectl(&["get", kind, "-n", "shop", name, "-o", "json"], "").ok()?;
    serde_json::from_str(&text).ok()
}

fn service(cluster: &Cluster, name: &str, labels: &Value) {
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": "shop", "labels": labels },
        "spec": { "selector": { "app": "web" }, "ports": [{ "name": "http", "port": 80 }] },
    }));
}

/// What a route's status says of its first parent: status, reason and message of a condition, by the newest version.
fn of_parent(cluster: &Cluster, route: &str, kind: &str) -> Option<(String, String, String)> {
    let route = get(cluster, "httproute", route)?;
    let parents = route["status"]["parents"].as_array()?;
    let ours = parents.iter().find(|p| p["controllerName"] == "culvert.dev/mesh-controller")?;
    let condition = ours["conditions"].as_array()?.iter().find(|c| c["type"] == kind)?;
    let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
    (condition["observedGeneration"] == route["metadata"]["generation"])
        .then(|| (text("status"), text("reason"), text("message")))
}

struct Shop {
    cluster: Cluster,
    _plane: Plane,
    rights: String,
}

impl Shop {
    fn open() -> Option<Self> {
        let cluster = Cluster::start()?;
        fill(&cluster);
        apply_crds(&cluster);
        if !apply_gateway_api(&cluster) {
            return None;
        }
        let (account, rights) = account(&cluster)?;
        cluster.apply(&apiserver::pod("culvert-system", "culvertd-a", "culvertd"));
        let flags = [
            "--webhooks=culvertd-culvert-system",
            "--waypoint-image=culvert/waypoint:test",
            "--waypoint-resources={\"requests\":{\"cpu\":\"10m\",\"memory\":\"16Mi\"}}",
        ];
        let plane = Plane::launch(&cluster, "culvertd-a", &account, &flags);
        cluster.until("the control plane", || plane.is_ready());
        Some(Self { cluster, _plane: plane, rights })
    }

    fn until(&self, what: &str, of: &str, name: &str, kind: &str, wanted: (&str, &str)) {
        self.cluster.until(what, || {
            let found = self.cluster.condition(of, name, kind);
            found.is_some_and(|(status, reason, _)| (status.as_str(), reason.as_str()) == wanted)
        });
    }

    /// The route `r` has a condition of its parent.
    fn route_is(&self, kind: &str, status: &str, reason: &str) {
        self.cluster.until(&format!("{kind} {reason}"), || {
            of_parent(&self.cluster, "r", kind).is_some_and(|(s, r, _)| (&*s, &*r) == (status, reason))
        });
    }

    /// There is no controller of Deployments here.
    fn pods_serve(&self, name: &str, count: u32) {
        let status = json!({ "status": {
            "replicas": count, "availableReplicas": count, "readyReplicas": count, "updatedReplicas": count,
            "observedGeneration": 1,
        } });
        let patch =
            ["patch", "deployment", "-n", "shop", name, "--subresource", "status", "-p", &status.to_string()];
        self.cluster.kubectl(&patch, "").unwrap();
    }

    fn rights_are_those_that_are_used(&self) {
        let found = std::cell::RefCell::default();
        let all_are_used = std::panic::AssertUnwindSafe(|| {
            self.cluster.until("the use of all rights", || {
                *found.borrow_mut() = compare(&self.cluster, &self.rights, &UNSEEN);
                found.borrow().0.is_empty()
            });
        });
        let all_are_used = std::panic::catch_unwind(all_are_used).is_ok();
        let (unused, forbidden) = found.into_inner();
        assert!(all_are_used, "granted and not used: {unused:#?}");
        assert!(forbidden.is_empty(), "used and not granted: {forbidden:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_are_deployed_and_all_says_how_it_stands_by_the_charts_rights_of_which_none_is_unused() {
    let Some(shop) = Shop::open() else { return };
    routes_services_and_policies_say_how_they_stand(&shop);
    objects_of_all_kinds(&shop);
    a_gateway_is_deployed_changed_scaled_and_let_go(&shop);
    shop.rights_are_those_that_are_used();
}

/// Those that say something, each of which gets a status.
fn objects_of_all_kinds(shop: &Shop) {
    let route = |kind: &str, version: &str, rule: Value| {
        json!({
            "apiVersion": format!("gateway.networking.k8s.io/{version}"), "kind": kind,
            "metadata": { "name": "one", "namespace": "shop" },
            "spec": { "parentRefs": [{ "group": "", "kind": "Service", "name": "taken" }], "rules": [rule] },
        })
    };
    let backend = json!({ "backendRefs": [{ "name": "taken", "port": 80 }] });
    let mut of_tls = route("TLSRoute", "v1", backend.clone());
    of_tls["spec"]["hostnames"] = json!(["a.example.com"]);
    let mut objects =
        vec![route("GRPCRoute", "v1", backend.clone()), route("TCPRoute", "v1", backend), of_tls];
    let target = json!([{ "kind": "Service", "name": "taken" }]);
    for (version, kind, spec) in [
        (
            "networking.istio.io/v1",
            "VirtualService",
            json!({ "hosts": ["taken"], "http": [{ "route": [{ "destination": { "host": "taken" } }] }] }),
        ),
        ("networking.istio.io/v1", "DestinationRule", json!({ "host": "taken" })),
        (
            "security.istio.io/v1",
            "RequestAuthentication",
            json!({ "jwtRules": [{ "issuer": "a", "jwksUri": "https://a.example.com/keys" }] }),
        ),
        ("telemetry.istio.io/v1", "Telemetry", json!({ "accessLogging": [{ "disabled": true }] })),
        (
            "culvert.dev/v1alpha1",
            "RateLimit",
            json!({ "targetRefs": target, "limits": [{ "name": "a", "local": { "requests": 1, "per": "1s" } }] }),
        ),
    ] {
        objects.push(json!({
            "apiVersion": version, "kind": kind, "metadata": { "name": "one", "namespace": "shop" }, "spec": spec,
        }));
    }
    for object in &objects {
        shop.cluster.apply(object);
    }
    for object in &objects {
        let kind = object["kind"].as_str().unwrap();
        shop.cluster.until(&format!("the status of {kind}"), || {
            get(&shop.cluster, kind, "one")
                .is_some_and(|found| found["status"].to_string().contains("Accepted"))
        });
    }
}

fn a_gateway_is_deployed_changed_scaled_and_let_go(shop: &Shop) {
    let cluster = &shop.cluster;
    for class in ["culvert-waypoint", "istio-waypoint"] {
        cluster.until(class, || {
            let class = get(cluster, "gatewayclass", class);
            class.is_some_and(|class| {
                let accepted = class["status"]["conditions"][0].clone();
                class["spec"]["controllerName"] == "culvert.dev/mesh-controller"
                    && accepted["status"] == "True"
            })
        });
    }
    a_gateway_is_deployed(shop);
    parameters_are_followed_and_mistakes_in_them_are_not(shop);
    what_is_changed_is_put_right_and_nothing_is_taken(shop);
    let other = json!({ "gatewayClassName": "somebody-elses" });
    cluster.apply(&gateway("other", &other));
    let wrong = json!({ "listeners": [{ "name": "a", "port": 80, "protocol": "HTTP" }] });
    cluster.apply(&gateway("wrong", &wrong));
    shop.until("no waypoint", "gateway", "wrong", "Accepted", ("False", "ListenersNotValid"));
    assert!(get(cluster, "deployment", "other").is_none() && get(cluster, "deployment", "wrong").is_none());
}

fn a_gateway_is_deployed(shop: &Shop) {
    let cluster = &shop.cluster;
    cluster.apply(&gateway("waypoint", &json!({ "infrastructure": { "labels": { "team": "a" } } })));
    cluster.until("its Deployment", || get(cluster, "deployment", "waypoint").is_some());
    shop.until("it waits", "gateway", "waypoint", "Programmed", ("False", "Pending"));
    let deployed = get(cluster, "deployment", "waypoint").unwrap();
    let made = get(cluster, "gateway", "waypoint").unwrap();
    for kind in ["serviceaccount", "service", "deployment", "poddisruptionbudget"] {
        let object = get(cluster, kind, "waypoint").unwrap();
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], made["metadata"]["uid"], "{kind}");
        assert_eq!(object["metadata"]["labels"]["team"], "a", "{kind}");
    }
    let pod = &deployed["spec"]["template"]["spec"];
    assert_eq!(pod["containers"][0]["image"], "culvert/waypoint:test");
    assert_eq!(pod["containers"][0]["resources"]["requests"]["cpu"], "10m");
    shop.pods_serve("waypoint", 1);
    shop.until("it serves", "gateway", "waypoint", "Programmed", ("True", "Programmed"));
    let served = get(cluster, "gateway", "waypoint").unwrap();
    let address = get(cluster, "service", "waypoint").unwrap()["spec"]["clusterIP"].clone();
    assert_eq!(served["status"]["addresses"], json!([{ "type": "IPAddress", "value": address }]));
    assert_eq!(served["status"]["listeners"][0]["attachedRoutes"], 0);
}

fn parameters_are_followed_and_mistakes_in_them_are_not(shop: &Shop) {
    let cluster = &shop.cluster;
    let own = |text: &str| {
        cluster.apply(&json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "own", "namespace": "shop" },
            "data": { "deployment": text },
        }));
    };
    let with = json!({ "infrastructure": {
        "labels": { "team": "b" }, "parametersRef": { "group": "", "kind": "ConfigMap", "name": "own" },
    } });
    cluster.apply(&gateway("waypoint", &with));
    shop.until("there is no such map", "gateway", "waypoint", "Accepted", ("False", "InvalidParameters"));
    own("spec: {replicas: two}");
    let refused = || {
        let found = cluster.condition("gateway", "waypoint", "Accepted");
        found.is_some_and(|(.., message)| message.contains("replicas"))
    };
    cluster.until("the API server's words", refused);
    let label = |kind: &str| get(cluster, kind, "waypoint").unwrap()["metadata"]["labels"]["team"].clone();
    assert_eq!(label("deployment"), "a");
    own("spec: {replicas: 3, template: {spec: {nodeSelector: {disk: ssd}}}}");
    cluster
        .until("three replicas", || get(cluster, "deployment", "waypoint").unwrap()["spec"]["replicas"] == 3);
    let deployed = get(cluster, "deployment", "waypoint").unwrap();
    assert_eq!(deployed["spec"]["template"]["spec"]["nodeSelector"], json!({ "disk": "ssd" }));
    assert_eq!(label("deployment"), "b");
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "own", "namespace": "shop" },
        "data": { "horizontalPodAutoscaler": "spec: {minReplicas: 2, maxReplicas: 4}" },
    }));
    cluster.until("an autoscaler", || get(cluster, "horizontalpodautoscaler", "waypoint").is_some());
    cluster.apply(&gateway("waypoint", &json!({})));
    cluster.until("none any more", || get(cluster, "horizontalpodautoscaler", "waypoint").is_none());
}

fn what_is_changed_is_put_right_and_nothing_is_taken(shop: &Shop) {
    let cluster = &shop.cluster;
    let patch = r#"{"spec":{"ports":[{"port":15008,"name":"mesh","targetPort":1}]}}"#;
    cluster
        .kubectl(&["patch", "service", "-n", "shop", "waypoint", "--type=merge", "-p", patch], "")
        .unwrap();
    let port = || {
        let ports = get(cluster, "service", "waypoint").unwrap()["spec"]["ports"].clone();
        ports.as_array().unwrap().iter().find(|p| p["port"] == 15008).map(|p| p["targetPort"].clone())
    };
    cluster.until("the port again", || port() == Some(json!(15008)));
    service(cluster, "taken", &json!({}));
    cluster.apply(&gateway("taken", &json!({})));
    cluster.until("it is said", || {
        let found = cluster.condition("gateway", "taken", "Programmed");
        found.is_some_and(|(status, _, message)| status == "False" && message.contains("not this Gateway's"))
    });
    assert_eq!(get(cluster, "service", "taken").unwrap()["spec"]["ports"][0]["port"], 80);
}

fn routes_services_and_policies_say_how_they_stand(shop: &Shop) {
    let cluster = &shop.cluster;
    service(cluster, "web", &json!({}));
    let route = |backend: Value| {
        cluster.apply(&json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": { "name": "r", "namespace": "shop" },
            "spec": {
                "parentRefs": [{ "group": "", "kind": "Service", "name": "web", "port": 80 }],
                "rules": [{ "backendRefs": [backend] }],
            },
        }));
    };
    let is = |kind: &str, status: &str, reason: &str| shop.route_is(kind, status, reason);
    route(json!({ "name": "web", "port": 80 }));
    is("Accepted", "True", "Accepted");
    is("ResolvedRefs", "True", "ResolvedRefs");
    is("istio.io/WaypointBound", "False", "NoWaypoint");
    route(json!({ "name": "nowhere", "port": 80 }));
    is("ResolvedRefs", "False", "BackendNotFound");
    cluster.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "other" } }));
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "other" },
        "spec": { "ports": [{ "name": "http", "port": 80 }] },
    }));
    route(json!({ "name": "web", "namespace": "other", "port": 80 }));
    is("ResolvedRefs", "False", "RefNotPermitted");
    cluster.apply(&json!({
        "apiVersion": "gateway.networking.k8s.io/v1beta1", "kind": "ReferenceGrant",
        "metadata": { "name": "g", "namespace": "other" },
        "spec": {
            "from": [{ "group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "shop" }],
            "to": [{ "group": "", "kind": "Service" }],
        },
    }));
    is("ResolvedRefs", "True", "ResolvedRefs");
    the_waypoint_is_bound_and_let_go(shop);
}

const ATTACHED: [(&str, &str, &str); 3] = [
    (
        "RequestAuthentication",
        "security.istio.io/v1",
        r#"{"jwtRules": [{"issuer": "a", "jwks": "{\"keys\": []}"}]}"#,
    ),
    (
        "RateLimit",
        "culvert.dev/v1alpha1",
        r#"{"limits": [{"name": "a", "local": {"requests": 1, "per": "1s"}}]}"#,
    ),
    ("Telemetry", "telemetry.istio.io/v1", r#"{"accessLogging": [{"providers": [{"name": "envoy"}]}]}"#),
];

/// What is attached to the Service by `targetRefs` beside policies, one of each kind.
fn attach_to_web(shop: &Shop) {
    for (kind, version, spec) in ATTACHED {
        let mut spec: Value = serde_json::from_str(spec).unwrap();
        spec["targetRefs"] = json!([{ "group": "", "kind": "Service", "name": "web" }]);
        shop.cluster.apply(&json!({
            "apiVersion": version, "kind": kind, "metadata": { "name": "a", "namespace": "shop" }, "spec": spec,
        }));
    }
}

fn attached_say(shop: &Shop, expected: (&str, &str)) {
    for (kind, ..) in ATTACHED {
        shop.until(kind, &kind.to_lowercase(), "a", "WaypointAccepted", expected);
    }
}

fn virtual_service(shop: &Shop, entries: &str) {
    shop.cluster.apply(&json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService",
        "metadata": { "name": "v", "namespace": "shop" },
        "spec": { "hosts": ["web"],
            entries: [{ "route": [{ "destination": { "host": "web", "port": { "number": 80 } } }] }] },
    }));
}

fn the_waypoint_is_bound_and_let_go(shop: &Shop) {
    let cluster = &shop.cluster;
    let is = |kind: &str, status: &str, reason: &str| shop.route_is(kind, status, reason);
    cluster.apply(&json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "p", "namespace": "shop" },
        "spec": {
            "targetRefs": [{ "group": "", "kind": "Service", "name": "web" }],
            "rules": [{ "to": [{ "operation": { "methods": ["GET"] } }] }],
        },
    }));
    shop.until("the policy", "authorizationpolicy", "p", "WaypointAccepted", ("False", "AncestorNotBound"));
    attach_to_web(shop);
    attached_say(shop, ("False", "AncestorNotBound"));
    virtual_service(shop, "http");
    shop.until("no waypoint", "virtualservice", "v", "WaypointAccepted", ("False", "NoWaypoint"));
    service(cluster, "web", &json!({ "istio.io/use-waypoint": "gate" }));
    let bound = |status: &str, reason: &str| {
        cluster.until(&format!("the service: {reason}"), || {
            let service = get(cluster, "service", "web").unwrap();
            let conditions = service["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let found = conditions.iter().find(|c| c["type"] == "istio.io/WaypointBound").cloned();
            match found {
                Some(found) => found["status"] == status && found["reason"] == reason,
                None => reason.is_empty(),
            }
        });
    };
    bound("False", "WaypointIsNotReady");
    is("istio.io/WaypointBound", "False", "WaypointIsNotReady");
    cluster.apply(&gateway("gate", &json!({})));
    bound("True", "WaypointAccepted");
    is("istio.io/WaypointBound", "True", "WaypointAccepted");
    shop.until("the policy again", "authorizationpolicy", "p", "WaypointAccepted", ("True", "Accepted"));
    attached_say(shop, ("True", "Accepted"));
    // An HTTPRoute hangs on the port, which takes no connections from it.
    shop.until("a route", "virtualservice", "v", "WaypointAccepted", ("False", "Overruled"));
    virtual_service(shop, "tcp");
    shop.until("of connections", "virtualservice", "v", "WaypointAccepted", ("True", "Accepted"));
    let narrow = json!({ "listeners": [{
        "name": "mesh", "port": 15008, "protocol": "HBONE", "allowedRoutes": { "namespaces": { "from": "Selector",
            "selector": { "matchLabels": { "a": "b" } } } },
    }] });
    cluster.apply(&gateway("gate", &narrow));
    bound("False", "AttachmentDenied");
    service(cluster, "web", &json!({ "istio.io/use-waypoint": "none" }));
    bound("", "");
    cluster.kubectl(&["delete", "service", "-n", "shop", "web"], "").unwrap();
    is("Accepted", "False", "NoMatchingParent");
}
