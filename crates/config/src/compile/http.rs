//! What waypoints do for services: the routes of each service that is bound to one.

use std::sync::Arc;

use model::http::{BackendRef, HttpPort, HttpService, Protocol, WaypointKey};
use model::{Change, ServiceKey, Str};

use super::instance::Definition;
use super::{Compiler, convert};
use crate::resource::{Kind, ObjectKey, Resource};
use crate::routes::{BackendDraft, Concerned, Parent, ParentKind, Reference};

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
                for parent in self.routes.leading_into(&key.namespace) {
                    self.touch(&parent);
                }
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
                    Some(Resource::HttpRoute(route)) => Some(*route),
                    _ => None,
                };
                for parent in self.routes.set(key, route) {
                    self.touch(&parent);
                }
            }
        }
    }

    /// Has the services of these hosts compiled by the next commit.
    fn touch_hosts(&mut self, concerned: &[Concerned]) {
        for key in self.services.keys().filter(|key| concerned.iter().any(|c| c.has(key))) {
            self.dirty_services.insert(key.clone());
        }
    }

    /// Has the services that an object defines compiled by the next commit.
    fn touch(&mut self, parent: &Parent) {
        let key = |kind| ObjectKey { kind, namespace: parent.namespace.clone(), name: parent.name.clone() };
        let owner = match parent.kind {
            ParentKind::Service => key(Kind::Service),
            ParentKind::ServiceEntry => key(Kind::ServiceEntry),
            ParentKind::Gateway => return,
        };
        let services = self.made_services.get(&owner).cloned().unwrap_or_default();
        self.dirty_services.extend(services);
    }

    /// Has the services compiled whose routes lead to the service `key`, which came, went, or changed its ports.
    pub(super) fn touch_leading_to(&mut self, key: &ServiceKey) {
        let domain = format!(".{}.svc.{}", key.namespace, self.options.cluster_domain);
        let mut references = vec![Reference::Host(key.hostname.clone())];
        if let Some(name) = key.hostname.strip_suffix(&domain) {
            references.push(Reference::Service { namespace: key.namespace.clone(), name: name.into() });
        }
        for reference in &references {
            for parent in self.routes.leading_to(reference) {
                self.touch(&parent);
            }
            let hosts = self.virtual_services.leading_to(reference, &self.options.cluster_domain);
            if !hosts.is_empty() {
                self.touch_hosts(&hosts);
            }
        }
    }

    /// What a waypoint does for a service, if it is bound to one.
    pub(super) fn http_service(&self, owner: &ObjectKey, definition: &Definition) -> Option<HttpService> {
        let (waypoint, spec) = self.waypoint_of(owner, definition)?;
        spec.ok()?;
        let parent = Parent::owner(owner)?;
        let service = definition.service.key();
        let resolve = |draft: &BackendDraft, route: &ObjectKey, port: u16| self.resolve(draft, route, port);
        let ports = definition.service.ports.iter().map(|port| HttpPort {
            number: port.port,
            protocol: protocol(&port.app_protocol),
            // A route of the Gateway API goes before a VirtualService: its parent is named, the other's host is looked up.
            routes: Arc::new(
                self.routes
                    .table(&parent, port, &resolve)
                    .or_else(|| self.virtual_services.table(&service, port, &resolve))
                    .unwrap_or_default(),
            ),
        });
        Some(HttpService {
            ports: ports.collect(),
            service,
            waypoint: WaypointKey { namespace: waypoint.namespace.clone(), name: waypoint.name.clone() },
            policies: self.policies.through(owner, waypoint).into(),
        })
    }

    /// What a back end's reference comes to.
    fn resolve(&self, draft: &BackendDraft, route: &ObjectKey, port: u16) -> Result<BackendRef, Str> {
        let key = match &draft.to {
            Reference::Unknown(reason) => return Err(reason.clone()),
            Reference::Service { namespace, name } => {
                let kind = if route.kind == Kind::GrpcRoute { "GRPCRoute" } else { "HTTPRoute" };
                if !self.grants.allow(kind, &route.namespace, namespace, name) {
                    let text = format!(
                        "no ReferenceGrant lets {} refer to the Service {namespace}/{name}",
                        route.namespace
                    );
                    return Err(text.as_str().into());
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
                    let mut all = self.services.keys().filter(|k| k.hostname == *host);
                    all.next()
                        .cloned()
                        .ok_or_else(|| Str::from(format!("there is no host {host}").as_str()))?
                }
            }
        };
        let definition = self.services.get(&key).and_then(|e| e.definitions.first());
        let Some((_, definition)) = definition else {
            return Err(format!("there is no service {key}").as_str().into());
        };
        // Where no port is named, it is the only one, or the one that the request came to (VirtualService).
        let ports = &definition.service.ports;
        let only = || ports.first().filter(|_| ports.len() == 1).map_or(port, |p| p.port);
        let port = draft.port.unwrap_or_else(only);
        if !ports.iter().any(|p| p.port == port) {
            return Err(format!("the service {key} has no port {port}").as_str().into());
        }
        Ok(BackendRef::Service { service: key, port, subset: draft.subset.clone() })
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

/// What is spoken at a port of this application protocol (`appProtocol`, or the prefix of the port's name).
fn protocol(app: &str) -> Protocol {
    match app.to_ascii_lowercase().as_str() {
        "" => Protocol::Detect,
        "http" | "kubernetes.io/ws" => Protocol::Http,
        "http2" | "grpc" | "grpc-web" | "kubernetes.io/h2c" => Protocol::Http2,
        "https" | "tls" => Protocol::Tls,
        _ => Protocol::Tcp,
    }
}
