//! What is said of policies on request, see [`crate::policy::review`].

use model::http::ProviderAddress;
use model::{ServiceKey, Str, StringMatch, TunnelProtocol};

use super::ids::Id;
use super::join::key_of;
use super::{Compiler, Finding, Record};
use crate::kinds::Capture;
use crate::labels::Selector;
use crate::policy::review::{Selected, World};
use crate::resource::ObjectKey;

impl Compiler {
    /// What to say of an object in the light of all that there is, beside what was found.
    #[must_use]
    pub fn review(&self, key: &ObjectKey) -> Vec<Finding> {
        let mut found = self.policies.review(key, self);
        found.extend(self.review_routes(key));
        found.extend(self.at_no_waypoint(key));
        found
    }

    /// The pods that are in the mesh and have annotations on what of their traffic is captured, by their uids.
    pub fn captures(&self) -> impl Iterator<Item = (&Str, &Capture)> {
        self.by_uid.iter().filter(|id| self.is_in_mesh(*id)).filter_map(|id| {
            let record = self.record(id)?;
            Some((&record.workload()?.uid, record.capture()?))
        })
    }

    fn selection(&self, namespace: Option<&Str>, selector: Option<&Selector>) -> impl Iterator<Item = Id> {
        let areas: Vec<_> = match namespace {
            Some(name) => self.areas.get(name).into_iter().collect(),
            None => self.areas.values().collect(),
        };
        let candidates = areas.into_iter().flat_map(move |area| -> Vec<Id> {
            match selector {
                Some(selector) => area.candidates(selector).map(|m| m.iter().collect()).unwrap_or_default(),
                None => area.instances.iter().collect(),
            }
        });
        let selects =
            move |id: &Id| selector.is_none_or(|s| self.record(*id).is_some_and(|r| s.matches(&r.labels)));
        candidates.filter(selects)
    }

    fn is_in_mesh(&self, id: Id) -> bool {
        let compiled = self.record(id).and_then(Record::compiled);
        compiled.is_some_and(|w| w.tunnel == TunnelProtocol::Hbone)
    }
}

impl World for Compiler {
    fn has_namespace(&self, pattern: &StringMatch) -> bool {
        let inhabited = self.areas.iter().filter(|(_, a)| !a.instances.is_empty()).map(|(name, _)| name);
        self.namespaces.iter().chain(inhabited).any(|name| pattern.matches(name))
    }

    fn has_object(&self, object: &ObjectKey) -> bool {
        self.made_services.contains_key(object)
    }

    fn away(&self, address: &ProviderAddress) -> Option<String> {
        let ProviderAddress { namespace, host, port } = address;
        let of = |key: &ServiceKey| {
            key.hostname == *host && namespace.as_ref().is_none_or(|n| *n == key.namespace)
        };
        let found: Vec<_> = self.services.iter().filter(|(key, _)| of(key)).map(|(_, entry)| entry).collect();
        if found.is_empty() {
            return Some(format!("there is no service {host}"));
        }
        let mut ports =
            found.iter().filter_map(|e| e.definitions.first()).flat_map(|(_, d)| &d.service.ports);
        (!ports.any(|p| p.port == *port)).then(|| format!("the service {host} has no port {port}"))
    }

    fn is_closed(&self, object: &ObjectKey) -> bool {
        let services = self.made_services.get(object).into_iter().flatten();
        services.filter_map(|key| self.services.get(key)).any(|entry| {
            // One that is bound leads to its waypoint; what is the matter with that is said of the binding.
            let own = entry.definitions.first().filter(|(by, _)| by == object);
            own.is_some_and(|(by, definition)| self.waypoint_of(by, definition).is_none())
                && entry.emitted.as_ref().is_some_and(|s| s.waypoint.is_some())
        })
    }

    fn left_alone(
        &self,
        namespace: Option<&Str>,
        selector: Option<&Selector>,
    ) -> Option<(ObjectKey, &'static str)> {
        let ids = self.selection(namespace, selector).filter(|id| self.is_in_mesh(*id));
        let pods = ids.filter_map(|id| {
            let record = self.record(id)?;
            let annotation = record.capture()?.leaves_alone(None)?;
            Some((key_of(record.maker, record.workload()?), annotation))
        });
        // The first by name: what is said must not depend on the order of a set.
        pods.min_by(|a, b| a.0.cmp(&b.0))
    }

    fn selected(&self, namespace: Option<&Str>, selector: Option<&Selector>) -> Selected {
        let mut found = Selected::Nothing;
        for id in self.selection(namespace, selector) {
            if self.is_in_mesh(id) {
                return Selected::InMesh;
            }
            found = Selected::Outside;
        }
        found
    }
}
