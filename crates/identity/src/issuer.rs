//! Where workload certificates come from.

use std::future::Future;
use std::pin::Pin;

use model::SpiffeId;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

use crate::ca::CaError;

/// A certificate with its key, fresh from the CA.
#[derive(Debug)]
pub struct Issued {
    /// The certificate, then those between it and the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
}

/// Why no certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The CA can't be reached or does not answer.
    #[error("the CA is not available: {0}")]
    Unavailable(String),
    /// The CA does not give this node a certificate for this identity.
    #[error("the CA refused: {0}")]
    Refused(String),
    /// The local CA failed.
    #[error(transparent)]
    Ca(#[from] CaError),
}

/// What [`Issuer::issue`] returns: boxed, because issuers are chosen at run time.
pub type IssueFuture<'a> = Pin<Box<dyn Future<Output = Result<Issued, IssueError>> + Send + 'a>>;

/// A certificate authority as [`Certificates`](crate::Certificates) sees it. Each call of `issue` is one attempt;
/// retries, time limits and back-off are the caller's.
pub trait Issuer: Send + Sync + 'static {
    /// Makes a key and has a certificate for `id` issued.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> IssueFuture<'a>;

    /// Counts the changes of who signs: after each, all certificates are issued anew.
    fn signer(&self) -> watch::Receiver<u64>;
}
