//! A scenario's namespace, and what a scenario does in it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Error, Result, bail};
use serde_json::{Value, json};

use super::apps::{App, Job, service};
use crate::capture::{self, Capture, Seen};
use crate::cluster::Cluster;
use crate::kubectl::Kubectl;
use crate::lab::Node;
use crate::mesh;
use crate::node;
use crate::process::finish;
use crate::report::{Clock, say, wait_for};

/// How long a pod may take to be what it should.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// What enrols.
pub const MODE: &str = "istio.io/dataplane-mode";
/// What says that a pod is enrolled.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// Where a scenario plays; its namespace is deleted when it is dropped.
pub struct Stage {
    /// The cluster.
    pub cluster: Cluster,
    /// The scenario's namespace.
    pub namespace: String,
    name: String,
    /// More namespaces, made by this stage.
    others: std::cell::RefCell<Vec<String>>,
    clock: Clock,
}

impl Stage {
    /// Makes the namespace `e2e-NAME`.
    ///
    /// # Errors
    /// It is there already, or can't be made.
    pub fn new(cluster: &Cluster, name: &str) -> Result<Self> {
        let this = Self {
            cluster: cluster.clone(),
            namespace: format!("e2e-{name}"),
            name: name.to_owned(),
            others: std::cell::RefCell::default(),
            clock: Clock::start(),
        };
        this.make_namespace(&this.namespace)?;
        Ok(this)
    }

    /// A stage in another namespace, for what is not of this one's mesh: `e2e-NAME-PART`.
    ///
    /// # Errors
    /// It can't be made.
    pub fn beside(&self, part: &str) -> Result<Self> {
        Self::new(&self.cluster, &format!("{}-{part}", self.name))
    }

    /// A further namespace, of a name that is given; it goes with the stage.
    ///
    /// # Errors
    /// It can't be made.
    pub fn also(&self, name: &str) -> Result<()> {
        self.make_namespace(name)
    }

    fn make_namespace(&self, name: &str) -> Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        wait_for(&format!("the namespace {name}"), PATIENCE, || {
            // One of the same name may still be going.
            let going =
                self.kubectl().get(&["namespace", name]).is_ok_and(|n| n["status"]["phase"] == "Terminating");
            if going {
                return Ok(Err("that of before is still going".to_owned()));
            }
            Ok(self.kubectl().put(&namespace).map_err(|e| e.to_string()))
        })?;
        self.others.borrow_mut().push(name.to_owned());
        wait_for("its ServiceAccount", PATIENCE, || {
            let account = self.kubectl().get(&["serviceaccount", "default", "-n", name]);
            Ok(account.map_err(|e| e.to_string()))
        })
        .map(drop)
    }

    /// kubectl.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.cluster.kubectl
    }

    /// Says what has been seen to be so.
    pub fn ok(&self, what: &str) {
        say(&format!("   {:>6.1} s  {}: {what}", self.clock.elapsed().as_secs_f64(), self.name));
    }

    /// Lets time pass.
    pub fn pass(&self, time: Duration) {
        thread::sleep(time);
    }

    /// Applies objects to the scenario's namespace.
    ///
    /// # Errors
    /// They are refused.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let mut list = Vec::new();
        for object in objects {
            let mut object = object.clone();
            if object["metadata"]["namespace"].is_null() {
                object["metadata"]["namespace"] = json!(self.namespace);
            }
            list.push(object);
        }
        self.kubectl().put(&json!({"apiVersion": "v1", "kind": "List", "items": list}))
    }

    /// Starts pods, with their ServiceAccounts, and waits until they are Ready.
    ///
    /// # Errors
    /// One is not in time.
    pub fn start(&self, apps: &[App]) -> Result<()> {
        self.accounts(apps)?;
        self.apply(&apps.iter().map(App::pod).collect::<Vec<_>>())?;
        apps.iter().try_for_each(|app| self.pod_ready(&app.name))
    }

    /// Makes the ServiceAccounts of pods.
    ///
    /// # Errors
    /// They are refused.
    pub fn accounts(&self, apps: &[App]) -> Result<()> {
        let mut names: Vec<&str> = apps.iter().map(App::account_name).filter(|a| *a != "default").collect();
        names.sort_unstable();
        names.dedup();
        if names.is_empty() {
            return Ok(());
        }
        let account =
            |name: &&str| json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
        self.apply(&names.iter().map(account).collect::<Vec<_>>())
    }

    /// Starts pods and a Service of the same name for each.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn serve(&self, apps: &[App]) -> Result<()> {
        self.apply(&apps.iter().map(|app| service(&app.name)).collect::<Vec<_>>())?;
        self.start(apps)
    }

    /// Waits until a pod is Ready.
    ///
    /// # Errors
    /// It is not in time: with what its events say.
    pub fn pod_ready(&self, pod: &str) -> Result<()> {
        let name = format!("pod/{pod}");
        self.kubectl().wait(&self.namespace, "Ready", &name, PATIENCE).map_err(|error| {
            let selector = format!("involvedObject.name={pod}");
            let events = ["get", "events", "-n", &self.namespace, "--field-selector", &selector];
            error.context(format!("{pod}: {}", self.kubectl().run(&events).unwrap_or_default().trim()))
        })
    }

    /// Deletes pods and waits until they are gone.
    ///
    /// # Errors
    /// They do not go.
    pub fn delete_pods(&self, pods: &[&str]) -> Result<()> {
        self.kubectl()
            .run(&[&["delete", "pod", "-n", &self.namespace, "--timeout=60s"], pods].concat())
            .map(drop)
    }

    /// A pod's address.
    ///
    /// # Errors
    /// It is not there.
    pub fn address(&self, pod: &str) -> Result<String> {
        let pod = self.kubectl().get(&["pod", "-n", &self.namespace, pod])?;
        let address = pod["status"]["podIP"].as_str();
        address.map(str::to_owned).with_context(|| format!("no address in {}", pod["status"]))
    }

    /// All addresses of the scenario's pods.
    ///
    /// # Errors
    /// The API server can't be asked.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let pods = self.kubectl().get(&["pods", "-n", &self.namespace])?;
        Ok(pods["items"].as_array().into_iter().flatten().flat_map(ips).collect())
    }

    /// A pod's IPv6 address.
    ///
    /// # Errors
    /// It has none.
    pub fn address6(&self, pod: &str) -> Result<String> {
        let found = ips(&self.kubectl().get(&["pod", "-n", &self.namespace, pod])?);
        let six = found.iter().find(|ip| ip.contains(':'));
        six.cloned().with_context(|| format!("{pod} has no IPv6 address: {found:?}"))
    }

    /// Runs a command in a pod.
    ///
    /// # Errors
    /// It fails.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl().exec(&self.namespace, pod, command)
    }

    /// What the client in a pod has seen.
    ///
    /// # Errors
    /// It does not say.
    pub fn jobs(&self, pod: &str) -> Result<Vec<Job>> {
        // Asked so often that a process in the container for each would take a tenth of the processors.
        let (lab, found) = (&self.cluster.lab, self.kubectl().get(&["pod", "-n", &self.namespace, pod])?);
        let text = |value: &Value| {
            value.as_str().map(str::to_owned).with_context(|| format!("{pod} is not placed yet"))
        };
        let (node, uid) = (text(&found["spec"]["nodeName"])?, text(&found["metadata"]["uid"])?);
        let mut ask = node::beside_pod(lab, Node::named(&node)?, &uid, &lab.bin("app"))?;
        let text = finish(ask.arg("stats"))?;
        serde_json::from_str(&text).with_context(|| format!("reading what {pod} has seen: {text}"))
    }

    /// Waits until every job of a client has something to show.
    ///
    /// # Errors
    /// One does not.
    pub fn talking(&self, pod: &str) -> Result<Vec<Job>> {
        wait_for(&format!("{pod} to talk"), PATIENCE, || {
            Ok(match self.jobs(pod) {
                Ok(jobs) if jobs.iter().all(|j| j.good > 0) => Ok(jobs),
                Ok(jobs) => Err(format!("{jobs:?}")),
                Err(error) => Err(format!("{error:#}")),
            })
        })
    }

    /// Waits until every job of a client gets through again: a name query that was lost is asked again after five seconds.
    ///
    /// # Errors
    /// One does not.
    pub fn gets_through(&self, pod: &str) -> Result<Vec<Job>> {
        let before = self.jobs(pod)?;
        wait_for(&format!("{pod} to get through"), PATIENCE, || {
            let jobs = self.jobs(pod)?;
            let all = jobs.iter().zip(&before).all(|(job, before)| job.good > before.good);
            Ok(if all { Ok(jobs) } else { Err(format!("{jobs:?}")) })
        })
    }

    /// Says what a client has seen, if nothing of it failed, since it was asked the first time (`before`).
    ///
    /// # Errors
    /// A connection was lost, a request failed, or nothing got through any more.
    pub fn undisturbed(&self, pod: &str, before: &[Job]) -> Result<Vec<Job>> {
        let jobs = self.jobs(pod)?;
        for (job, before) in jobs.iter().zip(before) {
            if job.failed > before.failed {
                let lost = job.failed - before.failed;
                bail!(
                    "{pod}: {} {}: {lost} lost or failed, the last: {}",
                    job.kind,
                    job.target,
                    job.last_error
                );
            }
            if job.good == before.good && !before.done {
                bail!("{pod}: {} {}: nothing got through", job.kind, job.target);
            }
            let more = job.good - before.good;
            let what = if job.kind == "download" { "bytes" } else { "answers" };
            self.ok(&format!(
                "{} {}: {more} {what} more, none lost, the longest wait {} ms",
                job.kind, job.target, job.longest_ms
            ));
        }
        Ok(jobs)
    }

    /// That a pod reaches a URL.
    ///
    /// # Errors
    /// It does not come to.
    pub fn reaches(&self, pod: &str, url: &str) -> Result<String> {
        wait_for(&format!("{pod} to reach {url}"), Duration::from_secs(20), || {
            Ok(self.exec(pod, &["app", "get", "-timeout", "3s", url]).map_err(|e| format!("{e:#}")))
        })
    }

    /// That a pod does not reach a URL, and that it stays so.
    ///
    /// # Errors
    /// It does.
    pub fn cannot_reach(&self, pod: &str, url: &str) -> Result<()> {
        wait_for(&format!("{pod} to be refused by {url}"), Duration::from_secs(20), || {
            Ok(match self.exec(pod, &["app", "get", "-timeout", "2s", url]) {
                Ok(answer) => Err(format!("it was answered: {answer}")),
                Err(_) => Ok(()),
            })
        })?;
        for _ in 0..3 {
            if let Ok(answer) = self.exec(pod, &["app", "get", "-timeout", "1s", url]) {
                bail!("{pod} was refused by {url}, and then it was answered: {answer}");
            }
        }
        Ok(())
    }

    /// Labels the namespace into the mesh.
    ///
    /// # Errors
    /// kubectl fails.
    pub fn label_in(&self) -> Result<()> {
        self.label("namespace", &self.namespace, &format!("{MODE}=ambient"))
    }

    /// Sets or removes (`KEY-`) a label.
    ///
    /// # Errors
    /// kubectl fails.
    pub fn label(&self, kind: &str, name: &str, label: &str) -> Result<()> {
        let mut words = vec!["label", "--overwrite", kind, name, label];
        if kind != "namespace" {
            words.extend(["-n", &self.namespace]);
        }
        self.kubectl().run(&words).map(drop)
    }

    /// Labels the namespace into the mesh and waits until every pod in it is enrolled.
    ///
    /// # Errors
    /// One is not in time.
    pub fn enrol(&self) -> Result<()> {
        self.label_in()?;
        self.enrolled(true)
    }

    /// Takes the namespace out of the mesh and waits until no pod in it is enrolled.
    ///
    /// # Errors
    /// One stays.
    pub fn un_enrol(&self) -> Result<()> {
        self.label("namespace", &self.namespace, &format!("{MODE}-"))?;
        self.enrolled(false)
    }

    /// Waits until all pods say that they are enrolled, or none does.
    ///
    /// # Errors
    /// With those that do not.
    pub fn enrolled(&self, wanted: bool) -> Result<()> {
        let clock = Clock::start();
        self.kubectl().until(&["pods", "-n", &self.namespace], PATIENCE, |pods| {
            let pods = pods["items"].as_array().cloned().unwrap_or_default();
            let running = pods.iter().filter(|p| p["status"]["phase"] == "Running");
            let wrong: Vec<&str> = running
                .filter(|p| (p["metadata"]["annotations"][REDIRECTION] == "enabled") != wanted)
                .filter_map(|p| p["metadata"]["name"].as_str())
                .collect();
            if wrong.is_empty() { Ok(()) } else { Err(format!("not so: {}", wrong.join(", "))) }
        })?;
        self.ok(&format!(
            "every pod is {} the mesh, {}",
            if wanted { "in" } else { "out of" },
            clock.seconds()
        ));
        Ok(())
    }

    /// Captures a node's link while `what` is done.
    ///
    /// # Errors
    /// Of `what`, or the capture missed something.
    pub fn watch<T>(&self, node: &Node, what: impl FnOnce() -> Result<T>) -> Result<(Seen, T)> {
        let capture = Capture::start(&self.cluster.lab, node, capture::marker(&self.namespace))?;
        let done = what()?;
        Ok((capture.finish()?, done))
    }

    /// As [`Self::watch`], and fails if a message of an application could be read on the link.
    ///
    /// # Errors
    /// As there, and with the flows that were in plaintext.
    pub fn nothing_in_plaintext<T>(&self, node: &Node, what: impl FnOnce() -> Result<T>) -> Result<T> {
        let (seen, done) = self.watch(node, what)?;
        if !seen.plaintext.is_empty() {
            let flows: Vec<String> = seen.plaintext.iter().take(5).map(ToString::to_string).collect();
            bail!("{} flows passed in plaintext: {}", seen.plaintext.len(), flows.join(", "));
        }
        let tunnel = seen.tunnel(&self.addresses()?);
        if tunnel == 0 {
            bail!("nothing passed in a tunnel: the watch has seen nothing ({} packets)", seen.packets);
        }
        self.ok(&format!("{tunnel} packets of tunnels between the nodes, no plaintext"));
        Ok(done)
    }

    /// Installs the mesh as the others expect it, after a scenario that had it otherwise. Of one that failed, what the agents and
    /// ztunnels said is kept first: they are replaced.
    ///
    /// # Errors
    /// The scenario's, or that of the installation.
    pub fn put_back(&self, outcome: Result<()>) -> Result<()> {
        if let Err(error) = &outcome {
            self.keep_evidence(error);
        }
        let back = mesh::install(&self.cluster, &[]);
        outcome.and(back)
    }

    /// Writes down what is known after a failure; returns the directory.
    pub fn keep_evidence(&self, error: &Error) -> PathBuf {
        let directory = self.cluster.lab.root.join("failed").join(&self.name);
        let _ = fs::create_dir_all(&directory);
        let keep = |file: &str, mut command: Command| {
            let text = finish(&mut command).unwrap_or_else(|e| format!("{e:#}"));
            let _ = fs::write(directory.join(file), text);
        };
        let _ = fs::write(directory.join("error"), format!("{error:#}\n"));
        let k = self.kubectl();
        keep("pods", k.command(&["get", "pods", "-A", "-o", "wide"]));
        keep("events", k.command(&["get", "events", "-A", "--sort-by=.lastTimestamp"]));
        keep("objects.yaml", k.command(&["get", "all,endpointslices", "-n", &self.namespace, "-o", "yaml"]));
        for namespace in self.others.borrow().iter().map(String::as_str).chain([mesh::NAMESPACE]) {
            let arguments = ["get", "pods", "-n", namespace, "-o", "jsonpath={.items[*].metadata.name}"];
            for pod in k.run(&arguments).unwrap_or_default().split_whitespace() {
                let log = ["logs", "-n", namespace, pod, "--all-containers", "--tail=5000"];
                keep(&format!("{pod}.log"), k.command(&log));
                let before = k.run(&[&log[..], &["--previous"]].concat());
                if let Ok(before) = before {
                    let _ = fs::write(directory.join(format!("{pod}.previous.log")), before);
                }
            }
        }
        directory
    }
}

/// A pod's addresses, of both families.
fn ips(pod: &Value) -> Vec<String> {
    let all = pod["status"]["podIPs"].as_array().into_iter().flatten();
    all.filter_map(|ip| ip["ip"].as_str().map(str::to_owned)).collect()
}

impl Drop for Stage {
    fn drop(&mut self) {
        for namespace in self.others.borrow().iter() {
            let path = format!("/api/v1/namespaces/{namespace}");
            let deleted = self.kubectl().api().and_then(|api| api.delete(&path));
            if let Err(error) = deleted {
                say(&format!("   the namespace {namespace} stays: {error:#}"));
            }
        }
    }
}
