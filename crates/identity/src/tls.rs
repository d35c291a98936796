//! TLS configuration: version 1.3 only, ALPN `h2`, both sides authenticated, no server name sent, nothing resumed.
//!
//! A configuration is made for each handshake: it carries the verifier, which knows who is expected and keeps what
//! it found. Its parts are shared, so this costs a few microseconds beside the hundreds of a handshake.

use std::sync::{Arc, LazyLock};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};

use crate::clock::Clock;
use crate::verify::HandshakeVerifier;

/// The one protocol spoken inside (RFC 9113, section 3.1).
pub const ALPN_H2: &[u8] = b"h2";

/// The cryptography: aws-lc-rs, hybrid post-quantum key exchange first.
pub(crate) fn crypto_provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
                aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
                aws_lc_rs::kx_group::SECP384R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    PROVIDER.clone()
}

/// Presents one certificate, whatever the peer asks for.
#[derive(Debug)]
struct OwnKey(Arc<CertifiedKey>);

impl ResolvesServerCert for OwnKey {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for OwnKey {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

pub(crate) fn server_config(
    own: &Arc<CertifiedKey>,
    verifier: Arc<HandshakeVerifier>,
    clock: &Clock,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_details(crypto_provider(), clock.provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(OwnKey(own.clone())));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    // A ticket would outlive what it was given for: a changed policy, identity or root. None are given.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

pub(crate) fn client_config(
    own: &Arc<CertifiedKey>,
    verifier: Arc<HandshakeVerifier>,
    clock: &Clock,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut config = ClientConfig::builder_with_details(crypto_provider(), clock.provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(OwnKey(own.clone())));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}
