//! The choice of a back-end.

use std::fmt;
use std::sync::Arc;

use crate::backend::{Backend, Capture};
use crate::ebpf::Programs;
use crate::error::Missing;
use crate::iptables::Iptables;
use crate::nft::Nftables;
use crate::tool::Tools;

/// A back-end that works here, and why it is this one.
#[derive(Clone, Debug)]
pub struct Selected {
    /// The back-end.
    pub capture: Arc<dyn Capture>,
    /// The reason, in a sentence or two for the log.
    pub reason: String,
}

/// No back-end works here.
#[derive(Debug)]
pub struct NoBackend {
    /// Every one that was tried, and what it lacks.
    pub tried: Vec<(Backend, Missing)>,
}

impl std::error::Error for NoBackend {}

impl fmt::Display for NoBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "traffic can't be captured here: {}", describe(&self.tried))
    }
}

/// The back-end `wanted`; without one the first of [`Backend::ALL`] that works here. Each is tried in a
/// namespace of its own, which takes some tens of milliseconds.
///
/// # Errors
/// None works; what each lacks.
pub fn select(wanted: Option<Backend>, tools: &Tools) -> Result<Selected, NoBackend> {
    let candidates = wanted.map_or_else(|| Backend::ALL.to_vec(), |backend| vec![backend]);
    let mut tried = Vec::new();
    for backend in candidates {
        match probe(backend, tools) {
            Ok(capture) => {
                let version = capture.version();
                let why = if wanted.is_some() {
                    "as configured"
                } else {
                    "the first that works here, ebpf being the last"
                };
                let mut reason = format!("{backend} ({version}): {why}");
                if !tried.is_empty() {
                    reason = format!("{reason}; {}", describe(&tried));
                }
                return Ok(Selected { capture, reason });
            }
            Err(missing) => tried.push((backend, missing)),
        }
    }
    Err(NoBackend { tried })
}

/// The back-end, if it works here.
///
/// # Errors
/// What it lacks.
pub fn probe(backend: Backend, tools: &Tools) -> Result<Arc<dyn Capture>, Missing> {
    Ok(match backend {
        Backend::Nftables => Arc::new(Nftables::probe(tools)?),
        Backend::IptablesNft => Arc::new(Iptables::probe_nft(tools)?),
        Backend::IptablesLegacy => Arc::new(Iptables::probe_legacy(tools)?),
        Backend::Ebpf => Arc::new(Programs::probe(tools)?),
    })
}

/// What every back-end is called here, or lacks: each is tried in an empty namespace, and eBPF without the file system that keeps
/// its programs.
#[must_use]
pub fn survey(tools: &Tools) -> Vec<(Backend, Result<String, Missing>)> {
    let tried = |backend| match backend {
        Backend::Ebpf => Programs::work_here(),
        other => probe(other, tools).map(|capture| capture.version().to_owned()),
    };
    Backend::ALL.into_iter().map(|backend| (backend, tried(backend))).collect()
}

fn describe(tried: &[(Backend, Missing)]) -> String {
    tried.iter().map(|(backend, missing)| format!("{backend}: {missing}")).collect::<Vec<_>>().join("; ")
}
