//! Which of the fields that not all of our proxies know an object needs, and which of them a proxy knows.
//!
//! A proxy skips a field that is younger than itself, and would enforce something else than what was meant. So each such
//! field has a name here from the version on that brings it; a proxy says the names that it knows ([`Features::text`]), and
//! is sent an object that needs another in the form for proxies that have no extensions, which is refused, brought into
//! older terms, or closed (see [`crate::Extensions::None`]).

use std::fmt;

use model::{Policy, Service, ServiceSource};

/// A set of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Features(u32);

const NAMES: [(Features, &str); 5] = [
    (Features::TRUST_DOMAINS, "trust-domains"),
    (Features::SERVICE_ACCOUNTS, "service-accounts"),
    (Features::DRY_RUN, "dry-run"),
    (Features::SESSION_AFFINITY, "session-affinity"),
    (Features::SERVICE_SOURCES, "service-sources"),
];

impl Features {
    /// None.
    pub const NONE: Self = Self(0);
    /// Matches of policies by trust domain.
    pub const TRUST_DOMAINS: Self = Self(1);
    /// Matches of policies by service account.
    pub const SERVICE_ACCOUNTS: Self = Self(1 << 1);
    /// Policies that are only tried.
    pub const DRY_RUN: Self = Self(1 << 2);
    /// Services whose clients keep their endpoint.
    pub const SESSION_AFFINITY: Self = Self(1 << 3);
    /// Services whose endpoints are not those of Kubernetes.
    pub const SERVICE_SOURCES: Self = Self(1 << 4);
    /// All that this version knows.
    pub const ALL: Self = Self((1 << NAMES.len()) - 1);

    /// What a policy needs.
    #[must_use]
    pub fn of_policy(policy: &Policy) -> Self {
        let clauses = policy.rules.iter().flat_map(|rule| &rule.clauses);
        let mut needed = if policy.dry_run { Self::DRY_RUN } else { Self::NONE };
        for m in clauses.flat_map(|clause| &clause.matches) {
            if !m.trust_domains.is_empty() || !m.not_trust_domains.is_empty() {
                needed = needed.and(Self::TRUST_DOMAINS);
            }
            if !m.service_accounts.is_empty() || !m.not_service_accounts.is_empty() {
                needed = needed.and(Self::SERVICE_ACCOUNTS);
            }
        }
        needed
    }

    /// What a service needs.
    #[must_use]
    pub fn of_service(service: &Service) -> Self {
        let affinity = if service.session_affinity.is_some() { Self::SESSION_AFFINITY } else { Self::NONE };
        match service.source {
            ServiceSource::Kubernetes => affinity,
            _ => affinity.and(Self::SERVICE_SOURCES),
        }
    }

    /// These and others.
    #[must_use]
    pub const fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// Those of these that `known` has not.
    #[must_use]
    pub const fn lacking(self, known: Self) -> Self {
        Self(self.0 & !known.0)
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Their names, separated by commas: what a proxy says of itself.
    #[must_use]
    pub fn text(self) -> String {
        let has = |(feature, _): &&(Self, &str)| feature.lacking(self).is_empty();
        NAMES.iter().filter(has).map(|(_, name)| *name).collect::<Vec<_>>().join(",")
    }

    /// Reads [`text`](Self::text). Names that are not known are of a newer proxy, and nothing here needs them.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let find =
            |name: &str| NAMES.iter().find(|(_, known)| *known == name.trim()).map(|(feature, _)| *feature);
        text.split(',').filter_map(find).fold(Self::NONE, Self::and)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        assert_eq!(Features::parse(&Features::ALL.text()), Features::ALL);
        assert_eq!(Features::parse(""), Features::NONE);
        let some = Features::parse("dry-run, of-tomorrow,trust-domains");
        assert_eq!(some, Features::DRY_RUN.and(Features::TRUST_DOMAINS));
        assert_eq!(Features::ALL.lacking(some).text(), "service-accounts,session-affinity,service-sources");
        assert!(some.lacking(Features::ALL).is_empty());
    }
}
