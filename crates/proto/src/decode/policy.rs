//! Reading policies.

use model::{
    Action, Clause, IpMatch, Match, Policy, PolicyKey, Rule, Scope, ServiceAccountMatch, StringMatch,
};

use super::{DecodeError, Decoder, Fault, Problem, cut, each, port, range};
use crate::wire::security as wire;

impl Decoder {
    /// Reads a policy.
    ///
    /// # Errors
    /// A field has no meaning in the model; the error names it. The policy must then not be taken for absent: a
    /// DENY would not be enforced.
    pub fn policy(&mut self, policy: &wire::Authorization) -> Result<Policy, DecodeError> {
        self.read_policy(policy)
            .map_err(|fault| fault.of("policy", format_args!("{}/{}", cut(&policy.namespace), policy.name)))
    }

    fn read_policy(&mut self, p: &wire::Authorization) -> Result<Policy, Fault> {
        if p.name.is_empty() {
            return Err(Fault::new("name", Problem::Missing));
        }
        Ok(Policy {
            key: PolicyKey { namespace: self.text(&p.namespace), name: self.text(&p.name) },
            scope: scope(p.scope)?,
            action: match wire::Action::try_from(p.action) {
                Ok(wire::Action::Allow) => Action::Allow,
                Ok(wire::Action::Deny) => Action::Deny,
                Err(_) => return Err(Fault::new("action", Problem::Enum(p.action))),
            },
            rules: each(&p.groups, "groups", |group| {
                let clauses = each(&group.rules, "rules", |rules| {
                    Ok(Clause { matches: each(&rules.matches, "matches", |m| self.policy_match(m))? })
                })?;
                Ok(Rule { clauses })
            })?,
            dry_run: p.dry_run,
        })
    }

    pub(super) fn policy_match(&mut self, m: &wire::Match) -> Result<Match, Fault> {
        Ok(Match {
            namespaces: self.patterns(&m.namespaces, "namespaces")?,
            not_namespaces: self.patterns(&m.not_namespaces, "not_namespaces")?,
            principals: self.patterns(&m.principals, "principals")?,
            not_principals: self.patterns(&m.not_principals, "not_principals")?,
            service_accounts: self.accounts(&m.service_accounts),
            not_service_accounts: self.accounts(&m.not_service_accounts),
            trust_domains: self.patterns(&m.trust_domains, "trust_domains")?,
            not_trust_domains: self.patterns(&m.not_trust_domains, "not_trust_domains")?,
            source_ips: ranges(&m.source_ips, "source_ips")?,
            not_source_ips: ranges(&m.not_source_ips, "not_source_ips")?,
            destination_ips: ranges(&m.destination_ips, "destination_ips")?,
            not_destination_ips: ranges(&m.not_destination_ips, "not_destination_ips")?,
            destination_ports: each(&m.destination_ports, "destination_ports", |p| port(*p, "value"))?,
            not_destination_ports: each(&m.not_destination_ports, "not_destination_ports", |p| {
                port(*p, "value")
            })?,
            http: None,
        })
    }

    pub(super) fn patterns(
        &mut self,
        list: &[wire::StringMatch],
        field: &str,
    ) -> Result<Box<[StringMatch]>, Fault> {
        each(list, field, |pattern| self.string_match(pattern))
    }

    pub(super) fn string_match(&mut self, pattern: &wire::StringMatch) -> Result<StringMatch, Fault> {
        use wire::string_match::MatchType;
        match &pattern.match_type {
            Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(self.text(text))),
            Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(self.text(text))),
            Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(self.text(text))),
            Some(MatchType::Presence(_)) => Ok(StringMatch::Presence),
            None => Err(Fault::new("match_type", Problem::Missing)),
        }
    }

    fn accounts(&mut self, list: &[wire::ServiceAccountMatch]) -> Box<[ServiceAccountMatch]> {
        list.iter()
            .map(|a| ServiceAccountMatch {
                namespace: self.text(&a.namespace),
                name: self.text(&a.service_account),
            })
            .collect()
    }
}

pub(super) fn scope(scope: i32) -> Result<Scope, Fault> {
    match wire::Scope::try_from(scope) {
        Ok(wire::Scope::Global) => Ok(Scope::Global),
        Ok(wire::Scope::Namespace) => Ok(Scope::Namespace),
        Ok(wire::Scope::WorkloadSelector) => Ok(Scope::WorkloadSelector),
        Err(_) => Err(Fault::new("scope", Problem::Enum(scope))),
    }
}

pub(super) fn ranges(list: &[wire::Address], field: &str) -> Result<Box<[IpMatch]>, Fault> {
    each(list, field, |a| range(&a.address, Some(a.length)).map(IpMatch))
}

impl wire::Authorization {
    /// The fields that are set and have no place in the model, by name.
    #[must_use]
    pub fn not_applied(&self) -> Vec<&'static str> {
        let mut matches = self.groups.iter().flat_map(|g| &g.rules).flat_map(|r| &r.matches);
        let fields = [
            ("extensions", !self.extensions.is_empty()),
            ("groups.rules.matches.extensions", matches.any(|m| !m.extensions.is_empty())),
        ];
        fields.into_iter().filter_map(|(name, set)| set.then_some(name)).collect()
    }
}
