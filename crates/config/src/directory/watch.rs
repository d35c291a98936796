//! The kernel's word that something changed (inotify(7)).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::unix::AsyncFd;

use super::scan::is_manifest;

/// Watches on directories, and what they told since the last look.
pub(super) struct Watch {
    inotify: AsyncFdOnDemand,
    directories: BTreeMap<PathBuf, WatchDescriptor>,
    by_descriptor: HashMap<WatchDescriptor, PathBuf>,
    changed: BTreeSet<PathBuf>,
    open: BTreeSet<PathBuf>,
    told: bool,
}

/// What the kernel told.
#[derive(Default)]
pub(super) struct Changed {
    /// The files that changed, or were closed after that.
    pub(super) files: BTreeSet<PathBuf>,
    /// Those of them that were written to and not closed since.
    pub(super) open: BTreeSet<PathBuf>,
}

/// [`AsyncFd`] needs a runtime, which there is when something is awaited, not when a directory is opened.
enum AsyncFdOnDemand {
    Plain(Descriptor),
    Registered(AsyncFd<Descriptor>),
    Lost,
}

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

#[expect(
    deprecated,
    reason = "its successor is unsafe; the descriptor is owned here, never replaced or closed"
)]
fn register(descriptor: Descriptor) -> io::Result<AsyncFd<Descriptor>> {
    AsyncFd::new(descriptor)
}

fn mask() -> AddWatchFlags {
    AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR
}

impl Watch {
    pub(super) fn new() -> nix::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        Ok(Self {
            inotify: AsyncFdOnDemand::Plain(Descriptor(inotify)),
            directories: BTreeMap::new(),
            by_descriptor: HashMap::new(),
            changed: BTreeSet::new(),
            open: BTreeSet::new(),
            told: false,
        })
    }

    fn get(&self) -> Option<&Inotify> {
        match &self.inotify {
            AsyncFdOnDemand::Plain(descriptor) => Some(&descriptor.0),
            AsyncFdOnDemand::Registered(fd) => Some(&fd.get_ref().0),
            AsyncFdOnDemand::Lost => None,
        }
    }

    /// Watches a directory; one that is watched already is watched anew should another stand in its place.
    pub(super) fn add(&mut self, directory: &Path) -> nix::Result<()> {
        let Some(inotify) = self.get() else { return Ok(()) };
        let descriptor = inotify.add_watch(directory, mask())?;
        if let Some(old) = self.directories.insert(directory.to_owned(), descriptor)
            && old != descriptor
        {
            self.forget(old);
        }
        self.by_descriptor.insert(descriptor, directory.to_owned());
        Ok(())
    }

    /// Stops watching directories that are not in `wanted`.
    pub(super) fn keep(&mut self, wanted: &BTreeSet<PathBuf>) {
        let unwanted: Vec<PathBuf> =
            self.directories.keys().filter(|d| !wanted.contains(*d)).cloned().collect();
        for directory in unwanted {
            if let Some(descriptor) = self.directories.remove(&directory) {
                self.forget(descriptor);
            }
        }
    }

    fn forget(&mut self, descriptor: WatchDescriptor) {
        // Two paths may lead to one directory.
        if self.directories.values().any(|d| *d == descriptor) {
            return;
        }
        self.by_descriptor.remove(&descriptor);
        if let Some(inotify) = self.get() {
            // Refused where the kernel dropped the watch with its directory.
            let _ = inotify.rm_watch(descriptor);
        }
    }

    /// Whether nothing was told since the last look.
    pub(super) fn is_quiet(&self) -> bool {
        !self.told
    }

    /// Whether a file was written to and not closed since.
    pub(super) fn has_open_files(&self) -> bool {
        !self.open.is_empty()
    }

    /// The files that were told of since the last look.
    pub(super) fn take_changed(&mut self) -> Changed {
        self.told = false;
        // One that is still open now has waited long enough; if it is written to again, or closed, that is told again.
        Changed { files: std::mem::take(&mut self.changed), open: std::mem::take(&mut self.open) }
    }

    /// Waits until something is told. Cancelling it loses nothing.
    pub(super) async fn event(&mut self) {
        loop {
            match self.read().await {
                Ok(events) => {
                    let mut relevant = false;
                    for event in events {
                        relevant |= self.take(event);
                    }
                    if relevant {
                        self.told = true;
                        return;
                    }
                }
                Err(e) => {
                    tracing::warn!("changes of files are found late, by looking: inotify: {e}");
                    self.inotify = AsyncFdOnDemand::Lost;
                }
            }
        }
    }

    async fn read(&mut self) -> io::Result<Vec<InotifyEvent>> {
        self.inotify = match std::mem::replace(&mut self.inotify, AsyncFdOnDemand::Lost) {
            AsyncFdOnDemand::Plain(descriptor) => AsyncFdOnDemand::Registered(register(descriptor)?),
            other => other,
        };
        let AsyncFdOnDemand::Registered(fd) = &self.inotify else {
            return std::future::pending().await;
        };
        loop {
            let mut ready = fd.readable().await?;
            match ready.try_io(|fd| fd.get_ref().0.read_events().map_err(io::Error::from)) {
                Ok(Err(e)) if e.raw_os_error() == Some(Errno::EINTR as i32) => {}
                Ok(events) => return events,
                Err(_) => {}
            }
        }
    }

    /// Notes an event; whether it can concern a file of ours.
    fn take(&mut self, event: InotifyEvent) -> bool {
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            return false; // our own doing, or told by another event
        }
        let Some(name) = event.name else { return true };
        let Some(path) = self.by_descriptor.get(&event.wd).map(|d| d.join(name)) else { return true };
        if !is_manifest(&path) {
            // Directories, links such as a ConfigMap's `..data`, and editors' files: content does not matter.
            return !event.mask.intersects(AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE);
        }
        if event.mask.contains(AddWatchFlags::IN_MODIFY) {
            self.open.insert(path.clone());
        } else {
            self.open.remove(&path);
        }
        self.changed.insert(path);
        true
    }
}
