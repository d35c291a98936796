//! Which scenario runs when, and on which cluster: those that keep to their namespace side by side, those that break what
//! others need alone, each on the cluster that is free first.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Scenario, Stage, Way};
use crate::cluster::Cluster;
use crate::mesh;
use crate::report::{Clock, say};

/// How many scenarios run side by side: most of their time they wait.
const SIDE_BY_SIDE: usize = 4;

/// Scenarios that are still to be run, and what became of the others.
#[derive(Debug)]
pub struct Schedule {
    waiting: Mutex<Vec<Scenario>>,
    played: Mutex<Vec<Played>>,
}

#[derive(Clone, Copy, Debug)]
struct Played {
    name: &'static str,
    took: Duration,
    failed: bool,
}

impl Schedule {
    /// Of these, in this order.
    #[must_use]
    pub fn new(scenarios: &[Scenario]) -> Self {
        Self { waiting: Mutex::new(scenarios.to_vec()), played: Mutex::default() }
    }

    /// How many are left that run in this way.
    #[must_use]
    pub fn left(&self, way: Way) -> usize {
        self.waiting().iter().filter(|s| s.way == way).count()
    }

    /// Whether one is left that needs the product.
    #[must_use]
    pub fn needs_a_mesh(&self) -> bool {
        self.waiting().iter().any(|s| s.way != Way::Before)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Scenario>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, way: Way) -> Option<Scenario> {
        let mut waiting = self.waiting();
        let at = waiting.iter().position(|s| s.way == way)?;
        Some(waiting.remove(at))
    }

    /// Runs those that run in this way side by side.
    ///
    /// # Errors
    /// One can't even be set up.
    pub fn run_beside(&self, cluster: &Cluster, way: Way) -> Result<()> {
        thread::scope(|scope| {
            let work = || {
                while let Some(scenario) = self.take(way) {
                    self.play(cluster, &scenario)?;
                }
                anyhow::Ok(())
            };
            let workers: Vec<_> = (0..SIDE_BY_SIDE).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|w| w.join().ok().context("a scenario panicked")?)
        })
    }

    /// Runs one after the other of those that must be alone on their cluster, as many as no other cluster takes. One that leaves
    /// no mesh is the cluster's last.
    ///
    /// # Errors
    /// One can't even be set up.
    pub fn run_alone(&self, cluster: &Cluster) -> Result<()> {
        while let Some(scenario) = self.take(Way::Alone) {
            self.play(cluster, &scenario)?;
        }
        match self.take(Way::Last) {
            Some(scenario) => self.play(cluster, &scenario),
            None => Ok(()),
        }
    }

    fn play(&self, cluster: &Cluster, scenario: &Scenario) -> Result<()> {
        say(&format!("== {}: {}", scenario.name, scenario.shows));
        let clock = Clock::start();
        let stage = Stage::new(cluster, scenario.name)?;
        let outcome = (scenario.run)(&stage);
        let took = clock.elapsed();
        match &outcome {
            Ok(()) => say(&format!("== {}: ok, {}", scenario.name, clock.seconds())),
            Err(error) => {
                let left = stage.keep_evidence(error);
                say(&format!("== {}: FAILED after {}: {error:#}", scenario.name, clock.seconds()));
                say(&format!("   see {}", left.display()));
            }
        }
        let played = Played { name: scenario.name, took, failed: outcome.is_err() };
        self.played.lock().unwrap_or_else(PoisonError::into_inner).push(played);
        Ok(())
    }

    /// Says what came of all, with their times, and what the clusters have used; whether all went well.
    #[must_use]
    pub fn summary(&self, clock: Clock, clusters: &[Cluster]) -> bool {
        for cluster in clusters {
            mesh::usage(&cluster.lab).iter().for_each(|line| say(line));
        }
        let mut played = self.played.lock().unwrap_or_else(PoisonError::into_inner).clone();
        played.sort_by_key(|p| std::cmp::Reverse(p.took));
        let times: Vec<String> = played.iter().map(|p| format!("{} {}", p.name, p.took.as_secs())).collect();
        say(&format!("   seconds: {}", times.join(", ")));
        if let Some(line) = crate::cluster::processor_time(clusters) {
            say(&format!("   {line}"));
        }
        let failed: Vec<&str> = played.iter().filter(|p| p.failed).map(|p| p.name).collect();
        let (all, time) = (played.len(), clock.seconds());
        if failed.is_empty() {
            say(&format!("== all {all} scenarios: ok, {time}"));
        } else {
            say(&format!("== {} of {all} scenarios FAILED: {}, {time}", failed.len(), failed.join(", ")));
        }
        failed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::ALL;

    #[test]
    fn what_leaves_no_mesh_comes_last() {
        let schedule = Schedule::new(ALL);
        assert!(schedule.needs_a_mesh() && schedule.left(Way::Alone) > 1);
        assert_eq!(schedule.left(Way::Last), 1, "a cluster can have one only");
        let taken: Vec<_> = std::iter::from_fn(|| schedule.take(Way::Alone)).map(|s| s.name).collect();
        let wanted: Vec<_> = ALL.iter().filter(|s| s.way == Way::Alone).map(|s| s.name).collect();
        assert_eq!(taken, wanted, "in the order of the list");
    }
}
