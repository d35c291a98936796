//! Network namespaces: opening one, telling two apart, and doing something inside one.
//!
//! A socket belongs for ever to the namespace that its thread was in when `socket(2)` ran, so listeners and
//! connections of a pod are made by stepping into its namespace for a few microseconds ([`Netns::run`]).
//!
//! Invariants:
//! * after [`Netns::run`] the thread is in the namespace it came from, also when the closure panicked;
//! * a thread that may not return is never sent in: a throw-away thread goes instead;
//! * a thread that could not return all the same never runs another line: the process aborts.
//!
//! A [`Netns`] holds a descriptor, and so keeps the namespace alive (with its devices) after its last process
//! has ended: drop it when the pod goes.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::fstat;
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use socket2::{Domain, Socket};

use crate::stock::{self, Stock};

/// Why a network namespace could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing is at the path: the namespace was deleted, or its process has ended.
    #[error("network namespace {path} does not exist (any more)")]
    Vanished {
        /// What was opened.
        path: PathBuf,
    },
    /// The file is none of the kernel's namespace files. An empty regular file in `/run/netns` is what an
    /// unmounted namespace leaves behind.
    #[error("{path} is not a namespace file; a deleted namespace leaves such a file in /run/netns")]
    NotANamespace {
        /// What was opened.
        path: PathBuf,
    },
    /// The file is a namespace of another kind: mount, pid, user...
    #[error("{path} is a namespace, but not a network namespace; use .../ns/net")]
    NotANetworkNamespace {
        /// What was opened.
        path: PathBuf,
    },
    /// The kernel refused; permission, as a rule.
    #[error("cannot open network namespace {path}: {source}")]
    Io {
        /// What was opened.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// What tells one namespace from another: the device and inode of its file in nsfs. An inode number is used
/// again only after the namespace is gone.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    dev: u64,
    ino: u64,
}

impl NetnsId {
    /// The number that `ip netns identify`, `lsns` and `/proc/PID/ns/net` show.
    #[must_use]
    pub fn inode(self) -> u64 {
        self.ino
    }
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.ino)
    }
}

impl fmt::Debug for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An open network namespace. Cheap to clone: clones share the descriptor.
#[derive(Clone)]
pub struct Netns {
    held: Arc<Held>,
    id: NetnsId,
    /// What it was opened by, for messages.
    name: Arc<Path>,
}

/// What the clones share.
struct Held {
    file: OwnedFd,
    stock: Stock,
}

impl Netns {
    /// Opens the namespace at `path`, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// Nothing is there, it is something else, or the kernel refuses.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| match source.raw_os_error() {
            // ESRCH: the process of a /proc/PID path ended between the look-up and the open.
            Some(libc::ENOENT | libc::ESRCH) => OpenError::Vanished { path: path.into() },
            _ => OpenError::Io { path: path.into(), source },
        })?;
        Self::from_fd_named(file.into(), path)
    }

    /// The namespace of a running process.
    ///
    /// # Errors
    /// As [`Netns::open`].
    pub fn of_process(pid: u32) -> Result<Self, OpenError> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// As [`Netns::open`]; in practice only when `/proc` isn't mounted or descriptors have run out.
    pub fn current() -> Result<Self, OpenError> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// A new namespace with nothing in it but a loopback device that is down. It lives as long as the value
    /// and its clones.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`.
    pub fn new_empty() -> io::Result<Self> {
        // On a thread of its own, which ends in the new namespace and needn't return.
        let made = std::thread::Builder::new().name("netns".into()).spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let file = File::open("/proc/thread-self/ns/net")?;
            Self::from_fd(file.into(), "a new namespace").map_err(io::Error::other)
        })?;
        made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A descriptor that came from elsewhere: a node agent sends them over a Unix socket. `name` stands for it
    /// in messages.
    ///
    /// # Errors
    /// It is not a network namespace.
    pub fn from_fd(fd: OwnedFd, name: &str) -> Result<Self, OpenError> {
        Self::from_fd_named(fd, Path::new(name))
    }

    fn from_fd_named(fd: OwnedFd, path: &Path) -> Result<Self, OpenError> {
        let failed = |errno: nix::Error| OpenError::Io { path: path.into(), source: errno.into() };
        if fstatfs(&fd).map_err(failed)?.filesystem_type() != NSFS_MAGIC {
            return Err(OpenError::NotANamespace { path: path.into() });
        }
        if namespace_type(fd.as_fd()).map_err(failed)? != CloneFlags::CLONE_NEWNET.bits() {
            return Err(OpenError::NotANetworkNamespace { path: path.into() });
        }
        let stat = fstat(&fd).map_err(failed)?;
        let held = Arc::new(Held { file: fd, stock: Stock::default() });
        Ok(Self { held, id: NetnsId { dev: stat.st_dev, ino: stat.st_ino }, name: path.into() })
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// What it was opened by.
    #[must_use]
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Whether both are the same namespace, however they were opened.
    #[must_use]
    pub fn same(&self, other: &Netns) -> bool {
        self.id == other.id
    }

    /// Runs `work` inside the namespace, on this thread, and returns to the thread's own namespace: two system
    /// calls, about 4 µs together. A process that `work` spawns is born in the namespace. May be nested.
    ///
    /// `work` should make sockets and leave: it must not block for long, and must not change the thread's
    /// namespace by other means. tokio types register with the runtime and are better made outside, from the
    /// plain socket that `work` returns (there may be no runtime inside, see below).
    ///
    /// Where the thread wouldn't be allowed to return (it lacks `CAP_SYS_ADMIN` over its own namespace), a
    /// new thread runs `work` and ends. A thread that is there already just runs it, privileged or not.
    ///
    /// # Errors
    /// The kernel refuses to enter: `EPERM` without `CAP_SYS_ADMIN`. Then `work` has not run.
    pub fn run<T, F>(&self, work: F) -> io::Result<T>
    where
        F: FnOnce() -> T + Send,
        T: Send,
    {
        let home = place()?;
        if home.netns.same(self) {
            return Ok(work());
        }
        if !home.may_return {
            return self.run_on_new_thread(work);
        }
        enter(self.held.file.as_fd())?;
        PLACE.set(Some(Place { netns: self.clone(), may_return: true }));
        let _return = Return { home };
        Ok(work())
    }

    /// A TCP socket of the namespace, neither bound nor connected, that does not block: from stock, or new.
    ///
    /// # Errors
    /// As [`Netns::run`]; and, inside, those of `socket(2)`.
    pub(crate) fn tcp_socket(&self, domain: Domain) -> io::Result<io::Result<Socket>> {
        let count = match self.held.stock.take(domain) {
            Ok(socket) => return Ok(Ok(socket)),
            Err(count) => count,
        };
        let made = self.run(|| stock::make(domain, count))?;
        let one = made.map(|made| self.held.stock.put(domain, made));
        Ok(one.and_then(|one| one.ok_or_else(|| io::ErrorKind::Other.into())))
    }

    /// Lets go of sockets that were made in advance, if nobody needs them now: to be called now and then.
    pub fn tidy(&self) {
        self.held.stock.tidy();
    }

    /// Lets go of all of them: the pod needs none any more.
    pub fn clear_stock(&self) {
        self.held.stock.clear();
    }

    fn run_on_new_thread<T, F>(&self, work: F) -> io::Result<T>
    where
        F: FnOnce() -> T + Send,
        T: Send,
    {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".into());
            let handle = thread.spawn_scoped(scope, || {
                enter(self.held.file.as_fd())?;
                PLACE.set(Some(Place { netns: self.clone(), may_return: false }));
                Ok(work())
            })?;
            handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.held.file.as_fd()
    }
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.same(other)
    }
}

impl Eq for Netns {}

impl Hash for Netns {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name.display(), self.id)
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netns({self})")
    }
}

/// Where a thread is, as far as this module has moved it.
#[derive(Clone)]
struct Place {
    netns: Netns,
    /// Whether the thread is allowed back once it has left.
    may_return: bool,
}

thread_local! {
    /// Found out on first use.
    static PLACE: RefCell<Option<Place>> = const { RefCell::new(None) };
}

fn place() -> io::Result<Place> {
    if let Some(known) = PLACE.with_borrow(Option::clone) {
        return Ok(known);
    }
    let netns = Netns::current().map_err(|error| match error {
        OpenError::Io { source, .. } => source,
        other => io::Error::other(other),
    })?;
    // Going where one is already needs the same privilege as coming back.
    let may_return = enter(netns.as_fd()).is_ok();
    let found = Place { netns, may_return };
    PLACE.set(Some(found.clone()));
    Ok(found)
}

/// Takes the thread back, on return and on unwinding.
struct Return {
    home: Place,
}

impl Drop for Return {
    fn drop(&mut self) {
        if let Err(error) = enter(self.home.netns.as_fd()) {
            // Whatever ran next here would run in a pod. The kernel allowed this very step a moment ago.
            let message = format!("cannot return from a pod's network namespace: {error}; aborting\n");
            let _ = io::stderr().write_all(message.as_bytes());
            std::process::abort();
        }
        PLACE.set(Some(self.home.clone()));
    }
}

fn enter(fd: BorrowedFd<'_>) -> io::Result<()> {
    setns(fd, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
}

/// `NS_GET_NSTYPE` (ioctl_nsfs(2)): the `CLONE_NEW*` constant of a namespace.
#[expect(unsafe_code, reason = "no safe wrapper of this ioctl exists")]
fn namespace_type(fd: BorrowedFd<'_>) -> nix::Result<libc::c_int> {
    // SAFETY: the descriptor is open for the duration of the borrow; this request takes no argument, writes no
    // memory of ours, and only returns a number.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::NS_GET_NSTYPE) };
    nix::errno::Errno::result(result)
}
