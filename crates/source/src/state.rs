//! The snapshot of the mesh that the data plane works by, and whether it may be worked by yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use model::{Change, Mesh};
use tokio::sync::{Semaphore, watch};

/// Connections that may wait at once for what the control plane has not told yet.
const WAITING_LIMIT: usize = 4096;

/// The current snapshot. Readers take it whole and keep it for one decision; a change replaces it whole.
///
/// Nothing is decided by a snapshot that is not complete: a policy that has not arrived yet would be missing, and the
/// destination that has not arrived yet would be passed to in plaintext.
pub struct State {
    mesh: ArcSwap<Mesh>,
    complete: AtomicBool,
    /// Told of every snapshot, and of completeness.
    changed: watch::Sender<()>,
    waiting: Semaphore,
    given_up: AtomicU64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            mesh: ArcSwap::default(),
            complete: AtomicBool::new(false),
            changed: watch::Sender::new(()),
            waiting: Semaphore::new(WAITING_LIMIT),
            given_up: AtomicU64::new(0),
        }
    }
}

impl State {
    /// The current snapshot.
    #[must_use]
    pub fn mesh(&self) -> Guard<Arc<Mesh>> {
        self.mesh.load()
    }

    /// The current snapshot, to keep for longer than a decision.
    #[must_use]
    pub fn mesh_owned(&self) -> Arc<Mesh> {
        self.mesh.load_full()
    }

    /// Replaces the snapshot by the one after `changes`. There is one caller, the source of configuration.
    pub fn apply(&self, changes: Vec<Change>) -> Arc<Mesh> {
        let next = Arc::new(self.mesh.load().apply(changes));
        self.mesh.store(next.clone());
        self.changed.send_replace(());
        next
    }

    /// Says that the snapshot holds all that the source of configuration has. It stays so.
    pub fn set_complete(&self) {
        self.complete.store(true, Ordering::Release);
        self.changed.send_replace(());
    }

    /// Whether the snapshot may be worked by.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Waits until the snapshot may be worked by, however long.
    pub async fn completed(&self) {
        let mut changed = self.changed.subscribe();
        let _ = changed.wait_for(|()| self.is_complete()).await; // the sender lives in `self`
    }

    /// Waits until the snapshot is complete and `known` holds of it, for at most `limit`. Says whether it is so. What
    /// holds already costs no wait.
    pub async fn until(&self, limit: Duration, known: impl Fn(&Mesh) -> bool) -> bool {
        let holds = || self.is_complete() && known(&self.mesh());
        if holds() {
            return true;
        }
        let Ok(_place) = self.waiting.try_acquire() else {
            self.given_up.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        // Subscribed before it is looked again, so that no change falls in between.
        let mut changed = self.changed.subscribe();
        let found = tokio::time::timeout(limit, changed.wait_for(|()| holds())).await;
        let found = matches!(found, Ok(Ok(_)));
        if !found {
            self.given_up.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    /// Connections that wait now for what is not known yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        WAITING_LIMIT - self.waiting.available_permits()
    }

    /// Connections that were refused because what they needed did not become known in time.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.given_up.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn nothing_holds_of_a_snapshot_that_is_not_complete() {
        let state = Arc::new(State::default());
        assert!(!state.until(LIMIT, |_| true).await);
        assert_eq!((state.given_up(), state.waiting()), (1, 0));
        let waiting = tokio::spawn({
            let state = state.clone();
            async move { state.until(LIMIT, |mesh| mesh.generation() == 1).await }
        });
        tokio::time::sleep(LIMIT / 4).await;
        state.set_complete();
        tokio::time::sleep(LIMIT / 4).await;
        assert!(!waiting.is_finished(), "it holds too early");
        state.apply(Vec::new());
        assert!(waiting.await.unwrap());
        assert!(state.until(Duration::ZERO, |_| true).await);
    }

    #[tokio::test(start_paused = true)]
    async fn not_more_wait_than_may() {
        let state = Arc::new(State::default());
        for _ in 0..WAITING_LIMIT {
            let state = state.clone();
            tokio::spawn(async move { state.until(LIMIT, |_| true).await });
        }
        while state.waiting() < WAITING_LIMIT {
            tokio::task::yield_now().await;
        }
        let started = tokio::time::Instant::now();
        assert!(!state.until(LIMIT, |_| true).await);
        assert_eq!(started.elapsed(), Duration::ZERO);
    }
}
