//! Helm as a program: it renders the chart and keeps the release.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cluster::ClusterArgs;

/// The oldest that keeps values as an upgrade has to (`--reset-then-reuse-values`).
const OLDEST: (u32, u32) = (3, 14);

/// Major and minor number of a version such as `v3.14.0+gc309b6f`.
fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim().trim_start_matches('v').split(['.', '+', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// A Helm that works.
#[derive(Debug)]
pub struct Helm {
    program: PathBuf,
    /// Arguments that say which cluster and namespace.
    place: Vec<String>,
}

impl Helm {
    /// Finds the program, and asks for its version.
    ///
    /// # Errors
    /// It is not there; the text says what else there is to do.
    pub fn find(program: &Path, cluster: &ClusterArgs) -> Result<Self> {
        let mut place = vec!["--namespace".to_owned(), cluster.system_namespace.clone()];
        if let Some(file) = &cluster.kubeconfig {
            place.extend(["--kubeconfig".to_owned(), file.display().to_string()]);
        }
        if let Some(context) = &cluster.context {
            place.extend(["--kube-context".to_owned(), context.clone()]);
        }
        let helm = Self { program: program.to_owned(), place };
        match Command::new(program).args(["version", "--short"]).output() {
            Ok(output) => {
                let version = helm.checked("version", &output)?;
                if number(&version).is_none_or(|found| found < OLDEST) {
                    bail!("{} is of version {}; 3.14 or newer is needed", program.display(), version.trim());
                }
                Ok(helm)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => bail!(
                "the chart that this program carries is applied by Helm, and there is no {}. Install Helm (version 3.14 \
                 or newer, https://helm.sh/docs/intro/install), or say where it is with --helm; or take the chart \
                 with `culvert install --write-chart DIR` to where Helm, Argo CD or Flux is",
                program.display()
            ),
            Err(e) => Err(e).with_context(|| format!("cannot run {}", program.display())),
        }
    }

    fn run(&self, arguments: &[String]) -> Result<Output> {
        Command::new(&self.program)
            .args(arguments)
            .args(&self.place)
            .output()
            .with_context(|| format!("cannot run {}", self.program.display()))
    }

    /// Its output, if it did what it was asked.
    fn checked(&self, what: &str, output: &Output) -> Result<String> {
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} {what} failed: {}", self.program.display(), said.trim())
    }

    /// Whether there is a release, in whatever state.
    ///
    /// # Errors
    /// Helm fails otherwise than by not finding it.
    pub fn has_release(&self, release: &str) -> Result<bool> {
        let output = self.run(&["status".to_owned(), release.to_owned()])?;
        if !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("not found") {
            return Ok(false);
        }
        self.checked("status", &output)?;
        Ok(true)
    }

    /// That Helm would take the chart with these values, before anything is changed.
    ///
    /// # Errors
    /// It would not; with Helm's words.
    pub fn check(&self, release: &str, chart: &Path, more: &[String]) -> Result<()> {
        let mut arguments: Vec<String> =
            ["upgrade", "--install", "--dry-run=client", release].map(str::to_owned).into();
        arguments.push(chart.display().to_string());
        arguments.extend(more.iter().cloned());
        let output = self.run(&arguments)?;
        self.checked("upgrade --dry-run", &output).map(drop).with_context(|| {
            format!(
                "nothing was changed, since Helm refuses the release {release}; where it names a value, `culvert install \
                 --write-chart DIR` writes the chart, with its values in values.yaml and README.md; where it names the \
                 release, `helm history {release}` says more"
            )
        })
    }

    /// Installs or upgrades a release from a chart's directory; what Helm says of it.
    ///
    /// # Errors
    /// Helm fails, such as for a value that the chart refuses; with its words.
    pub fn upgrade(&self, release: &str, chart: &Path, more: &[String]) -> Result<String> {
        let mut arguments: Vec<String> = ["upgrade", "--install", release].map(str::to_owned).into();
        arguments.push(chart.display().to_string());
        arguments.extend(more.iter().cloned());
        let output = self.run(&arguments)?;
        self.checked("upgrade", &output).with_context(|| {
            format!("the release {release} could not be applied; `helm history {release}` and `culvert status` say how far it came")
        })
    }

    /// Removes a release, and waits until its objects are gone.
    ///
    /// # Errors
    /// Helm fails; with its words.
    pub fn uninstall(&self, release: &str, limit: Duration) -> Result<()> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        let output = self.run(&["uninstall".to_owned(), release.to_owned(), "--wait".to_owned(), timeout])?;
        self.checked("uninstall", &output)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_by_their_numbers() {
        assert_eq!(number("v3.14.0+gc309b6f\n"), Some((3, 14)));
        assert_eq!((number("v4.0.1"), number("v4.2+unreleased")), (Some((4, 0)), Some((4, 2))));
        assert!(number("v3.9.2").is_some_and(|found| found < OLDEST));
        assert!(number("version.BuildInfo{}").is_none() && number("").is_none());
    }
}
