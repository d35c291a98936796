//! Pipes for splice(2): bytes pass from socket to socket as references to the kernel's pages, uncopied.
//!
//! Invariant: a pipe in a pool is empty. One that still holds bytes when its connection ends is closed.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// Pipes that exist at a time in the whole process; a connection beyond them copies through user space.
const LIMIT: usize = 1024;

/// Empty pipes that a thread keeps for later.
const KEPT_PER_THREAD: usize = 4;

/// How much a pipe is to hold, and what is asked for at once, bytes. The default is 64 KiB in 16 pages.
const CAPACITY: i32 = 512 * 1024;
const AT_ONCE: usize = 512 * 1024;

static EXISTING: AtomicUsize = AtomicUsize::new(0);
static WITHOUT: AtomicU64 = AtomicU64::new(0);

/// The process's pipes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PipeCounts {
    /// Those that there are, in use or kept empty for the next.
    pub existing: usize,
    /// How many there may be.
    pub limit: usize,
    /// How often one was wanted and there was none, so that bytes were copied.
    pub without: u64,
}

/// How many pipes there are.
#[must_use]
pub fn pipes() -> PipeCounts {
    let existing = EXISTING.load(Ordering::Relaxed);
    PipeCounts { existing, limit: LIMIT, without: WITHOUT.load(Ordering::Relaxed) }
}

thread_local! {
    static KEPT: RefCell<Vec<Ends>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl Drop for Ends {
    fn drop(&mut self) {
        EXISTING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A pipe and how many bytes are in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    /// `None` only while being dropped.
    ends: Option<Ends>,
    len: usize,
}

impl Pipe {
    /// An empty pipe; `None` when there are too many, or descriptors have run out.
    pub(crate) fn take() -> Option<Self> {
        let kept = KEPT.try_with(|kept| kept.borrow_mut().pop()).ok().flatten();
        let Some(ends) = kept.or_else(Self::make) else {
            WITHOUT.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        Some(Self { ends: Some(ends), len: 0 })
    }

    fn make() -> Option<Ends> {
        if EXISTING.fetch_add(1, Ordering::Relaxed) >= LIMIT {
            EXISTING.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        match pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK) {
            Ok((read, write)) => {
                // Refused where the user's pipes hold too much already; a small one serves too.
                let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(CAPACITY));
                Some(Ends { read, write })
            }
            Err(_) => {
                EXISTING.fetch_sub(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// Bytes that wait in it.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes what `socket` has, 0 at its end. Only for an empty pipe: for a full one the kernel's answer is
    /// the same as for a socket without data.
    pub(crate) fn fill(&mut self, socket: impl AsFd) -> io::Result<usize> {
        debug_assert_eq!(self.len, 0, "a pipe is filled only when empty");
        let ends = self.ends.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let moved = splice(socket, None, &ends.write, None, AT_ONCE, flags())?;
        self.len = moved;
        Ok(moved)
    }

    /// Gives `socket` what it takes of it.
    pub(crate) fn drain(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let ends = self.ends.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let moved = splice(&ends.read, None, socket, None, self.len, flags())?;
        self.len = self.len.saturating_sub(moved);
        Ok(moved)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let Some(ends) = self.ends.take().filter(|_| self.len == 0) else { return };
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            if kept.len() < KEPT_PER_THREAD {
                kept.push(ends);
            }
        });
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}
