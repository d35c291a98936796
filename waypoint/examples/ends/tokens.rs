//! Tokens.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::{Args, ValueEnum};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject as _;

/// What is wanted.
#[derive(Args, Debug)]
pub struct Wanted {
    /// The algorithm
    #[arg(long)]
    algorithm: Algorithm,
    /// The key: PKCS #8, PEM
    #[arg(long)]
    key: PathBuf,
    /// Who issues them
    #[arg(long)]
    issuer: String,
    /// How many
    #[arg(long)]
    count: usize,
    /// Where they are written
    #[arg(long)]
    out: PathBuf,
}

/// How a token is signed.
#[derive(ValueEnum, Clone, Copy, Debug)]
enum Algorithm {
    Rs256,
    Es256,
}

enum Key {
    Rsa(Box<RsaKeyPair>),
    Ec(EcdsaKeyPair),
}

impl Key {
    fn sign(&self, random: &SystemRandom, text: &[u8]) -> io::Result<Vec<u8>> {
        let failed = |_| io::Error::other("a token could not be signed");
        match self {
            Self::Rsa(key) => {
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, random, text, &mut signature).map_err(failed)?;
                Ok(signature)
            }
            Self::Ec(key) => Ok(key.sign(random, text).map_err(failed)?.as_ref().to_vec()),
        }
    }
}

/// Writes tokens that are valid for a day, each of another user.
pub fn write(wanted: &Wanted) -> io::Result<()> {
    let der = PrivatePkcs8KeyDer::from_pem_file(&wanted.key).map_err(io::Error::other)?;
    let der = der.secret_pkcs8_der();
    let (name, key) = match wanted.algorithm {
        Algorithm::Rs256 => {
            let key = RsaKeyPair::from_pkcs8(der).map_err(|error| io::Error::other(error.to_string()))?;
            ("RS256", Key::Rsa(Box::new(key)))
        }
        Algorithm::Es256 => {
            let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der);
            ("ES256", Key::Ec(key.map_err(|error| io::Error::other(error.to_string()))?))
        }
    };
    let random = SystemRandom::new();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?.as_secs();
    let header =
        URL_SAFE_NO_PAD.encode(serde_json::json!({"alg": name, "kid": "k1", "typ": "JWT"}).to_string());
    let mut out = io::BufWriter::new(std::fs::File::create(&wanted.out)?);
    for number in 0..wanted.count {
        let claims = serde_json::json!({
            "iss": wanted.issuer, "sub": format!("user-{number}"), "exp": now + 86_400,
        });
        let text = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()));
        let signature = URL_SAFE_NO_PAD.encode(key.sign(&random, text.as_bytes())?);
        writeln!(out, "{text}.{signature}")?;
    }
    out.flush()
}
