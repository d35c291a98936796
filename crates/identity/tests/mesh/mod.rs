//! A mesh for tests: a CA in a directory on a tmpfs, certificates from it, and peers that are not as they should be.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use identity::{
    CaDirectory, CertificateSettings, Certificates, Clock, LocalIssuer, LocalIssuerSettings, Validity,
};
use model::{SpiffeId, TrustDomain, TrustDomains};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use tempfile::TempDir;

pub const DAY: Duration = Duration::from_secs(24 * 3600);

pub fn id(text: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/{text}").parse().unwrap()
}

pub fn domain() -> TrustDomain {
    TrustDomain::cluster_local()
}

pub fn domains() -> TrustDomains {
    TrustDomains::only(domain())
}

/// A directory on a tmpfs that goes away with the value.
pub fn memory_dir() -> TempDir {
    let dir = tempfile::Builder::new().prefix("culvert-identity-").tempdir_in("/dev/shm").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    dir
}

pub struct Mesh {
    pub dir: TempDir,
    pub ca: CaDirectory,
    pub issuer: Arc<LocalIssuer>,
    pub certificates: Certificates,
}

impl Mesh {
    pub fn start() -> Self {
        Self::start_with(LocalIssuerSettings {
            poll: Duration::from_millis(20),
            ..LocalIssuerSettings::default()
        })
    }

    pub fn start_with(settings: LocalIssuerSettings) -> Self {
        let dir = memory_dir();
        let ca = CaDirectory::open(dir.path()).unwrap();
        ca.make_if_missing(&domain(), Validity::of_roots(), UnixTime::now()).unwrap();
        let (issuer, certificates) = node(&ca, settings);
        Self { dir, ca, issuer, certificates }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The signing certificate and key, to make certificates that the mesh would not.
    pub fn stolen_ca(&self) -> (Vec<CertificateDer<'static>>, Issuer<'static, KeyPair>) {
        let text = std::fs::read_to_string(self.path("ca.pem")).unwrap();
        let key = text.find("-----BEGIN PRIVATE KEY").unwrap();
        let key = KeyPair::from_pem(&text[key..]).unwrap();
        let certificate = Issuer::from_ca_cert_pem(&text, key).unwrap();
        (Vec::new(), certificate)
    }
}

/// One more node on the same directory.
pub fn node(ca: &CaDirectory, settings: LocalIssuerSettings) -> (Arc<LocalIssuer>, Certificates) {
    let issuer = Arc::new(LocalIssuer::start(ca.clone(), domains(), settings, Clock::system()).unwrap());
    let certificates = Certificates::new(
        issuer.clone(),
        issuer.bundle().clone(),
        CertificateSettings::default(),
        None,
        Clock::system(),
    );
    (issuer, certificates)
}

/// A certificate with its key.
pub struct Leaf {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// Parameters of a proper workload certificate, to be spoiled.
pub fn leaf_params(uri: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = time::OffsetDateTime::now_utc();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now - Duration::from_secs(60);
    params.not_after = now + DAY;
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

pub fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_after = time::OffsetDateTime::now_utc() + DAY;
    params
}

pub fn sign(params: &CertificateParams, issuer: &Issuer<'_, KeyPair>) -> Leaf {
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, issuer).unwrap();
    Leaf { chain: vec![certificate.into()], key: pkcs8(&key) }
}

pub fn pkcs8(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))
}

pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// A stock rustls client with `leaf` (or none) that accepts every server.
pub fn stock_client(leaf: Option<&Leaf>, alpn: &[&[u8]]) -> tokio_rustls::TlsConnector {
    let builder = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting));
    let mut config = match leaf {
        Some(leaf) => builder.with_client_auth_cert(leaf.chain.clone(), leaf.key.clone_key()).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    tokio_rustls::TlsConnector::from(Arc::new(config))
}

/// A stock rustls server with `leaf` that asks for a client certificate and accepts every one.
pub fn stock_server(leaf: &Leaf, alpn: &[&[u8]]) -> tokio_rustls::TlsAcceptor {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(Trusting))
        .with_single_cert(leaf.chain.clone(), leaf.key.clone_key())
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    tokio_rustls::TlsAcceptor::from(Arc::new(config))
}

pub fn any_name() -> ServerName<'static> {
    ServerName::try_from("ignored.example").unwrap()
}

#[derive(Debug)]
pub struct Trusting;

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unreachable!()
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl rustls::server::danger::ClientCertVerifier for Trusting {
    fn client_auth_mandatory(&self) -> bool {
        false
    }
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<rustls::server::danger::ClientCertVerified, rustls::Error> {
        Ok(rustls::server::danger::ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        unreachable!()
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
