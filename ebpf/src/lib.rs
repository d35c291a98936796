//! Capture of a pod's traffic by eBPF: the programs (`programs/`), the structs that they share with user space ([`layout`]),
//! and the loader; and connections between two pods of a node that no proxy carries ([`verdicts`]).
//!
//! All that belongs to a pod is pinned below one directory of a bpf file system, so that it outlives every process of ours:
//!
//! ```text
//! ROOT/INODE OF THE NAMESPACE/settings, ports, ranges, interfaces, own, refused, listeners, counters   maps
//!                            /link-sockets, link-inside-1, link-arriving-N, link-leaving-N              links
//!                            /maps-N/settings, ...   the maps, once they were others than the first programs'
//! ```
//!
//! Invariants:
//! * the programs decide alone, by what is in the maps; nothing here has to run for that;
//! * a change of settings is seen whole: lists are written to the half that is not in force, then the settings name it;
//! * newer programs replace older ones link by link, each at once, with the same maps; or with a new generation of them, if
//!   they declare them otherwise: that one says what is captured before any program uses it, and the old one goes last.

pub mod layout;
mod marks;
mod pins;
mod pod;
mod sys;
pub mod verdicts;

pub use marks::mark;
pub use pins::{Pins, bpf_file_system, forget, remember, remembered};
pub use pod::{Contents, Drift, Pod, build, is_guarded, remove};

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::EbpfLoader;

/// Why the programs or their maps could not be changed or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no bpf file system to keep the programs in.
    #[error(
        "no bpf file system is mounted at {path}, which keeps the programs while no process of ours runs \
         ({source}); mount one on the node: mount -t bpf bpf {path}; a container needs that directory of the \
         node's as a volume (hostPath)"
    )]
    NoFileSystem {
        /// Where it should be.
        path: PathBuf,
        /// Why it can't be used.
        #[source]
        source: io::Error,
    },
    /// The programs or maps are refused by the kernel.
    #[error("cannot load the programs: {0}")]
    Load(#[source] Box<aya::EbpfError>),
    /// A program is refused.
    #[error("cannot load the program {program}: {source}")]
    Program {
        /// Which.
        program: &'static str,
        /// The verifier's answer.
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// A map can't be opened, read or written.
    #[error("cannot {action} the map {map}: {source}")]
    Map {
        /// What was attempted.
        action: &'static str,
        /// Which.
        map: &'static str,
        /// The kernel's answer.
        #[source]
        source: Box<aya::maps::MapError>,
    },
    /// The kernel's type information can't be read.
    #[error("cannot read the kernel's type information (CONFIG_DEBUG_INFO_BTF): {0}")]
    Types(#[source] Box<aya::BtfError>),
    /// Something else of the kernel's.
    #[error("cannot {action} {what}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// With what.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Whether a map has no room for more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let Self::Map { source, .. } = self else { return false };
        // E2BIG, see kernel/bpf/hashtab.c.
        matches!(&**source, aya::maps::MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::E2BIG))
    }

    /// Whether another process has what was to be taken, and gives it on when it ends.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::WouldBlock)
    }

    fn io(action: &'static str, what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, what: what.to_string(), source }
    }

    fn map(action: &'static str, map: &'static str) -> impl FnOnce(aya::maps::MapError) -> Self {
        move |source| Self::Map { action, map, source: Box::new(source) }
    }

    fn program(program: &'static str) -> impl FnOnce(aya::programs::ProgramError) -> Self {
        move |source| Self::Program { program, source: Box::new(source) }
    }
}

/// How often a program is loaded: a signal to the thread breaks the kernel's check of it off (`EAGAIN` of `bpf_check`,
/// kernel/bpf/verifier.c), and a process that waits for children gets signals.
const LOAD_ATTEMPTS: usize = 5;

/// Loads the program of this name with `load`, again where a signal came between.
fn load(
    program: &'static str,
    mut load: impl FnMut() -> Result<(), aya::programs::ProgramError>,
) -> Result<(), Error> {
    let is_broken_off = |error: &aya::programs::ProgramError| {
        use aya::programs::ProgramError::LoadError;
        matches!(error, LoadError { io_error, .. } if io_error.kind() == std::io::ErrorKind::WouldBlock)
    };
    let mut outcome = load();
    for _ in 1..LOAD_ATTEMPTS {
        if !outcome.as_ref().is_err_and(is_broken_off) {
            break;
        }
        outcome = load();
    }
    outcome.map_err(Error::program(program))
}

/// For programs that need nothing of the kernel's type information. aya reads that whole for each loader that is made, tens of
/// megabytes for a moment, so that all pods have the same one.
static LOADER: Mutex<Option<EbpfLoader<'static>>> = Mutex::new(None);

fn loader() -> MutexGuard<'static, Option<EbpfLoader<'static>>> {
    LOADER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A loader that has let go of what aya has read.
fn without_types() -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    net::release_free();
    loader
}

/// The programs, as clang made them.
mod objects {
    use aya::include_bytes_aligned;

    pub(crate) static CAPTURE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/capture.bpf.o"));
    pub(crate) static VERDICTS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/verdicts.bpf.o"));
    pub(crate) static MARKS: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/marks.bpf.o"));
}

#[cfg(test)]
mod tests {
    /// What these read of the kernel's structs would be read at the wrong places.
    #[test]
    fn programs_of_pods_need_no_type_information() {
        for (name, text) in [
            ("capture.bpf.c", include_str!("../programs/capture.bpf.c")),
            ("kernel.h", include_str!("../programs/kernel.h")),
            ("packet.h", include_str!("../programs/packet.h")),
            ("verdicts.h", include_str!("../programs/verdicts.h")),
        ] {
            assert!(!text.contains("preserve_access_index"), "{name}");
        }
        assert!(include_str!("../programs/marks.bpf.c").contains("preserve_access_index"));
    }
}
