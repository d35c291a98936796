//! The decision over a connection. There is one evaluator, and what it returns is the explanation: the access
//! log, `culvert why` and `culvert what-if` show this value, they do not work it out again.
//!
//! Order (as in Istio): a DENY policy that matches refuses; else, when any ALLOW policy holds for the workload,
//! one of them must match; else the connection is allowed. A policy that a workload lists and nobody knows
//! refuses, because what it would have said is not known.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::policy::{Action, Clause, Match, Policy, PolicyKey, Rule};
use crate::{SpiffeId, canonical_ip};

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

    /// The value that a match compares, as text, for explanations.
    fn shown(&self, field: Field) -> String {
        let part = |f: fn(&SpiffeId) -> String| self.source.as_ref().map_or_else(|| "none".to_owned(), f);
        match field {
            Field::Namespace => part(|s| s.namespace().to_string()),
            Field::Principal => part(SpiffeId::principal),
            Field::ServiceAccount => part(|s| format!("{}/{}", s.namespace(), s.service_account())),
            Field::TrustDomain => part(|s| s.trust_domain().to_string()),
            Field::SourceIp => self.source_ip.to_string(),
            Field::DestinationIp => self.destination.ip().to_string(),
            Field::DestinationPort => self.destination.port().to_string(),
        }
    }
}

/// A field of a [`Match`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
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
}

impl Field {
    /// The name that AuthorizationPolicy conditions give the field.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "source.namespace",
            Self::Principal => "source.principal",
            Self::ServiceAccount => "source.serviceAccount",
            Self::TrustDomain => "source.trustDomain",
            Self::SourceIp => "source.ip",
            Self::DestinationIp => "destination.ip",
            Self::DestinationPort => "destination.port",
        }
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
        closest: Option<NearMiss>,
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
        let Some(field) = self.field else { return f.write_str(" matches nothing") };
        let verb = if self.negated { "must not be one of" } else { "must be one of" };
        write!(f, ": {} {verb} [{}] and is {}", field.as_str(), self.wanted.join(", "), self.got)
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

/// Decides over `connection` by `policies`: those that hold for the workload, `Err` for a listed but unknown one.
pub(crate) fn decide(policies: &[Result<&Arc<Policy>, &PolicyKey>], connection: &Connection) -> Decision {
    let outcome = enforce(policies, None, connection);
    let allowed = outcome.is_ok();
    let dry_run = policies
        .iter()
        .filter_map(|p| p.as_ref().ok())
        .filter(|p| p.dry_run)
        .map(|p| DryRun { policy: p.key.clone(), would: enforce(policies, Some(&p.key), connection) })
        .filter(|d| d.would.is_ok() != allowed)
        .collect();
    Decision { outcome: outcome.map(|reason| Permit { connection: connection.clone(), reason }), dry_run }
}

/// `trial` names a dry-run policy that counts as enforced this once.
fn enforce(
    policies: &[Result<&Arc<Policy>, &PolicyKey>],
    trial: Option<&PolicyKey>,
    connection: &Connection,
) -> Result<Allow, Deny> {
    if let Some(unknown) = policies.iter().find_map(|p| p.as_ref().err()) {
        return Err(Deny::UnknownPolicy((*unknown).clone()));
    }
    let in_force = |action| {
        policies
            .iter()
            .filter_map(|p| p.as_ref().ok())
            .filter(move |p| p.action == action && (!p.dry_run || Some(&p.key) == trial))
    };
    if let Some(rule) = in_force(Action::Deny).find_map(|p| matching_rule(p, connection)) {
        return Err(Deny::Matched(rule));
    }
    if let Some(rule) = in_force(Action::Allow).find_map(|p| matching_rule(p, connection)) {
        return Ok(Allow::Matched(rule));
    }
    let considered: Box<[PolicyKey]> = in_force(Action::Allow).map(|p| p.key.clone()).collect();
    if considered.is_empty() {
        return Ok(Allow::NoAllowPolicies);
    }
    Err(Deny::NoneMatched { considered, closest: closest(in_force(Action::Allow).copied(), connection) })
}

fn matching_rule(policy: &Policy, connection: &Connection) -> Option<RuleRef> {
    policy.rules.iter().enumerate().find_map(|(index, rule)| {
        // First without building anything: most rules do not match.
        if !rule.clauses.iter().all(|c| clause_holds(c, connection)) {
            return None;
        }
        let matches = rule
            .clauses
            .iter()
            .map(|c| c.matches.iter().position(|m| failing_field(m, connection).is_none()))
            .collect();
        Some(RuleRef { policy: policy.key.clone(), rule: index, matches })
    })
}

fn clause_holds(clause: &Clause, connection: &Connection) -> bool {
    clause.matches.is_empty() || clause.matches.iter().any(|m| failing_field(m, connection).is_none())
}

/// What makes a match fail.
enum Failure {
    Empty,
    Field { field: Field, negated: bool },
}

/// The first field of `m` that does not hold.
fn failing_field(m: &Match, c: &Connection) -> Option<Failure> {
    let s = c.source.as_ref();
    let mut any_field = false;
    // `hit` says whether a value matches. A list that is empty is a field that is not set.
    let mut check = |field: Field, values: usize, negated: bool, hit: &dyn Fn() -> bool| {
        if values == 0 {
            return None;
        }
        any_field = true;
        (hit() == negated).then_some(Failure::Field { field, negated })
    };
    let namespace = s.map_or("", |s| s.namespace());
    let domain = s.map_or("", |s| s.trust_domain().as_str());
    let account = |list: &[crate::policy::ServiceAccountMatch]| {
        s.is_some_and(|s| {
            list.iter().any(|a| a.namespace == *s.namespace() && a.name == *s.service_account())
        })
    };
    // An absent text matches no pattern, whatever the pattern: `Exact("")` and `Prefix("")` included.
    let text = |list: &[crate::StringMatch], t: &str| s.is_some() && list.iter().any(|p| p.matches(t));
    let ip = |list: &[crate::IpMatch], ip: IpAddr| list.iter().any(|r| r.matches(ip));
    let (to_ip, to_port) = (c.destination.ip(), c.destination.port());
    let first = check(Field::Principal, m.principals.len(), false, &|| text(&m.principals, &c.principal))
        .or_else(|| {
            check(Field::Principal, m.not_principals.len(), true, &|| text(&m.not_principals, &c.principal))
        })
        .or_else(|| {
            check(Field::ServiceAccount, m.service_accounts.len(), false, &|| account(&m.service_accounts))
        })
        .or_else(|| {
            check(Field::ServiceAccount, m.not_service_accounts.len(), true, &|| {
                account(&m.not_service_accounts)
            })
        })
        .or_else(|| check(Field::Namespace, m.namespaces.len(), false, &|| text(&m.namespaces, namespace)))
        .or_else(|| {
            check(Field::Namespace, m.not_namespaces.len(), true, &|| text(&m.not_namespaces, namespace))
        })
        .or_else(|| {
            check(Field::TrustDomain, m.trust_domains.len(), false, &|| text(&m.trust_domains, domain))
        })
        .or_else(|| {
            check(Field::TrustDomain, m.not_trust_domains.len(), true, &|| text(&m.not_trust_domains, domain))
        })
        .or_else(|| check(Field::SourceIp, m.source_ips.len(), false, &|| ip(&m.source_ips, c.source_ip)))
        .or_else(|| {
            check(Field::SourceIp, m.not_source_ips.len(), true, &|| ip(&m.not_source_ips, c.source_ip))
        })
        .or_else(|| {
            check(Field::DestinationIp, m.destination_ips.len(), false, &|| ip(&m.destination_ips, to_ip))
        })
        .or_else(|| {
            check(Field::DestinationIp, m.not_destination_ips.len(), true, &|| {
                ip(&m.not_destination_ips, to_ip)
            })
        })
        .or_else(|| {
            let hit = || m.destination_ports.contains(&to_port);
            check(Field::DestinationPort, m.destination_ports.len(), false, &hit)
        })
        .or_else(|| {
            let hit = || m.not_destination_ports.contains(&to_port);
            check(Field::DestinationPort, m.not_destination_ports.len(), true, &hit)
        });
    first.or((!any_field).then_some(Failure::Empty))
}

/// Of the rules of `policies`, none of which matched, the one with the fewest failing clauses. Runs on refusal
/// only.
fn closest<'a>(policies: impl Iterator<Item = &'a Arc<Policy>>, connection: &Connection) -> Option<NearMiss> {
    let mut best: Option<(usize, NearMiss)> = None;
    for policy in policies {
        if policy.rules.is_empty() {
            best.get_or_insert_with(|| (usize::MAX, empty_policy(policy)));
        }
        for (index, rule) in policy.rules.iter().enumerate() {
            let failing = rule.clauses.iter().filter(|c| !clause_holds(c, connection)).count();
            if best.as_ref().is_none_or(|(fewest, _)| failing < *fewest)
                && let Some(miss) = near_miss(policy, index, rule, connection)
            {
                best = Some((failing, miss));
            }
        }
    }
    best.map(|(_, miss)| miss)
}

fn empty_policy(policy: &Policy) -> NearMiss {
    NearMiss {
        policy: policy.key.clone(),
        rule: 0,
        clause: None,
        field: None,
        negated: false,
        wanted: Box::new([]),
        got: String::new(),
    }
}

fn near_miss(policy: &Policy, index: usize, rule: &Rule, connection: &Connection) -> Option<NearMiss> {
    let (clause_index, clause) =
        rule.clauses.iter().enumerate().find(|(_, c)| !clause_holds(c, connection))?;
    let (m, failure) = clause.matches.iter().find_map(|m| Some((m, failing_field(m, connection)?)))?;
    let (field, negated) = match failure {
        Failure::Empty => (None, false),
        Failure::Field { field, negated } => (Some(field), negated),
    };
    Some(NearMiss {
        policy: policy.key.clone(),
        rule: index,
        clause: Some(clause_index),
        field,
        negated,
        wanted: field.map(|f| wanted(clause, m, f, negated)).unwrap_or_default(),
        got: field.map(|f| connection.shown(f)).unwrap_or_default(),
    })
}

/// The values of a field: of all matches of the clause when it is a positive one (each is an alternative), of
/// the one match when it is negated.
fn wanted(clause: &Clause, one: &Match, field: Field, negated: bool) -> Box<[String]> {
    if negated {
        return values(one, field, true).into();
    }
    clause.matches.iter().flat_map(|m| values(m, field, false)).collect()
}

fn values(m: &Match, field: Field, negated: bool) -> Vec<String> {
    fn texts<T: ToString>(list: &[T]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }
    match (field, negated) {
        (Field::Namespace, false) => texts(&m.namespaces),
        (Field::Namespace, true) => texts(&m.not_namespaces),
        (Field::Principal, false) => texts(&m.principals),
        (Field::Principal, true) => texts(&m.not_principals),
        (Field::ServiceAccount, false) => texts(&m.service_accounts),
        (Field::ServiceAccount, true) => texts(&m.not_service_accounts),
        (Field::TrustDomain, false) => texts(&m.trust_domains),
        (Field::TrustDomain, true) => texts(&m.not_trust_domains),
        (Field::SourceIp, false) => texts(&m.source_ips),
        (Field::SourceIp, true) => texts(&m.not_source_ips),
        (Field::DestinationIp, false) => texts(&m.destination_ips),
        (Field::DestinationIp, true) => texts(&m.not_destination_ips),
        (Field::DestinationPort, false) => texts(&m.destination_ports),
        (Field::DestinationPort, true) => texts(&m.not_destination_ports),
    }
}
