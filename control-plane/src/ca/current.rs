//! The authority in force in this replica: exchanged whole, read by everything that signs, serves or tells of roots.
//!
//! Invariants:
//! * what is in force was whole and valid when it was read; a Secret that no longer is leaves it as it is;
//! * nothing is signed by what was not confirmed for [`MAX_STALE`]: the gate that lets an old root go counts on it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use identity::{CertificateAuthority, Clock, RootId, Timestamp, certificates_to_pem};
use model::TrustDomains;
use rustls_pki_types::UnixTime;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::record::Record;

/// So long the Secret may be out of reach before this replica signs nothing any more.
pub const MAX_STALE: Duration = Duration::from_secs(300);

/// A record with what it makes.
#[derive(Debug)]
pub struct InForce {
    /// The record.
    pub record: Record,
    /// What signs.
    pub authority: CertificateAuthority,
    /// All roots, PEM.
    pub roots_pem: String,
}

impl InForce {
    /// Of a record that was checked.
    #[must_use]
    pub fn new(record: Record, authority: CertificateAuthority) -> Self {
        let roots_pem = certificates_to_pem(&record.roots);
        Self { record, authority, roots_pem }
    }

    /// When the first of the roots expires.
    #[must_use]
    pub fn first_root_expiry(&self, domains: &TrustDomains) -> Option<UnixTime> {
        let bundle = identity::TrustBundle::new(&self.record.roots, domains.clone()).ok()?;
        bundle.snapshot().roots().iter().map(|root| root.not_after).min_by_key(UnixTime::as_secs)
    }
}

/// How the authority is doing, for `/debug` and for people.
#[derive(Clone, Debug, Serialize)]
pub struct CaStatus {
    /// The signing certificate's subject; `None` before there is one.
    pub signer: Option<String>,
    /// The root that it leads to.
    pub root: Option<String>,
    /// When it, or what it depends on, expires.
    pub expires: Option<String>,
    /// The roots that are trusted.
    pub roots: Vec<String>,
    /// What a rotation waits for, if there is one.
    pub rotation: Option<String>,
    /// Why what the Secret holds now is not in force, or can't be read.
    pub error: Option<String>,
    /// What is wrong with `cacerts`.
    pub given_error: Option<String>,
    /// ConfigMaps for the roots that others keep, and that are left alone: how many, by who keeps them.
    pub of_others: BTreeMap<String, usize>,
}

/// Notes beside what is in force.
#[derive(Debug, Default)]
struct Notes {
    confirmed: Option<Instant>,
    error: Option<String>,
    given_error: Option<String>,
    rotation: Option<String>,
    failures: u64,
    of_others: BTreeMap<String, usize>,
}

/// The authority in force; clones share it.
#[derive(Clone, Debug)]
pub struct Current(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    in_force: ArcSwapOption<InForce>,
    domains: ArcSwap<TrustDomains>,
    clock: Clock,
    notes: Mutex<Notes>,
    changes: watch::Sender<u64>,
}

impl Current {
    /// Nothing is in force yet.
    #[must_use]
    pub fn new(domains: TrustDomains, clock: Clock) -> Self {
        Self(Arc::new(Inner {
            in_force: ArcSwapOption::empty(),
            domains: ArcSwap::from_pointee(domains),
            clock,
            notes: Mutex::default(),
            changes: watch::Sender::new(0),
        }))
    }

    /// What is in force.
    #[must_use]
    pub fn get(&self) -> Option<Arc<InForce>> {
        self.0.in_force.load_full()
    }

    /// What is in force and may sign; the reason if nothing may.
    ///
    /// # Errors
    /// There is no authority, or it is not known any more whether it still is the one.
    pub fn signing(&self) -> Result<Arc<InForce>, String> {
        let notes = self.notes();
        let Some(in_force) = self.get() else {
            let why = notes.error.as_deref().unwrap_or("it has not been read yet");
            return Err(format!("the certificate authority is not loaded: {why}"));
        };
        match notes.confirmed {
            Some(confirmed) if confirmed.elapsed() <= MAX_STALE => Ok(in_force),
            _ => Err(format!(
                "the certificate authority could not be confirmed for {MAX_STALE:?}, so nothing is signed: {}",
                notes.error.as_deref().unwrap_or("its Secret was not read")
            )),
        }
    }

    /// Trust domain and aliases.
    #[must_use]
    pub fn domains(&self) -> Arc<TrustDomains> {
        self.0.domains.load_full()
    }

    /// Puts other trust domains in force.
    pub fn set_domains(&self, domains: TrustDomains) {
        self.0.domains.store(Arc::new(domains));
    }

    /// The time that certificates are judged by.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// Counts the changes of what is in force.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> CaStatus {
        let in_force = self.get();
        let notes = self.notes();
        let roots = in_force.as_ref().map(|in_force| in_force.record.root_ids()).unwrap_or_default();
        CaStatus {
            signer: in_force.as_ref().map(|i| i.authority.subject().to_owned()),
            root: in_force.as_ref().map(|i| i.authority.root().to_string()),
            expires: in_force.as_ref().map(|i| Timestamp(i.authority.not_after()).to_string()),
            roots: roots.iter().map(RootId::to_string).collect(),
            rotation: notes.rotation.clone(),
            error: notes.error.clone(),
            given_error: notes.given_error.clone(),
            of_others: notes.of_others.clone(),
        }
    }

    /// Times that the Secret could not be read or used.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.notes().failures
    }

    /// Puts a record in force, unless it is already.
    pub(super) fn put(&self, in_force: InForce) {
        let same = self.get().is_some_and(|old| old.record == in_force.record);
        if !same {
            tracing::info!(
                signer = in_force.authority.subject(),
                root = %in_force.authority.root(),
                roots = in_force.record.root_ids().len(),
                rotation = in_force.record.state.rotation.is_some(),
                "certificate authority in force"
            );
            self.0.in_force.store(Some(Arc::new(in_force)));
            self.0.changes.send_modify(|count| *count += 1);
        }
        let mut notes = self.notes();
        notes.confirmed = Some(Instant::now());
        notes.error = None;
    }

    /// The Secret was read and is as it was, or is broken: what is in force stays so.
    pub(super) fn confirm(&self) {
        self.notes().confirmed = Some(Instant::now());
    }

    /// What is in force is what the Secret holds, whatever was wrong before.
    pub(super) fn recovered(&self) {
        self.notes().error = None;
    }

    /// Notes why the Secret is not in force, and logs it when it is news.
    pub(super) fn fail(&self, error: &str) {
        let signs = self.get().is_some();
        let mut notes = self.notes();
        notes.failures += 1;
        if notes.error.as_deref() != Some(error) {
            tracing::error!(last_good_in_force = signs, "certificate authority: {error}");
            notes.error = Some(error.to_owned());
        }
    }

    /// Notes what is wrong with `cacerts`, or that it is right.
    pub(super) fn note_given(&self, error: Option<String>) {
        let mut notes = self.notes();
        if let Some(error) = error.as_ref().filter(|error| notes.given_error.as_ref() != Some(error)) {
            tracing::error!("the given certificate authority is not taken over: {error}");
            notes.failures += 1;
        }
        notes.given_error = error;
    }

    /// Notes what a rotation waits for.
    pub(super) fn note_rotation(&self, text: Option<String>) {
        self.notes().rotation = text;
    }

    /// Notes how many ConfigMaps others keep.
    pub(super) fn note_others(&self, of_others: BTreeMap<String, usize>) {
        self.notes().of_others = of_others;
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
