//! Manifests as the commands read them: directories and single files, once, through the same code as ztunnel's.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use config::compile::Options;
use config::diagnostic::Diagnostic;
use config::directory::manifests;
use config::kinds::Capture;
use config::repository::{Content, Repository};
use model::Mesh;

/// As [`config::directory::Options`] has them.
const MOST_FILES: usize = 10_000;
const MOST_BYTES: u64 = 64 << 20;

/// The files that are read, by path, each with its content.
#[derive(Debug, Default)]
pub struct Files(BTreeMap<PathBuf, Vec<u8>>);

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
        if files.0.is_empty() {
            let names: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
            bail!("no .yaml, .yml or .json file in {}", names.join(", "));
        }
        Ok(files)
    }

    fn add_directory(&mut self, dir: &Path) -> Result<()> {
        for path in manifests(dir, MOST_FILES).map_err(|e| anyhow!("cannot read {e}"))? {
            self.add(&path)?;
        }
        Ok(())
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        if self.0.len() >= MOST_FILES {
            bail!("more than {MOST_FILES} files; name the directories that matter");
        }
        let file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut bytes = Vec::new();
        file.take(MOST_BYTES + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {}", path.display()))?;
        self.0.insert(path.to_owned(), bytes);
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// What they come to.
    pub fn compile(&self) -> Compiled {
        let mut repository = Repository::new(Options::default());
        self.stage(&mut repository);
        Compiled::of(&mut repository)
    }

    /// What they would come to with `changed`: its objects take the place of those of the same names, and its files
    /// that of files of the same names.
    pub fn compile_with(&self, changed: &Self) -> Compiled {
        let mut repository = Repository::new(Options::default());
        changed.stage(&mut repository);
        // What is committed first stays in force; later objects of the same names are only reported.
        let first = repository.commit();
        let replaced = |path: &Path| changed.0.keys().any(|c| c.file_name() == path.file_name());
        let kept =
            Self(self.0.iter().filter(|(p, _)| !replaced(p)).map(|(p, b)| (p.clone(), b.clone())).collect());
        kept.stage(&mut repository);
        let mut compiled = Compiled::of(&mut repository);
        let mesh = Mesh::default().apply(first.changes);
        compiled.mesh = mesh.apply(std::mem::take(&mut compiled.changes));
        compiled
    }

    fn stage(&self, repository: &mut Repository) {
        for (path, bytes) in &self.0 {
            let name: Arc<str> = path.to_string_lossy().into();
            let size = bytes.len() as u64;
            let content =
                if size > MOST_BYTES { Content::TooLarge(size, MOST_BYTES) } else { Content::Bytes(bytes) };
            repository.stage(&name, content);
        }
    }
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
    changes: Vec<model::Change>,
}

impl Compiled {
    fn of(repository: &mut Repository) -> Self {
        let changes = repository.commit().changes;
        Self {
            mesh: Mesh::default().apply(changes.clone()),
            diagnostics: repository.review(),
            objects: repository.object_count(),
            captures: repository.captures().map(|(uid, c)| (uid.clone(), c.clone())).collect(),
            changes,
        }
    }
}
