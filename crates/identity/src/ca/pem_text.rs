//! Certificates and keys as PEM (RFC 7468).

use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::CaError;

/// More certificates in one file are refused.
const MAX_CERTIFICATES: usize = 128;

/// All certificates of a text; at least one. Other sections are passed over. `file` is what errors call the text.
///
/// # Errors
/// It holds none, too many, or a spoiled one.
pub fn certificates_from_pem(file: &str, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let error = |reason: String| CaError::Pem { file: file.to_owned(), reason };
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(text) {
        certificates.push(certificate.map_err(|e| error(format!("not PEM: {e:?}")))?);
        if certificates.len() > MAX_CERTIFICATES {
            return Err(error(format!("more than {MAX_CERTIFICATES} certificates")));
        }
    }
    if certificates.is_empty() {
        return Err(error("it holds no certificate".to_owned()));
    }
    Ok(certificates)
}

/// The first private key of a text; `None` if there is none. `file` is what errors call the text.
///
/// # Errors
/// The section of the key is spoiled.
pub fn key_from_pem(file: &str, text: &[u8]) -> Result<Option<PrivateKeyDer<'static>>, CaError> {
    match PrivateKeyDer::from_pem_slice(text) {
        Ok(key) => Ok(Some(key)),
        Err(pem::Error::NoItemsFound) => Ok(None),
        Err(e) => Err(CaError::Pem { file: file.to_owned(), reason: format!("not PEM: {e:?}") }),
    }
}

/// Writes certificates one after the other.
#[must_use]
pub fn certificates_to_pem<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> String {
    certificates.into_iter().map(|der| encode("CERTIFICATE", der)).collect()
}

/// Writes a private key.
#[must_use]
pub fn key_to_pem(key: &PrivateKeyDer<'_>) -> String {
    let tag = match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    encode(tag, key.secret_der())
}

fn encode(tag: &str, der: &[u8]) -> String {
    let config = ::pem::EncodeConfig::new().set_line_ending(::pem::LineEnding::LF);
    ::pem::encode_config(&::pem::Pem::new(tag, der), config)
}
