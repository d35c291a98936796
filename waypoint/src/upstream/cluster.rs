//! The endpoints of one destination.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use balance::requests::{Balancing, Choice, Ejections, Event, Group, Load, Member, Nearness, Origin};
use hashbrown::HashMap;
use model::http::{HashKey, HashTable, LoadBalancer, ServiceTraffic, TrafficPolicy};
use model::{EndpointSet, Mesh, Service, ServiceSource, Str, TargetPort};

use crate::http::decide::{Call, Endpoints, NoEndpoint, Picked, Protocol, Retrying, Target};
use crate::http::head::Version;
use crate::upstream::circuit::Circuit;
use crate::upstream::clusters::{Backend, ClusterInfo, EndpointInfo, NoCluster, Shared};
use crate::upstream::endpoint::{Endpoint, about, is_reached_alike, reach};
use crate::upstream::hashing::{self, Key};
use crate::upstream::original::Outside;
use crate::upstream::tls::Origination;

/// A view that an ejection asks for is made once so many times as long has passed as the last one took to make.
const VIEW_REST: u32 = 20;

/// The endpoints of one destination, for as long as its service is there.
pub(crate) struct Cluster {
    backend: Backend,
    shared: Arc<Shared>,
    view: ArcSwap<View>,
    /// Endpoints that are left out. Held by whoever makes a new view.
    ejections: Mutex<Option<Ejections>>,
    /// When these are to be looked at, in microseconds since the start.
    next_sweep: AtomicU64,
    /// When a view may be made for an ejection: where many endpoints fail at a time, views must not take the threads' time.
    /// Until then the endpoints' own marks say who is left out.
    next_view: AtomicU64,
    this: Weak<Self>,
}

/// What a cluster is between two changes.
struct View {
    /// The newest mesh that it is right for.
    generation: AtomicU64,
    facts: Arc<Facts>,
    group: Group,
}

/// What a view is made of.
struct Facts {
    service: Arc<Service>,
    set: Arc<EndpointSet>,
    traffic: Option<Arc<ServiceTraffic>>,
    origin: Arc<Origin>,
    policy: TrafficPolicy,
    circuit: Arc<Circuit>,
    tls: Option<Arc<Origination>>,
    wire: Wire,
    endpoints: Box<[Arc<Endpoint>]>,
    /// The places in `endpoints` of those in `set`.
    places: Box<[Option<u32>]>,
    /// The same by address, where that is asked for.
    by_address: HashMap<SocketAddr, u32>,
    /// The endpoints of a service that has none of its own.
    outside: Option<Outside>,
}

/// What is spoken to the endpoints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wire {
    /// Of requests, this.
    Always(Protocol),
    /// Of requests, HTTP/1.1; as a rule none come, and the port carries bytes.
    Bytes,
    /// What the client speaks.
    AsClient,
}

impl Cluster {
    pub(crate) fn new(shared: Arc<Shared>, backend: Backend, mesh: &Mesh) -> Result<Arc<Self>, NoCluster> {
        let found = Found::new(&backend, mesh)?;
        Ok(Arc::new_cyclic(|this| {
            let facts = Facts::new(&shared, &backend, found, this, None);
            let group = facts.group(None, None);
            shared.stats.built.inc();
            let view = View { generation: AtomicU64::new(mesh.generation()), facts: Arc::new(facts), group };
            Self {
                backend,
                shared,
                view: ArcSwap::from_pointee(view),
                ejections: Mutex::default(),
                next_sweep: AtomicU64::new(u64::MAX),
                next_view: AtomicU64::new(0),
                this: this.clone(),
            }
        }))
    }

    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Brings it up to a mesh, if it isn't.
    pub(crate) fn follow(&self, mesh: &Mesh) -> Result<(), NoCluster> {
        if self.view.load().generation.load(Ordering::Acquire) >= mesh.generation() {
            return Ok(());
        }
        let mut ejections = self.ejections();
        let view = self.view.load_full();
        if view.generation.load(Ordering::Acquire) >= mesh.generation() {
            return Ok(());
        }
        if view.facts.are_of(&self.shared, &self.backend, mesh) {
            view.generation.store(mesh.generation(), Ordering::Release);
            return Ok(());
        }
        let found = Found::new(&self.backend, mesh)?;
        let facts = Facts::new(&self.shared, &self.backend, found, &self.this, Some(&view.facts));
        self.set_rules(&mut ejections, &facts);
        self.publish(Arc::new(facts), mesh.generation(), &view, ejections.as_ref());
        Ok(())
    }

    fn set_rules(&self, ejections: &mut Option<Ejections>, facts: &Facts) {
        match (&facts.policy.outliers, &mut *ejections) {
            (Some(rules), Some(ejections)) => ejections.set_rules(rules.clone()),
            (Some(_), None) => {}
            (None, _) => *ejections = None,
        }
        if let Some(ejections) = ejections {
            ejections.retain(|uid| facts.set.position(uid).is_some());
        }
        self.plan_sweep(ejections.as_ref());
    }

    fn plan_sweep(&self, ejections: Option<&Ejections>) {
        let next = ejections.and_then(Ejections::next).map_or(u64::MAX, micros);
        self.next_sweep.store(next, Ordering::Relaxed);
    }

    fn publish(&self, facts: Arc<Facts>, generation: u64, old: &View, ejections: Option<&Ejections>) {
        let begun = self.shared.now();
        let group = facts.group(ejections, Some(&old.group));
        let ended = self.shared.now();
        self.next_view.store(micros(ended + (ended - begun) * VIEW_REST), Ordering::Relaxed);
        self.shared.stats.built.inc();
        self.view.store(Arc::new(View { generation: AtomicU64::new(generation), facts, group }));
    }

    fn ejections(&self) -> MutexGuard<'_, Option<Ejections>> {
        self.ejections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets endpoints come back whose time is over.
    fn sweep(&self, now: Duration) {
        // Another thread is at it.
        let Ok(mut ejections) = self.ejections.try_lock() else { return };
        let changed = ejections.as_mut().is_some_and(|ejections| ejections.sweep(now));
        self.plan_sweep(ejections.as_ref());
        let view = self.view.load();
        let known = view.group.members().iter().filter(|member| member.ejected).count();
        if changed || ejections.as_ref().map_or(0, Ejections::out) != known {
            let view = self.view.load_full();
            let generation = view.generation.load(Ordering::Acquire);
            self.publish(Arc::clone(&view.facts), generation, &view, ejections.as_ref());
        }
    }

    /// A request to one of the endpoints went so.
    pub(crate) fn reported(&self, endpoint: &Endpoint, event: Event) {
        let view = self.view.load();
        let Some(rules) = &view.facts.policy.outliers else { return };
        let Some(cause) = endpoint.strikes.note(rules, event) else { return };
        let mut ejections = self.ejections();
        let view = self.view.load_full();
        let uid = &endpoint.workload.uid;
        if view.facts.place(uid).is_none() {
            return;
        }
        let total = usize::try_from(view.group.eligible()).unwrap_or(usize::MAX);
        let all = ejections.get_or_insert_with(|| Ejections::new(rules.clone()));
        let was_out = all.is_out(uid);
        endpoint.strikes.clear();
        if !all.eject(uid, total, self.shared.now()) {
            if !was_out {
                self.shared.stats.ejections_over_limit.inc();
            }
            return;
        }
        self.shared.stats.ejections.inc();
        tracing::info!(cluster = %self.backend, endpoint = %uid, ?cause, "an endpoint is left out for a while");
        endpoint.load.leave_out(true);
        self.plan_sweep(ejections.as_ref());
        let next_view = self.next_view.load(Ordering::Relaxed);
        if micros(self.shared.now()) < next_view {
            self.next_sweep.fetch_min(next_view, Ordering::Relaxed);
            return;
        }
        let generation = view.generation.load(Ordering::Acquire);
        self.publish(Arc::clone(&view.facts), generation, &view, ejections.as_ref());
    }

    pub(crate) fn info(&self, with_endpoints: bool) -> ClusterInfo {
        let view = self.view.load();
        let all = view.facts.endpoints.iter().zip(view.group.members());
        let wanted = if with_endpoints { usize::MAX } else { 0 };
        let endpoints = all.take(wanted).map(|(endpoint, _)| EndpointInfo {
            target: Arc::clone(endpoint.shown()),
            under_way: endpoint.load.under_way(),
            ejected: endpoint.load.is_out(),
        });
        ClusterInfo {
            backend: self.backend.clone(),
            circuit: view.facts.circuit.counts(),
            eligible: view.group.eligible(),
            healthy: view.group.healthy(),
            endpoints: endpoints.collect(),
        }
    }
}

impl Endpoints for Cluster {
    fn pick(&self, call: &Call<'_>) -> Result<Picked, NoEndpoint> {
        let now = self.shared.now();
        if micros(now) >= self.next_sweep.load(Ordering::Relaxed) {
            self.sweep(now);
        }
        let view = self.view.load();
        let facts = &view.facts;
        if !facts.circuit.request(now) {
            self.shared.stats.overflows.inc();
            return Err(NoEndpoint::OVERFLOW);
        }
        if let Some(picked) = facts.dialled(call) {
            self.shared.stats.picks.inc();
            return Ok(picked);
        }
        let key = facts.hash_key().map_or_else(Key::default, |key| hashing::of(key, call));
        let tried: Vec<u32> = call.tried.iter().filter_map(|target| facts.place_of(target)).collect();
        let choice = Choice {
            now,
            random: self.shared.random(),
            key: key.hash,
            tried: &tried,
            elsewhere: call.elsewhere,
            under_way: facts.circuit.under_way(),
        };
        let found = view.group.pick(&choice).and_then(|at| facts.endpoints.get(at as usize));
        let Some(endpoint) = found else {
            facts.circuit.request_ended();
            self.shared.stats.none.inc();
            return Err(NoEndpoint::NONE);
        };
        self.shared.stats.picks.inc();
        let mut picked = facts.send_to(endpoint, call);
        picked.cookie = key.cookie;
        Ok(picked)
    }

    fn may_retry(&self) -> Option<Retrying> {
        let circuit = Arc::clone(&self.view.load().facts.circuit);
        circuit.retry(self.shared.now()).map(|retry| Retrying(Some(retry)))
    }
}

impl Wire {
    fn protocol(self, call: &Call<'_>) -> Protocol {
        match (self, call.request.version) {
            (Self::Always(protocol), _) => protocol,
            (Self::Bytes, _) | (Self::AsClient, Version::Http1) => Protocol::Http1,
            (Self::AsClient, Version::Http2) => Protocol::Http2,
        }
    }

    /// What a policy and the service's port come to.
    fn of(policy: &TrafficPolicy, app_protocol: &str) -> Self {
        if policy.pool.use_client_protocol {
            return Self::AsClient;
        }
        match (model::http::Protocol::of(app_protocol), policy.pool.h2_upgrade) {
            (model::http::Protocol::Http2, _) | (_, Some(true)) => Self::Always(Protocol::Http2),
            (model::http::Protocol::Http, _) => Self::Always(Protocol::Http1),
            (model::http::Protocol::Tcp | model::http::Protocol::Tls, _) => Self::Bytes,
            (model::http::Protocol::Detect, _) => Self::AsClient,
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn same<T>(a: Option<&Arc<T>>, b: Option<&Arc<T>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// `sessionAffinity: ClientIP`: every replica of the waypoint sends a client to the same endpoint.
const AFFINE: LoadBalancer =
    LoadBalancer::Hash { key: HashKey::SourceIp, table: HashTable::Maglev(65_537), bound: None };

/// What a mesh says of a destination.
struct Found {
    service: Arc<Service>,
    set: Arc<EndpointSet>,
    traffic: Option<Arc<ServiceTraffic>>,
    policy: TrafficPolicy,
    target: TargetPort,
    wire: Wire,
}

impl Found {
    fn new(backend: &Backend, mesh: &Mesh) -> Result<Self, NoCluster> {
        let key = &backend.service;
        let service = mesh.service(key).ok_or_else(|| NoCluster::Service(key.clone()))?;
        let port = service.port(backend.port).ok_or_else(|| NoCluster::Port(key.clone(), backend.port))?;
        let traffic = mesh.traffic(key);
        if let Some(subset) = &backend.subset
            && !traffic.is_some_and(|t| t.subsets.iter().any(|s| s.name == *subset))
        {
            return Err(NoCluster::Subset(key.clone(), subset.clone()));
        }
        let policy = traffic.map(|t| t.policy(backend.port, backend.subset.as_deref()).clone());
        let mut policy = policy.unwrap_or_default();
        // What the Service says holds where no rule says something else.
        if service.session_affinity.is_some() && policy.load_balancer == LoadBalancer::default() {
            policy.load_balancer = AFFINE;
        }
        Ok(Self {
            wire: Wire::of(&policy, &port.app_protocol),
            target: port.target.clone(),
            service: Arc::clone(service),
            set: mesh.endpoints(key).cloned().unwrap_or_default(),
            traffic: traffic.cloned(),
            policy,
        })
    }
}

impl Facts {
    fn new(
        shared: &Arc<Shared>,
        backend: &Backend,
        found: Found,
        cluster: &Weak<Cluster>,
        old: Option<&Self>,
    ) -> Self {
        let Found { service, set, traffic, policy, target, wire } = found;
        let known = old.filter(|old| old.circuit.is_of(&policy.pool, policy.retry_budget));
        let circuit =
            known.map_or_else(|| Circuit::new(&policy.pool, policy.retry_budget), |old| old.circuit.clone());
        let origin = shared.origin.load_full();
        let (endpoints, places) = (Box::default(), Box::default());
        let tls = policy.tls.as_ref().map(|settings| {
            let known = old.filter(|old| old.policy.tls == policy.tls).and_then(|old| old.tls.clone());
            known.unwrap_or_else(|| Origination::new(Arc::clone(shared), settings, &service.hostname))
        });
        let mut facts = Self {
            service,
            set,
            traffic,
            origin,
            policy,
            circuit,
            tls,
            wire,
            endpoints,
            places,
            by_address: HashMap::new(),
            outside: None,
        };
        if facts.service.source == ServiceSource::Passthrough {
            let tls = facts.tls.clone().map(|origination| (origination, facts.wire != Wire::Bytes));
            let circuit = Arc::clone(&facts.circuit);
            facts.outside = Some(Outside::new(shared, backend.clone(), circuit, tls));
        }
        facts.find_endpoints(shared, backend, cluster, &target, old);
        if facts.policy.load_balancer == LoadBalancer::Passthrough {
            let addresses = facts.endpoints.iter().map(|endpoint| endpoint.shown().address);
            facts.by_address = addresses.zip(0..).collect();
        }
        facts
    }

    /// The labels that endpoints have to have.
    fn wanted_labels(&self, backend: &Backend) -> &[(Str, Str)] {
        let subsets = self.traffic.as_ref().map_or(&[][..], |traffic| &traffic.subsets);
        let subset = subsets.iter().find(|subset| Some(&subset.name) == backend.subset.as_ref());
        subset.map_or(&[], |subset| &subset.labels)
    }

    fn find_endpoints(
        &mut self,
        shared: &Arc<Shared>,
        backend: &Backend,
        cluster: &Weak<Cluster>,
        of_service: &TargetPort,
        old: Option<&Self>,
    ) {
        let set = Arc::clone(&self.set);
        let (mut endpoints, mut places) = (Vec::new(), vec![None; set.as_slice().len()]);
        let now = shared.now();
        let keepalive = self.policy.pool.keepalive;
        let tls = self.tls.as_ref().map(|origination| (origination, self.wire != Wire::Bytes));
        let wanted = self.wanted_labels(backend);
        let unchanged = old.is_some_and(|old| {
            old.wire == self.wire
                && Arc::ptr_eq(&old.circuit, &self.circuit)
                && Arc::ptr_eq(&old.origin, &self.origin)
                && old.policy.tls == self.policy.tls
                && old.service.subject_alt_names == self.service.subject_alt_names
        });
        for (member, place) in set.as_slice().iter().zip(&mut places) {
            if !wanted.iter().all(|(key, value)| member.workload.label(key) == Some(value)) {
                continue;
            }
            let of_service = match of_service {
                TargetPort::Number(number) => Some(*number),
                TargetPort::PerEndpoint => None,
            };
            let port = set.target_port(member, backend.port).or(of_service).filter(|port| *port != 0);
            let Some(port) = port else { continue };
            let before = old.and_then(|old| old.endpoint(&member.workload.uid));
            // Connections stay in use where they lead to the same place by the same way.
            let alike = before.filter(|before| {
                unchanged
                    && before.shown().address.port() == port
                    && is_reached_alike(&before.workload, &member.workload)
            });
            let endpoint = match alike {
                Some(alike) if Arc::ptr_eq(&alike.workload, &member.workload) => Arc::clone(alike),
                Some(alike) => Arc::new(alike.renewed(Arc::clone(&member.workload))),
                None => {
                    let workload = &member.workload;
                    let reached = reach(shared, workload, port, Some(&self.service), keepalive);
                    let Some((address, carrier)) = reached else { continue };
                    let about = about(Some(backend), backend.port, Some(Arc::clone(workload)), &carrier);
                    let target = Target {
                        circuit: Some(Arc::clone(&self.circuit)),
                        about: Some(about),
                        ..Target::new(address, self.wire.first(), carrier)
                    };
                    let load = before.map_or_else(|| Arc::new(Load::new(now)), |b| Arc::clone(&b.load));
                    let strikes = before.map_or_else(Arc::default, |b| Arc::clone(&b.strikes));
                    let known = (load, strikes);
                    Arc::new(Endpoint::new(Arc::clone(workload), target, tls, cluster.clone(), known))
                }
            };
            *place = u32::try_from(endpoints.len()).ok();
            endpoints.push(endpoint);
        }
        self.endpoints = endpoints.into();
        self.places = places.into();
    }

    /// Whether nothing has changed.
    fn are_of(&self, shared: &Shared, backend: &Backend, mesh: &Mesh) -> bool {
        let key = &backend.service;
        let set = mesh.endpoints(key);
        let same_set = set.map_or_else(|| self.set.as_slice().is_empty(), |set| Arc::ptr_eq(set, &self.set));
        same_set
            && same(mesh.service(key), Some(&self.service))
            && same(mesh.traffic(key), self.traffic.as_ref())
            && Arc::ptr_eq(&shared.origin.load(), &self.origin)
    }

    fn group(&self, ejections: Option<&Ejections>, old: Option<&Group>) -> Group {
        let members = self.endpoints.iter().map(|endpoint| {
            let ejected = ejections.is_some_and(|ejections| ejections.is_out(&endpoint.workload.uid));
            endpoint.load.leave_out(ejected);
            Member {
                name: endpoint.name,
                workload: Arc::clone(&endpoint.workload),
                labels: Arc::clone(&endpoint.workload.labels),
                ejected,
                load: Arc::clone(&endpoint.load),
            }
        });
        let policy = &self.policy;
        let outliers = policy.outliers.as_ref();
        let balancing = Balancing {
            balancer: policy.load_balancer.clone(),
            warmup: policy.warmup,
            min_health: outliers.map(|outliers| outliers.min_health).unwrap_or_default(),
        };
        let nearness = Nearness {
            service: &self.service.load_balancing,
            setting: policy.locality.as_ref(),
            failover: outliers.is_some(),
        };
        Group::new(balancing, &self.origin, nearness, members.collect(), old)
    }

    fn hash_key(&self) -> Option<&HashKey> {
        match &self.policy.load_balancer {
            LoadBalancer::Hash { key, .. } => Some(key),
            _ => None,
        }
    }

    fn send_to(&self, endpoint: &Arc<Endpoint>, call: &Call<'_>) -> Picked {
        endpoint.load.begin();
        let target = Arc::clone(endpoint.target(self.wire.protocol(call)));
        Picked::watched(target, Arc::clone(endpoint) as Arc<_>)
    }

    /// The endpoint that the client dialled itself, where that is what it gets; `None` where it dialled the service.
    fn dialled(&self, call: &Call<'_>) -> Option<Picked> {
        let address = call.connection.destination;
        if let Some(outside) = &self.outside {
            // Where a route of another service leads here, the address that was dialled is the other's.
            let mut ranges = self.service.vips.iter().map(|vip| vip.range);
            let of_it = ranges.any(|range| range.contains(&address.ip()));
            return of_it.then(|| outside.pick(address, self.wire.protocol(call)));
        }
        let at = self.by_address.get(&address)?;
        Some(self.send_to(self.endpoints.get(*at as usize)?, call))
    }

    fn place(&self, uid: &Str) -> Option<u32> {
        self.places.get(self.set.position(uid)?).copied().flatten()
    }

    fn place_of(&self, target: &Target) -> Option<u32> {
        self.place(&target.about.as_ref()?.workload.as_ref()?.uid)
    }

    fn endpoint(&self, uid: &Str) -> Option<&Arc<Endpoint>> {
        self.endpoints.get(self.place(uid)? as usize)
    }
}

impl Wire {
    fn first(self) -> Protocol {
        match self {
            Self::Always(protocol) => protocol,
            Self::Bytes | Self::AsClient => Protocol::Http1,
        }
    }
}
