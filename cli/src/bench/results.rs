//! What was measured, as JSON for machines, Markdown for people, and a picture.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::picture;

/// Where it was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub machine: String,
    pub kernel: String,
    pub commit: String,
    pub repetitions: usize,
}

/// One figure. `direct` is the same without the mesh, `ratio` the figure divided by it.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    pub scenario: &'static str,
    pub path: &'static str,
    pub metric: &'static str,
    pub unit: &'static str,
    pub value: f64,
    pub direct: Option<f64>,
    pub ratio: Option<f64>,
    #[serde(flatten)]
    pub machine: Machine,
}

/// All figures.
#[derive(Debug)]
pub struct Results {
    machine: Machine,
    records: Vec<Record>,
}

impl Results {
    /// None yet.
    pub fn new(machine: Machine) -> Self {
        Self { machine, records: Vec::new() }
    }

    /// Says what is being measured.
    pub fn note(&self, what: &str) {
        // Progress only; the results are in files.
        let _ = writeln!(io::stderr(), "{what}");
    }

    /// Adds a figure.
    pub fn add(
        &mut self,
        scenario: &'static str,
        path: &'static str,
        metric: &'static str,
        unit: &'static str,
        value: f64,
        direct: Option<f64>,
    ) {
        let ratio = direct.map(|d| rounded(value / d));
        let (value, direct) = (rounded(value), direct.map(rounded));
        let beside = direct.map(|d| format!(", direct {d}")).unwrap_or_default();
        self.note(&format!("  {metric}: {value} {unit}{beside}"));
        let machine = self.machine.clone();
        self.records.push(Record { scenario, path, metric, unit, value, direct, ratio, machine });
    }

    /// Writes `tunnel.json`, `tunnel.md` and `tunnel.svg`.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let put = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        put("tunnel.json", format!("{}\n", serde_json::to_string_pretty(&self.records)?))?;
        put("tunnel.md", self.markdown()?)?;
        put("tunnel.svg", picture::draw(&self.records)?)
    }

    fn markdown(&self) -> Result<String> {
        let Machine { machine, kernel, commit, repetitions } = &self.machine;
        let mut text = format!(
            "# What the tunnel costs\n\nMeasured by `make bench` on {machine}, Linux {kernel}, commit {commit}; medians of \
             {repetitions}. Client, servers and both ztunnels share the machine, so only ratios and CPU figures mean \
             anything elsewhere. `direct` is the same path between pods outside the mesh; CPU is that of both ztunnels \
             together. Istio's column is its ztunnel's figure from another run on a like machine, for the same load.\n\n\
             ![ratios](tunnel.svg)\n\n| scenario | path | metric | mesh | direct | ratio | Istio |\n|---|---|---|---|---|---|---|\n"
        );
        for r in &self.records {
            let optional = |v: Option<f64>| v.map(shown).unwrap_or_default();
            let istio = istio(r.scenario, r.path, r.metric).map(Istio::shown).unwrap_or_default();
            writeln!(
                text,
                "| {} | {} | {} | {} {} | {} | {} | {istio} |",
                r.scenario,
                r.path,
                r.metric,
                shown(r.value),
                r.unit,
                optional(r.direct),
                optional(r.ratio),
            )?;
        }
        Ok(text)
    }
}

/// Istio's ztunnel, August 2026, two nodes on one machine of 2 cores: what can be compared between runs.
#[derive(Clone, Copy, Debug)]
pub enum Istio {
    /// Its ratio to direct.
    Ratio(f64),
    /// Its cost or memory.
    Value(f64),
}

impl Istio {
    fn shown(self) -> String {
        match self {
            Self::Ratio(r) => format!("ratio {r}"),
            Self::Value(v) => format!("{v}"),
        }
    }
}

/// Its figure for a record, where there is one.
pub fn istio(scenario: &str, path: &str, metric: &str) -> Option<Istio> {
    use Istio::{Ratio, Value};
    Some(match (scenario, path.strip_suffix("-ebpf").unwrap_or(path), metric) {
        ("throughput-1", "across", "gbps") => Ratio(0.36),
        ("throughput-1", "same-node", "gbps") => Ratio(0.34),
        ("throughput-8", "across", "gbps") => Ratio(0.22),
        ("throughput-8", "same-node", "gbps") => Ratio(0.23),
        ("throughput-1", "across", "cpu_s_per_gb") => Value(1.21),
        ("throughput-1", "same-node", "cpu_s_per_gb") => Value(1.17),
        ("latency-1000rps", "across", "p50_us") => Ratio(3.5),
        ("latency-1000rps", "across", "p90_us") => Ratio(3.2),
        ("latency-1000rps", "across", "p99_us") => Ratio(3.0),
        ("latency-1000rps", "across", "p999_us") => Ratio(1.8),
        ("latency-1000rps", "same-node", "p50_us") => Ratio(3.2),
        ("latency-1000rps", "same-node", "p90_us") => Ratio(3.0),
        ("latency-1000rps", "same-node", "p99_us") => Ratio(2.8),
        ("latency-1000rps", "same-node", "p999_us") => Ratio(2.0),
        ("latency-1000rps", "across", "cpu_us_per_request") => Value(88.0),
        ("latency-1000rps", "same-node", "cpu_us_per_request") => Value(67.0),
        ("closed-1", "across", "rps") => Ratio(0.56),
        ("closed-1", "same-node", "rps") => Ratio(0.47),
        ("closed-16", "across", "rps") => Ratio(0.24),
        ("closed-16", "same-node", "rps") => Ratio(0.19),
        ("closed-64", "across", "rps") => Ratio(0.25),
        ("closed-64", "same-node", "rps") => Ratio(0.21),
        ("closed-16", "across", "cpu_us_per_request") => Value(42.8),
        ("closed-16", "same-node", "cpu_us_per_request") => Value(50.0),
        ("new-connections", "across", "cps") => Ratio(0.24),
        ("new-connections", "same-node", "cps") => Ratio(0.11),
        ("new-connections", "across", "p50_us") => Ratio(4.1),
        ("new-connections", "across", "p99_us") => Ratio(4.9),
        ("new-connections", "across", "cpu_us_per_connection") => Value(219.0),
        ("new-connections", "same-node", "cpu_us_per_connection") => Value(297.0),
        ("cold-start", "across", "p50_us") => Value(2800.0),
        ("memory", _, "rss_mb_idle") => Value(15.5),
        ("memory", _, "kb_per_idle_connection") => Value(7.5),
        ("memory", _, "rss_mb_100k_workloads") => Value(136.0),
        ("memory", _, "peak_mb_100k_workloads") => Value(615.0),
        _ => return None,
    })
}

/// The middle value; the mean of the two middle ones of an even number.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    if values.len() % 2 == 1 { at(middle) } else { f64::midpoint(at(middle.wrapping_sub(1)), at(middle)) }
}

/// To four significant digits: more would claim what was not measured.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

fn shown(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let machine = Machine {
            machine: "2 cores".into(),
            kernel: "6.18".into(),
            commit: "abc".into(),
            repetitions: 3,
        };
        let mut results = Results::new(machine);
        results.add("closed-16", "across", "rps", "1/s", 50_123.4, Some(100_000.0));
        results.add("closed-16", "across", "cpu_us_per_request", "us", 21.0, None);
        results
    }

    #[test]
    fn medians_and_rounding() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(Vec::new()).is_nan());
        assert_eq!((rounded(123_456.0), rounded(0.123_456), rounded(0.0)), (123_500.0, 0.1235, 0.0));
    }

    #[test]
    fn the_files_hold_every_figure() {
        let dir = tempfile::tempdir().unwrap();
        results().write(dir.path()).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        let json: Vec<serde_json::Value> = serde_json::from_str(&read("tunnel.json")).unwrap();
        assert_eq!(json.len(), 2);
        let keys =
            ["scenario", "path", "metric", "unit", "value", "direct", "ratio", "machine", "kernel", "commit"];
        for key in keys.into_iter().chain(["repetitions"]) {
            assert!(json[0].get(key).is_some(), "{key}");
        }
        assert_eq!(json[0]["ratio"], 0.5012);
        assert!(json[1]["direct"].is_null());
        assert!(
            read("tunnel.md")
                .contains("| closed-16 | across | rps | 50120 1/s | 100000 | 0.5012 | ratio 0.24 |")
        );
        assert!(read("tunnel.svg").starts_with("<svg"));
    }
}
