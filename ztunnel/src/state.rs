//! The snapshot of the mesh that the data plane works by.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use model::{Change, Mesh};
use tokio::sync::watch;

/// The current snapshot. Readers take it whole and keep it for one decision; a change replaces it whole.
pub struct State {
    mesh: ArcSwap<Mesh>,
    changed: watch::Sender<u64>,
}

impl Default for State {
    fn default() -> Self {
        Self { mesh: ArcSwap::default(), changed: watch::Sender::new(0) }
    }
}

impl State {
    /// The current snapshot.
    pub fn mesh(&self) -> Guard<Arc<Mesh>> {
        self.mesh.load()
    }

    /// The current snapshot, to keep for longer than a decision.
    pub fn mesh_owned(&self) -> Arc<Mesh> {
        self.mesh.load_full()
    }

    /// Replaces the snapshot by the one after `changes`. There is one caller, the source of configuration.
    pub fn apply(&self, changes: Vec<Change>) -> Arc<Mesh> {
        let next = Arc::new(self.mesh.load().apply(changes));
        self.mesh.store(next.clone());
        self.changed.send_replace(next.generation());
        next
    }

    /// Tells of each new generation.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}
