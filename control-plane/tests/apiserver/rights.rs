//! Which of an account's rights were used, by the API server's audit log.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Cluster;

/// What of the rights nobody used so far, but for those in `otherwise`, and what was asked for without the right.
pub fn compare(cluster: &Cluster, rights: &str, otherwise: &[&str]) -> (BTreeSet<String>, BTreeSet<String>) {
    let log = std::fs::read_to_string(cluster.at("audit.log")).unwrap_or_default();
    let mut forbidden = BTreeSet::new();
    let mut used = BTreeSet::new();
    for line in log.lines() {
        let Ok(event) = serde_json::from_str::<Value>(line) else { continue };
        let decision = event["annotations"]["authorization.k8s.io/decision"].as_str();
        let is_ours = event["user"]["username"] == "system:serviceaccount:culvert-system:culvertd";
        let (Some(decision), true) = (decision, is_ours && event["objectRef"].is_object()) else { continue };
        let text = |field: &str| event["objectRef"][field].as_str().unwrap_or_default().to_owned();
        let sub = event["objectRef"]["subresource"].as_str().map(|sub| format!("/{sub}")).unwrap_or_default();
        let what = format!("{}/{}{sub}", text("apiGroup"), text("resource"));
        let verb = event["verb"].as_str().unwrap();
        if decision == "allow" {
            used.insert((format!("{what} {verb}"), text("namespace"), text("name")));
        } else {
            forbidden.insert(format!("{what} {verb} {} {}", text("namespace"), text("name")));
        }
    }
    let objects = cluster.kubectl(&["create", "--dry-run=client", "-o", "json", "-f", "-"], rights).unwrap();
    let mut unused = BTreeSet::new();
    for object in serde_json::Deserializer::from_str(&objects).into_iter::<Value>() {
        let object = object.unwrap();
        let items = object["items"].as_array().cloned().unwrap_or_else(|| vec![object]);
        for role in items {
            let namespace = role["metadata"]["namespace"].as_str().unwrap_or_default();
            for rule in role["rules"].as_array().into_iter().flatten() {
                unused.extend(not_used(rule, namespace, &used, otherwise));
            }
        }
    }
    (unused, forbidden)
}

fn not_used(
    rule: &Value,
    namespace: &str,
    used: &BTreeSet<(String, String, String)>,
    otherwise: &[&str],
) -> Vec<String> {
    let list = |field: &str| {
        let items = rule[field].as_array().into_iter().flatten();
        items.map(|item| item.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let names = list("resourceNames");
    let mut found = Vec::new();
    for group in list("apiGroups") {
        for resource in list("resources") {
            for verb in list("verbs") {
                let what = format!("{group}/{resource} {verb}");
                let fits = |(asked, within, name): &(String, String, String)| {
                    *asked == what
                        && (namespace.is_empty() || within == namespace)
                        && (names.is_empty() || names.contains(name))
                };
                if !otherwise.contains(&what.as_str()) && !used.iter().any(fits) {
                    found.push(what);
                }
            }
        }
    }
    found
}
