//! What carries requests.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use hbone::{Authority, ConnectRequest, Connector, Pool, PoolSettings, TunnelHeaders};
use identity::{
    CaDirectory, CertificateSettings, Certificates, Clock, ExpectedPeers, HandshakeError, HandshakeLimits,
    LocalIssuer, LocalIssuerSettings, PeerInfo, TlsStream, Validity,
};
use model::{SpiffeId, TrustDomain, TrustDomains};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// What is around HTTP.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Carry {
    /// Nothing.
    Plain,
    /// TLS, with certificates on both sides.
    Mtls,
    /// A tunnel, as clients in the mesh have it.
    Hbone,
}

/// How the server is reached.
#[derive(Args, Debug)]
pub struct Way {
    /// What is around HTTP
    #[arg(long, default_value = "plain")]
    carry: Carry,
    /// What is dialled
    #[arg(long)]
    to: SocketAddr,
    /// Where tunnels lead
    #[arg(long, default_value = "240.240.0.1:80")]
    authority: SocketAddr,
    /// Our certificate: a directory with cert.pem, key.pem and root.pem; of tunnels, that of the CA
    #[arg(long, default_value = ".")]
    certificates: PathBuf,
    /// Who we are in tunnels
    #[arg(long, default_value = "spiffe://cluster.local/ns/bench/sa/web")]
    identity: SpiffeId,
    /// Whose certificate is expected: a DNS name, of tunnels a SPIFFE ID
    #[arg(long, default_value = "cart.bench.example")]
    peer: String,
}

/// Opens connections.
#[derive(Clone)]
pub struct Open {
    to: SocketAddr,
    how: How,
}

#[derive(Clone)]
enum How {
    Plain,
    Mtls(TlsConnector, ServerName<'static>),
    Hbone(Pool<Dialer>, Box<ConnectRequest>),
}

impl Way {
    pub fn open_with(self) -> io::Result<Open> {
        let how = match self.carry {
            Carry::Plain => How::Plain,
            Carry::Mtls => {
                let name = ServerName::try_from(self.peer).map_err(io::Error::other)?;
                How::Mtls(TlsConnector::from(client(&self.certificates)?), name)
            }
            Carry::Hbone => {
                let expected = self.peer.parse().map_err(io::Error::other)?;
                let certificates = authority(&self.certificates)?;
                let dialer = Dialer { certificates, own: self.identity, expected };
                // As a node's proxy to a waypoint with one thread.
                let settings = PoolSettings { spread: 1, ..PoolSettings::default() };
                let authority = Authority::from_addr(self.authority).ok_or(io::ErrorKind::InvalidInput)?;
                let request = ConnectRequest { authority, headers: TunnelHeaders::default() };
                How::Hbone(Pool::new(dialer, settings), Box::new(request))
            }
        };
        Ok(Open { to: self.to, how })
    }
}

impl Open {
    pub async fn open(&self) -> io::Result<Box<dyn net::Io>> {
        if let How::Hbone(pool, request) = &self.how {
            let opened = pool.open(&self.to, request).await.map_err(io::Error::other)?;
            return Ok(Box::new(opened.tunnel));
        }
        let tcp = TcpStream::connect(self.to).await?;
        tcp.set_nodelay(true)?;
        match &self.how {
            How::Mtls(connector, name) => Ok(Box::new(connector.connect(name.clone(), tcp).await?)),
            _ => Ok(Box::new(tcp)),
        }
    }
}

/// Dials the waypoint as a workload.
pub struct Dialer {
    certificates: Arc<Certificates>,
    own: SpiffeId,
    expected: SpiffeId,
}

impl Connector for Dialer {
    type Key = SocketAddr;
    type Io = TlsStream<TcpStream>;
    type Peer = Option<PeerInfo>;
    type Error = HandshakeError;

    async fn connect(&self, to: &SocketAddr) -> Result<(Self::Io, Self::Peer), HandshakeError> {
        let tcp = TcpStream::connect(to).await.map_err(HandshakeError::Transport)?;
        tcp.set_nodelay(true).map_err(HandshakeError::Transport)?;
        let expected = ExpectedPeers::One(self.expected.clone());
        let limits = HandshakeLimits::default();
        let tls = identity::connect(tcp, &self.certificates, &self.own, expected, limits).await?;
        let peer = tls.peer().clone();
        Ok((tls, Some(peer)))
    }
}

/// Certificates by the CA that a waypoint with files uses; made where there is none.
pub fn authority(directory: &Path) -> io::Result<Arc<Certificates>> {
    let domains = TrustDomains::only(TrustDomain::cluster_local());
    let settings =
        LocalIssuerSettings { validity: Validity::of_workloads(), ..LocalIssuerSettings::default() };
    let (directory, clock) = (CaDirectory::named(directory), Clock::system());
    let issuer = LocalIssuer::start_kept(directory, None, domains, settings, clock.clone());
    let issuer = issuer.map_err(io::Error::other)?;
    let bundle = issuer.bundle().clone();
    let settings = CertificateSettings::default();
    Ok(Arc::new(Certificates::new(Arc::new(issuer), bundle, settings, None, clock)))
}

type Files = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, Arc<RootCertStore>);

fn files(directory: &Path) -> io::Result<Files> {
    let chain = CertificateDer::pem_file_iter(directory.join("cert.pem")).map_err(io::Error::other)?;
    let chain: Result<Vec<_>, _> = chain.collect();
    let key = PrivateKeyDer::from_pem_file(directory.join("key.pem")).map_err(io::Error::other)?;
    let root = CertificateDer::from_pem_file(directory.join("root.pem")).map_err(io::Error::other)?;
    let mut roots = RootCertStore::empty();
    roots.add(root).map_err(io::Error::other)?;
    Ok((chain.map_err(io::Error::other)?, key, Arc::new(roots)))
}

fn client(directory: &Path) -> io::Result<Arc<ClientConfig>> {
    let (chain, key, roots) = files(directory)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(io::Error::other)?.with_root_certificates(roots);
    Ok(Arc::new(builder.with_client_auth_cert(chain, key).map_err(io::Error::other)?))
}

/// A server that asks for certificates.
pub fn server(directory: &Path) -> io::Result<Arc<ServerConfig>> {
    let (chain, key, roots) = files(directory)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(io::Error::other)?;
    let builder = builder.with_client_cert_verifier(verifier.map_err(io::Error::other)?);
    Ok(Arc::new(builder.with_single_cert(chain, key).map_err(io::Error::other)?))
}
