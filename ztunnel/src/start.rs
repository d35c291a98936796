//! Start-up and the end of the process, in order.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use identity::Certificates;
use model::{Change, SpiffeId};
use process::admin as pages;
use process::logs::Logs;
use process::metrics::tcp::TcpMetrics;
use process::metrics::{Registry as Metrics, build_info, register_process};
use process::ports::Ports;
use process::readiness::{Condition, Readiness};
use process::runtimes::{self, Workers};
use process::shutdown::Shutdown;
use source::{ClusterMode, FileMode, Files, Mode, Source, State, Tls, Update};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::cluster::ClusterStatus;
use crate::connections::Registry;
use crate::dns::{DnsMetrics, DnsProxy, DnsSettings, Upstreams};
use crate::node::{EnrolmentChange, Node, Record, Redirection, Work};
use crate::proxy::Proxy;
use crate::proxy::dialer::Tunnels;
use crate::proxy::handshakes::Handshakes;
use crate::proxy::peers::Peers;
use crate::proxy::pod::Room;
use crate::proxy::threads::Threads;
use crate::settings::{Flags, Limits};
use crate::telemetry::Handles;
use crate::verdicts::{self, Verdicts};
use crate::zds::{Here, Zds, ZdsStatus};
use crate::{admin, metrics};

/// How often the metrics of open connections are brought up to date.
const SETTLE_INTERVAL: Duration = Duration::from_secs(5);
/// How long there has to be nothing new before memory is given back.
const QUIET: Duration = Duration::from_secs(5);
const SWEEP_INTERVAL: Duration = Duration::from_secs(120);
const RENEWAL_INTERVAL: Duration = Duration::from_secs(1);
/// For connections that are cut at the end to be reset.
const LAST_MOMENT: Duration = Duration::from_secs(2);
/// For the work on pods that is under way at the end: programs that change rules have their own limit.
const WORK_LIMIT: Duration = Duration::from_secs(30);

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
    let mode = flags.mode()?;
    let shutdown = Shutdown::new(settings.grace);
    shutdown.on_signals().context("signal handlers")?;
    logs.on_hangup().context("signal handlers")?;
    let readiness = Readiness::default();
    let (configured, enrolled) = (readiness.condition("configuration"), readiness.condition("pods"));
    let ports = Ports::bind(settings).await?;

    let registry = Metrics::new();
    let Parts { state, source, enrolments, tls, redirection, cluster } = match &mode {
        Mode::Files(files) => Parts::of_files(flags, files)?,
        Mode::Cluster(cluster) => Parts::of_cluster(flags, cluster, &registry)?,
    };
    let telemetry = TcpMetrics::new(&registry, settings.series_limit);
    let limits = Limits::of_process(flags);
    let verdicts = Verdicts::new(redirection.verdicts(flags.kernel_verdicts));
    let proxy = Arc::new(proxy(state, tls, telemetry, (limits, verdicts), logs, &shutdown, workers));
    let dns = dns(&proxy, &registry);
    let node = Arc::new(Node::new(proxy.clone(), redirection, dns, upstreams(flags)?));

    register_process(&registry);
    build_info(&registry, "ztunnel", env!("CARGO_PKG_VERSION"));
    logs.register(&registry);
    metrics::register(&registry, &proxy, &node);
    if let Some(status) = &cluster {
        status.register(&registry);
    }
    let zds = cluster.as_ref().map(|status| status.zds.clone());
    ports.serve(
        admin::routes(pages::routes("ztunnel", logs, &shutdown), &proxy, &node, cluster),
        pages::metrics_routes(&registry),
        readiness.routes(&shutdown),
    );

    node.set_diagnostics(source.diagnostics());
    let work = Arc::new(Work::default());
    work.add(enrolments);
    work.recheck();
    // Before pods are captured: what captures them has to know of verdicts.
    let looking = node.clone();
    verdicts::keep(&proxy, move || looking.verify_soon()).context("the thread of verdicts")?;
    let pods = follow_pods(flags, mode, zds, (&node, &proxy.state), &work, enrolled, &shutdown);
    keep_up(&proxy);
    tokio::spawn(net::release_code_at_rest(async move { readiness.settled().await }));
    tokio::spawn(follow_trust(proxy.clone(), workers.clone()));
    tokio::spawn(follow(source, proxy.clone(), node.clone(), work.clone(), configured));

    let left = shutdown.finished().await;
    if left > 0 {
        tracing::warn!(connections = left, "the grace period is over; cutting what is left");
    }
    cut_all(&proxy).await;
    // A pod that is being enrolled would be overlooked.
    work.close();
    if tokio::time::timeout(WORK_LIMIT, pods).await.is_err() {
        tracing::error!("the work on pods does not end; what it does now is not cleaned up");
    }
    if flags.cleanup {
        node.clean_up().await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// What goes on beside the connections, as long as the process does.
fn keep_up(proxy: &Arc<Proxy>) {
    tokio::spawn(look_after(proxy.clone()));
    tokio::spawn(proxy.threads.clone().watch());
    tokio::spawn(give_back(proxy.clone()));
}

/// What differs between file mode and a cluster.
struct Parts {
    state: Arc<State>,
    source: Source,
    enrolments: Vec<EnrolmentChange>,
    tls: Tls,
    redirection: Redirection,
    cluster: Option<ClusterStatus>,
}

impl Parts {
    fn of_files(flags: &Flags, files: &FileMode) -> anyhow::Result<Self> {
        let (source, first) = Files::open(&files.config_dir, Some(&flags.node))?;
        let Update { changes, enrolments, .. } = first;
        let state = Arc::new(State::default());
        state.apply(changes);
        state.set_complete();
        let tls = files.tls(&flags.source, &state)?;
        let capture = capture(flags)?;
        let record = Arc::new(Record::open(&flags.source.state_dir, &flags.node)?);
        Ok(Self {
            state,
            source: Source::Files(Box::new(source)),
            enrolments: enrolments.into_iter().map(Into::into).collect(),
            tls,
            redirection: Redirection::Own { capture, record },
            cluster: None,
        })
    }

    fn of_cluster(flags: &Flags, mode: &ClusterMode, registry: &Metrics) -> anyhow::Result<Self> {
        let state = Arc::new(State::default());
        state.apply(vec![Change::SetSettings(mode.defaults().into())]);
        let tls = mode.tls(&flags.source)?;
        let source = mode.source(&flags.source, &flags.node, None, &state, registry)?;
        let status = ClusterStatus { xds: source.status(), zds: Arc::new(ZdsStatus::default()) };
        Ok(Self {
            state,
            source: Source::Xds(Box::new(source)),
            enrolments: Vec::new(),
            tls,
            redirection: Redirection::Agent,
            cluster: Some(status),
        })
    }
}

/// Resets what is still open. Left to the end of the process, it would look as if it had come to its own end.
async fn cut_all(proxy: &Proxy) {
    proxy.verdicts.end().await;
    proxy.registry.cut_all("ztunnel stops");
    let over = async {
        while proxy.registry.open_count() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    // A thread that hangs must not keep the process.
    let _ = tokio::time::timeout(LAST_MOMENT, over).await;
}

fn proxy(
    state: Arc<State>,
    tls: Tls,
    metrics: TcpMetrics,
    (limits, verdicts): (Limits, Verdicts),
    logs: &Logs,
    shutdown: &Shutdown,
    workers: &Workers,
) -> Proxy {
    let server = hbone::ServerSettings::default();
    let transport = hbone::Transport { memory: limits.memory, ..server.transport };
    Proxy {
        state,
        registry: Arc::new(Registry::default()),
        handles: Handles::new(metrics.clone(), workers.handles().len()),
        metrics,
        access: logs.access().clone(),
        tunnels: Tunnels::new(workers.handles().len(), &tls, &limits),
        tls,
        server: hbone::ServerSettings { transport, ..server },
        server_counters: Arc::default(),
        balancer: balance::Balancer::new(balance::Limits::default()),
        hosts: crate::proxy::hosts::Hosts::default(),
        locals: Arc::default(),
        peers: Arc::new(Peers::new(limits.peers)),
        room: Arc::new(Room::new(limits.room)),
        handshakes: Handshakes::new(limits.handshakes),
        limits,
        threads: Arc::new(Threads::new(workers)),
        accepts: Arc::default(),
        verdicts,
        shutdown: shutdown.clone(),
        started: Instant::now(),
    }
}

/// The DNS proxy, which answers from the same snapshots as the data plane.
fn dns(proxy: &Proxy, registry: &Metrics) -> Arc<DnsProxy> {
    let state = proxy.state.clone();
    DnsProxy::new(DnsSettings::default(), move || state.mesh_owned(), DnsMetrics::new(registry))
}

/// Whom the DNS proxy asks for names outside the mesh.
fn upstreams(flags: &Flags) -> anyhow::Result<Arc<Upstreams>> {
    if !flags.dns_upstream.is_empty() {
        return Ok(Arc::new(Upstreams::new(flags.dns_upstream.iter().copied())));
    }
    let text = std::fs::read_to_string(&flags.resolv_conf).with_context(|| {
        format!(
            "{}: the resolvers for names outside the mesh (--dns-upstream names others)",
            flags.resolv_conf.display()
        )
    })?;
    Ok(Arc::new(Upstreams::from_resolv_conf(&text)))
}

/// The back-end that redirects pods' traffic.
fn capture(flags: &Flags) -> anyhow::Result<Arc<dyn capture::Capture>> {
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
    Ok(selected.capture)
}

/// Does the work on pods, and learns of them where the node agent tells. `enrolled` holds when all are served; in a
/// cluster, when the agent has told of all once: what fails there is told to the agent, which tries it again.
///
/// The agent is met once the configuration is there. Until then a pod that starts waits, with a reason that is seen, a pod
/// that runs is refused or served by the ztunnel before, and no name is looked up outside that may be the mesh's.
fn follow_pods(
    flags: &Flags,
    mode: Mode,
    agent: Option<Arc<ZdsStatus>>,
    (node, state): (&Arc<Node>, &Arc<State>),
    work: &Arc<Work>,
    enrolled: Condition,
    shutdown: &Shutdown,
) -> JoinHandle<()> {
    let (node, work) = (node.clone(), work.clone());
    match (mode, agent) {
        (Mode::Cluster(mode), Some(status)) => {
            let here = Here {
                node: flags.node.as_str().into(),
                cluster: mode.cluster.clone(),
                network: mode.network.clone(),
            };
            let zds = Zds::new(flags.zds_socket.clone(), here, work.clone(), status, enrolled);
            let (state, shutdown) = (state.clone(), shutdown.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = shutdown.draining() => return,
                    () = state.completed() => {}
                }
                zds.run(shutdown).await;
            });
            tokio::spawn(node.run(work, |_| ()))
        }
        _ => tokio::spawn(node.run(work, move |node| match node.ready() {
            Ok(()) => enrolled.holds(),
            Err(reason) => enrolled.fails(reason),
        })),
    }
}

/// Puts each change of the configuration in force.
async fn follow(
    mut source: Source,
    proxy: Arc<Proxy>,
    node: Arc<Node>,
    work: Arc<Work>,
    configured: Condition,
) {
    if proxy.state.is_complete() {
        configured.holds();
    } else {
        configured.fails("the control plane has not told yet what there is, and nothing was kept of it");
    }
    while let Some(change) = source.next().await {
        let before = proxy.state.mesh().policy_generation();
        let mesh = proxy.state.apply(change.changes);
        proxy.tls.bundle().set_trust_domains(mesh.settings().trust_domains.clone());
        node.set_diagnostics(source.diagnostics());
        if mesh.policy_generation() != before {
            let cut = proxy.recheck().await;
            if cut > 0 {
                tracing::info!(connections = cut, "cut connections that are no longer allowed");
            }
            work.recheck();
        } else {
            // Where a name or an address leads is no policy.
            proxy.verdicts.recheck().await;
        }
        if !change.enrolments.is_empty() {
            work.add(change.enrolments.into_iter().map(Into::into));
        }
        proxy.balancer.sweep(proxy.started.elapsed(), |key| mesh.service(key).is_some());
        if change.complete && !proxy.state.is_complete() {
            proxy.state.set_complete();
            configured.holds();
            work.recheck();
        }
        tracing::debug!(generation = mesh.generation(), "configuration in force");
        source.applied();
    }
    tracing::error!("the configuration is followed no longer; what is in force stays");
}

/// When the roots change, pooled connections are made anew, which proves both ends to each other again; what is
/// not proved in time is cut. See [`source::Tls`].
// A namespace is compared by its identity; its stock of sockets has no part in that.
#[allow(clippy::mutable_key_type)]
async fn follow_trust(proxy: Arc<Proxy>, workers: Arc<Workers>) {
    let mut generation = proxy.tls.bundle().subscribe();
    while generation.changed().await.is_ok() {
        proxy.tls.roots_changed();
        let in_use: HashSet<_> = proxy
            .tunnels
            .pools()
            .iter()
            .flat_map(hbone::Pool::snapshot)
            .filter(|c| c.streams > 0)
            .map(|c| c.key)
            .collect();
        let retired = proxy.tunnels.retire(|_| true);
        for (key, worker) in in_use.iter().zip(workers.handles().iter().cycle()) {
            let (proxy, key) = (proxy.clone(), key.clone());
            worker.spawn(async move {
                if let Err(error) = proxy.tunnels.here().warm(&key).await {
                    tracing::warn!(to = %key.to, %error, "the peer has not proved itself under the new roots");
                }
            });
        }
        tracing::info!(retired, proving_anew = in_use.len(), "the trust bundle changed");
        tokio::time::sleep(source::REAUTHENTICATION).await;
        let cut = proxy.recheck().await;
        if cut > 0 {
            tracing::warn!(connections = cut, "cut connections whose peer is no longer trusted");
        }
    }
}

/// What has to be done now and then.
async fn look_after(proxy: Arc<Proxy>) {
    let mut settle = tokio::time::interval(SETTLE_INTERVAL);
    let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
    let mut renewals = tokio::time::interval(RENEWAL_INTERVAL);
    let mut certificates = Renewals::default();
    loop {
        tokio::select! {
            _ = settle.tick() => {
                proxy.registry.settle();
                proxy.handles.forget();
                proxy.locals.tidy();
            }
            _ = renewals.tick() => certificates.follow(&proxy),
            _ = sweep.tick() => {
                let mesh = proxy.state.mesh_owned();
                proxy.balancer.sweep(proxy.started.elapsed(), |key| mesh.service(key).is_some());
            }
        }
    }
}

/// Gives back the memory that a burst of connections, or a new configuration, needed for a moment, once there has been no other
/// for [`QUIET`].
async fn give_back(proxy: Arc<Proxy>) {
    let (mut seen, mut is_due) = (None, false);
    loop {
        tokio::time::sleep(QUIET).await;
        let now = Some((proxy.registry.last_id(), proxy.state.mesh().generation()));
        if seen != now {
            (seen, is_due) = (now, true);
        } else if std::mem::take(&mut is_due) {
            net::release_free(); // some milliseconds, on a thread that carries no connection
        }
    }
}

/// The certificates in use. A pooled connection shows the one that it was made with, so new tunnels get new
/// connections once there is another.
#[derive(Default)]
struct Renewals {
    renewed: u64,
    serials: HashMap<SpiffeId, String>,
}

impl Renewals {
    fn follow(&mut self, proxy: &Proxy) {
        let counts = proxy.tls.certificates().counts();
        if counts.valid < counts.identities {
            demand(proxy.tls.certificates());
        }
        if counts.renewed_total == self.renewed {
            return;
        }
        self.renewed = counts.renewed_total;
        let serials: HashMap<SpiffeId, String> = proxy
            .tls
            .certificates()
            .status()
            .into_iter()
            .filter_map(|status| Some((status.id, status.certificate?.serial)))
            .collect();
        let old = std::mem::replace(&mut self.serials, serials);
        let unchanged =
            |id: &SpiffeId| old.get(id).is_some_and(|serial| self.serials.get(id) == Some(serial));
        proxy.tunnels.retire(|key| !unchanged(&key.source));
    }
}

/// Has those issued anew that are not valid, which the clock may have made them by a jump. Pooled connections don't:
/// they ask for a certificate when they are made. What failed already is tried again with back-off as it is.
fn demand(certificates: &Arc<Certificates>) {
    for status in certificates.status().into_iter().filter(|s| !s.valid && s.failure.is_none()) {
        let certificates = certificates.clone();
        tokio::spawn(async move {
            // Failures are logged where they happen.
            let _ = tokio::time::timeout(RENEWAL_INTERVAL, certificates.get(&status.id)).await;
        });
    }
}
