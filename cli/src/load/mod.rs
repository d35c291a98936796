//! A load generator: closed loops, an open loop at a fixed rate, bulk streams and new connections, each from
//! inside a network namespace.
//!
//! Invariants:
//! * one thread and one epoll instance a run, no allocation and three system calls a request: what it costs
//!   itself must not hide what the path under test costs;
//! * the open loop's latencies count from when a request was due, not from when it could be sent, so that a
//!   stall counts for all the requests that it delayed;
//! * every run ends: by its duration, by its stop flag, and by [`GRACE`] where an answer never comes.

mod client;
mod server;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::netns;

pub use server::{EXCHANGE_PORT, SINK_PORT, serve_datagrams, serve_greeting, serve_load};

/// How long after the end of a run an answer is waited for before it counts as lost.
pub const GRACE: Duration = Duration::from_secs(5);

/// The size of a request and of an answer on [`EXCHANGE_PORT`].
pub const EXCHANGE_BYTES: usize = 1024;

/// What is sent and what comes back.
#[derive(Clone, Debug)]
pub enum Talk {
    /// [`EXCHANGE_BYTES`] each way, against [`serve_load`].
    Exchange,
    /// `GET path` with keep-alive, against any HTTP/1.1 server that answers with a Content-Length.
    Http {
        /// The Host header.
        host: String,
        /// The path.
        path: String,
    },
}

/// The form of the load.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// Each connection sends its next request when the answer to the last is there.
    Closed {
        /// How many connections.
        connections: usize,
        /// Whether a connection that fails is opened again (each failure is counted).
        reconnect: bool,
    },
    /// A fixed rate, spread over the connections in turn.
    Open {
        /// How many connections.
        connections: usize,
        /// Requests a second, over all connections.
        rate: u32,
    },
    /// Each connection sends one request, and then nothing until the end.
    Idle {
        /// How many connections.
        connections: usize,
    },
    /// Data in one direction, against [`SINK_PORT`].
    Bulk {
        /// How many streams.
        streams: usize,
    },
    /// A new connection for each request.
    Connects {
        /// How many at a time.
        parallel: usize,
    },
}

/// A run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The namespace that the connections come from; `None` for the caller's own.
    pub namespace: Option<PathBuf>,
    /// Where they go.
    pub target: SocketAddr,
    /// What they say.
    pub talk: Talk,
    /// Their form.
    pub shape: Shape,
    /// How long is measured.
    pub duration: Duration,
    /// How long before that the load runs without being measured.
    pub warm_up: Duration,
}

/// What is known of a run while it goes on.
#[derive(Debug, Default)]
pub struct Live {
    /// Requests answered.
    pub answered: AtomicU64,
    /// Requests and connections that failed.
    pub failed: AtomicU64,
    /// Connections opened.
    pub opened: AtomicU64,
    stop: AtomicBool,
}

impl Live {
    /// Ends the run soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Requests answered so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// What came of a run.
pub struct Outcome {
    /// Requests answered in the measured time.
    pub requests: u64,
    /// Requests answered at any time, the warm-up included.
    pub answered: u64,
    /// Connections opened in all.
    pub connections: u64,
    /// Bytes that the sink had received, for [`Shape::Bulk`].
    pub bytes: u64,
    /// The measured time.
    pub elapsed: Duration,
    /// What failed, and how often.
    pub failures: BTreeMap<String, u64>,
    /// Latencies in nanoseconds; of connect and request together for [`Shape::Connects`].
    pub latency: Histogram<u64>,
}

impl Outcome {
    /// Requests a second.
    pub fn rate(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// Gigabits a second.
    pub fn gigabits(&self) -> f64 {
        self.bytes as f64 * 8.0 / 1e9 / self.elapsed.as_secs_f64()
    }

    /// A quantile of the latencies, in microseconds.
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1000.0
    }

    /// How many requests and connections failed.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// The failures as one line, for people.
    pub fn failures_shown(&self) -> String {
        let list: Vec<_> = self.failures.iter().map(|(what, n)| format!("{n} x {what}")).collect();
        if list.is_empty() { "none".to_owned() } else { list.join(", ") }
    }
}

/// A run that goes on in the background.
#[derive(Debug)]
pub struct Running {
    live: Arc<Live>,
    thread: Option<JoinHandle<io::Result<Outcome>>>,
}

impl Running {
    /// The counters so far.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// Ends the run and returns what came of it.
    ///
    /// # Errors
    /// As [`run`].
    pub fn finish(mut self) -> io::Result<Outcome> {
        self.live.stop();
        self.join()
    }

    fn join(&mut self) -> io::Result<Outcome> {
        let gone = || Err(io::Error::other("the load generator's thread is gone"));
        self.thread.take().map_or_else(gone, |thread| thread.join().unwrap_or_else(|_| gone()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.live.stop();
    }
}

/// Starts a run on a thread of its own.
///
/// # Errors
/// No thread can be made.
pub fn start(plan: Plan) -> io::Result<Running> {
    let live = Arc::new(Live::default());
    let seen = live.clone();
    let thread = std::thread::Builder::new().name("load".to_owned()).spawn(move || {
        netns::run_in(plan.namespace.as_deref(), || netns::block_on(client::drive(&plan, &seen)))??
    })?;
    Ok(Running { live, thread: Some(thread) })
}

/// How long a connect and one request take, from the namespace of `plan`; its form and times don't count.
///
/// # Errors
/// Either fails.
pub fn once(plan: &Plan) -> io::Result<Duration> {
    netns::run_in(plan.namespace.as_deref(), || netns::block_on(client::once(plan)))??
}

/// Runs `plan` to its end.
///
/// # Errors
/// The namespace can't be entered, or not one connection could be made.
pub fn run(plan: Plan) -> io::Result<Outcome> {
    start(plan)?.join()
}
