//! All destinations that requests go to.
//!
//! Invariants:
//! * a cluster is there once a request asked for it, and goes when its service does;
//! * it is brought up to a new mesh once, by [`Clusters::prepare`] where the change is about it, else by the first request
//!   that sees the new one, for which that costs three look-ups;
//! * what was counted of endpoints and destinations outlives the meshes.

use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use balance::requests::Origin;
use hashbrown::{HashMap, HashSet};
use model::{CowMap, HboneAddr, Mesh, ServiceKey, SpiffeId, Str, TlsVersion};
use process::metrics::Counter;
use tokio::time::Instant;

use crate::http::decide::{Connection, Dial, Endpoints, Target};
use crate::upstream::circuit::CircuitCounts;
use crate::upstream::cluster::Cluster;
use crate::upstream::dial::Names;
use crate::upstream::original::{Original, Targets};

/// Where the Secrets that DestinationRules name by `credentialName` are mounted, each in a directory of its name.
pub const CREDENTIALS: &str = "/etc/culvert/credentials";

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct ClusterLimits {
    /// Destinations; requests to more are refused.
    pub clusters: usize,
    /// Addresses that clients dialled themselves, of which connections are shared.
    pub originals: usize,
}

impl Default for ClusterLimits {
    fn default() -> Self {
        Self { clusters: 65_536, originals: 16_384 }
    }
}

/// Makes what connections are carried by.
pub trait Dialers: Send + Sync + 'static {
    /// Tunnels to an endpoint, of whose node's proxy this is the address, and which proves one of these identities.
    fn tunnel(&self, to: HboneAddr, expected: Arc<[SpiffeId]>) -> Arc<dyn Dial>;
}

/// Where requests go, by the name that configuration has for it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Backend {
    /// The service.
    pub service: ServiceKey,
    /// Its port.
    pub port: u16,
    /// The subset of its endpoints.
    pub subset: Option<Str>,
}

impl std::fmt::Display for Backend {
    /// As Istio names clusters: `outbound|PORT|SUBSET|HOST`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let subset = self.subset.as_deref().unwrap_or_default();
        write!(f, "outbound|{}|{subset}|{}", self.port, self.service.hostname)
    }
}

/// Why requests can't go where they should.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoCluster {
    /// The service is not known.
    #[error("there is no service {0}")]
    Service(ServiceKey),
    /// It has no such port.
    #[error("the service {0} has no port {1}")]
    Port(ServiceKey, u16),
    /// No DestinationRule names the subset.
    #[error("the service {0} has no subset {1}")]
    Subset(ServiceKey, Str),
    /// There are too many destinations.
    #[error("there are {0} destinations already, the most that are kept")]
    TooMany(usize),
}

/// What happened to endpoints, for metrics.
#[derive(Debug, Default)]
pub struct ClusterStats {
    /// Choices of endpoints.
    pub picks: Counter,
    /// Requests for which there was none.
    pub none: Counter,
    /// Requests refused because as many were under way as may be.
    pub overflows: Counter,
    /// Endpoints left out because they failed.
    pub ejections: Counter,
    /// Endpoints that would have been, if not too many were.
    pub ejections_over_limit: Counter,
    /// How often the endpoints of a destination were sorted.
    pub built: Counter,
    /// How often addresses that clients dialled were forgotten because there were too many.
    pub originals_forgotten: Counter,
    /// Host names that were not found.
    pub names_failed: Counter,
    /// TLS handshakes with servers that failed.
    pub handshakes_failed: Counter,
}

/// What all clusters share.
pub(crate) struct Shared {
    pub(crate) dialers: Arc<dyn Dialers>,
    pub(crate) limits: ClusterLimits,
    pub(crate) stats: ClusterStats,
    pub(crate) origin: ArcSwap<Origin>,
    pub(crate) names: Names,
    pub(crate) credentials: PathBuf,
    /// Whether servers that TLS is begun to have to speak 1.3; TLS 1.2 will do otherwise.
    pub(crate) only_tls13: AtomicBool,
    started: Instant,
    random: AtomicU64,
}

impl Shared {
    /// The time since the start.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Well spread, and no secret that matters (SplitMix64).
    pub(crate) fn random(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.random.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

type Map = CowMap<Backend, Arc<Cluster>>;

/// What the clusters were last brought up to.
#[derive(Default)]
struct Prepared {
    mesh: Arc<Mesh>,
    origin: Option<Arc<Origin>>,
    /// Those that there are, by their services.
    by_service: HashMap<ServiceKey, Vec<Backend>>,
}

impl Prepared {
    fn add(&mut self, backend: &Backend) {
        self.by_service.entry(backend.service.clone()).or_default().push(backend.clone());
    }

    fn remove(&mut self, backend: &Backend) {
        if let Some(of_service) = self.by_service.get_mut(&backend.service) {
            of_service.retain(|other| other != backend);
            if of_service.is_empty() {
                self.by_service.remove(&backend.service);
            }
        }
    }
}

/// See the module. Shared by all threads.
pub struct Clusters {
    shared: Arc<Shared>,
    map: ArcSwap<Map>,
    /// Held by whoever changes the map.
    changing: Mutex<Prepared>,
    originals: Arc<Targets>,
}

impl std::fmt::Debug for Clusters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clusters").field("count", &self.map.load().len()).finish_non_exhaustive()
    }
}

impl Clusters {
    /// None yet. `origin` is where this waypoint is.
    #[must_use]
    pub fn new(origin: Origin, limits: ClusterLimits, dialers: Arc<dyn Dialers>) -> Self {
        let shared = Arc::new(Shared {
            dialers,
            limits,
            stats: ClusterStats::default(),
            origin: ArcSwap::from_pointee(origin),
            names: Names::default(),
            credentials: PathBuf::from(CREDENTIALS),
            only_tls13: AtomicBool::new(false),
            started: Instant::now(),
            random: AtomicU64::new(RandomState::new().hash_one(0)),
        });
        let originals = Arc::new(Targets::new(Arc::clone(&shared)));
        Self { shared, map: ArcSwap::default(), changing: Mutex::default(), originals }
    }

    /// Says where this waypoint is, once that is known. Clusters follow with the next mesh.
    pub fn set_origin(&self, origin: Origin) {
        if **self.shared.origin.load() != origin {
            self.shared.origin.store(Arc::new(origin));
        }
    }

    /// What was counted.
    #[must_use]
    pub fn stats(&self) -> &ClusterStats {
        &self.shared.stats
    }

    /// The endpoints of a back end. Costs a look into a map, but for the first time and after a new mesh.
    ///
    /// # Errors
    /// See [`NoCluster`].
    pub fn endpoints(&self, mesh: &Arc<Mesh>, backend: &Backend) -> Result<Arc<dyn Endpoints>, NoCluster> {
        let known = self.map.load().get(backend).cloned();
        let cluster = match known {
            Some(cluster) => cluster,
            None => self.add(mesh, backend)?,
        };
        cluster.follow(mesh)?;
        Ok(cluster)
    }

    /// The endpoint that the client dialled: a workload of the mesh, or what is outside of it.
    #[must_use]
    pub fn original(&self, mesh: &Arc<Mesh>, _client: &Connection) -> Arc<dyn Endpoints> {
        Arc::new(Original::new(Arc::clone(mesh), Arc::clone(&self.originals)))
    }

    fn add(&self, mesh: &Arc<Mesh>, backend: &Backend) -> Result<Arc<Cluster>, NoCluster> {
        let cluster = Cluster::new(Arc::clone(&self.shared), backend.clone(), mesh)?;
        let mut prepared = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let map = self.map.load();
        if let Some(other) = map.get(backend) {
            return Ok(Arc::clone(other));
        }
        // Of a request that was decided before its destination went: no change would come by to forget it.
        if cluster.follow(&prepared.mesh).is_err() {
            return Ok(cluster);
        }
        if map.len() >= self.shared.limits.clusters {
            return Err(NoCluster::TooMany(map.len()));
        }
        let mut next = Map::clone(&map);
        next.insert(backend.clone(), Arc::clone(&cluster));
        self.map.store(Arc::new(next));
        prepared.add(backend);
        Ok(cluster)
    }

    /// Brings the clusters that a change is about up to a mesh, before requests see it, and forgets those whose service has
    /// gone; says how many it looked at. May take milliseconds where there are many endpoints: to be called on a thread that
    /// carries no requests.
    pub fn prepare(&self, mesh: &Arc<Mesh>) -> usize {
        let only_tls13 = mesh.settings().tls_minimum >= TlsVersion::V1_3;
        self.shared.only_tls13.store(only_tls13, Ordering::Relaxed);
        let concerned = self.concerned(mesh);
        // Without the lock, which requests to new destinations wait for; what these add meanwhile is of this mesh already, or
        // follows with its next request.
        let mut gone = Vec::new();
        for cluster in &concerned {
            // One that can't follow says so to the request that asks for it.
            if let Err(error) = cluster.follow(mesh) {
                tracing::debug!(cluster = %cluster.backend(), %error, "a destination can't be reached any more");
                gone.push(cluster.backend().clone());
            }
        }
        if !gone.is_empty() {
            let mut prepared = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
            let map = self.map.load();
            let mut next = Map::clone(&map);
            for backend in &gone {
                next.remove(backend);
                prepared.remove(backend);
            }
            self.map.store(Arc::new(next));
        }
        concerned.len()
    }

    /// The clusters that differ between the mesh of the last time and this one: all, once this waypoint is elsewhere.
    fn concerned(&self, mesh: &Arc<Mesh>) -> Vec<Arc<Cluster>> {
        let mut prepared = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let map = self.map.load();
        let origin = self.shared.origin.load_full();
        let stays = prepared.origin.as_ref().is_some_and(|before| Arc::ptr_eq(before, &origin));
        let concerned = if stays {
            let changed: HashSet<ServiceKey> = mesh.destinations_since(&prepared.mesh).into_iter().collect();
            let backends = changed.iter().filter_map(|key| prepared.by_service.get(key)).flatten();
            backends.filter_map(|backend| map.get(backend).cloned()).collect()
        } else {
            map.values().cloned().collect()
        };
        prepared.mesh = Arc::clone(mesh);
        prepared.origin = Some(origin);
        concerned
    }

    /// How many clusters there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.load().len()
    }

    /// Whether nothing was asked for yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All clusters with their endpoints, for `proxy-config`.
    #[must_use]
    pub fn snapshot(&self) -> Vec<ClusterInfo> {
        self.map.load().values().map(|cluster| cluster.info(true)).collect()
    }

    /// All clusters without their endpoints, for metrics.
    #[must_use]
    pub fn totals(&self) -> Vec<ClusterInfo> {
        self.map.load().values().map(|cluster| cluster.info(false)).collect()
    }
}

/// A cluster, as [`Clusters::snapshot`] shows it.
#[derive(Clone, Debug)]
pub struct ClusterInfo {
    /// What it is.
    pub backend: Backend,
    /// The counts of its limits.
    pub circuit: CircuitCounts,
    /// How many endpoints take requests, those that are left out included.
    pub eligible: u64,
    /// How many of those are not left out.
    pub healthy: u64,
    /// Its endpoints, unready ones too, where they were asked for.
    pub endpoints: Vec<EndpointInfo>,
}

/// An endpoint, as [`Clusters::snapshot`] shows it.
#[derive(Clone, Debug)]
pub struct EndpointInfo {
    /// How it is reached.
    pub target: Arc<Target>,
    /// Requests under way.
    pub under_way: u32,
    /// Whether it is left out because it failed.
    pub ejected: bool,
}
