//! The routes that there are, by what they hang on and where they lead, and the tables that they make.

use std::collections::BTreeSet;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use model::http::{
    Backend, BackendRef, Forward, Mirror, Respond, Route, RouteAction, RouteMatch, RouteTable, SourceMatch,
};
use model::{ServicePort, Str};

use super::precedence::Precedence;
use super::reference::{BackendDraft, ParentKind, ParentRef, Reference};
use super::{HttpRoute, http_route::RuleDraft};
use crate::resource::{Kind, ObjectKey};

/// The object that a route hangs on.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Parent {
    /// Its kind.
    pub kind: ParentKind,
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
}

impl Parent {
    fn of(parent: &ParentRef) -> Self {
        Self { kind: parent.kind, namespace: parent.namespace.clone(), name: parent.name.clone() }
    }

    /// The parent that defines a service, if routes can hang on it.
    #[must_use]
    pub fn owner(owner: &ObjectKey) -> Option<Self> {
        let kind = match owner.kind {
            Kind::Service => ParentKind::Service,
            Kind::ServiceEntry => ParentKind::ServiceEntry,
            _ => return None,
        };
        Some(Self { kind, namespace: owner.namespace.clone(), name: owner.name.clone() })
    }
}

/// What a back end's reference comes to in the light of what there is; `Err` says what is wrong with it.
/// The port is the one that the request came to.
pub type Resolve<'r> = &'r dyn Fn(&BackendDraft, &ObjectKey, u16) -> Result<BackendRef, Str>;

/// The routes that there are.
#[derive(Debug, Default)]
pub struct Routes {
    http: HashMap<ObjectKey, Arc<HttpRoute>>,
    by_parent: HashMap<Parent, BTreeSet<ObjectKey>>,
    by_target: HashMap<Reference, HashSet<ObjectKey>>,
}

impl Routes {
    /// Sets a route, or removes it. Gives what it hung on and hangs on now.
    pub fn set(&mut self, key: &ObjectKey, route: Option<HttpRoute>) -> HashSet<Parent> {
        let mut touched = HashSet::new();
        if let Some(old) = self.http.remove(key) {
            for parent in old.parents.iter().map(Parent::of) {
                remove_from(&mut self.by_parent, &parent, |set| set.remove(key), BTreeSet::is_empty);
                touched.insert(parent);
            }
            for target in targets(&old) {
                remove_from(&mut self.by_target, target, |set| set.remove(key), HashSet::is_empty);
            }
        }
        if let Some(route) = route {
            for parent in route.parents.iter().map(Parent::of) {
                self.by_parent.entry(parent.clone()).or_default().insert(key.clone());
                touched.insert(parent);
            }
            for target in targets(&route) {
                self.by_target.entry(target.clone()).or_default().insert(key.clone());
            }
            self.http.insert(key.clone(), Arc::new(route));
        }
        touched
    }

    /// What routes hang on that lead to `target`.
    pub fn leading_to(&self, target: &Reference) -> HashSet<Parent> {
        let routes = self.by_target.get(target).into_iter().flatten().filter_map(|key| self.http.get(key));
        routes.flat_map(|route| route.parents.iter().map(Parent::of)).collect()
    }

    /// What routes hang on that lead to Services of `namespace`.
    pub fn leading_into(&self, namespace: &str) -> HashSet<Parent> {
        let into = self.by_target.iter().filter(
            |(target, _)| matches!(target, Reference::Service { namespace: n, .. } if **n == *namespace),
        );
        let routes = into.flat_map(|(_, keys)| keys).filter_map(|key| self.http.get(key));
        routes.flat_map(|route| route.parents.iter().map(Parent::of)).collect()
    }

    /// The table of `parent`'s `port`: `None` when no route hangs on it, so that requests go to the service itself.
    ///
    /// A route in the service's namespace is its owner's, and for all clients; one in another namespace is for the
    /// clients of that namespace, and what it leaves over is not its owner's to answer (Gateway API, "consumer
    /// routes").
    #[must_use]
    pub fn table(&self, parent: &Parent, port: &ServicePort, resolve: Resolve<'_>) -> Option<RouteTable> {
        let keys = self.by_parent.get(parent)?;
        let mut entries = Vec::new();
        let mut consumers = BTreeSet::new();
        for key in keys {
            let Some(route) = self.http.get(key) else { continue };
            let hangs = |p: &&ParentRef| {
                Parent::of(p) == *parent
                    && p.port.is_none_or(|number| number == port.port)
                    && p.section.as_ref().is_none_or(|name| *name == port.name)
            };
            if !route.parents.iter().any(|p| hangs(&p)) {
                continue;
            }
            let consumer = (key.namespace != parent.namespace).then(|| key.namespace.clone());
            consumers.extend(consumer.clone());
            for (place, rule) in route.rules.iter().enumerate() {
                let made = Arc::new(made(rule, key, port.port, resolve));
                for (entry, when) in rule.matches.iter().enumerate() {
                    let place =
                        Precedence::of(when, &route.created, &key.namespace, &key.name, (place, entry));
                    entries.push((
                        (consumer.is_none(), place),
                        narrowed(when, consumer.as_ref()),
                        made.clone(),
                    ));
                }
            }
        }
        if entries.is_empty() && consumers.is_empty() {
            return None;
        }
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        let first_of_owner = entries.partition_point(|((owners, _), ..)| !owners);
        let mut table: Vec<(RouteMatch, Arc<Route>)> =
            entries.into_iter().map(|(_, when, route)| (when, route)).collect();
        let owners = table.split_off(first_of_owner);
        let not_found = Arc::new(Route::new(RouteAction::Respond(Box::new(Respond {
            status: 404,
            body: Box::default(),
            content_type: None,
        }))));
        for namespace in consumers {
            table.push((narrowed(&RouteMatch::default(), Some(&namespace)), not_found.clone()));
        }
        let without_owners = owners.is_empty();
        table.extend(owners);
        if without_owners {
            // Clients of other namespaces find the service as it is.
            let itself = BackendDraft::itself(parent, port.port);
            let owner = ObjectKey {
                kind: Kind::HttpRoute,
                namespace: parent.namespace.clone(),
                name: parent.name.clone(),
            };
            let route = Route::new(RouteAction::Forward(forward(&[itself], &owner, port.port, resolve)));
            table.push((RouteMatch::default(), Arc::new(route)));
        }
        Some(RouteTable::new(table))
    }
}

impl BackendDraft {
    /// The service that a route hangs on.
    fn itself(parent: &Parent, port: u16) -> Self {
        let (namespace, name) = (parent.namespace.clone(), parent.name.clone());
        Self {
            to: match parent.kind {
                ParentKind::Service => Reference::Service { namespace, name },
                ParentKind::ServiceEntry | ParentKind::Gateway => Reference::Host(name),
            },
            port: Some(port),
            subset: None,
            weight: 1,
            request_headers: model::http::HeaderEdits::default(),
            response_headers: model::http::HeaderEdits::default(),
        }
    }
}

fn remove_from<K: std::hash::Hash + Eq, S>(
    index: &mut HashMap<K, S>,
    key: &K,
    remove: impl FnOnce(&mut S) -> bool,
    is_empty: impl FnOnce(&S) -> bool,
) {
    if let Some(set) = index.get_mut(key) {
        remove(set);
        if is_empty(set) {
            index.remove(key);
        }
    }
}

fn targets(route: &HttpRoute) -> impl Iterator<Item = &Reference> {
    route.rules.iter().flat_map(|rule| {
        rule.backends.iter().map(|b| &b.to).chain(rule.mirrors.iter().map(|(mirror, _)| &mirror.to))
    })
}

fn narrowed(when: &RouteMatch, consumer: Option<&Str>) -> RouteMatch {
    let mut when = when.clone();
    if let Some(namespace) = consumer {
        let source = SourceMatch { namespace: Some(namespace.clone()), labels: Box::default() };
        when.source = Some(Box::new(source));
    }
    when
}

/// The route of a rule, with its back ends looked up.
pub(super) fn made(rule: &RuleDraft, key: &ObjectKey, port: u16, resolve: Resolve<'_>) -> Route {
    let mut route = rule.route.clone();
    if let RouteAction::Forward(_) = route.action {
        route.action = RouteAction::Forward(forward(&rule.backends, key, port, resolve));
    }
    route.mirrors = rule
        .mirrors
        .iter()
        .filter_map(|(mirror, share)| Some(Mirror { to: resolve(mirror, key, port).ok()?, share: *share }))
        .collect();
    route
}

fn forward(backends: &[BackendDraft], key: &ObjectKey, port: u16, resolve: Resolve<'_>) -> Forward {
    let backend = |draft: &BackendDraft| Backend {
        to: resolve(draft, key, port).unwrap_or_else(|reason| BackendRef::Unresolved { reason }),
        weight: draft.weight,
        request_headers: draft.request_headers.clone(),
        response_headers: draft.response_headers.clone(),
    };
    Forward::new(backends.iter().map(backend).collect())
}
