//! Who may talk to whom.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::stage::PATIENCE;
use super::{App, Stage};
use crate::lab::NODES;
use crate::{network_policy, node};

/// Plaintext is refused.
pub const STRICT: &str = "STRICT";

/// For the whole namespace.
pub fn peer_authentication(mode: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "default"},
        "spec": {"mtls": {"mode": mode}},
    })
}

/// Waits for the conditions of a policy: that no proxy is behind.
pub fn enforced(stage: &Stage, kind: &str, name: &str) -> Result<()> {
    stage.kubectl().until(&[kind, "-n", &stage.namespace, name], PATIENCE, |policy| {
        let conditions = policy["status"]["conditions"].as_array().cloned().unwrap_or_default();
        match conditions.iter().find(|c| c["type"] == "Enforced") {
            Some(condition) if condition["status"] == "True" => Ok(()),
            Some(condition) => Err(condition.to_string()),
            None => Err(format!("no condition Enforced among {conditions:?}")),
        }
    })?;
    stage.ok(&format!("{kind} {name} is enforced, by its status"));
    Ok(())
}

/// See [`super::ALL`].
pub fn strict(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    let client = |name: &str| App::idle(name).account(name).on(&near);
    stage.serve(&[App::server("server").on(&far)])?;
    stage.start(&[client("friend"), client("stranger")])?;
    let outside = stage.beside("outside")?;
    outside.start(&[App::idle("plain").on(&near)])?;
    let url = format!("http://server.{}:8080/", stage.namespace);
    outside.reaches("plain", &url)?;
    stage.ok("without a policy, plaintext from outside the mesh gets in");

    stage.apply(&[peer_authentication(STRICT)])?;
    outside.cannot_reach("plain", &url)?;
    stage.reaches("friend", &url)?;
    stage.reaches("stranger", &url)?;
    stage.ok("STRICT refuses plaintext and lets the mesh in");
    enforced(stage, "peerauthentication", "default")?;

    let friend = format!("cluster.local/ns/{}/sa/friend", stage.namespace);
    stage.apply(&[json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "friends"},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}},
            "action": "ALLOW",
            "rules": [{"from": [{"source": {"principals": [friend]}}], "to": [{"operation": {"ports": ["8080"]}}]}],
        },
    })])?;
    stage.cannot_reach("stranger", &url)?;
    stage.reaches("friend", &url)?;
    let echo = ["app", "echo", "-timeout", "2s", "server:9000"];
    ensure!(stage.exec("friend", &echo).is_err(), "the policy names port 8080 only, and port 9000 answers");
    stage.ok("the policy lets one identity in, at one port");
    enforced(stage, "authorizationpolicy", "friends")?;

    stage.kubectl().run(&["delete", "authorizationpolicy", "-n", &stage.namespace, "friends"])?;
    stage.reaches("stranger", &url)?;
    stage.ok("without the policy the other identity gets in again");
    Ok(())
}

/// See [`super::ALL`].
pub fn probes(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.apply(&[peer_authentication(STRICT)])?;
    let quick = |check: Value| {
        let mut probe = check;
        probe["periodSeconds"] = json!(1);
        probe["failureThreshold"] = json!(2);
        probe
    };
    let http = quick(json!({"httpGet": {"path": "/live", "port": 8080}}));
    let tcp = quick(json!({"tcpSocket": {"port": 9000}}));
    let run = quick(json!({"exec": {"command": ["app", "echo", "127.0.0.1:9000"]}}));
    let server = |name: &str, startup: &Value, liveness: &Value| {
        App::server(name).on(&far).container(&json!({"startupProbe": startup, "livenessProbe": liveness}))
    };
    let names = ["http", "tcp", "exec"];
    stage.start(&[server("http", &tcp, &http), server("tcp", &http, &tcp), server("exec", &run, &run)])?;
    stage.enrolled(true)?;
    stage.pass(Duration::from_secs(6));
    for name in names {
        let restarts = "jsonpath={.status.containerStatuses[0].restartCount}";
        let restarts = stage.kubectl().run(&["get", "pod", "-n", &stage.namespace, name, "-o", restarts])?;
        ensure!(restarts == "0", "{name} was restarted {restarts} times");
    }
    stage.ok("HTTP, TCP and command probes pass under STRICT");

    let url = format!("http://{}:8080/", stage.address("http")?);
    let curl = ["curl", "--silent", "--max-time", "3", "--output", "/dev/null", &url];
    // On its own node, another user: without cgroup v2 the kubelet is known by its user only.
    let nobody = [&["setpriv", "--reuid=65534", "--clear-groups"], &curl[..]].concat();
    for (whose, node, words) in [("its node", &far, &nobody[..]), ("the other node", &near, &curl)] {
        if node::run(&stage.cluster.lab, node, words).is_ok() {
            bail!("a process of {whose} that is no kubelet reached a STRICT pod in plaintext");
        }
    }
    stage.ok("other processes of the nodes do not get in");

    stage.exec("http", &["app", "get", "http://127.0.0.1:8080/set?live=0"])?;
    stage.kubectl().until(&["pod", "-n", &stage.namespace, "http"], PATIENCE, |pod| {
        let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
        if *restarts == 1 { Ok(()) } else { Err(format!("{restarts} restarts")) }
    })?;
    stage.ok("a pod that is not alive is started again");
    Ok(())
}

/// See [`super::ALL`].
pub fn network(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    let friend = |name: &str| App::idle(name).label("role", "friend").on(&near);
    stage.start(&[friend("client"), friend("late"), App::idle("other").on(&near)])?;
    stage.enrolled(true)?;
    let url = "http://server:8080/";
    stage.reaches("client", url)?;
    let allow = |ports: &[u16]| {
        let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port})).collect();
        stage.apply(&[json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "server"},
            "spec": {
                "podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"role": "friend"}}}], "ports": ports}],
            },
        })])?;
        network_policy::enforce(&stage.cluster)
    };
    let _alone = network_policy::alone();
    let outcome = allow(&[8080, 15008]).and_then(|()| {
        stage.nothing_in_plaintext(&far, || stage.reaches("client", url))?;
        stage.cannot_reach("other", url)?;
        stage.ok("a policy that names the tunnel's port lets in who it names, and nobody else");
        allow(&[8080])?;
        // Of a pod that has no tunnel yet: what is open stays open.
        let (seen, ()) = stage.watch(&far, || stage.cannot_reach("late", url))?;
        ensure!(seen.plaintext.is_empty(), "in plaintext, past the tunnel: {:?}", seen.plaintext);
        stage.ok("one that does not closes the way, and nothing takes the open port in plaintext");
        let restarts = "jsonpath={.status.containerStatuses[0].ready}";
        let ready = stage.kubectl().run(&["get", "pod", "-n", &stage.namespace, "server", "-o", restarts])?;
        ensure!(ready == "true", "the server is no longer ready");
        stage.ok("the kubelet's probes pass all the while");
        Ok(())
    });
    network_policy::clear(&stage.cluster)?;
    outcome
}
