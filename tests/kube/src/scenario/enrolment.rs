//! Into the mesh and out of it, while applications talk.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::stage::PATIENCE;
use super::{App, Job, Stage};
use crate::capture::{Flow, Seen};
use crate::lab::{NODES, Node};
use crate::report::wait_for;

const DOWNLOAD: &str = "-download=60000000@http://server:8080/download?rate=3000000";

/// A server and a client on different nodes, with long connections, a download and short requests.
fn talkers(stage: &Stage, server: &Node, client: &Node) -> Result<Vec<Job>> {
    stage.serve(&[App::server("server").on(server)])?;
    let words = ["-hold", "20@server:9000", "-load", "20@http://server:8080/", DOWNLOAD];
    stage.start(&[App::client("client", &words).on(client)])?;
    stage.talking("client")
}

/// What is on the link for a moment.
fn glimpse(stage: &Stage, node: &Node) -> Result<Seen> {
    let (seen, ()) = stage.watch(node, || {
        stage.pass(Duration::from_secs(2));
        Ok(())
    })?;
    Ok(seen)
}

/// That nothing is in plaintext but what was so before: connections go on as they began.
fn only_old_plaintext(old: &Seen, now: &Seen) -> Result<()> {
    let new: Vec<String> =
        now.plaintext.iter().filter(|flow| !old.plaintext.contains(flow)).map(Flow::to_string).collect();
    if !new.is_empty() {
        bail!("{} new connections in plaintext: {}", new.len(), new.join(", "));
    }
    Ok(())
}

/// See [`super::ALL`].
pub fn enrol(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    let before = talkers(stage, &far, &near)?;
    let old = glimpse(stage, &far)?;
    ensure!(!old.plaintext.is_empty(), "the capture does not see the plaintext before the label");
    stage.ok(&format!("{} flows in plaintext between the nodes", old.plaintext.len()));

    stage.enrol()?;
    // What began before the label took effect ends by itself.
    stage.pass(Duration::from_secs(3));
    let now = glimpse(stage, &far)?;
    only_old_plaintext(&old, &now)?;
    ensure!(now.tunnel(&stage.addresses()?) > 0, "no tunnel between the nodes: {now:?}");
    stage.ok("new requests go through tunnels, the old connections go on as they are");
    stage.undisturbed("client", &before)?;
    wait_for("the end of the download", PATIENCE, || {
        let jobs = stage.jobs("client")?;
        let done = jobs.iter().find(|j| j.kind == "download").is_some_and(|j| j.done);
        Ok(if done { Ok(()) } else { Err(format!("{jobs:?}")) })
    })?;
    stage.undisturbed("client", &before)?;

    stage.start(&[App::client("late", &["-hold", "5@server:9000"]).on(&near)])?;
    let late = stage.talking("late")?;
    let now = glimpse(stage, &far)?;
    only_old_plaintext(&old, &now)?;
    stage.undisturbed("late", &late)?;
    stage.ok("a pod that is made in the mesh talks through tunnels from the start");
    Ok(())
}

/// See [`super::ALL`].
pub fn leave(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    let before = talkers(stage, &far, &near)?;
    stage.enrolled(true)?;
    stage.un_enrol()?;
    stage.pass(Duration::from_secs(3));
    // Long connections that are in a tunnel may end with it: the load, of short ones, may not fail.
    let load = |jobs: &[Job]| jobs.iter().filter(|j| j.kind == "load").cloned().collect::<Vec<_>>();
    let now = stage.jobs("client")?;
    for (now, before) in load(&now).iter().zip(load(&before)) {
        ensure!(now.failed == before.failed, "requests failed: {now:?}");
        ensure!(now.good > before.good, "no request got through: {now:?}");
    }
    for job in &now {
        stage.ok(&format!("{} {}: {} good, {} lost", job.kind, job.target, job.good, job.failed));
    }
    let later = glimpse(stage, &far)?;
    ensure!(
        !later.plaintext.is_empty(),
        "requests are not in plaintext after the label's removal: {later:?}; they were {now:?}, and are {:?}",
        stage.jobs("client")?
    );
    stage.ok("new connections leave as they are");
    Ok(())
}

/// What the command line says of a namespace that another mesh's sidecars are for.
fn reported(stage: &Stage, injected: &Stage) -> Result<()> {
    let doctor = stage.culvert(&["doctor", "-o", "json"])?;
    let both = format!("namespace {} asks for sidecars and for this mesh", stage.namespace);
    let pod = format!("{}/sidecar has a sidecar and is left alone", stage.namespace);
    for wanted in [&both, &pod] {
        ensure!(doctor.output.contains(wanted.as_str()), "doctor does not say that {wanted}: {doctor:?}");
    }
    let analyzed = stage.culvert(&["analyze", "-n", &injected.namespace])?;
    let said = format!("{}{}", analyzed.output, analyzed.errors);
    ensure!(said.contains("sidecar-namespace"), "analyze says nothing of the namespace: {analyzed:?}");
    let status = stage.culvert(&["status", "-o", "json"])?.json()?;
    let ours = &status["namespaces"][&stage.namespace];
    ensure!(ours["sidecars"] == 1, "status does not count the pod with a sidecar: {ours}");
    stage.ok("doctor, analyze and status tell of the sidecars");
    Ok(())
}

/// See [`super::ALL`].
pub fn left_alone(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.label("namespace", &stage.namespace, "istio-injection=enabled")?;
    stage.serve(&[App::server("server").on(&far)])?;
    let mut sidecar = App::idle("sidecar").on(&near).pod();
    // What a sidecar injector leaves on its pods.
    sidecar["metadata"]["annotations"] = json!({"sidecar.istio.io/status": "{}"});
    let out = App::idle("out").on(&near).label("istio.io/dataplane-mode", "none").pod();
    let mut host = App::idle("host").on(&near).pod();
    host["spec"]["hostNetwork"] = json!(true);
    host["spec"]["dnsPolicy"] = json!("ClusterFirstWithHostNet");
    stage.apply(&[sidecar, out, host])?;
    stage.start(&[App::idle("plain").on(&near)])?;
    for pod in ["sidecar", "out", "host"] {
        stage.pod_ready(pod)?;
        let redirection = r"jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}";
        let words = ["get", "pod", "-n", &stage.namespace, pod, "-o", redirection];
        let annotation = stage.kubectl().run(&words)?;
        ensure!(annotation.is_empty(), "{pod} is enrolled: {annotation}");
        let answer = stage.reaches(pod, "http://server:8080/")?;
        ensure!(answer.starts_with("200 server"), "{pod} was answered {answer}");
    }
    stage.ok(
        "pods with a sidecar, of the node's network, and that opted out are left alone, and reach the mesh",
    );
    // A namespace for sidecars alone, whose pods have one each or are in no mesh.
    let injected = stage.beside("injected")?;
    stage.label("namespace", &injected.namespace, "istio-injection=enabled")?;
    injected.start(&[App::idle("bare").on(&near)])?;
    injected.reaches("bare", &format!("http://server.{}:8080/", stage.namespace))?;
    reported(stage, &injected)?;
    injected.enrolled(false)
}
