//! What a choice costs, by load balancer and number of endpoints: `cargo run --release -p balance --example choice_cost`.
#![allow(clippy::print_stdout, clippy::expect_used, clippy::panic, clippy::cast_precision_loss)]
#![expect(clippy::disallowed_types, reason = "it measures")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use balance::Client;
use balance::requests::{Balancing, Choice, Group, Load, Member, Nearness, Origin, hash};
use model::http::{HashKey, HashTable, LoadBalancer, LocalitySetting};
use model::{LoadBalancing, Locality};

#[path = "../tests/world/mod.rs"]
mod world;

/// What is shown is the quickest of so many rounds: the others were interrupted.
const ROUNDS: u64 = 20;
const CHOICES: u64 = 50_000;

fn member(at: usize, weight: u32) -> Member {
    let zone = format!("z{}", at % 3);
    let locality =
        Arc::new(Locality { region: "r".into(), zone: zone.as_str().into(), ..Locality::default() });
    let workload = world::workload(&format!("w{at}"), "").with(|w| {
        w.capacity = weight;
        w.locality = locality;
    });
    Member {
        name: hash(workload.uid.as_bytes()),
        labels: workload.labels.clone(),
        workload: Arc::new(workload),
        ejected: at % 20 == 7,
        load: Arc::new(Load::new(Duration::ZERO)),
    }
}

/// One choice, with what is counted of it.
fn choose(group: &Group, n: u64) {
    let random = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let choice = Choice {
        now: Duration::ZERO,
        random,
        key: Some(random),
        tried: &[],
        elsewhere: false,
        under_way: 100_000,
    };
    let at = black_box(group.pick(black_box(&choice))).expect("an endpoint");
    let load = &group.members().get(at as usize).expect("it is there").load;
    load.begin();
    load.end();
}

fn main() {
    let by_hash = |table| LoadBalancer::Hash { key: HashKey::SourceIp, table, bound: Some(150) };
    let origin = Origin {
        client: Client::new(&world::workload("own", "r/z1"), std::net::Ipv4Addr::LOCALHOST.into()),
        labels: Arc::default(),
    };
    println!("{:<28} {:>10} {:>14} {:>12}", "balancer", "endpoints", "build, us", "pick, ns");
    for (name, balancer, weighted) in [
        ("round robin", LoadBalancer::RoundRobin, false),
        ("round robin, weights", LoadBalancer::RoundRobin, true),
        ("least request", LoadBalancer::LeastRequest, false),
        ("least request, weights", LoadBalancer::LeastRequest, true),
        ("random", LoadBalancer::Random, false),
        ("ring of 1024", by_hash(HashTable::Ring(1024)), false),
        ("Maglev of 65537", by_hash(HashTable::Maglev(65_537)), false),
    ] {
        for count in [10, 1000, 10_000] {
            let weight = |at: usize| if weighted { 1 + (at % 4) as u32 } else { 1 };
            let members: Vec<Member> = (0..count).map(|at| member(at, weight(at))).collect();
            let (service, setting) = (LoadBalancing::default(), LocalitySetting::default());
            let nearness = Nearness { service: &service, setting: Some(&setting), failover: true };
            let balancing = Balancing { balancer: balancer.clone(), ..Balancing::default() };
            let begun = Instant::now();
            let group = Group::new(balancing, &origin, nearness, members, None);
            let built = begun.elapsed();
            let rounds = (0..ROUNDS).map(|round| {
                let begun = Instant::now();
                for n in round * CHOICES..(round + 1) * CHOICES {
                    choose(&group, n);
                }
                begun.elapsed()
            });
            let pick = rounds.min().expect("a round").as_nanos() as f64 / CHOICES as f64;
            println!("{name:<28} {count:>10} {:>14.0} {pick:>12.1}", built.as_nanos() as f64 / 1000.0);
        }
    }
}
