//! What a waypoint is made of: the objects of a Gateway, as they are to be. Pure.
//!
//! All have the Gateway's name and namespace, and are owned by it: they go with it. Replicas are nobody's to say but the
//! user's, by an override, an autoscaler, or `kubectl scale`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::gateway::Gateway;
use super::overrides::Overrides;

/// Labels of what is made of a Gateway, as users of Istio know them.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
const GATEWAY_CLASS: &str = "gateway.networking.k8s.io/gateway-class-name";
const OLD_GATEWAY_NAME: &str = "istio.io/gateway-name";
/// The label of all that a control plane made of Gateways, and its value for waypoints.
pub const MANAGED: (&str, &str) = ("gateway.istio.io/managed", "istio.io-mesh-controller");

/// How long a pod is still there after it is to end, in seconds, before it is told so: until then everybody who has
/// connections to it knows that it goes.
const LAST_CALL: u64 = 5;
/// How long it may take to end in good order after that.
const DRAIN: u64 = 30;

/// What is the same for all waypoints.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The image.
    pub image: String,
    /// When the kubelet pulls it.
    pub pull_policy: String,
    /// Where the control plane and its CA are, `https://HOST:PORT`.
    pub address: String,
    /// The cluster's name.
    pub cluster: String,
    /// The network that its pods are on.
    pub network: String,
    /// The revision of the control plane.
    pub revision: String,
    /// The version of the control plane.
    pub version: &'static str,
    /// Log filter and form.
    pub log: (String, String),
    /// CPU and memory of a waypoint.
    pub resources: Value,
    /// What the installation wants otherwise.
    pub overrides: Overrides,
    /// Whether the cluster's kubelets know `preStop.sleep` (1.30).
    pub can_sleep: bool,
}

/// The objects of a Gateway, in the order in which they are applied. `own` is what its ConfigMap wants otherwise.
#[must_use]
pub fn objects(gateway: &Gateway, settings: &Settings, own: &Overrides) -> Vec<Value> {
    let scales = |overrides: &Overrides| overrides.has("HorizontalPodAutoscaler");
    let is_scaled = scales(&settings.overrides) || scales(own);
    let mut all = vec![
        object("v1", "ServiceAccount", gateway, settings, json!({ "automountServiceAccountToken": false })),
        object("v1", "Service", gateway, settings, service(gateway)),
        object("apps/v1", "Deployment", gateway, settings, deployment(gateway, settings)),
        object("policy/v1", "PodDisruptionBudget", gateway, settings, budget(gateway)),
    ];
    if is_scaled {
        all.push(object("autoscaling/v2", "HorizontalPodAutoscaler", gateway, settings, autoscaler(gateway)));
    }
    for object in &mut all {
        settings.overrides.apply(object);
        own.apply(object);
        // Two that say it would have it their own way in turn.
        let spec = object.get_mut("spec").and_then(Value::as_object_mut);
        if let Some(spec) = spec.filter(|_| is_scaled) {
            spec.remove("replicas");
        }
    }
    all
}

fn object(api_version: &str, kind: &str, gateway: &Gateway, settings: &Settings, rest: Value) -> Value {
    let mut annotations = gateway.infrastructure_annotations.clone();
    if kind == "Service" {
        // The nearest of a waypoint's instances is dialled.
        let nearest = ("networking.istio.io/traffic-distribution".to_owned(), "PreferClose".to_owned());
        annotations.entry(nearest.0).or_insert(nearest.1);
    }
    let mut object = json!({
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {
            "name": gateway.name,
            "namespace": gateway.namespace,
            "labels": labels(gateway, settings),
            "annotations": annotations,
            "ownerReferences": [{
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "name": gateway.name,
                "uid": gateway.uid, "controller": true, "blockOwnerDeletion": true,
            }],
        },
    });
    if let (Value::Object(into), Value::Object(rest)) = (&mut object, rest) {
        into.extend(rest);
    }
    object
}

fn labels(gateway: &Gateway, settings: &Settings) -> Map<String, Value> {
    let mut labels: BTreeMap<String, String> = gateway.infrastructure_labels.clone();
    labels.extend(gateway.labels.clone());
    let own = [
        (GATEWAY_NAME, gateway.name.as_str()),
        (OLD_GATEWAY_NAME, &gateway.name),
        (GATEWAY_CLASS, &gateway.class),
        (MANAGED.0, MANAGED.1),
        ("istio.io/rev", &settings.revision),
        ("app.kubernetes.io/name", "waypoint"),
        ("app.kubernetes.io/part-of", "culvert"),
        ("app.kubernetes.io/managed-by", "culvertd"),
        ("app.kubernetes.io/version", settings.version),
    ];
    labels.extend(own.map(|(key, value)| (key.to_owned(), value.to_owned())));
    labels.into_iter().map(|(key, value)| (key, value.into())).collect()
}

fn selector(gateway: &Gateway) -> Value {
    json!({ GATEWAY_NAME: gateway.name })
}

fn service(gateway: &Gateway) -> Value {
    json!({ "spec": {
        "type": "ClusterIP",
        "selector": selector(gateway),
        "ports": [
            { "name": "status-port", "port": 15021, "targetPort": 15021, "protocol": "TCP", "appProtocol": "tcp" },
            { "name": "mesh", "port": 15008, "targetPort": 15008, "protocol": "TCP", "appProtocol": "hbone" },
        ],
    } })
}

fn budget(gateway: &Gateway) -> Value {
    json!({ "spec": {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": { "matchLabels": selector(gateway) },
    } })
}

fn autoscaler(gateway: &Gateway) -> Value {
    json!({ "spec": {
        "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": gateway.name },
        "maxReplicas": 10,
    } })
}

fn deployment(gateway: &Gateway, settings: &Settings) -> Value {
    let mut pod_labels = labels(gateway, settings);
    let more = [
        // It is no part of what it stands before: nothing of its traffic is captured.
        ("istio.io/dataplane-mode", "none"),
        ("sidecar.istio.io/inject", "false"),
        ("service.istio.io/canonical-name", gateway.name.as_str()),
        ("service.istio.io/canonical-revision", "latest"),
    ];
    pod_labels.extend(more.map(|(key, value)| (key.to_owned(), value.into())));
    let mut annotations = gateway.infrastructure_annotations.clone();
    for (key, value) in [
        ("prometheus.io/scrape", "true"),
        ("prometheus.io/port", "15020"),
        ("prometheus.io/path", "/metrics"),
    ] {
        annotations.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    json!({ "spec": {
        "selector": { "matchLabels": selector(gateway) },
        // The successor takes connections before its predecessor lets go of its own.
        "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
        "template": {
            "metadata": { "labels": pod_labels, "annotations": annotations },
            "spec": pod(gateway, settings),
        },
    } })
}

fn pod(gateway: &Gateway, settings: &Settings) -> Value {
    let apart = |weight: u32, topology: &str| {
        json!({ "weight": weight, "podAffinityTerm": {
            "topologyKey": topology, "labelSelector": { "matchLabels": selector(gateway) },
        } })
    };
    json!({
        "serviceAccountName": gateway.name,
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": LAST_CALL + DRAIN + 5,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "affinity": { "podAntiAffinity": { "preferredDuringSchedulingIgnoredDuringExecution":
            [apart(100, "kubernetes.io/hostname"), apart(50, "topology.kubernetes.io/zone")] } },
        "containers": [container(gateway, settings)],
        "volumes": [
            { "name": "token", "projected": { "sources": [{ "serviceAccountToken": {
                "audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token",
            } }] } },
            // The control plane makes it in each namespace; until then the pod waits.
            { "name": "root", "configMap": { "name": "istio-ca-root-cert" } },
            { "name": "state", "emptyDir": { "sizeLimit": "256Mi" } },
        ],
    })
}

fn container(gateway: &Gateway, settings: &Settings) -> Value {
    let field =
        |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let text = |name: &str, value: &str| json!({ "name": name, "value": value });
    let mut container = json!({
        "name": "waypoint",
        "image": settings.image,
        "imagePullPolicy": settings.pull_policy,
        "args": [
            format!("--xds-address={}", settings.address),
            format!("--ca-address={}", settings.address),
            format!("--cluster-id={}", settings.cluster),
            format!("--gateway={}/{}", gateway.namespace, gateway.name),
            "--token-file=/var/run/secrets/tokens/istio-token",
            "--root-file=/var/run/secrets/istio/root-cert.pem",
            "--state-dir=/var/lib/culvert",
        ],
        "env": [
            field("NODE_NAME", "spec.nodeName"),
            field("POD_NAME", "metadata.name"),
            field("POD_NAMESPACE", "metadata.namespace"),
            field("INSTANCE_IP", "status.podIP"),
            field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
            text("NETWORK", &settings.network),
            text("RUST_LOG", &settings.log.0),
            text("LOG_FORMAT", &settings.log.1),
            text("TERMINATION_GRACE_PERIOD", &format!("{DRAIN}s")),
        ],
        "ports": [
            { "name": "mesh", "containerPort": 15008, "protocol": "TCP" },
            { "name": "metrics", "containerPort": 15020, "protocol": "TCP" },
            { "name": "readiness", "containerPort": 15021, "protocol": "TCP" },
        ],
        "startupProbe": probe(&json!({ "periodSeconds": 1, "failureThreshold": 120, "timeoutSeconds": 1 })),
        "readinessProbe": probe(&json!({ "periodSeconds": 5, "failureThreshold": 2, "timeoutSeconds": 3 })),
        // Ready says that it serves; that this port answers says that it lives. One that waits for the control plane is
        // not ready, and a restart would not help it.
        "livenessProbe": {
            "tcpSocket": { "port": "metrics" }, "periodSeconds": 15, "timeoutSeconds": 5, "failureThreshold": 4,
        },
        "resources": settings.resources,
        "securityContext": {
            "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
            "runAsNonRoot": true, "capabilities": { "drop": ["ALL"] },
        },
        "volumeMounts": [
            { "name": "token", "mountPath": "/var/run/secrets/tokens", "readOnly": true },
            { "name": "root", "mountPath": "/var/run/secrets/istio", "readOnly": true },
            { "name": "state", "mountPath": "/var/lib/culvert" },
        ],
    });
    if settings.can_sleep
        && let Some(container) = container.as_object_mut()
    {
        let sleep = json!({ "preStop": { "sleep": { "seconds": LAST_CALL } } });
        container.insert("lifecycle".to_owned(), sleep);
    }
    container
}

fn probe(times: &Value) -> Value {
    let mut probe = json!({ "httpGet": { "path": "/healthz/ready", "port": "readiness" } });
    if let (Value::Object(into), Value::Object(times)) = (&mut probe, times) {
        into.extend(times.clone());
    }
    probe
}

#[cfg(test)]
mod tests {
    use super::super::gateway::tests::{gateway, spec};
    use super::*;

    fn settings() -> Settings {
        Settings {
            image: "culvert/waypoint:1".to_owned(),
            pull_policy: "IfNotPresent".to_owned(),
            address: "https://culvertd.culvert-system.svc:15012".to_owned(),
            cluster: "Kubernetes".to_owned(),
            network: String::new(),
            revision: "default".to_owned(),
            version: "1",
            log: ("info".to_owned(), "json".to_owned()),
            resources: json!({ "requests": { "cpu": "100m" } }),
            overrides: Overrides::default(),
            can_sleep: true,
        }
    }

    fn of<'o>(all: &'o [Value], kind: &str) -> Option<&'o Value> {
        all.iter().find(|object| object["kind"] == kind)
    }

    #[test]
    fn all_that_is_made_is_the_gateways_and_has_its_name() {
        let mut with = spec();
        with["infrastructure"] = json!({
            "labels": { "team": "a", GATEWAY_NAME: "another" }, "annotations": { "note": "x" },
        });
        let gateway = gateway(&with);
        let all = objects(&gateway, &settings(), &Overrides::default());
        assert_eq!(all.len(), 4);
        for object in &all {
            let metadata = &object["metadata"];
            assert_eq!((&metadata["name"], &metadata["namespace"]), (&json!("waypoint"), &json!("shop")));
            assert_eq!(metadata["ownerReferences"][0]["uid"], "u-1");
            assert_eq!(metadata["labels"][GATEWAY_NAME], "waypoint", "not to be changed");
            assert_eq!(metadata["labels"]["team"], "a");
            assert_eq!(metadata["labels"]["istio.io/waypoint-for"], "all");
            assert_eq!(metadata["annotations"]["note"], "x");
        }
        let template = &of(&all, "Deployment").unwrap()["spec"]["template"];
        assert_eq!(template["metadata"]["labels"]["istio.io/dataplane-mode"], "none");
        assert_eq!(template["metadata"]["labels"]["team"], "a");
        assert_eq!(of(&all, "Deployment").unwrap()["spec"].get("replicas"), None);
    }

    #[test]
    fn its_pods_are_restricted() {
        let all = objects(&gateway(&spec()), &settings(), &Overrides::default());
        let pod = &of(&all, "Deployment").unwrap()["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(pod["automountServiceAccountToken"], false);
        let context = &container["securityContext"];
        assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }));
        assert_eq!(
            (&context["readOnlyRootFilesystem"], &context["allowPrivilegeEscalation"]),
            (&json!(true), &json!(false))
        );
        let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
        let sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap();
        assert!(sleep + DRAIN < grace);
        let old = Settings { can_sleep: false, ..settings() };
        let all = objects(&gateway(&spec()), &old, &Overrides::default());
        let container = &of(&all, "Deployment").unwrap()["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container.get("lifecycle"), None);
    }

    #[test]
    fn a_gateways_overrides_go_after_the_installations() {
        let parse = |key: &str, text: &str| Overrides::of_data([(key, text)].into_iter()).unwrap();
        let mut settings = settings();
        settings.overrides = parse("deployment", "spec: {replicas: 2, minReadySeconds: 3}");
        let all = objects(&gateway(&spec()), &settings, &parse("deployment", "spec: {replicas: 5}"));
        let spec_of = &of(&all, "Deployment").unwrap()["spec"];
        assert_eq!((&spec_of["replicas"], &spec_of["minReadySeconds"]), (&json!(5), &json!(3)));
        assert!(of(&all, "HorizontalPodAutoscaler").is_none());
        let scaled = parse("horizontalPodAutoscaler", "spec: {minReplicas: 2, maxReplicas: 6}");
        let all = objects(&gateway(&spec()), &settings, &scaled);
        let scaler = of(&all, "HorizontalPodAutoscaler").unwrap();
        assert_eq!(scaler["spec"]["maxReplicas"], 6);
        assert_eq!(scaler["spec"]["scaleTargetRef"]["name"], "waypoint");
    }
}
