//! What the scenarios ask of the API server, in kubectl's words: what is asked often without its process, which takes a tenth of a
//! second of the processor and more.

use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::api::{self, Api};
use crate::lab::Lab;
use crate::process::{WITH_FEW_COLLECTIONS, feed, finish, in_netns};
use crate::report::wait_for;

/// How long what is deleted may take to go.
const GONE_LIMIT: Duration = Duration::from_secs(60);

/// A change that needs no kubectl.
#[derive(Debug, PartialEq)]
enum Change {
    Merge(String, Value),
    /// Whether their end is waited for.
    Delete(Vec<String>, bool),
}

impl Change {
    /// That of a command line; `None` where it is another's, or has something that is not known here.
    fn read(words: &[&str]) -> Option<Self> {
        let (verb, rest) = words.split_first()?;
        match *verb {
            "label" => Self::of_metadata("labels", rest),
            "annotate" => Self::of_metadata("annotations", rest),
            "delete" => Self::of_end(rest),
            "rollout" if rest.first() == Some(&"restart") => {
                let now = format!("{:?}", std::time::SystemTime::now());
                let annotation = json!({"kubectl.kubernetes.io/restartedAt": now});
                let change = json!({"spec": {"template": {"metadata": {"annotations": annotation}}}});
                Some(Self::Merge(named(rest.get(1..)?)?, change))
            }
            _ => None,
        }
    }

    fn of_metadata(what: &str, words: &[&str]) -> Option<Self> {
        let words: Vec<&str> = words.iter().copied().filter(|word| *word != "--overwrite").collect();
        let is_value = |word: &&str| !word.starts_with('-') && (word.contains('=') || word.ends_with('-'));
        let (values, target): (Vec<&str>, Vec<&str>) = words.into_iter().partition(is_value);
        let mut map = serde_json::Map::new();
        for value in values {
            match value.split_once('=') {
                Some((key, value)) => map.insert(key.to_owned(), value.into()),
                None => map.insert(value.strip_suffix('-')?.to_owned(), Value::Null),
            };
        }
        Some(Self::Merge(named(&target)?, json!({"metadata": {what: map}})))
    }

    fn of_end(words: &[&str]) -> Option<Self> {
        let waits = !words.contains(&"--wait=false");
        let is_of_waiting = |word: &&str| *word == "--wait=false" || word.starts_with("--timeout=");
        let mut rest = words.iter().copied().filter(|word| !is_of_waiting(word));
        let (mut place, mut plain) = (Vec::new(), Vec::new());
        while let Some(word) = rest.next() {
            if word == "-n" {
                place.extend([word, rest.next()?]);
            } else {
                plain.push(word);
            }
        }
        let (kind, names) = plain.split_first()?;
        let paths = names.iter().map(|name| named(&[&[*kind, *name], &place[..]].concat()));
        let paths: Vec<String> = paths.collect::<Option<_>>()?;
        (!paths.is_empty()).then_some(Self::Delete(paths, waits))
    }
}

/// The path of one object.
fn named(words: &[&str]) -> Option<String> {
    let namespace = words.iter().position(|word| *word == "-n");
    let is_plain = |at: usize| namespace.is_none_or(|n| at != n && at != n + 1);
    let plain = words.iter().enumerate().filter(|(at, _)| is_plain(*at)).map(|(_, word)| word);
    let parts: usize = plain.map(|word| word.split('/').count()).sum();
    api::path(words).ok().filter(|_| parts == 2)
}

/// Whether a Deployment, a DaemonSet or a StatefulSet is rolled out, as kubectl judges it.
fn rollout(object: &Value) -> Result<(), String> {
    let status = &object["status"];
    let count = |key: &str| status[key].as_u64().unwrap_or_default();
    if count("observedGeneration") < object["metadata"]["generation"].as_u64().unwrap_or_default() {
        return Err("the change has not been seen".to_owned());
    }
    let wanted = object["spec"]["replicas"].as_u64().unwrap_or(1);
    let is_done = match object["kind"].as_str() {
        Some("Deployment") => {
            count("updatedReplicas") >= wanted
                && count("replicas") <= count("updatedReplicas")
                && count("availableReplicas") >= count("updatedReplicas")
        }
        Some("DaemonSet") => {
            let wanted = count("desiredNumberScheduled");
            count("updatedNumberScheduled") >= wanted && count("numberAvailable") >= wanted
        }
        _ => count("readyReplicas") >= wanted && status["currentRevision"] == status["updateRevision"],
    };
    if is_done { Ok(()) } else { Err(status.to_string()) }
}

/// kubectl as the cluster's administrator; and without it what is asked often.
#[derive(Clone, Debug)]
pub struct Kubectl {
    lab: Lab,
    /// Once the first has asked.
    api: Arc<Mutex<Option<Api>>>,
}

impl Kubectl {
    /// For the cluster of `lab`.
    #[must_use]
    pub fn new(lab: &Lab) -> Self {
        Self { lab: lab.clone(), api: Arc::default() }
    }

    /// The API server.
    ///
    /// # Errors
    /// It is not up.
    pub fn api(&self) -> Result<Api> {
        let mut api = self.api.lock().unwrap_or_else(PoisonError::into_inner);
        match &*api {
            Some(api) => Ok(api.clone()),
            None => Ok(api.insert(Api::connect(&self.lab)?).clone()),
        }
    }

    /// The command, for those who want to do more with it.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.program("kubectl", arguments)
    }

    /// Helm, as the same user.
    #[must_use]
    pub fn helm(&self, arguments: &[&str]) -> Command {
        self.with_helm(self.program("helm", arguments))
    }

    /// The product's command line, as the same user; [`crate::mesh::build`] puts it beside Helm.
    #[must_use]
    pub fn culvert(&self, arguments: &[&str]) -> Command {
        let mut command = self.with_helm(self.program("culvert", arguments));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.lab.root.join("bin").display()));
        command
    }

    fn with_helm(&self, mut command: Command) -> Command {
        for (variable, directory) in
            [("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")]
        {
            command.env(variable, self.lab.run("helm").join(directory));
        }
        command
    }

    fn program(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = in_netns(&self.lab.control_plane_netns(), self.lab.bin(name));
        command
            .env("KUBECONFIG", self.lab.pki("admin.kubeconfig"))
            .args(arguments)
            .envs(WITH_FEW_COLLECTIONS);
        command
    }

    /// What kubectl prints; nothing where it is done without it: labels and annotations, and deleting and restarting by name.
    ///
    /// # Errors
    /// It fails: with what it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        match Change::read(arguments) {
            Some(change) => self.make(&change).map(|()| String::new()),
            None => finish(&mut self.command(arguments)),
        }
    }

    fn make(&self, change: &Change) -> Result<()> {
        let api = self.api()?;
        match change {
            Change::Merge(path, change) => api.merge(path, change),
            Change::Delete(paths, waits) => {
                let mut going = Vec::new();
                for path in paths {
                    let found = api.find(path)?.with_context(|| format!("there is no {path}"))?;
                    going.push((path, found["metadata"]["uid"].clone()));
                    api.delete(path)?;
                }
                going.iter().filter(|_| *waits).try_for_each(|(path, uid)| {
                    wait_for(&format!("the end of {path}"), GONE_LIMIT, || {
                        Ok(match api.find(path) {
                            Ok(Some(found)) if found["metadata"]["uid"] == *uid => {
                                Err("it is there".to_owned())
                            }
                            Ok(_) => Ok(()),
                            Err(error) => Err(format!("{error:#}")),
                        })
                    })
                })
            }
        }
    }

    /// Applies objects, as YAML or JSON.
    ///
    /// # Errors
    /// They are refused.
    pub fn apply(&self, objects: &str) -> Result<()> {
        feed(&mut self.command(&["apply", "-f", "-"]), objects).map(drop)
    }

    /// Applies an object on the server, which is how big ones (CRDs) must be.
    ///
    /// # Errors
    /// They are refused.
    pub fn apply_server_side(&self, path: &str) -> Result<()> {
        self.run(&["apply", "--server-side", "--force-conflicts", "-f", path]).map(drop)
    }

    /// Applies objects of kinds that are known here.
    ///
    /// # Errors
    /// They are refused.
    pub fn put(&self, objects: &Value) -> Result<()> {
        self.api()?.apply(objects)
    }

    /// An object, or a list of them.
    ///
    /// # Errors
    /// It is not there.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        if let Ok(path) = api::path(arguments) {
            return self.api()?.find(&path)?.with_context(|| format!("there is no {}", arguments.join(" ")));
        }
        let text = self.run(&[&["get", "-o", "json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {}", arguments.join(" ")))
    }

    /// Waits until what `look` sees in the object is as it should be; it says why not.
    ///
    /// # Errors
    /// It does not come to be so.
    pub fn until(
        &self,
        arguments: &[&str],
        limit: Duration,
        look: impl Fn(&Value) -> Result<(), String>,
    ) -> Result<()> {
        wait_for(&arguments.join(" "), limit, || {
            Ok(self.get(arguments).map_err(|e| format!("{e:#}")).and_then(|object| look(&object)))
        })
    }

    /// Runs a command in a pod.
    ///
    /// # Errors
    /// It fails.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Result<String> {
        Ok(self.api()?.exec(namespace, pod, command)?.trim().to_owned())
    }

    /// Waits for a Deployment, a DaemonSet or a StatefulSet.
    ///
    /// # Errors
    /// It is not rolled out in time.
    pub fn rolled_out(&self, namespace: &str, what: &str, limit: Duration) -> Result<()> {
        self.until(&[what, "-n", namespace], limit, rollout)
    }

    /// Waits for a condition of an object.
    ///
    /// # Errors
    /// It does not come in time.
    pub fn wait(&self, namespace: &str, condition: &str, what: &str, limit: Duration) -> Result<()> {
        self.until(&[what, "-n", namespace], limit, |object| {
            let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            match conditions.iter().find(|c| c["type"] == condition) {
                Some(found) if found["status"] == "True" => Ok(()),
                Some(found) => Err(found.to_string()),
                None => Err(format!("it has no condition {condition}: {}", object["status"])),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_changed_often_needs_no_kubectl() {
        let merged = |words: &[&str]| match Change::read(words) {
            Some(Change::Merge(path, change)) => (path, change),
            other => panic!("{words:?}: {other:?}"),
        };
        assert_eq!(
            merged(&["label", "--overwrite", "pod", "a", "x.y/z=1", "b-", "-n", "shop"]),
            (
                "/api/v1/namespaces/shop/pods/a".into(),
                json!({"metadata": {"labels": {"x.y/z": "1", "b": null}}})
            )
        );
        let (path, change) = merged(&["annotate", "--overwrite", "-n", "m", "secret/s", "k=v=w"]);
        assert_eq!(path, "/api/v1/namespaces/m/secrets/s");
        assert_eq!(change, json!({"metadata": {"annotations": {"k": "v=w"}}}));
        let (path, change) = merged(&["rollout", "restart", "-n", "m", "daemonset/d"]);
        assert_eq!(path, "/apis/apps/v1/namespaces/m/daemonsets/d");
        assert!(change["spec"]["template"]["metadata"]["annotations"].is_object());
        assert_eq!(
            Change::read(&["delete", "pod", "-n", "shop", "--timeout=60s", "a", "b"]),
            Some(Change::Delete(
                vec!["/api/v1/namespaces/shop/pods/a".into(), "/api/v1/namespaces/shop/pods/b".into()],
                true
            ))
        );
        for others in [
            &["get", "pods"][..],
            &["label", "pods", "--all", "a=b"],
            &["label", "pods", "-n", "a", "a=b"],
            &["delete", "-f", "file"],
            &["delete", "pods", "-n", "a"],
            &["delete", "crds", "a"],
            &["rollout", "undo", "deployment/a"],
        ] {
            assert_eq!(Change::read(others), None, "{others:?}");
        }
    }

    #[test]
    fn a_rollout_is_over_when_all_is_new_and_there() {
        let of = |kind: &str, status: Value| {
            rollout(
                &json!({"kind": kind, "metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": status}),
            )
        };
        let done =
            json!({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2});
        assert!(of("Deployment", done.clone()).is_ok());
        for (key, value) in
            [("observedGeneration", 1), ("replicas", 3), ("updatedReplicas", 1), ("availableReplicas", 1)]
        {
            let mut not = done.clone();
            not[key] = value.into();
            assert!(of("Deployment", not).is_err(), "{key}");
        }
        let done = json!({"observedGeneration": 2, "desiredNumberScheduled": 2, "updatedNumberScheduled": 2,
                          "numberAvailable": 2});
        assert!(of("DaemonSet", done.clone()).is_ok());
        for key in ["updatedNumberScheduled", "numberAvailable"] {
            let mut not = done.clone();
            not[key] = 1.into();
            assert!(of("DaemonSet", not).is_err(), "{key}");
        }
        let done = json!({"observedGeneration": 2, "readyReplicas": 2, "currentRevision": "b", "updateRevision": "b"});
        assert!(of("StatefulSet", done.clone()).is_ok());
        let mut not = done;
        not["currentRevision"] = "a".into();
        assert!(of("StatefulSet", not).is_err());
    }
}
