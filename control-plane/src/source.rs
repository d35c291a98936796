//! What the API server holds of the kinds that the mesh reads, as events for the [`crate::registry`].
//!
//! * One watch a kind; a kind of a custom resource is watched once a version of it that is read is served.
//! * Nothing is taken for gone but what is deleted, or missing from a complete list: while the server is slow, refuses or
//!   is away, all stays as it is. Watches are resumed where they were; where the server has forgotten that (410), the
//!   kind is listed again.
//! * The channel to the registry is short: objects wait in the server, not in this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use config::json::Decoded;
use config::resource::Kind;
use futures_util::{StreamExt, pin_mut};
use kube::Client;
use kube::api::{Api, ApiResource, GroupVersionKind};
use kube::error::DiscoveryError;
use kube::runtime::watcher::{self, Config, Error, watcher};
use process::metrics::{Counter, Family};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::objects::{self, Object, Watched};

/// What happened to the objects of a kind.
#[derive(Debug)]
pub enum Change {
    /// An object is this now.
    Set(Box<Decoded>),
    /// An object is gone.
    Gone {
        /// Its namespace, empty for a kind that has none.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A list of all objects begins.
    Listing,
    /// The list is complete: what it did not have is gone.
    Listed,
    /// The server does not have the kind.
    NotServed,
}

/// An event of a kind.
#[derive(Debug)]
pub struct Event {
    /// The kind.
    pub kind: Kind,
    /// When it came.
    pub at: Instant,
    /// What happened.
    pub change: Change,
}

/// How many events may wait.
const QUEUE: usize = 1024;
/// Objects in one answer to a list.
const PAGE: u32 = 500;
/// How long a kind that is not served is left alone.
const NOT_SERVED_PAUSE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What is counted, and what was said last.
#[derive(Debug)]
pub struct Watches {
    errors: Arc<Family<[(&'static str, &'static str); 1], Counter>>,
    events: Arc<Family<[(&'static str, &'static str); 1], Counter>>,
    /// Watches that fail now.
    failing: AtomicU64,
}

impl Watches {
    /// Registers the metrics.
    #[must_use]
    pub fn new(metrics: &process::metrics::Registry) -> Arc<Self> {
        let new = Arc::new(Self {
            errors: metrics.counters("pilot_k8s_watch_errors", "Watches of the API server that failed"),
            events: metrics.counters("pilot_k8s_reg_events", "Events from the API server"),
            failing: AtomicU64::new(0),
        });
        let watches = new.clone();
        let description = process::metrics::Description {
            name: "culvertd_watches_failing",
            help: "Kinds whose watch fails now: what they were last stays in force",
            kind: process::metrics::Kind::Gauge,
        };
        metrics.collect(description, move |out| out.integer(&|_| {}, watches.failing()));
        new
    }

    /// How many watches fail now.
    #[must_use]
    pub fn failing(&self) -> u64 {
        self.failing.load(Ordering::Relaxed)
    }
}

/// Watches all kinds.
pub struct Source {
    client: Client,
    /// Where the mesh's settings are: namespace and name of the ConfigMap.
    settings: (String, String),
    watches: Arc<Watches>,
    out: mpsc::Sender<Event>,
    relist: watch::Receiver<u64>,
}

/// The registry's end.
pub struct Feed {
    /// What happens.
    pub events: mpsc::Receiver<Event>,
    /// Has all kinds listed again that are in namespaces.
    pub relist: watch::Sender<u64>,
}

impl Source {
    /// A source, and the feed that it fills.
    #[must_use]
    pub fn new(client: Client, settings: (String, String), watches: Arc<Watches>) -> (Self, Feed) {
        let (out, events) = mpsc::channel(QUEUE);
        let (relist, relisted) = watch::channel(0);
        (Self { client, settings, watches, out, relist: relisted }, Feed { events, relist })
    }

    /// Starts the watches that say which objects are read at all: namespaces and the mesh's settings.
    pub fn start_first(&self) {
        let (namespace, name) = &self.settings;
        let only = Config::default().fields(&format!("metadata.name={name}"));
        self.spawn::<objects::ConfigMap>(only, Some(namespace.clone()), Relist::Never);
        self.spawn::<objects::Namespace>(Config::default(), None, Relist::Never);
    }

    /// Starts all others.
    pub fn start_others(&self) {
        let all = Config::default;
        self.spawn::<objects::Node>(all(), None, Relist::Never);
        self.spawn::<objects::Pod>(all(), None, Relist::OnDemand);
        self.spawn::<objects::Service>(all(), None, Relist::OnDemand);
        self.spawn::<objects::EndpointSlice>(all(), None, Relist::OnDemand);
        self.spawn::<objects::ServiceAccount>(all(), None, Relist::OnDemand);
        self.spawn::<objects::AuthorizationPolicy>(all(), None, Relist::OnDemand);
        self.spawn::<objects::PeerAuthentication>(all(), None, Relist::OnDemand);
        self.spawn::<objects::ServiceEntry>(all(), None, Relist::OnDemand);
        self.spawn::<objects::WorkloadEntry>(all(), None, Relist::OnDemand);
        self.spawn::<objects::WorkloadGroup>(all(), None, Relist::OnDemand);
    }

    fn spawn<W: Watched>(&self, config: Config, namespace: Option<String>, relist: Relist) {
        let follower = Follower {
            client: self.client.clone(),
            config: config.page_size(PAGE),
            namespace,
            out: self.out.clone(),
            relist: self.relist.clone(),
            relists: relist == Relist::OnDemand,
            watches: self.watches.clone(),
            pause: Pause::default(),
            failing: false,
        };
        tokio::spawn(follower.run::<W>());
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Relist {
    Never,
    OnDemand,
}

/// Watches one kind.
struct Follower {
    client: Client,
    config: Config,
    namespace: Option<String>,
    out: mpsc::Sender<Event>,
    relist: watch::Receiver<u64>,
    relists: bool,
    watches: Arc<Watches>,
    pause: Pause,
    failing: bool,
}

/// The registry is gone: the process ends.
struct Over;

impl Follower {
    async fn run<W: Watched>(mut self) {
        loop {
            let Ok(resource) = self.served::<W>().await else { return };
            if self.watch::<W>(&resource).await.is_err() {
                return;
            }
        }
    }

    /// Waits until the server has the kind in a version that is read.
    async fn served<W: Watched>(&mut self) -> Result<ApiResource, Over> {
        let Some(spec) = W::KIND.spec() else { return Err(Over) };
        if !spec.group.ends_with("istio.io") {
            let version = spec.versions.first().copied().unwrap_or("v1");
            return Ok(ApiResource::from_gvk(&GroupVersionKind::gvk(spec.group, version, spec.name)));
        }
        let mut said = false;
        loop {
            match find(&self.client, spec).await {
                Ok(Some(resource)) => {
                    self.works(W::KIND);
                    tracing::debug!(
                        kind = spec.name,
                        version = resource.version,
                        "the API server has the kind"
                    );
                    return Ok(resource);
                }
                Ok(None) => {
                    if !said && let Err(error) = confirm_absent(&self.client, spec).await {
                        self.failed::<W>(chain(&error)).await;
                        continue;
                    }
                    if !std::mem::replace(&mut said, true) {
                        self.works(W::KIND);
                        tracing::info!(
                            kind = spec.name,
                            group = spec.group,
                            versions = spec.versions.join(", "),
                            "the API server has no such kind; it is read once its CRD is there"
                        );
                        self.send::<W>(Change::NotServed).await?;
                    }
                    tokio::time::sleep(jittered(NOT_SERVED_PAUSE)).await;
                }
                Err(error) => self.failed::<W>(chain(&error)).await,
            }
        }
    }

    /// Watches until the kind is not served any more, or has to be found anew.
    async fn watch<W: Watched>(&mut self, resource: &ApiResource) -> Result<(), Over> {
        let api: Api<Object<W>> = match &self.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        };
        self.relist.mark_unchanged();
        let stream = watcher(api, self.config.clone());
        pin_mut!(stream);
        loop {
            let next = tokio::select! {
                next = stream.next() => next,
                changed = self.relist.changed(), if self.relists => {
                    return changed.map_err(|_| Over);
                }
            };
            let event = match next {
                None => return Ok(()),
                Some(Err(error)) => {
                    let stuck = is_stuck(&error);
                    self.failed::<W>(chain(&error)).await;
                    if stuck {
                        return Ok(());
                    }
                    continue;
                }
                Some(Ok(event)) => event,
            };
            // That a list is to begin is said before the server is asked for it.
            if !matches!(event, watcher::Event::Init) {
                self.works(W::KIND);
            }
            let change = match event {
                watcher::Event::Init => Change::Listing,
                watcher::Event::InitDone => Change::Listed,
                watcher::Event::Apply(object) | watcher::Event::InitApply(object) => {
                    Change::Set(Box::new(object.decoded))
                }
                watcher::Event::Delete(object) => Change::Gone {
                    namespace: object.decoded.metadata("namespace").to_owned(),
                    name: object.decoded.metadata("name").to_owned(),
                },
            };
            self.send::<W>(change).await?;
        }
    }

    async fn send<W: Watched>(&self, change: Change) -> Result<(), Over> {
        self.watches.events.with(&[("type", W::KIND.name())]).inc();
        let event = Event { kind: W::KIND, at: Instant::now(), change };
        self.out.send(event).await.map_err(|_| Over)
    }

    fn works(&mut self, kind: Kind) {
        self.pause = Pause::default();
        if std::mem::take(&mut self.failing) {
            self.watches.failing.fetch_sub(1, Ordering::Relaxed);
            tracing::info!(kind = kind.name(), "the API server answers again");
        }
    }

    /// Says that a watch failed, and waits.
    async fn failed<W: Watched>(&mut self, error: String) {
        self.watches.errors.with(&[("type", W::KIND.name())]).inc();
        let pause = self.pause.next();
        if !std::mem::replace(&mut self.failing, true) {
            self.watches.failing.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                kind = W::KIND.name(),
                error,
                "the API server does not answer a watch; what was known stays in force"
            );
        }
        tokio::time::sleep(pause).await;
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if self.failing {
            self.watches.failing.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether a watch can't go on as it is: the kind is not served (any more) in this version, or the server has forgotten
/// where the watch was and says so before it starts, which the watcher would ask again forever.
fn is_stuck(error: &Error) -> bool {
    match error {
        Error::InitialListFailed(kube::Error::Api(status)) => status.code == 404,
        // The answer to a watch is read as its first event.
        Error::WatchStartFailed(kube::Error::Api(status)) | Error::WatchFailed(kube::Error::Api(status)) => {
            matches!(status.code, 404 | 410)
        }
        _ => false,
    }
}

/// The kind as the server has it, in the first version of those that are read; `None` when it has none of them.
pub(crate) async fn find(
    client: &Client,
    spec: &config::resource::KindSpec,
) -> Result<Option<ApiResource>, kube::Error> {
    // Asked for by name, a group that is not there would be an error.
    let groups = client.list_api_groups().await?.groups;
    let group = groups.into_iter().find(|group| group.name == spec.group);
    let served: Vec<String> = group.into_iter().flat_map(|g| g.versions).map(|v| v.version).collect();
    for version in spec.versions.iter().filter(|version| served.iter().any(|s| s == *version)) {
        let listed = match client.list_api_group_resources(&format!("{}/{version}", spec.group)).await {
            Ok(listed) => listed,
            Err(kube::Error::Api(status)) if status.code == 404 => continue,
            Err(error) => return Err(error),
        };
        let found = listed.resources.into_iter().find(|r| r.kind == spec.name && !r.name.contains('/'));
        if let Some(found) = found {
            let gvk = GroupVersionKind::gvk(spec.group, version, spec.name);
            return Ok(Some(ApiResource::from_gvk_with_plural(&gvk, &found.name)));
        }
    }
    Ok(None)
}

/// Makes sure that a kind is not there. The list of groups of a server that is starting may lack what the server has;
/// asked for the group itself, it says that it can't tell yet (503). Policies must not be taken for none in between.
async fn confirm_absent(client: &Client, spec: &config::resource::KindSpec) -> Result<(), kube::Error> {
    for version in spec.versions {
        match client.list_api_group_resources(&format!("{}/{version}", spec.group)).await {
            Ok(listed) if !listed.resources.iter().any(|r| r.kind == spec.name) => {}
            Ok(_) => return Err(kube::Error::Discovery(DiscoveryError::MissingKind(spec.name.to_owned()))),
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// An error and what caused it.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text.chars().take(1000).collect()
}

/// Ever longer pauses, so that a server in trouble is not asked by all at once.
#[derive(Default)]
pub(crate) struct Pause(u32);

impl Pause {
    /// The next pause: twice the one before, up to a limit, and up to a half less by chance.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.0.min(10)).min(LONGEST_PAUSE);
        self.0 = self.0.saturating_add(1);
        jittered(pause)
    }
}

/// A duration, up to a half less by chance.
pub(crate) fn jittered(duration: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    // Each state has keys of its own: chance enough to spread requests.
    let chance = RandomState::new().hash_one(0) % 1000;
    duration.mul_f64(1.0 - f64::from(u32::try_from(chance).unwrap_or(0)) / 2000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        let mut pause = Pause::default();
        let pauses: Vec<Duration> = (0..40).map(|_| pause.next()).collect();
        assert!(pauses[0] <= FIRST_PAUSE && pauses[0] >= FIRST_PAUSE / 2);
        assert!(pauses[39] <= LONGEST_PAUSE && pauses[39] >= LONGEST_PAUSE / 2);
    }

    #[test]
    fn a_watch_that_the_server_has_forgotten_is_begun_anew() {
        let status = |code| {
            let status = kube::core::Status { code, ..kube::core::Status::default() };
            kube::Error::Api(Box::new(status))
        };
        assert!(is_stuck(&Error::WatchStartFailed(status(410))));
        assert!(is_stuck(&Error::WatchFailed(status(410))));
        assert!(is_stuck(&Error::InitialListFailed(status(404))));
        assert!(!is_stuck(&Error::InitialListFailed(status(429))));
        assert!(!is_stuck(&Error::WatchStartFailed(status(503))));
    }
}
