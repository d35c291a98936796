//! The waypoint behind a plain listener, for measurements:
//! `front CONFIG_DIR NAMESPACE/GATEWAY LISTEN AS [CLIENT [CERTIFICATES]]`.
//!
//! One thread of the data plane. Every connection to LISTEN is taken for one to AS, a service's address and port; with
//! CLIENT, a SPIFFE ID, for one of a client that has proved it. With CERTIFICATES, a directory with cert.pem, key.pem and
//! root.pem, it takes connections with TLS and a certificate of the client's, and no others. Everything but the way in is the
//! program's: files, decisions, balancing, telemetry.
#![allow(clippy::print_stderr, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::http::WaypointKey;
use model::{HboneAddr, Mesh, SpiffeId};
use process::logs::{LogSettings, Logs};
use process::metrics::{Format, Registry};
use process::runtimes::Workers;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;
use waypoint::deciding::Deciding;
use waypoint::guards::Guards;
use waypoint::http::carriers::serve_tls;
use waypoint::http::decide::{Connection, Dial, Dialing};
use waypoint::http::io::Io;
use waypoint::http::{Settings, Worker, serve};
use waypoint::telemetry::{Exporters, Telemetry};
use waypoint::upstream::{ClusterLimits, Clusters, Dialers};

/// Endpoints of the benchmark are outside the mesh.
struct NoTunnels;

impl Dialers for NoTunnels {
    fn tunnel(&self, _: HboneAddr, _: Arc<[SpiffeId]>) -> Arc<dyn Dial> {
        Arc::new(Self)
    }
}

impl Dial for NoTunnels {
    fn dial(&self, _: SocketAddr) -> Dialing {
        Box::pin(async { Err(std::io::Error::other("there are no tunnels")) })
    }
}

struct Given {
    config: PathBuf,
    gateway: WaypointKey,
    listen: SocketAddr,
    destination: SocketAddr,
    client: Option<Arc<SpiffeId>>,
    tls: Option<Arc<ServerConfig>>,
}

impl Given {
    fn read() -> Self {
        let mut args = std::env::args().skip(1);
        let mut next = || args.next().expect("CONFIG_DIR NAMESPACE/GATEWAY LISTEN AS [CLIENT]");
        let config = next().into();
        let gateway = next();
        let (namespace, name) = gateway.split_once('/').expect("NAMESPACE/GATEWAY");
        Self {
            config,
            gateway: WaypointKey { namespace: namespace.into(), name: name.into() },
            listen: next().parse().expect("an address"),
            destination: next().parse().expect("an address"),
            client: args.next().map(|id| Arc::new(id.parse().expect("a SPIFFE ID"))),
            tls: args.next().map(|directory| Arc::new(tls(directory.as_ref()))),
        }
    }
}

fn tls(directory: &Path) -> ServerConfig {
    let of = |name: &str| directory.join(name);
    let chain =
        CertificateDer::pem_file_iter(of("cert.pem")).expect("cert.pem").map(|one| one.expect("cert.pem"));
    let key = PrivateKeyDer::from_pem_file(of("key.pem")).expect("key.pem");
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(of("root.pem")).expect("root.pem")).expect("root.pem");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.expect("versions").with_client_cert_verifier(verifier.expect("root.pem"));
    builder.with_single_cert(chain.collect(), key).expect("a key that fits the certificate")
}

fn deciding(given: &Given, mesh: Arc<Mesh>, logs: &Logs, registry: &Registry) -> Deciding {
    let client = balance::Client {
        locality: Arc::default(),
        node: "".into(),
        cluster: "Kubernetes".into(),
        network: "".into(),
        address: given.listen.ip(),
    };
    let origin = balance::requests::Origin { client, labels: Arc::default() };
    let clusters = Clusters::new(origin, ClusterLimits::default(), Arc::new(NoTunnels));
    let told = waypoint::telemetry::Settings::default();
    let telemetry = Telemetry::new(registry, told, logs.writer().clone(), Exporters::none());
    let guards = Arc::new(Guards::new(tokio::runtime::Handle::current(), None).expect("cryptography"));
    let deciding = Deciding::new(given.gateway.clone(), "".into(), clusters, telemetry, guards);
    deciding.update(mesh);
    deciding
}

fn main() {
    let given = Given::read();
    let logs = Logs::init(&LogSettings { filter: "warn".into(), ..LogSettings::default() }).expect("logs");
    let control = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _context = control.enter();
    let (_files, first) = source::Files::open(&given.config, None).expect("resources");
    let mesh = Arc::new(Mesh::default().apply(first.changes));
    assert!(mesh.http_services().next().is_some(), "no service is bound to the waypoint");
    let registry = Registry::new();
    let deciding = deciding(&given, mesh, &logs, &registry);
    let workers = Workers::start("1".parse().expect("a number")).expect("threads");
    let (listen, destination, identity) = (given.listen, given.destination, given.client.clone());
    let tls = given.tls.clone();
    let task = workers.handles()[0].spawn(async move {
        let listener = tokio::net::TcpListener::bind(listen).await.expect("an address that is free");
        let worker = Worker::new(Arc::new(deciding), Settings::default(), CancellationToken::new());
        eprintln!("ready");
        while let Ok((stream, client)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let identity = identity.clone();
            let facts =
                Connection { client, destination, identity, server_name: None, secure: false, said: None };
            match &tls {
                Some(tls) => tokio::spawn(serve_tls(Arc::clone(&worker), stream, Arc::clone(tls), facts)),
                None => tokio::spawn(serve(Arc::clone(&worker), Io::Tcp(stream), facts)),
            };
        }
    });
    // Its metrics are asked for by a signal's lack of anything better: a line on standard input.
    let mut line = String::new();
    while std::io::stdin().read_line(&mut line).is_ok_and(|read| read > 0) && !task.is_finished() {
        eprint!("{}", registry.encode(Format::Prometheus));
        line.clear();
    }
    while !task.is_finished() {
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}
