//! The snapshot of the mesh that the data plane works by.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use model::{Change, Mesh};

/// The current snapshot. Readers take it whole and keep it for one decision; a change replaces it whole.
#[derive(Default)]
pub struct State(ArcSwap<Mesh>);

impl State {
    /// The current snapshot.
    pub fn mesh(&self) -> Guard<Arc<Mesh>> {
        self.0.load()
    }

    /// The current snapshot, to keep for longer than a decision.
    pub fn mesh_owned(&self) -> Arc<Mesh> {
        self.0.load_full()
    }

    /// Replaces the snapshot by the one after `changes`. There is one caller, the source of configuration.
    pub fn apply(&self, changes: Vec<Change>) -> Arc<Mesh> {
        let next = Arc::new(self.0.load().apply(changes));
        self.0.store(next.clone());
        next
    }
}
