//! The pods whose traffic this process carries, found by who they are.
//!
//! A pod is here from the moment in which it is enrolled, listeners and redirection, to that in which it is let go.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};

use model::{Mesh, Str, Workload};
use net::{Netns, NetnsId};

use super::pod::LocalPod;

/// The pods, by the uid of their workload. For a moment one of the same name may be here twice: before it is let go, and
/// after it began anew.
#[derive(Debug, Default)]
pub struct Locals(RwLock<HashMap<Str, Vec<Arc<LocalPod>>>>);

/// A pod's place among them, until dropped.
#[derive(Debug)]
pub struct Served {
    locals: Arc<Locals>,
    pod: Arc<LocalPod>,
}

impl Locals {
    /// Enters a pod.
    pub fn enter(self: &Arc<Self>, pod: Arc<LocalPod>) -> Served {
        let mut pods = self.0.write().unwrap_or_else(PoisonError::into_inner);
        pods.entry(pod.subject.uid.clone()).or_default().push(pod.clone());
        Served { locals: self.clone(), pod }
    }

    /// Lets go of what was made in advance for pods that don't need it now.
    pub fn tidy(&self) {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pods.values().flatten().for_each(|pod| pod.netns.tidy());
    }

    /// The pod that is `workload`, is served under its address `ip`, and really has it: a connection that is made there
    /// from inside the pod's namespace ends in the pod.
    pub fn find(&self, mesh: &Mesh, workload: &Workload, ip: IpAddr) -> Option<Arc<LocalPod>> {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let same = |pod: &&Arc<LocalPod>| {
            let known = pod.subject.destination(mesh, ip);
            known.is_ok_and(|known| known.uid == workload.uid) && pod.has_address(ip)
        };
        // The one that came last: another of its name is about to be let go.
        pods.get(&workload.uid)?.iter().rev().find(same).cloned()
    }

    /// Whether the pod is here.
    pub fn serves(&self, pod: &Arc<LocalPod>) -> bool {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pods.get(&pod.subject.uid).is_some_and(|list| list.iter().any(|other| Arc::ptr_eq(other, pod)))
    }

    /// Whether a pod is here that lives in this namespace.
    pub fn serves_in(&self, netns: NetnsId) -> bool {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pods.values().flatten().any(|pod| pod.netns.id() == netns)
    }

    /// Where the pods live.
    pub fn namespaces(&self) -> Vec<Netns> {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pods.values().flatten().map(|pod| pod.netns.clone()).collect()
    }

    /// The pod whose address is `ip`.
    pub fn at(&self, mesh: &Mesh, ip: IpAddr) -> Option<Arc<LocalPod>> {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let has = |pod: &&Arc<LocalPod>| {
            pod.subject.known(mesh).is_some_and(|workload| workload.addresses.contains(&ip))
        };
        pods.values().flatten().find(has).cloned()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let mut pods = self.locals.0.write().unwrap_or_else(PoisonError::into_inner);
        let uid = &self.pod.subject.uid;
        if let Some(list) = pods.get_mut(uid) {
            list.retain(|other| !Arc::ptr_eq(other, &self.pod));
            if list.is_empty() {
                pods.remove(uid);
            }
        }
        // Connections that go on hold the namespace, and need none.
        self.pod.netns.clear_stock();
    }
}
