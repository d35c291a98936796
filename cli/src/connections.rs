//! Connections as a ztunnel's `/connections` lists them, and how a user names one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::admin;
use crate::cluster::{Cluster, ClusterArgs, PodName};

/// Where the proxy is: on this machine if --netns or --admin name it, otherwise in the cluster, if there is a
/// kubeconfig.
#[derive(Args, Clone, Debug)]
pub struct Target {
    /// The network namespace of the node: a name of `ip netns`, or a path [default: this one]
    #[arg(long, value_name = "NAME|PATH", global = true)]
    netns: Option<String>,
    /// The proxy's admin address on this machine [default: 127.0.0.1:15000]
    #[arg(long, value_name = "ADDR", global = true)]
    admin: Option<SocketAddr>,
    /// The node whose ztunnel is asked, in a cluster
    #[arg(long, value_name = "NAME", global = true, conflicts_with_all = ["netns", "admin"])]
    node: Option<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

impl Target {
    fn is_here(&self) -> bool {
        self.netns.is_some() || self.admin.is_some() || self.node.is_none() && !self.cluster.is_any()
    }

    /// The addresses to ask: the one of this machine, or those of the cluster's nodes.
    ///
    /// # Errors
    /// The cluster can't be asked, or has no ztunnel there.
    pub fn all(&self) -> Result<Vec<admin::Address>> {
        if self.is_here() {
            let namespace = self.netns.as_deref().map(crate::netns::path_of);
            return Ok(vec![admin::Address::Here { namespace, at: self.admin.unwrap_or(admin::ADMIN) }]);
        }
        let cluster = Arc::new(Cluster::connect(&self.cluster)?);
        let pods = cluster.pods("ztunnel")?;
        let nodes: Vec<_> = pods.iter().map(|p| p.node.clone()).collect();
        let wanted = |p: &PodName| p.ready && self.node.as_ref().is_none_or(|node| p.node == *node);
        let found: Vec<_> = pods.into_iter().filter(wanted).collect();
        if found.is_empty() {
            let system = &cluster.system;
            match &self.node {
                Some(node) if !nodes.is_empty() => {
                    bail!("no ztunnel is ready on node {node:?}; there are some on {}", nodes.join(", "))
                }
                _ => bail!(
                    "no ztunnel is ready in namespace {system} of the cluster: `culvert status` says why; \
                     --system-namespace names another namespace, --netns or --admin a ztunnel of this machine"
                ),
            }
        }
        let port = admin::ADMIN.port();
        Ok(found.into_iter().map(|pod| admin::Address::Pod { cluster: cluster.clone(), pod, port }).collect())
    }

    /// The addresses of waypoints instead: the one of this machine, or those of the pods of `who`, or of all.
    ///
    /// # Errors
    /// See [`crate::proxy_config::target::addresses`].
    pub fn waypoints(&self, who: Option<&str>) -> Result<Vec<admin::Address>> {
        if self.node.is_some() {
            bail!("--node names a ztunnel's node, and waypoints are asked: name the waypoint");
        }
        crate::proxy_config::target::addresses((self.netns.as_deref(), self.admin), &self.cluster, who)
    }

    /// One address to ask for what all ztunnels know alike.
    ///
    /// # Errors
    /// As [`Target::all`].
    pub fn any(&self) -> Result<admin::Address> {
        self.all()?.into_iter().next().context("no ztunnel")
    }
}

/// One connection. What is absent is not known.
#[derive(Clone, Debug, Deserialize)]
pub struct Connection {
    pub id: u64,
    #[serde(default)]
    pub direction: String,
    #[serde(default)]
    pub carrier: String,
    #[serde(default)]
    pub opened_ms: u64,
    pub source: SocketAddr,
    pub source_workload: Option<String>,
    pub source_identity: Option<String>,
    pub destination: SocketAddr,
    pub upstream: Option<SocketAddr>,
    pub destination_workload: Option<String>,
    pub destination_service: Option<String>,
    pub destination_identity: Option<String>,
    #[serde(default)]
    pub decision: String,
    pub policy: Option<String>,
    #[serde(default)]
    pub dry_run: Vec<String>,
    pub closed_ms: Option<u64>,
    #[serde(default)]
    pub bytes_sent: u64,
    #[serde(default)]
    pub bytes_received: u64,
    pub error: Option<String>,
    /// The node whose ztunnel lists it, in a cluster.
    #[serde(skip)]
    pub node: String,
    /// All of it, as it came.
    #[serde(skip)]
    pub json: Value,
}

/// How a connection is doing, in a word.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It goes on.
    Open,
    /// It ended in order.
    Closed,
    /// It was not let in.
    Refused,
    /// It was let in, and ended otherwise: cut, reset, or never connected.
    Failed,
}

impl State {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

impl Connection {
    /// Its state.
    pub fn state(&self) -> State {
        match (&self.closed_ms, &self.error) {
            _ if self.decision.starts_with("denied") => State::Refused,
            (None, _) => State::Open,
            (Some(_), Some(_)) => State::Failed,
            (Some(_), None) => State::Closed,
        }
    }

    /// How long ago it was opened.
    pub fn age(&self) -> Duration {
        let opened = SystemTime::UNIX_EPOCH + Duration::from_millis(self.opened_ms);
        SystemTime::now().duration_since(opened).unwrap_or_default()
    }
}

/// Which connections.
#[derive(Args, Clone, Debug, Default)]
pub struct Filter {
    /// From whom: an address, address:port, SPIFFE ID, or namespace/name of a pod, or of what it is a pod of
    #[arg(long, value_name = "WHO")]
    source: Option<String>,
    /// To whom: as --source, or a service by namespace/name or its host name
    #[arg(long, value_name = "WHO")]
    destination: Option<String>,
}

impl Filter {
    /// Whether who is at these addresses and has these names is the source that is meant.
    pub fn is_source(&self, addresses: &[Option<SocketAddr>], names: &[&Option<String>]) -> bool {
        self.source.as_ref().is_none_or(|who| is(who, addresses, names))
    }

    /// The same for the destination.
    pub fn is_destination(&self, addresses: &[Option<SocketAddr>], names: &[&Option<String>]) -> bool {
        self.destination.as_ref().is_none_or(|who| is(who, addresses, names))
    }

    /// Whether nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.source.is_none() && self.destination.is_none()
    }

    /// Whether `c` is meant.
    pub fn matches(&self, c: &Connection) -> bool {
        let source = self
            .source
            .as_ref()
            .is_none_or(|who| is(who, &[Some(c.source)], &[&c.source_workload, &c.source_identity]));
        source
            && self.destination.as_ref().is_none_or(|who| {
                let service = c.destination_service.as_deref().and_then(|s| s.split_once('/')).map(|s| s.1);
                // As a host name.
                service == Some(who)
                    || is(
                        who,
                        &[Some(c.destination), c.upstream],
                        &[&c.destination_workload, &c.destination_identity, &c.destination_service],
                    )
            })
    }
}

fn is(who: &str, addresses: &[Option<SocketAddr>], names: &[&Option<String>]) -> bool {
    if let Ok(address) = who.parse::<SocketAddr>() {
        return addresses.contains(&Some(address));
    }
    if let Ok(ip) = who.parse::<std::net::IpAddr>() {
        return addresses.iter().flatten().any(|a| a.ip() == ip);
    }
    names.iter().any(|name| name.as_deref().is_some_and(|name| is_named(name, who)))
}

/// Whether `who` is this name, or the workload (Deployment, StatefulSet, Job, …) of the pod of this name, or a pod of the workload of
/// this name, or `namespace/name` of the service.
fn is_named(name: &str, who: &str) -> bool {
    let Some(rest) = name.strip_prefix(who) else {
        // A waypoint knows a client by what made its pod.
        return who.contains('/') && is_generated_for(who, name);
    };
    let Some((namespace, _)) = who.split_once('/').filter(|_| !who.contains("://")) else {
        return rest.is_empty();
    };
    let service = || rest.strip_prefix('.')?.strip_prefix(namespace)?.strip_prefix(".svc");
    rest.is_empty()
        || is_generated(rest)
        || service().is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Whether a pod of this name is one of the workload of that name.
pub fn is_generated_for(pod: &str, workload: &str) -> bool {
    pod.strip_prefix(workload).is_some_and(is_generated)
}

/// Whether this is what controllers put behind a workload's name for its pods: a template's hash, a number, random letters.
fn is_generated(rest: &str) -> bool {
    // k8s.io/apimachinery/pkg/util/rand: without vowels, and what looks like one.
    let random = |part: &str| part.bytes().all(|b| b"bcdfghjklmnpqrstvwxz2456789".contains(&b));
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let Some(rest) = rest.strip_prefix('-') else { return false };
    match rest.split_once('-') {
        // A StatefulSet's, or a DaemonSet's or Job's.
        None => number(rest) || (rest.len() == 5 && random(rest)),
        // A Deployment's; an Indexed Job's, or a CronJob's, whose Jobs have the minute in their names.
        Some((first, last)) => {
            let of_template = matches!(first.len(), 6..=10) && random(first);
            (of_template || number(first)) && last.len() == 5 && random(last)
        }
    }
}

/// All connections that the ztunnels know, each one's in the order of their numbers.
pub fn fetch(addresses: &[admin::Address]) -> Result<Vec<Connection>> {
    let mut list = Vec::new();
    for address in addresses {
        let mut all = address.json("/connections")?;
        let start = list.len();
        for key in ["ended", "open"] {
            let Some(Value::Array(items)) = all.get_mut(key).map(Value::take) else { continue };
            for mut item in items {
                let mut connection = Connection::deserialize(&item)
                    .with_context(|| format!("{address} lists a connection that this culvert can't read"))?;
                connection.node = address.node().to_owned();
                if let (Some(map), false) = (item.as_object_mut(), address.node().is_empty()) {
                    map.insert("node".to_owned(), address.node().into());
                }
                connection.json = item;
                list.push(connection);
            }
        }
        if let Some(new) = list.get_mut(start..) {
            new.sort_by_key(|c| c.id);
        }
    }
    // Numbers are each ztunnel's own; between nodes the time orders.
    if addresses.len() > 1 {
        list.sort_by_key(|c| c.opened_ms);
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn connection() -> Connection {
        Connection::deserialize(json!({
            "id": 7, "direction": "inbound", "carrier": "hbone", "opened_ms": 1,
            "source": "10.0.0.1:4000", "source_workload": "shop/batch",
            "source_identity": "spiffe://cluster.local/ns/shop/sa/batch",
            "destination": "[fd00::2]:80", "destination_workload": "shop/web",
            "destination_service": "shop/web.shop.svc.cluster.local",
            "decision": "denied by policy shop/no rule 0", "policy": "shop/no",
            "closed_ms": 2, "error": "denied"
        }))
        .unwrap()
    }

    #[test]
    fn a_connection_is_found_by_each_of_its_names_and_by_no_other() {
        let c = connection();
        let source = |who: &str| Filter { source: Some(who.into()), destination: None }.matches(&c);
        let destination = |who: &str| Filter { source: None, destination: Some(who.into()) }.matches(&c);
        for who in ["10.0.0.1", "10.0.0.1:4000", "shop/batch", "spiffe://cluster.local/ns/shop/sa/batch"] {
            assert!(source(who) && !destination(who), "{who}");
        }
        for who in ["fd00::2", "[fd00::2]:80", "shop/web", "web.shop.svc.cluster.local"] {
            assert!(destination(who) && !source(who), "{who}");
        }
        assert!(!source("10.0.0.1:4001") && !source("batch") && !destination("10.0.0.2"));
        assert_eq!(c.state(), State::Refused);
    }

    #[test]
    fn a_pod_is_found_by_what_it_is_a_pod_of() {
        for pod in ["shop/web-5dc6c6bd59-v8fkf", "shop/web-0", "shop/web-v8fkf", "shop/web-29382910-v8fkf"] {
            assert!(is_named(pod, "shop/web") && is_named(pod, pod), "{pod}");
            assert!(
                !is_named(pod, "shop/we") && !is_named(pod, "web") && !is_named(pod, "other/web"),
                "{pod}"
            );
        }
        for pod in
            ["shop/web-admin", "shop/web-admin-5dc6c6bd59-v8fkf", "shop/web-", "shop/webs-0", "shop/web-v2"]
        {
            assert!(!is_named(pod, "shop/web"), "{pod}");
        }
        // A waypoint has the name of what made the pod.
        assert!(is_named("shop/web", "shop/web-5dc6c6bd59-v8fkf") && !is_named("shop/web", "shop/web-admin"));
        let service = "shop/web.shop.svc.cluster.local";
        assert!(is_named(service, "shop/web"));
        assert!(!is_named(service, "shop/we") && !is_named("shop/web.other.svc.cluster.local", "shop/web"));
        assert!(!is_named(
            "spiffe://cluster.local/ns/shop/sa/web-0",
            "spiffe://cluster.local/ns/shop/sa/web"
        ));
    }
}
