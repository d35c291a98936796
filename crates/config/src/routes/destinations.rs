//! The DestinationRules that there are, and which of them is for a service: one of the service's own namespace before
//! one of the root namespace, an exact host before the longest wildcard, the older before the younger. Those of one namespace that
//! name the same host are one rule (Istio): with the subsets of all, and the policy of the oldest that has one.

use hashbrown::HashMap;
use model::http::ServiceTraffic;
use model::{ServiceKey, Str};

use super::DestinationRule;
use super::destination_rule::PolicyDraft;
use super::hosts::{ByHost, Concerned, Named, full};
use crate::resource::{Kind, ObjectKey};

/// The DestinationRules that there are.
#[derive(Debug, Default)]
pub struct DestinationRules {
    /// Each with its host, as [`full`] gives it.
    rules: HashMap<ObjectKey, (Str, DestinationRule)>,
    hosts: ByHost,
}

impl DestinationRules {
    /// Sets a rule, or removes it. `domain` is the cluster's. Gives whom the old one and the new one concern.
    pub fn set(&mut self, key: &ObjectKey, rule: Option<DestinationRule>, domain: &str) -> Vec<Concerned> {
        let mut concerned = Vec::new();
        if let Some((host, old)) = self.rules.remove(key) {
            self.hosts.remove(&host, &Named::new(key, &old.created));
            concerned.push(Concerned(host));
        }
        if let Some(rule) = rule {
            let host = full(&rule.host, &key.namespace, domain);
            self.hosts.insert(host.clone(), Named::new(key, &rule.created));
            self.rules.insert(key.clone(), (host.clone(), rule));
            concerned.push(Concerned(host));
        }
        concerned
    }

    /// What is said of a service.
    #[must_use]
    pub fn traffic(&self, key: &ServiceKey, root: &str) -> Option<ServiceTraffic> {
        let first = self.in_force(key, root)?;
        let mut rules = self.alike(&first, key).map(|(_, rule)| rule);
        let first = rules.next()?;
        let Some(second) = rules.next() else { return Some(first.traffic(key.clone())) };
        let mut merged = first.clone();
        for other in std::iter::once(second).chain(rules) {
            if merged.policy == PolicyDraft::default() {
                merged.policy = other.policy.clone();
            }
            let more = other.subsets.iter().filter(|new| merged.subsets.iter().all(|s| s.name != new.name));
            merged.subsets = merged.subsets.iter().chain(more).cloned().collect();
        }
        Some(merged.traffic(key.clone()))
    }

    /// The rule that is in force for a service, before others for the same host.
    #[must_use]
    pub fn in_force(&self, key: &ServiceKey, root: &str) -> Option<ObjectKey> {
        self.rule(&key.namespace, key).or_else(|| self.rule(root, key))
    }

    /// What of a rule has no effect for a service, whose rules are those of its namespace, and the rule that says it instead. All
    /// of the rule is nothing in particular.
    #[must_use]
    pub fn without_effect(
        &self,
        key: &ObjectKey,
        service: &ServiceKey,
        root: &str,
    ) -> Vec<(String, ObjectKey)> {
        let first = self.in_force(service, root).filter(|first| first.namespace == key.namespace);
        let (Some(first), Some((_, own))) = (first, self.rules.get(key)) else { return Vec::new() };
        if self.alike(&first, service).all(|(other, _)| other != *key) {
            return vec![(String::new(), first)];
        }
        let mut found = Vec::new();
        let mut is_said = own.policy == PolicyDraft::default();
        for (other, rule) in self.alike(&first, service).take_while(|(other, _)| other != key) {
            if !is_said && rule.policy != PolicyDraft::default() {
                is_said = true;
                found.push(("its trafficPolicy ".to_owned(), other.clone()));
            }
            let same = own.subsets.iter().filter(|own| rule.subsets.iter().any(|s| s.name == own.name));
            found.extend(same.map(|own| (format!("its subset {} ", own.name), other.clone())));
        }
        found
    }

    /// A rule, and the host that it is for.
    #[must_use]
    pub fn get(&self, key: &ObjectKey) -> Option<(Concerned, &DestinationRule)> {
        let (host, rule) = self.rules.get(key)?;
        Some((Concerned(host.clone()), rule))
    }

    /// The rules of a rule's namespace, for a service, that name its host: in the order in which they count.
    fn alike<'a>(
        &'a self,
        first: &ObjectKey,
        service: &'a ServiceKey,
    ) -> impl Iterator<Item = (ObjectKey, &'a DestinationRule)> + use<'a> {
        let (host, namespace) = (self.rules.get(first).map(|(host, _)| host), first.namespace.clone());
        let named = host.into_iter().flat_map(move |host| self.hosts.naming(host));
        named.filter(move |named| named.namespace == namespace).filter_map(move |n| self.exported(n, service))
    }

    fn rule(&self, namespace: &str, key: &ServiceKey) -> Option<ObjectKey> {
        let mut named = self.hosts.of(&key.hostname).filter(|named| *named.namespace == *namespace);
        named.find_map(|named| self.exported(named, key)).map(|(by, _)| by)
    }

    /// A rule, if it is for services of the namespace of this one.
    fn exported(&self, named: &Named, service: &ServiceKey) -> Option<(ObjectKey, &DestinationRule)> {
        let (namespace, name) = (named.namespace.clone(), named.name.clone());
        let by = ObjectKey { kind: Kind::DestinationRule, namespace, name };
        let (_, rule) = self.rules.get(&by)?;
        let own = named.namespace == service.namespace;
        let exported = rule.export_to.as_deref().is_none_or(|list| own || list.contains(&service.namespace));
        exported.then_some((by, rule))
    }
}
