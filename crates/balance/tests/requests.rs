//! Choices for requests: against naive references, and over virtual time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod world;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use balance::requests::{
    Balancing, Budget, Cause, Choice, Ejections, Event, Gate, Group, Load, Member, Nearness, Origin, Strikes,
    hash,
};
use model::http::{
    Distribution, HashKey, HashTable, LoadBalancer, LocalitySetting, Outliers, Percent, RetryBudget, Warmup,
};
use model::{LoadBalancing, LoadBalancingMode, LocalityScope, Str, Workload};
use proptest::prelude::*;
use world::{client, seconds, workload};

/// What a test's choices have in common.
struct Bed {
    balancing: Balancing,
    service: LoadBalancing,
    setting: Option<LocalitySetting>,
    failover: bool,
    origin: Origin,
    random: u64,
}

impl Bed {
    fn new(balancer: LoadBalancer) -> Self {
        let origin = Origin { client: client("r1/z1/n1"), labels: Arc::default() };
        let balancing = Balancing { balancer, ..Balancing::default() };
        let service = LoadBalancing::default();
        Self { balancing, service, setting: None, failover: false, origin, random: 0 }
    }

    fn group(&self, members: Vec<Member>, before: Option<&Group>) -> Group {
        let nearness =
            Nearness { service: &self.service, setting: self.setting.as_ref(), failover: self.failover };
        Group::new(self.balancing.clone(), &self.origin, nearness, members, before)
    }

    fn choice(&mut self) -> Choice<'static> {
        self.random += 1;
        Choice { now: seconds(0), random: self.random, key: None, tried: &[], elsewhere: false, under_way: 0 }
    }

    /// How many of many choices fall to each member, in percent.
    fn shares(&mut self, group: &Group) -> Vec<u32> {
        self.shares_at(group, seconds(0))
    }

    fn shares_at(&mut self, group: &Group, now: Duration) -> Vec<u32> {
        const CHOICES: u32 = 40_000;
        let mut counts = vec![0; group.members().len()];
        for _ in 0..CHOICES {
            let choice = Choice { now, ..self.choice() };
            counts[group.pick(&choice).unwrap() as usize] += 1;
        }
        counts.iter().map(|count| (count * 100 + CHOICES / 2) / CHOICES).collect()
    }
}

fn member(workload: Workload) -> Member {
    let labels = workload.labels.clone();
    let name = hash(workload.uid.as_bytes());
    Member { name, workload: Arc::new(workload), labels, ejected: false, load: Arc::default() }
}

fn members(places: &[&str]) -> Vec<Member> {
    let named = |(at, place): (usize, &&str)| member(workload(&format!("w{at}"), place));
    places.iter().enumerate().map(named).collect()
}

fn equal(count: usize) -> Vec<Member> {
    members(&vec![""; count])
}

fn by_hash(table: HashTable, bound: Option<u32>) -> LoadBalancer {
    LoadBalancer::Hash { key: HashKey::SourceIp, table, bound }
}

#[test]
fn weights_are_kept_by_all_that_draw() {
    for balancer in [LoadBalancer::Random, LoadBalancer::LeastRequest, LoadBalancer::RoundRobin] {
        let mut bed = Bed::new(balancer.clone());
        let weighing =
            |(at, capacity)| member(workload(&format!("w{at}"), "").with(|w| w.capacity = capacity));
        let group = bed.group([1, 0, 2, 5, 2].into_iter().enumerate().map(weighing).collect(), None);
        assert_eq!(bed.shares(&group), [10, 0, 20, 50, 20], "{balancer:?}");
    }
}

#[test]
fn round_robin_goes_on_where_it_was_when_endpoints_change() {
    let mut bed = Bed::new(LoadBalancer::RoundRobin);
    let mut group = bed.group(equal(3), None);
    let mut turns = Vec::new();
    for _ in 0..3 {
        turns.extend((0..4).map(|_| group.pick(&bed.choice()).unwrap()));
        group = bed.group(equal(3), Some(&group));
    }
    assert_eq!(turns, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]);
}

#[test]
fn least_request_avoids_the_busy_ones() {
    let mut bed = Bed::new(LoadBalancer::LeastRequest);
    let group = bed.group(equal(10), None);
    let mut most = 0;
    for _ in 0..10_000 {
        let at = group.pick(&bed.choice()).unwrap() as usize;
        group.members()[at].load.begin();
        most = most.max(group.members()[at].load.under_way());
    }
    // 1,000 each; chosen at random, the fullest would have about 1,050.
    assert!(most <= 1010, "{most}");
    let slow = &group.members()[3].load;
    (0..100).for_each(|_| slow.begin());
    assert_eq!(bed.shares(&group)[3], 0, "the other one of the two always has less");
}

#[test]
fn failover_is_in_the_order_of_places_and_takes_over_by_degrees() {
    let mut bed = Bed::new(LoadBalancer::Random);
    bed.failover = true;
    let mut all = members(&["r1/z1", "r1/z1", "r1/z2", "r2/z1", "r3/z1"]);
    let group = bed.group(all.clone(), None);
    assert_eq!((group.tiers(), bed.shares(&group)), (3, vec![50, 50, 0, 0, 0]));
    // Half of two is 70 percent of what they are to bear.
    all[0].ejected = true;
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [0, 70, 30, 0, 0]);
    all[1].ejected = true;
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [0, 0, 100, 0, 0]);
    all[2].ejected = true;
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [0, 0, 0, 50, 50]);
    let failover = Box::new([("r1".into(), "r3".into())]);
    bed.setting = Some(LocalitySetting { failover, ..LocalitySetting::default() });
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [0, 0, 0, 0, 100]);
    bed.setting = Some(LocalitySetting { disabled: true, ..LocalitySetting::default() });
    assert_eq!(bed.shares(&bed.group(all, None)), [0, 0, 0, 50, 50]);
    // Without outlier detection, nothing is said of the order.
    (bed.failover, bed.setting) = (false, None);
    let group = bed.group(members(&["r1/z1", "r2/z1"]), None);
    assert_eq!(bed.shares(&group), [50, 50]);
    // But the service may say it.
    bed.service.mode = LoadBalancingMode::Failover;
    bed.service.scopes = Box::new([LocalityScope::Region]);
    assert_eq!(bed.shares(&bed.group(members(&["r1/z1", "r2/z1"]), None)), [100, 0]);
    bed.service.mode = LoadBalancingMode::Strict;
    assert_eq!(bed.group(members(&["r2/z1"]), None).pick(&bed.choice()), None);
}

#[test]
fn labels_order_failover() {
    let mut bed = Bed::new(LoadBalancer::Random);
    bed.failover = true;
    bed.origin.labels = Arc::new([("version".into(), "v1".into())]);
    let labelled = |uid: &str, place: &str, version: &str| {
        let labels: Arc<[(Str, Str)]> = Arc::new([("version".into(), version.into())]);
        member(workload(uid, place).with(|w| w.labels = labels))
    };
    let mut all = vec![
        labelled("a", "r2/z1/n1", "v1"),
        labelled("b", "r1/z1/n1", "v2"),
        labelled("c", "r1/z1/n1", "v1"),
        labelled("d", "r1/z2/n2", "v1"),
    ];
    let priority = |list: &[&str]| LocalitySetting {
        failover_priority: list.iter().map(|label| (*label).into()).collect(),
        ..LocalitySetting::default()
    };
    bed.setting = Some(priority(&["version", "topology.kubernetes.io/region"]));
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [0, 0, 50, 50]);
    bed.setting = Some(priority(&["kubernetes.io/hostname", "version=v2"]));
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [0, 100, 0, 0]);
    all[1].ejected = true;
    assert_eq!(bed.shares(&bed.group(all, None)), [50, 0, 50, 0]);
}

#[test]
fn distribution_is_by_percent_and_shifts_from_zones_that_fail() {
    let mut bed = Bed::new(LoadBalancer::Random);
    let to = |list: &[(&str, u32)]| list.iter().map(|(to, share)| ((*to).into(), *share)).collect();
    let distribute = Box::new([
        Distribution { from: "r9/*".into(), to: to(&[("r2/*", 100)]) },
        Distribution { from: "r1/z1/*".into(), to: to(&[("r1/*", 20), ("r1/z1/*", 70), ("r2/*", 10)]) },
    ]);
    bed.setting = Some(LocalitySetting { distribute, ..LocalitySetting::default() });
    let mut all = members(&["r1/z1", "r1/z1", "r1/z2", "r2/z1", "r3/z1"]);
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [35, 35, 20, 10, 0]);
    for balancer in [by_hash(HashTable::Maglev(65_537), None), by_hash(HashTable::Ring(10_000), None)] {
        bed.balancing.balancer = balancer;
        let group = bed.group(all.clone(), None);
        let mut counts = [0; 5];
        for key in 0..20_000u32 {
            let key = Some(hash(&key.to_le_bytes()));
            counts[group.pick(&Choice { key, ..bed.choice() }).unwrap() as usize] += 1;
        }
        for (count, share) in counts.iter().zip([35, 35, 20, 10, 0]) {
            assert!((count - share * 200i32).abs() <= 400, "{counts:?}");
        }
    }
    bed.balancing.balancer = LoadBalancer::Random;
    all[0].ejected = true;
    // 70 percent of 70, with 20 and 10: of 79.
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [0, 62, 25, 13, 0]);
    all[1].ejected = true;
    assert_eq!(bed.shares(&bed.group(all, None)), [0, 0, 67, 33, 0]);
}

#[test]
fn below_the_least_health_all_are_used() {
    let mut bed = Bed::new(LoadBalancer::Random);
    bed.balancing.min_health = Percent::of(50, 100);
    let mut all = equal(4);
    all[0].ejected = true;
    all[1].ejected = true;
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [0, 0, 50, 50], "half is not below half");
    all[2].ejected = true;
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [25, 25, 25, 25]);
    all[3].ejected = true;
    assert_eq!(bed.shares(&bed.group(all.clone(), None)), [25, 25, 25, 25]);
    bed.balancing.min_health = Percent::default();
    assert_eq!(bed.group(all, None).pick(&bed.choice()), None);
}

#[test]
fn a_new_endpoint_begins_with_a_part_of_its_share() {
    for balancer in [LoadBalancer::Random, LoadBalancer::LeastRequest, LoadBalancer::RoundRobin] {
        let mut bed = Bed::new(balancer.clone());
        let warmup = Warmup { duration: seconds(100), minimum_percent: 10.0, aggression: 1.0 };
        bed.balancing.warmup = Some(warmup);
        let mut all = equal(2);
        all[0].load = Arc::new(Load::new(seconds(0)));
        all[1].load = Arc::new(Load::new(seconds(1000)));
        let group = bed.group(all, None);
        let mut at = |now| bed.shares_at(&group, seconds(now))[1];
        // 10, 25, 50 and 100 to 100.
        let got = [1000, 1025, 1050, 1100].map(&mut at);
        for (got, wanted) in got.iter().zip([9, 20, 33, 50]) {
            assert!(got.abs_diff(wanted) <= 1, "{balancer:?}: {got} instead of {wanted} percent");
        }
        // Where all are new, all have the same.
        let mut all = equal(2);
        all.iter_mut().for_each(|m| m.load = Arc::new(Load::new(seconds(1000))));
        let group = bed.group(all, None);
        assert_eq!(bed.shares_at(&group, seconds(1001)), [50, 50]);
    }
}

#[test]
fn a_bounded_ring_never_gives_more_than_the_bound() {
    for table in [HashTable::Ring(1024), HashTable::Maglev(65_537)] {
        let mut bed = Bed::new(by_hash(table, Some(125)));
        let group = bed.group(equal(10), None);
        // All have the same key.
        for under_way in 0..1000u32 {
            let choice = Choice { key: Some(42), under_way, ..bed.choice() };
            let at = group.pick(&choice).unwrap() as usize;
            group.members()[at].load.begin();
            let bound = (f64::from(under_way + 1) / 10.0 * 1.25).ceil() as u32;
            assert!(group.members()[at].load.under_way() <= bound, "at {under_way}");
        }
        // With nothing under way it is always the same one.
        let group = bed.group(equal(10), None);
        let mut of = |_| group.pick(&Choice { key: Some(42), ..bed.choice() });
        assert_eq!((0..10).map(&mut of).collect::<std::collections::HashSet<_>>().len(), 1);
    }
}

#[test]
fn an_ejection_moves_the_keys_of_the_ejected_only() {
    for table in [HashTable::Ring(1024), HashTable::Maglev(65_537)] {
        let mut bed = Bed::new(by_hash(table, None));
        let mut all = equal(20);
        let before = bed.group(all.clone(), None);
        all[7].ejected = true;
        let after = bed.group(all, Some(&before));
        let mut moved = HashMap::new();
        for key in 0..5000u32 {
            let choice = Choice { key: Some(hash(&key.to_le_bytes())), ..bed.choice() };
            let (old, new) = (before.pick(&choice).unwrap(), after.pick(&choice).unwrap());
            assert_ne!(new, 7);
            if old == 7 {
                *moved.entry(new).or_insert(0) += 1;
            } else {
                assert_eq!(old, new);
            }
        }
        assert!(moved.len() >= 15, "its keys go to all others: {moved:?}");
    }
}

#[test]
fn what_is_left_out_is_passed_over_before_there_is_a_new_group() {
    let (ring, maglev) = (HashTable::Ring(64), HashTable::Maglev(251));
    for balancer in [
        LoadBalancer::Random,
        LoadBalancer::LeastRequest,
        LoadBalancer::RoundRobin,
        by_hash(ring, None),
        by_hash(maglev, None),
    ] {
        let mut bed = Bed::new(balancer.clone());
        let group = bed.group(equal(4), None);
        group.members()[2].load.leave_out(true);
        for key in 0..500u64 {
            let key = Some(hash(&key.to_le_bytes()));
            assert_ne!(group.pick(&Choice { key, ..bed.choice() }), Some(2), "{balancer:?}");
        }
        group.members()[2].load.leave_out(false);
        assert!(bed.shares(&group)[2] >= 20, "{balancer:?}");
    }
}

fn balancers() -> impl Strategy<Value = LoadBalancer> {
    prop_oneof![
        Just(LoadBalancer::Random),
        Just(LoadBalancer::LeastRequest),
        Just(LoadBalancer::RoundRobin),
        Just(by_hash(HashTable::Ring(64), None)),
        Just(by_hash(HashTable::Maglev(251), Some(150))),
    ]
}

proptest! {
    #[test]
    fn what_is_chosen_may_be_and_was_not_tried_if_there_is_another(
        balancer in balancers(),
        list in prop::collection::vec((0..4u32, 0..4usize, any::<bool>()), 0..12),
        tried in prop::collection::vec(0..12u32, 0..5),
        (failover, elsewhere, distribute, warm) in any::<(bool, bool, bool, bool)>(),
        random in any::<u64>(),
        key in prop::option::of(any::<u64>()),
    ) {
        let mut bed = Bed::new(balancer);
        bed.failover = failover;
        if distribute {
            let to = Box::new([("r1/*".into(), 60), ("r2/*".into(), 40)]);
            let distribute = Box::new([Distribution { from: "*".into(), to }]);
            bed.setting = Some(LocalitySetting { distribute, ..LocalitySetting::default() });
        }
        if warm {
            let warmup = Warmup { duration: seconds(100), minimum_percent: 1.0, aggression: 2.0 };
            bed.balancing.warmup = Some(warmup);
        }
        let places = ["r1/z1", "r1/z2", "r2/z1", "r3/z1"];
        let all: Vec<Member> = list.iter().enumerate().map(|(at, (capacity, place, ejected))| {
            let workload = workload(&format!("w{at}"), places[*place]).with(|w| w.capacity = *capacity);
            let load = Arc::new(Load::new(seconds(at as u64)));
            Member { ejected: *ejected, load, ..member(workload) }
        }).collect();
        let may = |at: &usize| {
            let (capacity, place, ejected) = list[*at];
            capacity > 0 && !ejected && (!distribute || place < 3)
        };
        let eligible: Vec<usize> = (0..list.len()).filter(may).collect();
        let group = bed.group(all, None);
        let choice = Choice { now: seconds(20), random, key, tried: &tried, elsewhere, under_way: 0 };
        let picked = group.pick(&choice);
        prop_assert_eq!(picked.is_some(), !eligible.is_empty());
        if let Some(picked) = picked {
            prop_assert!(eligible.contains(&(picked as usize)), "{picked} of {eligible:?}");
            let fresh = eligible.iter().any(|at| !tried.contains(&(*at as u32)));
            prop_assert!(!fresh || !tried.contains(&picked), "{picked} was tried");
        }
    }
}

/// Endpoints that fail at times, requests to them with retries, all over virtual time.
struct Simulation {
    bed: Bed,
    members: Vec<Member>,
    strikes: Vec<Strikes>,
    ejections: Ejections,
    rules: Outliers,
    group: Group,
    budget: Budget,
    retrying: Gate,
    now: Duration,
    sent: u64,
    retries: u64,
    refused: u64,
    failed: u64,
    to: Vec<u64>,
}

impl Simulation {
    fn new(count: usize, rules: Outliers) -> Self {
        let bed = Bed::new(LoadBalancer::LeastRequest);
        let members = equal(count);
        let budget =
            RetryBudget { share: Percent::of(20, 100), min_concurrency: 2, interval: Some(seconds(10)) };
        Self {
            group: bed.group(members.clone(), None),
            bed,
            members,
            strikes: (0..count).map(|_| Strikes::default()).collect(),
            ejections: Ejections::new(rules.clone()),
            rules,
            budget: Budget::new(budget),
            retrying: Gate::new(u32::MAX),
            now: seconds(0),
            sent: 0,
            retries: 0,
            refused: 0,
            failed: 0,
            to: vec![0; count],
        }
    }

    fn rebuild(&mut self) {
        for member in &mut self.members {
            member.ejected = self.ejections.is_out(&member.workload.uid);
        }
        self.group = self.bed.group(self.members.clone(), Some(&self.group));
    }

    /// One request, which is tried up to three times; what each endpoint answers `fails` says.
    fn request(&mut self, fails: &impl Fn(usize, Duration) -> bool) {
        self.now += Duration::from_millis(1);
        if self.ejections.next().is_some_and(|next| next <= self.now) && self.ejections.sweep(self.now) {
            self.rebuild();
        }
        self.sent += 1;
        self.budget.request(self.now);
        let mut tried: Vec<u32> = Vec::new();
        loop {
            let choice = Choice { now: self.now, tried: &tried, ..self.bed.choice() };
            let at = self.group.pick(&choice).expect("an endpoint");
            self.to[at as usize] += 1;
            let failed = fails(at as usize, self.now);
            let event = if failed { Event::Status(503) } else { Event::Status(200) };
            if self.strikes[at as usize].note(&self.rules, event) == Some(Cause::ServerErrors) {
                self.strikes[at as usize].clear();
                let uid = self.members[at as usize].workload.uid.clone();
                if self.ejections.eject(&uid, self.members.len(), self.now) {
                    self.rebuild();
                }
            }
            let most = self.rules.max_ejection.millionths() as usize * self.members.len() / 1_000_000;
            assert!(self.ejections.out() <= most, "{} are out", self.ejections.out());
            if !failed {
                return;
            }
            tried.push(at);
            if tried.len() == 3 {
                self.failed += 1;
                return;
            }
            if !self.retrying.enter_up_to(self.budget.allowed(self.now, 1)) {
                self.refused += 1;
                self.failed += 1;
                return;
            }
            self.retries += 1;
            // A retry takes 10 ms here, in which others come: ten are under way at a time at most.
            if self.sent.is_multiple_of(10) {
                (0..self.retrying.now()).for_each(|_| self.retrying.leave());
            }
        }
    }
}

fn rules() -> Outliers {
    Outliers {
        consecutive_5xx: 5,
        consecutive_gateway_errors: 0,
        split_local_origin: false,
        consecutive_local_origin_failures: 5,
        interval: seconds(10),
        base_ejection: seconds(30),
        max_ejection: Percent::of(50, 100),
        min_health: Percent::default(),
    }
}

#[test]
fn an_endpoint_that_fails_for_a_minute_costs_few_requests_and_comes_back() {
    let mut simulation = Simulation::new(10, rules());
    let bad = |at: usize, now: Duration| at == 3 && (seconds(60)..seconds(120)).contains(&now);
    for _ in 0..60_000 {
        simulation.request(&bad);
    }
    assert_eq!((simulation.failed, simulation.retries, simulation.ejections.out()), (0, 0, 0));
    simulation.to.fill(0);
    for _ in 0..60_000 {
        simulation.request(&bad);
    }
    // Found out at 60 s and, after 30 and 60 s, once more: 5 each, and what was under way.
    assert!(simulation.to[3] < 40, "it was asked {} times while it failed", simulation.to[3]);
    assert_eq!(simulation.failed, 0, "each was tried again elsewhere");
    simulation.to.fill(0);
    for _ in 0..120_000 {
        simulation.request(&bad);
    }
    assert_eq!(simulation.ejections.out(), 0);
    assert!(simulation.to[3] > 3_000, "it has come back: {}", simulation.to[3]);
}

#[test]
fn where_everything_fails_half_stays_in_use_and_retries_stay_in_their_budget() {
    let mut simulation = Simulation::new(10, rules());
    for _ in 0..30_000 {
        simulation.request(&|_, _| true);
    }
    assert_eq!(simulation.ejections.out(), 5);
    assert_eq!(simulation.failed, simulation.sent);
    assert!(simulation.refused > 0);
    for _ in 0..200_000 {
        simulation.request(&|_, now| now < seconds(30));
    }
    assert_eq!(simulation.ejections.out(), 0, "all are back");
    assert_eq!(simulation.failed, 30_000);
}

#[test]
fn the_same_numbers_make_the_same_story() {
    let story = || {
        let mut simulation = Simulation::new(7, rules());
        for _ in 0..20_000 {
            simulation.request(&|at, now| (at as u64 + now.as_secs()).is_multiple_of(5));
        }
        (simulation.to, simulation.failed, simulation.retries, simulation.ejections.counts())
    };
    assert_eq!(story(), story());
}
