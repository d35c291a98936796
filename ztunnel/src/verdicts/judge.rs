//! Who decides what the kernel may let pass: what decides for connections that this process carries.

use std::sync::Arc;

use futures_util::FutureExt;
use model::{Mesh, NodeLocal, SpiffeId, Workload};
use net::Netns;
use process::shutdown::Phase;

use super::kernel::{Pair, Way};
use super::records::Stories;
use super::table::{self, Judge, Lead};
use crate::connections::Recheck;
use crate::proxy::Proxy;
use crate::proxy::pod::LocalPod;
use crate::proxy::within::Drawn;

/// Both ends of a pair.
pub struct Ends {
    /// The source.
    pub source: Arc<LocalPod>,
    /// Who it is.
    pub source_identity: SpiffeId,
    /// The destination.
    pub destination: Arc<LocalPod>,
    /// Who it is.
    pub destination_identity: SpiffeId,
    /// Whether the destination's policies still allow it.
    pub allowed: Recheck,
    /// Whether it may still go unencrypted, and both ends are who they were.
    pub direct: Recheck,
}

impl table::Ends for Ends {
    fn netns(&self) -> (&Netns, &Netns) {
        (&self.source.netns, &self.destination.netns)
    }
}

impl Judge<Ends, Stories> for Proxy {
    fn against(&self, _pair: &Pair, ends: &Ends) -> Option<String> {
        let mut pods = [&ends.source, &ends.destination].into_iter();
        if let Some(left) = pods.find(|pod| !self.locals.serves(pod)) {
            return Some(format!("the pod {} has left the mesh", left.subject.uid));
        }
        (ends.direct)().or_else(|| (ends.allowed)())
    }

    fn leads(&self, way: &Way, leads: &[Lead<&Ends, &Stories>]) -> bool {
        let vouched = |id: &SpiffeId| self.tls.vouched(id).now_or_never().is_some_and(|now| now.is_ok());
        let may = |ends: &Ends| {
            self.verdicts.may_begin(&ends.source.netns)
                && self.verdicts.may_end(&ends.destination.netns)
                && vouched(&ends.source_identity)
                && vouched(&ends.destination_identity)
        };
        self.shutdown.phase() == Phase::Running
            && leads.iter().all(|lead| may(lead.ends))
            && self.leads_there(way, leads).unwrap_or(false)
    }
}

impl Proxy {
    /// Resolves what is dialled as for a connection that is carried, and sees whether it goes to one of these alone, as often to
    /// each as is said, and as it is told.
    fn leads_there(&self, way: &Way, leads: &[Lead<&Ends, &Stories>]) -> Option<bool> {
        let first = leads.first()?;
        let mesh = self.state.mesh();
        let source = first.ends.source.subject.known(&mesh)?;
        // Of several addresses the kernel may choose another, which has no verdict.
        let mut own = source.addresses.iter().filter(|ip| ip.is_ipv4() == first.pair.to.is_ipv4());
        let source_ip = *own.next()?;
        let drawn = self.drawn(&mesh, (source, source_ip), way.dialled)?;
        let is_one = |lead: &Lead<&Ends, &Stories>| {
            lead.pair.source == source_ip
                && drawn.iter().any(|drawn| is_same(&mesh, source, drawn, lead).unwrap_or(false))
        };
        Some(own.next().is_none() && drawn.len() == leads.len() && leads.iter().all(is_one))
    }
}

/// Whether a verdict is about what is drawn.
fn is_same(mesh: &Mesh, source: &Workload, drawn: &Drawn, lead: &Lead<&Ends, &Stories>) -> Option<bool> {
    let same = |one: &Workload, other: Option<&Arc<Workload>>| {
        other.is_some_and(|other| std::ptr::eq(one, &**other))
    };
    let (Drawn { destination, target, weight }, told) = (drawn, &lead.told.outbound);
    let workload = target.workload.as_ref()?;
    let is_told = same(source, told.source_workload.as_ref())
        && same(workload, told.destination_workload.as_ref())
        && target.service.as_ref().map(Arc::as_ptr) == told.destination_service.as_ref().map(Arc::as_ptr);
    let wanted = mesh.settings().node_local.between(&source.namespace, &workload.namespace);
    Some(
        destination.to == lead.pair.to
            && *weight == lead.weight
            && is_told
            && wanted == NodeLocal::Kernel
            && Arc::ptr_eq(destination.pod(), &lead.ends.destination),
    )
}
