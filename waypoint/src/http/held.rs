//! What requests and responses hold in memory: what was read of them, by us or by HTTP/2 for us, and waits for somebody who does
//! not take it. Windows limit it for a stream; here it is limited for a client, on all of its connections and threads, and for
//! all together.
//!
//! ```text
//!   0 ──────────────────────────── limit ──▶
//!     all goes on                   new requests are refused; of those under way the ones end that hold
//!                                   more than a small share, when they come to hold more
//! ```
//!
//! Invariants:
//! * what holds nothing costs nothing here, and what ends gives all of it back;
//! * one client can't use up what there is for all.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hashbrown::HashMap;
use process::metrics::Counter;

use crate::http::decide::Connection;

/// What an exchange may hold in any case: the buffers that it reads into.
const LEAST: usize = 64 * 1024;

/// How much may be held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeldLimits {
    /// By all.
    pub all: usize,
    /// By one client.
    pub client: usize,
}

impl HeldLimits {
    /// Half of `all` for a client: behind one identity there may be many, as behind a gateway's.
    #[must_use]
    pub fn of(all: usize) -> Self {
        Self { all, client: all / 2 }
    }
}

impl Default for HeldLimits {
    fn default() -> Self {
        Self::of(256 << 20)
    }
}

/// Who a client is: by its identity, else by its address.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Client {
    Known(Arc<model::SpiffeId>),
    Unknown(IpAddr),
}

/// What all exchanges hold. One for the program.
#[derive(Debug, Default)]
pub struct Held {
    limits: HeldLimits,
    bytes: AtomicUsize,
    clients: Mutex<HashMap<Client, Weak<OfClient>>>,
    /// Requests that were refused, because too much is held.
    pub refused: Counter,
    /// Requests that were ended, because they held too much.
    pub cut: Counter,
    /// What waits for those who get copies of requests.
    copies: AtomicUsize,
}

/// What the exchanges of one client hold.
#[derive(Debug)]
pub struct OfClient {
    all: Arc<Held>,
    client: Client,
    bytes: AtomicUsize,
}

impl Held {
    /// With these limits.
    #[must_use]
    pub fn new(limits: HeldLimits) -> Arc<Self> {
        Arc::new(Self { limits, ..Self::default() })
    }

    /// Bytes that are held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// Bytes that wait for those who get copies of requests.
    #[must_use]
    pub fn bytes_of_copies(&self) -> usize {
        self.copies.load(Relaxed)
    }

    /// Takes room for copies. They have an eighth of what requests have, beside that: who asked for no copy loses nothing by it.
    ///
    /// # Errors
    /// There is no room.
    pub(crate) fn take_for_copies(&self, bytes: usize) -> Result<(), TooMuch> {
        if self.copies.fetch_add(bytes, Relaxed) + bytes > self.limits.all / 8 {
            self.give_back_of_copies(bytes);
            return Err(TooMuch);
        }
        Ok(())
    }

    /// Gives back what copies have taken.
    pub(crate) fn give_back_of_copies(&self, bytes: usize) {
        if bytes > 0 {
            self.copies.fetch_sub(bytes, Relaxed);
        }
    }

    /// What the client of a connection holds.
    pub(crate) fn of(self: &Arc<Self>, connection: &Connection) -> Arc<OfClient> {
        let client = match &connection.identity {
            Some(identity) => Client::Known(Arc::clone(identity)),
            None => Client::Unknown(connection.client.ip()),
        };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = clients.get(&client).and_then(Weak::upgrade) {
            return known;
        }
        let made =
            Arc::new(OfClient { all: Arc::clone(self), client: client.clone(), bytes: AtomicUsize::new(0) });
        clients.insert(client, Arc::downgrade(&made));
        made
    }
}

impl OfClient {
    fn is_over(&self) -> bool {
        let limits = &self.all.limits;
        self.bytes.load(Relaxed) > limits.client || self.all.bytes() > limits.all
    }
}

impl Drop for OfClient {
    fn drop(&mut self) {
        let mut clients = self.all.clients.lock().unwrap_or_else(PoisonError::into_inner);
        // Another connection of the client may have come meanwhile.
        if clients.get(&self.client).is_some_and(|known| known.strong_count() == 0) {
            clients.remove(&self.client);
        }
    }
}

/// What one exchange holds.
#[derive(Debug)]
pub(crate) struct Share {
    of: Arc<OfClient>,
    bytes: usize,
}

/// Too much is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TooMuch;

impl Share {
    /// Of a request that has come.
    ///
    /// # Errors
    /// There is no room for another.
    pub(crate) fn new(of: &Arc<OfClient>) -> Result<Self, TooMuch> {
        if of.is_over() {
            of.all.refused.inc();
            return Err(TooMuch);
        }
        Ok(Self { of: Arc::clone(of), bytes: 0 })
    }

    /// Says how much it holds now.
    ///
    /// # Errors
    /// That is more than before, and too much.
    pub(crate) fn set(&mut self, bytes: usize) -> Result<(), TooMuch> {
        let before = std::mem::replace(&mut self.bytes, bytes);
        if bytes <= before {
            self.give_back(before - bytes);
            return Ok(());
        }
        self.of.bytes.fetch_add(bytes - before, Relaxed);
        self.of.all.bytes.fetch_add(bytes - before, Relaxed);
        if bytes > LEAST && self.of.is_over() {
            self.of.all.cut.inc();
            return Err(TooMuch);
        }
        Ok(())
    }

    fn give_back(&self, bytes: usize) {
        if bytes > 0 {
            self.of.bytes.fetch_sub(bytes, Relaxed);
            self.of.all.bytes.fetch_sub(bytes, Relaxed);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn connection(account: &str) -> Connection {
        let id = format!("spiffe://cluster.local/ns/a/sa/{account}").parse().unwrap();
        Connection {
            client: "10.0.0.1:1".parse().unwrap(),
            destination: "10.0.0.2:80".parse().unwrap(),
            identity: Some(Arc::new(id)),
            server_name: None,
            secure: false,
            said: None,
        }
    }

    #[test]
    fn a_client_has_its_part_on_all_of_its_connections_and_leaves_the_others_theirs() {
        let held = Held::new(HeldLimits { all: 1 << 20, client: 256 * 1024 });
        let (first, second) = (held.of(&connection("a")), held.of(&connection("a")));
        let mut one = Share::new(&first).unwrap();
        let mut two = Share::new(&second).unwrap();
        assert_eq!(one.set(200 * 1024), Ok(()));
        // What holds little goes on, whatever the others hold; what would hold more ends.
        assert_eq!(two.set(60 * 1024), Ok(()));
        assert_eq!(two.set(70 * 1024), Err(TooMuch));
        assert_eq!((held.cut.get(), held.bytes()), (1, 270 * 1024));
        assert!(Share::new(&second).is_err(), "nothing new");
        let other = held.of(&connection("b"));
        assert!(Share::new(&other).is_ok(), "of others all goes on");
        drop(two);
        assert!(Share::new(&second).is_ok());
        assert_eq!(one.set(10), Ok(()));
        assert_eq!(held.bytes(), 10);
        drop(one);
        assert_eq!(held.bytes(), 0);
        drop((first, second, other));
        assert!(held.clients.lock().unwrap().is_empty());
    }

    #[test]
    fn all_together_are_limited() {
        let held = Held::new(HeldLimits { all: 256 * 1024, client: 256 * 1024 });
        let clients: Vec<_> = ["a", "b", "c"].map(|name| held.of(&connection(name))).into();
        let mut shares: Vec<_> = clients.iter().map(|client| Share::new(client).unwrap()).collect();
        let set: Vec<_> = shares.iter_mut().map(|share| share.set(100 * 1024)).collect();
        assert_eq!(set, [Ok(()), Ok(()), Err(TooMuch)]);
        assert!(Share::new(&held.of(&connection("d"))).is_err());
    }
}
