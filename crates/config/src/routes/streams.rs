//! The tables of routes of connections: of TCPRoutes and TLSRoutes that hang on a service, or else of the VirtualService
//! for its host.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;

use model::http::{Forward, RouteId, ServerName, StreamMatch, StreamRoute as Route, StreamTable};
use model::{ServiceKey, ServicePort, Str};

use super::state::{Parent, Resolve, RouteDraft, Routes, forward, of_namespace};
use super::virtual_services::VirtualServices;
use super::{BackendDraft, Reference};
use crate::resource::{Kind, ObjectKey};

/// Where an entry stands; the least comes first: those of other namespaces' clients, those with a server name, the exact
/// names, the longer ones, then the older resource, then the first by name.
type Place = (bool, Option<(bool, Reverse<usize>)>, (bool, Str), Str, Str);

impl Routes {
    /// The table of connections to `parent`'s `port`: `None` when no TCPRoute and no TLSRoute hangs on it. What no
    /// route takes is refused. Whose clients a route is for is said as for requests, see [`Routes::table`].
    #[must_use]
    pub fn streams(&self, parent: &Parent, port: &ServicePort, resolve: Resolve<'_>) -> Option<StreamTable> {
        let mut entries: Vec<(Place, StreamMatch, Arc<Route>)> = Vec::new();
        let mut consumers: BTreeSet<Str> = BTreeSet::new();
        let mut owned = false;
        for (key, route) in self.at(parent, port) {
            let RouteDraft::Stream(route) = route else { continue };
            let Some(rule) = &route.rule else { continue };
            let consumer = (key.namespace != parent.namespace).then_some(&key.namespace);
            owned |= consumer.is_none();
            consumers.extend(consumer.cloned());
            let to = forward(&rule.backends, key, port.port, resolve);
            let made = Arc::new(Route { id: rule.id.clone(), to });
            let place = |name: Option<&ServerName>| {
                let rank = name.map(|name| match name {
                    ServerName::Exact(name) => (false, Reverse(name.len())),
                    ServerName::Below(end) => (true, Reverse(end.len())),
                });
                let age = (route.created.is_empty(), route.created.clone());
                // Nothing comes before something in an `Option`; here it comes after it.
                let rank = rank.or(Some((true, Reverse(0)))).filter(|_| key.kind == Kind::TlsRoute);
                (consumer.is_none(), rank, age, key.namespace.clone(), key.name.clone())
            };
            let tls = key.kind == Kind::TlsRoute;
            let when = |names| StreamMatch {
                tls,
                names,
                destinations: Box::default(),
                source: consumer.map(of_namespace),
            };
            if route.names.is_empty() {
                entries.push((place(None), when(Box::default()), made));
                continue;
            }
            for name in &route.names {
                entries.push((place(Some(name)), when([name.clone()].into()), made.clone()));
            }
        }
        if entries.is_empty() {
            return None;
        }
        // TLSRoutes before TCPRoutes, since these take everything.
        entries.sort_by(|(a, ..), (b, ..)| (a.0, a.1.is_none(), a).cmp(&(b.0, b.1.is_none(), b)));
        let owners = entries.partition_point(|(place, ..)| !place.0);
        let mut table: Vec<(StreamMatch, Arc<Route>)> =
            entries.into_iter().map(|(_, when, route)| (when, route)).collect();
        let rest = table.split_off(owners);
        let nowhere = Arc::new(Route { id: RouteId::default(), to: Forward::new(Vec::new()) });
        for namespace in &consumers {
            let when = StreamMatch { source: Some(of_namespace(namespace)), ..StreamMatch::default() };
            table.push((when, nowhere.clone()));
        }
        table.extend(rest);
        if !owned {
            let itself = BackendDraft::itself(parent, port.port);
            let owner = ObjectKey {
                kind: Kind::TcpRoute,
                namespace: parent.namespace.clone(),
                name: parent.name.clone(),
            };
            table.push((StreamMatch::default(), all_to(&itself, &owner, port.port, resolve)));
        }
        Some(StreamTable::new(table))
    }
}

impl VirtualServices {
    /// The table of connections to a service's port; `None` when nothing is said of them. What no entry takes goes to
    /// the service itself.
    #[must_use]
    pub fn streams(&self, key: &ServiceKey, port: &ServicePort, resolve: Resolve<'_>) -> Option<StreamTable> {
        let (by, service) = self.of(key)?;
        let mut table = Vec::new();
        for entry in &service.streams {
            let here = |wanted: Option<u16>| wanted.is_none_or(|number| number == port.port);
            let mut matches = entry.matches.iter().filter(|m| here(m.port)).peekable();
            if matches.peek().is_none() {
                continue;
            }
            let to = forward(&entry.backends, &by, port.port, resolve);
            let route = Arc::new(Route { id: entry.id.clone(), to });
            for when in matches {
                // `*` among the names is any.
                let any = when.sni.iter().any(|host| &**host == "*");
                let names = when.sni.iter().filter(|_| !any).filter_map(|host| ServerName::parse(host));
                let when = StreamMatch {
                    tls: entry.tls,
                    names: names.collect(),
                    destinations: when.destinations.clone(),
                    source: when.source.clone(),
                };
                table.push((when, route.clone()));
            }
        }
        if table.is_empty() {
            return None;
        }
        let itself = BackendDraft {
            to: Reference::Host(key.hostname.clone()),
            port: Some(port.port),
            subset: None,
            weight: 1,
            request_headers: model::http::HeaderEdits::default(),
            response_headers: model::http::HeaderEdits::default(),
        };
        table.push((StreamMatch::default(), all_to(&itself, &by, port.port, resolve)));
        Some(StreamTable::new(table))
    }
}

fn all_to(backend: &BackendDraft, by: &ObjectKey, port: u16, resolve: Resolve<'_>) -> Arc<Route> {
    let to = forward(std::slice::from_ref(backend), by, port, resolve);
    Arc::new(Route { id: RouteId::default(), to })
}
