//! Step 5: the root of trust exchanged in its three stages, while connections are made and used.

use std::time::Duration;

use anyhow::{Context, Result};
use identity::rotation;
use identity::{CaDirectory, Clock};
use model::{TrustDomain, TrustDomains};
use serde_json::Value;

use super::web_service;
use crate::demo::Demo;
use crate::lab::NodeId;
use crate::load::{self, Shape};

/// A stage must have reached both nodes by then.
const LIMIT: Duration = Duration::from_secs(15);
/// How long the load goes on between the stages.
const BETWEEN: Duration = Duration::from_millis(700);

/// The step.
pub fn run(demo: &mut Demo) -> Result<()> {
    let old = signing_root(demo)?;
    let closed = Shape::Closed { connections: 8, reconnect: false };
    let kept = load::start(demo.web_load("frontend", web_service(), closed)?)?;
    let fresh = load::start(demo.web_load("frontend", web_service(), Shape::Connects { parallel: 2 })?)?;
    let stop = demo.lab.stop().clone();
    let flows = || Ok(kept.live().answered() > 200 && fresh.live().answered() > 20);
    let flows = stop.wait_until(LIMIT, flows)?;
    demo.report.claim(flows, "load: 8 connections that stay, and 2 clients that make new ones without end");

    stage(demo, &["trust-both"])?;
    let new = rotation::status(&CaDirectory::open(&demo.options.ca_dir)?)?;
    let new = new.new_root.context("no new root after trust-both")?.to_string();
    wait_for(demo, "both ztunnels trust old and new root", |c| roots(c).contains(&new))?;
    stage(demo, &["sign-with-new", "--acknowledge"])?;
    wait_for(demo, "every workload in use has a certificate of the new root", |c| {
        let issued = issuing_roots(c);
        !issued.is_empty() && issued.iter().all(|r| *r == new)
    })?;
    stage(demo, &["drop-old", "--acknowledge"])?;
    wait_for(demo, "neither trusts the old root any more", |c| !roots(c).contains(&old))?;
    demo.report
        .claim(signing_root(demo)? == new && new != old, "the root that signs is another one than before");

    let (kept, fresh) = (kept.finish()?, fresh.finish()?);
    demo.report.say(&format!(
        "8 connections carried {} requests; {} new ones were made",
        kept.answered, fresh.connections
    ));
    demo.report.claim(kept.failed() == 0, format!("of the 8 that stayed, lost: {}", kept.failures_shown()));
    demo.report.claim(
        fresh.failed() == 0,
        format!("of the {} new ones, failed: {}", fresh.connections, fresh.failures_shown()),
    );
    demo.report.measured("requests_during_rotation", "1", (kept.answered + fresh.answered) as f64, None);
    demo.report.measured("connections_lost", "1", (kept.failed() + fresh.failed()) as f64, None);
    Ok(())
}

fn signing_root(demo: &Demo) -> Result<String> {
    let ca = CaDirectory::open(&demo.options.ca_dir)?;
    let loaded = ca.load(&TrustDomains::only(TrustDomain::cluster_local()), Clock::system().now())?;
    Ok(loaded.authority.root().to_string())
}

fn stage(demo: &mut Demo, arguments: &[&str]) -> Result<()> {
    let dir = demo.options.ca_dir.to_string_lossy().into_owned();
    let mut all = vec!["ca", "--ca-dir", &dir];
    all.extend(arguments);
    let ran = demo.culvert_on(NodeId::One, &all)?;
    demo.report.ran(&ran);
    demo.report.claim(ran.success, format!("stage {}", arguments.first().unwrap_or(&"")));
    Ok(())
}

/// Waits until both nodes' certificates satisfy `done`, then lets the load go on for a while.
fn wait_for(demo: &mut Demo, claim: &str, done: impl Fn(&Value) -> bool) -> Result<()> {
    let stop = demo.lab.stop().clone();
    let reached = stop.wait_until(LIMIT, || {
        for node in NodeId::ALL {
            let dump = demo.lab.ztunnel(node)?.admin().json("/config_dump")?;
            if !done(dump.get("certificates").unwrap_or(&Value::Null)) {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    demo.report.claim(reached, claim);
    stop.sleep(BETWEEN)
}

fn texts(list: Option<&Value>, key: &str) -> Vec<String> {
    let list = list.and_then(Value::as_array).into_iter().flatten();
    list.filter_map(|v| v.get(key)?.as_str()).map(str::to_owned).collect()
}

/// The roots that a node trusts.
fn roots(certificates: &Value) -> Vec<String> {
    texts(certificates.get("roots"), "id")
}

/// The roots that its workloads' certificates lead to.
fn issuing_roots(certificates: &Value) -> Vec<String> {
    texts(certificates.get("workloads"), "root")
}
