//! Resources by the hosts that they name: exact ones, and `*.` for all below.

use std::collections::BTreeSet;

use hashbrown::HashMap;
use model::Str;

use crate::resource::ObjectKey;

/// Resources of one kind by their hosts.
#[derive(Debug, Default)]
pub(super) struct ByHost(HashMap<Str, BTreeSet<Named>>);

/// A resource in the order of age: those that have one first, the oldest of them first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Named {
    without_age: bool,
    created: Str,
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
}

impl Named {
    pub(super) fn new(key: &ObjectKey, created: &Str) -> Self {
        let (namespace, name) = (key.namespace.clone(), key.name.clone());
        Self { without_age: created.is_empty(), created: created.clone(), namespace, name }
    }
}

impl ByHost {
    pub(super) fn insert(&mut self, host: Str, named: Named) {
        self.0.entry(host).or_default().insert(named);
    }

    pub(super) fn remove(&mut self, host: &Str, named: &Named) {
        if let Some(set) = self.0.get_mut(host) {
            set.remove(named);
            if set.is_empty() {
                self.0.remove(host);
            }
        }
    }

    /// The resources that name just this host, as [`full`] gives it.
    pub(super) fn naming(&self, host: &str) -> impl Iterator<Item = &Named> {
        self.0.get(host).into_iter().flatten()
    }

    /// The resources for a host: those that name it, then those of the longest wildcard, and so on.
    pub(super) fn of<'a>(&'a self, hostname: &'a str) -> impl Iterator<Item = &'a Named> {
        let below = hostname.match_indices('.').filter_map(|(at, _)| hostname.get(at..));
        let all = std::iter::once(hostname).chain(below).chain([""]);
        all.filter_map(|host| self.0.get(host)).flatten()
    }
}

/// The host that a resource of `namespace` means, as [`ByHost`] has it: a name without a dot is a Service of the
/// namespace, `*.example.com` is `.example.com`, and `*` is everything.
pub(super) fn full(host: &str, namespace: &str, domain: &str) -> Str {
    match host.strip_prefix('*') {
        Some(below) => below.into(),
        None if host.contains('.') => host.into(),
        None => format!("{host}.{namespace}.svc.{domain}").as_str().into(),
    }
}

/// A host that a change concerns, as [`full`] gives it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Concerned(pub Str);
