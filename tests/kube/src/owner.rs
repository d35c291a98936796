//! Whose clusters are on this machine: what network namespaces and cgroups are called is the machine's, not a checkout's.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::lab::Lab;
use crate::process::Recorded;

/// Where it is written.
pub const NOTE: &str = "/run/culvert-kube";

/// That no other checkout's cluster runs: what it is made of would be taken from under it.
///
/// # Errors
/// One does.
pub fn check(note: &Path, lab: &Lab) -> Result<()> {
    let root = match fs::read_to_string(note) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        text => PathBuf::from(text.with_context(|| format!("reading {}", note.display()))?.trim()),
    };
    if root == lab.root {
        return Ok(());
    }
    let other = Lab { root: root.clone(), ..lab.clone() };
    let recorded: Vec<_> = other.all().flat_map(|lab| Recorded::all(&lab)).collect();
    if let Some(process) = recorded.iter().find(|process| process.pid().is_some()) {
        bail!(
            "a cluster of another checkout is up, in {} ({} runs), and a machine has room for one checkout's: wait for its \
             end, or end it there: cargo run -p kube-tests -- cluster down",
            root.display(),
            process.name()
        );
    }
    Ok(())
}

/// Says that what comes is this checkout's.
///
/// # Errors
/// Another one's runs, or it can't be written.
pub fn claim(note: &Path, lab: &Lab) -> Result<()> {
    check(note, lab)?;
    fs::write(note, lab.root.display().to_string()).with_context(|| format!("writing {}", note.display()))
}

/// Says that nothing is left of this checkout's.
///
/// # Errors
/// It can't be removed.
pub fn release(note: &Path, lab: &Lab) -> Result<()> {
    if fs::read_to_string(note).is_ok_and(|root| Path::new(root.trim()) == lab.root) {
        fs::remove_file(note).with_context(|| format!("removing {}", note.display()))?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_clusters_of_another_checkout_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let note = directory.path().join("note");
        let [one, two] = ["one", "two"].map(|name| {
            let workspace = directory.path().join(name);
            Lab { root: workspace.clone(), workspace, number: 1 }
        });
        claim(&note, &one).unwrap();
        check(&note, &one).unwrap();
        // Nothing of it runs: it was killed, and its names are free.
        claim(&note, &two).unwrap();
        // Of another of its clusters.
        let process = Recorded::start(&two.nth(2), "node1", Command::new("sleep").arg("1000")).unwrap();
        let error = claim(&note, &one).unwrap_err().to_string();
        assert!(error.contains("two (node1 runs)"), "{error}");
        release(&note, &one).unwrap();
        assert!(check(&note, &one).is_err(), "it is not this one's to release");
        process.end().unwrap();
        check(&note, &one).unwrap();
        release(&note, &two).unwrap();
        assert!(!note.exists());
        release(&note, &two).unwrap();
    }
}
