//! Who is chosen: tables of the rules, and a naive reference.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod world;

use std::collections::BTreeMap;

use balance::NoEndpoint;
use model::{Health, HealthPolicy, LoadBalancingMode as Mode, LocalityScope as Scope, Str, Workload};
use proptest::prelude::*;
use world::{PORT, World, client, many, service, serving, set, workload};

fn unready(uid: &str, place: &str) -> Workload {
    workload(uid, place).with(|w| w.health = Health::Unhealthy)
}

fn weighing(uid: &str, capacity: u32) -> Workload {
    workload(uid, "").with(|w| w.capacity = capacity)
}

/// Name, mode, scopes, endpoints, the client's place, and who may be chosen.
type Row<'a> = (&'a str, Mode, &'a [Scope], Vec<Workload>, &'a str, &'a [&'a str]);

#[test]
fn the_nearest_tier_that_has_an_endpoint_is_chosen() {
    let prefer_close = [Scope::Network, Scope::Region, Scope::Zone];
    let all =
        || vec![workload("same-zone", "eu/a"), workload("same-region", "eu/b"), workload("far", "us/a")];
    let cases: Vec<Row<'_>> = vec![
        ("any", Mode::Any, &prefer_close, all(), "eu/a", &["far", "same-region", "same-zone"]),
        ("closest", Mode::Failover, &prefer_close, all(), "eu/a", &["same-zone"]),
        ("region", Mode::Failover, &prefer_close, all()[1..].to_vec(), "eu/a", &["same-region"]),
        ("far", Mode::Failover, &prefer_close, all()[2..].to_vec(), "eu/a", &["far"]),
        // A zone of the same name in another region is not near: scopes count from the first.
        ("by-order", Mode::Failover, &prefer_close, all(), "us/b", &["far"]),
        ("unknown", Mode::Failover, &prefer_close, all(), "", &["far", "same-region", "same-zone"]),
        (
            "network",
            Mode::Failover,
            &prefer_close,
            vec![workload("a", "eu/a///n2"), workload("b", "us/b")],
            "eu/a",
            &["b"],
        ),
        (
            "unready",
            Mode::Failover,
            &prefer_close,
            vec![unready("near", "eu/a"), workload("far", "us/b")],
            "eu/a",
            &["far"],
        ),
        (
            "node",
            Mode::Strict,
            &[Scope::Node],
            vec![workload("a", "//n1"), workload("b", "//n2")],
            "//n1",
            &["a"],
        ),
        (
            "cluster",
            Mode::Strict,
            &[Scope::Cluster],
            vec![workload("a", "///c1"), workload("b", "///c2")],
            "///c2",
            &["b"],
        ),
        ("weight", Mode::Any, &[], vec![weighing("none", 0), weighing("one", 1)], "", &["one"]),
    ];
    check(cases);
}

fn check(cases: Vec<Row<'_>>) {
    for (name, mode, scopes, workloads, at, wanted) in cases {
        let mut world = World::new(service(mode, scopes), set(workloads));
        world.client = client(at);
        let wanted: Vec<Str> = wanted.iter().map(|w| Str::from(*w)).collect();
        assert_eq!(world.uids(), wanted, "{name}");
    }
}

#[test]
fn what_nobody_knows_of_a_place_is_no_difference() {
    let prefer_close = [Scope::Network, Scope::Region, Scope::Zone];
    let same_node = [Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];
    check(vec![
        // The node counts where there are no subzones, or no zones at all.
        (
            "same-node",
            Mode::Failover,
            &same_node,
            vec![workload("a", "eu/a/n1"), workload("b", "eu/a/n2")],
            "eu/a/n2",
            &["b"],
        ),
        (
            "same-node-nowhere",
            Mode::Failover,
            &same_node,
            vec![workload("a", "//n1"), workload("b", "//n2"), workload("c", "")],
            "//n1",
            &["a"],
        ),
        (
            "zones-only",
            Mode::Failover,
            &prefer_close,
            vec![workload("a", "/a"), workload("b", "/b"), workload("c", "")],
            "/b",
            &["b"],
        ),
        // An EndpointSlice's endpoint has a zone, and can't have a region.
        (
            "slice",
            Mode::Failover,
            &prefer_close,
            vec![workload("a", "/a"), workload("b", "/b"), workload("c", "eu/c")],
            "eu/b",
            &["b"],
        ),
    ]);
}

#[test]
fn a_refusal_says_why() {
    let strict = || service(Mode::Strict, &[Scope::Node]);
    let any = || service(Mode::Any, &[]);
    let cases = vec![
        ("empty", World::new(any(), set([])), NoEndpoint::Empty),
        ("unready", World::new(any(), set([unready("a", "")])), NoEndpoint::NoneHealthy { unready: 1 }),
        ("weightless", World::new(any(), set([weighing("a", 0)])), NoEndpoint::NoneWithWeight),
        (
            "elsewhere",
            World {
                client: client("//n2"),
                ..World::new(strict(), set([workload("a", "//n1"), workload("b", "//n3")]))
            },
            NoEndpoint::NoneInLocality { elsewhere: 2 },
        ),
        // A node that nobody knows is no node.
        (
            "unknown node",
            World::new(strict(), set([workload("a", "")])),
            NoEndpoint::NoneInLocality { elsewhere: 1 },
        ),
        (
            "tried",
            World { exclude: vec!["w0".into(), "w1".into(), "gone".into()], ..World::new(any(), many(2)) },
            NoEndpoint::AllTried { tried: 2 },
        ),
        ("port of no service", World { port: 81, ..World::new(any(), many(2)) }, NoEndpoint::PortUnknown(81)),
        (
            "named port that nobody has",
            World { port: 443, ..World::new(any(), many(2)) },
            NoEndpoint::PortUnknown(443),
        ),
        (
            "port 0",
            World::new(any(), set([serving(workload("a", ""), PORT, 0)])),
            NoEndpoint::PortUnknown(PORT),
        ),
    ];
    for (name, mut world, wanted) in cases {
        assert_eq!(world.pick().map(|p| p.workload().uid.clone()).unwrap_err(), wanted, "{name}");
        assert_eq!(world.balancer.stats().refused, 1);
    }
}

#[test]
fn the_endpoints_own_port_goes_before_the_services() {
    let mut world = World::new(service(Mode::Any, &[]), set([workload("plain", "")]));
    assert_eq!(world.pick().unwrap().target_port(), 8080);
    world.set = set([serving(workload("own", ""), PORT, 9090)]);
    assert_eq!(world.pick().unwrap().target_port(), 9090);
    // Of a named port, only the endpoints that have it.
    world.port = 443;
    world.set = set([serving(workload("named", ""), 443, 8443), workload("without", "")]);
    assert_eq!(world.uids(), [Str::from("named")]);
    assert_eq!(world.pick().unwrap().target_port(), 8443);
}

#[test]
fn unready_endpoints_are_chosen_where_the_service_wants_them() {
    let mut all = service(Mode::Any, &[]);
    all.load_balancing.health = HealthPolicy::AllowAll;
    let mut world = World::new(all, set([unready("a", ""), workload("b", "")]));
    assert_eq!(world.uids(), ["a".into(), "b".into()] as [Str; 2]);
}

#[test]
fn a_change_of_the_service_or_its_endpoints_counts_at_once() {
    let mut world = World::new(service(Mode::Any, &[]), set([workload("a", "//n1"), workload("b", "//n2")]));
    world.client = client("//n1");
    assert_eq!(world.uids().len(), 2);
    world.service = service(Mode::Strict, &[Scope::Node]);
    assert_eq!(world.uids(), [Str::from("a")]);
    world.set = set([workload("c", "//n1")]);
    assert_eq!(world.uids(), [Str::from("c")]);
    world.client = client("//n2");
    assert_eq!(world.pick().unwrap_err(), NoEndpoint::NoneInLocality { elsewhere: 1 });
}

/// What an endpoint and its history come to, in the plainest terms.
#[derive(Debug, Clone)]
struct Case {
    place: [u8; 4],
    ready: bool,
    weight: u32,
    serves: bool,
    excluded: bool,
    failed: bool,
}

fn case() -> impl Strategy<Value = Case> {
    let often = || prop::bool::weighted(0.85);
    let rarely = || prop::bool::weighted(0.15);
    (any::<[bool; 4]>(), often(), 0..4u32, often(), rarely(), rarely()).prop_map(
        |(place, ready, weight, serves, excluded, failed)| Case {
            place: place.map(u8::from),
            ready,
            weight,
            serves,
            excluded,
            failed,
        },
    )
}

fn place([region, zone, node, cluster]: [u8; 4]) -> String {
    format!("r{region}/z{zone}/n{node}/c{cluster}")
}

/// The uids one of which must be chosen; empty for none.
fn reference(cases: &BTreeMap<Str, Case>, scopes: &[Scope], mode: Mode, client: [u8; 4]) -> Vec<Str> {
    let agreeing = |c: &Case| {
        let agrees = |scope: &&Scope| match scope {
            Scope::Region => c.place[0] == client[0],
            Scope::Zone => c.place[1] == client[1],
            Scope::Node => c.place[2] == client[2],
            Scope::Cluster => c.place[3] == client[3],
            // Nobody has one, and all are on the default network.
            Scope::Subzone | Scope::Network => true,
        };
        scopes.iter().take_while(agrees).count()
    };
    let mut eligible: Vec<(bool, usize, &Str)> = cases
        .iter()
        .filter(|(_, c)| c.ready && c.weight > 0 && c.serves && !c.excluded)
        .filter(|(_, c)| mode != Mode::Strict || agreeing(c) == scopes.len())
        .map(|(uid, c)| (c.failed, if mode == Mode::Any { 0 } else { scopes.len() - agreeing(c) }, uid))
        .collect();
    // Those that failed last; then the ones that agree in the most scopes first.
    eligible.sort();
    let best = eligible.first().map(|(failed, distance, _)| (*failed, *distance));
    let equal = eligible.into_iter().filter(|(f, d, _)| Some((*f, *d)) == best);
    equal.map(|(_, _, uid)| uid.clone()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn choices_are_those_of_the_reference(
        cases in prop::collection::vec(case(), 0..12),
        scopes in prop::collection::vec(
            prop::sample::select(vec![
                Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster, Scope::Network,
            ]), 0..4),
        mode in prop::sample::select(vec![Mode::Any, Mode::Strict, Mode::Failover]),
        at in any::<[bool; 4]>(),
    ) {
        let cases: BTreeMap<Str, Case> =
            cases.into_iter().enumerate().map(|(i, c)| (format!("w{i}").into(), c)).collect();
        let workloads = cases.iter().map(|(uid, c)| {
            let health = if c.ready { Health::Healthy } else { Health::Unhealthy };
            let w = workload(uid, &place(c.place)).with(|w| { w.health = health; w.capacity = c.weight; });
            serving(w, PORT, if c.serves { 8080 } else { 0 })
        });
        let at = at.map(u8::from);
        let mut world = World::new(service(mode, &scopes), set(workloads));
        world.client = client(&place(at));
        for uid in cases.iter().filter(|(_, c)| c.failed).map(|(uid, _)| uid) {
            world.exclude = cases.keys().filter(|u| *u != uid).cloned().collect();
            if let Ok(picked) = world.pick() {
                prop_assert_eq!(&picked.workload().uid, uid);
                picked.report_failure(world.now);
            }
        }
        world.exclude = cases.iter().filter(|(_, c)| c.excluded).map(|(uid, _)| uid.clone()).collect();
        let wanted = reference(&cases, &scopes, mode, at);
        let mut seen = Vec::new();
        for _ in 0..40 {
            match world.pick() {
                Ok(picked) => seen.push(picked.workload().uid.clone()),
                Err(_) => prop_assert!(wanted.is_empty(), "nothing, though there are {wanted:?}"),
            }
        }
        for uid in &seen {
            prop_assert!(wanted.contains(uid), "{uid}, though it should be one of {wanted:?}");
        }
    }
}
