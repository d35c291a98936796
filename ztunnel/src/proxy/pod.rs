//! A pod of this node, as the data plane sees it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hbone::{Baggage, HeaderValue};
use model::{Mesh, Str, Workload};
use net::Netns;

use super::failure::Failure;

/// A pod whose traffic this process carries. Its workload is looked up in the snapshot of the moment, so that a
/// changed manifest holds for the next connection.
#[derive(Debug)]
pub struct LocalPod {
    /// The workload's uid.
    pub uid: Str,
    /// Where its sockets live.
    pub netns: Netns,
    open: AtomicUsize,
    baggage: Mutex<Option<(Arc<Workload>, Option<HeaderValue>)>>,
}

impl LocalPod {
    /// A pod in `netns`.
    pub fn new(uid: Str, netns: Netns) -> Self {
        Self { uid, netns, open: AtomicUsize::new(0), baggage: Mutex::default() }
    }

    /// Its workload in `mesh`.
    ///
    /// # Errors
    /// The snapshot has none.
    pub fn workload(&self, mesh: &Mesh) -> Result<Arc<Workload>, Failure> {
        mesh.workload(&self.uid).cloned().ok_or_else(|| Failure::UnknownPod(self.uid.clone()))
    }

    /// What tunnels say of `workload`, which is the pod's. Made once for each version of it.
    pub fn baggage(&self, workload: &Arc<Workload>) -> Option<HeaderValue> {
        let mut made = self.baggage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, value)) = &*made
            && Arc::ptr_eq(of, workload)
        {
            return value.clone();
        }
        let some = |text: &Str| (!text.is_empty()).then(|| text.clone());
        let value = Baggage {
            cluster: some(&workload.cluster),
            namespace: some(&workload.namespace),
            workload: some(&workload.workload_name).map(|name| (workload.workload_kind, name)),
            service_name: some(&workload.canonical_name),
            service_version: some(&workload.canonical_revision),
            region: some(&workload.locality.region),
            zone: some(&workload.locality.zone),
        }
        .encode();
        *made = Some((workload.clone(), value.clone()));
        value
    }

    /// Takes one of the pod's places for open connections.
    ///
    /// # Errors
    /// All `limit` are taken.
    pub fn place(self: &Arc<Self>, limit: usize) -> Result<Place, Failure> {
        let place = Place(self.clone());
        if self.open.fetch_add(1, Ordering::Relaxed) >= limit {
            return Err(Failure::TooMany(limit)); // dropping `place` gives it back
        }
        Ok(place)
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// A place among a pod's open connections, given back when dropped.
#[derive(Debug)]
pub struct Place(Arc<LocalPod>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}
