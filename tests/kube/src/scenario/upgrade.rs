//! New versions, while applications talk.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Error, Result, ensure};
use serde_json::{Value, json};

use super::stage::PATIENCE;
use super::{App, Stage, policy};
use crate::lab::NODES;
use crate::mesh::{self, NAMESPACE};
use crate::report::wait_for;

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

const SECRET: [&str; 4] = ["secret", "-n", NAMESPACE, "culvert-ca-secret"];

/// Says something to the one who keeps the root.
fn annotate_root(stage: &Stage, annotation: &str) -> Result<()> {
    let words = ["annotate", "--overwrite", "-n", NAMESPACE, "secret/culvert-ca-secret", annotation];
    stage.kubectl().run(&words).map(drop)
}

/// Waits until every namespace is given so many roots; returns them.
fn roots(stage: &Stage, wanted: usize) -> Result<String> {
    let bundle = ["configmap", "-n", &stage.namespace, "istio-ca-root-cert"];
    let text = |bundle: &Value| bundle["data"]["root-cert.pem"].as_str().unwrap_or_default().to_owned();
    stage.kubectl().until(&bundle, PATIENCE * 3, |bundle| {
        let roots = text(bundle).matches("BEGIN CERTIFICATE").count();
        if roots == wanted { Ok(()) } else { Err(format!("{roots} roots")) }
    })?;
    Ok(text(&stage.kubectl().get(&bundle)?))
}

/// See [`super::ALL`].
pub fn root(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    // What the old root signed is to be over within this scenario, as it is after a day: then it is dropped without a loss.
    mesh::install(&stage.cluster, &["ztunnel.extraArgs={--certificate-ttl=60}"])?;
    stage.label_in()?;
    stage.serve(&[App::server("server").account("old").on(&far)])?;
    let talk = |server: &str| [format!("20@http://{server}:8080/"), format!("5@{server}:9000")];
    let client = |name: &str, server: &str| {
        let [load, hold] = talk(server);
        App::client(name, &["-load", &load, "-hold", &hold]).account(name).on(&near)
    };
    stage.start(&[client("first", "server")])?;
    stage.enrolled(true)?;
    let before = stage.talking("first")?;
    let certificates = ["ztunnel-config", "certificate", "-o", "json"];
    let old_id = of_one_root(&stage.culvert(&certificates)?.output, 1).map_err(Error::msg)?;
    let signer = |secret: &Value| secret["data"]["ca-cert.pem"].clone();
    let (old, old_root) = (signer(&stage.kubectl().get(&SECRET)?), roots(stage, 1)?);
    annotate_root(stage, "culvert.dev/rotate-root=now")?;
    let both = roots(stage, 2)?;
    ensure!(both.contains(old_root.trim()), "the old root is not among the two");
    stage.ok("every namespace has the new root beside the old one");
    stage.kubectl().until(&SECRET, PATIENCE * 3, |secret| {
        if signer(secret) == old { Err(secret["metadata"]["annotations"].to_string()) } else { Ok(()) }
    })?;
    stage.ok("every proxy trusts it, and it signs");
    // Certificates of the new root and of the old one, each way.
    stage.serve(&[App::server("fresh").account("fresh").on(&far)])?;
    stage.start(&[client("late", "server"), client("cross", "fresh")])?;
    let (late, cross) = (stage.talking("late")?, stage.talking("cross")?);
    let old_to_new = stage.exec("first", &["app", "get", "-n", "20", "http://fresh:8080/"])?;
    ensure!(old_to_new.lines().all(|l| l.starts_with("200 fresh")), "from old to new: {old_to_new}");
    stage.pass(Duration::from_secs(3));
    let calm = |stage: &Stage| -> Result<()> {
        stage.undisturbed("first", &before)?;
        stage.undisturbed("late", &late)?;
        stage.undisturbed("cross", &cross).map(drop)
    };
    calm(stage)?;
    stage.ok("certificates of both roots talk to each other, and nothing was lost");

    wait_for("every certificate to be of the new root", PATIENCE * 4, || {
        Ok(of_another_root(&stage.culvert(&certificates)?.output, &old_id))
    })?;
    calm(stage)?;
    stage.ok("every certificate has been renewed, and is of the new root");
    // The control plane counts with the longest that it signs for.
    annotate_root(stage, "culvert.dev/accept-rotation=drop")?;
    let new = roots(stage, 1)?;
    ensure!(both.contains(new.trim()) && new != old_root, "the root that is left is not the new one");
    stage.ok("the old root is dropped");
    wait_for("every ztunnel to trust the new root only, with certificates of it", PATIENCE * 4, || {
        Ok(of_one_root(&stage.culvert(&certificates)?.output, 1).map(drop))
    })?;
    stage.ok("every ztunnel trusts the new root only, and has certificates of it only");
    stage.pass(Duration::from_secs(3));
    calm(stage)?;
    stage.start(&[client("last", "server")])?;
    let last = stage.talking("last")?;
    stage.pass(Duration::from_secs(2));
    stage.undisturbed("last", &last)?;
    let state = stage.kubectl().get(&SECRET)?["metadata"]["annotations"]["culvert.dev/rotation"].clone();
    ensure!(state.is_null(), "a rotation is still under way: {state}");
    stage.ok("the rotation is complete, and no connection or request was lost in it");
    Ok(())
}

/// Whether all certificates are of one root, beside the old one that is trusted too. A replica that has not read the Secret yet
/// signs with the old one for a moment: all may be of that.
fn of_another_root(text: &str, old: &str) -> Result<(), String> {
    let root = of_one_root(text, 2)?;
    if root == old { Err(format!("all are of {root}")) } else { Ok(()) }
}

/// The root of all certificates, where what the ztunnels of both nodes say of them (as JSON) is that all are valid and of one, and
/// that so many roots are trusted.
fn of_one_root(text: &str, roots: usize) -> Result<String, String> {
    let all: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let nodes = all.as_array().cloned().unwrap_or_default();
    let trusted: BTreeSet<String> = nodes.iter().map(|node| node["roots"].to_string()).collect();
    let certificates: Vec<Value> =
        nodes.iter().flat_map(|n| n["workloads"].as_array().cloned().unwrap_or_default()).collect();
    let signed: BTreeSet<String> = certificates.iter().map(|c| c["root"].to_string()).collect();
    let so_many = nodes.iter().all(|node| node["roots"].as_array().is_some_and(|all| all.len() == roots));
    let valid = !certificates.is_empty() && certificates.iter().all(|c| c["valid"] == true);
    match signed.first() {
        Some(root) if nodes.len() == NODES.len() && so_many && valid && signed.len() == 1 => Ok(root.clone()),
        _ => Err(format!("trusted: {trusted:?}, signed by: {signed:?}, valid: {valid}")),
    }
}

/// See [`super::ALL`].
pub fn revision(stage: &Stage) -> Result<()> {
    const CANARY: &str = "culvert-canary";
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    stage.start(&[
        App::client("client", &["-load", "20@http://server:8080/"]).on(&near),
        App::idle("stranger").account("stranger").on(&near),
    ])?;
    let outside = stage.beside("outside")?;
    outside.start(&[App::idle("plain").on(&near)])?;
    stage.enrolled(true)?;
    let before = stage.talking("client")?;
    let settings = ["revision=canary", "node.enabled=false", "ztunnel.enabled=false"];
    let outcome = mesh::release(&stage.cluster, CANARY, &settings).and_then(|()| {
        stage.kubectl().rolled_out(NAMESPACE, "deployment/culvertd-canary", PATIENCE)?;
        stage.culvert(&["verify-install", "--timeout", "60s"])?.code(0)?;
        stage.ok("a second control plane is ready beside the first");
        moved(stage, &outside)
    });
    let outcome = stage.put_back(outcome).and_then(|()| moved_back(stage, &outside));
    mesh::remove(&stage.cluster, CANARY)?;
    mesh::ready(&stage.cluster, PATIENCE)?;
    outcome?;
    policy::enforced(stage, "authorizationpolicy", "not-strangers")?;
    stage.undisturbed("client", &before)?;
    stage.ok("it comes and goes, and no request was lost");
    Ok(())
}

/// Waits until the proxies of all nodes are connected to this Deployment's pods, and have acknowledged everything.
fn served_by(stage: &Stage, deployment: &str) -> Result<()> {
    wait_for(&format!("the proxies to be connected to {deployment}"), PATIENCE, || {
        let said = stage.culvert(&["proxy-status"])?;
        // The name of a pod has two more parts.
        let is = |pod: &str| pod.rsplitn(3, '-').nth(2) == Some(deployment);
        let of = |line: &str| {
            line.matches("SYNCED").count() == 2 && line.split_whitespace().last().is_some_and(is)
        };
        let all = NODES.iter().all(|n| said.output.lines().any(|l| l.starts_with(n.name) && of(l)));
        Ok(if all { Ok(()) } else { Err(said.output) })
    })
}

fn moved(stage: &Stage, outside: &Stage) -> Result<()> {
    let url = format!("http://server.{}:8080/", stage.namespace);
    let principal = format!("cluster.local/ns/{}/sa/stranger", stage.namespace);
    let not_strangers = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "not-strangers"},
        "spec": {"action": "DENY", "rules": [{"from": [{"source": {"principals": [principal]}}]}]},
    });
    let mut strict = policy::peer_authentication(policy::STRICT);
    strict["metadata"]["labels"] = json!({"istio.io/rev": "canary"});
    stage.apply(&[not_strangers, strict])?;
    policy::enforced(stage, "authorizationpolicy", "not-strangers")?;
    stage.cannot_reach("stranger", &url)?;
    outside.reaches("plain", &url)?;
    served_by(stage, "culvertd")?;
    stage.ok("the proxies are the first one's, and what is labelled for the second is not in force");

    let address = format!("ztunnel.xdsAddress=https://culvertd-canary.{NAMESPACE}.svc:15012");
    mesh::install(&stage.cluster, &[&address, "ztunnel.rootConfigMap=culvert-ca-root-cert"])?;
    served_by(stage, "culvertd-canary")?;
    outside.cannot_reach("plain", &url)?;
    stage.reaches("client", &url)?;
    stage.cannot_reach("stranger", &url)?;
    policy::enforced(stage, "peerauthentication", "default")?;
    policy::enforced(stage, "authorizationpolicy", "not-strangers")?;
    stage.ok(
        "moved to the second, they enforce what is labelled for it, and what has no label, by their status",
    );
    Ok(())
}

fn moved_back(stage: &Stage, outside: &Stage) -> Result<()> {
    let url = format!("http://server.{}:8080/", stage.namespace);
    served_by(stage, "culvertd")?;
    outside.reaches("plain", &url)?;
    stage.cannot_reach("stranger", &url)?;
    policy::enforced(stage, "authorizationpolicy", "not-strangers")?;
    stage.kubectl().until(
        &["peerauthentication", "-n", &stage.namespace, "default"],
        PATIENCE,
        |policy| {
            let conditions = policy["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let enforced = conditions.iter().find(|c| c["type"] == "Enforced").cloned().unwrap_or_default();
            if enforced["status"] == "True" { Err(enforced.to_string()) } else { Ok(()) }
        },
    )?;
    stage.ok("moved back, what is labelled for the second is not in force, and does not say so");
    Ok(())
}
