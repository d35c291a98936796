//! Where a process keeps its last good configuration: a place of its own in the state directory, since during an upgrade
//! two of them run beside each other on one node. A process begins with what was kept last, whoever kept it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};

/// So many processes at a time can keep something: one, and two during an upgrade; one more that ends.
const PLACES: usize = 3;
const LOCK: &str = "lock";

/// A place that no other process has, for as long as this is held, also when the process is killed.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Place {
    /// Takes a free place below `directory`; `None` when all are taken.
    ///
    /// # Errors
    /// The directory can't be made or written.
    pub fn take(directory: &Path) -> io::Result<Option<Self>> {
        let paths: Vec<PathBuf> = (0..PLACES).map(|n| directory.join(format!("configuration-{n}"))).collect();
        for path in &paths {
            fs::create_dir_all(path)?;
            let lock = File::options().create(true).append(true).open(path.join(LOCK))?;
            let Ok(lock) = Flock::lock(lock, FlockArg::LockExclusiveNonblock) else { continue };
            let newest = paths.iter().max_by_key(|path| changed(path)).filter(|newest| *newest != path);
            if let Some(newest) = newest {
                // What is being appended there is cut off at its last whole entry when it is read.
                take_over(newest, path)?;
            }
            return Ok(Some(Self { path: path.clone(), _lock: lock }));
        }
        Ok(None)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The files of a place, but for its lock.
fn files(place: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.is_file() && path.file_name().is_some_and(|name| name != LOCK))
}

/// When something was last kept in a place.
fn changed(place: &Path) -> Option<SystemTime> {
    files(place).filter_map(|file| fs::metadata(file).and_then(|metadata| metadata.modified()).ok()).max()
}

/// Puts the files of one place into another, instead of those there.
fn take_over(from: &Path, to: &Path) -> io::Result<()> {
    for old in files(to) {
        fs::remove_file(old)?;
    }
    for file in files(from) {
        let Some(name) = file.file_name() else { continue };
        match fs::copy(&file, to.join(name)) {
            // It may have been put in place of another meanwhile, or have gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            copied => drop(copied?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_begins_with_what_was_kept_last_and_disturbs_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let write = |place: &Place, text: &str| fs::write(place.path().join("journal"), text).unwrap();
        let read = |place: &Place| fs::read_to_string(place.path().join("journal")).ok();
        let first = Place::take(&state).unwrap().unwrap();
        assert_eq!(read(&first), None);
        write(&first, "one");
        let second = Place::take(&state).unwrap().unwrap();
        assert_eq!(read(&second).as_deref(), Some("one"));
        std::thread::sleep(std::time::Duration::from_millis(20));
        write(&second, "two");
        assert_eq!(read(&first).as_deref(), Some("one"));
        drop((first, second));
        // The first place is free again; what is newest is in the second.
        let third = Place::take(&state).unwrap().unwrap();
        assert_eq!(read(&third).as_deref(), Some("two"));
        let others = [Place::take(&state).unwrap(), Place::take(&state).unwrap()];
        assert!(others.iter().all(Option::is_some));
        assert!(Place::take(&state).unwrap().is_none(), "more than there are places");
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(Place::take(&file).is_err());
    }
}
