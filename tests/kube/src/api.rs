//! The API server, asked by this process: what scenarios look at again and again, and the commands that they run in pods. A
//! kubectl for each question took most of the machine.

use std::fs::File;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::AttachParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::runtime::Runtime;

use crate::lab::Lab;
use crate::report::say;

/// For an answer.
const LIMIT: Duration = Duration::from_secs(30);
/// For a command in a pod: those of scenarios have limits of their own.
const COMMAND_LIMIT: Duration = Duration::from_secs(90);
/// Who changes what scenarios apply, in the server's records.
const MANAGER: &str = "kube-tests";

/// The kinds that scenarios use: as they call them, as objects do, where they are, and their plural. `true`: in a namespace.
const KINDS: &[(&[&str], &str, &str, &str, bool)] = &[
    (&["pod", "pods"], "Pod", "api/v1", "pods", true),
    (&["service", "services"], "Service", "api/v1", "services", true),
    (&["serviceaccount"], "ServiceAccount", "api/v1", "serviceaccounts", true),
    (&["secret"], "Secret", "api/v1", "secrets", true),
    (&["configmap"], "ConfigMap", "api/v1", "configmaps", true),
    (&["node", "nodes"], "Node", "api/v1", "nodes", false),
    (&["namespace", "namespaces"], "Namespace", "api/v1", "namespaces", false),
    (&["deployment"], "Deployment", "apis/apps/v1", "deployments", true),
    (&["daemonset"], "DaemonSet", "apis/apps/v1", "daemonsets", true),
    (&["statefulset"], "StatefulSet", "apis/apps/v1", "statefulsets", true),
    (&["job"], "Job", "apis/batch/v1", "jobs", true),
    (&["networkpolicies"], "NetworkPolicy", "apis/networking.k8s.io/v1", "networkpolicies", true),
    (
        &["authorizationpolicy"],
        "AuthorizationPolicy",
        "apis/security.istio.io/v1",
        "authorizationpolicies",
        true,
    ),
    (&["peerauthentication"], "PeerAuthentication", "apis/security.istio.io/v1", "peerauthentications", true),
    (&["serviceentry"], "ServiceEntry", "apis/networking.istio.io/v1", "serviceentries", true),
    (&["gateway"], "Gateway", "apis/gateway.networking.k8s.io/v1", "gateways", true),
    (&["httproute"], "HTTPRoute", "apis/gateway.networking.k8s.io/v1", "httproutes", true),
];

/// The path of an object, or of a list of them, in kubectl's words for it: `pod NAME -n NAMESPACE`.
///
/// # Errors
/// There is a word, or a kind, that is not known here.
pub fn path(words: &[&str]) -> Result<String> {
    let (mut namespace, mut all, mut plain) = (None, false, Vec::new());
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        match *word {
            "-n" => namespace = rest.next().copied(),
            "--all-namespaces" | "-A" => all = true,
            flag if flag.starts_with('-') => bail!("{flag} is not known here: {}", words.join(" ")),
            word => plain.extend(word.split('/')),
        }
    }
    let (kind, name) = match plain.as_slice() {
        [kind] => (*kind, None),
        [kind, name] => (*kind, Some(*name)),
        _ => bail!("one kind, and a name: {}", words.join(" ")),
    };
    let (.., place, plural, namespaced) = KINDS
        .iter()
        .find(|(names, ..)| names.contains(&kind))
        .with_context(|| format!("the kind {kind} is not known here"))?;
    let namespace = if *namespaced && !all {
        format!("/namespaces/{}", namespace.unwrap_or("default"))
    } else {
        String::new()
    };
    let name = name.map(|name| format!("/{name}")).unwrap_or_default();
    Ok(format!("/{place}{namespace}/{plural}{name}"))
}

/// The path of an object that is to be applied.
fn path_of(object: &Value) -> Result<String> {
    let text = |pointer| object.pointer(pointer).and_then(Value::as_str);
    let kind = text("/kind").context("an object has no kind")?;
    let known = KINDS.iter().find(|(_, k, place, ..)| {
        *k == kind && text("/apiVersion").is_some_and(|version| place.ends_with(version))
    });
    let (_, _, place, plural, namespaced) =
        known.with_context(|| format!("the kind {kind} of {} is not known here", object["apiVersion"]))?;
    let namespace = if *namespaced {
        format!("/namespaces/{}", text("/metadata/namespace").unwrap_or("default"))
    } else {
        String::new()
    };
    let name = text("/metadata/name").context("an object has no name")?;
    Ok(format!("/{place}{namespace}/{plural}/{name}"))
}

/// The API server. Cloning shares the connections.
#[derive(Clone)]
pub struct Api {
    /// Its threads are in the cluster's network namespace, and with them all that is spawned there.
    runtime: Arc<Runtime>,
    client: Client,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Api {
    /// That of a cluster, as its administrator.
    ///
    /// # Errors
    /// It is not up.
    pub fn connect(lab: &Lab) -> Result<Self> {
        let netns = format!("/run/netns/{}", lab.control_plane_netns());
        let netns = File::open(&netns).with_context(|| format!("opening {netns}"))?;
        let enter = move || {
            if let Err(error) = setns(&netns, CloneFlags::CLONE_NEWNET) {
                say(&format!("error: a thread can't enter the cluster's network: {error}"));
            }
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(enter)
            .build()?;
        let kubeconfig = Kubeconfig::read_from(lab.pki("admin.kubeconfig"))?;
        let client = wait(&runtime, async {
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            anyhow::Ok(Client::try_from(config)?)
        })?;
        Ok(Self { runtime: Arc::new(runtime), client })
    }

    /// What is at a path; `None` if nothing is.
    ///
    /// # Errors
    /// The server refuses or can't be reached.
    pub fn find(&self, path: &str) -> Result<Option<Value>> {
        self.request("GET", path, None)
    }

    /// Deletes what is at a path, without waiting for its end; whether it was there.
    ///
    /// # Errors
    /// The server refuses or can't be reached.
    pub fn delete(&self, path: &str) -> Result<bool> {
        Ok(self.request("DELETE", path, None)?.is_some())
    }

    /// Applies an object, or the items of a List.
    ///
    /// # Errors
    /// One is refused.
    pub fn apply(&self, object: &Value) -> Result<()> {
        if object["kind"] == "List" {
            let items = object["items"].as_array();
            return items.into_iter().flatten().try_for_each(|item| self.apply(item));
        }
        let path = path_of(object)?;
        let whole = format!("{path}?fieldManager={MANAGER}&force=true&fieldValidation=Strict");
        self.request("PATCH", &whole, Some((object, "application/apply-patch+yaml"))).map(drop)
    }

    /// Merges `change` into the object at a path (RFC 7386).
    ///
    /// # Errors
    /// It is not there, or the server refuses or can't be reached.
    pub fn merge(&self, path: &str, change: &Value) -> Result<()> {
        let whole = format!("{path}?fieldManager={MANAGER}");
        self.request("PATCH", &whole, Some((change, "application/merge-patch+json"))).map(drop)
    }

    fn request(&self, method: &str, path: &str, body: Option<(&Value, &str)>) -> Result<Option<Value>> {
        let mut request = http::Request::builder().method(method).uri(path);
        if let Some((_, form)) = body {
            request = request.header("content-type", form);
        }
        let body = body.map(|(body, _)| serde_json::to_vec(body)).transpose()?;
        let request = request.body(body.unwrap_or_default())?;
        let (client, what) = (self.client.clone(), format!("{method} {path}"));
        wait(&self.runtime, async move {
            match tokio::time::timeout(LIMIT, client.request::<Value>(request)).await {
                Ok(Ok(answer)) => Ok(Some(answer)),
                Ok(Err(kube::Error::Api(status))) if status.code == 404 && what.starts_with("PATCH") => {
                    bail!("{what}: {} ({})", status.message, status.code)
                }
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(None),
                Ok(Err(kube::Error::Api(status))) => bail!("{what}: {} ({})", status.message, status.code),
                Ok(Err(error)) => Err(anyhow!(error).context(what)),
                Err(_) => bail!("{what}: no answer within {LIMIT:?}"),
            }
        })
    }

    /// Runs a command in a pod and returns what it printed.
    ///
    /// # Errors
    /// It can't be started, or fails: with what it said.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Result<String> {
        let pods: kube::Api<Pod> = kube::Api::namespaced(self.client.clone(), namespace);
        let words: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
        let (pod, shown) = (pod.to_owned(), format!("{} in {namespace}/{pod}", command.join(" ")));
        let run = async move {
            let how = AttachParams::default().stdin(false).stdout(true).stderr(true);
            let mut process = pods.exec(&pod, words, &how).await?;
            let ended = process.take_status().context("it has no status")?;
            let (mut out, mut errors) = (process.stdout(), process.stderr());
            let (mut printed, mut said) = (Vec::new(), Vec::new());
            let read = async {
                match &mut out {
                    Some(out) => out.read_to_end(&mut printed).await.map(drop),
                    None => Ok(()),
                }
            };
            let complaints = async {
                match &mut errors {
                    Some(errors) => errors.read_to_end(&mut said).await.map(drop),
                    None => Ok(()),
                }
            };
            let (status, read, complaints) = tokio::join!(ended, read, complaints);
            read.and(complaints)?;
            let said = String::from_utf8_lossy(&said).trim().to_owned();
            let printed = String::from_utf8_lossy(&printed).into_owned();
            let status = status.with_context(|| format!("the connection ended before it did: {said}"))?;
            if status.status.as_deref() == Some("Success") {
                return Ok(printed);
            }
            let said = if said.is_empty() { printed.trim().to_owned() } else { said };
            bail!("{}: {said}", status.message.unwrap_or_default())
        };
        wait(&self.runtime, async move {
            let ended = tokio::time::timeout(COMMAND_LIMIT, run).await;
            ended.unwrap_or_else(|_| Err(anyhow!("not over after {COMMAND_LIMIT:?}"))).context(shown)
        })
    }
}

/// Does something on the runtime's own threads, and waits for it.
fn wait<T: Send + 'static>(
    runtime: &Runtime,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    // Not here: this thread is in the machine's network.
    runtime.block_on(runtime.spawn(work)).context("asking the API server")?
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kubectls_words_lead_to_paths() {
        for (words, wanted) in [
            (&["pod", "-n", "a", "x"][..], "/api/v1/namespaces/a/pods/x"),
            (&["pods", "--all-namespaces"], "/api/v1/pods"),
            (&["node/n"], "/api/v1/nodes/n"),
            (&["httproute", "x", "-n", "a"], "/apis/gateway.networking.k8s.io/v1/namespaces/a/httproutes/x"),
        ] {
            assert_eq!(path(words).unwrap(), wanted);
        }
        for unknown in [&["pod", "-l", "a=b"][..], &["crds"], &[], &["pod", "a", "b"]] {
            assert!(path(unknown).is_err(), "{unknown:?}");
        }
        let policy =
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "a"}});
        let wanted = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/a";
        assert_eq!(path_of(&policy).unwrap(), wanted);
        assert!(path_of(&json!({"apiVersion": "v2", "kind": "Pod", "metadata": {"name": "a"}})).is_err());
    }
}
