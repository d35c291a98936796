//! The server of ZDS (facts of compatibility, section 4.5): hands this node's pods to the ztunnels that connect.
//!
//! ```text
//!   ztunnel                                   agent
//!     hello ------------------------------------>
//!     <-------------------- add (descriptor), keep     each pod of the snapshot
//!     ack --------------------------------------->     before the next one
//!     <-------------------------------- snapshot sent
//!     ack --------------------------------------->
//!     <------------------------------------ add, del   as pods come and go
//! ```
//!
//! What is to be served is a map, and each connection knows what its ztunnel has acknowledged; a connection sends the
//! difference, one message at a time. So nothing is lost or sent twice, whoever connects and goes when. Pods are added to
//! the newest ztunnel alone, and taken from all: an older one is about to end. When the newest one goes, the one before
//! is the newest, and gets what it missed.
//!
//! Limits: 1024 bytes a packet, 5 seconds for an acknowledgement (a connection that takes longer is closed), 5 new
//! connections a second, 8 at a time.

mod connection;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use net::Netns;
use net::seqpacket::SeqpacketListener;
use tokio::sync::watch;

use connection::Connection;

/// Ztunnels at a time: one, and two during an upgrade.
const CONNECTION_LIMIT: usize = 8;
/// Between two connections.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Who a pod is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodIdentity {
    /// Its uid.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its service account.
    pub service_account: String,
}

/// A pod to be served.
#[derive(Clone, Debug)]
struct Served {
    pod: PodIdentity,
    /// `None` where it can't be opened now: a ztunnel that has the pod keeps it.
    netns: Option<Netns>,
    /// Its annotations on capture, for a ztunnel that wants them.
    capture: BTreeMap<String, String>,
    /// Another for each network namespace.
    generation: u64,
}

/// What a ztunnel has acknowledged.
#[derive(Debug, Default)]
struct Peer {
    id: u64,
    has: BTreeMap<String, u64>,
    /// What it refused to serve, and why.
    refused: HashMap<String, (u64, String)>,
}

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<String, Served>,
    /// The newest last.
    peers: Vec<Peer>,
    last_generation: u64,
    last_peer: u64,
}

impl State {
    fn peer(&mut self, id: u64) -> Option<&mut Peer> {
        self.peers.iter_mut().find(|peer| peer.id == id)
    }

    fn is_newest(&self, id: u64) -> bool {
        self.peers.last().is_some_and(|peer| peer.id == id)
    }
}

/// Why a pod is not served.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotServed {
    /// No ztunnel is there.
    #[error("no ztunnel is connected; look at the ztunnel pod of this node")]
    NoZtunnel,
    /// It refused.
    #[error("ztunnel refuses it: {0}")]
    Refused(String),
    /// It has not answered yet.
    #[error("ztunnel has not acknowledged it yet")]
    Waiting,
}

/// What is served, and by whom. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Ztunnels {
    state: Arc<Mutex<State>>,
    /// Wakes everyone who waits for a change of `state`.
    changed: Arc<watch::Sender<()>>,
}

impl Default for Ztunnels {
    fn default() -> Self {
        Self { state: Arc::default(), changed: Arc::new(watch::Sender::new(())) }
    }
}

impl Ztunnels {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and wakes those who wait.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.changed.send_replace(());
        result
    }

    /// Has a pod served; does nothing when it is already, in the same namespace.
    pub fn serve(&self, pod: PodIdentity, netns: Option<Netns>) {
        self.serve_as(pod, netns, BTreeMap::new());
    }

    /// The same, with the annotations on capture that the pod has. Others later don't matter: by these a ztunnel tells
    /// what is older than the capture.
    pub fn serve_as(&self, pod: PodIdentity, netns: Option<Netns>, capture: BTreeMap<String, String>) {
        let is_same = |served: &Served| {
            let same = match (&served.netns, &netns) {
                (Some(old), Some(new)) => old.same(new),
                (None, None) => true,
                _ => false,
            };
            same && served.pod == pod
        };
        if self.state().pods.get(&pod.uid).is_some_and(is_same) {
            return;
        }
        self.change(|state| {
            state.last_generation += 1;
            // Who has kept a pod whose namespace is found at last has it.
            let kept = state.pods.get(&pod.uid).filter(|old| old.netns.is_none() && old.pod == pod);
            let generation = kept.map_or(state.last_generation, |kept| kept.generation);
            state.pods.insert(pod.uid.clone(), Served { pod, netns, capture, generation });
        });
    }

    /// Has a pod served no longer.
    pub fn withdraw(&self, uid: &str) {
        if self.state().pods.contains_key(uid) {
            self.change(|state| {
                state.pods.remove(uid);
                state.peers.iter_mut().for_each(|peer| drop(peer.refused.remove(uid)));
            });
        }
    }

    /// Whether the newest ztunnel serves the pod.
    ///
    /// # Errors
    /// It doesn't.
    pub fn served(&self, uid: &str) -> Result<(), NotServed> {
        let state = self.state();
        let (Some(peer), Some(pod)) = (state.peers.last(), state.pods.get(uid)) else {
            return Err(NotServed::NoZtunnel);
        };
        if peer.has.get(uid) == Some(&pod.generation) {
            return Ok(());
        }
        match peer.refused.get(uid) {
            Some((generation, why)) if *generation == pod.generation => Err(NotServed::Refused(why.clone())),
            _ => Err(NotServed::Waiting),
        }
    }

    /// Waits until a ztunnel serves the pod, `limit` at most. What it refuses is sent again meanwhile.
    ///
    /// # Errors
    /// It doesn't.
    pub async fn wait_served(&self, uid: &str, limit: Duration) -> Result<(), NotServed> {
        let waiting = self.wait(|| self.served(uid).ok());
        match tokio::time::timeout(limit, waiting).await {
            Ok(()) => Ok(()),
            Err(_) => self.served(uid),
        }
    }

    /// Waits until no ztunnel serves the pod any more, `limit` at most. Whether that is so.
    pub async fn wait_withdrawn(&self, uid: &str, limit: Duration) -> bool {
        let gone = || self.state().peers.iter().all(|peer| !peer.has.contains_key(uid)).then_some(());
        tokio::time::timeout(limit, self.wait(gone)).await.is_ok()
    }

    async fn wait<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        let mut changes = self.changed.subscribe();
        loop {
            changes.borrow_and_update();
            if let Some(done) = done() {
                return done;
            }
            // The sender lives in `self`.
            let _ = changes.changed().await;
        }
    }

    /// How many ztunnels are connected and have said hello.
    #[must_use]
    pub fn connected(&self) -> usize {
        self.state().peers.len()
    }

    /// How many pods should be served and are not, by the newest ztunnel.
    #[must_use]
    pub fn unserved(&self) -> usize {
        let uids: Vec<String> = self.state().pods.keys().cloned().collect();
        uids.iter().filter(|uid| self.served(uid).is_err()).count()
    }

    /// Serves those who connect at `path`, until the future is dropped. A socket that is there is replaced.
    ///
    /// # Errors
    /// The socket can't be made.
    pub fn listen(&self, path: &Path) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        let listener = SeqpacketListener::bind(path)?;
        Ok(self.clone().accept(listener))
    }

    async fn accept(self, listener: SeqpacketListener) {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            match listener.accept().await {
                Ok(socket) => {
                    while connections.try_join_next().is_some() {}
                    if connections.len() < CONNECTION_LIMIT {
                        connections.spawn(Connection::new(self.clone(), socket).run());
                    } else {
                        tracing::warn!(limit = CONNECTION_LIMIT, "too many ztunnels; refused one");
                    }
                }
                Err(error) => tracing::warn!(%error, "ztunnel could not be accepted"),
            }
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}
