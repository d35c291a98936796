//! Whether capture can work here, found out by doing it in a namespace of its own.

use std::fs;

use net::Netns;

use crate::backend::Installed;
use crate::error::{Error, Missing};
use crate::routing;

/// Bit numbers of kernel include/uapi/linux/capability.h.
const CAPABILITIES: [(u32, &str, &str); 2] = [
    (12, "CAP_NET_ADMIN", "changing a pod's rules"),
    (21, "CAP_SYS_ADMIN", "entering a pod's network namespace"),
];

/// Checks that the thread has what every back-end needs.
pub(crate) fn privileges() -> Result<(), Missing> {
    let status = fs::read_to_string("/proc/thread-self/status").map_err(Missing::Unknown)?;
    let effective = effective_capabilities(&status).unwrap_or_default();
    match CAPABILITIES.into_iter().find(|(bit, ..)| effective & (1 << bit) == 0) {
        Some((_, capability, purpose)) => Err(Missing::Capability { capability, purpose }),
        None => Ok(()),
    }
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Tries an installation in an empty namespace.
pub(crate) fn trial(install: impl FnOnce(&Netns) -> Result<Installed, Error>) -> Result<(), Missing> {
    let made = Netns::new_empty()
        .map_err(|source| Error::Enter { netns: "an empty namespace".to_owned(), source })
        .and_then(|netns| {
            routing::loopback_up(&netns)?;
            install(&netns)
        });
    made.map(drop).map_err(|error| Missing::Kernel(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_status_file() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t00000000a80435fb\n";
        assert_eq!(effective_capabilities(status), Some(0xa804_35fb));
        assert_eq!(effective_capabilities("CapEff:\tnonsense\n"), None);
        assert_eq!(effective_capabilities(""), None);
    }
}
