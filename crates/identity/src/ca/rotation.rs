//! Exchanges the root of a [`CaDirectory`] without a moment at which two workloads don't trust each other.
//!
//! ```text
//!             trust_both            sign_with_new            drop_old
//!   Settled ──────────────▶ BothTrusted ──────────────▶ NewSigns ──────────────▶ Settled
//!                │                gate: all nodes                gate: no certificate
//!                ◀── abandon ──   trust the new root             of the old root is in use
//! ```
//!
//! A stage changes one file that readers look at, by one rename. Before that it writes down in `rotation.json` what
//! it is about to do, so that a stage that was cut short is completed by running it again, and running a completed
//! one again does nothing. The gates open by themselves after the time that [`Pace`] states, or when the caller
//! says that he knows ([`Consent::Acknowledged`]).

use std::time::Duration;

use model::TrustDomains;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};

use super::directory::{KEY, NEXT, ROOTS, SIGNER, STATE, signer_text};
use super::pem_text::{certificates_from_pem, certificates_to_pem, key_from_pem};
use super::{CaDirectory, CaError, CertificateAuthority, MadeCa, Validity};
use crate::clock::{Timestamp, at, later};
use crate::trust::TrustBundle;
use crate::x509::RootId;

/// Where the new signing certificate comes from.
#[derive(Clone, Debug)]
pub enum NewSigner {
    /// A root is made.
    Made(Validity),
    /// It is given, all PEM: the signing certificate with those above it, its key, and the root.
    Given {
        /// The signing certificate first.
        chain: Vec<u8>,
        /// Its private key.
        key: Vec<u8>,
        /// The root that it leads to.
        root: Vec<u8>,
    },
}

/// How long the gates stay shut by themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// From trusting both to signing with the new: time for every node to read the new bundle.
    pub settle: Duration,
    /// From signing with the new to dropping the old: the longest lifetime of a workload's certificate.
    pub lifetime: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { settle: Duration::from_secs(300), lifetime: Validity::of_workloads().lifetime }
    }
}

/// On what ground a gate is passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Consent {
    /// The time has come.
    WhenDue,
    /// The caller has seen that all nodes are ready, whatever the time.
    Acknowledged,
}

/// How far a rotation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// There is none under way.
    Settled,
    /// Old and new root are trusted, the old signs.
    BothTrusted,
    /// Old and new root are trusted, the new signs.
    NewSigns,
}

/// How far a rotation is, and what is next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RotationStatus {
    /// The stage reached.
    pub stage: Stage,
    /// The root that is coming; `None` when settled.
    pub new_root: Option<RootId>,
    /// The roots that are going.
    pub old_roots: Vec<RootId>,
    /// When the next gate opens by itself; `None` when settled.
    pub next_due: Option<UnixTime>,
}

/// Why a stage was not done.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// The gate is shut.
    #[error("too early: {waits_for}; it opens by itself at {due}, or acknowledge that it is so")]
    TooEarly {
        /// What the gate waits for.
        waits_for: &'static str,
        /// When it opens.
        due: Timestamp,
    },
    /// The stage before has not been done, or not completely.
    #[error("{missing} first")]
    OutOfOrder {
        /// What to do.
        missing: &'static str,
    },
    /// `rotation.json` can't be read.
    #[error("{STATE} is not readable: {0}; remove it if no rotation is under way")]
    State(String),
    /// The authority's files are at fault.
    #[error(transparent)]
    Ca(#[from] CaError),
}

impl From<crate::storage::StorageError> for RotationError {
    fn from(error: crate::storage::StorageError) -> Self {
        Self::Ca(error.into())
    }
}

/// What `rotation.json` holds. Times in seconds since 1970.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    stage: Stage,
    new_root: String,
    old_roots: Vec<String>,
    settle_s: u64,
    lifetime_s: u64,
    both_trusted_at: u64,
    new_signs_at: Option<u64>,
}

impl Plan {
    fn new_root(&self) -> Result<RootId, RotationError> {
        parse_id(&self.new_root)
    }

    fn old_roots(&self) -> Result<Vec<RootId>, RotationError> {
        self.old_roots.iter().map(|text| parse_id(text)).collect()
    }

    fn due(&self) -> UnixTime {
        match self.new_signs_at {
            None => later(at(self.both_trusted_at), Duration::from_secs(self.settle_s)),
            Some(time) => later(at(time), Duration::from_secs(self.lifetime_s)),
        }
    }

    fn gate(&self, consent: Consent, now: UnixTime, waits_for: &'static str) -> Result<(), RotationError> {
        let due = self.due();
        if consent == Consent::Acknowledged || now.as_secs() >= due.as_secs() {
            return Ok(());
        }
        Err(RotationError::TooEarly { waits_for, due: Timestamp(due) })
    }

    fn status(&self) -> Result<RotationStatus, RotationError> {
        Ok(RotationStatus {
            stage: self.stage,
            new_root: Some(self.new_root()?),
            old_roots: self.old_roots()?,
            next_due: Some(self.due()),
        })
    }
}

/// Says how far a rotation is.
///
/// # Errors
/// The record of it can't be read.
pub fn status(ca: &CaDirectory) -> Result<RotationStatus, RotationError> {
    match read_plan(ca)? {
        Some(plan) => plan.status(),
        None => Ok(settled()),
    }
}

/// Stage 1: the new root is trusted beside the old ones; nothing is signed with it yet. While a rotation is under
/// way, this only completes its stage 1, whatever `new` says.
///
/// # Errors
/// The directory's authority is not in order, or the given parts don't fit together.
pub fn trust_both(
    ca: &CaDirectory,
    new: &NewSigner,
    pace: Pace,
    domains: &TrustDomains,
    now: UnixTime,
) -> Result<RotationStatus, RotationError> {
    let _lock = ca.dir.lock()?;
    let mut roots = read_roots(ca, domains, now)?;
    let mut plan = match read_plan(ca)? {
        Some(plan) if plan.stage != Stage::BothTrusted => return plan.status(),
        Some(plan) => plan,
        None => begin(ca, new, pace, domains, now)?,
    };
    let new_root = plan.new_root()?;
    if bundle(&roots, domains)?.snapshot().root(&new_root).is_some() {
        return plan.status();
    }
    let next = read_next(ca)?.ok_or(RotationError::OutOfOrder {
        missing: "next.pem is gone: abandon this rotation and begin a new one",
    })?;
    roots.push(next.root);
    plan.both_trusted_at = now.as_secs();
    write_plan(ca, &plan)?;
    ca.dir.replace(ROOTS, certificates_to_pem(&roots).as_bytes())?;
    plan.status()
}

/// Stage 2: the new signing certificate signs, both roots stay trusted.
///
/// # Errors
/// Stage 1 is not complete, or its gate is shut.
pub fn sign_with_new(
    ca: &CaDirectory,
    consent: Consent,
    domains: &TrustDomains,
    now: UnixTime,
) -> Result<RotationStatus, RotationError> {
    let _lock = ca.dir.lock()?;
    let mut plan = read_plan(ca)?.ok_or(RotationError::OutOfOrder { missing: "trust both roots" })?;
    if plan.stage == Stage::BothTrusted {
        plan.gate(consent, now, "every node must trust the new root before anything is signed with it")?;
    }
    if let Some(next) = read_next(ca)? {
        let roots = read_roots(ca, domains, now)?;
        let key = next.signer.key;
        CertificateAuthority::new(&next.signer.chain, &key, &bundle(&roots, domains)?, now)?;
        if plan.stage == Stage::BothTrusted {
            plan.stage = Stage::NewSigns;
            plan.new_signs_at = Some(now.as_secs());
            write_plan(ca, &plan)?;
        }
        ca.dir.rename(NEXT, SIGNER)?;
    } else if plan.stage == Stage::BothTrusted {
        return Err(RotationError::OutOfOrder { missing: "next.pem is gone: trust both roots" });
    }
    // The key of the old one, if it was a file of its own: `ca.pem` has the new one in it.
    ca.dir.remove(KEY)?;
    plan.status()
}

/// Stage 3: the old roots are no longer trusted.
///
/// # Errors
/// Stage 2 is not complete, or its gate is shut.
pub fn drop_old(
    ca: &CaDirectory,
    consent: Consent,
    domains: &TrustDomains,
    now: UnixTime,
) -> Result<RotationStatus, RotationError> {
    let _lock = ca.dir.lock()?;
    let Some(plan) = read_plan(ca)? else { return Ok(settled()) };
    if plan.stage != Stage::NewSigns {
        return Err(RotationError::OutOfOrder { missing: "sign with the new root" });
    }
    plan.gate(consent, now, "certificates of the old root may still be in use")?;
    let loaded = ca.load(domains, now)?;
    if loaded.authority.root() != plan.new_root()? {
        return Err(RotationError::OutOfOrder {
            missing: "the old root signs still: sign with the new root",
        });
    }
    keep_roots(ca, &loaded.roots, domains, &plan.old_roots()?)?;
    ca.dir.remove(STATE)?;
    Ok(settled())
}

/// Takes stage 1 back: the new root is no longer trusted, and its key is gone.
///
/// # Errors
/// The new root signs already: then the way out is forward, and another rotation.
pub fn abandon(
    ca: &CaDirectory,
    domains: &TrustDomains,
    now: UnixTime,
) -> Result<RotationStatus, RotationError> {
    let _lock = ca.dir.lock()?;
    let Some(plan) = read_plan(ca)? else { return Ok(settled()) };
    if plan.stage != Stage::BothTrusted {
        return Err(RotationError::OutOfOrder {
            missing: "the new root signs already: complete this rotation",
        });
    }
    let new_root = plan.new_root()?;
    if !plan.old_roots()?.is_empty() {
        keep_roots(ca, &read_roots(ca, domains, now)?, domains, &[new_root])?;
    }
    ca.dir.remove(NEXT)?;
    ca.dir.remove(STATE)?;
    Ok(settled())
}

/// A signer that waits in `next.pem`, with its root.
struct Next {
    signer: MadeCa,
    root: CertificateDer<'static>,
}

/// Makes or takes the new signer, and writes down that stage 1 has begun.
fn begin(
    ca: &CaDirectory,
    new: &NewSigner,
    pace: Pace,
    domains: &TrustDomains,
    now: UnixTime,
) -> Result<Plan, RotationError> {
    let old = ca.load(domains, now)?;
    let (mut signer, roots) = match new {
        NewSigner::Made(validity) => {
            let made = CertificateAuthority::make_root(&domains.own, *validity, now)?;
            let roots = made.chain.clone();
            (made, roots)
        }
        NewSigner::Given { chain, key, root } => {
            let chain = certificates_from_pem("the given chain", chain)?;
            let key = key_from_pem("the given key", key)?
                .ok_or_else(|| CaError::Key("the text holds no private key".to_owned()))?;
            (MadeCa { chain, key }, certificates_from_pem("the given root", root)?)
        }
    };
    let trust = bundle(&roots, domains)?;
    let new_root = CertificateAuthority::new(&signer.chain, &signer.key, &trust, now)?.root();
    let root = trust.snapshot().root(&new_root).map(|root| root.der.clone());
    // The root goes last in next.pem, whence stage 1 takes it when it is run again.
    if let Some(root) = root
        && signer.chain.last() != Some(&root)
    {
        signer.chain.push(root);
    }
    let old_root = old.authority.root();
    let plan = Plan {
        stage: Stage::BothTrusted,
        new_root: new_root.to_string(),
        // A new signing certificate below the same root: there is nothing to drop.
        old_roots: if old_root == new_root { Vec::new() } else { vec![old_root.to_string()] },
        settle_s: pace.settle.as_secs(),
        lifetime_s: pace.lifetime.as_secs(),
        both_trusted_at: now.as_secs(),
        new_signs_at: None,
    };
    ca.dir.replace(NEXT, signer_text(&signer).as_bytes())?;
    write_plan(ca, &plan)?;
    Ok(plan)
}

fn read_next(ca: &CaDirectory) -> Result<Option<Next>, RotationError> {
    let Some(text) = ca.dir.read_secret(NEXT, |_| true)? else { return Ok(None) };
    let chain = certificates_from_pem(NEXT, &text)?;
    let key = key_from_pem(NEXT, &text)?.ok_or_else(|| CaError::Pem {
        file: NEXT.to_owned(),
        reason: "it holds no private key".to_owned(),
    })?;
    let root = chain.last().cloned().ok_or(CaError::NoCertificate)?;
    Ok(Some(Next { signer: MadeCa { chain, key }, root }))
}

/// The roots in force; those of the signer if there is no file of them.
fn read_roots(
    ca: &CaDirectory,
    domains: &TrustDomains,
    now: UnixTime,
) -> Result<Vec<CertificateDer<'static>>, RotationError> {
    match ca.dir.read_public(ROOTS)? {
        Some(text) => Ok(certificates_from_pem(ROOTS, &text)?),
        None => Ok(ca.load(domains, now)?.roots),
    }
}

/// Writes the bundle without the roots in `drop`.
fn keep_roots(
    ca: &CaDirectory,
    roots: &[CertificateDer<'static>],
    domains: &TrustDomains,
    drop: &[RootId],
) -> Result<(), RotationError> {
    let snapshot = bundle(roots, domains)?.snapshot();
    let kept: Vec<_> = snapshot
        .roots()
        .iter()
        .filter(|root| !drop.contains(&root.id))
        .map(|root| root.der.clone())
        .collect();
    bundle(&kept, domains)?;
    if kept != roots {
        ca.dir.replace(ROOTS, certificates_to_pem(&kept).as_bytes())?;
    }
    Ok(())
}

fn bundle(roots: &[CertificateDer<'_>], domains: &TrustDomains) -> Result<TrustBundle, RotationError> {
    Ok(TrustBundle::new(roots, domains.clone()).map_err(CaError::from)?)
}

fn read_plan(ca: &CaDirectory) -> Result<Option<Plan>, RotationError> {
    let Some(text) = ca.dir.read_public(STATE)? else { return Ok(None) };
    serde_json::from_slice(&text).map(Some).map_err(|e| RotationError::State(e.to_string()))
}

fn write_plan(ca: &CaDirectory, plan: &Plan) -> Result<(), RotationError> {
    let text = serde_json::to_vec_pretty(plan).map_err(|e| RotationError::State(e.to_string()))?;
    Ok(ca.dir.replace(STATE, &text)?)
}

fn parse_id(text: &str) -> Result<RootId, RotationError> {
    RootId::from_hex(text).ok_or_else(|| RotationError::State(format!("{text:?} is no root's id")))
}

fn settled() -> RotationStatus {
    RotationStatus { stage: Stage::Settled, new_root: None, old_roots: Vec::new(), next_due: None }
}
