//! `kube-tests`: the cluster, the images and the scenarios, from the command line.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};

use kube_tests::cluster::{self, Cluster};
use kube_tests::image::{Build, Definition, Platform};
use kube_tests::lab::{Lab, Node};
use kube_tests::report::{Clock, say};
use kube_tests::scenario::{self, ALL};
use kube_tests::{mesh, node, node_init, tools};

/// A real Kubernetes on this machine: two nodes in namespaces of their own.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts, ends and uses the cluster
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Writes the product's images
    Images(Images),
    /// Runs the scenarios on a cluster of their own
    E2e(E2e),
    /// Becomes process 1 of a node: not for people
    #[command(hide = true)]
    NodeInit {
        /// The node
        node: String,
    },
}

#[derive(Subcommand)]
enum ClusterCommand {
    /// Builds its programs (cold: ten minutes of processor time), without starting it
    Build,
    /// Starts it
    Up,
    /// Ends it, and removes what it left
    Down,
    /// What runs
    Status,
    /// kubectl, as the administrator
    #[command(disable_help_flag = true)]
    Kubectl {
        /// kubectl's arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Helm, as the administrator
    #[command(disable_help_flag = true)]
    Helm {
        /// Helm's arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// A shell, or a command, on a node
    Node {
        /// node1 or node2
        node: String,
        /// The command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Takes a node's power away and gives it back: its disk stays, its `/run`, network and processes do not
    Reboot {
        /// node1 or node2
        node: String,
    },
    /// Kills a daemon of a node, which starts it again
    Kill {
        /// node1 or node2
        node: String,
        /// containerd, kubelet or kube-proxy
        daemon: String,
    },
    /// Imports archives of images on both nodes
    Import {
        /// Files, as `images` writes them
        archives: Vec<PathBuf>,
    },
    /// Builds the product, imports its images and installs or upgrades it
    Install {
        /// cargo's profile
        #[arg(long, default_value = "release")]
        profile: String,
        /// Takes what cargo has built already
        #[arg(long)]
        prebuilt: bool,
        /// Settings of the chart, KEY=VALUE
        #[arg(long)]
        set: Vec<String>,
    },
}

#[derive(clap::Args)]
struct Images {
    /// Which; all, if none is named
    names: Vec<String>,
    /// cargo's profile
    #[arg(long, default_value = "dist")]
    profile: String,
    /// Takes what cargo has built already
    #[arg(long)]
    prebuilt: bool,
    /// amd64 or arm64; this machine's, if none is given
    #[arg(long)]
    arch: Option<String>,
    /// The tree of Debian that tools and libraries are taken from; another platform needs its own
    #[arg(long, default_value = "/")]
    sysroot: PathBuf,
    /// Where to
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(clap::Args)]
struct E2e {
    /// Which scenarios; all, if none is named
    names: Vec<String>,
    /// Only says which there are
    #[arg(long)]
    list: bool,
    /// Leaves out the Gateway API's conformance suite (by-chance, conformance), which alone takes minutes
    #[arg(long)]
    short: bool,
    /// Leaves the cluster up, and uses the one that is up
    #[arg(long)]
    keep: bool,
    /// With --keep: the mesh as it is installed
    #[arg(long)]
    as_is: bool,
    /// cargo's profile
    #[arg(long, default_value = "release")]
    profile: String,
    /// Takes what cargo has built already
    #[arg(long)]
    prebuilt: bool,
    /// Settings of the chart, KEY=VALUE
    #[arg(long)]
    set: Vec<String>,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    let lab = Lab::find()?;
    match command {
        Command::Cluster(command) => on_cluster(&lab, command)?,
        Command::Images(arguments) => images(&lab, &arguments)?,
        Command::E2e(arguments) => return e2e(&lab, &arguments),
        Command::NodeInit { node } => node_init::run(&lab, Node::named(&node)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn on_cluster(lab: &Lab, command: ClusterCommand) -> Result<()> {
    match command {
        ClusterCommand::Build => tools::build(lab),
        ClusterCommand::Up => Cluster::up(lab).map(drop),
        ClusterCommand::Down => cluster::down(lab),
        ClusterCommand::Status => {
            cluster::status(lab).iter().for_each(|line| say(line));
            Ok(())
        }
        ClusterCommand::Kubectl { arguments } => {
            Err(Cluster::running(lab)?.kubectl.command(&borrowed(&arguments)).exec())
                .context("becoming kubectl")
        }
        ClusterCommand::Helm { arguments } => {
            Err(Cluster::running(lab)?.kubectl.helm(&borrowed(&arguments)).exec()).context("becoming Helm")
        }
        ClusterCommand::Node { node, command } => {
            let command = if command.is_empty() { vec!["bash".to_owned()] } else { command };
            Err(node::shell(lab, Node::named(&node)?, &borrowed(&command))?.exec())
                .context("entering the node")
        }
        ClusterCommand::Reboot { node } => {
            let (cluster, node) = (Cluster::running(lab)?, Node::named(&node)?);
            node::reboot(lab, node)?;
            cluster.ready(node)
        }
        ClusterCommand::Kill { node, daemon } => {
            if !node::kill_daemon(lab, Node::named(&node)?, &daemon)? {
                bail!("{daemon} does not run on {node}");
            }
            Ok(())
        }
        ClusterCommand::Import { archives } => Cluster::running(lab)?.import(&archives),
        ClusterCommand::Install { profile, prebuilt, set } => {
            install(&Cluster::running(lab)?, &profile, prebuilt, &set)
        }
    }
}

fn borrowed(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

fn images(lab: &Lab, arguments: &Images) -> Result<()> {
    let platform = arguments.arch.as_deref().map_or_else(Platform::here, Platform::named)?;
    let mut definitions: BTreeMap<String, Definition> = Definition::all(&lab.workspace)?;
    if let Some(unknown) = arguments.names.iter().find(|name| !definitions.contains_key(*name)) {
        bail!("there is no image {unknown:?} in deploy/images");
    }
    definitions.retain(|name, _| arguments.names.is_empty() || arguments.names.contains(name));
    let build = Build {
        workspace: lab.workspace.clone(),
        platform,
        profile: arguments.profile.clone(),
        prebuilt: arguments.prebuilt,
        sysroot: arguments.sysroot.clone(),
        out: arguments.out.clone().unwrap_or_else(|| lab.product_images()),
    };
    for archive in build.run(&definitions)? {
        say(&format!("{}", archive.display()));
    }
    Ok(())
}

fn install(cluster: &Cluster, profile: &str, prebuilt: bool, settings: &[String]) -> Result<()> {
    let archives = mesh::build(cluster, profile, prebuilt)?;
    cluster.import(&archives)?;
    mesh::install(cluster, &borrowed(settings))
}

fn e2e(lab: &Lab, arguments: &E2e) -> Result<ExitCode> {
    if arguments.list {
        for scenario in ALL {
            say(&format!("{:16} {}", scenario.name, scenario.shows));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let clock = Clock::start();
    let mut scenarios = scenario::select(&arguments.names)?;
    scenarios.retain(|s| !(arguments.short && s.long));
    let there = Cluster::running(lab).ok().filter(|_| arguments.keep);
    let cluster = match there {
        Some(cluster) => cluster,
        None => Cluster::up(lab)?,
    };
    let outcome = play(&cluster, &scenarios, arguments);
    if !arguments.keep {
        cluster::down(lab)?;
    }
    let failed = outcome?;
    if failed.is_empty() {
        say(&format!("== all {} scenarios: ok, {}", scenarios.len(), clock.seconds()));
        return Ok(ExitCode::SUCCESS);
    }
    say(&format!(
        "== {} of {} scenarios FAILED: {}, {}",
        failed.len(),
        scenarios.len(),
        failed.join(", "),
        clock.seconds()
    ));
    Ok(ExitCode::FAILURE)
}

fn play(cluster: &Cluster, scenarios: &[scenario::Scenario], arguments: &E2e) -> Result<Vec<&'static str>> {
    scenario::clear_evidence(cluster)?;
    let (mesh, plain): (Vec<_>, Vec<_>) = scenarios.iter().partition(|s| s.mesh);
    let wanted = !mesh.is_empty() && !arguments.as_is;
    let build = || {
        let built = mesh::build(cluster, &arguments.profile, arguments.prebuilt);
        // Said at once: the scenarios that run meanwhile take minutes.
        built
            .and_then(|archives| cluster.import(&archives))
            .inspect_err(|error| say(&format!("error: {error:#}")))
    };
    // What is built needs the processor, and the cluster's own scenarios mostly wait.
    let (failed, built) = thread::scope(|scope| {
        let building = wanted.then(|| scope.spawn(build));
        let failed = scenario::run(cluster, &plain);
        (failed, building.map(|b| b.join().unwrap_or_else(|_| bail!("building the images panicked"))))
    });
    let mut failed = failed?;
    if let Some(built) = built {
        built?;
        mesh::install(cluster, &borrowed(&arguments.set))?;
    }
    failed.extend(scenario::run(cluster, &mesh)?);
    Ok(failed)
}
