//! The CNI plugin, killed while a pod is being added.

use anyhow::{Result, bail, ensure};

use super::stage::PATIENCE;
use super::{App, Stage};
use crate::lab::{NODES, Node};
use crate::node;
use crate::report::wait_for;

const AGENT: &str = "culvert-node";
const PLUGIN: &str = "culvert-cni";

/// The processes of this name on a node.
fn processes(stage: &Stage, node: &Node, name: &str) -> Result<Vec<String>> {
    // Nothing found is a failure for pgrep.
    let found = node::run(&stage.cluster.lab, node, &["sh", "-c", &format!("pgrep --exact {name} || true")])?;
    Ok(found.split_whitespace().map(str::to_owned).collect())
}

fn signal(stage: &Stage, node: &Node, name: &str, signal: &str) -> Result<usize> {
    let found = processes(stage, node, name)?;
    let sent = |pid: &&String| node::run(&stage.cluster.lab, node, &["kill", signal, pid]).is_ok();
    Ok(found.iter().filter(sent).count())
}

/// See [`super::ALL`].
pub fn killed(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    stage.enrolled(true)?;
    let names = ["client-0", "client-1", "client-2"];
    stage.nothing_in_plaintext(&far, || {
        // An agent that hangs: the plugin waits for its answer, inside ADD.
        ensure!(signal(stage, &near, AGENT, "-STOP")? > 0, "there is no {AGENT} on {}", near.name);
        let stuck = stuck(stage, &names);
        signal(stage, &near, AGENT, "-CONT")?;
        stuck?;
        names.iter().try_for_each(|name| stage.pod_ready(name))?;
        stage.ok("the agent goes on, and the pods start");
        names.iter().try_for_each(|name| stage.talking(name).map(drop))
    })?;
    stage.enrolled(true)?;
    wait_for("no plugin to run any more", PATIENCE, || {
        let left = processes(stage, &near, PLUGIN)?;
        Ok(if left.is_empty() { Ok(()) } else { Err(format!("processes {}", left.join(", "))) })
    })
}

/// Has pods made, and kills the plugin twice while it adds them.
fn stuck(stage: &Stage, names: &[&str]) -> Result<()> {
    let near = &NODES[0];
    let app = |name: &&str| App::client(name, &["-dial", "10@server:9000"]).on(near).pod();
    stage.apply(&names.iter().map(app).collect::<Vec<_>>())?;
    let mut killed: Vec<String> = Vec::new();
    for round in ["first", "second"] {
        let found = wait_for("the plugin to wait inside ADD", PATIENCE, || {
            let mut found = processes(stage, near, PLUGIN)?;
            // The dead are listed until the runtime has buried them.
            found.retain(|pid| !killed.contains(pid));
            Ok(if found.is_empty() { Err(format!("no {PLUGIN} runs")) } else { Ok(found) })
        })?;
        let kill = [&["kill", "-KILL"], &found.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat();
        node::run(&stage.cluster.lab, near, &kill)?;
        stage.ok(&format!("killed {} plugins inside ADD, for the {round} time", found.len()));
        killed.extend(found);
    }
    for name in names {
        let started = "jsonpath={.status.containerStatuses[0].state.running.startedAt}";
        let started = stage.kubectl().run(&["get", "pod", "-n", &stage.namespace, name, "-o", started])?;
        if !started.is_empty() {
            bail!("{name} has started although its ADD was killed");
        }
    }
    stage.ok("none of the pods has started");
    Ok(())
}
