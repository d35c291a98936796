//! Judges the certificate of a peer.
//!
//! A peer is accepted if its chain leads to a root of the [`TrustBundle`], every certificate of the chain is valid
//! now and for this use, the leaf has exactly one URI SAN, that one is a SPIFFE ID of the mesh's trust domain or an
//! alias of it, and, where the caller expects certain peers, it is one of those.

use std::sync::{Arc, OnceLock};

use model::{InvalidIdentity, SpiffeId, TrustDomain, TrustDomains};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, PeerIncompatible, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::KeyUsage;

use crate::clock::Timestamp;
use crate::trust::{TrustBundle, TrustSnapshot};
use crate::x509::{Facts, RootId, not_after, shown, svid};

/// A chain longer than this is refused unread.
const MAX_CHAIN: usize = 8;

/// Why a peer's certificate was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It presented none.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// It can't be read.
    #[error("the peer's certificate can't be read: {0}")]
    Malformed(String),
    /// It sent more certificates than any sane chain has.
    #[error("the peer's chain has {0} certificates, at most {MAX_CHAIN} are read")]
    LongChain(usize),
    /// A certificate of the chain has expired.
    #[error("a certificate of the peer's chain ({subject}) expired at {not_after}; it is {now} here")]
    Expired {
        /// Whose it is.
        subject: String,
        /// When it expired.
        not_after: Timestamp,
        /// This node's clock.
        now: Timestamp,
    },
    /// A certificate of the chain is not valid yet.
    #[error(
        "a certificate of the peer's chain ({subject}) is not valid before {not_before}; it is {now} here: \
         compare the clocks of the two nodes"
    )]
    NotYetValid {
        /// Whose it is.
        subject: String,
        /// When it begins to be valid.
        not_before: Timestamp,
        /// This node's clock.
        now: Timestamp,
    },
    /// No root of the bundle vouches for it.
    #[error("the peer's certificate was issued by {issuer:?}, which no root of the trust bundle vouches for")]
    ForeignCa {
        /// The issuer that the leaf names.
        issuer: String,
    },
    /// It may not be used for this side of TLS.
    #[error("the peer's certificate may not be used here: {0}")]
    WrongUse(String),
    /// The chain is not acceptable for another reason.
    #[error("the peer's chain is not valid: {0}")]
    BadChain(String),
    /// It names no workload.
    #[error("the peer's certificate ({subject}) has no URI among its alternative names, so no SPIFFE ID")]
    NoSpiffeId {
        /// Its subject.
        subject: String,
    },
    /// It names several workloads.
    #[error("the peer's certificate has {count} URIs among its alternative names; an SVID has exactly one")]
    SeveralUris {
        /// How many.
        count: usize,
    },
    /// The name is not one that the mesh gives.
    #[error("the peer's certificate names no workload of this mesh: {0}")]
    InvalidSpiffeId(#[source] InvalidIdentity),
    /// It is of another mesh.
    #[error("{id} is not of the trust domain {own} or one of its aliases")]
    WrongTrustDomain {
        /// The peer.
        id: SpiffeId,
        /// The mesh's trust domain.
        own: TrustDomain,
    },
    /// It is not who should answer there.
    #[error("the peer is {id}, expected {expected}")]
    UnexpectedPeer {
        /// The peer.
        id: SpiffeId,
        /// Who was expected.
        expected: ExpectedPeers,
    },
}

impl PeerError {
    /// A short constant for metrics and log fields.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Malformed(_) => "malformed_certificate",
            Self::LongChain(_) | Self::BadChain(_) => "bad_chain",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::ForeignCa { .. } => "foreign_ca",
            Self::WrongUse(_) => "wrong_use",
            Self::NoSpiffeId { .. } => "no_spiffe_id",
            Self::SeveralUris { .. } => "several_uris",
            Self::InvalidSpiffeId(_) => "invalid_spiffe_id",
            Self::WrongTrustDomain { .. } => "wrong_trust_domain",
            Self::UnexpectedPeer { .. } => "unexpected_peer",
        }
    }

    /// The form in which rustls refuses the handshake, chosen for the alert that the peer then gets.
    fn for_rustls(&self) -> rustls::Error {
        match self {
            Self::NoCertificate => rustls::Error::NoCertificatesPresented,
            Self::Expired { .. } => CertificateError::Expired.into(),
            Self::NotYetValid { .. } => CertificateError::NotValidYet.into(),
            Self::ForeignCa { .. } => CertificateError::UnknownIssuer.into(),
            Self::Malformed(_) => CertificateError::BadEncoding.into(),
            Self::WrongUse(_) => CertificateError::InvalidPurpose.into(),
            Self::WrongTrustDomain { .. } | Self::UnexpectedPeer { .. } => {
                CertificateError::ApplicationVerificationFailure.into()
            }
            Self::LongChain(_)
            | Self::BadChain(_)
            | Self::NoSpiffeId { .. }
            | Self::SeveralUris { .. }
            | Self::InvalidSpiffeId(_) => CertificateError::Other(OtherError(Arc::new(self.clone()))).into(),
        }
    }
}

/// Who may answer a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ExpectedPeers {
    /// Anyone of the mesh. Only right where the answer's content does not depend on who gives it.
    AnyOfMesh,
    /// Exactly this workload.
    One(SpiffeId),
    /// One of these.
    OneOf(Arc<[SpiffeId]>),
}

impl ExpectedPeers {
    /// Whether `id` is expected. Trust domains that are aliases of each other count as one.
    #[must_use]
    pub fn include(&self, id: &SpiffeId, domains: &TrustDomains) -> bool {
        let same = |expected: &SpiffeId| {
            expected.namespace() == id.namespace()
                && expected.service_account() == id.service_account()
                && (expected.trust_domain() == id.trust_domain()
                    || (domains.includes(expected.trust_domain()) && domains.includes(id.trust_domain())))
        };
        match self {
            Self::AnyOfMesh => true,
            Self::One(expected) => same(expected),
            Self::OneOf(expected) => expected.iter().any(same),
        }
    }
}

impl From<SpiffeId> for ExpectedPeers {
    fn from(id: SpiffeId) -> Self {
        Self::One(id)
    }
}

impl FromIterator<SpiffeId> for ExpectedPeers {
    fn from_iter<I: IntoIterator<Item = SpiffeId>>(ids: I) -> Self {
        Self::OneOf(ids.into_iter().collect())
    }
}

impl std::fmt::Display for ExpectedPeers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 4;
        match self {
            Self::AnyOfMesh => f.write_str("anyone of the mesh"),
            Self::One(id) => write!(f, "{id}"),
            Self::OneOf(ids) if ids.is_empty() => f.write_str("nobody"),
            Self::OneOf(ids) => {
                f.write_str("one of ")?;
                for (index, id) in ids.iter().take(SHOWN).enumerate() {
                    write!(f, "{}{id}", if index == 0 { "" } else { ", " })?;
                }
                match ids.len().saturating_sub(SHOWN) {
                    0 => Ok(()),
                    more => write!(f, " and {more} more"),
                }
            }
        }
    }
}

/// Which end of the connection the judged certificate is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    Client,
    Server,
}

/// A peer whose chain was verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct VerifiedPeer {
    pub(crate) id: SpiffeId,
    pub(crate) root: RootId,
    /// The first moment at which a certificate of the chain, the root included, is no longer valid.
    pub(crate) not_after: UnixTime,
}

/// Judges `chain`, leaf first, by `trust` at `now`.
pub(crate) fn verify_chain(
    chain: &[CertificateDer<'_>],
    role: Role,
    trust: &TrustSnapshot,
    algorithms: &WebPkiSupportedAlgorithms,
    now: UnixTime,
) -> Result<VerifiedPeer, PeerError> {
    let (leaf, rest) = chain.split_first().ok_or(PeerError::NoCertificate)?;
    if chain.len() > MAX_CHAIN {
        return Err(PeerError::LongChain(chain.len()));
    }
    let parsed = webpki::EndEntityCert::try_from(leaf).map_err(|e| PeerError::Malformed(e.to_string()))?;
    let usage = match role {
        Role::Client => KeyUsage::client_auth(),
        Role::Server => KeyUsage::server_auth(),
    };
    let path = parsed
        .verify_for_usage(algorithms.all, trust.anchors(), rest, now, usage, None, None)
        .map_err(|error| refusal(&error, chain, now))?;
    let id = RootId::of(path.anchor());
    let root = trust.root(&id).ok_or_else(|| PeerError::BadChain("its root is unknown".to_owned()))?;
    // A trust anchor is a name and a key to webpki; its validity is ours to look at.
    if root.not_after.as_secs() < now.as_secs() {
        return Err(PeerError::Expired {
            subject: root.subject.clone(),
            not_after: Timestamp(root.not_after),
            now: Timestamp(now),
        });
    }
    if root.not_before.as_secs() > now.as_secs() {
        return Err(PeerError::NotYetValid {
            subject: root.subject.clone(),
            not_before: Timestamp(root.not_before),
            now: Timestamp(now),
        });
    }
    let (id, leaf_ends) = svid(leaf)?;
    let between = path.intermediate_certificates().filter_map(|certificate| not_after(&certificate.der()));
    let not_after = between
        .chain([leaf_ends])
        .fold(root.not_after, |first, end| if end.as_secs() < first.as_secs() { end } else { first });
    let peer = VerifiedPeer { id, root: root.id, not_after };
    if !trust.trust_domains().includes(peer.id.trust_domain()) {
        return Err(PeerError::WrongTrustDomain { id: peer.id, own: trust.trust_domains().own.clone() });
    }
    Ok(peer)
}

/// The reason for what webpki found, with the names that its error lacks.
fn refusal(error: &webpki::Error, chain: &[CertificateDer<'_>], now: UnixTime) -> PeerError {
    use webpki::Error as E;
    let facts: Vec<Facts> = chain.iter().filter_map(Facts::read).collect();
    let subject = |matches: &dyn Fn(&Facts) -> bool| {
        facts.iter().find(|f| matches(f)).map_or_else(|| "unnamed".to_owned(), name)
    };
    match error {
        E::CertExpired { not_after, .. } => PeerError::Expired {
            subject: subject(&|f| f.not_after == *not_after),
            not_after: Timestamp(*not_after),
            now: Timestamp(now),
        },
        E::CertNotValidYet { not_before, .. } => PeerError::NotYetValid {
            subject: subject(&|f| f.not_before == *not_before),
            not_before: Timestamp(*not_before),
            now: Timestamp(now),
        },
        // The signature fails when a foreign CA bears the name of one of ours.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => {
            PeerError::ForeignCa { issuer: facts.last().map(|f| f.issuer.clone()).unwrap_or_default() }
        }
        E::RequiredEkuNotFoundContext(_) | E::CaUsedAsEndEntity | E::EmptyEkuExtension => {
            PeerError::WrongUse(shown(&error.to_string()))
        }
        E::BadDer | E::BadDerTime | E::TrailingData(_) => PeerError::Malformed(shown(&error.to_string())),
        other => PeerError::BadChain(shown(&other.to_string())),
    }
}

/// How a certificate is called in an error: workload certificates have an empty subject.
fn name(facts: &Facts) -> String {
    if facts.subject.is_empty() { format!("serial {}", facts.serial) } else { facts.subject.clone() }
}

/// The verifier of one handshake. It keeps what it found, because rustls only passes on that there was an error.
#[derive(Debug)]
pub(crate) struct HandshakeVerifier {
    trust: Arc<TrustSnapshot>,
    algorithms: WebPkiSupportedAlgorithms,
    expected: ExpectedPeers,
    outcome: OnceLock<Result<VerifiedPeer, PeerError>>,
}

impl HandshakeVerifier {
    pub(crate) fn new(
        bundle: &TrustBundle,
        algorithms: WebPkiSupportedAlgorithms,
        expected: ExpectedPeers,
    ) -> Arc<Self> {
        Arc::new(Self { trust: bundle.snapshot(), algorithms, expected, outcome: OnceLock::new() })
    }

    /// What was found; `None` if no certificate was judged.
    pub(crate) fn outcome(&self) -> Option<&Result<VerifiedPeer, PeerError>> {
        self.outcome.get()
    }

    fn judge(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<_> = std::iter::once(leaf).chain(rest).cloned().collect();
        let found = verify_chain(&chain, role, &self.trust, &self.algorithms, now).and_then(|peer| {
            if self.expected.include(&peer.id, self.trust.trust_domains()) {
                Ok(peer)
            } else {
                Err(PeerError::UnexpectedPeer { id: peer.id, expected: self.expected.clone() })
            }
        });
        match self.outcome.get_or_init(|| found) {
            Ok(_) => Ok(()),
            Err(error) => Err(error.for_rustls()),
        }
    }

    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }
}

impl ServerCertVerifier for HandshakeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(Role::Server, end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for HandshakeVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: each side has one certificate, and the names of the roots are nobody's business.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(Role::Client, end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
