//! The client's side: a pool of secured connections, keyed by who connects to whom.
//!
//! ```text
//!   open(key) ─▶ Slot of the key ─▶ a usable Link with a free stream ──────────────▶ CONNECT
//!                     │ none                             ▲
//!                     └─▶ one attempt to connect for all who wait, or a stream that ends
//! ```
//!
//! Invariants:
//! * per key one attempt to connect at a time, with a time limit; keys never wait for each other;
//! * a link that has reached its limit of streams is used again as soon as one ends;
//! * a link made with credentials that were retired while it was being made is never used;
//! * a slot exists only while it has links, an attempt or callers.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::{BuildHasherDefault, DefaultHasher, Hash};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use net::Io;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::counters::PoolCounters;
use crate::link::{self, Driver, Ended, Link};
use crate::open::{OpenError, TRIES};
use crate::settings::PoolSettings;
use crate::tunnel::{Ticket, TunnelError};

/// Makes the secured connections of a pool.
pub trait Connector: Send + Sync + 'static {
    /// What connections may be shared by: the source's identity, the destinations' identities, the source address and
    /// the destination's address. Two tunnels share a connection only if their keys are equal.
    type Key: Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static;
    /// A secured connection, its handshake done and the peer's identity checked against the key.
    type Io: Io + 'static;
    /// What callers want to know of the connection's peer, such as the identity that it has proved.
    type Peer: Clone + Send + Sync + 'static;
    /// Why no connection could be made.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Connects and secures. The pool limits the time and runs it in a task of its own.
    fn connect(
        &self,
        key: &Self::Key,
    ) -> impl Future<Output = Result<(Self::Io, Self::Peer), Self::Error>> + Send;
}

/// Why a pool has no connection to a peer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError<E: std::error::Error + 'static> {
    /// The connector failed.
    #[error(transparent)]
    Connector(E),
    /// Connecting and securing took too long.
    #[error("no secured connection within {0:?}")]
    Timeout(Duration),
    /// HTTP/2 could not begin on the secured connection.
    #[error("HTTP/2 did not begin: {0}")]
    Http2(String),
    /// As many connections are open as the pool may have, and none is idle.
    #[error("the pool has reached its limit of {0} connections")]
    TooManyConnections(usize),
}

/// A pool of connections. Clones are handles to the same pool.
pub struct Pool<C: Connector>(Arc<Inner<C>>);

impl<C: Connector> Clone for Pool<C> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// All keys and what there is for them. Without random seeds, so that a simulation can be replayed; keys come from the
/// mesh's own configuration, nobody outside chooses them.
type Slots<C> = HashMap<<C as Connector>::Key, Arc<Slot<C>>, BuildHasherDefault<DefaultHasher>>;

struct Inner<C: Connector> {
    connector: C,
    settings: PoolSettings,
    counters: Arc<PoolCounters>,
    slots: Mutex<Slots<C>>,
    /// Connections that are open or being made.
    seats: AtomicUsize,
}

/// All there is for one key. The map's lock is never taken while a slot's is held.
struct Slot<C: Connector> {
    key: C::Key,
    state: Mutex<State<C>>,
    freed: Arc<Notify>,
}

struct State<C: Connector> {
    members: Vec<Member<C::Peer>>,
    attempt: Option<Attempt<C::Error>>,
    /// Connections in a row that ended before a stream was opened on them, and how the last one did.
    stillborn: (u32, String),
    /// Callers inside [`Pool::link`].
    callers: usize,
    /// The slot is no longer in the map.
    removed: bool,
}

struct Member<P> {
    link: Arc<Link<P>>,
    meter: Meter,
}

/// How an attempt to connect has ended.
enum Verdict<E: std::error::Error + 'static> {
    Connected,
    Failed(Arc<ConnectError<E>>),
    /// The key was retired meanwhile, or the connector panicked.
    Stopped,
}

/// Empty until the attempt has ended.
type VerdictCell<E> = Arc<OnceLock<Verdict<E>>>;

struct Attempt<E: std::error::Error + 'static> {
    /// Set before those who wait for the slot are told.
    verdict: VerdictCell<E>,
    task: AbortHandle,
}

/// Bytes a second on a link, over at least a tenth of a second.
struct Meter {
    at: Instant,
    bytes: u64,
    rate: u64,
}

impl Meter {
    fn new() -> Self {
        Self { at: Instant::now(), bytes: 0, rate: 0 }
    }

    fn rate(&mut self, now: Instant, bytes: u64) -> u64 {
        let millis = u64::try_from(now.saturating_duration_since(self.at).as_millis()).unwrap_or(u64::MAX);
        if millis >= 100 {
            self.rate = bytes.saturating_sub(self.bytes).saturating_mul(1000) / millis;
            (self.at, self.bytes) = (now, bytes);
        }
        self.rate
    }
}

/// A link on which a stream is reserved.
pub(crate) struct Reserved<P> {
    pub(crate) link: Arc<Link<P>>,
    pub(crate) ticket: Ticket,
    /// Whether streams had been opened on it before.
    pub(crate) reused: bool,
}

/// One connection, as [`Pool::snapshot`] shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConnectionInfo<K> {
    /// Whose it is.
    pub key: K,
    /// Streams open now.
    pub streams: usize,
    /// Whether it only finishes its streams.
    pub retired: bool,
    /// Bytes that its tunnels carried, both ways.
    pub bytes: u64,
}

impl<C: Connector> Pool<C> {
    /// An empty pool. Connections are driven by tasks of the runtime that [`Pool::open`] is called in.
    #[must_use]
    pub fn new(connector: C, settings: PoolSettings) -> Self {
        Self(Arc::new(Inner {
            connector,
            settings,
            counters: Arc::default(),
            slots: Mutex::default(),
            seats: AtomicUsize::new(0),
        }))
    }

    /// What the pool has done.
    #[must_use]
    pub fn counters(&self) -> &PoolCounters {
        &self.0.counters
    }

    /// What makes its connections.
    #[must_use]
    pub fn connector(&self) -> &C {
        &self.0.connector
    }

    pub(crate) fn settings(&self) -> &PoolSettings {
        &self.0.settings
    }

    /// Uses the connections of all matching keys no more: their streams may finish, new ones get new connections.
    /// For rotated certificates and exchanged trust bundles. Returns how many were in use.
    pub fn retire(&self, matches: impl Fn(&C::Key) -> bool) -> usize {
        let retired = self.0.each_matching(matches, |state| {
            state.stop_attempt();
            state.members.iter().filter(|member| member.link.retire()).count()
        });
        self.0.counters.retired.add(retired as u64);
        retired
    }

    /// Ends all connections of matching keys with their streams, retired ones included. Returns how many.
    pub fn abort(&self, matches: impl Fn(&C::Key) -> bool) -> usize {
        let aborted = self.0.each_matching(matches, |state| {
            state.stop_attempt();
            state.members.iter().for_each(|member| member.link.abort());
            state.members.len()
        });
        self.0.counters.aborted.add(aborted as u64);
        aborted
    }

    /// All connections now, in no order.
    #[must_use]
    pub fn snapshot(&self) -> Vec<ConnectionInfo<C::Key>> {
        let mut all = Vec::new();
        for slot in self.0.matching(|_| true) {
            all.extend(slot.state().members.iter().map(|Member { link, .. }| ConnectionInfo {
                key: slot.key.clone(),
                streams: link.open(),
                retired: !link.is_usable(),
                bytes: link.bytes(),
            }));
        }
        all
    }

    /// Makes sure that there is a connection for `key`, without a stream: it proves both ends to each other, and
    /// the next tunnel need not wait for it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn warm(&self, key: &C::Key) -> Result<(), OpenError<C::Error>> {
        self.link(key).await.map(drop)
    }

    /// A link with a free stream, from the pool or new.
    pub(crate) async fn link(&self, key: &C::Key) -> Result<Reserved<C::Peer>, OpenError<C::Error>> {
        let inner = &self.0;
        let slot = inner.enter(key)?;
        let deadline = Instant::now() + inner.settings.queue_timeout + inner.settings.connect_timeout;
        let mut attempts = 0u32;
        while Instant::now() < deadline {
            let mut freed = pin!(slot.slot.freed.notified());
            freed.as_mut().enable();
            let verdict = match inner.pick(&slot.slot) {
                Pick::Use(reserved) => return Ok(reserved),
                Pick::Wait(verdict) => verdict,
                Pick::Fail(error) => return Err(OpenError::Connect(Arc::new(error))),
            };
            let waiting = Gauge::up(&inner.counters);
            if timeout_at(deadline, freed).await.is_err() {
                break;
            }
            drop(waiting);
            match verdict.get() {
                Some(Verdict::Failed(error)) => return Err(OpenError::Connect(Arc::clone(error))),
                Some(Verdict::Connected | Verdict::Stopped) => attempts += 1,
                // A stream has ended; perhaps it is ours to take.
                None => continue,
            }
            if attempts >= TRIES {
                let stillborn = slot.slot.state().stillborn();
                if let Some(reason) = stillborn {
                    return Err(OpenError::Lost(TunnelError::Connection(reason)));
                }
                // Connections come, and others take all of their streams; or the connector panics. No hurry then.
                sleep(Duration::from_millis(10) * attempts.min(50)).await;
            }
        }
        inner.counters.queue_timed_out.up();
        Err(OpenError::QueueTimeout)
    }

    /// Uses `link` no more: its peer has announced its end.
    pub(crate) fn going_away(&self, link: &Link<C::Peer>) {
        if link.retire() {
            self.0.counters.going_away.up();
        }
    }
}

/// Counts a caller that waits.
struct Gauge<'a>(&'a PoolCounters);

impl<'a> Gauge<'a> {
    fn up(counters: &'a PoolCounters) -> Self {
        counters.waiting_now.up();
        Self(counters)
    }
}

impl Drop for Gauge<'_> {
    fn drop(&mut self) {
        self.0.waiting_now.down();
    }
}

enum Pick<C: Connector> {
    Use(Reserved<C::Peer>),
    /// Until the slot's `freed` tells of something new; then the attempt may have a verdict.
    Wait(VerdictCell<C::Error>),
    Fail(ConnectError<C::Error>),
}

impl<C: Connector> Slot<C> {
    fn state(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: Connector> State<C> {
    fn is_empty(&self) -> bool {
        self.members.is_empty() && self.attempt.is_none() && self.callers == 0
    }

    fn stillborn(&self) -> Option<String> {
        let (count, last) = &self.stillborn;
        (*count >= TRIES).then(|| format!("{count} connections ended before a request, the last: {last}"))
    }

    fn note_end(&mut self, link: &Link<C::Peer>, ended: &Ended) {
        if link.was_used() {
            self.stillborn.0 = 0;
        } else if !matches!(ended, Ended::Finished | Ended::Aborted) {
            self.stillborn = (self.stillborn.0.saturating_add(1), ended.to_string());
        }
    }

    /// Stops the attempt under way; who waits for it makes another one.
    fn stop_attempt(&mut self) {
        if let Some(attempt) = self.attempt.take() {
            attempt.verdict.get_or_init(|| Verdict::Stopped);
            attempt.task.abort();
        }
    }
}

/// A caller's stay in a slot, which keeps the slot in the map.
struct Stay<'a, C: Connector> {
    inner: &'a Arc<Inner<C>>,
    slot: Arc<Slot<C>>,
}

impl<C: Connector> Drop for Stay<'_, C> {
    fn drop(&mut self) {
        let empty = {
            let mut state = self.slot.state();
            state.callers -= 1;
            state.is_empty()
        };
        if empty {
            self.inner.remove_if_empty(&self.slot);
        }
    }
}

/// A place among the pool's connections.
struct Seat<C: Connector>(Arc<Inner<C>>);

impl<C: Connector> Drop for Seat<C> {
    fn drop(&mut self) {
        self.0.seats.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<C: Connector> Inner<C> {
    fn slots(&self) -> MutexGuard<'_, Slots<C>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn matching(&self, matches: impl Fn(&C::Key) -> bool) -> Vec<Arc<Slot<C>>> {
        self.slots().iter().filter(|(key, _)| matches(key)).map(|(_, slot)| Arc::clone(slot)).collect()
    }

    fn each_matching(
        self: &Arc<Self>,
        matches: impl Fn(&C::Key) -> bool,
        act: impl Fn(&mut State<C>) -> usize,
    ) -> usize {
        self.matching(matches)
            .iter()
            .map(|slot| {
                let done = act(&mut slot.state());
                slot.freed.notify_waiters();
                self.remove_if_empty(slot);
                done
            })
            .sum()
    }

    /// The slot of `key`, with the caller counted in it.
    fn enter(self: &Arc<Self>, key: &C::Key) -> Result<Stay<'_, C>, OpenError<C::Error>> {
        loop {
            let slot = self.slot(key);
            let mut state = slot.state();
            if state.removed {
                continue;
            }
            if state.callers >= self.settings.max_waiting {
                self.counters.overloaded.up();
                return Err(OpenError::Overloaded(self.settings.max_waiting));
            }
            state.callers += 1;
            drop(state);
            return Ok(Stay { inner: self, slot });
        }
    }

    fn slot(&self, key: &C::Key) -> Arc<Slot<C>> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get(key) {
            return Arc::clone(slot);
        }
        let state = State {
            members: Vec::new(),
            attempt: None,
            stillborn: (0, String::new()),
            callers: 0,
            removed: false,
        };
        let slot = Arc::new(Slot { key: key.clone(), state: Mutex::new(state), freed: Arc::default() });
        slots.insert(key.clone(), Arc::clone(&slot));
        slot
    }

    fn remove_if_empty(&self, slot: &Arc<Slot<C>>) {
        let mut slots = self.slots();
        let mut state = slot.state();
        if state.is_empty() && !state.removed {
            state.removed = true;
            slots.remove(&slot.key);
        }
    }

    /// Reserves a stream on the least loaded link, and starts an attempt to connect where there is none or all are
    /// busy.
    fn pick(self: &Arc<Self>, slot: &Arc<Slot<C>>) -> Pick<C> {
        let settings = &self.settings;
        let mut state = slot.state();
        let now = Instant::now();
        let usable = state.members.iter_mut().filter_map(|member| {
            let open = member.link.open();
            if open >= settings.max_streams || open >= member.link.limit(settings.max_streams) {
                return None;
            }
            let fast = member.meter.rate(now, member.link.bytes()) >= settings.spread_bytes_per_second;
            Some((fast, open, &member.link))
        });
        let Some((fast, open, link)) = usable.min_by_key(|(fast, open, _)| (*fast, *open)) else {
            return match &state.attempt {
                Some(attempt) => Pick::Wait(Arc::clone(&attempt.verdict)),
                None => match self.start(slot, &mut state) {
                    Ok(verdict) => Pick::Wait(verdict),
                    Err(error) => Pick::Fail(error),
                },
            };
        };
        let link = Arc::clone(link);
        let reused = link.reserve();
        let ticket = Ticket::new(Arc::clone(&link) as Arc<dyn crate::tunnel::Owner>);
        let busy = open >= settings.spread_streams || (fast && open > 0);
        let links = state.members.iter().filter(|member| member.link.is_usable()).count();
        if busy && links < settings.spread && state.attempt.is_none() && self.start(slot, &mut state).is_ok()
        {
            self.counters.spread.up();
        }
        Pick::Use(Reserved { link, ticket, reused })
    }

    /// Starts an attempt to connect.
    fn start(
        self: &Arc<Self>,
        slot: &Arc<Slot<C>>,
        state: &mut State<C>,
    ) -> Result<VerdictCell<C::Error>, ConnectError<C::Error>> {
        let seat = self.seat(slot).ok_or_else(|| {
            self.counters.overloaded.up();
            ConnectError::TooManyConnections(self.settings.max_connections)
        })?;
        let verdict = Arc::new(OnceLock::new());
        let attempt =
            Making { slot: Arc::clone(slot), inner: Arc::clone(self), verdict: Arc::clone(&verdict) };
        self.counters.connecting_now.up();
        // The task can't look at the slot before this function's caller lets go of it.
        let task = tokio::spawn(async move {
            let (outcome, driving) = match attempt.run(seat).await {
                Ok(driving) => (Verdict::Connected, driving),
                Err(error) => (Verdict::Failed(Arc::new(error)), None),
            };
            attempt.verdict.get_or_init(|| outcome);
            // Those who wait are woken before the driver is there, so that their requests go with its first words.
            drop(attempt);
            if let Some(driving) = driving {
                tokio::spawn(driving);
            }
        });
        state.attempt = Some(Attempt { verdict: Arc::clone(&verdict), task: task.abort_handle() });
        Ok(verdict)
    }

    /// A place for one more connection, if need be that of an idle one of another key.
    fn seat(self: &Arc<Self>, asking: &Arc<Slot<C>>) -> Option<Seat<C>> {
        let most = self.settings.max_connections;
        let take =
            || self.seats.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < most).then_some(n + 1));
        if take().is_ok() {
            return Some(Seat(Arc::clone(self)));
        }
        // The one that makes room ends soon, not now: for that moment there may be one too many.
        self.evict(asking).then(|| {
            self.seats.fetch_add(1, Ordering::AcqRel);
            Seat(Arc::clone(self))
        })
    }

    fn evict(&self, asking: &Arc<Slot<C>>) -> bool {
        // The caller holds the lock of its own slot, and must not wait for the map's: see `Slot`.
        let Ok(slots) = self.slots.try_lock() else { return false };
        let evicted = slots.values().filter(|slot| !Arc::ptr_eq(slot, asking)).any(|slot| {
            let Ok(state) = slot.state.try_lock() else { return false };
            state.members.iter().any(|member| member.link.open() == 0 && member.link.retire())
        });
        if evicted {
            self.counters.evicted.up();
        }
        evicted
    }
}

/// An attempt to connect, as its task sees it. When it is dropped, however that comes, the slot knows of it no more.
struct Making<C: Connector> {
    slot: Arc<Slot<C>>,
    inner: Arc<Inner<C>>,
    verdict: VerdictCell<C::Error>,
}

impl<C: Connector> Making<C> {
    /// Makes the connection; what drives it, unless nobody is to use it.
    async fn run(
        &self,
        seat: Seat<C>,
    ) -> Result<Option<impl Future<Output = ()> + Send + use<C>>, ConnectError<C::Error>> {
        let limit = self.inner.settings.connect_timeout;
        let result = timeout(limit, self.connect()).await.unwrap_or_else(|_| {
            self.inner.counters.connects_timed_out.up();
            Err(ConnectError::Timeout(limit))
        });
        let (link, driver) = result.inspect_err(|_| self.inner.counters.connects_failed.up())?;
        let mut state = self.slot.state();
        if !self.is_current(&state) {
            // Retired while it was being made.
            return Ok(None);
        }
        state.members.push(Member { link: Arc::clone(&link), meter: Meter::new() });
        drop(state);
        self.inner.counters.connections.up();
        self.inner.counters.connections_now.up();
        Ok(Some(drive(driver, link, Arc::clone(&self.slot), seat)))
    }

    async fn connect(&self) -> Result<(Arc<Link<C::Peer>>, Driver<C::Io>), ConnectError<C::Error>> {
        let (io, peer) =
            self.inner.connector.connect(&self.slot.key).await.map_err(ConnectError::Connector)?;
        let freed = Arc::clone(&self.slot.freed);
        let counters = Arc::clone(&self.inner.counters);
        link::begin(io, peer, &self.inner.settings, freed, counters)
            .await
            .map_err(|error| ConnectError::Http2(error.to_string()))
    }

    fn is_current(&self, state: &State<C>) -> bool {
        state.attempt.as_ref().is_some_and(|attempt| Arc::ptr_eq(&attempt.verdict, &self.verdict))
    }
}

impl<C: Connector> Drop for Making<C> {
    fn drop(&mut self) {
        self.inner.counters.connecting_now.down();
        let mut state = self.slot.state();
        if self.is_current(&state) {
            state.attempt = None;
        }
        let empty = state.is_empty();
        drop(state);
        self.verdict.get_or_init(|| Verdict::Stopped);
        self.slot.freed.notify_waiters();
        if empty {
            self.inner.remove_if_empty(&self.slot);
        }
    }
}

/// Runs a connection to its end, and takes it out of its slot.
async fn drive<C: Connector>(
    driver: Driver<C::Io>,
    link: Arc<Link<C::Peer>>,
    slot: Arc<Slot<C>>,
    seat: Seat<C>,
) {
    let inner = Arc::clone(&seat.0);
    let ended = driver
        .run(&link, || {
            // Under the slot's lock nobody can reserve a stream.
            let _state = slot.state();
            link.open() == 0 && link.retire() && {
                inner.counters.idle_closed.up();
                true
            }
        })
        .await;
    link.retire();
    if matches!(ended, Ended::PingTimeout) {
        inner.counters.ping_timeouts.up();
    }
    tracing::debug!(key = ?slot.key, %ended, "a pooled connection ended");
    inner.counters.connections_now.down();
    drop(seat);
    let mut state = slot.state();
    state.members.retain(|member| !Arc::ptr_eq(&member.link, &link));
    state.note_end(&link, &ended);
    drop(state);
    // Whoever waits for a stream of this link is to look again.
    slot.freed.notify_waiters();
    inner.remove_if_empty(&slot);
}
