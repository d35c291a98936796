//! What holds for the connections and requests of one destination, and how many there are of each: what a
//! DestinationRule calls its connection pool. All threads share it, and it outlives the endpoints that use it.

use std::sync::Arc;
use std::time::Duration;

use balance::requests::{Budget, Gate};
use model::http::{ConnectionPool, RetryBudget};

/// See the module.
#[derive(Debug)]
pub struct Circuit {
    pool: ConnectionPool,
    budget: Option<Budget>,
    connections: Gate,
    pending: Gate,
    requests: Gate,
    retries: Gate,
}

/// One of what a [`Circuit`] counts, for as long as this lives.
#[derive(Debug)]
pub struct Entered {
    circuit: Arc<Circuit>,
    gate: fn(&Circuit) -> &Gate,
}

impl Drop for Entered {
    fn drop(&mut self) {
        (self.gate)(&self.circuit).leave();
    }
}

/// Leave for a retry.
#[derive(Debug)]
pub struct Retry(#[expect(dead_code, reason = "it counts while it is there")] Entered);

/// What a [`Circuit`] has counted, for metrics and `proxy-config cluster`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CircuitCounts {
    /// Connections that are open or being made.
    pub connections: u32,
    /// Requests that wait for one.
    pub pending: u32,
    /// Requests under way.
    pub requests: u32,
    /// Retries under way.
    pub retries: u32,
    /// Connections that were not made, because there were as many as may be.
    pub connections_refused: u64,
    /// Requests that did not wait, because as many did as may.
    pub pending_refused: u64,
    /// Requests that were refused, because as many were under way as may be.
    pub requests_refused: u64,
    /// Retries that were not made, because as many were under way as may be.
    pub retries_refused: u64,
}

impl Circuit {
    /// With these limits; what they don't limit is limited by the program's own settings alone.
    #[must_use]
    pub fn new(pool: &ConnectionPool, budget: Option<RetryBudget>) -> Arc<Self> {
        let gate = |limit: Option<u32>| Gate::new(limit.unwrap_or(u32::MAX));
        Arc::new(Self {
            pool: pool.clone(),
            budget: budget.map(Budget::new),
            connections: gate(pool.max_connections),
            pending: gate(pool.max_pending_requests),
            requests: gate(pool.max_requests),
            retries: gate(pool.max_retries),
        })
    }

    /// Whether it is what these settings come to.
    #[must_use]
    pub fn is_of(&self, pool: &ConnectionPool, budget: Option<RetryBudget>) -> bool {
        self.pool == *pool && self.budget.as_ref().map(Budget::settings) == budget
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &ConnectionPool {
        &self.pool
    }

    /// Requests under way.
    #[must_use]
    pub fn under_way(&self) -> u32 {
        self.requests.now()
    }

    /// Counts a connection; `always` is for a thread that has none to its endpoint: it gets one whatever the limit is, as
    /// each of Envoy's threads does, since it can't use those of others.
    pub fn connection(self: &Arc<Self>, always: bool) -> Option<Entered> {
        if always {
            self.connections.force();
        } else if !self.connections.enter() {
            return None;
        }
        Some(self.entered(|circuit| &circuit.connections))
    }

    /// Counts a request that waits for a connection.
    pub fn pending(self: &Arc<Self>) -> Option<Entered> {
        self.pending.enter().then(|| self.entered(|circuit| &circuit.pending))
    }

    /// Counts a request. It ends with [`Circuit::request_ended`].
    pub fn request(&self, now: Duration) -> bool {
        let entered = self.requests.enter();
        if let (true, Some(budget)) = (entered, &self.budget) {
            budget.request(now);
        }
        entered
    }

    /// The end of a request that was counted.
    pub fn request_ended(&self) {
        self.requests.leave();
    }

    /// Counts a retry, if one more may be made. With a budget, that is all that limits them.
    pub fn retry(self: &Arc<Self>, now: Duration) -> Option<Retry> {
        let entered = match &self.budget {
            Some(budget) => self.retries.enter_up_to(budget.allowed(now, self.under_way())),
            None => self.retries.enter(),
        };
        entered.then(|| Retry(self.entered(|circuit| &circuit.retries)))
    }

    /// What was counted.
    #[must_use]
    pub fn counts(&self) -> CircuitCounts {
        CircuitCounts {
            connections: self.connections.now(),
            pending: self.pending.now(),
            requests: self.requests.now(),
            retries: self.retries.now(),
            connections_refused: self.connections.refused(),
            pending_refused: self.pending.refused(),
            requests_refused: self.requests.refused(),
            retries_refused: self.retries.refused(),
        }
    }

    fn entered(self: &Arc<Self>, gate: fn(&Self) -> &Gate) -> Entered {
        Entered { circuit: Arc::clone(self), gate }
    }
}
