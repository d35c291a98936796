//! The routes that there are, by what they hang on and where they lead, and the tables that they make.

use std::collections::BTreeSet;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use model::http::{
    Backend, BackendRef, Forward, Mirror, Respond, Route, RouteAction, RouteMatch, RouteTable, SourceMatch,
};
use model::{ServicePort, Str};

use super::precedence::Precedence;
use super::reference::{BackendDraft, ParentKind, ParentRef, Reference, Unresolved};
use super::{HttpRoute, StreamRoute, http_route::RuleDraft};
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
    /// The one that a reference is to.
    #[must_use]
    pub fn of(parent: &ParentRef) -> Self {
        Self { kind: parent.kind, namespace: parent.namespace.clone(), name: parent.name.clone() }
    }

    /// The object that it is, where it is one that defines services.
    #[must_use]
    pub fn object(&self) -> Option<ObjectKey> {
        let kind = match self.kind {
            ParentKind::Service => Kind::Service,
            ParentKind::ServiceEntry => Kind::ServiceEntry,
            ParentKind::Gateway => return None,
        };
        Some(ObjectKey { kind, namespace: self.namespace.clone(), name: self.name.clone() })
    }

    /// Whether it is this Service.
    #[must_use]
    pub fn is_service(&self, namespace: &str, name: &str) -> bool {
        self.kind == ParentKind::Service && *self.namespace == *namespace && *self.name == *name
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
pub type Resolve<'r> = &'r dyn Fn(&BackendDraft, &ObjectKey, u16) -> Result<BackendRef, Unresolved>;

/// A route of any kind of the Gateway API, as it is written.
#[derive(Clone, PartialEq, Debug)]
pub enum RouteDraft {
    /// An HTTPRoute or GRPCRoute.
    Http(Box<HttpRoute>),
    /// A TCPRoute or TLSRoute.
    Stream(Box<StreamRoute>),
}

impl RouteDraft {
    /// What it hangs on.
    #[must_use]
    pub fn parents(&self) -> &[ParentRef] {
        match self {
            Self::Http(route) => &route.parents,
            Self::Stream(route) => &route.parents,
        }
    }

    /// All that it leads to.
    #[must_use]
    pub fn backends(&self) -> Vec<&BackendDraft> {
        match self {
            Self::Http(route) => {
                let forwarded = route.rules.iter().flat_map(|rule| &rule.backends);
                let mirrored = route.rules.iter().flat_map(|rule| &rule.mirrors).map(|(mirror, _)| mirror);
                forwarded.chain(mirrored).collect()
            }
            Self::Stream(route) => route.rule.iter().flat_map(|rule| &rule.backends).collect(),
        }
    }
}

/// The routes that there are.
#[derive(Debug, Default)]
pub struct Routes {
    all: HashMap<ObjectKey, RouteDraft>,
    by_parent: HashMap<Parent, BTreeSet<ObjectKey>>,
    by_target: HashMap<Reference, HashSet<ObjectKey>>,
}

impl Routes {
    /// Sets a route, or removes it. Gives what it hung on and hangs on now.
    pub fn set(&mut self, key: &ObjectKey, route: Option<RouteDraft>) -> HashSet<Parent> {
        let mut touched = HashSet::new();
        if let Some(old) = self.all.remove(key) {
            for parent in old.parents().iter().map(Parent::of) {
                remove_from(&mut self.by_parent, &parent, |set| set.remove(key), BTreeSet::is_empty);
                touched.insert(parent);
            }
            for target in old.backends().into_iter().map(|backend| &backend.to) {
                remove_from(&mut self.by_target, target, |set| set.remove(key), HashSet::is_empty);
            }
        }
        if let Some(route) = route {
            for parent in route.parents().iter().map(Parent::of) {
                self.by_parent.entry(parent.clone()).or_default().insert(key.clone());
                touched.insert(parent);
            }
            for target in route.backends().into_iter().map(|backend| &backend.to) {
                self.by_target.entry(target.clone()).or_default().insert(key.clone());
            }
            self.all.insert(key.clone(), route);
        }
        touched
    }

    /// The back ends that a route names, those of its mirrors included.
    pub fn backends<'a>(&'a self, key: &ObjectKey) -> impl Iterator<Item = &'a BackendDraft> + use<'a> {
        self.all.get(key).into_iter().flat_map(RouteDraft::backends)
    }

    /// The routes that hang on `parent`.
    pub fn on(&self, parent: &Parent) -> impl Iterator<Item = &ObjectKey> {
        self.by_parent.get(parent).into_iter().flatten()
    }

    /// The route of this name.
    #[must_use]
    pub fn get(&self, key: &ObjectKey) -> Option<&RouteDraft> {
        self.all.get(key)
    }

    /// The routes that lead to `target`.
    pub fn leading_to(&self, target: &Reference) -> impl Iterator<Item = (&ObjectKey, &RouteDraft)> {
        let keys = self.by_target.get(target).into_iter().flatten();
        keys.filter_map(|key| self.all.get_key_value(key))
    }

    /// The routes that lead to Services of `namespace`.
    pub fn leading_into(&self, namespace: &str) -> impl Iterator<Item = (&ObjectKey, &RouteDraft)> {
        let into = self.by_target.iter().filter(
            move |(target, _)| matches!(target, Reference::Service { namespace: n, .. } if **n == *namespace),
        );
        into.flat_map(|(_, keys)| keys).filter_map(|key| self.all.get_key_value(key))
    }

    /// The routes that hang on a port of `parent` and are in force there: of those that are for the same clients the ones
    /// of the most specific type, and none of another (GEP-1294, "Route types").
    pub(super) fn at(
        &self,
        parent: &Parent,
        port: &ServicePort,
    ) -> impl Iterator<Item = (&ObjectKey, &RouteDraft)> {
        let mut first: HashMap<Option<&Str>, u8> = HashMap::new();
        for (key, _) in self.hanging(parent, port) {
            let least = first.entry(audience(key, parent)).or_insert(u8::MAX);
            *least = specificity(key.kind).min(*least);
        }
        self.hanging(parent, port)
            .filter(move |(key, _)| first.get(&audience(key, parent)) == Some(&specificity(key.kind)))
    }

    /// The type of route that is in force at a port of `parent` in the place of `route`'s, for the same clients.
    #[must_use]
    pub fn overruling(&self, route: &ObjectKey, parent: &Parent, port: &ServicePort) -> Option<Kind> {
        let others = self.hanging(parent, port).map(|(key, _)| key);
        let others = others.filter(|key| audience(key, parent) == audience(route, parent));
        let first = others.map(|key| key.kind).min_by_key(|kind| specificity(*kind))?;
        (specificity(first) < specificity(route.kind)).then_some(first)
    }

    /// The routes that hang on a port of `parent`, in force or not.
    fn hanging(
        &self,
        parent: &Parent,
        port: &ServicePort,
    ) -> impl Iterator<Item = (&ObjectKey, &RouteDraft)> {
        let hangs = |p: &ParentRef| Parent::of(p) == *parent && p.means(port);
        let here = self.on(parent).filter_map(|key| self.all.get_key_value(key));
        here.filter(move |(_, route)| route.parents().iter().any(hangs))
    }

    /// The table of `parent`'s `port`: `None` when no route hangs on it, so that requests go to the service itself.
    ///
    /// A route in the service's namespace is its owner's, and for all clients; one in another namespace is for the
    /// clients of that namespace, and what it leaves over is not its owner's to answer (Gateway API, "consumer
    /// routes").
    #[must_use]
    pub fn table(&self, parent: &Parent, port: &ServicePort, resolve: Resolve<'_>) -> Option<RouteTable> {
        let mut entries = Vec::new();
        let mut consumers = BTreeSet::new();
        for (key, route) in self.at(parent, port) {
            let RouteDraft::Http(route) = route else { continue };
            let consumer = (key.namespace != parent.namespace).then(|| key.namespace.clone());
            consumers.extend(consumer.clone());
            for (place, rule) in route.rules.iter().enumerate() {
                let made = Arc::new(made(rule, key, port.port, resolve));
                for (entry, when) in rule.matches.iter().enumerate() {
                    let place = Precedence::of(when, &route.created, key, (place, entry));
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
    pub(super) fn itself(parent: &Parent, port: u16) -> Self {
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

/// Whose clients a route is for: those of a namespace, or all.
fn audience<'k>(route: &'k ObjectKey, parent: &Parent) -> Option<&'k Str> {
    (route.namespace != parent.namespace).then_some(&route.namespace)
}

/// How specific a type of route is; the least is the most.
fn specificity(kind: Kind) -> u8 {
    match kind {
        Kind::GrpcRoute => 0,
        Kind::HttpRoute => 1,
        Kind::TlsRoute => 2,
        _ => 3,
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

fn narrowed(when: &RouteMatch, consumer: Option<&Str>) -> RouteMatch {
    let mut when = when.clone();
    if consumer.is_some() {
        when.source = consumer.map(of_namespace);
    }
    when
}

/// The clients of a namespace.
pub(super) fn of_namespace(namespace: &Str) -> Box<SourceMatch> {
    Box::new(SourceMatch { namespace: Some(namespace.clone()), labels: Box::default() })
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

/// Back ends, looked up.
pub(super) fn forward(
    backends: &[BackendDraft],
    key: &ObjectKey,
    port: u16,
    resolve: Resolve<'_>,
) -> Forward {
    let backend = |draft: &BackendDraft| Backend {
        to: resolve(draft, key, port)
            .unwrap_or_else(|unresolved| BackendRef::Unresolved { reason: unresolved.message }),
        weight: draft.weight,
        request_headers: draft.request_headers.clone(),
        response_headers: draft.response_headers.clone(),
    };
    Forward::new(backends.iter().map(backend).collect())
}
