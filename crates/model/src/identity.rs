//! SPIFFE identities in the form that Istio gives them:
//! `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>` (SPIFFE ID specification, section 2).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::Str;

/// Why a text is no identity. The text of the error names the part that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidIdentity {
    /// The scheme is missing or another one.
    #[error("{0:?} is not a SPIFFE ID: it does not start with spiffe://")]
    Scheme(String),
    /// The trust domain is empty, too long, or holds a character that SPIFFE does not allow.
    #[error("{0:?} is not a trust domain: 1 to 255 of the characters a-z, 0-9, '.', '-' and '_'")]
    TrustDomain(String),
    /// The path is not `/ns/<namespace>/sa/<service-account>`.
    #[error("{0:?} does not have the path /ns/<namespace>/sa/<service-account>")]
    Path(String),
}

/// A trust domain: the authority part of a SPIFFE ID (SPIFFE ID specification, section 2.1).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Str);

impl TrustDomain {
    /// The domain's name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `cluster.local`, the default of Kubernetes meshes.
    #[must_use]
    pub fn cluster_local() -> Self {
        Self("cluster.local".into())
    }

    /// Checks and wraps a shared string.
    ///
    /// # Errors
    /// The text is not a valid trust domain.
    pub fn new(text: Str) -> Result<Self, InvalidIdentity> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > 255 || !text.bytes().all(allowed) {
            return Err(InvalidIdentity::TrustDomain(text.chars().take(300).collect()));
        }
        Ok(Self(text))
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidIdentity;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::new(text.into())
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A workload's identity.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Str,
    service_account: Str,
}

impl SpiffeId {
    /// Builds an identity of its parts.
    ///
    /// # Errors
    /// A part is empty or holds a character that a path segment of a SPIFFE ID may not hold.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: Str,
        service_account: Str,
    ) -> Result<Self, InvalidIdentity> {
        if !is_segment(&namespace) || !is_segment(&service_account) {
            return Err(InvalidIdentity::Path(format!("/ns/{namespace}/sa/{service_account}")));
        }
        Ok(Self { trust_domain, namespace, service_account })
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The namespace of the service account.
    #[must_use]
    pub fn namespace(&self) -> &Str {
        &self.namespace
    }

    /// The service account's name.
    #[must_use]
    pub fn service_account(&self) -> &Str {
        &self.service_account
    }

    /// The identity without its scheme, `<trust-domain>/ns/<namespace>/sa/<service-account>`: the form in which
    /// policies name principals.
    #[must_use]
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

/// SPIFFE ID specification, section 2.2: letters, digits, '.', '-' and '_', and not a dot segment.
fn is_segment(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !text.is_empty() && text.len() <= 253 && text != "." && text != ".." && text.bytes().all(allowed)
}

impl FromStr for SpiffeId {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shown = || text.chars().take(300).collect::<String>();
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| InvalidIdentity::Scheme(shown()))?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| InvalidIdentity::Path(shown()))?;
        let trust_domain = domain.parse()?;
        let mut segments = path.split('/');
        match (segments.next(), segments.next(), segments.next(), segments.next(), segments.next()) {
            (Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(trust_domain, namespace.into(), account.into())
                    .map_err(|_| InvalidIdentity::Path(shown()))
            }
            _ => Err(InvalidIdentity::Path(shown())),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The mesh's trust domain and the older or other names that count as the same one
/// (`meshConfig.trustDomain`, `trustDomainAliases`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrustDomains {
    /// The domain that new identities are issued in.
    pub own: TrustDomain,
    /// Domains whose identities are accepted as if they were of the own one.
    pub aliases: Arc<[TrustDomain]>,
}

impl TrustDomains {
    /// A mesh of one trust domain.
    #[must_use]
    pub fn only(own: TrustDomain) -> Self {
        Self { own, aliases: Arc::new([]) }
    }

    /// Whether `domain` is the own one or an alias of it.
    #[must_use]
    pub fn includes(&self, domain: &TrustDomain) -> bool {
        *domain == self.own || self.aliases.contains(domain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_reads_back_as_it_was_written() {
        let text = "spiffe://cluster.local/ns/shop/sa/cart";
        let id: SpiffeId = text.parse().unwrap();
        assert_eq!(
            (id.to_string().as_str(), id.principal().as_str()),
            (text, "cluster.local/ns/shop/sa/cart")
        );
    }

    #[test]
    fn what_is_no_identity_is_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td",
            "spiffe:///ns/a/sa/b",
            "https://td/ns/a/sa/b",
            "spiffe://td/ns/a/sa",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td/ns/../sa/b",
            "spiffe://td/ns/a b/sa/c",
            "spiffe://td:1/ns/a/sa/b",
            "spiffe://td/sa/a/ns/b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }
}
