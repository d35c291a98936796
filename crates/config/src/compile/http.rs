//! What waypoints do for services: the routes of each service that is bound to one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use model::http::{
    Backend, BackendRef, Forward, HeaderEdits, HttpPort, HttpService, LedTo, Protocol, Retry, Route,
    RouteAction, RouteKind, RouteMatch, RouteTable, WaypointKey,
};
use model::{Change, ServiceKey};

use super::instance::{Definition, Told};
use super::{Compiler, convert};
use crate::policy::MeshConfig;
use crate::resource::{Kind, ObjectKey, Resource};
use crate::routes::{BackendDraft, Concerned, Parent, Reference, RouteDraft, Unresolved, Why};

impl Compiler {
    pub(super) fn set_route(&mut self, key: &ObjectKey, resource: Option<Resource>) {
        match (key.kind, resource) {
            (Kind::ReferenceGrant, resource) => {
                let grant = match resource {
                    Some(Resource::ReferenceGrant(grant)) => Some(*grant),
                    _ => None,
                };
                self.grants.set(key, grant);
                // Few, and seldom changed: what leads into the namespace is looked at again.
                let routes = self.routes.leading_into(&key.namespace).map(named).collect();
                self.touch_routes(routes);
            }
            (Kind::DestinationRule, resource) => {
                let rule = match resource {
                    Some(Resource::DestinationRule(rule)) => Some(*rule),
                    _ => None,
                };
                let concerned = self.destinations.set(key, rule, &self.options.cluster_domain);
                self.touch_hosts(&concerned);
            }
            (Kind::VirtualService, resource) => {
                let service = match resource {
                    Some(Resource::VirtualService(service)) => Some(*service),
                    _ => None,
                };
                let concerned = self.virtual_services.set(key, service, &self.options.cluster_domain);
                self.touch_hosts(&concerned);
            }
            (_, resource) => {
                let route = match resource {
                    Some(Resource::HttpRoute(route)) => Some(RouteDraft::Http(route)),
                    Some(Resource::StreamRoute(route)) => Some(RouteDraft::Stream(route)),
                    _ => None,
                };
                self.found.insert(key.clone());
                for parent in self.routes.set(key, route) {
                    self.touch(&parent);
                    // Of several types one is in force.
                    let others = self.routes.on(&parent).filter(|other| other.kind != key.kind);
                    self.found.extend(others.cloned());
                }
            }
        }
    }

    /// Has the services of these hosts compiled by the next commit.
    fn touch_hosts(&mut self, concerned: &[Concerned]) {
        for by in concerned {
            self.dirty_services.extend(self.hosts.concerned(by));
        }
    }

    /// Has the services that an object defines compiled by the next commit.
    fn touch(&mut self, parent: &Parent) {
        let services = parent.object().and_then(|owner| self.made_services.get(&owner));
        self.dirty_services.extend(services.cloned().unwrap_or_default());
    }

    /// Has the tables of these routes made again by the next commit.
    fn touch_routes(&mut self, routes: Vec<(ObjectKey, Vec<Parent>)>) {
        for (key, parents) in routes {
            self.found.insert(key);
            parents.iter().for_each(|parent| self.touch(parent));
        }
    }

    /// Has the services compiled whose routes lead to the service `key`, which came, went, or changed its ports or the policies
    /// for its workloads.
    pub(super) fn touch_leading_to(&mut self, key: &ServiceKey) {
        let domain = format!(".{}.svc.{}", key.namespace, self.options.cluster_domain);
        let mut references = vec![Reference::Host(key.hostname.clone())];
        if let Some(name) = key.hostname.strip_suffix(&domain) {
            references.push(Reference::Service { namespace: key.namespace.clone(), name: name.into() });
        }
        for reference in &references {
            let routes = self.routes.leading_to(reference).map(named).collect();
            self.touch_routes(routes);
            let hosts = self.virtual_services.leading_to(reference, &self.options.cluster_domain);
            self.touch_hosts(&hosts);
        }
    }

    /// Has the services compiled of which something else is told. One that is not behind a waypoint yet is compiled
    /// when it comes to be.
    pub(super) fn touch_told(&mut self, told: &Told) {
        let concerned = |service: &HttpService| match told {
            Told::All => true,
            Told::In(namespace) => service.waypoint.namespace == *namespace,
            Told::By(by) => service.waypoint.namespace == by.namespace && service.waypoint.name == by.name,
            Told::Of(_) => false,
        };
        if let Told::Of(object) = told {
            self.dirty_services.extend(self.made_services.get(object).cloned().unwrap_or_default());
        } else {
            let services = self.http_services.iter().filter(|(_, service)| concerned(service));
            self.dirty_services.extend(services.map(|(key, _)| key.clone()));
        }
    }

    /// What a waypoint does for a service, if it is bound to one.
    pub(super) fn http_service(&self, owner: &ObjectKey, definition: &Definition) -> Option<HttpService> {
        let (waypoint, spec) = self.waypoint_of(owner, definition)?;
        spec.ok()?;
        let parent = Parent::owner(owner)?;
        let service = definition.service.key();
        let resolve = |draft: &BackendDraft, route: &ObjectKey, port: u16| {
            self.resolve(draft, route, Some(&parent), port)
        };
        let ports = definition.service.ports.iter().map(|port| {
            // A route of the Gateway API goes before a VirtualService: its parent is named, the other's host is looked up.
            let routes = self.routes.table(&parent, port, &resolve);
            let streams = self.routes.streams(&parent, port, &resolve);
            let mut spoken = protocol(&port.app_protocol);
            // All connections are those of routes of connections, where there are no others: none may get past them by
            // being HTTP.
            if let (Protocol::Detect, None, Some(streams)) = (spoken, &routes, &streams) {
                spoken = if streams.asks_for_tls() { Protocol::Tls } else { Protocol::Tcp };
            }
            let routes = routes.or_else(|| self.virtual_services.table(&service, port, &resolve));
            let routes = match self.policies.config().and_then(MeshConfig::retries) {
                Some(default) => with_retries(routes, default, (&service, port.port), spoken),
                None => routes,
            };
            let streams = streams.or_else(|| self.virtual_services.streams(&service, port, &resolve));
            HttpPort {
                number: port.port,
                protocol: spoken,
                routes: Arc::new(routes.unwrap_or_default()),
                streams: Arc::new(streams.unwrap_or_default()),
            }
        });
        let ports: Box<[HttpPort]> = ports.collect();
        let led: BTreeSet<ServiceKey> = ports.iter().flat_map(led_to).collect();
        let selected = self.selected(std::iter::once(&service).chain(&led));
        let others = led.into_iter().filter(|other| *other != service);
        let led_to =
            others.map(|other| LedTo { selected: self.selected(std::iter::once(&other)), service: other });
        let led_to = led_to.filter(|led| !led.selected.is_empty()).collect();
        Some(HttpService {
            selected,
            led_to,
            ports,
            service,
            waypoint: WaypointKey { namespace: waypoint.namespace.clone(), name: waypoint.name.clone() },
            policies: self.policies.through(owner, waypoint).into(),
            telemetry: self.policies.telemetry(owner, waypoint),
            authentication: self.authentication(owner, &definition.service.key(), waypoint),
            rate_limits: self.policies.rate_limits(owner, waypoint).into(),
        })
    }

    /// What a back end's reference comes to for what came to `port` of `parent`.
    ///
    /// A route may lead back to the Service that it hangs on, in whichever namespace: its clients asked for nothing else
    /// (Gateway API, GEP-1426, "Namespace boundaries"). What came to another of its parents may not be led there
    /// without a grant, since the policies of the Service were not asked about it.
    pub(super) fn resolve(
        &self,
        draft: &BackendDraft,
        route: &ObjectKey,
        parent: Option<&Parent>,
        port: u16,
    ) -> Result<BackendRef, Unresolved> {
        let (key, ports) = self.referred(draft, route, parent)?;
        // Where no port is named, it is the only one, or the one that the request came to (VirtualService).
        let only = || ports.first().filter(|_| ports.len() == 1).map_or(port, |p| p.port);
        let port = draft.port.unwrap_or_else(only);
        if !ports.iter().any(|p| p.port == port) {
            return Err(unresolved(Why::NotFound, &format!("the service {key} has no port {port}")));
        }
        Ok(BackendRef::Service { service: key, port, subset: draft.subset.clone() })
    }

    /// The service that a back end's reference means, with its ports.
    pub(super) fn referred(
        &self,
        draft: &BackendDraft,
        route: &ObjectKey,
        parent: Option<&Parent>,
    ) -> Result<(ServiceKey, &[model::ServicePort]), Unresolved> {
        let key = match &draft.to {
            Reference::Unknown(reason) => {
                return Err(Unresolved { why: Why::InvalidKind, message: reason.clone() });
            }
            Reference::Service { namespace, name } => {
                let back = parent.is_some_and(|parent| parent.is_service(namespace, name));
                if !back && !self.grants.allow(route.kind.name(), &route.namespace, namespace, name) {
                    let from = &route.namespace;
                    let text =
                        format!("no ReferenceGrant lets {from} refer to the Service {namespace}/{name}");
                    return Err(unresolved(Why::NotPermitted, &text));
                }
                let service =
                    ObjectKey { kind: Kind::Service, namespace: namespace.clone(), name: name.clone() };
                convert::service_key(&self.options, &service)
            }
            Reference::Host(host) => {
                // The route's own namespace first, as for those who dial it.
                let here = ServiceKey { namespace: route.namespace.clone(), hostname: host.clone() };
                if self.services.contains_key(&here) {
                    here
                } else {
                    let first = self.hosts.named(host).next().cloned();
                    first.ok_or_else(|| unresolved(Why::NotFound, &format!("there is no host {host}")))?
                }
            }
        };
        let definition = self.services.get(&key).and_then(|e| e.definitions.first());
        let Some((_, definition)) = definition else {
            return Err(unresolved(Why::NotFound, &format!("there is no service {key}")));
        };
        Ok((key, &definition.service.ports))
    }

    /// Follows a change of how a service is spoken to.
    pub(super) fn follow_traffic(&mut self, key: &ServiceKey, is_there: bool) {
        let root = &self.policies.settings().root_namespace;
        let new = is_there.then(|| self.destinations.traffic(key, root)).flatten();
        match new {
            Some(new) if self.traffic.get(key).is_some_and(|old| **old == new) => {}
            Some(new) => {
                let new = Arc::new(new);
                self.traffic.insert(key.clone(), new.clone());
                self.changes.push(Change::SetTraffic(new));
            }
            None => {
                if self.traffic.remove(key).is_some() {
                    self.removed.push(Change::RemoveTraffic(key.clone()));
                }
            }
        }
    }

    /// Follows a change of what a waypoint does for a service.
    pub(super) fn follow_http(&mut self, key: &ServiceKey, new: Option<HttpService>) {
        match new {
            Some(new) if self.http_services.get(key).is_some_and(|old| **old == new) => {}
            Some(new) => {
                let new = Arc::new(new);
                self.http_services.insert(key.clone(), new.clone());
                self.changes.push(Change::SetHttpService(new));
            }
            None => {
                if self.http_services.remove(key).is_some() {
                    self.removed.push(Change::RemoveHttpService(key.clone()));
                }
            }
        }
    }
}

/// The routes of a port, with what the mesh's settings say of retries where they say nothing. Where there are none the service's
/// port is the route.
fn with_retries(
    routes: Option<RouteTable>,
    (retry, per_try): &(Retry, Option<Duration>),
    (service, port): (&ServiceKey, u16),
    spoken: Protocol,
) -> Option<RouteTable> {
    let mut entries = routes.map(|table| table.entries().to_vec()).unwrap_or_default();
    if entries.is_empty() {
        if matches!(spoken, Protocol::Tcp | Protocol::Tls) {
            return None;
        }
        let to = BackendRef::Service { service: service.clone(), port, subset: None };
        let (request_headers, response_headers) = (HeaderEdits::default(), HeaderEdits::default());
        let itself = Backend { to, weight: 1, request_headers, response_headers };
        let route = Route::new(RouteAction::Forward(Forward::new(vec![itself])));
        entries.push((RouteMatch::default(), Arc::new(route)));
    }
    // Entries of one route share it, and follow each other.
    let mut last: Option<(Arc<Route>, Arc<Route>)> = None;
    for (_, route) in &mut entries {
        if route.retry.is_some() || !matches!(route.action, RouteAction::Forward(_)) {
            continue;
        }
        let known =
            last.as_ref().filter(|(before, _)| Arc::ptr_eq(before, route)).map(|(_, new)| new.clone());
        let new = known.unwrap_or_else(|| {
            let mut new = Route { retry: Some(retry.clone()), ..Route::clone(route) };
            // The limits of the Gateway API are for all of a response, which this one is not.
            if matches!(route.id.kind, RouteKind::VirtualService | RouteKind::Default) {
                new.timeouts.per_try = new.timeouts.per_try.or(*per_try);
            }
            Arc::new(new)
        });
        last = Some((std::mem::replace(route, new.clone()), new));
    }
    Some(RouteTable::new(entries))
}

fn unresolved(why: Why, text: &str) -> Unresolved {
    Unresolved { why, message: text.into() }
}

/// The services that the routes of a port lead to, copies of requests included.
pub(super) fn led_to(port: &HttpPort) -> BTreeSet<ServiceKey> {
    let routes = port.routes.entries();
    let requests = routes.iter().filter_map(|(_, route)| match &route.action {
        RouteAction::Forward(forward) => Some(forward),
        RouteAction::Redirect(_) | RouteAction::Respond(_) => None,
    });
    let all = requests.chain(port.streams.entries().iter().map(|(_, route)| &route.to));
    let copies = routes.iter().flat_map(|(_, route)| &route.mirrors).map(|mirror| &mirror.to);
    let all = all.flat_map(Forward::backends).map(|backend| &backend.to).chain(copies);
    let services = all.filter_map(|to| match to {
        BackendRef::Service { service, .. } => Some(service.clone()),
        BackendRef::Original | BackendRef::Unresolved { .. } => None,
    });
    services.collect()
}

/// A route's name, and what it hangs on.
fn named((key, route): (&ObjectKey, &RouteDraft)) -> (ObjectKey, Vec<Parent>) {
    (key.clone(), route.parents().iter().map(Parent::of).collect())
}

/// What is spoken at a port of this application protocol (`appProtocol`, or the prefix of the port's name).
pub(super) fn protocol(app: &str) -> Protocol {
    Protocol::of(app)
}
