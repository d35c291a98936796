//! HBONE with Envoy in both roles, over real certificates and sockets of loopback.
//!
//! Without a network to install Envoy from these tests say so and pass, unless `CI_REQUIRE_INTEROP=1`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]
#![allow(missing_docs)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hbone::{
    Authority, Baggage, ConnectRequest, OpenError, Pool, PoolSettings, ServerSettings, StatusCode,
    TunnelHeaders,
};
use interop::ours::{self, Dialer, Seen};
use interop::{Envoy, Mesh};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const BANNER: &[u8] = b"220 ready\n";
const FAREWELL: &[u8] = b"221 bye\n";

/// An application that speaks first, sends back what comes, and has a last word after the client has finished. What
/// begins with `RESET` makes it reset the connection.
async fn app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut block = vec![0; 64 * 1024];
                tcp.write_all(BANNER).await?;
                loop {
                    let n = tcp.read(&mut block).await?;
                    if block[..n].starts_with(b"RESET") {
                        return tcp.set_zero_linger();
                    }
                    if n == 0 {
                        tcp.write_all(FAREWELL).await?;
                        return tcp.shutdown().await;
                    }
                    tcp.write_all(&block[..n]).await?;
                }
            });
        }
    });
    address
}

/// Everything that the application does, with `length` bytes.
async fn check<T: AsyncRead + AsyncWrite>(stream: T, length: usize) {
    let (mut read, mut write) = split(stream);
    let mut banner = vec![0; BANNER.len()];
    read.read_exact(&mut banner).await.unwrap();
    assert_eq!(banner, BANNER);
    let data: Arc<Vec<u8>> = Arc::new((0..length).map(|at| (at * 31 % 251) as u8).collect());
    let sending = Arc::clone(&data);
    let send = async {
        write.write_all(&sending).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let ((), received) = tokio::join!(send, read.read_to_end(&mut got));
    received.unwrap();
    assert!(got.ends_with(FAREWELL), "{} of {length} bytes and no farewell", got.len());
    got.truncate(got.len() - FAREWELL.len());
    assert!(got == *data, "{} of {length} bytes came back", got.len());
}

/// Starts an Envoy, or says why the test is skipped.
fn envoy(configure: impl FnOnce(&Path) -> String) -> Option<Envoy> {
    match Envoy::start(configure) {
        Ok(envoy) => Some(envoy),
        Err(error) => {
            let required = std::env::var("CI_REQUIRE_INTEROP").is_ok_and(|value| value == "1");
            assert!(!required, "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// Both ends of TLS as a waypoint has them: our certificate, the mesh's root, the peers' identities, HTTP/2 only.
fn tls_context(files: &interop::PemFiles, peer: &str) -> String {
    format!(
        "common_tls_context: {{ alpn_protocols: [h2], \
         tls_params: {{ tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3 }}, \
         tls_certificates: [{{ certificate_chain: {{ filename: '{}' }}, private_key: {{ filename: '{}' }} }}], \
         validation_context: {{ trusted_ca: {{ filename: '{}' }}, \
         match_typed_subject_alt_names: [{{ san_type: URI, matcher: {{ exact: '{}' }} }}] }} }}",
        files.chain.display(),
        files.key.display(),
        files.root.display(),
        Mesh::id(peer).unwrap()
    )
}

/// Envoy as a waypoint terminates HBONE: CONNECT to `app.interop:80` and `10.0.0.1:80` lead to the application, to
/// `denied.interop:80` gets 401, and no stream is open for longer than `longest`, if that is given.
fn terminating(mesh: &Mesh, directory: &Path, port: u16, app: SocketAddr, longest: Option<u32>) -> String {
    let tls = tls_context(&mesh.write_pem("waypoint", directory).unwrap(), "client");
    let duration =
        longest.map(|s| format!("common_http_protocol_options: {{ max_connection_duration: {s}s }}"));
    format!(
        "static_resources:
  listeners:
  - name: hbone
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          {tls}
      filters:
      - name: http
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: hbone
          codec_type: HTTP2
          drain_timeout: 1s
          {}
          http2_protocol_options:
            allow_connect: true
            max_concurrent_streams: 100
            connection_keepalive: {{ interval: 10s, timeout: 20s }}
          upgrade_configs: [{{ upgrade_type: CONNECT }}]
          http_filters:
          - name: router
            typed_config: {{ '@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
          route_config:
            virtual_hosts:
            - name: app
              domains: ['app.interop:80', '10.0.0.1:80']
              routes:
              - match: {{ connect_matcher: {{}} }}
                route:
                  cluster: app
                  timeout: 0s
                  upgrade_configs: [{{ upgrade_type: CONNECT, connect_config: {{}} }}]
            - name: dead
              domains: ['dead.interop:80']
              routes:
              - match: {{ connect_matcher: {{}} }}
                route:
                  cluster: dead
                  upgrade_configs: [{{ upgrade_type: CONNECT, connect_config: {{}} }}]
            - name: denied
              domains: ['denied.interop:80']
              routes:
              - match: {{ connect_matcher: {{}} }}
                direct_response: {{ status: 401 }}
  clusters:
  - {{ name: app, type: STATIC, load_assignment: {{ cluster_name: app, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }} }}] }}] }} }}
  - {{ name: dead, type: STATIC, load_assignment: {{ cluster_name: dead, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: 1 }} }} }} }}] }}] }} }}
",
        duration.unwrap_or_default(),
        app.port()
    )
}

/// Envoy as a waypoint originates HBONE: what comes to `plain` goes through a tunnel to 10.0.0.1:80, what comes to
/// `denied` to 10.0.0.1:1.
fn originating(mesh: &Mesh, directory: &Path, plain: u16, denied: u16, ours: SocketAddr) -> String {
    let tls = tls_context(&mesh.write_pem("waypoint", directory).unwrap(), "server");
    let listener = |name: &str, port: u16, destination: &str| {
        format!(
            "  - name: {name}
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: {name}
          cluster: ours
          tunneling_config:
            hostname: '{destination}'
            headers_to_add:
            - header: {{ key: baggage, value: 'k8s.namespace.name=interop,service.name=waypoint' }}
            - header: {{ key: x-istio-source, value: waypoint }}
"
        )
    };
    format!(
        "static_resources:
  listeners:
{}{}  clusters:
  - name: ours
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options:
            connection_keepalive: {{ interval: 10s, timeout: 20s }}
    load_assignment: {{ cluster_name: ours, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }} }}] }}] }}
    transport_socket:
      name: tls
      typed_config:
        '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        {}
",
        listener("plain", plain, "10.0.0.1:80"),
        listener("denied", denied, "10.0.0.1:1"),
        ours.port(),
        tls
    )
}

fn request(authority: &str) -> ConnectRequest {
    let baggage = Baggage { namespace: Some("interop".into()), ..Baggage::default() };
    let headers = TunnelHeaders { baggage: baggage.encode(), ..TunnelHeaders::default() };
    ConnectRequest { authority: Authority::parse(authority).unwrap(), headers }
}

/// An Envoy that terminates HBONE, and our pool towards it.
async fn towards_envoy(
    settings: PoolSettings,
    longest: Option<u32>,
) -> Option<(Envoy, Pool<Dialer>, SocketAddr)> {
    let mesh = Mesh::new().unwrap();
    let (app, port) = (app().await, harness::port::free());
    let certificates = mesh.certificates();
    let envoy = tokio::task::spawn_blocking(move || {
        envoy(|directory| terminating(&mesh, directory, port, app, longest))
    })
    .await
    .unwrap()?;
    let (from, expected) = (Mesh::id("client").unwrap(), Mesh::id("waypoint").unwrap());
    Some((
        envoy,
        ours::pool(certificates, from, expected, settings),
        SocketAddr::from(([127, 0, 0, 1], port)),
    ))
}

async fn in_time<T>(test: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(120), test).await.expect("it hangs")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_pool_opens_tunnels_through_envoy() {
    let Some((_envoy, pool, to)) = towards_envoy(PoolSettings::default(), None).await else { return };
    in_time(async {
        for (authority, length) in
            [("10.0.0.1:80", 10), ("app.interop:80", 0), ("app.interop:80", 20_000_000)]
        {
            let opened = pool.open(&to, &request(authority)).await.unwrap();
            assert_eq!(opened.peer.unwrap().id, Mesh::id("waypoint").unwrap());
            check(opened.tunnel, length).await;
        }
        assert_eq!(pool.counters().connections.get(), 1);
        // What Envoy refuses keeps its status, and the connection goes on.
        for (authority, status) in
            [("denied.interop:80", 401), ("unknown.interop:80", 404), ("dead.interop:80", 503)]
        {
            let error = pool.open(&to, &request(authority)).await.unwrap_err();
            let expected = StatusCode::from_u16(status).unwrap();
            assert!(matches!(error, OpenError::Refused(got) if got == expected), "{authority}: {error}");
        }
        check(pool.open(&to, &request("app.interop:80")).await.unwrap().tunnel, 100_000).await;
        assert_eq!(pool.counters().connections.get(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoys_limit_of_a_hundred_streams_is_kept() {
    let settings = PoolSettings { spread: 1, ..PoolSettings::default() };
    let Some((envoy, pool, to)) = towards_envoy(settings, None).await else { return };
    in_time(async {
        let mut open = Vec::new();
        for _ in 0..150 {
            open.push(pool.open(&to, &request("10.0.0.1:80")).await.unwrap());
        }
        assert_eq!(pool.counters().connections.get(), 2);
        let mut all = JoinSet::new();
        for opened in open {
            all.spawn(check(opened.tunnel, 100_000));
        }
        all.join_all().await;
        assert_eq!((pool.counters().retried.get(), pool.counters().streams_now.get()), (0, 0));
        // At once, before the limit of new connections is known: nothing fails.
        pool.retire(|_| true);
        let mut all = JoinSet::new();
        for _ in 0..250 {
            let pool = pool.clone();
            all.spawn(async move {
                check(pool.open(&to, &request("10.0.0.1:80")).await.unwrap().tunnel, 10_000).await;
            });
        }
        all.join_all().await;
        assert_eq!(envoy.stat("http.hbone.downstream_cx_protocol_error"), Some(0));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_behind_envoy_reaches_us_and_ours_reaches_envoy() {
    let Some((envoy, pool, to)) = towards_envoy(PoolSettings::default(), None).await else { return };
    in_time(async {
        let mut tunnel = pool.open(&to, &request("10.0.0.1:80")).await.unwrap().tunnel;
        tunnel.read_exact(&mut [0; BANNER.len()]).await.unwrap();
        tunnel.write_all(b"RESET").await.unwrap();
        let error = tunnel.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        // Ours: dropped in the middle. Envoy also counts the answer to its own reset, soon.
        sleep(Duration::from_millis(500)).await;
        let resets = || envoy.stat("http.hbone.downstream_rq_rx_reset").unwrap_or_default();
        let before = resets();
        let mut tunnel = pool.open(&to, &request("10.0.0.1:80")).await.unwrap().tunnel;
        tunnel.read_exact(&mut [0; BANNER.len()]).await.unwrap();
        drop(tunnel);
        for _ in 0..50 {
            if resets() > before {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
        panic!("Envoy saw no reset");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_envoy_ends_after_a_while_fail_no_tunnel() {
    // Envoy sends GOAWAY after a second, and again a second later.
    let settings = PoolSettings { spread: 1, ..PoolSettings::default() };
    let Some((_envoy, pool, to)) = towards_envoy(settings, Some(1)).await else { return };
    in_time(async {
        let mut all = JoinSet::new();
        for worker in 0..8 {
            let pool = pool.clone();
            all.spawn(async move {
                for round in 0..120 {
                    let opened = pool.open(&to, &request("10.0.0.1:80")).await.unwrap();
                    check(opened.tunnel, 1000 * worker + round).await;
                    sleep(Duration::from_millis(40)).await;
                }
            });
        }
        all.join_all().await;
        assert!(pool.counters().connections.get() >= 3, "{}", pool.counters().connections.get());
        assert!(pool.counters().going_away.get() >= 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_and_we_accept_only_who_is_expected() {
    let mesh = Mesh::new().unwrap();
    let other = Mesh::new().unwrap();
    let (app, port) = (app().await, harness::port::free());
    let (certificates, foreign) = (mesh.certificates(), other.certificates());
    let started = tokio::task::spawn_blocking(move || {
        envoy(|directory| terminating(&mesh, directory, port, app, None))
    });
    let Some(_envoy) = started.await.unwrap() else { return };
    let to = SocketAddr::from(([127, 0, 0, 1], port));
    let id = |name| Mesh::id(name).unwrap();
    in_time(async {
        for (why, certificates, from, expected) in [
            ("the waypoint is another one than expected", certificates.clone(), id("client"), id("someone")),
            ("Envoy expects another client", certificates.clone(), id("intruder"), id("waypoint")),
            ("we trust another root", foreign, id("client"), id("waypoint")),
        ] {
            let pool = ours::pool(certificates, from, expected, PoolSettings::default());
            let error = pool.open(&to, &request("10.0.0.1:80")).await.unwrap_err();
            assert!(matches!(error, OpenError::Connect(_) | OpenError::Lost(_)), "{why}: {error}");
        }
    })
    .await;
}

/// Our server, and an Envoy that tunnels to it: the ports of what is let through and of what is refused.
async fn from_envoy(settings: ServerSettings) -> Option<(Envoy, Arc<Seen>, u16, u16)> {
    let mesh = Mesh::new().unwrap();
    let server = ours::server(mesh.certificates(), Mesh::id("server").unwrap(), settings, app().await);
    let (address, seen) = server.await.unwrap();
    let (plain, denied) = (harness::port::free(), harness::port::free());
    let started = tokio::task::spawn_blocking(move || {
        envoy(|directory| originating(&mesh, directory, plain, denied, address))
    });
    Some((started.await.unwrap()?, seen, plain, denied))
}

async fn dial(port: u16) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_opens_tunnels_to_our_server() {
    let Some((_envoy, seen, plain, denied)) = from_envoy(ServerSettings::default()).await else { return };
    in_time(async {
        for length in [10, 0, 20_000_000] {
            check(dial(plain).await, length).await;
        }
        {
            let requests = seen.requests.lock().unwrap();
            let (authority, source, headers) = &requests[0];
            assert_eq!(authority, "10.0.0.1:80");
            assert_eq!(*source, Mesh::id("waypoint").unwrap());
            assert_eq!(headers.parse_baggage().unwrap().service_name.as_deref(), Some("waypoint"));
            assert_eq!(headers.istio_source.as_ref().unwrap(), "waypoint");
        }
        // A refusal ends the client's connection.
        assert_eq!(dial(denied).await.read(&mut [0; 1]).await.unwrap_or(0), 0);
        let mut all = JoinSet::new();
        for length in 0..100 {
            all.spawn(async move { check(dial(plain).await, 1000 * length).await });
        }
        all.join_all().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_keeps_to_our_limit_of_streams() {
    let settings = ServerSettings { max_streams: 10, ..ServerSettings::default() };
    let Some((_envoy, seen, plain, _)) = from_envoy(settings).await else { return };
    in_time(async {
        // One first, so that the limit is known on its connection.
        check(dial(plain).await, 10).await;
        let mut open = Vec::new();
        for _ in 0..35 {
            let mut tcp = dial(plain).await;
            tcp.read_exact(&mut [0; BANNER.len()]).await.unwrap();
            open.push(tcp);
        }
        assert!(seen.counters.connections_now.get() >= 4);
        assert_eq!(seen.counters.over_limit.get(), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_of_our_server_fails_no_tunnel_of_envoys() {
    let Some((_envoy, seen, plain, _)) = from_envoy(ServerSettings::default()).await else { return };
    in_time(async {
        let mut old = dial(plain).await;
        old.read_exact(&mut [0; BANNER.len()]).await.unwrap();
        let mut all = JoinSet::new();
        for worker in 0..8 {
            all.spawn(async move {
                for round in 0..80 {
                    check(dial(plain).await, 1000 * worker + round).await;
                    sleep(Duration::from_millis(20)).await;
                }
            });
        }
        for _ in 0..5 {
            sleep(Duration::from_millis(400)).await;
            seen.drain(Duration::from_secs(30));
        }
        all.join_all().await;
        assert!(seen.counters.connections.get() >= 5, "{}", seen.counters.connections.get());
        // The tunnel that was open all the time is still there.
        old.write_all(b"still").await.unwrap();
        old.read_exact(&mut [0; 5]).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_pass_between_envoy_and_our_server() {
    let Some((_envoy, seen, plain, _)) = from_envoy(ServerSettings::default()).await else { return };
    in_time(async {
        // The application's, through us and Envoy to the client.
        let mut tcp = dial(plain).await;
        tcp.read_exact(&mut [0; BANNER.len()]).await.unwrap();
        tcp.write_all(b"RESET").await.unwrap();
        assert_eq!(tcp.read(&mut [0; 1]).await.unwrap_or(0), 0);
        // The client's, through Envoy to us.
        let mut tcp = dial(plain).await;
        tcp.read_exact(&mut [0; BANNER.len()]).await.unwrap();
        tcp.set_zero_linger().unwrap();
        drop(tcp);
        for _ in 0..100 {
            if seen.counters.streams_now.get() == 0 {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("a tunnel whose client is gone lives on");
    })
    .await;
}
