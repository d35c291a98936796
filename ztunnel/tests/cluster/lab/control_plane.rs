//! A stand-in of the control plane: the real ADS server on what a test gives it, and a CA service that signs for
//! whoever has the token.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use harness::netns::Host;
use identity::{CertificateAuthority, Issued, TrustBundle, Validity};
use model::{Policy, Service, Settings, SpiffeId, TrustDomain, TrustDomains, Workload};
use net::ListenOptions;
use prost::Message;
use prost_types::value::Kind;
use proto::wire::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use proto::wire::auth::{IstioCertificateRequest, IstioCertificateResponse};
use proto::wire::workload::{Address, address};
use proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, Extensions, MESH_SETTINGS_NAME, MESH_SETTINGS_TYPE_URL,
    encode_policy, encode_service, encode_settings, encode_workload,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::runtime::{Builder, Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};
use xds::server::{self, Authorizer, Caller, Change, Config, Event, Observer, Resource};

/// Where it listens in each node's namespace.
pub const ADDRESS: &str = "127.0.0.1:15012";
pub const TOKEN: &str = "a-token-of-this-lab";

/// The control plane. Dropping it ends it.
pub struct ControlPlane {
    pub server: server::Server,
    pub counts: Arc<Counts>,
    authority: Arc<Authority>,
    tls: ServerTlsConfig,
    /// Of its own, so that its connections end with it.
    runtime: Option<Runtime>,
}

/// What it has sent.
#[derive(Default)]
pub struct Counts {
    pub resources: AtomicUsize,
    pub connected: AtomicUsize,
    pub certificates: AtomicUsize,
    pub rejected: Mutex<Vec<String>>,
}

impl Observer for Counts {
    fn observe(&self, event: Event<'_>) {
        match event {
            Event::Connected(_) => drop(self.connected.fetch_add(1, Ordering::Relaxed)),
            Event::Pushed { resources, .. } => drop(self.resources.fetch_add(resources, Ordering::Relaxed)),
            Event::Rejected { .. } => self.rejected.lock().unwrap().push(format!("{event:?}")),
            _ => {}
        }
    }
}

/// Lets in who has the token.
struct Token;

fn check(metadata: &tonic::metadata::MetadataMap) -> Result<(), Status> {
    let is = |key, wanted: &str| metadata.get(key).is_some_and(|value| value == wanted);
    if is("authorization", &format!("Bearer {TOKEN}")) && is("clusterid", "Kubernetes") {
        Ok(())
    } else {
        Err(Status::unauthenticated("no token"))
    }
}

#[tonic::async_trait]
impl Authorizer for Token {
    async fn authenticate(&self, request: &Request<()>) -> Result<Caller, Status> {
        check(request.metadata())?;
        Ok(Caller { name: "a ztunnel".into() })
    }
}

/// The CA of the lab, which outlives control planes.
pub struct Authority {
    ca: CertificateAuthority,
    root: CertificateDer<'static>,
}

impl Authority {
    pub fn new() -> Self {
        let (domain, now) = (TrustDomain::cluster_local(), UnixTime::now());
        let made = CertificateAuthority::make_root(&domain, Validity::of_roots(), now).unwrap();
        let bundle = TrustBundle::new(&made.chain, TrustDomains::only(domain)).unwrap();
        let ca = CertificateAuthority::new(&made.chain, &made.key, &bundle, now).unwrap();
        Self { ca, root: made.chain[0].clone() }
    }

    pub fn root_pem(&self) -> String {
        pem("CERTIFICATE", &self.root)
    }

    fn server(&self) -> ServerTlsConfig {
        let names = ["127.0.0.1".to_owned()];
        let (Issued { chain, key }, _) =
            self.ca.issue_server(&names, Validity::of_workloads(), UnixTime::now()).unwrap();
        let chain: String = chain.iter().map(|c| pem("CERTIFICATE", c)).collect();
        ServerTlsConfig::new().identity(Identity::from_pem(chain, pem("PRIVATE KEY", key.secret_der())))
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    pem::encode(&pem::Pem::new(label, der))
}

/// The CA service.
struct Ca(Arc<Authority>, Arc<Counts>);

#[tonic::async_trait]
impl IstioCertificateService for Ca {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        check(request.metadata())?;
        let request = request.into_inner();
        let fields = request.metadata.unwrap_or_default().fields;
        let id = match fields.get("ImpersonatedIdentity").and_then(|value| value.kind.clone()) {
            Some(Kind::StringValue(id)) => id,
            _ => "spiffe://cluster.local/ns/culvert-system/sa/ztunnel".into(),
        };
        let id: SpiffeId = id.parse().map_err(|e| Status::invalid_argument(format!("{e}")))?;
        let lifetime = Duration::from_secs(request.validity_duration.unsigned_abs());
        let validity = Validity { lifetime, ..Validity::of_workloads() };
        let csr = pem::parse(&request.csr).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let chain = self
            .0
            .ca
            .sign_request(csr.contents(), &id, validity, UnixTime::now())
            .map_err(|e| Status::internal(e.to_string()))?;
        self.1.certificates.fetch_add(1, Ordering::Relaxed);
        let root = std::iter::once(&self.0.root);
        let cert_chain = chain.iter().chain(root).map(|c| pem("CERTIFICATE", c)).collect();
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

impl ControlPlane {
    /// One that has nothing to send yet.
    pub fn new(authority: Arc<Authority>) -> Self {
        let counts = Arc::new(Counts::default());
        let types = vec![MESH_SETTINGS_TYPE_URL, AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL];
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let context = runtime.enter();
        let server =
            server::Server::new(Config { types, ..Config::default() }, Arc::new(Token), counts.clone());
        let tls = authority.server();
        drop(context);
        Self { server, counts, authority, tls, runtime: Some(runtime) }
    }

    /// Listens in the namespace of a node.
    pub fn listen(&self, node: &Host) {
        let _context = self.runtime.as_ref().unwrap().enter();
        let address: SocketAddr = ADDRESS.parse().unwrap();
        let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
        let listener = net::listen(&node.netns, address, &options).unwrap();
        let ca = IstioCertificateServiceServer::new(Ca(self.authority.clone(), self.counts.clone()));
        let serving = Server::builder()
            .tls_config(self.tls.clone())
            .unwrap()
            .add_service(self.server.service())
            .add_service(ca)
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(async move { serving.await.unwrap() });
    }

    pub fn workload(&self, workload: &Workload) {
        let message = encode_workload(workload).unwrap();
        let address = Address { r#type: Some(address::Type::Workload(message)) };
        self.set(ADDRESS_TYPE_URL, &workload.uid, address.encode_to_vec());
    }

    pub fn service(&self, service: &Service) {
        let message = encode_service(service, Extensions::Culvert).unwrap();
        let address = Address { r#type: Some(address::Type::Service(message)) };
        self.set(ADDRESS_TYPE_URL, &service.key().to_string(), address.encode_to_vec());
    }

    pub fn policy(&self, policy: &Policy) {
        let message = encode_policy(policy, Extensions::Culvert).unwrap();
        self.set(AUTHORIZATION_TYPE_URL, &policy.key.to_string(), message.encode_to_vec());
    }

    pub fn settings(&self, settings: &Settings) {
        self.set(MESH_SETTINGS_TYPE_URL, MESH_SETTINGS_NAME, encode_settings(settings).encode_to_vec());
    }

    /// Any bytes under any name.
    pub fn set(&self, type_url: &'static str, name: &str, body: Vec<u8>) {
        let body = bytes::Bytes::from(body);
        self.server.apply([Change::Set(Resource {
            type_url,
            name: name.into(),
            aliases: Vec::new(),
            scope: None,
            plain: Some(body.clone()),
            culvert: Some(body),
            needs: proto::Features::NONE,
        })]);
    }

    pub fn unset(&self, type_url: &'static str, name: &str) {
        self.server.apply([Change::Remove { type_url, name: name.into() }]);
    }

    /// Whether every ztunnel has acknowledged all that there is, refused or not.
    pub fn all_have_all(&self, clients: usize) -> bool {
        let generation = self.server.generation();
        let list = self.server.clients();
        list.len() == clients && list.iter().all(|c| c.types.iter().all(|t| t.acked >= generation))
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// Files that the cluster gives a ztunnel.
pub fn write_files(dir: &Path, authority: &Authority) -> (PathBuf, PathBuf) {
    let (token, root) = (dir.join("token"), dir.join("root-cert.pem"));
    std::fs::write(&token, TOKEN).unwrap();
    std::fs::write(&root, authority.root_pem()).unwrap();
    (token, root)
}
