//! Policies in the form that Istio's proxies enforce.
//!
//! Istio's wire has no trust domains, and its proxies compare the namespace of a source without identity as an
//! empty text. Here a policy is rewritten so that such a proxy decides as the model does:
//! * a trust domain is the text before the first slash of a principal, so `Exact(td)` is the principal prefix
//!   `td/`, a prefix is the same prefix, presence is presence. A suffix has no such form and is refused.
//! * A match that has principals already takes the trust domain as a second clause, which is AND-ed. In a clause
//!   of several matches, which are OR-ed, the rule is split first (rules are OR-ed too).
//! * A pattern that no namespace or trust domain can match is taken out of its list. Where that empties the
//!   list, the match becomes what it was: one that never holds, or (negated) one that holds of every source.

use model::{Clause, Match, Policy, Rule, StringMatch};

use crate::encode::{Obstacle, Reason};

/// More rules than this out of one are refused: the number is the product over the rule's clauses.
const MAX_RULES: usize = 64;

/// Rewrites `policy`, or says what can't be expressed.
pub(crate) fn lower(policy: &Policy) -> Result<Policy, Vec<Obstacle>> {
    let mut obstacles = Vec::new();
    let mut rules = Vec::with_capacity(policy.rules.len());
    for (index, rule) in policy.rules.iter().enumerate() {
        lower_rule(rule, index, &mut rules, &mut obstacles);
    }
    if !obstacles.is_empty() {
        return Err(obstacles);
    }
    Ok(Policy { rules: rules.into(), ..policy.clone() })
}

fn lower_rule(rule: &Rule, index: usize, out: &mut Vec<Rule>, obstacles: &mut Vec<Obstacle>) {
    // Each alternative is the clauses of one rule to be.
    let mut alternatives: Vec<Vec<Clause>> = vec![Vec::new()];
    for (position, clause) in rule.clauses.iter().enumerate() {
        let options = lower_clause(clause, &format!("rules[{index}].clauses[{position}]"), obstacles);
        if alternatives.len() * options.len() > MAX_RULES {
            let wanted = alternatives.len() * options.len();
            let reason = Reason::TooManyRules { wanted, limit: MAX_RULES };
            obstacles.push(Obstacle { field: format!("rules[{index}]"), reason });
            return;
        }
        alternatives = alternatives
            .iter()
            .flat_map(|so_far| options.iter().map(|option| [so_far.as_slice(), option.as_slice()].concat()))
            .collect();
    }
    out.extend(alternatives.into_iter().map(|clauses| Rule { clauses: clauses.into() }));
}

/// The alternatives that a clause comes to, each a list of clauses that must all hold. Never empty.
fn lower_clause(clause: &Clause, path: &str, obstacles: &mut Vec<Obstacle>) -> Vec<Vec<Clause>> {
    let one = |m: Match| Clause { matches: Box::new([m]) };
    let mut plain = Vec::new();
    let mut options = Vec::new();
    for (index, m) in clause.matches.iter().enumerate() {
        match lower_match(m, &format!("{path}.matches[{index}]"), obstacles) {
            Lowered { main, and: None } => plain.push(main),
            Lowered { main, and: Some(and) } => options.push(vec![one(main), one(and)]),
        }
    }
    if !plain.is_empty() || options.is_empty() {
        options.push(vec![Clause { matches: plain.into() }]);
    }
    options
}

/// A match, and another that must hold beside it.
struct Lowered {
    main: Match,
    and: Option<Match>,
}

fn lower_match(m: &Match, path: &str, obstacles: &mut Vec<Obstacle>) -> Lowered {
    let mut main = Match { trust_domains: [].into(), not_trust_domains: [].into(), ..m.clone() };
    let mut refuse = |field: &str, suffix: &str| {
        let reason = Reason::TrustDomainSuffix(format!("*{suffix}"));
        obstacles.push(Obstacle { field: format!("{path}.{field}"), reason });
    };
    let mut to_principals = |list: &[StringMatch], field: &str| -> Vec<StringMatch> {
        list.iter()
            .filter_map(|pattern| match domain_as_principal(pattern) {
                Domain::Principal(pattern) => Some(pattern),
                Domain::Never => None,
                Domain::Suffix(suffix) => {
                    refuse(field, suffix);
                    None
                }
            })
            .collect()
    };
    let domains = to_principals(&m.trust_domains, "trust_domains");
    let not_domains = to_principals(&m.not_trust_domains, "not_trust_domains");
    main.namespaces = m.namespaces.iter().filter_map(namespace).collect();
    main.not_namespaces = m.not_namespaces.iter().filter_map(namespace).collect();

    let emptied = |before: &[StringMatch], after: &[StringMatch]| !before.is_empty() && after.is_empty();
    if emptied(&m.namespaces, &main.namespaces) || emptied(&m.trust_domains, &domains) {
        return Lowered { main: Match::default(), and: None };
    }
    let mut not_principals = main.not_principals.into_vec();
    if emptied(&m.not_namespaces, &main.not_namespaces) || emptied(&m.not_trust_domains, &not_domains) {
        // Holds of every source, and keeps the match from being an empty one, which holds of none.
        not_principals.push(StringMatch::Exact("".into()));
    }
    not_principals.extend(not_domains);
    main.not_principals = not_principals.into();

    if domains.is_empty() {
        return Lowered { main, and: None };
    }
    if main.principals.is_empty() {
        main.principals = domains.into();
        return Lowered { main, and: None };
    }
    Lowered { main, and: Some(Match { principals: domains.into(), ..Match::default() }) }
}

/// A pattern of trust domains among principals.
enum Domain<'a> {
    Principal(StringMatch),
    /// No trust domain matches.
    Never,
    Suffix(&'a str),
}

fn domain_as_principal(pattern: &StringMatch) -> Domain<'_> {
    match pattern {
        StringMatch::Exact(name) if name.is_empty() || name.contains('/') => Domain::Never,
        StringMatch::Exact(name) => Domain::Principal(StringMatch::Prefix(format!("{name}/").into())),
        StringMatch::Prefix(start) if start.is_empty() => Domain::Principal(StringMatch::Presence),
        StringMatch::Prefix(start) if start.contains('/') => Domain::Never,
        StringMatch::Prefix(start) => Domain::Principal(StringMatch::Prefix(start.clone())),
        StringMatch::Suffix(end) if end.is_empty() => Domain::Principal(StringMatch::Presence),
        StringMatch::Suffix(end) if end.contains('/') => Domain::Never,
        StringMatch::Suffix(end) => Domain::Suffix(end),
        StringMatch::Presence => Domain::Principal(StringMatch::Presence),
    }
}

/// A pattern of namespaces that does not match the empty text, which a source without identity has in Istio's
/// proxies; `None` for one that matches nothing else.
fn namespace(pattern: &StringMatch) -> Option<StringMatch> {
    match pattern {
        StringMatch::Exact(name) if name.is_empty() => None,
        StringMatch::Prefix(part) | StringMatch::Suffix(part) if part.is_empty() => {
            Some(StringMatch::Presence)
        }
        StringMatch::Exact(_) | StringMatch::Prefix(_) | StringMatch::Suffix(_) | StringMatch::Presence => {
            Some(pattern.clone())
        }
    }
}
