//! How connections spread, what a choice costs, and what is kept.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod world;

use std::collections::BTreeMap;
use std::sync::Arc;

use balance::{Balancer, Limits, Picked};
use model::{Change, LoadBalancingMode as Mode, Mesh, ServiceKey, Str};
use world::{World, client, key, many, seconds, service, set, workload};

fn of(n: usize) -> World {
    World::new(service(Mode::Any, &[]), many(n))
}

fn weighing(weights: &[u32]) -> World {
    let weighed =
        weights.iter().enumerate().map(|(i, n)| workload(&format!("w{i}"), "").with(|w| w.capacity = *n));
    World::new(service(Mode::Any, &[]), set(weighed))
}

fn count<'a>(uids: impl IntoIterator<Item = &'a Picked>) -> BTreeMap<Str, u32> {
    let mut counts = BTreeMap::new();
    for picked in uids {
        *counts.entry(picked.workload().uid.clone()).or_default() += 1;
    }
    counts
}

/// How far the counts are from `expected` at most, in parts of it.
fn error(counts: &BTreeMap<Str, u32>, expected: impl Fn(usize) -> f64) -> f64 {
    let off = |(i, count): (usize, &u32)| (f64::from(*count) - expected(i)).abs() / expected(i);
    counts.values().enumerate().map(off).fold(0.0, f64::max)
}

#[test]
fn idle_endpoints_are_chosen_by_weight() {
    let weights = [1, 2, 3, 4];
    let mut world = weighing(&weights);
    let mut counts: BTreeMap<Str, u32> = BTreeMap::new();
    for _ in 0..40_000 {
        *counts.entry(world.uid()).or_default() += 1; // closed at once, so all are idle at every choice
    }
    let off = error(&counts, |i| 4000.0 * f64::from(weights[i]));
    assert!(off < 0.05, "{counts:?}");
}

#[test]
fn open_connections_spread_by_weight() {
    let weights = [1, 2, 3, 4];
    let mut world = weighing(&weights);
    let held: Vec<Picked> = (0..2000).map(|_| world.pick().unwrap()).collect();
    let counts = count(&held);
    // Two choices hold the load far closer to the weights than drawing does: within a few connections.
    let off = error(&counts, |i| 200.0 * f64::from(weights[i]));
    assert!(off < 0.03, "{counts:?}");
}

#[test]
fn equal_endpoints_get_equal_shares_of_open_connections() {
    let mut world = of(50);
    let held: Vec<Picked> = (0..5000).map(|_| world.pick().unwrap()).collect();
    let counts = count(&held);
    let (min, max) = (counts.values().min().unwrap(), counts.values().max().unwrap());
    // Drawing alone gives 100 with a deviation of 10, so some 75 to 125.
    assert!(counts.len() == 50 && max - min <= 8, "{min} to {max}");
}

#[test]
fn a_closed_connection_counts_no_more() {
    let mut world = of(2);
    let held: Vec<Picked> = (0..100).map(|_| world.pick().unwrap()).collect();
    let (of_w0, of_w1): (Vec<_>, Vec<_>) = held.into_iter().partition(|p| &*p.workload().uid == "w0");
    assert_eq!((of_w0.len(), of_w1.len()), (50, 50));
    drop(of_w1);
    // w0 still has 50, so the next 50 go to w1.
    let next: Vec<Picked> = (0..50).map(|_| world.pick().unwrap()).collect();
    assert_eq!(count(&next), BTreeMap::from([("w1".into(), 50)]));
}

#[test]
fn connections_count_across_ports_places_and_changes() {
    let mut world = of(2);
    let first = world.pick().unwrap();
    let other = |world: &mut World| {
        let picked = world.pick().unwrap();
        assert_ne!(picked.workload().uid, first.workload().uid);
    };
    other(&mut world);
    world.set = many(2); // another set, with the same workloads
    other(&mut world);
    world.service = service(Mode::Failover, &[model::LocalityScope::Node]);
    world.client = client("//n7");
    other(&mut world);
}

#[test]
fn a_choice_looks_at_two_endpoints_however_many_there_are() {
    let mut costs = Vec::new();
    for n in [2, 10, 1000, 20_000] {
        let mut world = of(n);
        // The worst case in everything: some tried, many dead, all busy.
        for uid in ["w0", "w1"].iter().take(n / 5) {
            world.exclude.push((*uid).into());
        }
        let held: Vec<Picked> = (0..1000).map(|_| world.pick().unwrap()).collect();
        for picked in held.iter().step_by(2) {
            picked.report_failure(world.now);
        }
        let before = world.balancer.stats().inspected;
        for _ in 0..1000 {
            world.pick().unwrap();
        }
        costs.push(world.balancer.stats().inspected - before);
        assert_eq!(world.balancer.stats().partitions_built, 1, "sorted once, for {n}");
    }
    assert!(costs.iter().all(|c| *c <= 2000), "{costs:?}");
}

#[test]
fn endpoints_are_sorted_again_only_when_they_changed() {
    let other = ServiceKey { namespace: "shop".into(), hostname: "other".into() };
    let mut elsewhere = workload("x", "");
    Arc::make_mut(&mut elsewhere.services)[0].service = other;
    let mesh = Mesh::default().apply([Change::SetWorkload(Arc::new(workload("a", "")))]);
    let mut world = World::new(service(Mode::Any, &[]), mesh.endpoints(&key()).unwrap().clone());
    world.uids();
    let mesh = mesh.apply([Change::SetWorkload(Arc::new(elsewhere))]);
    world.set = mesh.endpoints(&key()).unwrap().clone();
    world.uids();
    assert_eq!(world.balancer.stats().partitions_built, 1);
    let mesh = mesh.apply([Change::SetWorkload(Arc::new(workload("b", "")))]);
    world.set = mesh.endpoints(&key()).unwrap().clone();
    assert_eq!(world.uids().len(), 2);
    assert_eq!(world.balancer.stats().partitions_built, 2);
}

#[test]
fn clients_of_one_place_share_a_partition_and_places_are_limited() {
    let limits = Limits { partitions_per_service: 3, ..Limits::default() };
    let mut world = World::new(service(Mode::Failover, &[model::LocalityScope::Node]), many(4));
    world.balancer = Balancer::new(limits);
    for _ in 0..3 {
        world.client = client("//n1"); // an equal place, in other memory
        world.uids();
    }
    assert_eq!(world.balancer.stats().partitions_built, 1);
    for i in 0..20 {
        world.client = client(&format!("//other-{i}"));
        world.uid();
        world.client = client("//n1");
        world.uid();
    }
    let stats = world.balancer.stats();
    // The one that is used all the time is never the one that goes.
    assert_eq!((stats.partitions_built, stats.partitions_evicted), (21, 18));
}

#[test]
fn services_are_limited_and_forgotten_when_they_are_gone() {
    let limits = Limits { services: 10, ..Limits::default() };
    let mut world = of(2);
    world.balancer = Balancer::new(limits);
    for i in 0..100 {
        world.service.hostname = format!("s{i}").into();
        world.uid();
    }
    let stats = world.balancer.stats();
    assert_eq!((stats.services, stats.services_evicted), (10, 90));

    world.service.hostname = "kept".into();
    world.uid();
    world.balancer.sweep(world.now, |key| &*key.hostname == "kept");
    assert_eq!(world.balancer.stats().services, 1);
    // Nobody asked since, but a connection is open; then it is not.
    let held = world.pick().unwrap();
    world.balancer.sweep(world.now, |_| true);
    world.balancer.sweep(world.now, |_| true);
    assert_eq!(world.balancer.stats().services, 1);
    drop(held);
    world.balancer.sweep(world.now, |_| true);
    assert_eq!(world.balancer.stats().services, 0);
}

#[test]
fn dialling_random_ports_keeps_nothing() {
    let mut world = of(2);
    for port in 1000..2000 {
        world.port = port;
        assert!(world.pick().is_err());
    }
    let stats = world.balancer.stats();
    assert_eq!((stats.services, stats.partitions_built, stats.refused), (0, 0, 1000));
}

#[test]
fn a_connection_outlives_what_is_kept_of_its_service() {
    let mut world = of(2);
    let held = world.pick().unwrap();
    world.balancer.sweep(world.now, |_| false);
    held.report_failure(seconds(1));
    held.report_success();
    drop(held);
    assert_eq!(world.uids().len(), 2);
}

#[test]
fn the_handle_of_a_connection_is_small() {
    assert!(size_of::<Picked>() <= 64, "{}", size_of::<Picked>());
}

#[test]
fn choices_from_many_threads_keep_the_count() {
    let world = of(10);
    let open = || {
        (0..2000)
            .map(|random| {
                let picked = world.balancer.pick(&world.request(random)).unwrap();
                if random % 3 == 0 { None } else { Some(picked) }
            })
            .collect::<Vec<_>>()
    };
    let held: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).flatten().collect()
    });
    let counts = count(&held);
    assert!(error(&counts, |_| held.len() as f64 / 10.0) < 0.1, "{counts:?}");
    drop(held);
    // With all of them closed, nothing is kept of the service.
    world.balancer.sweep(world.now, |_| true);
    world.balancer.sweep(world.now, |_| true);
    assert_eq!(world.balancer.stats().services, 0);
}
