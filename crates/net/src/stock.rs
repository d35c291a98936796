//! TCP sockets of a namespace that were made in advance.
//!
//! Only `socket(2)` has to run inside a namespace, and to go there and back costs more than to make one. So where many are
//! asked for, several are made at a time. A socket that nobody has bound or connected is as good later as it is now.
//!
//! Invariants:
//! * a namespace that is asked for a socket now and then has none in stock;
//! * what nobody asks for is let go of ([`Stock::tidy`]), and with the namespace ([`crate::Netns`]) in any case.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;

/// So many are made at once where many are asked for: the two system calls of a visit are a quarter of one for each then.
const MANY: usize = 8;
/// Many are asked for where two are within this time.
const OFTEN: Duration = Duration::from_millis(50);
/// What was not asked for in this time is let go of.
const KEPT: Duration = Duration::from_secs(5);
/// So many the process has at most, and few more: beyond, each is made when it is needed.
const IN_ALL: usize = 256;

static IN_STOCK: AtomicUsize = AtomicUsize::new(0);

/// How many sockets the process has that were made in advance, of all namespaces.
#[must_use]
pub fn sockets_in_stock() -> usize {
    IN_STOCK.load(Ordering::Relaxed)
}

/// The sockets of one namespace.
#[derive(Debug, Default)]
pub(crate) struct Stock {
    v4: Mutex<Shelf>,
    v6: Mutex<Shelf>,
}

#[derive(Debug, Default)]
struct Shelf {
    sockets: Vec<Socket>,
    /// When there was none last.
    emptied: Option<Instant>,
}

impl Drop for Shelf {
    fn drop(&mut self) {
        IN_STOCK.fetch_sub(self.sockets.len(), Ordering::Relaxed);
    }
}

impl Stock {
    /// A socket from the stock, or how many to make.
    pub(crate) fn take(&self, domain: Domain) -> Result<Socket, usize> {
        let mut shelf = self.shelf(domain);
        if let Some(socket) = shelf.sockets.pop() {
            IN_STOCK.fetch_sub(1, Ordering::Relaxed);
            return Ok(socket);
        }
        let now = Instant::now();
        let before = shelf.emptied.replace(now);
        let is_often = before.is_some_and(|before| now.saturating_duration_since(before) < OFTEN);
        Err(if is_often && sockets_in_stock() < IN_ALL { MANY } else { 1 })
    }

    /// Puts those into stock that are more than one; returns that one.
    pub(crate) fn put(&self, domain: Domain, mut made: Vec<Socket>) -> Option<Socket> {
        let one = made.pop();
        if !made.is_empty() {
            let mut shelf = self.shelf(domain);
            // Another thread may have made some meanwhile.
            made.truncate(MANY.saturating_sub(shelf.sockets.len()));
            IN_STOCK.fetch_add(made.len(), Ordering::Relaxed);
            shelf.sockets.extend(made);
        }
        one
    }

    /// Lets go of what nobody asked for lately.
    pub(crate) fn tidy(&self) {
        let now = Instant::now();
        for shelf in [&self.v4, &self.v6] {
            let mut shelf = shelf.lock().unwrap_or_else(PoisonError::into_inner);
            if shelf.emptied.is_some_and(|at| now.saturating_duration_since(at) >= KEPT) {
                *shelf = Shelf::default();
            }
        }
    }

    /// Lets go of all.
    pub(crate) fn clear(&self) {
        for shelf in [&self.v4, &self.v6] {
            *shelf.lock().unwrap_or_else(PoisonError::into_inner) = Shelf::default();
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        [&self.v4, &self.v6].iter().map(|shelf| shelf.lock().map_or(0, |shelf| shelf.sockets.len())).sum()
    }

    fn shelf(&self, domain: Domain) -> MutexGuard<'_, Shelf> {
        let shelf = if domain == Domain::IPV4 { &self.v4 } else { &self.v6 };
        shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes so many, in the namespace of the thread. One that can't be made ends it; if it is the first, that is an error.
pub(crate) fn make(domain: Domain, count: usize) -> io::Result<Vec<Socket>> {
    let mut made = Vec::with_capacity(count);
    for _ in 0..count {
        match Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP)) {
            Ok(socket) => made.push(socket),
            Err(error) if made.is_empty() => return Err(error),
            Err(_) => break,
        }
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(stock: &Stock, domain: Domain) -> usize {
        match stock.take(domain) {
            Ok(_) => 0,
            Err(count) => {
                stock.put(domain, make(domain, count).unwrap()).unwrap();
                count
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn several_are_made_where_several_are_asked_for_and_let_go_of_afterwards() {
        let stock = Stock::default();
        for _ in 0..3 {
            assert_eq!((take(&stock, Domain::IPV4), stock.len()), (1, 0), "now and then");
            tokio::time::advance(OFTEN).await;
        }
        assert_eq!(take(&stock, Domain::IPV4), 1);
        let made: Vec<_> = (0..=MANY).map(|_| take(&stock, Domain::IPV4)).collect();
        assert_eq!(made, [8, 0, 0, 0, 0, 0, 0, 0, 8]);
        assert_eq!((take(&stock, Domain::IPV6), stock.len()), (1, MANY - 1), "of the other family");
        tokio::time::advance(KEPT - OFTEN).await;
        stock.tidy();
        assert_eq!(stock.len(), MANY - 1);
        tokio::time::advance(OFTEN).await;
        stock.tidy();
        assert_eq!(stock.len(), 0);
        // Two threads that find none at the same moment.
        let counts = [stock.take(Domain::IPV4).unwrap_err(), stock.take(Domain::IPV4).unwrap_err()];
        assert_eq!(counts, [1, MANY]);
        for _ in 0..2 {
            stock.put(Domain::IPV4, make(Domain::IPV4, MANY).unwrap()).unwrap();
        }
        assert_eq!(stock.len(), MANY);
        stock.clear();
        assert_eq!(stock.len(), 0);
        // Where the process has many already.
        IN_STOCK.fetch_add(IN_ALL, Ordering::Relaxed);
        let counts = [stock.take(Domain::IPV4).unwrap_err(), stock.take(Domain::IPV4).unwrap_err()];
        IN_STOCK.fetch_sub(IN_ALL, Ordering::Relaxed);
        assert_eq!(counts, [1, 1]);
    }
}
