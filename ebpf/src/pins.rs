//! Where programs and maps are kept while no process of ours runs.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use net::Netns;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::statfs;

use crate::{Error, sys};

/// `BPF_FS_MAGIC` (kernel include/uapi/linux/magic.h).
const MAGIC: i64 = 0xcafe_4a11;

/// Before the number of a node's namespace.
const VERDICTS: &str = "verdicts-";

/// Before the numbers of a note: the namespace's cookie, and what is noted.
const NOTE: &str = "before-";

/// The machine's own process namespace (kernel include/linux/proc_ns.h, `PROC_PID_INIT_INO`): in another one, process 1 isn't the
/// machine's.
const MACHINES_PROCESSES: &str = "pid:[4026531836]";

/// So long after the last change a directory without live links is what a process left that ended half-way.
const HALF_MADE: Duration = Duration::from_secs(600);

/// Where the system has its bpf file system.
#[must_use]
pub fn bpf_file_system() -> &'static Path {
    Path::new("/sys/fs/bpf")
}

/// How often who opens the directory looks whether nobody installs, and how long it waits between.
const SWEEP_ATTEMPTS: u32 = 20;
const SWEEP_PAUSE: Duration = Duration::from_millis(50);

/// A directory of a bpf file system.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
    /// The number of the node's network namespace.
    node: u64,
    /// Of one that is mounted nowhere.
    _own: Option<Arc<OwnedFd>>,
}

impl Pins {
    /// `culvert` in the bpf file system at `path`, which is mounted if nothing is there and it would outlive us. What namespaces
    /// that are gone have left is removed.
    ///
    /// # Errors
    /// There is no such directory, we may not mount, or our mounts aren't the machine's.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::NoFileSystem { path: path.to_owned(), source };
        if !is_bpf(path).map_err(failed)? {
            if !outlives_us() {
                return Err(failed(io::Error::other(
                    "this process has mounts of its own, and the pins would end with it",
                )));
            }
            mount_at(path).map_err(failed)?;
        }
        let root = path.join("culvert");
        fs::create_dir_all(&root).map_err(failed)?;
        let pins = Self { root, node: here(), _own: None };
        // Whoever installs is done in a moment.
        for _ in 0..SWEEP_ATTEMPTS {
            if pins.sweep().is_some() {
                break;
            }
            std::thread::sleep(SWEEP_PAUSE);
        }
        Ok(pins)
    }

    /// In a bpf file system of this value's own, with which all of it ends: to try something.
    ///
    /// # Errors
    /// The kernel has none, or refuses.
    pub fn to_try() -> Result<Self, Error> {
        let own = net::mounts::detached(c"bpf").map_err(Error::io("make", "a bpf file system"))?;
        let root = PathBuf::from(format!("/proc/self/fd/{}/culvert", own.as_raw_fd()));
        fs::create_dir(&root).map_err(Error::io("make", root.display()))?;
        Ok(Self { root, node: here(), _own: Some(Arc::new(own)) })
    }

    /// The same without a look: for whoever reads what others pinned.
    #[must_use]
    pub fn of_others(path: &Path) -> Self {
        Self { root: path.join("culvert"), node: here(), _own: None }
    }

    /// The pods' directories.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The same for the node of which this is the network namespace; without, it is the one in which the value was made.
    #[must_use]
    pub fn of_node(self, node: &Netns) -> Self {
        Self { node: node.id().inode(), ..self }
    }

    /// Where the node's verdicts are.
    #[must_use]
    pub fn verdicts(&self) -> PathBuf {
        self.root.join(format!("{VERDICTS}{}", self.node))
    }

    /// Where what belongs to a namespace is.
    #[must_use]
    pub fn of(&self, netns: &Netns) -> PathBuf {
        self.root.join(netns.id().inode().to_string())
    }

    /// Removes what belongs to namespaces that are gone, whose numbers are given again; says of how many. `None` while somebody
    /// installs: there is a next time.
    pub fn sweep(&self) -> Option<usize> {
        self.sweep_but(None)
    }

    /// The same for whoever has attached the node's verdicts: these stay, also while no pod makes use of them.
    pub fn sweep_others(&self) -> Option<usize> {
        self.sweep_but(Some(&self.verdicts()))
    }

    fn sweep_but(&self, kept: Option<&Path>) -> Option<usize> {
        let root = File::open(&self.root).ok()?;
        let _alone = Flock::lock(root, FlockArg::LockExclusiveNonblock).ok()?;
        let entries = fs::read_dir(&self.root).ok()?;
        let mut removed = 0;
        for directory in entries.flatten().map(|entry| entry.path()) {
            if kept == Some(&directory) {
                continue;
            }
            let over = if is_verdicts(&directory) {
                !is_shared(&self.root, &directory) && crate::verdicts::is_over(&directory)
            } else {
                is_over(&directory) == Some(true)
            };
            if !over {
                continue;
            }
            match fs::remove_dir_all(&directory) {
                Ok(()) => removed += 1,
                Err(error) => {
                    tracing::warn!(directory = %directory.display(), %error, "what a pod that is gone left can't be removed");
                }
            }
        }
        Some(removed)
    }

    /// While this is held, by any process, [`Pins::sweep`] removes nothing: a namespace that takes the number of one that is gone
    /// is not to lose what it is just given.
    pub(crate) fn hold(&self) -> Result<Flock<File>, Error> {
        let failed = Error::io("lock", self.root.display());
        let locked = File::open(&self.root)
            .and_then(|root| Flock::lock(root, FlockArg::LockShared).map_err(|(_, error)| error.into()));
        locked.map_err(failed)
    }
}

/// Notes a number beside a pod's programs, for whoever removes them. What was noted before stays: it is what was found first.
///
/// # Errors
/// It can't be kept.
pub fn remember(pins: &Pins, netns: &Netns, bits: u32) -> Result<(), Error> {
    let _held = pins.hold()?;
    let directory = pins.of(netns);
    let cookie = cookie(netns)?;
    if noted(&directory, cookie).is_some() {
        return Ok(());
    }
    // The numbers of namespaces are given again: what another one left says nothing of this one.
    if is_over(&directory) == Some(true) {
        crate::remove(pins, netns)?;
    }
    fs::create_dir_all(&directory).map_err(Error::io("make", directory.display()))?;
    for note in fs::read_dir(&directory).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if is_note(&note) {
            fs::remove_dir(&note).map_err(Error::io("remove", note.display()))?;
        }
    }
    // A directory's name: files of this file system hold nothing but objects.
    let path = directory.join(format!("{NOTE}{cookie}-{bits}"));
    fs::create_dir(&path).map_err(Error::io("make", path.display()))
}

/// What [`remember`] noted of this namespace; 0 if nothing.
#[must_use]
pub fn remembered(pins: &Pins, netns: &Netns) -> u32 {
    cookie(netns).ok().and_then(|cookie| noted(&pins.of(netns), cookie)).unwrap_or(0)
}

/// Removes what [`remember`] noted, after what it is for was done.
///
/// # Errors
/// It can't be removed.
pub fn forget(pins: &Pins, netns: &Netns) -> Result<(), Error> {
    let directory = pins.of(netns);
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", directory.display())(error))
        }
        _ => Ok(()),
    }
}

fn noted(directory: &Path, cookie: u64) -> Option<u32> {
    let prefix = format!("{NOTE}{cookie}-");
    let mut entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.find_map(|entry| entry.file_name().to_str()?.strip_prefix(&prefix)?.parse().ok())
}

pub(crate) fn is_note(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NOTE))
}

/// The number of the thread's network namespace; 0 if it can't be told.
fn here() -> u64 {
    Netns::current().map_or(0, |netns| netns.id().inode())
}

pub(crate) fn is_verdicts(directory: &Path) -> bool {
    directory.file_name().is_some_and(|name| name.to_string_lossy().starts_with(VERDICTS))
}

/// Whether programs of a pod use the verdicts of `directory`.
fn is_shared(root: &Path, directory: &Path) -> bool {
    let pods = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    pods.filter(|pod| !is_verdicts(pod)).any(|pod| crate::pod::shares(&pod, directory))
}

/// What no other namespace has until the machine starts anew; and then the file system is empty.
pub(crate) fn cookie(netns: &Netns) -> Result<u64, Error> {
    netns.run(sys::netns_cookie).and_then(|cookie| cookie).map_err(Error::io("tell the cookie of", netns))
}

/// Whether the namespace of a pod's directory is gone, or never had programs that stayed; `None` if that can't be told.
pub(crate) fn is_over(directory: &Path) -> Option<bool> {
    let target = |link: &Path| {
        let link = sys::open(link)?;
        io::Result::Ok(sys::link_info(link.as_fd())?.target)
    };
    match target(&directory.join(crate::pod::SOCKETS)) {
        Ok(target) => return Some(target == 0),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return None,
        Err(_) => {}
    }
    // That link comes last.
    let mut paths = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
    let alive = |path: &Path| crate::pod::is_link(path) && target(path).ok() != Some(0);
    if paths.any(|path| alive(&path)) {
        return None;
    }
    is_at_rest(directory)?.then_some(true)
}

/// Whether nobody has put anything into a directory for a while.
pub(crate) fn is_at_rest(directory: &Path) -> Option<bool> {
    let changed = fs::metadata(directory).and_then(|metadata| metadata.modified()).ok()?;
    Some(changed.elapsed().ok()? > HALF_MADE)
}

/// Whether a mount of ours stays when we end: our mounts are those of the machine's first process. If that can't be told, no.
fn outlives_us() -> bool {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}")).ok();
    let (first, ours) = (namespace("1/ns/mnt"), namespace("thread-self/ns/mnt"));
    first.is_some() && first == ours && namespace("thread-self/ns/pid") == Some(MACHINES_PROCESSES.into())
}

fn mount_at(path: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700"))?)
}

fn is_bpf(path: &Path) -> io::Result<bool> {
    // The type's width differs between machines.
    #[allow(clippy::unnecessary_cast, reason = "it is i64 on some machines")]
    let kind = statfs(path)?.filesystem_type().0 as i64;
    Ok(kind & 0xffff_ffff == MAGIC)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use nix::sched::{CloneFlags, unshare};
    use nix::sys::statvfs::{FsFlags, statvfs};

    use super::*;

    /// In a thread with mounts of its own.
    #[test]
    fn nothing_is_mounted_that_ends_with_us() {
        let outcome = std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNS).is_err() {
                return;
            }
            let none: Option<&Path> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let path = Path::new("/mnt");
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
            let error = Pins::open(path).unwrap_err().to_string();
            assert!(error.contains("hostPath") && error.contains("/mnt"), "{error}");
            assert!(!is_bpf(path).unwrap());

            mount_at(path).unwrap();
            assert!(is_bpf(path).unwrap());
            let flags = statvfs(path).unwrap().flags();
            assert!(flags.contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC), "{flags:?}");
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
            Pins::open(path).unwrap();
        });
        outcome.join().unwrap();
    }
}
