//! The node's side of verdicts where one process captures pods and another one writes verdicts: the node agent, and ztunnel.
//!
//! The one that captures attaches the programs, and looks which pods qualify. What the other has to know of a pod is noted beside
//! the maps, as the name of a directory (files of this file system hold nothing but objects):
//!
//! ```text
//! ROOT/verdicts-INODE OF THE NODE'S NAMESPACE/pod-COOKIE-DEVICE-INSIDE-EXEMPTS
//! ```
//!
//! Invariants:
//! * a pod is noted after its device has the program, and for as long as it qualifies;
//! * who writes verdicts holds the lock of the directory ([`alone`]) until its process has ended: there is one at a time;
//! * nothing that is noted here lets anything pass by itself.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::maps::{HashMap, MapData, MapInfo};
use net::{MARK_MASK, Netns};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::device::{self, DEVICE, Qualified, Why, is_attached};
use super::{Pair, Side, destroy, links, map, of_pair};
use crate::layout::{MARK_GRANTED, PairKey, VerdictEntry};
use crate::pins::cookie;
use crate::{Error, Pins, sys};

/// Before the numbers of a note.
const NOTE: &str = "pod-";
/// The machine's own clocks (kernel include/linux/proc_ns.h, `PROC_TIME_INIT_INO`): those of another namespace may be ahead, and so
/// would be the end of a lease.
const MACHINES_CLOCKS: &str = "time:[4026531834]";

/// What has to be known of a pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Note {
    cookie: u64,
    device: u32,
    inside: u32,
    exempts: bool,
}

impl Note {
    fn name(self) -> String {
        let Self { cookie, device, inside, exempts } = self;
        format!("{NOTE}{cookie}-{device}-{inside}-{}", u8::from(exempts))
    }

    fn read(name: &str) -> Option<Self> {
        let mut numbers = name.strip_prefix(NOTE)?.split('-');
        let mut next = || numbers.next();
        let note = Self {
            cookie: next()?.parse().ok()?,
            device: next()?.parse().ok()?,
            inside: next()?.parse().ok()?,
            exempts: match next()? {
                "0" => false,
                "1" => true,
                _ => return None,
            },
        };
        next().is_none().then_some(note)
    }
}

/// The programs of a node's verdicts, for whoever captures its pods and leaves it to another process to write verdicts.
#[derive(Debug)]
pub struct Node {
    pins: Pins,
    directory: PathBuf,
    netns: Netns,
    from_pod: OwnedFd,
}

impl Node {
    /// Loads the programs and puts them in the place of those that are there. `cgroups` is where the machine's cgroups are,
    /// `netns` is the node's namespace. Verdicts, lease and owner stay as they are.
    ///
    /// Pods that are captured already have to be captured again: their programs don't know these maps.
    ///
    /// # Errors
    /// The kernel refuses the programs, or the root of the machine's cgroups (version 2) is not to be found.
    pub fn attach(pins: &Pins, cgroups: &Path, netns: Netns) -> Result<Self, Error> {
        let directory = pins.verdicts();
        let from_pod = {
            let _held = pins.hold()?;
            attach(&directory, cgroups)?
        };
        let node = Self { pins: pins.clone(), directory, netns, from_pod };
        node.sweep();
        Ok(node)
    }

    /// Whether all of it is still there: whoever cleans up may have taken it away.
    #[must_use]
    pub fn stands(&self) -> bool {
        links::stand(&self.directory)
    }

    /// Looks whether connections between `pod` and others can do without a proxy. If they can, its device gets the program and the
    /// pod is noted; if they can't, it isn't noted any more. May be asked again.
    ///
    /// # Errors
    /// Why not.
    pub fn join(&self, pod: &Netns) -> Result<Qualified, Why> {
        let qualified = self.qualified(pod);
        let wanted = qualified.as_ref().ok().map(|found| Note {
            cookie: found.cookie,
            device: found.device,
            inside: found.inside,
            exempts: found.exempts,
        });
        let cookie = cookie(pod)?;
        // The new one first: with two of them the pod does not count as noted.
        if let Some(note) = wanted {
            let path = self.directory.join(note.name());
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io("make", path.display())(error).into());
                }
                _ => {}
            }
        }
        for note in notes(&self.directory)?.into_iter().filter(|note| note.cookie == cookie) {
            if Some(note) != wanted {
                self.forget(note)?;
            }
        }
        qualified
    }

    fn qualified(&self, pod: &Netns) -> Result<Qualified, Why> {
        let qualified = device::qualify(&self.pins, &self.directory, &self.from_pod, &self.netns, pod)?;
        super::end_strays_of(pod, &self.directory)?;
        Ok(qualified)
    }

    /// The pod is no end of such connections any more: those that it has are ended. Whoever writes verdicts ends its pairs; until then
    /// their packets are dropped.
    ///
    /// # Errors
    /// The note stays, or the program of its device.
    pub fn leave(&self, pod: &Netns) -> Result<(), Error> {
        let cookie = cookie(pod)?;
        // First: without the program the other end would not hear of it.
        if let Err(error) = end_all(pod, &self.directory) {
            tracing::warn!(%pod, %error, "connections that no proxy carries can't be ended; they stall");
        }
        for note in notes(&self.directory)?.into_iter().filter(|note| note.cookie == cookie) {
            self.forget(note)?;
            device::release(&self.directory, note.device)?;
        }
        // One that no longer qualified may have the program all the same.
        device::release_all(&self.directory, &self.netns, pod)
    }

    fn forget(&self, note: Note) -> Result<(), Error> {
        let path = self.directory.join(note.name());
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove", path.display())(error))
            }
            _ => Ok(()),
        }
    }

    /// Removes what was noted of pods that are gone, whose devices are too. How many that were.
    pub fn sweep(&self) -> usize {
        let Ok(notes) = notes(&self.directory) else { return 0 };
        let mut removed = 0;
        for note in notes.into_iter().filter(|note| !has_program(&self.directory, note.device)) {
            match self.forget(note) {
                Ok(()) => removed += 1,
                Err(error) => tracing::warn!(%error, "what a pod that is gone left can't be removed"),
            }
        }
        links::sweep_devices(&self.directory);
        removed
    }
}

/// Attaches all programs but those of devices, and returns that of these.
pub(super) fn attach(directory: &Path, cgroups: &Path) -> Result<OwnedFd, Error> {
    let root = links::cgroup_root(cgroups)?;
    fs::create_dir_all(directory).map_err(Error::io("make", directory.display()))?;
    links::attach(directory, &root)
}

fn notes(directory: &Path) -> Result<Vec<Note>, Error> {
    let entries = fs::read_dir(directory).map_err(Error::io("list", directory.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name());
    Ok(names.filter_map(|name| Note::read(name.to_str()?)).collect())
}

fn has_program(directory: &Path, device: u32) -> bool {
    sys::open(&directory.join(format!("{DEVICE}{device}")))
        .is_ok_and(|link| is_attached(link.as_fd()) == Some(device))
}

/// What is noted of a pod in `directory`, whose map of the lease is to have this number.
pub(super) fn noted(directory: &Path, control: u32, pod: &Netns) -> Result<Qualified, Why> {
    if number(directory)? != control {
        return Err(Why::OtherMaps);
    }
    let cookie = cookie(pod)?;
    let found: Vec<Note> = notes(directory)?.into_iter().filter(|note| note.cookie == cookie).collect();
    let [Note { device, inside, exempts, .. }] = *found.as_slice() else { return Err(Why::NotNoted) };
    if !has_program(directory, device) {
        return Err(Why::NotNoted);
    }
    Ok(Qualified { cookie, device, inside, netns: pod.clone(), exempts })
}

/// What tells the maps of `directory` from earlier ones of that name.
pub(super) fn number(directory: &Path) -> Result<u32, Error> {
    let info = MapInfo::from_pin(directory.join("control")).map_err(Error::map("look at", "control"))?;
    Ok(info.id())
}

/// The directory below `root` in which one of these pods is noted, if there is one.
pub(super) fn directory(root: &Path, pods: &[Netns]) -> Result<Option<PathBuf>, Error> {
    let cookies: Vec<u64> = pods.iter().filter_map(|pod| cookie(pod).ok()).collect();
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(Error::io("list", root.display()))?,
    };
    let mut all = entries.flatten().map(|entry| entry.path()).filter(|path| crate::pins::is_verdicts(path));
    let is_ours = |path: &PathBuf| {
        notes(path).is_ok_and(|notes| notes.iter().any(|note| cookies.contains(&note.cookie)))
    };
    Ok(all.find(is_ours))
}

/// The right to write verdicts in `directory`, which one process has at a time, for as long as the value lives: the kernel gives
/// it on when the process has ended, however it did.
pub(super) fn alone(directory: &Path) -> Result<Flock<File>, Error> {
    let failed = Error::io("take over", directory.display());
    let clocks = fs::read_link("/proc/self/ns/time");
    if clocks.is_ok_and(|clocks| clocks != Path::new(MACHINES_CLOCKS)) {
        return Err(failed(io::Error::other("this process has clocks of its own (a time namespace)")));
    }
    if !links::fit(directory) {
        return Err(failed(io::Error::other("the maps are of another build's programs")));
    }
    let opened = match File::open(directory) {
        Ok(opened) => opened,
        Err(error) => return Err(failed(error)),
    };
    Flock::lock(opened, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        failed(match error {
            Errno::EWOULDBLOCK => io::Error::new(
                io::ErrorKind::WouldBlock,
                "another process writes the verdicts; it is this one's turn when that has ended",
            ),
            other => other.into(),
        })
    })
}

/// Whether the lock is that of what is at `directory` now: it may have been removed and made anew.
pub(super) fn is_of(alone: &File, directory: &Path) -> Result<(), Error> {
    let failed = |error| Error::io("take over", directory.display())(error);
    let (locked, there) = (alone.metadata().map_err(failed)?, fs::metadata(directory).map_err(failed)?);
    if (locked.dev(), locked.ino()) == (there.dev(), there.ino()) {
        return Ok(());
    }
    Err(failed(io::Error::new(io::ErrorKind::WouldBlock, "the maps have just been made anew")))
}

/// Ends a pod's sockets at either end of what passes by a verdict, or did.
fn end_all(pod: &Netns, directory: &Path) -> Result<usize, Error> {
    let verdicts: HashMap<MapData, PairKey, VerdictEntry> = map(directory, "verdicts")?;
    destroy(pod, |socket| {
        let pair = Pair { source: socket.peer.ip(), destination: socket.local };
        socket.mark.unwrap_or(0) & MARK_MASK == MARK_GRANTED
            || (of_pair(socket, Side::Destination, pair) && verdicts.get(&PairKey::from(pair), 0).is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_of_a_directory_that_was_made_anew_is_none() {
        let directory = std::env::temp_dir().join(format!("culvert-lock-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let locked = File::open(&directory).unwrap();
        is_of(&locked, &directory).unwrap();
        fs::remove_dir(&directory).unwrap();
        fs::create_dir(&directory).unwrap();
        let refused = is_of(&locked, &directory).unwrap_err();
        fs::remove_dir(&directory).unwrap();
        assert!(refused.is_taken(), "{refused}");
        assert!(!is_of(&locked, &directory).unwrap_err().is_taken(), "it is gone");
    }

    #[test]
    fn notes_are_read_as_they_are_written_and_nothing_else_is() {
        for note in [
            Note { cookie: u64::MAX, device: 7, inside: 2, exempts: false },
            Note { cookie: 1, device: u32::MAX, inside: 1, exempts: true },
        ] {
            assert_eq!(Note::read(&note.name()), Some(note));
        }
        for name in [
            "pod-",
            "pod-1-2-3",
            "pod-1-2-3-2",
            "pod-1-2-3-0-0",
            "pod-1-2--3-0",
            "pod-x-2-3-0",
            "link-device-3",
        ] {
            assert_eq!(Note::read(name), None, "{name}");
        }
    }
}
