//! `culvert install`, `upgrade`, `uninstall` and `verify-install`.
//!
//! The chart is rendered by Helm, so that there is one description of an installation, and one made by this command is
//! a release like any other: `helm list`, `helm rollback` and the like work on it. What Helm does not do is done here:
//! custom resource definitions by their versions ([`crds`]), waiting until all of it works, and the order in which a
//! mesh can be taken down without cutting pods off.

pub mod chart;
pub mod crds;
mod helm;
mod plan;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::{Cluster, ClusterArgs, MeshSettings};
use crate::doctor;
use crate::health::{self, Check, State};
use crate::status::{self, MODE};
use crate::table::{Output, print};
use crds::Action;
use helm::Helm;
use plan::Plan;

/// How often the cluster is looked at while waiting; at first more often.
const PERIOD: Duration = Duration::from_secs(2);

/// Installs the mesh in the cluster, and waits until it works
#[derive(Args, Debug)]
pub struct InstallArgs {
    #[command(flatten)]
    change: ChangeArgs,
    /// Only write the chart that would be installed into this directory
    #[arg(long, value_name = "DIR")]
    write_chart: Option<PathBuf>,
}

/// Brings an installation to this version, or to other values, and waits until it works
#[derive(Args, Debug)]
pub struct UpgradeArgs {
    #[command(flatten)]
    change: ChangeArgs,
    /// Forget the values of the installation; without it, what is not given again stays as it was
    #[arg(long)]
    reset_values: bool,
}

/// What install and upgrade have in common.
#[derive(Args, Debug)]
struct ChangeArgs {
    /// A value of the chart, as helm takes it: key=value; deploy/charts/culvert/README.md lists them
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// A file of values
    #[arg(short = 'f', long = "values", value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Leave custom resource definitions alone
    #[arg(long)]
    skip_crds: bool,
    /// Show what would be done, and what would be applied
    #[arg(long)]
    dry_run: bool,
    /// Take back what someone else has edited of the release's objects since (as Helm 4 has it; Helm 3 leaves it)
    #[arg(long)]
    force_conflicts: bool,
    #[command(flatten)]
    release: ReleaseArgs,
}

#[derive(Args, Debug)]
struct ReleaseArgs {
    /// The name of Helm's release
    #[arg(long, value_name = "NAME", default_value = "culvert")]
    release: String,
    /// Helm's program
    #[arg(long, value_name = "FILE", default_value = "helm")]
    helm: PathBuf,
    #[command(flatten)]
    waiting: WaitArgs,
}

#[derive(Args, Debug)]
struct WaitArgs {
    /// How long to wait, such as 90s or 10m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    timeout: Duration,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Removes the mesh from the cluster. Refuses while pods are in it, since they would go on in plaintext
#[derive(Args, Debug)]
pub struct UninstallArgs {
    /// First take all namespaces out of the mesh: removes their labels, and waits until no pod is captured
    #[arg(long)]
    remove_labels: bool,
    /// Remove the custom resource definitions that this mesh installed, and with them all objects of their kinds
    #[arg(long)]
    delete_crds: bool,
    #[command(flatten)]
    release: ReleaseArgs,
}

/// Waits until an installation works, and says what doesn't; the exit code is 1 where something doesn't
#[derive(Args, Debug)]
pub struct VerifyArgs {
    #[command(flatten)]
    waiting: WaitArgs,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Parses a time such as `90s`, `10m` or `1m30s`.
pub fn duration(text: &str) -> Result<Duration, String> {
    config::routes::parse_go_duration(text)
        .ok_or_else(|| format!("{text:?} is not a time such as 90s, 10m or 1m30s"))
}

/// Runs `install`.
pub fn install(args: &InstallArgs) -> Result<ExitCode> {
    if let Some(directory) = &args.write_chart {
        chart::write(directory)?;
        print(&format!("wrote the chart to {}\n", directory.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = Cluster::connect(&args.change.release.waiting.cluster)?;
    let helm = Helm::find(&args.change.release.helm, &args.change.release.waiting.cluster)?;
    if helm.has_release(&args.change.release.release)? {
        bail!(
            "there is a release {} in namespace {} already: `culvert upgrade` changes it",
            args.change.release.release,
            cluster.system
        );
    }
    refuse_old_server(&cluster)?;
    for rival in doctor::rivals(&cluster)? {
        print(&format!("note: there is a {rival}: pods must not be captured twice, see `culvert doctor`\n"))?;
    }
    change(&cluster, &helm, &args.change, &[])
}

/// Runs `upgrade`.
pub fn upgrade(args: &UpgradeArgs) -> Result<ExitCode> {
    let cluster = Cluster::connect(&args.change.release.waiting.cluster)?;
    let helm = Helm::find(&args.change.release.helm, &args.change.release.waiting.cluster)?;
    if !helm.has_release(&args.change.release.release)? {
        bail!(
            "there is no release {} in namespace {}: `culvert install` makes it; --release and --system-namespace \
             name another",
            args.change.release.release,
            cluster.system
        );
    }
    let keep = if args.reset_values { "--reset-values" } else { "--reset-then-reuse-values" };
    change(&cluster, &helm, &args.change, &[keep])
}

fn change(cluster: &Cluster, helm: &Helm, args: &ChangeArgs, more: &[&str]) -> Result<ExitCode> {
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    chart::write(directory.path())?;
    let mut arguments = vec!["--create-namespace".to_owned(), "--skip-crds".to_owned()];
    arguments.extend(more.iter().map(|a| (*a).to_owned()));
    for value in &args.set {
        arguments.extend(["--set".to_owned(), value.clone()]);
    }
    for file in &args.values {
        arguments.extend(["--values".to_owned(), file.display().to_string()]);
    }
    let planned = helm.check(&args.release.release, directory.path(), &arguments)?;
    let planned = Plan::read(&planned)?;
    planned.check_settings(&cluster.system)?;
    planned.check_nodes(&nodes_parts(cluster, &args.release.release)?, || all_captured(cluster))?;
    if helm.refuses_conflicts() {
        if args.force_conflicts {
            arguments.push("--force-conflicts".to_owned());
        } else {
            planned.check_edits(&MeshSettings::all(cluster)?)?;
        }
    }
    if !args.skip_crds {
        install_crds(cluster, args.dry_run)?;
    }
    if args.dry_run {
        arguments.push("--dry-run=server".to_owned());
        print(&helm.upgrade(&args.release.release, directory.path(), &arguments)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    prepare_namespace(cluster)?;
    helm.upgrade(&args.release.release, directory.path(), &arguments)?;
    print(&format!("applied release {} in namespace {}\n", args.release.release, cluster.system))?;
    wait(cluster, args.release.waiting.timeout, Output::default())
}

/// Makes the namespace, and lets it have pods that reach into their node, where pod security admission would refuse them.
fn prepare_namespace(cluster: &Cluster) -> Result<()> {
    let name = &cluster.system;
    let labels = json!({"pod-security.kubernetes.io/enforce": "privileged"});
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
    cluster.apply(&format!("/api/v1/namespaces/{name}"), &namespace)
}

/// The oldest server that has what the chart uses.
fn refuse_old_server(cluster: &Cluster) -> Result<()> {
    const OLDEST: u32 = 29;
    let version = cluster.get("/version")?;
    let minor = version.get("minor").and_then(Value::as_str).unwrap_or_default();
    let number: Option<u32> = minor.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok();
    if let Some(found) = number.filter(|n| *n < OLDEST) {
        bail!("the cluster is Kubernetes 1.{found}; the mesh needs 1.{OLDEST} or newer");
    }
    Ok(())
}

/// Applies those of our definitions that are to be applied by the rule of [`crds`].
fn install_crds(cluster: &Cluster, dry_run: bool) -> Result<()> {
    let mut planned = Vec::new();
    let mut blocked = Vec::new();
    for crd in crds::ours()? {
        let name = crd.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
        let path = format!("{}/{name}", crds::PATH);
        let action = crds::decide(&crd, cluster.find(&path)?.as_ref());
        if let Action::Blocked(why) = &action {
            blocked.push(format!("{name}: {why}"));
        }
        planned.push((name, path, crd, action));
    }
    if !blocked.is_empty() {
        bail!(
            "custom resource definitions are in the way:\n  {}\nupdate them with the mesh that they belong to (Istio's \
             chart \"base\"), or remove them if it is gone; --skip-crds leaves them as they are",
            blocked.join("\n  ")
        );
    }
    let mut changed = 0;
    for (name, path, crd, action) in planned {
        match action {
            Action::Create | Action::Update { .. } if dry_run => print(&format!("would apply {name}\n"))?,
            Action::Create | Action::Update { .. } => {
                cluster.apply(&path, &crd).with_context(|| format!("cannot install {name}"))?;
                changed += 1;
            }
            Action::Keep(why) if why.starts_with("newer") || why.contains("another") => {
                print(&format!("left {name} as it is: {why}\n"))?;
            }
            Action::Keep(_) | Action::Blocked(_) => {}
        }
    }
    if changed > 0 {
        print(&format!("applied {changed} custom resource definitions\n"))?;
    }
    Ok(())
}

/// Runs `verify-install`.
pub fn verify(args: &VerifyArgs) -> Result<ExitCode> {
    let cluster = Cluster::connect(&args.waiting.cluster)?;
    wait(&cluster, args.waiting.timeout, args.output)
}

/// Looks again and again until all checks are fine, one has failed for good, or the time is over. A look that fails behind one
/// that did not is repeated as well: the API server may be replaced meanwhile, or its way.
fn settled(
    mut look: impl FnMut() -> Result<Vec<Check>>,
    limit: Duration,
    period: Duration,
    told: impl Fn(String),
) -> Result<Vec<Check>> {
    let began = Instant::now();
    let end = began + limit;
    // A failure may be the moment between two steps of Helm or of a controller.
    let patience = Instant::now() + Duration::from_secs(20).min(limit);
    let mut is_known = false;
    loop {
        match look() {
            Ok(checks) => {
                is_known = true;
                let open: Vec<&Check> = checks.iter().filter(|c| c.state != State::Ready).collect();
                let now = Instant::now();
                let hopeless = open.iter().any(|c| c.state == State::Failed) && now > patience;
                if open.is_empty() || now >= end || hopeless {
                    return Ok(checks);
                }
                let names: Vec<_> = open.iter().map(|c| c.what.as_str()).take(3).collect();
                let ready = checks.len() - open.len();
                told(format!("{ready} of {} ready; waiting for {}", checks.len(), names.join(", ")));
            }
            Err(error) if !is_known || Instant::now() >= end => return Err(error),
            Err(error) => told(format!("{error:#}")),
        }
        // What takes long is asked for seldom.
        std::thread::sleep((began.elapsed() / 5).clamp(period / 8, period));
    }
}

/// Waits until all checks are fine, and shows them.
fn wait(cluster: &Cluster, limit: Duration, output: Output) -> Result<ExitCode> {
    let progress = spinner();
    let end = Instant::now() + limit;
    let checks = settled(|| health::look(cluster), limit, PERIOD, |message| progress.set_message(message));
    let checks = checks.inspect_err(|_| progress.finish_and_clear())?;
    progress.finish_and_clear();
    let ready = checks.iter().all(|c| c.state == State::Ready);
    if let Some(document) = output.document(&json!({"ready": ready, "checks": checks}))? {
        print(&document)?;
        return Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    print(&status::checks(&checks)?)?;
    if ready {
        print("the mesh is ready\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&format!(
        "the mesh is not ready. `culvert verify-install` waits again; `culvert bug-report` collects what is known{}\n",
        if Instant::now() >= end {
            format!(" (waited {} s, --timeout sets it)", limit.as_secs())
        } else {
            String::new()
        }
    ))?;
    Ok(ExitCode::FAILURE)
}

/// Shows that something goes on, on a terminal.
pub fn spinner() -> ProgressBar {
    let progress = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
        progress.set_style(style);
    }
    progress.enable_steady_tick(Duration::from_millis(200));
    progress
}

/// Runs `uninstall`.
pub fn uninstall(args: &UninstallArgs) -> Result<ExitCode> {
    let cluster = Cluster::connect(&args.release.waiting.cluster)?;
    let helm = Helm::find(&args.release.helm, &args.release.waiting.cluster)?;
    if !helm.has_release(&args.release.release)? {
        bail!(
            "there is no release {} in namespace {}; --release and --system-namespace name another",
            args.release.release,
            cluster.system
        );
    }
    if !nodes_parts(&cluster, &args.release.release)?.is_empty() {
        leave(&cluster, args)?;
    }
    helm.uninstall(&args.release.release, args.release.waiting.timeout)?;
    print(&format!("removed release {}\n", args.release.release))?;
    if args.delete_crds {
        for crd in cluster.list(crds::PATH)? {
            let name = crd.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            let ours =
                crd.pointer("/metadata/annotations").and_then(|a| a.get(crds::VERSION_ANNOTATION)).is_some();
            if ours && cluster.delete(&format!("{}/{name}", crds::PATH))? {
                print(&format!("removed {name} and its objects\n"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The nodes' parts of a release, without which captured pods are cut off or in plaintext; a second control plane has none.
fn nodes_parts(cluster: &Cluster, release: &str) -> Result<Vec<String>> {
    let instance = "app.kubernetes.io%2Finstance";
    let path = format!(
        "/apis/apps/v1/namespaces/{}/daemonsets?labelSelector={instance}%3D{release}",
        cluster.system
    );
    let name = |set: &Value| set.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned);
    Ok(cluster.list(&path)?.iter().filter_map(name).collect())
}

/// Makes sure that no pod is in the mesh: what it says would be in plaintext without anybody's word, or, where no agent runs to
/// clean its node up, refused for good.
fn leave(cluster: &Cluster, args: &UninstallArgs) -> Result<()> {
    let labelled =
        || cluster.list(&format!("/api/v1/namespaces?labelSelector={}%3Dambient", MODE.replace('/', "%2F")));
    let names: Vec<String> = labelled()?
        .iter()
        .filter_map(|n| n.pointer("/metadata/name").and_then(Value::as_str).map(str::to_owned))
        .collect();
    if args.remove_labels {
        let with_own = plan::by_own_label(cluster, captured)?;
        if !with_own.is_empty() {
            bail!(
                "pods are in the mesh by a label of their own, which --remove-labels does not take off: {}. Nothing was changed; \
                 kubectl label pod NAME {MODE}- takes one out",
                with_own.join(", ")
            );
        }
        for name in &names {
            let labels = json!({"metadata": {"labels": {MODE: null}}});
            cluster.merge(&format!("/api/v1/namespaces/{name}"), &labels)?;
            print(&format!("took namespace {name} out of the mesh\n"))?;
        }
    }
    let progress = spinner();
    let end = Instant::now() + if args.remove_labels { args.release.waiting.timeout } else { Duration::ZERO };
    loop {
        let captured = all_captured(cluster)?;
        if captured.is_empty() && (names.is_empty() || args.remove_labels) {
            return Ok(());
        }
        if Instant::now() >= end {
            progress.finish_and_clear();
            bail!(
                "namespaces in the mesh: {}; {}, or let --remove-labels do it for the namespaces",
                if names.is_empty() || args.remove_labels { "none".to_owned() } else { names.join(", ") },
                plan::in_need(&captured)
            );
        }
        progress.set_message(format!("{} pods are still captured", captured.len()));
        std::thread::sleep(PERIOD);
    }
}

fn all_captured(cluster: &Cluster) -> Result<Vec<String>> {
    Ok(cluster.list("/api/v1/pods")?.iter().filter_map(captured).collect())
}

/// The name of a pod whose traffic is captured.
fn captured(pod: &Value) -> Option<String> {
    let metadata = pod.get("metadata")?;
    let text = |key: &str| metadata.get(key).and_then(Value::as_str).unwrap_or_default();
    let phase = pod.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default();
    let enabled = metadata.get("annotations")?.get(status::REDIRECTION)?.as_str()? == "enabled";
    (enabled && !["Succeeded", "Failed"].contains(&phase))
        .then(|| format!("{}/{}", text("namespace"), text("name")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        for wrong in ["90", "m", "", "1d", "-1s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_api_server_that_is_away_for_a_moment_ends_no_waiting() {
        let check = |state| Check { what: "a".into(), state, detail: String::new(), remedy: String::new() };
        let (short, long) = (Duration::from_millis(1), Duration::from_secs(60));
        let told = std::cell::RefCell::new(Vec::new());
        let mut answers = vec![
            Ok(vec![check(State::Ready)]),
            Err(anyhow::anyhow!("it is away")),
            Ok(vec![check(State::Waiting)]),
        ];
        let look = || answers.pop().unwrap();
        let checks = settled(look, long, short, |message| told.borrow_mut().push(message)).unwrap();
        assert_eq!(checks[0].state, State::Ready);
        assert_eq!(told.take(), ["0 of 1 ready; waiting for a", "it is away"]);
        // One that was never there, and one that stays away, are said.
        let never = || Err(anyhow::anyhow!("nobody"));
        assert_eq!(settled(never, long, short, |_| ()).unwrap_err().to_string(), "nobody");
        let mut first = Some(vec![check(State::Waiting)]);
        let away = || first.take().ok_or_else(|| anyhow::anyhow!("gone"));
        assert_eq!(settled(away, 20 * short, short, |_| ()).unwrap_err().to_string(), "gone");
    }

    #[test]
    fn a_pod_that_has_ended_holds_nothing_up() {
        let pod = |phase: &str, value: &str| {
            json!({"metadata": {"namespace": "a", "name": "b", "annotations": {status::REDIRECTION: value}},
                   "status": {"phase": phase}})
        };
        assert_eq!(captured(&pod("Running", "enabled")).as_deref(), Some("a/b"));
        assert_eq!(captured(&pod("Succeeded", "enabled")), None);
        assert_eq!(captured(&pod("Running", "pending")), None);
    }
}
