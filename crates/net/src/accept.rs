//! Accepting connections for ever, also when descriptors or memory run out.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Counters of an [`AcceptLoop`], for metrics.
#[derive(Debug, Default)]
pub struct AcceptStats {
    /// Connections handed out.
    pub accepted: AtomicU64,
    /// Connections that ended before they were accepted.
    pub aborted: AtomicU64,
    /// Times that accepting failed for lack of descriptors or memory, or for a reason of the listener's own.
    pub failed: AtomicU64,
}

/// A listener that never gives up and never spins: after a failure that will last (no descriptors, no
/// memory) it pauses, 5 ms at first and up to a second. The kernel keeps new connections in the backlog
/// meanwhile, and they are served as soon as there is room.
#[derive(Debug)]
pub struct AcceptLoop {
    listener: TcpListener,
    stats: Arc<AcceptStats>,
    pause: Duration,
}

impl AcceptLoop {
    /// Accepts from `listener`. Several loops may share their `stats`.
    #[must_use]
    pub fn new(listener: TcpListener, stats: Arc<AcceptStats>) -> Self {
        Self { listener, stats, pause: Duration::ZERO }
    }

    /// The listener.
    #[must_use]
    pub fn listener(&self) -> &TcpListener {
        &self.listener
    }

    /// The next connection and its peer, as `accept` reports it: IPv4-mapped when an IPv4 client meets a
    /// dual-stack listener. Cancelling loses no connection.
    pub async fn next(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok(accepted) => {
                    if !self.pause.is_zero() {
                        tracing::info!(listener = ?self.address(), "accepting connections again");
                        self.pause = Duration::ZERO;
                    }
                    self.stats.accepted.fetch_add(1, Ordering::Relaxed);
                    return accepted;
                }
                Err(error) if concerns_one_connection(&error) => {
                    self.stats.aborted.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => self.back_off(&error).await,
            }
        }
    }

    async fn back_off(&mut self, error: &io::Error) {
        self.stats.failed.fetch_add(1, Ordering::Relaxed);
        if self.pause.is_zero() {
            // Once for each spell: this may be the state of things for a while.
            tracing::warn!(listener = ?self.address(), %error, "cannot accept connections; trying again");
        }
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        tokio::time::sleep(self.pause).await;
    }

    fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }
}

/// Whether the next `accept` may well succeed: the errors of a connection that failed before it was accepted,
/// which Linux reports here (accept(2), "Error handling").
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::ECONNRESET
                | libc::EINTR
                | libc::EPERM
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::ENETDOWN
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::ENONET
        )
    )
}
