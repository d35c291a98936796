//! A waypoint before services, in the test's own process, and those it has to do with. The authorizer, the rate-limit service
//! and the service of access logs are those of `checks/`: grpc-go with Envoy's own messages. Without Go, or without a network
//! to fetch its modules, tests that need them say so and pass, unless `CULVERT_REQUIRE_GO=1`.

use std::io::Write;
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
use process::logs::{Format, LogWriter};
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
use waypoint::telemetry::{Exporters, Settings as Told, Telemetry, ThroughMesh};
use waypoint::upstream::{ClusterLimits, Clusters, Dialers};

pub const LONG: Duration = Duration::from_secs(60);

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

/// Keeps what is written.
#[derive(Clone, Default)]
pub struct Kept(pub Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A waypoint before the service `shop`, in the test's own process, with all that it tells.
pub struct Lab {
    pub address: SocketAddr,
    pub guards: Arc<Guards>,
    pub worker: Arc<Worker>,
    pub deciding: Deciding,
    pub registry: Registry,
    pub writer: LogWriter,
    pub kept: Kept,
    files: Mutex<(Repository, Arc<Mesh>)>,
}

const GATEWAY: &str = "
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]}
";

/// The resources, which have no errors, and the mesh of them.
fn read(resources: &str) -> (Repository, Arc<Mesh>) {
    let mut repository = Repository::new(Options::default());
    let text = [GATEWAY, resources].concat();
    repository.stage(&"lab.yaml".into(), Content::Bytes(text.as_bytes()));
    let outcome = repository.commit();
    let errors = repository.diagnostics().into_iter();
    let errors: Vec<_> =
        errors.filter(|d| d.severity == config::diagnostic::Severity::Error).map(|d| d.to_string()).collect();
    assert!(errors.is_empty(), "{errors:#?}");
    let mesh = Arc::new(Mesh::default().apply(outcome.changes));
    (repository, mesh)
}

/// Destinations of a waypoint that is somewhere.
fn clusters() -> Clusters {
    let client = Client {
        locality: Arc::default(),
        node: "".into(),
        cluster: "".into(),
        network: "".into(),
        address: "127.0.0.1".parse().unwrap(),
    };
    let origin = Origin { client, labels: Arc::default() };
    Clusters::new(origin, ClusterLimits::default(), Arc::new(NoTunnels))
}

/// Takes the connections of one client to the service; where they come to.
async fn listen(worker: &Arc<Worker>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = Arc::clone(worker);
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
    address
}

impl Lab {
    /// With these resources, and lines of requests as JSON in [`Lab::kept`].
    pub async fn new(resources: &str, settings: Settings) -> Self {
        Self::telling(resources, settings, Some(Format::Json)).await
    }

    /// With `resources` beside the service, of which `authz` is at `grpc`, and `authz-http` at `http`.
    pub async fn with(grpc: SocketAddr, http: SocketAddr, resources: &str) -> Self {
        let text = [
            external("shop", VIP, "http", echo().await),
            external("authz", "240.240.0.2", "grpc", grpc).replace("use-waypoint", "none"),
            external("authz-http", "240.240.0.3", "http", http).replace("use-waypoint", "none"),
            external("away", "240.240.0.4", "grpc", free()).replace("use-waypoint", "none"),
            resources.to_owned(),
        ]
        .concat();
        Self::telling(&text, Settings::default(), None).await
    }

    async fn telling(resources: &str, settings: Settings, access_log: Option<Format>) -> Self {
        let (repository, mesh) = read(resources);
        let here = tokio::runtime::Handle::current();
        let (registry, kept) = (Registry::new(), Kept::default());
        let writer =
            LogWriter::start_on(kept.clone(), 1 << 20, |lines| format!("{lines} dropped\n")).unwrap();
        let collectors = Arc::new(ThroughMesh::new(here.clone()));
        let exporters = Exporters::new(here.clone(), collectors.clone(), "waypoint", "shop");
        let told = Told { access_log, ..Told::default() };
        let told = Telemetry::new(&registry, told, writer.clone(), exporters);
        let own = model::http::WaypointKey { namespace: "shop".into(), name: "waypoint".into() };
        let guards = Arc::new(Guards::fetching(Arc::new(NoKeys), here));
        let deciding = Deciding::new(own, "".into(), clusters(), told, guards.clone());
        collectors.follow(&deciding);
        deciding.update(mesh.clone());
        let worker = Worker::new(Arc::new(deciding.clone()), settings, CancellationToken::new());
        let address = listen(&worker).await;
        let files = Mutex::new((repository, mesh));
        Self { address, guards, worker, deciding, registry, writer, kept, files }
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
