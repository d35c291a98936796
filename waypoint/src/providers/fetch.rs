//! Small documents of others, over HTTP or HTTPS: an issuer's keys. Each fetch has a time limit and a size limit; a
//! redirect is not followed, since it could lead anywhere.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Collected, Empty, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use model::TlsVersion;
use model::telemetry::Collector;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::telemetry::Connect;
use crate::upstream::tls::versions;

/// The largest document that is read.
const MAX_DOCUMENT: usize = 1 << 20;

/// Why a document did not come.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The URL has no host, or is neither of HTTP nor of HTTPS.
    #[error("{0:?} is no URL of http or https")]
    Url(String),
    /// It took too long.
    #[error("no whole answer within {0:?}")]
    Timeout(Duration),
    /// No connection, or no TLS.
    #[error("connecting to {0} failed: {1}")]
    Connect(String, #[source] io::Error),
    /// What came is no HTTP.
    #[error("the answer is no HTTP: {0}")]
    Http(#[from] hyper::Error),
    /// Something else than the document came.
    #[error("the answer has the status {0}")]
    Status(StatusCode),
    /// It is too large, or broke off.
    #[error("the document did not come whole, or has more than {MAX_DOCUMENT} bytes: {0}")]
    Body(String),
    /// It says something else than it should.
    #[error("{0}")]
    Content(String),
}

/// A document that is on its way.
pub type Fetching = Pin<Box<dyn Future<Output = Result<Bytes, FetchError>> + Send>>;

/// Fetches documents.
pub trait Fetch: Send + Sync + 'static {
    /// Fetches the document of `url`, within `limit`.
    fn fetch(&self, url: &str, limit: Duration) -> Fetching;

    /// The least version of TLS that servers have to speak from now on.
    fn require(&self, _minimum: TlsVersion) {}
}

/// Fetches over the network: through the mesh from hosts that it knows, past it from others, as most issuers are.
pub struct Network {
    /// For TLS 1.2 and above, and for 1.3 alone.
    tls: [Arc<ClientConfig>; 2],
    only_tls13: AtomicBool,
    inside: Option<Arc<dyn Connect>>,
}

impl Network {
    /// Trusts what the system trusts (`SSL_CERT_FILE`, or the distribution's bundle). `inside` reaches hosts of the mesh.
    ///
    /// # Errors
    /// When the cryptography can't be set up.
    pub fn new(inside: Option<Arc<dyn Connect>>) -> Result<Self, rustls::Error> {
        let mut roots = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "certificates of the system can't be read");
        }
        let (added, _) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            tracing::warn!(
                "the system trusts no certificate authority: keys can be fetched over http only; set SSL_CERT_FILE"
            );
        }
        Self::trusting(roots, inside)
    }

    /// Trusts `roots`.
    ///
    /// # Errors
    /// When the cryptography can't be set up.
    pub fn trusting(roots: RootCertStore, inside: Option<Arc<dyn Connect>>) -> Result<Self, rustls::Error> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = Arc::new(roots);
        let of = |only_tls13| {
            let builder = ClientConfig::builder_with_provider(Arc::clone(&provider));
            let builder = builder.with_protocol_versions(versions(only_tls13))?;
            let mut tls = builder.with_root_certificates(Arc::clone(&roots)).with_no_client_auth();
            tls.alpn_protocols = vec![b"http/1.1".to_vec()];
            Ok::<_, rustls::Error>(Arc::new(tls))
        };
        Ok(Self { tls: [of(false)?, of(true)?], only_tls13: AtomicBool::new(false), inside })
    }
}

impl Fetch for Network {
    fn fetch(&self, url: &str, limit: Duration) -> Fetching {
        let [any, only_tls13] = &self.tls;
        let tls = if self.only_tls13.load(Ordering::Relaxed) { only_tls13 } else { any };
        let (url, tls, inside) = (url.to_owned(), Arc::clone(tls), self.inside.clone());
        Box::pin(async move {
            let got = tokio::time::timeout(limit, get(&url, tls, inside)).await;
            got.unwrap_or(Err(FetchError::Timeout(limit)))
        })
    }

    fn require(&self, minimum: TlsVersion) {
        self.only_tls13.store(minimum >= TlsVersion::V1_3, Ordering::Relaxed);
    }
}

async fn get(
    url: &str,
    tls: Arc<ClientConfig>,
    inside: Option<Arc<dyn Connect>>,
) -> Result<Bytes, FetchError> {
    let bad = || FetchError::Url(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| bad())?;
    let secure = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(bad()),
    };
    // An IPv6 address stands in brackets.
    let host = uri.host().ok_or_else(bad)?.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let failed = |error| FetchError::Connect(format!("{host}:{port}"), error);
    let stream = connect(host, port, inside).await.map_err(failed)?;
    if !secure {
        return exchange(stream, &uri).await;
    }
    let name = ServerName::try_from(host.to_owned()).map_err(|error| failed(io::Error::other(error)))?;
    let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(failed)?;
    exchange(stream, &uri).await
}

/// Through the mesh, if it knows the host; a host that it knows is not reached past it.
async fn connect(host: &str, port: u16, inside: Option<Arc<dyn Connect>>) -> io::Result<Box<dyn net::Io>> {
    if let Some(inside) = inside {
        let host = host.to_ascii_lowercase().as_str().into();
        let to = Collector { provider: "issuer".into(), namespace: None, host, port };
        match inside.connect(&to).await {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotConnected) => {}
            result => return result,
        }
    }
    let stream = TcpStream::connect((host, port)).await?;
    Ok(Box::new(stream))
}

async fn exchange<S>(stream: S, uri: &Uri) -> Result<Bytes, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    // User information is not for others to read.
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let request = Request::get(path)
        .header(header::HOST, authority)
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, "culvert")
        .body(Empty::<Bytes>::new());
    let request = request.map_err(|_| FetchError::Url(uri.to_string()))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_DOCUMENT).collect().await;
        body.map(Collected::to_bytes).map_err(|error| {
            let large = error.downcast_ref::<LengthLimitError>().is_some();
            FetchError::Body(if large { "it is too large".to_owned() } else { error.to_string() })
        })
    };
    let answer = answer.await;
    driver.abort();
    answer
}
