//! Start-up and the end of the process, in order.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use config::compile::{self, Origin};
use identity::Clock;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use model::TrustDomains;
use process::http::{self, Routes};
use process::logs::{LogSettings, Logs};
use process::metrics::{Handle, Histogram, Registry as Metrics, build_info, register_process};
use process::readiness::Readiness;
use process::shutdown::Shutdown;
use process::{admin as pages, runtimes};
use rustls::RootCertStore;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;
use xds::server::{Config as XdsConfig, Server};

use crate::alive::{Nodes, Ztunnels};
use crate::ca::{Account, Authenticator, Ca, CaSettings, KubeReviewer, Namespaces, Proxy, service_names};
use crate::debug::Views;
use crate::gateways::Gateways;
use crate::in_force::InForce;
use crate::leader::Election;
use crate::metrics::{self, Streams};
use crate::pods::PodTable;
use crate::push::{Exceptions, Push, TYPES};
use crate::registry::{self, Ask, Committed, Overview, Registry};
use crate::serve::{self, NodeProxies, Port, Proving, connections};
use crate::settings::Flags;
use crate::source::{SILENCE, Source, Watches};
use crate::status::exchange::{Exchange, Keys};
use crate::status::peers::{Peers, Reach};
use crate::status::{Followers, Keeper, Writer};
use crate::trusted;
use crate::trusting::{Bundles, Trusting};
use crate::waypoints::{self, Deployer, Overrides};
use crate::webhook::{self, Webhook, bundle};

/// HTTP/2 pings: they end the connections of proxies that are gone.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Streams of one connection: the mesh's configuration, and certificates of a node's pods.
const MOST_STREAMS: u32 = 128;
/// What lies in memory of a request that waits for its turn: thousands of proxies come back at once, and each has a few MB
/// to say.
const WINDOW: u32 = 64 << 10;
/// After it is told to end, for others to learn that it does: new streams still come until then.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Where proxies of the cluster find the control plane, at its Service.
const XDS_PORT: u16 = 15012;
/// How long the API server may take to take a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// Runs until a signal, or the admin port, ends the process in good order.
///
/// # Errors
/// What could not be started, and what to do.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let mut shared = flags.shared.clone();
    // As istiod's, where monitoring looks for it.
    shared.metrics_address.get_or_insert_with(|| "[::]:15014".to_owned());
    let settings = shared.resolve()?;
    let logs = Logs::init(&LogSettings { filter: filter(&settings.logs.filter), ..settings.logs.clone() })?;
    if let Err(error) = runtimes::raise_descriptor_limit() {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    // `kube` asks for it by name of the process; somebody may have set it before.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(runtimes::processors().clamp(2, 16))
        .max_blocking_threads(16)
        .thread_name("culvertd")
        .enable_all()
        .build()
        .context("runtime")?;
    let result = runtime.block_on(serve(flags, &settings, &logs));
    logs.flush();
    runtime.shutdown_background();
    result
}

/// The API server, as the kubeconfig says or as a pod finds it.
///
/// # Errors
/// The kubeconfig can't be read, or this is no pod.
pub async fn client(flags: &Flags) -> anyhow::Result<Client> {
    let mut config = match &flags.kubeconfig {
        Some(path) => {
            let file =
                Kubeconfig::read_from(path).with_context(|| format!("{} (--kubeconfig)", path.display()))?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
        }
        None => kube::Config::incluster()
            .context("no API server: this is no pod; outside a cluster say --kubeconfig FILE")?,
    };
    // A server that takes connections and says nothing is not waited for for ever.
    (config.connect_timeout, config.read_timeout) =
        (Some(CONNECT), Some(silence(flags).max(SILENCE) + CONNECT));
    Ok(Client::try_from(config)?)
}

fn silence(flags: &Flags) -> Duration {
    Duration::from_secs(flags.api_server_silence.max(1))
}

/// The ports, bound before anything else: a second process must not get as far as leading.
struct Ports {
    grpc: TcpListener,
    webhook: TcpListener,
    admin: TcpListener,
    metrics: TcpListener,
    readiness: TcpListener,
}

impl Ports {
    async fn bind(flags: &Flags, settings: &process::settings::Settings) -> anyhow::Result<Self> {
        let bind = async |what: &str, address| {
            http::listen(address).await.with_context(|| format!("the port for {what}, {address}"))
        };
        Ok(Self {
            grpc: bind("xDS and the CA", flags.grpc_address).await?,
            webhook: bind("the webhook", flags.webhook_address).await?,
            admin: bind("the admin pages", settings.admin).await?,
            metrics: bind("metrics", settings.metrics).await?,
            readiness: bind("readiness", settings.readiness).await?,
        })
    }
}

/// The filter without what the client of the API server warns of by itself: each question for a kind that is not installed, whose
/// answer is no object. What fails of its calls is said where they are made.
fn filter(asked: &str) -> String {
    let is_asked_for = ["kube_client", "debug", "trace"].iter().any(|word| asked.contains(word));
    // What is off stays so.
    let is_off = asked.split(',').any(|part| part.trim().eq_ignore_ascii_case("off"));
    if is_asked_for || is_off { asked.to_owned() } else { format!("{asked},kube_client::client=error") }
}

async fn serve(flags: &Flags, settings: &process::settings::Settings, logs: &Logs) -> anyhow::Result<()> {
    let shutdown = Shutdown::new(settings.grace);
    shutdown.on_signals().context("signal handlers")?;
    logs.on_hangup().context("signal handlers")?;
    let readiness = Readiness::default();
    let configured = readiness.condition("the cluster's objects");
    let certified = readiness.condition("the certificate authority");
    let ports = Ports::bind(flags, settings).await?;
    let plane = Plane::new(flags, logs).await?;
    let known = plane.read_cluster(flags)?;
    let leader = plane.lead(flags, &known, &shutdown)?;
    let grpc = plane.serve_proxies(ports.grpc, &known, &shutdown)?;
    plane.serve_webhook(flags, ports.webhook, &known)?;
    metrics::register(&plane.metrics, &known.overview, &known.exceptions);
    let views = plane.views(flags, &known, leader);
    let limits = http::Limits::default();
    tokio::spawn(http::serve(ports.admin, pages::routes("culvertd", logs, &shutdown), pages::limits()));
    tokio::spawn(http::serve(ports.metrics, views.routes(pages::metrics_routes(&plane.metrics)), limits));
    tokio::spawn(http::serve(ports.readiness, readiness.routes(&shutdown), limits));
    tokio::spawn(become_ready(known.first.clone(), plane.ca.clone(), configured, certified));

    shutdown.draining().await;
    let end = async {
        tokio::time::sleep(LAST_WORDS).await;
        // Streams have no end of their own: their proxies go to another control plane, and are told nothing twice there.
        plane.server.disconnect(|_| true);
        if tokio::time::timeout(settings.grace, grpc).await.is_err() {
            tracing::warn!("the grace period is over; cutting what is left");
        }
    };
    tokio::select! {
        () = end => {}
        () = shutdown.aborting() => {}
    }
    tracing::info!("stopped");
    Ok(())
}

/// What all parts share.
struct Plane {
    client: Client,
    trusted: Vec<Account>,
    gateways: Gateways,
    metrics: Metrics,
    ca: Ca,
    server: Server,
    authenticator: Arc<Authenticator>,
}

/// What is known of the cluster, as views that stay up to date.
struct Known {
    pods: PodTable,
    nodes: Nodes,
    ztunnels: Ztunnels,
    namespaces: Namespaces,
    in_force: watch::Receiver<InForce>,
    overview: Arc<Mutex<Overview>>,
    exceptions: Exceptions,
    followers: Followers,
    asks: mpsc::Sender<Ask>,
    /// Whether proxies are told.
    first: watch::Receiver<bool>,
}

impl Plane {
    async fn new(flags: &Flags, logs: &Logs) -> anyhow::Result<Self> {
        let client = client(flags).await?;
        let trusted = trusted::accounts(flags)?;
        trusted::may_serve(&client, flags, &trusted).await?;
        let metrics = Metrics::new();
        register_process(&metrics);
        build_info(&metrics, "culvertd", env!("CARGO_PKG_VERSION"));
        logs.register(&metrics);
        let ca = ca(flags, &trusted, &metrics);
        let reviewer = KubeReviewer::new(client.clone());
        let authenticator = Arc::new(Authenticator::new(reviewer, Clock::system()));
        let gateways = Gateways::default();
        let proxies = NodeProxies::new(authenticator.clone(), flags.cluster_id.clone(), trusted.clone())
            .and_waypoints(gateways.clone());
        let xds = XdsConfig { types: TYPES.to_vec(), ..XdsConfig::default() };
        let server = Server::new(xds, Arc::new(proxies), Streams::new(&metrics));
        Ok(Self { client, trusted, gateways, metrics, ca, server, authenticator })
    }

    /// Starts to read the cluster, to compile it, and to tell proxies.
    fn read_cluster(&self, flags: &Flags) -> anyhow::Result<Known> {
        let map = (flags.namespace.clone(), flags.mesh_config_map.clone());
        let (source, feed) = Source::new(self.client.clone(), map.clone(), Watches::new(&self.metrics));
        let source = source.with_silence(silence(flags));
        source.start_first();
        let settings = registry::Settings {
            options: options(flags),
            settings: map,
            revision: flags.revision.clone(),
            own_namespaces: trusted::namespaces(flags, &self.trusted),
            settings_optional: flags.mesh_config_optional,
        };
        let others = on_this_runtime(move || source.start_others());
        let registry = Registry::new(settings, feed.relist.clone(), Box::new(others));
        let registry = registry.telling(self.gateways.clone());
        let (asks, asked) = mpsc::channel(4);
        let (given_out, first) = watch::channel(false);
        registry.pods().follow(self.trusted.clone());
        let known = Known {
            pods: registry.pods(),
            nodes: registry.nodes(),
            ztunnels: Ztunnels::new(registry.pods(), registry.nodes(), Some(self.client.clone())),
            namespaces: registry.namespaces(),
            in_force: registry.in_force(),
            overview: registry.overview(),
            exceptions: Exceptions::default(),
            followers: Followers::default(),
            asks,
            first,
        };
        let delay = self.metrics.latencies::<()>(
            "culvertd_commit_delay_seconds",
            "From an event of the API server until what follows is given to proxies' streams",
        );
        let push = Push::new(self.server.clone(), known.exceptions.clone());
        let followers = known.followers.clone().enforced_by(push.enforcers());
        let mut out = Out {
            push,
            server: self.server.clone(),
            ca: self.ca.clone(),
            followers,
            given_out,
            delay: delay.with(&()),
        };
        registry::spawn(registry, feed, asked, move |committed| out.take(committed))
            .context("the registry's thread")?;
        Ok(known)
    }

    /// Starts to deploy waypoints, where the installation has their image.
    fn deploy_waypoints(
        &self,
        flags: &Flags,
        known: &Known,
        leads: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let Some(image) = flags.waypoint_image.clone().filter(|image| !image.is_empty()) else {
            return Ok(());
        };
        let overrides = serde_json::from_str(&flags.waypoint_overrides)
            .map_err(|error| error.to_string())
            .and_then(Overrides::of)
            .map_err(|error| anyhow::anyhow!("--waypoint-overrides: {error}"))?;
        let resources = serde_json::from_str(&flags.waypoint_resources).context("--waypoint-resources")?;
        let deployer = Deployer {
            client: self.client.clone(),
            settings: waypoints::Settings {
                image,
                pull_policy: flags.waypoint_image_pull_policy.clone(),
                address: format!("https://{}.{}.svc:{}", flags.service, flags.namespace, XDS_PORT),
                cluster: flags.cluster_id.clone(),
                network: flags.network.clone(),
                revision: flags.revision.clone(),
                version: env!("CARGO_PKG_VERSION"),
                log: (flags.waypoint_log.clone(), flags.waypoint_log_format.clone()),
                resources,
                overrides,
                can_sleep: false,
            },
            in_force: known.in_force.clone(),
            namespaces: known.namespaces.clone(),
            leads,
        };
        let (metrics, mut first) = (self.metrics.clone(), known.first.clone());
        tokio::spawn(async move {
            // Which namespaces are read is known then.
            if first.wait_for(|first| *first).await.is_ok() {
                deployer.run(metrics).await;
            }
        });
        Ok(())
    }

    /// Starts what the leader does, and the election; a view of who leads.
    fn lead(
        &self,
        flags: &Flags,
        known: &Known,
        shutdown: &Shutdown,
    ) -> anyhow::Result<watch::Receiver<Option<String>>> {
        let identity = format!("{}_{:08x}", flags.pod_name, std::process::id());
        let (election, leads, leader) =
            Election::new(self.client.clone(), &flags.namespace, &flags.revision, identity);
        let webhook: Arc<Mutex<Option<Proxy>>> = Arc::default();
        let seen = webhook.clone();
        let (others, own) = (Bundles::default(), flags.webhooks.clone());
        let bundles = others.clone().follow(self.client.clone(), flags.namespace.clone(), own, leads.clone());
        tokio::spawn(bundles);
        let (pods, nodes) = (known.pods.clone(), known.nodes.clone());
        let fleet = Trusting {
            // Apart from the status keeper's, which has other doubts.
            ztunnels: Ztunnels::new(pods.clone(), nodes.clone(), Some(self.client.clone())),
            pods,
            nodes,
            namespaces: trusted::namespaces(flags, &self.trusted),
            others,
            webhook: Arc::new(move || seen.lock().unwrap_or_else(PoisonError::into_inner).clone()),
        };
        let (ca, client) = (self.ca.clone(), self.client.clone());
        let (namespaces, first) = (known.namespaces.clone(), known.first.clone());
        tokio::spawn(run_ca(ca, client, fleet, namespaces, leads.clone(), first));
        let keeper = Keeper {
            followers: known.followers.clone(),
            server: self.server.clone(),
            peers: Peers::new(Some(reach(flags, &self.client, &self.ca))),
            writer: Writer::new(self.client.clone()),
            exceptions: known.exceptions.clone(),
            ztunnels: known.ztunnels.clone(),
            revision: flags.revision.clone(),
            leads: leads.clone(),
        };
        tokio::spawn(keeper.run(self.metrics.clone()));
        let kept = bundle::Kept {
            name: flags.webhooks.clone(),
            revision: flags.revision.clone(),
            roots: roots(&self.ca),
            in_force: known.in_force.clone(),
            seen: webhook,
        };
        tokio::spawn(kept.run(self.client.clone(), leads.clone()));
        self.deploy_waypoints(flags, known, leads)?;
        tokio::spawn(election.run(shutdown.clone()));
        Ok(leader)
    }

    /// Serves xDS and the CA.
    fn serve_proxies(
        &self,
        listener: TcpListener,
        known: &Known,
        shutdown: &Shutdown,
    ) -> anyhow::Result<tokio::task::JoinHandle<Result<(), tonic::transport::Error>>> {
        let port = Port::new(serve::Limits::default(), &self.metrics);
        let gone = serve::end_streams_of_pods_that_are_gone(
            self.server.clone(),
            Arc::new(known.pods.clone()),
            self.gateways.clone(),
            self.authenticator.clone(),
        );
        tokio::spawn(gone);
        let grpc = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(MOST_STREAMS)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(2 * WINDOW)
            .layer(Proving(port.clone()))
            .add_service(self.server.service())
            .add_service(self.ca.service(self.client.clone(), Arc::new(known.pods.clone())));
        let incoming = connections(listener, self.ca.server_config(&[b"h2"])?, port);
        let ending = shutdown.clone();
        Ok(tokio::spawn(grpc.serve_with_incoming_shutdown(incoming, async move {
            ending.draining().await;
            tokio::time::sleep(LAST_WORDS).await;
        })))
    }

    /// Serves the webhook, and what other control planes ask.
    fn serve_webhook(&self, flags: &Flags, listener: TcpListener, known: &Known) -> anyhow::Result<()> {
        let webhook = Arc::new(Webhook::new(options(flags), known.in_force.clone(), &self.metrics));
        let (followers, revision) = (known.followers.clone(), flags.revision.clone());
        let exchange = Exchange::new(followers, self.server.clone(), revision, keys(&self.ca));
        let routes = exchange.routes(webhook.routes(Routes::new("culvertd")));
        let acceptor = TlsAcceptor::from(self.ca.server_config(&[b"http/1.1"])?);
        let secure = move |stream| {
            let acceptor = acceptor.clone();
            async move { acceptor.accept(stream).await }
        };
        tokio::spawn(http::serve_secured(listener, secure, routes, webhook::limits()));
        Ok(())
    }

    fn views(&self, flags: &Flags, known: &Known, leader: watch::Receiver<Option<String>>) -> Views {
        Views {
            server: self.server.clone(),
            followers: known.followers.clone(),
            overview: known.overview.clone(),
            exceptions: known.exceptions.clone(),
            ca: self.ca.clone(),
            asks: known.asks.clone(),
            pod: flags.pod_name.as_str().into(),
            revision: flags.revision.as_str().into(),
            leader,
        }
    }
}

fn options(flags: &Flags) -> compile::Options {
    compile::Options {
        cluster: flags.cluster_id.as_str().into(),
        network: flags.network.as_str().into(),
        root_namespace: flags.namespace.as_str().into(),
        origin: Origin::Cluster,
        ..compile::Options::default()
    }
}

fn ca(flags: &Flags, trusted: &[Account], metrics: &Metrics) -> Ca {
    let settings = CaSettings {
        trusted: trusted.to_vec(),
        own_namespaces: trusted::namespaces(flags, trusted),
        pod: flags.pod_name.clone(),
        serving_names: service_names(&flags.service, &flags.namespace, "cluster.local"),
        ..CaSettings::new(&flags.namespace, &flags.cluster_id)
    };
    let domains = TrustDomains::only(model::TrustDomain::cluster_local());
    Ca::new(settings, domains, Clock::system(), metrics)
}

/// Calls something on the runtime that this is called on, wherever that is called.
fn on_this_runtime(call: impl FnOnce() + Send + 'static) -> impl FnOnce() + Send + 'static {
    let runtime = tokio::runtime::Handle::current();
    move || {
        let _entered = runtime.enter();
        call();
    }
}

/// What is done with commits.
struct Out {
    push: Push<Server>,
    server: Server,
    ca: Ca,
    followers: Followers,
    given_out: watch::Sender<bool>,
    delay: Handle<(), Histogram>,
}

impl Out {
    fn take(&mut self, committed: Committed) {
        for change in &committed.changes {
            if let model::Change::SetSettings(settings) = change {
                self.ca.current().set_domains(settings.trust_domains.clone());
            }
        }
        let generation = self.push.push(&committed.changes);
        self.delay.observe(committed.since.elapsed().as_secs_f64());
        if committed.first {
            self.server.ready();
            self.given_out.send_replace(true);
            tracing::info!(resources = committed.changes.len(), "the mesh is served");
        }
        self.followers.take(committed.reports, &committed.changes, generation);
    }
}

/// Runs the CA once the trust domain is known: its root has it in its name.
async fn run_ca(
    ca: Ca,
    client: Client,
    fleet: Trusting,
    namespaces: Namespaces,
    leads: watch::Receiver<bool>,
    mut first: watch::Receiver<bool>,
) {
    if first.wait_for(|first| *first).await.is_ok() {
        ca.run(client, Arc::new(fleet), namespaces, leads).await;
    }
}

async fn become_ready(
    mut first: watch::Receiver<bool>,
    ca: Ca,
    configured: process::readiness::Condition,
    certified: process::readiness::Condition,
) {
    if first.wait_for(|first| *first).await.is_err() {
        return;
    }
    configured.holds();
    ca.wait_ready().await;
    certified.holds();
    // The conditions last as long as the process.
    std::future::pending::<()>().await;
}

/// The roots in force, for the webhook's configuration.
fn roots(ca: &Ca) -> bundle::Roots {
    let ca = ca.clone();
    Arc::new(move || {
        let in_force = ca.current().get()?;
        Some((in_force.roots_pem.clone(), in_force.record.root_ids()))
    })
}

/// How the other control planes are asked.
fn reach(flags: &Flags, client: &Client, ca: &Ca) -> Reach {
    let (keys, ca) = (keys(ca), ca.clone());
    Reach {
        client: client.clone(),
        namespace: flags.namespace.clone(),
        own_pod: flags.pod_name.clone(),
        own_revision: flags.revision.clone(),
        keys,
        tls: Arc::new(move || {
            let in_force = ca.current().get()?;
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(in_force.record.roots.iter().cloned());
            let builder = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13]);
            let config = builder.with_root_certificates(roots).with_no_client_auth();
            Some(Arc::new(config))
        }),
    }
}

/// What control planes have in common: the keys of who signs, and, while the root is exchanged, of who will.
fn keys(ca: &Ca) -> Keys {
    let ca = ca.clone();
    let secrets = move |take: &mut dyn FnMut(&[u8])| {
        let Some(in_force) = ca.current().get() else { return };
        let record = &in_force.record;
        std::iter::once(&record.signer).chain(&record.next).for_each(|s| take(s.key.secret_der()));
    };
    Keys::new(Arc::new(secrets), Clock::system())
}
