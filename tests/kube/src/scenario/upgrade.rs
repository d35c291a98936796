//! New versions, while applications talk.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::stage::PATIENCE;
use super::{App, Stage};
use crate::lab::NODES;
use crate::mesh::{self, NAMESPACE};

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

/// See [`super::ALL`].
pub fn root(stage: &Stage) -> Result<()> {
    const SECRET: [&str; 4] = ["secret", "-n", NAMESPACE, "culvert-ca-secret"];
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    stage.start(&[App::client("client", &["-load", "20@http://server:8080/"]).on(&near)])?;
    stage.enrolled(true)?;
    let before = stage.talking("client")?;
    let signer = |secret: &Value| secret["data"]["ca-cert.pem"].clone();
    let old = signer(&stage.kubectl().get(&SECRET)?);
    let words = ["annotate", "-n", NAMESPACE, "secret/culvert-ca-secret", "culvert.dev/rotate-root=now"];
    stage.kubectl().run(&words)?;
    stage.kubectl().until(
        &["configmap", "-n", &stage.namespace, "istio-ca-root-cert"],
        PATIENCE,
        |bundle| {
            let text = bundle["data"]["root-cert.pem"].as_str().unwrap_or_default();
            let roots = text.matches("BEGIN CERTIFICATE").count();
            if roots == 2 { Ok(()) } else { Err(format!("{roots} roots")) }
        },
    )?;
    stage.ok("every namespace has the new root beside the old one");
    stage.kubectl().until(&SECRET, PATIENCE * 2, |secret| {
        if signer(secret) == old { Err(secret["metadata"]["annotations"].to_string()) } else { Ok(()) }
    })?;
    stage.ok("every proxy trusts it, and it signs");
    // Its certificate is of the new root, the server's of the old one.
    stage.start(&[App::client("late", &["-load", "20@http://server:8080/"]).account("late").on(&near)])?;
    let late = stage.talking("late")?;
    stage.pass(Duration::from_secs(3));
    stage.undisturbed("late", &late)?;
    stage.undisturbed("client", &before)?;
    stage.ok("both talk, and nothing was lost");
    Ok(())
}

/// See [`super::ALL`].
pub fn revision(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    stage.start(&[App::client("client", &["-load", "20@http://server:8080/"]).on(&near)])?;
    stage.enrolled(true)?;
    let before = stage.talking("client")?;
    let settings = ["revision=canary", "node.enabled=false", "ztunnel.enabled=false"];
    let outcome = mesh::release(&stage.cluster, "culvert-canary", &settings).and_then(|()| {
        stage.kubectl().rolled_out(NAMESPACE, "deployment/culvertd-canary", PATIENCE)?;
        stage.ok("a second control plane is ready beside the first");
        stage.pass(Duration::from_secs(3));
        stage.undisturbed("client", &before)
    });
    mesh::remove(&stage.cluster, "culvert-canary")?;
    mesh::ready(&stage.cluster, PATIENCE)?;
    stage.undisturbed("client", &outcome?)?;
    stage.ok("it comes and goes, and the first goes on");
    Ok(())
}
