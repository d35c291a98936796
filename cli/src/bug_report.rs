//! `culvert bug-report`: what is known of an installation, as files. No Secret is read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use http::Method;
use serde_json::Value;

use crate::cluster::{Cluster, ClusterArgs, Objects, PodName};
use crate::files::Files;
use crate::table::{Output, print};
use crate::{admin, health, proxy_status};

/// Lines of each container's log.
const LINES: u32 = 20_000;

/// Collects what is known of an installation into a directory, for a report of what is wrong
#[derive(Args, Debug)]
pub struct BugReportArgs {
    /// The directory, which must not exist yet
    #[arg(long, value_name = "DIR", default_value = "culvert-bug-report")]
    out: PathBuf,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// What is asked of the API server: a file's name, and a path.
const LISTS: &[(&str, &str)] = &[
    ("nodes", "/api/v1/nodes"),
    ("namespaces", "/api/v1/namespaces"),
    ("services", "/api/v1/services"),
    ("networkpolicies", "/apis/networking.k8s.io/v1/networkpolicies"),
    ("webhooks", "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"),
    ("gatewayclasses", "/apis/gateway.networking.k8s.io/v1/gatewayclasses"),
    ("clustertrustbundles", "/apis/certificates.k8s.io/v1beta1/clustertrustbundles"),
];

/// The same of the mesh's own namespace.
const OWN_LISTS: &[(&str, &str)] = &[
    ("pods", "/api/v1/namespaces/{}/pods"),
    ("events", "/api/v1/namespaces/{}/events"),
    ("configmaps", "/api/v1/namespaces/{}/configmaps"),
    ("deployments", "/apis/apps/v1/namespaces/{}/deployments"),
    ("daemonsets", "/apis/apps/v1/namespaces/{}/daemonsets"),
    ("leases", "/apis/coordination.k8s.io/v1/namespaces/{}/leases"),
];

struct Report<'c> {
    cluster: &'c Cluster,
    directory: &'c Path,
    files: usize,
    missing: Vec<String>,
}

/// Runs the command.
pub fn run(args: &BugReportArgs) -> Result<ExitCode> {
    let cluster = Cluster::connect(&args.cluster)?;
    // A report of one state only, whole or not at all.
    fs::create_dir(&args.out).with_context(|| {
        format!("cannot make {}: --out names a directory that is not there yet", args.out.display())
    })?;
    let mut report = Report { cluster: &cluster, directory: &args.out, files: 0, missing: Vec::new() };
    report.json("version", cluster.get("/version"))?;
    report.json("status", health::look(&cluster).and_then(|checks| Ok(serde_json::to_value(checks)?)))?;
    for (name, path) in LISTS {
        report.json(name, cluster.list(path).map(Value::from))?;
    }
    match Objects::custom(&cluster) {
        Ok(kinds) => {
            for (name, path) in kinds {
                report.json(&name, cluster.list(&path).map(Value::from))?;
            }
        }
        Err(error) => report.missing.push(format!("the mesh's own kinds: {error:#}")),
    }
    for (name, path) in OWN_LISTS {
        let path = path.replace("{}", &cluster.system);
        report.json(&format!("{}/{name}", cluster.system), cluster.list(&path).map(Value::from))?;
    }
    report.json("analyze", analysis(&args.cluster))?;
    for app in ["culvertd", "culvert-node", "ztunnel"] {
        report.pods(app, cluster.pods(app))?;
    }
    report.pods("waypoint", cluster.waypoint_pods(None, None))?;
    let Report { files, missing, .. } = report;
    if !missing.is_empty() {
        fs::write(args.out.join("missing.txt"), missing.join("\n") + "\n")?;
    }
    let name = args.out.display();
    print(&format!(
        "wrote {files} files to {name}{}. They hold names, addresses and logs of your cluster, and no keys: look \
         through them before you share them (tar czf {name}.tar.gz {name})\n",
        if missing.is_empty() {
            String::new()
        } else {
            format!("; {} are missing, see missing.txt", missing.len())
        }
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// What `culvert analyze` would say.
fn analysis(cluster: &ClusterArgs) -> Result<Value> {
    let found = Files::of_cluster(cluster)?.compile()?.diagnostics;
    Ok(serde_json::to_value(found)?)
}

impl Report<'_> {
    fn write(&mut self, name: &str, content: Result<Vec<u8>>) -> Result<()> {
        match content {
            Ok(bytes) => {
                let path = self.directory.join(name);
                let parent = path.parent().unwrap_or(self.directory);
                let write = || fs::create_dir_all(parent).and_then(|()| fs::write(&path, bytes));
                write().with_context(|| format!("cannot write {}", path.display()))?;
                self.files += 1;
            }
            // What can't be had says something too, and keeps nothing else from being collected.
            Err(error) => self.missing.push(format!("{name}: {error:#}")),
        }
        Ok(())
    }

    fn json(&mut self, name: &str, content: Result<Value>) -> Result<()> {
        let text = content.and_then(|value| Ok(Output::Json.document(&value)?.unwrap_or_default()));
        self.write(&format!("{name}.json"), text.map(String::into_bytes))
    }

    fn pods(&mut self, app: &str, pods: Result<Vec<PodName>>) -> Result<()> {
        match pods {
            Ok(pods) => pods.iter().try_for_each(|pod| self.pod(app, pod)),
            Err(error) => {
                self.missing.push(format!("the pods of {app}: {error:#}"));
                Ok(())
            }
        }
    }

    /// A pod's logs, and what it says of itself.
    fn pod(&mut self, app: &str, pod: &PodName) -> Result<()> {
        let base = format!("{}/{}", pod.namespace, pod.name);
        for (name, previous) in [("log", false), ("previous.log", true)] {
            let log = self.cluster.log(pod, LINES, previous);
            if !previous || log.as_ref().is_ok_and(|log| !log.is_empty()) {
                self.write(&format!("{base}/{name}"), log.map(String::into_bytes))?;
            }
        }
        if !pod.ready {
            return Ok(());
        }
        let (control, node) = (proxy_status::MONITORING, admin::METRICS.port());
        let pages: &[(u16, &str)] = match app {
            "culvertd" => &[(control, "/debug/syncz"), (control, "/debug/ca"), (control, "/metrics")],
            "ztunnel" => &[
                (admin::ADMIN.port(), "/config_dump"),
                (admin::ADMIN.port(), "/connections"),
                (node, "/metrics"),
            ],
            "waypoint" => &[
                (admin::ADMIN.port(), "/config_dump"),
                (admin::ADMIN.port(), "/clusters"),
                (node, "/metrics"),
            ],
            _ => &[(admin::ADMIN.port(), "/pods"), (admin::ADMIN.port(), "/capture"), (node, "/metrics")],
        };
        for (port, path) in pages {
            let answer = self.cluster.ask_pod(pod, *port, Method::GET, path).and_then(|(status, bytes)| {
                anyhow::ensure!(status == http::StatusCode::OK, "{path} was answered with {status}");
                Ok(bytes.to_vec())
            });
            self.write(&format!("{base}/{}", path.trim_start_matches('/').replace('/', "-")), answer)?;
        }
        Ok(())
    }
}
