//! `culvert bench`: what the tunnel costs, beside the same path without the mesh, in one run on one machine.
//!
//! Every figure is the median of several repetitions in which direct and mesh take turns, so that a busy
//! neighbour meets both. CPU is that of both ztunnels together, from `/proc/PID/stat`.

mod memory;
mod picture;
mod results;
mod scenarios;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::lab::manifests::{DIRECT, ENROLLED, KERNEL, Manifests, OUTSIDE};
use crate::lab::{Interrupted, Lab, NodeId, PodPlan, ZtunnelOptions, missing_programs, stop_on_signals};
use crate::load::SINK_PORT;
use results::{Machine, Results};

/// Measures what the tunnel costs beside the direct path. Needs root; half an hour at the defaults.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Where tunnel.json, tunnel.md and tunnel.svg go [default: bench/results; nowhere with --only]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// How often each figure is measured; the median counts
    #[arg(long, default_value_t = 3, value_name = "N")]
    repetitions: usize,
    /// How long one measurement lasts
    #[arg(long, default_value_t = 4, value_name = "S")]
    seconds: u64,
    /// How long memory is left idle before it is read
    #[arg(long, default_value_t = 60, value_name = "S")]
    idle_seconds: u64,
    /// Only these scenarios; `closed` stands for all whose name goes on with a dash
    #[arg(long, value_delimiter = ',', value_name = "SCENARIO")]
    only: Vec<String>,
    /// What captures the pods' traffic: auto, nftables, iptables-nft, iptables-legacy or ebpf [default: what auto takes, and
    /// then ebpf, on paths of that name]
    #[arg(long, value_name = "BACKEND")]
    capture: Option<String>,
    /// The ztunnel to measure [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    ztunnel: Option<PathBuf>,
}

impl BenchArgs {
    fn wants(&self, scenario: &str) -> bool {
        let is =
            |s: &String| scenario == s || scenario.strip_prefix(s).is_some_and(|rest| rest.starts_with('-'));
        self.only.is_empty() || self.only.iter().any(is)
    }

    /// A part must not take the place of the whole.
    fn out(&self) -> Option<&Path> {
        let default = self.only.is_empty().then_some(Path::new("bench/results"));
        self.out.as_deref().or(default)
    }
}

/// A client and a server on each side, in the mesh and outside of it.
const PODS: &[PodPlan] = &[
    PodPlan { name: "client", namespace: ENROLLED, node: NodeId::One },
    PodPlan { name: "near", namespace: ENROLLED, node: NodeId::One },
    PodPlan { name: "far", namespace: ENROLLED, node: NodeId::Two },
    PodPlan { name: "dclient", namespace: DIRECT, node: NodeId::One },
    PodPlan { name: "dnear", namespace: DIRECT, node: NodeId::One },
    PodPlan { name: "kclient", namespace: KERNEL, node: NodeId::One },
    PodPlan { name: "knear", namespace: KERNEL, node: NodeId::One },
    PodPlan { name: "xclient", namespace: OUTSIDE, node: NodeId::One },
    PodPlan { name: "xnear", namespace: OUTSIDE, node: NodeId::One },
    PodPlan { name: "xfar", namespace: OUTSIDE, node: NodeId::Two },
];

/// The back-end that is measured beside the one that `auto` takes.
const EBPF: &str = "ebpf";

/// What is measured on.
struct Bench<'a> {
    args: &'a BenchArgs,
    lab: Lab,
    manifests: Manifests,
    options: ZtunnelOptions,
    results: Results,
    failures: Vec<String>,
}

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the benchmark makes network namespaces and so needs root: sudo make bench");
    }
    if !missing_programs(&["ip"]).is_empty() {
        bail!("missing: ip; on Debian: apt-get install iproute2");
    }
    if args.repetitions == 0 || args.seconds == 0 {
        bail!("--repetitions and --seconds start at 1");
    }
    let culvert = std::env::current_exe().context("cannot tell where this program is")?;
    let ztunnel = args.ztunnel.clone().unwrap_or_else(|| culvert.with_file_name("ztunnel"));
    if !ztunnel.is_file() {
        bail!("{} is missing: build it (`make bench` does), or name one with --ztunnel", ztunnel.display());
    }
    raise_descriptors()?;
    let stop = stop_on_signals()?;
    let mut lab = Lab::build("culvert-bench", PODS, &stop)?;
    let manifests = Manifests::write(&lab, &[])?;
    const SERVERS: [&str; 6] = ["near", "far", "dnear", "knear", "xnear", "xfar"];
    for name in SERVERS {
        let netns = lab.pod(name)?.netns.clone();
        lab.spawn(&netns, name, &[&culvert.to_string_lossy(), "lab-service", "load", "::"])?;
    }
    for name in SERVERS {
        lab.wait_listening(name, SINK_PORT)?;
    }
    let options = ZtunnelOptions {
        program: ztunnel,
        config_dir: manifests.dir().to_owned(),
        ca_dir: lab.dir().join("ca"),
        more: Vec::new(),
        with_mounts: false,
    };
    let results = Results::new(machine(args.repetitions)?);
    if let Some(load) = busy().filter(|load| *load > 0.5) {
        results.note(&format!(
            "this machine is busy (load {load}): wait until it is not, or take the figures as rough"
        ));
    }
    let mut bench = Bench { args, lab, manifests, options, results, failures: Vec::new() };
    bench.measure()?;
    if let Some(out) = args.out() {
        bench.results.write(out)?;
    }
    for left in bench.lab.clear() {
        bench.failures.push(format!("could not clear: {left}"));
    }
    if bench.failures.is_empty() { Ok(ExitCode::SUCCESS) } else { bail!("{}", bench.failures.join("\n")) }
}

impl Bench<'_> {
    fn measure(&mut self) -> Result<()> {
        let capture = self.args.capture.as_deref();
        self.capture_by(capture.unwrap_or("auto"));
        self.start_ztunnels()?;
        if self.args.wants("memory") {
            // First: nothing has been carried yet.
            self.attempt("memory", memory::idle)?;
        }
        let paths = if capture == Some(EBPF) { scenarios::ALL_BY_EBPF } else { scenarios::PATHS };
        scenarios::measure(self, paths)?;
        if self.args.wants("memory") {
            self.attempt("memory of a large mesh", memory::large_mesh)?;
        }
        if capture.is_none() && scenarios::any_is_wanted(self.args) {
            self.measure_ebpf()?;
        }
        Ok(())
    }

    /// What differs with capture by eBPF, where the kernel has it.
    fn measure_ebpf(&mut self) -> Result<()> {
        self.capture_by(EBPF);
        match self.start_ztunnels() {
            Err(error) if error.is::<Interrupted>() => Err(error),
            Err(error) => {
                self.results.note(&format!("not measured with capture by eBPF: {error:#}"));
                Ok(())
            }
            Ok(()) => scenarios::measure(self, scenarios::BY_EBPF),
        }
    }

    /// For ztunnels that are started from now on.
    fn capture_by(&mut self, backend: &str) {
        self.options.more = vec!["--capture".to_owned(), backend.to_owned()];
        self.options.with_mounts = backend == EBPF;
    }

    fn start_ztunnels(&mut self) -> Result<()> {
        for node in NodeId::ALL {
            self.lab.start_ztunnel(node, &self.options)?;
        }
        Ok(())
    }

    /// Does one part; one that fails is said at the end, and does not cost the others. Only a stop is an error.
    fn attempt(&mut self, name: &str, part: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.results.note(name);
        match part(self) {
            Err(e) if e.is::<Interrupted>() => Err(e),
            Err(e) => {
                self.results.note(&format!("  failed: {e:#}"));
                self.failures.push(format!("{name}: {e:#}"));
                // What it did to the ztunnels is not to be the next one's.
                self.start_ztunnels()
            }
            Ok(()) => Ok(()),
        }
    }

    fn seconds(&self) -> Duration {
        Duration::from_secs(self.args.seconds)
    }
}

/// A thousand idle connections need two descriptors each, here and in the programs that are started.
fn raise_descriptors() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")
}

fn machine(repetitions: usize) -> Result<Machine> {
    let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    let cpuinfo = read("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map(|m| m.1);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let meminfo = read("/proc/meminfo")?;
    let kb: u64 = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap_or_default();
    let model = model.unwrap_or("unknown processor");
    // What TCP costs depends on it: with BBR each segment waits for a timer.
    let congestion = read("/proc/sys/net/ipv4/tcp_congestion_control")?;
    Ok(Machine {
        machine: format!("{cores} cores, {model}, {} GiB, TCP {}", kb >> 20, congestion.trim()),
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        commit: commit(),
        repetitions,
    })
}

/// The load of this machine over the last minute.
fn busy() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    if changed { format!("{commit} and uncommitted changes") } else { commit }
}
