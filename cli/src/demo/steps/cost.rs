//! Step 6: a node's metrics, and throughput and latency beside the same path without the mesh.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;

use crate::demo::Demo;
use crate::lab::NodeId;
use crate::load::{self, EXCHANGE_PORT, Outcome, Plan, SINK_PORT, Shape, Talk};

/// How long each figure is measured.
const MEASURED: Duration = Duration::from_millis(1500);

/// The step.
pub fn run(demo: &mut Demo) -> Result<()> {
    metrics(demo)?;
    demo.report.say("The same load from node-1 to node-2, between pods outside the mesh (direct) and in it:");
    demo.report.say(&format!("{:44}{:>12}{:>12}{:>8}", "", "direct", "mesh", "ratio"));
    let bulk = compare(demo, SINK_PORT, Shape::Bulk { streams: 1 })?;
    line(demo, "one stream, Gbit/s", "bulk", &bulk, Outcome::gigabits);
    let closed = compare(demo, EXCHANGE_PORT, Shape::Closed { connections: 16, reconnect: false })?;
    line(demo, "16 connections, 1 KB requests, requests/s", "closed-16", &closed, Outcome::rate);
    let open = compare(demo, EXCHANGE_PORT, Shape::Open { connections: 16, rate: 1000 })?;
    line(demo, "at 1,000 requests/s: half within, µs", "open-p50", &open, |o| o.quantile_us(0.5));
    line(demo, "                     99 of 100 within, µs", "open-p99", &open, |o| o.quantile_us(0.99));
    let connects = compare(demo, EXCHANGE_PORT, Shape::Connects { parallel: 16 })?;
    line(demo, "new connections/s", "new-connections", &connects, Outcome::rate);
    let failed: u64 = [bulk, closed, open, connects].iter().flatten().map(Outcome::failed).sum();
    demo.report.claim(failed == 0, format!("requests and connections that failed: {failed}"));
    for node in NodeId::ALL {
        let used = demo.lab.ztunnel(node)?.usage()?;
        demo.report.say(&format!(
            "{}'s ztunnel: {:.1} MB resident",
            node.name(),
            used.rss_kb as f64 / 1000.0
        ));
    }
    demo.report
        .say("Both nodes, the load and the servers share this machine; `make bench` measures at length.");
    Ok(())
}

fn metrics(demo: &mut Demo) -> Result<()> {
    let text = demo.lab.ztunnel(NodeId::Two)?.metrics()?;
    let wanted = "istio_tcp_connections_opened_total{";
    let line =
        text.lines().find(|l| l.starts_with(wanted) && l.contains("sa/frontend") && l.contains("sa/web"));
    demo.report.say(&format!("node-2:15020/metrics has {} lines; one of them:", text.lines().count()));
    let Some(line) = line else {
        demo.report.claim(false, "the metrics count frontend's connections to web");
        return Ok(());
    };
    for part in line.replace("\",", "\",\n").lines().filter(|l| !l.contains("\"unknown\"")) {
        demo.report.say(&format!("    {part}"));
    }
    demo.report.claim(true, "the metrics count frontend's connections to web, under Istio's names");
    Ok(())
}

/// Direct and through the mesh.
fn compare(demo: &mut Demo, port: u16, shape: Shape) -> Result<[Outcome; 2]> {
    let one = |client: &str, server: &str| -> Result<Outcome> {
        demo.report.doing(&format!("{shape:?} {client}"));
        let target: IpAddr = demo.lab.pod(server)?.v4.into();
        demo.lab.stop().check()?;
        Ok(load::run(Plan {
            namespace: Some(demo.lab.pod(client)?.netns_path()),
            target: SocketAddr::new(target, port),
            talk: Talk::Exchange,
            shape,
            duration: MEASURED,
            warm_up: Duration::from_millis(200),
        })?)
    };
    Ok([one("legacy", "plain")?, one("frontend", "target")?])
}

fn line(demo: &mut Demo, text: &str, key: &str, [direct, mesh]: &[Outcome; 2], figure: fn(&Outcome) -> f64) {
    let (direct, mesh) = (figure(direct), figure(mesh));
    let digits = usize::from(direct < 100.0) * 2;
    demo.report.say(&format!("{text:44}{direct:>12.digits$}{mesh:>12.digits$}{:>8.2}", mesh / direct));
    demo.report.measured(key, "as named", mesh, Some(direct));
}
