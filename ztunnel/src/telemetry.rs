//! From what is known of a connection to its metric labels and its line in the access log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::{Service, SpiffeId, Workload};
use process::metrics::tcp::{ConnectionSecurity, Party, Reporter, ServiceLabels, TcpHandle, TcpLabels};

use crate::connections::{Carrier, Direction, Story};

/// The labels of a workload, with its identity where one was proved.
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
        party.workload = w.workload_name.clone();
        party.canonical_service = w.canonical_name.clone();
        party.canonical_revision = w.canonical_revision.clone();
        party.namespace = w.namespace.clone();
        party.cluster = w.cluster.clone();
        party.region = w.locality.region.clone();
        party.zone = w.locality.zone.clone();
    }
    Arc::new(party)
}

fn service_labels(service: Option<&Arc<Service>>) -> ServiceLabels {
    service.map_or_else(ServiceLabels::default, |s| ServiceLabels {
        hostname: s.hostname.clone(),
        name: s.name.clone(),
        namespace: s.namespace.clone(),
    })
}

/// The labels of the connection that `story` tells of.
pub fn labels(story: &Story) -> TcpLabels {
    TcpLabels {
        reporter: reporter(story.direction),
        source: party(story.source_workload.as_ref(), story.source_identity.as_ref()),
        destination: party(story.destination_workload.as_ref(), story.destination_identity.as_ref()),
        service: service_labels(story.destination_service.as_ref()),
        security: match story.carrier {
            Carrier::Hbone => ConnectionSecurity::MutualTls,
            Carrier::Plaintext => ConnectionSecurity::Unknown,
        },
    }
}

/// The labels of a connection of which nothing is known but its direction.
pub fn unknown_labels(direction: Direction) -> TcpLabels {
    TcpLabels {
        reporter: reporter(direction),
        source: Party::unknown(),
        destination: Party::unknown(),
        service: ServiceLabels::default(),
        security: ConnectionSecurity::Unknown,
    }
}

fn reporter(direction: Direction) -> Reporter {
    match direction {
        Direction::Outbound => Reporter::Source,
        Direction::Inbound => Reporter::Destination,
    }
}

/// The metrics of one open connection. What was carried since the last time is added by [`Meter::settle`], which
/// the registry calls now and then and the connection at its end, so that a counter moves while data does.
#[derive(Debug)]
pub struct Meter {
    handle: TcpHandle,
    settled_sent: AtomicU64,
    settled_received: AtomicU64,
}

impl Meter {
    /// Counts the connection as opened.
    pub fn open(handle: TcpHandle) -> Self {
        handle.opened();
        Self { handle, settled_sent: AtomicU64::new(0), settled_received: AtomicU64::new(0) }
    }

    /// Adds what was carried since the last time: `sent` and `received` are totals.
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
