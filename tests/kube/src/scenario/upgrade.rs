//! New versions, while applications talk.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::stage::PATIENCE;
use super::{App, Stage};
use crate::lab::NODES;
use crate::mesh::NAMESPACE;

/// See [`super::ALL`].
pub fn rollout(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.apply(&[super::apps::service("server"), App::server("server").on(&far).deployment(2)])?;
    stage.kubectl().rolled_out(&stage.namespace, "deployment/server", PATIENCE)?;
    stage.start(&[App::client("client", &["-load", "40@http://server:8080/"]).on(&near)])?;
    stage.enrolled(true)?;
    let before = stage.talking("client")?;
    stage.nothing_in_plaintext(&far, || {
        for _ in 0..2 {
            stage.kubectl().run(&["rollout", "restart", "-n", &stage.namespace, "deployment/server"])?;
            stage.kubectl().rolled_out(&stage.namespace, "deployment/server", PATIENCE)?;
        }
        stage.pass(Duration::from_secs(3));
        Ok(())
    })?;
    let after = stage.undisturbed("client", &before)?;
    ensure!(after.iter().all(|job| job.good > 100), "too few requests to say anything: {after:?}");
    stage.ok("two rolling updates, and every request was answered");
    Ok(())
}

/// See [`super::ALL`].
pub fn ztunnel(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    let talk = ["-load", "40@http://server:8080/", "-hold", "10@server:9000"];
    stage.start(&[App::client("client", &talk).on(&near)])?;
    stage.enrolled(true)?;
    let before = stage.talking("client")?;
    stage.nothing_in_plaintext(&far, || {
        stage.kubectl().run(&["rollout", "restart", "-n", NAMESPACE, "daemonset/ztunnel"])?;
        stage.kubectl().rolled_out(NAMESPACE, "daemonset/ztunnel", PATIENCE * 3)?;
        stage.pass(Duration::from_secs(3));
        Ok(())
    })?;
    let after = stage.jobs("client")?;
    for (after, before) in after.iter().zip(&before) {
        stage.ok(&format!(
            "{} {}: {} good, {} lost, the longest wait {} ms",
            after.kind,
            after.target,
            after.good - before.good,
            after.failed - before.failed,
            after.longest_ms
        ));
        // Long connections live until the old ztunnel's time is over, and may be made again then.
        let may_lose = if after.kind == "hold" { 10 } else { 0 };
        ensure!(after.failed - before.failed <= may_lose, "lost: {after:?}");
    }
    Ok(())
}
