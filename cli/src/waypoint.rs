//! `culvert waypoint`: Gateways of the waypoint class, which the control plane deploys; as `istioctl waypoint` has it.

mod generate;
mod look;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::{Cluster, ClusterArgs};
use crate::install::{duration, spinner};
use crate::status::MODE;
use crate::table::{Output, print};
use crate::yaml;

pub use generate::For;
use generate::{CLASSES, gateway};
use look::{Waypoint, trouble};

/// The label that binds a namespace, service or pod to a waypoint.
const USE: &str = "istio.io/use-waypoint";
/// The label that says in which namespace the waypoint is.
const USE_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
/// Where the API server has Gateways.
const API: &str = "/apis/gateway.networking.k8s.io/v1";
/// Between looks at a waypoint that is waited for.
const PERIOD: Duration = Duration::from_millis(500);

/// Waypoints: the proxies that services' requests pass
#[derive(Args, Debug)]
pub struct WaypointArgs {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The namespace [default: that of the kubeconfig's context]
    #[arg(short, long, value_name = "NAMESPACE", global = true)]
    namespace: Option<String>,
}

/// What a waypoint is to be.
#[derive(Args, Debug)]
struct Wanted {
    /// Its name
    #[arg(long, default_value = "waypoint", value_parser = generate::name)]
    name: String,
    /// Which traffic passes it: to services, to pods by their own addresses, or both [default: service]
    #[arg(long = "for", value_enum, value_name = "TRAFFIC")]
    traffic: Option<For>,
    /// The revision of the control plane that deploys it
    #[arg(short, long, value_name = "NAME")]
    revision: Option<String>,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Deploys a waypoint
    Apply {
        #[command(flatten)]
        wanted: Wanted,
        /// Bind all services of the namespace to it
        #[arg(long)]
        enroll_namespace: bool,
        /// Bind the namespace to it even if it is bound to another
        #[arg(long, requires = "enroll_namespace")]
        overwrite: bool,
        /// Wait until it serves
        #[arg(short, long)]
        wait: bool,
        /// How long to wait, such as 90s or 5m
        #[arg(long, value_name = "TIME", default_value = "90s", value_parser = duration)]
        timeout: Duration,
    },
    /// Writes the Gateway that `apply` would apply
    Generate {
        #[command(flatten)]
        wanted: Wanted,
        /// The form of the output
        #[arg(short, long, value_enum, default_value = "yaml")]
        output: Output,
    },
    /// Lists waypoints
    List {
        /// Those of all namespaces
        #[arg(short = 'A', long)]
        all_namespaces: bool,
        /// The form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// How waypoints are, and what is bound to them; the exit code is 1 where one does not serve
    Status {
        /// Its name; all of the namespace, if none is given
        name: Option<String>,
        /// The form of the output
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Deletes waypoints
    Delete {
        /// Their names
        names: Vec<String>,
        /// All of the namespace
        #[arg(long, conflicts_with = "names")]
        all: bool,
    },
}

/// Runs the command.
pub fn run(args: &WaypointArgs) -> Result<ExitCode> {
    if let What::Generate { wanted, output } = &args.what {
        let made = gateway(wanted, args.namespace.as_deref());
        print(&output.document(&made)?.unwrap_or_else(|| yaml::write(&made, 0)))?;
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = Cluster::connect(&args.cluster)?;
    let namespace = args.namespace.clone().unwrap_or_else(|| cluster.namespace.clone());
    if cluster.find(API)?.is_none() {
        bail!(
            "the cluster has no Gateway API, by which waypoints are asked for. To install it: kubectl apply --server-side \
             -f https://github.com/kubernetes-sigs/gateway-api/releases/download/v1.6.3/standard-install.yaml"
        );
    }
    match &args.what {
        What::Generate { .. } => Ok(ExitCode::SUCCESS),
        What::Apply { wanted, enroll_namespace, overwrite, wait, timeout } => {
            let enroll = enroll_namespace.then_some(*overwrite);
            apply(&cluster, &namespace, wanted, enroll, wait.then_some(*timeout))
        }
        What::List { all_namespaces, output } => {
            look::list(&cluster, (!all_namespaces).then_some(&namespace), *output)
        }
        What::Status { name, output } => look::status(&cluster, &namespace, name.as_deref(), *output),
        What::Delete { names, all } => delete(&cluster, &namespace, names, *all),
    }
}

/// Deploys one. `enroll` binds the namespace to it, with `true` also away from another.
fn apply(
    cluster: &Cluster,
    namespace: &str,
    wanted: &Wanted,
    enroll: Option<bool>,
    wait: Option<Duration>,
) -> Result<ExitCode> {
    let there = cluster.find(&format!("/api/v1/namespaces/{namespace}"))?;
    let Some(there) = there else {
        bail!(
            "there is no namespace {namespace} (kubectl create namespace {namespace}, or name another with -n)"
        );
    };
    let label = |key: &str| {
        let labels = there.pointer("/metadata/labels");
        labels.and_then(|labels| labels.get(key)).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let bound = label(USE);
    if enroll == Some(false) && !bound.is_empty() && bound != wanted.name {
        bail!(
            "the namespace {namespace} is bound to {bound:?} already; --overwrite binds it to {}",
            wanted.name
        );
    }
    let place = format!("{API}/namespaces/{namespace}/gateways/{}", wanted.name);
    let class =
        cluster.find(&place)?.and_then(|g| Some(g.pointer("/spec/gatewayClassName")?.as_str()?.to_owned()));
    if let Some(class) = class.filter(|class| !CLASSES.contains(&class.as_str())) {
        bail!("{namespace}/{} is a Gateway of the class {class}; --name names another", wanted.name);
    }
    cluster.apply(&place, &gateway(wanted, Some(namespace)))?;
    print(&format!("waypoint {namespace}/{} applied\n", wanted.name))?;
    if enroll.is_some() {
        let labels = json!({ USE: wanted.name, USE_NAMESPACE: null });
        cluster
            .merge(&format!("/api/v1/namespaces/{namespace}"), &json!({"metadata": {"labels": labels}}))?;
        print(&format!("namespace {namespace} labelled {USE}={}\n", wanted.name))?;
        if label(MODE) != "ambient" {
            print(&format!(
                "note: the namespace is not in the mesh, and nothing passes the waypoint until it is: kubectl label \
                 namespace {namespace} {MODE}=ambient\n"
            ))?;
        }
    }
    match wait {
        Some(limit) => serve(cluster, namespace, &wanted.name, limit),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// Waits until a waypoint serves, and says how it goes.
fn serve(cluster: &Cluster, namespace: &str, name: &str, limit: Duration) -> Result<ExitCode> {
    let progress = spinner();
    let end = Instant::now() + limit;
    let found = loop {
        let waypoint = Waypoint::find(cluster, namespace, name)?;
        let Some(found) = waypoint else {
            progress.finish_and_clear();
            bail!("the waypoint {namespace}/{name} was deleted meanwhile");
        };
        // What is not accepted stays so until somebody changes it.
        let hopeless = found.accepted.is_some_and(|accepted| !accepted);
        if found.serves || hopeless || Instant::now() >= end {
            break found;
        }
        progress.set_message(format!("waiting for {namespace}/{name}: {}", found.said()));
        std::thread::sleep(PERIOD);
    };
    progress.finish_and_clear();
    if found.serves {
        print(&format!("waypoint {namespace}/{name} serves: {}\n", found.said()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let waited = if Instant::now() >= end {
        format!(" after {} s (--timeout sets how long to wait)", limit.as_secs())
    } else {
        String::new()
    };
    print(&format!("waypoint {namespace}/{name} does not serve{waited}: {}\n", found.said()))?;
    for line in trouble(cluster, &found)? {
        print(&format!("  {line}\n"))?;
    }
    Ok(ExitCode::FAILURE)
}

fn delete(cluster: &Cluster, namespace: &str, names: &[String], all: bool) -> Result<ExitCode> {
    let there = Waypoint::all(cluster, Some(namespace))?;
    let listed = || match &there[..] {
        [] => "there is none".to_owned(),
        there => {
            format!("there are: {}", there.iter().map(|w| w.name.as_str()).collect::<Vec<_>>().join(", "))
        }
    };
    let chosen: Vec<&Waypoint> = match (names, all) {
        ([], false) => bail!("which? Name them, or say --all; {}", listed()),
        (_, true) => there.iter().collect(),
        (names, false) => {
            let mut chosen = Vec::new();
            for name in names {
                let Some(found) = there.iter().find(|waypoint| waypoint.name == *name) else {
                    bail!("there is no waypoint {name} in namespace {namespace}; {}", listed());
                };
                chosen.push(found);
            }
            chosen
        }
    };
    if chosen.is_empty() {
        print(&format!("there is no waypoint in namespace {namespace}\n"))?;
    }
    for waypoint in chosen {
        cluster.delete(&format!("{API}/namespaces/{namespace}/gateways/{}", waypoint.name))?;
        print(&format!("waypoint {namespace}/{} deleted\n", waypoint.name))?;
        let bound = look::bound_to(cluster, waypoint)?;
        if !bound.is_empty() {
            print(&format!(
                "note: {} still bound to it, and connections to what is bound are refused until the label {USE} is removed \
                 or the waypoint is back: {}\n",
                if bound.len() == 1 { "one object is" } else { "several objects are" },
                bound.join(", ")
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
