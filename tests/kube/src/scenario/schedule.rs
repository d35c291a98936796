//! Which scenario runs when, and on which cluster: those that keep to their namespace side by side, those that break what
//! others need alone, each on the cluster that is free first.

use std::sync::{Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Run, Scenario, Stage, Way};
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
    /// Clusters that have a mesh, or will have.
    staying: Mutex<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Played {
    name: &'static str,
    took: Duration,
    failed: bool,
}

/// One that plays.
struct Begun {
    name: &'static str,
    clock: Clock,
    stage: Stage,
}

impl Schedule {
    /// Of these, in this order.
    #[must_use]
    pub fn new(scenarios: &[Scenario]) -> Self {
        Self { waiting: Mutex::new(scenarios.to_vec()), played: Mutex::default(), staying: Mutex::new(1) }
    }

    /// On so many clusters.
    pub fn on(&self, clusters: usize) {
        *self.staying.lock().unwrap_or_else(PoisonError::into_inner) = clusters;
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

    /// The next that must be alone. While another one is `waited` for, one that leaves alone what that looks at. One that leaves
    /// no mesh has its turn where there is another cluster for the rest, and else when nothing else is left.
    fn take_alone(&self, waited: bool) -> Option<Scenario> {
        let mut waiting = self.waiting();
        let mut staying = self.staying.lock().unwrap_or_else(PoisonError::into_inner);
        let is_left = waiting.iter().any(|s| s.way == Way::Alone);
        let at = waiting.iter().position(|s| match s.way {
            Way::Alone => s.gentle || !waited,
            Way::Last => !waited && (*staying > 1 || !is_left),
            Way::Before | Way::Beside => false,
        })?;
        let taken = waiting.remove(at);
        *staying -= usize::from(taken.way == Way::Last);
        Some(taken)
    }

    /// Runs one after the other of those that must be alone on their cluster, as many as no other cluster takes; what one merely
    /// waits for at its end, beside the next. One that leaves no mesh is the cluster's last.
    ///
    /// # Errors
    /// One can't even be set up.
    pub fn run_alone(&self, cluster: &Cluster) -> Result<()> {
        thread::scope(|scope| {
            let mut waited: Option<ScopedJoinHandle<'_, ()>> = None;
            loop {
                let is_waited = waited.as_ref().is_some_and(|thread| !thread.is_finished());
                if let Some(scenario) = self.take_alone(is_waited) {
                    if let Some((begun, after)) = self.begin(cluster, &scenario)? {
                        waited = Some(scope.spawn(move || self.end(&begun, &after(&begun.stage))));
                    }
                    if scenario.way == Way::Last {
                        return Ok(());
                    }
                } else if let Some(thread) = waited.take() {
                    thread.join().ok().context("a scenario panicked")?;
                } else {
                    return Ok(());
                }
            }
        })
    }

    fn play(&self, cluster: &Cluster, scenario: &Scenario) -> Result<()> {
        if let Some((begun, after)) = self.begin(cluster, scenario)? {
            self.end(&begun, &after(&begun.stage));
        }
        Ok(())
    }

    /// Plays one. If it went well and something of it is left to be waited for, returns that.
    fn begin(&self, cluster: &Cluster, scenario: &Scenario) -> Result<Option<(Begun, Run)>> {
        say(&format!("== {}: {}", scenario.name, scenario.shows));
        let begun =
            Begun { name: scenario.name, clock: Clock::start(), stage: Stage::new(cluster, scenario.name)? };
        let outcome = (scenario.run)(&begun.stage);
        match scenario.after.filter(|_| outcome.is_ok()) {
            Some(after) => Ok(Some((begun, after))),
            None => {
                self.end(&begun, &outcome);
                Ok(None)
            }
        }
    }

    fn end(&self, begun: &Begun, outcome: &Result<()>) {
        let Begun { name, clock, stage } = begun;
        match outcome {
            Ok(()) => say(&format!("== {name}: ok, {}", clock.seconds())),
            Err(error) => {
                let left = stage.keep_evidence(error);
                say(&format!("== {name}: FAILED after {}: {error:#}", clock.seconds()));
                say(&format!("   see {}", left.display()));
            }
        }
        let played = Played { name, took: clock.elapsed(), failed: outcome.is_err() };
        self.played.lock().unwrap_or_else(PoisonError::into_inner).push(played);
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
    fn what_leaves_no_mesh_comes_last_unless_others_can_take_the_rest() {
        let schedule = Schedule::new(ALL);
        assert!(schedule.needs_a_mesh() && schedule.left(Way::Alone) > 1);
        assert_eq!(schedule.left(Way::Last), 1, "a cluster can have one only");
        let taken: Vec<_> = std::iter::from_fn(|| schedule.take_alone(false)).collect();
        let (last, before) = taken.split_last().unwrap();
        assert!(last.way == Way::Last && before.iter().all(|s| s.way == Way::Alone));
        // Side by side, in the order of the list.
        let schedule = Schedule::new(ALL);
        schedule.on(2);
        let taken: Vec<_> = std::iter::from_fn(|| schedule.take_alone(false)).map(|s| s.name).collect();
        let wanted: Vec<_> =
            ALL.iter().filter(|s| matches!(s.way, Way::Alone | Way::Last)).map(|s| s.name).collect();
        assert_eq!(taken, wanted);
        assert_eq!(*schedule.staying.lock().unwrap(), 1);
        let schedule = Schedule::new(ALL);
        schedule.on(2);
        let beside: Vec<_> = std::iter::from_fn(|| schedule.take_alone(true)).collect();
        assert!(beside.len() > 1 && beside.iter().all(|s| s.gentle && s.after.is_none()));
        let rest = std::iter::from_fn(|| schedule.take_alone(false)).count();
        assert_eq!(beside.len() + rest, wanted.len(), "the others come when nothing is waited for");
    }
}
