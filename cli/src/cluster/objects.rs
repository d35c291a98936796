//! The objects of a cluster that the mesh reads, fed to the compiler as the control plane feeds them.

use std::sync::Arc;

use anyhow::{Context, Result};
use config::compile::{Options, Origin};
use config::json::ObjectSeed;
use config::repository::{ObjectContent, Repository};
use config::resource::{KINDS, Kind, KindSpec};
use serde::de::DeserializeSeed;
use serde_json::Value;

use super::Cluster;

/// Objects, each with its kind.
#[derive(Debug, Default)]
pub struct Objects {
    all: Vec<(&'static KindSpec, Value)>,
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
                    let items = cluster.list(&path(spec)?)?;
                    found.all.extend(items.into_iter().map(|item| (*spec, item)));
                }
            }
        }
        Ok(found)
    }

    /// The settings, under the name by which the compiler knows them.
    fn read_settings(&mut self, cluster: &Cluster, spec: &'static KindSpec) -> Result<()> {
        let path = format!("/api/v1/namespaces/{}/configmaps/culvert", cluster.system);
        let Some(mut settings) = cluster.find(&path)? else { return Ok(()) };
        let domain = settings.pointer("/data/clusterDomain").and_then(Value::as_str);
        self.cluster_domain = domain.map(str::to_owned);
        if let Some(name) = settings.pointer_mut("/metadata/name") {
            *name = Value::from(config::policy::mesh_config::CONFIG_MAP);
        }
        self.all.push((spec, settings));
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
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

    /// Gives all of them to a repository.
    ///
    /// # Errors
    /// One of them is not an object.
    pub fn stage(&self, repository: &mut Repository) -> Result<()> {
        for (spec, object) in &self.all {
            let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default();
            let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
            let slash = if namespace.is_empty() { "" } else { "/" };
            let origin: Arc<str> = format!("{} {namespace}{slash}{name}", spec.name).into();
            // The server has checked its own kinds; what it has and the table lacks does not concern the mesh.
            let seed = ObjectSeed { kind: spec.kind, unknown: &|_, _| {} };
            let decoded = seed.deserialize(object).with_context(|| format!("the API server's {origin}"))?;
            let version = text("/metadata/resourceVersion");
            repository.stage_object(&origin, ObjectContent::Node { node: &decoded.node, version, text: "" });
        }
        Ok(())
    }
}

/// Where a kind's objects are listed.
fn path(spec: &KindSpec) -> Result<String> {
    let version = spec.versions.first().context("a kind without a version")?;
    let name = spec.name.to_lowercase();
    // English, as far as the kinds that are read need it.
    let plural = match name.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None if name.ends_with('s') => format!("{name}es"),
        None => format!("{name}s"),
    };
    let group = if spec.group.is_empty() { "/api".to_owned() } else { format!("/apis/{}", spec.group) };
    Ok(format!("{group}/{version}/{plural}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kinds_are_listed_where_the_server_has_them() {
        let paths: Vec<_> = KINDS.iter().map(|spec| path(spec).unwrap()).collect();
        for wanted in [
            "/api/v1/pods",
            "/api/v1/namespaces",
            "/apis/discovery.k8s.io/v1/endpointslices",
            "/apis/security.istio.io/v1/authorizationpolicies",
            "/apis/security.istio.io/v1/peerauthentications",
            "/apis/networking.istio.io/v1/serviceentries",
            "/apis/networking.istio.io/v1/workloadentries",
            "/apis/networking.istio.io/v1/workloadgroups",
        ] {
            assert!(paths.iter().any(|p| p == wanted), "{wanted}: {paths:?}");
        }
    }
}
