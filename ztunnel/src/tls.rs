//! TLS as one of this node's pods: handshakes with their failures put in the data plane's words.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use identity::{Certificates, ExpectedPeers, HandshakeError, HandshakeLimits, TlsStream, TrustBundle};
use model::SpiffeId;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::proxy::failure::Failure;

/// The certificates of this node's pods, and whom they trust. Clones share them.
#[derive(Clone)]
pub struct Tls {
    certificates: Arc<Certificates>,
    limits: HandshakeLimits,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    done: AtomicU64,
    failed: AtomicU64,
}

impl Tls {
    /// Handshakes with `certificates`.
    pub fn new(certificates: Arc<Certificates>) -> Self {
        Self { certificates, limits: HandshakeLimits::default(), counts: Arc::default() }
    }

    /// Whom we trust.
    pub fn bundle(&self) -> &TrustBundle {
        self.certificates.bundle()
    }

    /// The certificates.
    pub fn certificates(&self) -> &Arc<Certificates> {
        &self.certificates
    }

    /// Accepts a connection as `own`.
    ///
    /// # Errors
    /// See [`HandshakeError`].
    pub async fn accept(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        own: &SpiffeId,
    ) -> Result<TlsStream<TcpStream>, Failure> {
        let accepted = identity::accept(stream, &self.certificates, own, self.limits).await;
        self.counted(accepted).map_err(|e| failure(peer, own, &e))
    }

    /// Connects as `own` to one of `expected`.
    ///
    /// # Errors
    /// See [`HandshakeError`].
    pub async fn connect(
        &self,
        stream: TcpStream,
        to: SocketAddr,
        own: &SpiffeId,
        expected: ExpectedPeers,
    ) -> Result<TlsStream<TcpStream>, Failure> {
        let connected = identity::connect(stream, &self.certificates, own, expected, self.limits).await;
        self.counted(connected).map_err(|e| failure(to, own, &e))
    }

    fn counted<T, E>(&self, outcome: Result<T, E>) -> Result<T, E> {
        let count = if outcome.is_ok() { &self.counts.done } else { &self.counts.failed };
        count.fetch_add(1, Ordering::Relaxed);
        outcome
    }

    /// Handshakes that succeeded.
    pub fn handshakes(&self) -> u64 {
        self.counts.done.load(Ordering::Relaxed)
    }

    /// Handshakes that failed.
    pub fn failed_handshakes(&self) -> u64 {
        self.counts.failed.load(Ordering::Relaxed)
    }

    /// The certificates as JSON, for `/config_dump`.
    pub fn dump(&self) -> Value {
        let status = |s: identity::CertificateStatus| {
            let certificate = s.certificate.map(|c| {
                json!({
                    "serial": c.serial,
                    "notBefore": c.not_before.to_string(),
                    "notAfter": c.not_after.to_string(),
                    "renewAt": c.renew_at.to_string(),
                    "root": c.root.to_string(),
                })
            });
            json!({ "identity": s.id.to_string(), "valid": s.valid, "certificate": certificate, "failure": s.failure })
        };
        let bundle = self.bundle().snapshot();
        json!({
            "workloads": self.certificates.status().into_iter().map(status).collect::<Vec<_>>(),
            "roots": bundle.roots().iter().map(|r| json!({
                "id": r.id.to_string(), "subject": r.subject,
                "notAfter": identity::Timestamp(r.not_after).to_string(),
            })).collect::<Vec<_>>(),
            "generation": bundle.generation(),
        })
    }
}

fn failure(to: SocketAddr, own: &SpiffeId, error: &HandshakeError) -> Failure {
    match error {
        HandshakeError::OwnCertificate(reason) => Failure::Identity(own.clone(), reason.to_string()),
        other => Failure::Tls { to, reason: other.to_string() },
    }
}
