//! Public keys of issuers: JWK sets (RFC 7517), and checking a token's signature by one (RFC 7518 section 3, RFC 8037).
//!
//! Invariants:
//! * an algorithm is used only with a key of the type that it is for, and never one that is symmetric, or `none`;
//! * a key that says what it is for is used for nothing else.

use std::fmt;

use aws_lc_rs::signature::{
    self, ParsedPublicKey, RsaParameters, RsaPublicKeyComponents, VerificationAlgorithm,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

/// How tokens may be signed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256, and so on.
    Rs256,
    /// With SHA-384.
    Rs384,
    /// With SHA-512.
    Rs512,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// With SHA-384.
    Ps384,
    /// With SHA-512.
    Ps512,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// On P-384 with SHA-384.
    Es384,
    /// On P-521 with SHA-512.
    Es512,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    const ALL: [(&'static str, Self); 10] = [
        ("RS256", Self::Rs256),
        ("RS384", Self::Rs384),
        ("RS512", Self::Rs512),
        ("PS256", Self::Ps256),
        ("PS384", Self::Ps384),
        ("PS512", Self::Ps512),
        ("ES256", Self::Es256),
        ("ES384", Self::Es384),
        ("ES512", Self::Es512),
        ("EdDSA", Self::EdDsa),
    ];

    /// The algorithm of this name; `None` for those that are not taken.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, algorithm)| *algorithm)
    }

    fn rsa(self) -> Option<&'static RsaParameters> {
        Some(match self {
            Self::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Self::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
            Self::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
            Self::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
            Self::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
            Self::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
            Self::Es256 | Self::Es384 | Self::Es512 | Self::EdDsa => return None,
        })
    }

    /// The curve of an EC key, with the length of a coordinate.
    fn curve(name: &str) -> Option<(Self, &'static dyn VerificationAlgorithm, usize)> {
        Some(match name {
            "P-256" => (Self::Es256, &signature::ECDSA_P256_SHA256_FIXED, 32),
            "P-384" => (Self::Es384, &signature::ECDSA_P384_SHA384_FIXED, 48),
            "P-521" => (Self::Es512, &signature::ECDSA_P521_SHA512_FIXED, 66),
            _ => return None,
        })
    }
}

/// The most keys of a set that are looked at.
const MAX_KEYS: usize = 256;

/// A public key, ready for use with each algorithm that it may be used with.
struct Key {
    id: Option<Box<str>>,
    uses: Box<[(Algorithm, ParsedPublicKey)]>,
}

/// An issuer's keys.
pub struct KeySet {
    keys: Box<[Key]>,
    /// Keys of the set that could not be used, with the reason; for the log.
    passed_over: Vec<&'static str>,
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<_> = self.keys.iter().map(|key| key.id.as_deref()).collect();
        f.debug_struct("KeySet").field("ids", &ids).field("passed_over", &self.passed_over).finish()
    }
}

/// Why a JWK set can't be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidKeySet {
    /// It is no JSON, or not of that form.
    #[error("is no JWK set: {0}")]
    Form(#[from] serde_json::Error),
    /// It has none that could check a signature.
    #[error("has no key that can be used ({0})")]
    NoKeys(String),
    /// It has more than are looked at.
    #[error("has {0} keys, more than {MAX_KEYS}")]
    TooMany(usize),
}

/// Why no key of a set vouches for a signature.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rejected {
    /// None has the token's `kid`, or is of the type of its `alg`.
    NoSuchKey,
    /// None made the signature.
    Signature,
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: Box<str>,
    kid: Option<Box<str>>,
    #[serde(rename = "use")]
    usage: Option<Box<str>>,
    key_ops: Option<Vec<Box<str>>>,
    alg: Option<Box<str>>,
    crv: Option<Box<str>>,
    n: Option<Box<str>>,
    e: Option<Box<str>>,
    x: Option<Box<str>>,
    y: Option<Box<str>>,
}

impl KeySet {
    /// Reads a JWK set. Keys of it that are of no use here are passed over, as RFC 7517 section 5 has it.
    ///
    /// # Errors
    /// See [`InvalidKeySet`].
    pub fn parse(text: &[u8]) -> Result<Self, InvalidKeySet> {
        let set: Set = serde_json::from_slice(text)?;
        if set.keys.len() > MAX_KEYS {
            return Err(InvalidKeySet::TooMany(set.keys.len()));
        }
        let (mut keys, mut passed_over) = (Vec::new(), Vec::new());
        for value in set.keys {
            let read =
                serde_json::from_value(value).map_err(|_| "it is no JWK").and_then(|jwk: Jwk| jwk.key());
            match read {
                Ok(key) => keys.push(key),
                Err(reason) => passed_over.push(reason),
            }
        }
        if keys.is_empty() {
            return Err(InvalidKeySet::NoKeys(passed_over.join(", ")));
        }
        Ok(Self { keys: keys.into(), passed_over })
    }

    /// Keys of the set that could not be used, each with the reason.
    #[must_use]
    pub fn passed_over(&self) -> &[&'static str] {
        &self.passed_over
    }

    /// Whether a key vouches for `signature` over `message`. With a `kid` only keys of that ID are tried, and those
    /// without one.
    ///
    /// # Errors
    /// See [`Rejected`].
    pub fn verify(
        &self,
        algorithm: Algorithm,
        kid: Option<&str>,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), Rejected> {
        let mut tried = false;
        for key in &self.keys {
            if kid.is_some() && key.id.is_some() && key.id.as_deref() != kid {
                continue;
            }
            let Some((_, public)) = key.uses.iter().find(|(use_, _)| *use_ == algorithm) else { continue };
            tried = true;
            if public.verify_sig(message, signature).is_ok() {
                return Ok(());
            }
        }
        Err(if tried { Rejected::Signature } else { Rejected::NoSuchKey })
    }
}

impl Jwk {
    fn key(self) -> Result<Key, &'static str> {
        if self.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return Err("it is not for signatures");
        }
        if self.key_ops.as_ref().is_some_and(|ops| ops.iter().all(|op| &**op != "verify")) {
            return Err("it is not for verifying");
        }
        let named = match self.alg.as_deref() {
            Some(name) => Some(Algorithm::named(name).ok_or("its algorithm is not supported")?),
            None => None,
        };
        let mut uses = match &*self.kty {
            "RSA" => self.rsa(named)?,
            "EC" => vec![self.elliptic()?],
            "OKP" => vec![self.edwards()?],
            _ => return Err("its type is not supported"),
        };
        if let Some(named) = named {
            uses.retain(|(algorithm, _)| *algorithm == named);
        }
        if uses.is_empty() {
            return Err("its algorithm is not one of its type");
        }
        Ok(Key { id: self.kid, uses: uses.into() })
    }

    fn rsa(&self, named: Option<Algorithm>) -> Result<Vec<(Algorithm, ParsedPublicKey)>, &'static str> {
        let (n, e) = (decoded(self.n.as_deref())?, decoded(self.e.as_deref())?);
        // What aws-lc would refuse at each signature: shorter than 2048 bits, longer than 8192.
        let bits = n.iter().position(|b| *b != 0).and_then(|at| n.get(at..)).map_or(0, |rest| rest.len() * 8);
        if !(2048..=8192).contains(&bits) {
            return Err("its modulus does not have 2048 to 8192 bits");
        }
        let mut uses = Vec::new();
        for (_, algorithm) in Algorithm::ALL.iter().filter(|(_, a)| named.is_none_or(|named| named == *a)) {
            let Some(parameters) = algorithm.rsa() else { continue };
            let components = RsaPublicKeyComponents { n: &n, e: &e };
            let key = components.to_parsed_public_key(parameters).map_err(|_| "it is no RSA key")?;
            uses.push((*algorithm, key));
        }
        Ok(uses)
    }

    fn elliptic(&self) -> Result<(Algorithm, ParsedPublicKey), &'static str> {
        let curve = self.crv.as_deref().and_then(Algorithm::curve);
        let (algorithm, verification, length) = curve.ok_or("its curve is not supported")?;
        let (x, y) = (decoded(self.x.as_deref())?, decoded(self.y.as_deref())?);
        if x.len() != length || y.len() != length {
            return Err("its coordinates are not of its curve's length");
        }
        // An uncompressed point (SEC 1 section 2.3.3).
        let mut point = vec![4];
        point.extend(x);
        point.extend(y);
        let key = ParsedPublicKey::new(verification, point).map_err(|_| "its point is not on its curve")?;
        Ok((algorithm, key))
    }

    fn edwards(&self) -> Result<(Algorithm, ParsedPublicKey), &'static str> {
        if self.crv.as_deref() != Some("Ed25519") {
            return Err("its curve is not supported");
        }
        let x = decoded(self.x.as_deref())?;
        let key = ParsedPublicKey::new(&signature::ED25519, x).map_err(|_| "it is no Ed25519 key")?;
        Ok((Algorithm::EdDsa, key))
    }
}

fn decoded(text: Option<&str>) -> Result<Vec<u8>, &'static str> {
    let text = text.ok_or("a part of it is missing")?;
    // Some issuers pad (RFC 7515 section 2 has no padding).
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|_| "a part of it is no base64url")
}
