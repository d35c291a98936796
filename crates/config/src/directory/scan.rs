//! Looking at a directory: which files there are, without reading them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::watch::Watch;
use crate::diagnostic::Code;

/// How deep directories may nest.
const MOST_DEPTH: usize = 16;

/// How many directories are looked into.
const MOST_DIRECTORIES: usize = 1000;

/// What tells one content of a file from another: device, number, size, times of modification and of change.
pub(super) type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

/// A file.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub(super) stamp: Stamp,
    pub(super) size: u64,
}

/// What was found.
#[derive(Default)]
pub(super) struct Scan {
    pub(super) files: BTreeMap<PathBuf, Found>,
    /// Files and directories that cannot be looked at, with the reason.
    pub(super) refused: BTreeMap<PathBuf, String>,
    /// Links that lead nowhere and do not look like ours: a directory's name need not show what it is.
    pub(super) dangling: BTreeMap<PathBuf, String>,
    /// The directory's device and number.
    pub(super) identity: Option<(u64, u64)>,
    /// The same of all directories below.
    pub(super) directories: BTreeMap<PathBuf, (u64, u64)>,
    visited: BTreeSet<(u64, u64)>,
    watched: BTreeSet<PathBuf>,
}

impl Scan {
    /// Looks at everything below `root`, and has every directory watched before it is looked into, so that no
    /// change falls between.
    ///
    /// # Errors
    /// The whole cannot be read: the code to report, and the reason.
    pub(super) fn of(
        root: &Path,
        most_files: usize,
        mut watch: Option<&mut Watch>,
    ) -> Result<Self, (Code, String)> {
        let mut scan = Self::default();
        if let Some(watch) = watch.as_deref_mut() {
            // The parent tells when the directory is replaced, the nearest one when it returns.
            let absolute = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
            let parent = absolute.ancestors().skip(1).find(|p| p.is_dir()).unwrap_or(Path::new("/"));
            scan.watch(watch, parent);
        }
        let metadata = fs::metadata(root).map_err(|e| {
            let code =
                if e.kind() == io::ErrorKind::NotFound { Code::DirectoryGone } else { Code::FileUnreadable };
            (code, format!("the directory cannot be read: {e}"))
        });
        let walked = metadata.and_then(|metadata| {
            scan.identity = Some((metadata.dev(), metadata.ino()));
            scan.walk(root, &metadata, 0, most_files, watch.as_deref_mut())
        });
        if let Some(watch) = watch {
            watch.keep(&scan.watched);
        }
        walked?;
        match scan.refused.remove(root) {
            Some(reason) => Err((Code::FileUnreadable, reason)),
            None => Ok(scan),
        }
    }

    /// Whether a path is below something that could not be looked at.
    pub(super) fn hides(&self, path: &Path) -> bool {
        path.ancestors().any(|p| self.refused.contains_key(p))
    }

    fn watch(&mut self, watch: &mut Watch, directory: &Path) {
        if self.watched.insert(directory.to_owned())
            && let Err(e) = watch.add(directory)
        {
            tracing::warn!("changes in {} are found late, by looking: {e}", directory.display());
        }
    }

    fn walk(
        &mut self,
        directory: &Path,
        metadata: &Metadata,
        depth: usize,
        most_files: usize,
        mut watch: Option<&mut Watch>,
    ) -> Result<(), (Code, String)> {
        if !self.visited.insert((metadata.dev(), metadata.ino())) {
            return Ok(()); // reached by two ways
        }
        if depth > 0 {
            self.directories.insert(directory.to_owned(), (metadata.dev(), metadata.ino()));
        }
        if self.visited.len() > MOST_DIRECTORIES || depth > MOST_DEPTH {
            let message =
                format!("more than {MOST_DIRECTORIES} directories, or nested deeper than {MOST_DEPTH}");
            return Err((Code::TooManyFiles, message));
        }
        if let Some(watch) = watch.as_deref_mut() {
            self.watch(watch, directory);
        }
        let entries = fs::read_dir(directory).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut entries = match entries {
            Ok(entries) => entries,
            Err(e) => {
                self.refused.insert(directory.to_owned(), format!("the directory cannot be read: {e}"));
                return Ok(());
            }
        };
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            if entry.file_type().is_ok_and(|t| t.is_symlink())
                && let Some(watch) = watch.as_deref_mut()
                && let Some(parent) = fs::canonicalize(&path).ok().as_deref().and_then(Path::parent)
            {
                self.watch(watch, parent);
            }
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => {
                    self.walk(&path, &metadata, depth + 1, most_files, watch.as_deref_mut())?;
                }
                Ok(metadata) if metadata.is_file() && is_manifest(&path) => {
                    self.files.insert(path, found(&metadata));
                    if self.files.len() > most_files {
                        return Err((
                            Code::TooManyFiles,
                            format!("the directory has more than {most_files} files"),
                        ));
                    }
                }
                Ok(_) => {}
                Err(e) => self.refuse(&entry, path, &e),
            }
        }
        Ok(())
    }

    /// Notes what cannot be looked at, unless it is gone since the directory was read. A link is not: what it leads to
    /// may be on a volume that went away, and must not be taken for deleted.
    fn refuse(&mut self, entry: &fs::DirEntry, path: PathBuf, error: &io::Error) {
        let is = |wanted: fn(&fs::FileType) -> bool| entry.file_type().as_ref().is_ok_and(wanted);
        let link = is(fs::FileType::is_symlink);
        let reason = if link {
            format!("what it leads to cannot be looked at: {error}")
        } else {
            format!("it cannot be looked at: {error}")
        };
        if error.kind() == io::ErrorKind::NotFound && (!link || fs::symlink_metadata(&path).is_err()) {
            return;
        }
        if is_manifest(&path) || is(fs::FileType::is_dir) || (link && path.extension().is_none()) {
            self.refused.insert(path, reason);
        } else if link {
            self.dangling.insert(path, reason);
        }
    }
}

fn found(metadata: &Metadata) -> Found {
    let size = metadata.size();
    let modified = (metadata.mtime(), metadata.mtime_nsec());
    let changed = (metadata.ctime(), metadata.ctime_nsec());
    Found { stamp: (metadata.dev(), metadata.ino(), size, modified, changed), size }
}

/// Whether a file is one of ours by its name.
pub(super) fn is_manifest(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
    !hidden && ["yaml", "yml", "json"].iter().any(|e| extension.eq_ignore_ascii_case(e))
}
