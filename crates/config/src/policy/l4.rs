//! Compiling AuthorizationPolicies to what connections are matched by.
//!
//! A connection shows its source's identity and address and its destination's address and port. Rules may ask for
//! more, which only a waypoint sees. Such a rule is compiled so that the decision errs on the closed side only:
//!
//! | action | rule with parts that need requests | why |
//! |---|---|---|
//! | ALLOW | matches nothing | letting in by half of the conditions would let in more than is written |
//! | DENY | without these parts; matches everything in its scope when nothing else is left | missing attributes count as matched |
//! | CUSTOM | as DENY | the provider, which cannot be asked, might have refused |
//! | AUDIT | not compiled | it never changes a decision |
//!
//! What of this holds for a workload that a waypoint stands before is in [`super::halves`].
//!
//! A rule keeps its place in the list, so that an explanation names it by its index in the resource.
//!
//! A policy with `targetRefs` is for what comes through a waypoint, which asks it beside the policies of the node
//! and for the client behind it. While there is none, the workloads behind the target refuse what the policy could
//! refuse: a DENY or CUSTOM policy refuses what its rules match, without regard to ports and addresses of the
//! destination, since those are the service's there and the workload's here. An ALLOW policy refuses everything:
//! its "nothing else" is a refusal of its own, which no other ALLOW policy at the node may undo, and no connection
//! can be told to be one that the waypoint would have let in. Both are compiled to DENY for these reasons. Behind
//! an external ServiceEntry there is nobody to refuse; there it is the clients' proxy that lets nothing out, as for a
//! service whose waypoint is not ready.

use std::sync::Arc;

use model::{Action, Clause, Match, Policy, PolicyKey, Rule, Scope, TrustDomains};

use super::authorization::{AuthorizationPolicy, PolicyMatch, PolicyRule, PolicyScope, RequestedAction};
use super::pattern::{expand_domains, expand_principals};

/// The scope of what workloads list.
pub(super) const LISTED: Scope = Scope::WorkloadSelector;

/// Compiles `policy`. `None` when it never changes a decision.
#[must_use]
pub fn compile(
    key: PolicyKey,
    policy: &AuthorizationPolicy,
    is_root_namespace: bool,
    domains: &TrustDomains,
) -> Option<Arc<Policy>> {
    let targeted = matches!(policy.scope, PolicyScope::Targets(_));
    let scope = match policy.scope {
        // Not the same for all: what a waypoint stands before has another half of it.
        PolicyScope::Namespace if policy.needs_requests() => LISTED,
        PolicyScope::Namespace if is_root_namespace => Scope::Global,
        PolicyScope::Namespace => Scope::Namespace,
        PolicyScope::Selector(_) | PolicyScope::Targets(_) => LISTED,
    };
    let action = match policy.action {
        RequestedAction::Allow if !targeted => Action::Allow,
        RequestedAction::Allow | RequestedAction::Deny | RequestedAction::Custom => Action::Deny,
        RequestedAction::Audit => return None,
    };
    let rules: Box<[Rule]> = match policy.action {
        RequestedAction::Allow if targeted => Box::new([Rule::default()]),
        RequestedAction::Allow => policy.rules.iter().map(|r| allowing(r, domains)).collect(),
        RequestedAction::Deny | RequestedAction::Custom | RequestedAction::Audit => {
            policy.rules.iter().map(|r| refusing(r, targeted, domains)).collect()
        }
    };
    Some(Arc::new(Policy { key, scope, action, rules, dry_run: policy.dry_run }))
}

/// A rule that matches no more than is written.
fn allowing(rule: &PolicyRule, domains: &TrustDomains) -> Rule {
    if rule.needs_requests() {
        return Rule { clauses: [Clause { matches: [Match::default()].into() }].into() };
    }
    let clause = |matches: &[PolicyMatch]| Clause {
        matches: matches.iter().map(|m| expand(&m.connection, domains)).collect(),
    };
    Rule { clauses: rule.clauses.iter().map(|c| clause(&c.matches)).collect() }
}

/// A rule that matches no less than is written.
fn refusing(rule: &PolicyRule, targeted: bool, domains: &TrustDomains) -> Rule {
    let clause = |matches: &[PolicyMatch]| {
        let matches: Box<[Match]> = matches
            .iter()
            .map(|m| {
                let m = expand(&m.connection, domains);
                if targeted { without_destination(m) } else { m }
            })
            .collect();
        // A match of which nothing is left holds for every connection, and with it the clause.
        let holds = matches.iter().any(|m| *m == Match::default());
        Clause { matches: if holds { Box::default() } else { matches } }
    };
    Rule { clauses: rule.clauses.iter().map(|c| clause(&c.matches)).collect() }
}

fn without_destination(m: Match) -> Match {
    Match {
        destination_ips: Box::default(),
        not_destination_ips: Box::default(),
        destination_ports: Box::default(),
        not_destination_ports: Box::default(),
        ..m
    }
}

/// A match with the trust domains spelled out.
pub(super) fn expand(m: &Match, domains: &TrustDomains) -> Match {
    Match {
        principals: expand_principals(&m.principals, domains),
        not_principals: expand_principals(&m.not_principals, domains),
        trust_domains: expand_domains(&m.trust_domains, domains),
        not_trust_domains: expand_domains(&m.not_trust_domains, domains),
        ..m.clone()
    }
}
