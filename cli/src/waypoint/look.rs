//! How waypoints are: by the status of their Gateways, their pods, and the labels of what is bound to them.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use super::generate::{CLASSES, FOR};
use super::{API, USE, USE_NAMESPACE};
use crate::cluster::Cluster;
use crate::table::{Output, Table, print};
use crate::tag::REVISION;

/// The label of what is deployed for a Gateway.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// How many objects are shown that are bound to one.
const MOST_BOUND: usize = 10;

/// A waypoint.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Waypoint {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    class: String,
    revision: String,
    traffic: String,
    addresses: Vec<String>,
    /// Whether its Gateway is accepted in this version; `None` while nothing is said of it.
    pub accepted: Option<bool>,
    /// Whether it serves, in this version.
    pub serves: bool,
    /// What its conditions say, the first that does not hold.
    message: String,
}

impl Waypoint {
    fn read(gateway: &Value) -> Self {
        let text = |path: &str| gateway.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let label = |key: &str| {
            let labels = gateway.pointer("/metadata/labels");
            labels.and_then(|labels| labels.get(key)).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let conditions = gateway.pointer("/status/conditions").and_then(Value::as_array);
        let generation = gateway.pointer("/metadata/generation");
        // What was said of an older version says nothing of this one.
        let of = |kind: &str| {
            let mut all = conditions.into_iter().flatten();
            all.find(|c| {
                c.get("type").is_some_and(|t| t == kind) && c.get("observedGeneration") == generation
            })
        };
        let holds = |condition: &Value| condition.get("status").is_some_and(|status| status == "True");
        let (accepted, programmed) = (of("Accepted"), of("Programmed"));
        let said = accepted.filter(|condition| !holds(condition)).or(programmed).or(accepted);
        let part =
            |key: &str| said.and_then(|c| c.get(key)).and_then(Value::as_str).unwrap_or_default().to_owned();
        let message = match (part("reason"), part("message")) {
            (_, message) if !message.is_empty() => message,
            (reason, _) => reason,
        };
        let addresses = gateway.pointer("/status/addresses").and_then(Value::as_array).into_iter().flatten();
        let addresses = addresses.filter_map(|address| address.get("value")?.as_str()).map(str::to_owned);
        Self {
            namespace: text("/metadata/namespace"),
            name: text("/metadata/name"),
            class: text("/spec/gatewayClassName"),
            revision: Some(label(REVISION)).filter(|r| !r.is_empty()).unwrap_or_else(|| "default".to_owned()),
            traffic: Some(label(FOR)).filter(|t| !t.is_empty()).unwrap_or_else(|| "service".to_owned()),
            addresses: addresses.collect(),
            // The definition's default says that no controller has looked.
            accepted: accepted.filter(|c| c.get("reason").is_none_or(|r| r != "Pending")).map(holds),
            serves: programmed.is_some_and(holds),
            message,
        }
    }

    /// One of them.
    ///
    /// # Errors
    /// The API server can't be asked.
    pub fn find(cluster: &Cluster, namespace: &str, name: &str) -> Result<Option<Self>> {
        let found = cluster.find(&format!("{API}/namespaces/{namespace}/gateways/{name}"))?;
        Ok(found.as_ref().map(Self::read))
    }

    /// All of a namespace, or of the cluster.
    ///
    /// # Errors
    /// The API server can't be asked.
    pub fn all(cluster: &Cluster, namespace: Option<&str>) -> Result<Vec<Self>> {
        let path =
            namespace.map_or_else(|| format!("{API}/gateways"), |n| format!("{API}/namespaces/{n}/gateways"));
        let all = cluster.list(&path)?;
        let mut found: Vec<Self> =
            all.iter().map(Self::read).filter(|w| CLASSES.contains(&w.class.as_str())).collect();
        found.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Ok(found)
    }

    /// What is said of it.
    pub fn said(&self) -> &str {
        if self.message.is_empty() { "no control plane has looked at it yet" } else { &self.message }
    }
}

/// Lists them.
///
/// # Errors
/// The API server can't be asked.
pub fn list(cluster: &Cluster, namespace: Option<&String>, output: Output) -> Result<ExitCode> {
    let all = Waypoint::all(cluster, namespace.map(String::as_str))?;
    if let Some(document) = output.document(&all)? {
        print(&document)?;
        return Ok(ExitCode::SUCCESS);
    }
    if all.is_empty() {
        let place = namespace.map_or_else(|| "the cluster".to_owned(), |n| format!("namespace {n}"));
        print(&format!("no waypoint in {place}: culvert waypoint apply deploys one\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&table(&all, output).to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn table(all: &[Waypoint], output: Output) -> Table {
    let mut heading = vec!["NAMESPACE", "NAME", "REVISION", "FOR", "SERVES"];
    if output == Output::Wide {
        heading.extend(["CLASS", "ADDRESSES", "SAID"]);
    }
    let mut table = Table::new(&heading);
    for waypoint in all {
        let serves = if waypoint.serves { "yes" } else { "no" };
        let mut row = vec![
            waypoint.namespace.clone(),
            waypoint.name.clone(),
            waypoint.revision.clone(),
            waypoint.traffic.clone(),
            serves.to_owned(),
        ];
        if output == Output::Wide {
            row.extend([waypoint.class.clone(), waypoint.addresses.join(","), waypoint.said().to_owned()]);
        }
        table.row(row);
    }
    table
}

#[derive(Debug, Serialize)]
struct Status {
    #[serde(flatten)]
    waypoint: Waypoint,
    bound: Vec<String>,
    trouble: Vec<String>,
}

/// How they are.
///
/// # Errors
/// The API server can't be asked.
pub fn status(cluster: &Cluster, namespace: &str, name: Option<&str>, output: Output) -> Result<ExitCode> {
    let mut all = Waypoint::all(cluster, Some(namespace))?;
    all.retain(|waypoint| name.is_none_or(|name| waypoint.name == name));
    if let (Some(name), []) = (name, all.as_slice()) {
        anyhow::bail!(
            "there is no waypoint {name} in namespace {namespace}; `culvert waypoint list -A` lists all"
        );
    }
    let mut found = Vec::new();
    for waypoint in all {
        let bound = bound_to(cluster, &waypoint)?;
        let trouble = if waypoint.serves { Vec::new() } else { trouble(cluster, &waypoint)? };
        found.push(Status { waypoint, bound, trouble });
    }
    let fine = found.iter().all(|status| status.waypoint.serves);
    if let Some(document) = output.document(&found)? {
        print(&document)?;
    } else if found.is_empty() {
        print(&format!("no waypoint in namespace {namespace}: culvert waypoint apply deploys one\n"))?;
    } else {
        let all: Vec<Waypoint> = found.iter().map(|status| status.waypoint.clone()).collect();
        let mut text = table(&all, Output::Wide).to_string();
        for status in &found {
            let bound = match status.bound.as_slice() {
                [] => format!("nothing is bound to it (label {USE})"),
                some => format!("bound to it: {}", shown(some)),
            };
            text.push_str(&format!("\n{}: {bound}\n", status.waypoint.name));
            status.trouble.iter().for_each(|line| text.push_str(&format!("  {line}\n")));
        }
        print(&text)?;
    }
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn shown(names: &[String]) -> String {
    let first = names.iter().take(MOST_BOUND).cloned().collect::<Vec<_>>().join(", ");
    let more = names.len().saturating_sub(MOST_BOUND);
    if more > 0 { format!("{first} and {more} more") } else { first }
}

/// The namespaces, services, ServiceEntries and pods whose labels bind them to a waypoint.
///
/// # Errors
/// The API server can't be asked.
pub fn bound_to(cluster: &Cluster, waypoint: &Waypoint) -> Result<Vec<String>> {
    let lists = [
        ("Namespace", "/api/v1/namespaces"),
        ("Service", "/api/v1/services"),
        ("ServiceEntry", "/apis/networking.istio.io/v1/serviceentries"),
        ("Pod", "/api/v1/pods"),
    ];
    let mut bound = Vec::new();
    for (kind, path) in lists {
        let selector = format!("{path}?labelSelector={}%3D{}", USE.replace('/', "%2F"), waypoint.name);
        let all = cluster.list(&selector)?;
        bound.extend(
            all.iter()
                .filter(|object| is_bound(kind, object, waypoint))
                .map(|object| crate::cluster::origin(kind, object)),
        );
    }
    Ok(bound)
}

fn is_bound(kind: &str, object: &Value, waypoint: &Waypoint) -> bool {
    let text = |path: &str| object.pointer(path).and_then(Value::as_str);
    let labels = object.pointer("/metadata/labels");
    let named = labels.and_then(|labels| labels.get(USE_NAMESPACE)).and_then(Value::as_str);
    let own = if kind == "Namespace" { text("/metadata/name") } else { text("/metadata/namespace") };
    named.or(own) == Some(waypoint.namespace.as_str())
}

/// Why a waypoint does not serve, as far as its pods and the control plane tell, and what to do.
///
/// # Errors
/// The API server can't be asked.
pub fn trouble(cluster: &Cluster, waypoint: &Waypoint) -> Result<Vec<String>> {
    let Waypoint { namespace, name, .. } = waypoint;
    if waypoint.accepted == Some(false) {
        return Ok(vec![format!(
            "change the Gateway accordingly: kubectl edit gateway -n {namespace} {name}"
        )]);
    }
    if waypoint.accepted.is_none() {
        let class = format!("/apis/gateway.networking.k8s.io/v1/gatewayclasses/{}", waypoint.class);
        let mut lines = Vec::new();
        if cluster.find(&class)?.is_none() {
            lines.push(format!("there is no GatewayClass {}: the control plane makes it", waypoint.class));
        }
        lines.push(format!(
            "does a control plane of revision {} run, and deploy waypoints (the chart's waypoint.enabled), and read this \
             namespace (discoverySelectors)? culvert status; kubectl logs -n {} -l app=culvertd",
            waypoint.revision, cluster.system
        ));
        return Ok(lines);
    }
    let selector = format!("{}%3D{name}", GATEWAY_NAME.replace('/', "%2F"));
    let pods = cluster.list(&format!("/api/v1/namespaces/{namespace}/pods?labelSelector={selector}"))?;
    let mut lines: Vec<String> = pods.iter().filter_map(|pod| of_pod(pod, namespace)).collect();
    if pods.is_empty() {
        lines.push(format!(
            "it has no pod: kubectl describe deployment,replicaset -n {namespace} -l {GATEWAY_NAME}={name}"
        ));
    }
    Ok(lines)
}

fn of_pod(pod: &Value, namespace: &str) -> Option<String> {
    let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let name = text("/metadata/name");
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    let is = |condition: &Value, kind: &str, status: &str| {
        condition.get("type").is_some_and(|t| t == kind)
            && condition.get("status").is_some_and(|s| s == status)
    };
    let mut conditions = conditions.peekable();
    if conditions.clone().any(|condition| is(condition, "Ready", "True")) {
        return None;
    }
    if let Some(unscheduled) = conditions.find(|condition| is(condition, "PodScheduled", "False")) {
        let why = unscheduled.get("message").and_then(Value::as_str).unwrap_or_default();
        return Some(format!("pod {name} is on no node: {why}"));
    }
    let state = pod.pointer("/status/containerStatuses/0/state/waiting");
    let part = |key: &str| state.and_then(|s| s.get(key)).and_then(Value::as_str).unwrap_or_default();
    Some(match part("reason") {
        "" => format!(
            "pod {name} runs and is not ready: kubectl logs -n {namespace} {name} says what it waits for"
        ),
        reason => format!(
            "pod {name} waits: {reason} {} (kubectl describe pod -n {namespace} {name})",
            part("message")
        ),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn gateway(conditions: &Value) -> Waypoint {
        Waypoint::read(&json!({
            "metadata": { "namespace": "shop", "name": "waypoint", "generation": 2 },
            "spec": { "gatewayClassName": "culvert-waypoint" },
            "status": { "conditions": conditions, "addresses": [{ "value": "10.0.0.1" }] },
        }))
    }

    #[test]
    fn only_what_is_said_of_this_version_counts() {
        let condition = |kind: &str, status: &str, generation: u32, message: &str| {
            json!({ "type": kind, "status": status, "observedGeneration": generation, "message": message,
                "reason": "Reason" })
        };
        let fine = [condition("Accepted", "True", 2, ""), condition("Programmed", "True", 2, "1 of 1")];
        let read = gateway(&json!(fine));
        assert!(read.serves && read.accepted == Some(true) && read.said() == "1 of 1");
        assert_eq!(
            (&*read.traffic, &*read.revision, &read.addresses[..]),
            ("service", "default", &["10.0.0.1".to_owned()][..])
        );
        let old =
            gateway(&json!([condition("Accepted", "True", 1, ""), condition("Programmed", "True", 1, "")]));
        assert!(!old.serves && old.accepted.is_none());
        let refused = [
            condition("Accepted", "False", 2, "no such ConfigMap"),
            condition("Programmed", "False", 2, "b"),
        ];
        let refused = gateway(&json!(refused));
        assert!(refused.accepted == Some(false) && refused.said() == "no such ConfigMap");
        assert_eq!(gateway(&json!([])).said(), "no control plane has looked at it yet");
    }

    #[test]
    fn a_pod_that_does_not_serve_says_why() {
        let pod = |status: Value| json!({ "metadata": { "name": "w-1" }, "status": status });
        let ready = pod(json!({ "conditions": [{ "type": "Ready", "status": "True" }] }));
        assert_eq!(of_pod(&ready, "shop"), None);
        let full = pod(json!({ "conditions": [
            { "type": "PodScheduled", "status": "False", "message": "0/2 nodes are available" },
        ] }));
        assert!(of_pod(&full, "shop").unwrap().contains("0/2 nodes"));
        let pull =
            pod(json!({ "containerStatuses": [{ "state": { "waiting": { "reason": "ErrImagePull" } } }] }));
        assert!(of_pod(&pull, "shop").unwrap().contains("ErrImagePull"));
        assert!(of_pod(&pod(json!({})), "shop").unwrap().contains("kubectl logs -n shop w-1"));
    }

    #[test]
    fn what_is_bound_may_be_in_another_namespace() {
        let waypoint = gateway(&json!([]));
        let object = |namespace: &str, to: Value| json!({ "metadata": { "name": "shop", "namespace": namespace, "labels": to } });
        let elsewhere = json!({ USE: "waypoint", USE_NAMESPACE: "shop" });
        assert!(is_bound("Service", &object("shop", json!({})), &waypoint));
        assert!(!is_bound("Service", &object("other", json!({})), &waypoint));
        assert!(is_bound("Service", &object("other", elsewhere), &waypoint));
        assert!(is_bound("Namespace", &object("", json!({})), &waypoint));
    }
}
