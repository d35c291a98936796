//! One pod's change costs what it touches, among 100,000 as among ten.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod mesh;

use std::cell::Cell;
use std::rc::Rc;

use config::resource::Kind;
use control_plane::push::{Exceptions, Push, Sink};
use mesh::{event, first_lists, other_lists, pod, policy, registry, service, set};
use serde_json::json;
use tokio::time::Instant;
use xds::server::{Change, Generation};

/// Counts what it is given.
#[derive(Clone, Default)]
struct Counting(Rc<Cell<usize>>);

impl Sink for Counting {
    fn apply(&self, changes: Vec<Change>) -> Generation {
        self.0.set(self.0.get() + changes.len());
        Generation::default()
    }
}

/// Steps, encoded resources, and workloads looked at for who of the waypoints is sent them, of a pod's change, its removal
/// and its return, in a mesh of so many. It is behind a waypoint, as one service of ten is.
fn cost(pods: usize) -> Vec<(u64, u64, u64)> {
    let (mut registry, _) = registry();
    first_lists(&mut registry, &[("shop", json!({ "istio.io/dataplane-mode": "ambient" }))], None);
    let address = |index: usize| format!("10.{}.{}.{}", index >> 16, (index >> 8) & 255, index & 255);
    let of = |index: usize, version: &str| {
        let mut pod = pod("shop", &format!("web-{index}"), &address(index), version);
        // As many services as a large mesh has, each of a hundred pods.
        pod["metadata"]["labels"] = json!({ "app": format!("web-{}", index / 100) });
        pod["spec"]["nodeName"] = json!(format!("node-{}", index / 50));
        pod
    };
    let mut objects: Vec<_> = (0..pods).map(|index| set(Kind::Pod, &of(index, "1"))).collect();
    for index in 0..pods.div_ceil(100) {
        let mut service =
            service("shop", &format!("web-{index}"), &format!("10.96.{}.{}", index >> 8, index & 255));
        service["spec"]["selector"] = json!({ "app": format!("web-{index}") });
        if index % 10 == 0 {
            service["metadata"]["labels"] = json!({ "istio.io/use-waypoint": format!("w-{index}") });
            objects.push(set(Kind::Gateway, &gateway(&format!("w-{index}"))));
        }
        objects.push(set(Kind::Service, &service));
    }
    let rules = json!({ "selector": { "matchLabels": { "app": "web-0" } }, "rules": [{}] });
    objects.push(set(Kind::AuthorizationPolicy, &policy("shop", "p", &rules, 1)));
    other_lists(&mut registry, objects);
    let mut push = Push::new(Counting::default(), Exceptions::default());
    let committed = registry.commit(Instant::now()).unwrap();
    push.push(&committed.changes);
    assert!(push.encoded() as usize >= pods);
    let mut changed = of(7, "2");
    changed["status"]["conditions"][0]["status"] = json!("False");
    let gone = control_plane::source::Change::Gone { namespace: "shop".into(), name: "web-7".into() };
    let mut costs = Vec::new();
    for event in [set(Kind::Pod, &changed), event(Kind::Pod, gone), set(Kind::Pod, &of(7, "3"))] {
        let (steps, encoded, looks) = (registry.repository().steps(), push.encoded(), push.looks());
        registry.take(event);
        let committed = registry.commit(Instant::now()).unwrap();
        push.push(&committed.changes);
        costs.push((registry.repository().steps() - steps, push.encoded() - encoded, push.looks() - looks));
    }
    costs
}

fn gateway(name: &str) -> serde_json::Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": { "name": name, "namespace": "shop", "labels": { "istio.io/waypoint-for": "service" } },
        "spec": {
            "gatewayClassName": "culvert-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        },
    })
}

#[test]
fn a_pods_change_costs_the_same_among_100_000_as_among_a_hundred() {
    let (few, many) = (cost(100), cost(100_000));
    assert_eq!(few, many);
    let limited = |(steps, encoded, looks): &(u64, u64, u64)| *steps <= 10 && *encoded <= 2 && *looks <= 1;
    assert!(many.iter().all(limited), "{many:?}");
    assert_eq!(many[0].1, 2, "it is told to nodes, and to the waypoint: {many:?}");
}
