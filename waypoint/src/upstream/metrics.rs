//! What is counted of destinations, as metrics.

use std::sync::Arc;

use process::metrics::{Description, Kind, Registry};

use crate::upstream::clusters::{ClusterInfo, ClusterStats, Clusters};

/// Destinations that have series of their own; those of more are in the sums alone.
const MAX_SERIES: usize = 1000;

/// Registers them. `clusters` finds the clusters behind what is shared.
pub fn register<T: Send + Sync + 'static>(
    registry: &Registry,
    shared: &Arc<T>,
    clusters: fn(&T) -> &Clusters,
) {
    let count = |name, help, read: fn(&ClusterStats) -> u64| {
        let shared = Arc::clone(shared);
        registry.collect(Description { name, help, kind: Kind::Counter }, move |out| {
            out.integer(&|_| {}, read(clusters(&shared).stats()));
        });
    };
    count("culvert_upstream_picks", "Choices of endpoints", |s| s.picks.get());
    count("culvert_upstream_no_endpoint", "Requests for which there was no endpoint", |s| s.none.get());
    count("culvert_upstream_overflow", "Requests refused by a limit of their destination", |s| {
        s.overflows.get()
    });
    count("culvert_upstream_ejections", "Endpoints left out because they failed", |s| s.ejections.get());
    count(
        "culvert_upstream_ejections_over_limit",
        "Endpoints that failed and were not left out, because too many were",
        |s| s.ejections_over_limit.get(),
    );
    count("culvert_upstream_built", "Times that endpoints of a destination were sorted", |s| s.built.get());
    count("culvert_upstream_names_failed", "Host names of endpoints that were not found", |s| {
        s.names_failed.get()
    });
    count("culvert_upstream_tls_failed", "TLS handshakes with servers that failed", |s| {
        s.handshakes_failed.get()
    });
    count(
        "culvert_upstream_originals_forgotten",
        "Times that dialled addresses were forgotten because there were too many",
        |s| s.originals_forgotten.get(),
    );
    let all = Arc::clone(shared);
    let description = Description {
        name: "culvert_clusters",
        help: "Destinations that requests were sent to",
        kind: Kind::Gauge,
    };
    registry.collect(description, move |out| out.integer(&|_| {}, clusters(&all).len() as u64));
    let each = |name, help, kind, read: fn(&ClusterInfo) -> u64| {
        let shared = Arc::clone(shared);
        registry.collect(Description { name, help, kind }, move |out| {
            for info in clusters(&shared).totals().into_iter().take(MAX_SERIES) {
                let cluster = info.backend.to_string();
                out.integer(&|labels| labels.pair("cluster", &cluster), read(&info));
            }
        });
    };
    let gauge = Kind::Gauge;
    each("culvert_cluster_endpoints", "Endpoints that take requests", gauge, |c| c.eligible);
    each("culvert_cluster_endpoints_healthy", "Those that are not left out", gauge, |c| c.healthy);
    each("culvert_cluster_requests_active", "Requests under way", gauge, |c| u64::from(c.circuit.requests));
    each("culvert_cluster_connections", "Connections there are", gauge, |c| u64::from(c.circuit.connections));
    each("culvert_cluster_pending", "Requests that wait for one", gauge, |c| u64::from(c.circuit.pending));
    each("culvert_cluster_refused", "Requests and retries refused by limits", Kind::Counter, |c| {
        c.circuit.pending_refused + c.circuit.requests_refused + c.circuit.retries_refused
    });
}
