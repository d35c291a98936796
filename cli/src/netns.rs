//! Work inside a network namespace that is given by name or path.

use std::io;
use std::path::{Path, PathBuf};

use net::Netns;

/// Where `ip netns` keeps its names.
const NAMED: &str = "/run/netns";

/// The file of a namespace that is given by name or by path.
pub fn path_of(name_or_path: &str) -> PathBuf {
    if name_or_path.contains('/') { name_or_path.into() } else { Path::new(NAMED).join(name_or_path) }
}

/// Runs `work` inside `namespace`; `None` is the caller's own.
///
/// # Errors
/// The namespace can't be entered. The text says why.
pub fn run_in<T: Send>(namespace: Option<&Path>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    match namespace {
        Some(namespace) => Netns::open(namespace).map_err(io::Error::other)?.run(work),
        None => Ok(work()),
    }
}

/// Runs `work` to its end on a runtime of its own. Its sockets belong to the thread's namespace.
///
/// # Errors
/// The runtime can't be made: out of descriptors.
pub fn block_on<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(work))
}
