//! What is said of routes on request: that they are not in force, or lead to what is not there.

use std::collections::{BTreeMap, BTreeSet};

use model::ServiceKey;
use model::http::Protocol;

use super::{Compiler, Finding, Judgement};
use crate::diagnostic::Code;
use crate::labels::Selector;
use crate::resource::{Kind, ObjectKey};
use crate::routes::{BackendDraft, Parent, RouteDraft};

/// Of so many services of a VirtualService's hosts it is said how it stands with them: `*` may be all that there are.
const MOST_HOSTS: usize = 64;
/// The reason where something is in force for a part of what it is for.
const IN_PART: &str = "PartiallyInvalid";

fn finding(code: Code, message: String, remedy: &str) -> Finding {
    Finding { code, message, remedy: remedy.to_owned() }
}

impl Compiler {
    /// What is not as it should be about a route, or about how a host is spoken to.
    pub(super) fn review_routes(&self, key: &ObjectKey) -> Vec<Finding> {
        let mut found = self.bound_elsewhere(key);
        found.extend(match key.kind {
            Kind::VirtualService => self.review_virtual_service(key),
            Kind::DestinationRule => self.review_destination_rule(key),
            Kind::HttpRoute | Kind::GrpcRoute | Kind::TcpRoute | Kind::TlsRoute => self.review_route(key),
            _ => Vec::new(),
        });
        let mut seen = BTreeSet::new();
        found.retain(|finding| seen.insert(finding.message.clone()));
        found
    }

    fn review_route(&self, key: &ObjectKey) -> Vec<Finding> {
        let parents = self.routes.get(key).map(|route| route.parents().to_vec()).unwrap_or_default();
        let mut found = Vec::new();
        for standing in parents.iter().filter_map(|parent| self.route_standing(key, parent)) {
            let of_parent = std::iter::once(standing.accepted).chain(standing.bound);
            let unmet = of_parent.filter(|judgement| !judgement.holds);
            found.extend(unmet.map(|judgement| finding(Code::WithoutEffect, judgement.message, "")));
            let resolved = standing.resolved;
            found.extend((!resolved.holds).then(|| {
                finding(Code::NamesNothing, resolved.message, "what falls to it is answered with 500")
            }));
        }
        let owners = parents.iter().filter_map(|parent| Parent::of(parent).object());
        let services: Vec<ServiceKey> =
            owners.filter_map(|owner| self.made_services.get(&owner)).flatten().cloned().collect();
        found.extend(self.shadowed(key, &services));
        found
    }

    /// The back ends of a resource that let in the waypoint of another service than the one that is called.
    pub(super) fn bound_elsewhere(&self, key: &ObjectKey) -> Vec<Finding> {
        let mut found = Vec::new();
        for (service, at) in self.called_by(key) {
            let backends: BTreeSet<ServiceKey> = at.ports.iter().flat_map(super::http::led_to).collect();
            for backend in backends.iter().filter(|backend| **backend != service) {
                let Some((owner, definition)) = self.in_force(backend) else { continue };
                let Some((waypoint, Ok(spec))) = self.waypoint_of(owner, definition) else { continue };
                let same = waypoint.namespace == at.waypoint.namespace && waypoint.name == at.waypoint.name;
                if same || spec.permissive {
                    continue;
                }
                let message = format!(
                    "what goes from {} to {} is refused by its nodes, which let in the waypoint {}/{} alone: requests pass \
                     one waypoint, here {}",
                    service.hostname, backend.hostname, waypoint.namespace, waypoint.name, at.waypoint
                );
                let remedy = "bind both services to one waypoint, or make the back end's binding permissive";
                found.push(finding(Code::WaypointNotReady, message, remedy));
            }
        }
        found
    }

    /// The services whose requests a resource routes, as waypoints have them.
    fn called_by(&self, key: &ObjectKey) -> Vec<(ServiceKey, &model::http::HttpService)> {
        let services: Vec<ServiceKey> = match key.kind {
            Kind::VirtualService => {
                let hosts = self.virtual_services.hosts(key, &self.options.cluster_domain);
                let all = hosts.iter().flat_map(|by| self.hosts.concerned(by));
                all.filter(|s| self.virtual_services.of(s).is_some_and(|(first, _)| first == *key)).collect()
            }
            _ => {
                let parents = self.routes.get(key).map(RouteDraft::parents).unwrap_or_default();
                let owners = parents.iter().filter_map(|parent| Parent::of(parent).object());
                owners.filter_map(|owner| self.made_services.get(&owner)).flatten().cloned().collect()
            }
        };
        services.into_iter().filter_map(|s| Some((s.clone(), &**self.http_services.get(&s)?))).collect()
    }

    fn review_virtual_service(&self, key: &ObjectKey) -> Vec<Finding> {
        let mut found = Vec::new();
        let services: BTreeSet<ServiceKey> = self.hosted(key).collect();
        for service in &services {
            found.extend(self.overruled(key, service).map(|(_, finding)| finding));
        }
        let services: Vec<ServiceKey> = services.into_iter().collect();
        found.extend(self.shadowed(key, &services));
        for message in self.virtual_services.broken_delegates(key) {
            found.push(finding(Code::NamesNothing, message, "what it would take is answered with 404"));
        }
        for backend in self.virtual_services.backends(key) {
            // Without a port it is that of the request, which may be any of the host's; of a delegate, who asks has the host.
            let port =
                services.iter().find_map(|s| self.in_force(s)?.1.service.ports.first().map(|p| p.port));
            let to = match backend.port.or(port) {
                Some(port) => self.resolve(backend, key, None, port).map(drop),
                None => self.referred(backend, key, None).map(drop),
            };
            match to {
                Err(unresolved) => found.push(finding(
                    Code::NamesNothing,
                    unresolved.message.to_string(),
                    "what falls to it is answered with 500",
                )),
                Ok(_) => found.extend(self.missing_subset(backend, key)),
            }
        }
        found
    }

    /// The services of a VirtualService's hosts that it is exported to.
    fn hosted(&self, key: &ObjectKey) -> impl Iterator<Item = ServiceKey> {
        let hosts = self.virtual_services.hosts(key, &self.options.cluster_domain);
        let services = hosts.into_iter().flat_map(|by| self.hosts.concerned(&by));
        services.filter(|service| self.virtual_services.is_visible(key, service))
    }

    /// Whether waypoints enforce a VirtualService for its hosts; `None` where these are no services.
    #[must_use]
    pub fn host_standing(&self, key: &ObjectKey) -> Option<Judgement> {
        if key.kind != Kind::VirtualService {
            return None;
        }
        let mut services = BTreeSet::new();
        let is_new = self.hosted(key).filter(|service| services.insert(service.clone()));
        let are_more = is_new.take(MOST_HOSTS + 1).count() > MOST_HOSTS;
        if are_more {
            services.pop_last();
        }
        let wrong = services.iter().filter_map(|service| self.overruled(key, service));
        let wrong: Vec<(&'static str, Finding)> = wrong.collect();
        let Some((first, _)) = wrong.first() else {
            let which = if are_more {
                format!("the {MOST_HOSTS} services of its hosts that were looked at")
            } else {
                "all of its hosts".to_owned()
            };
            return (!services.is_empty()).then(|| Judgement::enforced(&which));
        };
        let in_part = wrong.len() < services.len() || wrong.iter().any(|(reason, _)| *reason == IN_PART);
        let reason = if in_part { IN_PART } else { first };
        let mut all =
            wrong.iter().map(|(_, finding)| finding.message.as_str()).collect::<Vec<_>>().join("; ");
        if are_more {
            all += &format!("; of the services of its hosts {MOST_HOSTS} were looked at");
        }
        Some(Judgement::not_enforced(reason, &all))
    }

    /// What is in force for a service in the place of a VirtualService for it, if something is: in one word, and in several.
    fn overruled(&self, key: &ObjectKey, service: &ServiceKey) -> Option<(&'static str, Finding)> {
        use model::http::RouteKind::{Default, VirtualService};
        let host = &service.hostname;
        let (owner, definition) = self.in_force(service)?;
        if !self.is_served(owner, definition) {
            let message =
                format!("no waypoint enforces it for {host}: the service is bound to none that takes it");
            let finding = finding(Code::WithoutEffect, message, "label the service istio.io/use-waypoint");
            return Some(("NoWaypoint", finding));
        }
        let (first, _) = self.virtual_services.of(service)?;
        if first != *key {
            let message = format!("has no effect for {host}: the one in force is {}", first.resource_name());
            let finding = finding(Code::WithoutEffect, message, "make one VirtualService of both");
            return Some(("Overruled", finding));
        }
        let (has_http, has_streams) = self.virtual_services.entries(key);
        let mut before: BTreeMap<String, BTreeSet<u16>> = BTreeMap::new();
        let mut is_in_force = false;
        for port in self.http_services.get(service).into_iter().flat_map(|served| &served.ports) {
            let has_requests = !matches!(port.protocol, Protocol::Tcp | Protocol::Tls);
            let declared = definition.service.ports.iter().find(|declared| declared.port == port.number);
            let is_open =
                declared.is_some_and(|d| super::http::protocol(&d.app_protocol) == Protocol::Detect);
            // Routes of connections take the requests, too, of a port that is not declared to be for either.
            let takes_requests = has_http && is_open && !has_requests;
            let requests = port.routes.entries().iter().map(|(_, route)| &route.id).filter(|_| has_requests);
            let streams = port.streams.entries().iter().map(|(_, route)| &route.id);
            is_in_force |= requests.clone().chain(streams.clone()).any(|id| id.kind == VirtualService);
            let streams = streams.filter(|_| has_streams || takes_requests);
            let all = requests.filter(|_| has_http).chain(streams);
            for id in all.filter(|id| !matches!(id.kind, Default | VirtualService)) {
                let name = format!("{} {}/{}", id.kind.name(), id.namespace, id.name);
                before.entry(name).or_default().insert(port.number);
            }
        }
        (!before.is_empty()).then(|| {
            let on = |(name, ports): (&String, &BTreeSet<u16>)| {
                let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
                format!("{name} on {}", ports.join(" and "))
            };
            let all: Vec<String> = before.iter().map(on).collect();
            let message = format!(
                "has no effect for ports of {host} that routes of the Gateway API hang on, which go before it: {}",
                all.join(", ")
            );
            let remedy = "keep one of both kinds for a port of a service";
            let reason = if is_in_force { IN_PART } else { "Overruled" };
            (reason, finding(Code::WithoutEffect, message, remedy))
        })
    }

    /// Whether a back end names a subset that no DestinationRule makes.
    fn missing_subset(&self, backend: &BackendDraft, key: &ObjectKey) -> Option<Finding> {
        let subset = backend.subset.as_ref()?;
        let (service, _) = self.referred(backend, key, None).ok()?;
        let root = &self.policies.settings().root_namespace;
        let traffic = self.destinations.traffic(&service, root);
        let known = traffic.is_some_and(|t| t.subsets.iter().any(|s| s.name == *subset));
        let message = format!("no DestinationRule makes the subset {subset} of {}", service.hostname);
        (!known).then(|| finding(Code::NamesNothing, message, "what falls to it is answered with 503"))
    }

    fn review_destination_rule(&self, key: &ObjectKey) -> Vec<Finding> {
        let Some((host, rule)) = self.destinations.get(key) else { return Vec::new() };
        let services = self.hosts.concerned(&host);
        if services.is_empty() {
            let message = format!("there is no service of the host {}", rule.host);
            return vec![finding(Code::NamesNothing, message, "")];
        }
        let root = &self.policies.settings().root_namespace;
        let mut found = Vec::new();
        for service in &services {
            for (part, first) in self.destinations.without_effect(key, service, root) {
                let (host, name) = (&service.hostname, first.resource_name());
                let message = format!("{part}has no effect for {host}: the one in force is {name}");
                found.push(finding(Code::WithoutEffect, message, "make one DestinationRule of both"));
            }
        }
        for subset in &rule.subsets {
            let selector = Selector::new(subset.labels.to_vec());
            let any = services.iter().any(|service| self.has_endpoint(service, selector.as_ref()));
            if !any {
                let message = format!("the subset {} has no endpoint", subset.name);
                found.push(finding(Code::NoWorkload, message, "check its labels"));
            }
        }
        found
    }

    /// Whether a service has an endpoint of these labels.
    fn has_endpoint(&self, service: &ServiceKey, selector: Option<&Selector>) -> bool {
        let mut records = self.records.iter().flatten();
        records.any(|record| {
            let listed = record.compiled().filter(|_| record.emitted);
            listed.is_some_and(|w| w.services.iter().any(|m| m.service == *service))
                && selector.is_none_or(|selector| selector.matches(&record.labels))
        })
    }
}
