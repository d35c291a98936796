//! Capture by eBPF in a cluster: the same that the other back-ends do, and what is its own.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::faults::Victim;
use super::policy::{STRICT, enforced, peer_authentication};
use super::stage::PATIENCE;
use super::{App, Stage};
use crate::lab::{NODES, Node};
use crate::mesh;
use crate::node;
use crate::report::wait_for;

/// Where the programs are kept on a node, a directory for each pod.
const PINS: &str = "/sys/fs/bpf/culvert";

/// Long connections and requests.
const TALK: [&str; 4] = ["-hold", "10@server:9000", "-load", "10@http://server:8080/"];

/// See [`super::ALL`].
pub fn run(stage: &Stage) -> Result<()> {
    let outcome = to_programs(stage).and_then(|()| captured(stage)).and_then(|()| to_rules(stage));
    outcome.or_else(|error| stage.put_back(Err(error)))
}

/// From rules of netfilter to programs, under pods that talk.
fn to_programs(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    stage.start(&[App::client("early", &TALK).on(&near)])?;
    stage.enrolled(true)?;
    let before = stage.talking("early")?;
    stage.nothing_in_plaintext(&far, || mesh::install(&stage.cluster, &["node.capture=ebpf"]))?;
    NODES.iter().try_for_each(|node| kept(stage, node, 1))?;
    ensure!(rules(stage)? == 0, "there are rules of netfilter");
    let then = stage.jobs("early")?;
    stage.pass(Duration::from_secs(2));
    for ((now, then), before) in stage.jobs("early")?.iter().zip(&then).zip(&before) {
        // What netfilter redirected is ended, and once more where it was made again before the rules were gone; and both nodes'
        // ztunnels are replaced, each of which ends what it still carries.
        let lost = now.failed - before.failed;
        ensure!(lost <= 40 && now.failed == then.failed && now.good > then.good, "{now:?} after {before:?}");
    }
    stage.ok("another back-end takes over under load: what it can't take over ends at once, nothing is in plaintext");
    stage.delete_pods(&["early"])?;
    stage.un_enrol()
}

/// And back.
fn to_rules(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.delete_pods(&["stays"])?;
    stage.enrol()?;
    stage.start(&[App::client("returns", &TALK).on(&near)])?;
    let before = stage.talking("returns")?;
    stage.nothing_in_plaintext(&far, || mesh::install(&stage.cluster, &[]))?;
    stage.undisturbed("returns", &before)?;
    NODES.iter().try_for_each(|node| kept(stage, node, 0))?;
    ensure!(rules(stage)? > 0, "there are no rules of netfilter");
    stage.ok(
        "netfilter takes over under load: no connection is lost, nothing is in plaintext, no program is left",
    );
    Ok(())
}

fn captured(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.start(&[App::client("client", &TALK).on(&near), App::idle("idle").on(&near)])?;
    let before = stage.talking("client")?;
    stage.enrol()?;
    stage.pass(Duration::from_secs(2));
    stage.undisturbed("client", &before)?;
    kept(stage, &near, 2)?;
    kept(stage, &far, 1)?;
    ensure!(rules(stage)? == 0, "there are rules of netfilter");
    // What lived at enrolment goes on in plaintext, and is not to be taken for what comes.
    stage.delete_pods(&["client"])?;
    kept(stage, &near, 1)?;
    stage.ok("a label enrols running pods by programs alone, nothing is lost, and nothing is kept of a pod that goes");
    stage.start(&[App::client("late", &["-dial", "10@server:9000"]).on(&near)])?;
    stage.nothing_in_plaintext(&far, || {
        stage.talking("late")?;
        stage.reaches("idle", "http://server:8080/").map(drop)
    })?;
    strict(stage)?;
    told(stage)?;
    device(stage)?;
    restarts(stage)?;
    stage.delete_pods(&["late"])?;
    kept(stage, &near, 1)?;
    stage.ok("of a pod that is gone nothing is kept on the node");
    left(stage)
}

/// The kubelet gets in, and nobody else.
fn strict(stage: &Stage) -> Result<()> {
    let far = NODES[1];
    let outside = stage.beside("outside")?;
    outside.start(&[App::idle("plain").on(&NODES[0])])?;
    let url = format!("http://server.{}:8080/", stage.namespace);
    outside.reaches("plain", &url)?;
    stage.apply(&[peer_authentication(STRICT)])?;
    outside.cannot_reach("plain", &url)?;
    enforced(stage, "peerauthentication", "default")?;
    stage.reaches("idle", &url)?;
    let probed = App::server("probed").on(&far);
    let live = serde_json::json!({"httpGet": {"path": "/live", "port": 8080}, "periodSeconds": 1});
    stage.start(&[probed.container(&serde_json::json!({"livenessProbe": live}))])?;
    stage.pass(Duration::from_secs(4));
    let pod = stage.kubectl().get(&["pod", "-n", &stage.namespace, "probed"])?;
    let status = &pod["status"]["containerStatuses"][0];
    ensure!(status["ready"] == true && status["restartCount"] == 0, "the probed pod: {status}");
    stage.ok("STRICT refuses plaintext, and the kubelet's probes pass");
    // Pods leave the mesh one by one later: those that have must reach the others.
    stage.kubectl().run(&["delete", "peerauthentication", "-n", &stage.namespace, "default"])?;
    outside.reaches("plain", &url).map(drop)
}

/// What is counted, and what commands say.
fn told(stage: &Stage) -> Result<()> {
    let listed = ["ztunnel-config", "capture", "-n", &stage.namespace, "-o", "json"];
    let listed = stage.culvert(&listed)?.code(0)?.json()?;
    let counted = |pod: &str, what: &str| {
        let pods = listed.as_array().into_iter().flatten();
        let pod = pods.into_iter().find(|p| p["name"] == pod).context("a pod is not listed")?;
        pod["captureCounters"][what].as_u64().with_context(|| format!("no {what} of {pod}"))
    };
    ensure!(counted("late", "captured_outbound")? > 0, "nothing of late was captured: {listed}");
    ensure!(counted("server", "captured_inbound")? > 0, "nothing plain came to the server: {listed}");
    for pod in ["late", "idle", "server"] {
        for what in ["escaped_inbound", "escaped_outbound", "unreadable"] {
            ensure!(counted(pod, what)? == 0, "{what} of {pod}: {listed}");
        }
    }
    let doctor = stage.culvert(&["doctor"])?;
    ensure!(doctor.output.contains("in use: ebpf on 2;"), "doctor does not say what is in use: {doctor:?}");
    stage.ok("connections are counted by pod, none escaped, and doctor says what is in use");
    Ok(())
}

/// A device that is added to a pod is guarded without anybody's look.
fn device(stage: &Stage) -> Result<()> {
    let near = NODES[0];
    let address = stage.address("idle")?;
    // By a shell on the node: finds the pod's namespace by its address, and prints its number and the new device's.
    let add = format!(
        "for netns in /run/netns/*; do nsenter --net=$netns ip -o addr | grep -qF ' {address}/' || continue; \
         nsenter --net=$netns ip link add extra type veth peer name other; \
         stat -Lc %i $netns; nsenter --net=$netns ip -o link show extra | cut -d: -f1; done"
    );
    let said = node::run(&stage.cluster.lab, &near, &["sh", "-c", &add])?;
    let numbers: Vec<&str> = said.split_whitespace().collect();
    let [netns, .., index] = numbers.as_slice() else { anyhow::bail!("the pod's namespace: {said:?}") };
    let link = format!("{PINS}/{netns}/link-leaving-{index}");
    // The regular look comes every 30 seconds.
    wait_for(&format!("{link} to be there"), Duration::from_secs(20), || {
        let looked = node::run(&stage.cluster.lab, &near, &["test", "-e", &link]);
        Ok(looked.map_err(|_| "it is not".to_owned()))
    })?;
    stage.ok("a device that is added to a pod is guarded");
    Ok(())
}

/// No process of ours has to run for capture to hold.
fn restarts(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    let before = stage.jobs("late")?;
    ensure!(Victim::Container("culvert-node").kill(stage, &near)?, "there is no agent to kill");
    stage.pass(Duration::from_secs(1));
    stage.undisturbed("late", &before)?;
    mesh::ready(&stage.cluster, PATIENCE)?;
    kept(stage, &near, 2)?;
    stage.ok("the agent is killed, and nothing is lost");
    stage.nothing_in_plaintext(&far, || {
        ensure!(Victim::Container("ztunnel").kill(stage, &near)?, "there is no ztunnel to kill");
        let good = |jobs: &[super::Job]| jobs.iter().map(|job| job.good).sum::<u64>();
        let then = good(&stage.jobs("late")?);
        wait_for("answers after ztunnel was killed", PATIENCE, || {
            let now = good(&stage.jobs("late")?);
            Ok(if now > then + 20 { Ok(()) } else { Err(format!("{} since", now - then)) })
        })
    })?;
    stage.ok("ztunnel is killed: refused until the next one is there, and never in plaintext");
    Ok(())
}

/// Out of the mesh, and nothing of it stays.
fn left(stage: &Stage) -> Result<()> {
    let far = NODES[1];
    stage.start(&[App::client("stays", &["-load", "10@http://server:8080/"]).on(&NODES[0])])?;
    let before = stage.talking("stays")?;
    stage.un_enrol()?;
    let (seen, ()) = stage.watch(&far, || {
        stage.pass(Duration::from_secs(2));
        Ok(())
    })?;
    ensure!(!seen.plaintext.is_empty(), "nothing is in plaintext after the label's removal: {seen:?}");
    stage.undisturbed("stays", &before)?;
    NODES.iter().try_for_each(|node| kept(stage, node, 0))?;
    stage.ok("the label's removal lets go of the pods, no request is lost, and nothing is kept on the nodes");
    Ok(())
}

/// Waits until programs of so many pods are kept on a node.
pub fn kept(stage: &Stage, node: &Node, pods: usize) -> Result<()> {
    // A pod is let go of once nothing of ztunnel's connections is left in it: a minute of TIME_WAIT, too. A pod of another scenario
    // may have ended under an idle tunnel: its peer's silence is noticed by a ping, and then the kernel tries for 100 s to tell it.
    wait_for(&format!("programs of {pods} pods on {}", node.name), PATIENCE * 4, || {
        let listed = format!("ls {PINS} 2>/dev/null | wc -l");
        let found = node::run(&stage.cluster.lab, node, &["sh", "-c", &listed])?;
        Ok(if found.trim() == pods.to_string() { Ok(()) } else { Err(format!("of {}", found.trim())) })
    })
}

/// How many lines of netfilter's rules capture pods of the nodes.
fn rules(stage: &Stage) -> Result<usize> {
    let look =
        "for netns in /run/netns/*; do nsenter --net=$netns nft list ruleset; done | grep -c 15001 || true";
    let mut found = 0;
    for node in &NODES {
        let lines = node::run(&stage.cluster.lab, node, &["sh", "-c", look])?;
        found += lines.trim().parse::<usize>().with_context(|| format!("lines on {}: {lines}", node.name))?;
    }
    Ok(found)
}
