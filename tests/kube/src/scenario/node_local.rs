//! `nodeLocal: kernel` in a cluster: connections within a node that no proxy carries.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::apps::{container, service};
use super::ebpf::kept;
use super::faults::Victim;
use super::policy::{STRICT, enforced, peer_authentication};
use super::stage::{MODE, PATIENCE, REDIRECTION};
use super::{App, Job, Stage};
use crate::lab::NODES;
use crate::mesh::{self, NAMESPACE};
use crate::node;
use crate::report::{Clock, wait_for};

/// The longest that verdicts outlive their ztunnel, and some.
const LEASE: Duration = Duration::from_secs(5);
/// Long connections of a pod.
const HELD: u64 = 10;
/// Short ones that a pod makes in a second.
const SECOND: u64 = 10;

/// See [`super::ALL`].
pub fn run(stage: &Stage) -> Result<()> {
    mesh::install(&stage.cluster, &["node.capture=ebpf", "node.kernelVerdicts=true"])?;
    let outcome = prepared(stage).and_then(|()| {
        // All the while: what crosses the nodes is in tunnels, whatever happens within one.
        stage.nothing_in_plaintext(&NODES[1], || played(stage))
    });
    stage.put_back(outcome)?;
    unasked_for(stage)
}

/// That the nodes keep nothing of it: once its last connections have been over for a minute (TIME_WAIT).
pub fn forgotten(stage: &Stage) -> Result<()> {
    NODES.iter().try_for_each(|node| kept(stage, node, 0))?;
    stage.ok(
        "capture by netfilter again: what passed ztunnel by is carried, and nothing is kept on the nodes",
    );
    Ok(())
}

/// Two servers on a node, a client on it and one on the other.
fn prepared(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    let wish = "culvert.dev/node-local=kernel";
    stage.kubectl().run(&["annotate", "--overwrite", "namespace", &stage.namespace, wish])?;
    stage.label_in()?;
    stage.apply(&[peer_authentication(STRICT)])?;
    stage.apply(&[service("server"), App::server("server").on(&near).deployment(2)])?;
    stage.kubectl().rolled_out(&stage.namespace, "deployment/server", PATIENCE)?;
    let dials = |name: &str| App::client(name, &["-dial", &format!("{SECOND}@server:9000")]).account(name);
    stage.start(&[dials("dials").on(&near), dials("afar").on(&far)])?;
    stage.enrolled(true)?;
    enforced(stage, "peerauthentication", "default")
}

fn played(stage: &Stage) -> Result<()> {
    stage.talking("afar")?;
    stage.talking("dials")?;
    unasked(stage, "dials")?;
    stage.ok("under STRICT, connections of a node pass without ztunnel");
    spread(stage)?;
    told(stage)?;
    holder(stage, "holds")?;
    denied(stage)?;
    left(stage)?;
    replaced(stage)?;
    agent(stage)?;
    rollout(stage)?;
    killed(stage)
}

/// Starts a pod with long connections that pass ztunnel by: the first of a pair is carried, so the pod makes some before.
fn holder(stage: &Stage, name: &str) -> Result<()> {
    let app = App::client(name, &["-hold", &format!("{HELD}@server:9000")]).account(name).on(&NODES[0]);
    let echo = ["app", "echo", "-timeout", "10s", "server:9000"].map(str::to_owned);
    let first = |number: u8| container(&format!("first-{number}"), &echo);
    let mut pod = app.pod();
    pod["spec"]["initContainers"] = json!([first(0), first(1), first(2)]);
    stage.accounts(&[app])?;
    stage.apply(&[pod])?;
    stage.pod_ready(name)?;
    stage.talking(name)?;
    let passing = wait_for(&format!("a long connection of {name} to pass by"), PATIENCE, || {
        let passing = open_past(stage, name)?;
        Ok(if passing > 0 { Ok(passing) } else { Err("none does".to_owned()) })
    })?;
    stage.ok(&format!("{passing} of {HELD} long connections of {name} pass without ztunnel"));
    Ok(())
}

/// What the ztunnels tell of connections of a pod, as its end has them.
fn views(stage: &Stage, source: &str) -> Result<Vec<Value>> {
    let source = format!("{}/{source}", stage.namespace);
    let listed = ["ztunnel-config", "connections", "--source", &source, "-o", "json"];
    let listed = stage.culvert(&listed)?.code(0)?.json()?;
    let all = listed.as_array().context("no list of connections")?.iter();
    Ok(all.filter(|c| c["direction"] == "outbound").cloned().collect())
}

/// The open connections of a pod that no proxy carries.
fn open_past(stage: &Stage, source: &str) -> Result<usize> {
    let is_open = |c: &&Value| c["carrier"] == "kernel" && c["closed_ms"].is_null();
    Ok(views(stage, source)?.iter().filter(is_open).count())
}

/// How many connections of a pod capture gave to ztunnel.
fn captured(stage: &Stage, pod: &str) -> Result<u64> {
    let listed = ["ztunnel-config", "capture", "-n", &stage.namespace, "-o", "json"];
    let listed = stage.culvert(&listed)?.code(0)?.json()?;
    let found = listed.as_array().into_iter().flatten().find(|p| p["name"] == pod);
    let found = found.with_context(|| format!("{pod} is not listed: {listed}"))?;
    found["captureCounters"]["captured_outbound"].as_u64().with_context(|| format!("no count of {found}"))
}

fn good(jobs: &[Job]) -> u64 {
    jobs.iter().map(|job| job.good).sum()
}

fn lost(jobs: &[Job]) -> u64 {
    jobs.iter().map(|job| job.failed).sum()
}

/// Waits until a pod that connects all the time does so without ztunnel.
fn unasked(stage: &Stage, pod: &str) -> Result<()> {
    let counts = || anyhow::Ok((captured(stage, pod)?, good(&stage.jobs(pod)?)));
    wait_for(&format!("{pod} to pass ztunnel by"), PATIENCE, || {
        let second = counts().and_then(|before| {
            stage.pass(Duration::from_secs(1));
            Ok((before, counts()?))
        });
        Ok(match second {
            // While ztunnels come and go, one of them may not answer.
            Err(error) => Err(format!("{error:#}")),
            Ok((before, after)) if before.0 == after.0 && after.1 > before.1 => Ok(()),
            Ok((before, after)) => Err(format!(
                "of {} connections {} came to ztunnel",
                after.1.abs_diff(before.1),
                after.0.abs_diff(before.0)
            )),
        })
    })
}

/// Waits until a pod gets answers again.
fn answered(stage: &Stage, pod: &str) -> Result<()> {
    let before = good(&stage.jobs(pod)?);
    wait_for(&format!("answers to {pod}"), PATIENCE, || {
        let more = good(&stage.jobs(pod)?) - before;
        Ok(if more > 5 { Ok(()) } else { Err(format!("{more} since")) })
    })
}

/// That a pod gets no answers.
fn unanswered(stage: &Stage, pod: &str) -> Result<()> {
    let before = good(&stage.jobs(pod)?);
    stage.pass(Duration::from_secs(2));
    let after = stage.jobs(pod)?;
    ensure!(good(&after) == before, "{pod} is answered: {after:?}");
    Ok(())
}

/// Both of a service's endpoints are connected to.
fn spread(stage: &Stage) -> Result<()> {
    let pods = stage.kubectl().get(&["pods", "-n", &stage.namespace])?;
    let all = pods["items"].as_array().into_iter().flatten();
    let servers = all.filter(|pod| {
        pod["metadata"]["labels"]["app"] == "server" && pod["metadata"]["deletionTimestamp"].is_null()
    });
    let addresses = servers.filter_map(|pod| pod["status"]["podIP"].as_str());
    let servers: BTreeSet<String> = addresses.map(|ip| format!("{ip}:9000")).collect();
    ensure!(servers.len() == 2, "there are the servers {servers:?}");
    wait_for("connections past ztunnel to both servers", PATIENCE, || {
        let past = views(stage, "dials")?.into_iter().filter(|c| c["carrier"] == "kernel");
        let reached: BTreeSet<String> =
            past.filter_map(|c| c["upstream"].as_str().map(str::to_owned)).collect();
        Ok(if reached.is_superset(&servers) { Ok(()) } else { Err(format!("to {reached:?}")) })
    })?;
    stage.ok(&format!("one service's address leads to both of its pods of the node: {servers:?}"));
    Ok(())
}

/// The node's ztunnel, by its address and by its name.
fn ztunnel(stage: &Stage) -> Result<(String, String)> {
    let node = format!("spec.nodeName={}", NODES[0].name);
    let words =
        ["get", "pods", "-n", NAMESPACE, "-l", "app=ztunnel", "--field-selector", &node, "-o", "json"];
    let pods: Value = serde_json::from_str(&stage.kubectl().run(&words)?)?;
    // The one before may still drain.
    let mut all = pods["items"].as_array().into_iter().flatten();
    let pod = all.find(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    let pod = pod.with_context(|| format!("no ztunnel: {pods}"))?;
    let text =
        |value: &Value| value.as_str().map(str::to_owned).with_context(|| format!("no ztunnel: {pods}"));
    Ok((text(&pod["status"]["podIP"])?, text(&pod["metadata"]["name"])?))
}

/// Metrics and log have these connections, with a security of their own.
fn told(stage: &Stage) -> Result<()> {
    let (address, name) = ztunnel(stage)?;
    let url = format!("http://{address}:15020/metrics");
    let metrics = node::run(&stage.cluster.lab, &NODES[0], &["curl", "--silent", "--max-time", "5", &url])?;
    let security = |source: &str| -> BTreeSet<&str> {
        let of = format!("source_workload=\"{source}\"");
        let opened = metrics.lines().filter(|line| line.starts_with("istio_tcp_connections_opened_total{"));
        let values = opened.filter(|line| line.contains(&of)).filter_map(|line| {
            line.split_once("connection_security_policy=\"")?.1.split_once('"').map(|(value, _)| value)
        });
        values.collect()
    };
    let (near, far) = (security("dials"), security("afar"));
    ensure!(near.contains("node_local"), "the metrics of who connects within the node have {near:?}");
    ensure!(far == BTreeSet::from(["mutual_tls"]), "those of who connects from another node have {far:?}");
    let log = stage.kubectl().run(&["logs", "-n", NAMESPACE, &name, "--tail=1000"])?;
    let said = |line: &&str| {
        line.contains("\"dials\"") && line.contains("passed within the node by the kernel's verdict")
    };
    let line = log.lines().find(said).with_context(|| format!("the log has no such connection: {log}"))?;
    let identity = format!("spiffe://cluster.local/ns/{}/sa/dials", stage.namespace);
    ensure!(line.contains(&identity), "the log leaves the identity out: {line}");
    stage.ok(
        "metrics and log have both: node_local within the node, mutual_tls across nodes, with identities",
    );
    Ok(())
}

/// A policy ends what passes.
fn denied(stage: &Stage) -> Result<()> {
    let holds = format!("cluster.local/ns/{}/sa/holds", stage.namespace);
    let (calm, before) = (lost(&stage.jobs("dials")?), lost(&stage.jobs("holds")?));
    let clock = Clock::start();
    stage.apply(&[json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "deny"},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}},
            "action": "DENY",
            "rules": [{"from": [{"source": {"principals": [holds]}}]}],
        },
    })])?;
    over(stage, "holds", before)?;
    stage.ok(&format!(
        "a DENY has ended all connections of who it names, {} after it was written",
        clock.seconds()
    ));
    enforced(stage, "authorizationpolicy", "deny")?;
    ensure!(open_past(stage, "holds")? == 0, "connections pass that an enforced policy denies");
    unanswered(stage, "holds")?;
    let after = stage.jobs("dials")?;
    ensure!(lost(&after) == calm, "who is not denied lost something: {after:?}");
    stage.kubectl().run(&["delete", "authorizationpolicy", "-n", &stage.namespace, "deny"])?;
    answered(stage, "holds")?;
    stage.delete_pods(&["holds"])?;
    stage.ok("what is denied is not answered, others have not noticed, and without the policy it is again");
    Ok(())
}

/// Waits until all long connections of a pod were ended, since it had lost so many: reset, not left alone, which they give up after
/// ten seconds.
fn over(stage: &Stage, pod: &str, before: u64) -> Result<()> {
    let after = wait_for(&format!("the end of {pod}'s connections"), PATIENCE, || {
        let jobs = stage.jobs(pod)?;
        let ended = lost(&jobs) - before;
        Ok(if ended >= HELD { Ok(jobs) } else { Err(format!("{ended} of {HELD} ended")) })
    })?;
    ensure!(after.iter().all(|job| !job.last_error.contains("timeout")), "left alone: {after:?}");
    Ok(())
}

/// A pod that leaves the mesh loses what passes, and comes back.
fn left(stage: &Stage) -> Result<()> {
    let pod = "leaves";
    holder(stage, pod)?;
    let before = lost(&stage.jobs(pod)?);
    let is_in = |wanted: bool| {
        stage.kubectl().until(&["pod", "-n", &stage.namespace, pod], PATIENCE * 2, |pod| {
            let says = &pod["metadata"]["annotations"][REDIRECTION];
            if (says == "enabled") == wanted { Ok(()) } else { Err(format!("{REDIRECTION} is {says}")) }
        })
    };
    stage.reaches(pod, "http://server:8080/")?;
    stage.label("pod", pod, &format!("{MODE}=none"))?;
    over(stage, pod, before)?;
    ensure!(open_past(stage, pod)? == 0, "connections pass of a pod that left the mesh");
    // One that ztunnel carries goes on until it ends; new ones have no identity.
    stage.cannot_reach(pod, "http://server:8080/")?;
    is_in(false)?;
    stage.label("pod", pod, &format!("{MODE}-"))?;
    is_in(true)?;
    answered(stage, pod)?;
    stage.delete_pods(&[pod])?;
    stage.ok("a pod that leaves the mesh loses what passed, STRICT refuses it, and it can come back");
    Ok(())
}

/// The servers are replaced: the new ones are connected to in the same way.
fn replaced(stage: &Stage) -> Result<()> {
    let before = lost(&stage.jobs("dials")?);
    stage.kubectl().run(&["rollout", "restart", "-n", &stage.namespace, "deployment/server"])?;
    stage.kubectl().rolled_out(&stage.namespace, "deployment/server", PATIENCE)?;
    unasked(stage, "dials")?;
    let failed = lost(&stage.jobs("dials")?) - before;
    spread(stage)?;
    // Who connects between the end of an endpoint and its removal loses that, as without a mesh.
    ensure!(failed <= SECOND, "{failed} connections were lost as the servers were replaced");
    stage.ok(&format!(
        "the servers are replaced, {failed} connections lost, and the new ones pass ztunnel by"
    ));
    Ok(())
}

/// Without an agent, and with the next one, what passes goes on.
fn agent(stage: &Stage) -> Result<()> {
    let before = stage.jobs("dials")?;
    ensure!(Victim::Container("culvert-node").kill(stage, &NODES[0])?, "there is no agent to kill");
    stage.pass(Duration::from_secs(2));
    mesh::ready(&stage.cluster, PATIENCE)?;
    unasked(stage, "dials")?;
    stage.undisturbed("dials", &before)?;
    stage.ok("the agent is killed, and nothing is lost of what passes");
    Ok(())
}

/// Another ztunnel takes over when the one before has ended.
fn rollout(stage: &Stage) -> Result<()> {
    let before = lost(&stage.jobs("dials")?);
    stage.kubectl().run(&["rollout", "restart", "-n", NAMESPACE, "daemonset/ztunnel"])?;
    stage.kubectl().rolled_out(NAMESPACE, "daemonset/ztunnel", PATIENCE * 3)?;
    unasked(stage, "dials")?;
    let after = stage.jobs("dials")?;
    let failed = lost(&after) - before;
    // Those that were being made as the old one ended.
    ensure!(failed <= SECOND, "{failed} connections were lost: {after:?}");
    stage.ok(&format!("ztunnel is replaced, {failed} connections lost, and the next one lets them pass"));
    Ok(())
}

/// Nothing passes for longer than the lease without a ztunnel.
fn killed(stage: &Stage) -> Result<()> {
    let near = &NODES[0];
    holder(stage, "stalls")?;
    let kill = || Victim::Container("ztunnel").kill(stage, near);
    let clock = Clock::start();
    // Again and again, so that none gets to serve.
    while clock.elapsed() < LEASE {
        kill()?;
        stage.pass(Duration::from_millis(200));
    }
    let echo = ["app", "echo", "-timeout", "1s", "server:9000"];
    wait_for("a second without a ztunnel", PATIENCE, || {
        let before = good(&stage.jobs("stalls")?);
        let answer = stage.exec("dials", &echo);
        let after = good(&stage.jobs("stalls")?);
        // One that came meanwhile may have carried them.
        if kill()? {
            return Ok(Err("another one came".to_owned()));
        }
        ensure!(answer.is_err(), "a connection passes without a ztunnel: {answer:?}");
        ensure!(after == before, "{} messages pass without a ztunnel", after - before);
        Ok(Ok(()))
    })?;
    stage.ok("ztunnel is killed under load, and after its lease nothing passes, neither old nor new");
    mesh::ready(&stage.cluster, PATIENCE * 3)?;
    unasked(stage, "dials")?;
    answered(stage, "stalls")?;
    answered(stage, "afar")?;
    stage.ok("the next one begins anew");
    Ok(())
}

/// After verdicts are no longer wanted on the nodes, ztunnel carries all.
fn unasked_for(stage: &Stage) -> Result<()> {
    answered(stage, "dials")?;
    let views = wait_for("a connection that ztunnel carries", PATIENCE, || {
        let views = views(stage, "dials")?;
        let carried = views.iter().any(|c| c["carrier"] == "node-local");
        Ok(if carried { Ok(views) } else { Err(format!("{} connections", views.len())) })
    })?;
    let past = views.iter().filter(|c| c["carrier"] == "kernel" && c["closed_ms"].is_null()).count();
    ensure!(past == 0, "{past} connections pass ztunnel by, which nobody wants any more");
    Ok(())
}
