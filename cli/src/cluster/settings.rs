//! The settings of the mesh as they stand in the cluster, read as a control plane would read them.

use std::collections::BTreeSet;

use anyhow::Result;
use config::diagnostic::{Diagnostic, Severity};
use config::policy::NamespaceSelector;
use config::policy::mesh_config;
use config::policy::state::SYSTEM_NAMESPACE;
use serde_json::Value;

use super::objects::{NamespaceLabels, Objects, name_of, selects};
use super::{Cluster, origin};

/// Of a revision: its ConfigMap, and what a control plane makes of it.
#[derive(Debug)]
pub struct MeshSettings {
    /// The ConfigMap's name.
    pub name: String,
    /// Why it can't be taken, each with what to do: a control plane keeps what it had before, and one that starts waits.
    pub errors: Vec<String>,
    /// Who else than Helm set them last, such as `kubectl-edit`.
    pub edited_by: Option<String>,
    selectors: Vec<NamespaceSelector>,
    /// Namespaces that are read whatever is selected.
    always: [String; 2],
}

impl MeshSettings {
    /// Those of all revisions in the mesh's namespace.
    ///
    /// # Errors
    /// They can't be listed, or one is no ConfigMap.
    pub fn all(cluster: &Cluster) -> Result<Vec<Self>> {
        let maps = maps(cluster)?;
        maps.into_iter().map(|map| Self::of(&cluster.system, map)).collect()
    }

    /// Reads a ConfigMap of the mesh's namespace, `system`.
    ///
    /// # Errors
    /// It is no ConfigMap.
    pub fn of(system: &str, map: Value) -> Result<Self> {
        let (name, edited_by) = (name_of(&map).to_owned(), edited_by(&map));
        let objects = Objects::of_settings(system, map);
        let mut repository = objects.repository(&BTreeSet::new())?;
        objects.stage(&mut repository, &BTreeSet::new(), &NamespaceLabels::default())?;
        repository.commit();
        let root = repository.settings().root_namespace.to_string();
        let errors = repository.diagnostics().into_iter().filter(|d| d.severity == Severity::Error);
        let errors = errors
            .map(|d| if d.remedy.is_empty() { d.message } else { format!("{} ({})", d.message, d.remedy) });
        Ok(Self {
            name,
            errors: errors.collect(),
            edited_by,
            selectors: repository.discovery().to_vec(),
            always: [system.to_owned(), root],
        })
    }

    /// Whether the objects of a namespace with these labels are read.
    pub fn selects(&self, namespace: &str, labels: &NamespaceLabels) -> bool {
        let [system, root] = &self.always;
        selects(&self.selectors, [system, root], namespace, labels)
    }
}

/// The ConfigMaps with the settings of all revisions.
///
/// # Errors
/// They can't be listed.
pub(super) fn maps(cluster: &Cluster) -> Result<Vec<Value>> {
    let path = format!("/api/v1/namespaces/{}/configmaps?labelSelector=app%3Dculvertd", cluster.system);
    let mut all = cluster.list(&path)?;
    all.retain(|map| map.pointer("/data/mesh").is_some());
    Ok(all)
}

/// Who else than Helm and these commands set the key `mesh` last, by the server's records of who manages which field.
fn edited_by(map: &Value) -> Option<String> {
    let managers = map.pointer("/metadata/managedFields").and_then(Value::as_array).into_iter().flatten();
    let owns = |entry: &&Value| entry.pointer("/fieldsV1/f:data/f:mesh").is_some();
    let names = managers.filter(owns).filter_map(|entry| entry.get("manager")?.as_str());
    names.filter(|name| !["helm", super::MANAGER].contains(name)).map(str::to_owned).next()
}

/// Has findings about the settings name the ConfigMap by its own name, and not by the one that the compiler knows settings by.
pub fn name_settings(diagnostics: &mut [Diagnostic], map: &str) {
    let known = origin_of_known();
    for diagnostic in diagnostics.iter_mut() {
        let Some(resource) = diagnostic.resource.as_mut().filter(|_| *diagnostic.file == *map) else {
            continue;
        };
        if resource.to_string() == known
            && let Some((namespace, name)) = map.strip_prefix("ConfigMap ").and_then(|of| of.split_once('/'))
        {
            (resource.namespace, resource.name) = (namespace.into(), name.into());
        }
    }
}

fn origin_of_known() -> String {
    let known =
        serde_json::json!({"metadata": {"namespace": SYSTEM_NAMESPACE, "name": mesh_config::CONFIG_MAP}});
    origin("ConfigMap", &known)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(mesh: &str) -> MeshSettings {
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "culvert", "namespace": "culvert-system"}, "data": {"mesh": mesh}});
        MeshSettings::of("culvert-system", map).unwrap()
    }

    #[test]
    fn what_a_control_plane_would_not_take_is_said() {
        assert_eq!(of("trustDomain: example.org").errors, [""; 0]);
        for wrong in [
            "nope: 1",
            "trustDomain: [1",
            "outboundTrafficPolicy: {mode: SOMETIMES}",
            "trustDomain: bad domain/",
        ] {
            let found = of(wrong).errors;
            assert!(found.len() == 1, "{wrong}: {found:?}");
        }
    }

    #[test]
    fn namespaces_are_selected_as_the_control_plane_selects_them() {
        let settings = of("discoverySelectors: [{matchLabels: {mesh: \"yes\"}}]");
        let labels = |value: &str| [("mesh".to_owned(), value.to_owned())].into();
        let labels: NamespaceLabels =
            [("a".to_owned(), labels("yes")), ("b".to_owned(), labels("no"))].into();
        let selected = ["a", "b", "c", "culvert-system"].map(|name| settings.selects(name, &labels));
        assert_eq!(selected, [true, false, false, true]);
    }

    #[test]
    fn who_edited_the_settings_is_known() {
        let fields = |name: &str, key: &str| json!({"manager": name, "fieldsV1": {"f:data": {key: {}}}});
        let map = |entries: Value| json!({"metadata": {"managedFields": entries}});
        assert_eq!(
            edited_by(&map(json!([fields("helm", "f:mesh"), fields("culvert", "f:revisionTags")]))),
            None
        );
        let edited = map(json!([fields("helm", "f:clusterDomain"), fields("kubectl-edit", "f:mesh")]));
        assert_eq!(edited_by(&edited).as_deref(), Some("kubectl-edit"));
    }
}
