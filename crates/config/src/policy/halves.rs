//! Policies for workloads that a waypoint stands before. What such a policy asks of requests only the waypoint can tell;
//! so there it is enforced whole, for the client, and at the node as before for everybody but the waypoint, which is let
//! off on the ports that it stands before.
//!
//! | policy for the workload | at its waypoint | at the node |
//! |---|---|---|
//! | DENY that asks nothing of requests | as it is, for the client | as it is, for the peer, which is the waypoint |
//! | ALLOW that asks nothing of requests | where a policy beside it does: one of them has to let the client in | as it is |
//! | any that asks something of requests, and CUSTOM | as it is | as where there is no waypoint, but not for the waypoint |

use std::collections::BTreeSet;

use model::{Action, Clause, Match, Policy, PolicyKey, Rule, ServiceAccountMatch, Str};

use super::authorization::{PolicyScope, RequestedAction};
use super::l4;
use super::state::{Entry, Policies};
use super::waypoint::Waypoint;
use crate::labels::Labels;

/// A waypoint that stands before ports of a workload.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Covered {
    /// The waypoint.
    pub waypoint: Waypoint,
    /// The workload's ports.
    pub ports: BTreeSet<u16>,
}

impl Entry {
    /// Whether it is for workloads, and asks what only requests show.
    pub(super) fn is_halved(&self) -> bool {
        self.compiled.is_some()
            && !matches!(self.source.scope, PolicyScope::Targets(_))
            && self.source.needs_requests()
    }

    /// Whether there may be halves of it: also of what is for services, where a waypoint stands before their workloads.
    pub(super) fn has_halves(&self) -> bool {
        self.is_halved() || (self.compiled.is_some() && matches!(self.source.scope, PolicyScope::Targets(_)))
    }
}

impl Policies {
    /// Whether a policy is for workloads, and asks what only requests show.
    #[must_use]
    pub fn is_halved(&self, key: &PolicyKey) -> bool {
        self.authorization.get(key).is_some_and(Entry::is_halved)
    }

    /// The AuthorizationPolicies that select a workload by its labels, sorted.
    #[must_use]
    pub fn selecting(&self, namespace: &Str, labels: &Labels) -> Box<[PolicyKey]> {
        let own = self.by_selector.attached(Some(namespace), labels);
        let mut keys: Vec<PolicyKey> = own.chain(self.by_selector.attached(None, labels)).cloned().collect();
        keys.sort_unstable();
        keys.into()
    }

    /// What a waypoint enforces for workloads of a namespace that these policies select.
    #[must_use]
    pub fn through_workloads(&self, namespace: &Str, selecting: &[PolicyKey]) -> Box<[PolicyKey]> {
        let wide = [Some(namespace.clone()), None];
        let wide = wide.iter().filter_map(|namespace| self.wide.get(namespace)).flatten();
        let all = selecting.iter().chain(wide).filter_map(|key| Some((key, self.authorization.get(key)?)));
        let all: Vec<(&PolicyKey, &Entry)> = all.filter(|(_, entry)| entry.http.is_some()).collect();
        let allows = |entry: &Entry| entry.source.action == RequestedAction::Allow;
        let by_requests =
            all.iter().any(|(_, entry)| allows(entry) && entry.is_halved() && !entry.source.dry_run);
        let here = |entry: &Entry| !allows(entry) || by_requests || entry.is_halved();
        let keys: BTreeSet<&PolicyKey> =
            all.iter().filter(|(_, entry)| here(entry)).map(|(key, _)| *key).collect();
        keys.into_iter().cloned().collect()
    }

    /// What the node enforces of a policy for a workload that waypoints stand before, under the name `name`.
    #[must_use]
    pub fn half(&self, key: &PolicyKey, name: PolicyKey, covered: &[Covered]) -> Option<Policy> {
        let entry = self.authorization.get(key).filter(|entry| entry.has_halves())?;
        let whole = entry.compiled.as_deref()?;
        let rules = match whole.action {
            Action::Allow => whole.rules.iter().cloned().chain(covered.iter().map(letting_in)).collect(),
            Action::Deny | Action::Custom(_) => {
                whole.rules.iter().map(|rule| letting_off(rule, covered)).collect()
            }
        };
        Some(Policy { key: name, scope: l4::LISTED, rules, ..whole.clone() })
    }
}

fn account(waypoint: &Waypoint) -> ServiceAccountMatch {
    // The service account that a Gateway's pods run under has its name.
    ServiceAccountMatch { namespace: waypoint.namespace.clone(), name: waypoint.name.clone() }
}

/// The rule that lets in the waypoint.
fn letting_in(covered: &Covered) -> Rule {
    let waypoint = Match {
        service_accounts: [account(&covered.waypoint)].into(),
        destination_ports: covered.ports.iter().copied().collect(),
        ..Match::default()
    };
    Rule { clauses: [Clause { matches: [waypoint].into() }].into() }
}

/// The rule, for all but the waypoints.
fn letting_off(rule: &Rule, covered: &[Covered]) -> Rule {
    let others = covered.iter().map(|covered| {
        let peer = Match { not_service_accounts: [account(&covered.waypoint)].into(), ..Match::default() };
        let ports = covered.ports.iter().copied().collect();
        let port = Match { not_destination_ports: ports, ..Match::default() };
        Clause { matches: [peer, port].into() }
    });
    Rule { clauses: rule.clauses.iter().cloned().chain(others).collect() }
}
