//! The program `waypoint`, on loopback, among programs of others. Envoy opens the tunnels to it, as gateways and waypoints of
//! Istio do; who speaks through these are gRPC's interoperability client, h2spec and curl; behind it are gRPC's
//! interoperability server and nginx, and what it asks and tells are OPA and an OpenTelemetry collector.
//!
//! Envoy is fetched; `.ci/peers` builds the others into `target/interop/peers`. Without one of them a test says so and passes,
//! unless `CULVERT_REQUIRE_PEERS=1`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]
#![allow(missing_docs)]

use std::fmt::Write as _;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use interop::{Envoy, Mesh, PemFiles};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

const LONG: Duration = Duration::from_secs(60);
const VIP: &str = "240.240.0.1";

fn skipped(why: &str) {
    assert!(std::env::var_os("CULVERT_REQUIRE_PEERS").is_none(), "{why}");
    println!("skipped: {why}");
}

/// A program that `.ci/peers` has built.
fn peer(name: &str) -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/interop/peers").join(name);
    if program.is_file() {
        return Some(program);
    }
    skipped(&format!("there is no {} (.ci/peers builds it)", program.display()));
    None
}

/// A program, until this is dropped. What it says is in a file.
struct Running {
    child: Child,
    said: PathBuf,
}

impl Running {
    async fn start(command: &mut Command, directory: &Path, listens: u16) -> Self {
        let name = Path::new(command.get_program()).file_name().unwrap().to_string_lossy().into_owned();
        let said = directory.join(format!("{name}.log"));
        let log = File::create(&said).unwrap();
        let child =
            command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let mut running = Self { child, said };
        let begin = Instant::now();
        while TcpStream::connect(("127.0.0.1", listens)).await.is_err() {
            let ended = running.child.try_wait().unwrap();
            assert!(ended.is_none() && begin.elapsed() < LONG, "{name} ({ended:?}):\n{}", running.said());
            sleep(Duration::from_millis(20)).await;
        }
        running
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let said = self.said();
            let last: Vec<&str> = said.lines().rev().take(30).collect();
            println!(
                "---- {}\n{}",
                self.said.display(),
                last.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
    }
}

/// Runs a program to its end; what it wrote.
async fn run(command: &mut tokio::process::Command) -> (bool, String) {
    let output = timeout(2 * LONG, command.kill_on_drop(true).output()).await.expect("in time").unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

async fn curl(arguments: &[&str]) -> String {
    let (good, said) =
        run(tokio::process::Command::new("curl").args(["-sS", "-m", "30"]).args(arguments)).await;
    assert!(good, "curl {arguments:?}: {said}");
    said
}

/// A port of which nothing says what is spoken there.
const UNSAID: &str = "unsaid";

/// A service at one address of loopback.
fn service(name: &str, vip: &str, port: &str, to: u16, bound: bool) -> String {
    let label = if bound { "istio.io/use-waypoint" } else { "none" };
    let protocol =
        if port == UNSAID { String::new() } else { format!("protocol: {}, ", port.to_uppercase()) };
    format!(
        "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: interop, labels: {{{label}: waypoint}}}}
spec:
  hosts: [{name}.example]
  addresses: [{vip}]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: {port}, {protocol}targetPort: {to}}}]
  endpoints: [{{address: 127.0.0.1}}]
"
    )
}

const GATEWAY: &str = "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: interop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";

/// An Envoy that sends each connection to `front` through a tunnel to the service, as `client`.
fn tunneling(files: &PemFiles, front: u16, waypoint: u16) -> String {
    format!(
        "static_resources:
  listeners:
  - name: front
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {front} }} }}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: front
          cluster: waypoint
          tunneling_config: {{ hostname: '{VIP}:80' }}
  clusters:
  - name: waypoint
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{ http2_protocol_options: {{}} }}
    load_assignment: {{ cluster_name: waypoint, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {waypoint} }} }} }} }}] }}] }}
    transport_socket:
      name: tls
      typed_config:
        '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          alpn_protocols: [h2]
          tls_params: {{ tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3 }}
          tls_certificates: [{{ certificate_chain: {{ filename: '{}' }}, private_key: {{ filename: '{}' }} }}]
          validation_context:
            trusted_ca: {{ filename: '{}' }}
            match_typed_subject_alt_names: [{{ san_type: URI, matcher: {{ exact: '{}' }} }}]
",
        files.chain.display(),
        files.key.display(),
        files.root.display(),
        Mesh::id("waypoint").unwrap()
    )
}

/// The waypoint of the service `shop`, and an Envoy before it.
struct Lab {
    front: SocketAddr,
    stats: u16,
    waypoint: Running,
    _envoy: Envoy,
    _directory: TempDir,
}

impl Lab {
    /// `shop` is at `to`, and spoken to by what `port` names.
    async fn start(port: &str, to: u16, resources: &str) -> Option<Self> {
        let test = std::env::current_exe().unwrap();
        let program = test.parent()?.parent()?.join("waypoint");
        if !program.is_file() {
            skipped(&format!("{} is not built (`make test` builds it)", program.display()));
            return None;
        }
        let directory = tempfile::Builder::new().prefix("culvert-interop-").tempdir_in("/dev/shm").unwrap();
        let mesh = Mesh::in_directory(&directory.path().join("ca")).unwrap();
        let config = directory.path().join("config");
        std::fs::create_dir(&config).unwrap();
        let text = [GATEWAY, &service("shop", VIP, port, to, true), resources].concat();
        std::fs::write(config.join("all.yaml"), text).unwrap();
        let [hbone, admin, ready, stats, front] = std::array::from_fn(|_| harness::port::free());
        let mut command = Command::new(program);
        command.args(["--gateway", "interop/waypoint", "--forward-client-cert"]);
        command.arg("--config-dir").arg(&config).arg("--ca-dir").arg(directory.path().join("ca"));
        command.args(["--hbone-address", &format!("127.0.0.1:{hbone}")]);
        for (variable, port) in [("ADMIN_ADDR", admin), ("READINESS_ADDR", ready), ("STATS_ADDR", stats)] {
            command.env(variable, format!("127.0.0.1:{port}"));
        }
        command.env_remove("RUST_LOG");
        let waypoint = Running::start(&mut command, directory.path(), hbone).await;
        let ready = format!("http://127.0.0.1:{ready}/healthz/ready");
        let begin = Instant::now();
        while curl(&["-o", "/dev/null", "-w", "%{http_code}", &ready]).await != "200" {
            assert!(begin.elapsed() < LONG, "it is not ready: {}", waypoint.said());
            sleep(Duration::from_millis(50)).await;
        }
        let files = mesh.write_pem("client", directory.path()).unwrap();
        let started = tokio::task::spawn_blocking(move || Envoy::start(|_| tunneling(&files, front, hbone)));
        let envoy = match started.await.unwrap() {
            Ok(envoy) => envoy,
            Err(error) => {
                assert!(std::env::var_os("CI_REQUIRE_INTEROP").is_none(), "{error}");
                skipped(&error.to_string());
                return None;
            }
        };
        let front = SocketAddr::from(([127, 0, 0, 1], front));
        Some(Self { front, stats, waypoint, _envoy: envoy, _directory: directory })
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.front)
    }

    async fn metrics(&self) -> String {
        curl(&[&format!("http://127.0.0.1:{}/metrics", self.stats)]).await
    }
}

/// A server of nginx that answers with what it was asked.
fn telling(port: u16) -> String {
    format!(
        "server {{ listen 127.0.0.1:{port};
         location / {{ return 200 \"$request_method $request_uri $http_x_forwarded_client_cert\"; }} }}"
    )
}

async fn start_nginx(directory: &Path, servers: &str, port: u16) -> Running {
    let path = directory.display();
    let text = format!(
        "daemon off; master_process off; pid {path}/pid; error_log {path}/error.log; events {{}}
         http {{ access_log off; client_body_temp_path {path}/b; proxy_temp_path {path}/p; fastcgi_temp_path {path}/f;
         uwsgi_temp_path {path}/u; scgi_temp_path {path}/s; {servers} }}"
    );
    std::fs::write(directory.join("nginx.conf"), text).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-p").arg(directory).arg("-c").arg(directory.join("nginx.conf"));
    Running::start(&mut command, directory, port).await
}

/// nginx, which answers with what it was asked.
async fn nginx(directory: &Path) -> (Running, u16) {
    let port = harness::port::free();
    (start_nginx(directory, &telling(port), port).await, port)
}

/// The same, which answers once all of a request has come: it passes requests on to itself, and reads them before.
async fn patient_nginx(directory: &Path) -> (Running, u16) {
    let [port, behind] = std::array::from_fn(|_| harness::port::free());
    let front = format!(
        "server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{behind}; }} }}"
    );
    (start_nginx(directory, &[telling(behind), front].concat(), port).await, port)
}

const POLICIES: &str = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: client, namespace: interop}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: shop}]
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/interop/sa/client]}}], to: [{operation: {notPaths: [/admin*]}}]}]
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_come_through_envoys_tunnels_with_its_identity() {
    let directory = tempfile::tempdir().unwrap();
    let (_nginx, port) = nginx(directory.path()).await;
    let Some(lab) = Lab::start("http", port, POLICIES).await else { return };
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let body = curl(&[version, &lab.url("/a?b")]).await;
        assert_eq!(body, format!("GET /a?b URI={}", Mesh::id("client").unwrap()));
        let status = curl(&[version, "-o", "/dev/null", "-w", "%{http_code}", &lab.url("/admin/x")]).await;
        assert_eq!(status, "403");
    }
    for how in [&["-m", "10"][..], &["--h1"]] {
        let mut command = tokio::process::Command::new("h2load");
        let (_, said) = run(command.args(["-n", "2000", "-c", "4"]).args(how).arg(lab.url("/"))).await;
        assert!(said.contains("2000 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
    }
    let metrics = lab.metrics().await;
    let of_client = |line: &&str| {
        line.starts_with("istio_requests_total{")
            && line.contains("source_principal=\"spiffe://cluster.local/ns/interop/sa/client\"")
            && line.contains("response_code=\"200\"")
    };
    assert!(metrics.lines().any(|line| of_client(&line)), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcs_own_client_and_server_find_no_fault() {
    let (Some(client), Some(server)) = (peer("grpc-client"), peer("grpc-server")) else { return };
    let (directory, port) = (tempfile::tempdir().unwrap(), harness::port::free());
    let mut command = Command::new(server);
    let _server = Running::start(command.args(["--port", &port.to_string()]), directory.path(), port).await;
    let Some(lab) = Lab::start("grpc", port, "").await else { return };
    for case in [
        "empty_unary",
        "large_unary",
        "client_streaming",
        "server_streaming",
        "ping_pong",
        "empty_stream",
        "custom_metadata",
        "status_code_and_message",
        "special_status_message",
        "unimplemented_method",
        "unimplemented_service",
        "cancel_after_begin",
        "cancel_after_first_response",
        "timeout_on_sleeping_server",
    ] {
        let mut command = tokio::process::Command::new(&client);
        command.args(["--server_host", "127.0.0.1", "--test_case", case]);
        let (good, said) = run(command.args(["--server_port", &lab.front.port().to_string()])).await;
        assert!(good, "{case}: {said}");
    }
    // Ok, Unknown (asked for), Unimplemented.
    let metrics = lab.metrics().await;
    for status in ["0", "2", "12"] {
        let told = format!("grpc_response_status=\"{status}\"");
        let counted = |l: &str| l.starts_with("istio_requests_total{") && l.contains(&told);
        assert!(metrics.lines().any(counted), "{told}: {metrics}");
    }
    assert!(metrics.contains("istio_request_messages_total"), "{metrics}");
}

/// What h2spec holds against a server, and why that stays.
const KNOWN: &[&str] = &[
    // A port of HTTP/1.1 too: what is no preface is answered with 400 of that, and the connection ends.
    "http2/3.5 Sends invalid connection preface",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h2spec_finds_nothing_that_is_not_known() {
    let Some(h2spec) = peer("h2spec") else { return };
    let directory = tempfile::tempdir().unwrap();
    // Where a server answers before the request's end, it may be told to stop without an error, and what comes of the request
    // after that is passed over, whatever is wrong with it (RFC 9113 sections 5.1 and 8.1): h2spec does not know of that.
    let (_nginx, port) = patient_nginx(directory.path()).await;
    let Some(lab) = Lab::start("http", port, "").await else { return };
    let report = directory.path().join("report.xml");
    let mut command = tokio::process::Command::new(h2spec);
    command.args(["--strict", "-h", "127.0.0.1", "-p", &lab.front.port().to_string(), "-o", "5", "-j"]);
    let (_, said) = run(command.arg(&report)).await;
    let report = std::fs::read_to_string(report).unwrap();
    // <testcase package="http2/5.1" classname="half closed (remote): Sends a DATA frame" ...><failure>
    let (mut passed, mut wrong) = (0, String::new());
    for case in report.split("<testcase ").skip(1) {
        let value = |name: &str| case.split_once(name).and_then(|(_, rest)| rest.split('"').nth(1));
        let name = format!("{} {}", value("package=").unwrap(), value("classname=").unwrap());
        if !case.contains("<failure") && !case.contains("<error") {
            passed += 1;
        } else if !KNOWN.iter().any(|known| name.starts_with(known)) {
            writeln!(wrong, "{name}").unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong}\n{said}");
    assert!(passed >= 140, "only {passed} were tried");
}

/// OPA's own server, whose rules for who may ask it are those for who may ask the service.
const REGO: &str = "package system.authz
default allow := false
allow if { input.headers[\"X-User\"][0] == \"anna\"; input.path[2] != \"secret\" }
";

fn authorizer(port: u16) -> String {
    [
        service("opa", "240.240.0.2", "http", port, false),
        "---
apiVersion: mesh.istio.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec:
  extensionProviders:
  - name: opa
    envoyExtAuthzHttp:
      service: opa.example
      port: 80
      timeout: 20s
      pathPrefix: /v1/data
      includeRequestHeadersInCheck: [x-user]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: opa, namespace: interop}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: shop}]
  action: CUSTOM
  provider: {name: opa}
  rules: [{to: [{operation: {notPaths: [/open]}}]}]
"
        .to_owned(),
    ]
    .concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn opa_decides() {
    let Some(opa) = peer("opa") else { return };
    let (directory, port) = (tempfile::tempdir().unwrap(), harness::port::free());
    std::fs::write(directory.path().join("policy.rego"), REGO).unwrap();
    let mut command = Command::new(opa);
    command.args(["run", "--server", "--disable-telemetry", "--authorization", "basic"]);
    command.args(["--addr", &format!("127.0.0.1:{port}")]).arg(directory.path().join("policy.rego"));
    let opa = Running::start(&mut command, directory.path(), port).await;
    let (_nginx, to) = nginx(directory.path()).await;
    let Some(lab) = Lab::start("http", to, &authorizer(port)).await else { return };
    let status = async |user: &str, path: &str| {
        let field = format!("x-user: {user}");
        curl(&["-o", "/dev/null", "-w", "%{http_code}", "-H", &field, &lab.url(path)]).await
    };
    assert_eq!(status("anna", "/a").await, "200");
    assert_eq!(status("ben", "/a").await, "401");
    assert_eq!(status("anna", "/secret").await, "401");
    assert_eq!(status("anna", "/a/../secret").await, "401", "asked about is what is sent on");
    assert_eq!(status("ben", "/open").await, "200", "and nobody was asked");
    drop(opa);
    assert_eq!(status("anna", "/a").await, "403", "who can't be asked refuses");
}

fn collecting(port: u16) -> String {
    [
        service("collector", "240.240.0.2", "grpc", port, false),
        "---
apiVersion: mesh.istio.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec:
  extensionProviders:
  - {name: otel, opentelemetry: {service: collector.example, port: 80}}
  - name: otel-logs
    envoyOtelAls:
      service: collector.example
      port: 80
      logFormat: {text: 'logged %RESPONSE_CODE% %REQ(:PATH)%', labels: {who: '%DOWNSTREAM_PEER_URI_SAN%'}}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: all, namespace: istio-system}
spec:
  tracing: [{providers: [{name: otel}], randomSamplingPercentage: 100}]
  accessLogging: [{providers: [{name: otel-logs}]}]
"
        .to_owned(),
    ]
    .concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opentelemetry_collector_takes_spans_and_access_logs() {
    let Some(collector) = peer("collector") else { return };
    let (directory, port) = (tempfile::tempdir().unwrap(), harness::port::free());
    let config = format!(
        "receivers: {{otlp: {{protocols: {{grpc: {{endpoint: 127.0.0.1:{port}}}}}}}}}
exporters: {{debug: {{verbosity: detailed}}}}
service:
  telemetry: {{metrics: {{level: none}}}}
  pipelines:
    traces: {{receivers: [otlp], exporters: [debug]}}
    logs: {{receivers: [otlp], exporters: [debug]}}
"
    );
    std::fs::write(directory.path().join("collector.yaml"), config).unwrap();
    let mut command = Command::new(collector);
    command.arg("--config").arg(format!("file:{}", directory.path().join("collector.yaml").display()));
    let collector = Running::start(&mut command, directory.path(), port).await;
    let (_nginx, to) = nginx(directory.path()).await;
    let Some(lab) = Lab::start("http", to, &collecting(port)).await else { return };
    let (trace, parent) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    let context = format!("traceparent: 00-{trace}-{parent}-01");
    assert!(curl(&["-H", &context, &lab.url("/traced?x=y")]).await.starts_with("GET /traced"));
    let begin = Instant::now();
    loop {
        let said = collector.said();
        let span = said.contains(trace) && said.contains(parent) && said.contains("/traced?x=y");
        let records =
            ["Body: Str(logged 200 /traced?x=y)", "-> who: Str(", "-> log_name: Str(otel_envoy_accesslog)"];
        if span && records.iter().all(|part| said.contains(part)) {
            return;
        }
        assert!(begin.elapsed() < LONG, "the collector has no such span:\n{said}\n{}", lab.metrics().await);
        sleep(Duration::from_millis(100)).await;
    }
}

const SHORT: &str = "---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: shop, namespace: interop}
spec: {host: shop.example, trafficPolicy: {connectionPool: {tcp: {maxConnectionDuration: 2s}}}}
---
apiVersion: mesh.istio.io/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {accessLogFile: /dev/stdout, accessLogFormat: 'flags=%RESPONSE_FLAGS% %BYTES_SENT%'}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_of_bytes_is_as_long_as_it_may_be_and_its_line_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    let Some(lab) = Lab::start("tcp", to, SHORT).await else { return };
    let mut client = TcpStream::connect(lab.front).await.unwrap();
    client.write_all(b"abc").await.unwrap();
    let mut got = Vec::new();
    // An end or a reset.
    let _ = timeout(LONG, client.read_to_end(&mut got)).await.expect("it ends");
    assert_eq!(got, b"abc");
    let begin = Instant::now();
    while !lab.waypoint.said().contains("flags=DT 3") {
        assert!(begin.elapsed() < LONG, "{}", lab.waypoint.said());
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_speaks_first_is_heard_where_nothing_says_what_it_speaks() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(b"220 speak\r\n").await.unwrap();
                let mut said = [0; 6];
                stream.read_exact(&mut said).await.unwrap();
                stream.write_all(&said).await.unwrap();
            });
        }
    });
    let Some(lab) = Lab::start(UNSAID, to, "").await else { return };
    let mut client = TcpStream::connect(lab.front).await.unwrap();
    let mut heard = [0; 11];
    timeout(LONG, client.read_exact(&mut heard)).await.expect("it speaks").unwrap();
    assert_eq!(&heard, b"220 speak\r\n");
    client.write_all(b"HELO\r\n").await.unwrap();
    let mut rest = Vec::new();
    timeout(LONG, client.read_to_end(&mut rest)).await.expect("it ends").unwrap();
    assert_eq!(rest, b"HELO\r\n");
}
