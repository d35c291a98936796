//! Writing policies.

use model::{Action, IpMatch, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};

use super::{EncodeError, Extensions, Obstacles, Reason, network};
use crate::lower::lower;
use crate::wire::security as wire;

/// Writes a policy. Without extensions it may come to other rules than it has, which decide alike (see
/// `lower.rs`); an explanation by such a receiver counts those.
///
/// Two fields are younger than the rest, and the caller has to know the receiver's age: proxies of Istio before
/// 1.29 enforce a dry-run policy, and those before service accounts came to the wire skip that match.
///
/// # Errors
/// What the receiver could not enforce as it stands; nothing is left out.
pub fn encode_policy(policy: &Policy, extensions: Extensions) -> Result<wire::Authorization, EncodeError> {
    let name = policy.key.to_string();
    let mut obstacles = Obstacles::default();
    obstacles.not_empty("name", &policy.key.name);
    obstacles.no_slash("namespace", &policy.key.namespace);
    only_connections(policy, &mut obstacles);
    let lowered = match extensions {
        Extensions::Culvert => None,
        Extensions::None => match lower(policy) {
            Ok(lowered) => Some(lowered),
            Err(more) => {
                obstacles.0.extend(more);
                None
            }
        },
    };
    let p = lowered.as_ref().unwrap_or(policy);
    let message = wire::Authorization {
        name: p.key.name.to_string(),
        namespace: p.key.namespace.to_string(),
        scope: scope(p.scope).into(),
        action: if p.action == Action::Allow { wire::Action::Allow } else { wire::Action::Deny }.into(),
        groups: p.rules.iter().map(rule).collect(),
        dry_run: p.dry_run,
        extensions: Vec::new(),
    };
    obstacles.result("policy", &name, message)
}

pub(super) fn scope(scope: Scope) -> wire::Scope {
    match scope {
        Scope::Global => wire::Scope::Global,
        Scope::Namespace => wire::Scope::Namespace,
        Scope::WorkloadSelector => wire::Scope::WorkloadSelector,
    }
}

/// What only requests show has no place in this message.
fn only_connections(policy: &Policy, obstacles: &mut Obstacles) {
    if matches!(policy.action, Action::Custom(_)) {
        obstacles.add("action", Reason::NeedsRequests);
    }
    for (r, rule) in policy.rules.iter().enumerate() {
        for (c, clause) in rule.clauses.iter().enumerate() {
            for m in clause.matches.iter().enumerate().filter(|(_, m)| m.http.is_some()).map(|(m, _)| m) {
                let field = format!("rules[{r}].clauses[{c}].matches[{m}].http");
                obstacles.add(field, Reason::NeedsRequests);
            }
        }
    }
}

fn rule(rule: &Rule) -> wire::Group {
    let clause = |clause: &model::Clause| wire::Rules { matches: clause.matches.iter().map(one).collect() };
    wire::Group { rules: rule.clauses.iter().map(clause).collect() }
}

pub(super) fn one(m: &Match) -> wire::Match {
    wire::Match {
        namespaces: patterns(&m.namespaces),
        not_namespaces: patterns(&m.not_namespaces),
        service_accounts: accounts(&m.service_accounts),
        not_service_accounts: accounts(&m.not_service_accounts),
        principals: patterns(&m.principals),
        not_principals: patterns(&m.not_principals),
        source_ips: ranges(&m.source_ips),
        not_source_ips: ranges(&m.not_source_ips),
        destination_ips: ranges(&m.destination_ips),
        not_destination_ips: ranges(&m.not_destination_ips),
        destination_ports: m.destination_ports.iter().map(|p| u32::from(*p)).collect(),
        not_destination_ports: m.not_destination_ports.iter().map(|p| u32::from(*p)).collect(),
        extensions: Vec::new(),
        trust_domains: patterns(&m.trust_domains),
        not_trust_domains: patterns(&m.not_trust_domains),
    }
}

pub(super) fn patterns(list: &[StringMatch]) -> Vec<wire::StringMatch> {
    list.iter().map(pattern).collect()
}

pub(super) fn pattern(pattern: &StringMatch) -> wire::StringMatch {
    use wire::string_match::MatchType;
    wire::StringMatch {
        match_type: Some(match pattern {
            StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
            StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
            StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
            StringMatch::Presence => MatchType::Presence(()),
        }),
    }
}

fn accounts(list: &[ServiceAccountMatch]) -> Vec<wire::ServiceAccountMatch> {
    list.iter()
        .map(|a| wire::ServiceAccountMatch {
            namespace: a.namespace.to_string(),
            service_account: a.name.to_string(),
        })
        .collect()
}

pub(super) fn ranges(list: &[IpMatch]) -> Vec<wire::Address> {
    list.iter().map(|range| network(range.0)).collect()
}
