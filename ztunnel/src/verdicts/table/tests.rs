//! What stands after any sequence of changes is what the judge would say from scratch; and nothing that is allowed stalls on the
//! way there.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use net::Netns;
use proptest::prelude::*;

use super::*;
use crate::verdicts::kernel::{Kernel, Listing, Passed};

const PAIRS: u8 = 6;
const WAYS: u8 = 10;

#[derive(Default, Debug)]
struct Written {
    /// The generation, or 0 where it is revoked.
    pairs: BTreeMap<Pair, u64>,
    oldest: u64,
    ways: BTreeMap<SocketAddr, Pair>,
    /// Pairs that must not stall.
    allowed: BTreeSet<Pair>,
    stalled: Vec<Pair>,
    /// Fails what takes back.
    broken: bool,
    /// Sockets that `end` does not get rid of.
    held: BTreeSet<Pair>,
}

impl Written {
    fn is_live(&self, pair: &Pair) -> bool {
        self.pairs.get(pair).is_some_and(|generation| *generation != 0 && *generation >= self.oldest)
    }

    fn changed(&mut self) {
        let stalled = self.allowed.iter().filter(|pair| self.pairs.contains_key(pair) && !self.is_live(pair));
        self.stalled.extend(stalled.copied().collect::<Vec<_>>());
    }

    fn take_back(&self) -> io::Result<()> {
        if self.broken { Err(io::Error::other("broken")) } else { Ok(()) }
    }
}

/// A kernel that notes.
#[derive(Default)]
struct Notes(Mutex<Written>);

impl Kernel for Notes {
    fn join(&self, _: &Netns) -> Result<bool, String> {
        Ok(true)
    }

    fn leave(&self, _: &Netns) {}

    fn allow(&self, _: (&Netns, &Netns), pair: &Pair, generation: NonZeroU64) -> io::Result<()> {
        self.0.lock().unwrap().pairs.insert(*pair, generation.get());
        Ok(())
    }

    fn revoke(&self, pair: &Pair) -> io::Result<()> {
        let mut written = self.0.lock().unwrap();
        written.take_back()?;
        if let Some(generation) = written.pairs.get_mut(pair) {
            *generation = 0;
        }
        written.changed();
        Ok(())
    }

    fn end(&self, _: (Option<&Netns>, Option<&Netns>), pair: &Pair) -> io::Result<(usize, usize)> {
        self.revoke(pair)?;
        let mut written = self.0.lock().unwrap();
        if written.held.contains(pair) {
            return Ok((0, 1));
        }
        written.pairs.remove(pair);
        Ok((1, 0))
    }

    fn lead(&self, _: &Netns, dialled: SocketAddr, pair: &Pair) -> io::Result<()> {
        self.0.lock().unwrap().ways.insert(dialled, *pair);
        Ok(())
    }

    fn withdraw(&self, _: &Netns, dialled: SocketAddr) -> io::Result<()> {
        let mut written = self.0.lock().unwrap();
        written.take_back()?;
        written.ways.remove(&dialled);
        Ok(())
    }

    fn commit(&self, generation: NonZeroU64) -> io::Result<()> {
        let mut written = self.0.lock().unwrap();
        written.take_back()?;
        written.oldest = generation.get();
        written.changed();
        Ok(())
    }

    fn renew(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        Ok(())
    }

    fn inherit(&self) -> io::Result<Vec<Pair>> {
        Ok(Vec::new())
    }

    fn ended(&self, _: usize) -> io::Result<Vec<Passed>> {
        Ok(Vec::new())
    }

    fn listing(&self) -> io::Result<Listing> {
        Ok(Listing::default())
    }

    fn tallies(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

struct Here(Netns);

impl Ends for Here {
    fn netns(&self) -> (&Netns, &Netns) {
        (&self.0, &self.0)
    }
}

/// What policies and routes say at the moment.
#[derive(Default)]
struct Says {
    denied: RefCell<BTreeSet<Pair>>,
    astray: RefCell<BTreeSet<(SocketAddr, Pair)>>,
}

impl Says {
    fn allows(&self, pair: &Pair) -> bool {
        !self.denied.borrow().contains(pair)
    }

    fn goes(&self, dialled: SocketAddr, pair: &Pair) -> bool {
        !self.astray.borrow().contains(&(dialled, *pair))
    }
}

impl Judge<Here, u8> for Says {
    fn against(&self, pair: &Pair, _: &Here) -> Option<String> {
        (!self.allows(pair)).then(|| "denied".to_owned())
    }

    fn leads(&self, way: &Way, pair: &Pair, _: &Here, _: &u8) -> bool {
        self.goes(way.dialled, pair)
    }
}

fn netns() -> Netns {
    Netns::open("/proc/self/ns/net").unwrap()
}

fn pair(number: u8) -> Pair {
    Pair {
        source: IpAddr::from([10, 0, 0, number]),
        to: SocketAddr::from(([10, 0, 1, number % 3], 80 + u16::from(number))),
    }
}

fn dialled(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 96, 0, number], 80))
}

struct Stand {
    kernel: Notes,
    says: Says,
    table: Table<Here, u8>,
    netns: Netns,
}

impl Stand {
    fn new(most: usize) -> Self {
        Self { kernel: Notes::default(), says: Says::default(), table: Table::new(most), netns: netns() }
    }

    fn offer(&mut self, way: u8, to: u8) -> Result<(), NotWritten> {
        let netns = self.netns.clone();
        let way = (Way { netns: netns.id(), dialled: dialled(way) }, Arc::new(way));
        self.table.offer((&self.kernel, &self.says), way, (pair(to), Arc::new(Here(netns))))
    }

    /// Judges again, and ends what is over, as the thread does.
    fn recheck(&mut self) -> io::Result<()> {
        self.kernel.0.lock().unwrap().allowed =
            (0..PAIRS).map(pair).filter(|pair| self.says.allows(pair) && self.table.holds(pair)).collect();
        let (over, outcome) = self.table.recheck(&self.kernel, &self.says);
        self.end(&over);
        outcome
    }

    fn end(&mut self, over: &[Over<Here>]) {
        for Over { pair, ends, .. } in over {
            let (source, destination) = ends.netns();
            if let Ok((_, 0)) = self.kernel.end((Some(source), Some(destination)), pair) {
                self.table.ended(pair);
            }
        }
    }

    fn look(&mut self, open: &HashSet<Pair>) {
        self.kernel.0.lock().unwrap().allowed =
            open.iter().copied().filter(|p| self.table.holds(p)).collect();
        let over = self.table.idle(open);
        self.end(&over);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Offer(u8, u8),
    Deny(u8, bool),
    Astray(u8, u8, bool),
    Recheck,
    Look(Vec<u8>),
    Broken(bool),
    Hold(u8, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..WAYS, 0..PAIRS).prop_map(|(way, pair)| Step::Offer(way, pair)),
        3 => (0..PAIRS, any::<bool>()).prop_map(|(pair, deny)| Step::Deny(pair, deny)),
        3 => (0..WAYS, 0..PAIRS, any::<bool>()).prop_map(|(way, pair, no)| Step::Astray(way, pair, no)),
        3 => Just(Step::Recheck),
        2 => proptest::collection::vec(0..PAIRS, 0..4).prop_map(Step::Look),
        1 => any::<bool>().prop_map(Step::Broken),
        1 => (0..PAIRS, any::<bool>()).prop_map(|(pair, hold)| Step::Hold(pair, hold)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_stands_is_what_would_be_said_from_scratch(
        most in 1_usize..8,
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let mut stand = Stand::new(most);
        for step in steps {
            match step {
                Step::Offer(way, to) => {
                    // What is allowed and refused all the same is so for a reason that is told.
                    if stand.offer(way, to).is_ok() {
                        prop_assert!(stand.says.allows(&pair(to)) && stand.says.goes(dialled(way), &pair(to)));
                    }
                }
                Step::Deny(number, deny) => {
                    let mut denied = stand.says.denied.borrow_mut();
                    if deny { denied.insert(pair(number)) } else { denied.remove(&pair(number)) };
                }
                Step::Astray(way, to, no) => {
                    let mut astray = stand.says.astray.borrow_mut();
                    let key = (dialled(way), pair(to));
                    if no { astray.insert(key) } else { astray.remove(&key) };
                }
                Step::Recheck => {
                    let outcome = stand.recheck();
                    let written = stand.kernel.0.lock().unwrap();
                    for found in written.pairs.keys() {
                        let stands = written.is_live(found);
                        prop_assert!(outcome.is_err() || !stands || stand.says.allows(found), "{found:?}");
                        prop_assert_eq!(outcome.is_ok() && stand.table.holds(found), outcome.is_ok() && stands);
                    }
                    for (way, to) in &written.ways {
                        let right = written.is_live(to) && stand.says.goes(*way, to);
                        prop_assert!(outcome.is_err() || right, "{way} leads to {to:?}");
                    }
                }
                Step::Look(open) => stand.look(&open.into_iter().map(pair).collect()),
                Step::Broken(broken) => stand.kernel.0.lock().unwrap().broken = broken,
                Step::Hold(number, hold) => {
                    let held = &mut stand.kernel.0.lock().unwrap().held;
                    if hold { held.insert(pair(number)) } else { held.remove(&pair(number)) };
                }
            }
            let written = stand.kernel.0.lock().unwrap();
            prop_assert!(written.stalled.is_empty(), "{:?} are allowed, and stalled", written.stalled);
            let (ways, pairs) = stand.table.len();
            prop_assert!(ways <= most && pairs <= most);
            prop_assert!(written.broken || written.ways.len() == ways, "{:?}", written.ways);
        }
    }
}

#[test]
fn a_pair_that_nothing_leads_to_is_forgotten_when_it_has_been_looked_at_often_enough() {
    let mut stand = Stand::new(8);
    stand.offer(1, 1).unwrap();
    stand.says.astray.borrow_mut().insert((dialled(1), pair(1)));
    stand.recheck().unwrap();
    // What was opened goes on.
    let open = [pair(1)].into();
    for _ in 0..5 {
        stand.look(&open);
    }
    assert!(stand.table.holds(&pair(1)));
    assert_eq!(stand.table.told(Some(dialled(1)), &pair(1)).as_deref(), Some(&1));
    for _ in 0..LOOKS {
        stand.look(&HashSet::new());
        assert!(stand.table.holds(&pair(1)));
    }
    stand.look(&HashSet::new());
    assert!(stand.table.len().1 == 0 && stand.kernel.0.lock().unwrap().pairs.is_empty());
}

#[test]
fn the_way_that_was_not_used_for_longest_gives_its_place_and_its_pair_goes_on() {
    let mut stand = Stand::new(2);
    stand.offer(1, 1).unwrap();
    stand.offer(2, 1).unwrap();
    assert!(stand.table.told(Some(dialled(1)), &pair(1)).is_some());
    stand.offer(3, 2).unwrap();
    let ways: Vec<_> = stand.kernel.0.lock().unwrap().ways.keys().copied().collect();
    assert_eq!(ways, [dialled(1), dialled(3)]);
    assert_eq!(stand.table.displaced(), (1, 0));
    // Both pairs are in use.
    assert!(matches!(stand.offer(4, 3), Err(NotWritten::NoRoom)));
    assert_eq!(stand.table.displaced(), (1, 1));
}

#[test]
fn what_can_not_be_taken_back_is_told_until_it_is() {
    let mut stand = Stand::new(8);
    stand.offer(1, 1).unwrap();
    stand.says.denied.borrow_mut().insert(pair(1));
    stand.kernel.0.lock().unwrap().broken = true;
    stand.recheck().unwrap_err();
    stand.recheck().unwrap_err();
    assert!(!stand.table.holds(&pair(1)));
    assert!(stand.offer(1, 1).is_err());
    stand.kernel.0.lock().unwrap().broken = false;
    stand.recheck().unwrap();
    let written = stand.kernel.0.lock().unwrap();
    assert!(written.pairs.is_empty() && written.ways.is_empty() && stand.table.len().1 == 0);
}
