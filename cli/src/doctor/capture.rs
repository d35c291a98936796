//! Pods that ask to be in the mesh and aren't, and pods that wait for it before they start: with what is said of them in
//! events.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde_json::Value;

use super::{Finding, Grade, name, text, time_of};
use crate::cluster::{Cluster, MeshSettings, NamespaceLabels, labels_of};
use crate::events::newest;
use crate::status::{MODE, REDIRECTION};

/// Who reports, of the mesh.
const AGENT: &str = "culvert-node";
/// What the container runtime names in its errors.
const PLUGIN: &str = "culvert-cni";
/// Pods of a kind that are named one by one.
const NAMED: usize = 20;
/// A pod that started this shortly ago may be captured, and not annotated yet.
const FRESH: Duration = Duration::from_secs(15);
/// The argument of the node agent that names namespaces whose pods are never in the mesh.
const EXCLUDE: &str = "--exclude-namespaces=";

/// Pods that ask to be in the mesh, by what has become of it.
#[derive(Debug, Default)]
struct Asking<'v> {
    captured: usize,
    with_sidecar: Vec<&'v Value>,
    /// Of namespaces that are left out, how many.
    excluded: BTreeMap<&'v str, usize>,
    open: Vec<&'v Value>,
}

impl<'v> Asking<'v> {
    fn of(namespaces: &[Value], pods: &'v [Value], excluded: &BTreeSet<String>, now: SystemTime) -> Self {
        let mode = |object: &Value| {
            let labels = object.pointer("/metadata/labels");
            labels.and_then(|l| l.get(MODE)).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let meshed: BTreeSet<&str> = namespaces.iter().filter(|n| mode(n) == "ambient").map(name).collect();
        let mut asking = Self::default();
        for pod in pods.iter().filter(|pod| text(pod, "/status/phase") == "Running") {
            let (namespace, own) = (text(pod, "/metadata/namespace"), mode(pod));
            let asks = own == "ambient" || own != "none" && meshed.contains(namespace);
            let on_host = pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) == Some(true);
            if !asks || on_host {
                continue;
            }
            let annotation = |key| pod.pointer("/metadata/annotations").and_then(|a| a.get(key));
            let started = time_of(text(pod, "/status/startTime"));
            if excluded.contains(namespace) {
                *asking.excluded.entry(namespace).or_default() += 1;
            } else if annotation("sidecar.istio.io/status").is_some() {
                asking.with_sidecar.push(pod);
            } else if annotation(REDIRECTION).is_some_and(|said| said == "enabled") {
                asking.captured += 1;
            } else if started.is_none_or(|at| now.duration_since(at).is_ok_and(|age| age > FRESH)) {
                asking.open.push(pod);
            }
        }
        asking
    }
}

/// What is to be said of the pods of a cluster.
///
/// # Errors
/// The API server can't be asked.
pub(super) fn findings(
    cluster: &Cluster,
    namespaces: &[Value],
    pods: &[Value],
    now: SystemTime,
) -> Result<Vec<Finding>> {
    let excluded = excluded(cluster)?;
    let asking = Asking::of(namespaces, pods, &excluded, now);
    let mut found = Vec::new();
    for pod in &asking.with_sidecar {
        let remedy = "remove the namespace's istio-injection label and restart it to bring it into this mesh";
        let detail = format!("{} has a sidecar and is left alone", full(pod));
        found.push(Finding::new("capture", Grade::Note, detail, remedy));
    }
    for (namespace, count) in &asking.excluded {
        let detail =
            format!("{count} pods of namespace {namespace} ask for it, and the namespace is left out");
        let remedy = if *namespace == cluster.system {
            "remove its label istio.io/dataplane-mode: the mesh's own namespace is never in the mesh"
        } else {
            "remove it from the value node.excludeNamespaces, or its label istio.io/dataplane-mode"
        };
        found.push(Finding::new("capture", Grade::Note, detail, remedy));
    }
    let log = format!("kubectl logs -n {} -l app={AGENT} says what its node agent did", cluster.system);
    for pod in asking.open.iter().take(NAMED) {
        let (namespace, name) = (text(pod, "/metadata/namespace"), name(pod));
        let path =
            format!("/api/v1/namespaces/{namespace}/events?fieldSelector=involvedObject.name%3D{name}");
        let why = said_of(pod, &cluster.list(&path)?).map_or(String::new(), |said| format!(": {said}"));
        let detail = format!("{} is not captured{why}", full(pod));
        found.push(Finding::new("capture", Grade::Problem, detail, log.clone()));
    }
    if asking.open.len() > NAMED {
        let detail = format!("{} more pods are not captured", asking.open.len() - NAMED);
        found.push(Finding::new("capture", Grade::Problem, detail, log));
    }
    let failed = cluster.list("/api/v1/events?fieldSelector=reason%3DFailedCreatePodSandBox")?;
    found.extend(waiting(&cluster.system, pods, &failed));
    let detail = format!("{} pods are captured", asking.captured);
    found.push(Finding::new("capture", Grade::Ok, detail, ""));
    Ok(found)
}

/// Namespaces with pods of the mesh of which no control plane reads anything: their pods have no identity, and nobody lets them in.
pub(super) fn unselected(settings: &[MeshSettings], namespaces: &[Value], pods: &[Value]) -> Vec<Finding> {
    let labels: NamespaceLabels = namespaces.iter().map(|n| (name(n).to_owned(), labels_of(n))).collect();
    let captured = |pod: &&Value| {
        let annotations = pod.pointer("/metadata/annotations");
        annotations.and_then(|all| all.get(REDIRECTION)).and_then(Value::as_str) == Some("enabled")
    };
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for pod in pods.iter().filter(captured) {
        *counts.entry(text(pod, "/metadata/namespace")).or_default() += 1;
    }
    counts.retain(|namespace, _| {
        !settings.is_empty() && !settings.iter().any(|s| s.selects(namespace, &labels))
    });
    let finding = |(namespace, count): (&str, usize)| {
        let detail = format!(
            "{count} pods of namespace {namespace} are captured, and discoverySelectors (mesh settings) leave the namespace out: \
             their connections are refused, or leave the mesh"
        );
        let remedy = "give the namespace a label that discoverySelectors select, or take it out of the mesh";
        Finding::new("capture", Grade::Problem, detail, remedy)
    };
    counts.into_iter().map(finding).collect()
}

fn full(pod: &Value) -> String {
    format!("{}/{}", text(pod, "/metadata/namespace"), name(pod))
}

/// Whether an event is about this pod, and not an earlier one of its name.
fn is_of(event: &Value, pod: &Value) -> bool {
    let same = |of: &str, own: &str| text(event, of) == text(pod, own);
    same("/involvedObject/namespace", "/metadata/namespace")
        && same("/involvedObject/name", "/metadata/name")
        && ["", text(pod, "/metadata/uid")].contains(&text(event, "/involvedObject/uid"))
}

/// What the node agent said of a pod last; if it said nothing, anybody.
fn said_of<'v>(pod: &Value, events: &'v [Value]) -> Option<&'v str> {
    let of_pod = || events.iter().filter(|event| is_of(event, pod));
    let of_agent = of_pod().filter(|event| text(event, "/reportingComponent") == AGENT);
    newest(of_agent).or_else(|| newest(of_pod())).map(|event| text(event, "/message"))
}

/// Pods that don't start because of the mesh, labelled or not: all of a node wait while its agent is away.
fn waiting(system: &str, pods: &[Value], failed: &[Value]) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut more = 0;
    for pod in pods.iter().filter(|pod| text(pod, "/status/phase") == "Pending") {
        let last = newest(failed.iter().filter(|event| is_of(event, pod)));
        let Some(said) = last.map(|event| text(event, "/message")).filter(|said| said.contains(PLUGIN))
        else {
            continue;
        };
        if found.len() == NAMED {
            more += 1;
            continue;
        }
        let node = text(pod, "/spec/nodeName");
        let remedy = if said.contains("metadata.annotations") {
            "correct the annotation: the pod then starts by itself".to_owned()
        } else {
            format!(
                "kubectl get pods -n {system} -o wide --field-selector spec.nodeName={node} shows the mesh's pods of its node"
            )
        };
        found.push(Finding::new("capture", Grade::Problem, format!("{} waits: {said}", full(pod)), remedy));
    }
    if more > 0 {
        found.push(Finding::new("capture", Grade::Problem, format!("{more} more pods wait"), ""));
    }
    found
}

/// The namespaces whose pods the node agents leave alone.
fn excluded(cluster: &Cluster) -> Result<BTreeSet<String>> {
    let path = format!("/apis/apps/v1/namespaces/{}/daemonsets/{AGENT}", cluster.system);
    Ok(cluster.find(&path)?.as_ref().map(excluded_by).unwrap_or_default())
}

fn excluded_by(agents: &Value) -> BTreeSet<String> {
    let arguments = agents.pointer("/spec/template/spec/containers/0/args").and_then(Value::as_array);
    let mut lists =
        arguments.into_iter().flatten().filter_map(|argument| argument.as_str()?.strip_prefix(EXCLUDE));
    // Of an argument that is given twice the last counts.
    let list = lists.next_back().unwrap_or_default();
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "callers write it in place")]
    fn pod(namespace: &str, pod_name: &str, label: &str, annotations: Value) -> Value {
        json!({
            "metadata": {"namespace": namespace, "name": pod_name, "uid": "u", "labels": {MODE: label},
                         "annotations": annotations},
            "spec": {"nodeName": "n1"}, "status": {"phase": "Running", "startTime": "1970-01-01T00:10:00Z"},
        })
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn pods_ask_by_the_rule_of_the_node_agent() {
        let namespaces = [
            json!({"metadata": {"name": "shop", "labels": {MODE: "ambient"}}}),
            json!({"metadata": {"name": "kube-system", "labels": {MODE: "ambient"}}}),
            json!({"metadata": {"name": "other"}}),
        ];
        let mut on_host = pod("shop", "host", "", json!({}));
        on_host["spec"]["hostNetwork"] = true.into();
        let pods = [
            pod("shop", "in", "", json!({REDIRECTION: "enabled"})),
            pod("shop", "closed", "", json!({REDIRECTION: "pending"})),
            // A value that is none leaves it to the namespace.
            pod("shop", "odd", "Kmesh", json!({})),
            pod("shop", "out", "none", json!({})),
            pod("shop", "sidecar", "", json!({"sidecar.istio.io/status": "{}"})),
            pod("other", "own", "ambient", json!({})),
            pod("other", "not", "", json!({})),
            pod("kube-system", "dns", "", json!({})),
            on_host,
        ];
        let excluded = BTreeSet::from(["kube-system".to_owned()]);
        let asking = Asking::of(&namespaces, &pods, &excluded, at(1000));
        let names = |pods: &[&Value]| pods.iter().map(|pod| full(pod)).collect::<Vec<_>>();
        assert_eq!(asking.captured, 1);
        assert_eq!(names(&asking.open), ["shop/closed", "shop/odd", "other/own"]);
        assert_eq!(names(&asking.with_sidecar), ["shop/sidecar"]);
        assert_eq!(asking.excluded, BTreeMap::from([("kube-system", 1)]));
        // The annotation follows a moment after the start.
        let soon = Asking::of(&namespaces, &pods, &excluded, at(605));
        assert_eq!((soon.captured, soon.open.len()), (1, 0));
    }

    #[test]
    fn what_the_agent_says_goes_before_what_the_kubelet_said_later() {
        let event = |uid: &str, component: &str, time: &str, message: &str| {
            json!({"involvedObject": {"namespace": "shop", "name": "web", "uid": uid}, "message": message,
                   "reportingComponent": component, "eventTime": time})
        };
        let web = pod("shop", "web", "", json!({}));
        let events = [
            event("u", AGENT, "2026-11-22T10:00:00.000000Z", "no ztunnel"),
            event("u", AGENT, "2026-11-22T10:00:01.000000Z", "it refuses"),
            event("before", AGENT, "2026-11-22T10:00:03.000000Z", "of an earlier one"),
            event("u", "kubelet", "2026-11-22T10:00:02.000000Z", "Started container"),
        ];
        assert_eq!(said_of(&web, &events), Some("it refuses"));
        assert_eq!(said_of(&web, &events[2..]), Some("Started container"));
        assert_eq!(said_of(&web, &[]), None);
    }

    #[test]
    fn a_pod_that_waits_for_the_mesh_is_named_with_the_reason() {
        let event = |name: &str, message: &str| {
            json!({"involvedObject": {"namespace": "shop", "name": name, "uid": "u"}, "message": message,
                   "lastTimestamp": "2026-11-22T10:00:00Z"})
        };
        let mut pods = [pod("shop", "web", "", json!({})), pod("shop", "other", "", json!({}))];
        pods.iter_mut().for_each(|pod| pod["status"]["phase"] = "Pending".into());
        let ours = "plugin type=\"culvert-cni\" failed (add): pod shop/web waits for the Culvert node agent";
        let failed = [event("web", ours), event("other", "plugin type=\"calico\" failed (add)")];
        let found = waiting("culvert-system", &pods, &failed);
        assert_eq!(found.len(), 1);
        assert!(found[0].detail.contains("shop/web waits: plugin type"), "{found:?}");
        assert!(found[0].remedy.contains("spec.nodeName=n1"), "{found:?}");
        // It runs by now.
        pods[0]["status"]["phase"] = "Running".into();
        assert!(waiting("culvert-system", &pods, &failed).is_empty());
        let many: Vec<Value> = (0..30).map(|at| pod("shop", &format!("p{at}"), "", json!({}))).collect();
        let mut many = many;
        many.iter_mut().for_each(|pod| pod["status"]["phase"] = "Pending".into());
        let failed: Vec<Value> = (0..30).map(|at| event(&format!("p{at}"), ours)).collect();
        let found = waiting("culvert-system", &many, &failed);
        assert_eq!((found.len(), found[NAMED].detail.as_str()), (NAMED + 1, "10 more pods wait"));
    }

    #[test]
    fn the_agents_arguments_say_which_namespaces_are_left_out() {
        let set =
            |arguments: Value| json!({"spec": {"template": {"spec": {"containers": [{"args": arguments}]}}}});
        let of = |arguments| excluded_by(&set(arguments)).into_iter().collect::<Vec<_>>();
        assert_eq!(of(json!(["--x", "--exclude-namespaces=a,b"])), ["a", "b"]);
        assert_eq!(of(json!(["--exclude-namespaces=a", "--exclude-namespaces=c"])), ["c"]);
        assert_eq!(of(json!(["--x"])), [""; 0]);
    }
}
