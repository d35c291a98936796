//! Signing requests (PKCS #10, RFC 2986) from outside: what is taken from one is its public key, and nothing else.
//!
//! Names, extensions and attributes that a request asks for are not looked at: whose certificate it becomes is decided
//! by who asks, not by what he writes. The signature of the request is checked, so that nobody gets a certificate for
//! a key that he does not hold.

use rcgen::{PublicKeyData, SignatureAlgorithm, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION,
    OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA, OID_SIG_ED25519,
};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo as ParsedKey;

use super::CaError;

/// A request of more bytes, as DER or as PEM, is refused unread. One for a key of 8192 bits has less than 4 KiB.
pub const MAX_REQUEST: usize = 64 * 1024;
/// RSA keys below are weak, those above are costly to everybody who checks a signature of theirs.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Why a signing request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It is larger than [`MAX_REQUEST`].
    #[error("{0} bytes, at most {MAX_REQUEST} are read")]
    TooLarge(usize),
    /// The text holds no section `CERTIFICATE REQUEST`, or a spoiled one.
    #[error("the text is not one PEM section CERTIFICATE REQUEST")]
    NotPem,
    /// The bytes are something else.
    #[error("it is not PKCS #10")]
    Malformed,
    /// There is more than the request.
    #[error("bytes follow its end")]
    TrailingBytes,
    /// Whoever asks does not hold the key, or the signature is of a kind that is not accepted.
    #[error("its signature is not of the key that it names, or not of a kind that is accepted")]
    Signature,
    /// The key is too weak, or too large.
    #[error("its RSA key has {bits} bits, {} to {} are accepted", RSA_BITS.start(), RSA_BITS.end())]
    RsaBits {
        /// How long the modulus is.
        bits: usize,
    },
    /// The key is of another kind.
    #[error("its kind of key ({0}) is not accepted: ECDSA P-256 or P-384, Ed25519, or RSA are")]
    KeyKind(String),
}

/// A request whose signature and key were checked.
#[derive(Debug)]
pub struct SigningRequest {
    key: SubjectPublicKeyInfo,
}

impl SigningRequest {
    /// Reads and checks a request in PEM.
    ///
    /// # Errors
    /// It is not one, not signed by its own key, or of a key that is not accepted.
    pub fn from_pem(text: &[u8]) -> Result<Self, RequestError> {
        if text.len() > MAX_REQUEST {
            return Err(RequestError::TooLarge(text.len()));
        }
        let der = CertificateSigningRequestDer::from_pem_slice(text).map_err(|_| RequestError::NotPem)?;
        Self::from_der(&der)
    }

    /// Reads and checks a request in DER.
    ///
    /// # Errors
    /// As for [`SigningRequest::from_pem`].
    pub fn from_der(der: &[u8]) -> Result<Self, RequestError> {
        if der.len() > MAX_REQUEST {
            return Err(RequestError::TooLarge(der.len()));
        }
        let (rest, request) = X509CertificationRequest::from_der(der).map_err(|_| RequestError::Malformed)?;
        if !rest.is_empty() {
            return Err(RequestError::TrailingBytes);
        }
        let key = &request.certification_request_info.subject_pki;
        check_kind(key)?;
        // SHA-1 would do as a proof that the key is at hand; but nothing in use makes such requests.
        let algorithm = &request.signature_algorithm.algorithm;
        if *algorithm == OID_PKCS1_SHA1WITHRSA || *algorithm == OID_SHA1_WITH_RSA {
            return Err(RequestError::Signature);
        }
        request.verify_signature().map_err(|_| RequestError::Signature)?;
        let key = SubjectPublicKeyInfo::from_der(key.raw)
            .map_err(|_| RequestError::KeyKind(key.algorithm.algorithm.to_id_string()))?;
        Ok(Self { key })
    }
}

impl PublicKeyData for SigningRequest {
    fn der_bytes(&self) -> &[u8] {
        self.key.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.key.algorithm()
    }
}

impl From<RequestError> for CaError {
    fn from(error: RequestError) -> Self {
        Self::Request(error)
    }
}

fn check_kind(key: &ParsedKey<'_>) -> Result<(), RequestError> {
    let kind = &key.algorithm.algorithm;
    let other = |what: String| Err(RequestError::KeyKind(what));
    if *kind == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        return match curve {
            Some(curve) if curve == OID_EC_P256 || curve == OID_NIST_EC_P384 => Ok(()),
            Some(curve) => other(format!("elliptic curve {}", curve.to_id_string())),
            None => other("an elliptic curve without a name".to_owned()),
        };
    }
    if *kind == OID_PKCS1_RSAENCRYPTION {
        return match key.parsed() {
            Ok(PublicKey::RSA(rsa)) if RSA_BITS.contains(&rsa.key_size()) => Ok(()),
            Ok(PublicKey::RSA(rsa)) => Err(RequestError::RsaBits { bits: rsa.key_size() }),
            _ => Err(RequestError::Malformed),
        };
    }
    if *kind == OID_SIG_ED25519 { Ok(()) } else { other(kind.to_id_string()) }
}
