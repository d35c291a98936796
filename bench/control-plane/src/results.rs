//! What was measured, as JSON for machines and Markdown for people: the form of `culvert bench`.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

/// Where it was measured.
#[derive(Clone, Debug, Serialize)]
struct Machine {
    machine: String,
    kernel: String,
    commit: String,
    repetitions: usize,
}

/// One figure, with what is wanted of it where something is.
#[derive(Clone, Debug, Serialize)]
struct Record {
    pods: u32,
    proxies: u32,
    scenario: &'static str,
    metric: &'static str,
    unit: &'static str,
    value: f64,
    target: Option<f64>,
    #[serde(flatten)]
    machine: Machine,
}

/// All figures.
#[derive(Debug)]
pub struct Results {
    machine: Machine,
    records: Vec<Record>,
}

/// What is wanted at 100,000 pods.
fn target(pods: u32, scenario: &str, metric: &str) -> Option<f64> {
    match (scenario, metric) {
        _ if pods < 100_000 => None,
        ("churn", "p99_ms") => Some(1000.0),
        (_, "culvertd_peak_mib") => Some(1536.0),
        (_, "ztunnel_rss_mib") => Some(100.0),
        ("restart" | "reconnect", "resources_resent") => Some(0.0),
        _ => None,
    }
}

impl Results {
    /// None yet.
    ///
    /// # Errors
    /// The machine can't be described.
    pub fn new(repetitions: usize) -> Result<Self> {
        Ok(Self { machine: machine(repetitions)?, records: Vec::new() })
    }

    /// Says what is being measured.
    pub fn note(&self, what: &str) {
        // Progress only; the results are in files.
        let _ = writeln!(io::stderr(), "{what}");
    }

    /// Adds a figure, the median of what repetitions gave.
    pub fn add(
        &mut self,
        (pods, proxies): (u32, u32),
        (scenario, metric): (&'static str, &'static str),
        unit: &'static str,
        value: f64,
    ) {
        let target = target(pods, scenario, metric);
        let value = rounded(value);
        let machine = self.machine.clone();
        self.records.push(Record { pods, proxies, scenario, metric, unit, value, target, machine });
    }

    /// What missed its target.
    pub fn missed(&self) -> Vec<String> {
        let missed = self.records.iter().filter(|r| r.target.is_some_and(|target| r.value > target));
        let said = |r: &Record| {
            let target = r.target.unwrap_or_default();
            format!("{} {}: {} {}, and wanted is {target}", r.scenario, r.metric, r.value, r.unit)
        };
        missed.map(said).collect()
    }

    /// Writes `control-plane.json` and `control-plane.md`.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let put = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        put("control-plane.json", format!("{}\n", serde_json::to_string_pretty(&self.records)?))?;
        put("control-plane.md", self.markdown()?)
    }

    fn markdown(&self) -> Result<String> {
        let Machine { machine, kernel, commit, repetitions } = &self.machine;
        let mut text = format!(
            "# What the control plane costs\n\nMeasured by `make bench-control-plane` on {machine}, Linux {kernel}, commit {commit}; \
             medians of {repetitions}. One culvertd, fed by a generator that speaks the API server's lists and watches; the \
             generator, the simulated proxies and two real ztunnels share the machine with it, so times are longer than where they \
             don't. How it is measured and what the rows mean: [../README.md](../README.md).\n"
        );
        let mut size = None;
        for r in &self.records {
            if size != Some((r.pods, r.proxies)) {
                size = Some((r.pods, r.proxies));
                writeln!(
                    text,
                    "\n## {} pods, {} proxies\n\n| scenario | metric | value | target |\n|---|---|---|---|",
                    r.pods, r.proxies
                )?;
            }
            let target = r.target.map(|t| format!("≤ {t}")).unwrap_or_default();
            writeln!(text, "| {} | {} | {} {} | {target} |", r.scenario, r.metric, r.value, r.unit)?;
        }
        Ok(text)
    }
}

/// The middle value; the mean of the two middle ones of an even number.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    if values.len() % 2 == 1 { at(middle) } else { f64::midpoint(at(middle.wrapping_sub(1)), at(middle)) }
}

/// The value that a share of all is not above.
pub fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = (values.len() as f64 * share).ceil() as usize;
    values.get(place.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// To four significant digits: more would claim what was not measured.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

fn machine(repetitions: usize) -> Result<Machine> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
    let cpuinfo = read("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map(|m| m.1);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let meminfo = read("/proc/meminfo")?;
    let kb =
        meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    let kb: u64 = kb.unwrap_or_default();
    Ok(Machine {
        machine: format!("{cores} cores, {}, {} GiB", model.unwrap_or("unknown processor"), kb >> 20),
        kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        commit: commit(),
        repetitions,
    })
}

fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    if changed { format!("{commit} and uncommitted changes") } else { commit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_medians() {
        let mut values: Vec<f64> = (1..=100).map(f64::from).rev().collect();
        assert_eq!((quantile(&mut values, 0.5), quantile(&mut values, 0.99)), (50.0, 99.0));
        assert!(quantile(&mut [], 0.5).is_nan());
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(rounded(123_456.0), 123_500.0);
    }

    #[test]
    fn what_misses_its_target_is_named() {
        let mut results = Results::new(1).unwrap();
        results.add((100_000, 10), ("churn", "p99_ms"), "ms", 1200.0);
        results.add((100_000, 10), ("start", "culvertd_peak_mib"), "MiB", 900.0);
        results.add((1000, 10), ("churn", "p99_ms"), "ms", 1200.0);
        assert_eq!(results.missed(), ["churn p99_ms: 1200 ms, and wanted is 1000"]);
        let text = results.markdown().unwrap();
        assert!(text.contains("## 1000 pods, 10 proxies") && text.contains("| 1200 ms | ≤ 1000 |"), "{text}");
    }
}
