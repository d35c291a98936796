//! Accepting connections for ever, also when descriptors or memory run out.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;

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
    listener: Arc<TcpListener>,
    stats: Arc<AcceptStats>,
    pause: Duration,
}

impl AcceptLoop {
    /// Accepts from `listener`. Several loops may share their `stats`.
    #[must_use]
    pub fn new(listener: TcpListener, stats: Arc<AcceptStats>) -> Self {
        Self { listener: Arc::new(listener), stats, pause: Duration::ZERO }
    }

    /// Where the listener can be had from, by others too.
    #[must_use]
    pub fn reach(&self) -> Reach {
        Reach { listener: Arc::downgrade(&self.listener), stats: self.stats.clone() }
    }

    /// The listener.
    #[must_use]
    pub fn listener(&self) -> &TcpListener {
        &self.listener
    }

    /// Has the listener watched by `runtime`. What is called later need not be called there, but is woken by it.
    ///
    /// # Errors
    /// It can't; the listener stays where it is.
    pub fn move_to(&mut self, runtime: &Handle) -> io::Result<()> {
        self.listener = Arc::new(watched_by(&self.listener, runtime)?);
        Ok(())
    }

    /// The next connection and its peer, as `accept` reports it: IPv4-mapped when an IPv4 client meets a
    /// dual-stack listener. Cancelling loses no connection.
    pub async fn next(&mut self) -> (TcpStream, SocketAddr) {
        self.accepted(TcpListener::poll_accept).await
    }

    /// The same for another runtime: the connection belongs to the one that `choose` gives, which is asked once for each
    /// attempt.
    pub async fn next_for<R: AsRef<Handle>>(
        &mut self,
        mut choose: impl FnMut() -> R,
    ) -> (TcpStream, SocketAddr, R) {
        self.accepted(|listener, cx| {
            let chosen = choose();
            let polled = {
                let _context = chosen.as_ref().enter();
                listener.poll_accept(cx)
            };
            polled.map_ok(|(stream, peer)| (stream, peer, chosen))
        })
        .await
    }

    /// A connection that waits, for the runtime that `choose` gives; also one that no runtime has heard of yet, which is no
    /// excuse where the listener is about to be closed. Never waits itself.
    pub fn take_waiting<R: AsRef<Handle>>(
        &mut self,
        choose: impl FnOnce() -> R,
    ) -> Option<(TcpStream, SocketAddr, R)> {
        loop {
            match SockRef::from(&self.listener).accept() {
                Ok((socket, peer)) => {
                    let (chosen, peer) = (choose(), peer.as_socket()?);
                    let registered = socket.set_nonblocking(true).and_then(|()| {
                        let _context = chosen.as_ref().enter();
                        TcpStream::from_std(socket.into())
                    });
                    let counter = if registered.is_ok() { &self.stats.accepted } else { &self.stats.failed };
                    counter.fetch_add(1, Ordering::Relaxed);
                    return registered.ok().map(|stream| (stream, peer, chosen));
                }
                Err(error) if concerns_one_connection(&error) => {
                    self.stats.aborted.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => return None,
            }
        }
    }

    async fn accepted<T>(
        &mut self,
        mut poll: impl FnMut(&TcpListener, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> T {
        loop {
            match poll_fn(|cx| poll(&self.listener, cx)).await {
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

/// The listener of an [`AcceptLoop`] as others see it, who don't keep it open.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    listener: Weak<TcpListener>,
    stats: Arc<AcceptStats>,
}

impl Reach {
    /// Another loop over the same listener, woken by `runtime`: for the place of one whose task does not get to run. Until that
    /// is dropped, both accept.
    ///
    /// # Errors
    /// The listener can't be registered there, or has been closed.
    pub fn again(&self, runtime: &Handle) -> io::Result<AcceptLoop> {
        let listener = self.listener.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        Ok(AcceptLoop::new(watched_by(&listener, runtime)?, self.stats.clone()))
    }
}

/// The same listener, of which `runtime` is told when a connection waits.
fn watched_by(listener: &TcpListener, runtime: &Handle) -> io::Result<TcpListener> {
    let same = listener.as_fd().try_clone_to_owned()?;
    let _context = runtime.enter();
    TcpListener::from_std(same.into())
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
