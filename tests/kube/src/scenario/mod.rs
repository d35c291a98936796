//! The scenarios: what users do to a mesh, and what the world does to it, with applications that must not notice.
//!
//! A scenario is a function of a [`Stage`], which has a namespace of its own and is taken down after it, also when
//! it fails. It says with [`Stage::ok`] what it has seen to be so, and fails with an error that says what was not.

mod apps;
mod cases;
mod commands;
mod conformance;
mod dual_stack;
mod ebpf;
mod enrolment;
mod faults;
mod node_local;
mod plugin;
mod policy;
mod release;
mod schedule;
mod smoke;
mod stage;
mod upgrade;
mod waypoint;
mod workloads;

use std::fs;

use anyhow::{Result, bail};

pub use apps::{App, Job};
pub use schedule::Schedule;
pub use stage::Stage;

use crate::lab::Lab;

/// One of them.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// What it is called on the command line, and its namespace after `e2e-`.
    pub name: &'static str,
    /// What is shown, in one line.
    pub shows: &'static str,
    /// What it needs of the cluster, and leaves of it.
    pub way: Way,
    /// Whether a short run leaves it out.
    pub long: bool,
    /// Whether it runs only where it is named.
    pub asked: bool,
    /// It.
    pub run: Run,
    /// What is merely waited for when it is over: beside the next of its cluster that are `gentle`.
    pub after: Option<Run>,
    /// Stops no node and none of its daemons, and looks at its own pods alone.
    pub gentle: bool,
}

/// What a scenario does on its stage.
type Run = fn(&Stage) -> Result<()>;

/// How a scenario gets on with others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// On the cluster before the product is there.
    Before,
    /// With the product, beside others: it keeps to its namespaces.
    Beside,
    /// With the product, alone: it changes or breaks what others need.
    Alone,
    /// As that, and no mesh is left after it.
    Last,
}

impl std::fmt::Debug for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// All of them, in the order in which they run.
pub use cases::ALL;

/// The scenarios of these names; if none is given, all but those that have to be asked for.
///
/// # Errors
/// There is none of a name.
pub fn select(names: &[String]) -> Result<Vec<Scenario>> {
    if let Some(unknown) = names.iter().find(|name| !ALL.iter().any(|s| s.name == **name)) {
        let all: Vec<&str> = ALL.iter().map(|s| s.name).collect();
        bail!("there is no scenario {unknown:?}; there are {}", all.join(", "));
    }
    let is_wanted =
        |s: &&Scenario| if names.is_empty() { !s.asked } else { names.iter().any(|n| n == s.name) };
    Ok(ALL.iter().filter(is_wanted).copied().collect())
}

/// Forgets the evidence of earlier runs.
///
/// # Errors
/// It can't be deleted.
pub fn clear_evidence(lab: &Lab) -> Result<()> {
    crate::process::remove_tree(&lab.root.join("failed"))?;
    fs::create_dir_all(lab.root.join("failed"))?;
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
        assert_eq!(select(&[]).unwrap().len(), ALL.iter().filter(|s| !s.asked).count());
        assert_eq!(select(&["by-chance".into()]).unwrap().len(), 1);
        assert!(select(&["none".into()]).is_err());
    }
}
