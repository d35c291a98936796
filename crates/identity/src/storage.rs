//! A directory for secrets: who may read it, how files in it are replaced, and whether it is memory or a disk.
//!
//! Invariants:
//! * the directory belongs to this user (or root) and nobody else can enter it;
//! * a secret file that others can read is refused, not read;
//! * a file is replaced whole or not at all, also when the machine stops in between;
//! * edits of several steps hold the directory's lock.
//!
//! All calls block for as long as the file system does.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::geteuid;

/// Larger files are refused unread.
const MAX_FILE: u64 = 1 << 20;
/// linux/magic.h; not among nix's constants.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
const LOCK_FILE: &str = ".lock";
/// How long another process may hold the lock; its edits take milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Why a directory or file of secrets can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The system call failed.
    #[error("can't {what} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It is not a directory, or not a regular file.
    #[error("{} is not a {expected}", path.display())]
    WrongKind {
        /// What.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// It belongs to another user.
    #[error("{} belongs to uid {owner}, not to root or the uid {euid} of this process: chown it", path.display())]
    Owner {
        /// What.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// This process's effective uid.
        euid: u32,
    },
    /// Others can get at it.
    #[error("{} has mode {mode:04o}, so that others can get at it: chmod it to {want:04o}", path.display())]
    Mode {
        /// What.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode it should have.
        want: u32,
    },
    /// It is larger than any such file is.
    #[error("{} has {size} bytes, at most {MAX_FILE} are read", path.display())]
    TooLarge {
        /// What.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Secrets would be written to a disk.
    #[error(
        "{} is on a file system of type {fs:#x}, not on a tmpfs: keys would reach a disk",
        path.display()
    )]
    NotInMemory {
        /// What.
        path: PathBuf,
        /// The file system's magic number (statfs(2)).
        fs: i64,
    },
    /// Another process holds the lock for longer than any edit takes.
    #[error("{} is locked by another process", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
}

/// A directory that only this user can enter.
#[derive(Clone, Debug)]
pub(crate) struct SecretDir {
    path: PathBuf,
}

/// Held during an edit of several steps.
pub(crate) struct DirLock(#[expect(dead_code, reason = "unlocks when dropped")] Flock<File>);

/// What a file looked like from outside; differs when the file may have changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl SecretDir {
    /// Uses a directory that exists.
    pub(crate) fn open(path: &Path) -> Result<Self, StorageError> {
        let dir = Self::named(path);
        dir.check()?;
        Ok(dir)
    }

    /// A directory that may not be there yet: see [`SecretDir::check`].
    pub(crate) fn named(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Errors unless the directory is there, and nobody else can enter it.
    pub(crate) fn check(&self) -> Result<(), StorageError> {
        let path = &self.path;
        let metadata = std::fs::metadata(path).map_err(at("look at", path))?;
        if !metadata.is_dir() {
            return Err(StorageError::WrongKind { path: path.clone(), expected: "directory" });
        }
        check_access(path, metadata.uid(), metadata.mode(), 0o700)
    }

    /// Uses a directory, making it first if it is missing (its parent must exist).
    pub(crate) fn open_or_make(path: &Path) -> Result<Self, StorageError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(at("make", path)(error)),
        }
        Self::open(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Errors unless the directory is memory.
    pub(crate) fn check_in_memory(&self) -> Result<(), StorageError> {
        let fs = statfs(&self.path)
            .map_err(|errno| at("look at the file system of", &self.path)(errno.into()))?
            .filesystem_type();
        if fs == TMPFS_MAGIC || fs == RAMFS_MAGIC {
            return Ok(());
        }
        Err(StorageError::NotInMemory { path: self.path.clone(), fs: fs.0 as i64 })
    }

    /// Waits until no other process edits the directory.
    pub(crate) fn lock(&self) -> Result<DirLock, StorageError> {
        let path = self.path.join(LOCK_FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(at("open", &path))?;
        let tries = LOCK_PATIENCE.as_millis() / LOCK_RETRY.as_millis();
        for _ in 0..tries {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(DirLock(lock)),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
                Err((_, errno)) => return Err(at("lock", &path)(errno.into())),
            };
            std::thread::sleep(LOCK_RETRY);
        }
        Err(StorageError::Locked { path })
    }

    /// Reads a file that others may know; `None` if it is missing.
    pub(crate) fn read_public(&self, name: &str) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.read(name)?.map(|(bytes, _)| bytes))
    }

    /// Reads a file that may hold a secret; `None` if it is missing. `secret` says whether it does, and then the
    /// file must be closed to others.
    pub(crate) fn read_secret(
        &self,
        name: &str,
        secret: impl FnOnce(&[u8]) -> bool,
    ) -> Result<Option<Vec<u8>>, StorageError> {
        let Some((bytes, metadata)) = self.read(name)? else { return Ok(None) };
        if secret(&bytes) {
            check_access(&self.path.join(name), metadata.uid(), metadata.mode(), 0o600)?;
        }
        Ok(Some(bytes))
    }

    /// Replaces a file, readable by this user only.
    pub(crate) fn replace(&self, name: &str, content: &[u8]) -> Result<(), StorageError> {
        let path = self.path.join(name);
        let temporary = self.temporary(name)?;
        let written = write_new(&temporary, content)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(at("replace", &path));
        if written.is_err() {
            // Best effort: the name is random and never read.
            let _ = std::fs::remove_file(&temporary);
        }
        written?;
        self.sync()
    }

    /// Gives a file another name, replacing what bears it.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), StorageError> {
        let path = self.path.join(from);
        std::fs::rename(&path, self.path.join(to)).map_err(at("rename", &path))?;
        self.sync()
    }

    /// Removes a file; it may be missing.
    pub(crate) fn remove(&self, name: &str) -> Result<(), StorageError> {
        let path = self.path.join(name);
        match std::fs::remove_file(&path) {
            Ok(()) => self.sync(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(at("remove", &path)(error)),
        }
    }

    /// Whether there is something of this name, be it a link that leads nowhere.
    pub(crate) fn exists(&self, name: &str) -> Result<bool, StorageError> {
        let path = self.path.join(name);
        match std::fs::symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(at("look at", &path)(error)),
        }
    }

    /// The names of all files but the lock and what was cut short in writing.
    pub(crate) fn names(&self) -> Result<Vec<OsString>, StorageError> {
        let names = || -> io::Result<Vec<OsString>> {
            std::fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name())).collect()
        };
        let mut names = names().map_err(at("read", &self.path))?;
        names.retain(|name| !name.as_encoded_bytes().starts_with(b"."));
        Ok(names)
    }

    /// What a file looks like from outside; `None` if it is missing.
    pub(crate) fn stamp(&self, name: &str) -> Option<FileStamp> {
        let metadata = std::fs::metadata(self.path.join(name)).ok()?;
        Some(FileStamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }

    fn read(&self, name: &str) -> Result<Option<(Vec<u8>, std::fs::Metadata)>, StorageError> {
        let path = self.path.join(name);
        // Without O_NONBLOCK, opening a pipe would wait for a writer.
        let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at("open", &path)(error)),
        };
        let metadata = file.metadata().map_err(at("look at", &path))?;
        if !metadata.is_file() {
            return Err(StorageError::WrongKind { path, expected: "regular file" });
        }
        if metadata.len() > MAX_FILE {
            return Err(StorageError::TooLarge { path, size: metadata.len() });
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes).map_err(at("read", &path))?;
        Ok(Some((bytes, metadata)))
    }

    fn temporary(&self, name: &str) -> Result<PathBuf, StorageError> {
        let mut tag = [0; 8];
        aws_lc_rs::rand::fill(&mut tag)
            .map_err(|_| at("choose a temporary name in", &self.path)(io::Error::other("no randomness")))?;
        let mut file = OsString::from(format!(".{name}."));
        file.push(format!("{:016x}", u64::from_be_bytes(tag)));
        Ok(self.path.join(file))
    }

    fn sync(&self) -> Result<(), StorageError> {
        File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(at("sync", &self.path))
    }
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn check_access(path: &Path, owner: u32, mode: u32, want: u32) -> Result<(), StorageError> {
    let euid = geteuid().as_raw();
    if owner != 0 && owner != euid {
        return Err(StorageError::Owner { path: path.to_owned(), owner, euid });
    }
    if mode & 0o077 != 0 {
        return Err(StorageError::Mode { path: path.to_owned(), mode: mode & 0o7777, want });
    }
    Ok(())
}

fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    let path = path.to_owned();
    move |source| StorageError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn secret_dir() -> (tempfile::TempDir, SecretDir) {
        let temporary = tempfile::tempdir().unwrap();
        let dir = SecretDir::open_or_make(&temporary.path().join("secrets")).unwrap();
        (temporary, dir)
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let (_keep, dir) = secret_dir();
        for mode in [0o750, 0o705, 0o777, 0o1777] {
            chmod(dir.path(), mode);
            assert!(matches!(SecretDir::open(dir.path()), Err(StorageError::Mode { .. })), "{mode:o}");
        }
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused() {
        let (_keep, dir) = secret_dir();
        dir.replace("key", b"secret").unwrap();
        assert_eq!(dir.read_secret("key", |_| true).unwrap().unwrap(), b"secret");
        for mode in [0o640, 0o604, 0o620] {
            chmod(&dir.path().join("key"), mode);
            let error = dir.read_secret("key", |_| true).unwrap_err();
            assert!(error.to_string().contains("chmod"), "{error}");
            assert!(dir.read_secret("key", |_| false).unwrap().is_some());
        }
    }

    #[test]
    fn what_is_no_file_or_too_large_is_refused() {
        let (_keep, dir) = secret_dir();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        std::fs::write(dir.path().join("big"), vec![b'x'; MAX_FILE as usize + 1]).unwrap();
        assert!(matches!(dir.read_public("sub"), Err(StorageError::WrongKind { .. })));
        assert!(matches!(dir.read_public("pipe"), Err(StorageError::WrongKind { .. })));
        assert!(matches!(dir.read_public("big"), Err(StorageError::TooLarge { .. })));
        assert!(dir.read_public("missing").unwrap().is_none());
    }

    #[test]
    fn a_replaced_file_leaves_no_temporary_behind() {
        let (_keep, dir) = secret_dir();
        dir.replace("a", b"1").unwrap();
        let before = dir.stamp("a").unwrap();
        dir.replace("a", b"2").unwrap();
        assert_ne!(dir.stamp("a").unwrap(), before);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_lock_is_held_by_one_at_a_time() {
        let (_keep, dir) = secret_dir();
        let held = dir.lock().unwrap();
        let other = dir.clone();
        let waiting = std::thread::spawn(move || other.lock().map(|_| ()));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished());
        drop(held);
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn a_disk_is_told_from_memory() {
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        chmod(memory.path(), 0o700);
        SecretDir::open(memory.path()).unwrap().check_in_memory().unwrap();
        let disk = SecretDir { path: PathBuf::from("/proc") };
        assert!(matches!(disk.check_in_memory(), Err(StorageError::NotInMemory { .. })));
    }
}
