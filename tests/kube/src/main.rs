//! `kube-tests`: the cluster, the images and the scenarios, from the command line.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Parser, Subcommand};

use kube_tests::cluster::{self, Cluster};
use kube_tests::image::{Build, Definition, Platform};
use kube_tests::lab::{Lab, Node};
use kube_tests::report::{Clock, say, wait_for};
use kube_tests::scenario::{self, ALL, Schedule, Way};
use kube_tests::{interrupt, mesh, node, node_init, tools};

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
    /// Runs the scenarios on clusters of their own
    E2e(E2e),
    /// Becomes process 1 of a node: not for people
    #[command(hide = true)]
    NodeInit {
        /// The node
        node: String,
        /// Of the cluster with this number
        #[arg(long)]
        cluster: u8,
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
    /// Which scenarios; if none is named, all but by-chance
    names: Vec<String>,
    /// Only says which there are
    #[arg(long)]
    list: bool,
    /// Leaves out the Gateway API's conformance suite, which alone takes minutes
    #[arg(long)]
    short: bool,
    /// Leaves the cluster up, and uses the one that is up
    #[arg(long)]
    keep: bool,
    /// Only one cluster: by default those scenarios that must be alone have two more
    #[arg(long)]
    one: bool,
    /// With --keep: the mesh as it is installed
    #[arg(long)]
    as_is: bool,
    /// cargo's profile
    #[arg(long, default_value = "dev")]
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
        Command::NodeInit { node, cluster } => {
            let lab = lab.nth(cluster);
            node_init::run(&lab, Node::named(&node)?)?;
        }
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
        beside: &[],
        sysroot: arguments.sysroot.clone(),
        out: arguments.out.clone().unwrap_or_else(|| lab.product_images()),
        reuse: false,
    };
    for archive in build.run(&definitions)? {
        say(&format!("{}", archive.display()));
    }
    Ok(())
}

fn install(cluster: &Cluster, profile: &str, prebuilt: bool, settings: &[String]) -> Result<()> {
    let archives = mesh::build(&cluster.lab, profile, prebuilt)?;
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
    scenario::clear_evidence(lab)?;
    if !arguments.keep {
        interrupt::take_down_after(lab)?;
    }
    let there = Cluster::running(lab).ok().filter(|_| arguments.keep);
    let outcome = play(lab, there, &Schedule::new(&scenarios), arguments, clock);
    if !arguments.keep {
        cluster::down(lab)?;
    }
    Ok(if outcome? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether all went well.
fn play(
    lab: &Lab,
    there: Option<Cluster>,
    schedule: &Schedule,
    arguments: &E2e,
    clock: Clock,
) -> Result<bool> {
    let images = Built::default();
    let wanted = schedule.needs_a_mesh() && !arguments.as_is;
    thread::scope(|scope| {
        if wanted {
            // A cluster that starts mostly waits.
            scope.spawn(|| images.build(lab, arguments));
        }
        let first = match there {
            Some(cluster) => cluster,
            None => Cluster::up(lab)?,
        };
        let equip = |cluster: &Cluster| -> Result<()> {
            if wanted {
                cluster.import(&images.built()?)?;
                mesh::install(cluster, &borrowed(&arguments.set))?;
            }
            Ok(())
        };
        let clusters = on_clusters(&first, schedule, arguments, equip)?;
        Ok(schedule.summary(clock, &clusters))
    })
}

/// Runs all: those that must be alone on other clusters, too, where there are some. `equip` installs the product.
fn on_clusters(
    first: &Cluster,
    schedule: &Schedule,
    arguments: &E2e,
    equip: impl Fn(&Cluster) -> Result<()> + Sync,
) -> Result<Vec<Cluster>> {
    thread::scope(|scope| {
        let alone = schedule.left(Way::Alone) + schedule.left(Way::Last);
        let others = match alone {
            _ if arguments.keep || arguments.one => 0,
            0..=2 => 0,
            _ if arguments.short => 1,
            3..=6 => 1,
            _ => 2,
        };
        schedule.on(1 + usize::from(others));
        let (first_of, equip, schedule) = (first, &equip, schedule);
        let beside: Vec<_> = (2..2 + others)
            .map(|number| {
                scope.spawn(move || {
                    let cluster = first_of.up_beside(number)?;
                    equip(&cluster)?;
                    schedule.run_alone(&cluster)?;
                    anyhow::Ok(cluster)
                })
            })
            .collect();
        schedule.run_beside(first, Way::Before)?;
        if schedule.needs_a_mesh() {
            equip(first)?;
        }
        schedule.run_beside(first, Way::Beside)?;
        schedule.run_alone(first)?;
        let mut clusters = vec![first.clone()];
        for thread in beside {
            clusters.push(thread.join().unwrap_or_else(|_| bail!("a cluster's thread panicked"))?);
        }
        Ok(clusters)
    })
}

/// The product's images, made while clusters start.
#[derive(Default)]
struct Built(OnceLock<Result<Vec<PathBuf>, String>>);

impl Built {
    fn build(&self, lab: &Lab, arguments: &E2e) {
        let built = mesh::build(lab, &arguments.profile, arguments.prebuilt);
        let _ = self.0.set(built.map_err(|error| {
            // Said at once: what runs meanwhile takes a while.
            say(&format!("error: {error:#}"));
            format!("{error:#}")
        }));
    }

    /// Waits for them.
    fn built(&self) -> Result<Vec<PathBuf>> {
        wait_for("the images", Duration::from_secs(3600), || {
            Ok(self.0.get().ok_or_else(|| "they are being made".to_owned()))
        })?
        .clone()
        .map_err(|error| anyhow!("making the images: {error}"))
    }
}
