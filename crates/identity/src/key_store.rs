//! Certificates and their keys in a root-only tmpfs, with the roots that they are judged by, so that a ztunnel that was
//! restarted serves while the CA is away: the identities that it had, until their certificates expire, and by the roots
//! that it last saw. New identities, renewals and changes of the roots wait for the CA. Nothing here ever reaches a
//! disk: a directory that is not memory is refused; so nothing is left of it after the machine restarts.
//!
//! What is kept here also says that there was a CA, so that no other one is made in its place: see
//! [`LocalIssuer::start_kept`](crate::LocalIssuer::start_kept).

use std::path::Path;

use aws_lc_rs::digest;
use model::SpiffeId;
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::ca::{CaError, certificates_from_pem, certificates_to_pem, key_from_pem, key_to_pem};
use crate::issuer::Issued;
use crate::storage::{SecretDir, StorageError};
use crate::x509::Facts;

const ROOTS: &str = "roots.pem";

/// The directory. Its calls block for as long as the file system does.
#[derive(Clone, Debug)]
pub struct KeyStore {
    dir: SecretDir,
}

impl KeyStore {
    /// Uses a directory, making it (mode 0700) if it is missing; its parent must exist.
    ///
    /// # Errors
    /// It is not on a tmpfs, or others than root and this process's user can get at it.
    pub fn open(path: &Path) -> Result<Self, StorageError> {
        let dir = SecretDir::open_or_make(path)?;
        dir.check_in_memory()?;
        Ok(Self { dir })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Whether nothing was ever kept.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn is_empty(&self) -> Result<bool, StorageError> {
        Ok(self.dir.names()?.is_empty())
    }

    /// The roots that were last kept.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn roots(&self) -> Result<Option<Vec<CertificateDer<'static>>>, CaError> {
        let Some(text) = self.dir.read_public(ROOTS)? else { return Ok(None) };
        certificates_from_pem(ROOTS, &text).map(Some)
    }

    /// Keeps the roots, for a restart while the CA is away.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn keep_roots<'a>(
        &self,
        roots: impl IntoIterator<Item = &'a CertificateDer<'a>>,
    ) -> Result<(), StorageError> {
        self.dir.replace(ROOTS, certificates_to_pem(roots).as_bytes())
    }

    pub(crate) fn load(&self, id: &SpiffeId) -> Result<Option<Issued>, CaError> {
        let name = file_name(id);
        let Some(text) = self.dir.read_secret(&name, |_| true)? else { return Ok(None) };
        let chain = certificates_from_pem(&name, &text)?;
        let key = key_from_pem(&name, &text)?
            .ok_or(CaError::Pem { file: name, reason: "it holds no private key".to_owned() })?;
        Ok(Some(Issued { chain, key }))
    }

    pub(crate) fn keep(&self, id: &SpiffeId, issued: &Issued) -> Result<(), StorageError> {
        let text = certificates_to_pem(&issued.chain) + &key_to_pem(&issued.key);
        self.dir.replace(&file_name(id), text.as_bytes())
    }

    /// Removes what no longer serves anybody: certificates that have expired, as those of pods that left while nobody
    /// looked after them do. Files that can't be read stay: they are replaced when their identity is asked for.
    pub(crate) fn forget_expired(&self, now: UnixTime) -> Result<(), StorageError> {
        for name in self.dir.names()? {
            let Some(name) = name.to_str().filter(|name| name.ends_with(".pem") && *name != ROOTS) else {
                continue;
            };
            let Ok(Some(text)) = self.dir.read_secret(name, |_| true) else { continue };
            let Ok(chain) = certificates_from_pem(name, &text) else { continue };
            let facts = chain.first().and_then(|leaf| Facts::read(leaf));
            if facts.is_some_and(|facts| facts.not_after.as_secs() < now.as_secs()) {
                self.dir.remove(name)?;
            }
        }
        Ok(())
    }

    pub(crate) fn forget(&self, id: &SpiffeId) -> Result<(), StorageError> {
        self.dir.remove(&file_name(id))
    }
}

/// Names of service accounts can be longer than names of files.
fn file_name(id: &SpiffeId) -> String {
    let digest = digest::digest(&digest::SHA256, id.to_string().as_bytes());
    let hex: String = digest.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}.pem")
}
