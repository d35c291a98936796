//! The kinds of workloads and services that there are.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::stage::PATIENCE;
use super::{App, Stage};
use crate::capture;
use crate::lab::NODES;

/// See [`super::ALL`].
pub fn jobs(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    stage.enrolled(true)?;
    let address = stage.address("server")?;
    // To the address: a wait for DNS would give the mesh time.
    let talk = ["app", "echo", "-timeout", "5s", &format!("{address}:9000")];
    let app = App::program("hasty", &talk).on(&near);
    let mut template = app.template();
    template["spec"]["restartPolicy"] = json!("Never");
    template["spec"]["initContainers"] = json!([super::apps::container("init", &talk.map(str::to_owned))]);
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hasty"},
        "spec": {"completions": 12, "parallelism": 4, "backoffLimit": 0, "template": template},
    });
    stage.nothing_in_plaintext(&far, || {
        stage.apply(&[job])?;
        stage.kubectl().until(&["job", "-n", &stage.namespace, "hasty"], PATIENCE * 2, |job| {
            let status = &job["status"];
            if status["succeeded"] == 12 { Ok(()) } else { Err(status.to_string()) }
        })
    })?;
    stage.ok("12 Jobs talked as their first act, in an init container and in the main one, and none failed");
    Ok(())
}

/// See [`super::ALL`].
pub fn sets(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    let mut headless = super::apps::service("member");
    headless["spec"]["clusterIP"] = json!("None");
    let set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "member"},
        "spec": {
            "serviceName": "member", "replicas": 2, "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": "member"}},
            "template": App::server("member").on(&far).template(),
        },
    });
    stage.apply(&[headless, set])?;
    stage.kubectl().rolled_out(&stage.namespace, "statefulset/member", PATIENCE)?;
    stage.start(&[App::idle("client").on(&near)])?;
    stage.enrolled(true)?;
    stage.nothing_in_plaintext(&far, || {
        for member in ["member-0", "member-1"] {
            let answer = stage.reaches("client", &format!("http://{member}.member:8080/"))?;
            ensure!(answer.starts_with(&format!("200 {member} ")), "{member} answered {answer}");
        }
        stage.ok("each member is reached by its own name");
        let greeting = stage.exec("client", &["app", "hello", "member:9001"])?;
        ensure!(greeting.contains("member-"), "the server that speaks first said {greeting:?}");
        stage.ok("a server that speaks first is heard");
        Ok(())
    })?;
    stage.exec("client", &["app", "echo", "-udp", &format!("{}:9002", stage.address("member-0")?)])?;
    stage.ok("UDP passes");

    stage.apply(&[service_entry(&stage.address("member-1")?)])?;
    let answer = stage.reaches("client", "http://elsewhere.example.com:8080/")?;
    ensure!(answer.starts_with("200 member-1 "), "the ServiceEntry's host was answered by {answer}");
    stage.ok("a ServiceEntry's host has a name and is reached");
    Ok(())
}

fn service_entry(address: &str) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "elsewhere"},
        "spec": {
            "hosts": ["elsewhere.example.com"],
            "ports": [{"number": 8080, "name": "http", "protocol": "HTTP"}],
            "location": "MESH_EXTERNAL", "resolution": "STATIC",
            "endpoints": [{"address": address}],
        },
    })
}

/// See [`super::ALL`].
pub fn real(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    let listening = |port: u16| json!({"readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1}});
    let nginx = App::program("nginx", &["nginx"]).on(&far).container(&listening(8080));
    let redis = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
    let redis = App::program("redis", &redis).on(&far).container(&listening(6379));
    let mut service = super::apps::service("redis");
    service["spec"]["ports"] = json!([{"name": "tcp-redis", "port": 6379}]);
    stage.label_in()?;
    stage.apply(&[super::apps::service("nginx"), service])?;
    stage.start(&[nginx, redis, App::idle("client").on(&near)])?;
    stage.enrolled(true)?;
    let client = stage.address("client")?;
    stage.nothing_in_plaintext(&far, || {
        let value = capture::marker(&stage.namespace);
        let header = format!("X-Marker: {value}");
        let curl = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "5",
            "--header",
            &header,
            "http://nginx:8080/",
        ];
        let answer = stage.exec("client", &curl)?;
        ensure!(answer == format!("nginx on nginx for {client}"), "nginx says {answer:?}, to {client}");
        stage.ok("curl gets nginx's page, and nginx sees the client's own address");
        let cli = |words: &[&str]| stage.exec("client", &[&["redis-cli", "-h", "redis"], words].concat());
        ensure!(cli(&["set", "key", &value])? == "OK", "Redis does not set");
        ensure!(cli(&["get", "key"])? == value, "Redis does not get");
        stage.pass(Duration::from_millis(200));
        stage.ok("Redis keeps what it is given");
        Ok(())
    })
}
