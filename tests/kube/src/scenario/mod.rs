//! The scenarios: what users do to a mesh, and what the world does to it, with applications that must not notice.
//!
//! A scenario is a function of a [`Stage`], which has a namespace of its own and is taken down after it, also when
//! it fails. It says with [`Stage::ok`] what it has seen to be so, and fails with an error that says what was not.

mod apps;
mod cases;
mod commands;
mod conformance;
mod dual_stack;
mod enrolment;
mod faults;
mod plugin;
mod policy;
mod release;
mod smoke;
mod stage;
mod upgrade;
mod waypoint;
mod workloads;

use std::fs;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context as _, Result, bail};

pub use apps::{App, Job};
pub use stage::Stage;

use crate::cluster::Cluster;
use crate::mesh;
use crate::report::{Clock, say};

/// One of them.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// What it is called on the command line, and its namespace after `e2e-`.
    pub name: &'static str,
    /// What is shown, in one line.
    pub shows: &'static str,
    /// Whether the product must be there.
    pub mesh: bool,
    /// Whether others must not run at the same time.
    pub alone: bool,
    /// Whether a short run leaves it out.
    pub long: bool,
    /// It.
    pub run: fn(&Stage) -> Result<()>,
}

/// All of them, in the order in which they run.
pub use cases::ALL;

/// The scenarios of these names; all, if none is given.
///
/// # Errors
/// There is none of a name.
pub fn select(names: &[String]) -> Result<Vec<Scenario>> {
    if let Some(unknown) = names.iter().find(|name| !ALL.iter().any(|s| s.name == **name)) {
        let all: Vec<&str> = ALL.iter().map(|s| s.name).collect();
        bail!("there is no scenario {unknown:?}; there are {}", all.join(", "));
    }
    Ok(ALL.iter().filter(|s| names.is_empty() || names.iter().any(|n| n == s.name)).copied().collect())
}

/// How many scenarios run side by side: most of their time they wait.
const SIDE_BY_SIDE: usize = 4;

/// Runs scenarios: first those that can be run side by side, then the others, one after the other; returns the names of
/// those that failed. What is known of a failure is left in `target/kube/failed`.
///
/// # Errors
/// A scenario can't even be set up.
pub fn run(cluster: &Cluster, scenarios: &[Scenario]) -> Result<Vec<&'static str>> {
    let (alone, beside): (Vec<_>, Vec<_>) = scenarios.iter().partition(|s| s.alone);
    let mut failed = Vec::new();
    let waiting = Mutex::new(beside.into_iter());
    thread::scope(|scope| {
        let work = || {
            let mut failed = Vec::new();
            loop {
                let next = waiting.lock().map_err(|_| anyhow::anyhow!("a scenario panicked"))?.next();
                let Some(scenario) = next else { return anyhow::Ok(failed) };
                failed.extend(play(cluster, scenario)?);
            }
        };
        let workers: Vec<_> = (0..SIDE_BY_SIDE).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            failed.extend(worker.join().ok().context("a scenario panicked")??);
        }
        anyhow::Ok(())
    })?;
    if scenarios.iter().any(|s| !s.alone) {
        mesh::usage().iter().for_each(|line| say(line));
    }
    for scenario in alone {
        failed.extend(play(cluster, scenario)?);
    }
    Ok(failed)
}

/// Runs one; returns its name if it failed.
fn play(cluster: &Cluster, scenario: &Scenario) -> Result<Option<&'static str>> {
    say(&format!("== {}: {}", scenario.name, scenario.shows));
    let clock = Clock::start();
    let stage = Stage::new(cluster, scenario.name)?;
    let Err(error) = (scenario.run)(&stage) else {
        say(&format!("== {}: ok, {}", scenario.name, clock.seconds()));
        return Ok(None);
    };
    let left = stage.keep_evidence(&error);
    say(&format!("== {}: FAILED after {}: {error:#}", scenario.name, clock.seconds()));
    say(&format!("   see {}", left.display()));
    Ok(Some(scenario.name))
}

/// Forgets the evidence of earlier runs.
///
/// # Errors
/// It can't be deleted.
pub fn clear_evidence(cluster: &Cluster) -> Result<()> {
    crate::process::remove_tree(&cluster.lab.root.join("failed"))?;
    fs::create_dir_all(cluster.lab.root.join("failed"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_be_namespaces_and_none_is_the_beginning_of_another() {
        for (i, scenario) in ALL.iter().enumerate() {
            assert!(scenario.name.chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{}", scenario.name);
            let others = ALL.iter().enumerate().filter(|(other, _)| *other != i);
            // A capture tells scenarios apart by it.
            assert!(others.into_iter().all(|(_, o)| !o.name.starts_with(scenario.name)), "{}", scenario.name);
        }
        assert_eq!(select(&[]).unwrap().len(), ALL.len());
        assert!(select(&["none".into()]).is_err());
    }
}
