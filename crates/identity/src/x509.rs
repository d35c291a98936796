//! What this crate needs to know of a certificate, read once from its DER (RFC 5280).

use std::fmt;

use aws_lc_rs::digest;
use model::SpiffeId;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::clock::at;
use crate::verify::PeerError;

/// Texts out of a peer's certificate are cut here before they go into an error or a log.
const SHOWN_NAME: usize = 200;

/// Which root a chain ends in: SHA-256 over the root's subject and public key. A root that was renewed with the same
/// key keeps its id, so connections under it live on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RootId([u8; 32]);

impl RootId {
    /// The id's bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn of(anchor: &TrustAnchor<'_>) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&(anchor.subject.len() as u64).to_be_bytes());
        context.update(&anchor.subject);
        context.update(&anchor.subject_public_key_info);
        let mut id = [0; 32];
        id.copy_from_slice(context.finish().as_ref());
        Self(id)
    }

    /// The id of a root certificate; `None` if it can't be read.
    #[must_use]
    pub fn of_certificate(root: &CertificateDer<'_>) -> Option<Self> {
        webpki::anchor_from_trusted_cert(root).ok().map(|anchor| Self::of(&anchor))
    }

    /// Reads what [`Display`](fmt::Display) writes, 64 hexadecimal digits.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut id = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        for (byte, pair) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(id))
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The parts of a certificate that decisions here depend on.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// The serial number as colon-less hex.
    pub(crate) serial: String,
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
    pub(crate) is_ca: bool,
    pub(crate) path_len: Option<u32>,
    /// Whether the key usage lets the key sign certificates; true when the extension is absent.
    pub(crate) may_sign: bool,
    /// Whether subject and issuer are the same name.
    pub(crate) self_issued: bool,
    /// The subject, for people.
    pub(crate) subject: String,
    /// The issuer, for people.
    pub(crate) issuer: String,
    /// SubjectPublicKeyInfo in DER.
    pub(crate) public_key: Vec<u8>,
    /// Whether every part of the subject is a single attribute, each of another type. Other names exist and are
    /// valid, but the issuing library can't write them back unchanged.
    pub(crate) plain_subject: bool,
}

impl Facts {
    /// Reads a certificate; `None` if it is not one.
    pub(crate) fn read(der: &CertificateDer<'_>) -> Option<Self> {
        let (rest, certificate) = X509Certificate::from_der(der).ok()?;
        if !rest.is_empty() {
            return None;
        }
        let constraints = certificate.basic_constraints().ok()?;
        let usage = certificate.key_usage().ok()?;
        let mut types = Vec::new();
        let mut plain_subject = true;
        for name in certificate.subject().iter() {
            let mut attributes = name.iter();
            match (attributes.next(), attributes.next()) {
                (Some(only), None) if !types.contains(&only.attr_type()) && writable(only.attr_type()) => {
                    types.push(only.attr_type());
                }
                _ => plain_subject = false,
            }
        }
        Some(Self {
            serial: certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
            not_before: unix(certificate.validity().not_before.timestamp()),
            not_after: unix(certificate.validity().not_after.timestamp()),
            is_ca: constraints.as_ref().is_some_and(|c| c.value.ca),
            path_len: constraints.and_then(|c| c.value.path_len_constraint),
            may_sign: usage.is_none_or(|u| u.value.key_cert_sign()),
            self_issued: certificate.subject().as_raw() == certificate.issuer().as_raw(),
            subject: shown(&certificate.subject().to_string()),
            issuer: shown(&certificate.issuer().to_string()),
            public_key: certificate.public_key().raw.to_vec(),
            plain_subject,
        })
    }
}

/// Whether an attribute's type can be copied into what is issued. The first octet of an OID holds its first two arcs
/// (X.690, section 8.19.4); below 2.40, which all attribute types in use are, reader and writer agree on them.
fn writable(oid: &Oid<'_>) -> bool {
    oid.as_bytes().first().is_some_and(|first| *first < 120)
}

/// The SPIFFE ID of an X.509-SVID: its one URI SAN (X509-SVID specification, section 2); and when it ceases to be valid.
/// Certificates with several URIs are refused whichever of them is the right one, as it says.
pub(crate) fn svid(der: &CertificateDer<'_>) -> Result<(SpiffeId, UnixTime), PeerError> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|e| PeerError::Malformed(shown(&e.to_string())))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|e| PeerError::Malformed(shown(&format!("subject alternative names: {e}"))))?
        .map_or(&[][..], |extension| &extension.value.general_names);
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (None, _) => Err(PeerError::NoSpiffeId { subject: shown(&certificate.subject().to_string()) }),
        (Some(_), Some(_)) => Err(PeerError::SeveralUris { count: 2 + uris.count() }),
        (Some(uri), None) => match uri.parse() {
            Ok(id) => Ok((id, unix(certificate.validity().not_after.timestamp()))),
            Err(error) => Err(PeerError::InvalidSpiffeId(error)),
        },
    }
}

/// When a certificate ceases to be valid; `None` if it is not one.
pub(crate) fn not_after(der: &CertificateDer<'_>) -> Option<UnixTime> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(unix(certificate.validity().not_after.timestamp()))
}

/// A text from a certificate, fit for a log line.
pub(crate) fn shown(text: &str) -> String {
    text.escape_debug().take(SHOWN_NAME).collect()
}

fn unix(seconds: i64) -> UnixTime {
    at(u64::try_from(seconds).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_id_reads_back_from_its_hex() {
        let id = RootId([0xa5; 32]);
        assert_eq!(RootId::from_hex(&id.to_string()), Some(id));
        for wrong in ["", "a5", &"g".repeat(64), &"é".repeat(32)] {
            assert_eq!(RootId::from_hex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_no_certificate_has_no_facts() {
        for der in [&b""[..], b"\x30\x00", b"\x30\x82\xff\xff", b"GET / HTTP/1.1"] {
            assert!(Facts::read(&CertificateDer::from(der)).is_none());
        }
    }
}
