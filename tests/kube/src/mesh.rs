//! The product in the cluster: its images on the nodes, its chart installed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::cluster::Cluster;
use crate::image::{Build, Definition, Platform};
use crate::lab::{Lab, NODES};
use crate::process::{finish, output};
use crate::report::{Clock, say};

/// The namespace of the product.
pub const NAMESPACE: &str = "culvert-system";

/// How the chart is set on this cluster: one machine's two cores carry it all, nothing is pulled, and nobody waits long
/// for connections that a scenario holds until its end.
pub const SETTINGS: [&str; 6] = [
    "controlPlane.resources.requests.cpu=10m",
    "ztunnel.resources.requests.cpu=10m",
    "node.resources.requests.cpu=10m",
    "waypoint.resources.requests.cpu=10m",
    "image.pullPolicy=Never",
    "ztunnel.terminationGracePeriodSeconds=12",
];

/// Makes the product's images, and puts its command line beside Helm, of what cargo builds with `profile`, or of what it
/// has built already; returns the archives.
///
/// # Errors
/// A program does not compile.
pub fn build(lab: &Lab, profile: &str, prebuilt: bool) -> Result<Vec<PathBuf>> {
    let build = Build {
        workspace: lab.workspace.clone(),
        platform: Platform::here()?,
        profile: profile.to_owned(),
        prebuilt,
        // As the Makefile's call, which so is most of the work.
        beside: &["cli", "kube-tests"],
        sysroot: PathBuf::from("/"),
        out: lab.root.join("product-images"),
        reuse: true,
    };
    let definitions: BTreeMap<String, Definition> = Definition::all(&lab.workspace)?;
    let archives = build.run(&definitions)?;
    let built = Path::new("target").join(if profile == "dev" { "debug" } else { profile }).join("culvert");
    let (from, to) = (lab.workspace.join(built), lab.bin("culvert"));
    output("cp", &["--remove-destination", &from.display().to_string(), &to.display().to_string()])?;
    Ok(archives)
}

/// Installs or upgrades the release `culvert` by Helm and waits until all of it is ready. `settings` are `key=value`.
///
/// # Errors
/// Helm refuses, or something does not become ready: with what the pods say.
pub fn install(cluster: &Cluster, settings: &[&str]) -> Result<()> {
    let clock = Clock::start();
    release(cluster, "culvert", settings)?;
    let applied = clock.seconds();
    ready(cluster, Duration::from_secs(120))?;
    let rolled_out = clock.seconds();
    // That the API server can ask for admission, too.
    let words = ["verify-install", "--timeout", "60s"];
    finish(&mut cluster.kubectl.culvert(&words)).context("verifying the installation")?;
    say(&format!("   mesh: Helm {applied}, rolled out {rolled_out}, verified {}", clock.seconds()));
    Ok(())
}

/// Installs or upgrades a release of the chart.
///
/// # Errors
/// Helm refuses.
pub fn release(cluster: &Cluster, name: &str, settings: &[&str]) -> Result<()> {
    let chart = cluster.lab.workspace.join("deploy/charts/culvert").display().to_string();
    let mut arguments =
        vec!["upgrade", "--install", name, &chart, "--namespace", NAMESPACE, "--create-namespace"];
    for setting in SETTINGS.iter().chain(settings) {
        arguments.extend(["--set", setting]);
    }
    finish(&mut cluster.kubectl.helm(&arguments)).map(drop).context("installing the chart")
}

/// Waits until the control plane, and the node's two daemons on every node, are ready.
///
/// # Errors
/// They are not in time.
pub fn ready(cluster: &Cluster, limit: Duration) -> Result<()> {
    for what in ["deployment/culvertd", "daemonset/culvert-node", "daemonset/ztunnel"] {
        if let Err(error) = cluster.kubectl.rolled_out(NAMESPACE, what, limit) {
            let pods = cluster.kubectl.run(&["get", "pods", "-n", NAMESPACE, "-o", "wide"])?;
            let (_, name) = what.split_once('/').unwrap_or_default();
            let events = ["get", "events", "-n", NAMESPACE, "--sort-by=.lastTimestamp"];
            let events = cluster.kubectl.run(&events).unwrap_or_default();
            let last: Vec<&str> = events.lines().rev().take(5).collect();
            let logs = ["logs", "-n", NAMESPACE, "-l", &format!("app={name}"), "--tail=15", "--prefix"];
            let logs = cluster.kubectl.run(&logs).unwrap_or_else(|e| e.to_string());
            bail!("{error:#}\n{pods}\n{}\n{logs}", last.join("\n"));
        }
    }
    Ok(())
}

/// What the mesh's processes have used so far, a line for each: for the chart's requests.
#[must_use]
pub fn usage(lab: &Lab) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        let name = read("comm").trim().to_owned();
        // Those of others on this machine are not of a node.
        let of_node = NODES.iter().find(|node| read("cgroup").contains(&lab.cgroup(node)));
        let (Some(node), true) =
            (of_node, ["culvertd", "culvert-node", "ztunnel", "waypoint"].contains(&name.as_str()))
        else {
            continue;
        };
        let status = read("status");
        let memory = |key: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or_default()
        };
        // proc_pid_stat(5): fields 14 and 15, in hundredths of a second; the second field ends with a bracket.
        let stat = read("stat");
        let fields = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ')).into_iter().flatten();
        let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        lines.push(format!(
            "   {name} of {}: {} MiB of memory, {} at most; {}.{:02} s of CPU",
            node.name,
            memory("VmRSS:") >> 10,
            memory("VmHWM:") >> 10,
            ticks / 100,
            ticks % 100
        ));
    }
    lines.sort();
    lines
}

/// Removes a release.
///
/// # Errors
/// Helm can't.
pub fn remove(cluster: &Cluster, name: &str) -> Result<()> {
    let words = ["uninstall", name, "--namespace", NAMESPACE, "--wait", "--timeout", "90s"];
    finish(&mut cluster.kubectl.helm(&words)).map(drop)
}
