//! A certificate authority in memory: a signing certificate, its chain, its key, and what it may issue.

use std::time::Duration;

use model::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use time::OffsetDateTime;

use super::CaError;
use super::request::SigningRequest;
use crate::clock::{Timestamp, earlier, later};
use crate::issuer::Issued;
use crate::tls::crypto_provider;
use crate::trust::TrustBundle;
use crate::verify::{Role, verify_chain};
use crate::x509::{Facts, RootId};

/// How long certificates are valid.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Validity {
    /// From now on.
    pub lifetime: Duration,
    /// Before now, for peers whose clocks are late.
    pub backdate: Duration,
}

impl Validity {
    /// 24 hours, and two minutes back: what `SECRET_TTL` and Istio's CA have.
    #[must_use]
    pub fn of_workloads() -> Self {
        Self { lifetime: Duration::from_secs(24 * 3600), backdate: Duration::from_secs(120) }
    }

    /// Ten years, and an hour back.
    #[must_use]
    pub fn of_roots() -> Self {
        Self { lifetime: Duration::from_secs(3650 * 24 * 3600), backdate: Duration::from_secs(3600) }
    }
}

/// A CA certificate that was made here, with its key.
pub struct MadeCa {
    /// The certificate, followed by those between it and the root, the root last if the chain has one.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key, PKCS #8.
    pub key: PrivateKeyDer<'static>,
}

/// A certificate that was signed for somebody else's key.
#[derive(Clone, Debug)]
pub struct SignedCertificate {
    /// The certificate, then those between it and the root, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its serial number, hex.
    pub serial: String,
    /// When it ceases to be valid.
    pub not_after: UnixTime,
}

/// Signs certificates for workloads.
#[derive(Debug)]
pub struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    signing: CertificateDer<'static>,
    /// What follows a leaf: the signing certificate and those above it, without the self-signed root.
    chain: Vec<CertificateDer<'static>>,
    root: RootId,
    serial: String,
    subject: String,
    not_after: UnixTime,
}

impl CertificateAuthority {
    /// Makes a self-signed root for `domain`: ECDSA P-256, may sign intermediates and workloads. Each has a name of
    /// its own, so that two of one mesh can be told apart.
    ///
    /// # Errors
    /// Key or certificate could not be made.
    pub fn make_root(domain: &TrustDomain, validity: Validity, now: UnixTime) -> Result<MadeCa, CaError> {
        let key = KeyPair::generate().map_err(CaError::signing("make a root key"))?;
        let params = ca_params(&format!("root of {domain}"), None, validity, now)?;
        let root = params.self_signed(&key).map_err(CaError::signing("sign the root certificate"))?;
        Ok(MadeCa { chain: vec![root.into()], key: pkcs8(&key) })
    }

    /// Makes a signing certificate below this one that may sign workloads only.
    ///
    /// # Errors
    /// Key or certificate could not be made, or this authority has expired.
    pub fn make_intermediate(
        &self,
        domain: &TrustDomain,
        validity: Validity,
        now: UnixTime,
    ) -> Result<MadeCa, CaError> {
        let key = KeyPair::generate().map_err(CaError::signing("make an intermediate's key"))?;
        let validity = self.clamp(validity, now)?;
        let params = ca_params(&format!("intermediate of {domain}"), Some(0), validity, now)?;
        let made = params
            .signed_by(&key, &self.issuer)
            .map_err(CaError::signing("sign the intermediate certificate"))?;
        let chain = std::iter::once(made.into()).chain(self.chain.iter().cloned()).collect();
        Ok(MadeCa { chain, key: pkcs8(&key) })
    }

    /// An authority of given parts: `chain` with the signing certificate first, each following one the issuer of
    /// the one before; `key` the signing certificate's; `bundle` with the root that the chain leads to.
    ///
    /// # Errors
    /// Says which certificate is no CA, expired or at the wrong place, or that key and certificate don't belong
    /// together, or that no root of the bundle vouches for the chain.
    pub fn new(
        chain: &[CertificateDer<'_>],
        key: &PrivateKeyDer<'_>,
        bundle: &TrustBundle,
        now: UnixTime,
    ) -> Result<Self, CaError> {
        let facts = check_chain(chain, now)?;
        let (Some(signing), Some(signing_facts)) = (chain.first(), facts.first()) else {
            return Err(CaError::NoCertificate);
        };
        let key = KeyPair::try_from(key).map_err(|e| CaError::Key(e.to_string()))?;
        if key.subject_public_key_info() != signing_facts.public_key {
            return Err(CaError::KeyMismatch { subject: signing_facts.subject.clone() });
        }
        if !signing_facts.plain_subject {
            return Err(CaError::Subject { subject: signing_facts.subject.clone() });
        }
        let issuer = Issuer::from_ca_cert_der(signing, key)
            .map_err(CaError::signing("read the signing certificate"))?;
        let mut not_after = signing_facts.not_after;
        for fact in &facts {
            not_after =
                if fact.not_after.as_secs() < not_after.as_secs() { fact.not_after } else { not_after };
        }
        let sent = chain.iter().zip(&facts).filter(|(_, f)| !f.self_issued);
        let mut authority = Self {
            issuer,
            signing: signing.clone().into_owned(),
            chain: sent.map(|(der, _)| der.clone().into_owned()).collect(),
            root: RootId::of(&webpki::anchor_from_trusted_cert(signing).map_err(|_| CaError::NoCertificate)?),
            serial: signing_facts.serial.clone(),
            subject: signing_facts.subject.clone(),
            not_after,
        };
        authority.try_out(bundle, now)?;
        Ok(authority)
    }

    /// Issues a certificate with a new key.
    ///
    /// # Errors
    /// The authority has expired, or signing failed.
    pub fn issue(&self, id: &SpiffeId, validity: Validity, now: UnixTime) -> Result<Issued, CaError> {
        let key = KeyPair::generate().map_err(CaError::signing("make a workload's key"))?;
        let chain = self.certify(&key, vec![uri(id)?], validity, now)?.chain;
        Ok(Issued { chain, key: pkcs8(&key) })
    }

    /// Issues a certificate for the key of a signing request (PKCS #10, DER). Only the key is taken from the
    /// request; whose certificate it becomes is `id`, which the caller has authorised.
    ///
    /// # Errors
    /// The request is malformed, not signed by its own key, of a key that is not accepted, or signing failed.
    pub fn sign_request(
        &self,
        request: &[u8],
        id: &SpiffeId,
        validity: Validity,
        now: UnixTime,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        let request = SigningRequest::from_der(request)?;
        Ok(self.sign(&request, id, validity, now)?.chain)
    }

    /// As [`CertificateAuthority::sign_request`], for a request that was checked already.
    ///
    /// # Errors
    /// The authority has expired, or signing failed.
    pub fn sign(
        &self,
        request: &SigningRequest,
        id: &SpiffeId,
        validity: Validity,
        now: UnixTime,
    ) -> Result<SignedCertificate, CaError> {
        self.certify(request, vec![uri(id)?], validity, now)
    }

    /// Issues a certificate with a new key for a server that clients know by DNS names: no SVID, and no client.
    ///
    /// # Errors
    /// A name can't be written, the authority has expired, or signing failed.
    pub fn issue_server(
        &self,
        names: &[String],
        validity: Validity,
        now: UnixTime,
    ) -> Result<(Issued, UnixTime), CaError> {
        let wrong = |name: &str| {
            let name = name.to_owned();
            move |e: rcgen::Error| CaError::Name { name, reason: e.to_string() }
        };
        let mut sans = Vec::with_capacity(names.len());
        for name in names {
            sans.push(match name.parse() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(wrong(name))?),
            });
        }
        let key = KeyPair::generate().map_err(CaError::signing("make a server's key"))?;
        let signed = self.certify(&key, sans, validity, now)?;
        Ok((Issued { chain: signed.chain, key: pkcs8(&key) }, signed.not_after))
    }

    /// The root that the issued certificates lead to.
    #[must_use]
    pub fn root(&self) -> RootId {
        self.root
    }

    /// The signing certificate's serial number, hex.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// The signing certificate's subject.
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// When the first certificate of the chain expires: nothing issued here lives longer.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// Whether both sign with the same certificate below the same chain, so that nothing need be issued anew.
    #[must_use]
    pub fn same_signer(&self, other: &Self) -> bool {
        self.signing == other.signing && self.chain == other.chain && self.root == other.root
    }

    /// A certificate for the names; servers that are known by a DNS name are no clients.
    fn certify(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        validity: Validity,
        now: UnixTime,
    ) -> Result<SignedCertificate, CaError> {
        let validity = self.clamp(validity, now)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        if names.iter().all(|name| matches!(name, SanType::URI(_))) {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.subject_alt_names = names;
        params.use_authority_key_identifier_extension = true;
        let not_after = later(now, validity.lifetime);
        params.not_before = date(earlier(now, validity.backdate))?;
        params.not_after = date(not_after)?;
        let serial = random_serial()?;
        let shown = serial.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        params.serial_number = Some(serial);
        let leaf = params.signed_by(key, &self.issuer).map_err(CaError::signing("sign a certificate"))?;
        let chain = std::iter::once(leaf.into()).chain(self.chain.iter().cloned()).collect();
        Ok(SignedCertificate { chain, serial: shown, not_after })
    }

    /// Shortens `validity` to the authority's own.
    fn clamp(&self, validity: Validity, now: UnixTime) -> Result<Validity, CaError> {
        let left = self.not_after.as_secs().saturating_sub(now.as_secs());
        if left == 0 {
            return Err(CaError::Expired {
                subject: self.subject.clone(),
                not_after: Timestamp(self.not_after),
            });
        }
        Ok(Validity { lifetime: validity.lifetime.min(Duration::from_secs(left)), ..validity })
    }

    /// Issues a certificate for nobody and verifies it as a peer would, which checks all that a chain can be wrong
    /// in; and learns which root it leads to.
    fn try_out(&mut self, bundle: &TrustBundle, now: UnixTime) -> Result<(), CaError> {
        let trust = bundle.snapshot();
        let own = trust.trust_domains().own.clone();
        let nobody = SpiffeId::new(own, "none".into(), "none".into())
            .map_err(|e| CaError::Name { name: "none".to_owned(), reason: e.to_string() })?;
        let validity = Validity { lifetime: Duration::from_secs(60), backdate: Duration::ZERO };
        let probe = self.issue(&nobody, validity, now)?;
        let algorithms = crypto_provider().signature_verification_algorithms;
        let peer = verify_chain(&probe.chain, Role::Server, &trust, &algorithms, now).map_err(|reason| {
            CaError::Untrusted { subject: self.subject.clone(), reason: Box::new(reason) }
        })?;
        self.root = peer.root;
        if let Some(root) = trust.root(&peer.root)
            && root.not_after.as_secs() < self.not_after.as_secs()
        {
            self.not_after = root.not_after;
        }
        Ok(())
    }
}

/// What can be said of a signing chain by looking at each certificate: errors that name the one at fault.
fn check_chain(chain: &[CertificateDer<'_>], now: UnixTime) -> Result<Vec<Facts>, CaError> {
    let mut facts = Vec::with_capacity(chain.len());
    for (below, der) in chain.iter().enumerate() {
        let fact = Facts::read(der).ok_or(CaError::Malformed { position: below + 1 })?;
        let subject = || fact.subject.clone();
        if !fact.is_ca || !fact.may_sign {
            return Err(CaError::NotCa { subject: subject() });
        }
        // `below` CA certificates lie between this one and a workload's (RFC 5280, section 4.2.1.9).
        if fact.path_len.is_some_and(|limit| usize::try_from(limit).unwrap_or(usize::MAX) < below) {
            return Err(CaError::PathLength { subject: subject(), below });
        }
        if fact.not_after.as_secs() <= now.as_secs() {
            return Err(CaError::Expired { subject: subject(), not_after: Timestamp(fact.not_after) });
        }
        if fact.not_before.as_secs() > now.as_secs() {
            return Err(CaError::NotYetValid {
                subject: subject(),
                not_before: Timestamp(fact.not_before),
                now: Timestamp(now),
            });
        }
        facts.push(fact);
    }
    Ok(facts)
}

fn ca_params(
    name: &str,
    path_len: Option<u8>,
    validity: Validity,
    now: UnixTime,
) -> Result<CertificateParams, CaError> {
    let mut tag = [0; 4];
    random(&mut tag)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "culvert");
    params.distinguished_name.push(DnType::CommonName, format!("{name} {:08x}", u32::from_be_bytes(tag)));
    params.is_ca = IsCa::Ca(path_len.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = path_len.is_some();
    params.not_before = date(earlier(now, validity.backdate))?;
    params.not_after = date(later(now, validity.lifetime))?;
    params.serial_number = Some(random_serial()?);
    Ok(params)
}

fn uri(id: &SpiffeId) -> Result<SanType, CaError> {
    Ok(SanType::URI(id.to_string().try_into().map_err(CaError::signing("write the SPIFFE ID"))?))
}

fn pkcs8(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()))
}

/// 127 random bits, which are positive in DER (RFC 5280, section 4.1.2.2: at most 20 octets).
fn random_serial() -> Result<SerialNumber, CaError> {
    let mut serial = [0; 16];
    random(&mut serial)?;
    if let Some(first) = serial.first_mut() {
        // Neither negative nor with leading zeros, which DER would not allow.
        *first = (*first & 0x7f) | 0x40;
    }
    Ok(SerialNumber::from(serial.to_vec()))
}

fn random(bytes: &mut [u8]) -> Result<(), CaError> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| CaError::Random)
}

fn date(time: UnixTime) -> Result<OffsetDateTime, CaError> {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    // Certificates can't say later than the end of year 9999 (RFC 5280, section 4.1.2.5).
    OffsetDateTime::from_unix_timestamp(seconds.min(253_402_300_799)).map_err(|_| CaError::Clock)
}
