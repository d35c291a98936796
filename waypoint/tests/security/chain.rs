//! A request's way through token, policies, external authorizers and rate limits, over real connections. The authorizer
//! and the rate-limit service are those of `checks/`: grpc-go with Envoy's own messages. Without Go, or without a network
//! to fetch its modules, these tests say so and pass, unless `CULVERT_REQUIRE_GO=1`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use balance::Client;
use balance::requests::Origin;
use config::compile::Options;
use config::repository::{Content, Repository};
use model::{Mesh, SpiffeId};
use process::logs::LogWriter;
use process::metrics::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use waypoint::deciding::Deciding;
use waypoint::guards::Guards;
use waypoint::http::decide::{Connection, Dial};
use waypoint::http::io::Io;
use waypoint::http::{Settings, Worker, serve};
use waypoint::providers::fetch::{Fetch, FetchError, Fetching};
use waypoint::telemetry::{Exporters, Settings as Told, Telemetry};
use waypoint::upstream::{ClusterLimits, Clusters, Dialers};

const LONG: Duration = Duration::from_secs(60);

/// The peer, as long as this lives.
pub struct Checks {
    child: Child,
    pub grpc: SocketAddr,
    pub http: SocketAddr,
}

impl Drop for Checks {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The peer's program, built once.
fn program() -> Option<&'static PathBuf> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/security/checks");
        let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("checks");
        let built =
            Command::new("go").arg("build").arg("-o").arg(&program).arg(".").current_dir(source).output();
        let why = match built {
            Ok(output) if output.status.success() => return Some(program),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        assert!(std::env::var_os("CULVERT_REQUIRE_GO").is_none(), "the peer can't be built: {why}");
        eprintln!("skipped: the peer can't be built: {why}");
        None
    };
    PROGRAM.get_or_init(build).as_ref()
}

/// Addresses that were free a moment ago.
pub fn free() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], harness::port::free()))
}

pub async fn checks() -> Option<Checks> {
    let program = tokio::task::spawn_blocking(program).await.unwrap()?;
    let (grpc, http) = (free(), free());
    let child = Command::new(program)
        .args([grpc.to_string(), http.to_string()])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let checks = Checks { child, grpc, http };
    for address in [grpc, http] {
        let begin = tokio::time::Instant::now();
        while TcpStream::connect(address).await.is_err() {
            assert!(begin.elapsed() < LONG, "the peer does not listen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    Some(checks)
}

/// Nothing is in the mesh here.
pub struct NoTunnels;

impl Dialers for NoTunnels {
    fn tunnel(&self, to: model::HboneAddr, _: Arc<[SpiffeId]>) -> Arc<dyn Dial> {
        panic!("a tunnel to {to:?}");
    }
}

pub struct NoKeys;

impl Fetch for NoKeys {
    fn fetch(&self, url: &str, _: Duration) -> Fetching {
        let error = FetchError::Url(url.to_owned());
        Box::pin(async move { Err(error) })
    }
}

pub fn external(name: &str, vip: &str, port: &str, to: SocketAddr) -> String {
    format!(
        "
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}
spec:
  hosts: [{name}.example]
  addresses: [{vip}]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: {port}, protocol: HTTP, targetPort: {}}}]
  endpoints: [{{address: {}}}]
",
        to.port(),
        to.ip()
    )
}

pub const VIP: &str = "240.240.0.1";

/// A waypoint before the service `shop`, in the test's own process.
pub struct Lab {
    pub address: SocketAddr,
    pub guards: Arc<Guards>,
    pub worker: Arc<Worker>,
    deciding: Deciding,
    files: Mutex<(Repository, Arc<Mesh>)>,
}

impl Lab {
    async fn start(checks: &Checks, resources: &str) -> Self {
        Self::with(checks.grpc, checks.http, resources).await
    }

    /// With `resources` beside the service, of which `authz` is at `grpc`, and `authz-http` at `http`.
    pub async fn with(grpc: SocketAddr, http: SocketAddr, resources: &str) -> Self {
        let shop = echo().await;
        let text = [
            external("shop", VIP, "http", shop),
            external("authz", "240.240.0.2", "grpc", grpc).replace("use-waypoint", "none"),
            external("authz-http", "240.240.0.3", "http", http).replace("use-waypoint", "none"),
            external("away", "240.240.0.4", "grpc", free()).replace("use-waypoint", "none"),
            "
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]}
"
            .to_owned(),
            resources.to_owned(),
        ]
        .concat();
        let mut repository = Repository::new(Options::default());
        repository.stage(&"lab.yaml".into(), Content::Bytes(text.as_bytes()));
        let outcome = repository.commit();
        let errors = repository.diagnostics().into_iter();
        let errors: Vec<_> = errors
            .filter(|d| d.severity == config::diagnostic::Severity::Error)
            .map(|d| d.to_string())
            .collect();
        assert!(errors.is_empty(), "{errors:#?}");
        let mesh = Arc::new(Mesh::default().apply(outcome.changes));
        let guards = Arc::new(Guards::fetching(Arc::new(NoKeys), tokio::runtime::Handle::current()));
        let writer = LogWriter::start_on(std::io::sink(), 1 << 20, |_| String::new()).unwrap();
        let told = Telemetry::new(&Registry::new(), Told::default(), writer, Exporters::none());
        let client = Client {
            locality: Arc::default(),
            node: "".into(),
            cluster: "".into(),
            network: "".into(),
            address: "127.0.0.1".parse().unwrap(),
        };
        let origin = Origin { client, labels: Arc::default() };
        let clusters = Clusters::new(origin, ClusterLimits::default(), Arc::new(NoTunnels));
        let own = model::http::WaypointKey { namespace: "shop".into(), name: "waypoint".into() };
        let deciding = Deciding::new(own, "".into(), clusters, told, guards.clone());
        deciding.update(mesh.clone());
        let worker = Worker::new(Arc::new(deciding.clone()), Settings::default(), CancellationToken::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = Arc::clone(&worker);
        let identity: SpiffeId = "spiffe://cluster.local/ns/web/sa/front".parse().unwrap();
        let identity = Arc::new(identity);
        tokio::spawn(async move {
            while let Ok((stream, client)) = listener.accept().await {
                let facts = Connection {
                    client,
                    destination: SocketAddr::new(VIP.parse().unwrap(), 80),
                    identity: Some(identity.clone()),
                    server_name: None,
                    secure: false,
                    said: None,
                };
                tokio::spawn(serve(Arc::clone(&serving), Io::Tcp(stream), facts));
            }
        });
        Self { address, guards, worker, deciding, files: Mutex::new((repository, mesh)) }
    }

    /// Puts a file in force beside the others, as a change of what there is.
    pub fn put(&self, file: &str, text: &str) {
        let mut files = self.files.lock().unwrap();
        let (repository, mesh) = &mut *files;
        repository.stage(&file.into(), Content::Bytes(text.as_bytes()));
        *mesh = Arc::new(mesh.apply(repository.commit().changes));
        self.deciding.update(mesh.clone());
    }

    /// Sends a request on a connection of its own; the response's head and body.
    pub async fn ask(
        &self,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        body: &str,
    ) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let mut text = format!("{method} {path} HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n");
        for (name, value) in fields {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() {
            text.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        text.push_str("\r\n");
        text.push_str(body);
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        tokio::time::timeout(LONG, stream.read_to_end(&mut all)).await.expect("an answer").unwrap();
        let all = String::from_utf8_lossy(&all).into_owned();
        let (head, body) = all.split_once("\r\n\r\n").expect("a head");
        (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_ascii_lowercase(), body.to_owned())
    }
}

/// A server that answers each request with all that it was sent.
pub async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut seen = Vec::new();
                loop {
                    let text = String::from_utf8_lossy(&seen).into_owned();
                    if let Some((head, body)) = text.split_once("\r\n\r\n") {
                        let length = head.lines().filter_map(|line| line.split_once(": "));
                        let length = length.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
                        let length =
                            length.map(|(_, value)| value.parse::<usize>().unwrap()).next().unwrap_or(0);
                        if body.len() >= length {
                            let answer =
                                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
                            stream.write_all(answer.as_bytes()).await.unwrap();
                            seen.clear();
                            continue;
                        }
                    }
                    if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
            });
        }
    });
    address
}

pub fn custom(provider: &str) -> String {
    format!(
        "
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {provider}, namespace: shop}}
spec:
  targetRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: shop}}]
  action: CUSTOM
  provider: {{name: {provider}}}
  rules: [{{to: [{{operation: {{paths: [\"/ask*\"]}}}}]}}]
"
    )
}

pub fn mesh_config(providers: &str) -> String {
    format!(
        "\n---\napiVersion: mesh.istio.io/v1alpha1\nkind: MeshConfig\nmetadata: {{name: mesh}}\nspec:\n  extensionProviders:\n{providers}"
    )
}

#[tokio::test]
async fn an_authorizer_of_others_is_asked_by_grpc() {
    let Some(checks) = checks().await else { return };
    let providers = "
  - name: opa
    envoyExtAuthzGrpc:
      service: authz.example
      port: 80
      timeout: 2s
      statusOnError: \"503\"
      includeRequestBodyInCheck: {maxRequestBytes: 4, allowPartialMessage: true}
";
    let lab = Lab::start(&checks, &[mesh_config(providers), custom("opa")].concat()).await;
    let (status, head, body) =
        lab.ask("POST", "/ask?a=1", &[("X-Secret", "s"), ("X-Told", "mine")], "abcdef").await;
    assert_eq!(status, 200, "{head} {body}");
    assert!(head.contains("x-decided: yes"), "{head}");
    let told = "x-told: POST shop.example/ask?a=1 from 127.0.0.1 body=\"abcd\" partial=true";
    assert!(body.contains(told), "{body}");
    assert!(!body.to_lowercase().contains("x-secret"), "{body}");
    assert!(!body.contains("evil") && !body.contains("mine"), "{body}");
    assert!(body.ends_with("abcdef"), "the whole body was sent on: {body}");
    let (status, head, body) = lab.ask("GET", "/ask", &[("x-ask", "deny=401")], "").await;
    assert_eq!((status, &*body), (401, "no, spiffe://cluster.local/ns/web/sa/front"), "{head}");
    assert!(head.contains("x-why: because"), "{head}");
    assert_eq!(lab.ask("GET", "/ask", &[("x-ask", "fail")], "").await.0, 503);
    // No answer in time is none.
    assert_eq!(lab.ask("GET", "/ask", &[("x-ask", "slow")], "").await.0, 503);
    // What no policy matches is not asked about.
    assert_eq!(lab.ask("GET", "/other", &[("x-ask", "deny=401")], "").await.0, 200);
    let stats = &lab.guards.authorizers;
    assert_eq!((stats.allowed.get(), stats.denied.get(), stats.failed.get()), (1, 1, 2));
}

#[tokio::test]
async fn an_authorizer_is_asked_over_http() {
    let Some(checks) = checks().await else { return };
    let providers = "
  - name: web
    envoyExtAuthzHttp:
      service: authz-http.example
      port: 80
      pathPrefix: /check
      includeRequestHeadersInCheck: [x-user, x-ask]
      includeRequestBodyInCheck: {maxRequestBytes: 16}
      headersToUpstreamOnAllow: [x-told]
      headersToDownstreamOnDeny: [x-told]
";
    let lab = Lab::start(&checks, &[mesh_config(providers), custom("web")].concat()).await;
    let (status, _, body) =
        lab.ask("PUT", "/ask?a=1", &[("X-User", "anna"), ("Cookie", "secret=1")], "abc").await;
    assert_eq!(status, 200, "{body}");
    let told = "x-told: PUT shop.example/check/ask?a=1 body=\"abc\" user=\"anna\" cookie=\"\"";
    assert!(body.contains(told), "{body}");
    assert!(body.contains("Cookie: secret=1") && body.ends_with("abc"), "{body}");
    let (status, head, body) = lab.ask("GET", "/ask", &[("x-ask", "302")], "").await;
    assert_eq!((status, &*body), (302, "not you"));
    assert!(head.contains("location: /login") && head.contains("x-told: "), "{head}");
    assert!(!head.contains("x-internal"), "{head}");
    assert_eq!(lab.ask("GET", "/ask", &[("x-ask", "500")], "").await.0, 403);
    let long = "a".repeat(17);
    assert_eq!(lab.ask("POST", "/ask", &[], &long).await.0, 413);
}

#[tokio::test]
async fn who_can_t_be_asked_refuses_unless_it_is_said_otherwise() {
    let Some(checks) = checks().await else { return };
    for (open, wanted) in [("false", 403), ("true", 200)] {
        let providers = format!(
            "
  - name: gone
    envoyExtAuthzGrpc: {{service: away.example, port: 80, timeout: 2s, failOpen: {open}}}
"
        );
        let lab = Lab::start(&checks, &[mesh_config(&providers), custom("gone")].concat()).await;
        assert_eq!(lab.ask("GET", "/ask", &[], "").await.0, wanted, "failOpen: {open}");
    }
    // One that nobody defines refuses, whatever.
    let lab = Lab::start(&checks, &custom("nobody")).await;
    assert_eq!(lab.ask("GET", "/ask", &[], "").await.0, 403);
    assert_eq!(lab.ask("GET", "/other", &[], "").await.0, 200);
}

pub fn limits(spec: &str) -> String {
    format!(
        "
---
apiVersion: culvert.dev/v1alpha1
kind: RateLimit
metadata: {{name: limits, namespace: shop}}
spec:
  targetRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: shop}}]
{spec}"
    )
}

#[tokio::test]
async fn requests_are_counted_here_and_by_a_service_of_others() {
    let Some(checks) = checks().await else { return };
    let spec = "
  global: {service: authz.example, port: 80, domain: shop, timeout: 5s, onFailure: Deny}
  limits:
  - name: user
    match: {paths: [/global*]}
    by: [{type: Header, name: x-user}, {type: Identity}, {type: Constant, name: limit, value: \"2\"}]
    global: {}
  - name: here
    match: {paths: [/local*]}
    by: [{type: Header, name: x-user}]
    local: {requests: 1, per: 1h}
";
    let lab = Lab::start(&checks, &limits(spec)).await;
    for (path, most) in [("/global", 2), ("/local", 1)] {
        for user in ["anna", "ben"] {
            for n in 0..most {
                let (status, head, body) = lab.ask("GET", path, &[("x-user", user)], "").await;
                assert_eq!(status, 200, "{head} {body}");
                assert!(head.contains(&format!(";r={}", most - 1 - n)), "{head}");
            }
            let (status, head, _) = lab.ask("GET", path, &[("x-user", user)], "").await;
            assert_eq!(status, 429);
            assert!(head.contains("ratelimit-policy: \"") && head.contains("retry-after: "), "{head}");
            if path == "/global" {
                let key =
                    format!("x-counted: shop|x-user={user}|identity=cluster.local/ns/web/sa/front|limit=2");
                assert!(head.contains(&key), "{head}");
            }
        }
    }
    assert_eq!(lab.ask("GET", "/other", &[("x-user", "anna")], "").await.0, 200);
    assert_eq!(lab.guards.limits.stats().over.get(), 4);
}

#[tokio::test]
async fn a_service_that_is_away_does_as_the_resource_says() {
    let Some(checks) = checks().await else { return };
    for (on_failure, wanted) in [("Deny", 500), ("Allow", 200)] {
        let spec = format!(
            "
  global: {{service: away.example, port: 80, domain: shop, onFailure: {on_failure}}}
  limits: [{{name: all, by: [{{type: Path}}], global: {{}}}}]
"
        );
        let lab = Lab::start(&checks, &limits(&spec)).await;
        assert_eq!(lab.ask("GET", "/", &[], "").await.0, wanted, "{on_failure}");
        assert_eq!(lab.guards.limits.stats().failed.get(), 1);
    }
}
