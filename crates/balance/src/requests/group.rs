//! The endpoints of a destination, sorted for choices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use model::http::{HashTable, LoadBalancer, Percent, Warmup};
use model::{Health, Str, Workload};

use super::hash::derived;
use super::places::{Nearness, Origin, Ranking};
use super::tables::Table;
use super::warmup;
use super::weighted::{Hole, Weighted};
use crate::partition::mixed;

/// How often an endpoint that is still warming up may be passed over in one choice.
const PASSES: u32 = 32;
/// How many endpoints that are left out, and that the group does not know of yet, one choice passes over.
const MAX_OUT: usize = 64;
/// By how much a tier may be unhealthy before the next takes over a part, in percent of what is healthy (Envoy's
/// overprovisioning factor).
const OVERPROVISION: u64 = 140;

/// What requests change of an endpoint, and what is known of it for longer than a [`Group`] lives.
#[derive(Debug, Default)]
pub struct Load {
    /// When it came, since any fixed moment.
    since: Duration,
    under_way: AtomicU32,
    /// Whether it is left out, where the group does not know that yet.
    out: AtomicBool,
}

impl Load {
    /// Of an endpoint that has come at this time.
    #[must_use]
    pub fn new(since: Duration) -> Self {
        Self { since, ..Self::default() }
    }

    /// Whether the endpoint is left out from now on. A choice passes it over from then on, also before a new group is made,
    /// which may wait where many are left out at a time.
    pub fn leave_out(&self, out: bool) {
        self.out.store(out, Ordering::Relaxed);
    }

    /// Whether the endpoint is left out.
    #[must_use]
    pub fn is_out(&self) -> bool {
        self.out.load(Ordering::Relaxed)
    }

    /// A request goes there. Each is to [`Load::end`].
    pub fn begin(&self) {
        self.under_way.fetch_add(1, Ordering::Relaxed);
    }

    /// A request that has gone there is over.
    pub fn end(&self) {
        self.under_way.fetch_sub(1, Ordering::Relaxed);
    }

    /// Requests under way.
    #[must_use]
    pub fn under_way(&self) -> u32 {
        self.under_way.load(Ordering::Relaxed)
    }
}

/// An endpoint that may be chosen. A choice names it by its place in the list that the group was made of.
#[derive(Clone, Debug)]
pub struct Member {
    /// The hash of its name, which is the same on all replicas of the proxy: see [`super::hash()`].
    pub name: u64,
    /// What runs there.
    pub workload: Arc<Workload>,
    /// Its labels.
    pub labels: Arc<[(Str, Str)]>,
    /// Whether it is left out, see [`super::Ejections`].
    pub ejected: bool,
    /// Its load.
    pub load: Arc<Load>,
}

/// How endpoints are chosen.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Balancing {
    /// Which takes the next request.
    pub balancer: LoadBalancer,
    /// How new ones begin.
    pub warmup: Option<Warmup>,
    /// Below which share of healthy ones all of a tier are used, where the others can't take over.
    pub min_health: Percent,
}

/// A choice to make.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// The time since the fixed moment.
    pub now: Duration,
    /// A number that nobody can foresee.
    pub random: u64,
    /// The hash of what of the request is hashed, if it has that.
    pub key: Option<u64>,
    /// Endpoints that were tried for the request.
    pub tried: &'a [u32],
    /// Whether it should go to a tier that has none of those.
    pub elsewhere: bool,
    /// Requests under way to all endpoints.
    pub under_way: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Group {
    balancing: Balancing,
    members: Box<[Member]>,
    tiers: Box<[Tier]>,
    /// The tier of each member that is in one.
    tier_of: Box<[Option<u32>]>,
    /// Until when some are warming up.
    warm: Duration,
    /// When the oldest came: what the others' warming up is compared with.
    oldest: Duration,
}

#[derive(Debug)]
struct Tier {
    zones: Box<[Zone]>,
    /// Its part of all requests, in millionths.
    share: u64,
    table: Option<Tabled>,
    /// Whether ejected ones are used too.
    panics: bool,
    total: u64,
    healthy: u64,
}

#[derive(Debug)]
struct Zone {
    live: Weighted,
    /// Whether ejected ones are used too.
    panics: bool,
    share: u64,
    turn: AtomicU64,
}

#[derive(Debug)]
struct Tabled {
    table: Arc<Table>,
    /// The members behind the table's numbers.
    members: Box<[u32]>,
    weight: u64,
}

impl Group {
    /// Sorts `members`; the one step that takes time by their number. `before` is the group that this one takes the place
    /// of, whose turns go on and whose tables stay where they are the same.
    #[must_use]
    pub fn new(
        balancing: Balancing,
        origin: &Origin,
        nearness: Nearness<'_>,
        members: Vec<Member>,
        before: Option<&Self>,
    ) -> Self {
        let ranking = Ranking::new(origin, nearness);
        let shares = ranking.shares();
        let mut ranked: Vec<(u32, u32, u32)> = (0u32..)
            .zip(&members)
            .filter(|(_, m)| m.workload.capacity > 0)
            .filter(|(_, m)| m.workload.health == Health::Healthy || ranking.takes_unready())
            .filter_map(|(at, m)| ranking.rank(&m.workload, &m.labels).map(|rank| (rank.tier, rank.zone, at)))
            .collect();
        ranked.sort_unstable();
        let tiers: Vec<&[(u32, u32, u32)]> = ranked.chunk_by(|a, b| a.0 == b.0).collect();
        let health: Vec<(u64, u64)> = tiers.iter().map(|tier| health(&members, tier)).collect();
        let spread = spread(&health, balancing.min_health);
        let mut made = Vec::with_capacity(tiers.len());
        for (number, ((tier, (total, healthy)), (share, panics))) in
            tiers.iter().zip(&health).zip(spread).enumerate()
        {
            let old = before.and_then(|before| before.tiers.get(number));
            let zones = zones(&members, tier, &shares, panics, old);
            let table = match balancing.balancer {
                LoadBalancer::Hash { table, .. } => Some(tabled(table, &members, tier, &shares, old)),
                _ => None,
            };
            made.push(Tier { zones, share, table, panics, total: *total, healthy: *healthy });
        }
        let since = ranked.iter().filter_map(|(_, _, at)| members.get(*at as usize)).map(|m| m.load.since);
        let (oldest, youngest) = (since.clone().min().unwrap_or_default(), since.max().unwrap_or_default());
        // Where all came at once, all are equally warm.
        let warm = match &balancing.warmup {
            Some(warmup) if youngest > oldest => youngest.saturating_add(warmup.duration),
            _ => Duration::ZERO,
        };
        let mut tier_of = vec![None; members.len()];
        for (number, tier) in (0u32..).zip(&tiers) {
            for (_, _, at) in *tier {
                if let Some(of) = tier_of.get_mut(*at as usize) {
                    *of = Some(number);
                }
            }
        }
        let tiers = made.into();
        Self { balancing, members: members.into(), tiers, tier_of: tier_of.into(), warm, oldest }
    }

    /// What it was made of.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// How many endpoints may be chosen, those that are left out included.
    #[must_use]
    pub fn eligible(&self) -> u64 {
        self.tiers.iter().map(|tier| tier.total).sum()
    }

    /// How many of them are not left out.
    #[must_use]
    pub fn healthy(&self) -> u64 {
        self.tiers.iter().map(|tier| tier.healthy).sum()
    }

    /// How many tiers there are.
    #[must_use]
    pub fn tiers(&self) -> usize {
        self.tiers.len()
    }

    /// Chooses an endpoint: one that was not tried, if there is another.
    #[must_use]
    pub fn pick(&self, choice: &Choice<'_>) -> Option<u32> {
        let first = self.tier(choice);
        if choice.tried.is_empty() {
            return self.pick_in(first?, choice).or_else(|| self.pick_anywhere(choice, false));
        }
        if choice.elsewhere
            && let Some(found) = self.pick_anywhere(choice, true)
        {
            return Some(found);
        }
        first
            .and_then(|tier| self.pick_in(tier, choice))
            .or_else(|| self.pick_anywhere(choice, false))
            .or_else(|| self.pick(&Choice { tried: &[], elsewhere: false, ..*choice }))
    }

    /// The tier that a request falls to; for a hash always the same, as long as their health is.
    fn tier(&self, choice: &Choice<'_>) -> Option<&Tier> {
        if let [only] = &*self.tiers {
            return Some(only);
        }
        let mut point = derived(choice.key.unwrap_or(choice.random), 7) % 1_000_000;
        let found = self.tiers.iter().find(|tier| {
            let mine = point < tier.share;
            point = point.saturating_sub(tier.share);
            mine
        });
        found.or_else(|| self.tiers.iter().rev().find(|tier| tier.share > 0))
    }

    /// In the nearest tier that has one; `fresh` says that tiers with some that were tried are passed over.
    fn pick_anywhere(&self, choice: &Choice<'_>, fresh: bool) -> Option<u32> {
        let of = |tried: &u32| self.tier_of.get(*tried as usize).copied().flatten();
        let tried = |number: u32| fresh && choice.tried.iter().any(|tried| of(tried) == Some(number));
        let tiers = (0u32..).zip(&self.tiers).filter(|(number, _)| !tried(*number));
        tiers.map(|(_, tier)| tier).find_map(|tier| self.pick_in(tier, choice))
    }

    fn pick_in(&self, tier: &Tier, choice: &Choice<'_>) -> Option<u32> {
        if let (Some(tabled), Some(key)) = (&tier.table, choice.key)
            && let Some(found) = self.pick_tabled(tier, tabled, key, choice)
        {
            return Some(found);
        }
        if let [zone] = &*tier.zones {
            return self.pick_zone(zone, choice);
        }
        let total: u64 = tier.zones.iter().map(|zone| zone.share).sum();
        let mut point = derived(choice.random, 8).checked_rem(total)?;
        let drawn = tier.zones.iter().find(|zone| {
            let mine = point < zone.share;
            point = point.saturating_sub(zone.share);
            mine
        });
        drawn
            .and_then(|zone| self.pick_zone(zone, choice))
            .or_else(|| tier.zones.iter().find_map(|zone| self.pick_zone(zone, choice)))
    }

    fn pick_tabled(&self, tier: &Tier, tabled: &Tabled, key: u64, choice: &Choice<'_>) -> Option<u32> {
        let found = tabled.table.find(key, |number| {
            let Some(at) = tabled.members.get(number as usize) else { return false };
            let Some(member) = self.members.get(*at as usize) else { return false };
            (tier.panics || !(member.ejected || member.load.is_out()))
                && !choice.tried.contains(at)
                && self.is_within_bound(member, tabled.weight, choice.under_way)
        });
        found.and_then(|number| tabled.members.get(number as usize).copied())
    }

    /// Whether an endpoint takes one more without having more than its bound of the average (V. Mirrokni et al.,
    /// "Consistent Hashing with Bounded Loads", 2016).
    fn is_within_bound(&self, member: &Member, total_weight: u64, under_way: u32) -> bool {
        let LoadBalancer::Hash { bound: Some(bound), .. } = self.balancing.balancer else { return true };
        let all = u128::from(under_way) + 1;
        let weight = u128::from(member.workload.capacity);
        let most = (all * weight * u128::from(bound)).div_ceil(u128::from(total_weight.max(1)) * 100);
        u128::from(member.load.under_way()) < most
    }

    fn pick_zone(&self, zone: &Zone, choice: &Choice<'_>) -> Option<u32> {
        if zone.live.total() == 0 {
            return None;
        }
        let slot = match self.balancing.balancer {
            LoadBalancer::LeastRequest => self.lesser_of_two(zone, choice)?,
            LoadBalancer::RoundRobin => self.next_in_turn(zone, choice)?,
            LoadBalancer::Random | LoadBalancer::Passthrough | LoadBalancer::Hash { .. } => {
                self.draw(zone, None, choice.random, choice)?
            }
        };
        zone.live.member(slot)
    }

    fn lesser_of_two(&self, zone: &Zone, choice: &Choice<'_>) -> Option<usize> {
        let first = self.draw(zone, None, choice.random, choice)?;
        let second = self.draw(zone, Some(first), mixed(choice.random), choice);
        let load = |slot: usize| {
            let member = zone.live.member(slot).and_then(|at| self.members.get(at as usize));
            member.map_or(0, |member| u128::from(member.load.under_way()))
        };
        // By requests for the weight, the weights multiplied crosswise; the first on a tie, so that idle endpoints are
        // taken by weight alone.
        match second {
            Some(second)
                if load(first) * u128::from(zone.live.weight(second))
                    > load(second) * u128::from(zone.live.weight(first)) =>
            {
                Some(second)
            }
            _ => Some(first),
        }
    }

    fn next_in_turn(&self, zone: &Zone, choice: &Choice<'_>) -> Option<usize> {
        for pass in 0..PASSES {
            let slot = zone.live.turn(zone.turn.fetch_add(1, Ordering::Relaxed))?;
            let passed_over = is_tried(zone, slot, choice) || self.is_out(zone, slot);
            if !passed_over && self.is_warm(zone, slot, choice, pass) {
                return Some(slot);
            }
        }
        self.draw(zone, None, choice.random, choice)
    }

    /// A slot by weight: one that was not tried, and is not `without`.
    fn draw(&self, zone: &Zone, without: Option<usize>, random: u64, choice: &Choice<'_>) -> Option<usize> {
        let mut random = mixed(random);
        let mut holes: Vec<Hole> = Vec::new();
        holes.extend(without.map(|slot| zone.live.hole(slot)));
        let mut passes = 0;
        loop {
            let slot = zone.live.draw(&holes, random)?;
            random = mixed(random);
            let out = holes.len() < MAX_OUT && self.is_out(zone, slot);
            if out || is_tried(zone, slot, choice) {
                // There are as many of these as there were tries, and of the others as the limit says.
                let hole = zone.live.hole(slot);
                let place = holes.partition_point(|other| *other < hole);
                holes.insert(place, hole);
            } else if passes >= PASSES || self.is_warm(zone, slot, choice, passes) {
                return Some(slot);
            } else {
                passes += 1;
            }
        }
    }

    /// Whether an endpoint is left out that was not when the group was made.
    fn is_out(&self, zone: &Zone, slot: usize) -> bool {
        let member = || zone.live.member(slot).and_then(|at| self.members.get(at as usize));
        !zone.panics && member().is_some_and(|member| member.load.is_out())
    }

    /// Whether an endpoint that is drawn is taken: one that is warming up in as many of 100 draws as it has percent of what
    /// the oldest one has.
    fn is_warm(&self, zone: &Zone, slot: usize, choice: &Choice<'_>, pass: u32) -> bool {
        let Some(warmup) = self.balancing.warmup.as_ref().filter(|_| choice.now < self.warm) else {
            return true;
        };
        let Some(member) = zone.live.member(slot).and_then(|at| self.members.get(at as usize)) else {
            return true;
        };
        let share = |since: Duration| warmup::share(warmup, choice.now.saturating_sub(since));
        let part = share(member.load.since) / share(self.oldest);
        let random = derived(choice.random, 100 + u64::from(pass)) >> 11;
        #[expect(clippy::cast_precision_loss, reason = "53 bits")]
        let point = random as f64 / (1u64 << 53) as f64;
        point < part
    }
}

fn is_tried(zone: &Zone, slot: usize, choice: &Choice<'_>) -> bool {
    !choice.tried.is_empty() && zone.live.member(slot).is_some_and(|at| choice.tried.contains(&at))
}

/// How many endpoints a tier has, and how many of them are not left out.
fn health(members: &[Member], tier: &[(u32, u32, u32)]) -> (u64, u64) {
    let healthy = |(_, _, at): &&(u32, u32, u32)| members.get(*at as usize).is_some_and(|m| !m.ejected);
    (tier.len() as u64, tier.iter().filter(healthy).count() as u64)
}

/// What part of the requests each tier gets, in millionths, and whether it uses all its endpoints, ejected ones too: as
/// Envoy's priority levels and panic thresholds do.
fn spread(tiers: &[(u64, u64)], min_health: Percent) -> Vec<(u64, bool)> {
    let able: Vec<u64> = tiers
        .iter()
        .map(|(total, healthy)| (healthy * 10_000 * OVERPROVISION / (*total).max(1)).min(1_000_000))
        .collect();
    let all: u64 = able.iter().sum::<u64>().min(1_000_000);
    let panics = |(total, healthy): &(u64, u64)| {
        all < 1_000_000 && healthy * 1_000_000 / (*total).max(1) < u64::from(min_health.millionths())
    };
    if all == 0 {
        // By how many there are, where all are used; else the first has none to give, and says so.
        let count: u64 = tiers.iter().map(|(total, _)| total).sum();
        return tiers.iter().map(|tier| (tier.0 * 1_000_000 / count.max(1), panics(tier))).collect();
    }
    let mut left = 1_000_000;
    let shares = tiers.iter().zip(&able).map(|(tier, able)| {
        let share = (able * 1_000_000 / all).min(left);
        left -= share;
        (share, panics(tier))
    });
    shares.collect()
}

fn zones(
    members: &[Member],
    tier: &[(u32, u32, u32)],
    shares: &[u32],
    panics: bool,
    old: Option<&Tier>,
) -> Box<[Zone]> {
    let zones = tier.chunk_by(|a, b| a.1 == b.1).enumerate();
    let zones = zones.map(|(number, zone)| {
        let (total, healthy) = health(members, zone);
        let used = zone.iter().filter_map(|(_, _, at)| {
            let member = members.get(*at as usize).filter(|m| panics || !m.ejected)?;
            Some((*at, member.workload.capacity))
        });
        let live = Weighted::new(used);
        let share = zone.first().and_then(|(_, zone, _)| shares.get(*zone as usize)).copied().unwrap_or(1);
        // What a zone is too unhealthy for, the others take (Envoy's locality-weighted balancing).
        let able = if panics { 100 } else { (healthy * OVERPROVISION / total.max(1)).min(100) };
        let turn = old.and_then(|old| old.zones.get(number)).map(|zone| zone.turn.load(Ordering::Relaxed));
        let turn = AtomicU64::new(turn.unwrap_or(0));
        Zone { live, panics, share: u64::from(share) * able, turn }
    });
    zones.collect()
}

/// The table of a tier's endpoints, ejected ones too: they are passed over when they are found, so that the others keep
/// their keys.
fn tabled(
    kind: HashTable,
    members: &[Member],
    tier: &[(u32, u32, u32)],
    shares: &[u32],
    old: Option<&Tier>,
) -> Tabled {
    let zone_weight = |zone: u32| -> u64 {
        let of_zone = tier.iter().filter(|(_, z, _)| *z == zone);
        of_zone
            .filter_map(|(_, _, at)| members.get(*at as usize))
            .map(|m| u64::from(m.workload.capacity))
            .sum()
    };
    let weights: Vec<u64> = if shares.len() > 1 {
        (0u32..).zip(shares).map(|(zone, _)| zone_weight(zone)).collect()
    } else {
        Vec::new()
    };
    let weight = |zone: u32, capacity: u32| {
        let whole = weights.get(zone as usize).copied().filter(|whole| *whole > 0);
        let share = shares.get(zone as usize).copied().unwrap_or(1);
        // In ten thousandths of a percent, where zones have shares.
        let part = whole.map_or(u64::from(capacity), |whole| {
            (u64::from(share) * 10_000 * u64::from(capacity) / whole).max(1)
        });
        u32::try_from(part).unwrap_or(u32::MAX)
    };
    let mut list: Vec<(u64, u32, u32)> = tier
        .iter()
        .filter_map(|(_, zone, at)| {
            let member = members.get(*at as usize)?;
            Some((member.name, weight(*zone, member.workload.capacity), *at))
        })
        .collect();
    list.sort_unstable();
    let entries: Vec<(u64, u32)> = list.iter().map(|(name, weight, _)| (*name, *weight)).collect();
    let known = old.and_then(|old| old.table.as_ref()).filter(|old| old.table.is_of(kind, &entries));
    let table = known.map_or_else(|| Arc::new(Table::new(kind, &entries)), |old| old.table.clone());
    let capacity = |at: &u32| members.get(*at as usize).map_or(0, |m| u64::from(m.workload.capacity));
    let members: Box<[u32]> = list.iter().map(|(_, _, at)| *at).collect();
    Tabled { table, weight: members.iter().map(capacity).sum(), members }
}
