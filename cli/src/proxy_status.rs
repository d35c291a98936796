//! `culvert proxy-status`: what each node's proxy was sent, and what it has acknowledged. A proxy that no control plane knows
//! is told apart from that of a node that is not there: the status of policies does not count that one either.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cluster::{Cluster, ClusterArgs, PodName};
use crate::table::{Output, Table, print, printable};

/// culvertd's monitoring port.
pub const MONITORING: u16 = 15014;
const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
const WORKLOAD: &str = "type.googleapis.com/istio.workload.Workload";
const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// What each proxy was sent by the control plane, and what it has acknowledged; the exit code is 1 where one has
/// refused something, or is not connected and its node is there
#[derive(Args, Debug)]
pub struct ProxyStatusArgs {
    /// Only the proxy of this node
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// An answer of a replica; and of one that is not ready, which may not run.
const ASKING: Duration = Duration::from_secs(10);
const ASKING_UNREADY: Duration = Duration::from_secs(3);

/// A proxy, as a control plane lists it. What this version does not know is kept.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Proxy {
    #[serde(default)]
    id: String,
    #[serde(default)]
    node: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(default)]
    address: String,
    #[serde(default)]
    connected_since: String,
    #[serde(default)]
    types: serde_json::Map<String, Value>,
    /// The replica that it is connected to.
    #[serde(default)]
    control_plane: String,
    #[serde(default)]
    connected: bool,
    /// Its node is gone or not ready.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    node_away: bool,
    /// Not all replicas could be asked, so that it may be connected to one that was not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    unknown: bool,
    #[serde(flatten)]
    more: serde_json::Map<String, Value>,
}

/// Runs the command.
pub fn run(args: &ProxyStatusArgs) -> Result<ExitCode> {
    let cluster = Cluster::connect(&args.cluster)?;
    let wanted = |node: &str| args.node.as_deref().is_none_or(|wanted| wanted == node);
    let (mut proxies, silent) = connected(&cluster)?;
    // A proxy that no replica knows is what most needs to be seen.
    for pod in cluster.pods("ztunnel")? {
        if !proxies.iter().any(|p| is_pod(p, &pod)) {
            let id = format!("{}.{}", pod.name, pod.namespace);
            proxies.push(Proxy { id, node: pod.node, unknown: !silent.is_empty(), ..Proxy::default() });
        }
    }
    // Who may not see nodes is told of the proxy all the same.
    if proxies.iter().any(|p| !p.connected)
        && let Ok(nodes) = cluster.list("/api/v1/nodes")
    {
        let ready = ready_nodes(&nodes);
        proxies.iter_mut().filter(|p| !p.connected).for_each(|p| p.node_away = !ready.contains(&p.node));
    }
    if let Some(node) = &args.node
        && !proxies.iter().any(|p| wanted(&p.node))
        && !proxies.is_empty()
    {
        let nodes: BTreeSet<&str> = proxies.iter().map(|p| p.node.as_str()).collect();
        let nodes: Vec<&str> = nodes.into_iter().take(20).collect();
        bail!("no proxy is on a node {node:?}; there are proxies on {}", nodes.join(", "));
    }
    proxies.retain(|p| wanted(&p.node));
    if proxies.is_empty() {
        bail!("no proxy is connected, and no ztunnel is there: `culvert status` says what is installed");
    }
    proxies.sort_by(|a, b| (&a.node, &a.id).cmp(&(&b.node, &b.id)));
    match args.output.document(&proxies)? {
        Some(document) => print(&document)?,
        None => {
            print(&table(&proxies, args.output == Output::Wide).to_string())?;
            for said in &silent {
                print(&format!("not asked: {}\n", printable(said)))?;
            }
        }
    }
    let fine = |p: &Proxy| p.node_away || p.connected && p.types.values().all(|t| state(t) != "NACKED");
    Ok(if proxies.iter().all(fine) && silent.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The proxies of all replicas that answer, and what is to be said of the others. One on a node that is not ready serves on,
/// and is asked too.
fn connected(cluster: &Cluster) -> Result<(Vec<Proxy>, Vec<String>)> {
    let replicas = cluster.pods("culvertd")?;
    let (mut all, mut silent, mut answered) = (Vec::new(), Vec::new(), false);
    for replica in &replicas {
        let limit = if replica.ready { ASKING } else { ASKING_UNREADY };
        let list = match cluster.pod_json_within(limit, replica, MONITORING, "/debug/syncz") {
            Ok(Some(list)) => list,
            Ok(None) => bail!(
                "culvertd in pod {} has no /debug/syncz: it is of another version than this culvert",
                replica.name
            ),
            Err(error) => {
                silent.push(format!("{error:#}"));
                continue;
            }
        };
        answered = true;
        for mut proxy in Vec::<Proxy>::deserialize(list)? {
            proxy.control_plane.clone_from(&replica.name);
            proxy.connected = true;
            all.push(proxy);
        }
    }
    if !answered {
        let why = if silent.is_empty() { String::new() } else { format!(" ({})", silent.join("; ")) };
        let is = if replicas.iter().any(|r| r.ready) { "answers" } else { "is ready" };
        bail!("no culvertd {is} in namespace {}{why}: `culvert status` says more", cluster.system);
    }
    Ok((all, silent))
}

/// Whether a proxy's id, `ztunnel~IP~POD.NAMESPACE~…`, names a pod.
fn is_pod(proxy: &Proxy, pod: &PodName) -> bool {
    proxy.id.split('~').nth(2) == Some(&format!("{}.{}", pod.name, pod.namespace))
}

/// The names of the nodes that are ready.
fn ready_nodes(nodes: &[Value]) -> BTreeSet<String> {
    let is = |c: &Value, key: &str, value: &str| c.get(key).and_then(Value::as_str) == Some(value);
    let ready = |node: &&Value| {
        let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
        conditions.into_iter().flatten().any(|c| is(c, "type", "Ready") && is(c, "status", "True"))
    };
    let name = |node: &Value| node.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
    nodes.iter().filter(ready).filter_map(name).collect()
}

/// How a type is doing, in a word.
fn state(of: &Value) -> &'static str {
    let known = |key: &str| of.get(key).filter(|v| !v.is_null() && v.as_str() != Some(""));
    match (known("sent"), known("acked"), known("nack")) {
        (_, _, Some(_)) => "NACKED",
        (None, _, None) => "NOT SENT",
        (Some(sent), Some(acked), None) if sent == acked => "SYNCED",
        _ => "STALE",
    }
}

fn table(proxies: &[Proxy], wide: bool) -> Table {
    let mut heading = vec!["NODE", "PROXY", "VERSION", "WORKLOADS", "POLICIES", "CONTROL PLANE"];
    if wide {
        heading.extend(["ADDRESS", "CONNECTED SINCE", "REFUSED BECAUSE"]);
    }
    let mut table = Table::new(&heading);
    for p in proxies {
        let shown = |names: &[&str]| {
            let found = names.iter().find_map(|name| p.types.get(*name));
            let word = match (p.connected, p.unknown, p.node_away) {
                (true, ..) => found.map_or("NOT SENT", state),
                (false, true, _) => "NOT KNOWN",
                (false, false, true) => "NODE NOT READY",
                (false, false, false) => "NOT CONNECTED",
            };
            match found.and_then(|of| of.get("sent")).filter(|_| wide) {
                Some(Value::String(version)) => format!("{word} {version}"),
                Some(version) => format!("{word} {version}"),
                None => word.to_owned(),
            }
        };
        let name = p.id.split('~').nth(2).unwrap_or(&p.id).to_owned();
        let mut row = vec![
            p.node.clone(),
            name,
            p.version.clone().unwrap_or_default(),
            shown(&[ADDRESS, WORKLOAD]),
            shown(&[AUTHORIZATION]),
            p.control_plane.clone(),
        ];
        if wide {
            let refusals = p.types.values().filter_map(|of| of.get("nack")?.as_str());
            row.extend([
                p.address.clone(),
                p.connected_since.clone(),
                refusals.collect::<Vec<_>>().join("; "),
            ]);
        }
        table.row(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_was_acknowledged_is_synced() {
        assert_eq!(state(&json!({})), "NOT SENT");
        assert_eq!(state(&json!({"sent": "2"})), "STALE");
        assert_eq!(state(&json!({"sent": "2", "acked": "1"})), "STALE");
        assert_eq!(state(&json!({"sent": 2, "acked": 2, "nack": null})), "SYNCED");
        assert_eq!(state(&json!({"sent": "2", "acked": "1", "nack": "no"})), "NACKED");
    }

    #[test]
    fn a_proxy_that_is_not_connected_has_a_row_of_its_own() {
        let list = json!([{
            "id": "ztunnel~10.0.0.5~ztunnel-a.culvert-system~culvert-system.svc.cluster.local", "node": "node1",
            "version": "0.1.0", "types": {ADDRESS: {"sent": "7", "acked": "7"}}, "future": 1,
        }]);
        let mut proxies = Vec::<Proxy>::deserialize(list).unwrap();
        proxies[0].connected = true;
        let pod = |name: &str| PodName {
            namespace: "culvert-system".into(),
            name: name.into(),
            ..PodName::default()
        };
        assert!(is_pod(&proxies[0], &pod("ztunnel-a")) && !is_pod(&proxies[0], &pod("ztunnel-b")));
        proxies.push(Proxy {
            id: "ztunnel-b.culvert-system".into(),
            node: "node2".into(),
            ..Proxy::default()
        });
        proxies.push(Proxy { id: "ztunnel-c.culvert-system".into(), node_away: true, ..Proxy::default() });
        proxies.push(Proxy { id: "ztunnel-d.culvert-system".into(), unknown: true, ..Proxy::default() });
        let text = table(&proxies, true).to_string();
        let lines: Vec<_> = text.lines().collect();
        assert!(
            lines[1].contains("node1") && lines[1].contains("SYNCED 7") && lines[1].contains("NOT SENT"),
            "{text}"
        );
        assert!(lines[2].contains("NOT CONNECTED"), "{text}");
        assert!(lines[3].contains("NODE NOT READY"), "{text}");
        assert!(lines[4].contains("NOT KNOWN"), "{text}");
        assert_eq!(serde_json::to_value(&proxies[0]).unwrap()["future"], 1);
    }

    #[test]
    fn a_node_is_ready_that_says_so() {
        let node = |name: &str, ready: &str| {
            let conditions =
                json!([{"type": "DiskPressure", "status": "True"}, {"type": "Ready", "status": ready}]);
            json!({"metadata": {"name": name}, "status": {"conditions": conditions}})
        };
        let nodes = [node("a", "True"), node("b", "Unknown"), json!({"metadata": {"name": "c"}})];
        assert_eq!(ready_nodes(&nodes), BTreeSet::from(["a".to_owned()]));
    }
}
