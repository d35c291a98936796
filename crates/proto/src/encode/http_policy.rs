//! Writing policies over requests.

use model::http::{Attribute, AttributeMatch, HttpMatch, PathPattern};
use model::{Action, Clause, Match, Policy, Rule};

use super::http::policy_key;
use super::policy::{one, patterns, ranges, scope};
use crate::wire::waypoint as wire;

/// Writes what waypoints enforce of a policy: all of it, that of requests and that of connections.
#[must_use]
pub fn encode_http_policy(policy: &Policy) -> wire::HttpPolicy {
    use wire::http_policy::Action as Wire;
    let Policy { key, scope: holds_for, action, rules, dry_run } = policy;
    let action = match action {
        Action::Allow => Wire::Allow(()),
        Action::Deny => Wire::Deny(()),
        Action::Custom(provider) => Wire::Custom(provider.to_string()),
    };
    wire::HttpPolicy {
        name: Some(policy_key(key)),
        scope: scope(*holds_for).into(),
        action: Some(action),
        rules: rules.iter().map(rule).collect(),
        dry_run: *dry_run,
    }
}

fn rule(Rule { clauses }: &Rule) -> wire::Rule {
    let clause =
        |Clause { matches }: &Clause| wire::Clause { matches: matches.iter().map(policy_match).collect() };
    wire::Rule { clauses: clauses.iter().map(clause).collect() }
}

fn policy_match(m: &Match) -> wire::Match {
    wire::Match { connection: Some(one(m)), http: m.http.as_deref().map(http_match) }
}

fn http_match(m: &HttpMatch) -> wire::HttpMatch {
    let HttpMatch {
        hosts,
        not_hosts,
        methods,
        not_methods,
        paths,
        not_paths,
        remote_ips,
        not_remote_ips,
        request_principals,
        not_request_principals,
        attribute,
    } = m;
    wire::HttpMatch {
        hosts: patterns(hosts),
        not_hosts: patterns(not_hosts),
        methods: patterns(methods),
        not_methods: patterns(not_methods),
        paths: paths.iter().map(path).collect(),
        not_paths: not_paths.iter().map(path).collect(),
        remote_ips: ranges(remote_ips),
        not_remote_ips: ranges(not_remote_ips),
        request_principals: patterns(request_principals),
        not_request_principals: patterns(not_request_principals),
        attribute: attribute.as_ref().map(condition),
    }
}

pub(super) fn path(pattern: &PathPattern) -> wire::PathPattern {
    use wire::path_pattern::Kind;
    let kind = match pattern {
        PathPattern::Text(text) => Kind::Text(super::policy::pattern(text)),
        PathPattern::Template(template) => Kind::Template(template.source().to_string()),
    };
    wire::PathPattern { kind: Some(kind) }
}

fn condition(condition: &AttributeMatch) -> wire::AttributeMatch {
    use wire::attribute_match::{Attribute as Wire, Claim};
    let AttributeMatch { attribute, values, not_values } = condition;
    let attribute = match attribute {
        Attribute::Header(name) => Wire::Header(name.to_string()),
        Attribute::Claim(path) => Wire::Claim(Claim { path: super::texts(path) }),
        Attribute::Sni => Wire::Sni(()),
    };
    wire::AttributeMatch {
        attribute: Some(attribute),
        values: patterns(values),
        not_values: patterns(not_values),
    }
}
