//! Whether an installation is as it should be, and what to do where it isn't: what `status` shows, and what `install`,
//! `upgrade` and `verify-install` wait for.

use std::time::Duration;

use anyhow::Result;
use http::{Method, StatusCode};
use serde::Serialize;
use serde_json::Value;

use crate::admin::READINESS;
use crate::cluster::{Cluster, MeshSettings, PodName};
use crate::events::newest;
use crate::install::crds::{self, Action};

/// Pods of a part that are asked what they wait for, and for how long each: the node of one may be away.
const ASKED: usize = 3;
const ASKING: Duration = Duration::from_secs(5);
/// Characters of what one says.
const SHOWN: usize = 500;

/// How something is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ready,
    /// Not yet, and may become so by itself.
    Waiting,
    /// Not, and will not become so by itself.
    Failed,
}

impl State {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Waiting => "waiting",
            Self::Failed => "failed",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub what: String,
    /// How it is.
    pub state: State,
    /// In how far.
    pub detail: String,
    /// What to do about it; empty where there is nothing to do.
    pub remedy: String,
}

impl Check {
    fn new(what: impl Into<String>, state: State, detail: impl Into<String>) -> Self {
        Self { what: what.into(), state, detail: detail.into(), remedy: String::new() }
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }
}

/// Looks at all parts of an installation.
///
/// # Errors
/// The API server can't be asked.
pub fn look(cluster: &Cluster) -> Result<Vec<Check>> {
    let mut found = Vec::new();
    let system = &cluster.system;
    let deployments = cluster
        .list(&format!("/apis/apps/v1/namespaces/{system}/deployments?labelSelector=app%3Dculvertd"))?;
    if deployments.is_empty() {
        found.push(
            Check::new("control plane", State::Failed, format!("no culvertd in namespace {system}")).remedy(
                "`culvert install` installs the mesh; --system-namespace names another namespace to look in",
            ),
        );
    }
    for deployment in &deployments {
        found.extend(deployment_state(cluster, deployment)?);
    }
    for app in ["culvert-node", "ztunnel"] {
        match cluster.find(&format!("/apis/apps/v1/namespaces/{system}/daemonsets/{app}"))? {
            Some(set) => found.extend(daemon_set_state(cluster, app, &set)?),
            None if deployments.is_empty() => {}
            None => found.push(
                Check::new(app, State::Failed, format!("no DaemonSet {app} in namespace {system}")).remedy(
                    format!(
                        "`culvert upgrade` with {}.enabled=true makes it",
                        app.trim_start_matches("culvert-")
                    ),
                ),
            ),
        }
    }
    if !deployments.is_empty() {
        found.extend(settings(&deployments, &MeshSettings::all(cluster)?));
        found.push(root(cluster)?);
        found.extend(webhooks(cluster)?);
    }
    // Without a control plane nothing else is missing.
    if !deployments.is_empty() {
        found.push(definitions(cluster)?);
    }
    Ok(found)
}

fn number(object: &Value, path: &str) -> i64 {
    object.pointer(path).and_then(Value::as_i64).unwrap_or_default()
}

fn text<'v>(object: &'v Value, path: &str) -> &'v str {
    object.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn image(object: &Value) -> &str {
    text(object, "/spec/template/spec/containers/0/image")
}

fn is_current(object: &Value) -> bool {
    number(object, "/status/observedGeneration") >= number(object, "/metadata/generation")
}

fn deployment_state(cluster: &Cluster, object: &Value) -> Result<Vec<Check>> {
    let name = text(object, "/metadata/name");
    let wanted = number(object, "/spec/replicas");
    let (ready, updated) =
        (number(object, "/status/readyReplicas"), number(object, "/status/updatedReplicas"));
    let done = is_current(object) && ready >= wanted && updated >= wanted && wanted > 0;
    let detail = format!("{ready} of {wanted} ready, {}", image(object));
    with_pods(cluster, "culvertd", Check::new(name, if done { State::Ready } else { State::Waiting }, detail))
}

fn daemon_set_state(cluster: &Cluster, app: &str, object: &Value) -> Result<Vec<Check>> {
    let wanted = number(object, "/status/desiredNumberScheduled");
    let (ready, updated) =
        (number(object, "/status/numberReady"), number(object, "/status/updatedNumberScheduled"));
    let done = is_current(object) && ready >= wanted && updated >= wanted;
    let detail = format!("{ready} of {wanted} nodes ready, {updated} up to date, {}", image(object));
    let check = Check::new(app, if done { State::Ready } else { State::Waiting }, detail);
    if done && wanted == 0 {
        let remedy =
            format!("no node fits: look at the value {}.nodeSelector", app.trim_start_matches("culvert-"));
        return Ok(vec![Check { state: State::Failed, ..check }.remedy(remedy)]);
    }
    with_pods(cluster, app, check)
}

/// Adds what is the matter with the pods of a part that isn't ready.
fn with_pods(cluster: &Cluster, app: &str, check: Check) -> Result<Vec<Check>> {
    let ready = check.state == State::Ready;
    let mut found = vec![check];
    if !ready {
        let path = format!("/api/v1/namespaces/{}/pods?labelSelector=app%3D{app}", cluster.system);
        let mut left = ASKED;
        for pod in cluster.list(&path)? {
            found.extend(pod_trouble(cluster, &pod, &mut left)?);
        }
    }
    Ok(found)
}

/// Why a pod isn't ready; nothing for one that is, or is on its way without a word. One that runs is asked itself, where so many
/// are `left` to ask.
fn pod_trouble(cluster: &Cluster, pod: &Value, left: &mut usize) -> Result<Option<Check>> {
    let (namespace, name) = (text(pod, "/metadata/namespace"), text(pod, "/metadata/name"));
    let what = format!("pod {name}");
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let condition = |kind: &str| conditions.iter().find(|c| text(c, "/type") == kind);
    if condition("Ready").is_some_and(|c| text(c, "/status") == "True") {
        return Ok(None);
    }
    if let Some(unscheduled) = condition("PodScheduled").filter(|c| text(c, "/status") == "False") {
        return Ok(Some(Check::new(what, State::Waiting, text(unscheduled, "/message")).remedy(
            "no node takes it: its resources, nodeSelector and tolerations are values of the chart",
        )));
    }
    let statuses =
        pod.pointer("/status/containerStatuses").and_then(Value::as_array).cloned().unwrap_or_default();
    for status in &statuses {
        let reason = text(status, "/state/waiting/reason");
        let message = text(status, "/state/waiting/message");
        if let Some(remedy) = remedy_of(reason, namespace, name) {
            let ended = text(status, "/lastState/terminated/message");
            let detail =
                [reason, message, ended].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join(": ");
            return Ok(Some(Check::new(what, State::Waiting, detail).remedy(remedy)));
        }
    }
    let runs = statuses.iter().any(|status| status.pointer("/state/running").is_some());
    if runs && *left > 0 {
        *left -= 1;
        let pod = PodName { namespace: namespace.to_owned(), name: name.to_owned(), ..PodName::default() };
        let answer =
            cluster.ask_pod_within(ASKING, &pod, READINESS.port(), Method::GET, "/healthz/ready").ok();
        if let Some(missing) = answer.and_then(|(status, bytes)| missing(status, &bytes)) {
            let remedy = format!("kubectl logs -n {namespace} {name} has more of it");
            return Ok(Some(Check::new(what, State::Waiting, missing).remedy(remedy)));
        }
    }
    let path = format!(
        "/api/v1/namespaces/{namespace}/events?fieldSelector=involvedObject.name%3D{name},type%3DWarning"
    );
    let events = cluster.list(&path)?;
    Ok(newest(&events).map(|event| {
        Check::new(what, State::Waiting, format!("{}: {}", text(event, "/reason"), text(event, "/message")))
            .remedy(format!("kubectl describe pod -n {namespace} {name}"))
    }))
}

/// What a program of ours says that it waits for, by its answer to the question whether it is ready.
fn missing(status: StatusCode, answer: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(answer);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let is_said = status == StatusCode::SERVICE_UNAVAILABLE && !lines.is_empty();
    is_said.then(|| lines.join("; ").chars().take(SHOWN).collect())
}

fn remedy_of(reason: &str, namespace: &str, name: &str) -> Option<String> {
    match reason {
        "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "InvalidImageName" => Some(
            "the image can't be had: look at the values image.repository, image.tag and image.pullSecrets"
                .to_owned(),
        ),
        "CrashLoopBackOff" | "RunContainerError" | "CreateContainerError" | "CreateContainerConfigError" => {
            Some(format!("kubectl logs -n {namespace} {name} --previous"))
        }
        _ => None,
    }
}

/// The mesh's settings of each control plane, as it would read them now.
fn settings(deployments: &[Value], all: &[MeshSettings]) -> Vec<Check> {
    let of = |deployment: &Value| {
        // The chart names both by the revision.
        let name = text(deployment, "/metadata/name").replacen("culvertd", "culvert", 1);
        let what = format!("mesh settings, ConfigMap {name}");
        let stays = "what was read last stays in force, and a control plane that starts waits";
        match all.iter().find(|settings| settings.name == name) {
            None => Check::new(what, State::Failed, format!("not there: {stays}"))
                .remedy("`culvert upgrade` makes it anew, with the release's values"),
            Some(found) if found.errors.is_empty() => Check::new(what, State::Ready, "without errors"),
            Some(found) => Check::new(what, State::Failed, format!("{}; {stays}", found.errors.join("; "))).remedy(
                "correct it where it came from: the values meshConfig and `culvert upgrade`, or whoever edited the ConfigMap",
            ),
        }
    };
    deployments.iter().map(of).collect()
}

/// The root that pods of the mesh's own need before they can start.
fn root(cluster: &Cluster) -> Result<Check> {
    let what = "root of trust";
    let path = format!("/api/v1/namespaces/{}/configmaps/culvert-ca-root-cert", cluster.system);
    let there = cluster.find(&path)?.is_some_and(|map| !text(&map, "/data/root-cert.pem").is_empty());
    Ok(if there {
        Check::new(what, State::Ready, "ConfigMap culvert-ca-root-cert")
    } else {
        Check::new(what, State::Waiting, "no ConfigMap culvert-ca-root-cert yet")
            .remedy("the control plane makes it: its log says what is in the way")
    })
}

/// Without the CA's certificate the API server can't ask the control plane, and refuses changes of policies.
fn webhooks(cluster: &Cluster) -> Result<Option<Check>> {
    let all = cluster.list(
        "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations?labelSelector=app%3Dculvertd",
    )?;
    let ours = all.iter().filter(|w| text(w, "/webhooks/0/clientConfig/service/namespace") == cluster.system);
    let mut bundles = ours.flat_map(|w| w.get("webhooks").and_then(Value::as_array).into_iter().flatten());
    let (mut count, mut empty) = (0, 0);
    for webhook in &mut bundles {
        count += 1;
        empty += usize::from(text(webhook, "/clientConfig/caBundle").is_empty());
    }
    Ok(match (count, empty) {
        (0, _) => None,
        (_, 0) => Some(Check::new("admission", State::Ready, "the API server knows the webhook's CA")),
        _ => Some(
            Check::new("admission", State::Waiting, "the webhook has no CA bundle yet")
                .remedy("the control plane fills it in: its log says what is in the way"),
        ),
    })
}

/// The definitions of the kinds that users write.
fn definitions(cluster: &Cluster) -> Result<Check> {
    let what = "custom resource definitions";
    let (mut there, mut missing, mut trouble) = (0, 0, Vec::new());
    let ours = crds::ours()?;
    for crd in &ours {
        let name = text(crd, "/metadata/name");
        let installed = cluster.find(&format!("{}/{name}", crds::PATH))?;
        match crds::decide(crd, installed.as_ref()) {
            Action::Keep(_) => there += 1,
            Action::Create => missing += 1,
            Action::Update { from } => trouble.push(format!("{name} is of version {from}, an older one")),
            Action::Blocked(why) => trouble.push(format!("{name}: {why}")),
        }
    }
    if missing > 0 {
        trouble.push(format!("{missing} of {} are missing", ours.len()));
    }
    Ok(if trouble.is_empty() {
        Check::new(what, State::Ready, format!("{there} of {}", ours.len()))
    } else {
        Check::new(what, State::Failed, trouble.join("; ")).remedy(
            "`culvert upgrade` installs and updates them; those of another mesh are updated with that mesh",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_waits_for_is_what_it_says_itself() {
        let text = b"CNI plugin: no primary\nKubernetes: not yet\n";
        let said = missing(StatusCode::SERVICE_UNAVAILABLE, text);
        assert_eq!(said.as_deref(), Some("CNI plugin: no primary; Kubernetes: not yet"));
        assert_eq!(missing(StatusCode::OK, b"ready\n"), None);
        assert_eq!(missing(StatusCode::SERVICE_UNAVAILABLE, b"\n"), None);
        assert_eq!(missing(StatusCode::SERVICE_UNAVAILABLE, &[b'a'; 9000]).unwrap().len(), SHOWN);
    }
}
