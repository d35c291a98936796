//! Authorization policies in their compiled form. Those for connections are the same on the wire
//! (`istio.security.Authorization`) and in memory. How they decide is in `verdict.rs`.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::Str;
use crate::http::HttpMatch;

/// A policy's name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PolicyKey {
    /// The namespace of the resource.
    pub namespace: Str,
    /// The resource's name, or the name of a policy that a PeerAuthentication was compiled to.
    pub name: Str,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A compiled policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Policy {
    /// Its name.
    pub key: PolicyKey,
    /// Which workloads it holds for.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// The rules, OR-ed. A policy without rules matches nothing.
    pub rules: Box<[Rule]>,
    /// Whether it is only evaluated and reported, not enforced (`istio.io/dry-run`).
    pub dry_run: bool,
}

/// Which workloads a policy holds for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Scope {
    /// All of the mesh.
    Global,
    /// Those of the policy's namespace.
    Namespace,
    /// Those that list it: [`crate::Workload::policies`], [`crate::http::HttpService::policies`].
    WorkloadSelector,
}

/// What a match means.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// The connection is let in, unless a DENY policy matches too.
    Allow,
    /// The connection is refused.
    Deny,
    /// This provider has to agree too (an extension provider of MeshConfig). Only requests can be asked about: a
    /// connection is refused.
    Custom(Str),
}

/// One rule: all its clauses must hold. A rule without clauses matches every connection.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    /// The clauses, AND-ed: the `from` part, the `to` part, and one for each condition.
    pub clauses: Box<[Clause]>,
}

/// One clause: one of its matches must hold. A clause without matches holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Clause {
    /// The matches, OR-ed.
    pub matches: Box<[Match]>,
}

/// One match: every field that is set must hold; a field holds when one of its values does (a `not_` field when
/// none does). A match without any field never holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Match {
    /// Namespaces of the source's identity.
    pub namespaces: Box<[StringMatch]>,
    /// The negation.
    pub not_namespaces: Box<[StringMatch]>,
    /// Principals of the source: identities without `spiffe://`.
    pub principals: Box<[StringMatch]>,
    /// The negation.
    pub not_principals: Box<[StringMatch]>,
    /// Service accounts of the source, in any trust domain of the mesh.
    pub service_accounts: Box<[ServiceAccountMatch]>,
    /// The negation.
    pub not_service_accounts: Box<[ServiceAccountMatch]>,
    /// Trust domains of the source's identity.
    pub trust_domains: Box<[StringMatch]>,
    /// The negation.
    pub not_trust_domains: Box<[StringMatch]>,
    /// Source addresses.
    pub source_ips: Box<[IpMatch]>,
    /// The negation.
    pub not_source_ips: Box<[IpMatch]>,
    /// Destination addresses.
    pub destination_ips: Box<[IpMatch]>,
    /// The negation.
    pub not_destination_ips: Box<[IpMatch]>,
    /// Destination ports: the workload's, not the service's.
    pub destination_ports: Box<[u16]>,
    /// The negation.
    pub not_destination_ports: Box<[u16]>,
    /// What is asked of the request. Where there is none, it fails in an ALLOW policy, and holds in others. No
    /// proxy for connections is sent it.
    pub http: Option<Box<HttpMatch>>,
}

/// A pattern for a text. Matching is by bytes and case-sensitive.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum StringMatch {
    /// The same text.
    Exact(Str),
    /// A text that starts with it (`abc*`).
    Prefix(Str),
    /// A text that ends with it (`*abc`).
    Suffix(Str),
    /// Any text, as long as there is one (`*`): an absent or empty one does not match.
    Presence,
}

impl StringMatch {
    /// Reads Istio's pattern form: `*` is presence, `*abc` a suffix, `abc*` a prefix, anything else exact.
    #[must_use]
    pub fn parse(pattern: &str) -> Self {
        if pattern == "*" {
            Self::Presence
        } else if let Some(prefix) = pattern.strip_suffix('*') {
            Self::Prefix(prefix.into())
        } else if let Some(suffix) = pattern.strip_prefix('*') {
            Self::Suffix(suffix.into())
        } else {
            Self::Exact(pattern.into())
        }
    }

    /// Whether `text` matches.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(wanted) => text == &**wanted,
            Self::Prefix(wanted) => text.starts_with(&**wanted),
            Self::Suffix(wanted) => text.ends_with(&**wanted),
            Self::Presence => !text.is_empty(),
        }
    }
}

impl fmt::Display for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(t) => f.write_str(t),
            Self::Prefix(t) => write!(f, "{t}*"),
            Self::Suffix(t) => write!(f, "*{t}"),
            Self::Presence => f.write_str("*"),
        }
    }
}

/// A service account, by namespace and name.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ServiceAccountMatch {
    /// The account's namespace.
    pub namespace: Str,
    /// The account's name.
    pub name: Str,
}

impl fmt::Display for ServiceAccountMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A range of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IpMatch(pub IpNet);

impl IpMatch {
    /// Whether `ip`, which is not IPv4-mapped, is in the range. A v4 range holds no v6 address and the reverse.
    #[must_use]
    pub fn matches(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip)
    }
}

impl fmt::Display for IpMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
