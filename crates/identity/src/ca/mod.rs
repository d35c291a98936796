//! The local certificate authority: in memory ([`CertificateAuthority`]), as files ([`CaDirectory`]), followed
//! while it changes ([`LocalIssuer`](crate::LocalIssuer)), and its root exchanged in stages ([`rotation`]).

mod authority;
mod directory;
mod pem_text;
mod request;
pub mod rotation;

pub use authority::{CertificateAuthority, MadeCa, SignedCertificate, Validity};
pub(crate) use directory::CaStamp;
pub use directory::{CaDirectory, CaWarning, Creation, LoadedCa};
pub use pem_text::{certificates_from_pem, certificates_to_pem, key_from_pem, key_to_pem};
pub use request::{MAX_REQUEST, RequestError, SigningRequest};

use crate::clock::Timestamp;
use crate::storage::StorageError;
use crate::trust::BundleError;
use crate::verify::PeerError;

/// Why a certificate authority can't be made, loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// There is no signing certificate.
    #[error("there is no signing certificate")]
    NoCertificate,
    /// A file of the directory is missing.
    #[error("{file} is missing in {directory}")]
    Missing {
        /// The file.
        file: &'static str,
        /// The directory.
        directory: String,
    },
    /// There is a part of an authority, so none is made.
    #[error(
        "{directory} holds {file} but no ca.pem: no authority is made, because it would replace what is there; put \
         the missing files there, or remove {file} to begin with a new authority"
    )]
    Incomplete {
        /// The file that is there.
        file: &'static str,
        /// The directory.
        directory: String,
    },
    /// There is no authority, and no new one is made, because certificates of another one are in use.
    #[error(
        "no authority can be loaded, and no new one is made, because {keys} holds certificates of the one there was: \
         bring its directory back, or empty {keys} to begin with a new authority, which no node that keeps the old one \
         trusts"
    )]
    Away {
        /// Why it can't be loaded.
        #[source]
        reason: Box<CaError>,
        /// The directory of kept certificates.
        keys: String,
    },
    /// A file is no PEM of what it should hold.
    #[error("{file}: {reason}")]
    Pem {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A certificate of the signing chain is no X.509 certificate.
    #[error("certificate {position} of the signing chain is not an X.509 certificate")]
    Malformed {
        /// Which one, counted from 1.
        position: usize,
    },
    /// A certificate of the signing chain may not sign.
    #[error("{subject} is not a CA certificate (basic constraints, key usage)")]
    NotCa {
        /// Which one.
        subject: String,
    },
    /// A certificate of the signing chain may not have so many below it.
    #[error("{subject} has a path length that does not allow {below} CA certificates below it")]
    PathLength {
        /// Which one.
        subject: String,
        /// How many there are.
        below: usize,
    },
    /// A certificate of the signing chain has expired.
    #[error("{subject} expired at {not_after}")]
    Expired {
        /// Which one.
        subject: String,
        /// When.
        not_after: Timestamp,
    },
    /// A certificate of the signing chain is not valid yet.
    #[error("{subject} is not valid before {not_before}; it is {now} here")]
    NotYetValid {
        /// Which one.
        subject: String,
        /// From when on it is.
        not_before: Timestamp,
        /// This node's clock.
        now: Timestamp,
    },
    /// The private key can't be read.
    #[error("the private key can't be used: {0}")]
    Key(String),
    /// The key is another one's.
    #[error("the private key is not the one of {subject}")]
    KeyMismatch {
        /// The signing certificate.
        subject: String,
    },
    /// The signing certificate's name can't be written into what it issues.
    #[error(
        "the subject of {subject} has a repeated, multi-valued or unknown attribute, which can't be issued under: \
         sign an intermediate with a plain name by it"
    )]
    Subject {
        /// The signing certificate.
        subject: String,
    },
    /// The roots don't vouch for the signing certificate.
    #[error("the trust bundle does not vouch for what {subject} signs: {reason}")]
    Untrusted {
        /// The signing certificate.
        subject: String,
        /// How a peer would refuse it.
        #[source]
        reason: Box<PeerError>,
    },
    /// A signing request is refused.
    #[error("the signing request is refused: {0}")]
    Request(#[source] RequestError),
    /// A name can't be written into a certificate.
    #[error("{name:?} can't be the name of a certificate: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The cryptographic library refused.
    #[error("can't {what}: {source}")]
    Signing {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: rcgen::Error,
    },
    /// There is no randomness.
    #[error("the system gives no randomness")]
    Random,
    /// The clock is out of range.
    #[error("the clock shows a time that no certificate can hold")]
    Clock,
    /// The roots are unusable.
    #[error("roots: {0}")]
    Bundle(#[from] BundleError),
    /// A file or the directory is unusable.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl CaError {
    pub(crate) fn signing(what: &'static str) -> impl FnOnce(rcgen::Error) -> Self {
        move |source| Self::Signing { what, source }
    }
}
