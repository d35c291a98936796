//! The verdicts that were written: what stands in the kernel's maps, and when it goes.
//!
//! ```text
//!            offered, judged                      judged again: no             sockets destroyed
//!   nothing ----------------> Held, with ways -------------------> Revoked -----------------------> nothing
//!                               |  no way left, no connection open                                     ^
//!                               +----------------------------------------------------------------------+
//! ```
//!
//! A pair is what the kernel lets pass; a way is an address that a pod dials, which leads to one, or to one of several as their
//! weights say. What may be opened by a way is asked for the way with all of its pairs; what may go on is asked for the pair.
//!
//! A source has a share of all that there may be. Beyond it the way of its own that was not used for longest gives its place;
//! where all are given, the one of the source that has most.
//!
//! Invariants:
//! * nothing is written that the judge does not allow by the snapshot of that moment, and what it does not allow any more is
//!   revoked after [`Table::recheck`], or told: whoever renews the lease then has to stop;
//! * nothing is forgotten without a look that none of its sockets is left: they would go on unseen.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use net::{Netns, NetnsId};
use tokio::time::Instant;

use super::kernel::{Ending, Kernel, Pair, Way};

/// Looks so often at a pair without a way before it is forgotten: a connection may have been led here and not be made yet.
const LOOKS: u8 = 2;
/// Ways to a pair of which something is told; a destination is dialled by its own address, and those of its services.
const TOLD: usize = 16;
/// Ways that a source loses between two looks so that there is room for pairs.
const RELIEF: usize = 64;

/// How many ways there may be, and as many pairs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// In all.
    pub all: usize,
    /// Of one source.
    pub each: usize,
}

/// Both ends of a pair.
pub trait Ends {
    /// The source's namespace, and the destination's.
    fn netns(&self) -> (&Netns, &Netns);
}

/// One of the places that a way leads to.
pub struct Lead<E, S> {
    /// Which.
    pub pair: Pair,
    /// How often it is taken beside the others.
    pub weight: u32,
    /// Its ends.
    pub ends: E,
    /// What is told of connections by this way.
    pub told: S,
}

/// Who decides.
pub trait Judge<E, S> {
    /// Why connections of the pair may not go on, if they may not.
    fn against(&self, pair: &Pair, ends: &E) -> Option<String>;

    /// Whether new connections may take the way to all of these, and to no other.
    fn leads(&self, way: &Way, leads: &[Lead<&E, &S>]) -> bool;
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

impl<E: Ends> Over<E> {
    /// The same, for the kernel.
    pub fn ending(&self) -> Ending<'_> {
        let (source, destination) = self.ends.netns();
        Ending { pair: self.pair, netns: [Some(source), Some(destination)] }
    }
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
    source: IpAddr,
    /// The pairs with their weights.
    to: Vec<(Pair, u32)>,
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

/// How often there was no place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Crowded {
    /// Ways that gave their place to another of their source.
    pub of_source: u64,
    /// To one of another source.
    pub of_all: u64,
    /// Offers for whose pairs there was none.
    pub no_room: u64,
}

/// What stands in the maps.
pub struct Table<E, S> {
    pairs: HashMap<Pair, Held<E, S>>,
    ways: HashMap<Way, Led>,
    /// Ways that are not written before some time: each connection is ztunnel's to decide.
    later: HashMap<Way, Instant>,
    /// Sources that are to lose so many ways.
    relief: HashMap<IpAddr, usize>,
    limits: Limits,
    generation: NonZeroU64,
    clock: u64,
    crowded: Crowded,
}

impl<E: Ends, S> Table<E, S> {
    /// An empty one.
    pub fn new(limits: Limits) -> Self {
        Self {
            pairs: HashMap::new(),
            ways: HashMap::new(),
            later: HashMap::new(),
            relief: HashMap::new(),
            limits,
            generation: NonZeroU64::MIN,
            clock: 0,
            crowded: Crowded::default(),
        }
    }

    /// Whether the way may be written: it is not there, and nothing was against it just now.
    pub fn wants(&self, way: &Way) -> bool {
        !self.ways.contains_key(way) && self.later.get(way).is_none_or(|until| *until <= Instant::now())
    }

    /// Has the way not written for a while.
    pub fn put_off(&mut self, way: Way, pause: Duration) {
        let now = Instant::now();
        if self.later.len() >= self.limits.all {
            self.later.retain(|_, until| *until > now);
        }
        // Beyond the limit it is asked for more often than need be.
        if self.later.len() < self.limits.all {
            self.later.insert(way, now + pause);
        }
    }

    /// Ways and pairs.
    pub fn len(&self) -> (usize, usize) {
        (self.ways.len(), self.pairs.len())
    }

    /// Sources that have as many ways, or pairs, as one may have.
    pub fn full_sources(&self) -> usize {
        let full = |counts: BTreeMap<IpAddr, usize>| {
            let each = self.limits.each;
            counts.into_iter().filter(move |(_, count)| *count >= each).map(|(source, _)| source)
        };
        full(self.ways_of_sources()).chain(full(self.pairs_of_sources())).collect::<HashSet<_>>().len()
    }

    fn ways_of_sources(&self) -> BTreeMap<IpAddr, usize> {
        counted(self.ways.values().map(|led| led.source))
    }

    fn pairs_of_sources(&self) -> BTreeMap<IpAddr, usize> {
        counted(self.pairs.keys().map(|pair| pair.source))
    }

    /// How often there was no place.
    pub fn crowded(&self) -> Crowded {
        self.crowded
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

    /// Writes verdicts for all that the way leads to, if the judge allows it.
    ///
    /// # Errors
    /// Why they were not written.
    pub fn offer(
        &mut self,
        (kernel, judge): (&dyn Kernel, &impl Judge<E, S>),
        way: Way,
        mut leads: Vec<Lead<Arc<E>, Arc<S>>>,
    ) -> Result<(), NotWritten> {
        let is_known =
            |led: &Led| led.to.iter().copied().eq(leads.iter().map(|lead| (lead.pair, lead.weight)));
        if self.ways.get(&way).is_some_and(is_known) {
            return Err(NotWritten::Known);
        }
        let mut new = HashSet::new();
        for lead in &mut leads {
            match self.pairs.get(&lead.pair) {
                Some(held) if held.revoked.is_some() => return Err(NotWritten::NotAllowed),
                Some(held) => lead.ends = held.ends.clone(),
                None => drop(new.insert(lead.pair)),
            }
        }
        let Some(source) = leads.first().map(|lead| lead.pair.source) else {
            return Err(NotWritten::NotAllowed);
        };
        let judged: Vec<_> = leads
            .iter()
            .map(|Lead { pair, weight, ends, told }| Lead {
                pair: *pair,
                weight: *weight,
                ends: &**ends,
                told: &**told,
            })
            .collect();
        let is_distinct = judged.iter().map(|lead| lead.pair).collect::<HashSet<_>>().len() == judged.len();
        if !is_distinct
            || judged.iter().any(|lead| lead.pair.source != source)
            || judged.iter().any(|lead| judge.against(&lead.pair, lead.ends).is_some())
            || !judge.leads(&way, &judged)
        {
            return Err(NotWritten::NotAllowed);
        }
        if !self.has_room(source, new.len()) {
            self.crowded.no_room += 1;
            return Err(NotWritten::NoRoom);
        }
        self.make_room(kernel, &way, source)?;
        let written = self.write(kernel, way, source, leads);
        if written.is_err() {
            self.take_back(kernel, &way)?;
        }
        Ok(written?)
    }

    fn write(
        &mut self,
        kernel: &dyn Kernel,
        way: Way,
        source: IpAddr,
        leads: Vec<Lead<Arc<E>, Arc<S>>>,
    ) -> io::Result<()> {
        let Some(netns) = leads.first().map(|lead| lead.ends.netns().0.clone()) else { return Ok(()) };
        self.clock += 1;
        // Noted first: what fails half-way is taken back with the rest.
        let led = Led { source, to: Vec::new(), netns: netns.clone(), used: self.clock };
        let led = self.ways.entry(way).insert_entry(led).into_mut();
        for Lead { pair, weight, ends, told } in leads {
            kernel.allow(ends.netns(), &pair, self.generation)?;
            let held = self.pairs.entry(pair).or_insert_with(|| Held::new(ends));
            (held.ways, held.looks) = (held.ways + 1, 0);
            held.tell(way, told);
            led.to.push((pair, weight));
        }
        kernel.lead(&netns, way.dialled, &led.to)
    }

    /// Whether there is room for so many pairs more of a source. If not, whoever has most of it is to lose some.
    fn has_room(&mut self, source: IpAddr, more: usize) -> bool {
        if more == 0 {
            return true;
        }
        let counts = self.pairs_of_sources();
        let full = if counts.get(&source).copied().unwrap_or(0) + more > self.limits.each {
            Some(source)
        } else if self.pairs.len() + more > self.limits.all {
            greatest(&counts)
        } else {
            return true;
        };
        if let Some(full) = full {
            let ways = self.relief.entry(full).or_default();
            *ways = (*ways + 1).min(RELIEF);
        }
        false
    }

    /// Takes back what stood in the way's place, or the one that gives its place. What that opened goes on.
    fn make_room(&mut self, kernel: &dyn Kernel, way: &Way, source: IpAddr) -> io::Result<()> {
        self.take_back(kernel, way)?;
        let counts = self.ways_of_sources();
        let from = if counts.get(&source).is_some_and(|count| *count >= self.limits.each) {
            Some(source)
        } else if self.ways.len() >= self.limits.all {
            greatest(&counts)
        } else {
            return Ok(());
        };
        if from == Some(source) {
            self.crowded.of_source += 1;
        } else {
            self.crowded.of_all += 1;
        }
        from.map_or(Ok(()), |from| self.take_oldest(kernel, from))
    }

    /// Takes back the way of a source that was not used for longest.
    fn take_oldest(&mut self, kernel: &dyn Kernel, source: IpAddr) -> io::Result<()> {
        let own = self.ways.iter().filter(|(_, led)| led.source == source);
        let oldest = own.min_by_key(|(_, led)| led.used).map(|(way, _)| *way);
        oldest.map_or(Ok(()), |oldest| self.take_back(kernel, &oldest))
    }

    /// Leaves what the way leads to capture.
    fn take_back(&mut self, kernel: &dyn Kernel, way: &Way) -> io::Result<()> {
        let Some(led) = self.ways.get(way) else { return Ok(()) };
        kernel.withdraw(&led.netns, way.dialled)?;
        for (pair, _) in &led.to {
            if let Some(held) = self.pairs.get_mut(pair) {
                held.ways = held.ways.saturating_sub(1);
            }
        }
        self.ways.remove(way);
        Ok(())
    }

    /// A connection that was led by the way did not come about. Another may be led elsewhere, which is for ztunnel to choose:
    /// the way is taken back, and not written for a while.
    ///
    /// # Errors
    /// It can't be taken back.
    pub fn failed(
        &mut self,
        kernel: &dyn Kernel,
        dialled: SocketAddr,
        pair: &Pair,
        pause: Duration,
    ) -> io::Result<()> {
        // What is revoked has ended its connections itself.
        let Some(held) = self.pairs.get(pair).filter(|held| held.revoked.is_none()) else { return Ok(()) };
        let way = Way { netns: held.ends.netns().0.id(), dialled };
        if !self.ways.contains_key(&way) {
            return Ok(());
        }
        self.put_off(way, pause);
        self.take_back(kernel, &way)
    }

    /// The way's pairs, unless one of them is revoked, or nothing is told of it.
    fn leads(&self, way: &Way, led: &Led) -> Option<Vec<Lead<&E, &S>>> {
        let lead = |(pair, weight): &(Pair, u32)| {
            let held = self.pairs.get(pair).filter(|held| held.revoked.is_none())?;
            Some(Lead { pair: *pair, weight: *weight, ends: &*held.ends, told: &**held.told(way)? })
        };
        led.to.iter().map(lead).collect()
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
            (!self.leads(way, led).is_some_and(|leads| judge.leads(way, &leads))).then_some(*way)
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

    /// Takes ways back of the sources that have most, where there was no room for pairs: these are idle then before long.
    ///
    /// # Errors
    /// A way can't be taken back.
    pub fn relieve(&mut self, kernel: &dyn Kernel) -> io::Result<()> {
        for (source, ways) in std::mem::take(&mut self.relief) {
            for _ in 0..ways {
                self.take_oldest(kernel, source)?;
            }
        }
        Ok(())
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

/// How often each comes.
fn counted(sources: impl Iterator<Item = IpAddr>) -> BTreeMap<IpAddr, usize> {
    let mut counts = BTreeMap::new();
    sources.for_each(|source| *counts.entry(source).or_default() += 1);
    counts
}

/// Which comes most often.
fn greatest(counts: &BTreeMap<IpAddr, usize>) -> Option<IpAddr> {
    counts.iter().max_by_key(|(_, count)| **count).map(|(source, _)| *source)
}

#[cfg(test)]
mod tests;
