//! Helm as a program: it renders the chart and keeps the release.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use crate::cluster::ClusterArgs;

/// The oldest that keeps values as an upgrade has to (`--reset-then-reuse-values`).
const OLDEST: (u32, u32) = (3, 14);
/// The context that is made where --cluster, --user or --token names another than the context's.
const CONTEXT: &str = "culvert-of-this-command";

/// What Helm would take in the place of what is said here, of the environment: it must act on the cluster that is looked at.
const OVERRIDES: [&str; 8] = [
    "HELM_KUBEAPISERVER",
    "HELM_KUBEASGROUPS",
    "HELM_KUBEASUSER",
    "HELM_KUBECAFILE",
    "HELM_KUBECONTEXT",
    "HELM_KUBEINSECURE_SKIP_TLS_VERIFY",
    "HELM_KUBETLS_SERVER_NAME",
    "HELM_KUBETOKEN",
];

/// Major and minor number of a version such as `v3.14.0+gc309b6f`.
fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim().trim_start_matches('v').split(['.', '+', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// kubectl's flags in Helm's words, but for those that choose a context.
fn as_whom(cluster: &ClusterArgs) -> Result<Vec<String>> {
    if cluster.act_as_uid.is_some() || cluster.client_certificate.is_some() || cluster.client_key.is_some() {
        bail!(
            "Helm, which applies the chart, knows no --as-uid, --client-certificate and --client-key: give them to a user of a \
             kubeconfig (kubectl config set-credentials), and name it with --user"
        );
    }
    let authority = cluster.certificate_authority.as_ref().map(|path| path.display().to_string());
    let said = [
        ("--kube-apiserver", cluster.server.as_ref()),
        ("--kube-ca-file", authority.as_ref()),
        ("--kube-tls-server-name", cluster.tls_server_name.as_ref()),
        ("--kube-as-user", cluster.act_as.as_ref()),
    ];
    let said = said.into_iter().filter_map(|(flag, value)| value.map(|value| (flag, value)));
    let groups = cluster.act_as_group.iter().map(|group| ("--kube-as-group", group));
    let mut flags: Vec<String> = said.chain(groups).flat_map(|(f, v)| [f.to_owned(), v.clone()]).collect();
    if cluster.insecure_skip_tls_verify {
        flags.push("--kube-insecure-skip-tls-verify".to_owned());
    }
    Ok(flags)
}

/// A Helm that works.
#[derive(Debug)]
pub struct Helm {
    program: PathBuf,
    /// Arguments that say which cluster and namespace.
    place: Vec<String>,
    /// And variables, for what is in no list of processes.
    variables: Vec<(&'static str, OsString)>,
    /// The first number of its version.
    major: u32,
    /// A context of our own, while it is needed.
    _context: Option<NamedTempFile>,
}

impl Helm {
    /// Finds the program, and asks for its version.
    ///
    /// # Errors
    /// It is not there; the text says what else there is to do.
    pub fn find(program: &Path, cluster: &ClusterArgs) -> Result<Self> {
        let mut place = vec!["--namespace".to_owned(), cluster.system_namespace.clone()];
        place.extend(as_whom(cluster)?);
        let mut variables = Vec::new();
        // Where there is no file to name a user in.
        if let Some(token) = cluster.token.as_ref().filter(|_| !cluster.has_files()) {
            variables.push(("HELM_KUBETOKEN", token.into()));
        }
        let context = match cluster.as_a_context(CONTEXT)? {
            Some((text, others)) => {
                let file = NamedTempFile::new()?;
                fs::write(file.path(), text)?;
                let mut list = file.path().as_os_str().to_owned();
                list.push(":");
                list.push(others);
                variables.push(("KUBECONFIG", list));
                place.extend(["--kube-context".to_owned(), CONTEXT.to_owned()]);
                Some(file)
            }
            None => {
                if let Some(file) = &cluster.kubeconfig {
                    place.extend(["--kubeconfig".to_owned(), file.display().to_string()]);
                }
                if let Some(context) = &cluster.context {
                    place.extend(["--kube-context".to_owned(), context.clone()]);
                }
                None
            }
        };
        let mut helm = Self { program: program.to_owned(), place, variables, major: 0, _context: context };
        match Command::new(program).args(["version", "--short"]).output() {
            Ok(output) => {
                let version = helm.checked("version", &output)?;
                let Some(found) = number(&version).filter(|found| *found >= OLDEST) else {
                    bail!("{} is of version {}; 3.14 or newer is needed", program.display(), version.trim());
                };
                helm.major = found.0;
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
        let mut command = Command::new(&self.program);
        OVERRIDES.iter().for_each(|name| {
            command.env_remove(name);
        });
        command
            .args(arguments)
            .args(&self.place)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
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

    /// Whether it refuses to change fields that someone else manages by now, which it finds out one object after the other.
    pub fn refuses_conflicts(&self) -> bool {
        self.major >= 4
    }

    /// That Helm would take the chart with these values, before anything is changed: the release that it would make, as JSON.
    ///
    /// # Errors
    /// It would not; with Helm's words.
    pub fn check(&self, release: &str, chart: &Path, more: &[String]) -> Result<String> {
        let mut arguments: Vec<String> =
            ["upgrade", "--install", "--dry-run=client", "--output=json", release].map(str::to_owned).into();
        arguments.push(chart.display().to_string());
        arguments.extend(more.iter().cloned());
        let output = self.run(&arguments)?;
        self.checked("upgrade --dry-run", &output).with_context(|| {
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
