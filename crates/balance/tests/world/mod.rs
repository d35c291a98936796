//! A service and its endpoints, stated briefly.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::sync::Arc;
use std::time::Duration;

use balance::{Balancer, Client, NoEndpoint, Picked, Request};
use model::{
    Change, EndpointSet, IpFamilies, LoadBalancing, LoadBalancingMode, Locality, LocalityScope, Mesh,
    PortMapping, Profile, Service, ServiceKey, ServiceMembership, ServicePort, ServiceSource, Str,
    TargetPort, TunnelProtocol, Workload,
};

/// The service's port in most tests; endpoints serve it at 8080.
pub const PORT: u16 = 80;

pub fn key() -> ServiceKey {
    ServiceKey { namespace: "shop".into(), hostname: "cart".into() }
}

pub fn service(mode: LoadBalancingMode, scopes: &[LocalityScope]) -> Service {
    let port = |port, target| ServicePort { name: "".into(), port, target, app_protocol: "".into() };
    Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart".into(),
        vips: Box::new([]),
        ports: Box::new([port(PORT, TargetPort::Number(8080)), port(443, TargetPort::PerEndpoint)]),
        subject_alt_names: Box::new([]),
        waypoint: None,
        load_balancing: LoadBalancing { scopes: scopes.into(), mode, ..LoadBalancing::default() },
        ip_families: IpFamilies::default(),
        session_affinity: None,
        source: ServiceSource::Kubernetes,
        canonical: true,
    }
}

/// A ready endpoint of weight 1 that states no ports of its own; `place` is `region/zone/node/cluster/network`.
pub fn workload(uid: &str, place: &str) -> Workload {
    let mut parts = place.split('/').map(Str::from).chain(std::iter::repeat(Str::from("")));
    let mut next = || parts.next().expect("there is always one more");
    let (region, zone) = (next(), next());
    let node = next();
    let profile = Profile {
        namespace: "shop".into(),
        service_account: "cart".into(),
        cluster: next(),
        network: next(),
        tunnel: TunnelProtocol::Hbone,
        services: Arc::new([ServiceMembership { service: key(), ports: Arc::new([]) }]),
        ..Profile::default()
    };
    let locality = Arc::new(Locality { node, region, zone, subzone: "".into() });
    Workload { locality, ..Workload::new(uid.into(), uid, Arc::new(profile)) }
}

pub fn serving(mut workload: Workload, service_port: u16, target_port: u16) -> Workload {
    let ports = Arc::new([PortMapping { service_port, target_port }]);
    workload.services = Arc::new([ServiceMembership { service: key(), ports }]);
    workload
}

pub fn set(workloads: impl IntoIterator<Item = Workload>) -> Arc<EndpointSet> {
    let changes = workloads.into_iter().map(|w| Change::SetWorkload(Arc::new(w)));
    Mesh::default().apply(changes).endpoints(&key()).cloned().unwrap_or_default()
}

/// `n` equal endpoints.
pub fn many(n: usize) -> Arc<EndpointSet> {
    set((0..n).map(|i| workload(&format!("w{i}"), "")))
}

pub fn client(place: &str) -> Client {
    Client::new(&workload("client", place), "10.0.0.9".parse().expect("an address"))
}

pub fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A balancer, and what all of a test's requests have in common.
pub struct World {
    pub balancer: Balancer,
    pub service: Service,
    pub set: Arc<EndpointSet>,
    pub client: Client,
    pub port: u16,
    pub now: Duration,
    pub exclude: Vec<Str>,
    /// The next random number: the tests' numbers are 0, 1, 2, …, which the balancer has to mix itself.
    pub random: u64,
}

impl World {
    pub fn new(service: Service, set: Arc<EndpointSet>) -> Self {
        Self {
            balancer: Balancer::default(),
            service,
            set,
            client: client(""),
            port: PORT,
            now: seconds(0),
            exclude: Vec::new(),
            random: 0,
        }
    }

    pub fn pick(&mut self) -> Result<Picked, NoEndpoint> {
        self.random += 1;
        self.balancer.pick(&self.request(self.random))
    }

    /// What is asked with this random number.
    pub fn request(&self, random: u64) -> Request<'_> {
        Request {
            service: &self.service,
            set: &self.set,
            client: &self.client,
            port: self.port,
            exclude: &self.exclude,
            now: self.now,
            random,
        }
    }

    /// The uid of a choice, whose connection is closed at once.
    pub fn uid(&mut self) -> Str {
        self.pick().expect("an endpoint").workload().uid.clone()
    }

    /// The uids that come up in many choices, sorted.
    pub fn uids(&mut self) -> Vec<Str> {
        let mut uids: Vec<Str> = (0..200).map(|_| self.uid()).collect();
        uids.sort();
        uids.dedup();
        uids
    }

    pub fn fail(&mut self, uid: &str) {
        for _ in 0..10_000 {
            let picked = self.pick().expect("an endpoint");
            if &*picked.workload().uid == uid {
                picked.report_failure(self.now);
                return;
            }
        }
        panic!("{uid} never came up");
    }
}
