//! Who is who in the mesh: certificates for workloads, the roots that vouch for them, and the TLS that both ends of
//! a tunnel prove themselves with.
//!
//! * [`CaDirectory`] and [`LocalIssuer`]: the local certificate authority, its files, its [`rotation`].
//! * [`Certificates`]: the certificates of this node's workloads, from any [`Issuer`], renewed in time.
//! * [`CaClient`]: the CA of a control plane, asked over gRPC; [`RootFile`] and [`Dialer`]: how it is found and trusted.
//! * [`SigningRequest`], [`CertificateAuthority::sign`], [`ServingKey`]: what such a CA is made of.
//! * [`TrustBundle`]: the roots and trust domains in force, exchanged while connections live.
//! * [`accept`], [`connect`], [`TlsStream`]: TLS 1.3 with both sides authenticated by their SPIFFE IDs.
//!
//! Invariants of the crate:
//! * a private key is in memory, or in a directory on a tmpfs that only root can enter;
//! * a peer's identity is a [`model::SpiffeId`] that was parsed once, out of a chain that was verified;
//! * nothing a peer sends, and nothing in a file, ends the process;
//! * time is wall-clock time that is passed in ([`Clock`]); waits are tokio's.
#![forbid(unsafe_code)]

mod ca;
mod ca_client;
mod certificates;
mod clock;
mod handshake;
mod issuer;
mod key_store;
mod local_issuer;
mod renewal;
mod root_file;
mod serving;
mod storage;
mod stream;
mod tls;
mod trust;
mod verify;
mod x509;

pub use ca::{
    CaDirectory, CaError, CaWarning, CertificateAuthority, Creation, LoadedCa, MAX_REQUEST, MadeCa,
    RequestError, SignedCertificate, SigningRequest, Validity, certificates_from_pem, certificates_to_pem,
    key_from_pem, key_to_pem, rotation,
};
pub use ca_client::{
    CaClient, CaClientError, CaClientSettings, Dialer, IMPERSONATED_IDENTITY, InvalidAddress, ServerAddress,
    TRUSTED_ROOTS,
};
pub use certificates::{
    CertificateCounts, CertificateError, CertificateSettings, CertificateStatus, CertificateSummary,
    Certificates, WorkloadCertificate,
};
pub use clock::{Clock, Timestamp};
pub use handshake::{HandshakeError, HandshakeLimits, NotTls, PeerInfo, accept, connect, connect_corked};
pub use issuer::{IssueError, IssueFuture, Issued, Issuer};
pub use key_store::KeyStore;
pub use local_issuer::{CaStatus, LocalIssuer, LocalIssuerSettings, SignerStatus};
pub use root_file::{RootFile, RootFileError};
pub use serving::ServingKey;
pub use storage::StorageError;
pub use stream::{TlsError, TlsStream};
pub use trust::{BundleError, Distrust, MAX_ROOTS, Root, TrustBundle, TrustSnapshot};
pub use verify::{ExpectedPeers, PeerError};
pub use x509::RootId;
