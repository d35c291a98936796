//! The certificate authority as a directory of files.
//!
//! | file            | content |
//! |-----------------|---------|
//! | `roots.pem`     | the trust bundle, one root or several. May be missing if `ca.pem` ends in a self-signed root |
//! | `ca.pem`        | the signing certificate, then those above it; may hold the private key too |
//! | `ca.key`        | the private key, if `ca.pem` does not hold it |
//! | `next.pem`      | during a rotation: what will be `ca.pem` |
//! | `rotation.json` | during a rotation: how far it is, see [`rotation`](super::rotation) |
//!
//! An authority that is made here has its key in `ca.pem`, so that exchanging certificate and key together is one
//! rename, which no crash can leave half done.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::{TrustDomain, TrustDomains};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::pem_text::{certificates_from_pem, certificates_to_pem, key_from_pem, key_to_pem};
use super::{CaError, CertificateAuthority, MadeCa, Validity};
use crate::clock::{Timestamp, between};
use crate::storage::{DirLock, FileStamp, SecretDir, StorageError};
use crate::trust::TrustBundle;
use crate::x509::{Facts, RootId};

pub(super) const ROOTS: &str = "roots.pem";
pub(super) const SIGNER: &str = "ca.pem";
pub(super) const KEY: &str = "ca.key";
pub(super) const NEXT: &str = "next.pem";
pub(super) const STATE: &str = "rotation.json";

/// Roots and signing certificates that expire sooner are warned of.
const EXPIRES_SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// Whether [`CaDirectory::make_if_missing`] made anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Creation {
    /// A new authority.
    Made,
    /// The directory already has one.
    Existed,
}

/// What is not wrong, but should be known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CaWarning {
    /// The signing key is on a disk.
    NotInMemory {
        /// The directory.
        path: PathBuf,
    },
    /// A root or the signing chain expires soon.
    ExpiresSoon {
        /// Which.
        subject: String,
        /// When.
        not_after: Timestamp,
    },
}

impl fmt::Display for CaWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInMemory { path } => {
                write!(f, "the signing key in {} is on a disk: put the directory on a tmpfs", path.display())
            }
            Self::ExpiresSoon { subject, not_after } => {
                write!(f, "{subject} expires at {not_after}: rotate it")
            }
        }
    }
}

/// What a directory held.
#[derive(Debug)]
pub struct LoadedCa {
    /// Who signs.
    pub authority: CertificateAuthority,
    /// Who is trusted.
    pub roots: Vec<CertificateDer<'static>>,
    /// What should be known.
    pub warnings: Vec<CaWarning>,
}

/// What the files looked like; equal stamps mean that nothing was touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CaStamp([Option<FileStamp>; 3]);

/// A directory with a certificate authority. Its calls block for as long as the file system does. Each use checks that
/// nobody but root and this process's user can get at it.
#[derive(Clone, Debug)]
pub struct CaDirectory {
    pub(super) dir: SecretDir,
}

impl CaDirectory {
    /// Uses a directory that exists.
    ///
    /// # Errors
    /// It does not exist, or others than root and this process's user can get at it.
    pub fn open(path: &Path) -> Result<Self, CaError> {
        Ok(Self { dir: SecretDir::open(path)? })
    }

    /// Uses a directory, making it (mode 0700) if it is missing; its parent must exist.
    ///
    /// # Errors
    /// It can't be made, or others than root and this process's user can get at it.
    pub fn open_or_make(path: &Path) -> Result<Self, CaError> {
        Ok(Self { dir: SecretDir::open_or_make(path)? })
    }

    /// A directory that may not be there: whoever reads it then learns that.
    #[must_use]
    pub fn named(path: &Path) -> Self {
        Self { dir: SecretDir::named(path) }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Makes a root for `domain` if the directory has nothing of an authority. Several processes may call this at
    /// once: one makes it, all then find the same. That it was made is logged: peers of another authority are
    /// strangers from then on.
    ///
    /// # Errors
    /// The directory has some files of an authority and no `ca.pem`, or can't be read; files can't be written, or keys
    /// not be made.
    pub fn make_if_missing(
        &self,
        domain: &TrustDomain,
        validity: Validity,
        now: UnixTime,
    ) -> Result<Creation, CaError> {
        let lock = self.dir.lock()?;
        if self.dir.exists(SIGNER)? {
            return Ok(Creation::Existed);
        }
        for file in [ROOTS, KEY, NEXT, STATE] {
            if self.dir.exists(file)? {
                return Err(CaError::Incomplete { file, directory: self.dir.path().display().to_string() });
            }
        }
        let made = CertificateAuthority::make_root(domain, validity, now)?;
        self.install(&made, &lock)?;
        let root = own_root(&made.chain)
            .and_then(|root| Some(RootId::of(&webpki::anchor_from_trusted_cert(&root).ok()?)))
            .map(|id| id.to_string());
        tracing::warn!(
            directory = %self.dir.path().display(),
            root,
            "there was no certificate authority: a new one was made. Nodes that do not use this same directory do not \
             trust this one"
        );
        Ok(Creation::Made)
    }

    /// Puts a given authority into an empty directory: `chain` with the signing certificate first, `key`, and the
    /// `roots` that vouch for it, all PEM.
    ///
    /// # Errors
    /// They don't fit together, or the directory already has an authority.
    pub fn install_given(
        &self,
        chain: &[u8],
        key: &[u8],
        roots: &[u8],
        domain: &TrustDomain,
        now: UnixTime,
    ) -> Result<(), CaError> {
        let _lock = self.dir.lock()?;
        let there_is = |file: &str| CaError::Pem {
            file: self.dir.path().join(file).display().to_string(),
            reason: "there is an authority already; rotate it instead".to_owned(),
        };
        for file in [SIGNER, KEY] {
            if self.dir.exists(file)? {
                return Err(there_is(file));
            }
        }
        let chain = certificates_from_pem("the given chain", chain)?;
        let key = key_from_pem("the given key", key)?
            .ok_or_else(|| CaError::Key("the text holds no private key".to_owned()))?;
        let roots = certificates_from_pem("the given roots", roots)?;
        let bundle = TrustBundle::new(&roots, TrustDomains::only(domain.clone()))?;
        CertificateAuthority::new(&chain, &key, &bundle, now)?;
        let roots = certificates_to_pem(&roots);
        match self.dir.read_public(ROOTS)? {
            // This call was cut short before.
            Some(text) if text == roots.as_bytes() => {}
            Some(_) => return Err(there_is(ROOTS)),
            None => self.dir.replace(ROOTS, roots.as_bytes())?,
        }
        self.dir.replace(SIGNER, signer_text(&MadeCa { chain, key }).as_bytes())?;
        Ok(())
    }

    /// Reads and checks all files.
    ///
    /// # Errors
    /// Says which file and what is wrong with it.
    pub fn load(&self, domains: &TrustDomains, now: UnixTime) -> Result<LoadedCa, CaError> {
        self.dir.check()?;
        let missing = |file| CaError::Missing { file, directory: self.dir.path().display().to_string() };
        let holds_key = |text: &[u8]| !matches!(key_from_pem(SIGNER, text), Ok(None));
        let signer = self.dir.read_secret(SIGNER, holds_key)?.ok_or_else(|| missing(SIGNER))?;
        let chain = certificates_from_pem(SIGNER, &signer)?;
        let key = match key_from_pem(SIGNER, &signer)? {
            Some(key) => key,
            None => {
                let text = self.dir.read_secret(KEY, |_| true)?.ok_or_else(|| missing(KEY))?;
                key_from_pem(KEY, &text)?.ok_or_else(|| CaError::Pem {
                    file: KEY.to_owned(),
                    reason: "it holds no private key".to_owned(),
                })?
            }
        };
        let roots = match self.dir.read_public(ROOTS)? {
            Some(text) => certificates_from_pem(ROOTS, &text)?,
            None => own_root(&chain).map(|root| vec![root]).ok_or_else(|| missing(ROOTS))?,
        };
        let bundle = TrustBundle::new(&roots, domains.clone())?;
        let authority = CertificateAuthority::new(&chain, &key, &bundle, now)?;
        let warnings = self.warnings(&authority, &bundle, now);
        Ok(LoadedCa { authority, roots, warnings })
    }

    /// What the files look like from outside.
    pub(crate) fn stamp(&self) -> CaStamp {
        CaStamp([self.dir.stamp(ROOTS), self.dir.stamp(SIGNER), self.dir.stamp(KEY)])
    }

    /// Writes a made authority. The roots come second: without them the root in `ca.pem` counts, so that a crash
    /// in between leaves a whole authority.
    fn install(&self, made: &MadeCa, _lock: &DirLock) -> Result<(), CaError> {
        self.dir.replace(SIGNER, signer_text(made).as_bytes())?;
        if let Some(root) = own_root(&made.chain) {
            self.dir.replace(ROOTS, certificates_to_pem([&root]).as_bytes())?;
        }
        Ok(())
    }

    fn warnings(
        &self,
        authority: &CertificateAuthority,
        bundle: &TrustBundle,
        now: UnixTime,
    ) -> Vec<CaWarning> {
        let mut warnings = Vec::new();
        if let Err(StorageError::NotInMemory { path, .. }) = self.dir.check_in_memory() {
            warnings.push(CaWarning::NotInMemory { path });
        }
        let trust = bundle.snapshot();
        let roots = trust.roots().iter().map(|root| (root.subject.as_str(), root.not_after));
        for (subject, not_after) in roots.chain([(authority.subject(), authority.not_after())]) {
            let warning =
                CaWarning::ExpiresSoon { subject: subject.to_owned(), not_after: Timestamp(not_after) };
            // A root may be the signer too.
            if between(now, not_after) < EXPIRES_SOON && !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
        warnings
    }
}

/// The content of `ca.pem` with the key in it.
pub(super) fn signer_text(made: &MadeCa) -> String {
    certificates_to_pem(&made.chain) + &key_to_pem(&made.key)
}

/// The self-signed certificate at the end of a chain.
fn own_root(chain: &[CertificateDer<'static>]) -> Option<CertificateDer<'static>> {
    chain.last().filter(|der| Facts::read(der).is_some_and(|facts| facts.self_issued)).cloned()
}
