//! `culvert status`: what is installed, and how it is; which namespaces and pods are in the mesh; which policies are not
//! enforced by all proxies, as their status says.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use crate::cluster::{Cluster, ClusterArgs};
use crate::health::{self, Check, State};
use crate::table::{Output, Table, print, printable};

/// The label that puts a namespace or a pod into the mesh.
pub const MODE: &str = "istio.io/dataplane-mode";
/// What the node agent writes on a pod whose traffic is captured.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// How the mesh is: its parts, and what is in it; the exit code is 1 where something is not ready
#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// A namespace with pods that are, or are to be, in the mesh.
#[derive(Clone, Debug, Default, Serialize)]
struct Membership {
    /// How many pods ask to be in the mesh, by their own label or their namespace's.
    wanted: usize,
    /// Of how many of them the node agent says that their traffic is captured.
    captured: usize,
    /// Pods of the namespace that have a sidecar, which are left alone.
    sidecars: usize,
}

/// What the status of the mesh's policies says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Policies {
    /// How many all proxies enforce.
    enforced: usize,
    /// The others, and what is said of them.
    others: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Status {
    ready: bool,
    checks: Vec<Check>,
    namespaces: BTreeMap<String, Membership>,
    policies: Policies,
}

/// The kinds of policies, and where the API server has them.
const POLICIES: [(&str, &str); 2] = [
    ("AuthorizationPolicy", "/apis/security.istio.io/v1/authorizationpolicies"),
    ("PeerAuthentication", "/apis/security.istio.io/v1/peerauthentications"),
];
/// How many policies are shown that are not enforced.
const MOST_POLICIES: usize = 20;

/// Runs the command.
pub fn run(args: &StatusArgs) -> Result<ExitCode> {
    let cluster = Cluster::connect(&args.cluster)?;
    let checks = health::look(&cluster)?;
    let namespaces = memberships(&cluster.list("/api/v1/namespaces")?, &cluster.list("/api/v1/pods")?);
    let ready = checks.iter().all(|c| c.state == State::Ready);
    let mut policies = Policies::default();
    for (kind, path) in POLICIES {
        cluster.list(path)?.iter().for_each(|policy| policies.add(kind, policy));
    }
    let status = Status { ready, checks, namespaces, policies };
    match args.output.document(&status)? {
        Some(document) => print(&document)?,
        None => print(&text(&status)?)?,
    }
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(status: &Status) -> Result<String> {
    let mut text = checks(&status.checks)?;
    if status.namespaces.is_empty() {
        writeln!(
            text,
            "\nno namespace is in the mesh: kubectl label namespace NAME {MODE}=ambient puts one into it"
        )?;
        return Ok(text);
    }
    let mut table = Table::new(&["NAMESPACE", "PODS IN THE MESH", "CAPTURED", "WITH A SIDECAR"]);
    for (name, of) in &status.namespaces {
        table.row([name.clone(), of.wanted.to_string(), of.captured.to_string(), of.sidecars.to_string()]);
    }
    write!(text, "\n{table}")?;
    let Policies { enforced, others } = &status.policies;
    if enforced + others.len() > 0 {
        writeln!(text, "\n{enforced} of {} policies are enforced by all proxies", enforced + others.len())?;
    }
    for (name, said) in others.iter().take(MOST_POLICIES) {
        writeln!(text, "{}: {}", printable(name), printable(said))?;
    }
    if others.len() > MOST_POLICIES {
        writeln!(text, "and {} more: -o json has all", others.len() - MOST_POLICIES)?;
    }
    Ok(text)
}

impl Policies {
    fn add(&mut self, kind: &str, policy: &Value) {
        let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let conditions = policy.pointer("/status/conditions").and_then(Value::as_array);
        let enforced = conditions.into_iter().flatten().find(|c| text(c, "type") == "Enforced");
        // What was said of an older version says nothing of this one.
        let generation = policy.pointer("/metadata/generation");
        let enforced = enforced.filter(|c| c.get("observedGeneration") == generation);
        if enforced.is_some_and(|c| text(c, "status") == "True") {
            self.enforced += 1;
            return;
        }
        let metadata = policy.get("metadata").unwrap_or(&Value::Null);
        let name = format!("{kind} {}/{}", text(metadata, "namespace"), text(metadata, "name"));
        let nothing = || "nothing is said of this version yet".to_owned();
        self.others.insert(name, enforced.map_or_else(nothing, |c| text(c, "message")));
    }
}

/// The checks as people read them, each with what to do.
///
/// # Errors
/// None that a string could have.
pub fn checks(checks: &[Check]) -> Result<String> {
    let mut table = Table::new(&["PART", "STATE", "DETAIL"]);
    for check in checks {
        table.row([check.what.clone(), check.state.as_str().to_owned(), check.detail.clone()]);
    }
    let mut text = table.to_string();
    for check in checks.iter().filter(|c| !c.remedy.is_empty()) {
        writeln!(text, "{}: {}", printable(&check.what), printable(&check.remedy))?;
    }
    Ok(text)
}

fn memberships(namespaces: &[Value], pods: &[Value]) -> BTreeMap<String, Membership> {
    let text = |v: &Value, path: &[&str]| {
        let found = path.iter().try_fold(v, |v, key| v.get(key));
        found.and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let modes: BTreeMap<_, _> = namespaces
        .iter()
        .map(|n| (text(n, &["metadata", "name"]), text(n, &["metadata", "labels", MODE])))
        .collect();
    let mut found: BTreeMap<String, Membership> = BTreeMap::new();
    for (name, _) in modes.iter().filter(|(_, mode)| *mode == "ambient") {
        found.entry(name.clone()).or_default();
    }
    for pod in pods {
        let namespace = text(pod, &["metadata", "namespace"]);
        if ["Succeeded", "Failed"].contains(&text(pod, &["status", "phase"]).as_str()) {
            continue;
        }
        let own = text(pod, &["metadata", "labels", MODE]);
        let of_namespace = modes.get(&namespace).is_some_and(|mode| mode == "ambient");
        let host = pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) == Some(true);
        let asked = own == "ambient" || of_namespace && own != "none";
        let captured = text(pod, &["metadata", "annotations", REDIRECTION]) == "enabled";
        let sidecar = !text(pod, &["metadata", "annotations", "sidecar.istio.io/status"]).is_empty();
        if !asked && !captured {
            continue;
        }
        let of = found.entry(namespace).or_default();
        of.sidecars += usize::from(sidecar);
        of.wanted += usize::from(asked && !host && !sidecar);
        of.captured += usize::from(captured);
    }
    found
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn policies_are_enforced_whose_status_says_so_of_this_version() {
        let policy = |name: &str, status: &str, observed: i64| {
            json!({
                "metadata": {"namespace": "shop", "name": name, "generation": 2},
                "status": {"conditions": [
                    {"type": "ZtunnelAccepted", "status": "True", "observedGeneration": 2},
                    {"type": "Enforced", "status": status, "observedGeneration": observed, "message": "1/2 proxies"},
                ]},
            })
        };
        let mut policies = Policies::default();
        for (name, status, observed) in
            [("a", "True", 2), ("b", "False", 2), ("c", "True", 1), ("d", "Unknown", 2)]
        {
            policies.add("AuthorizationPolicy", &policy(name, status, observed));
        }
        let said: Vec<_> =
            policies.others.iter().map(|(name, said)| (name.as_str(), said.as_str())).collect();
        let old = "nothing is said of this version yet";
        assert_eq!(policies.enforced, 1);
        assert_eq!(
            said,
            [
                ("AuthorizationPolicy shop/b", "1/2 proxies"),
                ("AuthorizationPolicy shop/c", old),
                ("AuthorizationPolicy shop/d", "1/2 proxies"),
            ]
        );
    }

    #[test]
    fn pods_are_counted_by_what_they_and_their_namespace_ask_for() {
        let namespaces = [
            json!({"metadata": {"name": "shop", "labels": {MODE: "ambient"}}}),
            json!({"metadata": {"name": "other"}}),
            json!({"metadata": {"name": "empty", "labels": {MODE: "ambient"}}}),
        ];
        let pod = |namespace: &str, label: &str, annotations: Value, host: bool| {
            json!({
                "metadata": {"namespace": namespace, "labels": {MODE: label}, "annotations": annotations},
                "spec": {"hostNetwork": host}, "status": {"phase": "Running"},
            })
        };
        let pods = [
            pod("shop", "", json!({REDIRECTION: "enabled"}), false),
            pod("shop", "", json!({REDIRECTION: "pending"}), false),
            pod("shop", "none", json!({}), false),
            pod("shop", "", json!({}), true),
            pod("shop", "", json!({"sidecar.istio.io/status": "{}"}), false),
            pod("other", "ambient", json!({REDIRECTION: "enabled"}), false),
            pod("other", "", json!({}), false),
        ];
        let found = memberships(&namespaces, &pods);
        let of = |name: &str| found.get(name).map(|m| (m.wanted, m.captured, m.sidecars));
        assert_eq!(of("shop"), Some((2, 1, 1)));
        assert_eq!(of("other"), Some((1, 1, 0)));
        assert_eq!(of("empty"), Some((0, 0, 0)));
        assert_eq!(found.len(), 3);
    }
}
