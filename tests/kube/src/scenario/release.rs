//! The mesh comes and goes: by the command line, by Helm, and while pods are in it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::stage::{MODE, PATIENCE, REDIRECTION};
use super::{App, Stage};
use crate::lab::{NODES, Node};
use crate::mesh::{self, NAMESPACE};
use crate::node;
use crate::report::wait_for;

/// What the mesh puts on a node, by a shell script that prints what is there of it.
const LEFT_ON_NODE: &str = r#"
ls -d /etc/cni/net.d/*culvert* /opt/cni/bin/*culvert* 2>/dev/null
find /var/lib/culvert /run/culvert* /var/run/ztunnel -type f -o -type s 2>/dev/null
nft list tables | grep -i culvert
for namespace in /run/netns/*; do
    nsenter --net="$namespace" nft list ruleset | grep -iE '15001|15006|15008|culvert|istio' | sed "s,^,$namespace: ,"
    nsenter --net="$namespace" ip rule | grep fwmark | sed "s,^,$namespace: ,"
    nsenter --net="$namespace" ss -Htln | grep -E ':(15001|15006|15008)\b' | sed "s,^,$namespace: ,"
done
pgrep --list-name --exact 'culvert-node|culvert-cni|ztunnel|culvertd'
true
"#;

/// What the mesh has in the API server, by kind, but for what stays by intent.
const KINDS: &str = "clusterroles,clusterrolebindings,validatingwebhookconfigurations,mutatingwebhookconfigurations,\
                     validatingadmissionpolicies,validatingadmissionpolicybindings,priorityclasses";
const NAMESPACED: &str =
    "all,serviceaccounts,roles,rolebindings,poddisruptionbudgets,networkpolicies,daemonsets";

/// Waits until a node has nothing of the mesh.
fn clean(stage: &Stage, node: &Node) -> Result<()> {
    wait_for(&format!("{} to have nothing of the mesh", node.name), PATIENCE, || {
        let left = node::run(&stage.cluster.lab, node, &["sh", "-c", LEFT_ON_NODE])?;
        Ok(if left.trim().is_empty() { Ok(()) } else { Err(format!("there is\n{left}")) })
    })
}

/// That nothing of the mesh is left, but the kinds of istio.io, the Secret of the root and its copies.
fn nothing_left(stage: &Stage) -> Result<()> {
    NODES.iter().try_for_each(|node| clean(stage, node))?;
    stage.ok("the nodes have no rule, no listener, no file and no process of it");
    let k = stage.kubectl();
    wait_for("the API server to have nothing of the mesh", PATIENCE, || {
        let mut left = k.run(&["get", KINDS, "-o", "name"])?;
        left.push_str(&k.run(&["get", NAMESPACED, "-n", NAMESPACE, "-o", "name"])?);
        let left: Vec<&str> =
            left.lines().filter(|l| l.contains("culvert") || l.contains("ztunnel")).collect();
        Ok(if left.is_empty() { Ok(()) } else { Err(left.join(", ")) })
    })?;
    let taints = "jsonpath={.items[*].spec.taints[*].key}";
    let taints = k.run(&["get", "nodes", "-o", taints])?;
    ensure!(!taints.contains("culvert"), "taints are left on nodes: {taints}");
    stage.ok("the API server has no role, webhook, admission policy or workload of it");
    Ok(())
}

/// How the chart is set here, as arguments of `culvert install`.
fn settings() -> Vec<String> {
    mesh::SETTINGS.iter().flat_map(|setting| ["--set".to_owned(), (*setting).to_owned()]).collect()
}

/// See [`super::ALL`].
pub fn comes_and_goes(stage: &Stage) -> Result<()> {
    let [near, far] = NODES;
    stage.label_in()?;
    stage.serve(&[App::server("server").on(&far)])?;
    let talk = ["-hold", "5@server:9000", "-load", "10@http://server:8080/"];
    stage.start(&[App::client("client", &talk).on(&near), App::idle("idle").on(&near)])?;
    stage.enrolled(true)?;
    stage.apply(&[super::policy::peer_authentication("PERMISSIVE")])?;
    let before = stage.talking("client")?;
    let refused = stage.culvert(&["uninstall"])?.code(2)?;
    ensure!(refused.errors.contains("--remove-labels"), "{refused:?}");
    let undone = stage.culvert(&["install"])?.code(2)?;
    ensure!(undone.errors.contains("culvert upgrade"), "{undone:?}");
    stage.pass(Duration::from_secs(1));
    stage.undisturbed("client", &before)?;
    stage.ok("uninstall refuses while pods are in the mesh, and install where it is installed");

    taken_away(stage)?;
    installed(stage)?;
    upgraded(stage)?;
    // Nobody comes after this scenario; a run that uses a cluster again installs first.
    led_out(stage)
}

/// Helm takes it away while pods are in it.
fn taken_away(stage: &Stage) -> Result<()> {
    let far = &NODES[1];
    mesh::remove(&stage.cluster, "culvert")?;
    nothing_left(stage)?;
    stage.reaches("idle", "http://server:8080/")?;
    stage.start(&[App::idle("comer").on(&NODES[0])])?;
    stage.reaches("comer", "http://server:8080/")?;
    let before = stage.gets_through("client")?;
    let (seen, ()) = stage.watch(far, || {
        stage.pass(Duration::from_secs(2));
        Ok(())
    })?;
    stage.undisturbed("client", &before)?;
    ensure!(!seen.plaintext.is_empty(), "no plaintext without a mesh: {seen:?}");
    ensure!(seen.tunnels.is_empty(), "tunnels without a mesh: {:?}", seen.tunnels);
    // Its long connections would go on in plaintext.
    stage.delete_pods(&["client"])?;
    stage.ok(
        "helm uninstall under pods of the mesh: all of them, and a new one, talk in plaintext as before it",
    );
    let kept = ["get", "peerauthentication", "-n", &stage.namespace, "default", "-o", "name"];
    stage.kubectl().run(&kept).context("the kinds of istio.io, and objects of them, are to stay")?;
    stage
        .kubectl()
        .run(&["get", "secret", "-n", NAMESPACE, "culvert-ca-secret"])
        .context("the root is to stay")?;
    stage.ok("the root of trust, the kinds of istio.io and their objects stay");
    Ok(())
}

/// The command line puts it back.
fn installed(stage: &Stage) -> Result<()> {
    // The agents lost their right to write with the release.
    stage.label("pod", "idle", &format!("{MODE}=none"))?;
    let settings = settings();
    let words: Vec<&str> =
        ["install", "--timeout", "3m"].into_iter().chain(settings.iter().map(String::as_str)).collect();
    let said = stage.culvert(&words)?.code(0)?;
    ensure!(said.output.ends_with("the mesh is ready\n"), "{said:?}");
    stage.kubectl().until(&["pod", "-n", &stage.namespace, "idle"], PATIENCE, |pod| {
        let annotation = &pod["metadata"]["annotations"][REDIRECTION];
        if annotation.is_null() { Ok(()) } else { Err(annotation.to_string()) }
    })?;
    stage.ok("what the mesh of before said of a pod that is to be left out now is taken back");
    stage.label("pod", "idle", &format!("{MODE}-"))?;
    stage.enrolled(true)?;
    stage.ok("culvert install: ready, and what is labelled is in the mesh again");
    stage.nothing_in_plaintext(&NODES[1], || {
        stage.reaches("comer", "http://server:8080/")?;
        stage.start(&[App::client("client", &["-load", "10@http://server:8080/"]).on(&NODES[0])])?;
        stage.talking("client").map(drop)
    })
}

/// The command line changes a setting and keeps the others.
fn upgraded(stage: &Stage) -> Result<()> {
    let said = stage.culvert(&["upgrade", "--timeout", "3m", "--set", "log.filter=debug"])?.code(0)?;
    ensure!(said.output.ends_with("the mesh is ready\n"), "{said:?}");
    let level = "jsonpath={.spec.template.spec.containers[0].env[?(@.name==\"RUST_LOG\")].value}";
    let pull = "jsonpath={.spec.template.spec.containers[0].imagePullPolicy}";
    for what in ["deployment/culvertd", "daemonset/culvert-node", "daemonset/ztunnel"] {
        let get = |path: &str| stage.kubectl().run(&["get", "-n", NAMESPACE, what, "-o", path]);
        let (level, pull) = (get(level)?, get(pull)?);
        ensure!(level == "debug" && pull == "Never", "{what} logs {level:?} and pulls {pull:?}");
    }
    let wrong = stage.culvert(&["upgrade", "--set", "no.such.key=1"])?.code(2)?;
    ensure!(wrong.errors.contains("no"), "{wrong:?}");
    stage.ok(
        "culvert upgrade changes what it is given, keeps the rest, and refuses what the chart does not know",
    );
    Ok(())
}

/// The command line takes pods out of it, and then takes it away, with all that there is.
fn led_out(stage: &Stage) -> Result<()> {
    let before = stage.talking("client")?;
    let words = ["uninstall", "--remove-labels", "--delete-crds", "--timeout", "3m"];
    let said = stage.culvert(&words)?.code(0)?;
    for part in [&stage.namespace, "removed release culvert", "peerauthentications.security.istio.io"] {
        ensure!(said.output.contains(part), "uninstall does not tell of {part}: {said:?}");
    }
    nothing_left(stage)?;
    stage.enrolled(false)?;
    stage.undisturbed("client", &before)?;
    let kinds = stage.kubectl().run(&["get", "crds", "-o", "name"])?;
    ensure!(!kinds.contains("istio.io"), "kinds are left: {kinds}");
    stage.ok("culvert uninstall --remove-labels --delete-crds: no request lost, and nothing left");
    Ok(())
}
