//! Whom a token says that a request comes from: what a RequestAuthentication says, compiled.

use std::sync::Arc;
use std::time::Duration;

use crate::{PolicyKey, Str};

/// A RequestAuthentication for what reaches services through their waypoints. A service names those that hold for it
/// ([`super::HttpService::authentication`]); one that is named and not known refuses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestAuthentication {
    /// Its name.
    pub key: PolicyKey,
    /// Its rules, in the order of the resource. A request without a token passes; one with a token passes if a rule
    /// takes it.
    pub rules: Box<[Arc<TokenRule>]>,
}

/// Which tokens are taken, and what is made of them (`jwtRules[]`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenRule {
    /// `iss` of the tokens; `None` takes any that the keys have signed.
    pub issuer: Option<Str>,
    /// One of these has to be among the token's `aud`; empty takes any.
    pub audiences: Box<[Str]>,
    /// The issuer's keys.
    pub keys: KeySource,
    /// Where the token is looked for. Never empty.
    pub places: Box<[TokenPlace]>,
    /// Whether the service gets the token, too (`forwardOriginalToken`).
    pub forward: bool,
    /// The header, in lower case, in which the service gets the token's payload as it stands in the token.
    pub payload_header: Option<Str>,
    /// Headers, in lower case, in which the service gets claims.
    pub claim_headers: Box<[ClaimHeader]>,
    /// Claims whose text is a list, beside `scope` and `permission` (`spaceDelimitedClaims`).
    pub space_delimited: Box<[Box<str>]>,
    /// How long fetching the keys may take.
    pub timeout: Duration,
}

/// Where an issuer's keys come from.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum KeySource {
    /// A JWK set, written in the resource (RFC 7517 section 5).
    Inline(Str),
    /// Fetched from this URL, `http` or `https`.
    Url(Str),
    /// Fetched from where the issuer of this URL says that they are (OpenID Connect Discovery 1.0 section 4).
    Discovered(Str),
}

/// Where a token may stand in a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TokenPlace {
    /// In a header, after a prefix.
    Header {
        /// The header's name, in lower case.
        name: Str,
        /// What stands before the token, empty if nothing.
        prefix: Str,
    },
    /// In a parameter of the query.
    Parameter(Str),
    /// In a cookie.
    Cookie(Str),
}

impl TokenPlace {
    /// Where tokens are looked for if a rule doesn't say it (RFC 6750 sections 2.1 and 2.3).
    #[must_use]
    pub fn defaults() -> Box<[Self]> {
        let header = Self::Header { name: "authorization".into(), prefix: "Bearer ".into() };
        Box::new([header, Self::Parameter("access_token".into())])
    }
}

/// A claim that the service gets in a header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClaimHeader {
    /// The header's name, in lower case.
    pub header: Str,
    /// The claim, key by key.
    pub claim: Box<[Str]>,
}
