//! What is sent to the CA and what comes back, as bytes: `istio.v1.auth.IstioCertificateService/CreateCertificate`
//! (facts 4.8).

use std::collections::BTreeMap;
use std::time::Duration;

use model::SpiffeId;
use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use proto::wire::auth::{IstioCertificateRequest, IstioCertificateResponse};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::ca::{CaError, certificates_from_pem};
use crate::issuer::Issued;
use crate::x509::{Facts, RootId};

/// Metadata: for whom a node's proxy asks.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// Metadata of our own, in requests that are reports: the ids of the roots that whoever asks trusts, by which a CA knows
/// when a new root may sign. Other CAs pass over it.
pub const TRUSTED_ROOTS: &str = "TrustedRoots";

/// An answer of more parts is refused.
const MAX_PARTS: usize = 16;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose<'a> {
    /// A certificate for this identity.
    Certificate(&'a SpiffeId),
    /// Telling these roots. The certificate is for one's own identity, which the token says, and thrown away.
    Report(&'a [RootId]),
}

/// A new key and the request for it. The key never leaves this value but into what is issued.
pub(super) struct Asked {
    key: PrivateKeyDer<'static>,
    pub(super) request: IstioCertificateRequest,
}

/// What came back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) issued: Issued,
    /// The roots that the CA named; none if the answer is a chain without a root.
    pub(super) roots: Vec<CertificateDer<'static>>,
}

impl Asked {
    /// Makes a key and a request.
    pub(super) fn new(purpose: &Purpose<'_>, lifetime: Duration) -> Result<Self, CaError> {
        let key = KeyPair::generate().map_err(CaError::signing("make a workload's key"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let mut fields = BTreeMap::new();
        if let Purpose::Certificate(id) = purpose {
            let uri = id.to_string().try_into().map_err(CaError::signing("write the SPIFFE ID"))?;
            params.subject_alt_names = vec![SanType::URI(uri)];
            fields.insert(IMPERSONATED_IDENTITY.to_owned(), text(id.to_string()));
        }
        if let Purpose::Report(trusted) = purpose {
            let values = trusted.iter().map(|root| text(root.to_string())).collect();
            let list = Value { kind: Some(Kind::ListValue(ListValue { values })) };
            fields.insert(TRUSTED_ROOTS.to_owned(), list);
        }
        let csr = params
            .serialize_request(&key)
            .and_then(|request| request.pem())
            .map_err(CaError::signing("write a signing request"))?;
        let request = IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct { fields }),
        };
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(Self { key, request })
    }

    /// Reads the answer: the leaf first, the root last, the last part being several certificates where there are
    /// several roots. Whether it is for this key, for whom it is and whether it can be trusted, is looked at by
    /// whoever puts it in force.
    pub(super) fn answered(self, response: &IstioCertificateResponse) -> Result<Answer, String> {
        let parts = &response.cert_chain;
        if parts.len() > MAX_PARTS {
            return Err(format!("the chain has {} parts, at most {MAX_PARTS} are read", parts.len()));
        }
        let mut chain = Vec::new();
        let mut roots = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let name = format!("part {} of the chain", index + 1);
            for certificate in certificates_from_pem(&name, part.as_bytes()).map_err(|e| e.to_string())? {
                let facts = Facts::read(&certificate).ok_or_else(|| format!("{name} is no certificate"))?;
                // Some CAs end with an intermediate. Only what nobody else vouches for is a root.
                if last && index > 0 && facts.self_issued {
                    roots.push(certificate);
                } else {
                    chain.push(certificate);
                }
            }
        }
        if chain.is_empty() {
            return Err("the chain is empty".to_owned());
        }
        Ok(Answer { issued: Issued { chain, key: self.key }, roots })
    }
}

fn text(value: String) -> Value {
    Value { kind: Some(Kind::StringValue(value)) }
}
