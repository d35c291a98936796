//! The connection to a server: TLS, token, keep-alive. Files are read at each connect, so that a rotated root or
//! token is used at the next.

use std::io::Read;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Uri};

use super::{InvalidSettings, Settings};

/// Root and token files that are longer are refused.
const FILE_BYTES: u64 = 1 << 20;
/// How much of a stream may be under way: a first state has tens of MB.
const WINDOW: u32 = 4 << 20;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("can't read {path}: {source}")]
    File { path: String, source: std::io::Error },
    #[error("{0} holds no PEM certificate")]
    NoCertificate(String),
    #[error("{0} holds no token: it has characters that no header may have, or nothing")]
    NoToken(String),
    #[error("a file of root certificates is needed")]
    NoRoot,
    #[error("{}", chain(.0))]
    Transport(#[from] tonic::transport::Error),
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let inner = error.to_string();
        // Some repeat what they wrap.
        if !text.ends_with(&inner) {
            text = format!("{text}: {inner}");
        }
        source = error.source();
    }
    text
}

/// Reads an address.
pub(super) fn address(text: &str) -> Result<Uri, InvalidSettings> {
    let invalid = || InvalidSettings::Address(text.to_owned());
    let uri: Uri = text.parse().map_err(|_| invalid())?;
    let known = matches!(uri.scheme_str(), Some("https" | "http"));
    if !known || uri.host().is_none_or(str::is_empty) || uri.port_u16().is_none() {
        return Err(invalid());
    }
    Ok(uri)
}

fn read(path: &Path) -> Result<Vec<u8>, ConnectError> {
    let error = |source| ConnectError::File { path: path.display().to_string(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(error)?;
    file.take(FILE_BYTES + 1).read_to_end(&mut bytes).map_err(error)?;
    if bytes.len() as u64 > FILE_BYTES {
        return Err(error(std::io::Error::other(format!("it has more than {FILE_BYTES} bytes"))));
    }
    Ok(bytes)
}

/// A server whose machine is gone says nothing, and until that is known there is nothing new: pods that come are strangers, to
/// whom what is said is in plaintext. TCP's own probes may be more frequent than HTTP/2's, which an istiod counts.
const PROBE_AFTER: Duration = Duration::from_secs(5);
const PROBE_EVERY: Duration = Duration::from_secs(2);
const PROBES: u32 = 3;

/// Connects.
pub(super) async fn connect(settings: &Settings, address: &Uri) -> Result<Channel, ConnectError> {
    let mut endpoint = Endpoint::from(address.clone())
        .connect_timeout(settings.connect_timeout)
        .http2_keep_alive_interval(settings.keepalive)
        .keep_alive_timeout(settings.keepalive_timeout)
        .keep_alive_while_idle(true)
        .tcp_keepalive(Some(PROBE_AFTER))
        .tcp_keepalive_interval(Some(PROBE_EVERY))
        .tcp_keepalive_retries(Some(PROBES))
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    if address.scheme_str() == Some("https") {
        endpoint = endpoint.tls_config(tls(settings)?)?;
    }
    Ok(endpoint.connect().await?)
}

fn tls(settings: &Settings) -> Result<ClientTlsConfig, ConnectError> {
    let path = settings.root_file.as_ref().ok_or(ConnectError::NoRoot)?;
    let pem = read(path)?;
    // What is no certificate is passed over by rustls, and without one every server would look untrusted.
    if !pem.windows(27).any(|w| w == b"-----BEGIN CERTIFICATE-----") {
        return Err(ConnectError::NoCertificate(path.display().to_string()));
    }
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)).timeout(settings.connect_timeout);
    Ok(match &settings.server_name {
        Some(name) => tls.domain_name(name),
        None => tls,
    })
}

/// The value of the header `authorization`, if there is a token and this server may see it.
pub(super) fn token(
    settings: &Settings,
    address: &Uri,
) -> Result<Option<MetadataValue<Ascii>>, ConnectError> {
    let Some(path) = &settings.token_file else { return Ok(None) };
    if address.scheme_str() != Some("https") && !is_loopback(address) {
        tracing::warn!(%address, "the token is not sent in plaintext");
        return Ok(None);
    }
    let bytes = read(path)?;
    let none = || ConnectError::NoToken(path.display().to_string());
    let token = std::str::from_utf8(&bytes).map_err(|_| none())?.trim();
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(none());
    }
    let mut value: MetadataValue<Ascii> = format!("Bearer {token}").parse().map_err(|_| none())?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn is_loopback(address: &Uri) -> bool {
    let host = address.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_scheme_host_and_port() {
        for good in
            ["https://culvertd.culvert-system.svc:15012", "http://127.0.0.1:15010", "https://[::1]:15012"]
        {
            assert!(address(good).is_ok(), "{good}");
        }
        for bad in ["", "culvertd:15012", "https://culvertd", "unix:///run/x", "https://:15012", "ftp://a:1"]
        {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_goes_in_plaintext_to_loopback_only() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc\n").unwrap();
        let settings = Settings { token_file: Some(file.path().to_owned()), ..Settings::default() };
        let sent = |address: &str| token(&settings, &address.parse().unwrap()).unwrap().is_some();
        assert!(sent("https://culvertd.culvert-system.svc:15012"));
        assert!(sent("http://127.0.0.1:15010") && sent("http://[::1]:15010") && sent("http://localhost:1"));
        assert!(!sent("http://culvertd.culvert-system.svc:15010") && !sent("http://10.0.0.1:15010"));
    }

    #[test]
    fn bad_files_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let settings = Settings {
            token_file: Some(file.path().to_owned()),
            root_file: Some(file.path().to_owned()),
            ..Settings::default()
        };
        let address = "https://a:1".parse().unwrap();
        let name = file.path().display().to_string();
        for content in ["", " \n", "a\nb", "t\u{f6}ken"] {
            std::fs::write(file.path(), content).unwrap();
            let error = token(&settings, &address).unwrap_err().to_string();
            assert!(error.contains(&name), "{content:?}: {error}");
        }
        assert!(tls(&settings).unwrap_err().to_string().contains(&name));
        let gone = Settings { token_file: Some("/nowhere/token".into()), ..Settings::default() };
        assert!(token(&gone, &address).unwrap_err().to_string().contains("/nowhere/token"));
    }
}
