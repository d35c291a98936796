//! Endpoints that fail, and clients that stay.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod world;

use std::time::Duration;

use balance::{Balancer, Limits, NoEndpoint};
use model::{Health, LoadBalancingMode as Mode, LocalityScope, Str, Workload};
use proptest::prelude::*;
use world::{World, client, many, seconds, service, set, workload};

fn of(n: usize) -> World {
    World::new(service(Mode::Any, &[]), many(n))
}

fn uids(list: &[&str]) -> Vec<Str> {
    list.iter().map(|u| Str::from(*u)).collect()
}

#[test]
fn an_endpoint_that_failed_is_chosen_last() {
    let mut world = of(3);
    world.fail("w1");
    assert_eq!(world.uids(), uids(&["w0", "w2"]));
    world.exclude = uids(&["w0", "w2"]);
    assert_eq!(world.uids(), uids(&["w1"]));
    assert!(world.balancer.stats().last_resorts > 0);
}

#[test]
fn a_far_endpoint_that_works_goes_before_a_near_one_that_failed() {
    let scopes = [LocalityScope::Node];
    let endpoints = || set([workload("near", "//n1"), workload("far", "//n2")]);
    let mut world = World::new(service(Mode::Failover, &scopes), endpoints());
    world.client = client("//n1");
    world.fail("near");
    assert_eq!(world.uids(), uids(&["far"]));
    world.fail("far");
    assert_eq!(world.uids(), uids(&["near"]), "both failed, so the nearer one");
    // Where traffic must stay local, there is no other.
    let mut world = World::new(service(Mode::Strict, &scopes), endpoints());
    world.client = client("//n1");
    world.fail("near");
    assert_eq!(world.uids(), uids(&["near"]));
}

#[test]
fn one_connection_tries_it_again_when_the_time_is_over() {
    let mut world = of(2);
    world.fail("w1");
    world.now = Duration::from_millis(999);
    assert_eq!(world.uids(), uids(&["w0"]));
    world.now = seconds(1);
    let trials: Vec<_> =
        (0..200).map(|_| world.pick().unwrap()).filter(|p| &*p.workload().uid == "w1").collect();
    assert_eq!((trials.len(), world.balancer.stats().trials), (1, 1));
    // It works: all is as before.
    trials[0].report_success();
    drop(trials);
    assert_eq!(world.balancer.stats().restorations, 1);
    assert_eq!(world.uids(), uids(&["w0", "w1"]));
    // The next failure counts as the first.
    world.fail("w1");
    world.now = seconds(2);
    assert_eq!(world.uids(), uids(&["w0", "w1"]));
}

#[test]
fn the_time_doubles_with_each_failure_up_to_a_limit() {
    let mut world = of(2);
    world.fail("w1");
    for wanted in [1, 2, 4, 8, 16, 32, 60, 60, 60] {
        let start = world.now;
        world.now = start + seconds(wanted) - Duration::from_millis(1);
        assert_eq!(world.uids(), uids(&["w0"]), "before {wanted}");
        world.now = start + seconds(wanted);
        world.fail("w1"); // the trial
    }
    assert_eq!(world.balancer.stats().ejections, 10);
}

#[test]
fn failures_that_were_under_way_together_count_once() {
    let mut world = of(2);
    let under_way: Vec<_> = (0..100).map(|_| world.pick().unwrap()).collect();
    for picked in under_way.iter().filter(|p| &*p.workload().uid == "w1") {
        picked.report_failure(world.now);
    }
    assert_eq!(world.balancer.stats().ejections, 1);
    world.now = seconds(1);
    drop(under_way);
    assert_eq!(world.uids(), uids(&["w0", "w1"]));
}

#[test]
fn a_trial_that_nobody_reports_is_followed_by_another() {
    let mut world = of(2);
    world.fail("w1");
    world.now = seconds(1);
    assert_eq!(world.uids(), uids(&["w0", "w1"]));
    assert_eq!(world.balancer.stats().trials, 1);
    world.now = seconds(2);
    assert_eq!(world.uids(), uids(&["w0", "w1"]));
    assert_eq!(world.balancer.stats().trials, 2);
}

#[test]
fn failures_are_remembered_while_others_come_and_go() {
    let mut world = of(3);
    world.fail("w1");
    world.set = set(["w1", "w3", "w4"].map(|uid| workload(uid, "")));
    assert_eq!(world.uids(), uids(&["w3", "w4"]));
    // The same name at another address is another endpoint.
    let moved = Workload { addresses: ["10.0.0.7".parse().unwrap()].into(), ..workload("w1", "") };
    world.set = set([moved, workload("w3", "")]);
    assert_eq!(world.uids(), uids(&["w1", "w3"]));
}

#[test]
fn an_endpoint_that_became_ready_again_is_taken_at_its_word() {
    let mut world = of(2);
    world.fail("w1");
    let unready = workload("w1", "").with(|w| w.health = Health::Unhealthy);
    world.set = set([workload("w0", ""), unready]);
    assert_eq!(world.uids(), uids(&["w0"]));
    world.set = many(2);
    assert_eq!(world.uids(), uids(&["w0", "w1"]));
}

#[test]
fn many_that_come_back_at_once_come_back() {
    let mut world = of(1000);
    let held: Vec<_> = (0..5000).map(|_| world.pick().unwrap()).collect();
    held.iter().for_each(|p| p.report_failure(world.now));
    assert_eq!(world.balancer.stats().ejections, 1000);
    drop(held);
    world.now = seconds(1);
    for _ in 0..32 {
        world.uid(); // 32 of them return with each choice
    }
    for _ in 0..3000 {
        let picked = world.pick().unwrap();
        picked.report_success();
    }
    let stats = world.balancer.stats();
    assert!(stats.restorations > 900, "{stats:?}");
}

fn affine(n: usize, timeout: Duration) -> World {
    let mut world = of(n);
    world.service.session_affinity = Some(timeout);
    world
}

#[test]
fn a_client_keeps_its_endpoint_until_it_was_idle_for_the_timeout() {
    let mut world = affine(50, seconds(10));
    let first = world.uid();
    for _ in 0..20 {
        world.now += seconds(9); // each use begins the time anew
        assert_eq!(world.uid(), first);
    }
    assert_eq!(world.balancer.stats().affinity_hits, 20);
    world.now += seconds(10);
    world.uid();
    assert_eq!(world.balancer.stats().affinity_hits, 20);
    // Other clients, and the other port, have their own.
    let uids: std::collections::BTreeSet<Str> = (1..50u8)
        .map(|i| {
            world.client.address = [10, 0, 0, i].into();
            world.uid()
        })
        .collect();
    assert!(uids.len() > 10, "{uids:?}");
}

#[test]
fn a_client_moves_when_its_endpoint_fails_or_goes() {
    let mut world = affine(3, seconds(100));
    let first = world.uid();
    world.exclude = vec![first.clone()];
    let second = world.uid();
    assert_ne!(second, first);
    world.exclude.clear();
    assert_eq!(world.uid(), second, "it stays where it went");
    world.pick().unwrap().report_failure(world.now);
    let third = world.uid();
    assert_ne!(third, second);
    world.set = set(["w0", "w1", "w2"].iter().filter(|u| **u != &*third).map(|u| workload(u, "")));
    assert_ne!(world.uid(), third);
    world.set = set([]);
    assert_eq!(world.pick().unwrap_err(), NoEndpoint::Empty);
}

#[test]
fn clients_are_limited_and_forgotten() {
    let mut world = affine(3, seconds(10));
    world.balancer = Balancer::new(Limits { affinities: 100, ..Limits::default() });
    for i in 0..1000u32 {
        world.client.address = std::net::Ipv4Addr::from_bits(i).into();
        world.uid();
    }
    let stats = world.balancer.stats();
    assert_eq!((stats.affinities, stats.affinity_evicted), (100, 900));
    world.balancer.sweep(seconds(9), |_| true);
    assert_eq!(world.balancer.stats().affinities, 100);
    world.balancer.sweep(seconds(10), |_| true);
    assert_eq!(world.balancer.stats().affinities, 0);
}

/// What may happen to a service.
#[derive(Debug, Clone)]
enum Event {
    Open,
    Fail(prop::sample::Index),
    Succeed(prop::sample::Index),
    Close(prop::sample::Index),
    Wait(u16),
    Endpoints(u8),
    Sweep,
}

fn event() -> impl Strategy<Value = Event> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => Just(Event::Open),
        2 => index().prop_map(Event::Fail),
        2 => index().prop_map(Event::Succeed),
        2 => index().prop_map(Event::Close),
        2 => any::<u16>().prop_map(Event::Wait),
        1 => any::<u8>().prop_map(Event::Endpoints),
        1 => Just(Event::Sweep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever happens, there is a choice exactly when there is an endpoint, and nothing is left behind.
    #[test]
    fn any_history_leaves_a_choice(events in prop::collection::vec(event(), 0..200), affinity in any::<bool>()) {
        let mut world = of(4);
        world.service.session_affinity = affinity.then_some(seconds(30));
        let mut held = Vec::new();
        for event in events {
            match event {
                Event::Open => match world.pick() {
                    Ok(picked) => {
                        let uid = &picked.workload().uid;
                        prop_assert!(world.set.position(uid).is_some(), "{uid} is not among the endpoints");
                        held.push(picked);
                    }
                    Err(e) => prop_assert!(e == NoEndpoint::Empty && world.set.as_slice().is_empty(), "{e}"),
                },
                Event::Fail(at) if !held.is_empty() => at.get(&held).report_failure(world.now),
                Event::Succeed(at) if !held.is_empty() => at.get(&held).report_success(),
                Event::Close(at) if !held.is_empty() => drop(held.swap_remove(at.index(held.len()))),
                Event::Wait(ms) => world.now += Duration::from_millis(ms.into()),
                Event::Endpoints(bits) => {
                    let there = (0..8).filter(|i| bits & (1 << i) != 0);
                    world.set = set(there.map(|i| workload(&format!("w{i}"), "")));
                }
                Event::Sweep => world.balancer.sweep(world.now, |_| true),
                Event::Fail(_) | Event::Succeed(_) | Event::Close(_) => {}
            }
        }
        drop(held);
        world.balancer.sweep(world.now + seconds(100), |_| true);
        world.balancer.sweep(world.now + seconds(100), |_| true);
        let stats = world.balancer.stats();
        prop_assert_eq!((stats.services, stats.affinities), (0, 0));
    }
}
