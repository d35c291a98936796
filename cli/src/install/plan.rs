//! What Helm would apply, looked at before it does: what must not be found out halfway.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cluster::{Cluster, MeshSettings};
use crate::yaml;

/// Pods that are named of many.
const SHOWN_PODS: usize = 10;

/// The objects of a release, as Helm has rendered them.
#[derive(Debug)]
pub struct Plan(Vec<Value>);

impl Plan {
    /// Of Helm's answer, a release as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn read(release: &str) -> Result<Self> {
        let release: Value = serde_json::from_str(release).context("Helm's answer is no JSON")?;
        let manifest =
            release.get("manifest").and_then(Value::as_str).context("Helm's answer has no manifest")?;
        Ok(Self(yaml::read(manifest).context("what Helm has rendered")?))
    }

    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        let is = move |object: &&Value| object.get("kind").and_then(Value::as_str) == Some(kind);
        self.0.iter().filter(is)
    }

    /// That a control plane could read the mesh's settings: one that is at work would keep those that it has, and one that starts
    /// would wait.
    ///
    /// # Errors
    /// It could not; nothing was changed.
    pub fn check_settings(&self, system: &str) -> Result<()> {
        for map in self.of_kind("ConfigMap").filter(|map| map.pointer("/data/mesh").is_some()) {
            let found = MeshSettings::of(system, map.clone())?;
            if !found.errors.is_empty() {
                bail!(
                    "nothing was changed, since no control plane could read the mesh's settings (value meshConfig): {}",
                    found.errors.join("; ")
                );
            }
        }
        Ok(())
    }

    /// That none of `there`, the nodes' parts of the release, would go while pods are captured.
    ///
    /// # Errors
    /// One would; nothing was changed.
    pub fn check_nodes(
        &self,
        there: &[String],
        captured: impl FnOnce() -> Result<Vec<String>>,
    ) -> Result<()> {
        let name = |set: &Value| set.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
        let stay: Vec<String> = self.of_kind("DaemonSet").filter_map(name).collect();
        let gone: Vec<&str> = there.iter().filter(|name| !stay.contains(name)).map(String::as_str).collect();
        if gone.is_empty() {
            return Ok(());
        }
        let captured = captured()?;
        if !captured.is_empty() {
            bail!(
                "nothing was changed: with these values DaemonSet {} would go, and {}",
                gone.join(", "),
                in_need(&captured)
            );
        }
        Ok(())
    }

    /// That nobody else has edited the settings since Helm applied them: Helm 4 would refuse to take them back, after it had changed
    /// other objects.
    ///
    /// # Errors
    /// Somebody has; nothing was changed.
    pub fn check_edits(&self, there: &[MeshSettings]) -> Result<()> {
        for map in self.of_kind("ConfigMap") {
            let name = map.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            let edited = there.iter().find(|settings| settings.name == name);
            if let Some(by) = edited.and_then(|settings| settings.edited_by.as_ref()) {
                bail!(
                    "nothing was changed: ConfigMap {name} was edited by {by} since Helm applied it. Take what it says into the \
                     values meshConfig, and have Helm take it back with --force-conflicts"
                );
            }
        }
        Ok(())
    }
}

/// Which pods can't do without the nodes' parts, and what becomes of them.
pub fn in_need(captured: &[String]) -> String {
    let shown: Vec<_> = captured.iter().take(SHOWN_PODS).map(String::as_str).collect();
    let more = if captured.len() > shown.len() { ", ..." } else { "" };
    let names = if shown.is_empty() { String::new() } else { format!(" ({}{more})", shown.join(", ")) };
    format!(
        "{} pods are captured{names}. Without the mesh they go on in plaintext, and are refused on a node whose agent does not \
         run. Take them out first: remove the label {} from namespaces and pods",
        captured.len(),
        crate::status::MODE
    )
}

/// Which pods would stay in the mesh after their namespaces have left.
///
/// # Errors
/// The server can't be asked.
pub fn by_own_label(cluster: &Cluster, captured: impl Fn(&Value) -> Option<String>) -> Result<Vec<String>> {
    let label = crate::status::MODE.replace('/', "%2F");
    let pods = cluster.list(&format!("/api/v1/pods?labelSelector={label}%3Dambient"))?;
    Ok(pods.iter().filter_map(captured).take(SHOWN_PODS).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(mesh: &str) -> Plan {
        let manifest = format!(
            "---\n# Source: a\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: culvert, namespace: s}}\ndata:\n  mesh: |-\n    \
             {mesh}\n---\napiVersion: apps/v1\nkind: DaemonSet\nmetadata: {{name: ztunnel}}\n"
        );
        Plan::read(&json!({ "name": "culvert", "manifest": manifest }).to_string()).unwrap()
    }

    #[test]
    fn settings_that_nobody_could_read_are_refused() {
        plan("trustDomain: example.org").check_settings("s").unwrap();
        let error = plan("nope: 1").check_settings("s").unwrap_err().to_string();
        assert!(error.contains("nothing was changed") && error.contains("nope"), "{error}");
    }

    #[test]
    fn the_nodes_parts_stay_while_pods_are_captured() {
        let pods = || Ok(vec!["shop/cart".to_owned()]);
        let both = ["culvert-node".to_owned(), "ztunnel".to_owned()];
        plan("").check_nodes(&both[1..], pods).unwrap();
        plan("").check_nodes(&both, || Ok(Vec::new())).unwrap();
        let error = plan("").check_nodes(&both, pods).unwrap_err().to_string();
        assert!(error.contains("DaemonSet culvert-node would go") && error.contains("shop/cart"), "{error}");
    }
}
