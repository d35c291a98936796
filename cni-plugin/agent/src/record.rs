//! Which pods hold our redirection, kept on disk: it outlives this process, and what knows nothing of a pod must not
//! take it for one that was never in the mesh.
//!
//! An entry is written before the pod's rules are, and goes after the pod went. The file is replaced as a whole, and
//! outlives the node's restart too, which network namespaces don't: an entry of an earlier boot is dropped when it is read,
//! and its pod is added anew by the container runtime.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::zds::PodIdentity;

/// The form of the file.
const VERSION: u32 = 1;
/// More pods no node has.
const ENTRY_LIMIT: usize = 8192;
/// The size of the file, bytes: some kilobytes a pod.
const SIZE_LIMIT: u64 = 64 << 20;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A pod with our redirection in its namespace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Its uid.
    pub uid: String,
    /// The uid that the node knows it by, where that is another.
    #[serde(default)]
    pub static_uid: Option<String>,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its service account.
    pub service_account: String,
    /// The id of its sandbox, where the container runtime told it.
    pub container: Option<String>,
    /// Where its network namespace was opened.
    pub netns: PathBuf,
    /// Which network namespace it was: the path may lead to another one later.
    pub inode: u64,
    /// Its addresses, as far as they were known.
    pub addresses: Vec<IpAddr>,
    /// Its annotations on capture.
    pub annotations: BTreeMap<String, String>,
    /// The ports of its probes.
    pub probe_ports: Vec<u16>,
    /// What wrote the rules, see [`capture::Backend::as_str`].
    pub backend: String,
    /// Whether it leaves the mesh: nothing new is captured, what is open goes on.
    #[serde(default)]
    pub leaving: bool,
}

impl Entry {
    /// Who it is.
    #[must_use]
    pub fn identity(&self) -> PodIdentity {
        PodIdentity {
            uid: self.uid.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            service_account: self.service_account.clone(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    boot: String,
    pods: Vec<Entry>,
}

/// The record.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    boot: String,
    content: Mutex<Content>,
}

#[derive(Debug, Default)]
struct Content {
    entries: BTreeMap<String, Entry>,
    /// Why the file lacks what is in memory.
    trouble: Option<String>,
}

impl Record {
    /// Reads the record in `directory`, which is made if it is missing. A file that can't be read is put aside, and the
    /// pods are found again by their labels and processes.
    ///
    /// # Errors
    /// The directory can't be made.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let path = directory.join("pods.json");
        let boot = fs::read_to_string(BOOT_ID).map(|id| id.trim().to_owned()).unwrap_or_default();
        let entries = match read(&path) {
            Ok(Some(file)) if file.boot == boot => file.pods,
            Ok(Some(file)) => {
                tracing::info!(
                    pods = file.pods.len(),
                    "the node has started anew: its pods will be added again"
                );
                Vec::new()
            }
            Ok(None) => Vec::new(),
            Err(error) => {
                let aside = path.with_extension("json.bad");
                let kept = fs::rename(&path, &aside).is_ok();
                tracing::error!(
                    file = %path.display(), kept_as = kept.then(|| aside.display().to_string()), %error,
                    "the record of captured pods can't be read; they are looked for"
                );
                Vec::new()
            }
        };
        let entries = entries.into_iter().take(ENTRY_LIMIT).map(|entry| (entry.uid.clone(), entry)).collect();
        Ok(Self { path, boot, content: Mutex::new(Content { entries, trouble: None }) })
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All entries.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        self.content().entries.values().cloned().collect()
    }

    /// Notes a pod, in the place of what was noted of it before.
    pub fn put(&self, entry: Entry) {
        let mut content = self.content();
        if content.entries.get(&entry.uid) == Some(&entry) {
            return;
        }
        if content.entries.len() >= ENTRY_LIMIT && !content.entries.contains_key(&entry.uid) {
            tracing::error!(
                limit = ENTRY_LIMIT,
                pod = entry.name,
                "too many pods to keep a record of this one"
            );
            return;
        }
        content.entries.insert(entry.uid.clone(), entry);
        self.write(&mut content);
    }

    /// What is noted of a pod.
    #[must_use]
    pub fn get(&self, uid: &str) -> Option<Entry> {
        self.content().entries.get(uid).cloned()
    }

    /// Forgets a pod.
    pub fn remove(&self, uid: &str) {
        let mut content = self.content();
        if content.entries.remove(uid).is_some() {
            self.write(&mut content);
        }
    }

    /// Deletes the file: nothing comes after this.
    ///
    /// # Errors
    /// It can't be deleted.
    pub fn erase(self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Tries again what could not be written.
    ///
    /// # Errors
    /// It still can't be: why.
    pub fn settle(&self) -> Result<(), String> {
        let mut content = self.content();
        if content.trouble.is_some() {
            self.write(&mut content);
        }
        content.trouble.clone().map_or(Ok(()), Err)
    }

    /// Replaces the file. Without it everything works as well; only the next process will know less, and look for the
    /// pods. Their rules stand, and refuse, until it has found them.
    fn write(&self, content: &mut Content) {
        let file = File {
            version: VERSION,
            boot: self.boot.clone(),
            pods: content.entries.values().cloned().collect(),
        };
        let outcome =
            serde_json::to_vec(&file).map_err(io::Error::from).and_then(|b| replace(&self.path, &b, 0o600));
        let trouble = outcome.err().map(|error| format!("{}: {error}", self.path.display()));
        match (&content.trouble, &trouble) {
            (None, Some(error)) => {
                tracing::error!(error, "the record of captured pods can't be written; trying again");
            }
            (Some(_), None) => tracing::info!("the record of captured pods is written again"),
            _ => {}
        }
        content.trouble = trouble;
    }
}

fn read(path: &Path) -> io::Result<Option<File>> {
    let mut bytes = Vec::new();
    match fs::File::open(path) {
        Ok(file) => file.take(SIZE_LIMIT).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let file: File = serde_json::from_slice(&bytes)?;
    if file.version == VERSION {
        return Ok(Some(file));
    }
    let message = format!("version {}, and {VERSION} is known", file.version);
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}

/// Puts a file in the place of another, or of none, in one step: a reader, or a crash, finds the old or the new one.
///
/// # Errors
/// The file system's; then the old one is as it was.
pub fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Hidden, and with an ending that container runtimes don't read.
    let next = path.with_file_name(format!(".{name}.next"));
    let write = || {
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&next)?;
        file.write_all(content)?;
        // The mode above is cut by the process's mask.
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&next, path)
    };
    let outcome = write();
    if outcome.is_err() {
        let _ = fs::remove_file(&next);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uid: &str) -> Entry {
        Entry {
            uid: uid.to_owned(),
            static_uid: None,
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            service_account: "default".to_owned(),
            container: Some("abc".to_owned()),
            netns: "/run/netns/x".into(),
            inode: 7,
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            annotations: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            probe_ports: vec![80],
            backend: "nftables".to_owned(),
            leaving: false,
        }
    }

    #[test]
    fn what_is_noted_is_there_for_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let record = Record::open(&state).unwrap();
        record.put(entry("1"));
        record.put(entry("2"));
        record.remove("1");
        let next = Record::open(&state).unwrap();
        assert_eq!(next.entries(), [entry("2")]);
        let leaving = Entry { leaving: true, ..entry("2") };
        next.put(leaving.clone());
        assert_eq!(Record::open(&state).unwrap().get("2"), Some(leaving));
    }

    #[test]
    fn an_entry_of_an_earlier_boot_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        Record::open(dir.path()).unwrap().put(entry("1"));
        let path = dir.path().join("pods.json");
        let boot = fs::read_to_string(BOOT_ID).unwrap();
        let text = fs::read_to_string(&path).unwrap().replace(boot.trim(), "another");
        fs::write(&path, text).unwrap();
        assert_eq!(Record::open(dir.path()).unwrap().entries(), []);
    }

    #[test]
    fn what_is_erased_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        Record::open(dir.path()).unwrap().put(entry("1"));
        Record::open(dir.path()).unwrap().erase().unwrap();
        assert!(!dir.path().join("pods.json").exists());
        Record::open(dir.path()).unwrap().erase().unwrap();
    }

    #[test]
    fn a_damaged_file_or_one_of_a_later_version_is_put_aside() {
        for text in ["{", "[]", r#"{"version":2,"boot":"","pods":[]}"#, "\u{0}\u{1}"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("pods.json");
            fs::write(&path, text).unwrap();
            let record = Record::open(dir.path()).unwrap();
            assert_eq!(record.entries(), []);
            assert_eq!(fs::read_to_string(dir.path().join("pods.json.bad")).unwrap(), text);
            record.put(entry("1"));
            assert_eq!(Record::open(dir.path()).unwrap().entries().len(), 1);
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Record::open(&file).is_err(), "a file is no directory");
    }

    #[test]
    fn what_could_not_be_written_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let record = Record::open(&state).unwrap();
        fs::remove_dir(&state).unwrap();
        record.put(entry("1"));
        assert!(record.settle().unwrap_err().contains("pods.json"));
        assert_eq!(record.entries().len(), 1, "it is known all the same");
        fs::create_dir(&state).unwrap();
        assert_eq!(record.settle(), Ok(()));
        assert_eq!(Record::open(&state).unwrap().entries().len(), 1);
    }
}
