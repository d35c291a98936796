//! From what is known of a connection to its metric labels, and to their series.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashTable;
use model::{Service, SpiffeId, Workload};
use process::metrics::tcp::{
    ConnectionSecurity, Party, Reporter, ServiceLabels, TcpHandle, TcpLabels, TcpMetrics,
};
use process::runtimes::Workers;
use telemetry::{party, service_labels};

use crate::connections::{Carrier, Direction, Story};

/// So many series each thread finds without labels; when there are more it begins anew.
pub const KNOWN: usize = 1024;

/// The series of connections by their ends, as long as these are the same objects: most connections are like one a moment
/// ago, and labels, with two identities written out, cost more to make than to be compared here.
///
/// For each thread, so that none waits for another. To be forgotten every few seconds ([`Handles::forget`]): what is here
/// keeps workloads that the mesh has no more, and the places of series that nobody uses.
pub struct Handles {
    metrics: TcpMetrics,
    hasher: RandomState,
    known: Box<[Mutex<HashTable<Known>>]>,
}

struct Known {
    hash: u64,
    direction: Direction,
    carrier: Carrier,
    source: End,
    destination: End,
    service: Option<Arc<Service>>,
    handle: TcpHandle,
}

type End = (Option<Arc<Workload>>, Option<SpiffeId>);

impl Handles {
    /// Those of `metrics`, for so many threads.
    pub fn new(metrics: TcpMetrics, threads: usize) -> Self {
        let known = (0..threads.max(1)).map(|_| Mutex::default()).collect();
        Self { metrics, hasher: RandomState::new(), known }
    }

    /// The series of the connection that `story` tells of.
    pub fn of(&self, story: &Story) -> TcpHandle {
        let ends = [story.source_workload.as_ref(), story.destination_workload.as_ref()].map(address);
        let service = address(story.destination_service.as_ref());
        let hash = self.hasher.hash_one((story.direction, story.carrier, ends, service));
        let mut known = self.here();
        if let Some(found) = known.find(hash, |known| known.is_of(story)) {
            return found.handle.clone();
        }
        let handle = self.metrics.connection(&labels(story));
        if known.len() >= KNOWN {
            known.clear();
        }
        known.insert_unique(hash, Known::new(hash, story, handle.clone()), |known| known.hash);
        handle
    }

    /// Lets go of all.
    pub fn forget(&self) {
        self.known.iter().for_each(|known| *lock(known) = HashTable::new());
    }

    /// How many are known, over all threads.
    pub fn count(&self) -> usize {
        self.known.iter().map(|known| lock(known).len()).sum()
    }

    // There is at least one, by construction.
    #[allow(clippy::indexing_slicing)]
    fn here(&self) -> MutexGuard<'_, HashTable<Known>> {
        lock(&self.known[Workers::current() % self.known.len()])
    }
}

fn lock(known: &Mutex<HashTable<Known>>) -> MutexGuard<'_, HashTable<Known>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

fn address<T>(of: Option<&Arc<T>>) -> usize {
    of.map_or(0, |of| Arc::as_ptr(of).addr())
}

impl Known {
    fn new(hash: u64, story: &Story, handle: TcpHandle) -> Self {
        Self {
            hash,
            direction: story.direction,
            carrier: story.carrier,
            source: (story.source_workload.clone(), story.source_identity.clone()),
            destination: (story.destination_workload.clone(), story.destination_identity.clone()),
            service: story.destination_service.clone(),
            handle,
        }
    }

    /// What lives here has its address to itself.
    fn is_of(&self, story: &Story) -> bool {
        fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
            address(one) == address(other)
        }
        (self.direction, self.carrier) == (story.direction, story.carrier)
            && same(self.source.0.as_ref(), story.source_workload.as_ref())
            && same(self.destination.0.as_ref(), story.destination_workload.as_ref())
            && same(self.service.as_ref(), story.destination_service.as_ref())
            && self.source.1 == story.source_identity
            && self.destination.1 == story.destination_identity
    }
}

/// The labels of the connection that `story` tells of.
pub fn labels(story: &Story) -> TcpLabels {
    TcpLabels {
        reporter: reporter(story.direction),
        source: party(story.source_workload.as_ref(), story.source_identity.as_ref()),
        destination: party(story.destination_workload.as_ref(), story.destination_identity.as_ref()),
        service: service_labels(story.destination_service.as_ref()),
        security: match story.carrier {
            Carrier::Hbone => ConnectionSecurity::MutualTls,
            Carrier::NodeLocal | Carrier::Kernel => ConnectionSecurity::NodeLocal,
            Carrier::Plaintext => ConnectionSecurity::Unknown,
        },
        custom: None,
    }
}

/// The labels of a connection of which nothing is known but its direction.
pub fn unknown_labels(direction: Direction) -> TcpLabels {
    TcpLabels {
        reporter: reporter(direction),
        source: Party::unknown(),
        destination: Party::unknown(),
        service: ServiceLabels::default(),
        security: ConnectionSecurity::Unknown,
        custom: None,
    }
}

fn reporter(direction: Direction) -> Reporter {
    match direction {
        Direction::Outbound => Reporter::Source,
        Direction::Inbound => Reporter::Destination,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use process::metrics::Registry;

    use super::*;
    use crate::connections::Verdict;

    fn story(source: &Arc<Workload>, destination: &Arc<Workload>) -> Story {
        let any: SocketAddr = "10.0.0.1:80".parse().unwrap();
        Story {
            id: 1,
            direction: Direction::Outbound,
            carrier: Carrier::Hbone,
            opened_ms: 0,
            source: any,
            source_workload: Some(source.clone()),
            source_identity: Some("spiffe://cluster.local/ns/a/sa/one".parse().unwrap()),
            destination: any,
            upstream: None,
            destination_workload: Some(destination.clone()),
            destination_service: None,
            destination_identity: None,
            verdict: Verdict::proxy("for the test"),
        }
    }

    fn workload(name: &str) -> Arc<Workload> {
        let unnamed = Workload::new(name.into(), name, Arc::default());
        Arc::new(unnamed.with(|w| w.set_canonical_name(name.into())))
    }

    #[test]
    fn a_series_is_found_by_the_ends_and_by_all_else_that_its_labels_say() {
        let metrics = TcpMetrics::new(&Registry::new(), 100);
        let handles = Handles::new(metrics.clone(), 1);
        let (one, other) = (workload("one"), workload("other"));
        let first = story(&one, &other);
        let identity = |id: &str| Some(id.parse().unwrap());
        let stories = [
            Story { direction: Direction::Inbound, ..first.clone() },
            Story { carrier: Carrier::Plaintext, ..first.clone() },
            Story { source_identity: None, ..first.clone() },
            Story { source_identity: identity("spiffe://cluster.local/ns/a/sa/two"), ..first.clone() },
            Story { destination_identity: identity("spiffe://cluster.local/ns/a/sa/two"), ..first.clone() },
            Story { source_workload: Some(other.clone()), ..first.clone() },
            Story { destination_workload: None, ..first.clone() },
            first,
        ];
        for (count, story) in stories.iter().enumerate() {
            handles.of(story).opened();
            assert_eq!(handles.count(), count + 1, "{story:?}");
        }
        for story in &stories {
            let again = Story { id: 2, source: "10.0.0.9:9".parse().unwrap(), ..story.clone() };
            handles.of(&again).opened();
            assert_eq!((metrics.connection(&labels(story)).open(), handles.count()), (2, stories.len()));
        }
        assert_eq!(metrics.series(), stories.len());
    }

    #[test]
    fn what_is_known_is_bounded_and_forgotten() {
        let metrics = TcpMetrics::new(&Registry::new(), 100_000);
        let handles = Handles::new(metrics.clone(), 1);
        let (source, held) = (workload("one"), workload("held"));
        handles.of(&story(&source, &held));
        for nth in 0..KNOWN {
            assert_eq!(handles.count(), 1 + nth);
            handles.of(&story(&source, &workload(&nth.to_string())));
        }
        assert_eq!((handles.count(), Arc::strong_count(&held)), (1, 1));
        handles.of(&story(&source, &held));
        handles.forget();
        assert_eq!((handles.count(), Arc::strong_count(&held)), (0, 1));
        assert_eq!(metrics.series(), 1 + KNOWN);
    }
}
