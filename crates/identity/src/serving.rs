//! The certificate that a server shows to clients that show none: the control plane, to proxies and to the API server.
//! It is exchanged while the server runs; connections that are open keep the one that they began with.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use rustls::ServerConfig;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;

use crate::clock::Clock;
use crate::issuer::Issued;
use crate::tls::crypto_provider;

/// A certificate with its key that is shown from the next handshake on. Clones share it. Without one, handshakes fail.
#[derive(Clone, Debug, Default)]
pub struct ServingKey(Arc<ArcSwapOption<CertifiedKey>>);

impl ServingKey {
    /// Shows this one from now on.
    ///
    /// # Errors
    /// Key and certificate don't belong together.
    pub fn set(&self, issued: Issued) -> Result<(), rustls::Error> {
        let key = CertifiedKey::from_der(issued.chain, issued.key, &crypto_provider())?;
        self.0.store(Some(Arc::new(key)));
        Ok(())
    }

    /// Whether there is one.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load().is_some()
    }

    /// TLS 1.3 with it, no certificate asked of clients, nothing resumed. `alpn` in the order of preference.
    ///
    /// # Errors
    /// The library does not know the protocol version, which does not happen.
    pub fn server_config(&self, alpn: &[&[u8]], clock: &Clock) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut config = ServerConfig::builder_with_details(crypto_provider(), clock.provider())
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(self.clone()));
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for ServingKey {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}
