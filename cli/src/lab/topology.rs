//! Namespaces, links, addresses and routes, made with `ip`.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result};

use super::{Lab, NodeId, Pod, command, state};
use crate::netns;

/// The resolver that the pods' resolv.conf names. Nothing has the address: enrolled pods' queries are captured.
pub const RESOLVER: &str = "10.96.0.10";

pub(super) fn build(lab: &Lab) -> Result<()> {
    let nodes = NodeId::ALL;
    let mut script = String::new();
    for namespace in lab.namespaces() {
        writeln!(script, "netns add {namespace}")?;
    }
    command::feed(&["ip", "-batch", "-"], &script).context("cannot make network namespaces")?;
    // Before any interface: they take their settings from `default` when they are made.
    for node in nodes {
        set_sysctls(&lab.node_netns(node), NODE)?;
    }
    for pod in lab.pods() {
        set_sysctls(&pod.netns, POD)?;
        resolver(pod)?;
    }
    let [one, two] = nodes.map(|n| lab.node_netns(n));
    let uplink = format!("link add uplink type veth peer name uplink netns {two}");
    command::feed(&["ip", "-n", &one, "-batch", "-"], &uplink)?;
    for node in nodes {
        command::feed(&["ip", "-n", &lab.node_netns(node), "-batch", "-"], &node_script(lab, node)?)?;
    }
    for pod in lab.pods() {
        command::feed(&["ip", "-n", &pod.netns, "-batch", "-"], &pod_script(pod)?)?;
    }
    Ok(())
}

/// Addresses are fixed and known to be free, so no time is spent on finding duplicates. A port is given out again
/// a second after its connection ended, else a measurement of new connections runs out of them.
const POD: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv4/ip_local_port_range", "10000 65000"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/core/somaxconn", "4096"),
];
const NODE: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
];

/// `/proc/sys/net` shows the namespace of the thread that opens a file of it.
fn set_sysctls(namespace: &str, values: &[(&str, &str)]) -> Result<()> {
    netns::run_in(Some(&netns::path_of(namespace)), || {
        for (key, value) in values {
            let path = format!("/proc/sys/{key}");
            fs::write(&path, value).with_context(|| format!("cannot write {value} to {path}"))?;
        }
        Ok(())
    })?
}

fn resolver(pod: &Pod) -> Result<()> {
    let dir = state::etc(&pod.netns);
    let namespace = pod.plan.namespace;
    let text = format!(
        "nameserver {RESOLVER}\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\n\
         options ndots:5 timeout:2 attempts:1\n"
    );
    fs::create_dir_all(&dir)
        .and_then(|()| fs::write(dir.join("resolv.conf"), text))
        .with_context(|| format!("cannot write {}", dir.display()))
}

fn node_script(lab: &Lab, node: NodeId) -> Result<String> {
    let mut script =
        String::from("link set lo up\nlink add cbr0 type bridge\nlink set cbr0 up\nlink set uplink up\n");
    writeln!(script, "addr add {}/24 dev cbr0", node.pod_v4(1))?;
    writeln!(script, "addr add {}/64 dev cbr0 nodad", node.pod_v6(1))?;
    writeln!(script, "addr add {}/24 dev uplink", node.uplink_v4())?;
    writeln!(script, "addr add {}/64 dev uplink nodad", node.uplink_v6())?;
    for other in NodeId::ALL.into_iter().filter(|n| *n != node) {
        writeln!(script, "route add {}/24 via {}", other.pod_v4(0), other.uplink_v4())?;
        writeln!(script, "route add {}/64 via {}", other.pod_v6(0), other.uplink_v6())?;
    }
    for pod in lab.pods().iter().filter(|p| p.plan.node == node) {
        let device = format!("veth-{}", pod.plan.name);
        writeln!(script, "link add {device} type veth peer name eth0 netns {}", pod.netns)?;
        writeln!(script, "link set {device} master cbr0 up")?;
    }
    Ok(script)
}

fn pod_script(pod: &Pod) -> Result<String> {
    let node = pod.plan.node;
    let mut script = String::from("link set lo up\nlink set eth0 up\n");
    writeln!(script, "addr add {}/24 dev eth0", pod.v4)?;
    writeln!(script, "addr add {}/64 dev eth0 nodad", pod.v6)?;
    writeln!(script, "route add default via {}", node.pod_v4(1))?;
    writeln!(script, "route add default via {}", node.pod_v6(1))?;
    Ok(script)
}
