//! The Gateway API's own conformance suite for meshes, built from its Go module (`tests/kube/conformance`), and what comes
//! of a run of it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cluster::Cluster;
use crate::image::{Archive, Platform, Rootfs, Settings};
use crate::lab::Lab;
use crate::process::{WITH_FEW_COLLECTIONS, finish, in_netns};
use crate::report::{Clock, say};

/// The namespaces of its applications, which its manifests name.
pub const NAMESPACES: [&str; 2] = ["gateway-conformance-mesh", "gateway-conformance-mesh-consumer"];

/// The image that its pods name; built here, as there is no registry.
const ECHO: &str = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1";

/// The profiles, and with them their core features.
const PROFILES: &str = "MESH-HTTP,MESH-GRPC";

/// All nine extended features of the profiles.
const EXTENDED: [&str; 9] = [
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
];

/// Features of no mesh profile. Seven of the mesh tests ask for one of them, and run only if it is named.
const UNCOUNTED: [&str; 7] = [
    "HTTPRoute",
    "GRPCRoute",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
];

/// How many right answers in a row a case asks for, each by a program that is started in a pod. With the suite's three, a Service that
/// picks one of two pods at random passes tests of what no mesh does; twenty come by chance once in a million times.
pub const IN_A_ROW: u32 = 20;

/// What came of one of the suite's tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It failed.
    Failed,
    /// It was not run.
    Skipped,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The tests for meshes, by name, in the alphabet's order.
    pub tests: Vec<(String, Outcome)>,
    /// The suite's report.
    pub report: PathBuf,
    /// What the suite said.
    pub log: PathBuf,
}

impl Run {
    /// The names of the tests with an outcome.
    #[must_use]
    pub fn with(&self, outcome: Outcome) -> Vec<&str> {
        self.tests.iter().filter(|(_, o)| *o == outcome).map(|(name, _)| name.as_str()).collect()
    }

    /// Keeps it in `tests/conformance`, as the report and a list of all tests. A report that differs by its date alone
    /// stays as it is.
    ///
    /// # Errors
    /// It can't be written.
    pub fn keep(&self, lab: &Lab, name: &str) -> Result<()> {
        let directory = lab.workspace.join("tests/conformance");
        let (report, list) =
            (directory.join(format!("{name}.yaml")), directory.join(format!("{name}.tests.txt")));
        let undated =
            |text: &str| text.lines().filter(|l| !l.starts_with("date:")).collect::<Vec<_>>().join("\n");
        let new =
            fs::read_to_string(&self.report).with_context(|| format!("reading {}", self.report.display()))?;
        if !fs::read_to_string(&report).is_ok_and(|old| undated(&old) == undated(&new)) {
            lab.write(&report, &new)?;
        }
        let line = |(name, outcome): &(String, Outcome)| format!("{outcome:?} {name}\n");
        lab.write(&list, &self.tests.iter().map(line).collect::<String>())
    }
}

fn directory(lab: &Lab) -> PathBuf {
    lab.root.join("conformance")
}

/// Builds the suite and its applications' image, if they are not there or the module has changed, and imports the image.
/// Cold it takes three minutes of processor time.
///
/// # Errors
/// There is no Go, a module can't be fetched, or one does not compile.
pub fn build(cluster: &Cluster) -> Result<()> {
    let lab = &cluster.lab;
    let (module, out) = (lab.workspace.join("tests/kube/conformance"), directory(lab));
    let mut wanted = String::new();
    for file in ["go.mod", "conformance_test.go"] {
        wanted.push_str(&fs::read_to_string(module.join(file)).with_context(|| format!("reading {file}"))?);
    }
    let (stamp, archive) = (out.join(".built"), out.join("echo-advanced.tar"));
    if !fs::read_to_string(&stamp).is_ok_and(|built| built == wanted) {
        let clock = Clock::start();
        fs::create_dir_all(&out)?;
        let suite = out.join("suite").display().to_string();
        go(&module, &["test", "-c", "-o", &suite, "."])?;
        for program in ["client", "server"] {
            let to = out.join(program).display().to_string();
            let package = format!("istio.io/istio/pkg/test/echo/cmd/{program}");
            go(&module, &["build", "-trimpath", "-ldflags", "-s -w", "-o", &to, &package])?;
        }
        let istio = PathBuf::from(go(&module, &["list", "-m", "-f", "{{.Dir}}", "istio.io/istio"])?.trim());
        echo(&out, &istio.join("tests/testdata/certs/dns"))?.write(&archive)?;
        lab.write(&stamp, &wanted)?;
        say(&format!("   built the conformance suite and its image, {}", clock.seconds()));
    }
    cluster.import(&[archive])
}

fn go(module: &Path, words: &[&str]) -> Result<String> {
    let mut go = Command::new("go");
    go.current_dir(module)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-buildvcs=false -mod=readonly")
        .args(words);
    finish(&mut go).context("the conformance suite's module (needs Go 1.26, https://go.dev/dl)")
}

fn echo(programs: &Path, certificates: &Path) -> Result<Archive> {
    let mut files = Rootfs::default();
    files.basics()?;
    for program in ["client", "server"] {
        files.copy(&programs.join(program), &format!("/usr/local/bin/{program}"))?;
    }
    files.copy(&certificates.join("cert-chain.pem"), "/cert.crt")?;
    files.copy(&certificates.join("key.pem"), "/cert.key")?;
    let settings = Settings {
        name: ECHO.to_owned(),
        platform: Platform::here()?,
        entrypoint: vec!["/usr/local/bin/server".to_owned()],
        user: "0:0".to_owned(),
        labels: Vec::new(),
        seconds: 0,
    };
    Archive::pack(&files, &settings)
}

/// Runs the suite. `labels` are put on its namespaces; a case may take `patience` seconds to get its answers in a row.
///
/// # Errors
/// It does not run to its end; tests that fail are no error here.
pub fn run(cluster: &Cluster, name: &str, labels: &str, patience: u32) -> Result<Run> {
    let lab = &cluster.lab;
    let out = directory(lab);
    let (report, log) = (out.join(format!("{name}.yaml")), out.join(format!("{name}.log")));
    let _ = fs::remove_file(&report);
    let features = [&["Mesh"], &EXTENDED[..], &UNCOUNTED].concat().join(",");
    let mut suite = in_netns(&lab.control_plane_netns(), out.join("suite"));
    suite.env("KUBECONFIG", lab.pki("admin.kubeconfig")).envs(WITH_FEW_COLLECTIONS).args([
        "-test.run=TestConformance",
        "-test.v",
        "-test.timeout=30m",
        // As many as the processors can do at a time: more take turns, and none is done in its time.
        "-test.parallel=6",
        "-gateway-class=",
        "-cleanup-base-resources=false",
        &format!("-conformance-profiles={PROFILES}"),
        &format!("-supported-features={features}"),
        &format!("-namespace-labels={labels}"),
        &format!(
            "-timeout-config-overrides=MaxTimeToConsistency:{patience};RequiredConsecutiveSuccesses:{IN_A_ROW}"
        ),
        &format!("-report-output={}", report.display()),
        "-organization=culvert",
        "-project=culvert",
        "-url=https://culvert.dev",
        concat!("-version=", env!("CARGO_PKG_VERSION")),
        "-contact=@culvert",
    ]);
    let file = File::create(&log).with_context(|| format!("writing {}", log.display()))?;
    let status = suite
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .context("starting the conformance suite")?;
    let tests = outcomes(&String::from_utf8_lossy(&fs::read(&log)?));
    if tests.is_empty() || !report.exists() {
        bail!("the conformance suite ended ({status}) without a report: see {}", log.display());
    }
    Ok(Run { tests, report, log })
}

/// What the suite says of its tests for meshes. A test that was not begun is not in it.
fn outcomes(log: &str) -> Vec<(String, Outcome)> {
    let mut tests = Vec::new();
    for line in log.lines() {
        let Some((outcome, rest)) = line.trim_start().strip_prefix("--- ").and_then(|l| l.split_once(": "))
        else {
            continue;
        };
        let name = rest.strip_prefix("TestConformance/").and_then(|r| r.split(' ').next());
        let Some(name) = name.filter(|n| n.starts_with("Mesh") && !n.contains('/')) else { continue };
        let outcome = match outcome {
            "PASS" => Outcome::Passed,
            "SKIP" => Outcome::Skipped,
            _ => Outcome::Failed,
        };
        tests.push((name.to_owned(), outcome));
    }
    tests.sort_by(|a, b| a.0.cmp(&b.0));
    tests
}

/// That a report is one of success: of every profile, in what is core and in what is extended, with nothing left out.
///
/// # Errors
/// It is not: with the line that says so.
pub fn successful(report: &str) -> Result<()> {
    let mut results = 0;
    for line in report.lines().map(str::trim) {
        let wrong = line.starts_with("result: ") && line != "result: success"
            || ["Failed: ", "Skipped: "].iter().any(|of| line.starts_with(of) && !line.ends_with(" 0"))
            || ["failedTests:", "skippedTests:", "unsupportedFeatures:"].contains(&line);
        ensure!(!wrong, "the report of the conformance suite has {line:?}");
        results += u32::from(line.starts_with("result: "));
    }
    // Of two profiles; one of them has tests of extended features.
    ensure!(results == 3, "the report of the conformance suite has {results} results in place of 3");
    let missing = EXTENDED.iter().find(|feature| !report.contains(&format!("- {feature}\n")));
    ensure!(missing.is_none(), "the report of the conformance suite lacks {missing:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suites_own_words_are_understood() {
        let log = "=== RUN   TestConformance/MeshBasic\n--- FAIL: TestConformance (1.00s)\n    \
                   --- PASS: TestConformance/MeshPorts (1.00s)\n        \
                   --- PASS: TestConformance/MeshPorts/0_request (1.00s)\n    \
                   --- SKIP: TestConformance/GatewayInfrastructure (0.00s)\n    \
                   --- SKIP: TestConformance/MeshConsumerRoute (0.00s)\n    \
                   --- FAIL: TestConformance/MeshBasic (1.00s)\n";
        let tests = outcomes(log);
        let names: Vec<(&str, Outcome)> = tests.iter().map(|(n, o)| (n.as_str(), *o)).collect();
        assert_eq!(
            names,
            [
                ("MeshBasic", Outcome::Failed),
                ("MeshConsumerRoute", Outcome::Skipped),
                ("MeshPorts", Outcome::Passed)
            ]
        );
    }

    #[test]
    fn nothing_in_a_report_may_have_failed_or_been_left_out() {
        let part =
            "    result: success\n    statistics:\n      Failed: 0\n      Passed: 7\n      Skipped: 0\n";
        let features: String = EXTENDED.iter().map(|feature| format!("    - {feature}\n")).collect();
        let report = part.repeat(3) + &features;
        successful(&report).unwrap();
        assert!(successful(&(part.repeat(2) + &features)).is_err());
        assert!(successful(&part.repeat(3)).is_err());
        for (from, to) in [
            ("result: success", "result: partial"),
            ("Failed: 0", "Failed: 1"),
            ("Skipped: 0", "Skipped: 1"),
            ("    statistics", "    skippedTests:\n    - MeshBasic\n    statistics"),
        ] {
            assert!(successful(&report.replacen(from, to, 1)).is_err(), "{to}");
        }
    }
}
