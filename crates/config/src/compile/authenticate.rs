//! Which RequestAuthentications hold for a service because they select workloads behind it. Tokens are looked at before
//! it is known which workload takes the request, so one that selects any of them holds for all: it refuses no one who
//! sends no token.

use model::{PolicyKey, ServiceKey, Workload};

use super::Compiler;
use super::index::Id;
use crate::policy::Waypoint;
use crate::resource::ObjectKey;

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

    /// Follows which of them select a workload, which is `new` now.
    pub(super) fn count_authenticated(&mut self, id: Id, new: Option<&Workload>) {
        let Some(record) = self.record(id) else { return };
        let keys =
            new.map(|w| self.policies.authenticating(&w.namespace, &record.labels)).unwrap_or_default();
        if keys.is_empty() && record.authenticated.is_empty() {
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
        if record.authenticated == pairs {
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
        let old = self.record_mut(id).map(|record| std::mem::replace(&mut record.authenticated, pairs));
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
