//! Step 7: a node's metrics, and throughput and latency beside the same path without the mesh.

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

/// What is shown of the metrics: each name's first line that has all of the texts.
const SHOWN: [(&str, &[&str]); 5] = [
    ("istio_tcp_connections_opened_total", &["sa/frontend", "sa/web"]),
    ("istio_tcp_sent_bytes_total", &["sa/frontend", "sa/web"]),
    ("culvert_pods", &["enrolled"]),
    ("culvert_certificates", &[]),
    ("culvert_tls_handshakes_total", &[]),
];

/// The labels by which the metrics of a connection are read most.
const LABELS: [&str; 6] = [
    "reporter=",
    "source_principal=",
    "destination_principal=",
    "destination_service=",
    "response_code=",
    "connection_security_policy=",
];

fn metrics(demo: &mut Demo) -> Result<()> {
    let text = demo.lab.ztunnel(NodeId::Two)?.metrics()?;
    demo.report.say(&format!(
        "node-2:15020/metrics has {} lines, with Istio's names and labels; some:",
        text.lines().count()
    ));
    let mut found = 0;
    for (name, wanted) in SHOWN {
        let line = text.lines().find(|line| {
            let rest = line.strip_prefix(name).unwrap_or_default();
            rest.starts_with(['{', ' ']) && wanted.iter().all(|w| rest.contains(w))
        });
        if let Some(line) = line {
            found += 1;
            demo.report.say(&format!("    {}", shortened(line)));
        }
    }
    demo.report.claim(
        found == SHOWN.len(),
        "connections and bytes by both identities, capture, certificates, handshakes",
    );
    Ok(())
}

/// A line of metrics with the labels that matter here.
pub(super) fn shortened(line: &str) -> String {
    let Some((name, (labels, value))) =
        line.split_once('{').and_then(|(n, r)| Some((n, r.rsplit_once('}')?)))
    else {
        return line.to_owned();
    };
    let all: Vec<&str> = labels.split("\",").collect();
    let kept: Vec<_> = all
        .iter()
        .filter(|l| all.len() <= 2 || LABELS.iter().any(|k| l.starts_with(k)))
        .map(|l| format!("{}\"", l.trim_end_matches('"')))
        .collect();
    let more = if kept.len() < all.len() { ", …" } else { "" };
    format!("{name}{{{}{more}}}{value}", kept.join(", "))
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
