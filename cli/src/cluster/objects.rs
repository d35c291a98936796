//! The objects of a cluster that the mesh reads, fed to the compiler as the control plane feeds them.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result};
use config::compile::{Options, Origin};
use config::json::ObjectSeed;
use config::policy::mesh_config;
use config::policy::state::SYSTEM_NAMESPACE;
use config::repository::{ObjectContent, Repository};
use config::resource::{KINDS, Kind, KindSpec};
use serde::de::DeserializeSeed;
use serde_json::Value;

use super::Cluster;

/// An object of the server.
#[derive(Debug)]
struct Object {
    spec: &'static KindSpec,
    /// What it is called in diagnostics: `KIND NAMESPACE/NAME`.
    origin: Arc<str>,
    value: Value,
}

impl Object {
    fn new(spec: &'static KindSpec, value: Value) -> Self {
        Self { spec, origin: origin(spec.name, &value).into(), value }
    }
}

/// What an object is called in diagnostics.
#[must_use]
pub fn origin(kind: &str, object: &Value) -> String {
    let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
    let slash = if namespace.is_empty() { "" } else { "/" };
    format!("{kind} {namespace}{slash}{name}")
}

/// An object, and the value of one of its labels.
#[derive(Debug)]
pub struct Labelled {
    /// What it is called: `KIND NAMESPACE/NAME`.
    pub origin: String,
    /// The label's value.
    pub label: String,
}

/// What there is in a cluster.
#[derive(Debug, Default)]
pub struct Objects {
    all: Vec<Object>,
    /// The namespace that the mesh is installed in: its policies hold for the whole mesh.
    system: String,
    cluster_domain: Option<String>,
}

impl Objects {
    /// All objects that the mesh reads. A kind that the cluster does not have has none.
    ///
    /// # Errors
    /// One of the lists can't be had.
    pub fn read(cluster: &Cluster) -> Result<Self> {
        let mut found = Self { system: cluster.system.clone(), ..Self::default() };
        for spec in KINDS {
            match spec.kind {
                // Of the ConfigMaps one counts, and the object exists in files only.
                Kind::ConfigMap => found.read_settings(cluster, spec)?,
                Kind::MeshConfig => {}
                _ => {
                    let items = match path(cluster, spec)? {
                        Some(path) => cluster.list(&path)?,
                        None => Vec::new(),
                    };
                    found.all.extend(items.into_iter().map(|item| Object::new(spec, item)));
                }
            }
        }
        Ok(found)
    }

    /// The settings, under the name by which the compiler knows them: the default revision's, or where there is none, those of
    /// the first by name.
    fn read_settings(&mut self, cluster: &Cluster, spec: &'static KindSpec) -> Result<()> {
        let maps = format!("/api/v1/namespaces/{}/configmaps", cluster.system);
        let found = match cluster.find(&format!("{maps}/culvert"))? {
            Some(settings) => Some(settings),
            None => {
                let all = cluster.list(&format!("{maps}?labelSelector=app%3Dculvertd"))?;
                let name =
                    |map: &Value| map.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
                all.into_iter().filter(|map| map.pointer("/data/mesh").is_some()).min_by_key(name)
            }
        };
        let Some(mut settings) = found else { return Ok(()) };
        let domain = settings.pointer("/data/clusterDomain").and_then(Value::as_str);
        self.cluster_domain = domain.map(str::to_owned);
        let origin = origin(spec.name, &settings).into();
        let known = [("name", mesh_config::CONFIG_MAP), ("namespace", SYSTEM_NAMESPACE)];
        for (key, value) in known {
            if let Some(field) = settings.pointer_mut(&format!("/metadata/{key}")) {
                *field = Value::from(value);
            }
        }
        self.all.push(Object { spec, origin, value: settings });
        Ok(())
    }

    /// The objects of istio.io that have a label, each with the label's value.
    ///
    /// # Errors
    /// One of the lists can't be had.
    pub fn labelled(cluster: &Cluster, label: &str) -> Result<Vec<Labelled>> {
        let mut found = Vec::new();
        for spec in KINDS.iter().filter(|spec| spec.group.ends_with(".istio.io") && spec.namespaced) {
            let Some(path) = path(cluster, spec)? else { continue };
            let items = cluster.list(&format!("{path}?labelSelector={}", label.replace('/', "%2F")))?;
            for item in &items {
                let value =
                    item.pointer("/metadata/labels").and_then(|l| l.get(label)).and_then(Value::as_str);
                let label = value.unwrap_or_default().to_owned();
                found.push(Labelled { origin: origin(spec.name, item), label });
            }
        }
        Ok(found)
    }

    /// The custom resources that the mesh reads and the cluster has: the plural of each kind, and where its objects are listed.
    ///
    /// # Errors
    /// The server can't be asked.
    pub fn custom(cluster: &Cluster) -> Result<Vec<(String, String)>> {
        let mut found = Vec::new();
        for spec in KINDS.iter().filter(|spec| spec.is_custom() && spec.kind != Kind::MeshConfig) {
            found.extend(path(cluster, spec)?.map(|path| (plural(spec), path)));
        }
        Ok(found)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// The namespaces.
    pub fn namespaces(&self) -> impl Iterator<Item = String> {
        let all = self.all.iter().filter(|object| object.spec.name == "Namespace");
        all.filter_map(|object| object.value.pointer("/metadata/name")?.as_str().map(str::to_owned))
    }

    /// A repository for objects of a cluster.
    pub fn repository(&self) -> Repository {
        let mut options = Options { origin: Origin::Cluster, ..Options::default() };
        options.root_namespace = self.system.as_str().into();
        if let Some(domain) = &self.cluster_domain {
            options.cluster_domain = domain.as_str().into();
        }
        Repository::new(options)
    }

    /// Gives all of them to a repository, but those whose [`origin`] is in `replaced`.
    ///
    /// # Errors
    /// One of them is not an object.
    pub fn stage(&self, repository: &mut Repository, replaced: &BTreeSet<String>) -> Result<()> {
        for Object { spec, origin, value } in &self.all {
            if replaced.contains(&**origin) {
                continue;
            }
            // The server has checked its own kinds; what it has and the table lacks does not concern the mesh.
            let seed = ObjectSeed { kind: spec.kind, unknown: &|_, _| {} };
            let decoded = seed.deserialize(value).with_context(|| format!("the API server's {origin}"))?;
            let version =
                value.pointer("/metadata/resourceVersion").and_then(Value::as_str).unwrap_or_default();
            repository.stage_object(origin, ObjectContent::Node { node: &decoded.node, version, text: "" });
        }
        Ok(())
    }
}

/// English, as far as the kinds that are read need it.
fn plural(spec: &KindSpec) -> String {
    let name = spec.name.to_lowercase();
    match name.strip_suffix('y') {
        // A vowel before it stays: gateways.
        Some(stem) if !stem.ends_with('a') => format!("{stem}ies"),
        _ if name.ends_with('s') => format!("{name}es"),
        _ => format!("{name}s"),
    }
}

/// Where the server lists a kind's objects: in the first version of those that are read which it has; `None` where it has none.
fn path(cluster: &Cluster, spec: &KindSpec) -> Result<Option<String>> {
    let plural = plural(spec);
    for version in spec.versions {
        if spec.group.is_empty() {
            return Ok(Some(format!("/api/{version}/{plural}")));
        }
        let group = format!("/apis/{}/{version}", spec.group);
        let listed = cluster.find(&group)?;
        let mut kinds = listed.iter().filter_map(|l| l.get("resources")?.as_array()).flatten();
        if kinds.any(|kind| kind.get("name").and_then(Value::as_str) == Some(plural.as_str())) {
            return Ok(Some(format!("{group}/{plural}")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kinds_have_the_plurals_by_which_the_server_lists_them() {
        let plurals: Vec<_> = KINDS.iter().map(|spec| plural(spec)).collect();
        for wanted in [
            "pods",
            "namespaces",
            "endpointslices",
            "authorizationpolicies",
            "peerauthentications",
            "serviceentries",
            "telemetries",
            "gateways",
            "httproutes",
            "virtualservices",
            "ratelimits",
        ] {
            assert!(plurals.iter().any(|plural| plural == wanted), "{wanted}: {plurals:?}");
        }
    }
}
