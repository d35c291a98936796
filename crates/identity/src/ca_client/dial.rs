//! Connections to the control plane: TLS by the roots of a file that may change, and errors that say what to look at.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::CertificateError;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::root_file::RootFile;

/// Where the control plane listens when an address names no port.
const DEFAULT_PORT: u16 = 15012;

/// A text that is no address of a control plane.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an address of a control plane ({reason}); for example https://culvertd.culvert-system.svc:15012"
)]
pub struct InvalidAddress {
    text: String,
    reason: &'static str,
}

/// Where a control plane is: `https://host[:port]`, or `host[:port]`. Port 15012 unless another is named.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ServerAddress {
    host: String,
    port: u16,
    name: ServerName<'static>,
}

impl ServerAddress {
    /// The host, which its certificate must name.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority())
    }
}

impl FromStr for ServerAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |reason| InvalidAddress { text: text.chars().take(300).collect(), reason };
        let rest = match text.split_once("://") {
            Some(("https", rest)) => rest,
            Some(_) => return Err(wrong("the scheme is https, because a token is sent")),
            None => text,
        };
        let uri: Uri = format!("https://{rest}").parse().map_err(|_| wrong("it can't be read"))?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || rest.contains('@') {
            return Err(wrong("nothing but host and port can be said"));
        }
        let host = uri.host().ok_or_else(|| wrong("it has no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| wrong("the host is no name"))?;
        let port = match uri.authority().map_or("", |authority| authority.as_str()).rsplit_once(':') {
            Some((_, digits)) if !digits.contains(']') => uri
                .port_u16()
                .filter(|port| *port != 0 && !digits.is_empty())
                .ok_or_else(|| wrong("the port is none"))?,
            _ => DEFAULT_PORT,
        };
        Ok(Self { host, port, name })
    }
}

/// Makes channels to one address. gRPC's own errors only say that the transport failed; why, is kept here.
#[derive(Clone, Debug)]
pub struct Dialer {
    address: Arc<ServerAddress>,
    roots: RootFile,
    timeout: Duration,
    failure: Arc<Mutex<Option<String>>>,
}

impl Dialer {
    /// Each attempt at a connection may take `timeout`.
    #[must_use]
    pub fn new(address: ServerAddress, roots: RootFile, timeout: Duration) -> Self {
        Self { address: Arc::new(address), roots, timeout, failure: Arc::default() }
    }

    /// The address.
    #[must_use]
    pub fn address(&self) -> &ServerAddress {
        &self.address
    }

    /// Why the last attempt at a connection failed, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A channel that connects when it is first used, and again after it was lost.
    #[must_use]
    pub fn channel(&self) -> Channel {
        let dialer = self.clone();
        // TLS is the dialler's: tonic is told of none, and only of the name that requests carry.
        let authority = self.address.authority();
        let plain = Endpoint::from_shared(format!("http://{authority}"));
        let endpoint = plain.unwrap_or_else(|_| Endpoint::from_static("http://control-plane.invalid"));
        let endpoint = match format!("https://{authority}").parse() {
            Ok(origin) => endpoint.origin(origin),
            Err(_) => endpoint,
        };
        endpoint
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .connect_with_connector_lazy(service_fn(move |_: Uri| {
                let dialer = dialer.clone();
                async move { dialer.dial().await.map(TokioIo::new) }
            }))
    }

    /// One attempt.
    async fn dial(&self) -> io::Result<TlsStream<TcpStream>> {
        let found = match tokio::time::timeout(self.timeout, self.connect()).await {
            Ok(found) => found,
            Err(_) => Err(format!(
                "{} does not answer within {:?}: look whether its pods are ready, and whether a NetworkPolicy keeps \
                 this pod from port {}",
                self.address, self.timeout, self.address.port
            )),
        };
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = found.as_ref().err().cloned();
        found.map_err(io::Error::other)
    }

    async fn connect(&self) -> Result<TlsStream<TcpStream>, String> {
        let address = &self.address;
        let target = (address.host.as_str(), address.port);
        let found = tokio::net::lookup_host(target).await.map_err(|e| {
            format!(
                "the name {} is not found: {e}. Look whether the Service exists, and DNS works",
                address.host
            )
        })?;
        let mut last = None;
        for ip in found {
            match TcpStream::connect(ip).await {
                Ok(tcp) => {
                    // Small messages both ways.
                    let _ = tcp.set_nodelay(true);
                    let tls = TlsConnector::from(self.roots.client_config());
                    let stream = tls.connect(address.name.clone(), tcp).await;
                    return stream.map_err(|e| self.tls_failure(&e));
                }
                Err(e) => {
                    last = Some(format!(
                        "{address} ({ip}) can't be reached: {e}. Look whether its pods are ready"
                    ));
                }
            }
        }
        Err(last.unwrap_or_else(|| format!("the name {} has no address", address.host)))
    }

    fn tls_failure(&self, error: &io::Error) -> String {
        let (address, file) = (&self.address, self.roots.path().display());
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => format!(
                "no root in {file} vouches for the certificate of {address}: compare the ConfigMap \
                 culvert-ca-root-cert (istio-ca-root-cert of an istiod) of this namespace with the one in the control \
                 plane's"
            ),
            Some(rustls::Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            )) => format!(
                "the certificate of {address} is not valid now ({error}): compare the clocks of both nodes"
            ),
            Some(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => format!(
                "the certificate of {address} is for other names ({error}): address it by one of those"
            ),
            _ => format!("TLS with {address} fails: {error}"),
        }
    }
}

/// What a gRPC error says, with the causes that it keeps apart.
pub(super) fn explained(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for (text, shown) in [
            ("https://culvertd.culvert-system.svc:15012", "https://culvertd.culvert-system.svc:15012"),
            ("culvertd.culvert-system.svc", "https://culvertd.culvert-system.svc:15012"),
            ("https://istiod.istio-system.svc:443/", "https://istiod.istio-system.svc:443"),
            ("127.0.0.1:9000", "https://127.0.0.1:9000"),
            ("https://[::1]:9000", "https://[::1]:9000"),
            ("[fd00::1]", "https://[fd00::1]:15012"),
        ] {
            let address: ServerAddress = text.parse().expect(text);
            assert_eq!(address.to_string(), shown);
        }
        for wrong in [
            "",
            "http://a:1",
            "https://",
            "a:0",
            "a:",
            "a:99999",
            "a/b",
            "https://u@a",
            "grpc://a",
            "a b",
            "a?x",
        ] {
            assert!(wrong.parse::<ServerAddress>().is_err(), "{wrong}");
        }
    }
}
