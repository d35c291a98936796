//! What the control plane costs: `make bench-control-plane`.
//!
//! ```text
//!   store ─▶ api: lists, watches ─▶ culvertd (a process) ─▶ clients: one for each node, acknowledge, count
//!     ▲                                        └──────────▶ ztunnel (processes), a few
//!     └─ churn: scenarios ──────────── the last acknowledgement of each change ◀─┘
//! ```
#![forbid(unsafe_code)]

mod api;
mod clients;
mod objects;
mod programs;
mod results;
mod scenarios;
mod store;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

use objects::Size;
use results::Results;
use scenarios::{Figure, Plan};

/// Measures the control plane beside simulated proxies and a few real ones, on loopback. Needs no root.
#[derive(Parser, Debug)]
struct Arguments {
    /// Where control-plane.json and control-plane.md go; nowhere if it is not said
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The sizes: pods, and nodes, each of which has a proxy
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "PODS/NODES",
        default_value = "1000/20,10000/200,100000/2000"
    )]
    sizes: Vec<String>,
    /// How long pods come and go
    #[arg(long, default_value_t = 30, value_name = "S")]
    seconds: u64,
    /// Pods that are replaced in a second
    #[arg(long, default_value_t = 100, value_name = "N")]
    rate: u32,
    /// Real ztunnels
    #[arg(long, default_value_t = 2, value_name = "N")]
    ztunnels: u32,
    /// How often each size is measured; the median counts
    #[arg(long, default_value_t = 1, value_name = "N")]
    repetitions: usize,
    /// culvertd and ztunnel: this folder [default: where this program is]
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Keep the programs' logs and files here
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

fn size(text: &str) -> Result<Size> {
    let (pods, nodes) = text.split_once('/').context("a size is PODS/NODES, such as 1000/20")?;
    let size = Size { pods: pods.parse()?, nodes: nodes.parse()? };
    let fits = (1..=1_000_000).contains(&size.pods) && (1..=10_000).contains(&size.nodes);
    ensure!(fits, "{text}: at most 1000000 pods on at most 10000 nodes");
    Ok(size)
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.repetitions > 0 && arguments.rate > 0, "--repetitions and --rate start at 1");
    let sizes = arguments.sizes.iter().map(|text| size(text)).collect::<Result<Vec<_>>>()?;
    process::runtimes::raise_descriptor_limit().context("cannot raise the limit of open files")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(&arguments, &sizes))
}

async fn measure(arguments: &Arguments, sizes: &[Size]) -> Result<()> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    let programs = arguments.programs.clone().or_else(|| own.parent().map(PathBuf::from)).unwrap_or_default();
    let program = |name: &str| {
        let path = programs.join(name);
        ensure!(path.is_file(), "{} is missing: `make bench-control-plane` builds it", path.display());
        Ok(path)
    };
    let (culvertd, ztunnel) = (program("culvertd")?, program("ztunnel")?);
    let mut results = Results::new(arguments.repetitions)?;
    let mut failures = Vec::new();
    for &size in sizes {
        let plan = Plan {
            size,
            ztunnels: arguments.ztunnels,
            churn: Duration::from_secs(arguments.seconds),
            rate: arguments.rate,
            culvertd: culvertd.clone(),
            ztunnel: ztunnel.clone(),
        };
        // One size that fails does not cost the others.
        if let Err(error) = one_size(arguments, &plan, &mut results).await {
            results.note(&format!("  failed: {error:#}"));
            failures.push(format!("{} pods: {error:#}", size.pods));
        }
    }
    if let Some(out) = &arguments.out {
        results.write(out)?;
    }
    failures.extend(results.missed());
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("\n")) }
}

async fn one_size(arguments: &Arguments, plan: &Plan, results: &mut Results) -> Result<()> {
    let Size { pods, nodes } = plan.size;
    let mut order = Vec::new();
    let mut values: BTreeMap<(&str, &str), Vec<f64>> = BTreeMap::new();
    for repetition in 1..=arguments.repetitions {
        results.note(&format!("{pods} pods, {nodes} proxies ({repetition} of {})", arguments.repetitions));
        let dir = tempfile::Builder::new().prefix("culvert-bench-").tempdir()?;
        let kept = arguments.keep.as_ref().map(|keep| keep.join(format!("{pods}-{repetition}")));
        if let Some(kept) = &kept {
            std::fs::create_dir_all(kept)?;
        }
        let at = kept.as_deref().unwrap_or(dir.path()).to_owned();
        let say = |((scenario, metric), unit, value): &Figure| {
            results.note(&format!("  {scenario} {metric}: {value:.4} {unit}"));
        };
        let plan = plan.clone();
        // A runtime of its own: with it end its proxies and its API server.
        let figures = tokio::task::block_in_place(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            let figures = runtime.block_on(scenarios::run(plan, &at, &say));
            runtime.shutdown_background();
            figures
        })?;
        for (key, unit, value) in figures {
            if repetition == 1 {
                order.push((key, unit));
            }
            values.entry(key).or_default().push(value);
        }
    }
    for (key, unit) in order {
        let value = results::median(values.remove(&key).unwrap_or_default());
        results.add((pods, nodes), key, unit, value);
    }
    Ok(())
}
