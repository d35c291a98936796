//! The DestinationRules that there are, and which of them is for a service: one of the service's own namespace before
//! one of the root namespace, an exact host before the longest wildcard, the older before the younger.

use hashbrown::HashMap;
use model::ServiceKey;
use model::http::ServiceTraffic;

use super::DestinationRule;
use super::hosts::{ByHost, Concerned, Named, full};
use crate::resource::{Kind, ObjectKey};

/// The DestinationRules that there are.
#[derive(Debug, Default)]
pub struct DestinationRules {
    rules: HashMap<ObjectKey, DestinationRule>,
    hosts: ByHost,
}

impl DestinationRules {
    /// Sets a rule, or removes it. `domain` is the cluster's. Gives whom the old one and the new one concern.
    pub fn set(&mut self, key: &ObjectKey, rule: Option<DestinationRule>, domain: &str) -> Vec<Concerned> {
        let mut concerned = Vec::new();
        if let Some(old) = self.rules.remove(key) {
            let host = full(&old.host, &key.namespace, domain);
            self.hosts.remove(&host, &Named::new(key, &old.created));
            concerned.push(Concerned(host));
        }
        if let Some(rule) = rule {
            let host = full(&rule.host, &key.namespace, domain);
            self.hosts.insert(host.clone(), Named::new(key, &rule.created));
            self.rules.insert(key.clone(), rule);
            concerned.push(Concerned(host));
        }
        concerned
    }

    /// What is said of a service.
    #[must_use]
    pub fn traffic(&self, key: &ServiceKey, root: &str) -> Option<ServiceTraffic> {
        let rule = self.rules.get(&self.in_force(key, root)?)?;
        Some(rule.traffic(key.clone()))
    }

    /// The rule that is in force for a service.
    #[must_use]
    pub fn in_force(&self, key: &ServiceKey, root: &str) -> Option<ObjectKey> {
        self.rule(&key.namespace, key).or_else(|| self.rule(root, key))
    }

    /// A rule, and the host that it is for.
    #[must_use]
    pub fn get(&self, key: &ObjectKey, domain: &str) -> Option<(Concerned, &DestinationRule)> {
        let rule = self.rules.get(key)?;
        Some((Concerned(full(&rule.host, &key.namespace, domain)), rule))
    }

    fn rule(&self, namespace: &str, key: &ServiceKey) -> Option<ObjectKey> {
        self.hosts.of(&key.hostname).filter(|named| *named.namespace == *namespace).find_map(|named| {
            let (namespace, name) = (named.namespace.clone(), named.name.clone());
            let by = ObjectKey { kind: Kind::DestinationRule, namespace, name };
            let rule = self.rules.get(&by)?;
            let own = named.namespace == key.namespace;
            let exported = rule.export_to.as_deref().is_none_or(|list| own || list.contains(&key.namespace));
            exported.then_some(by)
        })
    }
}
