//! Manifests as the commands read them: directories and single files, once, through the same code as ztunnel's; and
//! beside them, or in their place, the objects of a cluster, as the control plane reads them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use config::compile::Options;
use config::diagnostic::{Code, Diagnostic};
use config::directory::manifests;
use config::kinds::Capture;
use config::repository::{Content, Repository};
use config::resource::KINDS;
use model::Mesh;
use serde_json::Value;

use crate::cluster::{
    Cluster, ClusterArgs, LeftOut, NamespaceLabels, Objects, labels_of, name_settings, origin,
};
use crate::yaml;

/// As [`config::directory::Options`] has them.
const MOST_FILES: usize = 10_000;
const MOST_BYTES: u64 = 64 << 20;
/// Namespaces that are named where one is not there.
const MOST_NAMES: usize = 20;

/// What is read.
#[derive(Args, Clone, Debug)]
pub struct Sources {
    /// Directories and files of Kubernetes and istio.io YAML or JSON; none for the cluster
    #[arg(value_name = "DIR|FILE")]
    paths: Vec<PathBuf>,
    /// The cluster's objects too; those of the files take the place of theirs of the same names
    #[arg(long)]
    with_cluster: bool,
    /// The revision of the cluster's control plane that is asked about, or a tag of it [default: the one without a name]
    #[arg(long, value_name = "NAME")]
    revision: Option<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

impl Sources {
    /// Reads all of it.
    ///
    /// # Errors
    /// A path or the cluster can't be read, or there is neither.
    pub fn read(&self) -> Result<Files> {
        let mut files = if self.paths.is_empty() { Files::default() } else { Files::read(&self.paths)? };
        if self.paths.is_empty() || self.with_cluster {
            if !self.cluster.is_any() {
                bail!("name directories or files, or a cluster with --kubeconfig or $KUBECONFIG");
            }
            files.cluster = Some(Objects::read(&Cluster::connect(&self.cluster)?, self.revision.as_deref())?);
        }
        Ok(files)
    }
}

/// The files that are read, by path, each with its content; and a cluster's objects.
#[derive(Debug, Default)]
pub struct Files {
    files: BTreeMap<PathBuf, Vec<u8>>,
    cluster: Option<Objects>,
}

impl Files {
    /// Reads `paths`: a file as it is, a directory with the files that ztunnel would read.
    ///
    /// # Errors
    /// A path is not there, can't be read, or there is too much of it.
    pub fn read(paths: &[PathBuf]) -> Result<Self> {
        let mut files = Self::default();
        for path in paths {
            let kind = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
            if kind.is_dir() {
                files.add_directory(path)?;
            } else {
                files.add(path)?;
            }
        }
        if files.files.is_empty() {
            let names: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
            bail!("no .yaml, .yml or .json file in {}", names.join(", "));
        }
        Ok(files)
    }

    /// The objects of a cluster alone.
    ///
    /// # Errors
    /// The cluster can't be read.
    pub fn of_cluster(cluster: &ClusterArgs) -> Result<Self> {
        let objects = Objects::read(&Cluster::connect(cluster)?, None)?;
        Ok(Self { cluster: Some(objects), ..Self::default() })
    }

    fn add_directory(&mut self, dir: &Path) -> Result<()> {
        for path in manifests(dir, MOST_FILES).map_err(|e| anyhow!("cannot read {e}"))? {
            self.add(&path)?;
        }
        Ok(())
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        if self.files.len() >= MOST_FILES {
            bail!("more than {MOST_FILES} files; name the directories that matter");
        }
        let file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut bytes = Vec::new();
        file.take(MOST_BYTES + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {}", path.display()))?;
        self.files.insert(path.to_owned(), bytes);
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// Whether a cluster is among them.
    pub fn is_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// How many objects are the cluster's.
    pub fn cluster_count(&self) -> usize {
        self.cluster.as_ref().map_or(0, Objects::count)
    }

    /// Sees whether there is a namespace, or an object that is of it.
    ///
    /// # Errors
    /// Neither: whoever asks what is wrong there would hear that nothing is.
    pub fn has_namespace(&self, wanted: &str) -> Result<()> {
        let Some(known) = self.namespaces().filter(|known| !known.contains(wanted)) else { return Ok(()) };
        if known.is_empty() {
            bail!("there is no namespace {wanted}: no object that is read is of any");
        }
        let names: Vec<&str> = known.iter().take(MOST_NAMES).map(String::as_str).collect();
        let more = known.len() - names.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        bail!("there is no namespace {wanted} in what is read: there are {}{more}", names.join(", "))
    }

    /// The namespaces that there are, or that objects are of; `None` where a file can't be read, which is said elsewhere.
    fn namespaces(&self) -> Option<BTreeSet<String>> {
        let mut found: BTreeSet<String> = self.cluster.iter().flat_map(Objects::namespaces).collect();
        for bytes in self.files.values() {
            found.extend(objects_of(bytes).ok()?.iter().filter_map(namespace_of));
        }
        Some(found)
    }

    fn repository(&self, changed: Option<&Self>) -> Result<Repository> {
        match &self.cluster {
            Some(objects) => objects.repository(&self.origins(changed)),
            None => Ok(Repository::new(Options::default())),
        }
    }

    /// What they come to.
    ///
    /// # Errors
    /// The cluster has something that is not an object.
    pub fn compile(&self) -> Result<Compiled> {
        let mut repository = self.repository(None)?;
        self.stage(&mut repository, |_| true);
        self.finish(&mut repository, Vec::new(), None)
    }

    /// What they would come to with `changed`: its objects take the place of those of the same names, and its files
    /// that of files of the same names.
    ///
    /// # Errors
    /// As [`Files::compile`].
    pub fn compile_with(&self, changed: &Self) -> Result<Compiled> {
        let mut repository = self.repository(Some(changed))?;
        changed.stage(&mut repository, |_| true);
        // What is committed first stays in force; later objects of the same names are only reported.
        let changes = repository.commit().changes;
        let replaced = |path: &Path| changed.files.keys().any(|c| c.file_name() == path.file_name());
        self.stage(&mut repository, |path| !replaced(path));
        self.finish(&mut repository, changes, Some(changed))
    }

    /// Adds the cluster's objects, if there are any, behind the files', and compiles the rest.
    fn finish(
        &self,
        repository: &mut Repository,
        mut changes: Vec<model::Change>,
        changed: Option<&Self>,
    ) -> Result<Compiled> {
        let mut left_out = LeftOut::default();
        if let Some(objects) = &self.cluster {
            changes.extend(repository.commit().changes);
            let labels = self.namespace_labels(objects, changed);
            let (more, out) = objects.stage(repository, &self.origins(changed), &labels)?;
            changes.extend(more);
            left_out = out;
        }
        changes.extend(repository.commit().changes);
        let mut diagnostics = repository.review();
        if self.cluster.is_some() {
            // What is new gets one of the server.
            diagnostics.retain(|diagnostic| diagnostic.code != Code::ServiceWithoutAddress);
        }
        if let Some(map) = self.cluster.as_ref().and_then(Objects::settings_origin) {
            name_settings(&mut diagnostics, map);
        }
        Ok(Compiled {
            mesh: Mesh::default().apply(changes),
            diagnostics,
            objects: repository.object_count(),
            captures: repository.captures().map(|(uid, c)| (uid.clone(), c.clone())).collect(),
            left_out,
        })
    }

    /// The labels of the cluster's namespaces, with those of the files in their place.
    fn namespace_labels(&self, objects: &Objects, changed: Option<&Self>) -> NamespaceLabels {
        let mut labels = objects.namespace_labels();
        let all = self.files.values().chain(changed.into_iter().flat_map(|c| c.files.values()));
        for object in all.flat_map(|bytes| objects_of(bytes).unwrap_or_default()) {
            let name = object.pointer("/metadata/name").and_then(Value::as_str);
            if let (Some("Namespace"), Some(name)) = (object.get("kind").and_then(Value::as_str), name) {
                labels.insert(name.to_owned(), labels_of(&object));
            }
        }
        labels
    }

    /// The objects of the files, as the cluster's are called. What can't be read is none: it is said elsewhere.
    fn origins(&self, changed: Option<&Self>) -> BTreeSet<String> {
        let all = self.files.values().chain(changed.into_iter().flat_map(|c| c.files.values()));
        let items = all.flat_map(|bytes| objects_of(bytes).unwrap_or_default());
        items
            .filter_map(|mut object| {
                let kind = object.get("kind")?.as_str()?.to_owned();
                let spec = KINDS.iter().find(|spec| spec.name == kind)?;
                let metadata = object.get_mut("metadata")?.as_object_mut()?;
                if spec.namespaced {
                    metadata.entry("namespace").or_insert_with(|| "default".into());
                }
                Some(origin(&kind, &object))
            })
            .collect()
    }

    fn stage(&self, repository: &mut Repository, wanted: impl Fn(&Path) -> bool) {
        for (path, bytes) in self.files.iter().filter(|(path, _)| wanted(path)) {
            let name: Arc<str> = path.to_string_lossy().into();
            let size = bytes.len() as u64;
            let content =
                if size > MOST_BYTES { Content::TooLarge(size, MOST_BYTES) } else { Content::Bytes(bytes) };
            repository.stage(&name, content);
        }
    }
}

/// The objects of a file; those of a list each by itself.
fn objects_of(bytes: &[u8]) -> Result<Vec<Value>> {
    let documents = yaml::read(&String::from_utf8_lossy(bytes))?.into_iter();
    let items = documents.flat_map(|mut document| match document.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => vec![document],
    });
    Ok(items.collect())
}

/// The namespace that an object is of, or is.
fn namespace_of(object: &Value) -> Option<String> {
    let text = |pointer: &str| object.pointer(pointer)?.as_str().map(str::to_owned);
    let kind = text("/kind")?;
    if kind == "Namespace" {
        return text("/metadata/name");
    }
    let is_of_none = KINDS.iter().any(|spec| spec.name == kind && !spec.namespaced);
    text("/metadata/namespace").or_else(|| (!is_of_none).then(|| "default".to_owned()))
}

/// What files come to.
pub struct Compiled {
    /// The mesh.
    pub mesh: Mesh,
    /// All there is to say about them.
    pub diagnostics: Vec<Diagnostic>,
    /// How many objects are in force.
    pub objects: usize,
    /// What of their traffic pods have captured, by their uids, where they say so.
    pub captures: HashMap<model::Str, Capture>,
    /// What of the cluster is not for this mesh.
    pub left_out: LeftOut,
}
