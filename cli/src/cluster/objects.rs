//! The objects of a cluster that the mesh reads, fed to the compiler as the control plane feeds them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use config::compile::{Options, Origin};
use config::json::{Decoded, ObjectSeed};
use config::policy::NamespaceSelector;
use config::policy::mesh_config;
use config::policy::state::SYSTEM_NAMESPACE;
use config::repository::{ObjectContent, Repository};
use config::resource::{KINDS, Kind, KindSpec};
use serde::Serialize;
use serde::de::DeserializeSeed;
use serde_json::Value;

use super::{Cluster, settings};
use crate::tag::REVISION;

/// The revision of a control plane that has no name.
const DEFAULT_REVISION: &str = "default";
/// The key of a revision's settings that lists its tags.
const TAGS: &str = "revisionTags";
/// Names that are shown of many.
const MOST_NAMES: usize = 10;

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

    fn decoded(&self) -> Result<Decoded> {
        // The server has checked its own kinds; what it has and the table lacks does not concern the mesh.
        let seed = ObjectSeed { kind: self.spec.kind, unknown: &|_, _| {} };
        seed.deserialize(&self.value).with_context(|| format!("the API server's {}", self.origin))
    }

    fn stage(&self, repository: &mut Repository) -> Result<()> {
        let (Self { origin, value, .. }, decoded) = (self, self.decoded()?);
        let version = value.pointer("/metadata/resourceVersion").and_then(Value::as_str).unwrap_or_default();
        repository.stage_object(origin, ObjectContent::Node { node: &decoded.node, version, text: "" });
        Ok(())
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

/// Labels of namespaces, by their names.
pub type NamespaceLabels = BTreeMap<String, BTreeMap<String, String>>;

/// What there is in a cluster.
#[derive(Debug, Default)]
pub struct Objects {
    all: Vec<Object>,
    /// The revision that is asked about, and its tags.
    revision: String,
    tags: BTreeSet<String>,
    /// The namespace that the mesh is installed in: its policies hold for the whole mesh.
    system: String,
    cluster_domain: Option<String>,
}

impl Objects {
    /// All objects that a mesh can read. A kind that the cluster does not have has none. `revision`, or a tag of it, says whose
    /// they are asked for; without it the default's, or where there is none, the first by the name of its settings.
    ///
    /// # Errors
    /// One of the lists can't be had, or there is no such revision.
    pub fn read(cluster: &Cluster, revision: Option<&str>) -> Result<Self> {
        let mut found = Self { system: cluster.system.clone(), ..Self::default() };
        for spec in KINDS {
            match spec.kind {
                // Of the ConfigMaps one counts, and the object exists in files only.
                Kind::ConfigMap => found.read_settings(cluster, spec, revision)?,
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

    /// The settings of the revision.
    fn read_settings(
        &mut self,
        cluster: &Cluster,
        spec: &'static KindSpec,
        revision: Option<&str>,
    ) -> Result<()> {
        let mut all = settings::maps(cluster)?;
        all.sort_by_key(|map| (revision_of(map) != DEFAULT_REVISION, name_of(map).to_owned()));
        let position = match revision {
            None => (!all.is_empty()).then_some(0),
            Some(wanted) => {
                let is = |map: &Value| revision_of(map) == wanted || tags_of(map).contains(wanted);
                let Some(found) = all.iter().position(is) else {
                    let known: Vec<_> = all.iter().map(revision_of).collect();
                    bail!(
                        "there is no revision {wanted} in namespace {}: there are: {}; `culvert tag list` lists the tags",
                        cluster.system,
                        known.join(", ")
                    );
                };
                Some(found)
            }
        };
        DEFAULT_REVISION.clone_into(&mut self.revision);
        if let Some(at) = position {
            self.add_settings(spec, all.swap_remove(at));
        }
        Ok(())
    }

    /// The settings alone, as they stand in this ConfigMap of the mesh's namespace.
    pub(super) fn of_settings(system: &str, map: Value) -> Self {
        let mut found = Self { system: system.to_owned(), ..Self::default() };
        if let Some(spec) = KINDS.iter().find(|spec| spec.kind == Kind::ConfigMap) {
            found.add_settings(spec, map);
        }
        found
    }

    /// Adds them under the name by which the compiler knows them.
    fn add_settings(&mut self, spec: &'static KindSpec, mut settings: Value) {
        (self.revision, self.tags) = (revision_of(&settings).to_owned(), tags_of(&settings));
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
    }

    /// What the ConfigMap with the settings is called in the cluster.
    pub fn settings_origin(&self) -> Option<&str> {
        self.all.iter().find(|object| object.spec.kind == Kind::ConfigMap).map(|object| &*object.origin)
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

    /// A repository for objects of a cluster, in which those of files whose [`origin`] is in `replaced` have what the server gave them.
    ///
    /// # Errors
    /// One of them is not an object.
    pub fn repository(&self, replaced: &BTreeSet<String>) -> Result<Repository> {
        let mut options = Options { origin: Origin::Cluster, ..Options::default() };
        options.root_namespace = self.system.as_str().into();
        if let Some(domain) = &self.cluster_domain {
            options.cluster_domain = domain.as_str().into();
        }
        let mut repository = Repository::new(options);
        for object in self.all.iter().filter(|object| replaced.contains(&*object.origin)) {
            repository.assign(object.decoded()?.node);
        }
        Ok(repository)
    }

    /// The labels of the namespaces.
    pub fn namespace_labels(&self) -> NamespaceLabels {
        let all = self.all.iter().filter(|object| object.spec.name == "Namespace");
        all.map(|object| (name_of(&object.value).to_owned(), labels_of(&object.value))).collect()
    }

    /// Gives to a repository those that the control plane of the revision reads, but those whose [`origin`] is in `replaced`;
    /// what follows from the settings, and what was left out.
    ///
    /// # Errors
    /// One of them is not an object.
    pub fn stage(
        &self,
        repository: &mut Repository,
        replaced: &BTreeSet<String>,
        labels: &NamespaceLabels,
    ) -> Result<(Vec<model::Change>, LeftOut)> {
        let wanted = || self.all.iter().filter(|object| !replaced.contains(&*object.origin));
        let (settings, others): (Vec<_>, Vec<_>) =
            wanted().partition(|object| object.spec.kind == Kind::ConfigMap);
        for object in settings {
            object.stage(repository)?;
        }
        // They say which namespaces are read.
        let changes = repository.commit().changes;
        let scope = Scope {
            of: self,
            selectors: repository.discovery().to_vec(),
            root: repository.settings().root_namespace.to_string(),
            labels,
        };
        let mut left_out = LeftOut::default();
        for object in others {
            if scope.has(object, &mut left_out) {
                object.stage(repository)?;
            }
        }
        Ok((changes, left_out))
    }
}

/// Which objects a control plane reads, as its registry has it.
struct Scope<'s> {
    of: &'s Objects,
    selectors: Vec<NamespaceSelector>,
    root: String,
    labels: &'s NamespaceLabels,
}

impl Scope<'_> {
    /// Whether an object is in it; counts it where it is not.
    fn has(&self, object: &Object, left_out: &mut LeftOut) -> bool {
        let revision = object.value.pointer("/metadata/labels").and_then(|labels| labels.get(REVISION));
        let revision = revision.and_then(Value::as_str).filter(|_| object.spec.is_custom());
        if let Some(other) = revision.filter(|r| *r != self.of.revision && !self.of.tags.contains(*r)) {
            *left_out.other_revisions.entry(other.to_owned()).or_default() += 1;
            return false;
        }
        let namespace =
            object.value.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or_default();
        if object.spec.namespaced && !self.selects(namespace) {
            *left_out.other_namespaces.entry(namespace.to_owned()).or_default() += 1;
            return false;
        }
        true
    }

    fn selects(&self, namespace: &str) -> bool {
        selects(&self.selectors, [&self.root, &self.of.system], namespace, self.labels)
    }
}

/// Whether one of the selectors, if there are any, takes a namespace, or it is one of those that are always read.
pub(super) fn selects(
    selectors: &[NamespaceSelector],
    always: [&str; 2],
    namespace: &str,
    labels: &NamespaceLabels,
) -> bool {
    let labels = labels.get(namespace);
    let label = |key: &str| labels.and_then(|labels| labels.get(key)).map(String::as_str);
    selectors.is_empty()
        || always.contains(&namespace)
        || selectors.iter().any(|selector| selector.matches(label))
}

/// How many objects of a cluster are not for the mesh that is asked about.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LeftOut {
    /// Those of other revisions, by their label.
    pub other_revisions: BTreeMap<String, usize>,
    /// Those of namespaces that `discoverySelectors` does not select, by these.
    pub other_namespaces: BTreeMap<String, usize>,
}

impl LeftOut {
    /// In words; empty where there are none.
    pub fn note(&self) -> String {
        let part = |counts: &BTreeMap<String, usize>, what: &str| {
            let named = counts.keys().take(MOST_NAMES).map(String::as_str).collect::<Vec<_>>().join(", ");
            let more = counts.len().saturating_sub(MOST_NAMES);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let total = counts.values().sum::<usize>();
            (total > 0).then(|| format!("{total} objects {what} ({named}{more})"))
        };
        let parts = [
            part(&self.other_revisions, "of other revisions"),
            part(&self.other_namespaces, "of namespaces that discoverySelectors does not select"),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        if parts.is_empty() { String::new() } else { format!("left out: {}", parts.join(", ")) }
    }
}

pub(super) fn name_of(object: &Value) -> &str {
    object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default()
}

/// An object's labels.
pub fn labels_of(object: &Value) -> BTreeMap<String, String> {
    let labels = object.pointer("/metadata/labels").and_then(Value::as_object).into_iter().flatten();
    labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

/// The revision whose settings these are.
fn revision_of(settings: &Value) -> &str {
    let label = settings.pointer("/metadata/labels").and_then(|labels| labels.get(REVISION));
    let name = name_of(settings).strip_prefix("culvert-").unwrap_or(DEFAULT_REVISION);
    label.and_then(Value::as_str).unwrap_or(name)
}

fn tags_of(settings: &Value) -> BTreeSet<String> {
    let tags = settings.pointer("/data").and_then(|data| data.get(TAGS)).and_then(Value::as_str);
    let tags = tags.unwrap_or_default().split(',').map(str::trim);
    tags.filter(|tag| !tag.is_empty()).map(str::to_owned).collect()
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
    use serde_json::json;

    use super::*;

    fn object(kind: Kind, value: Value) -> Object {
        Object::new(KINDS.iter().find(|spec| spec.kind == kind).unwrap(), value)
    }

    /// What `settings` leave out of three namespaces with a policy each and more of other revisions.
    fn left_out(settings: &str, tags: &[&str], labels: &NamespaceLabels) -> (LeftOut, usize) {
        let policy = |namespace: &str, name: &str, revision: Option<&str>| {
            let labels = revision.map(|r| json!({ REVISION: r }));
            object(
                Kind::AuthorizationPolicy,
                json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "spec": {},
                       "metadata": {"name": name, "namespace": namespace, "labels": labels}}),
            )
        };
        let settings = json!({"apiVersion": "v1", "kind": "ConfigMap", "data": {"mesh": settings},
            "metadata": {"name": mesh_config::CONFIG_MAP, "namespace": SYSTEM_NAMESPACE}});
        let objects = Objects {
            all: vec![
                policy("in", "a", None),
                policy("in", "b", Some("other")),
                policy("in", "c", Some("stable")),
                policy("in", "d", Some("here")),
                policy("out", "a", None),
                policy("mesh", "a", None),
                object(Kind::ConfigMap, settings),
            ],
            revision: "here".to_owned(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            system: "mesh".to_owned(),
            cluster_domain: None,
        };
        let mut repository = objects.repository(&BTreeSet::new()).unwrap();
        let (_, left_out) = objects.stage(&mut repository, &BTreeSet::new(), labels).unwrap();
        repository.commit();
        (left_out, repository.object_count())
    }

    fn counts(of: &[(&str, usize)]) -> BTreeMap<String, usize> {
        of.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn what_the_control_plane_does_not_read_is_left_out() {
        let selected = BTreeMap::from([("mesh".to_owned(), "yes".to_owned())]);
        let labels: NamespaceLabels =
            [("in".to_owned(), selected), ("out".to_owned(), BTreeMap::new())].into();
        let (found, in_force) = left_out("", &[], &labels);
        assert_eq!(found.other_revisions, counts(&[("other", 1), ("stable", 1)]));
        assert!(found.other_namespaces.is_empty());
        assert_eq!(found.note(), "left out: 2 objects of other revisions (other, stable)");
        let (tagged, more) = left_out("", &["stable"], &labels);
        assert_eq!((tagged.other_revisions, more), (counts(&[("other", 1)]), in_force + 1));
        let selectors = "discoverySelectors:\n- matchLabels: {mesh: 'yes'}\n";
        let (found, less) = left_out(selectors, &["stable", "other"], &labels);
        // That of the mesh's own pods is read whatever labels it has.
        assert_eq!((&found.other_namespaces, less), (&counts(&[("out", 1)]), in_force + 1));
        assert!(found.note().ends_with("that discoverySelectors does not select (out)"), "{}", found.note());
    }

    #[test]
    fn settings_say_which_revision_they_are_of() {
        let of = |name: &str, label: Option<&str>| {
            let labels = label.map(|label| json!({ REVISION: label }));
            revision_of(&json!({"metadata": {"name": name, "labels": labels}})).to_owned()
        };
        assert_eq!((of("culvert", None), of("culvert-1-2", None)), ("default".into(), "1-2".into()));
        assert_eq!(of("culvert", Some("next")), "next");
    }

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
