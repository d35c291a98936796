//! The engine's own metrics: read from where each thread keeps its numbers when somebody scrapes.

use std::sync::Arc;

use process::metrics::{Description, Kind, Registry};

use crate::http::held::Held;
use crate::http::stats::Stats;

/// Registers the metrics of the engine's threads, and of what they share.
pub fn register_engine(registry: &Registry, threads: &[Arc<Stats>], held: &Arc<Held>) {
    let of_all = |name, help, kind, read: fn(&Held) -> u64| {
        let held = Arc::clone(held);
        registry.collect(Description { name, help, kind }, move |out| out.integer(&|_| {}, read(&held)));
    };
    let help = "Bytes of requests and responses that wait for somebody to take them";
    of_all("culvert_held_bytes", help, Kind::Gauge, |held| held.bytes() as u64);
    let help = "Bytes of requests that wait for those who get copies";
    of_all("culvert_mirrors_held_bytes", help, Kind::Gauge, |held| held.bytes_of_copies() as u64);
    of_all(
        "culvert_requests_refused_for_memory",
        "Requests refused because too much of their client, or of all, waits in memory",
        Kind::Counter,
        |held| held.refused.get(),
    );
    of_all("culvert_requests_cut_for_memory", "Requests that were ended for that", Kind::Counter, |held| {
        held.cut.get()
    });
    let number = |name, help, kind, read: fn(&Stats) -> i64| {
        let threads = threads.to_vec();
        registry.collect(Description { name, help, kind }, move |out| {
            out.integer(&|_| {}, threads.iter().map(|stats| read(stats)).sum::<i64>());
        });
    };
    macro_rules! counters {
        ($($name:literal $help:literal $field:ident;)*) => {
            $(number($name, $help, Kind::Counter, |stats| i64::try_from(stats.$field.get()).unwrap_or(i64::MAX));)*
        };
    }
    macro_rules! gauges {
        ($($name:literal $help:literal $field:ident;)*) => {
            $(number($name, $help, Kind::Gauge, |stats| stats.$field.get());)*
        };
    }
    counters! {
        "culvert_client_connections" "Connections that clients made" connections;
        "culvert_client_connections_refused" "Connections closed because there were too many" connections_refused;
        "culvert_client_connections_idle_closed" "Connections closed for idleness" idle_closed;
        "culvert_client_handshakes_failed" "TLS handshakes that failed or took too long" handshakes_failed;
        "culvert_tunnels_refused" "Tunnels that were not taken" tunnels_refused;
        "culvert_requests" "Requests whose head came" requests;
        "culvert_request_heads_refused" "Requests refused as no HTTP, or as too large" requests_refused;
        "culvert_request_heads_timed_out" "Clients that did not send a request's head in time" heads_timed_out;
        "culvert_retries" "Requests that were sent again" retries;
        "culvert_retries_without_body" "Retries not made because the body was too large to be kept" retries_without_body;
        "culvert_retries_over_budget" "Retries not made because there were as many as may be" retries_over_budget;
        "culvert_mirrored" "Copies of requests that were sent" mirrored;
        "culvert_mirrors_dropped" "Copies of requests that were not sent, because too many were under way" mirrors_dropped;
        "culvert_mirrors_cut" "Copies of requests that were given up, because their destination took them too slowly" mirrors_cut;
        "culvert_mirrors_failed" "Copies of requests that were not answered" mirrors_failed;
        "culvert_upstream_connections" "Connections made to endpoints" upstream_connections;
        "culvert_upstream_connects_failed" "Attempts to connect to an endpoint that failed" connects_failed;
        "culvert_upstream_overflows" "Requests refused because of a limit of connections or requests" pool_overflows;
    }
    gauges! {
        "culvert_client_connections_open" "Clients' connections there are" connections_now;
        "culvert_requests_active" "Requests under way" requests_now;
        "culvert_mirrors_active" "Copies of requests under way" mirrors_now;
        "culvert_upstream_connections_open" "Connections to endpoints there are" upstream_connections_now;
    }
}
