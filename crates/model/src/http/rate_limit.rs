//! How many requests there may be: what a RateLimit (`culvert.dev`) says, compiled.

use std::sync::Arc;
use std::time::Duration;

use super::{PathPattern, ProviderAddress};
use crate::{PolicyKey, Str, StringMatch};

/// A RateLimit for what reaches services through their waypoints. A service names those that hold for it
/// ([`super::HttpService::rate_limits`]); one that is named and not known refuses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RateLimit {
    /// Its name.
    pub key: PolicyKey,
    /// Its limits, each of which has to have room.
    pub limits: Box<[Arc<Limit>]>,
    /// Which headers tell clients of them.
    pub headers: LimitHeaders,
}

/// One limit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limit {
    /// Its name, the only one of its kind in the resource.
    pub name: Str,
    /// The requests that it is of.
    pub on: LimitMatch,
    /// What requests have in common that share it, in the order in which a global service is told of it. Empty: all of
    /// them share it. A request that lacks one of these is not limited.
    pub by: Box<[LimitKey]>,
    /// Who counts.
    pub count: Count,
    /// Whether it is only counted what would be refused.
    pub dry_run: bool,
}

/// The requests that a limit is of: all that is set must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LimitMatch {
    /// Methods.
    pub methods: Box<[Str]>,
    /// Paths, without query.
    pub paths: Box<[PathPattern]>,
    /// Headers, in lower case, each with what its value has to be.
    pub headers: Box<[(Str, StringMatch)]>,
}

/// What requests have in common that share a limit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LimitKey {
    /// The path, without query.
    Path,
    /// The method.
    Method,
    /// The value of this header, in lower case.
    Header(Str),
    /// The value of this claim of the token, key by key.
    Claim(Box<[Str]>),
    /// The client's SPIFFE identity, without the scheme.
    Identity,
    /// The client's address, as trusted proxies named it.
    Address,
    /// This text, under this name: for global services.
    Constant {
        /// The name.
        key: Str,
        /// The text.
        value: Str,
    },
}

impl LimitKey {
    /// The name that a global service is told it under.
    #[must_use]
    pub fn descriptor(&self) -> &str {
        match self {
            Self::Path => "path",
            Self::Method => "method",
            Self::Header(name) => name,
            Self::Claim(path) => path.last().map_or("", |last| last),
            Self::Identity => "identity",
            Self::Address => "remote_address",
            Self::Constant { key, .. } => key,
        }
    }
}

/// Who counts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Count {
    /// Each waypoint for itself.
    Local(Bucket),
    /// A service that speaks Envoy's rate-limit protocol.
    Global(Arc<GlobalLimit>),
}

/// A bucket of tokens: a request takes one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bucket {
    /// So many are added in each `per`. At least 1.
    pub requests: u32,
    /// At least a millisecond.
    pub per: Duration,
    /// So many are there at most, and at first. At least 1.
    pub burst: u32,
    /// So many values of [`Limit::by`] are counted at a time; what is beyond shares one bucket.
    pub max_keys: u32,
}

/// A service that counts for all waypoints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GlobalLimit {
    /// Where it is.
    pub address: ProviderAddress,
    /// The domain of its configuration.
    pub domain: Str,
    /// How long its answer is waited for.
    pub timeout: Duration,
    /// Whether requests pass that it does not answer for (`onFailure: Allow`).
    pub fail_open: bool,
    /// How much a request counts.
    pub hits: u32,
}

/// Which headers tell clients of limits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum LimitHeaders {
    /// `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers).
    #[default]
    Standard,
    /// `X-RateLimit-Limit`, `X-RateLimit-Remaining` and `X-RateLimit-Reset`, as Envoy sends them.
    Legacy,
    /// None.
    None,
}
