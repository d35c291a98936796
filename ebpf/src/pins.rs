//! Where programs and maps are kept while no process of ours runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use net::Netns;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::statfs;

use crate::{Error, sys};

/// `BPF_FS_MAGIC` (kernel include/uapi/linux/magic.h).
const MAGIC: i64 = 0xcafe_4a11;

/// Before the number of a note.
const NOTE: &str = "before-";

/// Where the system has its bpf file system.
#[must_use]
pub fn bpf_file_system() -> &'static Path {
    Path::new("/sys/fs/bpf")
}

/// A directory of a bpf file system.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// `culvert` in the bpf file system at `path`, which is mounted if nothing is there. What namespaces that are gone have left
    /// is removed.
    ///
    /// # Errors
    /// There is no such directory, or we may not mount.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::NoFileSystem { path: path.to_owned(), source };
        if !is_bpf(path).map_err(failed)? {
            let none: Option<&Path> = None;
            mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), none)
                .map_err(|error| failed(error.into()))?;
        }
        let root = path.join("culvert");
        fs::create_dir_all(&root).map_err(failed)?;
        let pins = Self { root };
        pins.sweep();
        Ok(pins)
    }

    /// The same without a look: for whoever reads what others pinned.
    #[must_use]
    pub fn of_others(path: &Path) -> Self {
        Self { root: path.join("culvert") }
    }

    /// The pods' directories.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where what belongs to a namespace is.
    #[must_use]
    pub fn of(&self, netns: &Netns) -> PathBuf {
        self.root.join(netns.id().inode().to_string())
    }

    /// Removes what belongs to namespaces that are gone. Their numbers are given again.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        for directory in entries.flatten().map(|entry| entry.path()) {
            if is_over(&directory) == Some(true)
                && let Err(error) = fs::remove_dir_all(&directory)
            {
                tracing::warn!(directory = %directory.display(), %error, "what a pod that is gone left can't be removed");
            }
        }
    }
}

/// Notes a number beside a pod's programs, for whoever removes them. What was noted before stays: it is what was found first.
///
/// # Errors
/// It can't be kept.
pub fn remember(pins: &Pins, netns: &Netns, bits: u32) -> Result<(), Error> {
    let directory = pins.of(netns);
    if is_over(&directory) == Some(true) {
        crate::remove(pins, netns)?;
    }
    fs::create_dir_all(&directory).map_err(Error::io("make", directory.display()))?;
    if !remembered_in(&directory).is_empty() {
        return Ok(());
    }
    // A directory's name: files of this file system hold nothing but objects.
    let path = directory.join(format!("{NOTE}{bits}"));
    fs::create_dir(&path).map_err(Error::io("make", path.display()))
}

/// What [`remember`] noted; 0 if nothing.
#[must_use]
pub fn remembered(pins: &Pins, netns: &Netns) -> u32 {
    remembered_in(&pins.of(netns)).first().copied().unwrap_or(0)
}

fn remembered_in(directory: &Path) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix(NOTE)?.parse().ok()).collect()
}

/// Whether the namespace of a pod's directory is gone; `None` if that can't be told.
pub(crate) fn is_over(directory: &Path) -> Option<bool> {
    let link = sys::open(&directory.join(crate::pod::SOCKETS)).ok()?;
    let info = sys::link_info(std::os::fd::AsFd::as_fd(&link)).ok()?;
    Some(info.target == 0)
}

fn is_bpf(path: &Path) -> io::Result<bool> {
    // The type's width differs between machines.
    #[allow(clippy::unnecessary_cast, reason = "it is i64 on some machines")]
    let kind = statfs(path)?.filesystem_type().0 as i64;
    Ok(kind & 0xffff_ffff == MAGIC)
}
