//! How objects stand with what they name: a route with its parents and back ends, a service or ServiceEntry with its
//! waypoint, a policy with its targets. The control plane writes it into their status.
//!
//! What a batch may have changed of it is among the batch's [`super::Batch::found`].

use model::ServiceKey;
use model::http::Protocol;

use super::http::protocol;
use super::instance::Definition;
use super::{Compiler, Finding};
use crate::policy::Waypoint;
use crate::policy::selector::{Target, TargetKind};
use crate::resource::{Kind, ObjectKey};
use crate::routes::gateway::Unbound;
use crate::routes::{Parent, ParentKind, ParentRef, RouteDraft, Why};

/// What a condition says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Judgement {
    /// Whether it holds.
    pub holds: bool,
    /// In one word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Judgement {
    /// How each message of `WaypointAccepted` begins, by which ours are known among those of other control planes.
    pub const OF_WAYPOINTS: &str = "waypoints ";

    /// That waypoints enforce it for all of these.
    pub(super) fn enforced(what: &str) -> Self {
        Self::yes("Accepted", format!("{}enforce it for {what}", Self::OF_WAYPOINTS))
    }

    /// That waypoints don't enforce it, or not for all; why.
    pub(super) fn not_enforced(reason: &'static str, why: &str) -> Self {
        let message = format!("{}don't enforce it for all that it is for: {why}", Self::OF_WAYPOINTS);
        Self::no(reason, message)
    }

    pub(super) fn yes(reason: &'static str, message: impl Into<String>) -> Self {
        Self { holds: true, reason, message: message.into() }
    }

    pub(super) fn no(reason: &'static str, message: impl Into<String>) -> Self {
        Self { holds: false, reason, message: message.into() }
    }
}

/// How a route stands with one of its parents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouteStanding {
    /// Whether the parent takes it (Gateway API, `Accepted`).
    pub accepted: Judgement,
    /// Whether all that it leads to is there, and may be referred to (`ResolvedRefs`).
    pub resolved: Judgement,
    /// Whether a waypoint enforces it; `None` where that has no meaning.
    pub bound: Option<Judgement>,
}

impl Compiler {
    /// How a route stands with a parent that it names; `None` when that is another controller's to say.
    #[must_use]
    pub fn route_standing(&self, route: &ObjectKey, parent: &ParentRef) -> Option<RouteStanding> {
        let place = Parent::of(parent);
        let resolved = self.references_of(route, &place);
        let kind = match parent.kind {
            ParentKind::Service => Kind::Service,
            ParentKind::ServiceEntry => Kind::ServiceEntry,
            ParentKind::Gateway => {
                let waypoint = Waypoint { namespace: place.namespace, name: place.name };
                self.waypoints.contains_key(&waypoint).then_some(())?;
                let message =
                    "a waypoint has routes by the services that are bound to it: refer to a Service";
                let accepted = Judgement::no("NotAllowedByListeners", message);
                return Some(RouteStanding { accepted, resolved, bound: None });
            }
        };
        let owner = ObjectKey { kind, namespace: place.namespace, name: place.name };
        let Some((_, definition)) = self.definitions_by(&owner).next() else {
            let message = format!("there is no {} {}/{}", kind.name(), owner.namespace, owner.name);
            let accepted = Judgement::no("NoMatchingParent", message);
            return Some(RouteStanding { accepted, resolved, bound: None });
        };
        let is_meant = |port: &&model::ServicePort| {
            parent.port.is_none_or(|number| number == port.port)
                && parent.section.as_ref().is_none_or(|name| *name == port.name)
        };
        if !definition.service.ports.iter().any(|port| is_meant(&port)) {
            let message = format!("{} {}/{} has no such port", kind.name(), owner.namespace, owner.name);
            let accepted = Judgement::no("NoMatchingParent", message);
            return Some(RouteStanding { accepted, resolved, bound: None });
        }
        let is_http = |port: &model::ServicePort| {
            matches!(protocol(&port.app_protocol), Protocol::Http | Protocol::Http2)
        };
        let stream = matches!(self.routes.get(route), Some(RouteDraft::Stream(_)));
        if stream && definition.service.ports.iter().filter(is_meant).all(is_http) {
            let message = format!(
                "the ports of the {} {}/{} are for HTTP: use an HTTPRoute or a GRPCRoute",
                kind.name(),
                owner.namespace,
                owner.name
            );
            let accepted = Judgement::no("NoMatchingParent", message);
            return Some(RouteStanding { accepted, resolved, bound: None });
        }
        let meant = definition.service.ports.iter().filter(is_meant);
        if let Some(accepted) = self.conflicting(route, &Parent::of(parent), meant) {
            return Some(RouteStanding { accepted, resolved, bound: None });
        }
        let bound = self.binding_of(&owner, definition).unwrap_or_else(|| {
            let message = format!(
                "no waypoint enforces the route: the {} {}/{} is bound to none (label istio.io/use-waypoint)",
                kind.name(),
                owner.namespace,
                owner.name
            );
            Judgement::no("NoWaypoint", message)
        });
        let elsewhere = self.bound_elsewhere(route).into_iter().next();
        let bound = match elsewhere.filter(|_| bound.holds) {
            Some(finding) => Judgement::no("BackendBoundElsewhere", finding.message),
            None => bound,
        };
        let accepted = Judgement::yes("Accepted", "the route is attached");
        Some(RouteStanding { accepted, resolved, bound: Some(bound) })
    }

    /// What to say of a route in whose place those of another type are in force at all of these ports.
    fn conflicting<'p>(
        &self,
        route: &ObjectKey,
        parent: &Parent,
        mut ports: impl Iterator<Item = &'p model::ServicePort>,
    ) -> Option<Judgement> {
        let first = self.routes.overruling(route, parent, ports.next()?)?;
        ports.all(|port| self.routes.overruling(route, parent, port).is_some()).then(|| {
            let (first, own) = (first.name(), route.kind.name());
            Judgement::no("Conflicted", format!("the {first}s on the same ports go before every {own}"))
        })
    }

    /// How a Service or ServiceEntry stands with its waypoint; `None` if it is bound to none.
    #[must_use]
    pub fn binding_standing(&self, owner: &ObjectKey) -> Option<Judgement> {
        let all = self.definitions_by(owner).filter_map(|(_, definition)| self.binding_of(owner, definition));
        all.min_by_key(|judgement| judgement.holds)
    }

    /// Whether waypoints enforce a policy, or what else is attached so, for all that it names by `targetRefs`; `None` if it
    /// names nothing so.
    #[must_use]
    pub fn target_standing(&self, policy: &ObjectKey) -> Option<Judgement> {
        let targets = self.policies.targets_of(policy)?;
        let judged = targets.iter().map(|target| self.judge_target(target, policy));
        let missing: Vec<Judgement> = judged.filter(|judgement| !judgement.holds).collect();
        let Some(first) = missing.first() else {
            return Some(Judgement::enforced("all of its targets"));
        };
        let all = missing.iter().map(|judgement| judgement.message.as_str()).collect::<Vec<_>>().join("; ");
        let reason = if missing.len() < targets.len() { "PartiallyInvalid" } else { first.reason };
        Some(Judgement::not_enforced(reason, &all))
    }

    fn judge_target(&self, target: &Target, policy: &ObjectKey) -> Judgement {
        let fine = Judgement::yes("Accepted", "");
        let Some(object) = target.object(&policy.namespace) else {
            let waypoint = Waypoint { namespace: policy.namespace.clone(), name: target.name.clone() };
            if target.kind == TargetKind::GatewayClass {
                let root = &self.policies.settings().root_namespace;
                let message =
                    format!("a policy for a GatewayClass has an effect in the namespace {root} only");
                return if policy.namespace == *root {
                    fine
                } else {
                    Judgement::no("TargetNotFound", message)
                };
            }
            if self.waypoints.contains_key(&waypoint) {
                return fine;
            }
            let message = format!("there is no waypoint {}/{}", waypoint.namespace, waypoint.name);
            return Judgement::no("TargetNotFound", message);
        };
        let name = format!("the {} {}/{}", object.kind.name(), object.namespace, object.name);
        if self.definitions_by(&object).next().is_none() {
            return Judgement::no("TargetNotFound", format!("there is no such thing as {name}"));
        }
        match self.binding_standing(&object) {
            Some(bound) if bound.holds => fine,
            Some(bound) => Judgement::no("AncestorNotBound", format!("{name}: {}", bound.message)),
            None => Judgement::no(
                "AncestorNotBound",
                format!("{name} is bound to no waypoint (label istio.io/use-waypoint)"),
            ),
        }
    }

    /// The services of which an object has the definition in force.
    fn definitions_by<'a>(
        &'a self,
        owner: &ObjectKey,
    ) -> impl Iterator<Item = (&'a ServiceKey, &'a Definition)> {
        let keys = self.made_services.get(owner).map_or(&[][..], Vec::as_slice);
        let owner = owner.clone();
        keys.iter().filter_map(move |key| {
            let (by, definition) = self.services.get(key)?.definitions.first()?;
            (*by == owner).then_some((key, definition))
        })
    }

    fn binding_of(&self, owner: &ObjectKey, definition: &Definition) -> Option<Judgement> {
        let waypoint = self.named_waypoint(owner, &definition.waypoint)?;
        let Waypoint { namespace, name } = waypoint;
        let reason = match self.waypoint_of(owner, definition) {
            Some((_, Ok(_))) if self.is_deployed(waypoint) => {
                return Some(Judgement::yes(
                    "WaypointAccepted",
                    format!("bound to the waypoint {namespace}/{name}"),
                ));
            }
            Some((_, Ok(_))) => {
                let message =
                    format!("the waypoint {namespace}/{name} is not deployed yet: connections are refused");
                return Some(Judgement::no("WaypointIsNotReady", message));
            }
            Some((_, Err(Unbound::Missing))) => "WaypointIsNotReady",
            Some((_, Err(Unbound::NotAllowed))) => "AttachmentDenied",
            Some((_, Err(Unbound::OtherTraffic))) | None => "UnsupportedTrafficType",
        };
        let finding = self.binding_findings(owner, definition);
        let text = |finding: Finding| format!("{} ({})", finding.message, finding.remedy);
        Some(Judgement::no(reason, finding.map(text).unwrap_or_default()))
    }

    /// Whether a waypoint has its Service.
    fn is_deployed(&self, waypoint: &Waypoint) -> bool {
        let service = ObjectKey {
            kind: Kind::Service,
            namespace: waypoint.namespace.clone(),
            name: waypoint.name.clone(),
        };
        self.made_services.contains_key(&service)
    }

    /// Whether what came to `parent` may be led to all that the route names.
    fn references_of(&self, route: &ObjectKey, parent: &Parent) -> Judgement {
        let fine = || Judgement::yes("ResolvedRefs", "all references are resolved");
        let mut wrong: Vec<(&'static str, String)> = Vec::new();
        for draft in self.routes.backends(route) {
            // A port that is not said is reported where the route is read.
            let port = draft.port.unwrap_or_default();
            if let Err(unresolved) = self.resolve(draft, route, Some(parent), port) {
                let reason = match unresolved.why {
                    Why::InvalidKind => "InvalidKind",
                    Why::NotPermitted => "RefNotPermitted",
                    Why::NotFound => "BackendNotFound",
                };
                let entry = (reason, unresolved.to_string());
                if !wrong.contains(&entry) {
                    wrong.push(entry);
                }
            }
        }
        let Some((reason, _)) = wrong.first() else { return fine() };
        let all = wrong.iter().map(|(_, message)| message.as_str()).collect::<Vec<_>>().join("; ");
        Judgement::no(reason, all)
    }

    /// Notes that what hangs on a service, or names it, may stand otherwise.
    pub(super) fn note_standing(&mut self, owner: &ObjectKey) {
        if let Some(parent) = Parent::owner(owner) {
            self.found.extend(self.routes.on(&parent).cloned());
        }
        self.found.extend(self.policies.naming(owner));
        let services = self.definitions_by(owner).map(|(service, _)| service);
        let hosts: Vec<ObjectKey> =
            services.flat_map(|service| self.virtual_services.naming(service)).collect();
        self.found.extend(hosts);
        let waypoint = self
            .definitions_by(owner)
            .find_map(|(_, definition)| self.named_waypoint(owner, &definition.waypoint).cloned());
        let before = match waypoint {
            Some(waypoint) => self.bound.insert(owner.clone(), waypoint.clone()).or(Some(waypoint)),
            None => self.bound.remove(owner),
        };
        if before.is_some() {
            self.found.insert(owner.clone());
        }
    }

    /// Notes that what names a Gateway may stand otherwise.
    pub(super) fn note_gateway(&mut self, waypoint: &Waypoint) {
        let (namespace, name) = (waypoint.namespace.clone(), waypoint.name.clone());
        self.found.extend(self.routes.on(&Parent { kind: ParentKind::Gateway, namespace, name }).cloned());
        self.found.extend(self.policies.for_waypoint(waypoint));
        self.note_bound(waypoint);
    }

    /// Notes that what is bound to a waypoint may stand otherwise: it came, went, or changed.
    pub(super) fn note_bound(&mut self, waypoint: &Waypoint) {
        let bound = self.bound.iter().filter(|(_, to)| *to == waypoint).map(|(owner, _)| owner.clone());
        let bound: Vec<ObjectKey> = bound.collect();
        bound.iter().for_each(|owner| self.note_standing(owner));
    }
}
