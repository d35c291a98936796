//! What breaks, and what must not break with it.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::stage::PATIENCE;
use super::{App, Job, Stage, policy};
use crate::lab::{NODES, Node};
use crate::mesh::{self, NAMESPACE};
use crate::node;
use crate::report::{Clock, wait_for};

/// See [`super::ALL`].
pub fn control_plane_away(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    let talk = ["-hold", "10@server:9000", "-load", "10@http://server:8080/"];
    let stranger = App::idle("stranger").account("stranger").on(&near);
    stage.start(&[App::client("client", &talk).on(&near), stranger, App::idle("doomed").on(&near)])?;
    stage.apply(&[refuse_stranger(stage, "stranger")])?;
    policy::enforced(stage, "authorizationpolicy", "not-strangers")?;
    stage.enrolled(true)?;
    let before = stage.talking("client")?;
    let replicas = scale(stage, "0")?;
    stage.ok("the control plane is gone");
    let away = stage.nothing_in_plaintext(&far, || Ok(without_control_plane(stage, &before)));
    scale(stage, &replicas)?;
    mesh::ready(&stage.cluster, PATIENCE * 2)?;
    away??;
    for comer in COMERS {
        stage.pod_ready(comer)?;
        stage.talking(comer)?;
    }
    let comers = COMERS.map(|comer| stage.jobs(comer));
    stage.pass(Duration::from_secs(3));
    for (comer, before) in COMERS.iter().zip(comers) {
        stage.undisturbed(comer, &before?)?;
    }
    stage.enrolled(true)?;
    stage.ok("the pods that came meanwhile are in the mesh and talk");
    stage.apply(&[refuse_stranger(stage, "nobody")])?;
    policy::enforced(stage, "authorizationpolicy", "not-strangers")?;
    stage.reaches("stranger", "http://server:8080/")?;
    stage.ok("policies can be changed again, and hold");
    Ok(())
}

/// The pods that come while the control plane is away; the last has an account that is new to its node, and gets no
/// certificate until it is back.
const COMERS: [&str; 3] = ["comer-0", "comer-1", "newcomer"];

fn refuse_stranger(stage: &Stage, account: &str) -> Value {
    let principal = format!("cluster.local/ns/{}/sa/{account}", stage.namespace);
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "not-strangers"},
        "spec": {
            "selector": {"matchLabels": {"app": "server"}}, "action": "DENY",
            "rules": [{"from": [{"source": {"principals": [principal]}}]}],
        },
    })
}

/// Two minutes without a control plane, in which pods come and go, a ztunnel dies, and admission closes.
fn without_control_plane(stage: &Stage, before: &[Job]) -> Result<()> {
    const LONG: Duration = Duration::from_secs(120);
    let (clock, near) = (Clock::start(), &NODES[0]);
    stage.delete_pods(&["doomed"])?;
    let refused =
        stage.apply(&[refuse_stranger(stage, "nobody")]).err().context("no admission, and a change")?;
    let refused = format!("{refused:#}");
    ensure!(refused.contains("validation.culvert.dev"), "refused for another reason: {refused}");
    stage.apply(&[json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other"}})])?;
    stage.ok("admission is closed for the mesh's kinds, and for nothing else");
    for (round, comer) in COMERS.iter().enumerate() {
        let app = App::client(comer, &["-load", "5@http://server:8080/"]).on(near);
        let app = if *comer == "newcomer" { app.account(comer) } else { app };
        stage.accounts(std::slice::from_ref(&app))?;
        stage.apply(&[app.pod()])?;
        stage.cannot_reach("stranger", "http://server:8080/")?;
        if round == 1 {
            stage.undisturbed("client", before)?;
            Victim::Container("ztunnel").kill(stage, near)?;
            stage.ok("ztunnel of their node is killed");
            wait_for("requests to be answered again", PATIENCE, || {
                let good = |jobs: &[Job]| jobs.iter().map(|j| j.good).sum::<u64>();
                let now = good(&stage.jobs("client")?);
                stage.pass(Duration::from_secs(1));
                let later = good(&stage.jobs("client")?);
                Ok(if later > now + 5 { Ok(()) } else { Err(format!("{} answers in a second", later - now)) })
            })?;
            stage.ok("the next one goes on, by the configuration and the certificates that it was left");
        }
        stage.pass(Duration::from_secs(5));
    }
    for comer in ["comer-0", "comer-1"] {
        stage.pod_ready(comer)?;
        stage.talking(comer)?;
    }
    stage.ok("pods that come start, and talk by the certificate that their node has for their account");
    if let Ok(jobs) = stage.jobs("newcomer") {
        ensure!(
            jobs.iter().all(|j| j.good == 0),
            "without a certificate, the newcomer was answered: {jobs:?}"
        );
    }
    let calm = stage.jobs("client")?;
    stage.pass(LONG.saturating_sub(clock.elapsed()));
    stage.undisturbed("client", &calm)?;
    stage.cannot_reach("stranger", "http://server:8080/")?;
    stage.ok("two minutes without a control plane: what was in force is, and nothing else was disturbed");
    Ok(())
}

/// Kills the control plane's pods by their number; returns what it was.
fn scale(stage: &Stage, replicas: &str) -> Result<String> {
    let k = stage.kubectl();
    let words = ["get", "deployment", "culvertd", "-n", NAMESPACE, "-o", "jsonpath={.spec.replicas}"];
    let was = k.run(&words)?;
    k.run(&["scale", "deployment", "culvertd", "-n", NAMESPACE, &format!("--replicas={replicas}")])?;
    if replicas == "0" {
        let words = ["delete", "pod", "-n", NAMESPACE, "-l", "app=culvertd", "--force", "--grace-period=0"];
        k.run(&words)?;
    }
    Ok(was)
}

/// Something that can be killed.
#[derive(Clone, Copy, Debug)]
pub enum Victim {
    /// A daemon of the node.
    Daemon(&'static str),
    /// The first process of a container of the mesh.
    Container(&'static str),
}

const VICTIMS: [Victim; 5] = [
    Victim::Container("culvert-node"),
    Victim::Container("ztunnel"),
    Victim::Daemon("containerd"),
    Victim::Daemon("kubelet"),
    Victim::Container("ztunnel"),
];

impl Victim {
    /// Returns whether there was something to kill: it may still be down from the last time.
    ///
    /// # Errors
    /// The node is off.
    pub fn kill(self, stage: &Stage, node: &Node) -> Result<bool> {
        let lab = &stage.cluster.lab;
        match self {
            Self::Daemon(name) => node::kill_daemon(lab, node, name),
            Self::Container(name) => {
                // By its name among the node's processes: the API server may be of no help just now.
                let pids = node::run(lab, node, &["pgrep", "--exact", name]).unwrap_or_default();
                let kill = |pid| node::run(lab, node, &["kill", "-KILL", pid]);
                Ok(pids.split_whitespace().filter(|pid| kill(pid).is_ok()).count() > 0)
            }
        }
    }
}

/// Numbers that look random, and are the same for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // Marsaglia's xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides.max(1)
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        let sides = u64::try_from(of.len()).ok()?;
        of.get(usize::try_from(self.roll(sides)).ok()?).copied()
    }
}

/// See [`super::ALL`].
pub fn kills(stage: &Stage) -> Result<()> {
    const ROUNDS: u64 = 10;
    let seed = match std::env::var("E2E_SEED") {
        Ok(text) => text.parse()?,
        Err(_) => u64::from(std::process::id()) + 1,
    };
    stage.ok(&format!("E2E_SEED={seed} plays this again"));
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    stage.start(&[App::client("client", &["-dial", "10@server:9000"]).on(&near)])?;
    stage.enrolled(true)?;
    stage.talking("client")?;
    let mut dice = Dice(seed);
    stage.nothing_in_plaintext(&far, || {
        for round in 0..ROUNDS {
            let (Some(victim), Some(node)) = (dice.pick(&VICTIMS), dice.pick(&NODES)) else { break };
            let killed = victim.kill(stage, &node)?;
            let what = if killed { "killed" } else { "still down:" };
            stage.ok(&format!("{what} {victim:?} of {}", node.name));
            if round % 3 == 0 {
                let app = App::client(&format!("comer-{round}"), &["-dial", "5@server:9000"]);
                stage.apply(&[app.on(&near).pod()])?;
            }
            stage.pass(Duration::from_millis(200 + dice.roll(2500)));
        }
        Ok(())
    })?;
    recovered(stage, &["client", "comer-0", "comer-3", "comer-6", "comer-9"])
}

/// That after a fault everything is there again, and works without a further failure.
fn recovered(stage: &Stage, clients: &[&str]) -> Result<()> {
    let clock = Clock::start();
    for node in &NODES {
        stage.cluster.ready(node)?;
    }
    mesh::ready(&stage.cluster, PATIENCE)?;
    clients.iter().try_for_each(|client| stage.pod_ready(client))?;
    stage.enrolled(true)?;
    for client in clients {
        stage.talking(client)?;
    }
    stage.pass(Duration::from_secs(3));
    let before = clients.iter().map(|c| stage.jobs(c)).collect::<Result<Vec<_>>>()?;
    stage.nothing_in_plaintext(&NODES[1], || {
        stage.pass(Duration::from_secs(3));
        Ok(())
    })?;
    for (client, before) in clients.iter().zip(&before) {
        stage.undisturbed(client, before)?;
    }
    // A proxy may not know yet that its control plane's machine was gone; new pods would be strangers to it.
    wait_for("all proxies to be told all there is", Duration::from_secs(20), || {
        let said = stage.culvert(&["proxy-status"])?;
        Ok(if said.code == 0 { Ok(()) } else { Err(said.output) })
    })?;
    stage.ok(&format!("all is as before, {} after the last fault", clock.seconds()));
    Ok(())
}

/// See [`super::ALL`].
pub fn reboot(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&near)])?;
    // A client on the node that reboots: it is there, and talks, before anything of the mesh is.
    stage.start(&[App::client("client", &["-dial", "20@server:9000"]).on(&far)])?;
    stage.enrolled(true)?;
    stage.talking("client")?;
    let before = sandbox(stage, "client")?;
    // The watch is on the node that stays: a link goes with its node.
    stage.nothing_in_plaintext(&near, || {
        node::reboot(&stage.cluster.lab, &far)?;
        stage.ok("power off, and on again");
        stage.cluster.ready(&far)?;
        let clock = Clock::start();
        while sandbox(stage, "client")? == before {
            if clock.elapsed() > PATIENCE * 2 {
                bail!("the client's pod is still that of before the reboot");
            }
            stage.pass(Duration::from_millis(500));
        }
        mesh::ready(&stage.cluster, PATIENCE * 2)?;
        stage.pod_ready("client")?;
        stage.talking("client").map(drop)
    })?;
    recovered(stage, &["client"])
}

/// See [`super::ALL`].
pub fn chain(stage: &Stage) -> Result<()> {
    const DIRECTORY: &str = "/etc/cni/net.d";
    let [near, far] = NODES;
    let lab = &stage.cluster.lab;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    // As an operator of the primary CNI does: writes its own file anew, and takes out what it does not know.
    let rewrite = format!("cd {DIRECTORY} && sed -i s/1500/1450/ 10-bridge.conflist && rm -f *culvert*");
    node::run(lab, &near, &["sh", "-c", &rewrite])?;
    let clock = Clock::start();
    wait_for("the plugin to be in the chain again", PATIENCE, || {
        let ours = format!("cd {DIRECTORY} && grep -l 1450 *culvert*");
        Ok(node::run(lab, &near, &["sh", "-c", &ours]).map_err(|e| e.to_string()))
    })?;
    stage.ok(&format!("the plugin is in the new configuration's chain, {}", clock.seconds()));
    stage.nothing_in_plaintext(&far, || {
        stage.start(&[App::client("client", &["-dial", "10@server:9000"]).on(&near)])?;
        stage.talking("client").map(drop)
    })?;
    stage.enrolled(true)?;
    let mtu = stage.exec("client", &["cat", "/sys/class/net/eth0/mtu"])?;
    ensure!(mtu == "1450", "the pod has the old configuration's MTU: {mtu}");
    stage.ok("a pod that is made then has the new configuration and is in the mesh from its start");
    // One that nobody can read: pods go on to start with the last good one, and who asks hears which file it is.
    let spoil =
        format!("cd {DIRECTORY} && cp 10-bridge.conflist /run/kept && echo '{{' > 10-bridge.conflist");
    node::run(lab, &near, &["sh", "-c", &spoil])?;
    wait_for("culvert status to name the file", PATIENCE, || {
        let said = stage.culvert(&["status"])?;
        let named =
            said.output.contains("10-bridge.conflist: it is not JSON") && said.output.contains("last good");
        Ok(if named && said.code == 1 { Ok(()) } else { Err(format!("{said:?}")) })
    })?;
    stage.ok("a configuration that can't be read is named by `culvert status`");
    let back = format!("sed s/1450/1500/ /run/kept > {DIRECTORY}/10-bridge.conflist");
    node::run(lab, &near, &["sh", "-c", &back])?;
    stage.culvert(&["verify-install", "--timeout", "60s"])?.code(0).map(drop)
}

/// What changes when a pod's containers are started anew.
fn sandbox(stage: &Stage, pod: &str) -> Result<Value> {
    let pod = stage.kubectl().get(&["pod", "-n", &stage.namespace, pod])?;
    let id = pod["status"]["containerStatuses"][0]["containerID"].clone();
    ensure!(id.is_string(), "no container in {}", pod["status"]);
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_plays_the_same_game() {
        let game = |seed| {
            let mut dice = Dice(seed);
            (0..20).map(|_| dice.roll(100)).collect::<Vec<_>>()
        };
        assert_eq!(game(7), game(7));
        assert_ne!(game(7), game(8));
        assert_eq!(Dice(1).pick::<u8>(&[]), None);
    }
}
