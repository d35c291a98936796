//! The CA of a control plane as an [`Issuer`]: `culvertd`, or any CA that speaks Istio's protocol (facts 4.8).
//!
//! Who asks is said by a token that the cluster projects into a file and exchanges; it is read for each request. Whom
//! to trust comes from two places: the [`RootFile`], which the cluster exchanges too, and the roots that the CA's
//! answers end with. [`CaClient::bundle`] holds both together, so that a root that is coming is trusted as soon as
//! either says it, and one that is going stays until neither does.
//!
//! **How a CA learns whom this node trusts.** When the file changes, and at the start, a request for one's own identity
//! is made at once, whose certificate is thrown away. With it go the ids of the file's roots
//! ([`TRUSTED_ROOTS`](exchange::TRUSTED_ROOTS)): those only, since the control plane's own certificate is judged by
//! them, too. It is repeated until it is answered; other requests say nothing of roots, so that none that was under way
//! takes back what was said.
//!
//! Invariants:
//! * a root is trusted before a certificate that leads to it is handed out;
//! * keys are made here, and go nowhere but into what [`Issuer::issue`] returns;
//! * each wait has a limit; an error says where, why, and what to look at. The token is in none.

mod dial;
mod exchange;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::{SpiffeId, TrustDomains};
use proto::wire::auth::IstioCertificateResponse;
use proto::wire::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use rustls_pki_types::CertificateDer;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::ca::CaError;
use crate::clock::Clock;
use crate::issuer::{IssueError, IssueFuture, Issuer};
use crate::key_store::KeyStore;
use crate::root_file::{RootFile, RootFileError, shown};
use crate::trust::TrustBundle;
use crate::x509::RootId;

pub use dial::{Dialer, InvalidAddress, ServerAddress};
use exchange::{Answer, Asked, Purpose};
pub use exchange::{IMPERSONATED_IDENTITY, TRUSTED_ROOTS};

/// A file with more is no token.
const MAX_TOKEN: usize = 64 * 1024;
/// An answer with more is refused.
const MAX_ANSWER: usize = 512 * 1024;
/// The waits between reports of what is trusted that fail.
const REPORT_BACKOFF: std::ops::RangeInclusive<Duration> = Duration::from_secs(2)..=Duration::from_secs(60);

/// How the CA is asked.
#[derive(Clone, Debug)]
pub struct CaClientSettings {
    /// Where it is, in the order of preference. The one that answered last is asked first.
    pub addresses: Vec<ServerAddress>,
    /// The token that says who asks; `/var/run/secrets/tokens/istio-token` in a pod.
    pub token_file: PathBuf,
    /// Sent as `clusterid`: which cluster the token is of.
    pub cluster_id: String,
    /// How long certificates should be valid; the CA may give less.
    pub lifetime: Duration,
    /// How long one attempt at a connection may take.
    pub connect_timeout: Duration,
    /// How long one address may take to answer, the connection included.
    pub request_timeout: Duration,
    /// So many requests are under way at once; others wait.
    pub concurrent: usize,
    /// The most that a report of a changed root file waits, so that not all nodes report at once.
    pub report_spread: Duration,
}

impl CaClientSettings {
    /// The usual, for a pod of a cluster.
    #[must_use]
    pub fn new(addresses: Vec<ServerAddress>, token_file: PathBuf, cluster_id: String) -> Self {
        Self {
            addresses,
            token_file,
            cluster_id,
            lifetime: Duration::from_secs(24 * 3600),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(10),
            concurrent: 16,
            report_spread: Duration::from_secs(5),
        }
    }
}

/// Why the client can't be started.
#[derive(Debug, thiserror::Error)]
pub enum CaClientError {
    /// There is nobody to ask.
    #[error("no address of a certificate authority is given: set --ca-address or --xds-address")]
    NoAddress,
    /// The roots are not at hand.
    #[error(transparent)]
    Roots(#[from] RootFileError),
    /// The roots, or those that were kept, are unusable.
    #[error(transparent)]
    Ca(#[from] CaError),
}

/// Asks a CA for certificates. When dropped, it stops following the root file.
#[derive(Debug)]
pub struct CaClient {
    state: Arc<State>,
    follower: AbortHandle,
}

#[derive(Debug)]
struct State {
    settings: CaClientSettings,
    file: RootFile,
    store: Option<KeyStore>,
    bundle: TrustBundle,
    dialers: Vec<Dialer>,
    /// One channel for each address, made anew when the file of roots changes: generation, channel.
    channels: Mutex<Vec<(u64, Channel)>>,
    preferred: AtomicUsize,
    /// The roots that the last answer ended with, or that were kept.
    answered: Mutex<Vec<CertificateDer<'static>>>,
    /// The roots that the CA was last told of.
    reported: watch::Sender<Vec<RootId>>,
    permits: Semaphore,
    signer: watch::Sender<u64>,
}

impl CaClient {
    /// Reads the file of roots, and what `store` kept of earlier answers, and follows the file. Nothing is asked but
    /// the report of what is trusted; a CA that is away is no error here.
    ///
    /// # Errors
    /// There is no address, or the roots can't be used.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start(
        settings: CaClientSettings,
        root_file: &Path,
        store: Option<KeyStore>,
        domains: TrustDomains,
        clock: Clock,
    ) -> Result<Self, CaClientError> {
        Self::start_with(settings, RootFile::start(root_file, clock)?, store, domains)
    }

    /// As [`CaClient::start`], with a file that others read, too.
    ///
    /// # Errors
    /// There is no address, or the roots can't be used.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start_with(
        settings: CaClientSettings,
        file: RootFile,
        store: Option<KeyStore>,
        domains: TrustDomains,
    ) -> Result<Self, CaClientError> {
        if settings.addresses.is_empty() {
            return Err(CaClientError::NoAddress);
        }
        let kept = match store.as_ref().map(KeyStore::roots).transpose() {
            Ok(kept) => kept.flatten().unwrap_or_default(),
            Err(error) => {
                tracing::warn!("the roots that were kept are not used: {error}");
                Vec::new()
            }
        };
        let roots = union(file.roots(), &kept);
        let bundle = TrustBundle::new(&roots, domains).map_err(CaError::from)?;
        let dialers: Vec<_> = settings
            .addresses
            .iter()
            .map(|address| Dialer::new(address.clone(), file.clone(), settings.connect_timeout))
            .collect();
        let state = Arc::new(State {
            channels: Mutex::new(dialers.iter().map(|dialer| (0, dialer.channel())).collect()),
            permits: Semaphore::new(settings.concurrent.max(1)),
            settings,
            file,
            store,
            bundle,
            dialers,
            preferred: AtomicUsize::new(0),
            answered: Mutex::new(kept),
            reported: watch::Sender::new(Vec::new()),
            signer: watch::Sender::new(0),
        });
        let follower = tokio::spawn(follow(state.clone())).abort_handle();
        Ok(Self { state, follower })
    }

    /// The roots of the file and of the CA's answers, as they change.
    #[must_use]
    pub fn bundle(&self) -> &TrustBundle {
        &self.state.bundle
    }

    /// The file of roots.
    #[must_use]
    pub fn root_file(&self) -> &RootFile {
        &self.state.file
    }

    /// The roots that the CA was last told that this node trusts.
    #[must_use]
    pub fn reported(&self) -> watch::Receiver<Vec<RootId>> {
        self.state.reported.subscribe()
    }
}

impl Drop for CaClient {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Issuer for CaClient {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> IssueFuture<'a> {
        Box::pin(async move { Ok(self.state.obtain(Purpose::Certificate(id)).await?.issued) })
    }

    fn signer(&self) -> watch::Receiver<u64> {
        self.state.signer.subscribe()
    }
}

impl State {
    /// Asks one address after the other, and puts the roots of the answer in force.
    async fn obtain(&self, purpose: Purpose<'_>) -> Result<Answer, IssueError> {
        let gone = |_| IssueError::Unavailable("the client is going down".to_owned());
        let _permit = self.permits.acquire().await.map_err(gone)?;
        let token = self.token().await?;
        let first = self.preferred.load(Ordering::Relaxed);
        let count = self.dialers.len();
        let mut failures = Vec::new();
        for index in (0..count).map(|offset| (first + offset) % count) {
            let asked = Asked::new(&purpose, self.settings.lifetime)?;
            match self.ask(index, &asked, &token).await {
                Ok(response) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    let answer = asked.answered(&response).map_err(|reason| {
                        IssueError::Unavailable(format!("{} answered nonsense: {reason}", self.place(index)))
                    })?;
                    self.take_roots(&answer.roots)?;
                    return Ok(answer);
                }
                Err(Refusal::Final(reason)) => return Err(IssueError::Refused(reason)),
                Err(Refusal::Away(reason)) => failures.push(reason),
            }
        }
        Err(IssueError::Unavailable(failures.join("; ")))
    }

    async fn ask(
        &self,
        index: usize,
        asked: &Asked,
        token: &MetadataValue<Ascii>,
    ) -> Result<IstioCertificateResponse, Refusal> {
        let mut request = Request::new(asked.request.clone());
        request.metadata_mut().insert("authorization", token.clone());
        if let Ok(cluster) = self.settings.cluster_id.parse() {
            request.metadata_mut().insert("clusterid", cluster);
        }
        let channel = self.channel(index).ok_or_else(|| Refusal::Away("no such address".to_owned()))?;
        let mut client = IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        let limit = self.settings.request_timeout;
        match tokio::time::timeout(limit, client.create_certificate(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.refusal(index, &status)),
            Err(_) => {
                let why = self.dialers.get(index).and_then(Dialer::failure);
                let place = self.place(index);
                Err(Refusal::Away(why.unwrap_or_else(|| format!("{place} does not answer within {limit:?}"))))
            }
        }
    }

    /// Whether another address may do better, and what to tell people.
    fn refusal(&self, index: usize, status: &Status) -> Refusal {
        let place = self.place(index);
        let text = dial::explained(status);
        let token = self.settings.token_file.display();
        match status.code() {
            Code::Unauthenticated => Refusal::Final(format!(
                "{place} does not accept the token in {token}: {text}. Its audience is istio-ca; look whether the \
                 cluster renews it, and whether --cluster-id ({}) is the CA's",
                self.settings.cluster_id
            )),
            Code::PermissionDenied => Refusal::Final(format!("{place} gives it not to this node: {text}")),
            Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => {
                Refusal::Final(format!("{place} can't serve the request ({}): {text}", status.code()))
            }
            Code::Unavailable => {
                // Of the transport, or of the CA itself, which then says why.
                let why = self.dialers.get(index).and_then(Dialer::failure);
                Refusal::Away(why.unwrap_or_else(|| format!("{place} is not available: {text}")))
            }
            code => Refusal::Away(format!("{place} failed ({code}): {text}")),
        }
    }

    fn place(&self, index: usize) -> String {
        let name = |dialer: &Dialer| format!("the CA at {}", dialer.address());
        self.dialers.get(index).map_or_else(|| "the CA".to_owned(), name)
    }

    fn channel(&self, index: usize) -> Option<Channel> {
        let generation = *self.file.subscribe().borrow();
        let mut channels = lock(&self.channels);
        let (made, channel) = channels.get_mut(index)?;
        if *made != generation {
            *channel = self.dialers.get(index)?.channel();
            *made = generation;
        }
        Some(channel.clone())
    }

    async fn token(&self) -> Result<MetadataValue<Ascii>, IssueError> {
        let path = &self.settings.token_file;
        let wrong = |reason: String| {
            IssueError::Unavailable(format!(
                "the token in {} can't be used: {reason}. It is a projected service account token of the audience \
                 istio-ca",
                path.display()
            ))
        };
        let bytes = tokio::fs::read(path).await.map_err(|e| wrong(e.to_string()))?;
        let text = std::str::from_utf8(&bytes).map(str::trim).unwrap_or_default();
        if text.is_empty() || text.len() > MAX_TOKEN {
            return Err(wrong(format!("it has {} bytes and is no text of 1 to {MAX_TOKEN}", bytes.len())));
        }
        let mut value: MetadataValue<Ascii> = format!("Bearer {text}")
            .parse()
            .map_err(|_| wrong("it holds characters that no token has".to_owned()))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// Puts the roots of an answer in force beside those of the file. An answer without roots changes nothing.
    fn take_roots(&self, roots: &[CertificateDer<'static>]) -> Result<(), CaError> {
        let mut answered = lock(&self.answered);
        if !roots.is_empty() && *answered != roots {
            // Checked before it replaces what was known: an unusable set is an error of this answer.
            self.put(&union(self.file.roots(), roots))?;
            *answered = roots.to_vec();
        }
        Ok(())
    }

    /// The file changed: what it no longer holds stays while the CA's answers say so.
    fn take_file(&self) {
        let answered = lock(&self.answered);
        if let Err(error) = self.put(&union(self.file.roots(), &answered)) {
            tracing::error!("the changed root certificates are not in force: {error}");
        }
    }

    fn put(&self, roots: &[CertificateDer<'static>]) -> Result<(), CaError> {
        if !self.bundle.set_roots(roots)? {
            return Ok(());
        }
        let ids: Vec<_> = self.bundle.snapshot().roots().iter().map(|root| root.id).collect();
        tracing::info!(roots = %shown(&ids), "the trusted roots have changed");
        if let Some(store) = &self.store
            && let Err(error) = store.keep_roots(roots)
        {
            tracing::warn!("the roots are not kept for a restart while the CA is away: {error}");
        }
        Ok(())
    }
}

/// How an address answered when it gave no certificate.
enum Refusal {
    /// Another one would say the same.
    Final(String),
    /// Another one may do better.
    Away(String),
}

/// Puts changes of the file in force, and tells the CA.
async fn follow(state: Arc<State>) {
    let mut file = state.file.subscribe();
    loop {
        file.mark_unchanged();
        state.take_file();
        report(&state, &mut file).await;
        if file.changed().await.is_err() {
            return;
        }
    }
}

/// Tells the CA what is trusted now, again and again until it knows, or the file has changed once more.
async fn report(state: &State, file: &mut watch::Receiver<u64>) {
    let mut wait = state.settings.report_spread.mul_f64(random_share());
    let mut next = *REPORT_BACKOFF.start();
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = file.changed() => {
                state.take_file();
            }
        }
        let trusted = state.file.root_ids();
        if *state.reported.borrow() == trusted {
            return;
        }
        match state.obtain(Purpose::Report(&trusted)).await {
            Ok(_) => {
                state.reported.send_replace(trusted);
                return;
            }
            Err(error) => {
                tracing::warn!(
                    roots = %shown(&trusted),
                    "the CA does not know yet that this node trusts these roots: {error}"
                );
                wait = next.mul_f64(0.75 + 0.25 * random_share());
                next = (next * 2).min(*REPORT_BACKOFF.end());
            }
        }
    }
}

/// From 0 to 1.
fn random_share() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness TLS fails anyway; reports then only come less spread.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX)
}

/// The first, and those of the second that it lacks.
fn union(
    mut first: Vec<CertificateDer<'static>>,
    second: &[CertificateDer<'static>],
) -> Vec<CertificateDer<'static>> {
    for root in second {
        if !first.contains(root) {
            first.push(root.clone());
        }
    }
    first
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
