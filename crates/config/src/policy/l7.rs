//! Compiling AuthorizationPolicies to what waypoints match requests by. Everything that a policy says can be told there,
//! but for what an Envoy filter would have said: such a part of a rule fails in an ALLOW policy and holds in others.

use std::sync::Arc;

use model::{Action, Clause, Match, Policy, PolicyKey, Rule, Scope, TrustDomains};

use super::authorization::{AuthorizationPolicy, PolicyMatch, PolicyRule, RequestedAction};
use super::l4::expand;

/// Compiles `policy`. `None` when it never changes a decision.
#[must_use]
pub fn compile(key: PolicyKey, policy: &AuthorizationPolicy, domains: &TrustDomains) -> Option<Arc<Policy>> {
    let action = match policy.action {
        RequestedAction::Allow => Action::Allow,
        RequestedAction::Deny => Action::Deny,
        // Without a provider nobody can agree.
        RequestedAction::Custom => policy.provider.clone().map_or(Action::Deny, Action::Custom),
        RequestedAction::Audit => return None,
    };
    let allows = action == Action::Allow;
    let rules = policy.rules.iter().map(|r| rule(r, allows, domains)).collect();
    Some(Arc::new(Policy { key, scope: Scope::WorkloadSelector, action, rules, dry_run: policy.dry_run }))
}

fn rule(rule: &PolicyRule, allows: bool, domains: &TrustDomains) -> Rule {
    let one = |m: &PolicyMatch| Match { http: m.http.clone(), ..expand(&m.connection, domains) };
    let untold = |m: &PolicyMatch| m.needs_requests && m.http.is_none();
    let clauses = rule.clauses.iter().map(|clause| {
        // A match of which a part can't be told holds in full, and with it the clause.
        if !allows && clause.matches.iter().any(untold) {
            return Clause::default();
        }
        let told = clause.matches.iter().map(|m| if untold(m) { Match::default() } else { one(m) });
        Clause { matches: told.collect() }
    });
    Rule { clauses: clauses.collect() }
}
