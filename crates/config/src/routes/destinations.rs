//! The DestinationRules that there are, and which of them is for a service: one of the service's own namespace before
//! one of the root namespace, an exact host before the longest wildcard, the older before the younger.

use std::collections::{BTreeMap, BTreeSet};

use hashbrown::HashMap;
use model::http::ServiceTraffic;
use model::{ServiceKey, Str};

use super::DestinationRule;
use crate::resource::{Kind, ObjectKey};

/// The DestinationRules that there are.
#[derive(Debug, Default)]
pub struct DestinationRules {
    rules: HashMap<ObjectKey, DestinationRule>,
    /// By namespace, and by host: a name, or `.example.com` for all below. The first of a set is in force.
    hosts: HashMap<Str, BTreeMap<Str, BTreeSet<Age>>>,
}

/// Orders rules of one host: those with an age first, the oldest of them first.
type Age = (bool, Str, Str);

/// Which services a change of rules concerns.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Concerned {
    /// The rule's namespace: its services, or all if it is the root namespace.
    pub namespace: Str,
    /// The host name, or `.example.com` for all below.
    pub host: Str,
}

impl Concerned {
    /// Whether the service is one of them.
    #[must_use]
    pub fn has(&self, key: &ServiceKey, root: &str) -> bool {
        let host = if self.host.starts_with('.') {
            key.hostname.ends_with(&*self.host)
        } else {
            key.hostname == self.host
        };
        host && (key.namespace == self.namespace || *self.namespace == *root)
    }
}

impl DestinationRules {
    /// Sets a rule, or removes it. `domain` is the cluster's. Gives whom the old one and the new one concern.
    pub fn set(&mut self, key: &ObjectKey, rule: Option<DestinationRule>, domain: &str) -> Vec<Concerned> {
        let mut concerned = Vec::new();
        let new = rule.as_ref().map(|rule| (full_host(rule, key, domain), age(rule, key)));
        let old = self.rules.remove(key).map(|rule| (full_host(&rule, key, domain), age(&rule, key)));
        if let Some((host, age)) = old
            && let Some(hosts) = self.hosts.get_mut(&key.namespace)
        {
            if let Some(set) = hosts.get_mut(&host) {
                set.remove(&age);
                if set.is_empty() {
                    hosts.remove(&host);
                }
            }
            if hosts.is_empty() {
                self.hosts.remove(&key.namespace);
            }
            concerned.push(Concerned { namespace: key.namespace.clone(), host });
        }
        if let (Some(rule), Some((host, age))) = (rule, new) {
            let hosts = self.hosts.entry(key.namespace.clone()).or_default();
            hosts.entry(host.clone()).or_default().insert(age);
            self.rules.insert(key.clone(), rule);
            concerned.push(Concerned { namespace: key.namespace.clone(), host });
        }
        concerned
    }

    /// What is said of a service.
    #[must_use]
    pub fn traffic(&self, key: &ServiceKey, root: &str) -> Option<ServiceTraffic> {
        let rule = self.rule(&key.namespace, key).or_else(|| self.rule(root, key))?;
        Some(rule.traffic(key.clone()))
    }

    fn rule(&self, namespace: &str, key: &ServiceKey) -> Option<&DestinationRule> {
        let hosts = self.hosts.get(namespace)?;
        let below = key.hostname.match_indices('.').filter_map(|(at, _)| key.hostname.get(at..));
        std::iter::once(&*key.hostname).chain(below).find_map(|host| {
            let exported = |rule: &&DestinationRule| {
                let is_for = |list: &[Str]| *namespace == *key.namespace || list.contains(&key.namespace);
                rule.export_to.as_deref().is_none_or(is_for)
            };
            hosts.get(host)?.iter().find_map(|(.., name)| {
                let rule = ObjectKey {
                    kind: Kind::DestinationRule,
                    namespace: namespace.into(),
                    name: name.clone(),
                };
                self.rules.get(&rule).filter(exported)
            })
        })
    }
}

fn age(rule: &DestinationRule, key: &ObjectKey) -> Age {
    (rule.created.is_empty(), rule.created.clone(), key.name.clone())
}

/// A name without a dot is a Service of the rule's namespace.
fn full_host(rule: &DestinationRule, key: &ObjectKey, domain: &str) -> Str {
    match rule.host.strip_prefix('*') {
        Some(below) => below.into(),
        None if rule.host.contains('.') => rule.host.clone(),
        None => format!("{}.{}.svc.{domain}", rule.host, key.namespace).as_str().into(),
    }
}
