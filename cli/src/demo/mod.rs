//! `culvert demo`: two nodes with real programs on this machine, and seven things that the mesh does, each with
//! what was run and what came back.
//!
//! Every step ends in claims that are checked; one that does not hold makes the exit code 1. Whatever happens
//! (an error, Ctrl-C, a panic), the lab is cleared.

mod programs;
mod report;
mod steps;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::lab::manifests::Manifests;
use crate::lab::{
    self, Interrupted, Lab, NodeId, Ran, Stop, ZtunnelOptions, missing_programs, stop_on_signals,
};
use crate::load::{Plan, Shape, Talk};
use report::{Form, Report};

/// Shows the mesh at work on this machine: two nodes, real programs, seven steps. Needs root.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// One JSON document instead of text
    #[arg(long)]
    json: bool,
    /// Leave it up at the end, to play with
    #[arg(long)]
    keep: bool,
    /// Clear what `--keep` or a killed run left, and do nothing else
    #[arg(long, conflicts_with_all = ["json", "keep"])]
    clean: bool,
    /// The prefix of all that is made; two demos with different names don't meet
    #[arg(long, default_value = "culvert-demo")]
    name: String,
    /// The ztunnel to run [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    ztunnel: Option<PathBuf>,
    /// The waypoint to run [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    waypoint: Option<PathBuf>,
    /// Run only these steps (their number; earlier ones may be needed for later ones)
    #[arg(long, value_delimiter = ',', hide = true)]
    only: Vec<usize>,
}

/// What the steps work on.
struct Demo {
    lab: Lab,
    report: Report,
    manifests: Manifests,
    options: ZtunnelOptions,
    waypoint: PathBuf,
    culvert: String,
}

/// A step: its title and what it does.
type Step = (&'static str, fn(&mut Demo) -> Result<()>);

const STEPS: [Step; 7] = [
    ("A request across nodes: identity at the other end, nothing to read on the link", steps::request::run),
    ("A client outside the mesh: let in, then refused under STRICT", steps::strict::run),
    ("One service account is let in, another refused, and the mesh says why", steps::policy::run),
    ("A waypoint: HTTP routed by a header, a method refused, and no way around it", steps::waypoint::run),
    ("The root of trust exchanged under load", steps::rotation::run),
    ("ztunnel killed under load: refused, never in plaintext", steps::killed::run),
    ("What it shows and what it costs", steps::cost::run),
];

/// Runs the command.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    if args.clean {
        return clean(&args.name);
    }
    check_machine()?;
    let culvert = std::env::current_exe().context("cannot tell where this program is")?;
    let program = |given: &Option<PathBuf>, name: &str| -> Result<PathBuf> {
        let path = given.clone().unwrap_or_else(|| culvert.with_file_name(name));
        if !path.is_file() {
            bail!("{} is missing: build it (`make demo` does), or name one with --{name}", path.display());
        }
        Ok(path)
    };
    let programs = [program(&args.ztunnel, "ztunnel")?, program(&args.waypoint, "waypoint")?];
    let stop = stop_on_signals()?;
    let form = if args.json { Form::Json } else { Form::Text };
    let report = Report::new(form, STEPS.len() as u64 + 1);
    report.doing("two nodes, their pods and programs");
    let result = Demo::build(args, &stop, report, culvert.to_string_lossy().into_owned(), programs);
    let mut demo = match result {
        Ok(demo) => demo,
        Err(e) if e.is::<Interrupted>() => return Ok(ExitCode::from(130)),
        Err(e) => return Err(e),
    };
    let complete = demo.play(&args.only);
    if args.keep && !stop.is_set() {
        demo.lab.keep()?;
        demo.say_how_to_play();
    } else {
        demo.report.doing("clearing up");
        for left in demo.lab.clear() {
            demo.report.claim(false, format!("cleared: {left}"));
        }
    }
    let ok = demo.report.finish(complete);
    Ok(match (ok, stop.is_set()) {
        (_, true) => ExitCode::from(130),
        (true, _) => ExitCode::SUCCESS,
        (false, _) => ExitCode::FAILURE,
    })
}

fn clean(name: &str) -> Result<ExitCode> {
    if !lab::state::exists(name) {
        return Ok(ExitCode::SUCCESS);
    }
    let left = lab::state::clear(name);
    if left.is_empty() { Ok(ExitCode::SUCCESS) } else { bail!("could not clear: {}", left.join("; ")) }
}

/// Says what is missing before anything is made.
fn check_machine() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the demo makes network namespaces and so needs root: sudo make demo");
    }
    let names: Vec<&str> = programs::NEEDED.iter().map(|(program, _)| *program).collect();
    let missing = missing_programs(&names);
    if !missing.is_empty() {
        let packages: Vec<&str> = programs::NEEDED
            .iter()
            .filter(|(p, _)| missing.contains(p))
            .map(|(_, package)| *package)
            .collect();
        bail!("missing: {}; on Debian: apt-get install {}", missing.join(", "), packages.join(" "));
    }
    Ok(())
}

impl Demo {
    fn build(
        args: &DemoArgs,
        stop: &Stop,
        report: Report,
        culvert: String,
        [ztunnel, waypoint]: [PathBuf; 2],
    ) -> Result<Self> {
        let mut lab = Lab::build(&args.name, programs::PODS, stop)?;
        let manifests = Manifests::write(&lab, programs::SERVICES)?;
        programs::start(&mut lab, &culvert)?;
        let options = ZtunnelOptions {
            program: ztunnel,
            config_dir: manifests.dir().to_owned(),
            ca_dir: lab.dir().join("ca"),
            more: Vec::new(),
            with_mounts: false,
        };
        let mut demo = Self { lab, report, manifests, options, waypoint, culvert };
        demo.start_ztunnels()?;
        demo.introduce()?;
        Ok(demo)
    }

    fn start_ztunnels(&mut self) -> Result<()> {
        for node in NodeId::ALL {
            self.report.doing(&format!("ztunnel of {}", node.name()));
            self.lab.start_ztunnel(node, &self.options)?;
        }
        Ok(())
    }

    fn introduce(&self) -> Result<()> {
        self.report
            .say("Two nodes on one link, each with its own ztunnel, IPv4 and IPv6; the programs in the pods");
        self.report.say("don't know of the mesh:");
        for node in NodeId::ALL {
            let pods = self.lab.pods().iter().filter(|p| p.plan.node == node);
            let list: Vec<_> =
                pods.map(|p| format!("{}/{} {}", p.plan.namespace, p.plan.name, p.v4)).collect();
            self.report.say(&format!("  {}  {}", node.name(), list.join(", ")));
            let ready = self.lab.ztunnel(node)?.ready_after();
            self.report.say(&format!("          ztunnel ready after {} ms", ready.as_millis()));
        }
        self.report.say("Namespace shop is in the mesh (istio.io/dataplane-mode: ambient), outside is not.");
        self.report.say(&format!("Manifests: {}", self.manifests.dir().display()));
        Ok(())
    }

    /// Runs the steps; `false` when they did not all run to their end.
    fn play(&mut self, only: &[usize]) -> bool {
        let steps = STEPS.iter().enumerate().map(|(i, step)| (i + 1, step));
        for (number, (title, step)) in steps.filter(|(n, _)| only.is_empty() || only.contains(n)) {
            self.report.begin(number, STEPS.len(), title);
            let result = step(self);
            if let Err(e) = result {
                self.report.failed(&e);
                if !e.is::<Interrupted>() {
                    self.show_logs();
                }
                self.report.end();
                return false;
            }
            self.report.end();
        }
        true
    }

    fn show_logs(&self) {
        for node in NodeId::ALL {
            if let Ok(ztunnel) = self.lab.ztunnel(node) {
                self.report.say(&format!("the end of the log of {}'s ztunnel:", node.name()));
                for line in ztunnel.last_lines(8).lines() {
                    self.report.say(&format!("    {line}"));
                }
            }
        }
    }

    fn say_how_to_play(&self) {
        let (netns, node) = (|p: &str| self.lab.pod(p).map(|p| p.netns.clone()), NodeId::Two);
        let (Ok(frontend), Ok(batch)) = (netns("frontend"), netns("batch")) else { return };
        let node = self.lab.node_netns(node);
        self.report.say("It is still up. In the pods (`ip netns` lists them):");
        self.report.say(&format!("  ip netns exec {frontend} curl http://web/"));
        self.report.say(&format!("  ip netns exec {batch} curl http://web/"));
        self.report.say(&format!("  {} why --netns {node} --source shop/batch", self.culvert));
        self.report.say(&format!("  {} ztunnel-config connections --netns {node}", self.culvert));
        self.report
            .say(&format!("Edit the manifests in {}; clear it all with", self.manifests.dir().display()));
        self.report.say(&format!("  {} demo --clean --name {}", self.culvert, self.lab.name()));
    }

    /// Runs this program in a node's namespace, as an operator would, and shows it by its name.
    fn culvert_on(&self, node: NodeId, args: &[&str]) -> Result<Ran> {
        let mut argv = vec![self.culvert.as_str()];
        argv.extend(args);
        let mut ran = self.lab.run_on(node, &argv)?;
        ran.line = format!("culvert {}", args.join(" "));
        Ok(ran)
    }

    /// Runs culvert in a pod, as on the machine that it stands for.
    fn culvert_in(&self, pod: &str, args: &[&str]) -> Result<Ran> {
        let mut argv = vec![self.culvert.as_str()];
        argv.extend(args);
        let mut ran = self.lab.run(pod, &argv)?;
        ran.line = format!("culvert {}", args.join(" "));
        Ok(ran)
    }

    /// A load from `pod` on nginx behind the Service's address `ip`.
    fn web_load(&self, pod: &str, target: std::net::SocketAddr, shape: Shape) -> Result<Plan> {
        Ok(Plan {
            namespace: Some(self.lab.pod(pod)?.netns_path()),
            target,
            talk: Talk::Http { host: "web".to_owned(), path: "/quiet".to_owned() },
            shape,
            // Until it is stopped.
            duration: std::time::Duration::from_secs(60),
            warm_up: std::time::Duration::ZERO,
        })
    }
}
