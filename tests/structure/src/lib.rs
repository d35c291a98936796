//! The workspace as its own tests see it: the members' manifests and the source files.
#![forbid(unsafe_code)]

mod functions;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use functions::{Function, Parsed};

/// Directories that hold no sources of ours, by their path from the root.
const SKIPPED: [&str; 5] = ["target", ".git", "fuzz/target", "bench/out", "bench/results"];

/// The workspace.
#[derive(Debug)]
pub struct Workspace {
    /// Where it is.
    pub root: PathBuf,
    /// Its members.
    pub members: Vec<Member>,
}

/// A member of the workspace.
#[derive(Debug)]
pub struct Member {
    /// Its directory, from the root.
    pub directory: String,
    /// Its `Cargo.toml`.
    pub manifest: toml::Table,
}

impl Workspace {
    /// Reads the workspace that this crate is a member of.
    ///
    /// # Errors
    /// A manifest is missing or not understood.
    pub fn read() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
        let manifest = manifest(&root)?;
        let patterns = manifest
            .get("workspace")
            .and_then(|w| w.get("members"))
            .and_then(toml::Value::as_array)
            .context("the root Cargo.toml has no workspace.members")?;
        let mut members = Vec::new();
        for pattern in patterns.iter().filter_map(toml::Value::as_str) {
            for directory in expand(&root, pattern)? {
                let manifest = self::manifest(&root.join(&directory))?;
                members.push(Member { directory, manifest });
            }
        }
        Ok(Self { root, members })
    }

    /// Every Rust file of the workspace, from the root, sorted.
    ///
    /// # Errors
    /// A directory can't be read.
    pub fn sources(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let mut directories = vec![String::new()];
        while let Some(directory) = directories.pop() {
            let path = self.root.join(&directory);
            for entry in path.read_dir().with_context(|| format!("reading {}", path.display()))? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let path = if directory.is_empty() { name } else { format!("{directory}/{name}") };
                if entry.file_type()?.is_dir() {
                    if !SKIPPED.contains(&path.as_str()) {
                        directories.push(path);
                    }
                } else if path.ends_with(".rs") {
                    found.push(path);
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// The text of a file, by its path from the root.
    ///
    /// # Errors
    /// It can't be read.
    pub fn text(&self, path: &str) -> Result<String> {
        std::fs::read_to_string(self.root.join(path)).with_context(|| format!("reading {path}"))
    }
}

impl Member {
    /// The package's name.
    #[must_use]
    pub fn name(&self) -> &str {
        let package = self.manifest.get("package");
        package.and_then(|p| p.get("name")).and_then(toml::Value::as_str).unwrap_or_default()
    }

    /// What the table `kind` (`dependencies`, `dev-dependencies`, `build-dependencies`) names, for all targets.
    #[must_use]
    pub fn dependencies(&self, kind: &str) -> Vec<String> {
        let names = |table: Option<&toml::Value>| -> Vec<String> {
            table.and_then(toml::Value::as_table).map(|t| t.keys().cloned().collect()).unwrap_or_default()
        };
        let mut all = names(self.manifest.get(kind));
        let targets = self.manifest.get("target").and_then(toml::Value::as_table);
        for target in targets.into_iter().flat_map(|t| t.values()) {
            all.extend(names(target.get(kind)));
        }
        all
    }

    /// The files that are roots of its library and binaries, from the workspace's root.
    ///
    /// # Errors
    /// A directory can't be read.
    pub fn roots(&self, workspace: &Workspace) -> Result<Vec<String>> {
        let directory = workspace.root.join(&self.directory);
        let mut roots: Vec<String> = ["src/lib.rs", "src/main.rs"].map(str::to_owned).into();
        let explicit = ["bin", "lib"]
            .into_iter()
            .filter_map(|kind| self.manifest.get(kind))
            .flat_map(|v| v.as_array().cloned().unwrap_or_else(|| vec![v.clone()]));
        roots.extend(explicit.filter_map(|t| t.get("path").and_then(toml::Value::as_str).map(str::to_owned)));
        if let Ok(entries) = directory.join("src/bin").read_dir() {
            for entry in entries {
                let name = entry?.file_name().to_string_lossy().into_owned();
                roots.push(format!("src/bin/{name}"));
                roots.push(format!("src/bin/{name}/main.rs"));
            }
        }
        roots.retain(|r| directory.join(r).is_file());
        roots.sort();
        roots.dedup();
        Ok(roots.into_iter().map(|r| format!("{}/{r}", self.directory)).collect())
    }
}

fn manifest(directory: &Path) -> Result<toml::Table> {
    let path = directory.join("Cargo.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    text.parse().with_context(|| format!("parsing {}", path.display()))
}

/// A member pattern is a directory, or all directories in one (`crates/*`).
fn expand(root: &Path, pattern: &str) -> Result<Vec<String>> {
    let Some(parent) = pattern.strip_suffix("/*") else { return Ok(vec![pattern.to_owned()]) };
    let mut found = Vec::new();
    for entry in root.join(parent).read_dir().with_context(|| format!("reading {parent}"))? {
        let entry = entry?;
        if entry.path().join("Cargo.toml").is_file() {
            found.push(format!("{parent}/{}", entry.file_name().to_string_lossy()));
        }
    }
    found.sort();
    Ok(found)
}
