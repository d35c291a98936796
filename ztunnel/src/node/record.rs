//! Which network namespaces hold our redirection, kept on disk: the redirection outlives the process, and the next
//! one must know where to look.
//!
//! An entry is written before the rules are, and goes after they went. The file belongs on a file system that the
//! machine forgets when it starts anew (`/run`), as it forgets namespaces.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use capture::Backend;
use net::Netns;
use serde::{Deserialize, Serialize};

/// A namespace with our redirection in it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// `namespace/name` of the pod, for messages.
    pub pod: String,
    /// Which namespace it was: the path may lead to another one later.
    pub inode: u64,
    /// What wrote the redirection, see [`Backend::as_str`].
    pub backend: String,
}

/// The record, one a node.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    entries: Mutex<BTreeMap<PathBuf, Entry>>,
}

impl Record {
    /// Reads the record of `node` in `directory`, which is made if it is missing.
    ///
    /// # Errors
    /// The directory can't be made, or the file not be read.
    pub fn open(directory: &Path, node: &str) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory).with_context(|| {
            format!("state directory {} (--state-dir names another)", directory.display())
        })?;
        // A node's name is a DNS name as a rule; whatever it is, it stays inside of the directory.
        let name: String = node.chars().map(|c| if c == '/' { '_' } else { c }).collect();
        let path = directory.join(format!("{name}.captured.json"));
        let entries = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::error!(
                    file = %path.display(), %error,
                    "the record of captured pods can't be read; pods that left meanwhile stay closed"
                );
                BTreeMap::new()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("record of captured pods {}", path.display()));
            }
        };
        Ok(Self { path, entries: Mutex::new(entries) })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `netns` is about to hold the redirection of `backend`. Returns the other back-end that did before: that one
    /// stays noted until it is [`Record::replaced`], so that who fails tries again.
    pub fn note(&self, netns: &Netns, pod: &str, backend: Backend) -> Option<Backend> {
        let (path, inode) = (netns.name().to_owned(), netns.id().inode());
        let entry = Entry { pod: pod.to_owned(), inode, backend: backend.as_str().to_owned() };
        let mut entries = self.entries();
        if entries.get(&path) == Some(&entry) {
            return None;
        }
        let before = entries.get(&path).filter(|entry| entry.inode == inode);
        let other = before.and_then(|entry| entry.backend.parse().ok()).filter(|before| *before != backend);
        if other.is_none() {
            entries.insert(path, entry);
            self.write(&entries);
        }
        other
    }

    /// Notes that `backend` has taken the place of the other one in `netns`.
    pub fn replaced(&self, netns: &Netns, pod: &str, backend: Backend) {
        let entry =
            Entry { pod: pod.to_owned(), inode: netns.id().inode(), backend: backend.as_str().to_owned() };
        let mut entries = self.entries();
        entries.insert(netns.name().to_owned(), entry);
        self.write(&entries);
    }

    /// Which back-end is noted of `netns`, if it is another one than `backend`.
    pub fn other(&self, netns: &Netns, backend: Backend) -> Option<Backend> {
        let entries = self.entries();
        let entry = entries.get(netns.name()).filter(|entry| entry.inode == netns.id().inode());
        entry.and_then(|entry| entry.backend.parse().ok()).filter(|noted| *noted != backend)
    }

    /// Notes that nothing of ours is in `netns` any more.
    pub fn forget(&self, netns: &Netns) {
        let mut entries = self.entries();
        let count = entries.len();
        entries.retain(|path, entry| path != netns.name() || entry.inode != netns.id().inode());
        if entries.len() != count {
            self.write(&entries);
        }
    }

    /// The namespaces that are still there, with what is noted of them. Those that are gone are forgotten.
    pub fn standing(&self) -> Vec<(Netns, Entry)> {
        let mut entries = self.entries();
        let (count, mut standing) = (entries.len(), Vec::new());
        entries.retain(|path, entry| match Netns::open(path) {
            Ok(netns) if netns.id().inode() == entry.inode => {
                standing.push((netns, entry.clone()));
                true
            }
            Ok(_)
            | Err(net::netns::OpenError::Vanished { .. } | net::netns::OpenError::NotANamespace { .. }) => {
                false
            }
            Err(error) => {
                tracing::error!(pod = entry.pod, %error, "whether the pod is captured can't be seen");
                true
            }
        });
        if entries.len() != count {
            self.write(&entries);
        }
        standing
    }

    /// Replaces the file. Without it the redirection works as well; only the next process will know less.
    fn write(&self, entries: &BTreeMap<PathBuf, Entry>) {
        let write = || -> io::Result<()> {
            let next = self.path.with_extension("json.next");
            std::fs::write(&next, serde_json::to_vec_pretty(entries)?)?;
            std::fs::rename(&next, &self.path)
        };
        if let Err(error) = write() {
            tracing::error!(file = %self.path.display(), %error, "the record of captured pods can't be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_there_for_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let here = Netns::open("/proc/self/ns/net").unwrap();
        let record = Record::open(&state, "node/1").unwrap();
        assert_eq!(record.note(&here, "shop/web", Backend::Nftables), None);
        assert_eq!(record.note(&here, "shop/web", Backend::Nftables), None);

        let next = Record::open(&state, "node/1").unwrap();
        let standing = next.standing();
        assert_eq!(standing.len(), 1);
        assert_eq!((&*standing[0].1.pod, standing[0].0.same(&here)), ("shop/web", true));
        // Until it is replaced, and not only once.
        for _ in 0..2 {
            assert_eq!(next.note(&here, "shop/web", Backend::IptablesNft), Some(Backend::Nftables));
            assert_eq!(Record::open(&state, "node/1").unwrap().standing()[0].1.backend, "nftables");
        }
        next.replaced(&here, "shop/web", Backend::IptablesNft);
        assert_eq!(next.note(&here, "shop/web", Backend::IptablesNft), None);
        assert_eq!(Record::open(&state, "node/1").unwrap().standing()[0].1.backend, "iptables-nft");
        next.forget(&here);
        assert_eq!(Record::open(&state, "node/1").unwrap().standing().len(), 0);
        assert_eq!(Record::open(&state, "other").unwrap().standing().len(), 0);
    }

    #[test]
    fn a_damaged_record_and_a_namespace_that_is_gone_are_no_reason_to_fail() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("n.captured.json"), "{").unwrap();
        assert_eq!(Record::open(dir.path(), "n").unwrap().standing(), []);
        let gone = r#"{"/run/netns/no-such-namespace": {"pod": "a/b", "inode": 7, "backend": "nftables"}}"#;
        std::fs::write(dir.path().join("n.captured.json"), gone).unwrap();
        assert_eq!(Record::open(dir.path(), "n").unwrap().standing(), []);
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = Record::open(&file, "n").unwrap_err();
        assert!(format!("{error:#}").contains("--state-dir"), "{error:#}");
    }
}
