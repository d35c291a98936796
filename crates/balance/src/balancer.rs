//! The balancer: what is kept between choices, by service.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hashbrown::HashMap;
use model::{Endpoint, EndpointSet, Locality, Service, ServiceKey, Str, TargetPort, Workload};

use crate::partition::{Choice, Partition};
use crate::second_chance::SecondChance;
use crate::stats::{Counters, Stats};

/// Where a connection comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client {
    /// The client's locality.
    pub locality: Arc<Locality>,
    /// Its node, empty when unknown.
    pub node: Str,
    /// Its cluster, empty when unknown.
    pub cluster: Str,
    /// Its network, empty for the default one.
    pub network: Str,
    /// Its address, for session affinity.
    pub address: IpAddr,
}

impl Client {
    /// A workload that dials from `address`.
    #[must_use]
    pub fn new(workload: &Workload, address: IpAddr) -> Self {
        Self {
            locality: workload.locality.clone(),
            node: workload.node().clone(),
            cluster: workload.cluster.clone(),
            network: workload.network.clone(),
            address,
        }
    }

    /// Whether endpoints are as near to `other` as to this one.
    pub(crate) fn same_place(&self, other: &Self) -> bool {
        let same = |a: &Str, b: &Str| Arc::ptr_eq(a, b) || a == b;
        same(&self.node, &other.node)
            && same(&self.cluster, &other.cluster)
            && same(&self.network, &other.network)
            && (Arc::ptr_eq(&self.locality, &other.locality) || self.locality == other.locality)
    }
}

/// How much is kept, and for how long.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Services; beyond, one that was not used for long is forgotten.
    pub services: usize,
    /// Combinations of port and client's place, in a service.
    pub partitions_per_service: usize,
    /// Clients whose endpoint session affinity remembers, over all services.
    pub affinities: usize,
    /// How long an endpoint is put last after its first failure; doubled with each further one in a row.
    pub ejection: Duration,
    /// How long at most.
    pub max_ejection: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            services: 4096,
            partitions_per_service: 64,
            affinities: 65_536,
            ejection: Duration::from_secs(1),
            max_ejection: Duration::from_secs(60),
        }
    }
}

impl Limits {
    /// How long an endpoint is put last after this many failures in a row.
    pub(crate) fn ejection(&self, failures: u32) -> Duration {
        let doubled = 2u32.saturating_pow(failures.saturating_sub(1));
        self.ejection.saturating_mul(doubled).min(self.max_ejection)
    }
}

/// Why there is no endpoint to choose.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoEndpoint {
    /// The service has no endpoints.
    #[error("the service has no endpoints")]
    Empty,
    /// The service does not have the port, or no endpoint serves it.
    #[error("no endpoint of the service serves port {0}")]
    PortUnknown(u16),
    /// None of them is ready.
    #[error("none of the service's {unready} endpoints is ready")]
    NoneHealthy {
        /// How many there are.
        unready: usize,
    },
    /// All of them are set to take no traffic.
    #[error("every endpoint of the service has weight 0")]
    NoneWithWeight,
    /// None of them is where the service's traffic must stay.
    #[error("no endpoint of the service is local to the client ({elsewhere} are elsewhere)")]
    NoneInLocality {
        /// How many others there are.
        elsewhere: usize,
    },
    /// All of them were tried for this connection.
    #[error("all {tried} endpoints of the service were tried")]
    AllTried {
        /// How many.
        tried: usize,
    },
}

/// A choice to make.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The service that was dialled.
    pub service: &'a Service,
    /// Its endpoints.
    pub set: &'a Arc<EndpointSet>,
    /// Who dialled it.
    pub client: &'a Client,
    /// The service's port that was dialled.
    pub port: u16,
    /// The uids of the endpoints that were tried for this connection.
    pub exclude: &'a [Str],
    /// The time since any fixed moment, the same one for all calls.
    pub now: Duration,
    /// A number that the client can't foresee.
    pub random: u64,
}

/// An endpoint that a choice may come to.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its port behind the service's.
    pub target_port: u16,
    /// How often it is taken beside the others. Not 0.
    pub weight: u32,
}

/// Chooses endpoints. Shared by all connections. A choice holds locks for about a microsecond; when the endpoints
/// of a service have changed, the next choice sorts them under that service's own lock (a few milliseconds for
/// 10,000 of them).
#[derive(Debug)]
pub struct Balancer {
    shared: Arc<Shared>,
    services: Mutex<SecondChance<ServiceKey, Arc<PerService>>>,
    affinities: Mutex<SecondChance<AffinityKey, Affinity>>,
}

/// What connections need of the balancer for as long as they live.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) counters: Counters,
}

/// Service, port and client.
type AffinityKey = (ServiceKey, u16, IpAddr);

/// The endpoint that a client keeps.
#[derive(Debug)]
struct Affinity {
    uid: Str,
    expires: Duration,
}

#[derive(Debug, Default)]
struct PerService(Mutex<Kept>);

/// What is kept of a service.
#[derive(Debug, Default)]
struct Kept {
    partitions: HashMap<u64, Partition>,
    /// Counts the choices: names partitions, and tells which was used last.
    tick: u64,
    /// Open connections by uid, of endpoints that have any.
    open: HashMap<Str, u32>,
}

/// A panic elsewhere leaves at worst a count that is off by one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Balancer {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Balancer {
    /// A balancer that knows nothing yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            services: Mutex::new(SecondChance::new(limits.services)),
            affinities: Mutex::new(SecondChance::new(limits.affinities)),
            shared: Arc::new(Shared { limits, counters: Counters::default() }),
        }
    }

    /// Chooses an endpoint. It counts as having one connection more until the result is dropped.
    ///
    /// # Errors
    /// There is none to choose.
    pub fn pick(&self, request: &Request<'_>) -> Result<Picked, NoEndpoint> {
        let picked = self.choose(request);
        let counters = &self.shared.counters;
        if picked.is_ok() { &counters.picks } else { &counters.refused }.add(1);
        picked
    }

    fn choose(&self, request: &Request<'_>) -> Result<Picked, NoEndpoint> {
        let Request { service, client, port, now, .. } = *request;
        // Before anything is kept for it, since clients dial whatever ports they like.
        let target = &service.port(port).ok_or(NoEndpoint::PortUnknown(port))?.target;
        let key = service.key();
        let affinity = service.session_affinity.map(|timeout| (timeout, (key.clone(), port, client.address)));
        let bound = affinity.as_ref().and_then(|(_, key)| self.bound(key, now));

        let per_service = self.per_service(key);
        let mut kept = lock(&per_service.0);
        let Kept { partitions, tick, open } = &mut *kept;
        *tick += 1;
        let (id, partition) = partition(partitions, *tick, request, target, &self.shared);
        let choice = partition.pick(request, bound.as_ref(), open, &self.shared);
        let Some(Choice { endpoint, target_port, trial }) = choice else { return Err(partition.reason()) };
        let connections = open.entry(endpoint.workload.uid.clone()).or_default();
        *connections = connections.saturating_add(1);
        drop(kept);

        if let Some((timeout, key)) = affinity {
            let binding =
                Affinity { uid: endpoint.workload.uid.clone(), expires: now.saturating_add(timeout) };
            let evicted = lock(&self.affinities).insert(key, binding);
            self.shared.counters.affinity_evicted.add(evicted.into());
        }
        let shared = self.shared.clone();
        Ok(Picked { per_service, shared, partition: id, endpoint, target_port, trial })
    }

    /// All endpoints that [`Balancer::pick`] may come to for a while, for somebody who draws of them by their weights: the same as
    /// it does while none of them has a connection. To be asked again when the endpoints may have changed, and every second or
    /// so. `None` where a choice takes more than that: there are more than `limit`, clients keep their endpoints, or one that
    /// failed is to be tried by a single connection. Nothing is counted.
    #[must_use]
    pub fn candidates(&self, request: &Request<'_>, limit: usize) -> Option<Vec<Candidate>> {
        let Request { service, port, now, .. } = *request;
        let target = &service.port(port)?.target;
        let per_service = self.per_service(service.key());
        let mut kept = lock(&per_service.0);
        let Kept { partitions, tick, .. } = &mut *kept;
        *tick += 1;
        let (_, partition) = partition(partitions, *tick, request, target, &self.shared);
        let found = partition.candidates(now, limit)?;
        (found.len() == 1 || service.session_affinity.is_none()).then_some(found)
    }

    fn bound(&self, key: &AffinityKey, now: Duration) -> Option<Str> {
        let mut affinities = lock(&self.affinities);
        affinities.get(key).filter(|a| now < a.expires).map(|a| a.uid.clone())
    }

    fn per_service(&self, key: ServiceKey) -> Arc<PerService> {
        let mut services = lock(&self.services);
        if let Some(known) = services.get(&key) {
            return known.clone();
        }
        let new = Arc::<PerService>::default();
        let evicted = services.insert(key, new.clone());
        self.shared.counters.services_evicted.add(evicted.into());
        new
    }

    /// Forgets the services that `exists` does not know, those that were not asked for since the last call and
    /// have no connection, and clients' endpoints whose time is over. To be called when services went, and every
    /// few minutes.
    pub fn sweep(&self, now: Duration, exists: impl Fn(&ServiceKey) -> bool) {
        lock(&self.services)
            .retain(|key, kept, used| exists(key) && (used || !lock(&kept.0).open.is_empty()));
        lock(&self.affinities).retain(|(key, _, _), affinity, _| exists(key) && now < affinity.expires);
    }

    /// What was counted so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let sizes = [lock(&self.services).len(), lock(&self.affinities).len()];
        self.shared.counters.stats(sizes.map(|n| n as u64))
    }
}

/// The partition for the port and place that are asked for; made, or sorted anew, if need be.
fn partition<'a>(
    partitions: &'a mut HashMap<u64, Partition>,
    tick: u64,
    request: &Request<'_>,
    target: &TargetPort,
    shared: &Shared,
) -> (u64, &'a mut Partition) {
    let known = partitions.iter().find(|(_, p)| p.is_for(request)).map(|(id, _)| *id);
    if known.is_none() && partitions.len() >= shared.limits.partitions_per_service.max(1) {
        let oldest = partitions.iter().min_by_key(|(_, p)| p.last_used).map(|(id, _)| *id);
        if let Some(id) = oldest {
            partitions.remove(&id);
            shared.counters.partitions_evicted.add(1);
        }
    }
    let make = || {
        shared.counters.partitions_built.add(1);
        Partition::new(request, target)
    };
    let id = known.unwrap_or(tick);
    let partition = partitions.entry(id).or_insert_with(make);
    if !partition.is_current(request, target) {
        let old = std::mem::replace(partition, make());
        partition.inherit(&old);
    }
    partition.last_used = tick;
    (id, partition)
}

/// A chosen endpoint, which has one connection more for as long as this lives.
#[derive(Debug)]
pub struct Picked {
    per_service: Arc<PerService>,
    shared: Arc<Shared>,
    partition: u64,
    endpoint: Endpoint,
    target_port: u16,
    trial: bool,
}

impl Picked {
    /// The chosen workload.
    #[must_use]
    pub fn workload(&self) -> &Arc<Workload> {
        &self.endpoint.workload
    }

    /// The workload's port behind the service's.
    #[must_use]
    pub fn target_port(&self) -> u16 {
        self.target_port
    }

    /// To be told when no connection to the endpoint could be made: it is put last for a while.
    pub fn report_failure(&self, now: Duration) {
        let mut kept = lock(&self.per_service.0);
        if let Some(partition) = kept.partitions.get_mut(&self.partition)
            && partition.failed(&self.endpoint.workload.uid, self.trial, now, &self.shared.limits)
        {
            self.shared.counters.ejections.add(1);
        }
    }

    /// To be told when the connection to the endpoint stands: what failed before is forgotten.
    pub fn report_success(&self) {
        let mut kept = lock(&self.per_service.0);
        if let Some(partition) = kept.partitions.get_mut(&self.partition)
            && partition.succeeded(&self.endpoint.workload.uid)
        {
            self.shared.counters.restorations.add(1);
        }
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        let mut kept = lock(&self.per_service.0);
        let uid = &self.endpoint.workload.uid;
        match kept.open.get_mut(uid) {
            Some(connections) if *connections > 1 => *connections -= 1,
            _ => {
                kept.open.remove(uid);
            }
        }
    }
}
