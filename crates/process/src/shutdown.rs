//! The end of a process, in phases: running → draining (no new work, what is under way goes on) → aborting.
//!
//! SIGTERM, SIGINT and `/quitquitquit` begin the drain; when nothing holds the process any more, or the grace
//! period is over, or a second signal comes, it aborts.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

/// Where in its life a process is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// It takes new work.
    Running,
    /// It takes none, and ends what it has by the deadline.
    Draining {
        /// When the grace period is over.
        deadline: Instant,
    },
    /// It drops everything.
    Aborting,
}

/// Tells all parts of a process when to end. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Shutdown {
    phase: Arc<watch::Sender<Phase>>,
    /// Counts its receivers: one for each [`Hold`].
    holds: Arc<watch::Sender<()>>,
    grace: Duration,
}

/// Something that is under way: while it lives, a drain goes on.
#[derive(Debug, Clone)]
pub struct Hold {
    _count: watch::Receiver<()>,
}

impl Shutdown {
    /// A process that runs, and that once told to end takes no longer than `grace`.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self {
            phase: Arc::new(watch::Sender::new(Phase::Running)),
            holds: Arc::new(watch::Sender::new(())),
            grace,
        }
    }

    /// Begins the drain at SIGTERM or SIGINT, and aborts at a second one. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// The signals' handlers can't be installed.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let shutdown = self.clone();
        tokio::spawn(async move {
            loop {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                if shutdown.phase() == Phase::Running {
                    tracing::info!(signal = name, grace = ?shutdown.grace, "draining");
                    shutdown.drain();
                } else {
                    tracing::warn!(signal = name, "second signal: aborting");
                    shutdown.abort();
                }
            }
        });
        Ok(())
    }

    /// The phase now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// A watch of the phase, for parts that select on it.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Begins the drain; does nothing once it has begun.
    pub fn drain(&self) {
        self.phase.send_if_modified(|phase| {
            let begins = *phase == Phase::Running;
            if begins {
                *phase = Phase::Draining { deadline: Instant::now() + self.grace };
            }
            begins
        });
    }

    /// Ends everything at once.
    pub fn abort(&self) {
        self.phase.send_if_modified(|phase| std::mem::replace(phase, Phase::Aborting) != Phase::Aborting);
    }

    /// Waits for the drain to begin (or for the abort).
    pub async fn draining(&self) {
        let mut phase = self.phase.subscribe();
        let _ = phase.wait_for(|p| *p != Phase::Running).await; // the sender lives in `self`
    }

    /// Waits for the abort.
    pub async fn aborting(&self) {
        let mut phase = self.phase.subscribe();
        let _ = phase.wait_for(|p| *p == Phase::Aborting).await; // the sender lives in `self`
    }

    /// Says that something is under way.
    #[must_use]
    pub fn hold(&self) -> Hold {
        Hold { _count: self.holds.subscribe() }
    }

    /// How many things are under way.
    #[must_use]
    pub fn held(&self) -> usize {
        self.holds.receiver_count()
    }

    /// For the process's main function: waits for the drain to begin, then until nothing is under way, the grace
    /// period is over or the abort is called for; then aborts what is left. Returns how much that was.
    pub async fn finished(&self) -> usize {
        self.draining().await;
        let Phase::Draining { deadline } = self.phase() else { return self.held() };
        tokio::select! {
            () = self.holds.closed() => {}
            () = tokio::time::sleep_until(deadline) => {}
            () = self.aborting() => {}
        }
        let left = self.held();
        self.abort();
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_when_the_last_hold_is_gone() {
        let shutdown = Shutdown::new(GRACE);
        let hold = shutdown.hold();
        let finished = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.finished().await }
        });
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(!finished.is_finished(), "it ended before it was told to");
        let start = Instant::now();
        shutdown.drain();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!finished.is_finished());
        drop(hold);
        assert_eq!(finished.await.unwrap(), 0);
        assert_eq!(start.elapsed(), Duration::from_secs(2));
        assert_eq!(shutdown.phase(), Phase::Aborting);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_with_the_grace_period() {
        let shutdown = Shutdown::new(GRACE);
        let (_a, _b) = (shutdown.hold(), shutdown.hold());
        let start = Instant::now();
        shutdown.drain();
        shutdown.drain();
        assert_eq!(shutdown.finished().await, 2);
        assert_eq!(start.elapsed(), GRACE);
    }

    #[tokio::test(start_paused = true)]
    async fn an_abort_cuts_a_drain_short() {
        let shutdown = Shutdown::new(GRACE);
        let _hold = shutdown.hold();
        let start = Instant::now();
        shutdown.drain();
        tokio::spawn({
            let shutdown = shutdown.clone();
            async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                shutdown.abort();
            }
        });
        assert_eq!(shutdown.finished().await, 1);
        assert_eq!(start.elapsed(), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_held_ends_at_once() {
        let shutdown = Shutdown::new(GRACE);
        let start = Instant::now();
        shutdown.drain();
        assert_eq!(shutdown.finished().await, 0);
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
