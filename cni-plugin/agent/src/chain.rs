//! The plugin's place in the node's CNI configuration: a file of our own that names the primary plugin's plugins and then
//! ours, and sorts before the primary's, so that the container runtime takes it. The primary's file is never touched.
//!
//! A primary that can't be read leaves the last good file of ours in force: with it pods start, and start protected.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::record::replace;

/// The type of our plugin, which is also the name of its binary.
pub const PLUGIN: &str = "culvert-cni";
/// What the names of our files end with.
const SUFFIX: &str = "-culvert.conflist";
/// Names of our file, of which the first that sorts before the primary's is taken.
const NAMES: [&str; 4] =
    ["02-culvert.conflist", "00-culvert.conflist", "00-00-culvert.conflist", "0-culvert.conflist"];
/// The versions of the specification that our plugin speaks, the newest last.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The size of a configuration, bytes.
const SIZE_LIMIT: u64 = 1 << 20;

/// Why our plugin is not chained.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The directory or a file can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No primary plugin is configured.
    #[error("{0} has no configuration of a primary CNI plugin (.conflist, .conf or .json) yet")]
    NoPrimary(PathBuf),
    /// The primary's configuration can't be taken.
    #[error("{path}: {problem}; {kept}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What is in force.
        kept: &'static str,
    },
    /// No name of ours comes first.
    #[error("{0} sorts before every name of ours; rename it, for example to 10-NAME.conflist")]
    SortsFirst(PathBuf),
}

/// The place of our plugin.
#[derive(Clone, Debug)]
pub struct Chain {
    directory: PathBuf,
    /// Our plugin's configuration.
    plugin: Value,
}

/// What [`Chain::sync`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Synced {
    /// Whose plugins come before ours.
    pub primary: PathBuf,
    /// Our file.
    pub ours: PathBuf,
    /// Whether it had to be written.
    pub changed: bool,
}

impl Chain {
    /// In `directory`, where the agent listens at `socket` (as the plugin sees it), and pods of `excluded` namespaces are
    /// never in the mesh.
    #[must_use]
    pub fn new(directory: &Path, socket: &Path, excluded: &[String]) -> Self {
        let plugin = json!({
            "type": PLUGIN,
            "agentSocket": socket,
            "excludeNamespaces": excluded,
        });
        Self { directory: directory.to_owned(), plugin }
    }

    /// Sees to it that our file is there, in step with the primary's.
    ///
    /// # Errors
    /// It isn't: why. What was there stays.
    pub fn sync(&self) -> Result<Synced, ChainError> {
        let names = self.configurations()?;
        let (ours, others): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name.ends_with(SUFFIX));
        let first = others.first().ok_or_else(|| ChainError::NoPrimary(self.directory.clone()))?;
        let primary = self.directory.join(first);
        let kept = if ours.is_empty() {
            "pods start without the mesh's plugin until it is corrected"
        } else {
            "the last good one stays in force, with the mesh's plugin"
        };
        let malformed = |problem| ChainError::Malformed { path: primary.clone(), problem, kept };
        let content = read(&primary).map_err(|source| ChainError::Io { path: primary.clone(), source })?;
        let is_list = primary.extension() == Some(OsStr::new("conflist"));
        let wanted = compose(&content, is_list, &self.plugin).map_err(malformed)?;
        let name = NAMES.into_iter().find(|name| *name < first.as_str());
        let path = self.directory.join(name.ok_or_else(|| ChainError::SortsFirst(primary.clone()))?);
        let changed = !read(&path).is_ok_and(|there| there == wanted);
        if changed {
            // It may hold what the primary's file keeps secret.
            replace(&path, &wanted, 0o600).map_err(|source| ChainError::Io { path: path.clone(), source })?;
        }
        for other in ours.iter().map(|name| self.directory.join(name)).filter(|other| *other != path) {
            remove(&other)?;
        }
        Ok(Synced { primary, ours: path, changed })
    }

    /// Takes our plugin out of the node's configuration.
    ///
    /// # Errors
    /// A file can't be removed.
    pub fn remove(&self) -> Result<(), ChainError> {
        let names = self.configurations()?;
        names
            .iter()
            .filter(|name| name.ends_with(SUFFIX))
            .try_for_each(|name| remove(&self.directory.join(name)))
    }

    /// The names of the files that container runtimes read, in their order.
    fn configurations(&self) -> Result<Vec<String>, ChainError> {
        let failed = |source| ChainError::Io { path: self.directory.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let known = [".conf", ".conflist", ".json"].iter().any(|ending| name.ends_with(ending));
            if known && entry.path().is_file() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    fs::File::open(path)?.take(SIZE_LIMIT + 1).read_to_end(&mut content)?;
    if content.len() as u64 > SIZE_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than {SIZE_LIMIT} bytes")));
    }
    Ok(content)
}

fn remove(path: &Path) -> Result<(), ChainError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ChainError::Io { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// The primary's configuration as a list, with our plugin at its end. The network keeps its name: addresses are
/// managed by it.
fn compose(primary: &[u8], is_list: bool, plugin: &Value) -> Result<Vec<u8>, String> {
    let value: Value = serde_json::from_slice(primary).map_err(|error| format!("it is not JSON: {error}"))?;
    let Value::Object(mut list) = value else { return Err("it is no JSON object".to_owned()) };
    if !is_list && !list.contains_key("plugins") {
        list = as_list(list)?;
    }
    if list.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err("it has no name".to_owned());
    }
    let (version, versions) = versions(&list)?;
    let Some(Value::Array(plugins)) = list.get_mut("plugins") else {
        return Err("it has no list of plugins".to_owned());
    };
    if plugins.iter().any(|plugin| plugin.get("type").and_then(Value::as_str).is_none_or(str::is_empty)) {
        return Err("one of its plugins has no type".to_owned());
    }
    // Somebody may have copied our file.
    plugins.retain(|other| other.get("type").and_then(Value::as_str) != Some(PLUGIN));
    if plugins.is_empty() {
        return Err("it has no plugins but ours".to_owned());
    }
    plugins.push(plugin.clone());
    list.insert("cniVersion".to_owned(), version.into());
    match versions {
        Some(versions) => drop(list.insert("cniVersions".to_owned(), versions.into())),
        None => drop(list.remove("cniVersions")),
    }
    let mut text = serde_json::to_vec_pretty(&list).map_err(|error| error.to_string())?;
    text.push(b'\n');
    Ok(text)
}

/// A configuration of a single plugin as a list of one.
fn as_list(plugin: Map<String, Value>) -> Result<Map<String, Value>, String> {
    if !plugin.contains_key("type") {
        return Err("it has neither plugins nor a type".to_owned());
    }
    let mut list = Map::new();
    for name in ["cniVersion", "cniVersions", "name", "disableCheck", "disableGC"] {
        if let Some(value) = plugin.get(name) {
            list.insert(name.to_owned(), value.clone());
        }
    }
    list.insert("plugins".to_owned(), Value::Array(vec![Value::Object(plugin)]));
    Ok(list)
}

/// The version that a runtime goes by which knows of one alone, and all that are shared where the primary lists several.
fn versions(list: &Map<String, Value>) -> Result<(String, Option<Vec<Value>>), String> {
    let own = match list.get("cniVersion") {
        None | Some(Value::Null) => "",
        Some(Value::String(version)) => version,
        Some(_) => return Err("its cniVersion is no string".to_owned()),
    };
    let listed: Vec<&str> = match list.get("cniVersions") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
        Some(_) => return Err("its cniVersions are no list".to_owned()),
    };
    let shared: Vec<&str> =
        VERSIONS.into_iter().filter(|version| *version == own || listed.contains(version)).collect();
    let version = if VERSIONS.contains(&own) { Some(own) } else { shared.last().copied() };
    let version = version.ok_or_else(|| {
        format!("its cniVersion is {own:?}, and the mesh's plugin speaks {}", VERSIONS.join(", "))
    })?;
    let several = (!listed.is_empty()).then(|| shared.into_iter().map(Value::from).collect());
    Ok((version.to_owned(), several))
}

#[cfg(test)]
mod tests;
