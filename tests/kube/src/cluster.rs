//! The whole cluster: up, down, and what is on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Uid;

use crate::kubectl::Kubectl;
use crate::lab::{DNS_IP, Lab, NODES, Node};
use crate::process::{Recorded, remove_tree};
use crate::report::{Clock, say, wait_for};
use crate::{control_plane, lab_images, node, owner, pki, tools};

/// A running cluster.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Where it keeps things.
    pub lab: Lab,
    /// Its administrator's kubectl.
    pub kubectl: Kubectl,
}

impl Cluster {
    /// One that is running.
    ///
    /// # Errors
    /// None is.
    pub fn running(lab: &Lab) -> Result<Self> {
        if Recorded::named(lab, "apiserver").pid().is_none() {
            bail!("no cluster is running; start one: cargo run -p kube-tests -- cluster up");
        }
        Ok(Self { lab: lab.clone(), kubectl: Kubectl::new(lab) })
    }

    /// Builds what is missing and starts a cluster: two Ready nodes and DNS.
    ///
    /// # Errors
    /// One is running already, or something does not come up.
    pub fn up(lab: &Lab) -> Result<Self> {
        if !Uid::effective().is_root() {
            bail!("a cluster needs root, for namespaces and cgroups");
        }
        if let Some(process) = Recorded::all(lab).iter().find(|p| p.pid().is_some()) {
            bail!(
                "a cluster is up already ({} runs); end it: cargo run -p kube-tests -- cluster down",
                process.name()
            );
        }
        // What one that was killed left behind.
        down(lab)?;
        tools::build(lab)?;
        lab_images::build(lab)?;
        // Another one may have come meanwhile.
        owner::claim(Path::new(owner::NOTE), lab)?;
        Self::bring_up(lab).inspect_err(|_| {
            // What is half up is of no use; the logs stay.
            if let Err(error) = down(lab) {
                say(&format!("   and it can't be taken down: {error:#}"));
            }
        })
    }

    /// Starts another cluster, of this number, beside the first, which has built what it is made of.
    ///
    /// # Errors
    /// As for [`Cluster::up`].
    pub fn up_beside(&self, number: u8) -> Result<Self> {
        let lab = self.lab.nth(number);
        Self::bring_up(&lab).inspect_err(|_| {
            if let Err(error) = end(&lab) {
                say(&format!("   and it can't be taken down: {error:#}"));
            }
        })
    }

    fn bring_up(lab: &Lab) -> Result<Self> {
        let clock = Clock::start();
        remove_tree(&lab.log(""))?;
        pki::make(lab)?;
        control_plane::start(lab)?;
        let control_plane = clock.seconds();
        for node in &NODES {
            node::start(lab, node)?;
        }
        let cluster = Self::running(lab)?;
        for node in &NODES {
            cluster.ready(node)?;
        }
        let nodes = clock.seconds();
        cluster.dns()?;
        say(&format!(
            "   cluster: control plane {control_plane}, nodes Ready {nodes}, DNS {}",
            clock.seconds()
        ));
        Ok(cluster)
    }

    /// Waits until a node is Ready.
    ///
    /// # Errors
    /// It is off, or does not become Ready.
    pub fn ready(&self, node: &Node) -> Result<()> {
        wait_for(&format!("{} to be Ready", node.name), Duration::from_secs(90), || {
            if Recorded::named(&self.lab, node.name).pid().is_none() {
                let log = self.lab.log(&format!("{}.log", node.name));
                bail!("{} has ended: see {}", node.name, log.display());
            }
            // After a reboot, the API server still has the condition of before.
            let healthy = ["curl", "--silent", "--fail", "http://127.0.0.1:10248/healthz"];
            if let Err(error) = node::run(&self.lab, node, &healthy) {
                return Ok(Err(format!("its kubelet: {error:#}")));
            }
            Ok(self.kubectl.get(&["node", node.name]).map_err(|e| format!("{e:#}")).and_then(|found| {
                let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
                match conditions.iter().find(|c| c["type"] == "Ready") {
                    Some(ready) if ready["status"] == "True" => Ok(()),
                    other => Err(format!("its condition Ready is {other:?}")),
                }
            }))
        })
    }

    fn dns(&self) -> Result<()> {
        self.kubectl.apply(&include_str!("../manifests/dns.yaml").replace("@DNS_IP@", DNS_IP))?;
        self.kubectl.rolled_out("kube-system", "deployment/coredns", Duration::from_secs(90))?;
        wait_for("the ServiceAccount of the default namespace", Duration::from_secs(30), || {
            Ok(self.kubectl.get(&["serviceaccount", "default"]).map_err(|e| format!("{e:#}")))
        })
        .map(drop)
    }

    /// Imports images on both nodes at once.
    ///
    /// # Errors
    /// containerd refuses one.
    pub fn import(&self, archives: &[PathBuf]) -> Result<()> {
        thread::scope(|scope| {
            let nodes: Vec<_> = NODES
                .iter()
                .map(|node| {
                    scope.spawn(|| archives.iter().try_for_each(|a| node::import(&self.lab, node, a)))
                })
                .collect();
            nodes.into_iter().try_for_each(|n| n.join().unwrap_or_else(|_| bail!("importing panicked")))
        })
    }
}

/// Ends what is recorded of the first cluster and of others, and removes what they left; the logs stay in
/// `target/kube/log`.
///
/// # Errors
/// Something does not end or can't be removed, or what is there is another checkout's.
pub fn down(lab: &Lab) -> Result<()> {
    owner::check(Path::new(owner::NOTE), lab)?;
    // The directories that all are mounted on are the first one's, which is the last to go.
    lab.all().rev().try_for_each(|lab| end(&lab))?;
    owner::release(Path::new(owner::NOTE), lab)
}

fn end(lab: &Lab) -> Result<()> {
    for node in &NODES {
        Recorded::named(lab, node.name).end()?;
    }
    // An API server without etcd would wait for it.
    for name in control_plane::PROCESSES {
        Recorded::named(lab, name).end()?;
    }
    for process in Recorded::all(lab) {
        process.end()?;
    }
    for node in &NODES {
        node::disconnect(lab, node)?;
    }
    node::delete_netns(&lab.control_plane_netns())?;
    node::sweep(lab)?;
    let trees = [lab.run(""), lab.pki("")];
    trees.iter().try_for_each(|tree| remove_tree(tree))
}

/// What all of it has used of the machine's processors so far: to tell what a run needs from what it waits for.
#[must_use]
pub fn processor_time(clusters: &[Cluster]) -> Option<String> {
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let (mut nodes, mut control_planes) = (Duration::ZERO, Duration::ZERO);
    for cluster in clusters {
        for node in &NODES {
            // cgroup v1 in nanoseconds, v2 in microseconds (Documentation/admin-guide/cgroup-v2.rst).
            let name = cluster.lab.cgroup(node);
            let v1 = number(&Path::new("/sys/fs/cgroup/cpuacct").join(&name).join("cpuacct.usage"));
            let v2 = || {
                let text =
                    fs::read_to_string(Path::new("/sys/fs/cgroup").join(&name).join("cpu.stat")).ok()?;
                text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse::<u64>().ok())
            };
            nodes += v1.map(Duration::from_nanos).or_else(|| v2().map(Duration::from_micros))?;
        }
        let pids = Recorded::all(&cluster.lab).iter().filter_map(Recorded::pid).collect::<Vec<_>>();
        control_planes +=
            pids.iter().filter_map(|pid| crate::process::processor_time(*pid)).sum::<Duration>();
    }
    let of = |who| getrusage(who).ok().map(|usage| usage.user_time() + usage.system_time());
    let own = of(UsageWho::RUSAGE_SELF)? + of(UsageWho::RUSAGE_CHILDREN)?;
    Some(format!(
        "seconds of processor time: nodes {}, control planes {}, this program with its commands {}",
        nodes.as_secs(),
        control_planes.as_secs(),
        own.tv_sec()
    ))
}

/// What runs, one line each.
#[must_use]
pub fn status(lab: &Lab) -> Vec<String> {
    let mut lines: Vec<String> = Recorded::all(lab)
        .iter()
        .map(|process| match process.pid() {
            Some(pid) => format!("{}: process {pid}", process.name()),
            None => format!("{}: gone", process.name()),
        })
        .collect();
    let bytes: u64 = fs::read_dir(lab.images())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.metadata().ok())
        .map(|m| m.len())
        .sum();
    lines.push(format!("images: {} MiB in {}", bytes >> 20, lab.images().display()));
    lines
}
