//! A node's ztunnel, started in the node's network namespace.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::Instant;

use super::{Lab, NodeId, Process, Stop};
use crate::{admin, netns};

/// How to start one.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program.
    pub program: PathBuf,
    /// The manifests.
    pub config_dir: PathBuf,
    /// The CA's folder.
    pub ca_dir: PathBuf,
    /// Further arguments.
    pub more: Vec<String>,
    /// With a bpf file system and the cgroups, which `ip netns exec` hides, in mounts of its own.
    pub with_mounts: bool,
}

/// Mounts what capture by eBPF needs, and becomes the program that is named after it.
const MOUNT: &str =
    r#"mount -t bpf bpf /sys/fs/bpf && mount -t cgroup2 none /sys/fs/cgroup && exec "$0" "$@""#;

/// A running one.
#[derive(Debug)]
pub struct Ztunnel {
    node: NodeId,
    process: Process,
    namespace: PathBuf,
    log: PathBuf,
    stop: Stop,
    started: Instant,
    ready_after: Option<Duration>,
}

/// What a process has used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU seconds since its start, user's and kernel's.
    pub cpu: f64,
    /// Resident memory in kB.
    pub rss_kb: u64,
    /// The most that was ever resident, in kB.
    pub peak_kb: u64,
}

impl Ztunnel {
    pub(super) fn start(lab: &Lab, node: NodeId, options: &Options) -> Result<Self> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mount: &[&str] = if options.with_mounts { &["sh", "-c", MOUNT] } else { &[] };
        let mut argv: Vec<String> = mount.iter().map(|word| (*word).to_owned()).collect();
        argv.extend([
            text(&options.program),
            "--config-dir".to_owned(),
            text(&options.config_dir),
            "--node".to_owned(),
            node.name().to_owned(),
            "--ca-dir".to_owned(),
            text(&options.ca_dir),
        ]);
        // A tmpfs, as the lab's folder is: certificates outlive a restart.
        let keys = lab.dir().join(format!("keys-{}", node.name()));
        DirBuilder::new().mode(0o700).recursive(true).create(&keys)?;
        argv.extend(["--key-dir".to_owned(), text(&keys)]);
        argv.extend(["--state-dir".to_owned(), text(&lab.dir().join("state"))]);
        argv.extend(options.more.iter().cloned());
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let log = lab.dir().join(format!("ztunnel-{}.log", node.name()));
        let netns = lab.node_netns(node);
        let process = Process::start(&netns, &argv, &log)?;
        Ok(Self {
            node,
            process,
            namespace: netns::path_of(&netns),
            log,
            stop: lab.stop().clone(),
            started: Instant::now(),
            ready_after: None,
        })
    }

    /// Its node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// How long it took to become ready.
    pub fn ready_after(&self) -> Duration {
        self.ready_after.unwrap_or_default()
    }

    pub(super) fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let ready = admin::Address::Here { namespace: Some(self.namespace.clone()), at: admin::READINESS };
        let stop = self.stop.clone();
        let done = stop.wait_until(limit, || {
            if let Some(status) = self.process.ended() {
                bail!("ztunnel of {} ended at start ({status}):\n{}", self.node.name(), self.last_lines(12));
            }
            Ok(ready.get("/healthz/ready").is_ok())
        })?;
        if !done {
            bail!("ztunnel of {} is not ready after {limit:?}:\n{}", self.node.name(), self.last_lines(12));
        }
        self.ready_after = Some(self.started.elapsed());
        Ok(())
    }

    /// The end of its log.
    pub fn last_lines(&self, count: usize) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
    }

    /// Its admin address.
    pub fn admin(&self) -> admin::Address {
        admin::Address::Here { namespace: Some(self.namespace.clone()), at: admin::ADMIN }
    }

    /// Its metrics, as Prometheus reads them.
    pub fn metrics(&self) -> Result<String> {
        let at = admin::Address::Here { namespace: Some(self.namespace.clone()), at: admin::METRICS };
        Ok(String::from_utf8_lossy(&at.get("/metrics")?).into_owned())
    }

    /// What it has used so far.
    pub fn usage(&self) -> Result<Usage> {
        usage(self.pid())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// SIGTERM, and a wait for its end.
    pub fn terminate(&mut self) {
        self.process.terminate();
    }

    /// Lets it live on when this value goes.
    pub fn release(&mut self) {
        self.process.release();
    }
}

/// From `/proc/PID/stat` (fields 14 and 15, in ticks of 10 ms) and `/proc/PID/status`.
fn usage(pid: u32) -> Result<Usage> {
    let gone = || format!("process {pid} is gone");
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(gone)?;
    let (_, rest) = stat.rsplit_once(')').with_context(gone)?;
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<u64>().ok()).sum();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(gone)?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Ok(Usage {
        cpu: ticks as f64 / 100.0,
        rss_kb: field("VmRSS:").unwrap_or_default(),
        peak_kb: field("VmHWM:").unwrap_or_default(),
    })
}
