//! The plugin's place in the node's CNI configuration: a file of our own that names the primary plugin's plugins and then
//! ours, and sorts before the primary's, so that the container runtime takes it. The primary's file is never touched.
//!
//! A primary that calls plugins of other files, as Multus does, takes ours for one of them: it may have our plugin in its own
//! file then, or the name of ours. Ours stays out of its way, behind the plugins of the next primary: before it, each would
//! take up the other for ever.
//!
//! A primary that can't be read leaves the last good file of ours in force: with it pods start, and start protected. Where
//! there is none, ours goes behind the first that can be read: runtimes that pass over a broken file take that one.

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
/// The name of ours that is taken first before a primary of Multus: one that Multus does not take for a primary.
const BEFORE_MULTUS: (&str, &str) = ("00-multus", "00-multus-culvert.conflist");
/// The versions of the specification that our plugin speaks, the newest last.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The size of a configuration, bytes.
const SIZE_LIMIT: u64 = 1 << 20;
/// In our plugin's configuration: the file whose plugins come before it.
const PRIMARY: &str = "primary";
/// What Cilium moves other files away with, unless it is told not to (`cni.exclusive`).
const MOVED_AWAY: &str = "-culvert.conflist.cilium_bak";

/// Why our plugin is not chained.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The directory or a file can't be read or written.
    #[error("{path}: {source}{}", may_write(.source))]
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
    /// No configuration of a primary can be taken, or that which ours is of can't any more.
    #[error("{problems}; {kept}")]
    Malformed {
        /// Which, and what is wrong with each.
        problems: String,
        /// What is in force.
        kept: &'static str,
    },
    /// No name of ours comes first.
    #[error("{0} sorts before every name of ours; rename it, for example to 10-NAME.conflist")]
    SortsFirst(PathBuf),
}

/// What to do where a node does not let the agent write; empty where it is something else.
pub(crate) fn may_write(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            "; the agent has to be able to write there: node.cniConfDir and node.cniBinDir of the chart name the node's \
             directories, node.seLinuxType how SELinux sees the agent"
        }
        _ => "",
    }
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
    /// What somebody has to look at all the same.
    pub warnings: Vec<String>,
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
        let leading = others.iter().take_while(|name| self.calls_ours(name)).count();
        let (callers, others) = others.split_at(leading);
        let first = others.first().ok_or_else(|| ChainError::NoPrimary(self.directory.clone()))?;
        let (name, wanted, mut warnings) = self.primary(&ours, others)?;
        let primary = self.directory.join(name);
        // Before all of them, the runtime takes the first file; behind those that call it themselves.
        let name =
            name_of_ours(callers, first).or_else(|| ours.last().map(String::as_str).filter(|_| leading > 0));
        let first = || self.directory.join(first);
        let path = self.directory.join(name.ok_or_else(|| ChainError::SortsFirst(first()))?);
        let changed = !read(&path).is_ok_and(|there| there == wanted);
        if changed {
            // It may hold what the primary's file keeps secret.
            replace(&path, &wanted, 0o600).map_err(|source| ChainError::Io { path: path.clone(), source })?;
        }
        for other in ours.iter().map(|name| self.directory.join(name)).filter(|other| *other != path) {
            remove(&other)?;
        }
        if self.was_moved_away() {
            warnings.push(format!(
                "Cilium moves other CNI configurations in {} away: set its cni.exclusive to false",
                self.directory.display()
            ));
        }
        Ok(Synced { primary, ours: path, changed, warnings })
    }

    /// The primary whose plugins come before ours: its name, our configuration with it, and what is wrong with those that
    /// sort before it.
    fn primary<'n>(
        &self,
        ours: &[String],
        others: &'n [String],
    ) -> Result<(&'n str, Vec<u8>, Vec<String>), ChainError> {
        let in_force = ours.first().and_then(|name| primary_of(&read(&self.directory.join(name)).ok()?));
        let mut broken = Vec::new();
        for name in others {
            let path = self.directory.join(name);
            let problem = match read(&path) {
                Ok(content) => match compose(&content, name.ends_with(".conflist"), &self.plugin, name) {
                    Ok(wanted) => return Ok((name, wanted, broken)),
                    Err(problem) => problem,
                },
                Err(error) if path.is_symlink() => {
                    format!(
                        "it is a link whose end can't be read from here, put the file itself there: {error}"
                    )
                }
                Err(error) => error.to_string(),
            };
            broken.push(format!("{}: {problem}", path.display()));
            // Another primary makes other networks: pods that have started are in this one's.
            if in_force.as_ref() == Some(name) {
                break;
            }
        }
        let kept = match in_force {
            Some(_) => "the last good one stays in force, with the mesh's plugin",
            None => "pods start without the mesh's plugin until it is corrected",
        };
        Err(ChainError::Malformed { problems: broken.join("; "), kept })
    }

    /// Whether a primary calls our plugin by itself: it has it among the plugins that it calls in its turn, or names our file.
    fn calls_ours(&self, name: &str) -> bool {
        let content = read(&self.directory.join(name)).ok();
        let value = content.and_then(|content| serde_json::from_slice(&content).ok());
        value.is_some_and(|mut list: Value| {
            // In its own list it is a copy of ours, see `compose`.
            let plugins = list.get_mut("plugins").and_then(Value::as_array_mut);
            plugins.into_iter().for_each(|plugins| plugins.retain(|plugin| !is_ours(plugin)));
            names_ours(&list)
        })
    }

    fn was_moved_away(&self) -> bool {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(MOVED_AWAY))
    }

    /// Takes our plugin out of the node's configuration. A file of ours that another primary leads to stays, without our plugin:
    /// that primary takes it out of its own then, and goes on to find what it leads to.
    ///
    /// # Errors
    /// A file can't be removed, or written.
    pub fn remove(&self) -> Result<(), ChainError> {
        let is_called = self.is_called()?;
        for name in self.configurations()?.iter().filter(|name| name.ends_with(SUFFIX)) {
            let path = self.directory.join(name);
            match read(&path).ok().and_then(|content| without_ours(&content)).filter(|_| is_called) {
                Some(rest) => {
                    tracing::warn!(file = %path.display(), "another primary leads to this file: it stays, without our plugin");
                    replace(&path, &rest, 0o600)
                        .map_err(|source| ChainError::Io { path: path.clone(), source })?;
                }
                None => remove(&path)?,
            }
        }
        Ok(())
    }

    /// Whether a primary calls our plugin by itself, or leads to our file.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn is_called(&self) -> Result<bool, ChainError> {
        let names = self.configurations()?;
        Ok(names.iter().any(|name| !name.ends_with(SUFFIX) && self.calls_ours(name)))
    }

    /// The names of the files that container runtimes read, in their order.
    fn configurations(&self) -> Result<Vec<String>, ChainError> {
        let failed = |source| ChainError::Io { path: self.directory.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let known = [".conf", ".conflist", ".json"].iter().any(|ending| name.ends_with(ending));
            let path = entry.path();
            // What a link leads to on the node need not be there from here: it may be the runtime's first all the same.
            let is_link = || path.is_symlink() && fs::metadata(&path).is_err();
            if known && (path.is_file() || is_link()) {
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

/// The name of our file: before all primaries but those that call it.
fn name_of_ours(callers: &[String], first: &str) -> Option<&'static str> {
    let (prefix, before_multus) = BEFORE_MULTUS;
    let preferred = first.starts_with(prefix).then_some(before_multus);
    let mut names = preferred.into_iter().chain(NAMES);
    names.find(|name| *name < first && callers.iter().all(|caller| caller.as_str() < *name))
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(PLUGIN)
}

/// What a file of ours is without our plugin; `None` if nothing of it is left.
fn without_ours(ours: &[u8]) -> Option<Vec<u8>> {
    let mut list: Value = serde_json::from_slice(ours).ok()?;
    let plugins = list.get_mut("plugins")?.as_array_mut()?;
    plugins.retain(|plugin| !is_ours(plugin));
    (!plugins.is_empty()).then_some(())?;
    let mut text = serde_json::to_vec_pretty(&list).ok()?;
    text.push(b'\n');
    Some(text)
}

/// Whether something in here is our plugin, or the path of our file.
fn names_ours(value: &Value) -> bool {
    match value {
        Value::String(text) => text.ends_with(SUFFIX),
        Value::Array(items) => items.iter().any(names_ours),
        Value::Object(fields) => is_ours(value) || fields.values().any(names_ours),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn remove(path: &Path) -> Result<(), ChainError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ChainError::Io { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// The primary that a file of ours is of, if it is one that works.
fn primary_of(ours: &[u8]) -> Option<String> {
    let list: Value = serde_json::from_slice(ours).ok()?;
    let plugin = list.get("plugins")?.as_array()?.last()?;
    (plugin.get("type")?.as_str()? == PLUGIN).then_some(())?;
    Some(plugin.get(PRIMARY)?.as_str()?.to_owned())
}

/// The configuration of the primary of this `name` as a list, with our plugin at its end. The network keeps its name:
/// addresses are managed by it.
fn compose(primary: &[u8], is_list: bool, plugin: &Value, name: &str) -> Result<Vec<u8>, String> {
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
    plugins.retain(|other| !is_ours(other));
    if plugins.is_empty() {
        return Err("it has no plugins but ours".to_owned());
    }
    let mut plugin = plugin.clone();
    if let Some(plugin) = plugin.as_object_mut() {
        plugin.insert(PRIMARY.to_owned(), name.into());
    }
    plugins.push(plugin);
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
