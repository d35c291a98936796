//! What the connections of one thread share, and the engine's settings.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::http::decide::Decide;
use crate::http::head::RequestHead;
use crate::http::held::{Held, HeldLimits};
use crate::http::io::Buffers;
use crate::http::stats::Stats;
use crate::upstream::pool::{Pool, PoolSettings};

/// What becomes of `X-Forwarded-For`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ForwardedFor {
    /// It is passed on as it came.
    #[default]
    Keep,
    /// The client's address is added.
    Append,
    /// What came is removed, the client's address is put in its place.
    Replace,
}

/// What becomes of fields with an underscore in their name, which some servers take for a hyphen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Underscores {
    /// They are passed on, as Istio does unless told otherwise.
    #[default]
    Allow,
    /// They are removed.
    Drop,
    /// The request is refused with 400.
    Reject,
}

/// Settings of the engine.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Clients' connections of a thread.
    pub max_connections: usize,
    /// For a request's head, from its first byte.
    pub head_timeout: Duration,
    /// For the next request on a connection.
    pub idle_timeout: Duration,
    /// Without a byte of a request that is under way, in either direction, unless its route says otherwise.
    pub stream_idle_timeout: Duration,
    /// For what is still unread when a connection is ended.
    pub linger: Duration,
    /// What is kept of a request's body to send it again.
    pub replay_limit: usize,
    /// Copies of requests under way.
    pub max_mirrors: i64,
    /// What may wait of a request's body for one that gets a copy.
    pub mirror_limit: usize,
    /// Streams at a time on a client's connection of HTTP/2.
    pub max_streams: u32,
    /// What a client may send ahead on a stream.
    pub stream_window: u32,
    /// What a client may send ahead on all streams of a connection.
    pub connection_window: u32,
    /// What becomes of `X-Forwarded-For`.
    pub forwarded_for: ForwardedFor,
    /// Whether the application gets `X-Forwarded-Client-Cert` with the client's identity. What a client sends itself
    /// is removed in either case.
    pub forward_client_cert: bool,
    /// What becomes of fields with an underscore.
    pub underscores: Underscores,
    /// What requests and responses may hold in memory.
    pub held: HeldLimits,
    /// Limits of connections to endpoints.
    pub pool: PoolSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_connections: 65_536,
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(3600),
            stream_idle_timeout: Duration::from_secs(300),
            linger: Duration::from_secs(1),
            replay_limit: 64 * 1024,
            max_mirrors: 1024,
            mirror_limit: 4 << 20,
            max_streams: 128,
            stream_window: 256 * 1024,
            connection_window: 16 << 20,
            forwarded_for: ForwardedFor::default(),
            forward_client_cert: false,
            underscores: Underscores::default(),
            held: HeldLimits::default(),
            pool: PoolSettings::default(),
        }
    }
}

/// Heads that are not in use, so that none is allocated for a request and idle connections have none.
#[derive(Debug, Default)]
pub(crate) struct Heads(Mutex<Vec<RequestHead>>);

/// How many are kept, and how large each may have become.
const HEADS: usize = 64;
const HEAD_SIZE: usize = 8 * 1024;

impl Heads {
    pub(crate) fn take(&self) -> RequestHead {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    pub(crate) fn put(&self, mut head: RequestHead) {
        head.clear();
        let mut heads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if heads.len() < HEADS && head.fields.capacity() <= HEAD_SIZE {
            heads.push(head);
        }
    }
}

/// What the connections of one thread share.
pub struct Worker {
    /// Decides.
    pub decide: Arc<dyn Decide>,
    /// The settings.
    pub settings: Settings,
    /// Connections to endpoints.
    pub pool: Pool,
    /// Counts.
    pub stats: Arc<Stats>,
    /// Cancelled when connections are to end after what is under way on them.
    pub drain: CancellationToken,
    /// What is held in memory, of all threads.
    pub held: Arc<Held>,
    pub(crate) buffers: Buffers,
    pub(crate) heads: Heads,
    random: AtomicU64,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Worker {
    /// For the thread whose runtime this is called on, the only one.
    #[must_use]
    pub fn new(decide: Arc<dyn Decide>, settings: Settings, drain: CancellationToken) -> Arc<Self> {
        Self::beside(decide, settings, drain, Held::new(settings.held))
    }

    /// The same for one of several threads, which share `held`.
    #[must_use]
    pub fn beside(
        decide: Arc<dyn Decide>,
        settings: Settings,
        drain: CancellationToken,
        held: Arc<Held>,
    ) -> Arc<Self> {
        let (buffers, stats) = (Buffers::default(), Arc::new(Stats::default()));
        let pool = Pool::new(settings.pool, buffers.clone(), Arc::clone(&stats));
        let random = AtomicU64::new(RandomState::new().hash_one(0));
        Arc::new(Self {
            decide,
            settings,
            pool,
            stats,
            drain,
            held,
            buffers,
            heads: Heads::default(),
            random,
        })
    }

    /// Buffers that are kept and not in use.
    #[must_use]
    pub fn free_buffers(&self) -> usize {
        self.buffers.len()
    }

    /// A number for pauses, shares and request IDs: well spread, no secret (SplitMix64).
    pub(crate) fn random(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.random.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
