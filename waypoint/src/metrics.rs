//! The metrics of tunnels in and out, beside those of requests (telemetry).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use process::metrics::{Description, Kind, Registry};

use crate::listen::Front;
use crate::tunnels::Tunnels;

/// Registers them.
pub fn register(registry: &Registry, front: &Arc<Front>, tunnels: &Tunnels) {
    let number = |name, help, kind, read: fn(&Front) -> u64| {
        let front = front.clone();
        registry.collect(Description { name, help, kind }, move |out| out.integer(&|_| {}, read(&front)));
    };
    number("culvert_hbone_connections", "HBONE connections that peers opened", Kind::Counter, |f| {
        f.counters.connections.get()
    });
    number("culvert_hbone_connections_open", "Those there are", Kind::Gauge, |f| {
        f.counters.connections_now.get()
    });
    number("culvert_hbone_tunnels_open", "Tunnels that peers have open", Kind::Gauge, |f| {
        f.counters.streams_now.get()
    });
    number(
        "culvert_hbone_connections_refused",
        "HBONE connections refused because there were too many",
        Kind::Counter,
        |f| f.refused.connections.load(Ordering::Relaxed),
    );
    number("culvert_tls_handshakes", "TLS handshakes that succeeded", Kind::Counter, |f| f.tls.handshakes());
    number("culvert_tls_handshakes_failed", "TLS handshakes that failed", Kind::Counter, |f| {
        f.tls.failed_handshakes()
    });
    number(
        "culvert_tunnels_refused_destination",
        "Tunnels refused because nothing of their destination is bound to this waypoint",
        Kind::Counter,
        |f| f.refused.destinations.load(Ordering::Relaxed),
    );
    number(
        "culvert_tunnels_refused_peer",
        "Tunnels refused because their peer is not trusted any more",
        Kind::Counter,
        |f| f.refused.tunnels.load(Ordering::Relaxed),
    );
    number("culvert_tcp_idle_closed", "Connections of bytes ended for idleness", Kind::Counter, |f| {
        f.idle_connections.get()
    });
    number("culvert_accept_failed", "Times that accepting connections failed", Kind::Counter, |f| {
        f.accepts.failed.load(Ordering::Relaxed)
    });
    crate::upstream::metrics::register(registry, front, |front| front.deciding.clusters());
    let pools = tunnels.clone();
    registry.collect(
        Description {
            name: "culvert_hbone_pool_connections_open",
            help: "HBONE connections to destinations",
            kind: Kind::Gauge,
        },
        move |out| {
            let open: usize = pools.pools().iter().map(|pool| pool.snapshot().len()).sum();
            out.integer(&|_| {}, open as u64);
        },
    );
}
