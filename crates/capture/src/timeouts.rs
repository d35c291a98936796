//! How long the kernel remembers the redirected connections that an end has closed.
//!
//! Only a connection's first packet meets our rules; every other one is rewritten because the kernel (conntrack) remembers the
//! connection. An entry that is gone while the application still has its socket would let what it writes leave as it is, in
//! plaintext, for the original destination. The defaults are short once one end has closed (60 s in `CLOSE_WAIT`), once data
//! waits for its acknowledgement, or the window is closed. So these are as long as those of established connections: a late
//! write meets ztunnel's port, and is answered with a reset.
//!
//! The others are long enough. `TIME_WAIT`: both ends have closed, and nothing is written any more. `CLOSE`: a reset has ended
//! the socket that it was for. `SYN_SENT` and `SYN_RECV`: nobody has a connection to write to; a SYN meets the rules.
//!
//! A setting that was shorter becomes the established one plus what it was, so that [`put_back`] knows that without a record.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use net::{Netns, sysctl};

const PREFIX: &str = "netfilter/nf_conntrack_tcp_timeout_";
const STATES: [&str; 5] = ["close_wait", "fin_wait", "last_ack", "unacknowledged", "max_retrans"];
/// The kernel counts in ticks, of a millisecond at the shortest, in a signed word.
const LONGEST: u32 = i32::MAX.cast_unsigned() / 1000;

/// This process may not change such settings; it has been said. [`missing`] doesn't ask for them again and again then.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// The settings of a namespace, in seconds.
struct Timeouts {
    established: u32,
    /// In the order of [`STATES`].
    states: [u32; STATES.len()],
}

impl Timeouts {
    fn read(netns: &Netns) -> io::Result<Self> {
        let read = |state: &str| -> io::Result<u32> {
            let text = fs::read_to_string(format!("/proc/sys/net/{PREFIX}{state}"))?;
            text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        };
        netns.run(|| {
            let mut states = [0; STATES.len()];
            for (value, state) in states.iter_mut().zip(STATES) {
                *value = read(state)?;
            }
            Ok(Self { established: read("established")?, states })
        })?
    }

    fn each(&self) -> impl Iterator<Item = (&'static str, u32)> {
        STATES.into_iter().zip(self.states)
    }
}

/// Makes them long enough, once the rules are there: the kernel has the settings only when connections are tracked. Whether
/// anything was changed. Capture works without, but for what is said above, so that a failure is a warning.
pub(crate) fn raise(netns: &Netns) -> bool {
    raised(netns).unwrap_or_else(|error| {
        // What failed otherwise, since a pod went away for example, says nothing of other pods.
        if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) {
            REFUSED.store(true, Ordering::Relaxed);
        }
        tracing::warn!(
            netns = %netns,
            %error,
            "cannot raise net.{} (for {}) to that of established connections: what an application writes to a redirected \
             connection a minute after ztunnel closed it may leave the pod in plaintext; set them in the pod, or give this \
             process CAP_NET_ADMIN and CAP_SYS_ADMIN on Linux 5.2 or newer, or a /proc/sys that can be written",
            PREFIX.replace('/', "."),
            STATES.join(", "),
        );
        false
    })
}

fn raised(netns: &Netns) -> io::Result<bool> {
    let timeouts = Timeouts::read(netns)?;
    let mut changed = false;
    for (state, before) in timeouts.each().filter(|(_, value)| *value < timeouts.established) {
        let both = timeouts.established.saturating_add(before);
        let wanted = if both > LONGEST { timeouts.established } else { both };
        sysctl::write(netns, &format!("{PREFIX}{state}"), &wanted.to_string())?;
        changed = true;
    }
    Ok(changed)
}

/// Which are too short, in words; none where this process may not change them.
pub(crate) fn missing(netns: &Netns) -> Vec<String> {
    if REFUSED.load(Ordering::Relaxed) {
        return Vec::new();
    }
    let Ok(timeouts) = Timeouts::read(netns) else { return Vec::new() };
    let short = timeouts.each().filter(|(_, value)| *value < timeouts.established);
    short.map(|(state, _)| format!("{} in /proc/sys/net/{PREFIX}{state}", timeouts.established)).collect()
}

/// Makes them what they were, where the rules were taken out.
pub(crate) fn put_back(netns: &Netns) {
    let outcome = Timeouts::read(netns).and_then(|timeouts| {
        let ours = timeouts.each().filter_map(|(state, value)| {
            let before = value.checked_sub(timeouts.established)?;
            (before > 0 && before < timeouts.established).then_some((state, before))
        });
        for (state, before) in ours {
            sysctl::write(netns, &format!("{PREFIX}{state}"), &before.to_string())?;
        }
        Ok(())
    });
    if let Err(error) = outcome {
        tracing::warn!(netns = %netns, %error, "cannot put net.netfilter.nf_conntrack_tcp_timeout_* back; they stay long");
    }
}
