//! The verdicts that were written: what stands in the kernel's maps, and when it goes.
//!
//! ```text
//!            offered, judged                      judged again: no             sockets destroyed
//!   nothing ----------------> Held, with ways -------------------> Revoked -----------------------> nothing
//!                               |  no way left, no connection open                                     ^
//!                               +----------------------------------------------------------------------+
//! ```
//!
//! A pair is what the kernel lets pass; a way is an address that a pod dials, which leads there. What may be opened by a way is
//! asked for the way; what may go on is asked for the pair.
//!
//! Invariants:
//! * nothing is written that the judge does not allow by the snapshot of that moment, and what it does not allow any more is
//!   revoked after [`Table::recheck`], or told: whoever renews the lease then has to stop;
//! * nothing is forgotten without a look that none of its sockets is left: they would go on unseen.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;

use net::{Netns, NetnsId};

use super::kernel::{Kernel, Pair, Way};

/// Looks so often at a pair without a way before it is forgotten: a connection may have been led here and not be made yet.
const LOOKS: u8 = 2;
/// Ways to a pair of which something is told; a destination is dialled by its own address, and those of its services.
const TOLD: usize = 16;

/// Both ends of a pair.
pub trait Ends {
    /// The source's namespace, and the destination's.
    fn netns(&self) -> (&Netns, &Netns);
}

/// Who decides.
pub trait Judge<E, S> {
    /// Why connections of the pair may not go on, if they may not.
    fn against(&self, pair: &Pair, ends: &E) -> Option<String>;

    /// Whether new connections may take the way to the pair.
    fn leads(&self, way: &Way, pair: &Pair, ends: &E, told: &S) -> bool;
}

/// Why a verdict was not written.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten {
    /// It is there.
    #[error("it is there")]
    Known,
    /// There are as many as there may be, and all are in use.
    #[error("there are as many as there may be")]
    NoRoom,
    /// The judge is against it, or it is about to be revoked.
    #[error("it may not pass")]
    NotAllowed,
    /// The kernel refuses.
    #[error("{0}")]
    Kernel(#[from] io::Error),
}

/// A pair that is to end.
pub struct Over<E> {
    /// Which.
    pub pair: Pair,
    /// Its ends.
    pub ends: Arc<E>,
    /// Why; nothing of it was open otherwise.
    pub reason: Option<Arc<str>>,
}

struct Held<E, S> {
    ends: Arc<E>,
    revoked: Option<Arc<str>>,
    ways: usize,
    looks: u8,
    /// What is told of connections, by the way that they took: also of ways that are gone, for what they opened.
    told: Vec<(Way, Arc<S>)>,
}

struct Led {
    pair: Pair,
    netns: Netns,
    used: u64,
}

impl<E, S> Held<E, S> {
    fn new(ends: Arc<E>) -> Self {
        Self { ends, revoked: None, ways: 0, looks: 0, told: Vec::new() }
    }

    fn tell(&mut self, way: Way, told: Arc<S>) {
        self.told.retain(|(known, _)| *known != way);
        if self.told.len() >= TOLD {
            self.told.remove(0);
        }
        self.told.push((way, told));
    }

    fn told(&self, way: &Way) -> Option<&Arc<S>> {
        self.told.iter().find(|(known, _)| known == way).map(|(_, told)| told)
    }
}

/// What stands in the maps.
pub struct Table<E, S> {
    pairs: HashMap<Pair, Held<E, S>>,
    ways: HashMap<Way, Led>,
    most: usize,
    generation: NonZeroU64,
    clock: u64,
    displaced: u64,
    no_room: u64,
}

impl<E: Ends, S> Table<E, S> {
    /// An empty one for so many ways, and pairs.
    pub fn new(most: usize) -> Self {
        Self {
            pairs: HashMap::new(),
            ways: HashMap::new(),
            most,
            generation: NonZeroU64::MIN,
            clock: 0,
            displaced: 0,
            no_room: 0,
        }
    }

    /// Whether the way is there.
    pub fn knows(&self, way: &Way) -> bool {
        self.ways.contains_key(way)
    }

    /// Ways and pairs.
    pub fn len(&self) -> (usize, usize) {
        (self.ways.len(), self.pairs.len())
    }

    /// Ways that gave their place to another, and offers for which there was none.
    pub fn displaced(&self) -> (u64, u64) {
        (self.displaced, self.no_room)
    }

    /// What is told of a connection of the pair to what was `dialled`; where that is not known, of the way that came last.
    pub fn told(&mut self, dialled: Option<SocketAddr>, pair: &Pair) -> Option<Arc<S>> {
        let held = self.pairs.get(pair)?;
        let Some(dialled) = dialled else { return held.told.last().map(|(_, told)| told.clone()) };
        let way = Way { netns: held.ends.netns().0.id(), dialled };
        self.clock += 1;
        if let Some(led) = self.ways.get_mut(&way) {
            led.used = self.clock;
        }
        held.told(&way).cloned()
    }

    /// Whether the pair may pass.
    pub fn holds(&self, pair: &Pair) -> bool {
        self.pairs.get(pair).is_some_and(|held| held.revoked.is_none())
    }

    /// The namespaces that pairs are of.
    pub fn namespaces(&self) -> HashSet<NetnsId> {
        let both = |held: &Held<E, S>| {
            let (source, destination) = held.ends.netns();
            [source.id(), destination.id()]
        };
        self.pairs.values().flat_map(both).collect()
    }

    /// Writes a verdict, if the judge allows it.
    ///
    /// # Errors
    /// Why it was not written.
    pub fn offer(
        &mut self,
        (kernel, judge): (&dyn Kernel, &impl Judge<E, S>),
        (way, told): (Way, Arc<S>),
        (pair, ends): (Pair, Arc<E>),
    ) -> Result<(), NotWritten> {
        if self.ways.get(&way).is_some_and(|led| led.pair == pair) {
            return Err(NotWritten::Known);
        }
        let held = self.pairs.get(&pair);
        let ends = held.map_or(ends, |held| held.ends.clone());
        if held.is_some_and(|held| held.revoked.is_some())
            || judge.against(&pair, &ends).is_some()
            || !judge.leads(&way, &pair, &ends, &told)
        {
            return Err(NotWritten::NotAllowed);
        }
        if held.is_none() && self.pairs.len() >= self.most {
            self.no_room += 1;
            return Err(NotWritten::NoRoom);
        }
        self.make_room(kernel, &way)?;
        let (source, destination) = ends.netns();
        let netns = source.clone();
        kernel.allow((source, destination), &pair, self.generation)?;
        let held = self.pairs.entry(pair).or_insert_with(|| Held::new(ends));
        (held.ways, held.looks) = (held.ways + 1, 0);
        held.tell(way, told);
        self.clock += 1;
        // Noted first: what fails half-way is taken back with the rest.
        self.ways.insert(way, Led { pair, netns: netns.clone(), used: self.clock });
        if let Err(error) = kernel.lead(&netns, way.dialled, &pair) {
            self.take_back(kernel, &way)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes back what stood in the way's place, or the one that was not used for longest. What that opened goes on.
    fn make_room(&mut self, kernel: &dyn Kernel, way: &Way) -> io::Result<()> {
        if self.ways.contains_key(way) {
            return self.take_back(kernel, way);
        }
        if self.ways.len() < self.most {
            return Ok(());
        }
        let oldest = self.ways.iter().min_by_key(|(_, led)| led.used).map(|(way, _)| *way);
        self.displaced += 1;
        oldest.map_or(Ok(()), |oldest| self.take_back(kernel, &oldest))
    }

    /// Leaves what the way leads to capture.
    fn take_back(&mut self, kernel: &dyn Kernel, way: &Way) -> io::Result<()> {
        let Some(led) = self.ways.get(way) else { return Ok(()) };
        kernel.withdraw(&led.netns, way.dialled)?;
        if let Some(held) = self.pairs.get_mut(&led.pair) {
            held.ways = held.ways.saturating_sub(1);
        }
        self.ways.remove(way);
        Ok(())
    }

    /// Asks again of all that stands. Returns the pairs that are revoked, those of earlier rounds too: they are to be ended, see
    /// [`Table::ended`]. With an error something could not be taken back; all the rest was.
    pub fn recheck(
        &mut self,
        kernel: &dyn Kernel,
        judge: &impl Judge<E, S>,
    ) -> (Vec<Over<E>>, io::Result<()>) {
        let mut is_new = false;
        for (pair, held) in &mut self.pairs {
            if held.revoked.is_none()
                && let Some(reason) = judge.against(pair, &held.ends)
            {
                held.revoked = Some(reason.into());
                is_new = true;
            }
        }
        let over = |(way, led): (&Way, &Led)| {
            let held = self.pairs.get(&led.pair);
            let leads = |held: &Held<E, S>| {
                held.revoked.is_none()
                    && held.told(way).is_some_and(|told| judge.leads(way, &led.pair, &held.ends, told))
            };
            (!held.is_some_and(leads)).then_some(*way)
        };
        // New connections come here first: they are refused with a reason.
        let over: Vec<Way> = self.ways.iter().filter_map(over).collect();
        let mut outcome = Ok(());
        for way in over {
            let taken = self.take_back(kernel, &way);
            outcome = outcome.and(taken);
        }
        if is_new {
            // What stands is of the next generation before the last one ends: none of its packets waits.
            outcome = outcome.and(self.next_generation(kernel));
        }
        let mut revoked = Vec::new();
        for (pair, held) in &self.pairs {
            if let Some(reason) = &held.revoked {
                outcome = outcome.and(kernel.revoke(pair));
                revoked.push(Over { pair: *pair, ends: held.ends.clone(), reason: Some(reason.clone()) });
            }
        }
        (revoked, outcome)
    }

    fn next_generation(&mut self, kernel: &dyn Kernel) -> io::Result<()> {
        let next = self.generation.saturating_add(1);
        for (pair, held) in self.pairs.iter().filter(|(_, held)| held.revoked.is_none()) {
            kernel.allow(held.ends.netns(), pair, next)?;
        }
        self.generation = next;
        kernel.commit(next)
    }

    /// Neither a socket of the pair is left nor what was written for it.
    pub fn ended(&mut self, pair: &Pair) {
        if self.pairs.get(pair).is_some_and(|held| held.ways == 0) {
            self.pairs.remove(pair);
        }
    }

    /// The pairs that no way leads to and that have no open connection: they are to be ended, and can't be offered until then.
    pub fn idle(&mut self, open: &HashSet<Pair>) -> Vec<Over<E>> {
        let mut over = Vec::new();
        for (pair, held) in &mut self.pairs {
            if held.ways > 0 || held.revoked.is_some() || open.contains(pair) {
                held.looks = 0;
                continue;
            }
            held.looks += 1;
            if held.looks > LOOKS {
                held.revoked = Some("nothing leads here".into());
                over.push(Over { pair: *pair, ends: held.ends.clone(), reason: None });
            }
        }
        over
    }
}

#[cfg(test)]
mod tests;
