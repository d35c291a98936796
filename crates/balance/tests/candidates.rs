//! What somebody else may draw from: the same as a choice would.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use model::{Health, LoadBalancingMode as Mode, LocalityScope, Str};
use proptest::prelude::*;
use world::{World, client, many, seconds, service, set, workload};

const LIMIT: usize = 8;

/// Uids with their weights.
fn candidates(world: &World) -> Option<BTreeMap<Str, u32>> {
    let found = world.balancer.candidates(&world.request(0), LIMIT)?;
    assert!(found.iter().all(|candidate| candidate.target_port == 8080));
    Some(found.into_iter().map(|candidate| (candidate.workload.uid.clone(), candidate.weight)).collect())
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Any), Just(Mode::Failover), Just(Mode::Strict)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn they_are_what_a_choice_comes_to_as_often_as_it_does(
        mode in mode(),
        endpoints in prop::collection::vec((0..4_u32, 0..3_u8, prop::bool::weighted(0.8), prop::bool::weighted(0.2)), 1..LIMIT),
    ) {
        let made = endpoints.iter().enumerate().map(|(number, (weight, node, healthy, _))| {
            let mut made = workload(&format!("w{number}"), &format!("//n{node}"));
            made.capacity = *weight;
            made.health = if *healthy { Health::Healthy } else { Health::Unhealthy };
            made
        });
        let mut world = World::new(service(mode, &[LocalityScope::Node]), set(made));
        world.client = client("//n1");
        for (number, (.., fails)) in endpoints.iter().enumerate() {
            let uid = format!("w{number}");
            // Those alone that a choice comes to can fail.
            if *fails && candidates(&world).is_some_and(|found| found.contains_key(uid.as_str())) {
                world.fail(&uid);
            }
        }
        let Some(found) = candidates(&world) else {
            // None, or each has failed.
            let last_resorts = world.balancer.stats().last_resorts;
            prop_assert!(world.pick().is_err() || world.balancer.stats().last_resorts > last_resorts);
            return Ok(());
        };
        const DRAWN: u32 = 4000;
        let mut drawn: BTreeMap<Str, u32> = BTreeMap::new();
        for _ in 0..DRAWN {
            *drawn.entry(world.uid()).or_default() += 1;
        }
        prop_assert_eq!(drawn.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
        let total: u32 = found.values().sum();
        for (uid, weight) in found {
            let (wanted, got) = (f64::from(weight) / f64::from(total), f64::from(drawn[&uid]) / f64::from(DRAWN));
            prop_assert!((wanted - got).abs() < 0.06, "{}: {} of {}", uid, got, wanted);
        }
    }
}

#[test]
fn what_takes_more_than_a_draw_is_left_to_the_balancer() {
    let mut world = World::new(service(Mode::Any, &[]), many(LIMIT));
    assert_eq!(candidates(&world).unwrap().len(), LIMIT);
    world.set = many(LIMIT + 1);
    assert_eq!(candidates(&world), None, "too many");
    world.fail("w3");
    assert_eq!(candidates(&world).unwrap().len(), LIMIT, "one of them is left out for a while");
    world.now = Duration::from_secs(1);
    assert_eq!(candidates(&world), None, "a single connection tries it");
    world.fail("w3");
    assert_eq!(candidates(&world).unwrap().len(), LIMIT);
    world.set = many(0);
    assert_eq!(candidates(&world), None);

    world.set = many(2);
    world.service.session_affinity = Some(seconds(60));
    assert_eq!(candidates(&world), None, "clients keep theirs");
    world.set = many(1);
    assert_eq!(candidates(&world).unwrap().len(), 1, "there is no other");
    world.port = 81;
    assert_eq!(candidates(&world), None, "the service has no such port");
}

#[test]
fn asking_counts_nothing() {
    let mut world = World::new(service(Mode::Any, &[]), many(3));
    let _ = candidates(&world);
    let before = world.balancer.stats();
    for _ in 0..10 {
        candidates(&world).unwrap();
    }
    assert_eq!(world.balancer.stats(), before);
    assert_eq!(world.uids().len(), 3);
}
