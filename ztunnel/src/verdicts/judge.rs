//! Who decides what the kernel may let pass: what decides for connections that this process carries.

use std::sync::Arc;

use futures_util::FutureExt;
use model::{NodeLocal, OriginalDst, SpiffeId, Workload};
use net::Netns;
use process::shutdown::Phase;

use super::kernel::{Pair, Way};
use super::records::Stories;
use super::table::{self, Judge};
use crate::connections::Recheck;
use crate::proxy::Proxy;
use crate::proxy::pod::LocalPod;
use crate::proxy::resolve::{Context, Route};

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

    fn leads(&self, way: &Way, pair: &Pair, ends: &Ends, told: &Stories) -> bool {
        let vouched = |id: &SpiffeId| self.tls.vouched(id).now_or_never().is_some_and(|now| now.is_ok());
        self.shutdown.phase() == Phase::Running
            && self.verdicts.may_begin(&ends.source.netns)
            && self.verdicts.may_end(&ends.destination.netns)
            && vouched(&ends.source_identity)
            && vouched(&ends.destination_identity)
            && self.leads_there(way, pair, ends, told).unwrap_or(false)
    }
}

impl Proxy {
    /// Resolves what is dialled as for a connection that is carried, and sees whether it can only go there, as it is told.
    fn leads_there(&self, way: &Way, pair: &Pair, ends: &Ends, told: &Stories) -> Option<bool> {
        let same = |one: &Workload, other: Option<&Arc<Workload>>| {
            other.is_some_and(|other| std::ptr::eq(one, &**other))
        };
        let told = &told.outbound;
        let mesh = self.state.mesh();
        let source = ends.source.subject.known(&mesh)?;
        // Of several addresses the kernel may choose another, which has no verdict.
        let mut own = source.addresses.iter().filter(|ip| ip.is_ipv4() == pair.to.is_ipv4());
        let source_ip = *own.next()?;
        let context = Context {
            mesh: &mesh,
            balancer: &self.balancer,
            source,
            source_ip,
            tried: &[],
            now: self.started.elapsed(),
            random: 0,
        };
        let route = context.resolve(OriginalDst::new(way.dialled)).ok()?;
        let Route::Within { destination, target } = self.shortened(&mesh, (source, source_ip), route) else {
            return None;
        };
        let workload = target.workload.as_ref()?;
        let is_only = match &target.service {
            // Where there are several, each connection is to be another choice.
            Some(service) => mesh.endpoints(&service.key())?.as_slice().len() == 1,
            None => true,
        };
        let is_told = same(source, told.source_workload.as_ref())
            && same(workload, told.destination_workload.as_ref())
            && target.service.as_ref().map(Arc::as_ptr) == told.destination_service.as_ref().map(Arc::as_ptr);
        let wanted = mesh.settings().node_local.between(&source.namespace, &workload.namespace);
        Some(
            own.next().is_none()
                && source_ip == pair.source
                && is_only
                && is_told
                && wanted == NodeLocal::Kernel
                && destination.to == pair.to
                && Arc::ptr_eq(destination.pod(), &ends.destination),
        )
    }
}
