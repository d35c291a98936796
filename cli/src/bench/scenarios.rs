//! The scenarios of load: what is sent, and what is read off it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::results::median;
use super::{Bench, BenchArgs};
use crate::lab::{NodeId, Ztunnel};
use crate::load::{self, EXCHANGE_PORT, Outcome, Plan, SINK_PORT, Shape, Talk};

/// A figure that is read off an outcome.
type Figure = (&'static str, &'static str, fn(&Outcome) -> f64);

/// What CPU is counted by.
#[derive(Clone, Copy)]
enum Per {
    Gigabyte,
    Request,
    Connection,
}

impl Per {
    fn metric(self) -> (&'static str, &'static str) {
        match self {
            Self::Gigabyte => ("cpu_s_per_gb", "s"),
            Self::Request => ("cpu_us_per_request", "us"),
            Self::Connection => ("cpu_us_per_connection", "us"),
        }
    }

    fn of(self, cpu_seconds: f64, outcome: &Outcome) -> f64 {
        match self {
            Self::Gigabyte => cpu_seconds / (outcome.bytes as f64 / 1e9),
            // Those of the warm-up included, as in the CPU time.
            Self::Request | Self::Connection => cpu_seconds * 1e6 / outcome.answered as f64,
        }
    }
}

struct Scenario {
    name: &'static str,
    port: u16,
    shape: Shape,
    figures: &'static [Figure],
    per: Per,
}

const P50: Figure = ("p50_us", "us", |o| o.quantile_us(0.5));
const P90: Figure = ("p90_us", "us", |o| o.quantile_us(0.9));
const P99: Figure = ("p99_us", "us", |o| o.quantile_us(0.99));
const P999: Figure = ("p999_us", "us", |o| o.quantile_us(0.999));
const GBPS: Figure = ("gbps", "Gbit/s", Outcome::gigabits);
const RPS: Figure = ("rps", "1/s", Outcome::rate);
const CPS: Figure = ("cps", "1/s", Outcome::rate);

const fn closed(connections: usize) -> Shape {
    Shape::Closed { connections, reconnect: false }
}

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "throughput-1",
        port: SINK_PORT,
        shape: Shape::Bulk { streams: 1 },
        figures: &[GBPS],
        per: Per::Gigabyte,
    },
    Scenario {
        name: "throughput-8",
        port: SINK_PORT,
        shape: Shape::Bulk { streams: 8 },
        figures: &[GBPS],
        per: Per::Gigabyte,
    },
    Scenario {
        name: "latency-1000rps",
        port: EXCHANGE_PORT,
        shape: Shape::Open { connections: 16, rate: 1000 },
        figures: &[P50, P90, P99, P999],
        per: Per::Request,
    },
    Scenario {
        name: "closed-1",
        port: EXCHANGE_PORT,
        shape: closed(1),
        figures: &[RPS, P50, P99],
        per: Per::Request,
    },
    Scenario {
        name: "closed-16",
        port: EXCHANGE_PORT,
        shape: closed(16),
        figures: &[RPS, P50, P99],
        per: Per::Request,
    },
    Scenario {
        name: "closed-64",
        port: EXCHANGE_PORT,
        shape: closed(64),
        figures: &[RPS, P50, P99],
        per: Per::Request,
    },
    Scenario {
        name: "new-connections",
        port: EXCHANGE_PORT,
        shape: Shape::Connects { parallel: 16 },
        figures: &[CPS, P50, P99],
        per: Per::Connection,
    },
];

/// The way from a client to a server in the mesh, and the server outside that stands where that one does.
#[derive(Clone, Copy)]
pub(super) struct Path {
    name: &'static str,
    client: &'static str,
    server: &'static str,
    outside: &'static str,
}

const ACROSS: Path = Path { name: "across", client: "client", server: "far", outside: "xfar" };
const SAME_NODE: Path = Path { name: "same-node", client: "client", server: "near", outside: "xnear" };
/// As it is, by the namespace's `nodeLocal: direct`.
const DIRECT: Path = Path { name: "same-node-direct", client: "dclient", server: "dnear", outside: "xnear" };
/// Past ztunnel, by `nodeLocal: kernel`, which only capture by eBPF has.
const KERNEL: Path = Path { name: "same-node-kernel", client: "kclient", server: "knear", outside: "xnear" };

/// With any capture; with that by eBPF; and with that, beside another.
pub(super) const PATHS: &[Path] = &[ACROSS, SAME_NODE, DIRECT];
pub(super) const ALL_BY_EBPF: &[Path] = &[ACROSS, SAME_NODE, DIRECT, KERNEL];
pub(super) const BY_EBPF: &[Path] =
    &[Path { name: "across-ebpf", ..ACROSS }, Path { name: "same-node-direct-ebpf", ..DIRECT }, KERNEL];

/// How often, and how long, connections are made before those that are measured.
const PRIMED: usize = 3;
const PRIMING: Duration = Duration::from_millis(300);

/// Whether any of the scenarios here is wanted.
pub(super) fn any_is_wanted(args: &BenchArgs) -> bool {
    SCENARIOS.iter().map(|scenario| scenario.name).chain(["cold-start"]).any(|name| args.wants(name))
}

/// Measures all scenarios on these paths.
pub(super) fn measure(bench: &mut Bench<'_>, paths: &[Path]) -> Result<()> {
    for scenario in SCENARIOS {
        for &path in paths {
            if bench.args.wants(scenario.name) {
                bench.attempt(&format!("{} {}", scenario.name, path.name), |b| one(b, scenario, path))?;
            }
        }
    }
    if bench.args.wants("cold-start") {
        for &path in paths {
            bench.attempt(&format!("cold-start {}", path.name), |b| cold_start(b, path))?;
        }
    }
    Ok(())
}

fn one(bench: &mut Bench<'_>, scenario: &Scenario, path: Path) -> Result<()> {
    let mut direct = Vec::new();
    let mut mesh = Vec::new();
    let mut cpu = Vec::new();
    if path.name == KERNEL.name {
        prime(bench, scenario, path)?;
    }
    for _ in 0..bench.args.repetitions {
        direct.push(load_once(bench, scenario, "xclient", path.outside)?);
        let before = cpu_of_both(bench)?;
        let outcome = load_once(bench, scenario, path.client, path.server)?;
        cpu.push(scenario.per.of(cpu_of_both(bench)? - before, &outcome));
        mesh.push(outcome);
    }
    for (metric, unit, figure) in scenario.figures {
        let value = |list: &[Outcome]| median(list.iter().map(figure).collect());
        bench.results.add(scenario.name, path.name, metric, unit, value(&mesh), Some(value(&direct)));
    }
    let (metric, unit) = scenario.per.metric();
    bench.results.add(scenario.name, path.name, metric, unit, median(cpu), None);
    Ok(())
}

/// ztunnel carries the first connections of a pair; how long they last is the load's choice. What is measured are later ones.
fn prime(bench: &Bench<'_>, scenario: &Scenario, path: Path) -> Result<()> {
    for _ in 0..PRIMED {
        load::run(Plan {
            namespace: Some(bench.lab.pod(path.client)?.netns_path()),
            target: SocketAddr::new(bench.lab.pod(path.server)?.v4.into(), scenario.port),
            talk: Talk::Exchange,
            shape: scenario.shape,
            duration: PRIMING,
            warm_up: Duration::ZERO,
        })?;
        std::thread::sleep(PRIMING);
    }
    Ok(())
}

fn load_once(bench: &Bench<'_>, scenario: &Scenario, client: &str, server: &str) -> Result<Outcome> {
    bench.lab.stop().check()?;
    let outcome = load::run(Plan {
        namespace: Some(bench.lab.pod(client)?.netns_path()),
        target: SocketAddr::new(bench.lab.pod(server)?.v4.into(), scenario.port),
        talk: Talk::Exchange,
        shape: scenario.shape,
        duration: bench.seconds(),
        warm_up: Duration::from_millis(500),
    })?;
    // A figure of which a part failed is no figure.
    if outcome.failed() > 0 {
        bail!("{} from {client} to {server} failed: {}", scenario.name, outcome.failures_shown());
    }
    Ok(outcome)
}

fn cpu_of_both(bench: &Bench<'_>) -> Result<f64> {
    let [one, two] = NodeId::ALL.map(|n| bench.lab.ztunnel(n).and_then(Ztunnel::usage));
    Ok(one?.cpu + two?.cpu)
}

/// The first request that ztunnels carry: nothing is pooled, no certificate is there.
fn cold_start(bench: &mut Bench<'_>, path: Path) -> Result<()> {
    let plan = |bench: &Bench<'_>, client: &str, server: &str| -> Result<Plan> {
        Ok(Plan {
            namespace: Some(bench.lab.pod(client)?.netns_path()),
            target: SocketAddr::new(bench.lab.pod(server)?.v4.into(), EXCHANGE_PORT),
            talk: Talk::Exchange,
            shape: closed(1),
            duration: Duration::ZERO,
            warm_up: Duration::ZERO,
        })
    };
    let mut direct = Vec::new();
    let mut mesh = Vec::new();
    for _ in 0..bench.args.repetitions {
        for node in NodeId::ALL {
            bench.lab.ztunnel_mut(node)?.terminate();
        }
        bench.start_ztunnels()?;
        let us = |d: Duration| d.as_secs_f64() * 1e6;
        direct.push(us(load::once(&plan(bench, "xclient", path.outside)?)?));
        let first = plan(bench, path.client, path.server)?;
        mesh.push(us(load::once(&first).context("the first request after a start")?));
    }
    bench.results.add("cold-start", path.name, "p50_us", "us", median(mesh), Some(median(direct)));
    Ok(())
}
