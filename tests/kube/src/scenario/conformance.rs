//! The Gateway API's conformance suite, on the mesh and beside it.

use anyhow::{Result, ensure};
use serde_json::json;

use super::Stage;
use super::stage::{MODE, PATIENCE};
use crate::conformance::{self, IN_A_ROW, NAMESPACES, Outcome, Run};
use crate::tools;

/// What passes without a mesh, too: it asks for no more than that a Service answers.
const BY_CHANCE: [&str; 1] = ["MeshBasic"];

/// How many of the suite's tests are for meshes.
const TESTS: usize = 22;

fn run(stage: &Stage, name: &str, labels: &str, patience: u32) -> Result<Run> {
    let run = conformance::run(&stage.cluster, name, labels, patience)?;
    ensure!(run.tests.len() == TESTS, "{} tests in place of {TESTS}: {:?}", run.tests.len(), run.tests);
    let skipped = run.with(Outcome::Skipped);
    ensure!(skipped.is_empty(), "skipped: {}", skipped.join(", "));
    Ok(run)
}

/// See [`super::ALL`].
pub fn with_a_mesh(stage: &Stage) -> Result<()> {
    conformance::build(&stage.cluster)?;
    stage.kubectl().apply_server_side(&tools::gateway_api(&stage.cluster.lab)?.display().to_string())?;
    let labels = [format!("{MODE}=ambient"), "istio.io/use-waypoint=waypoint".to_owned()];
    for namespace in NAMESPACES {
        stage.also(namespace)?;
        for label in &labels {
            stage.label("namespace", namespace, label)?;
        }
        // For pods, too: the suite dials some at their own address, and this is the way to them that is open then.
        stage.apply(&[json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {
                "name": "waypoint", "namespace": namespace, "labels": {"istio.io/waypoint-for": "all"},
            },
            "spec": {
                "gatewayClassName": "culvert-waypoint",
                "listeners": [{"name": "mesh", "protocol": "HBONE", "port": 15008}],
            },
        })])?;
    }
    for namespace in NAMESPACES {
        stage.kubectl().wait(namespace, "Programmed", "gateway/waypoint", PATIENCE * 2)?;
    }
    let run = run(stage, "report", &labels.join(","), 120)?;
    let failed = run.with(Outcome::Failed);
    ensure!(failed.is_empty(), "failed: {}; see {}", failed.join(", "), run.log.display());
    conformance::successful(&std::fs::read_to_string(&run.report)?)?;
    run.keep(&stage.cluster.lab, "report")?;
    stage.ok(&format!(
        "all {TESTS} mesh tests pass, {IN_A_ROW} right answers in a row each, and none is skipped"
    ));
    Ok(())
}

/// See [`super::ALL`].
pub fn without_a_mesh(stage: &Stage) -> Result<()> {
    conformance::build(&stage.cluster)?;
    let kinds = tools::gateway_api(&stage.cluster.lab)?.display().to_string();
    stage.kubectl().apply_server_side(&kinds)?;
    for namespace in NAMESPACES {
        stage.also(namespace)?;
    }
    let run = run(stage, "without-mesh", "", 8)?;
    let passed = run.with(Outcome::Passed);
    let unexpected: Vec<&str> = passed.iter().filter(|name| !BY_CHANCE.contains(name)).copied().collect();
    ensure!(
        unexpected.is_empty(),
        "pass without a mesh, so that they say nothing of one: {}; see {}",
        unexpected.join(", "),
        run.log.display()
    );
    run.keep(&stage.cluster.lab, "without-mesh")?;
    stage.ok(&format!("without a mesh {} of {TESTS} tests pass: {}", passed.len(), passed.join(", ")));
    // The mesh has to do with kinds that come after it, too.
    stage.kubectl().run(&["delete", "--wait=false", "-f", &kinds]).map(drop)
}
