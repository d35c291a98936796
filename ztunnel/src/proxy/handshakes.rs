//! Places for inbound TLS handshakes.
//!
//! A handshake that has begun holds buffers, and its peer may take all the time that the limit leaves. So there are
//! only so many places, and one source has a share of them: whoever opens thousands of connections and says nothing
//! waits for itself.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};

use super::peers::Source;

/// How many there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Places {
    /// For all peers together.
    pub all: usize,
    /// For the connections of one source address.
    pub per_source: usize,
    /// Connections of one source that may wait for its places.
    pub waiting_per_source: usize,
    /// Connections of all sources that may wait.
    pub waiting: usize,
    /// How long a connection waits.
    pub patience: Duration,
}

/// Why a connection got none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoPlace {
    /// Its source has too many that wait.
    #[error("{0} connections from this address wait for their handshakes already")]
    TooMany(usize),
    /// All sources together have.
    #[error("{0} connections wait for their handshakes already")]
    TooManyInAll(usize),
    /// None became free in time.
    #[error("no place for a handshake became free within {0:?}")]
    TimedOut(Duration),
}

/// The places, and who has them.
#[derive(Debug)]
pub struct Handshakes {
    places: Places,
    all: Semaphore,
    waits: Mutex<Waits>,
}

#[derive(Debug, Default)]
struct Waits {
    of: HashMap<Source, Share>,
    /// Of all sources.
    connections: usize,
}

#[derive(Debug)]
struct Share {
    places: Arc<Semaphore>,
    /// Connections that have a place or wait for one.
    connections: usize,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub struct Place<'a> {
    // In the order in which they are given back.
    _all: SemaphorePermit<'a>,
    _turn: Turn<'a>,
}

/// A connection among those of its source.
#[derive(Debug)]
struct Turn<'a> {
    of: &'a Handshakes,
    source: Source,
    places: Arc<Semaphore>,
    taken: bool,
}

impl Handshakes {
    /// So many places.
    pub fn new(places: Places) -> Self {
        Self { places, all: Semaphore::new(places.all), waits: Mutex::default() }
    }

    /// A place for a connection from `source`, when there is one.
    ///
    /// # Errors
    /// See [`NoPlace`].
    pub async fn place(&self, source: IpAddr) -> Result<Place<'_>, NoPlace> {
        let deadline = Instant::now() + self.places.patience;
        let timed_out = |_| NoPlace::TimedOut(self.places.patience);
        let mut turn = self.turn(Source::of(source))?;
        let places = turn.places.clone();
        // Closed never: an error is the time that is up.
        if let Ok(permit) = timeout_at(deadline, places.acquire()).await.map_err(timed_out)? {
            permit.forget();
            turn.taken = true;
        }
        let all = timeout_at(deadline, self.all.acquire()).await.map_err(timed_out)?;
        let all = all.map_err(|_| NoPlace::TimedOut(self.places.patience))?;
        Ok(Place { _all: all, _turn: turn })
    }

    /// How many places are taken.
    pub fn active(&self) -> usize {
        self.places.all.saturating_sub(self.all.available_permits())
    }

    fn turn(&self, source: Source) -> Result<Turn<'_>, NoPlace> {
        let Places { all, per_source, waiting_per_source, waiting, .. } = self.places;
        let mut waits = self.waits();
        let others = waits.connections;
        let is_new = !waits.of.contains_key(&source);
        if others >= all + waiting - if is_new { 0 } else { waiting / 8 } {
            return Err(NoPlace::TooManyInAll(waiting));
        }
        let share = waits
            .of
            .entry(source)
            .or_insert_with(|| Share { places: Arc::new(Semaphore::new(per_source)), connections: 0 });
        if share.connections >= per_source + waiting_per_source {
            return Err(NoPlace::TooMany(waiting_per_source));
        }
        share.connections += 1;
        let places = share.places.clone();
        waits.connections += 1;
        Ok(Turn { of: self, source, places, taken: false })
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.taken {
            self.places.add_permits(1);
        }
        let mut waits = self.of.waits();
        waits.connections -= 1;
        if let Some(share) = waits.of.get_mut(&self.source) {
            share.connections -= 1;
            if share.connections == 0 {
                waits.of.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: Places = Places {
        all: 4,
        per_source: 2,
        waiting_per_source: 3,
        waiting: 16,
        patience: Duration::from_secs(10),
    };

    fn source(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_stalls_waits_for_itself() {
        let handshakes = Handshakes::new(PLACES);
        let stalled =
            [handshakes.place(source(1)).await.unwrap(), handshakes.place(source(1)).await.unwrap()];
        let start = Instant::now();
        let third = handshakes.place(source(1)).await.map(drop);
        assert_eq!(third, Err(NoPlace::TimedOut(PLACES.patience)));
        assert_eq!(start.elapsed(), PLACES.patience);
        let other = handshakes.place(source(2)).await.unwrap();
        assert_eq!(start.elapsed(), PLACES.patience, "another source had to wait");
        assert_eq!(handshakes.active(), 3);
        drop((stalled, other));
        assert_eq!(handshakes.active(), 0);
        assert!(handshakes.waits().of.is_empty(), "sources are remembered for ever");
        drop(handshakes.place(source(1)).await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_becomes_free_goes_to_the_first_that_waits() {
        let handshakes = Handshakes::new(PLACES);
        let taken = (handshakes.place(source(1)).await.unwrap(), handshakes.place(source(1)).await.unwrap());
        let (waited, ()) = tokio::join!(handshakes.place(source(1)), async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            drop(taken.0);
        });
        drop(waited.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_that_wait_are_turned_away_at_once() {
        let handshakes = Handshakes::new(PLACES);
        let attempts = (0..6).map(|_| async { handshakes.place(source(1)).await.map(std::mem::forget) });
        let mut attempts: Vec<_> = attempts.map(Box::pin).collect();
        let mut outcomes = Vec::new();
        for attempt in &mut attempts {
            outcomes.push(tokio::time::timeout(Duration::ZERO, attempt).await.ok());
        }
        let expected = [Some(Ok(())), Some(Ok(())), None, None, None, Some(Err(NoPlace::TooMany(3)))];
        assert_eq!(outcomes, expected);
        // Whoever gives up waiting leaves the queue.
        drop(attempts);
        assert_eq!(handshakes.waits().of[&Source::of(source(1))].connections, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_with_many_addresses_waits_for_itself() {
        let handshakes = Handshakes::new(PLACES);
        let address = |n: u16| IpAddr::from([0xfd00, 0, 0, 1, 0, 0, 0, n]);
        let taken =
            (handshakes.place(address(1)).await.unwrap(), handshakes.place(address(2)).await.unwrap());
        let third = handshakes.place(address(3)).await.map(drop);
        assert_eq!(third, Err(NoPlace::TimedOut(PLACES.patience)));
        drop(handshakes.place([0xfd00, 0, 0, 2, 0, 0, 0, 1].into()).await.unwrap());
        drop(taken);
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_wait_are_limited_over_all_sources() {
        let handshakes = Handshakes::new(PLACES);
        let mut waiting = Vec::new();
        let mut refused = 0;
        let begin = async |source_number: u8| {
            let mut attempt = Box::pin(handshakes.place(source(source_number)));
            match tokio::time::timeout(Duration::ZERO, &mut attempt).await {
                Ok(Err(error)) => Err(error),
                Ok(Ok(place)) => Ok((Some(place), None)),
                Err(_) => Ok((None, Some(attempt))),
            }
        };
        for source in 0..8 {
            for _ in 0..5 {
                match begin(source).await {
                    Ok(one) => waiting.push(one),
                    Err(error) => {
                        assert_eq!(error, NoPlace::TooManyInAll(16));
                        refused += 1;
                    }
                }
            }
        }
        // Four have places, sixteen wait, two of these as the first of their source.
        assert_eq!((waiting.len(), refused), (20, 20));
        let held = |source_number: u8| {
            handshakes.waits().of.get(&Source::of(source(source_number))).map_or(0, |share| share.connections)
        };
        assert_eq!((0..8).map(held).collect::<Vec<_>>(), [5, 5, 5, 3, 1, 1, 0, 0]);
        assert_eq!(begin(9).await.err(), Some(NoPlace::TooManyInAll(16)));
        drop(waiting);
        drop(begin(9).await.unwrap());
        assert_eq!(handshakes.waits().connections, 0);
    }
}
