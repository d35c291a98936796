//! The gRPC port under those who prove nothing: what one source takes up keeps nobody else out, what proves nothing is
//! closed, and who is known stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod mesh;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use control_plane::ca::{Account, AuthenticationError, Authenticator, BoundPod, Caller, Reviewer};
use control_plane::gateways::Gateways;
use control_plane::push::TYPES;
use control_plane::serve::{Limits, NodeProxies, OfOneSource, Port, Proving, connections};
use futures_util::future::BoxFuture;
use identity::Clock;
use mesh::Root;
use process::metrics::{Format, Registry};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use xds::client::{Client, Link, NodeInfo, Settings};
use xds::server::{Change, Config, Resource, Server};

/// The token says who has it: `POD` of the account ztunnel, or no pod at all.
struct Tokens;

impl Reviewer for Tokens {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthenticationError>> {
        Box::pin(async move {
            let bound = |pod: &str| BoundPod { name: pod.to_owned(), uid: "1".to_owned(), node: None };
            match token {
                "hangs" => std::future::pending().await,
                _ => Ok(match token.strip_prefix("waypoint-") {
                    // Of the Gateway shop/w, or one of another namespace.
                    Some(namespace) => Caller {
                        namespace: namespace.to_owned(),
                        service_account: "w".to_owned(),
                        pod: Some(bound("w-1")),
                    },
                    None => Caller {
                        namespace: "culvert-system".to_owned(),
                        service_account: "ztunnel".to_owned(),
                        pod: Some(token).filter(|token| *token != "unbound").map(bound),
                    },
                }),
            }
        })
    }
}

struct Plane {
    address: SocketAddr,
    root: Root,
    server: Server,
    metrics: Registry,
    files: TempDir,
}

impl Plane {
    async fn new(limits: Limits) -> Self {
        let authenticator = Arc::new(Authenticator::new(Tokens, Clock::system()));
        let trusted = vec!["culvert-system/ztunnel".parse::<Account>().unwrap()];
        let gateways = Gateways::default();
        gateways.set([("shop".into(), "w".into()), ("ops".into(), "w".into())].into_iter());
        let proxies =
            NodeProxies::new(authenticator, "Kubernetes".to_owned(), trusted).and_waypoints(gateways);
        let config = Config { types: TYPES.to_vec(), ..Config::default() };
        let server = Server::new(config, Arc::new(proxies), Arc::new(()));
        server.ready();
        let (root, metrics) = (Root::new(), Registry::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let port = Port::new(limits, &metrics);
        let incoming = connections(listener, root.server_config(&[b"h2"]), port.clone());
        let served = tonic::transport::Server::builder().layer(Proving(port)).add_service(server.service());
        tokio::spawn(served.serve_with_incoming(incoming));
        let files = TempDir::new().unwrap();
        std::fs::write(files.path().join("root.pem"), &root.pem).unwrap();
        Self { address, root, server, metrics, files }
    }

    /// A connection from an address of this host.
    async fn connect(&self, from: [u8; 4]) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((from, 0))).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    async fn secure(&self, from: [u8; 4]) -> TlsStream<TcpStream> {
        let mut config = (*self.root.client_config()).clone();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let name = ServerName::try_from("localhost").unwrap();
        let stream = self.connect(from).await;
        patient(TlsConnector::from(Arc::new(config)).connect(name, stream)).await.unwrap()
    }

    fn client(&self, token: &str, pod: &str) -> tokio::sync::watch::Receiver<Link> {
        self.client_of(token, (pod, "culvert-system"), None, Arc::default())
    }

    /// A proxy that writes down what it has; a waypoint, if it says which Gateway it is.
    fn client_of(
        &self,
        token: &str,
        (pod, namespace): (&str, &str),
        gateway: Option<&str>,
        has: Arc<Mutex<BTreeSet<String>>>,
    ) -> tokio::sync::watch::Receiver<Link> {
        let token_file = self.files.path().join(format!("{token}-{}", gateway.is_some()));
        std::fs::write(&token_file, token).unwrap();
        let node = NodeInfo {
            ip: "10.0.0.9".parse().unwrap(),
            name: pod.to_owned(),
            namespace: namespace.to_owned(),
            node_name: "node1".to_owned(),
            cluster_id: String::new(),
            version: "0.1.0".to_owned(),
        };
        let settings = Settings {
            addresses: vec![format!("https://{}", self.address)],
            root_file: Some(self.files.path().join("root.pem")),
            token_file: Some(token_file),
            node: gateway.map_or_else(|| node.node(), |gateway| node.waypoint(gateway)),
            types: TYPES.to_vec(),
            ..Settings::default()
        };
        let (client, mut updates) = Client::new(settings, Arc::new(())).unwrap();
        let link = client.link();
        tokio::spawn(client.run());
        tokio::spawn(async move {
            while let Some(update) = updates.next().await {
                {
                    let mut has = has.lock().unwrap();
                    has.retain(|name| !update.removed.contains(name));
                    has.extend(update.resources.iter().map(|r| r.name.to_string()));
                }
                update.ack();
            }
        });
        link
    }

    fn metric(&self, line: &str) -> u64 {
        let text = self.metrics.encode(Format::Prometheus);
        let line = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }

    fn refused(&self, reason: &str) -> u64 {
        self.metric(&format!("culvertd_connections_refused_total{{reason=\"{reason}\"}}"))
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..600 {
            if holds(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{what}: {}", self.metrics.encode(Format::Prometheus));
    }
}

async fn patient<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it takes too long")
}

/// Waits until the other end has closed it.
async fn closed(stream: &mut (impl tokio::io::AsyncRead + Unpin)) {
    let mut rest = Vec::new();
    // A reset says so, too.
    let _ = patient(stream.read_to_end(&mut rest)).await;
}

fn limits() -> Limits {
    Limits {
        of_one_source: OfOneSource { connections: 6, handshakes: 3, requests: 2 },
        loopback: true,
        ..Limits::default()
    }
}

#[tokio::test]
async fn half_open_handshakes_of_one_source_keep_nobody_else_out() {
    let plane = Plane::new(Limits { handshakes: 4, ..limits() }).await;
    let mut mute = Vec::new();
    for _ in 0..20 {
        mute.push(plane.connect([127, 0, 0, 1]).await);
    }
    plane.until("closed", |plane| plane.refused("handshakes of one source") == 17).await;
    plane.secure([127, 0, 0, 2]).await;
    let mut last = mute.pop().unwrap();
    closed(&mut last).await;
    // Its places are free again when it lets go.
    drop(mute);
    plane.until("free again", |plane| plane.refused("no handshake") >= 3).await;
    plane.secure([127, 0, 0, 1]).await;
}

#[tokio::test]
async fn idle_connections_of_one_source_keep_nobody_else_out() {
    let plane = Plane::new(limits()).await;
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(plane.secure([127, 0, 0, 1]).await);
    }
    let mut above = plane.connect([127, 0, 0, 1]).await;
    closed(&mut above).await;
    assert_eq!((plane.refused("connections of one source"), plane.metric("culvertd_connections")), (1, 6));
    plane.secure([127, 0, 0, 2]).await;
}

#[tokio::test]
async fn a_connection_that_proves_nothing_is_closed_and_a_known_one_stays() {
    let plane = Plane::new(Limits { unproven: Duration::from_secs(1), ..Limits::default() }).await;
    let mut link = plane.client("ztunnel-a", "ztunnel-a");
    patient(link.wait_for(|link| matches!(link, Link::Connected { .. }))).await.unwrap();
    // One that answers pings and asks for nothing.
    let mut idle = plane.secure([127, 0, 0, 1]).await;
    idle.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    closed(&mut idle).await;
    let mut mute = plane.secure([127, 0, 0, 1]).await;
    closed(&mut mute).await;
    assert_eq!(plane.refused("no known sender"), 2);
    assert!(matches!(*link.borrow(), Link::Connected { .. }));
    assert_eq!(plane.server.clients().len(), 1);
}

#[tokio::test]
async fn undecided_requests_of_one_source_are_limited() {
    let plane = Plane::new(limits()).await;
    for pod in ["a", "b", "c", "d"] {
        plane.client("hangs", pod);
    }
    plane.until("refused", |plane| plane.refused("requests of one source") > 0).await;
}

#[tokio::test]
async fn a_token_that_is_bound_to_no_pod_is_no_proxy_of_ours() {
    let plane = Plane::new(Limits::default()).await;
    let mut link = plane.client("unbound", "ztunnel-a");
    let away = patient(link.wait_for(|link| matches!(link, Link::Away { .. }))).await.unwrap().clone();
    let Link::Away { error, .. } = away else { panic!("{away:?}") };
    assert!(error.contains("not bound to a pod"), "{error}");
    assert!(plane.server.clients().is_empty());
}

fn of_waypoint(namespace: &str, kind: &'static str, name: &str) -> Change {
    let scope: Arc<str> = format!("{namespace}/w").into();
    Change::Set(Resource {
        type_url: kind,
        name: format!("{scope}/{name}").into(),
        aliases: Vec::new(),
        scope: Some(scope),
        plain: None,
        culvert: Some("x".into()),
        needs: proto::Features::NONE,
    })
}

#[tokio::test]
async fn a_waypoint_gets_its_own_gateways_configuration_and_a_node_proxy_none() {
    let plane = Plane::new(limits()).await;
    let address = |name: &str, scope: Option<&str>| {
        Change::Set(Resource {
            type_url: proto::ADDRESS_TYPE_URL,
            name: name.into(),
            aliases: Vec::new(),
            scope: scope.map(Arc::from),
            plain: None,
            culvert: Some("x".into()),
            needs: proto::Features::NONE,
        })
    };
    let service = proto::HTTP_SERVICE_TYPE_URL;
    let policy = proto::HTTP_POLICY_TYPE_URL;
    plane.server.apply([
        of_waypoint("shop", service, "shop/cart"),
        of_waypoint("shop", policy, "shop/p"),
        of_waypoint("ops", service, "ops/db"),
        of_waypoint("ops", proto::REACHABLE_TYPE_URL, "Kubernetes//Pod/ops/db-0"),
        address("shop/cart", None),
        address("Kubernetes//Pod/ops/db-0", Some("ops")),
    ]);
    plane.server.ready();
    let held: [Arc<Mutex<BTreeSet<String>>>; 3] = Default::default();
    let proxy = |token: &str, pod: (&str, &str), gateway: Option<&str>, at: usize| {
        plane.client_of(token, pod, gateway, held[at].clone())
    };
    let _shop = proxy("waypoint-shop", ("w-1", "shop"), Some("shop/w"), 0);
    let _ops = proxy("waypoint-ops", ("w-1", "ops"), Some("ops/w"), 1);
    let _node = proxy("ztunnel-1", ("ztunnel-1", "culvert-system"), None, 2);
    let has = |at: usize| held[at].lock().unwrap().iter().cloned().collect::<Vec<_>>();
    plane
        .until("each has its own", |_| {
            has(0) == ["shop/cart", "shop/w/shop/cart", "shop/w/shop/p"]
                && has(1) == ["ops/w/Kubernetes//Pod/ops/db-0", "ops/w/ops/db", "shop/cart"]
                && has(2) == ["Kubernetes//Pod/ops/db-0", "shop/cart"]
        })
        .await;

    // It moves to the other one.
    plane.server.apply([
        of_waypoint("ops", service, "shop/cart"),
        Change::Remove { type_url: service, name: "shop/w/shop/cart".into() },
    ]);
    plane
        .until("it has moved", |_| {
            has(0) == ["shop/cart", "shop/w/shop/p"]
                && has(1)
                    == ["ops/w/Kubernetes//Pod/ops/db-0", "ops/w/ops/db", "ops/w/shop/cart", "shop/cart"]
                && has(2) == ["Kubernetes//Pod/ops/db-0", "shop/cart"]
        })
        .await;
}

#[tokio::test]
async fn a_waypoint_is_the_gateway_of_its_account_and_no_other_one() {
    let plane = Plane::new(limits()).await;
    let away = |link: &tokio::sync::watch::Receiver<Link>| match &*link.borrow() {
        Link::Away { error, .. } => error.to_string(),
        _ => String::new(),
    };
    let another = plane.client_of("waypoint-shop", ("w-1", "shop"), Some("ops/w"), Arc::default());
    plane.until("it says another one", |_| away(&another).contains("and not of ops/w")).await;
    let unknown = plane.client_of("waypoint-else", ("w-1", "else"), Some("else/w"), Arc::default());
    plane.until("there is no such one", |_| away(&unknown).contains("nor is there a Gateway else/w")).await;
    let pod = plane.client_of("waypoint-ops", ("w-2", "ops"), Some("ops/w"), Arc::default());
    plane.until("it is another pod", |_| away(&pod).contains("not of the pod w-2.ops")).await;
}
