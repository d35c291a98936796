//! NetworkPolicies that stand in the mesh's way. Between pods of the mesh all connections go to port 15008 of the
//! destination, whatever port the client dialled; a policy that lists the application's ports lets none of them
//! through. The kubelet's probes can come from the address 169.254.7.127.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

/// The port that a policy has to let through.
const HBONE: i64 = 15008;

/// What is the matter with one policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// `NAMESPACE/NAME`.
    pub policy: String,
    /// What it does not let through.
    pub what: String,
    /// What to add to it.
    pub remedy: String,
}

fn rules<'v>(policy: &'v Value, direction: &str) -> &'v [Value] {
    policy.pointer(&format!("/spec/{direction}")).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Whether a rule lets the port through, from whomever it is for. One without ports lets all through.
fn covers(rule: &Value) -> bool {
    let ports = rule.get("ports").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    ports.is_empty()
        || ports.iter().any(|p| {
            let tcp = p.get("protocol").and_then(Value::as_str).is_none_or(|protocol| protocol == "TCP");
            let first = p.get("port").and_then(Value::as_i64);
            let last = p.get("endPort").and_then(Value::as_i64).or(first);
            // A name is of a container's port, and no container has this one.
            let any = p.get("port").is_none_or(Value::is_null);
            tcp && (any || first.is_some_and(|f| f <= HBONE) && last.is_some_and(|l| l >= HBONE))
        })
}

/// Whether a rule can be about connections between pods of the mesh: about TCP other than DNS, and not only about
/// addresses outside.
fn concerns(rule: &Value, side: &str, pods: &[IpAddr]) -> bool {
    let list = |key: &str| rule.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let is_outside = |peer: &Value| peer.get("ipBlock").is_some_and(|block| !has_pods(block, pods));
    let outside = !list(side).is_empty() && list(side).iter().all(is_outside);
    let tcp = |p: &Value| p.get("protocol").and_then(Value::as_str).is_none_or(|protocol| protocol == "TCP");
    let dns = |p: &Value| p.get("port").and_then(Value::as_i64) == Some(53);
    !outside && list("ports").iter().any(|p| tcp(p) && !dns(p))
}

/// Whether a block of addresses is of pods. Who names all addresses means those outside, as a rule.
fn has_pods(block: &Value, pods: &[IpAddr]) -> bool {
    let Ok(range) = names(block, "/cidr").parse::<IpNet>() else { return false };
    let but = block.get("except").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let but: Vec<IpNet> = but.iter().filter_map(|range| range.as_str()?.parse().ok()).collect();
    let is_within = |ip: &IpAddr| range.contains(ip) && !but.iter().any(|out| out.contains(ip));
    range.prefix_len() > 0 && pods.iter().any(is_within)
}

fn names<'v>(policy: &'v Value, path: &str) -> &'v str {
    policy.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn applies(policy: &Value, kind: &str, direction: &str) -> bool {
    match policy.pointer("/spec/policyTypes").and_then(Value::as_array) {
        Some(types) => types.iter().any(|t| t.as_str() == Some(kind)),
        // What the API server fills in (networking.k8s.io/v1): Ingress always, Egress where there are rules of it.
        None => kind == "Ingress" || !rules(policy, direction).is_empty(),
    }
}

/// Whether another policy for at least the same pods lets the port through for at least the same peers: policies add up.
fn made_good(policy: &Value, rule: &Value, side: &str, direction: &str, others: &[Value]) -> bool {
    others.iter().any(|other| {
        let same_namespace = names(other, "/metadata/namespace") == names(policy, "/metadata/namespace");
        let selector = other.pointer("/spec/podSelector");
        let everything = selector.is_none_or(|s| s.as_object().is_none_or(serde_json::Map::is_empty));
        let same_pods = everything || selector == policy.pointer("/spec/podSelector");
        let same_peers = |r: &Value| {
            r.get(side).is_none_or(|p| p.as_array().is_none_or(Vec::is_empty))
                || r.get(side) == rule.get(side)
        };
        same_namespace && same_pods && rules(other, direction).iter().any(|r| covers(r) && same_peers(r))
    })
}

/// What is in the way, among the policies of namespaces that are in the mesh; `pods` are the addresses of pods.
#[must_use]
pub fn findings(policies: &[Value], in_mesh: &dyn Fn(&str) -> bool, pods: &[IpAddr]) -> Vec<Finding> {
    let mut found = Vec::new();
    for policy in policies.iter().filter(|p| in_mesh(names(p, "/metadata/namespace"))) {
        let name = format!("{}/{}", names(policy, "/metadata/namespace"), names(policy, "/metadata/name"));
        for (kind, direction, side) in [("Ingress", "ingress", "from"), ("Egress", "egress", "to")] {
            if !applies(policy, kind, direction) {
                continue;
            }
            let closed = rules(policy, direction).iter().filter(|r| {
                concerns(r, side, pods) && !covers(r) && !made_good(policy, r, side, direction, policies)
            });
            let closed = closed.count();
            if closed > 0 {
                found.push(Finding {
                    policy: name.clone(),
                    what: format!(
                        "{closed} of its {direction} rules list ports, and not {HBONE}: connections between pods of \
                         the mesh go to that port"
                    ),
                    remedy: format!("add `- port: {HBONE}` to the rules' ports"),
                });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "callers write it in place")]
    fn policy(name: &str, spec: Value) -> Value {
        json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec})
    }

    fn found(policies: &[Value]) -> Vec<String> {
        let pods = ["10.244.1.7", "fd00:1::7"].map(|ip| ip.parse().unwrap());
        findings(policies, &|n| n == "shop", &pods).into_iter().map(|f| f.policy).collect()
    }

    #[test]
    fn a_rule_with_ports_needs_the_tunnels_port() {
        let web = |ports: Value| policy("web", json!({"podSelector": {}, "ingress": [{"ports": ports}]}));
        assert_eq!(found(&[web(json!([{"port": 80}]))]), ["shop/web"]);
        assert_eq!(found(&[web(json!([{"port": "http"}]))]), ["shop/web"]);
        let mixed = json!([{"port": 80}, {"port": 15008, "protocol": "UDP"}]);
        assert_eq!(found(&[web(mixed)]), ["shop/web"]);
        for fine in [
            json!([]),
            json!([{"port": 80}, {"port": 15008}]),
            json!([{"port": 1, "endPort": 65535}]),
            json!([{"protocol": "TCP"}]),
        ] {
            assert_eq!(found(&[web(fine.clone())]), [""; 0], "{fine}");
        }
    }

    #[test]
    fn what_another_policy_lets_through_is_let_through() {
        let from = json!([{"podSelector": {"matchLabels": {"app": "batch"}}}]);
        let selector = json!({"matchLabels": {"app": "web"}});
        let rule = |port: u16| json!([{"from": from, "ports": [{"port": port}]}]);
        let web = policy("web", json!({"podSelector": selector, "ingress": rule(80)}));
        let same = policy("mesh", json!({"podSelector": selector, "ingress": rule(15008)}));
        let all = policy("mesh", json!({"podSelector": {}, "ingress": [{"ports": [{"port": 15008}]}]}));
        let others = policy(
            "mesh",
            json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [{"ports": [{"port": 15008}]}]}),
        );
        assert_eq!(found(&[web.clone(), same]), [""; 0]);
        assert_eq!(found(&[web.clone(), all]), [""; 0]);
        assert_eq!(found(&[web, others]), ["shop/web"]);
    }

    #[test]
    fn a_block_of_addresses_counts_where_pods_have_them() {
        let web = |block: Value| {
            let rule = json!([{"from": [{"ipBlock": block}], "ports": [{"port": 80}]}]);
            policy("web", json!({"podSelector": {}, "ingress": rule}))
        };
        for block in
            [json!({"cidr": "10.244.0.0/16"}), json!({"cidr": "fd00:1::/64", "except": ["fd00:2::/64"]})]
        {
            assert_eq!(found(&[web(block.clone())]), ["shop/web"], "{block}");
        }
        for block in [
            json!({"cidr": "192.0.2.0/24"}),
            json!({"cidr": "10.0.0.0/8", "except": ["10.244.0.0/16"]}),
            json!({"cidr": "0.0.0.0/0"}),
            json!({}),
        ] {
            assert_eq!(found(&[web(block.clone())]), [""; 0], "{block}");
        }
    }

    #[test]
    fn egress_counts_and_namespaces_outside_the_mesh_do_not() {
        let egress =
            json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"ports": [{"port": 443}]}]});
        assert_eq!(found(&[policy("out", egress.clone())]), ["shop/out"]);
        let mut outside = policy("out", egress);
        outside["metadata"]["namespace"] = "other".into();
        assert_eq!(found(&[outside]), [""; 0]);
        // DNS and the outside are not reached through the mesh.
        let dns = json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [
            {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}]},
            {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]},
        ]});
        assert_eq!(found(&[policy("dns", dns)]), [""; 0]);
        // What denies all is meant to.
        assert_eq!(found(&[policy("none", json!({"podSelector": {}, "policyTypes": ["Ingress"]}))]), [""; 0]);
    }
}
