//! The certificates of the workloads of this node: issued on first need, renewed in time, kept while they are valid.
//!
//! ```text
//!             first need         issued              half of the lifetime, or another signer
//!  (unknown) ───────────▶ Wanted ──────▶ Valid ◀──────────────────────────────────▶ Renewing
//!                           │ ▲                                                        │
//!                    failed │ │ back-off, or asked for                failed: back-off, │
//!                           ▼ │                                       the old one kept │
//!                         Failed ◀─────────────────────────────────────────────────────┘ expired
//! ```
//!
//! Invariants:
//! * one attempt at a time for an identity, however many ask for it;
//! * a certificate that is returned is valid now, names the identity asked for, and leads to a root of the bundle;
//! * there are never more than [`CertificateSettings::max_identities`].

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::SpiffeId;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::clock::{Clock, Timestamp, between, later};
use crate::issuer::{Issued, Issuer};
use crate::key_store::KeyStore;
use crate::renewal::Keeper;
use crate::tls::crypto_provider;
use crate::trust::TrustBundle;
use crate::verify::{PeerError, Role, verify_chain};
use crate::x509::{Facts, RootId};

/// How certificates are looked after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CertificateSettings {
    /// More identities are refused, unless some have not been asked for lately.
    pub max_identities: usize,
    /// An identity that was not asked for in this time may make place for another.
    pub idle: Duration,
    /// How long one attempt at issuing may take.
    pub issue_timeout: Duration,
    /// The wait after the first failure; it doubles with each.
    pub backoff_min: Duration,
    /// The longest wait after a failure.
    pub backoff_max: Duration,
    /// Spreads renewals in time, so that not all nodes renew at once; any number that differs between processes.
    pub jitter_seed: u64,
}

impl Default for CertificateSettings {
    fn default() -> Self {
        let mut seed = [0; 8];
        // Without randomness TLS fails anyway; renewals then only come less spread.
        let _ = aws_lc_rs::rand::fill(&mut seed);
        Self {
            max_identities: 10_000,
            idle: Duration::from_secs(60),
            issue_timeout: Duration::from_secs(30),
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(150),
            jitter_seed: u64::from_ne_bytes(seed),
        }
    }
}

impl CertificateSettings {
    /// A number from 0 to 1 that depends on nothing but the seed and `of`.
    pub(crate) fn spread(&self, of: impl Hash) -> f64 {
        let mut hasher = DefaultHasher::new();
        (self.jitter_seed, of).hash(&mut hasher);
        f64::from(u32::try_from(hasher.finish() >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    }
}

/// Why there is no certificate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CertificateError {
    /// The last attempt failed.
    #[error("no certificate for {id}: {reason} (attempt {attempts}, tried again while it is asked for)")]
    NotIssued {
        /// For whom.
        id: SpiffeId,
        /// Why.
        reason: Arc<str>,
        /// How many attempts in a row have failed.
        attempts: u32,
    },
    /// There are as many identities as allowed, and all are in use.
    #[error("no certificate for {id}: {max} identities are in use on this node, which is the limit")]
    TooMany {
        /// For whom.
        id: SpiffeId,
        /// The limit.
        max: usize,
    },
    /// It was forgotten while it was waited for, or the process is going down.
    #[error("no certificate for {id}: it is no longer looked after")]
    Gone {
        /// For whom.
        id: SpiffeId,
    },
}

/// What is wrong with a certificate that the CA sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnfitCertificate {
    #[error("the CA sent something that is not a certificate")]
    Malformed,
    #[error("the CA sent a certificate that no peer would accept: {0}")]
    Unacceptable(#[from] PeerError),
    #[error("the CA sent a certificate for {0}")]
    OtherIdentity(SpiffeId),
    #[error("key and certificate from the CA don't fit: {0}")]
    Key(#[from] rustls::Error),
}

/// A certificate with its key, as TLS presents it.
#[derive(Debug)]
pub struct WorkloadCertificate {
    id: SpiffeId,
    key: Arc<CertifiedKey>,
    serial: String,
    not_before: UnixTime,
    not_after: UnixTime,
    renew_at: UnixTime,
    root: RootId,
}

impl WorkloadCertificate {
    /// Checks what was issued. `renewal` is the share of the lifetime, counted from `from`, after which it is
    /// renewed.
    pub(crate) fn new(
        id: &SpiffeId,
        issued: Issued,
        bundle: &TrustBundle,
        now: UnixTime,
        from: Option<UnixTime>,
        renewal: f64,
    ) -> Result<Self, UnfitCertificate> {
        let provider = crypto_provider();
        let algorithms = provider.signature_verification_algorithms;
        let leaf = issued.chain.first().ok_or(UnfitCertificate::Malformed)?;
        let facts = Facts::read(leaf).ok_or(UnfitCertificate::Malformed)?;
        let peer = verify_chain(&issued.chain, Role::Server, &bundle.snapshot(), &algorithms, now)?;
        if peer.id != *id {
            return Err(UnfitCertificate::OtherIdentity(peer.id));
        }
        let key = CertifiedKey::from_der(issued.chain, issued.key, &provider)?;
        let from = from.unwrap_or(facts.not_before);
        Ok(Self {
            id: peer.id,
            key: Arc::new(key),
            serial: facts.serial,
            not_before: facts.not_before,
            not_after: peer.not_after,
            renew_at: later(from, between(from, peer.not_after).mul_f64(renewal)),
            root: peer.root,
        })
    }

    /// Whose it is.
    #[must_use]
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The certificate, then those between it and the root.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The serial number, hex.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// When it begins to be valid.
    #[must_use]
    pub fn not_before(&self) -> UnixTime {
        self.not_before
    }

    /// When it, or the first certificate above it, ceases to be valid.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// When it is renewed.
    #[must_use]
    pub fn renew_at(&self) -> UnixTime {
        self.renew_at
    }

    /// The root that it leads to.
    #[must_use]
    pub fn root(&self) -> RootId {
        self.root
    }

    pub(crate) fn key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }

    /// Whether peers accept it at `now`.
    pub(crate) fn valid_at(&self, now: UnixTime) -> bool {
        (self.not_before.as_secs()..=self.not_after.as_secs()).contains(&now.as_secs())
    }
}

/// The last failure of an identity.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) reason: Arc<str>,
    pub(crate) attempts: u32,
}

/// What is known of an identity at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeptState {
    pub(crate) certificate: Option<Arc<WorkloadCertificate>>,
    pub(crate) failure: Option<Failure>,
    /// Counts the attempts that ended.
    pub(crate) attempts_ended: u64,
}

/// Counts since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) issued: AtomicU64,
    pub(crate) renewed: AtomicU64,
    pub(crate) restored: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) evicted: AtomicU64,
    pub(crate) refused: AtomicU64,
}

/// Numbers for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CertificateCounts {
    /// Identities looked after now.
    pub identities: u64,
    /// Of them, those with a valid certificate.
    pub valid: u64,
    /// Of them, those whose last attempt failed, whether they have a valid certificate or not.
    pub failing: u64,
    /// Seconds until the first certificate expires; `None` if there is none.
    pub first_expiry_s: Option<u64>,
    /// Seconds since the beginning of validity of the oldest certificate; `None` if there is none.
    pub oldest_age_s: Option<u64>,
    /// Certificates issued since the start, renewals included.
    pub issued_total: u64,
    /// Of them, renewals.
    pub renewed_total: u64,
    /// Certificates taken over from before the restart.
    pub restored_total: u64,
    /// Attempts at issuing that failed.
    pub failed_total: u64,
    /// Identities that made place for others.
    pub evicted_total: u64,
    /// Identities refused because of the limit.
    pub refused_total: u64,
}

/// One identity, for the admin interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CertificateStatus {
    /// Whose.
    pub id: SpiffeId,
    /// Whether there is a certificate that is valid now.
    pub valid: bool,
    /// The certificate, valid or not.
    pub certificate: Option<CertificateSummary>,
    /// Why the last attempt failed, if it did.
    pub failure: Option<String>,
}

/// The parts of a certificate that people ask for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CertificateSummary {
    /// Serial number, hex.
    pub serial: String,
    /// Begin of validity.
    pub not_before: Timestamp,
    /// End of validity.
    pub not_after: Timestamp,
    /// When it is renewed.
    pub renew_at: Timestamp,
    /// The root that it leads to.
    pub root: RootId,
}

/// Looks after the certificates of the identities that are asked for. Clones share one state; when the last is
/// dropped, renewals stop.
#[derive(Clone, Debug)]
pub struct Certificates(Arc<Inner>);

struct Inner {
    issuer: Arc<dyn Issuer>,
    bundle: TrustBundle,
    settings: CertificateSettings,
    store: Option<KeyStore>,
    clock: Clock,
    counters: Arc<Counters>,
    entries: Mutex<HashMap<SpiffeId, Entry>>,
    runtime: Handle,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").field("settings", &self.settings).finish_non_exhaustive()
    }
}

struct Entry {
    state: watch::Receiver<KeptState>,
    demand: Arc<Notify>,
    task: AbortHandle,
    last_use: tokio::time::Instant,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Certificates {
    /// Begins with no identities; renewals run on this runtime. What is kept in `store` and has expired is removed.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn new(
        issuer: Arc<dyn Issuer>,
        bundle: TrustBundle,
        settings: CertificateSettings,
        store: Option<KeyStore>,
        clock: Clock,
    ) -> Self {
        let runtime = Handle::current();
        if let Some(store) = store.clone() {
            let now = clock.now();
            runtime.spawn_blocking(move || {
                if let Err(error) = store.forget_expired(now) {
                    tracing::warn!("kept certificates that have expired are not removed: {error}");
                }
            });
        }
        Self(Arc::new(Inner {
            issuer,
            bundle,
            settings,
            store,
            clock,
            counters: Arc::default(),
            entries: Mutex::default(),
            runtime,
        }))
    }

    /// The roots that peers are judged by.
    #[must_use]
    pub fn bundle(&self) -> &TrustBundle {
        &self.0.bundle
    }

    /// The time that certificates are judged by.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// The certificate of `id`: the one there is, or, if there is none that is valid, what the next attempt brings.
    ///
    /// # Errors
    /// That attempt failed, or there are too many identities.
    pub async fn get(&self, id: &SpiffeId) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let gone = || CertificateError::Gone { id: id.clone() };
        let (mut state, demand) = self.entry(id)?;
        let ended_before = state.borrow().attempts_ended;
        loop {
            {
                let state = state.borrow_and_update();
                if let Some(certificate) = &state.certificate
                    && certificate.valid_at(self.0.clock.now())
                {
                    return Ok(certificate.clone());
                }
                if let Some(failure) = &state.failure
                    && state.attempts_ended > ended_before
                {
                    return Err(CertificateError::NotIssued {
                        id: id.clone(),
                        reason: failure.reason.clone(),
                        attempts: failure.attempts,
                    });
                }
            }
            demand.notify_one();
            state.changed().await.map_err(|_| gone())?;
        }
    }

    /// The root of the certificate that an identity has, valid or not.
    #[must_use]
    pub fn root_of(&self, id: &SpiffeId) -> Option<RootId> {
        self.entries().get(id).and_then(|entry| entry.state.borrow().certificate.as_ref().map(|c| c.root))
    }

    /// Stops looking after an identity; asked for again, it is issued again.
    pub fn forget(&self, id: &SpiffeId) {
        if self.entries().remove(id).is_some() {
            self.forget_kept(id);
        }
    }

    /// Stops looking after all identities but the `wanted`.
    pub fn retain(&self, mut wanted: impl FnMut(&SpiffeId) -> bool) {
        let mut unwanted = Vec::new();
        self.entries().retain(|id, _| {
            let keep = wanted(id);
            if !keep {
                unwanted.push(id.clone());
            }
            keep
        });
        unwanted.iter().for_each(|id| self.forget_kept(id));
    }

    /// All identities, sorted.
    #[must_use]
    pub fn status(&self) -> Vec<CertificateStatus> {
        let now = self.0.clock.now();
        let mut list: Vec<_> = self
            .entries()
            .iter()
            .map(|(id, entry)| {
                let state = entry.state.borrow();
                CertificateStatus {
                    id: id.clone(),
                    valid: state.certificate.as_ref().is_some_and(|c| c.valid_at(now)),
                    certificate: state.certificate.as_ref().map(|c| CertificateSummary {
                        serial: c.serial.clone(),
                        not_before: Timestamp(c.not_before),
                        not_after: Timestamp(c.not_after),
                        renew_at: Timestamp(c.renew_at),
                        root: c.root,
                    }),
                    failure: state.failure.as_ref().map(|failure| failure.reason.to_string()),
                }
            })
            .collect();
        list.sort_by(|a, b| a.id.cmp(&b.id));
        list
    }

    /// Numbers for metrics.
    #[must_use]
    pub fn counts(&self) -> CertificateCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.0.counters;
        let mut counts = CertificateCounts {
            issued_total: read(&counters.issued),
            renewed_total: read(&counters.renewed),
            restored_total: read(&counters.restored),
            failed_total: read(&counters.failed),
            evicted_total: read(&counters.evicted),
            refused_total: read(&counters.refused),
            ..CertificateCounts::default()
        };
        let now = self.0.clock.now();
        for entry in self.entries().values() {
            let state = entry.state.borrow();
            counts.identities += 1;
            counts.failing += u64::from(state.failure.is_some());
            if let Some(certificate) = &state.certificate {
                counts.valid += u64::from(certificate.valid_at(now));
                let left = between(now, certificate.not_after).as_secs();
                let age = between(certificate.not_before, now).as_secs();
                counts.first_expiry_s = Some(counts.first_expiry_s.map_or(left, |first| first.min(left)));
                counts.oldest_age_s = Some(counts.oldest_age_s.map_or(age, |oldest| oldest.max(age)));
            }
        }
        counts
    }

    /// The entry of an identity, which is made, and begins to be issued, when it is first asked for.
    fn entry(&self, id: &SpiffeId) -> Result<(watch::Receiver<KeptState>, Arc<Notify>), CertificateError> {
        let now = tokio::time::Instant::now();
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(id) {
            entry.last_use = now;
            return Ok((entry.state.clone(), entry.demand.clone()));
        }
        if entries.len() >= self.0.settings.max_identities {
            self.make_place(&mut entries, now).ok_or_else(|| {
                self.0.counters.refused.fetch_add(1, Ordering::Relaxed);
                CertificateError::TooMany { id: id.clone(), max: self.0.settings.max_identities }
            })?;
        }
        let demand = Arc::new(Notify::new());
        let (sender, state) = watch::channel(KeptState::default());
        let keeper = Keeper {
            id: id.clone(),
            issuer: self.0.issuer.clone(),
            bundle: self.0.bundle.clone(),
            settings: self.0.settings,
            store: self.0.store.clone(),
            clock: self.0.clock.clone(),
            counters: self.0.counters.clone(),
            state: sender,
            demand: demand.clone(),
        };
        let task = self.0.runtime.spawn(keeper.run()).abort_handle();
        let entry = Entry { state: state.clone(), demand: demand.clone(), task, last_use: now };
        entries.insert(id.clone(), entry);
        Ok((state, demand))
    }

    /// Lets go of the identity that was not asked for the longest, if that is long enough; `None` if it is not.
    fn make_place(&self, entries: &mut HashMap<SpiffeId, Entry>, now: tokio::time::Instant) -> Option<()> {
        let (id, entry) = entries.iter().min_by_key(|(_, entry)| entry.last_use)?;
        if now.duration_since(entry.last_use) < self.0.settings.idle {
            return None;
        }
        let id = id.clone();
        entries.remove(&id);
        self.forget_kept(&id);
        self.0.counters.evicted.fetch_add(1, Ordering::Relaxed);
        Some(())
    }

    fn forget_kept(&self, id: &SpiffeId) {
        let Some(store) = self.0.store.clone() else { return };
        let id = id.clone();
        self.0.runtime.spawn_blocking(move || {
            if let Err(error) = store.forget(&id) {
                tracing::warn!(%id, "the kept key of an identity no longer here is not removed: {error}");
            }
        });
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<SpiffeId, Entry>> {
        self.0.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
