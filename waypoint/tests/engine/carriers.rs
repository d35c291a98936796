//! TLS and tunnels under HTTP.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hbone::{
    Authority, ConnectRequest, Connector, Control, Incoming, PoolSettings, ServerSettings, StatusCode,
    TunnelHeaders,
};
use identity::{
    CaDirectory, CertificateSettings, Certificates, Clock, ExpectedPeers, HandshakeLimits, LocalIssuer,
    LocalIssuerSettings, TlsStream, Validity,
};
use model::{SpiffeId, TrustDomain, TrustDomains};
use rustls::ServerConfig;
use rustls_pki_types::{PrivatePkcs8KeyDer, UnixTime};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use waypoint::http::carriers::{TunnelOut, serve_tls};
use waypoint::http::decide::{Carrier, Connection, Dial, Forwarding, Protocol, Target};
use waypoint::http::io::Io;
use waypoint::http::{Settings, Worker, serve};

use crate::lab::{self, Client, Proxy, get, in_turn, target};

fn facts(client: SocketAddr, destination: SocketAddr) -> Connection {
    Connection { client, destination, identity: None, server_name: None, secure: false, said: None }
}

#[tokio::test]
async fn curl_comes_by_tls_and_the_handshake_says_which_protocol() {
    let made = rcgen::generate_simple_self_signed(vec!["a.test".to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config =
        config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key.into()).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let config = Arc::new(config);
    let proxy = Proxy::to(lab::echo().await).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let worker = Arc::clone(&proxy.worker);
    tokio::spawn(async move {
        while let Ok((tcp, client)) = listener.accept().await {
            tokio::spawn(serve_tls(Arc::clone(&worker), tcp, Arc::clone(&config), facts(client, address)));
        }
    });
    let resolve = format!("a.test:{}:127.0.0.1", address.port());
    let url = format!("https://a.test:{}/x", address.port());
    for (version, expected) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let args = ["-sSk", version, "--resolve", &resolve, "-w", "%{http_version}", &url];
        let out = crate::peers::run("curl", &args).await;
        assert!(out.starts_with("GET /x HTTP/1.1") && out.ends_with(expected), "{out}");
        assert!(out.contains("x-forwarded-proto: https"), "{out}");
    }
}

/// Certificates for anyone of a mesh.
fn mesh() -> (TempDir, Arc<Certificates>) {
    let dir = tempfile::Builder::new().prefix("culvert-waypoint-").tempdir_in("/dev/shm").unwrap();
    let domains = TrustDomains::only(TrustDomain::cluster_local());
    let ca = CaDirectory::open_or_make(&dir.path().join("ca")).unwrap();
    ca.make_if_missing(&TrustDomain::cluster_local(), Validity::of_roots(), UnixTime::now()).unwrap();
    let issuer = LocalIssuer::start(ca, domains, LocalIssuerSettings::default(), Clock::system()).unwrap();
    let bundle = issuer.bundle().clone();
    let certificates =
        Certificates::new(Arc::new(issuer), bundle, CertificateSettings::default(), None, Clock::system());
    (dir, Arc::new(certificates))
}

fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap()
}

/// Connects to where the key says, as one account to another.
struct Mesh {
    certificates: Arc<Certificates>,
    own: SpiffeId,
}

impl Connector for Mesh {
    type Key = (SocketAddr, SpiffeId);
    type Io = TlsStream<TcpStream>;
    type Peer = ();
    type Error = io::Error;

    async fn connect(&self, (to, expected): &Self::Key) -> io::Result<(Self::Io, ())> {
        let tcp = TcpStream::connect(to).await?;
        let expected = ExpectedPeers::One(expected.clone());
        let limits = HandshakeLimits::default();
        let stream = identity::connect(tcp, &self.certificates, &self.own, expected, limits).await;
        Ok((stream.map_err(io::Error::other)?, ()))
    }
}

/// Takes tunnels to one service.
struct To {
    service: SocketAddr,
    peer: SpiffeId,
    client: SocketAddr,
}

impl To {
    fn take(&self, worker: &Arc<Worker>, incoming: Incoming) {
        if incoming.authority.socket_addr() != Some(self.service) {
            worker.stats.tunnels_refused.inc();
            return incoming.refuse(StatusCode::BAD_REQUEST, &TunnelHeaders::default());
        }
        let identity = Some(Arc::new(self.peer.clone()));
        let connection = Connection { identity, ..facts(self.client, self.service) };
        let tunnel = incoming.accept(&TunnelHeaders::default()).unwrap();
        tokio::spawn(serve(Arc::clone(worker), Io::Tunnel(Box::new(tunnel)), connection));
    }
}

/// Listens for tunnels as `own` and hands them to a proxy.
async fn hbone_in(
    proxy: &Proxy,
    certificates: &Arc<Certificates>,
    own: SpiffeId,
    service: SocketAddr,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (worker, certificates) = (Arc::clone(&proxy.worker), Arc::clone(certificates));
    tokio::spawn(async move {
        while let Ok((tcp, client)) = listener.accept().await {
            let (worker, certificates, own) = (Arc::clone(&worker), Arc::clone(&certificates), own.clone());
            tokio::spawn(async move {
                let stream =
                    identity::accept(tcp, &certificates, &own, HandshakeLimits::default()).await.unwrap();
                let to = To { service, peer: stream.peer().id.clone(), client };
                let (settings, control) = (ServerSettings::default(), Control::default());
                let take = |incoming| to.take(&worker, incoming);
                hbone::serve(stream, &settings, &control, &Arc::default(), take).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn a_tunnel_that_is_reset_while_nobody_takes_its_body_is_noticed() {
    let (_dir, certificates) = mesh();
    let service: SocketAddr = "192.0.2.1:80".parse().unwrap();
    let proxy = Proxy::to(crate::limits::takes_nothing().await).await;
    let address = hbone_in(&proxy, &certificates, id("waypoint"), service).await;
    let connector = Mesh { certificates: Arc::clone(&certificates), own: id("client") };
    let pool = hbone::Pool::new(connector, PoolSettings::default());
    let request = || ConnectRequest {
        authority: Authority::from_addr(service).unwrap(),
        headers: TunnelHeaders::default(),
    };
    let open = async || pool.open(&(address, id("waypoint")), &request()).await.unwrap().tunnel;
    let head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n";
    let (mut first, mut second) = (open().await, open().await);
    for tunnel in [&mut first, &mut second] {
        tunnel.write_all(head).await.unwrap();
        crate::limits::fill(tunnel).await;
    }
    assert!(proxy.records().is_empty());
    first.reset(hbone::ErrorCode::CANCEL);
    let record = &proxy.wait_records(1).await[0];
    assert_eq!((record.status, &*record.flag.to_string()), (0, "DC"));
    // One that has no more to say, behind what nobody takes, waits for its answer.
    let ended = tokio::spawn(async move { second.shutdown().await.map(|()| second) });
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(proxy.records().len(), 1);
    ended.abort();
}

#[tokio::test]
async fn requests_come_and_go_through_tunnels_with_the_clients_identity() {
    let (_dir, certificates) = mesh();
    let service: SocketAddr = "192.0.2.1:80".parse().unwrap();
    let echo = lab::echo().await;

    // The server's side: HBONE in, and on by TCP.
    let settings = Settings { forward_client_cert: true, ..Settings::default() };
    let inner =
        Proxy::start(Forwarding::default(), in_turn(vec![target(echo, Protocol::Http1)]), settings).await;
    let server = hbone_in(&inner, &certificates, id("server"), service).await;

    // The waypoint: HBONE in, and out by HBONE as itself, by HTTP/1.1 and by HTTP/2 in the tunnel.
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let connector = Mesh { certificates: Arc::clone(&certificates), own: id("waypoint") };
        let pool = hbone::Pool::new(connector, PoolSettings::default());
        let dial: Arc<dyn Dial> =
            Arc::new(TunnelOut::new([pool].into(), (server, id("server")), TunnelHeaders::default()));
        let onward = Arc::new(Target::new(service, protocol, Carrier::Via(dial)));
        let settings = Settings { forward_client_cert: true, ..Settings::default() };
        let waypoint = Proxy::start(Forwarding::default(), in_turn(vec![onward]), settings).await;
        let address = hbone_in(&waypoint, &certificates, id("waypoint"), service).await;

        // The client's side.
        let connector = Mesh { certificates: Arc::clone(&certificates), own: id("client") };
        let pool = hbone::Pool::new(connector, PoolSettings::default());
        let open = |to: SocketAddr| {
            let authority = Authority::from_addr(to).unwrap();
            let (pool, key) = (pool.clone(), (address, id("waypoint")));
            async move {
                let request = ConnectRequest { authority, headers: TunnelHeaders::default() };
                pool.open(&key, &request).await
            }
        };
        assert!(open("192.0.2.2:80".parse().unwrap()).await.is_err());
        let mut tunnel = open(service).await.unwrap().tunnel;

        // A socket in front of the tunnel, for the test's client.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = Client::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let (mut end, _) = listener.accept().await.unwrap();
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut end, &mut tunnel).await });
        for _ in 0..3 {
            let text = String::from_utf8(client.ask(get("/t")).await.body).unwrap();
            assert!(text.starts_with("GET /t HTTP/1.1\r\n"), "{text}");
            // To the server the waypoint is the client.
            assert!(
                text.contains("x-forwarded-client-cert: URI=spiffe://cluster.local/ns/shop/sa/waypoint"),
                "{text}"
            );
        }
        let body = "z".repeat(300_000);
        let request = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        assert!(String::from_utf8(client.ask(request).await.body).unwrap().ends_with(&body));
        assert_eq!(waypoint.worker.stats.upstream_connections.get(), 1);
        assert_eq!(waypoint.worker.stats.tunnels_refused.get(), 1);
    }
}
