//! Start-up and the end of the process, in order.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use balance::Client;
use balance::requests::Origin;
use model::http::WaypointKey;
use model::{Change, Mesh, NetworkAddress};
use process::admin as pages;
use process::logs::Logs;
use process::metrics::{Registry as Metrics, build_info, register_process};
use process::ports::Ports;
use process::readiness::{Condition, Readiness};
use process::runtimes::{self, Workers};
use process::shutdown::{Phase, Shutdown};
use source::{ClusterMode, FileMode, Files, Mode, Source, State, Tls};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Shown};
use crate::deciding::Deciding;
use crate::guards::Guards;
use crate::http::Worker;
use crate::http::decide::Decide;
use crate::http::held::{Held, HeldLimits};
use crate::listen::Front;
use crate::settings::Flags;
use crate::tunnels::{AsWaypoint, Tunnels};
use crate::upstream::{ClusterLimits, Clusters};
use crate::{metrics, telemetry};

/// Runs until a signal, or the admin port, ends the process in good order.
///
/// # Errors
/// What could not be started, and what to do.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let settings = flags.shared.resolve()?;
    let logs = Logs::init(&settings.logs)?;
    // Failing to raise it is no reason not to run; the accept loops live with few.
    if let Err(error) = runtimes::raise_descriptor_limit() {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    let control = runtimes::control_plane().context("control runtime")?;
    let workers = Arc::new(Workers::start(settings.worker_threads).context("data-plane threads")?);
    let result = control.block_on(serve(flags, &settings, &logs, &workers));
    logs.flush();
    control.shutdown_background();
    result
}

async fn serve(
    flags: &Flags,
    settings: &process::settings::Settings,
    logs: &Logs,
    workers: &Arc<Workers>,
) -> anyhow::Result<()> {
    let mode = Mode::of(&flags.source)?;
    let shutdown = Shutdown::new(settings.grace);
    shutdown.on_signals().context("signal handlers")?;
    logs.on_hangup().context("signal handlers")?;
    let readiness = Readiness::default();
    let (configured, certified) = (readiness.condition("configuration"), readiness.condition("certificate"));
    let ports = Ports::bind(settings).await?;
    let listener = listen(flags.hbone_address)?;

    let registry = Metrics::new();
    let Parts { state, source, tls, mut shown } = match &mode {
        Mode::Files(files) => Parts::of_files(flags, files)?,
        Mode::Cluster(cluster) => Parts::of_cluster(flags, cluster, &registry)?,
    };
    shown.diagnostics = Arc::new(source.diagnostics().into());
    shown.listen = Some(flags.hbone_address);
    let network = flags.source.network.as_str().into();
    let tunnels = Tunnels::new(workers.handles().len(), &tls);
    let clusters = Clusters::new(
        origin(flags, &state.mesh()),
        ClusterLimits::default(),
        dialers(flags, &state, &tunnels),
    );
    let collectors =
        workers.handles().first().map(|thread| Arc::new(telemetry::ThroughMesh::new(thread.clone())));
    let told = telemetry(flags, settings, logs, &registry, collectors.clone());
    let inside = collectors.clone().map(|collectors| collectors as Arc<dyn telemetry::Connect>);
    let guards = Guards::new(tokio::runtime::Handle::current(), inside);
    let guards = Arc::new(guards.context("cryptography for issuers' keys")?);
    guards.register(&registry);
    let deciding = Deciding::new(flags.gateway.clone(), network, clusters, told, guards);
    collectors.iter().for_each(|collectors| collectors.follow(&deciding));
    deciding.update(state.mesh_owned());
    let front = Arc::new(Front::new(state.clone(), deciding.clone(), tls, shutdown.clone(), flags));

    register_process(&registry);
    build_info(&registry, "waypoint", env!("CARGO_PKG_VERSION"));
    logs.register(&registry);
    metrics::register(&registry, &front, &tunnels);
    ports.serve(
        admin::routes(pages::routes("waypoint", logs, &shutdown), &front, &shown),
        pages::metrics_routes(&registry),
        readiness.routes(&shutdown),
    );
    // As much as tunnels may hold beside it.
    let held = Held::new(HeldLimits::of(hbone::Memory::of_process().limit()));
    let engines = start_workers(flags, &front, workers, &listener, &held).await?;
    drop(listener);
    telemetry::register_engine(&registry, &engines, &held);

    reopen_on_hangup(&front).context("signal handlers")?;
    tokio::spawn(follow(source, state, front.clone(), shown, configured, flags.clone()));
    tokio::spawn(prove(front.clone(), tunnels.clone(), certified));
    tokio::spawn(follow_trust(front.clone(), tunnels));
    tokio::spawn(net::release_code_at_rest(async move { readiness.settled().await }));
    close_in_time(&front, flags.drain_delay).await;
    let left = shutdown.finished().await;
    if left > 0 {
        tracing::warn!(connections = left, "the grace period is over; cutting what is left");
    }
    tracing::info!("stopped");
    Ok(())
}

/// What differs between file mode and a cluster.
struct Parts {
    state: Arc<State>,
    source: Source,
    tls: Tls,
    shown: Shown,
}

impl Parts {
    fn of_files(flags: &Flags, files: &FileMode) -> anyhow::Result<Self> {
        let (source, first) = Files::open(&files.config_dir, None)?;
        let state = Arc::new(State::default());
        state.apply(first.changes);
        state.set_complete();
        let tls = files.tls(&flags.source, &state)?;
        Ok(Self { state, source: Source::Files(Box::new(source)), tls, shown: Shown::default() })
    }

    fn of_cluster(flags: &Flags, mode: &ClusterMode, registry: &Metrics) -> anyhow::Result<Self> {
        let state = Arc::new(State::default());
        state.apply(vec![Change::SetSettings(mode.defaults().into())]);
        let tls = mode.tls(&flags.source)?;
        let source = mode.source(&flags.source, &flags.node, Some(&flags.gateway), &state, registry)?;
        let xds = source.status();
        xds.register(registry);
        let shown = Shown { xds: Some(xds), ..Shown::default() };
        Ok(Self { state, source: Source::Xds(Box::new(source)), tls, shown })
    }
}

fn dialers(flags: &Flags, state: &Arc<State>, tunnels: &Tunnels) -> Arc<AsWaypoint> {
    let (state, gateway) = (state.clone(), flags.gateway.clone());
    let identity = move || identity(&state.mesh(), &gateway);
    Arc::new(AsWaypoint { tunnels: tunnels.clone(), identity: Box::new(identity) })
}

/// The identity of a waypoint: that of the service account with the Gateway's name.
pub(crate) fn identity(mesh: &Mesh, own: &WaypointKey) -> Option<model::SpiffeId> {
    let domain = mesh.settings().trust_domains.own.clone();
    model::SpiffeId::new(domain, own.namespace.clone(), own.name.clone()).ok()
}

/// Where this waypoint is: as its own pod, or, where the mesh does not know that, as other pods of its node.
fn origin(flags: &Flags, mesh: &Mesh) -> Origin {
    let network: model::Str = flags.source.network.as_str().into();
    let address = flags.source.instance_ip.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED.into());
    let own = mesh.workload_at(&NetworkAddress::new(network.clone(), address));
    let beside = || mesh.workloads().find(|w| !flags.node.is_empty() && **w.node() == *flags.node);
    let client = match own.or_else(beside) {
        Some(workload) => Client::new(workload, address),
        None => Client {
            locality: Arc::default(),
            node: flags.node.as_str().into(),
            cluster: flags.source.cluster_id.as_str().into(),
            network,
            address,
        },
    };
    Origin { client, labels: own.map(|w| w.labels.clone()).unwrap_or_default() }
}

fn telemetry(
    flags: &Flags,
    settings: &process::settings::Settings,
    logs: &Logs,
    registry: &Metrics,
    collectors: Option<Arc<telemetry::ThroughMesh>>,
) -> Arc<telemetry::Telemetry> {
    let told = telemetry::Settings {
        network: flags.source.network.as_str().into(),
        access_log: None,
        series: settings.series_limit,
        name: flags.gateway.name.clone(),
        namespace: flags.gateway.namespace.clone(),
    };
    // Spans are sent on this runtime, which is not the data plane's.
    let here = tokio::runtime::Handle::current();
    let exporters = collectors.map_or_else(telemetry::Exporters::none, |connect| {
        telemetry::Exporters::new(here, connect, &told.name, &told.namespace)
    });
    telemetry::Telemetry::new(registry, told, logs.writer().clone(), exporters)
}

fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let netns = net::Netns::current().context("the network namespace")?;
    let options = net::ListenOptions::default();
    net::listen(&netns, address, &options)
        .with_context(|| format!("tunnels at {address} (--hbone-address chooses another)"))
}

/// Every thread of the data plane accepts from the same socket.
async fn start_workers(
    flags: &Flags,
    front: &Arc<Front>,
    workers: &Workers,
    listener: &TcpListener,
    held: &Arc<Held>,
) -> anyhow::Result<Vec<Arc<crate::http::stats::Stats>>> {
    let mut engines = Vec::new();
    for thread in workers.handles() {
        let shared = listener.as_fd().try_clone_to_owned().context("the listener")?;
        let listener = {
            let _context = thread.enter();
            TcpListener::from_std(shared.into()).context("the listener")?
        };
        let decide: Arc<dyn Decide> = Arc::new(front.deciding.clone());
        let (engine, drain, held) = (flags.engine(), front.closed.clone(), Arc::clone(held));
        let made = thread.spawn(async move { Worker::beside(decide, engine, drain, held) });
        let worker = made.await.context("a data-plane thread")?;
        engines.push(worker.stats.clone());
        thread.spawn(front.clone().accept(listener, worker));
    }
    Ok(engines)
}

/// Opens the files of access logs again at SIGHUP, as [`Logs::on_hangup`] does the program's own.
fn reopen_on_hangup(front: &Arc<Front>) -> std::io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let front = front.clone();
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            front.deciding.telemetry().reopen_logs();
        }
    });
    Ok(())
}

/// Puts each change of the configuration in force.
async fn follow(
    mut source: Source,
    state: Arc<State>,
    front: Arc<Front>,
    shown: Shown,
    configured: Condition,
    flags: Flags,
) {
    if state.is_complete() {
        configured.holds();
    } else {
        configured.fails("the control plane has not told yet what there is, and nothing was kept of it");
    }
    while let Some(change) = source.next().await {
        let mesh = state.apply(change.changes);
        front.tls.bundle().set_trust_domains(mesh.settings().trust_domains.clone());
        front.deciding.clusters().set_origin(origin(&flags, &mesh));
        front.deciding.update(mesh);
        if let Ok(mut diagnostics) = shown.diagnostics.lock() {
            *diagnostics = source.diagnostics();
        }
        if change.complete && !state.is_complete() {
            state.set_complete();
            configured.holds();
        }
        source.applied();
    }
    tracing::error!("the source of configuration has ended; what is in force stays");
}

/// Has the waypoint's certificate made before it is needed, and retires tunnels that were opened with an older one.
async fn prove(front: Arc<Front>, tunnels: Tunnels, certified: Condition) {
    front.state.completed().await;
    let mut renewed = front.tls.certificates().counts().renewed_total;
    let mut every = tokio::time::interval(Duration::from_secs(1));
    let mut held = false;
    loop {
        every.tick().await;
        let Some(own) = front.deciding.identity(&front.state.mesh()) else {
            certified.fails("the Gateway's names make no identity");
            continue;
        };
        let counts = front.tls.certificates().counts();
        if !held || counts.valid < counts.identities {
            // Failures are tried again with back-off, and logged where they happen.
            match tokio::time::timeout(Duration::from_secs(10), front.tls.certificates().get(&own)).await {
                Ok(Ok(_)) => {
                    certified.holds();
                    held = true;
                }
                Ok(Err(error)) if !held => certified.fails(error.to_string()),
                Err(_) if !held => certified.fails("the CA does not answer"),
                Ok(Err(_)) | Err(_) => {}
            }
        }
        let now = front.tls.certificates().counts().renewed_total;
        if std::mem::replace(&mut renewed, now) != now {
            tunnels.retire(|_| true);
        }
    }
}

/// After a change of the roots all peers prove themselves anew: tunnels go over new connections from then on.
async fn follow_trust(front: Arc<Front>, tunnels: Tunnels) {
    let mut roots = front.tls.bundle().subscribe();
    while roots.changed().await.is_ok() {
        front.tls.roots_changed();
        let retired = tunnels.retire(|_| true);
        tracing::info!(retired, "the trust bundle changed");
    }
}

/// Once the drain begins: not ready, but connections are still taken until others have heard of it; then GOAWAY.
async fn close_in_time(front: &Arc<Front>, delay: Duration) {
    let (shutdown, closed): (Shutdown, CancellationToken) = (front.shutdown.clone(), front.closed.clone());
    let held = shutdown.hold();
    tokio::spawn(async move {
        shutdown.draining().await;
        if let Phase::Draining { .. } = shutdown.phase() {
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = shutdown.aborting() => {}
            }
        }
        closed.cancel();
        drop(held);
    });
}
