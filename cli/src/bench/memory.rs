//! Resident memory: of an idle ztunnel, of idle connections, and of a large mesh.

use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Bench;
use crate::lab::{NodeId, Ztunnel};
use crate::load::{self, EXCHANGE_PORT, Plan, Shape, Talk};

/// How many connections are held open.
const IDLE_CONNECTIONS: usize = 2000;
/// The workloads of the large mesh, and how many documents one file holds.
const WORKLOADS: usize = 100_000;
const DOCUMENTS_A_FILE: usize = 1000;
/// How the names of the files begin.
const MANY: &str = "many-";
/// Reading them must not take longer.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// The larger of both nodes' ztunnels.
fn resident_kb(bench: &Bench<'_>) -> Result<[u64; 2]> {
    let [one, two] = NodeId::ALL.map(|n| bench.lab.ztunnel(n).and_then(Ztunnel::usage));
    Ok([one?.rss_kb, two?.rss_kb])
}

fn wait(bench: &Bench<'_>) -> Result<()> {
    bench.lab.stop().sleep(Duration::from_secs(bench.args.idle_seconds))
}

/// An idle ztunnel, and what an idle connection adds to each of the two that carry it.
pub(super) fn idle(bench: &mut Bench<'_>) -> Result<()> {
    wait(bench)?;
    let before = resident_kb(bench)?;
    let largest = before.into_iter().max().unwrap_or_default();
    bench.results.add("memory", "across", "rss_mb_idle", "MB", largest as f64 / 1000.0, None);

    let running = load::start(Plan {
        namespace: Some(bench.lab.pod("client")?.netns_path()),
        target: SocketAddr::new(bench.lab.pod("far")?.v4.into(), EXCHANGE_PORT),
        talk: Talk::Exchange,
        shape: Shape::Idle { connections: IDLE_CONNECTIONS },
        duration: Duration::from_secs(3600),
        warm_up: Duration::ZERO,
    })?;
    let all = || Ok(running.live().answered() >= IDLE_CONNECTIONS as u64);
    if !bench.lab.stop().wait_until(Duration::from_secs(30), all)? {
        bail!("only {} of {IDLE_CONNECTIONS} connections were made", running.live().answered());
    }
    wait(bench)?;
    let after = resident_kb(bench)?;
    let outcome = running.finish()?;
    if outcome.failed() > 0 {
        bail!("idle connections were lost: {}", outcome.failures_shown());
    }
    let grown: u64 = after.iter().zip(before).map(|(a, b)| a.saturating_sub(b)).sum();
    let each = grown as f64 / 2.0 / IDLE_CONNECTIONS as f64;
    bench.results.add("memory", "across", "kb_per_idle_connection", "kB", each, None);
    Ok(())
}

/// A ztunnel that knows of 100,000 pods in 1,000 services, which are gone again afterwards.
pub(super) fn large_mesh(bench: &mut Bench<'_>) -> Result<()> {
    let measured = write_pods(bench).and_then(|()| measure_large_mesh(bench));
    for file in fs::read_dir(bench.manifests.dir())?.flatten() {
        if file.file_name().to_string_lossy().starts_with(MANY) {
            fs::remove_file(file.path())?;
        }
    }
    measured
}

fn measure_large_mesh(bench: &mut Bench<'_>) -> Result<()> {
    bench.lab.ztunnel_mut(NodeId::Two)?.terminate();
    let options = bench.options.clone();
    bench.lab.start_ztunnel_within(NodeId::Two, &options, READY_LIMIT)?;
    let ready = bench.lab.ztunnel(NodeId::Two)?.ready_after();
    let known = bench.lab.ztunnel(NodeId::Two)?.admin().json("/config_dump")?;
    let known = known.get("workloads").and_then(|w| w.as_array()).map_or(0, Vec::len);
    if known < WORKLOADS {
        bail!("ztunnel is ready and knows {known} of {WORKLOADS} workloads");
    }
    // Asking for the dump takes memory of its own: a fresh process is measured.
    bench.lab.ztunnel_mut(NodeId::Two)?.terminate();
    bench.lab.start_ztunnel_within(NodeId::Two, &options, READY_LIMIT)?;
    wait(bench)?;
    let usage = bench.lab.ztunnel(NodeId::Two)?.usage()?;
    let results = &mut bench.results;
    results.add("memory", "across", "rss_mb_100k_workloads", "MB", usage.rss_kb as f64 / 1000.0, None);
    results.add("memory", "across", "peak_mb_100k_workloads", "MB", usage.peak_kb as f64 / 1000.0, None);
    results.add("memory", "across", "ready_s_100k_workloads", "s", ready.as_secs_f64(), None);
    Ok(())
}

fn write_pods(bench: &Bench<'_>) -> Result<()> {
    let dir = bench.manifests.dir();
    for file in 0..WORKLOADS / DOCUMENTS_A_FILE {
        let mut text = String::new();
        for i in 0..DOCUMENTS_A_FILE {
            pod(&mut text, file * DOCUMENTS_A_FILE + i)?;
        }
        let path = dir.join(format!("{MANY}{file:03}.yaml"));
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut text = String::new();
    for app in 0..WORKLOADS / 100 {
        write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: app-{app}, namespace: many}}\nspec:\n  \
             clusterIP: 10.97.{}.{}\n  selector: {{app: app-{app}}}\n  ports: [{{port: 80, targetPort: 8080}}]\n",
            app / 250,
            app % 250 + 1
        )?;
    }
    fs::write(dir.join(format!("{MANY}services.yaml")), text)?;
    Ok(())
}

fn pod(text: &mut String, number: usize) -> Result<()> {
    // 250 pods on each of 400 nodes; 100 in each application.
    let (node, app) = (number / 250, number / 100);
    write!(
        text,
        "---
apiVersion: v1
kind: Pod
metadata:
  name: app-{app}-{number}
  namespace: many
  uid: 00000000-0000-4000-8000-{number:012}
  labels:
    app: app-{app}
    istio.io/dataplane-mode: ambient
spec:
  nodeName: other-{node}
  serviceAccountName: app-{app}
  containers:
  - name: main
    image: registry.example/app:1
status:
  phase: Running
  podIP: 10.{}.{}.{}
  conditions:
  - type: Ready
    status: \"True\"
",
        100 + number / 62_500,
        number / 250 % 250,
        number % 250 + 1
    )?;
    Ok(())
}
