//! The cluster without a mesh: a scenario that fails later fails for the mesh's sake.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::stage::PATIENCE;
use super::{App, Stage};
use crate::lab::NODES;
use crate::network_policy;
use crate::report::wait_for;

/// See [`super::ALL`].
pub fn run(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    let live = json!({"livenessProbe": {
        "httpGet": {"path": "/live", "port": 8080}, "periodSeconds": 1, "failureThreshold": 2,
    }});
    let server = |name: &str, node| App::server(name).on(node).label("group", "servers").container(&live);
    stage.serve(&[server("one", &near), server("two", &far)])?;
    let mut both = super::apps::service("servers");
    both["spec"]["selector"] = json!({"group": "servers"});
    stage.apply(&[both])?;
    // kube-proxy refuses connections to a service until it has read of its pods.
    stage.start(&[App::idle("other").on(&near)])?;
    stage.reaches("other", "http://two:8080/")?;
    stage.start(&[App::client("client", &["-hold", "2@two:9000"]).on(&near)])?;
    stage.ok("pods run on both nodes, probed by the kubelet");

    for pod in ["one", "two"] {
        let answer =
            stage.exec("client", &["app", "get", &format!("http://{}:8080/", stage.address(pod)?)])?;
        ensure!(answer.starts_with(&format!("200 {pod} ")), "{pod} answered {answer}");
    }
    stage.ok("pods reach each other by address, on the same node and across");
    answered_by(stage, &["one", "two"])?;
    stage.ok("a service's name leads to both of its pods");

    let logs = stage.kubectl().run(&["logs", "-n", &stage.namespace, "client"])?;
    ensure!(logs.is_empty(), "the client lost something: {logs}");
    stage.exec("one", &["app", "get", "http://127.0.0.1:8080/set?ready=0"])?;
    answered_by(stage, &["two"])?;
    stage.exec("one", &["app", "get", "http://127.0.0.1:8080/set?ready=1"])?;
    answered_by(stage, &["one", "two"])?;
    stage.ok("a pod that is not ready gets no requests");
    stage.exec("one", &["app", "get", "http://127.0.0.1:8080/set?live=0"])?;
    stage.kubectl().until(&["pod", "-n", &stage.namespace, "one"], PATIENCE, |pod| {
        let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
        if *restarts == 1 { Ok(()) } else { Err(format!("{restarts} restarts")) }
    })?;
    stage.ok("a pod that is not alive is started again");

    let before = stage.talking("client")?;
    let (seen, ()) = stage.watch(&far, || {
        stage.pass(Duration::from_secs(1));
        Ok(())
    })?;
    ensure!(!seen.plaintext.is_empty(), "plaintext passed, and the capture has not seen it: {seen:?}");
    ensure!(seen.tunnels.is_empty(), "there is no mesh, and the capture saw tunnels: {seen:?}");
    stage.undisturbed("client", &before)?;
    stage.ok("a capture between the nodes shows plaintext where there is some");
    let _alone = network_policy::alone();
    let outcome = network_policies(stage);
    network_policy::clear(&stage.cluster)?;
    outcome
}

fn network_policies(stage: &Stage) -> Result<()> {
    stage.apply(&[json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "two"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "two"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": 8080}]}],
        },
    })])?;
    network_policy::enforce(&stage.cluster)?;
    stage.reaches("client", "http://two:8080/")?;
    stage.cannot_reach("other", "http://two:8080/")?;
    let echo = stage.exec("client", &["app", "echo", "-timeout", "1s", "two:9000"]);
    ensure!(echo.is_err(), "a port that no policy names is open");
    stage.ok("NetworkPolicies are enforced");
    Ok(())
}

/// Waits until a service's requests are answered by these pods, by all of them and no others.
fn answered_by(stage: &Stage, pods: &[&str]) -> Result<()> {
    wait_for(&format!("answers of {}", pods.join(" and ")), Duration::from_secs(20), || {
        let answers = match stage.exec("client", &["app", "get", "-n", "20", "http://servers:8080/"]) {
            Ok(answers) => answers,
            Err(error) => return Ok(Err(format!("{error:#}"))),
        };
        let mut from: Vec<&str> = answers.lines().filter_map(|line| line.split(' ').nth(1)).collect();
        from.sort_unstable();
        from.dedup();
        Ok(if from == pods { Ok(()) } else { Err(format!("answers of {from:?}")) })
    })
}
