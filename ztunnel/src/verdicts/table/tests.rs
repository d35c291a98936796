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
use crate::verdicts::kernel::{Ending, Kernel, Listing, Passed};

const PAIRS: u8 = 6;
const WAYS: u8 = 10;
/// Pairs with this number and the same rest are of one source.
const SOURCES: u8 = 2;
const NO_LIMIT: Limits = Limits { all: 8, each: 8 };

#[derive(Default, Debug)]
struct Written {
    /// The generation, or 0 where it is revoked.
    pairs: BTreeMap<Pair, u64>,
    oldest: u64,
    ways: BTreeMap<SocketAddr, Vec<(Pair, u32)>>,
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

    fn end(&self, over: &[Ending<'_>], _: &mut dyn FnMut()) -> Vec<io::Result<bool>> {
        let end = |Ending { pair, .. }: &Ending<'_>| {
            self.revoke(pair)?;
            let mut written = self.0.lock().unwrap();
            let is_over = !written.held.contains(pair);
            if is_over {
                written.pairs.remove(pair);
            }
            Ok(is_over)
        };
        over.iter().map(end).collect()
    }

    fn lead(&self, _: &Netns, dialled: SocketAddr, to: &[(Pair, u32)]) -> io::Result<()> {
        let mut written = self.0.lock().unwrap();
        assert!(
            to.iter().all(|(pair, _)| written.pairs.contains_key(pair)),
            "the offer is the last that is written"
        );
        written.ways.insert(dialled, to.to_vec());
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

    fn remove(&self) -> io::Result<bool> {
        Ok(true)
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

    fn leads(&self, way: &Way, leads: &[Lead<&Here, &u8>]) -> bool {
        leads.iter().all(|lead| self.goes(way.dialled, &lead.pair))
    }
}

fn netns() -> Netns {
    Netns::open("/proc/self/ns/net").unwrap()
}

fn pair(number: u8) -> Pair {
    Pair {
        source: IpAddr::from([10, 0, 0, number % SOURCES]),
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
    fn new(limits: Limits) -> Self {
        Self { kernel: Notes::default(), says: Says::default(), table: Table::new(limits), netns: netns() }
    }

    fn way(&self, way: u8) -> Way {
        Way { netns: self.netns.id(), dialled: dialled(way) }
    }

    fn offer(&mut self, way: u8, to: u8) -> Result<(), NotWritten> {
        self.offer_all(way, &[(pair(to), 1)])
    }

    fn offer_all(&mut self, way: u8, to: &[(Pair, u32)]) -> Result<(), NotWritten> {
        let lead = |(pair, weight): &(Pair, u32)| Lead {
            pair: *pair,
            weight: *weight,
            ends: Arc::new(Here(self.netns.clone())),
            told: Arc::new(way),
        };
        let leads = to.iter().map(lead).collect();
        self.table.offer((&self.kernel, &self.says), self.way(way), leads)
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
        let endings: Vec<_> = over.iter().map(Over::ending).collect();
        for (ending, outcome) in endings.iter().zip(self.kernel.end(&endings, &mut || ())) {
            if let Ok(true) = outcome {
                self.table.ended(&ending.pair);
            }
        }
    }

    fn look(&mut self, open: &HashSet<Pair>) {
        // What can't be taken back now is, when it is asked again.
        let _ = self.table.relieve(&self.kernel);
        self.kernel.0.lock().unwrap().allowed =
            open.iter().copied().filter(|p| self.table.holds(p)).collect();
        let over = self.table.idle(open);
        self.end(&over);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Offer(u8, BTreeSet<u8>),
    Failed(u8, u8),
    Deny(u8, bool),
    Astray(u8, u8, bool),
    Recheck,
    Look(Vec<u8>),
    Broken(bool),
    Hold(u8, bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..WAYS, proptest::collection::btree_set(0..PAIRS, 0..4)).prop_map(|(way, to)| Step::Offer(way, to)),
        1 => (0..WAYS, 0..PAIRS).prop_map(|(way, pair)| Step::Failed(way, pair)),
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
        (all, each) in (1_usize..8, 1_usize..8),
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let limits = Limits { all, each };
        let mut stand = Stand::new(limits);
        for step in steps {
            match step {
                Step::Offer(way, to) => {
                    let to: Vec<_> = to.into_iter().map(|number| (pair(number), u32::from(number))).collect();
                    // What is allowed and refused all the same is so for a reason that is told.
                    if stand.offer_all(way, &to).is_ok() {
                        let may = |pair: &Pair| stand.says.allows(pair) && stand.says.goes(dialled(way), pair);
                        prop_assert!(to.iter().all(|(pair, _)| may(pair)), "{to:?}");
                        prop_assert_eq!(&stand.kernel.0.lock().unwrap().ways[&dialled(way)], &to);
                        prop_assert!(to.iter().all(|(pair, _)| pair.source == to[0].0.source));
                    }
                }
                Step::Failed(way, to) => {
                    let holds = stand.table.holds(&pair(to));
                    let failed = stand.table.failed(&stand.kernel, dialled(way), &pair(to), Duration::from_secs(60));
                    let is_there = stand.kernel.0.lock().unwrap().ways.contains_key(&dialled(way));
                    prop_assert!(failed.is_err() || !holds || !is_there, "ztunnel is to choose");
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
                        let right = |pair| written.is_live(pair) && stand.says.goes(*way, pair);
                        let right = to.iter().all(|(pair, _)| right(pair));
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
            prop_assert!(ways <= all && pairs <= all);
            let most = |counts: BTreeMap<IpAddr, usize>| counts.into_values().max().unwrap_or(0);
            prop_assert!(most(stand.table.ways_of_sources()) <= each && most(stand.table.pairs_of_sources()) <= each);
            prop_assert!(written.broken || written.ways.len() == ways, "{:?}", written.ways);
        }
    }
}

#[test]
fn a_pair_that_nothing_leads_to_is_forgotten_when_it_has_been_looked_at_often_enough() {
    let mut stand = Stand::new(NO_LIMIT);
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

/// Pairs of a source that there are no others of.
fn pairs_of(source: u8, numbers: std::ops::Range<u8>) -> Vec<(Pair, u32)> {
    let to = |number| SocketAddr::from(([10, 0, 2, number], 80));
    numbers.map(|number| (Pair { source: IpAddr::from([10, 0, 9, source]), to: to(number) }, 1)).collect()
}

fn ways(stand: &Stand) -> Vec<SocketAddr> {
    stand.kernel.0.lock().unwrap().ways.keys().copied().collect()
}

fn crowded(stand: &Stand) -> (u64, u64, u64) {
    let Crowded { of_source, of_all, no_room } = stand.table.crowded();
    (of_source, of_all, no_room)
}

#[test]
fn beyond_its_share_a_source_loses_what_it_did_not_use_for_longest_and_others_nothing() {
    let mut stand = Stand::new(Limits { all: 8, each: 2 });
    let [one, other] = [1, 2].map(|source| pairs_of(source, 0..2));
    stand.offer_all(0, &other[..1]).unwrap();
    stand.offer_all(1, &one[..1]).unwrap();
    stand.offer_all(2, &one[..1]).unwrap();
    assert!(stand.table.told(Some(dialled(1)), &one[0].0).is_some());
    assert_eq!(stand.table.full_sources(), 1);
    stand.offer_all(3, &one[1..]).unwrap();
    assert_eq!(ways(&stand), [dialled(0), dialled(1), dialled(3)]);
    assert_eq!(crowded(&stand), (1, 0, 0));
    // Its pairs are all in use: nothing of others is for it.
    let third = pairs_of(1, 2..3);
    assert!(matches!(stand.offer_all(4, &third), Err(NotWritten::NoRoom)));
    assert_eq!(crowded(&stand), (1, 0, 1));
    // Some of its own are given up for that, and are idle before long.
    for _ in 0..=LOOKS + 1 {
        stand.look(&HashSet::new());
    }
    assert_eq!(ways(&stand), [dialled(0), dialled(3)]);
    stand.offer_all(4, &third).unwrap();
    assert_eq!(ways(&stand), [dialled(0), dialled(3), dialled(4)]);
}

#[test]
fn where_all_is_given_whoever_has_most_makes_room() {
    let mut stand = Stand::new(Limits { all: 4, each: 3 });
    let [greedy, modest, new] = [1, 2, 3].map(|source| pairs_of(source, 0..3));
    stand.offer_all(0, &modest[..1]).unwrap();
    for way in 1..4 {
        stand.offer_all(way, &greedy[..1]).unwrap();
    }
    stand.offer_all(4, &new[..1]).unwrap();
    assert_eq!(ways(&stand), [0, 2, 3, 4].map(dialled), "the modest one's is older, and stays");
    assert_eq!(crowded(&stand), (0, 1, 0));
    // The same of pairs, which have to be idle first.
    let mut stand = Stand::new(Limits { all: 4, each: 3 });
    stand.offer_all(0, &modest[..1]).unwrap();
    stand.offer_all(1, &greedy).unwrap();
    assert!(matches!(stand.offer_all(2, &new[..1]), Err(NotWritten::NoRoom)));
    for _ in 0..=LOOKS {
        stand.look(&HashSet::new());
    }
    assert_eq!(ways(&stand), [dialled(0)]);
    stand.offer_all(2, &new).unwrap();
    assert_eq!(stand.table.len(), (2, 4));
}

#[test]
fn a_way_is_to_all_of_its_endpoints_or_to_none() {
    let mut stand = Stand::new(NO_LIMIT);
    let to: Vec<_> =
        pairs_of(1, 0..3).into_iter().zip([5, 1, 2]).map(|((pair, _), weight)| (pair, weight)).collect();
    stand.says.denied.borrow_mut().insert(to[1].0);
    assert!(matches!(stand.offer_all(1, &to), Err(NotWritten::NotAllowed)));
    assert!(stand.table.len() == (0, 0) && stand.kernel.0.lock().unwrap().pairs.is_empty());
    stand.says.denied.borrow_mut().clear();
    stand.offer_all(1, &to).unwrap();
    assert!(matches!(stand.offer_all(1, &to), Err(NotWritten::Known)));
    assert_eq!(stand.kernel.0.lock().unwrap().ways[&dialled(1)], to);
    // Of one that is not allowed any more the connections end; those of the others go on, and new ones are ztunnel's.
    stand.says.denied.borrow_mut().insert(to[1].0);
    stand.recheck().unwrap();
    assert!(ways(&stand).is_empty());
    assert!(stand.table.holds(&to[0].0) && !stand.table.holds(&to[1].0) && stand.table.holds(&to[2].0));
    // Without it, and by other weights.
    let others = [(to[2].0, 9), (to[0].0, 1)];
    stand.offer_all(1, &others).unwrap();
    assert_eq!(stand.kernel.0.lock().unwrap().ways[&dialled(1)], others);
    assert_eq!(stand.table.len(), (1, 2));
    // Twice the same, those of two sources, and none are no way.
    for wrong in [vec![to[0], to[0]], vec![to[0], pairs_of(2, 0..1)[0]], Vec::new()] {
        assert!(matches!(stand.offer_all(2, &wrong), Err(NotWritten::NotAllowed)));
    }
}

#[tokio::test(start_paused = true)]
async fn what_leads_to_an_endpoint_that_fails_is_ztunnels_for_a_while() {
    let mut stand = Stand::new(NO_LIMIT);
    let (to, pause) = (pairs_of(1, 0..2), Duration::from_secs(10));
    stand.offer_all(1, &to).unwrap();
    stand.offer_all(2, &to[..1]).unwrap();
    stand.table.failed(&stand.kernel, dialled(1), &to[1].0, pause).unwrap();
    assert_eq!(ways(&stand), [dialled(2)]);
    assert!(!stand.table.wants(&stand.way(1)) && stand.table.wants(&stand.way(3)));
    assert!(stand.table.holds(&to[1].0), "what is open goes on");
    tokio::time::advance(pause).await;
    assert!(stand.table.wants(&stand.way(1)));
    // One that was ended says nothing of the endpoint.
    stand.says.denied.borrow_mut().insert(to[1].0);
    stand.recheck().unwrap();
    stand.table.failed(&stand.kernel, dialled(2), &to[1].0, pause).unwrap();
    assert_eq!(ways(&stand), [dialled(2)]);
    // What is put off is no more than there may be ways.
    for way in 0..20 {
        stand.table.put_off(stand.way(way), pause);
    }
    assert_eq!(stand.table.later.len(), NO_LIMIT.all);
}

#[test]
fn what_can_not_be_taken_back_is_told_until_it_is() {
    let mut stand = Stand::new(NO_LIMIT);
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
