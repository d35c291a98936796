//! What the API server holds of the kinds that the mesh reads, as events for the [`crate::registry`].
//!
//! * One watch a kind; a kind of a custom resource is watched once a version of it that is read is served.
//! * Nothing is taken for gone but what is deleted, or missing from a complete list: while the server is slow, refuses or
//!   is away, all stays as it is. Watches are resumed where they were; where the server has forgotten that (410), the
//!   kind is listed again.
//! * A server that takes requests and says nothing is no better than one that refuses: see [`answers`].
//! * The objects of a kind whose definition was deleted are gone, too. That it is not served is not enough: a server that
//!   is starting may not serve what it has.
//! * The channel to the registry is short: objects wait in the server, not in this process.

mod answers;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use config::json::Decoded;
use config::resource::{Kind, KindSpec};
use futures_util::{StreamExt, pin_mut};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::error::DiscoveryError;
use kube::runtime::watcher::{self, Config, Error, watcher};
use process::metrics::{Counter, Family};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use answers::attentive;

use crate::objects::{self, ForKinds, Object, Watched};
pub use answers::{ClockSkew, SILENCE};

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
    /// The server does not have the kind. What is known of it stays.
    NotServed,
    /// The kind was deleted, and all of its objects with it.
    KindDeleted,
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
/// So long a kind that was served must be away before it is looked whether it was deleted.
const AWAY: Duration = Duration::from_secs(60);
/// A watch works again when it has been answered, and did not fail for so long.
const STEADY: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What is counted, and what was said last.
#[derive(Debug)]
pub struct Watches {
    errors: Arc<Family<[(&'static str, &'static str); 1], Counter>>,
    events: Arc<Family<[(&'static str, &'static str); 1], Counter>>,
    /// Watches that fail now.
    failing: AtomicU64,
    /// Kinds that were served, and are not, whose objects stay in force.
    away: AtomicU64,
    skew: Arc<ClockSkew>,
}

impl Watches {
    /// Registers the metrics.
    #[must_use]
    pub fn new(metrics: &process::metrics::Registry) -> Arc<Self> {
        let new = Arc::new(Self {
            errors: metrics.counters("pilot_k8s_watch_errors", "Watches of the API server that failed"),
            events: metrics.counters("pilot_k8s_reg_events", "Events from the API server"),
            failing: AtomicU64::new(0),
            away: AtomicU64::new(0),
            skew: Arc::default(),
        });
        type Read = fn(&Watches) -> i64;
        let gauges: [(&'static str, &'static str, Read); 3] = [
            (
                "culvertd_watches_failing",
                "Kinds whose watch fails now: what they were last stays in force",
                |watches| i64::try_from(watches.failing()).unwrap_or(i64::MAX),
            ),
            (
                "culvertd_kinds_not_served",
                "Kinds that the API server had and does not serve now, whose objects stay in force",
                |watches| i64::try_from(watches.away.load(Ordering::Relaxed)).unwrap_or(i64::MAX),
            ),
            (
                "culvertd_api_server_clock_ahead_seconds",
                "How far the API server's clock is ahead of this control plane's",
                |watches| watches.skew.seconds(),
            ),
        ];
        for (name, help, read) in gauges {
            let watches = new.clone();
            let kind = process::metrics::Kind::Gauge;
            let description = process::metrics::Description { name, help, kind };
            metrics.collect(description, move |out| out.integer(&|_| {}, read(&watches)));
        }
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
    silence: Duration,
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
        let silence = SILENCE;
        (Self { client, settings, watches, out, relist: relisted, silence }, Feed { events, relist })
    }

    /// How long the server may say nothing before it is asked again.
    #[must_use]
    pub fn with_silence(self, silence: Duration) -> Self {
        Self { silence, ..self }
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
        objects::for_others(&mut Others(self));
    }

    fn spawn<W: Watched>(&self, config: Config, namespace: Option<String>, relist: Relist) {
        let (client, answers) = attentive(&self.client, &self.watches.skew, self.silence);
        let follower = Follower {
            client,
            answers,
            config: config.page_size(PAGE),
            namespace,
            out: self.out.clone(),
            relist: self.relist.clone(),
            relists: relist == Relist::OnDemand,
            watches: self.watches.clone(),
            pause: Pause::default(),
            failing: false,
            listed: None,
            away: None,
        };
        tokio::spawn(follower.run::<W>());
    }
}

/// Starts the watches of the kinds that it is called for.
struct Others<'s>(&'s Source);

impl ForKinds for Others<'_> {
    fn of<W: Watched>(&mut self) {
        let namespaced = W::KIND.spec().is_some_and(|spec| spec.namespaced);
        let relist = if namespaced { Relist::OnDemand } else { Relist::Never };
        self.0.spawn::<W>(Config::default(), None, relist);
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
    /// Counts the server's good answers.
    answers: watch::Receiver<u64>,
    config: Config,
    namespace: Option<String>,
    out: mpsc::Sender<Event>,
    relist: watch::Receiver<u64>,
    relists: bool,
    watches: Arc<Watches>,
    pause: Pause,
    failing: bool,
    /// The kind's plural, once there may be objects of it that the registry knows.
    listed: Option<String>,
    /// Since when it is not served, having been listed.
    away: Option<Away>,
}

/// A kind that is not served any more.
struct Away {
    since: Instant,
    /// What was said of it last.
    said: &'static str,
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
        if !spec.is_custom() {
            let version = spec.versions.first().copied().unwrap_or("v1");
            return Ok(ApiResource::from_gvk(&GroupVersionKind::gvk(spec.group, version, spec.name)));
        }
        let mut said = false;
        loop {
            match find(&self.client, spec).await {
                Ok(Some(resource)) => {
                    self.works(W::KIND);
                    self.is_back();
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
                    self.is_away::<W>(spec).await?;
                    tokio::time::sleep(jittered(NOT_SERVED_PAUSE)).await;
                }
                Err(error) => self.failed::<W>(chain(&error)).await,
            }
        }
    }

    /// The kind is served.
    fn is_back(&mut self) {
        if self.away.take().is_some() {
            self.watches.away.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The kind is not served. If it was, its objects stay until it is certain that its definition was deleted.
    async fn is_away<W: Watched>(&mut self, spec: &KindSpec) -> Result<(), Over> {
        let Some(plural) = &self.listed else { return Ok(()) };
        let name = format!("{plural}.{}", spec.group);
        if self.away.is_none() {
            self.watches.away.fetch_add(1, Ordering::Relaxed);
        }
        let since = self.away.get_or_insert_with(|| Away { since: Instant::now(), said: "" }).since;
        if since.elapsed() < AWAY {
            return Ok(());
        }
        let definitions = ApiResource::from_gvk_with_plural(
            &GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition"),
            "customresourcedefinitions",
        );
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &definitions);
        let (outcome, error) = match api.get_metadata_opt(&name).await {
            Ok(None) => {
                tracing::warn!(
                    kind = spec.name,
                    "the definition {name} was deleted, and its objects with it: none is in force any more"
                );
                self.is_back();
                self.listed = None;
                return self.send::<W>(Change::KindDeleted).await;
            }
            Ok(Some(_)) => ("its definition is there, and serves no version that is read", String::new()),
            Err(error) => ("whether its definition was deleted can't be looked at", chain(&error)),
        };
        if let Some(away) = &mut self.away
            && std::mem::replace(&mut away.said, outcome) != outcome
        {
            tracing::error!(
                kind = spec.name,
                definition = name,
                error,
                "a kind is not served any more, and its objects stay in force as they were: {outcome}"
            );
        }
        Ok(())
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
        let mut steady: Option<Instant> = None;
        loop {
            let later = async { tokio::time::sleep_until(steady.unwrap_or_else(Instant::now)).await };
            let next = tokio::select! {
                next = stream.next() => next,
                // A watch without events works as well; one that breaks off after each answer does not.
                Ok(()) = self.answers.changed(), if self.failing => {
                    steady = Some(Instant::now() + STEADY);
                    continue;
                }
                () = later, if steady.is_some() => {
                    steady = None;
                    self.works(W::KIND);
                    continue;
                }
                changed = self.relist.changed(), if self.relists => {
                    return changed.map_err(|_| Over);
                }
            };
            let event = match next {
                None => return Ok(()),
                Some(Err(error)) => {
                    let stuck = is_stuck(&error);
                    steady = None;
                    self.failed::<W>(chain(&error)).await;
                    self.answers.mark_unchanged();
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
                watcher::Event::Init => {
                    self.listed = Some(resource.plural.clone());
                    Change::Listing
                }
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
        self.is_back();
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
        // A server that does not know the path (any more) answers in plain words: `404 page not found`.
        Error::WatchStartFailed(kube::Error::SerdeError(_))
        | Error::WatchFailed(kube::Error::SerdeError(_)) => true,
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
