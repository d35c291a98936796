//! Reading policies over requests.

use model::http::{Attribute, AttributeMatch, HttpMatch, PathPattern, Template};
use model::{Action, Clause, Match, Policy, PolicyKey, Rule};

use super::policy::{ranges, scope};
use super::strict::{needed, strict};
use super::{DecodeError, Decoder, Fault, Problem, cut, each};
use crate::wire::{security, waypoint as wire};

impl Decoder {
    /// Reads what waypoints enforce of a policy.
    ///
    /// # Errors
    /// These are no bytes of such a message, a field has no meaning in the model, or there is one that this version does
    /// not know. What was in force of it must then stay; where there was nothing, whoever lists it refuses.
    pub fn http_policy(&mut self, bytes: &[u8]) -> Result<Policy, DecodeError> {
        let message: wire::HttpPolicy =
            strict(bytes).map_err(|problem| Fault::new("message", problem).of("http policy", ""))?;
        self.read_http_policy(&message).map_err(|fault| {
            let name = message.name.unwrap_or_default();
            fault.of("http policy", format_args!("{}/{}", cut(&name.namespace), name.name))
        })
    }

    fn read_http_policy(&mut self, p: &wire::HttpPolicy) -> Result<Policy, Fault> {
        use wire::http_policy::Action as Wire;
        let (namespace, name) = self.name(p.name.as_ref(), "name")?;
        Ok(Policy {
            key: PolicyKey { namespace, name },
            scope: scope(p.scope)?,
            action: match needed(p.action.as_ref(), "action")? {
                Wire::Allow(()) => Action::Allow,
                Wire::Deny(()) => Action::Deny,
                Wire::Custom(provider) => Action::Custom(self.text(provider)),
            },
            rules: each(&p.rules, "rules", |rule| {
                let clauses = each(&rule.clauses, "clauses", |clause| {
                    Ok(Clause { matches: each(&clause.matches, "matches", |m| self.request_match(m))? })
                })?;
                Ok(Rule { clauses })
            })?,
            dry_run: p.dry_run,
        })
    }

    fn request_match(&mut self, m: &wire::Match) -> Result<Match, Fault> {
        let connection = needed(m.connection.as_ref(), "connection")?;
        if !connection.extensions.is_empty() {
            return Err(Fault::new("connection.extensions", Problem::Newer));
        }
        let read = self.policy_match(connection).map_err(|f| f.within("connection"))?;
        let http = m.http.as_ref().map(|http| self.http_match(http).map(Box::new));
        Ok(Match { http: http.transpose().map_err(|f| f.within("http"))?, ..read })
    }

    fn http_match(&mut self, m: &wire::HttpMatch) -> Result<HttpMatch, Fault> {
        Ok(HttpMatch {
            hosts: self.patterns(&m.hosts, "hosts")?,
            not_hosts: self.patterns(&m.not_hosts, "not_hosts")?,
            methods: self.patterns(&m.methods, "methods")?,
            not_methods: self.patterns(&m.not_methods, "not_methods")?,
            paths: each(&m.paths, "paths", |p| self.path_pattern(p))?,
            not_paths: each(&m.not_paths, "not_paths", |p| self.path_pattern(p))?,
            remote_ips: ranges(&m.remote_ips, "remote_ips")?,
            not_remote_ips: ranges(&m.not_remote_ips, "not_remote_ips")?,
            request_principals: self.patterns(&m.request_principals, "request_principals")?,
            not_request_principals: self.patterns(&m.not_request_principals, "not_request_principals")?,
            attribute: m
                .attribute
                .as_ref()
                .map(|a| self.attribute(a))
                .transpose()
                .map_err(|f| f.within("attribute"))?,
        })
    }

    pub(super) fn path_pattern(&mut self, pattern: &wire::PathPattern) -> Result<PathPattern, Fault> {
        use wire::path_pattern::Kind;
        match needed(pattern.kind.as_ref(), "kind")? {
            Kind::Text(text) => Ok(PathPattern::Text(self.one_pattern(text)?)),
            Kind::Template(text) => match Template::parse(text) {
                Ok(Some(template)) => Ok(PathPattern::Template(template)),
                Ok(None) => Err(Fault::new("template", Problem::NoTemplate(cut(text)))),
                Err(invalid) => Err(Fault::new("template", invalid)),
            },
        }
    }

    fn attribute(&mut self, m: &wire::AttributeMatch) -> Result<AttributeMatch, Fault> {
        use wire::attribute_match::Attribute as Wire;
        Ok(AttributeMatch {
            attribute: match needed(m.attribute.as_ref(), "attribute")? {
                Wire::Header(name) => Attribute::Header(self.header_key(name)?),
                Wire::Claim(claim) => Attribute::Claim(self.texts(&claim.path)),
                Wire::Sni(()) => Attribute::Sni,
            },
            values: self.patterns(&m.values, "values")?,
            not_values: self.patterns(&m.not_values, "not_values")?,
        })
    }

    fn one_pattern(&mut self, pattern: &security::StringMatch) -> Result<model::StringMatch, Fault> {
        self.string_match(pattern).map_err(|f| f.within("text"))
    }
}
