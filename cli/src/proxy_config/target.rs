//! Where a waypoint's admin port is: on this machine, or in the pods of a Gateway in a cluster.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::admin::{ADMIN, Address};
use crate::cluster::{Cluster, ClusterArgs, PodName};

/// Where the waypoint is: on this machine if --netns or --admin name it, otherwise in the cluster.
#[derive(Args, Clone, Debug)]
pub struct Target {
    /// The network namespace of the waypoint: a name of `ip netns`, or a path [default: this one]
    #[arg(long, value_name = "NAME|PATH", global = true)]
    netns: Option<String>,
    /// The waypoint's admin address on this machine [default: 127.0.0.1:15000]
    #[arg(long, value_name = "ADDR", global = true)]
    admin: Option<SocketAddr>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

impl Target {
    /// The addresses to ask: the one of this machine, or those of the ready pods of the waypoint `who`, which is
    /// `[NAMESPACE/]NAME` of a Gateway or of one of its pods; of all waypoints without one.
    ///
    /// # Errors
    /// The cluster can't be asked, or there is no such waypoint, or none that is ready.
    pub fn addresses(&self, who: Option<&str>) -> Result<Vec<Address>> {
        addresses((self.netns.as_deref(), self.admin), &self.cluster, who)
    }

    /// One address to ask for what all pods of a waypoint know alike.
    ///
    /// # Errors
    /// As [`Target::addresses`].
    pub fn any(&self, who: Option<&str>) -> Result<Address> {
        self.addresses(who)?.into_iter().next().context("no waypoint")
    }
}

/// As [`Target::addresses`]: `here` are a network namespace and an address of this machine.
///
/// # Errors
/// As [`Target::addresses`].
pub fn addresses(
    here: (Option<&str>, Option<SocketAddr>),
    cluster: &ClusterArgs,
    who: Option<&str>,
) -> Result<Vec<Address>> {
    if here.0.is_some() || here.1.is_some() || !cluster.is_any() {
        if let Some(who) = who {
            bail!(
                "{who} is a waypoint of a cluster, and no cluster is named: give --context or --kubeconfig, or leave the name \
                 out and give --admin (and --netns) for a waypoint of this machine"
            );
        }
        let namespace = here.0.map(crate::netns::path_of);
        return Ok(vec![Address::Here { namespace, at: here.1.unwrap_or(ADMIN) }]);
    }
    let cluster = Arc::new(Cluster::connect(cluster)?);
    let pods = match who {
        Some(who) => one(&cluster, who)?,
        None => cluster.waypoint_pods(None, None)?,
    };
    let count = pods.len();
    if pods.is_empty() {
        bail!(
            "there is no waypoint in the cluster: `culvert waypoint apply` makes one, and `culvert waypoint list -A` shows \
             those that were asked for"
        );
    }
    let ready: Vec<PodName> = pods.into_iter().filter(|pod| pod.ready).collect();
    if ready.is_empty() {
        let place = who.unwrap_or("the cluster");
        bail!(
            "none of the {count} pods of waypoints in {place} is ready: `culvert waypoint list -A` shows why"
        );
    }
    let port = ADMIN.port();
    Ok(ready.into_iter().map(|pod| Address::Pod { cluster: cluster.clone(), pod, port }).collect())
}

/// The pods of a Gateway, or the pod of a Gateway's, of this name.
fn one(cluster: &Cluster, who: &str) -> Result<Vec<PodName>> {
    let (namespace, name) = who.split_once('/').unwrap_or((&cluster.namespace, who));
    let of_gateway = cluster.waypoint_pods(Some(namespace), Some(name))?;
    if !of_gateway.is_empty() {
        return Ok(of_gateway);
    }
    let all = cluster.waypoint_pods(Some(namespace), None)?;
    let found: Vec<PodName> = all.into_iter().filter(|pod| pod.name == name).collect();
    if found.is_empty() {
        bail!(
            "there is no waypoint {name} in namespace {namespace}, and no pod of one: write NAMESPACE/NAME; `culvert waypoint \
             list` shows those there are"
        );
    }
    Ok(found)
}
