//! A pod of this node, as the data plane sees it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
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

    /// Takes one of the pod's places for open connections, and room for the descriptors that the connection needs.
    ///
    /// # Errors
    /// There is no more, for the pod or at all.
    pub fn place(self: &Arc<Self>, room: &Arc<Room>, descriptors: usize) -> Result<Place, Failure> {
        // Dropping it gives back what could be taken.
        let mut place = Place { pod: self.clone(), room: room.clone(), descriptors: 0 };
        if self.open.fetch_add(1, Ordering::Relaxed) >= room.most.per_pod {
            room.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Failure::TooMany(room.most.per_pod));
        }
        place.descriptors = descriptors;
        if room.taken.fetch_add(descriptors, Ordering::Relaxed) + descriptors > room.most.descriptors {
            room.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Failure::NoDescriptors(room.most.descriptors));
        }
        Ok(place)
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// What open connections of all pods together may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoomLimits {
    /// Open connections of one pod, both directions together.
    pub per_pod: usize,
    /// Descriptors of all of them.
    pub descriptors: usize,
}

/// Descriptors of open connections, and the limit for them: one pod's connections must not leave the others, or what
/// else the process needs, without.
#[derive(Debug)]
pub struct Room {
    most: RoomLimits,
    taken: AtomicUsize,
    refused: AtomicU64,
}

impl Room {
    /// All of it.
    pub fn new(most: RoomLimits) -> Self {
        Self { most, taken: AtomicUsize::new(0), refused: AtomicU64::new(0) }
    }

    /// Descriptors that are taken.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Descriptors that may be.
    pub fn limit(&self) -> usize {
        self.most.descriptors
    }

    /// Connections that were refused for want of room.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// A place among a pod's open connections, given back when dropped.
#[derive(Debug)]
pub struct Place {
    pod: Arc<LocalPod>,
    room: Arc<Room>,
    descriptors: usize,
}

impl Place {
    /// Gives back what is above `descriptors`: the connection needs no more.
    pub fn keep(&mut self, descriptors: usize) {
        let more = self.descriptors.saturating_sub(descriptors);
        self.descriptors -= more;
        self.room.taken.fetch_sub(more, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pod.open.fetch_sub(1, Ordering::Relaxed);
        self.keep(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_end_at_the_pods_limit_and_at_the_descriptors_of_all() {
        let netns = || Netns::open("/proc/self/ns/net").unwrap();
        let [one, other] = ["one", "other"].map(|uid| Arc::new(LocalPod::new(uid.into(), netns())));
        let room = Arc::new(Room::new(RoomLimits { per_pod: 3, descriptors: 8 }));
        let mut places: Vec<_> = (0..3).map(|_| one.place(&room, 2).unwrap()).collect();
        assert!(matches!(one.place(&room, 2), Err(Failure::TooMany(3))));
        assert_eq!((one.open(), room.taken(), room.refused()), (3, 6, 1));
        places.push(other.place(&room, 2).unwrap());
        assert!(matches!(other.place(&room, 1), Err(Failure::NoDescriptors(8))));
        assert_eq!((other.open(), room.taken(), room.refused()), (1, 8, 2));
        // A tunnel needs one only.
        places[0].keep(1);
        places.push(other.place(&room, 1).unwrap());
        drop(places);
        assert_eq!((one.open(), other.open(), room.taken()), (0, 0, 0));
    }
}
