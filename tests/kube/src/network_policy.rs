//! Enforces NetworkPolicies, which the bridge plugin does not: ingress, by pod and namespace labels and ports, as they
//! are when [`enforce`] is called. A scenario's cluster holds still while it looks, so nothing needs to be watched.
//!
//! As with the engines that clusters have, what the node itself sends to its pods (the kubelet's probes) passes.

use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value};

use crate::cluster::Cluster;
use crate::lab::NODES;
use crate::node;
use crate::process::feed;

const TABLE: &str = "inet kube-tests-policy";

/// While this is held, nobody else has policies enforced: whoever clears them clears all.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Loads the rules of all policies on both nodes.
///
/// # Errors
/// A policy has a field that is not known here, or the kernel refuses the rules.
pub fn enforce(cluster: &Cluster) -> Result<()> {
    let list = |kind: &str| -> Result<Vec<Value>> {
        let list = cluster.kubectl.get(&[kind, "--all-namespaces"])?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    };
    let rules = rules(&list("networkpolicies")?, &list("pods")?, &list("namespaces")?)?;
    load(cluster, &rules)
}

/// Takes all rules away.
///
/// # Errors
/// The kernel refuses.
pub fn clear(cluster: &Cluster) -> Result<()> {
    load(cluster, &format!("table {TABLE} {{}}\ndelete table {TABLE}\n"))
}

fn load(cluster: &Cluster, rules: &str) -> Result<()> {
    NODES.iter().try_for_each(|node| {
        let mut nft = node::shell(&cluster.lab, node, &["nft", "-f", "-"])?;
        feed(&mut nft, rules).map(drop).context("loading the rules of NetworkPolicies")
    })
}

fn rules(policies: &[Value], pods: &[Value], namespaces: &[Value]) -> Result<String> {
    let mut text = format!("table {TABLE} {{}}\ndelete table {TABLE}\ntable {TABLE} {{\n");
    let mut dispatch = String::new();
    for (number, pod) in pods.iter().enumerate() {
        let namespace = &pod["metadata"]["namespace"];
        let of_pod: Vec<&Value> = policies
            .iter()
            .filter(|p| p["metadata"]["namespace"] == *namespace && matches(&p["spec"]["podSelector"], pod))
            .filter(|p| p["spec"]["policyTypes"].as_array().is_none_or(|t| t.iter().any(|t| t == "Ingress")))
            .collect();
        if of_pod.is_empty() || pod["spec"]["hostNetwork"] == true {
            continue;
        }
        for address in addresses(pod) {
            let _ = writeln!(dispatch, "    {} daddr {address} jump pod-{number}", family(address));
        }
        let _ = writeln!(text, "  chain pod-{number} {{\n    ct state established,related accept");
        // IPv6 finds its neighbours by it.
        text.push_str("    meta l4proto ipv6-icmp accept\n");
        for rule in of_pod.iter().flat_map(|p| p["spec"]["ingress"].as_array().into_iter().flatten()) {
            for source in from(rule, namespace, pods, namespaces)? {
                let _ = writeln!(text, "    {source}{}accept", ports(rule)?);
            }
        }
        text.push_str("    drop\n  }\n");
    }
    let _ = write!(
        text,
        "  chain forward {{\n    type filter hook forward priority filter; policy accept;\n{dispatch}  }}\n}}\n"
    );
    Ok(text)
}

/// A pod's addresses, of both families.
fn addresses(pod: &Value) -> impl Iterator<Item = &str> {
    pod["status"]["podIPs"].as_array().into_iter().flatten().filter_map(|ip| ip["ip"].as_str())
}

fn family(address: &str) -> &'static str {
    if address.contains(':') { "ip6" } else { "ip" }
}

/// The matches on sources of a rule, one for each family; nobody is an address that nobody has.
fn from(rule: &Value, own: &Value, pods: &[Value], namespaces: &[Value]) -> Result<Vec<String>> {
    let Some(peers) = rule["from"].as_array() else { return Ok(vec![String::new()]) };
    let mut sources = vec!["192.0.2.1", "2001:db8::1"];
    for peer in peers {
        if !peer["ipBlock"].is_null() {
            bail!("ipBlock is not known to the tests' NetworkPolicies");
        }
        let here = |pod: &&Value| match &peer["namespaceSelector"] {
            Value::Null => pod["metadata"]["namespace"] == *own,
            selector => namespaces
                .iter()
                .any(|n| n["metadata"]["name"] == pod["metadata"]["namespace"] && matches(selector, n)),
        };
        let chosen = pods.iter().filter(here).filter(|pod| matches(&peer["podSelector"], pod));
        sources.extend(chosen.flat_map(addresses));
    }
    sources.sort_unstable();
    sources.dedup();
    let of = |wanted: &str| {
        let of_family: Vec<&str> = sources.iter().filter(|s| family(s) == wanted).copied().collect();
        format!("{wanted} saddr {{ {} }} ", of_family.join(", "))
    };
    Ok(vec![of("ip"), of("ip6")])
}

fn ports(rule: &Value) -> Result<String> {
    let Some(ports) = rule["ports"].as_array() else { return Ok(String::new()) };
    let mut numbers = Vec::new();
    for port in ports {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        let number = port["port"].as_u64().filter(|_| protocol == "TCP");
        numbers
            .push(number.with_context(|| format!("only TCP ports by number are known: {port}"))?.to_string());
    }
    Ok(format!("tcp dport {{ {} }} ", numbers.join(", ")))
}

/// Whether an object has the labels of a selector; an empty selector, or none, matches all.
fn matches(selector: &Value, object: &Value) -> bool {
    let none = Map::new();
    let wanted = selector["matchLabels"].as_object().unwrap_or(&none);
    wanted.iter().all(|(key, value)| object["metadata"]["labels"][key] == *value)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_selected_pod_is_closed_but_for_what_is_allowed() {
        let pod = |name: &str, namespace: &str, address: &str| {
            json!({"metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
                   "status": {"podIPs": [{"ip": address}, {"ip": address.replace("10.0.0.", "fd00::")}]}})
        };
        let pods =
            [pod("web", "a", "10.0.0.1"), pod("client", "a", "10.0.0.2"), pod("client", "b", "10.0.0.3")];
        let policy = |ingress: Value| {
            json!({"metadata": {"namespace": "a"},
                   "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "ingress": ingress}})
        };
        let client = json!({"podSelector": {"matchLabels": {"app": "client"}}});
        let one = policy(json!([{"from": [client], "ports": [{"port": 8080}, {"port": 15008}]}]));
        let text = rules(&[one], &pods, &[]).unwrap();
        let dispatched = "ip daddr 10.0.0.1 jump pod-0\n    ip6 daddr fd00::1 jump pod-0\n  }";
        assert!(text.contains(dispatched), "{text}");
        assert!(
            text.contains("    ip saddr { 10.0.0.2, 192.0.2.1 } tcp dport { 8080, 15008 } accept\n"),
            "{text}"
        );
        let allowed = "ip6 saddr { 2001:db8::1, fd00::2 } tcp dport { 8080, 15008 } accept\n    drop\n";
        assert!(text.contains(allowed), "{text}");

        let namespaces = [json!({"metadata": {"name": "b", "labels": {"team": "x"}}})];
        let other = policy(json!([{"from": [{"namespaceSelector": {"matchLabels": {"team": "x"}}}]}]));
        let text = rules(&[other], &pods, &namespaces).unwrap();
        assert!(text.contains("ip saddr { 10.0.0.3, 192.0.2.1 } accept\n"), "{text}");
        assert!(rules(&[policy(json!([{"from": [{"ipBlock": {}}]}]))], &pods, &[]).is_err());
        assert!(rules(&[policy(json!([{"ports": [{"port": "http"}]}]))], &pods, &[]).is_err());
    }
}
