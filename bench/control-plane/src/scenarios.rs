//! What is measured of a cluster of one size, in the order of a cluster's life: start, all proxies at once, churn, all
//! proxies again, a restart of the control plane.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::api;
use crate::clients::{Clients, Got};
use crate::objects::Size;
use crate::programs::{Culvertd, Ztunnel};
use crate::results::quantile;
use crate::store::Store;

/// For any one thing to happen.
const LIMIT: Duration = Duration::from_secs(600);
/// After which memory is read: what was freed by then is free.
const REST: Duration = Duration::from_secs(3);
/// What a change may take to reach all proxies.
const LAST: Duration = Duration::from_secs(60);

/// How it is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How large the cluster is; a simulated proxy for each node.
    pub size: Size,
    /// Real ztunnels.
    pub ztunnels: u32,
    /// How long pods come and go.
    pub churn: Duration,
    /// Pods that are replaced in a second.
    pub rate: u32,
    /// The programs.
    pub culvertd: PathBuf,
    /// See `culvertd`.
    pub ztunnel: PathBuf,
}

/// A figure: scenario, metric, unit and value.
pub type Figure = ((&'static str, &'static str), &'static str, f64);

/// A cluster that is measured.
struct Run {
    plan: Plan,
    store: Arc<Store>,
    culvertd: Culvertd,
    clients: Clients,
    ztunnels: Vec<Ztunnel>,
    figures: Vec<Figure>,
}

/// Measures a cluster.
///
/// # Errors
/// Something did not happen at all, or a program ended.
pub async fn run(plan: Plan, dir: &Path, say: &(dyn Fn(&Figure) + Sync)) -> Result<Vec<Figure>> {
    let store = Arc::new(Store::new(plan.size, "culvert-system")?);
    let address = api::serve(store.clone()).await?;
    let began = Instant::now();
    let mut culvertd = Culvertd::start(&plan.culvertd, dir, address)?;
    culvertd.wait_ready(LIMIT).await?;
    let ready = began.elapsed().as_secs_f64();
    let used = culvertd.usage()?;
    sleep(REST).await;
    let rested = culvertd.usage()?;
    let root = root(&store).await?;
    let mut figures = vec![
        (("start", "ready_s"), "s", ready),
        (("start", "culvertd_cpu_s"), "s", used.cpu),
        (("start", "culvertd_rss_mib"), "MiB", rested.rss),
        (("start", "culvertd_peak_mib"), "MiB", rested.peak),
    ];
    figures.iter().for_each(say);
    let said = figures.len();
    culvertd.forget_peak()?;
    let began = Instant::now();
    let clients = Clients::start(plan.size.nodes, culvertd.port, &root)?;
    let mut run = Run { plan, store, culvertd, clients, ztunnels: Vec::new(), figures: Vec::new() };
    run.figures.append(&mut figures);
    let mut said = said;
    let mut tell = |run: &Run| {
        run.figures.iter().skip(said).for_each(say);
        said = run.figures.len();
    };
    run.connect(began, used.cpu).await?;
    tell(&run);
    run.ztunnels(dir, &root).await?;
    tell(&run);
    run.churn().await?;
    tell(&run);
    run.reconnect().await?;
    tell(&run);
    run.restart().await?;
    tell(&run);
    Ok(run.figures)
}

/// The root that the control plane made, where pods find it.
async fn root(store: &Store) -> Result<String> {
    let deadline = Instant::now() + LAST;
    loop {
        let map = store.written("/api/v1/configmaps", "culvert-system", "istio-ca-root-cert");
        let root = map.as_ref().and_then(|map| map.pointer("/data/root-cert.pem")?.as_str());
        if let Some(root) = root {
            return Ok(root.to_owned());
        }
        ensure!(Instant::now() < deadline, "the control plane has not published its root");
        sleep(Duration::from_millis(50)).await;
    }
}

impl Run {
    fn add(&mut self, scenario: &'static str, metric: &'static str, unit: &'static str, value: f64) {
        self.figures.push(((scenario, metric), unit, value));
    }

    fn proxies(&self) -> f64 {
        f64::from(self.plan.size.nodes)
    }

    async fn settle(&self) -> Result<()> {
        let (all, deadline) = (self.plan.size.nodes as usize, Instant::now() + LIMIT);
        while self.clients.settled() < all {
            let settled = self.clients.settled();
            ensure!(Instant::now() < deadline, "only {settled} of {all} proxies have the mesh's state");
            self.culvertd.usage()?;
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Adds what a storm cost.
    async fn storm(&mut self, name: &'static str, began: Instant, cpu: f64, before: Got) -> Result<()> {
        self.settle().await?;
        let took = began.elapsed().as_secs_f64();
        let used = self.culvertd.usage()?;
        let got = self.clients.got() - before;
        sleep(REST).await;
        let rested = self.culvertd.usage()?;
        let proxies = self.proxies();
        self.add(name, "last_proxy_s", "s", took);
        self.add(name, "culvertd_cpu_s", "s", used.cpu - cpu);
        self.add(name, "culvertd_cpu_ms_a_proxy", "ms", (used.cpu - cpu) * 1e3 / proxies);
        self.add(name, "kb_a_proxy", "kB", got.bytes as f64 / 1e3 / proxies);
        self.add(name, "culvertd_peak_mib", "MiB", rested.peak);
        self.add(name, "culvertd_rss_mib", "MiB", rested.rss);
        self.add(name, "streams_lost", "", got.failures as f64);
        Ok(())
    }

    async fn connect(&mut self, began: Instant, cpu: f64) -> Result<()> {
        self.storm("connect", began, cpu, Got::default()).await
    }

    async fn ztunnels(&mut self, dir: &Path, root: &str) -> Result<()> {
        if self.plan.ztunnels == 0 {
            return Ok(());
        }
        for number in 0..self.plan.ztunnels {
            let started = Ztunnel::start(&self.plan.ztunnel, dir, number, self.culvertd.port, root)?;
            self.ztunnels.push(started);
        }
        // A state's length, of which a simulated proxy has got all.
        let whole = self.clients.got().bytes as f64 / self.proxies();
        let deadline = Instant::now() + LIMIT;
        for ztunnel in &self.ztunnels {
            while ztunnel.got().await.unwrap_or(0.0) < whole * 0.95 {
                ensure!(Instant::now() < deadline, "a ztunnel has not got the mesh's state: {dir:?}");
                ztunnel.usage().with_context(|| format!("a ztunnel ended: {}", dir.display()))?;
                sleep(Duration::from_millis(100)).await;
            }
        }
        sleep(REST * 2).await;
        let (rss, peak) = self.ztunnel_memory()?;
        self.add("ztunnel", "ztunnel_rss_mib", "MiB", rss);
        self.add("ztunnel", "ztunnel_peak_mib", "MiB", peak);
        Ok(())
    }

    /// Of the largest: resident, and the peak.
    fn ztunnel_memory(&self) -> Result<(f64, f64)> {
        self.ztunnels.iter().try_fold((0.0_f64, 0.0_f64), |(rss, peak), ztunnel| {
            let used = ztunnel.usage()?;
            anyhow::Ok((rss.max(used.rss), peak.max(used.peak)))
        })
    }

    /// The bytes that all ztunnels got.
    async fn ztunnels_got(&self) -> Result<f64> {
        let mut all = 0.0;
        for ztunnel in &self.ztunnels {
            all += ztunnel.got().await?;
        }
        Ok(all)
    }

    async fn churn(&mut self) -> Result<()> {
        let pods = self.plan.size.pods;
        self.culvertd.forget_peak()?;
        let (used, before, began) = (self.culvertd.usage()?, self.clients.got(), Instant::now());
        let steps = self.culvertd.metric("culvertd_compile_steps").await?;
        let mut ticks = interval(Duration::from_secs(1) / self.plan.rate.max(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut changes = Vec::new();
        while began.elapsed() < self.plan.churn {
            ticks.tick().await;
            // Spread over all services and nodes.
            let place = (changes.len() as u64 * 7919 % u64::from(pods)) as u32;
            changes.push(self.store.replace(place).context("no such place")?);
        }
        let lasted = began.elapsed().as_secs_f64();
        let mut latencies = Vec::with_capacity(changes.len() * 2);
        let deadline = Instant::now() + LAST;
        for (old, new, at) in &changes {
            for (pod, came) in [(old, false), (new, true)] {
                let name = pod.resource();
                let last = loop {
                    if let Some(last) = self.clients.acknowledged(&name, came) {
                        break last;
                    }
                    ensure!(Instant::now() < deadline, "not all proxies know that {name} came or went");
                    sleep(Duration::from_millis(50)).await;
                };
                latencies.push(last.duration_since(*at).as_secs_f64() * 1e3);
            }
        }
        let now = self.culvertd.usage()?;
        let got = self.clients.got() - before;
        let (replaced, proxies) = (changes.len() as f64, self.proxies());
        let cpu = now.cpu - used.cpu;
        let steps = self.culvertd.metric("culvertd_compile_steps").await? - steps;
        self.add("churn", "pods_a_second", "1/s", replaced / lasted);
        self.add("churn", "p50_ms", "ms", quantile(&mut latencies, 0.5));
        self.add("churn", "p99_ms", "ms", quantile(&mut latencies, 0.99));
        self.add("churn", "max_ms", "ms", quantile(&mut latencies, 1.0));
        self.add("churn", "culvertd_cores", "", cpu / lasted);
        self.add("churn", "culvertd_cpu_ms_a_pod", "ms", cpu * 1e3 / replaced);
        self.add("churn", "culvertd_cpu_us_a_response", "us", cpu * 1e6 / got.responses.max(1) as f64);
        self.add("churn", "compile_steps_a_pod", "", steps / replaced);
        self.add("churn", "bytes_a_proxy_a_pod", "B", got.bytes as f64 / proxies / replaced);
        self.add("churn", "responses_a_proxy_a_second", "1/s", got.responses as f64 / proxies / lasted);
        self.add("churn", "culvertd_peak_mib", "MiB", now.peak);
        if !self.ztunnels.is_empty() {
            let (rss, _) = self.ztunnel_memory()?;
            self.add("churn", "ztunnel_rss_mib", "MiB", rss);
        }
        self.add("churn", "streams_lost", "", got.failures as f64);
        Ok(())
    }

    async fn reconnect(&mut self) -> Result<()> {
        self.culvertd.forget_peak()?;
        let (used, before, began) = (self.culvertd.usage()?, self.clients.got(), Instant::now());
        self.clients.reconnect();
        self.storm("reconnect", began, used.cpu, before).await?;
        let resent = (self.clients.got() - before).resources as f64;
        self.add("reconnect", "resources_resent", "", resent);
        let said = self.clients.remembered_bytes() as f64 / 1e3;
        self.add("reconnect", "kb_said_by_a_proxy", "kB", said);
        Ok(())
    }

    async fn restart(&mut self) -> Result<()> {
        self.clients.remember();
        let before = self.clients.got();
        let told = self.ztunnels_got().await?;
        let began = Instant::now();
        tokio::task::block_in_place(|| self.culvertd.restart())?;
        self.storm("restart", began, 0.0, before).await?;
        let resent = (self.clients.got() - before).resources as f64;
        self.add("restart", "resources_resent", "", resent);
        if !self.ztunnels.is_empty() {
            let each = (self.ztunnels_got().await? - told) / 1e3 / self.ztunnels.len() as f64;
            self.add("restart", "kb_a_ztunnel", "kB", each);
        }
        Ok(())
    }
}
