//! TLS that is begun here, as a DestinationRule says (`trafficPolicy.tls`): inside of whatever carries it.
//!
//! Invariants:
//! * what it needs and isn't there fails the connection: it never goes without TLS, without our certificate, or without a
//!   look at the server's, unless exactly that is written;
//! * files are read again when they change; ones that can't be used leave the last good ones in force;
//! * TLS is 1.3, or 1.2 with a server that speaks no 1.3, unless the mesh's settings ask for 1.3.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use model::Str;
use model::http::TlsOrigination;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::version::{TLS12, TLS13};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    SupportedProtocolVersion,
};
use rustls_pki_types::pem::PemObject;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::http::decide::{Dial, Dialing, Protocol};
use crate::upstream::clusters::Shared;

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(10);
/// The most that a file may hold. Paths are what a DestinationRule says, whoever wrote it.
const MOST: u64 = 1 << 20;
/// What `caCertificates` says for the roots of the system.
const SYSTEM: &str = "system";

/// TLS to one destination: shared by its endpoints.
pub(crate) struct Origination {
    shared: Arc<Shared>,
    settings: TlsOrigination,
    /// What is sent and verified where the settings don't say it.
    host: Str,
    loaded: ArcSwapOption<Loaded>,
    /// Held by whoever reads files.
    looking: Arc<Mutex<()>>,
}

#[derive(Clone)]
struct Loaded {
    only_tls13: bool,
    /// By what is spoken inside: nothing that is told, HTTP/1.1, HTTP/2.
    configs: [Arc<ClientConfig>; 3],
    versions: Vec<Option<SystemTime>>,
    looked: Instant,
}

impl Loaded {
    fn config(&self, inside: Option<Protocol>) -> Arc<ClientConfig> {
        let [bytes, http1, http2] = &self.configs;
        Arc::clone(match inside {
            None => bytes,
            Some(Protocol::Http1) => http1,
            Some(Protocol::Http2) => http2,
        })
    }
}

/// What is not there, or can't be used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{0}: {1}")]
    File(PathBuf, String),
    #[error("the credential {0:?} is no name of a Secret")]
    Credential(Str),
    #[error("the system has no root certificates: {0}")]
    System(String),
    #[error("{0}")]
    Rustls(#[from] rustls::Error),
}

impl Origination {
    pub(crate) fn new(shared: Arc<Shared>, settings: &TlsOrigination, host: &Str) -> Arc<Self> {
        if settings.insecure_skip_verify {
            tracing::warn!(%host, "the certificates of this host are not verified: insecureSkipVerify is set");
        }
        let (settings, host) = (settings.clone(), host.clone());
        Arc::new(Self { shared, settings, host, loaded: ArcSwapOption::empty(), looking: Arc::default() })
    }

    fn name(&self) -> io::Result<ServerName<'static>> {
        let name = self.settings.sni.as_ref().unwrap_or(&self.host);
        ServerName::try_from(name.to_string()).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no server name: set tls.sni"))
        })
    }

    /// What was loaded. For other versions of TLS it is not in force, whatever becomes of the files.
    fn usable(&self, only_tls13: bool) -> Option<Arc<Loaded>> {
        self.loaded.load_full().filter(|loaded| loaded.only_tls13 == only_tls13)
    }

    /// The configuration in force. Reading files may block: one thread does at a time, and connections wait for it only where
    /// nothing was read before.
    async fn config(self: &Arc<Self>, inside: Option<Protocol>) -> io::Result<Arc<ClientConfig>> {
        let only_tls13 = self.shared.only_tls13.load(Ordering::Relaxed);
        let is_fresh = |loaded: &Arc<Loaded>| loaded.looked.elapsed() < LOOK;
        let usable = self.usable(only_tls13);
        if let Some(loaded) = usable.as_ref().filter(|loaded| is_fresh(loaded)) {
            return Ok(loaded.config(inside));
        }
        let looking = match (usable, Arc::clone(&self.looking).try_lock_owned()) {
            (_, Ok(looking)) => looking,
            (Some(loaded), Err(_)) => return Ok(loaded.config(inside)),
            (None, Err(_)) => Arc::clone(&self.looking).lock_owned().await,
        };
        if let Some(loaded) = self.usable(only_tls13).filter(is_fresh) {
            return Ok(loaded.config(inside));
        }
        let origination = Arc::clone(self);
        let look = move || {
            let _looking = looking;
            origination.look(inside, only_tls13)
        };
        tokio::task::spawn_blocking(look).await.map_err(io::Error::other)?
    }

    /// Looks at the files, and reads them if they have changed.
    fn look(&self, inside: Option<Protocol>, only_tls13: bool) -> io::Result<Arc<ClientConfig>> {
        let before = self.usable(only_tls13);
        let (versions, looked) = (self.versions(), Instant::now());
        let kept = before.as_ref().filter(|before| before.versions == versions);
        let loaded = match (kept, before.as_ref()) {
            (Some(kept), _) => Loaded { looked, ..Loaded::clone(kept) },
            (None, before) => match (self.load(only_tls13), before) {
                (Ok(configs), _) => Loaded { only_tls13, configs, versions, looked },
                (Err(error), Some(before)) => {
                    tracing::warn!(host = %self.host, %error, "TLS keeps what it was set to before");
                    Loaded { looked, ..Loaded::clone(before) }
                }
                (Err(error), None) => return Err(io::Error::other(error)),
            },
        };
        let config = loaded.config(inside);
        self.loaded.store(Some(Arc::new(loaded)));
        Ok(config)
    }

    fn paths(&self) -> Result<[Option<PathBuf>; 3], Unusable> {
        if let Some(credential) = &self.settings.credential {
            let name = credential.strip_prefix("kubernetes://").unwrap_or(credential);
            let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
            if name.is_empty() || name.starts_with('.') || !name.bytes().all(is_name) {
                return Err(Unusable::Credential(credential.clone()));
            }
            let directory = self.shared.credentials.join(name);
            let there =
                |names: [&str; 2]| names.iter().map(|name| directory.join(name)).find(|path| path.exists());
            let own = [there(["tls.crt", "cert"]), there(["tls.key", "key"])];
            let [certificate, key] = own;
            // One that isn't there is named by the error when it is read.
            let roots = there(["ca.crt", "cacert"]).or_else(|| Some(directory.join("ca.crt")));
            return Ok([certificate, key, roots]);
        }
        let path = |text: &Option<Str>| text.as_deref().map(PathBuf::from);
        let files = self.settings.files.as_ref();
        Ok(files.map_or([None, None, None], |(certificate, key, roots)| {
            [path(certificate), path(key), path(roots)]
        }))
    }

    fn versions(&self) -> Vec<Option<SystemTime>> {
        let paths = self.paths().unwrap_or_default();
        let version = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified()).ok();
        paths.iter().map(|path| path.as_deref().and_then(version)).collect()
    }

    fn load(&self, only_tls13: bool) -> Result<[Arc<ClientConfig>; 3], Unusable> {
        let [certificate, key, roots] = self.paths()?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier: Arc<dyn ServerCertVerifier> = if self.settings.insecure_skip_verify {
            Arc::new(Verifier { trusted: None, names: Box::default(), provider: Arc::clone(&provider) })
        } else {
            let trusted = match roots {
                Some(path) if path.as_os_str() != SYSTEM => Trusted::read(&path)?,
                _ => Trusted { roots: system_roots()?, written: Vec::new() },
            };
            let names = self.settings.subject_alt_names.clone();
            Arc::new(Verifier { trusted: Some(trusted), names, provider: Arc::clone(&provider) })
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions(only_tls13))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let config = match (certificate, key) {
            (Some(certificate), Some(key)) => {
                builder.with_client_auth_cert(chain(&certificate)?, private_key(&key)?)?
            }
            _ => builder.with_no_client_auth(),
        };
        let with = |protocols: &[&[u8]]| {
            let mut config = config.clone();
            config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            Arc::new(config)
        };
        Ok([with(&[]), with(&[b"http/1.1"]), with(&[b"h2"])])
    }
}

/// The versions that are spoken with servers outside of the mesh, the best first.
pub(crate) fn versions(only_tls13: bool) -> &'static [&'static SupportedProtocolVersion] {
    static NEWEST: [&SupportedProtocolVersion; 1] = [&TLS13];
    static BOTH: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
    if only_tls13 { &NEWEST } else { &BOTH }
}

fn file<T>(path: &Path, result: Result<T, impl std::fmt::Display>) -> Result<T, Unusable> {
    result.map_err(|error| Unusable::File(path.to_owned(), error.to_string()))
}

/// What a regular file holds. Of a device or a pipe there might be no end, or no beginning.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Without O_NONBLOCK, opening a pipe would wait for a writer.
    let opened = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !opened.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut text = Vec::new();
    opened.take(MOST + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MOST {
        return Err(io::Error::other(format!("it is longer than {MOST} bytes")));
    }
    Ok(text)
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let text = file(path, read(path))?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let all = file(path, all)?;
    if all.is_empty() { file(path, Err("it holds no certificate")) } else { Ok(all) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Unusable> {
    let text = file(path, read(path))?;
    file(path, PrivateKeyDer::from_pem_slice(&text))
}

/// Who vouches for servers.
#[derive(Debug)]
struct Trusted {
    roots: RootCertStore,
    /// The certificates of a file, as they stand there. One of them may be the server's own: then it needs nobody to vouch for it,
    /// also if it is one of a CA, as `openssl req -x509` makes them (OpenSSL, and so Envoy, take such).
    written: Vec<CertificateDer<'static>>,
}

impl Trusted {
    fn read(path: &Path) -> Result<Self, Unusable> {
        let (mut roots, written) = (RootCertStore::empty(), chain(path)?);
        for certificate in &written {
            file(path, roots.add(certificate.clone()))?;
        }
        Ok(Self { roots, written })
    }

    /// Whether a server's certificate is one that is written, and in its time.
    fn is_written(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> Result<bool, rustls::Error> {
        if !self.written.iter().any(|written| written == certificate) {
            return Ok(false);
        }
        let malformed = CertificateError::BadEncoding;
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| malformed.clone())?;
        let (now, validity) = (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), parsed.validity());
        if now < validity.not_before.timestamp() {
            return Err(CertificateError::NotValidYet.into());
        }
        if now > validity.not_after.timestamp() {
            return Err(CertificateError::Expired.into());
        }
        let usage = parsed.extended_key_usage().map_err(|_| malformed)?;
        if usage.is_some_and(|usage| !(usage.value.any || usage.value.server_auth)) {
            return Err(CertificateError::InvalidPurpose.into());
        }
        Ok(true)
    }
}

fn system_roots() -> Result<RootCertStore, Unusable> {
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(found.certs);
    if store.is_empty() {
        let errors: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        return Err(Unusable::System(errors.join(", ")));
    }
    Ok(store)
}

/// Verifies servers' certificates.
#[derive(Debug)]
struct Verifier {
    /// Whom we trust; `None` is anybody.
    trusted: Option<Trusted>,
    /// Names of which the certificate has to have one; empty is the name that was sent.
    names: Box<[Str]>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(trusted) = &self.trusted else { return Ok(ServerCertVerified::assertion()) };
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        if !trusted.is_written(end_entity, now)? {
            let roots = &trusted.roots;
            verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, algorithms)?;
        }
        if self.names.is_empty() {
            verify_server_name(&certificate, server_name)?;
        } else if !self.names.iter().any(|name| has_name(&certificate, end_entity, name)) {
            return Err(CertificateError::NotValidForName.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether a certificate has a name: a host, an address, or a URI.
fn has_name(certificate: &ParsedCertificate<'_>, der: &CertificateDer<'_>, name: &str) -> bool {
    if !name.contains("://") {
        let name = ServerName::try_from(name);
        return name.is_ok_and(|name| verify_server_name(certificate, &name).is_ok());
    }
    let Ok((_, parsed)) = X509Certificate::from_der(der) else { return false };
    let names = parsed.subject_alternative_name().ok().flatten();
    names.is_some_and(|names| {
        names.value.general_names.iter().any(|n| matches!(n, GeneralName::URI(uri) if *uri == name))
    })
}

/// Connections with TLS over what `base` makes.
pub(crate) struct Secured {
    pub(crate) origination: Arc<Origination>,
    pub(crate) base: Arc<dyn Dial>,
    /// What is spoken inside, if that is to be told.
    pub(crate) inside: Option<Protocol>,
}

impl Dial for Secured {
    fn dial(&self, address: SocketAddr) -> Dialing {
        let (origination, inside) = (Arc::clone(&self.origination), self.inside);
        let connecting = self.base.dial(address);
        Box::pin(async move {
            let shared = Arc::clone(&origination.shared);
            let secured = async move {
                let name = origination.name()?;
                let config = origination.config(inside).await?;
                let stream = connecting.await?;
                let stream = TlsConnector::from(config).connect(name, stream).await;
                stream.inspect_err(|_| shared.stats.handshakes_failed.inc())
            };
            let stream = secured.await.inspect_err(|error: &io::Error| {
                tracing::debug!(%address, %error, "TLS to an endpoint did not begin");
            })?;
            Ok(Box::new(stream) as Box<dyn net::Io>)
        })
    }
}
