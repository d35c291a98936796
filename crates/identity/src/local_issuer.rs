//! The local CA as an [`Issuer`], following its directory while it changes.
//!
//! Invariants:
//! * what is in force is always the last whole and valid state of the directory;
//! * a new root is trusted before anything signed by it is issued.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use model::{SpiffeId, TrustDomains};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::ca::{CaDirectory, CaError, CaStamp, CaWarning, CertificateAuthority, LoadedCa, Validity};
use crate::clock::{Clock, Timestamp};
use crate::issuer::{IssueFuture, Issuer};
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

/// How the local CA is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaStatus {
    /// The signing certificate's subject.
    pub subject: String,
    /// Its serial number, hex.
    pub serial: String,
    /// The root that it leads to.
    pub root: RootId,
    /// When it, or what it depends on, expires.
    pub not_after: Timestamp,
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
    bundle: TrustBundle,
    settings: LocalIssuerSettings,
    clock: Clock,
    authority: ArcSwap<CertificateAuthority>,
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
        let status = CaStatus {
            subject: loaded.authority.subject().to_owned(),
            serial: loaded.authority.serial().to_owned(),
            root: loaded.authority.root(),
            not_after: Timestamp(loaded.authority.not_after()),
            warnings: loaded.warnings,
            loads: 1,
            failures: 0,
            error: None,
        };
        for warning in &status.warnings {
            tracing::warn!(directory = %directory.path().display(), "certificate authority: {warning}");
        }
        let state = Arc::new(State {
            bundle: TrustBundle::new(&loaded.roots, domains)?,
            authority: ArcSwap::from_pointee(loaded.authority),
            signer: watch::Sender::new(0),
            status: Mutex::new(status),
            directory,
            settings,
            clock,
        });
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
            Ok(authority.load().issue(id, settings.validity, clock.now())?)
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
        let signer_changed = !self.authority.load().same_signer(&loaded.authority);
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
        authority.subject().clone_into(&mut status.subject);
        authority.serial().clone_into(&mut status.serial);
        status.root = authority.root();
        status.not_after = Timestamp(authority.not_after());
        status.warnings = loaded.warnings;
        status.error = None;
        drop(status);
        self.authority.store(authority);
        if signer_changed {
            self.signer.send_modify(|generation| *generation += 1);
        }
        Ok(())
    }

    fn fail(&self, error: &CaError) {
        let mut status = self.status();
        status.failures += 1;
        let text = error.to_string();
        if status.error.as_ref() != Some(&text) {
            tracing::error!(
                directory = %self.directory.path().display(),
                "certificate authority not reloaded, the last good state stays in force: {text}"
            );
            status.error = Some(text);
        }
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
            reader.directory.load(&domains, reader.clock.now())
        });
        match loaded.await {
            Ok(loaded) => {
                if let Err(error) = loaded.and_then(|loaded| state.take(loaded)) {
                    state.fail(&error);
                }
            }
            // The runtime is going down, or the reader panicked, which is on record already.
            Err(error) => tracing::error!("certificate authority not read: {error}"),
        }
    }
}
