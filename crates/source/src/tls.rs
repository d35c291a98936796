//! TLS as a workload: handshakes, and whether a peer is still trusted after the roots have changed.
//!
//! # Roots that go
//! A connection that was secured under a root that is no longer trusted may go on only if its peer has proved the
//! same identity again, from the same address, under a root that is. After a change of the bundle the dialling side
//! makes a new connection to each peer that it has tunnels to, which proves both ends to each other; the accepting
//! side waits [`REAUTHENTICATION`] for that before it cuts. So an exchange of roots in stages loses no connection,
//! and a peer that holds nothing but a certificate of the old root is out after that time.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use identity::{
    CertificateError, Certificates, Distrust, ExpectedPeers, HandshakeError, HandshakeLimits, PeerInfo,
    RootId, TlsStream, TrustBundle,
};
use model::SpiffeId;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// The certificates of the workloads that this process stands for, and whom they trust. Clones share them: each connection
/// has one.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    certificates: Arc<Certificates>,
    limits: HandshakeLimits,
    counts: Counts,
    proofs: Mutex<Proofs>,
    changed: Mutex<Option<Instant>>,
}

/// How long a peer has to prove itself again after the roots have changed.
pub const REAUTHENTICATION: Duration = Duration::from_secs(3);
/// Peers whose last proof is remembered; beyond, all are forgotten, which at worst cuts more than necessary.
const PROOFS: usize = 65_536;

/// Who a peer was when it last proved itself, by identity and address.
type Proofs = HashMap<(SpiffeId, IpAddr), PeerInfo>;

#[derive(Debug, Default)]
struct Counts {
    done: AtomicU64,
    failed: AtomicU64,
}

impl Tls {
    /// Handshakes with `certificates`.
    #[must_use]
    pub fn new(certificates: Arc<Certificates>) -> Self {
        Self(Arc::new(Inner {
            certificates,
            limits: HandshakeLimits::default(),
            counts: Counts::default(),
            proofs: Mutex::default(),
            changed: Mutex::default(),
        }))
    }

    /// Whom we trust.
    #[must_use]
    pub fn bundle(&self) -> &TrustBundle {
        self.0.certificates.bundle()
    }

    /// The certificates.
    #[must_use]
    pub fn certificates(&self) -> &Arc<Certificates> {
        &self.0.certificates
    }

    /// Accepts a connection from `peer` as `own`.
    ///
    /// # Errors
    /// See [`HandshakeError`].
    pub async fn accept(
        &self,
        stream: TcpStream,
        peer: IpAddr,
        own: &SpiffeId,
    ) -> Result<TlsStream<TcpStream>, HandshakeError> {
        let accepted = identity::accept(stream, &self.0.certificates, own, self.0.limits).await;
        self.counted(peer, accepted)
    }

    /// Connects as `own` to one of `expected`, over a connection to the address `to`.
    ///
    /// # Errors
    /// See [`HandshakeError`].
    pub async fn connect(
        &self,
        stream: TcpStream,
        to: IpAddr,
        own: &SpiffeId,
        expected: ExpectedPeers,
    ) -> Result<TlsStream<TcpStream>, HandshakeError> {
        let connected =
            identity::connect_corked(stream, &self.0.certificates, own, expected, self.0.limits).await;
        self.counted(to, connected)
    }

    fn counted<T, E>(&self, peer: IpAddr, outcome: Result<TlsStream<T>, E>) -> Result<TlsStream<T>, E> {
        match &outcome {
            Ok(stream) => {
                self.0.counts.done.fetch_add(1, Ordering::Relaxed);
                let info = stream.peer();
                let mut proofs = self.0.proofs.lock().unwrap_or_else(PoisonError::into_inner);
                if proofs.len() >= PROOFS {
                    proofs.clear();
                }
                proofs.insert((info.id.clone(), peer), info.clone());
            }
            Err(_) => {
                self.0.counts.failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        outcome
    }

    /// Whether the peer's chain is no longer valid: what it opened may go on, it opens nothing more.
    #[must_use]
    pub fn is_expired(&self, info: &PeerInfo) -> bool {
        info.not_after < self.0.certificates.clock().now()
    }

    /// Says that the roots have changed: peers have [`REAUTHENTICATION`] from now.
    pub fn roots_changed(&self) {
        *self.0.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn is_reauthenticating(&self) -> bool {
        let changed = *self.0.changed.lock().unwrap_or_else(PoisonError::into_inner);
        // A change that was not announced yet has just happened.
        changed.is_none_or(|at| at.elapsed() < REAUTHENTICATION)
    }

    /// Whether the peer at `address`, which proved itself as `info` once, is still to be trusted, or has time left to
    /// prove itself anew.
    ///
    /// # Errors
    /// It isn't, and has not proved itself anew.
    pub fn trusts(&self, info: &PeerInfo, address: IpAddr) -> Result<(), Distrust> {
        let distrust = match self.bundle().still_trusts(info) {
            Ok(()) => return Ok(()),
            Err(distrust) => distrust,
        };
        if self.is_reauthenticating() {
            return Ok(());
        }
        let proofs = self.0.proofs.lock().unwrap_or_else(PoisonError::into_inner);
        match proofs.get(&(info.id.clone(), address)) {
            Some(anew) if self.bundle().still_trusts(anew).is_ok() => Ok(()),
            _ => Err(distrust),
        }
    }

    /// Whether the CA says that this process may speak for `id`, where nobody is there to ask for proof; by which root.
    ///
    /// # Errors
    /// There is no certificate that whoever trusts whom we trust would accept.
    pub async fn vouched(&self, id: &SpiffeId) -> Result<RootId, CertificateError> {
        let root = self.0.certificates.get(id).await?.root();
        match self.bundle().snapshot().root(&root) {
            Some(_) => Ok(root),
            None => Err(CertificateError::NotIssued {
                id: id.clone(),
                reason: format!("the one that there is leads to the root {root}, which is not trusted")
                    .into(),
                attempts: 0,
            }),
        }
    }

    /// Whether it still does for `id`, which was vouched for by `root`, or there is time left for another certificate.
    #[must_use]
    pub fn is_still_vouched(&self, id: &SpiffeId, root: &RootId) -> bool {
        let bundle = self.bundle().snapshot();
        let trusted = |root: &RootId| bundle.root(root).is_some();
        trusted(root)
            || self.is_reauthenticating()
            || self.0.certificates.root_of(id).as_ref().is_some_and(trusted)
    }

    /// Handshakes that succeeded.
    #[must_use]
    pub fn handshakes(&self) -> u64 {
        self.0.counts.done.load(Ordering::Relaxed)
    }

    /// Handshakes that failed.
    #[must_use]
    pub fn failed_handshakes(&self) -> u64 {
        self.0.counts.failed.load(Ordering::Relaxed)
    }

    /// The certificates as JSON, for `/config_dump`.
    #[must_use]
    pub fn dump(&self) -> Value {
        let status = |s: identity::CertificateStatus| {
            let c = s.certificate.as_ref();
            json!({
                "identity": s.id.to_string(),
                "valid": s.valid,
                "failure": s.failure,
                "serial": c.map(|c| &c.serial),
                "notBefore": c.map(|c| c.not_before.to_string()),
                "notAfter": c.map(|c| c.not_after.to_string()),
                "renewAt": c.map(|c| c.renew_at.to_string()),
                "root": c.map(|c| c.root.to_string()),
            })
        };
        let bundle = self.bundle().snapshot();
        json!({
            "workloads": self.0.certificates.status().into_iter().map(status).collect::<Vec<_>>(),
            "roots": bundle.roots().iter().map(|r| json!({
                "id": r.id.to_string(), "subject": r.subject,
                "notAfter": identity::Timestamp(r.not_after).to_string(),
            })).collect::<Vec<_>>(),
            "generation": bundle.generation(),
        })
    }
}
