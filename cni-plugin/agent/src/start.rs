//! Start-up and the end of the process, in order: what was captured is captured again before anybody is asked anything,
//! then ztunnels may connect, then the plugin is answered, then the cluster is followed.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use capture::{Capture, NodeProbes, Selected};
use net::Netns;
use process::logs::Logs;
use process::metrics::{Registry, build_info, register_process};
use process::readiness::Readiness;
use process::runtimes;
use process::settings::Settings;
use process::shutdown::Shutdown;
use process::{admin as pages, http};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::chain::Chain;
use crate::cluster::Cluster;
use crate::install::Installation;
use crate::kubernetes::{self, Kubernetes};
use crate::metrics::{self, Metrics};
use crate::node::{Node, Parts, Times};
use crate::plugin;
use crate::probes::{Finder, KubeletProbes};
use crate::record::Record;
use crate::settings::{Command, Flags};
use crate::zds::Ztunnels;

/// The taint of a node whose pods can't be put into the mesh yet.
pub const TAINT: &str = "culvert.dev/agent-not-ready";
/// Between attempts to change the node's taints.
const TAINT_PAUSE: Duration = Duration::from_secs(2);
/// For a ztunnel to connect, before a node that is ready otherwise loses its taint.
const TAINT_WAIT: Duration = Duration::from_secs(20);

/// Runs until a signal, or the admin port, ends the process in good order; or cleans up.
///
/// # Errors
/// What could not be started, and what to do.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let settings = flags.shared.resolve()?;
    let logs = Logs::init(&settings.logs)?;
    if let Err(error) = runtimes::raise_descriptor_limit() {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    let runtime = runtimes::control_plane().context("runtime")?;
    let result = match flags.command {
        Some(Command::Cleanup) => runtime.block_on(clean_up(flags)),
        None => runtime.block_on(serve(flags, &settings, &logs)),
    };
    logs.flush();
    runtime.shutdown_background();
    result
}

async fn serve(flags: &Flags, settings: &Settings, logs: &Logs) -> anyhow::Result<()> {
    let shutdown = Shutdown::new(settings.grace);
    shutdown.on_signals().context("signal handlers")?;
    logs.on_hangup().context("signal handlers")?;
    let readiness = Readiness::default();
    let (in_place, watched) = (readiness.condition("CNI plugin"), readiness.condition("Kubernetes"));
    let ports = Ports::bind(settings).await?;

    let registry = Registry::new();
    let counters = Metrics::new(&registry);
    let client = kubernetes::client(flags.kubeconfig.as_deref()).await.context("Kubernetes")?;
    let kubernetes = Kubernetes::new(client, &flags.node);
    let (cluster, ztunnels) = (Arc::new(Cluster::default()), Ztunnels::default());
    let (capture, chosen) = capture(flags)?;
    // Before pods are captured again: what captures them has to know of verdicts.
    verdicts(flags, &*capture);
    let node = Arc::new(Node::new(Parts {
        capture,
        ztunnels: ztunnels.clone(),
        record: Record::open(&flags.state_dir).context("--state-dir")?,
        cluster: cluster.clone(),
        api: Arc::new(kubernetes.clone()),
        places: flags.places(),
        probes: probes(flags)?,
        metrics: counters.clone(),
        proc: "/proc".into(),
        times: Times::default(),
    }));
    node.restore().await;

    register_process(&registry);
    build_info(&registry, "culvert-node", env!("CARGO_PKG_VERSION"));
    logs.register(&registry);
    metrics::register(&registry, &node, &ztunnels);
    // The port is the node's, and any process's there: what changes something is behind a socket of root's.
    let means = Means::default();
    let shown = with_pods(pages::shown("culvert-node", logs), &node, &means);
    ports.serve(shown, pages::metrics_routes(&registry), readiness.routes(&shutdown));
    let admin = with_pods(pages::routes("culvert-node", logs, &shutdown), &node, &means);
    let surveyed = tokio::task::spawn_blocking(move || means.set(survey(&chosen)));
    serve_admin(flags, admin)?;

    make_room(&flags.zds_socket)?;
    tokio::spawn(ztunnels.listen(&flags.zds_socket).context("--zds-socket")?);
    let requests = plugin::routes(&node, &readiness, &counters);
    // What changes the node: it ends before that is cleaned up, or it would put everything back.
    let mut work = JoinSet::new();
    work.spawn(plugin::listen(&flags.plugin_socket, requests).context("--plugin-socket")?);
    work.spawn(installation(flags, counters)?.keep(in_place));
    follow(flags, &kubernetes, &cluster, &readiness, &ztunnels);
    work.spawn(node.clone().run(move |_| {
        if cluster.view().is_complete() {
            watched.holds();
        }
    }));

    let gone = follow_own(flags, &kubernetes);
    tokio::spawn(net::release_code_at_rest(async move {
        // That it is over is all that is asked of it.
        let _ = surveyed.await;
        readiness.settled().await;
        // The kernel's type information was read whole, which takes some 30 MiB.
        net::release_free();
    }));

    shutdown.finished().await;
    stop(flags, gone.load(Ordering::Relaxed), &node, work).await
}

/// Cleans the node up, if that is asked for or nobody else will: `last`.
async fn stop(flags: &Flags, last: bool, node: &Node, mut work: JoinSet<()>) -> anyhow::Result<()> {
    if last {
        tracing::info!("the DaemonSet is deleted: this is the last agent of this node");
    }
    if flags.cleanup || last {
        work.shutdown().await;
        // What was begun for single pods, too: else it would write again what is taken away.
        node.stop().await;
        clean_up(flags).await?;
    }
    tracing::info!("stopped; the pods stay as they are");
    Ok(())
}

/// Serves what changes the node, behind a socket of root's.
fn serve_admin(flags: &Flags, admin: http::Routes) -> anyhow::Result<()> {
    make_room(&flags.plugin_socket)?;
    let socket = plugin::bind(&flags.admin_socket()).context("admin socket, beside --plugin-socket")?;
    tokio::spawn(http::serve_unix(socket, admin, http::Limits::default()));
    Ok(())
}

/// What this node has for capture, once that was tried.
type Means = Arc<OnceLock<Value>>;

fn with_pods(routes: http::Routes, node: &Arc<Node>, means: &Means) -> http::Routes {
    let (node, means) = (node.clone(), means.clone());
    let routes = routes.get("/pods", "the pods of this node", move |_| {
        let response = http::Response::json(&node.dump());
        async { response }
    });
    routes.get("/capture", "what this node has for capture, as it was tried at the start", move |_| {
        let response = http::Response::json(means.get().unwrap_or(&Value::Null));
        async { response }
    })
}

/// Every back-end of capture, and what it is called here or lacks.
fn survey(chosen: &Selected) -> Value {
    let row = |(backend, found): (capture::Backend, Result<String, capture::Missing>)| {
        let (works, what) = match found {
            Ok(version) => (true, version),
            Err(missing) => (false, missing.to_string()),
        };
        json!({ "backend": backend.as_str(), "works": works, "what": what })
    };
    let all: Vec<Value> = capture::survey(&capture::Tools::default()).into_iter().map(row).collect();
    json!({ "chosen": chosen.capture.backend().as_str(), "reason": chosen.reason, "tried": all })
}

/// Follows the cluster, and says when this node is ready for pods.
fn follow(
    flags: &Flags,
    kubernetes: &Kubernetes,
    cluster: &Arc<Cluster>,
    readiness: &Readiness,
    ztunnels: &Ztunnels,
) {
    let (watching, pods, name) = (kubernetes.clone(), cluster.clone(), flags.node.clone());
    tokio::spawn(async move { watching.follow_pods(name, &pods).await });
    let (watching, namespaces) = (kubernetes.clone(), cluster.clone());
    tokio::spawn(async move { watching.follow_namespaces(&namespaces).await });
    let (kubernetes, readiness, ztunnels) = (kubernetes.clone(), readiness.clone(), ztunnels.clone());
    let (name, keys, first) = (flags.node.clone(), flags.remove_taints.clone(), flags.taint_at_start);
    tokio::spawn(async move {
        let is_ready = || readiness.is_ready() && ztunnels.connected() > 0;
        if first && !is_ready() {
            taint(&kubernetes, &name, &[TAINT], &[]).await;
        }
        let until = async |done: &(dyn Fn() -> bool + Sync)| {
            while !done() {
                tokio::time::sleep(TAINT_PAUSE / 4).await;
            }
        };
        until(&|| readiness.is_ready()).await;
        // Pods of the mesh wait for a ztunnel anyhow. The cluster's DNS must not: without it ztunnel may not find the control
        // plane, and until it has, it serves nobody.
        if tokio::time::timeout(TAINT_WAIT, until(&is_ready)).await.is_err() {
            tracing::warn!(
                "no ztunnel is connected yet; the node's taint goes all the same, and pods wait for it"
            );
        }
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        taint(&kubernetes, &name, &[], &keys).await;
    });
}

/// Follows the DaemonSet that this agent is of, if it is told: whether that is gone.
fn follow_own(flags: &Flags, kubernetes: &Kubernetes) -> Arc<AtomicBool> {
    let gone = Arc::new(AtomicBool::new(false));
    if let Some(name) = flags.daemon_set.clone() {
        let (kubernetes, namespace, gone) = (kubernetes.clone(), flags.namespace.clone(), gone.clone());
        tokio::spawn(async move { kubernetes.follow_own(namespace, name, &gone).await });
    }
    gone
}

/// Changes the node's taints, until it works.
async fn taint(kubernetes: &Kubernetes, node: &str, add: &[&str], remove: &[&str]) {
    loop {
        match kubernetes.taint(node, add, remove).await {
            Ok(true) => {
                tracing::info!(node, ?add, ?remove, "changed the node's taints");
                return;
            }
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(node, ?add, ?remove, %error, "the node's taints can't be changed; trying again");
            }
        }
        tokio::time::sleep(TAINT_PAUSE).await;
    }
}

/// Takes everything off this node.
async fn clean_up(flags: &Flags) -> anyhow::Result<()> {
    let counters = Metrics::new(&Registry::new());
    // First, so that no more pods are added.
    installation(flags, counters)?.remove().context("the CNI plugin")?;
    let record = Record::open(&flags.state_dir).context("--state-dir")?;
    let client = kubernetes::client(flags.kubeconfig.as_deref()).await;
    let kubernetes = client.map(|client| Kubernetes::new(client, &flags.node));
    if let Err(error) = &kubernetes {
        tracing::warn!(%error, "the pods' annotations stay");
    }
    let (capture, _) = capture(flags)?;
    let left = crate::node::clean_up(&record, capture, kubernetes.as_ref().ok()).await;
    if let Err(error) = capture::remove_verdicts() {
        tracing::warn!(%error, "what is left of verdicts stays, without a lease");
    }
    if let Some(probes) = probes(flags)? {
        probes.remove().context("the exemption of probes")?;
    }
    for socket in [&flags.plugin_socket, &flags.admin_socket(), &flags.zds_socket] {
        // Nobody listens there any more.
        let _ = std::fs::remove_file(socket);
    }
    anyhow::ensure!(
        left == 0,
        "the redirection of {left} pods could not be removed: their traffic is refused"
    );
    record.erase().context("the record of pods")?;
    for directory in &flags.ztunnel_dirs {
        empty(directory).with_context(|| format!("--ztunnel-dirs: {}", directory.display()))?;
    }
    tracing::info!("nothing is left on this node");
    Ok(())
}

/// Deletes what is in a directory, which may be a mount of its own.
fn empty(directory: &Path) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() { std::fs::remove_dir_all(path)? } else { std::fs::remove_file(path)? }
    }
    Ok(())
}

fn installation(flags: &Flags, metrics: Metrics) -> anyhow::Result<Installation> {
    let chain = Chain::new(&flags.cni_conf_dir, &flags.plugin_socket, &flags.exclude_namespaces);
    let source = flags.plugin_source().context("--plugin-binary")?;
    Ok(Installation::new(&source, &flags.cni_bin_dir, &flags.cni_conf_dir, chain, metrics))
}

/// The back-end that redirects pods' traffic.
fn capture(flags: &Flags) -> anyhow::Result<(Arc<dyn Capture>, Selected)> {
    let wanted = match flags.capture.as_str() {
        "auto" => None,
        name => Some(name.parse::<capture::Backend>().context("--capture")?),
    };
    let selected = capture::select(wanted, &capture::Tools::default())?;
    tracing::info!(
        backend = selected.capture.backend().as_str(),
        version = selected.capture.version(),
        reason = selected.reason,
        "capture"
    );
    Ok((selected.capture.clone(), selected))
}

/// Has pods prepared for connections that no proxy carries, or takes away what was prepared.
fn verdicts(flags: &Flags, capture: &dyn Capture) {
    let prepared = if flags.kernel_verdicts { capture.prepare_verdicts() } else { Ok(false) };
    match prepared {
        Ok(true) => tracing::info!("connections within the node may pass ztunnel by (nodeLocal: kernel)"),
        Ok(false) => {
            if flags.kernel_verdicts {
                let backend = capture.backend().as_str();
                tracing::warn!(
                    backend,
                    "--kernel-verdicts needs capture by ebpf: nodeLocal: kernel is direct"
                );
            }
            match capture::remove_verdicts() {
                Ok(true) => tracing::info!("no connection passes ztunnel by any more"),
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "what is left of verdicts stays, without a lease"),
            }
        }
        // What an earlier agent prepared stays, and a ztunnel may write verdicts for it.
        Err(error) => tracing::error!(
            %error,
            "nodeLocal: kernel is not kept up to date on this node: pods that come are direct; it is tried again each minute"
        ),
    }
}

/// The exemption of probes, where nft is there.
fn probes(flags: &Flags) -> anyhow::Result<Option<KubeletProbes>> {
    let nat = match NodeProbes::find(&capture::Tools::default()) {
        Ok(nat) => nat,
        Err(missing) => {
            tracing::error!(%missing, "the kubelet's probes are not exempt: policies decide over them");
            return Ok(None);
        }
    };
    let netns = Netns::current().context("the node's network namespace")?;
    if Netns::of_process(1).is_ok_and(|first| !first.same(&netns)) {
        tracing::warn!(
            "not in the network namespace of the first process: is hostNetwork (or hostPID) missing?"
        );
    }
    let finder = Finder {
        proc: "/proc".into(),
        cgroups: "/sys/fs/cgroup".into(),
        given: flags.kubelet_cgroup.clone(),
    };
    Ok(Some(KubeletProbes::new(nat, netns, finder)))
}

/// Makes the directory of a socket. A new one is root's alone.
fn make_room(socket: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let Some(directory) = socket.parent() else { return Ok(()) };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.with_context(|| directory.display().to_string())
}

/// The local ports. Bound before anything else, so that a taken one is told at once.
struct Ports {
    admin: TcpListener,
    metrics: TcpListener,
    readiness: TcpListener,
}

impl Ports {
    async fn bind(settings: &Settings) -> anyhow::Result<Self> {
        async fn on(what: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
            let listening = http::listen(address).await;
            listening.with_context(|| format!("{what} port (--{what}-address chooses another)"))
        }
        Ok(Self {
            admin: on("admin", settings.admin).await?,
            metrics: on("metrics", settings.metrics).await?,
            readiness: on("readiness", settings.readiness).await?,
        })
    }

    fn serve(self, admin: http::Routes, metrics: http::Routes, readiness: http::Routes) {
        tokio::spawn(http::serve(self.admin, admin, pages::limits()));
        tokio::spawn(http::serve(self.metrics, metrics, http::Limits::default()));
        tokio::spawn(http::serve(self.readiness, readiness, http::Limits::default()));
    }
}
