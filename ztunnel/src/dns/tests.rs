//! The proxy on real sockets, with an upstream server that the test plays.

mod forward;
mod fuzz;
mod names;
mod netns;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, Query as Question};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use model::{
    Change, Health, HealthPolicy, IpFamilies, Mesh, PortMapping, Profile, Service, ServiceMembership,
    ServicePort, ServiceSource, Str, TargetPort, Vip, Workload,
};
use net::{DatagramOptions, ListenOptions, Netns};
use process::metrics::{Format, Registry};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::*;

const SOON: Duration = Duration::from_secs(20);

/// A service in `namespace` with these virtual addresses; headless without any.
fn service(hostname: &str, namespace: &str, vips: &[&str]) -> Service {
    Service {
        name: hostname.split('.').next().unwrap().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        vips: vips
            .iter()
            .map(|vip| {
                let (network, range) = vip.split_once('@').map_or(("", *vip), |(ip, network)| (network, ip));
                let single = || ipnet::IpNet::from(range.parse::<IpAddr>().unwrap());
                Vip { network: network.into(), range: range.parse().unwrap_or_else(|_| single()) }
            })
            .collect(),
        ports: Box::new([ServicePort {
            name: "http".into(),
            port: 80,
            target: TargetPort::Number(8080),
            app_protocol: "".into(),
        }]),
        subject_alt_names: Box::default(),
        waypoint: None,
        load_balancing: model::LoadBalancing::default(),
        ip_families: IpFamilies::Automatic,
        session_affinity: None,
        source: ServiceSource::Kubernetes,
        canonical: false,
    }
}

fn kubernetes(name: &str, namespace: &str, vips: &[&str]) -> Service {
    service(&format!("{name}.{namespace}.svc.cluster.local"), namespace, vips)
}

/// A pod with these addresses that is an endpoint of `service`.
fn endpoint(name: &str, service: &Service, addresses: &[&str], health: Health) -> Workload {
    let profile = Profile {
        namespace: service.namespace.clone(),
        health,
        canonical_name: None,
        workload_name: None,
        services: Arc::new([ServiceMembership {
            service: service.key(),
            ports: Arc::new([PortMapping { service_port: 80, target_port: 8080 }]),
        }]),
        ..Profile::default()
    };
    let uid = format!("Kubernetes//Pod/{}/{name}", service.namespace);
    let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
    Workload { addresses, ..Workload::new(uid.into(), name, Arc::new(profile)) }
}

/// A mesh with one of everything.
fn mesh() -> Mesh {
    let headless = kubernetes("db", "shop", &[]);
    let mut open = kubernetes("queue", "shop", &[]);
    open.load_balancing.health = HealthPolicy::AllowAll;
    let mut v4_only = kubernetes("old", "shop", &[]);
    v4_only.ip_families = IpFamilies::V4Only;
    let external = |hostname: &str, namespace: &str, vips: &[&str], source| {
        let mut service = service(hostname, namespace, vips);
        service.source = source;
        service
    };
    let workloads = [
        endpoint("db-0", &headless, &["10.1.0.1", "fd00::1"], Health::Healthy),
        endpoint("db-1", &headless, &["10.1.0.2"], Health::Healthy),
        endpoint("db-2", &headless, &["10.1.0.3"], Health::Unhealthy),
        endpoint("queue-0", &open, &["10.1.1.1"], Health::Unhealthy),
        endpoint("old-0", &v4_only, &["10.1.2.1", "fd00::21"], Health::Healthy),
    ];
    let services = [
        kubernetes("cart", "shop", &["10.96.0.1"]),
        kubernetes("both", "shop", &["10.96.0.2", "fd00:96::2"]),
        kubernetes("six", "shop", &["fd00:96::3"]),
        kubernetes("mail", "office", &["10.96.0.4"]),
        kubernetes("cart", "office", &["10.96.0.5"]),
        kubernetes("empty", "shop", &[]),
        kubernetes("far", "shop", &["10.96.0.6@other"]),
        headless,
        open,
        v4_only,
        external("api.example.com", "shop", &["240.240.0.1"], ServiceSource::Dns),
        external("*.wild.example.com", "shop", &["240.240.0.2"], ServiceSource::Dns),
        external("*.deep.wild.example.com", "shop", &["240.240.0.3"], ServiceSource::Dns),
        external("plain.example.com", "shop", &[], ServiceSource::Passthrough),
        external("range.example.com", "shop", &["192.0.2.0/24"], ServiceSource::Passthrough),
        external("two.example.com", "a", &["240.240.0.10"], ServiceSource::Static),
        external("two.example.com", "b", &["240.240.0.11"], ServiceSource::Static),
    ];
    let changes = services.into_iter().map(|s| Change::SetService(Arc::new(s)));
    Mesh::default().apply(changes.chain(workloads.into_iter().map(|w| Change::SetWorkload(Arc::new(w)))))
}

/// A proxy that serves on loopback.
struct Lab {
    address: SocketAddr,
    registry: Registry,
    serving: [tokio::task::JoinHandle<()>; 2],
    /// Dropped, it ends what serves datagrams.
    told: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Lab {
    fn start(mesh: Mesh, upstreams: impl IntoIterator<Item = SocketAddr>, settings: DnsSettings) -> Self {
        let registry = Registry::new();
        let mesh = Arc::new(mesh);
        let proxy = DnsProxy::new(settings, move || mesh.clone(), DnsMetrics::new(&registry));
        let client = proxy.client(ClientSettings {
            namespace: "shop".into(),
            network: "".into(),
            addresses: Box::default(),
            canonical_service: "tester".into(),
            canonical_revision: "v1".into(),
            upstreams: Arc::new(Upstreams::new(upstreams)),
            upstreams_from: None,
            ask_original: false,
        });
        let netns = Netns::current().unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let (listener, socket) = (0..20)
            .find_map(|_| {
                let listener = net::listen(&netns, any, &ListenOptions::default()).unwrap();
                let address = listener.local_addr().unwrap();
                let socket = ProxyUdpSocket::bind(&netns, address, &DatagramOptions::default()).ok()?;
                Some((listener, socket))
            })
            .expect("no port is free for both UDP and TCP");
        let address = listener.local_addr().unwrap();
        let (told, stopped) = tokio::sync::oneshot::channel();
        let ending = async { drop(stopped.await) };
        let udp = tokio::spawn(proxy.clone().serve_udp(socket, client.clone(), ending));
        let tcp = tokio::spawn(proxy.serve_tcp(listener, client));
        Self { address, registry, serving: [udp, tcp], told: Some(told) }
    }

    /// Without an upstream.
    fn alone() -> Self {
        Self::start(mesh(), [], DnsSettings::default())
    }

    fn metric(&self, start: &str) -> f64 {
        let text = self.registry.encode(Format::Prometheus);
        let values = text.lines().filter(|l| l.starts_with(start)).map(|l| l.rsplit_once(' ').unwrap().1);
        values.map(|v| v.parse::<f64>().unwrap()).sum()
    }

    async fn udp(&self, query: &[u8]) -> Vec<u8> {
        self.udp_within(query, SOON).await.expect("no answer")
    }

    async fn udp_within(&self, query: &[u8], time: Duration) -> Option<Vec<u8>> {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(self.address).await.unwrap();
        socket.send(query).await.unwrap();
        let mut buffer = vec![0; 65_536];
        let len = timeout(time, socket.recv(&mut buffer)).await.ok()?.unwrap();
        buffer.truncate(len);
        Some(buffer)
    }

    async fn tcp(&self, query: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        write_framed(&mut stream, query).await;
        timeout(SOON, read_framed(&mut stream)).await.expect("no answer").unwrap()
    }

    async fn ask(&self, name: &str, kind: RecordType) -> Message {
        Message::from_vec(&self.udp(&query(name, kind)).await).unwrap()
    }
}

async fn write_framed(stream: &mut TcpStream, message: &[u8]) {
    let mut framed = u16::try_from(message.len()).unwrap().to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await.unwrap();
}

async fn read_framed(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

fn message(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Question::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn query(name: &str, kind: RecordType) -> Vec<u8> {
    message(name, kind).to_vec().unwrap()
}

fn query_with_edns(name: &str, kind: RecordType, size: u16, dnssec_ok: bool) -> Vec<u8> {
    let mut message = message(name, kind);
    let mut edns = Edns::new();
    edns.set_max_payload(size).set_dnssec_ok(dnssec_ok);
    message.set_edns(edns);
    message.to_vec().unwrap()
}

/// The addresses in an answer, sorted.
fn addresses(message: &Message) -> Vec<String> {
    let ips = message.answers.iter().filter_map(|record| match &record.data {
        RData::A(a) => Some(a.0.to_string()),
        RData::AAAA(a) => Some(a.0.to_string()),
        _ => None,
    });
    let mut ips: Vec<String> = ips.collect();
    ips.sort();
    ips
}

/// What the upstream server does with a query: the datagrams or messages that it sends back.
type Behaviour = Box<dyn FnMut(&[u8], Transport) -> Vec<Vec<u8>> + Send>;

type Seen = Arc<Mutex<Vec<(Transport, Vec<u8>)>>>;

/// An upstream server.
struct Upstream {
    address: SocketAddr,
    behaviour: Arc<Mutex<Behaviour>>,
    seen: Seen,
}

impl Upstream {
    async fn start(behaviour: impl FnMut(&[u8], Transport) -> Vec<Vec<u8>> + Send + 'static) -> Self {
        let (listener, socket) = loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()).await {
                break (listener, socket);
            }
        };
        let address = listener.local_addr().unwrap();
        let behaviour: Arc<Mutex<Behaviour>> = Arc::new(Mutex::new(Box::new(behaviour)));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let react = {
            let (behaviour, seen) = (behaviour.clone(), seen.clone());
            move |query: &[u8], transport| {
                seen.lock().unwrap().push((transport, query.to_vec()));
                (behaviour.lock().unwrap())(query, transport)
            }
        };
        let over_udp = react.clone();
        tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            loop {
                let (len, peer) = socket.recv_from(&mut buffer).await.unwrap();
                for reply in over_udp(&buffer[..len], Transport::Udp) {
                    socket.send_to(&reply, peer).await.unwrap();
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let react = react.clone();
                tokio::spawn(async move {
                    while let Ok(query) = read_framed(&mut stream).await {
                        for reply in react(&query, Transport::Tcp) {
                            write_framed(&mut stream, &reply).await;
                        }
                    }
                });
            }
        });
        Self { address, behaviour, seen }
    }

    fn behave(&self, behaviour: impl FnMut(&[u8], Transport) -> Vec<Vec<u8>> + Send + 'static) {
        *self.behaviour.lock().unwrap() = Box::new(behaviour);
    }

    fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

/// A reply to `query` with this address, for `ttl` seconds.
fn reply(query: &[u8], ip: &str, ttl: u32) -> Vec<u8> {
    let mut message = Message::from_vec(query).unwrap().into_response();
    let name = message.queries[0].name().clone();
    message.add_answer(Record::from_rdata(name, ttl, RData::A(A(ip.parse().unwrap()))));
    message.to_vec().unwrap()
}

/// A reply with this code and no records.
fn reply_code(query: &[u8], code: u16) -> Vec<u8> {
    let mut reply = Message::from_vec(query).unwrap().into_response().to_vec().unwrap();
    reply[3] = (reply[3] & 0xf0) | code as u8;
    reply
}
