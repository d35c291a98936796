//! Network namespaces, entered on a thread of their own: the namespace of a thread that serves others is never
//! changed.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

/// Where `ip netns` keeps its names.
pub const NAMED: &str = "/run/netns";

/// The file of a namespace that is given by name or by path.
pub fn path_of(name_or_path: &str) -> PathBuf {
    if name_or_path.contains('/') { name_or_path.into() } else { Path::new(NAMED).join(name_or_path) }
}

/// Moves the calling thread into the namespace.
///
/// # Errors
/// The file is missing or no namespace, or the caller lacks CAP_SYS_ADMIN. The text says which.
pub fn enter(namespace: &Path) -> io::Result<()> {
    let explain = |e: io::Error| {
        io::Error::new(e.kind(), format!("cannot enter the network namespace {}: {e}", namespace.display()))
    };
    let file = File::open(namespace).map_err(explain)?;
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(|e| explain(e.into()))
}

/// Runs `work` on a new thread inside `namespace`; `None` is the caller's own.
///
/// # Errors
/// The namespace can't be entered, or the thread did not end well.
pub fn run_in<T: Send>(namespace: Option<&Path>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Some(namespace) = namespace {
                enter(namespace)?;
            }
            Ok(work())
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread ended with a panic")))
    })
}

/// Builds a single-threaded runtime on the calling thread and runs `work` to its end. Its sockets belong to the
/// thread's namespace.
///
/// # Errors
/// The runtime can't be made: out of descriptors.
pub fn block_on<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(work))
}
