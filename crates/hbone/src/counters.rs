//! What servers and pools have done, for metrics. All counts only grow, except those that say "now".

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that anyone may read while it is counted.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The number now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn up(&self) {
        self.add(1);
    }

    pub(crate) fn down(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts of all connections served with the same counters.
#[derive(Debug, Default)]
pub struct ServerCounters {
    /// Connections that began HTTP/2.
    pub connections: Counter,
    /// Connections now.
    pub connections_now: Counter,
    /// Connections that did not begin HTTP/2: not the protocol, or too slow.
    pub handshakes_failed: Counter,
    /// CONNECT requests handed to the handler.
    pub requests: Counter,
    /// Requests refused here with 400: not CONNECT, or no valid destination.
    pub bad_requests: Counter,
    /// Streams refused because the handler had too many open already.
    pub over_limit: Counter,
    /// Requests and tunnels now.
    pub streams_now: Counter,
    /// Requests that the client gave up before they were answered.
    pub early_resets: Counter,
    /// Connections ended because of a flood.
    pub floods: Counter,
    /// Connections ended because the peer broke the protocol.
    pub protocol_errors: Counter,
    /// Connections ended because a PING was not answered.
    pub ping_timeouts: Counter,
    /// Connections ended because they had no streams for long.
    pub idle_closed: Counter,
}

/// Counts of a pool.
#[derive(Debug, Default)]
pub struct PoolCounters {
    /// Connections made.
    pub connections: Counter,
    /// Connections now.
    pub connections_now: Counter,
    /// Connections being made now.
    pub connecting_now: Counter,
    /// Attempts to connect that failed, those that took too long included.
    pub connects_failed: Counter,
    /// Attempts to connect that took too long.
    pub connects_timed_out: Counter,
    /// Connections made to spread the load of a busy peer.
    pub spread: Counter,
    /// Streams opened.
    pub streams: Counter,
    /// Streams now.
    pub streams_now: Counter,
    /// Streams opened on a connection that was there already.
    pub reused: Counter,
    /// Callers waiting for a connection now.
    pub waiting_now: Counter,
    /// Callers turned away because too many waited or too many connections were open.
    pub overloaded: Counter,
    /// Callers that waited too long for a free stream.
    pub queue_timed_out: Counter,
    /// Requests that no response came to in time.
    pub responses_timed_out: Counter,
    /// Requests sent again on another connection, because the first had not processed them.
    pub retried: Counter,
    /// Requests answered with another status than 200.
    pub refused: Counter,
    /// Connections that announced their end with GOAWAY while the pool used them.
    pub going_away: Counter,
    /// Connections ended because a PING was not answered.
    pub ping_timeouts: Counter,
    /// Connections ended because they had no streams for long.
    pub idle_closed: Counter,
    /// Idle connections ended to make room for others.
    pub evicted: Counter,
    /// Connections retired because of their key.
    pub retired: Counter,
    /// Connections aborted because of their key.
    pub aborted: Counter,
}
