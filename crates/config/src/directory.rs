//! A directory of files, watched.
//!
//! * All `.yaml`, `.yml` and `.json` files below it are read, in the order of their paths; hidden ones are not, and
//!   symlinks are followed (so a mounted ConfigMap works).
//! * A change is taken when the directory has been quiet for [`Options::settle`] and no file is open for writing,
//!   and everything that changed until then is one [`Outcome`].
//! * What cannot be read stays as it last was, with a diagnostic: a file, a subdirectory, the directory itself, and
//!   what a link led to; so does a directory in whose place there is an empty one, as when a volume goes away.
//! * A file that is emptied and not closed is about to be written: what it last held stays in force.
//! * The kernel's events only say when to look: each look compares all files with what was seen of them, so an
//!   event that is lost is made up for by the next, or by the slow scan that goes on beside.
//!
//! Reading and compiling is done in place, in [`Directory::open`] and [`Directory::next`]: run it where a pause of
//! some milliseconds delays nobody's connection.

mod scan;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

use crate::compile;
use crate::diagnostic::{Code, Diagnostic};
use crate::repository::{Content, Outcome, Repository};
use scan::{Found, Scan, Stamp};
use watch::{Changed, Watch};

/// How a directory is read and watched.
#[derive(Clone, Debug)]
pub struct Options {
    /// For the compiler.
    pub compile: compile::Options,
    /// How many files are read at most.
    pub most_files: usize,
    /// How large a file may be, in bytes.
    pub most_bytes: u64,
    /// How long the directory must be quiet before a change is taken.
    pub settle: Duration,
    /// The same where a file is still open for writing.
    pub settle_open: Duration,
    /// After how long a change is taken though the directory is not quiet.
    pub longest: Duration,
    /// How often to look without being told.
    pub rescan: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            compile: compile::Options::default(),
            most_files: 10_000,
            most_bytes: 64 << 20,
            settle: Duration::from_millis(20),
            settle_open: Duration::from_secs(1),
            longest: Duration::from_secs(5),
            rescan: Duration::from_secs(30),
        }
    }
}

/// How often to look while the kernel does not tell, or there is no directory to be told of.
const POLL: Duration = Duration::from_secs(1);

/// Why a directory was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be read.
    #[error("cannot read {path}", path = .0.display())]
    Unreadable(PathBuf, #[source] io::Error),
    /// It holds files or objects with errors: nothing is in force yet that could stay so.
    #[error("{} has errors:{}", .0.display(), list(.1))]
    Bad(PathBuf, Vec<Diagnostic>),
}

fn list(diagnostics: &[Diagnostic]) -> String {
    diagnostics.iter().map(|d| format!("\n{d}")).collect()
}

/// A directory that is watched.
pub struct Directory {
    path: PathBuf,
    options: Options,
    repository: Repository,
    watch: Option<Watch>,
    seen: BTreeMap<PathBuf, Seen>,
    /// Paths about which something is said that are no files of their own: directories that cannot be read.
    refused: BTreeSet<PathBuf>,
    /// The device and number of the directory as it last was.
    identity: Option<(u64, u64)>,
    /// The same of the directories below.
    directories: BTreeMap<PathBuf, (u64, u64)>,
    gone: bool,
}

/// A file as it was read last.
struct Seen {
    name: Arc<str>,
    stamp: Stamp,
}

impl Directory {
    /// Reads a directory and watches it from then on.
    ///
    /// # Errors
    /// The directory cannot be read, or holds anything with errors; then the error has all diagnostics.
    pub fn open(path: impl Into<PathBuf>, options: Options) -> Result<(Self, Outcome), OpenError> {
        let watch = match Watch::new() {
            Ok(watch) => Some(watch),
            Err(e) => {
                tracing::warn!("changes of files are found by looking every second: no inotify: {e}");
                None
            }
        };
        Self::read(path.into(), options, watch)
    }

    /// Reads a directory once.
    ///
    /// # Errors
    /// As [`Directory::open`].
    pub fn load(path: impl Into<PathBuf>, options: Options) -> Result<(Repository, Outcome), OpenError> {
        let (directory, outcome) = Self::read(path.into(), options, None)?;
        Ok((directory.repository, outcome))
    }

    fn read(path: PathBuf, options: Options, watch: Option<Watch>) -> Result<(Self, Outcome), OpenError> {
        std::fs::read_dir(&path).map_err(|e| OpenError::Unreadable(path.clone(), e))?;
        let mut directory = Self {
            repository: Repository::new(options.compile.clone()),
            path,
            options,
            watch,
            seen: BTreeMap::new(),
            refused: BTreeSet::new(),
            identity: None,
            directories: BTreeMap::new(),
            gone: false,
        };
        directory.look(Changed::default());
        let outcome = directory.repository.commit();
        if directory.repository.has_bad_files() {
            return Err(OpenError::Bad(directory.path, directory.repository.diagnostics()));
        }
        Ok((directory, outcome))
    }

    /// The next change. Cancelling it loses nothing.
    pub async fn next(&mut self) -> Outcome {
        loop {
            let changed = self.settled().await;
            if self.look(changed) {
                return self.repository.commit();
            }
        }
    }

    /// What was read.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// All there is to say, by file and place.
    #[must_use]
    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        self.repository.diagnostics()
    }

    /// Waits until there is reason to look and the directory has become quiet; gives the files to be read again
    /// though they may look unchanged.
    async fn settled(&mut self) -> Changed {
        let pause = if self.watch.is_none() || self.gone { POLL } else { self.options.rescan };
        let rescan = Instant::now() + pause;
        let Some(watch) = &mut self.watch else {
            sleep_until(rescan).await;
            return Changed::default();
        };
        if watch.is_quiet() && timeout_at(rescan, watch.event()).await.is_err() {
            return Changed::default();
        }
        let latest = Instant::now() + self.options.longest;
        loop {
            let settle = if watch.has_open_files() { self.options.settle_open } else { self.options.settle };
            let now = Instant::now();
            // A directory that is never quiet has an event at hand whenever it is asked.
            if now >= latest || timeout_at((now + settle).min(latest), watch.event()).await.is_err() {
                return watch.take_changed();
            }
        }
    }

    /// Looks at all files and stages what changed. Whether anything did.
    fn look(&mut self, mut told: Changed) -> bool {
        let scan = Scan::of(&self.path, self.options.most_files, self.watch.as_mut());
        let mut found = match scan {
            Ok(found) if self.is_replaced_by_nothing(&found) => {
                let reason = "the directory was replaced by an empty one";
                return self.lose(Code::DirectoryGone, reason);
            }
            Ok(found) => found,
            Err((code, reason)) => return self.lose(code, &reason),
        };
        self.gone = false;
        self.identity = found.identity;
        self.keep_lost(&mut found);
        let mut changed = self.set_refused(&found, &mut told);
        let gone: Vec<PathBuf> =
            self.seen.keys().filter(|p| !found.files.contains_key(*p) && !found.hides(p)).cloned().collect();
        for path in gone {
            if let Some(seen) = self.seen.remove(&path) {
                self.repository.stage(&seen.name, Content::Gone);
                changed = true;
            }
        }
        for (path, file) in &found.files {
            changed |= self.read_file(path, *file, &told);
        }
        changed
    }

    /// Counts what held files and does not any more, without having been deleted, to what cannot be read: links that
    /// lead nowhere now, and directories in whose place there is an empty one.
    fn keep_lost(&mut self, found: &mut Scan) {
        let held = |path: &Path| self.seen.keys().any(|file| file.starts_with(path));
        for (path, reason) in std::mem::take(&mut found.dangling) {
            if held(&path) {
                found.refused.insert(path, reason);
            }
        }
        let replaced = |(path, identity): &(&PathBuf, &(u64, u64))| {
            self.directories.get(*path).is_some_and(|old| old != *identity)
                && !found.files.keys().any(|file| file.starts_with(path))
                && held(path)
        };
        let lost: Vec<PathBuf> =
            found.directories.iter().filter(replaced).map(|(path, _)| path.clone()).collect();
        for path in lost {
            found.refused.insert(path, "the directory was replaced by an empty one".to_owned());
        }
        // Of what is lost, what it was before is still what it has to become again.
        self.directories.retain(|path, _| found.hides(path));
        for (path, identity) in &found.directories {
            self.directories.entry(path.clone()).or_insert(*identity);
        }
    }

    /// A mount point whose volume went away is an empty directory.
    fn is_replaced_by_nothing(&self, found: &Scan) -> bool {
        found.files.is_empty() && !self.seen.is_empty() && found.identity != self.identity
    }

    /// The whole directory cannot be read: everything stays as it was.
    fn lose(&mut self, code: Code, reason: &str) -> bool {
        self.gone = true;
        if self.refused.contains(&self.path) {
            return false;
        }
        self.refused.insert(self.path.clone());
        self.repository.stage(&name_of(&self.path), Content::Refused(code, reason));
        true
    }

    /// Says what cannot be read, and that other things can be again: files among these are told of, to be read anew.
    fn set_refused(&mut self, found: &Scan, told: &mut Changed) -> bool {
        let old = std::mem::take(&mut self.refused);
        let mut changed = false;
        for path in old.iter().filter(|p| !found.refused.contains_key(*p)) {
            if self.seen.contains_key(path) {
                told.files.insert(path.clone());
            } else {
                self.repository.stage(&name_of(path), Content::Gone);
                changed = true;
            }
        }
        for (path, reason) in found.refused.iter().filter(|(p, _)| !old.contains(*p)) {
            self.repository.stage(&name_of(path), Content::Refused(Code::FileUnreadable, reason));
            changed = true;
        }
        self.refused = found.refused.keys().cloned().collect();
        changed
    }

    fn read_file(&mut self, path: &Path, found: Found, told: &Changed) -> bool {
        let known = self.seen.get(path);
        if known.is_some_and(|seen| seen.stamp == found.stamp) && !told.files.contains(path) {
            return false;
        }
        let name = known.map_or_else(|| name_of(path), |seen| seen.name.clone());
        let limit = self.options.most_bytes;
        if found.size > limit {
            self.repository.stage(&name, Content::TooLarge(found.size, limit));
        } else {
            match read_limited(path, limit) {
                Ok(bytes) if bytes.len() as u64 > limit => {
                    self.repository.stage(&name, Content::TooLarge(bytes.len() as u64, limit));
                }
                Ok(bytes) if bytes.is_empty() && known.is_some() && told.open.contains(path) => {
                    let reason = "it is empty, and open for writing";
                    self.repository.stage(&name, Content::Unreadable(reason));
                }
                Ok(bytes) => self.repository.stage(&name, Content::Bytes(&bytes)),
                // Gone since it was found: the next look sees that.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return false,
                Err(e) => self.repository.stage(&name, Content::Unreadable(&e.to_string())),
            }
        }
        self.seen.insert(path.to_owned(), Seen { name, stamp: found.stamp });
        true
    }
}

/// The files below `path` that a [`Directory`] reads, in the order of their paths; for those who read them once.
///
/// # Errors
/// A file or directory cannot be looked at, or there are more than `most_files`; the text says which.
pub fn manifests(path: &Path, most_files: usize) -> Result<Vec<PathBuf>, String> {
    let scan =
        Scan::of(path, most_files, None).map_err(|(_, reason)| format!("{}: {reason}", path.display()))?;
    match scan.refused.first_key_value() {
        Some((path, reason)) => Err(format!("{}: {reason}", path.display())),
        None => Ok(scan.files.into_keys().collect()),
    }
}

fn name_of(path: &Path) -> Arc<str> {
    path.to_string_lossy().into()
}

/// At most one byte more than `limit`.
fn read_limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt;
    // Without blocking, should it have become a pipe since it was looked at.
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    let size = file.metadata()?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(size.min(limit) + 1).unwrap_or_default());
    file.take(limit + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
