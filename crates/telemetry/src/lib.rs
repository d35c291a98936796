//! From what is known of a connection's ends to the labels of its metrics: what the node proxy and the waypoint tell
//! alike.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::{Service, SpiffeId, Workload};
use process::metrics::tcp::{Party, ServiceLabels, TcpHandle};

/// The labels of a workload, with its identity where one was proved.
#[must_use]
pub fn party(workload: Option<&Arc<Workload>>, identity: Option<&SpiffeId>) -> Arc<Party> {
    if workload.is_none() && identity.is_none() {
        return Party::unknown();
    }
    let mut party = Party::default();
    if let Some(identity) = identity {
        party.principal = identity.to_string().into();
        party.namespace = identity.namespace().clone();
    }
    if let Some(w) = workload {
        party.workload = w.shared_workload_name();
        party.canonical_service = w.shared_canonical_name();
        party.canonical_revision = w.canonical_revision.clone();
        party.namespace = w.namespace.clone();
        party.cluster = w.cluster.clone();
        party.region = w.locality.region.clone();
        party.zone = w.locality.zone.clone();
    }
    Arc::new(party)
}

/// The labels of a service.
#[must_use]
pub fn service_labels(service: Option<&Arc<Service>>) -> ServiceLabels {
    service.map_or_else(ServiceLabels::default, |s| ServiceLabels {
        hostname: s.hostname.clone(),
        name: s.name.clone(),
        namespace: s.namespace.clone(),
    })
}

/// The metrics of one open connection. What was carried since the last time is added by [`Meter::settle`], which its
/// owner calls now and then and at its end, so that a counter moves while data does.
#[derive(Debug)]
pub struct Meter {
    handle: TcpHandle,
    settled_sent: AtomicU64,
    settled_received: AtomicU64,
}

impl Meter {
    /// Counts the connection as opened.
    #[must_use]
    pub fn open(handle: TcpHandle) -> Self {
        handle.opened();
        Self { handle, settled_sent: AtomicU64::new(0), settled_received: AtomicU64::new(0) }
    }

    /// Adds what was carried since the last time: `sent` (by the client) and `received` are totals.
    pub fn settle(&self, sent: u64, received: u64) {
        let new = |settled: &AtomicU64, total: u64| {
            total.saturating_sub(settled.fetch_max(total, Ordering::Relaxed))
        };
        self.handle.from_client(new(&self.settled_sent, sent));
        self.handle.from_server(new(&self.settled_received, received));
    }

    /// Counts the connection as closed.
    pub fn close(&self, sent: u64, received: u64) {
        self.settle(sent, received);
        self.handle.closed();
    }
}
