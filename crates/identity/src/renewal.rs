//! Keeps the certificate of one identity: the task behind each entry of [`Certificates`](crate::Certificates).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use model::SpiffeId;
use rustls_pki_types::{PrivateKeyDer, UnixTime};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::certificates::{CertificateSettings, Counters, Failure, KeptState, WorkloadCertificate};
use crate::clock::{Clock, Timestamp, between};
use crate::issuer::{Issued, Issuer};
use crate::key_store::KeyStore;
use crate::trust::TrustBundle;

/// The wall clock is looked at at least so often, because it jumps.
const LOOK: Duration = Duration::from_secs(30);
/// Attempts are at least so far apart, also when they succeed or are asked for.
const SPACING: Duration = Duration::from_secs(1);
/// When the signer changes, all identities renew; over so long a time.
const SIGNER_SPREAD: Duration = Duration::from_millis(250);
/// The middle of the renewal window, and half its width, as shares of the lifetime.
const HALF_LIFE: f64 = 0.5;
const JITTER: f64 = 0.05;

/// What the task works with.
pub(crate) struct Keeper {
    pub(crate) id: SpiffeId,
    pub(crate) issuer: Arc<dyn Issuer>,
    pub(crate) bundle: TrustBundle,
    pub(crate) settings: CertificateSettings,
    pub(crate) store: Option<KeyStore>,
    pub(crate) clock: Clock,
    pub(crate) counters: Arc<Counters>,
    pub(crate) state: watch::Sender<KeptState>,
    pub(crate) demand: Arc<Notify>,
}

impl Keeper {
    /// Runs until the entry is dropped.
    pub(crate) async fn run(self) {
        let mut signer = self.issuer.signer();
        let mut roots = self.bundle.subscribe();
        signer.mark_unchanged();
        roots.mark_unchanged();
        let mut stale = false;
        let mut failures = 0_u32;
        self.restore().await;
        loop {
            if stale || self.is_due() {
                let started = Instant::now();
                match self.attempt().await {
                    Ok(()) => (failures, stale) = (0, false),
                    Err(reason) => {
                        failures = failures.saturating_add(1);
                        self.failed(reason, failures);
                    }
                }
                tokio::time::sleep_until(started + SPACING).await;
            }
            let retry_at = (failures > 0).then(|| Instant::now() + self.backoff(failures));
            stale |= self.wait(retry_at, &mut signer, &mut roots).await;
        }
    }

    /// Waits until an attempt may be due; says whether who signs or what is trusted has made the certificate stale.
    async fn wait(
        &self,
        retry_at: Option<Instant>,
        signer: &mut watch::Receiver<u64>,
        roots: &mut watch::Receiver<u64>,
    ) -> bool {
        loop {
            let look = Instant::now() + self.until_due().min(LOOK);
            let until = retry_at.unwrap_or(look);
            tokio::select! {
                () = tokio::time::sleep_until(until) => {
                    if retry_at.is_some() || self.is_due() {
                        return false;
                    }
                }
                changed = signer.changed() => match changed {
                    Ok(()) => {
                        let spread = SIGNER_SPREAD.mul_f64(self.settings.spread(("signer", &self.id)));
                        tokio::time::sleep(spread).await;
                        return true;
                    }
                    Err(_) => return std::future::pending().await,
                },
                Ok(()) = roots.changed() => {
                    if !self.is_trusted() {
                        return true;
                    }
                }
                () = self.demand.notified() => {
                    if !self.has_valid() {
                        return false;
                    }
                }
            }
        }
    }

    /// One attempt, its result put in force.
    async fn attempt(&self) -> Result<(), String> {
        let issuing = self.issuer.issue(&self.id);
        let issued = match tokio::time::timeout(self.settings.issue_timeout, issuing).await {
            Ok(Ok(issued)) => issued,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(format!("the CA did not answer in {:?}", self.settings.issue_timeout)),
        };
        let kept = self.store.is_some().then(|| copy(&issued));
        let now = self.clock.now();
        let certificate = self.check(issued, Some(now), now)?;
        let renewal = self.state.borrow().certificate.is_some();
        self.counters.issued.fetch_add(1, Ordering::Relaxed);
        self.counters.renewed.fetch_add(u64::from(renewal), Ordering::Relaxed);
        tracing::debug!(
            id = %self.id,
            serial = certificate.serial(),
            not_after = %Timestamp(certificate.not_after()),
            renewal,
            "certificate issued"
        );
        self.put(certificate);
        if let (Some(store), Some(issued)) = (self.store.clone(), kept) {
            self.keep(store, issued).await;
        }
        Ok(())
    }

    /// Takes over what was kept before a restart, if it still serves.
    async fn restore(&self) {
        let Some(store) = self.store.clone() else { return };
        let id = self.id.clone();
        let loaded = match tokio::task::spawn_blocking(move || store.load(&id)).await {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(error)) => {
                tracing::warn!(id = %self.id, "the kept certificate is not used: {error}");
                return;
            }
            Err(_) => return,
        };
        let Some(issued) = loaded else { return };
        match self.check(issued, None, self.clock.now()) {
            Ok(certificate) => {
                self.counters.restored.fetch_add(1, Ordering::Relaxed);
                self.put(certificate);
            }
            Err(reason) => tracing::info!(id = %self.id, "the kept certificate is not used: {reason}"),
        }
    }

    fn check(
        &self,
        issued: Issued,
        from: Option<UnixTime>,
        now: UnixTime,
    ) -> Result<WorkloadCertificate, String> {
        let generation = self.state.borrow().attempts_ended;
        let renewal = HALF_LIFE - JITTER + 2.0 * JITTER * self.settings.spread((&self.id, generation));
        WorkloadCertificate::new(&self.id, issued, &self.bundle, now, from, renewal)
            .map_err(|e| e.to_string())
    }

    fn put(&self, certificate: WorkloadCertificate) {
        self.state.send_modify(|state| {
            state.certificate = Some(Arc::new(certificate));
            state.failure = None;
            state.attempts_ended += 1;
        });
    }

    fn failed(&self, reason: String, attempts: u32) {
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(
            id = %self.id,
            attempts,
            valid_certificate_kept = self.has_valid(),
            "certificate not issued: {reason}"
        );
        self.state.send_modify(|state| {
            state.failure = Some(Failure { reason: reason.into(), attempts });
            state.attempts_ended += 1;
        });
    }

    async fn keep(&self, store: KeyStore, issued: Issued) {
        let id = self.id.clone();
        let kept = tokio::task::spawn_blocking(move || store.keep(&id, &issued)).await;
        if let Ok(Err(error)) = kept {
            tracing::warn!(id = %self.id, "the certificate is not kept for a restart: {error}");
        }
    }

    fn with<T>(&self, read: impl FnOnce(&WorkloadCertificate) -> T) -> Option<T> {
        self.state.borrow().certificate.as_deref().map(read)
    }

    fn is_due(&self) -> bool {
        let now = self.clock.now();
        self.with(|c| now.as_secs() >= c.renew_at().as_secs() || !c.valid_at(now)).unwrap_or(true)
    }

    /// By the wall clock; a second more, because it counts whole ones.
    fn until_due(&self) -> Duration {
        let now = self.clock.now();
        self.with(|c| between(now, c.renew_at())).unwrap_or_default() + Duration::from_secs(1)
    }

    fn has_valid(&self) -> bool {
        let now = self.clock.now();
        self.with(|c| c.valid_at(now)).unwrap_or(false)
    }

    fn is_trusted(&self) -> bool {
        let trust = self.bundle.snapshot();
        self.with(|c| trust.root(&c.root()).is_some()).unwrap_or(true)
    }

    /// Doubles with each failure; between three quarters and all of it.
    fn backoff(&self, failures: u32) -> Duration {
        let doubled = self.settings.backoff_min.saturating_mul(1 << failures.saturating_sub(1).min(20));
        doubled
            .min(self.settings.backoff_max)
            .mul_f64(0.75 + 0.25 * self.settings.spread((&self.id, failures)))
    }
}

fn copy(issued: &Issued) -> Issued {
    Issued { chain: issued.chain.clone(), key: clone_key(&issued.key) }
}

fn clone_key(key: &PrivateKeyDer<'static>) -> PrivateKeyDer<'static> {
    key.clone_key()
}
