//! What the scenarios ask of the API server, through kubectl.

use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::api::{self, Api};
use crate::lab::Lab;
use crate::process::{feed, finish, in_netns};
use crate::report::wait_for;

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
        command.env("KUBECONFIG", self.lab.pki("admin.kubeconfig")).args(arguments);
        command
    }

    /// What kubectl prints.
    ///
    /// # Errors
    /// It fails: with what it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        finish(&mut self.command(arguments))
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
        let limit = format!("--timeout={}s", limit.as_secs());
        self.run(&["rollout", "status", "-n", namespace, what, &limit]).map(drop)
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
