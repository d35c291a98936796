//! The local CA as an [`Issuer`], following its directory while it changes.
//!
//! Invariants:
//! * what is in force is always the last whole and valid state of the directory, also of before a restart where a
//!   [`KeyStore`] keeps the roots: nothing is issued then until the directory is back;
//! * a new root is trusted, and kept, before anything signed by it is issued;
//! * an authority is made only where there is nothing of one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use model::{SpiffeId, TrustDomains};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::ca::{CaDirectory, CaError, CaStamp, CaWarning, CertificateAuthority, LoadedCa, Validity};
use crate::clock::{Clock, Timestamp};
use crate::issuer::{IssueError, IssueFuture, Issuer};
use crate::key_store::KeyStore;
use crate::trust::TrustBundle;
use crate::x509::RootId;

/// While the directory is in error, it is read again every so many looks, because time alone can mend it.
const RETRY_LOOKS: u32 = 20;

/// How the local CA is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalIssuerSettings {
    /// How long workload certificates are valid.
    pub validity: Validity,
    /// How often the directory is looked at.
    pub poll: Duration,
}

impl Default for LocalIssuerSettings {
    fn default() -> Self {
        Self { validity: Validity::of_workloads(), poll: Duration::from_millis(400) }
    }
}

/// Who signs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SignerStatus {
    /// The signing certificate's subject.
    pub subject: String,
    /// Its serial number, hex.
    pub serial: String,
    /// The root that it leads to.
    pub root: RootId,
    /// When it, or what it depends on, expires.
    pub not_after: Timestamp,
}

impl SignerStatus {
    fn of(authority: &CertificateAuthority) -> Self {
        Self {
            subject: authority.subject().to_owned(),
            serial: authority.serial().to_owned(),
            root: authority.root(),
            not_after: Timestamp(authority.not_after()),
        }
    }
}

/// How the local CA is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaStatus {
    /// Who signs; `None` while the directory could not be loaded since the start, and only what was kept serves.
    pub signer: Option<SignerStatus>,
    /// What should be known.
    pub warnings: Vec<CaWarning>,
    /// Times that a change of the directory was put in force, the start included.
    pub loads: u64,
    /// Times that the directory could not be loaded.
    pub failures: u64,
    /// Why the directory as it is now is not in force; the last good state is.
    pub error: Option<String>,
}

/// Issues from a [`CaDirectory`]. Stops following it when dropped.
#[derive(Debug)]
pub struct LocalIssuer {
    state: Arc<State>,
    follower: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    directory: CaDirectory,
    /// Where the roots are kept over a restart.
    store: Option<KeyStore>,
    bundle: TrustBundle,
    settings: LocalIssuerSettings,
    clock: Clock,
    authority: ArcSwapOption<CertificateAuthority>,
    signer: watch::Sender<u64>,
    status: Mutex<CaStatus>,
}

impl LocalIssuer {
    /// Loads the directory and follows it from then on, on this runtime.
    ///
    /// # Errors
    /// The directory can't be loaded; there is no last good state yet.
    pub fn start(
        directory: CaDirectory,
        domains: TrustDomains,
        settings: LocalIssuerSettings,
        clock: Clock,
    ) -> Result<Self, CaError> {
        let stamp = directory.stamp();
        let loaded = directory.load(&domains, clock.now())?;
        Self::with(directory, stamp, None, Ok(loaded), domains, settings, clock)
    }

    /// As [`LocalIssuer::start`], but makes an authority if there is nothing of one, and keeps the roots in `store`.
    /// While the directory can't be loaded, what is kept there serves.
    ///
    /// # Errors
    /// The directory can't be loaded, or made, and no roots are kept. Where certificates are, nothing is made either.
    pub fn start_kept(
        directory: CaDirectory,
        store: Option<KeyStore>,
        domains: TrustDomains,
        settings: LocalIssuerSettings,
        clock: Clock,
    ) -> Result<Self, CaError> {
        let kept = match &store {
            Some(store) if !store.is_empty()? => Some(store),
            _ => None,
        };
        if kept.is_none() {
            CaDirectory::open_or_make(directory.path())?.make_if_missing(
                &domains.own,
                Validity::of_roots(),
                clock.now(),
            )?;
        }
        let stamp = directory.stamp();
        let state = match (directory.load(&domains, clock.now()), kept) {
            (Ok(loaded), kept) => {
                if let Some(kept) = kept.map(KeyStore::roots).transpose()?.flatten()
                    && !kept.iter().any(|root| loaded.roots.contains(root))
                {
                    tracing::warn!(
                        directory = %directory.path().display(),
                        root = %loaded.authority.root(),
                        "the certificate authority is another one than before the restart"
                    );
                }
                Ok(loaded)
            }
            (Err(error), None) => return Err(error),
            (Err(reason), Some(store)) => match store.roots()? {
                Some(roots) => Err((reason, roots)),
                None => {
                    let keys = store.path().display().to_string();
                    return Err(CaError::Away { reason: Box::new(reason), keys });
                }
            },
        };
        Self::with(directory, stamp, store, state, domains, settings, clock)
    }

    /// With what was loaded, or else with the roots that were kept.
    fn with(
        directory: CaDirectory,
        stamp: CaStamp,
        store: Option<KeyStore>,
        found: Result<LoadedCa, (CaError, Vec<CertificateDer<'static>>)>,
        domains: TrustDomains,
        settings: LocalIssuerSettings,
        clock: Clock,
    ) -> Result<Self, CaError> {
        let (roots, found) = match found {
            Ok(loaded) => (loaded.roots.clone(), Ok(loaded)),
            Err((reason, roots)) => (roots, Err(reason)),
        };
        let state = Arc::new(State {
            bundle: TrustBundle::new(&roots, domains)?,
            authority: ArcSwapOption::empty(),
            signer: watch::Sender::new(0),
            status: Mutex::new(CaStatus {
                signer: None,
                warnings: Vec::new(),
                loads: 0,
                failures: 0,
                error: None,
            }),
            directory,
            store,
            settings,
            clock,
        });
        match found {
            Ok(loaded) => state.take(loaded)?,
            Err(reason) => state.fail(&reason),
        }
        let follower = tokio::spawn(follow(state.clone(), stamp));
        Ok(Self { state, follower })
    }

    /// The directory's roots, as they change.
    #[must_use]
    pub fn bundle(&self) -> &TrustBundle {
        &self.state.bundle
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> CaStatus {
        self.state.status().clone()
    }
}

impl Drop for LocalIssuer {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Issuer for LocalIssuer {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> IssueFuture<'a> {
        Box::pin(async move {
            let State { authority, settings, clock, .. } = &*self.state;
            let Some(authority) = authority.load_full() else {
                let error = self.state.status().error.clone().unwrap_or_default();
                return Err(IssueError::Unavailable(error));
            };
            Ok(authority.issue(id, settings.validity, clock.now())?)
        })
    }

    fn signer(&self) -> watch::Receiver<u64> {
        self.state.signer.subscribe()
    }
}

impl State {
    fn status(&self) -> MutexGuard<'_, CaStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, loaded: LoadedCa) -> Result<(), CaError> {
        let roots_changed = self.bundle.set_roots(&loaded.roots)?;
        let old = self.authority.load_full();
        let signer_changed = old.as_ref().is_none_or(|old| !old.same_signer(&loaded.authority));
        if roots_changed || old.is_none() {
            self.keep_roots(&loaded.roots);
        }
        let authority = Arc::new(loaded.authority);
        let mut status = self.status();
        if roots_changed || signer_changed || status.error.is_some() {
            status.loads += 1;
            tracing::info!(
                signer = authority.subject(),
                root = %authority.root(),
                roots_changed,
                signer_changed,
                "certificate authority loaded"
            );
        }
        for warning in loaded.warnings.iter().filter(|w| !status.warnings.contains(w)) {
            tracing::warn!(directory = %self.directory.path().display(), "certificate authority: {warning}");
        }
        status.signer = Some(SignerStatus::of(&authority));
        status.warnings = loaded.warnings;
        status.error = None;
        drop(status);
        self.authority.store(Some(authority));
        if signer_changed {
            self.signer.send_modify(|generation| *generation += 1);
        }
        Ok(())
    }

    fn keep_roots(&self, roots: &[CertificateDer<'static>]) {
        let kept = self.store.as_ref().map_or(Ok(()), |store| store.keep_roots(roots));
        if let Err(error) = kept {
            tracing::warn!("the roots are not kept for a restart while the CA is away: {error}");
        }
    }

    fn fail(&self, error: &CaError) {
        let mut status = self.status();
        status.failures += 1;
        let text = error.to_string();
        if status.error.as_ref() == Some(&text) {
            return;
        }
        let directory = self.directory.path().display();
        match (&status.signer, &self.store) {
            (None, Some(store)) => tracing::error!(
                %directory,
                "certificate authority not loaded: only the certificates that are kept in {keys} serve, until they \
                 expire. Bring the directory back; or, to begin with a new authority, stop, empty {keys}, and start \
                 again: {text}",
                keys = store.path().display(),
            ),
            _ => tracing::error!(
                %directory,
                "certificate authority not reloaded, the last good state stays in force: {text}"
            ),
        }
        status.error = Some(text);
    }
}

/// Looks at the files, and loads them when they look other than before.
async fn follow(state: Arc<State>, mut seen: CaStamp) {
    let mut ticks = tokio::time::interval(state.settings.poll);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // A file system's clock is coarse: a write right after the first read may leave the stamp as it was. So each
    // change is read twice, one look apart; the start counts as one.
    let mut read_again = true;
    let mut looks_in_error = 0;
    loop {
        ticks.tick().await;
        let stamp = state.directory.stamp();
        let in_error = state.status().error.is_some();
        looks_in_error = if in_error { looks_in_error + 1 } else { 0 };
        let changed = stamp != seen;
        if !changed && !read_again && looks_in_error < RETRY_LOOKS {
            continue;
        }
        read_again = changed;
        looks_in_error = 0;
        seen = stamp;
        let reader = state.clone();
        let loaded = tokio::task::spawn_blocking(move || {
            let domains = reader.bundle.snapshot().trust_domains().clone();
            reader.directory.load(&domains, reader.clock.now()).and_then(|loaded| reader.take(loaded))
        });
        match loaded.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => state.fail(&error),
            // The runtime is going down, or the reader panicked, which is on record already.
            Err(error) => tracing::error!("certificate authority not read: {error}"),
        }
    }
}
