//! Which RequestAuthentications hold for a service, also because they select workloads behind it. Tokens are looked at before
//! it is known which workload takes the request, so one that selects any of them holds for all: it refuses no one who
//! sends no token.

use model::{PolicyKey, ServiceKey, Workload};

use super::ids::Id;
use super::{Compiler, Finding};
use crate::diagnostic::Code;
use crate::policy::Waypoint;
use crate::resource::{Kind, ObjectKey};

impl Compiler {
    /// The RequestAuthentications that hold for a service, which an object defines, at its waypoint.
    pub(super) fn authentication(
        &self,
        owner: &ObjectKey,
        service: &ServiceKey,
        waypoint: &Waypoint,
    ) -> Box<[PolicyKey]> {
        let mut keys = self.policies.authentications(owner, waypoint);
        keys.extend(self.authenticated.get(service).into_iter().flat_map(|counts| counts.keys().cloned()));
        keys.sort_unstable();
        keys.dedup();
        keys.into()
    }

    /// What to say of what only waypoints act on, where none is before what it is for.
    pub(super) fn at_no_waypoint(&self, key: &ObjectKey) -> Option<Finding> {
        let name = PolicyKey { namespace: key.namespace.clone(), name: key.name.clone() };
        let mut services = self.http_services.values();
        let (listed, message) = match key.kind {
            Kind::RequestAuthentication => (
                services.any(|service| service.authentication.contains(&name)),
                "no service that it is for is bound to a waypoint: nobody looks at tokens, and policies that ask for \
                 one let nobody in",
            ),
            Kind::RateLimit => (
                services.any(|service| service.rate_limits.contains(&name)),
                "no service that it is for is bound to a waypoint: nobody counts requests",
            ),
            _ => return None,
        };
        let remedy = "bind the service, or its namespace, to a waypoint (istio.io/use-waypoint)".to_owned();
        (!listed).then(|| Finding { code: Code::WithoutEffect, message: message.to_owned(), remedy })
    }

    /// Follows which of them select a workload, which is `new` now.
    pub(super) fn count_authenticated(&mut self, id: Id, new: Option<&Workload>) {
        let Some(record) = self.record(id) else { return };
        let keys =
            new.map(|w| self.policies.authenticating(&w.namespace, &record.labels)).unwrap_or_default();
        if keys.is_empty() && record.authenticated().is_empty() {
            return;
        }
        let mut pairs = Vec::new();
        for key in keys {
            let own = new
                .into_iter()
                .flat_map(|w| w.services.iter().filter(|m| m.service.namespace == w.namespace));
            pairs.extend(own.map(|m| (m.service.clone(), key.clone())));
        }
        let pairs: Box<[(ServiceKey, PolicyKey)]> = pairs.into();
        if *record.authenticated() == *pairs {
            return;
        }
        for (service, key) in &pairs {
            let count =
                self.authenticated.entry(service.clone()).or_default().entry(key.clone()).or_default();
            *count += 1;
            if *count == 1 {
                self.dirty_services.insert(service.clone());
            }
        }
        let old = self.record_mut(id).map(|record| record.set_authenticated(pairs));
        self.forget_authenticated(&old.unwrap_or_default());
    }

    /// Takes back what was counted.
    pub(super) fn forget_authenticated(&mut self, old: &[(ServiceKey, PolicyKey)]) {
        for (service, key) in old {
            let Some(counts) = self.authenticated.get_mut(service) else { continue };
            let Some(count) = counts.get_mut(key) else { continue };
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.remove(key);
                if counts.is_empty() {
                    self.authenticated.remove(service);
                }
                self.dirty_services.insert(service.clone());
            }
        }
    }
}
