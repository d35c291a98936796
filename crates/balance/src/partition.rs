//! The endpoints of a service, sorted for one port and the place of a client.
//!
//! An eligible endpoint is in one tier, and there in one of two pools:
//!
//! ```text
//!            failure                      time is over
//!   live ──────────────▶ ejected (until) ──────────────▶ live, on trial
//!    ▲                      ▲                                │
//!    │ success              └────────── is picked ───────────┤
//!    └───────────────────────────────────────────────────────┘ success
//! ```
//!
//! On trial means that the next connection to it counts: it is ejected again while that connection is under way,
//! so that one connection tries an endpoint that may still be dead, and not all of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;
use model::{
    Endpoint, EndpointSet, Health, HealthPolicy, LoadBalancing, LoadBalancingMode, LocalityScope, Str,
    TargetPort, Workload,
};

use crate::balancer::{Candidate, Client, Limits, NoEndpoint, Request, Shared};
use crate::stats::Counters;
use crate::sums::Sums;

/// How many endpoints come back in one choice, when the time of many is over at once.
const MAX_RETURNS: usize = 32;

/// What is known of an endpoint that failed.
#[derive(Debug, Clone, Copy)]
struct Suspect {
    /// Failures in a row.
    failures: u32,
    /// `None` on trial.
    ejected_until: Option<Duration>,
}

/// The endpoints that are equally near.
#[derive(Debug)]
struct Tier {
    /// Indexes in the set, by slot.
    members: Box<[u32]>,
    live: Sums,
    /// Made with the first ejection.
    ejected: Sums,
}

/// Where an eligible endpoint is.
#[derive(Debug, Clone, Copy)]
struct Place {
    tier: u32,
    slot: u32,
}

/// How many endpoints passed each condition, in this order.
#[derive(Debug, Default, Clone, Copy)]
struct Passed {
    all: usize,
    port: usize,
    health: usize,
    weight: usize,
    locality: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Partition {
    /// When it was last used, in choices of the service.
    pub(crate) last_used: u64,
    port: u16,
    set: Arc<EndpointSet>,
    client: Client,
    load_balancing: LoadBalancing,
    target: TargetPort,
    passed: Passed,
    tiers: Vec<Tier>,
    places: Box<[Option<Place>]>,
    suspects: HashMap<u32, Suspect>,
    /// The suspects that are ejected, by the time of their return.
    returns: BTreeSet<(Duration, u32)>,
}

/// A choice.
pub(crate) struct Choice {
    pub(crate) endpoint: Endpoint,
    pub(crate) target_port: u16,
    /// Whether the endpoint was on trial.
    pub(crate) trial: bool,
}

impl Partition {
    /// Sorts the endpoints; the one step that takes time by their number.
    pub(crate) fn new(request: &Request<'_>, target: &TargetPort) -> Self {
        let mut partition = Self {
            last_used: 0,
            port: request.port,
            set: request.set.clone(),
            client: request.client.clone(),
            load_balancing: request.service.load_balancing.clone(),
            target: target.clone(),
            passed: Passed::default(),
            tiers: Vec::new(),
            places: vec![None; request.set.as_slice().len()].into(),
            suspects: HashMap::new(),
            returns: BTreeSet::new(),
        };
        partition.sort();
        partition
    }

    /// Whether it is for this port and place.
    pub(crate) fn is_for(&self, request: &Request<'_>) -> bool {
        let anywhere = self.load_balancing.mode == LoadBalancingMode::Any;
        self.port == request.port && (anywhere || self.client.same_place(request.client))
    }

    /// Whether what it was made of is unchanged.
    pub(crate) fn is_current(&self, request: &Request<'_>, target: &TargetPort) -> bool {
        // The set is held, so an equal pointer is the same set, in the same generation.
        Arc::ptr_eq(&self.set, request.set)
            && self.load_balancing == request.service.load_balancing
            && self.target == *target
    }

    /// Takes over what `old` knows of endpoints that are still the same.
    pub(crate) fn inherit(&mut self, old: &Self) {
        for (index, suspect) in &old.suspects {
            let Some(before) = old.set.as_slice().get(*index as usize) else { continue };
            let Some(position) = self.set.position(&before.workload.uid) else { continue };
            let same = self.set.as_slice().get(position).is_some_and(|now| {
                now.workload.addresses == before.workload.addresses
                    && now.workload.hostname == before.workload.hostname
            });
            let eligible = self.places.get(position).is_some_and(Option::is_some);
            if let (true, true, Ok(index)) = (same, eligible, u32::try_from(position)) {
                self.suspects.insert(index, *suspect);
                if let Some(until) = suspect.ejected_until {
                    self.eject(index, suspect.failures, until);
                }
            }
        }
    }

    fn sort(&mut self) {
        let set = self.set.clone();
        let scopes = self.load_balancing.scopes.len();
        // By how many leading scopes agree; the most first.
        let mut members: Vec<Vec<u32>> = vec![Vec::new(); scopes + 1];
        for (index, endpoint) in (0u32..).zip(set.as_slice()) {
            if let Some(rank) = self.rank(endpoint)
                && let Some(tier) = members.get_mut(scopes - rank)
            {
                tier.push(index);
            }
        }
        for members in members.into_iter().filter(|m| !m.is_empty()) {
            let tier = u32::try_from(self.tiers.len()).unwrap_or(u32::MAX);
            for (slot, index) in (0u32..).zip(&members) {
                if let Some(place) = self.places.get_mut(*index as usize) {
                    *place = Some(Place { tier, slot });
                }
            }
            let weight = |index: &u32| set.as_slice().get(*index as usize).map_or(0, |e| e.workload.capacity);
            let live = Sums::new(members.iter().map(weight));
            self.tiers.push(Tier { members: members.into(), live, ejected: Sums::default() });
        }
    }

    /// In how many leading scopes the endpoint agrees with the client; `None` when it is not eligible.
    fn rank(&mut self, endpoint: &Endpoint) -> Option<usize> {
        let workload = &endpoint.workload;
        self.passed.all += 1;
        target_port(&self.set, endpoint, self.port, &self.target)?;
        self.passed.port += 1;
        if self.load_balancing.health == HealthPolicy::OnlyHealthy && workload.health != Health::Healthy {
            return None;
        }
        self.passed.health += 1;
        if workload.capacity == 0 {
            return None;
        }
        self.passed.weight += 1;
        let scopes = &self.load_balancing.scopes;
        let agreeing = || scopes.iter().take_while(|s| agrees(**s, &self.client, workload)).count();
        let rank = match self.load_balancing.mode {
            LoadBalancingMode::Any => 0,
            LoadBalancingMode::Failover => agreeing(),
            LoadBalancingMode::Strict => Some(agreeing()).filter(|n| *n == scopes.len())?,
        };
        self.passed.locality += 1;
        Some(rank)
    }

    /// Why there is nothing to choose.
    pub(crate) fn reason(&self) -> NoEndpoint {
        let Passed { all, port, health, weight, locality } = self.passed;
        match () {
            () if all == 0 => NoEndpoint::Empty,
            () if port == 0 => NoEndpoint::PortUnknown(self.port),
            () if health == 0 => NoEndpoint::NoneHealthy { unready: port },
            () if weight == 0 => NoEndpoint::NoneWithWeight,
            () if locality == 0 => NoEndpoint::NoneInLocality { elsewhere: weight },
            () => NoEndpoint::AllTried { tried: locality },
        }
    }

    /// Chooses an endpoint that is not in `exclude`; `bound` goes first if it did not fail lately. `open` has the
    /// number of open connections by uid.
    pub(crate) fn pick(
        &mut self,
        request: &Request<'_>,
        bound: Option<&Str>,
        open: &HashMap<Str, u32>,
        shared: &Shared,
    ) -> Option<Choice> {
        let Request { exclude, now, random, .. } = *request;
        let Shared { limits, counters } = shared;
        self.let_return(now);
        let excluded: Vec<u32> = exclude.iter().filter_map(|uid| self.index(uid)).collect();
        let affine = bound.and_then(|uid| self.index(uid)).filter(|index| {
            counters.inspected.add(1);
            !excluded.contains(index) && self.place(*index).is_some() && !self.suspects.contains_key(index)
        });
        let index = match affine {
            Some(index) => {
                counters.affinity_hits.add(1);
                index
            }
            None => self.choose(&excluded, open, random, counters)?,
        };
        let suspect = self.suspects.get(&index).copied();
        let trial = suspect.is_some_and(|s| s.ejected_until.is_none());
        match suspect {
            Some(s) if trial => {
                counters.trials.add(1);
                self.eject(index, s.failures, now.saturating_add(limits.ejection(s.failures)));
            }
            Some(_) => counters.last_resorts.add(1),
            None => {}
        }
        let endpoint = self.set.as_slice().get(index as usize)?.clone();
        let target_port = target_port(&self.set, &endpoint, self.port, &self.target)?;
        Some(Choice { endpoint, target_port, trial })
    }

    /// All that a choice may come to, at most `limit`, where it is drawn by their weights as long as nothing is open. `None` where
    /// there are more, where none is live, and where one is on trial, which is for a single connection.
    pub(crate) fn candidates(&mut self, now: Duration, limit: usize) -> Option<Vec<Candidate>> {
        self.let_return(now);
        let tier = self.tiers.iter().find(|tier| tier.live.total() > 0)?;
        // Those that are ejected are walked too.
        if tier.members.len() > limit.saturating_mul(4) {
            return None;
        }
        let mut found = Vec::new();
        for (slot, index) in tier.members.iter().enumerate() {
            let weight = u32::try_from(tier.live.weight(slot)).ok()?;
            if weight == 0 {
                continue;
            }
            if found.len() == limit || self.suspects.contains_key(index) {
                return None;
            }
            let endpoint = self.set.as_slice().get(*index as usize)?;
            let target_port = target_port(&self.set, endpoint, self.port, &self.target)?;
            found.push(Candidate { workload: endpoint.workload.clone(), target_port, weight });
        }
        Some(found)
    }

    /// The first tier that has one live, then the first that has one ejected.
    fn choose(
        &self,
        excluded: &[u32],
        open: &HashMap<Str, u32>,
        random: u64,
        counters: &Counters,
    ) -> Option<u32> {
        let live = self.tiers.iter().enumerate().map(|(i, t)| (i, t, &t.live));
        let ejected = self.tiers.iter().enumerate().map(|(i, t)| (i, t, &t.ejected));
        live.chain(ejected).filter(|(_, _, pool)| pool.total() > 0).find_map(|(number, tier, pool)| {
            let mut holes: Vec<Hole> = excluded
                .iter()
                .filter_map(|index| self.place(*index).filter(|p| p.tier as usize == number))
                .map(|place| Hole::at(pool, place.slot as usize))
                .collect();
            holes.sort_unstable();
            holes.dedup();
            self.better_of_two(tier, pool, &holes, open, random, counters)
        })
    }

    fn better_of_two(
        &self,
        tier: &Tier,
        pool: &Sums,
        holes: &[Hole],
        open: &HashMap<Str, u32>,
        random: u64,
        counters: &Counters,
    ) -> Option<u32> {
        let first_random = mixed(random);
        let first = draw(pool, holes, first_random)?;
        let without_first = Hole::at(pool, first);
        let second = if holes.is_empty() {
            draw(pool, &[without_first], mixed(first_random))
        } else {
            let mut holes = [holes, &[without_first]].concat();
            holes.sort_unstable();
            draw(pool, &holes, mixed(first_random))
        };
        counters.inspected.add(1 + u64::from(second.is_some()));
        let load = |slot: usize| {
            let uid = tier
                .members
                .get(slot)
                .and_then(|index| self.set.as_slice().get(*index as usize))
                .map(|e| &e.workload.uid);
            u128::from(uid.and_then(|uid| open.get(uid)).copied().unwrap_or(0))
        };
        // By connections for the weight, the weights multiplied crosswise; the first on a tie, so that idle
        // endpoints are taken by weight alone.
        let chosen = match second {
            Some(second)
                if load(first) * u128::from(pool.weight(second))
                    > load(second) * u128::from(pool.weight(first)) =>
            {
                second
            }
            _ => first,
        };
        tier.members.get(chosen).copied()
    }

    /// Notes that a connection to `uid` could not be made. Says whether the endpoint is ejected for it.
    pub(crate) fn failed(&mut self, uid: &str, trial: bool, now: Duration, limits: &Limits) -> bool {
        let Some(index) = self.index(uid).filter(|index| self.place(*index).is_some()) else { return false };
        let failures = match self.suspects.get(&index) {
            // Connections that were under way with the one that failed first say nothing new.
            Some(suspect) if suspect.ejected_until.is_some() && !trial => return false,
            Some(suspect) => suspect.failures.saturating_add(1),
            None => 1,
        };
        self.eject(index, failures, now.saturating_add(limits.ejection(failures)));
        true
    }

    /// Notes that a connection to `uid` was made. Says whether that ended an ejection or trial.
    pub(crate) fn succeeded(&mut self, uid: &str) -> bool {
        if self.suspects.is_empty() {
            return false;
        }
        let Some(index) = self.index(uid) else { return false };
        let Some(suspect) = self.suspects.remove(&index) else { return false };
        if let Some(until) = suspect.ejected_until {
            self.returns.remove(&(until, index));
            self.move_to(index, Pool::Live);
        }
        true
    }

    fn eject(&mut self, index: u32, failures: u32, until: Duration) {
        let suspect = Suspect { failures, ejected_until: Some(until) };
        if let Some(Suspect { ejected_until: Some(before), .. }) = self.suspects.insert(index, suspect) {
            self.returns.remove(&(before, index));
        }
        self.returns.insert((until, index));
        self.move_to(index, Pool::Ejected);
    }

    fn let_return(&mut self, now: Duration) {
        for _ in 0..MAX_RETURNS {
            let Some(&(until, index)) = self.returns.first().filter(|(until, _)| *until <= now) else {
                return;
            };
            self.returns.remove(&(until, index));
            if let Some(suspect) = self.suspects.get_mut(&index) {
                suspect.ejected_until = None;
            }
            self.move_to(index, Pool::Live);
        }
    }

    fn move_to(&mut self, index: u32, pool: Pool) {
        let Some(place) = self.place(index) else { return };
        let weight = self.set.as_slice().get(index as usize).map_or(0, |e| u64::from(e.workload.capacity));
        let Some(tier) = self.tiers.get_mut(place.tier as usize) else { return };
        if tier.ejected.is_unused() {
            tier.ejected = Sums::zeros(tier.members.len());
        }
        let (live, ejected) = match pool {
            Pool::Live => (weight, 0),
            Pool::Ejected => (0, weight),
        };
        tier.live.set(place.slot as usize, live);
        tier.ejected.set(place.slot as usize, ejected);
    }

    fn index(&self, uid: &str) -> Option<u32> {
        self.set.position(uid).and_then(|i| u32::try_from(i).ok())
    }

    fn place(&self, index: u32) -> Option<Place> {
        self.places.get(index as usize).copied().flatten()
    }
}

#[derive(Clone, Copy)]
enum Pool {
    Live,
    Ejected,
}

/// A stretch of a pool's weights that must not be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Hole {
    start: u64,
    weight: u64,
}

impl Hole {
    fn at(pool: &Sums, slot: usize) -> Self {
        Self { start: pool.before(slot), weight: pool.weight(slot) }
    }
}

/// Draws a slot by weight, outside of `holes`, which are sorted and do not overlap.
fn draw(pool: &Sums, holes: &[Hole], random: u64) -> Option<usize> {
    let left = pool.total().checked_sub(holes.iter().map(|h| h.weight).sum())?;
    // Scales the random number to 0..left (D. Lemire, "Fast random integer generation in an interval", 2019).
    let mut point = u64::try_from((u128::from(random) * u128::from(left)) >> 64).ok()?;
    if left == 0 {
        return None;
    }
    for hole in holes {
        if point >= hole.start {
            point += hole.weight;
        }
    }
    pool.slot_at(point)
}

/// The next number of SplitMix64 (G. Steele et al., "Fast splittable pseudorandom number generators", 2014).
pub(crate) fn mixed(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The endpoint's port behind the service's: its own word goes first, a port number of the service counts where
/// it has none. 0 is no port.
fn target_port(set: &EndpointSet, endpoint: &Endpoint, port: u16, target: &TargetPort) -> Option<u16> {
    let of_service = match target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::PerEndpoint => None,
    };
    set.target_port(endpoint, port).or(of_service).filter(|number| *number != 0)
}

/// A part of a locality that neither side knows is no difference: in most clusters nobody has a subzone, in many nobody
/// a region, and what comes after it in the order counts all the same. An unknown node or cluster is like none. Where
/// an endpoint says its zone and no region (an EndpointSlice can't), the zone tells the region.
pub(crate) fn agrees(scope: LocalityScope, client: &Client, workload: &Workload) -> bool {
    let known = |a: &str, b: &str| !a.is_empty() && a == b;
    let (near, there) = (&client.locality, &workload.locality);
    match scope {
        LocalityScope::Region => {
            near.region == there.region || there.region.is_empty() && known(&near.zone, &there.zone)
        }
        LocalityScope::Zone => near.zone == there.zone,
        LocalityScope::Subzone => near.subzone == there.subzone,
        LocalityScope::Node => known(&client.node, workload.node()),
        LocalityScope::Cluster => known(&client.cluster, &workload.cluster),
        LocalityScope::Network => client.network == workload.network,
    }
}
