//! What the engine of one thread has done, for metrics.

use process::metrics::{Counter, Gauge};

/// Counts of one thread.
#[derive(Debug, Default)]
pub struct Stats {
    /// Connections that clients made.
    pub connections: Counter,
    /// Those there are.
    pub connections_now: Gauge,
    /// Those closed at once, because there were too many.
    pub connections_refused: Counter,
    /// TLS handshakes that failed or took too long.
    pub handshakes_failed: Counter,
    /// Tunnels that were not taken.
    pub tunnels_refused: Counter,
    /// Requests whose head came.
    pub requests: Counter,
    /// Those under way.
    pub requests_now: Gauge,
    /// Requests refused because they were no HTTP, or too large.
    pub requests_refused: Counter,
    /// Clients that did not send their request's head in time.
    pub heads_timed_out: Counter,
    /// Connections ended because nothing was sent on them for long.
    pub idle_closed: Counter,
    /// Requests that were sent again.
    pub retries: Counter,
    /// Retries that were not made because the body was too large to be kept.
    pub retries_without_body: Counter,
    /// Retries that were not made because there were as many as may be.
    pub retries_over_budget: Counter,
    /// Copies sent.
    pub mirrored: Counter,
    /// Copies that were not sent, because too many were under way.
    pub mirrors_dropped: Counter,
    /// Copies that were given up, because their destination took them too slowly.
    pub mirrors_cut: Counter,
    /// Copies that were not answered.
    pub mirrors_failed: Counter,
    /// Copies under way.
    pub mirrors_now: Gauge,
    /// Connections made to endpoints.
    pub upstream_connections: Counter,
    /// Those there are.
    pub upstream_connections_now: Gauge,
    /// Attempts to connect that failed.
    pub connects_failed: Counter,
    /// Requests refused because an endpoint had as many connections as it may.
    pub pool_overflows: Counter,
}
