//! The server side: what there is ([`store`]), what each client has ([`session`]), and the streams between
//! (tonic).
//!
//! ```text
//!   apply ─▶ Store ──publish, coalesced──▶ every stream: Session::poll ─▶ response ─▶ client
//!                                                        Session::request ◀─ acknowledgement ◀─┘
//! ```
//!
//! * Locks are taken in the order store, list of clients, session, and never across an await.
//! * A change waits a few milliseconds for others; when changes were published less than
//!   [`Config::coalesce`] ago, until that is over. Answers to what clients ask for wait for nothing.
//! * A stream costs at most one unanswered response for each of its types. One that is not answered in
//!   [`Config::answer_timeout`] ends the stream; the client's place is free when the transport has let go of it.
//! * Few streams start at once, so that thousands that come together don't each hold a whole state in memory.

mod body;
mod requests;
mod response;
mod service;
pub mod session;
mod status;
pub mod store;
mod stream;
mod subscription;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Duration;

use proto::wire::core::Node;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tonic::{Request, Status};

pub use response::Response;
pub(crate) use response::has_more;
pub use service::AdsService;
pub use session::{Limits, Session, Violation};
pub use status::{ClientStatus, Holds};
pub use store::{Change, ClientId, Generation, Interest, Resource, Store};
pub use subscription::{Rejected, TypeStatus};

/// How many publications are remembered to measure how long they took to arrive.
const REMEMBERED_PUSHES: usize = 1024;

/// How the server behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// All types, in the order in which what changes at the same time is sent: what others refer to comes first.
    pub types: Vec<&'static str>,
    /// What one client may use.
    pub limits: Limits,
    /// How many removals are remembered for each type and audience. A client that misses more connects anew.
    pub tombstones: usize,
    /// How many clients there may be.
    pub clients: usize,
    /// How many clients may be between their first request and the answer to their first state. One that comes back
    /// says what it holds, 2.6 MB for 100,000 resources.
    pub starting: usize,
    /// The same, of clients of another make: their first state is one message, some 35 MB of 100,000 resources, and what
    /// they say to hold 12 MB, and several times that when it is read.
    pub starting_others: usize,
    /// How many clients may be in authentication.
    pub authenticating: usize,
    /// How long authentication may take, and how long the first request.
    pub start_timeout: Duration,
    /// How long a client may take to answer a response.
    pub answer_timeout: Duration,
    /// How long a request may be: one of a client of another make that names 100,000 versions has about 12 MB; ours say
    /// a million in 26 MB.
    pub request_bytes: usize,
    /// How long the first change after a quiet time waits for others.
    pub gather: Duration,
    /// How far publications are apart.
    pub coalesce: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            types: Vec::new(),
            limits: Limits::default(),
            tombstones: 100_000,
            clients: 10_000,
            starting: 32,
            starting_others: 8,
            authenticating: 64,
            start_timeout: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(60),
            request_bytes: 64 << 20,
            gather: Duration::from_millis(5),
            coalesce: Duration::from_millis(200),
        }
    }
}

/// Who is at the other end, as the control plane authenticated it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// For logs and `status`.
    pub name: Arc<str>,
}

/// How a client is served.
#[derive(Clone, Default)]
pub struct Admission {
    /// Which scopes it gets; `None` is all. It must always answer the same: when it would not, end the stream by
    /// [`Server::disconnect`], and the client comes back without losing anything.
    pub interest: Option<Interest>,
}

/// Decides who may connect.
#[tonic::async_trait]
pub trait Authorizer: Send + Sync + 'static {
    /// Who sent this: from its metadata (`authorization`, `clusterid`), certificates and address.
    ///
    /// # Errors
    /// The status that the client gets.
    async fn authenticate(&self, request: &Request<()>) -> Result<Caller, Status>;

    /// Whether the caller may be this node, and what it gets.
    ///
    /// # Errors
    /// The status that the client gets.
    fn admit(&self, caller: &Caller, node: &Node) -> Result<Admission, Status> {
        let _ = (caller, node);
        Ok(Admission::default())
    }
}

/// What is worth counting.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A client's stream began (`pilot_xds` goes up).
    Connected(&'a Node),
    /// It ended, and this is why.
    Disconnected(&'a Node, &'a str),
    /// A stream was refused.
    Refused(&'a Status),
    /// A response went out (`pilot_xds_pushes`).
    Pushed {
        /// Its type.
        type_url: &'a str,
        /// How many resources are in it.
        resources: usize,
        /// How many names are removed.
        removed: usize,
        /// The length of the resources.
        bytes: usize,
    },
    /// A client refused a response or parts of it (`pilot_total_xds_rejects`).
    Rejected {
        /// Who.
        node: &'a Node,
        /// Of which type.
        type_url: &'a str,
        /// What it said.
        message: &'a str,
    },
    /// A response with changes went out, this long after the first of them was published (`pilot_proxy_queue_time`).
    Queued(Duration),
    /// A client has answered for changes, this long after the first of them (`pilot_proxy_convergence_time`).
    Converged(Duration),
}

/// Counts what happens. Called on the streams' tasks: it must be quick.
pub trait Observer: Send + Sync + 'static {
    /// This happened.
    fn observe(&self, event: Event<'_>);
}

/// Counts nothing.
impl Observer for () {
    fn observe(&self, _: Event<'_>) {}
}

/// A publication: up to where, when the first of its changes was made, and when it was.
struct Push {
    generation: Generation,
    since: Instant,
    at: Instant,
}

/// What all streams share.
struct Shared {
    config: Config,
    authorizer: Arc<dyn Authorizer>,
    observer: Arc<dyn Observer>,
    store: RwLock<Store>,
    clients: Mutex<BTreeMap<ClientId, Arc<stream::Client>>>,
    next_client: AtomicU64,
    /// When changes began that are not published, and the last publications.
    unpublished: Mutex<Option<Instant>>,
    pushes: Mutex<VecDeque<Push>>,
    changed: Notify,
    published: watch::Sender<Generation>,
    progress: watch::Sender<u64>,
    ready: watch::Sender<bool>,
    places: Arc<Semaphore>,
    starting: Arc<Semaphore>,
    starting_others: Arc<Semaphore>,
    authenticating: Semaphore,
    began: Instant,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Store> {
        self.store.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Store> {
        self.store.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time that sessions know.
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn tick(&self) {
        self.progress.send_modify(|n| *n = n.wrapping_add(1));
    }

    fn change(&self, store: &mut Store, changes: impl IntoIterator<Item = Change>) -> Generation {
        let before = store.generation();
        for change in changes {
            for follower in store.change(&change) {
                let client = locked(&self.clients).get(&follower.client).cloned();
                if let Some(client) = client {
                    client.changed(follower.type_url, &follower.name);
                }
            }
        }
        if store.generation() > before {
            locked(&self.unpublished).get_or_insert_with(Instant::now);
            self.changed.notify_one();
        }
        store.generation()
    }

    fn publish(&self) {
        let mut store = self.write();
        store.publish();
        let generation = store.published();
        drop(store);
        if let Some(since) = locked(&self.unpublished).take() {
            let mut pushes = locked(&self.pushes);
            if pushes.len() >= REMEMBERED_PUSHES {
                pushes.pop_front();
            }
            pushes.push_back(Push { generation, since, at: Instant::now() });
        }
        self.published.send_replace(generation);
    }

    /// A response has all that was published until now, to a client that had nothing after `from`.
    fn queued(&self, from: Generation) {
        let first = between(&locked(&self.pushes), from, Generation(u64::MAX)).last().map(|push| push.at);
        if let Some(at) = first {
            self.observer.observe(Event::Queued(at.elapsed()));
        }
    }

    /// A client has answered for everything after `from`, up to `to`.
    fn converged(&self, from: Generation, to: Generation) {
        let now = Instant::now();
        let pushes: Vec<Instant> = {
            let pushes = locked(&self.pushes);
            between(&pushes, from, to).map(|push| push.since).collect()
        };
        pushes.iter().for_each(|since| self.observer.observe(Event::Converged(now - *since)));
    }
}

/// The publications after `from`, up to `to`, the latest first.
fn between(pushes: &VecDeque<Push>, from: Generation, to: Generation) -> impl Iterator<Item = &Push> {
    pushes.iter().rev().skip_while(move |p| p.generation > to).take_while(move |p| p.generation > from)
}

/// Publishes what changes, as long as there is a server.
async fn coalesce(shared: Weak<Shared>, gather: Duration, window: Duration) {
    let mut last: Option<Instant> = None;
    while let Some(server) = shared.upgrade() {
        // Not for long, since it keeps the server.
        let changed = tokio::time::timeout(Duration::from_secs(1), server.changed.notified()).await.is_ok();
        if !changed {
            continue;
        }
        let now = Instant::now();
        let due = last.map_or(now + gather, |last| (last + window).max(now + gather));
        tokio::time::sleep_until(due).await;
        server.publish();
        last = Some(Instant::now());
    }
}

/// The server. Clones are the same one.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("config", &self.0.config).finish_non_exhaustive()
    }
}

impl Server {
    /// A server without resources. Must be called in a tokio runtime, on which it publishes.
    #[must_use]
    pub fn new(config: Config, authorizer: Arc<dyn Authorizer>, observer: Arc<dyn Observer>) -> Self {
        let (gather, window) = (config.gather, config.coalesce);
        let shared = Arc::new(Shared {
            store: RwLock::new(Store::new(&config.types, config.tombstones)),
            places: Arc::new(Semaphore::new(config.clients)),
            starting: Arc::new(Semaphore::new(config.starting)),
            starting_others: Arc::new(Semaphore::new(config.starting_others)),
            authenticating: Semaphore::new(config.authenticating),
            config,
            authorizer,
            observer,
            clients: Mutex::default(),
            next_client: AtomicU64::new(0),
            unpublished: Mutex::default(),
            pushes: Mutex::default(),
            changed: Notify::new(),
            published: watch::Sender::new(Generation(0)),
            progress: watch::Sender::new(0),
            ready: watch::Sender::new(false),
            began: Instant::now(),
        });
        tokio::spawn(coalesce(Arc::downgrade(&shared), gather, window));
        Self(shared)
    }

    /// What tonic serves, beside other services of the same port. The port should have keep-alive (HTTP/2 pings),
    /// which ends the connections of peers that are gone or don't read, and a low number of streams for each
    /// connection.
    #[must_use]
    pub fn service(&self) -> AdsService {
        AdsService::new(Arc::clone(&self.0))
    }

    /// Lets clients have what there is. Until this is called streams wait, so that one that comes back is not told
    /// that all it has is gone.
    pub fn ready(&self) {
        self.0.publish();
        self.0.ready.send_replace(true);
    }

    /// Makes changes, in their order, and says how far the store is with them. Equal content is no change.
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) -> Generation {
        let mut store = self.0.write();
        self.0.change(&mut store, changes)
    }

    /// Makes these the only resources of a type: what is not among them is removed.
    pub fn replace(&self, type_url: &'static str, resources: Vec<Resource>) -> Generation {
        let mut store = self.0.write();
        let mut gone = store.names(type_url);
        resources.iter().for_each(|r| {
            gone.remove(&r.name);
        });
        let gone = gone.into_iter().map(|name| Change::Remove { type_url, name });
        self.0.change(&mut store, resources.into_iter().map(Change::Set).chain(gone))
    }

    /// How far the store is.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.0.read().generation()
    }

    /// When a resource became what it is now for an audience; `None` for one that there never was.
    #[must_use]
    pub fn changed_at(&self, type_url: &str, name: &str, audience: proto::Extensions) -> Option<Generation> {
        let store = self.0.read();
        let (_, topic) = store.topic(type_url)?;
        topic.log(audience).get(name).map(|(position, _)| Generation(position))
    }

    /// How many resources of a type an audience sees.
    #[must_use]
    pub fn len(&self, type_url: &str, audience: proto::Extensions) -> usize {
        self.0.read().len(type_url, audience)
    }

    /// Who is connected, and what each has.
    #[must_use]
    pub fn clients(&self) -> Vec<ClientStatus> {
        let store = self.0.read();
        let clients: Vec<_> = locked(&self.0.clients).values().cloned().collect();
        clients.iter().map(|c| c.status(&store)).collect()
    }

    /// Changes whenever a client answers, comes or goes.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<u64> {
        self.0.progress.subscribe()
    }

    /// Ends the streams of those for which `whom` holds. They come back.
    pub fn disconnect(&self, whom: impl Fn(&ClientStatus) -> bool) {
        let clients: Vec<_> = locked(&self.0.clients).values().cloned().collect();
        for client in clients {
            // The caller's function may ask this server for more.
            let status = client.status(&self.0.read());
            if whom(&status) {
                client.end();
            }
        }
    }
}

fn next_id(shared: &Shared) -> ClientId {
    ClientId(shared.next_client.fetch_add(1, Ordering::Relaxed))
}
