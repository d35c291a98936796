//! The way to an API server through an HTTP proxy, as kubectl takes it: `proxy-url` of the kubeconfig's cluster, else
//! `$HTTPS_PROXY`, from which `$NO_PROXY` exempts.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Uri;
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ipnet::IpNet;
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tower::{Service, ServiceBuilder};

/// For a proxy's answer.
const LIMIT: Duration = Duration::from_secs(10);
/// The head of a proxy's answer, bytes.
const HEAD_LIMIT: usize = 16 << 10;

/// A client by this configuration, through its proxy if it has one.
///
/// # Errors
/// The configuration can't be used, or its proxy is of a kind that is not spoken to.
pub fn client(mut config: Config) -> Result<Client> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let either = |name: &str| variable(name).or_else(|| variable(&name.to_ascii_lowercase()));
    let Some(proxy) = config.proxy_url.take() else { return Ok(Client::try_from(config)?) };
    let is_of_environment = either("HTTPS_PROXY").and_then(|text| text.parse().ok()) == Some(proxy.clone());
    let exempt = either("NO_PROXY").unwrap_or_default();
    if is_of_environment && is_exempt(&exempt, &config.cluster_url) {
        return Ok(Client::try_from(config)?);
    }
    let connector = config.rustls_https_connector_with_connector(Tunnel::through(&proxy)?)?;
    let http = legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// The host of a URL and its port; an IPv6 address without its brackets.
fn place(url: &Uri, default_port: u16) -> (String, u16) {
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    (host.to_ascii_lowercase(), url.port_u16().unwrap_or(default_port))
}

/// Whether a list as in `$NO_PROXY` has a server: by its name or that of a domain above it, its address or a range, each with a
/// port or without, or `*`. This machine's own addresses are always in it.
fn is_exempt(list: &str, server: &Uri) -> bool {
    let (host, port) = place(server, 443);
    let address = host.parse::<IpAddr>().ok();
    if host == "localhost" || address.is_some_and(|ip| ip.is_loopback()) {
        return true;
    }
    list.split(',').map(|entry| entry.trim().to_ascii_lowercase()).filter(|e| !e.is_empty()).any(|entry| {
        if entry == "*"
            || address.is_some_and(|ip| entry.parse::<IpNet>().is_ok_and(|range| range.contains(&ip)))
        {
            return true;
        }
        let (name, wanted) = match entry.rsplit_once(':') {
            Some((name, number)) if !name.contains(':') || name.ends_with(']') => (name, number.parse().ok()),
            _ => (entry.as_str(), None),
        };
        if wanted.is_some_and(|wanted: u16| wanted != port) {
            return false;
        }
        let name = name.trim_start_matches('[').trim_end_matches(']');
        let name = name.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(name);
        match name.strip_prefix('.') {
            // Only what is below it.
            Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')),
            None => host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')),
        }
    })
}

/// Connections through a proxy (CONNECT, RFC 9110 section 9.3.6).
#[derive(Clone, Debug)]
struct Tunnel {
    host: String,
    port: u16,
    /// `user:password`, in the form of the header.
    credentials: Option<String>,
}

impl Tunnel {
    fn through(proxy: &Uri) -> Result<Self> {
        // `proxy:3128` is read as a host and a port.
        if !matches!(proxy.scheme_str(), None | Some("http")) || proxy.host().is_none_or(str::is_empty) {
            let shown = proxy.scheme_str().unwrap_or_default();
            bail!(
                "the proxy to the API server ({shown}, proxy-url of the kubeconfig or $HTTPS_PROXY) can't be used: only \
                 http:// proxies are. Name one, or reach the server without it ($NO_PROXY; kubectl proxy and a kubeconfig \
                 for what it serves)"
            );
        }
        let (host, port) = place(proxy, 80);
        let user = proxy.authority().and_then(|a| a.as_str().rsplit_once('@')).map(|(user, _)| user);
        let credentials = user.map(|user| {
            let with_password = if user.contains(':') { user.to_owned() } else { format!("{user}:") };
            STANDARD.encode(decoded(&with_password))
        });
        Ok(Self { host, port, credentials })
    }

    async fn open(self, target: String) -> io::Result<TokioIo<TcpStream>> {
        let proxy = format!("{}:{}", self.host, self.port);
        let named = |error: io::Error| io::Error::new(error.kind(), format!("proxy {proxy}: {error}"));
        let mut stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(named)?;
        let authorization =
            self.credentials.map_or(String::new(), |c| format!("Proxy-Authorization: Basic {c}\r\n"));
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n");
        stream.write_all(request.as_bytes()).await.map_err(named)?;
        // One by one: what is behind the head is the server's.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= HEAD_LIMIT {
                return Err(named(io::Error::other("its answer to CONNECT has no end")));
            }
            head.push(stream.read_u8().await.map_err(named)?);
        }
        let head = String::from_utf8_lossy(&head);
        let status = head.lines().next().unwrap_or_default();
        let mut words = status.split(' ');
        let is_http = words.next().is_some_and(|version| version.starts_with("HTTP/1."));
        if !(is_http && words.next().is_some_and(|code| code.len() == 3 && code.starts_with('2'))) {
            return Err(named(io::Error::other(format!("it answered CONNECT {target} with {status:?}"))));
        }
        Ok(TokioIo::new(stream))
    }
}

impl Service<Uri> for Tunnel {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let plain = server.scheme_str() == Some("http");
        let (host, port) = place(&server, if plain { 80 } else { 443 });
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let opened = self.clone().open(format!("{host}:{port}"));
        Box::pin(async move {
            let late = || io::Error::new(io::ErrorKind::TimedOut, "the proxy did not connect in time");
            timeout(LIMIT, opened).await.unwrap_or_else(|_| Err(late()))
        })
    }
}

/// RFC 3986 section 2.1; what is no escape stays.
fn decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escaped = (*first == b'%').then(|| after.get(..2)).flatten();
        let byte = escaped.and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { after.get(2..).unwrap_or_default() } else { after };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_exempt_is_reached_directly() {
        let exempt = |list: &str, server: &str| is_exempt(list, &server.parse().unwrap());
        for (list, server) in [
            ("", "https://localhost:6443"),
            ("", "https://127.0.0.2:6443"),
            ("", "https://[::1]:6443"),
            ("*", "https://api.example.com"),
            ("a.test, example.com", "https://api.example.com:6443"),
            ("example.com", "https://EXAMPLE.com"),
            (".example.com", "https://api.example.com"),
            ("*.example.com", "https://api.example.com"),
            ("example.com:443", "https://api.example.com"),
            ("10.0.0.0/8", "https://10.1.2.3:6443"),
            ("10.1.2.3", "https://10.1.2.3:6443"),
            ("fd00::/8", "https://[fd00::1]:6443"),
            ("fd00::1", "https://[fd00::1]:6443"),
            ("[fd00::1]:6443", "https://[fd00::1]:6443"),
        ] {
            assert!(exempt(list, server), "{list} {server}");
        }
        for (list, server) in [
            ("", "https://api.example.com"),
            ("example.com", "https://notexample.com"),
            (".example.com", "https://example.com"),
            ("example.com:6443", "https://api.example.com"),
            ("10.0.0.0/8", "https://11.0.0.1"),
            ("10.0.0.0/33,x/8,/", "https://10.0.0.1"),
            ("0.0.0.0/0", "https://[fd00::1]"),
            ("fd00::1", "https://[fd00::2]"),
        ] {
            assert!(!exempt(list, server), "{list} {server}");
        }
    }

    #[test]
    fn proxies_are_named_with_and_without_a_scheme() {
        let tunnel = |text: &str| Tunnel::through(&text.parse().unwrap());
        let of = |text: &str| tunnel(text).map(|t| (t.host, t.port, t.credentials)).unwrap();
        assert_eq!(of("http://proxy.test:3128"), ("proxy.test".to_owned(), 3128, None));
        assert_eq!(of("proxy.test:3128").1, 3128);
        assert_eq!(of("http://[fd00::1]"), ("fd00::1".to_owned(), 80, None));
        let known = of("http://me:p%40ss@proxy.test");
        assert_eq!(known.2.as_deref(), Some(STANDARD.encode("me:p@ss").as_str()));
        for other in ["socks5://proxy.test:1080", "https://me:secret@proxy.test"] {
            let said = tunnel(other).unwrap_err().to_string();
            assert!(said.contains("NO_PROXY") && !said.contains("secret"), "{said}");
        }
        assert_eq!(decoded("a%2Fb%zz%4"), b"a/b%zz%4");
    }
}
