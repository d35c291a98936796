//! The decision over a connection, and over a request. There is one evaluator, and what it returns is the explanation: the access
//! log, `culvert why` and `culvert what-if` show this value, they do not work it out again.
//!
//! Order (as in Istio): a DENY policy that matches refuses; else, when any ALLOW policy holds for the workload,
//! one of them must match; else it is allowed. CUSTOM policies that match name who else is to be asked. A policy that a workload lists and nobody knows
//! refuses, because what it would have said is not known.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::http::{Attribute, Request};
use crate::policy::{Action, Policy, PolicyKey};
use crate::{SpiffeId, Str, canonical_ip};

mod evaluate;

use evaluate::{Subject, closest, matching_rule};

/// What a policy can know of a connection at L4.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Connection {
    source: Option<SpiffeId>,
    principal: String,
    source_ip: IpAddr,
    destination: SocketAddr,
}

impl Connection {
    /// A connection from `source` (`None` when it proved no identity) at `source_ip` to the workload's own
    /// address and port `destination`. IPv4-mapped addresses count as IPv4.
    #[must_use]
    pub fn new(source: Option<SpiffeId>, source_ip: IpAddr, destination: SocketAddr) -> Self {
        let principal = source.as_ref().map(SpiffeId::principal).unwrap_or_default();
        let destination = SocketAddr::new(canonical_ip(destination.ip()), destination.port());
        Self { source, principal, source_ip: canonical_ip(source_ip), destination }
    }

    /// The identity that the source proved.
    #[must_use]
    pub fn source(&self) -> Option<&SpiffeId> {
        self.source.as_ref()
    }

    /// The source's address.
    #[must_use]
    pub fn source_ip(&self) -> IpAddr {
        self.source_ip
    }

    /// The workload's address and port.
    #[must_use]
    pub fn destination(&self) -> SocketAddr {
        self.destination
    }
}

/// A field of a [`crate::Match`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Field {
    /// The namespace of the source's identity.
    Namespace,
    /// The source's principal.
    Principal,
    /// The source's service account.
    ServiceAccount,
    /// The source's trust domain.
    TrustDomain,
    /// The source's address.
    SourceIp,
    /// The destination's address.
    DestinationIp,
    /// The destination's port.
    DestinationPort,
    /// The request's authority.
    Host,
    /// The request's method.
    Method,
    /// The request's path.
    Path,
    /// The client's address, as trusted proxies named it.
    RemoteIp,
    /// `iss/sub` of the request's token.
    RequestPrincipal,
    /// What a condition is of.
    Attribute(Attribute),
    /// That there is a request at all: what is not HTTP shows none.
    Request,
}

/// The name that AuthorizationPolicy gives the field.
impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Namespace => "source.namespace",
            Self::Principal => "source.principal",
            Self::ServiceAccount => "source.serviceAccount",
            Self::TrustDomain => "source.trustDomain",
            Self::SourceIp => "source.ip",
            Self::DestinationIp => "destination.ip",
            Self::DestinationPort => "destination.port",
            Self::Host => "operation.host",
            Self::Method => "operation.method",
            Self::Path => "operation.path",
            Self::RemoteIp => "remote.ip",
            Self::RequestPrincipal => "request.auth.principal",
            Self::Attribute(attribute) => return attribute.fmt(f),
            Self::Request => "request",
        })
    }
}

/// A place in a policy: the rule that decided, and in it, for each clause, the match that held.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RuleRef {
    /// The policy.
    pub policy: PolicyKey,
    /// The rule's index.
    pub rule: usize,
    /// For each clause of the rule, in order, the index of the match that held; `None` for a clause without
    /// matches.
    pub matches: Box<[Option<usize>]>,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "policy {} rule {}", self.policy, self.rule)?;
        for (clause, matched) in self.matches.iter().enumerate() {
            if let Some(matched) = matched {
                write!(f, " clause {clause}.{matched}")?;
            }
        }
        Ok(())
    }
}

/// Why a connection is allowed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Allow {
    /// No ALLOW policy holds for the workload, and no DENY policy matched.
    NoAllowPolicies,
    /// This rule of an ALLOW policy matched.
    Matched(RuleRef),
}

impl fmt::Display for Allow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAllowPolicies => f.write_str("allowed: no ALLOW policy holds for the workload"),
            Self::Matched(rule) => write!(f, "allowed by {rule}"),
        }
    }
}

/// Why a connection is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Deny {
    /// This rule of a DENY policy matched.
    Matched(RuleRef),
    /// ALLOW policies hold for the workload, and none matched.
    NoneMatched {
        /// Those policies.
        considered: Box<[PolicyKey]>,
        /// The rule among them that came closest, and what it lacked.
        closest: Option<Box<NearMiss>>,
    },
    /// The workload lists a policy that is not known (yet).
    UnknownPolicy(PolicyKey),
}

impl Deny {
    /// The policy that refused, or the one that came closest to allowing.
    #[must_use]
    pub fn policy(&self) -> Option<&PolicyKey> {
        match self {
            Self::Matched(rule) => Some(&rule.policy),
            Self::NoneMatched { closest, considered } => {
                closest.as_ref().map(|c| &c.policy).or_else(|| considered.first())
            }
            Self::UnknownPolicy(key) => Some(key),
        }
    }
}

impl fmt::Display for Deny {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Matched(rule) => write!(f, "denied by {rule}"),
            Self::NoneMatched { considered, closest } => {
                f.write_str("denied: no ALLOW policy matched (")?;
                for (i, key) in considered.iter().enumerate() {
                    write!(f, "{}{key}", if i == 0 { "" } else { ", " })?;
                }
                f.write_str(")")?;
                closest.as_ref().map_or(Ok(()), |c| write!(f, "; closest: {c}"))
            }
            Self::UnknownPolicy(key) => {
                write!(f, "denied: policy {key} selects the workload but has not arrived")
            }
        }
    }
}

/// A rule that did not match, and the first thing that it lacked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NearMiss {
    /// The policy.
    pub policy: PolicyKey,
    /// The rule's index.
    pub rule: usize,
    /// The clause that failed; `None` when the policy has no rule at all.
    pub clause: Option<usize>,
    /// The field that failed; `None` when the clause's match is empty and so never holds.
    pub field: Option<Field>,
    /// Whether it was the negated form of the field.
    pub negated: bool,
    /// What the field would have had to be, as the policy writes it.
    pub wanted: Box<[String]>,
    /// What it was.
    pub got: String,
}

impl fmt::Display for NearMiss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "policy {}", self.policy)?;
        let Some(clause) = self.clause else { return f.write_str(" has no rules") };
        write!(f, " rule {} clause {clause}", self.rule)?;
        let Some(field) = &self.field else { return f.write_str(" matches nothing") };
        let verb = if self.negated { "must not be one of" } else { "must be one of" };
        write!(f, ": {} {verb} [{}] and is {}", field, self.wanted.join(", "), self.got)
    }
}

/// What a dry-run policy would have changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DryRun {
    /// The policy.
    pub policy: PolicyKey,
    /// The decision if it were enforced beside the enforced ones.
    pub would: Result<Allow, Deny>,
}

/// The permission to deliver one connection. Only the evaluator makes one, and delivery takes nothing else, so
/// no path through the proxy can forget to ask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Permit {
    connection: Connection,
    reason: Allow,
}

impl Permit {
    /// The connection that is permitted.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Why.
    #[must_use]
    pub fn reason(&self) -> &Allow {
        &self.reason
    }
}

/// The decision over a connection, and its explanation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// What is enforced.
    pub outcome: Result<Permit, Deny>,
    /// What dry-run policies would have changed; those that would have changed nothing are not listed.
    pub dry_run: Vec<DryRun>,
}

/// The decision over a request, and its explanation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestDecision {
    /// What is enforced. A refusal by a DENY policy stands before what is in `ask`, one for want of an ALLOW policy
    /// after it.
    pub outcome: Result<Allow, Deny>,
    /// CUSTOM policies that match, each with the provider that has to agree too.
    pub ask: Vec<(PolicyKey, Str)>,
    /// What dry-run policies would have changed of `outcome`; those that would have changed nothing are not listed.
    pub dry_run: Vec<DryRun>,
}

impl RequestDecision {
    /// The decision of one who asks nobody and knows no policy.
    #[must_use]
    pub fn let_in() -> Self {
        Self { outcome: Ok(Allow::NoAllowPolicies), ask: Vec::new(), dry_run: Vec::new() }
    }

    /// The decision where both have to let the request in: the first refusal, else the first policy that let it in.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        let undecided = self.outcome == Ok(Allow::NoAllowPolicies);
        if undecided || (self.outcome.is_ok() && other.outcome.is_err()) {
            self.outcome = other.outcome;
        }
        for asked in other.ask {
            if !self.ask.contains(&asked) {
                self.ask.push(asked);
            }
        }
        for trial in other.dry_run {
            if !self.dry_run.iter().any(|known| known.policy == trial.policy) {
                self.dry_run.push(trial);
            }
        }
        self
    }
}

/// A policy, or the name of one that is listed and not known.
pub type Held<'a> = Result<&'a Arc<Policy>, &'a PolicyKey>;

/// Decides over `connection` by `policies`: those that hold for the workload, `Err` for a listed but unknown one.
pub(crate) fn decide(policies: &[Held<'_>], connection: &Connection) -> Decision {
    let subject = Subject { connection, request: None };
    // Nobody can be asked about a connection.
    let outcome = match custom(policies, subject).next() {
        Some((policy, rule, _)) if !policy.dry_run => Err(Deny::Matched(rule)),
        _ => enforce(policies, None, subject),
    };
    let dry_run = trials(policies, outcome.is_ok(), subject);
    Decision { outcome: outcome.map(|reason| Permit { connection: connection.clone(), reason }), dry_run }
}

/// Decides over `request`, that came by `connection`, by `policies`: those that hold for where it goes, `Err` for a
/// listed but unknown one. The destination of `connection` is the service's. Without a request, it is decided over the
/// connection: what is not HTTP shows none.
#[must_use]
pub fn decide_request(
    policies: &[Held<'_>],
    connection: &Connection,
    request: Option<&Request<'_>>,
) -> RequestDecision {
    let subject = Subject { connection, request };
    let outcome = enforce(policies, None, subject);
    let dry_run = trials(policies, outcome.is_ok(), subject);
    let ask = custom(policies, subject)
        .filter(|(policy, ..)| !policy.dry_run)
        .map(|(policy, _, provider)| (policy.key.clone(), provider.clone()))
        .collect();
    RequestDecision { outcome, ask, dry_run }
}

fn custom<'p>(
    policies: &'p [Held<'p>],
    subject: Subject<'p>,
) -> impl Iterator<Item = (&'p Policy, RuleRef, &'p Str)> {
    policies.iter().filter_map(|p| p.as_ref().ok()).filter_map(move |policy| match &policy.action {
        Action::Custom(provider) => Some((&***policy, matching_rule(policy, subject)?, provider)),
        Action::Allow | Action::Deny => None,
    })
}

fn trials(policies: &[Held<'_>], allowed: bool, subject: Subject<'_>) -> Vec<DryRun> {
    policies
        .iter()
        .filter_map(|p| p.as_ref().ok())
        .filter(|p| p.dry_run)
        .map(|p| DryRun { policy: p.key.clone(), would: enforce(policies, Some(&p.key), subject) })
        .filter(|d| d.would.is_ok() != allowed)
        .collect()
}

/// `trial` names a dry-run policy that counts as enforced this once.
fn enforce(policies: &[Held<'_>], trial: Option<&PolicyKey>, subject: Subject<'_>) -> Result<Allow, Deny> {
    if let Some(unknown) = policies.iter().find_map(|p| p.as_ref().err()) {
        return Err(Deny::UnknownPolicy((*unknown).clone()));
    }
    let in_force = |action: Action| {
        policies
            .iter()
            .filter_map(|p| p.as_ref().ok())
            .filter(move |p| p.action == action && (!p.dry_run || Some(&p.key) == trial))
    };
    if let Some(rule) = in_force(Action::Deny).find_map(|p| matching_rule(p, subject)) {
        return Err(Deny::Matched(rule));
    }
    if let Some(rule) = in_force(Action::Allow).find_map(|p| matching_rule(p, subject)) {
        return Ok(Allow::Matched(rule));
    }
    let considered: Box<[PolicyKey]> = in_force(Action::Allow).map(|p| p.key.clone()).collect();
    if considered.is_empty() {
        return Ok(Allow::NoAllowPolicies);
    }
    Err(Deny::NoneMatched {
        considered,
        closest: closest(in_force(Action::Allow).copied(), subject).map(Box::new),
    })
}
