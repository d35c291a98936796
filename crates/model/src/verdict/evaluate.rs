//! Whether a rule matches, and if not, which field of it fails.

use std::net::IpAddr;
use std::sync::Arc;

use super::{Connection, Field, NearMiss, RuleRef};
use crate::http::{HttpMatch, Readings, Request, matches_host};
use crate::policy::{Action, Clause, Match, Policy, Rule, ServiceAccountMatch};
use crate::{IpMatch, SpiffeId, StringMatch};

/// What is decided over.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    /// The connection.
    pub connection: &'a Connection,
    /// The request on it; none where it is not HTTP, or no one looked.
    pub request: Option<&'a Request<'a>>,
}

pub(super) fn matching_rule(policy: &Policy, subject: Subject<'_>) -> Option<RuleRef> {
    let unseen = Unseen::of(policy);
    policy.rules.iter().enumerate().find_map(|(index, rule)| {
        // First without building anything: most rules do not match.
        if !rule.clauses.iter().all(|c| clause_holds(c, subject, unseen)) {
            return None;
        }
        let matches = rule
            .clauses
            .iter()
            .map(|c| c.matches.iter().position(|m| failing_field(m, subject, unseen).is_none()))
            .collect();
        Some(RuleRef { policy: policy.key.clone(), rule: index, matches })
    })
}

/// What becomes of conditions on requests where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unseen {
    /// They hold: the policy refuses.
    Holds,
    /// They fail: the policy lets in.
    Fails,
}

impl Unseen {
    fn of(policy: &Policy) -> Self {
        if policy.action == Action::Allow { Self::Fails } else { Self::Holds }
    }
}

fn clause_holds(clause: &Clause, subject: Subject<'_>, unseen: Unseen) -> bool {
    clause.matches.is_empty() || clause.matches.iter().any(|m| failing_field(m, subject, unseen).is_none())
}

/// What makes a match fail.
enum Failure {
    Empty,
    Field { field: Field, negated: bool },
}

/// Runs through the fields of a match. A list that is empty is a field that is not set.
struct Fields {
    any: bool,
    failed: Option<Failure>,
    /// Whether what matches is refused, or shown to somebody who may refuse it.
    refuses: bool,
}

impl Fields {
    /// Checks one field: the positive list, and the negated one. `hit` says whether one of a list matches. What can be read
    /// in several ways matches by any of them where a match refuses, and by all of it where a match lets in.
    fn check<T>(
        &mut self,
        field: impl Fn() -> Field,
        positive: &[T],
        negated: &[T],
        hit: impl Fn(&[T], Readings) -> bool,
    ) {
        for (list, negated) in [(positive, false), (negated, true)] {
            if self.failed.is_some() {
                return;
            }
            if !list.is_empty() {
                self.any = true;
                let readings = if self.refuses == negated { Readings::Whole } else { Readings::Any };
                if hit(list, readings) == negated {
                    self.failed = Some(Failure::Field { field: field(), negated });
                }
            }
        }
    }
}

/// The first field of `m` that does not hold.
fn failing_field(m: &Match, subject: Subject<'_>, unseen: Unseen) -> Option<Failure> {
    let c = subject.connection;
    let s = c.source.as_ref();
    let namespace = s.map_or("", |s| s.namespace());
    let domain = s.map_or("", |s| s.trust_domain().as_str());
    let account = |list: &[ServiceAccountMatch], _| {
        s.is_some_and(|s| {
            list.iter().any(|a| a.namespace == *s.namespace() && a.name == *s.service_account())
        })
    };
    // An absent text matches no pattern, whatever the pattern: `Exact("")` and `Prefix("")` included.
    let text = |list: &[StringMatch], t: &str| s.is_some() && list.iter().any(|p| p.matches(t));
    let ip = |list: &[IpMatch], ip: IpAddr| list.iter().any(|r| r.matches(ip));
    let (to_ip, to_port) = (c.destination.ip(), c.destination.port());
    let mut fields = Fields { any: false, failed: None, refuses: unseen == Unseen::Holds };
    fields.check(|| Field::Principal, &m.principals, &m.not_principals, |l, _| text(l, &c.principal));
    fields.check(|| Field::ServiceAccount, &m.service_accounts, &m.not_service_accounts, account);
    fields.check(|| Field::Namespace, &m.namespaces, &m.not_namespaces, |l, _| text(l, namespace));
    fields.check(|| Field::TrustDomain, &m.trust_domains, &m.not_trust_domains, |l, _| text(l, domain));
    fields.check(|| Field::SourceIp, &m.source_ips, &m.not_source_ips, |l, _| ip(l, c.source_ip));
    fields.check(|| Field::DestinationIp, &m.destination_ips, &m.not_destination_ips, |l, _| ip(l, to_ip));
    fields.check(
        || Field::DestinationPort,
        &m.destination_ports,
        &m.not_destination_ports,
        |l, _| l.contains(&to_port),
    );
    if let (None, Some(http)) = (&fields.failed, &m.http) {
        match subject.request {
            Some(request) => failing_http(&mut fields, http, request),
            None => {
                fields.any = true;
                let failure = Failure::Field { field: Field::Request, negated: false };
                fields.failed = (unseen == Unseen::Fails).then_some(failure);
            }
        }
    }
    fields.failed.or((!fields.any).then_some(Failure::Empty))
}

fn failing_http(fields: &mut Fields, m: &HttpMatch, r: &Request<'_>) {
    let host = |list: &[StringMatch], readings: Readings| {
        readings.any_host(r.authority, |host| list.iter().any(|p| matches_host(p, host)))
    };
    fields.check(|| Field::Host, &m.hosts, &m.not_hosts, host);
    let method = |list: &[StringMatch], _| list.iter().any(|p| p.matches(r.method));
    fields.check(|| Field::Method, &m.methods, &m.not_methods, method);
    fields.check(|| Field::Path, &m.paths, &m.not_paths, |list, _| list.iter().any(|p| p.matches(r.path)));
    let remote = |list: &[IpMatch], _| list.iter().any(|p| p.matches(r.remote_ip));
    fields.check(|| Field::RemoteIp, &m.remote_ips, &m.not_remote_ips, remote);
    let principal = |list: &[StringMatch], _| {
        r.claims.and_then(|c| c.principal()).is_some_and(|text| list.iter().any(|p| p.matches(text)))
    };
    fields.check(|| Field::RequestPrincipal, &m.request_principals, &m.not_request_principals, principal);
    if let (None, Some(condition)) = (&fields.failed, &m.attribute) {
        let any = |list: &[StringMatch], readings| {
            condition.attribute.any(r, readings, |text| list.iter().any(|p| p.matches(text)))
        };
        let field = || Field::Attribute(condition.attribute.clone());
        fields.check(field, &condition.values, &condition.not_values, any);
    }
}

/// Of the rules of `policies`, none of which matched, the one with the fewest failing clauses. Runs on refusal
/// only.
pub(super) fn closest<'a>(
    policies: impl Iterator<Item = &'a Arc<Policy>>,
    subject: Subject<'_>,
) -> Option<NearMiss> {
    let mut best: Option<(usize, NearMiss)> = None;
    for policy in policies {
        if policy.rules.is_empty() {
            best.get_or_insert_with(|| (usize::MAX, empty_policy(policy)));
        }
        let unseen = Unseen::of(policy);
        for (index, rule) in policy.rules.iter().enumerate() {
            let failing = rule.clauses.iter().filter(|c| !clause_holds(c, subject, unseen)).count();
            if best.as_ref().is_none_or(|(fewest, _)| failing < *fewest)
                && let Some(miss) = near_miss(policy, index, rule, subject)
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

fn near_miss(policy: &Policy, index: usize, rule: &Rule, subject: Subject<'_>) -> Option<NearMiss> {
    let unseen = Unseen::of(policy);
    let (clause_index, clause) =
        rule.clauses.iter().enumerate().find(|(_, c)| !clause_holds(c, subject, unseen))?;
    let (m, failure) = clause.matches.iter().find_map(|m| Some((m, failing_field(m, subject, unseen)?)))?;
    let (field, negated) = match failure {
        Failure::Empty => (None, false),
        Failure::Field { field, negated } => (Some(field), negated),
    };
    Some(NearMiss {
        policy: policy.key.clone(),
        rule: index,
        clause: Some(clause_index),
        wanted: field.as_ref().map(|f| wanted(clause, m, f, negated)).unwrap_or_default(),
        got: field.as_ref().map(|f| shown(f, subject)).unwrap_or_default(),
        field,
        negated,
    })
}

/// The value that a match compares, as text, for explanations.
fn shown(field: &Field, subject: Subject<'_>) -> String {
    let (c, r) = (subject.connection, subject.request);
    let part = |f: fn(&SpiffeId) -> String| c.source.as_ref().map_or_else(|| "none".to_owned(), f);
    let of = |f: fn(&Request<'_>) -> String| r.map(f).unwrap_or_default();
    match field {
        Field::Namespace => part(|s| s.namespace().to_string()),
        Field::Principal => part(SpiffeId::principal),
        Field::ServiceAccount => part(|s| format!("{}/{}", s.namespace(), s.service_account())),
        Field::TrustDomain => part(|s| s.trust_domain().to_string()),
        Field::SourceIp => c.source_ip.to_string(),
        Field::DestinationIp => c.destination.ip().to_string(),
        Field::DestinationPort => c.destination.port().to_string(),
        Field::Host => of(|r| r.authority.to_owned()),
        Field::Method => of(|r| r.method.to_owned()),
        Field::Path => of(|r| r.path.to_owned()),
        Field::RemoteIp => of(|r| r.remote_ip.to_string()),
        Field::RequestPrincipal => of(|r| r.claims.and_then(|c| c.principal()).unwrap_or("none").to_owned()),
        Field::Attribute(attribute) => r.map(|r| attribute.shown(r)).unwrap_or_default(),
        Field::Request => "none".to_owned(),
    }
}

/// The values of a field: of all matches of the clause when it is a positive one (each is an alternative), of
/// the one match when it is negated.
fn wanted(clause: &Clause, one: &Match, field: &Field, negated: bool) -> Box<[String]> {
    if negated {
        return values(one, field, true).into();
    }
    clause.matches.iter().flat_map(|m| values(m, field, false)).collect()
}

fn values(m: &Match, field: &Field, negated: bool) -> Vec<String> {
    fn texts<T: ToString>(positive: &[T], negative: &[T], negated: bool) -> Vec<String> {
        if negated { negative } else { positive }.iter().map(ToString::to_string).collect()
    }
    let none = HttpMatch::default();
    let h = m.http.as_deref().unwrap_or(&none);
    match field {
        Field::Namespace => texts(&m.namespaces, &m.not_namespaces, negated),
        Field::Principal => texts(&m.principals, &m.not_principals, negated),
        Field::ServiceAccount => texts(&m.service_accounts, &m.not_service_accounts, negated),
        Field::TrustDomain => texts(&m.trust_domains, &m.not_trust_domains, negated),
        Field::SourceIp => texts(&m.source_ips, &m.not_source_ips, negated),
        Field::DestinationIp => texts(&m.destination_ips, &m.not_destination_ips, negated),
        Field::DestinationPort => texts(&m.destination_ports, &m.not_destination_ports, negated),
        Field::Host => texts(&h.hosts, &h.not_hosts, negated),
        Field::Method => texts(&h.methods, &h.not_methods, negated),
        Field::Path => texts(&h.paths, &h.not_paths, negated),
        Field::RemoteIp => texts(&h.remote_ips, &h.not_remote_ips, negated),
        Field::RequestPrincipal => texts(&h.request_principals, &h.not_request_principals, negated),
        Field::Attribute(attribute) => match &h.attribute {
            Some(a) if a.attribute == *attribute => texts(&a.values, &a.not_values, negated),
            _ => Vec::new(),
        },
        Field::Request => vec!["an HTTP request".to_owned()],
    }
}
