//! The VirtualServices that there are, and the tables that they make: of those for a host the one of the service's own
//! namespace, or else the oldest that is exported to it. Its entries are tried in order.

use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use model::http::{PathMatch, Pattern, Route, RouteMatch, RouteTable, SourceMatch};
use model::{ServiceKey, ServicePort, Str};

use super::hosts::{ByHost, Concerned, Named, full};
use super::state::{Resolve, made};
use super::virtual_service::{HttpEntry, VirtualService};
use super::{BackendDraft, Reference};
use crate::resource::{Kind, ObjectKey};

/// The VirtualServices that there are.
#[derive(Debug, Default)]
pub struct VirtualServices {
    services: HashMap<ObjectKey, Arc<VirtualService>>,
    hosts: ByHost,
    by_target: HashMap<Reference, HashSet<ObjectKey>>,
    /// Who delegates to which, by namespace and name.
    delegating: HashMap<(Str, Str), HashSet<ObjectKey>>,
}

impl VirtualServices {
    /// Sets a resource, or removes it. `domain` is the cluster's. Gives whom the old one and the new one concern.
    pub fn set(&mut self, key: &ObjectKey, service: Option<VirtualService>, domain: &str) -> Vec<Concerned> {
        let mut concerned = Vec::new();
        let old = self.services.remove(key);
        for (service, is_new) in
            old.as_deref().map(|s| (s, false)).into_iter().chain(service.as_ref().map(|s| (s, true)))
        {
            for host in service.hosts.iter().map(|host| full(host, &key.namespace, domain)) {
                let named = Named::new(key, &service.created);
                if is_new {
                    self.hosts.insert(host.clone(), named);
                } else {
                    self.hosts.remove(&host, &named);
                }
                concerned.push(Concerned(host));
            }
            for target in targets(service) {
                list(&mut self.by_target, target, key, is_new);
            }
            for target in service.http.iter().filter_map(|entry| entry.delegate.as_ref()) {
                list(&mut self.delegating, target, key, is_new);
            }
        }
        if let Some(service) = service {
            self.services.insert(key.clone(), Arc::new(service));
        }
        // Who delegates to it has changed with it.
        concerned.extend(self.delegating_to(key, domain));
        concerned
    }

    fn delegating_to(&self, key: &ObjectKey, domain: &str) -> Vec<Concerned> {
        let target = (key.namespace.clone(), key.name.clone());
        let roots = self.delegating.get(&target).into_iter().flatten();
        let roots = roots.filter_map(|by| self.services.get_key_value(by));
        roots.flat_map(|(by, service)| hosts_of(by, service, domain)).collect()
    }

    /// The hosts of which routes lead to `target`.
    #[must_use]
    pub fn leading_to(&self, target: &Reference, domain: &str) -> Vec<Concerned> {
        let mut concerned = Vec::new();
        for key in self.by_target.get(target).into_iter().flatten() {
            concerned.extend(self.services.get(key).into_iter().flat_map(|s| hosts_of(key, s, domain)));
            concerned.extend(self.delegating_to(key, domain));
        }
        concerned
    }

    /// The hosts of a resource.
    #[must_use]
    pub fn hosts(&self, key: &ObjectKey, domain: &str) -> Vec<Concerned> {
        self.services.get(key).map(|service| hosts_of(key, service, domain)).unwrap_or_default()
    }

    /// Whether a resource says anything of requests, and of connections.
    #[must_use]
    pub fn entries(&self, key: &ObjectKey) -> (bool, bool) {
        self.services.get(key).map_or((false, false), |s| (!s.http.is_empty(), !s.streams.is_empty()))
    }

    /// What is wrong with what a resource delegates to.
    #[must_use]
    pub fn broken_delegates(&self, key: &ObjectKey) -> Vec<String> {
        let service = self.services.get(key);
        let delegates = service.into_iter().flat_map(|s| s.http.iter().filter_map(|e| e.delegate.as_ref()));
        let wrong = delegates.filter_map(|(namespace, name)| {
            let target =
                ObjectKey { kind: Kind::VirtualService, namespace: namespace.clone(), name: name.clone() };
            let why = match self.services.get(&target) {
                None => "is not there",
                Some(service) if !service.hosts.is_empty() => "has hosts, and takes what is for these alone",
                Some(service) if service.http.iter().any(|e| e.delegate.is_some()) => {
                    "delegates on, and what does takes nothing"
                }
                Some(_) => return None,
            };
            Some(format!("it delegates to VirtualService {namespace}/{name}, which {why}"))
        });
        wrong.collect()
    }

    /// All that a resource leads to.
    pub fn backends(&self, key: &ObjectKey) -> impl Iterator<Item = &BackendDraft> {
        self.services.get(key).into_iter().flat_map(|service| backends(service))
    }

    /// Whether a resource is exported to the namespace of a service.
    #[must_use]
    pub fn is_visible(&self, key: &ObjectKey, to: &ServiceKey) -> bool {
        let own = key.namespace == to.namespace;
        let list = self.services.get(key).and_then(|service| service.export_to.as_deref());
        list.is_none_or(|list| own || list.contains(&to.namespace))
    }

    /// The resources that name the host of a service, exported to it or not.
    pub fn naming<'a>(&'a self, key: &'a ServiceKey) -> impl Iterator<Item = ObjectKey> + 'a {
        self.hosts.of(&key.hostname).map(|named| ObjectKey {
            kind: Kind::VirtualService,
            namespace: named.namespace.clone(),
            name: named.name.clone(),
        })
    }

    /// The resource that is in force for a service.
    #[must_use]
    pub fn of(&self, key: &ServiceKey) -> Option<(ObjectKey, &Arc<VirtualService>)> {
        let all = || {
            self.naming(key).filter_map(|by| {
                let service = self.services.get(&by)?;
                let own = by.namespace == key.namespace;
                let list = service.export_to.as_deref();
                list.is_none_or(|list| own || list.contains(&key.namespace)).then_some((by, service))
            })
        };
        all().find(|(by, _)| by.namespace == key.namespace).or_else(|| all().next())
    }

    /// The table of a service's port; `None` when nothing is said of its requests.
    #[must_use]
    pub fn table(&self, key: &ServiceKey, port: &ServicePort, resolve: Resolve<'_>) -> Option<RouteTable> {
        let (by, service) = self.of(key)?;
        let mut entries: Vec<(RouteMatch, Arc<Route>)> = Vec::new();
        for entry in &service.http {
            match &entry.delegate {
                None => entries.extend(rows(entry, &by, port, resolve)),
                Some(target) => entries.extend(self.delegated(entry, target, &by, port, resolve)),
            }
        }
        (!service.http.is_empty()).then(|| RouteTable::new(entries))
    }

    /// The rows of the one that is delegated to, each narrowed by who delegates.
    fn delegated(
        &self,
        root: &HttpEntry,
        (namespace, name): &(Str, Str),
        by: &ObjectKey,
        port: &ServicePort,
        resolve: Resolve<'_>,
    ) -> Vec<(RouteMatch, Arc<Route>)> {
        let (namespace, name) = (namespace.clone(), name.clone());
        let target = ObjectKey { kind: Kind::VirtualService, namespace, name };
        let Some(service) = self.services.get(&target).filter(|s| s.hosts.is_empty()) else {
            return Vec::new();
        };
        let visible = service.export_to.as_deref();
        if !visible.is_none_or(|list| by.namespace == target.namespace || list.contains(&by.namespace)) {
            return Vec::new();
        }
        let mut merged = Vec::new();
        // One that delegates on would go round in circles, or on without end: it takes nothing.
        for entry in service.http.iter().filter(|entry| entry.delegate.is_none()) {
            let inherited = HttpEntry { rule: inherit(root, entry), ..entry.clone() };
            for (when, route) in rows(&inherited, &target, port, resolve) {
                let outer = root.rule.matches.iter().zip(&root.ports).filter(|(_, p)| at(**p, port));
                merged.extend(outer.filter_map(|(outer, _)| Some((both(outer, &when)?, route.clone()))));
            }
        }
        merged
    }
}

/// Lists `key` under `slot`, or no more.
fn list<K: std::hash::Hash + Eq + Clone>(
    index: &mut HashMap<K, HashSet<ObjectKey>>,
    slot: &K,
    key: &ObjectKey,
    is_new: bool,
) {
    if is_new {
        index.entry(slot.clone()).or_default().insert(key.clone());
    } else if let Some(set) = index.get_mut(slot) {
        set.remove(key);
        if set.is_empty() {
            index.remove(slot);
        }
    }
}

fn hosts_of(key: &ObjectKey, service: &VirtualService, domain: &str) -> Vec<Concerned> {
    service.hosts.iter().map(|host| Concerned(full(host, &key.namespace, domain))).collect()
}

fn backends(service: &VirtualService) -> impl Iterator<Item = &BackendDraft> {
    let http = service.http.iter().flat_map(|entry| {
        let mirrors = entry.rule.mirrors.iter().map(|(mirror, _)| mirror);
        entry.rule.backends.iter().chain(mirrors)
    });
    http.chain(service.streams.iter().flat_map(|entry| &entry.backends))
}

fn targets(service: &VirtualService) -> impl Iterator<Item = &Reference> {
    backends(service).map(|backend| &backend.to)
}

/// An entry's matches for a port, each with its route.
fn rows(
    entry: &HttpEntry,
    by: &ObjectKey,
    port: &ServicePort,
    resolve: Resolve<'_>,
) -> Vec<(RouteMatch, Arc<Route>)> {
    let mut matches = entry.rule.matches.iter().zip(&entry.ports).filter(|(_, p)| at(**p, port)).peekable();
    if matches.peek().is_none() {
        return Vec::new();
    }
    let route = Arc::new(made(&entry.rule, by, port.port, resolve));
    matches.map(|(when, _)| (when.clone(), route.clone())).collect()
}

fn at(wanted: Option<u16>, port: &ServicePort) -> bool {
    wanted.is_none_or(|number| number == port.port)
}

/// What a delegate's entry does: each setting that is not written there is as the one that delegates has it, whole (Istio).
fn inherit(root: &HttpEntry, entry: &HttpEntry) -> super::http_route::RuleDraft {
    let mut rule = entry.rule.clone();
    let (own, outer) = (&mut rule.route, &root.rule.route);
    let is_written = |name: &str| entry.written.contains(&name);
    let mut hosts = entry.hosts.clone();
    if !is_written("rewrite") {
        own.path.clone_from(&outer.path);
        hosts.rewrite.clone_from(&root.hosts.rewrite);
    }
    if !is_written("timeout") {
        own.timeouts.request = outer.timeouts.request;
    }
    if !is_written("retries") {
        own.retry.clone_from(&outer.retry);
        own.timeouts.per_try = outer.timeouts.per_try;
    }
    if !is_written("fault") {
        own.fault.clone_from(&outer.fault);
    }
    if !is_written("headers") {
        own.request_headers.clone_from(&outer.request_headers);
        own.response_headers.clone_from(&outer.response_headers);
        hosts.headers.clone_from(&root.hosts.headers);
    }
    own.host = hosts.in_force();
    own.cors = own.cors.take().or_else(|| outer.cors.clone());
    if rule.mirrors.is_empty() {
        rule.mirrors.clone_from(&root.rule.mirrors);
    }
    rule
}

/// A match that holds where both do; `None` where they can't both be told to hold by one.
fn both(outer: &RouteMatch, inner: &RouteMatch) -> Option<RouteMatch> {
    Some(RouteMatch {
        path: one(outer.path.as_ref(), inner.path.as_ref(), narrower)?,
        method: one(outer.method.as_ref(), inner.method.as_ref(), narrower_text)?,
        scheme: one(outer.scheme.as_ref(), inner.scheme.as_ref(), narrower_text)?,
        authority: one(outer.authority.as_ref(), inner.authority.as_ref(), narrower_text)?,
        headers: outer.headers.iter().chain(&inner.headers).cloned().collect(),
        query: outer.query.iter().chain(&inner.query).cloned().collect(),
        source: one(outer.source.as_deref(), inner.source.as_deref(), same_client)?.map(Box::new),
    })
}

/// The one that holds where `a` and `b` do, as far as they are there; `None` where there is none, by `narrower`.
fn one<T: Clone>(a: Option<&T>, b: Option<&T>, narrower: impl Fn(&T, &T) -> Option<T>) -> Option<Option<T>> {
    match (a, b) {
        (Some(a), Some(b)) => narrower(a, b).map(Some),
        (a, b) => Some(a.or(b).cloned()),
    }
}

/// The one of two path matches that the other holds for wherever it holds.
fn narrower(a: &PathMatch, b: &PathMatch) -> Option<PathMatch> {
    use PathMatch::{Exact, ExactIgnoringCase, Prefix, PrefixIgnoringCase};
    let within = |inner: &PathMatch, outer: &PathMatch| match (outer, inner) {
        (Prefix(prefix), Exact(path) | Prefix(path))
        | (PrefixIgnoringCase(prefix), ExactIgnoringCase(path) | PrefixIgnoringCase(path)) => {
            path.starts_with(&**prefix)
        }
        (outer, inner) => outer == inner,
    };
    if within(b, a) { Some(b.clone()) } else { within(a, b).then(|| a.clone()) }
}

/// The same of texts.
fn narrower_text(a: &Pattern, b: &Pattern) -> Option<Pattern> {
    let within = |inner: &Pattern, outer: &Pattern| match (outer, inner) {
        (Pattern::Prefix(prefix), Pattern::Exact(text) | Pattern::Prefix(text)) => {
            text.starts_with(&**prefix)
        }
        (outer, inner) => outer == inner,
    };
    if within(b, a) { Some(b.clone()) } else { within(a, b).then(|| a.clone()) }
}

/// A client that is of both.
fn same_client(a: &SourceMatch, b: &SourceMatch) -> Option<SourceMatch> {
    let namespace = one(a.namespace.as_ref(), b.namespace.as_ref(), |a, b| (a == b).then(|| a.clone()))?;
    let more = b.labels.iter().filter(|label| !a.labels.contains(label));
    let labels: Vec<(Str, Str)> = a.labels.iter().chain(more).cloned().collect();
    let is_one = |(at, (key, _)): (usize, &(Str, Str))| labels.iter().skip(at + 1).all(|(k, _)| k != key);
    labels.iter().enumerate().all(is_one).then(|| SourceMatch { namespace, labels: labels.clone().into() })
}
