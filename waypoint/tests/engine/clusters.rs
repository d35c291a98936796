//! Endpoints of a mesh, as DestinationRules say: the engine, with [`Clusters`] behind it, and real servers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use balance::Client as Place;
use balance::requests::Origin;
use model::http::{
    ConnectionPool, HashKey, HashTable, LoadBalancer, Outliers, Percent, RetryBudget, ServiceTraffic, Subset,
    TrafficPolicy,
};
use model::{
    Addresses, Change, HboneAddr, Health, IpFamilies, LoadBalancing, Locality, Mesh, PortMapping, Profile,
    Service, ServiceKey, ServiceMembership, ServicePort, ServiceSource, SpiffeId, Str, TargetPort,
    TunnelProtocol, Workload,
};
use waypoint::http::Settings;
use waypoint::http::decide::{
    Call, Connection, Dial, Dialing, Endpoints, Forwarding, Outcome, Protocol, Retries,
};
use waypoint::http::head::RequestHead;
use waypoint::upstream::{Backend, ClusterLimits, Clusters, Dialers, NoCluster};

use crate::lab::{self, Proxy, get, server};

/// Writes down which tunnels are asked for. Nothing goes through them.
#[derive(Default)]
struct Asked(Mutex<Vec<(HboneAddr, Arc<[SpiffeId]>)>>);

impl Dialers for Asked {
    fn tunnel(&self, to: HboneAddr, expected: Arc<[SpiffeId]>) -> Arc<dyn Dial> {
        self.0.lock().unwrap().push((to, expected));
        Arc::new(Nowhere)
    }
}

struct Nowhere;

impl Dial for Nowhere {
    fn dial(&self, _: SocketAddr) -> Dialing {
        Box::pin(async { Err(std::io::ErrorKind::ConnectionRefused.into()) })
    }
}

fn key() -> ServiceKey {
    ServiceKey { namespace: "shop".into(), hostname: "cart.test".into() }
}

fn service(app_protocol: &str, source: ServiceSource) -> Change {
    Change::SetService(Arc::new(cart(app_protocol, source)))
}

fn cart(app_protocol: &str, source: ServiceSource) -> Service {
    let port = ServicePort {
        name: "".into(),
        port: 80,
        target: TargetPort::PerEndpoint,
        app_protocol: app_protocol.into(),
    };
    Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart.test".into(),
        vips: Box::new([]),
        ports: Box::new([port]),
        subject_alt_names: Box::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        ip_families: IpFamilies::default(),
        session_affinity: None,
        source,
        canonical: true,
    }
}

fn workload(uid: &str, address: SocketAddr) -> Workload {
    let ports = Arc::new([PortMapping { service_port: 80, target_port: address.port() }]);
    let profile = Profile {
        namespace: "shop".into(),
        service_account: "cart".into(),
        services: Arc::new([ServiceMembership { service: key(), ports }]),
        labels: Arc::new([("version".into(), uid.into())]),
        ..Profile::default()
    };
    Workload { addresses: [address.ip()].into(), ..Workload::new(uid.into(), uid, Arc::new(profile)) }
}

fn set(workload: Workload) -> Change {
    Change::SetWorkload(Arc::new(workload))
}

fn traffic(default: TrafficPolicy) -> Change {
    let subset = |name: &str| Subset {
        name: name.into(),
        labels: Box::new([("version".into(), name.into())]),
        default: default.clone(),
        ports: Box::default(),
    };
    let subsets = Box::new([subset("a"), subset("nobody")]);
    Change::SetTraffic(Arc::new(ServiceTraffic { service: key(), ports: Box::default(), subsets, default }))
}

/// The clusters, and the mesh that they are of.
pub struct World {
    asked: Arc<Asked>,
    clusters: Clusters,
    mesh: Arc<Mesh>,
}

impl World {
    /// A service with these endpoints, `a` being the first.
    pub fn new(endpoints: &[SocketAddr], policy: TrafficPolicy) -> Self {
        let named = ["a", "b", "c"].iter().zip(endpoints);
        let changes = named.map(|(uid, address)| set(workload(uid, *address)));
        Self::of(changes.chain([service("http", ServiceSource::Kubernetes), traffic(policy)]))
    }

    fn of(changes: impl IntoIterator<Item = Change>) -> Self {
        let client = Place {
            locality: Arc::default(),
            node: "".into(),
            cluster: "".into(),
            network: "".into(),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
        };
        let origin = Origin { client, labels: Arc::default() };
        let asked = Arc::<Asked>::default();
        let clusters = Clusters::new(origin, ClusterLimits::default(), asked.clone());
        Self { asked, clusters, mesh: Arc::new(Mesh::default().apply(changes)) }
    }

    fn backend(&self, subset: Option<&str>) -> Result<Arc<dyn Endpoints>, NoCluster> {
        let backend = Backend { service: key(), port: 80, subset: subset.map(Str::from) };
        self.clusters.endpoints(&self.mesh, &backend)
    }

    pub fn apply(&mut self, change: Change) -> usize {
        self.mesh = Arc::new(self.mesh.apply([change]));
        self.clusters.prepare(&self.mesh)
    }

    pub async fn proxy(&self) -> Proxy {
        self.proxy_with(Forwarding::default()).await
    }

    async fn proxy_with(&self, how: Forwarding) -> Proxy {
        Proxy::start(how, self.backend(None).unwrap(), Settings::default()).await
    }
}

/// A server that says its name, with the count of its connection, and the status that `status` says.
async fn named(name: &'static str, status: Arc<AtomicUsize>) -> SocketAddr {
    server(move |count, mut client| {
        let status = Arc::clone(&status);
        async move {
            while client.message().await.is_some() {
                let status = status.load(Ordering::Relaxed);
                let body = format!("{name}{count}");
                let length = body.len();
                client.send(format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n{body}")).await;
            }
        }
    })
    .await
}

fn good() -> Arc<AtomicUsize> {
    Arc::new(AtomicUsize::new(200))
}

pub fn round_robin() -> TrafficPolicy {
    TrafficPolicy { load_balancer: LoadBalancer::RoundRobin, ..TrafficPolicy::default() }
}

async fn body(proxy: &Proxy, request: String) -> String {
    String::from_utf8(proxy.connect().await.ask(request).await.body).unwrap()
}

async fn bodies(proxy: &Proxy, count: usize) -> String {
    let mut all = String::new();
    for _ in 0..count {
        all.push_str(&body(proxy, get("/")).await);
    }
    all
}

#[tokio::test]
async fn endpoints_come_and_go_with_the_mesh_and_subsets_are_by_labels() {
    let (a, b) = (named("a", good()).await, named("b", good()).await);
    let mut world = World::new(&[a, b], round_robin());
    let proxy = world.proxy().await;
    let bodies_of = bodies(&proxy, 4).await;
    assert!(bodies_of == "a0b0a0b0" || bodies_of == "b0a0b0a0", "{bodies_of}");
    let of_a = Proxy::start(Forwarding::default(), world.backend(Some("a")).unwrap(), Settings::default());
    assert_eq!(bodies(&of_a.await, 3).await.replace(|c: char| c.is_ascii_digit(), ""), "aaa");
    let nobody =
        Proxy::start(Forwarding::default(), world.backend(Some("nobody")).unwrap(), Settings::default());
    assert_eq!(nobody.await.connect().await.ask(get("/")).await.status(), 503);
    assert!(matches!(world.backend(Some("c")), Err(NoCluster::Subset(..))));

    world.apply(set(workload("a", a).with(|w| w.health = Health::Unhealthy)));
    assert_eq!(bodies(&proxy, 3).await, "b0b0b0");
    // Back, and known by another name: the connection to it is the one that was there.
    world.apply(set(workload("a", a).with(|w| w.set_canonical_name("cart".into()))));
    let again = bodies(&proxy, 2).await;
    assert!(again == "a0b0" || again == "b0a0", "{again}");
    world.apply(Change::RemoveService(key()));
    assert!(matches!(world.backend(None), Err(NoCluster::Service(_))));
    assert_eq!(world.clusters.snapshot().len(), 0);
}

#[test]
fn a_change_looks_at_its_own_destinations_and_none_is_kept_that_has_gone() {
    let of = |n: usize| ServiceKey { hostname: format!("s{n}.test").as_str().into(), ..key() };
    let make = |n: usize, to: u16| {
        let port = |port| ServicePort {
            port,
            target: TargetPort::Number(to),
            name: "".into(),
            app_protocol: "http".into(),
        };
        let (namespace, hostname) = (of(n).namespace, of(n).hostname);
        let ports = Box::new([port(80), port(81)]);
        Change::SetService(Arc::new(Service {
            namespace,
            hostname,
            ports,
            ..cart("http", ServiceSource::Kubernetes)
        }))
    };
    let mut world = World::of((0..500).map(|n| make(n, 8080)));
    let ask = |world: &World, n: usize, port| {
        world.clusters.endpoints(&world.mesh, &Backend { service: of(n), port, subset: None }).map(drop)
    };
    for n in 0..500 {
        ask(&world, n, 80).unwrap();
    }
    ask(&world, 7, 81).unwrap();
    assert_eq!(world.apply(make(3, 9090)), 501, "the first time it is all of them");
    assert_eq!(world.apply(make(3, 8080)), 1);
    assert_eq!(world.apply(make(7, 9090)), 2, "both of its ports");
    assert_eq!(world.apply(make(700, 8080)), 0, "nobody asked for it");
    let before = Arc::clone(&world.mesh);
    assert_eq!((world.apply(Change::RemoveService(of(7))), world.clusters.len()), (2, 499));
    assert!(matches!(ask(&world, 7, 80), Err(NoCluster::Service(_))));
    // A request of before finds its way, and leaves nothing behind.
    let late = Backend { service: of(7), port: 80, subset: None };
    assert!(world.clusters.endpoints(&before, &late).is_ok());
    assert_eq!(world.clusters.len(), 499);
    assert_eq!(world.apply(make(7, 8080)), 0);
    ask(&world, 7, 80).unwrap();
    assert_eq!(world.clusters.len(), 500);
}

#[tokio::test]
async fn a_tunnel_is_to_the_pods_node_and_stays_while_it_leads_to_the_same() {
    let a = SocketAddr::from(([127, 0, 0, 2], 8080));
    let meshed = || workload("a", a).with(|w| w.tunnel = TunnelProtocol::Hbone);
    let mut world = World::of([service("http", ServiceSource::Kubernetes), set(meshed())]);
    assert_eq!(world.proxy().await.connect().await.ask(get("/")).await.status(), 503);
    let asked = |world: &World| world.asked.0.lock().unwrap().clone();
    let own: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
    let to = HboneAddr::new(SocketAddr::from(([127, 0, 0, 2], 15008)));
    assert_eq!(asked(&world), [(to, Arc::from([own]))]);
    let target = |world: &World| Arc::clone(&world.clusters.snapshot()[0].endpoints[0].target);
    let before = target(&world);
    assert!(before.about.as_ref().unwrap().tunnelled && before.address == a);

    world.apply(set(meshed().with(|w| {
        w.health = Health::Unhealthy;
        w.set_canonical_name("cart".into());
    })));
    assert_eq!((asked(&world).len(), target(&world) == before), (1, true));
    assert_eq!(target(&world).about.as_ref().unwrap().workload.as_ref().unwrap().canonical_name(), "cart");
    world.apply(set(meshed().with(|w| w.service_account = "other".into())));
    assert_eq!((asked(&world).len(), target(&world) == before), (2, false));
    // A workload that can't prove who it is gets nothing.
    world.apply(set(meshed().with(|w| w.service_account = "no/name".into())));
    assert_eq!(world.clusters.snapshot()[0].endpoints.len(), 0);
}

#[tokio::test]
async fn an_endpoint_that_fails_is_left_out_and_stays_so_with_a_new_mesh() {
    let status = Arc::new(AtomicUsize::new(500));
    let (a, b) = (named("a", Arc::clone(&status)).await, named("b", good()).await);
    let outliers = Outliers {
        consecutive_5xx: 3,
        consecutive_gateway_errors: 0,
        split_local_origin: false,
        consecutive_local_origin_failures: 5,
        interval: Duration::from_millis(50),
        base_ejection: Duration::from_millis(300),
        max_ejection: Percent::of(50, 100),
        min_health: Percent::default(),
    };
    let mut world = World::new(&[a, b], TrafficPolicy { outliers: Some(outliers), ..round_robin() });
    let proxy = world.proxy().await;
    bodies(&proxy, 6).await;
    let ejected = |world: &World| {
        let info = world.clusters.snapshot().remove(0);
        info.endpoints.iter().filter(|endpoint| endpoint.ejected).count()
    };
    assert_eq!((ejected(&world), world.clusters.stats().ejections.get()), (1, 1));
    world.apply(service("http", ServiceSource::Kubernetes));
    assert_eq!(ejected(&world), 1);
    // Back after its time, and out again at the third failure.
    lab::until(|| (world.clusters.stats().ejections.get() == 1).then_some(())).await;
    let mut client = proxy.connect().await;
    while world.clusters.stats().ejections.get() < 2 {
        client.ask(get("/")).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // And when it is well, it is back for good.
    status.store(200, Ordering::Relaxed);
    while ejected(&world) > 0 {
        assert_eq!(client.ask(get("/")).await.status(), 200);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn threads_that_choose_while_endpoints_fail_and_come_and_go_lose_no_count() {
    let outliers = Outliers {
        consecutive_5xx: 2,
        consecutive_gateway_errors: 0,
        split_local_origin: false,
        consecutive_local_origin_failures: 2,
        interval: Duration::from_millis(5),
        base_ejection: Duration::from_millis(5),
        max_ejection: Percent::of(40, 100),
        min_health: Percent::default(),
    };
    let of = |n: u16| set(workload(&format!("w{n}"), SocketAddr::from(([127, 0, 0, 1], 1000 + n))));
    let policy = TrafficPolicy { outliers: Some(outliers), ..TrafficPolicy::default() };
    let mut world =
        World::of((0..50).map(of).chain([service("http", ServiceSource::Kubernetes), traffic(policy)]));
    let endpoints = world.backend(None).unwrap();
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let endpoints = Arc::clone(&endpoints);
            tokio::task::spawn_blocking(move || {
                let address = SocketAddr::from(([127, 0, 0, 1], 1));
                let connection = Connection {
                    client: address,
                    destination: address,
                    identity: None,
                    server_name: None,
                    secure: false,
                    said: None,
                };
                let request = RequestHead::default();
                for n in 0..20_000 {
                    let call =
                        Call { request: &request, connection: &connection, tried: &[], elsewhere: false };
                    let picked = endpoints.pick(&call).unwrap();
                    let retrying = endpoints.may_retry();
                    let fails =
                        (n + thread).is_multiple_of(3) || picked.target.address.port().is_multiple_of(2);
                    picked.report(if fails { Outcome::Failed } else { Outcome::Status(200) });
                    drop((picked, retrying));
                }
            })
        })
        .collect();
    for n in 0..200 {
        world.apply(of(50 + n % 10));
        world.apply(Change::RemoveWorkload(format!("w{}", 50 + (n + 5) % 10).as_str().into()));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for thread in threads {
        thread.await.unwrap();
    }
    let info = world.clusters.snapshot().remove(0);
    assert_eq!((info.circuit.requests, info.circuit.retries), (0, 0));
    assert!(info.endpoints.iter().all(|endpoint| endpoint.under_way == 0));
    let out = info.endpoints.iter().filter(|endpoint| endpoint.ejected).count();
    assert!(out * 100 <= 40 * info.endpoints.len() + 400, "{out} of {} are out", info.endpoints.len());
    assert!(world.clusters.stats().ejections.get() > 50);
    assert_eq!(world.clusters.stats().picks.get(), 80_000);
}

/// A server whose responses wait until `open` says so.
async fn waiting(open: Arc<tokio::sync::Semaphore>) -> SocketAddr {
    server(move |count, mut client| {
        let open = Arc::clone(&open);
        async move {
            while client.message().await.is_some() {
                open.acquire().await.unwrap().forget();
                client.send(format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{count}")).await;
            }
        }
    })
    .await
}

#[tokio::test]
async fn one_connection_one_that_waits_and_the_third_is_refused() {
    let open = Arc::new(tokio::sync::Semaphore::new(0));
    let pool = ConnectionPool {
        max_connections: Some(1),
        max_pending_requests: Some(1),
        max_requests_per_connection: Some(1),
        ..ConnectionPool::default()
    };
    let world = World::new(&[waiting(Arc::clone(&open)).await], TrafficPolicy { pool, ..round_robin() });
    let proxy = world.proxy().await;
    let counts = || world.clusters.snapshot().remove(0).circuit;
    let mut clients = Vec::new();
    for (connections, pending) in [(1, 0), (1, 1)] {
        let mut client = proxy.connect().await;
        client.send(get("/")).await;
        clients.push(client);
        lab::until(|| (counts().connections == connections && counts().pending == pending).then_some(()))
            .await;
    }
    let refused = proxy.connect().await.ask(get("/")).await;
    assert_eq!((refused.status(), counts().pending_refused), (503, 1));
    assert_eq!(proxy.wait_records(1).await[0].flag.to_string(), "UO");
    open.add_permits(2);
    for (number, client) in clients.iter_mut().enumerate() {
        let message = client.message().await.unwrap();
        assert_eq!(
            (message.status(), message.body),
            (200, number.to_string().into_bytes()),
            "a connection each"
        );
    }
    lab::until(|| (counts().requests == 0 && counts().connections == 0).then_some(())).await;
}

#[tokio::test]
async fn requests_and_retries_have_limits() {
    let open = Arc::new(tokio::sync::Semaphore::new(0));
    let pool = ConnectionPool { max_requests: Some(1), ..ConnectionPool::default() };
    let world = World::new(&[waiting(Arc::clone(&open)).await], TrafficPolicy { pool, ..round_robin() });
    let proxy = world.proxy().await;
    let mut first = proxy.connect().await;
    first.send(get("/")).await;
    let under_way = || world.clusters.snapshot()[0].circuit.requests;
    lab::until(|| (under_way() == 1).then_some(())).await;
    assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 503);
    // A client that goes gives its place back.
    drop(first);
    lab::until(|| (under_way() == 0).then_some(())).await;

    let failing = named("a", Arc::new(AtomicUsize::new(503))).await;
    let budget = RetryBudget { share: Percent::default(), min_concurrency: 0, interval: None };
    for (retry_budget, tries) in [(None, 3), (Some(budget), 1)] {
        let world = World::new(&[failing], TrafficPolicy { retry_budget, ..round_robin() });
        let retries = Retries { attempts: 2, gateway_errors: true, ..Retries::default() };
        let proxy = world.proxy_with(Forwarding { retries: Some(retries), ..Forwarding::default() }).await;
        assert_eq!(proxy.connect().await.ask(get("/")).await.status(), 503);
        let record = &proxy.wait_records(1).await[0];
        assert_eq!(record.tries, tries);
        let flag = if tries == 1 { "UO" } else { "-" };
        assert_eq!(record.flag.to_string(), flag);
    }
}

#[tokio::test]
async fn connections_end_when_they_are_idle_or_old() {
    let of = |pool| async {
        let world = World::new(&[named("a", good()).await], TrafficPolicy { pool, ..round_robin() });
        world.proxy().await
    };
    let short = Some(Duration::from_millis(30));
    for pool in [
        ConnectionPool { idle_timeout: short, ..ConnectionPool::default() },
        ConnectionPool { max_connection_duration: short, ..ConnectionPool::default() },
    ] {
        let proxy = of(pool).await;
        let mut client = proxy.connect().await;
        // Each on a connection of its own.
        for wanted in ["a0", "a1", "a2"] {
            assert_eq!(client.ask(get("/")).await.body, wanted.as_bytes());
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    }
    let pool =
        ConnectionPool { keepalive: Some((Duration::ZERO, Duration::ZERO, 3)), ..ConnectionPool::default() };
    assert_eq!(bodies(&of(pool).await, 3).await, "a0a0a0");
}

#[tokio::test]
async fn a_cookie_brings_a_client_back_to_its_endpoint() {
    let servers = [named("a", good()).await, named("b", good()).await, named("c", good()).await];
    let ttl = Some(Duration::from_secs(60));
    let key = HashKey::Cookie { name: "session".into(), path: Some("/shop".into()), ttl };
    let load_balancer = LoadBalancer::Hash { key, table: HashTable::Maglev(251), bound: None };
    let world = World::new(&servers, TrafficPolicy { load_balancer, ..TrafficPolicy::default() });
    let proxy = world.proxy().await;
    let letter = |message: &lab::Message| message.body[0] as char;
    for _ in 0..5 {
        let first = proxy.connect().await.ask(get("/")).await;
        let cookie = first.field("set-cookie").unwrap();
        let (value, rest) = cookie.split_once("; ").unwrap();
        assert_eq!(rest, "Max-Age=60; Path=/shop; HttpOnly");
        for _ in 0..3 {
            let request = format!("GET / HTTP/1.1\r\nHost: a\r\nCookie: x=1; {value}\r\n\r\n");
            let again = proxy.connect().await.ask(request).await;
            assert_eq!((letter(&again), again.field("set-cookie")), (letter(&first), None));
        }
    }
    let key = HashKey::Header("x-user".into());
    let load_balancer = LoadBalancer::Hash { key, table: HashTable::Ring(1024), bound: None };
    let world = World::new(&servers, TrafficPolicy { load_balancer, ..TrafficPolicy::default() });
    let proxy = world.proxy().await;
    let mut seen = std::collections::BTreeSet::new();
    for user in 0..20 {
        let request = || format!("GET / HTTP/1.1\r\nHost: a\r\nX-User: {user}\r\n\r\n");
        let first = body(&proxy, request()).await;
        assert_eq!(body(&proxy, request()).await, first);
        seen.insert(first);
    }
    assert_eq!(seen.len(), 3);
}

#[tokio::test]
async fn a_host_name_is_an_endpoint_and_so_is_what_the_client_dialled() {
    let a = named("a", good()).await;
    let by_name = workload("a", a).with(|w| {
        w.addresses = Addresses::default();
        w.hostname = "localhost".into();
    });
    let world = World::of([service("http", ServiceSource::Dns), set(by_name)]);
    assert_eq!(bodies(&world.proxy().await, 2).await, "a0a0");

    // Of a service without endpoints, and of none: the address that was dialled is where it goes.
    let passing = |vips: &[SocketAddr]| {
        let Change::SetService(service) = service("http", ServiceSource::Passthrough) else { unreachable!() };
        let range = |vip: &SocketAddr| model::Vip { network: "".into(), range: vip.ip().into() };
        let vips = vips.iter().map(range).collect();
        World::of([Change::SetService(Arc::new(Service { vips, ..Service::clone(&service) }))])
    };
    let outside = passing(&[a]);
    let connection = Connection {
        client: a,
        destination: a,
        identity: None,
        server_name: None,
        secure: false,
        said: None,
    };
    let call =
        Call { request: &RequestHead::default(), connection: &connection, tried: &[], elsewhere: false };
    let dialled = |endpoints: Arc<dyn Endpoints>| endpoints.pick(&call).unwrap().target.address;
    assert_eq!(dialled(outside.backend(None).unwrap()), a);
    assert_eq!(dialled(outside.clusters.original(&outside.mesh, &connection)), a);
    assert_eq!(outside.clusters.snapshot()[0].circuit.requests, 0, "both have ended");
    // Where a route of another service leads to it, the address is the other's: plain TCP to that would pass by all that
    // guards it.
    for vips in [&[][..], &["192.0.2.1:0".parse().unwrap()][..]] {
        let elsewhere = passing(vips);
        assert!(elsewhere.backend(None).unwrap().pick(&call).is_err(), "{vips:?}");
        assert_eq!(elsewhere.clusters.snapshot()[0].circuit.requests, 0);
    }
}

#[tokio::test]
async fn the_clients_protocol_goes_on_where_that_is_asked_for() {
    let of = |app: &str, pool: ConnectionPool| {
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let policy = TrafficPolicy { pool, ..round_robin() };
        let world = World::of([
            service(app, ServiceSource::Kubernetes),
            set(workload("a", address)),
            traffic(policy),
        ]);
        world.backend(None).unwrap();
        let target = Arc::clone(&world.clusters.snapshot()[0].endpoints[0].target);
        target.protocol
    };
    let plain = ConnectionPool::default();
    assert_eq!(of("http", plain.clone()), Protocol::Http1);
    assert_eq!(of("grpc", plain.clone()), Protocol::Http2);
    assert_eq!(of("http", ConnectionPool { h2_upgrade: Some(true), ..plain.clone() }), Protocol::Http2);
    // By HTTP/2 to a server that speaks it, because the client does.
    let servers = crate::h2::echo().await;
    let policy =
        TrafficPolicy { pool: ConnectionPool { use_client_protocol: true, ..plain }, ..round_robin() };
    let world = World::new(&[servers], policy);
    let proxy = world.proxy().await;
    let url = format!("http://{}/x", proxy.address);
    let out =
        crate::peers::run("curl", &["-sS", "--http2-prior-knowledge", "-w", "%{http_code}", &url]).await;
    assert!(out.ends_with("200"), "{out}");
}

#[tokio::test]
async fn another_try_goes_to_another_locality_where_that_is_said() {
    let bad = || Arc::new(AtomicUsize::new(503));
    let (one, two, far) = (named("n", bad()).await, named("n", bad()).await, named("f", good()).await);
    let outliers = Outliers {
        consecutive_5xx: 0,
        consecutive_gateway_errors: 0,
        split_local_origin: false,
        consecutive_local_origin_failures: 0,
        interval: Duration::from_secs(10),
        base_ejection: Duration::from_secs(10),
        max_ejection: Percent::of(10, 100),
        min_health: Percent::default(),
    };
    let policy = TrafficPolicy { outliers: Some(outliers), ..round_robin() };
    let place = |region: &str| Arc::new(Locality { region: region.into(), ..Locality::default() });
    let of =
        |uid: &str, address, region: &str| Workload { locality: place(region), ..workload(uid, address) };
    let world = World::of([
        set(of("a", one, "near")),
        set(of("b", two, "near")),
        set(of("c", far, "far")),
        service("http", ServiceSource::Kubernetes),
        traffic(policy),
    ]);
    let client = Place {
        locality: place("near"),
        node: "".into(),
        cluster: "".into(),
        network: "".into(),
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    world.clusters.set_origin(Origin { client, labels: Arc::default() });
    for (remote_localities, status) in [(false, 503), (true, 200)] {
        let retries = Retries {
            attempts: 1,
            gateway_errors: true,
            backoff: Some(Duration::from_millis(1)),
            remote_localities,
            ..Retries::default()
        };
        let proxy = world.proxy_with(Forwarding { retries: Some(retries), ..Forwarding::default() }).await;
        for _ in 0..4 {
            assert_eq!(proxy.connect().await.ask(get("/")).await.status(), status, "{remote_localities}");
        }
    }
}
