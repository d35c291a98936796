//! The certificate authority as a Secret holds it.
//!
//! | key                                            | content |
//! |------------------------------------------------|---------|
//! | `ca-cert.pem`                                  | the signing certificate |
//! | `ca-key.pem`                                   | its private key |
//! | `cert-chain.pem`                               | the certificates between it and the root, may be empty |
//! | `root-cert.pem`                                | all roots that are trusted, one or several |
//! | `next-ca-cert.pem`, `-key`, `next-cert-chain`  | during a rotation: who will sign |
//! | `state.json`                                   | how far a rotation is, the longest lifetime that was given |
//!
//! The first four are those of Istio's `cacerts`, which is read by the same code; the others are in our own Secret only.
//! A `cacerts` may have the keys of the type `kubernetes.io/tls` instead, as cert-manager writes it ([`TlsForm`]).
//! A [`Record`] is such content that was read and checked, so that it can sign; what can't is a [`SecretError`], which
//! names the Secret, the key in it, and what to do.

use std::collections::BTreeMap;

use identity::{
    CaError, CertificateAuthority, MadeCa, RootId, TrustBundle, certificates_from_pem, certificates_to_pem,
    key_from_pem, key_to_pem,
};
use k8s_openapi::ByteString;
use model::TrustDomains;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use serde::{Deserialize, Serialize};

use super::rotation::Rotation;

pub(super) const CA_CERT: &str = "ca-cert.pem";
pub(super) const CA_KEY: &str = "ca-key.pem";
pub(super) const CERT_CHAIN: &str = "cert-chain.pem";
pub(super) const ROOT_CERT: &str = "root-cert.pem";
const NEXT_CERT: &str = "next-ca-cert.pem";
const NEXT_KEY: &str = "next-ca-key.pem";
const NEXT_CHAIN: &str = "next-cert-chain.pem";
pub(super) const STATE: &str = "state.json";

/// The keys of a Secret of the type `kubernetes.io/tls`, each behind the one whose place it takes.
const TLS_KEYS: [(&str, &str); 4] =
    [(CA_CERT, "tls.crt"), (CERT_CHAIN, "tls.crt"), (CA_KEY, "tls.key"), (ROOT_CERT, "ca.crt")];

/// What a Secret holds: bytes by key.
pub type SecretData = BTreeMap<String, ByteString>;

/// What is wrong with a Secret, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Secret {secret}, key {key}: {reason}. {remedy}")]
pub struct SecretError {
    /// Namespace and name.
    pub secret: String,
    /// The key in it.
    pub key: &'static str,
    /// What is wrong.
    pub reason: String,
    /// What to do.
    pub remedy: String,
}

/// Which Secret is read; errors name it.
#[derive(Clone, Debug)]
pub struct SecretName {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// What to do about a broken one.
    pub remedy: &'static str,
}

impl SecretName {
    fn error(&self, key: &'static str, reason: impl std::fmt::Display) -> SecretError {
        SecretError {
            secret: format!("{}/{}", self.namespace, self.name),
            key,
            reason: reason.to_string(),
            remedy: self.remedy.to_owned(),
        }
    }
}

/// A Secret of the type `kubernetes.io/tls`, in the keys of a [`Record`]: `tls.crt` has the signing certificate and those
/// above it, `ca.crt` the root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsForm(SecretData);

impl TlsForm {
    /// What a Secret holds, if it is of this form. Its keys go before the others, as Istio has it.
    #[must_use]
    pub fn of(data: &SecretData) -> Option<Self> {
        data.contains_key("tls.crt").then_some(())?;
        let known = TLS_KEYS.iter().filter(|(own, _)| *own != CERT_CHAIN);
        let held = known.filter_map(|(own, key)| Some(((*own).to_owned(), data.get(*key)?.clone())));
        Some(Self(held.collect()))
    }

    /// In the keys of a [`Record`].
    #[must_use]
    pub fn data(&self) -> &SecretData {
        &self.0
    }

    /// An error about it, with the key that the Secret has.
    #[must_use]
    pub fn named(error: SecretError) -> SecretError {
        let key = TLS_KEYS.iter().find(|(own, _)| *own == error.key).map_or(error.key, |(_, key)| key);
        SecretError { key, ..error }
    }
}

/// Who signs: the certificate first, those above it, without the root; and the key.
#[derive(Debug)]
pub struct Signer {
    /// The signing certificate first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its private key.
    pub key: PrivateKeyDer<'static>,
}

impl Clone for Signer {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl PartialEq for Signer {
    fn eq(&self, other: &Self) -> bool {
        self.chain == other.chain && self.key.secret_der() == other.key.secret_der()
    }
}

impl Eq for Signer {}

impl From<MadeCa> for Signer {
    fn from(made: MadeCa) -> Self {
        Self { chain: made.chain, key: made.key }
    }
}

/// What is remembered beside keys and certificates.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// The longest lifetime, in seconds, that any replica may have given a certificate: none gives a longer one, and
    /// it only grows. By it, it is known when nothing is left that a former root signed.
    pub longest_lifetime_s: u64,
    /// The rotation under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<Rotation>,
    /// Whether the authority was given (`cacerts`), and not made here.
    #[serde(default)]
    pub given: bool,
}

/// A whole authority: it was checked that `signer` signs and `roots` vouch for it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Who signs.
    pub signer: Signer,
    /// Who is trusted.
    pub roots: Vec<CertificateDer<'static>>,
    /// Who will sign.
    pub next: Option<Signer>,
    /// The rest.
    pub state: State,
}

impl Record {
    /// A record of a new root or a given signer.
    #[must_use]
    pub fn settled(
        signer: Signer,
        roots: Vec<CertificateDer<'static>>,
        longest_lifetime_s: u64,
        given: bool,
    ) -> Self {
        Self { signer, roots, next: None, state: State { longest_lifetime_s, rotation: None, given } }
    }

    /// Reads a Secret, without looking whether it can sign.
    ///
    /// # Errors
    /// A key is missing or does not hold what it should.
    pub fn read(name: &SecretName, data: &SecretData) -> Result<Self, SecretError> {
        let signer = read_signer(name, data, CA_CERT, CA_KEY, CERT_CHAIN)?;
        let roots = certificates(name, data, ROOT_CERT)?;
        let next = match data.contains_key(NEXT_CERT) {
            true => Some(read_signer(name, data, NEXT_CERT, NEXT_KEY, NEXT_CHAIN)?),
            false => None,
        };
        let state = match data.get(STATE) {
            Some(text) => serde_json::from_slice(&text.0).map_err(|e| name.error(STATE, e))?,
            None => State::default(),
        };
        Ok(Self { signer, roots, next, state })
    }

    /// What a Secret holds for this record.
    ///
    /// # Errors
    /// The state can't be written, which does not happen.
    pub fn write(&self) -> Result<SecretData, serde_json::Error> {
        let mut data = SecretData::new();
        write_signer(&mut data, &self.signer, CA_CERT, CA_KEY, CERT_CHAIN);
        if let Some(next) = &self.next {
            write_signer(&mut data, next, NEXT_CERT, NEXT_KEY, NEXT_CHAIN);
        }
        put(&mut data, ROOT_CERT, certificates_to_pem(&self.roots).into_bytes());
        put(&mut data, STATE, serde_json::to_vec_pretty(&self.state)?);
        Ok(data)
    }

    /// Checks all parts, and makes what signs.
    ///
    /// # Errors
    /// Says which key of the Secret is at fault.
    pub fn authority(
        &self,
        name: &SecretName,
        domains: &TrustDomains,
        now: UnixTime,
    ) -> Result<CertificateAuthority, SecretError> {
        let bundle = TrustBundle::new(&self.roots, domains.clone()).map_err(|e| name.error(ROOT_CERT, e))?;
        if let Some(next) = &self.next {
            CertificateAuthority::new(&next.chain, &next.key, &bundle, now)
                .map_err(|e| name.error(if at_key(&e) { NEXT_KEY } else { NEXT_CERT }, e))?;
        }
        CertificateAuthority::new(&self.signer.chain, &self.signer.key, &bundle, now)
            .map_err(|e| name.error(at_fault(&e), e))
    }

    /// The ids of the roots that are trusted.
    #[must_use]
    pub fn root_ids(&self) -> Vec<RootId> {
        ids(&self.roots)
    }
}

/// The ids of certificates, each once.
#[must_use]
pub fn ids(roots: &[CertificateDer<'_>]) -> Vec<RootId> {
    let mut ids = Vec::new();
    for id in roots.iter().filter_map(RootId::of_certificate) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

fn at_key(error: &CaError) -> bool {
    matches!(error, CaError::Key(_) | CaError::KeyMismatch { .. })
}

/// The key of the Secret that people should look at.
fn at_fault(error: &CaError) -> &'static str {
    match error {
        error if at_key(error) => CA_KEY,
        CaError::Untrusted { .. } | CaError::Bundle(_) => ROOT_CERT,
        CaError::Malformed { position } if *position > 1 => CERT_CHAIN,
        _ => CA_CERT,
    }
}

fn bytes<'a>(name: &SecretName, data: &'a SecretData, key: &'static str) -> Result<&'a [u8], SecretError> {
    match data.get(key) {
        Some(bytes) if !bytes.0.is_empty() => Ok(&bytes.0),
        Some(_) => Err(name.error(key, "it is empty")),
        None => Err(name.error(key, "it is missing")),
    }
}

fn certificates(
    name: &SecretName,
    data: &SecretData,
    key: &'static str,
) -> Result<Vec<CertificateDer<'static>>, SecretError> {
    certificates_from_pem(key, bytes(name, data, key)?).map_err(|e| name.error(key, reason(&e)))
}

/// What the error says beside the name of the file, which is the key of the Secret here.
fn reason(error: &CaError) -> String {
    match error {
        CaError::Pem { reason, .. } => reason.clone(),
        other => other.to_string(),
    }
}

fn read_signer(
    name: &SecretName,
    data: &SecretData,
    cert: &'static str,
    key: &'static str,
    chain: &'static str,
) -> Result<Signer, SecretError> {
    let mut whole = certificates(name, data, cert)?;
    // Istio's form: the chain repeats the signing certificate, and may end with the root.
    if data.get(chain).is_some_and(|text| !text.0.trim_ascii().is_empty()) {
        for certificate in certificates(name, data, chain)? {
            if !whole.contains(&certificate) {
                whole.push(certificate);
            }
        }
    }
    let private = key_from_pem(key, bytes(name, data, key)?)
        .map_err(|e| name.error(key, reason(&e)))?
        .ok_or_else(|| name.error(key, "it holds no private key"))?;
    Ok(Signer { chain: whole, key: private })
}

fn write_signer(
    data: &mut SecretData,
    signer: &Signer,
    cert: &'static str,
    key: &'static str,
    chain: &'static str,
) {
    put(data, cert, certificates_to_pem(signer.chain.first()).into_bytes());
    put(data, chain, certificates_to_pem(&signer.chain).into_bytes());
    put(data, key, key_to_pem(&signer.key).into_bytes());
}

fn put(data: &mut SecretData, key: &'static str, bytes: Vec<u8>) {
    data.insert(key.to_owned(), ByteString(bytes));
}
