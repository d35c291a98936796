//! What is known of the cluster: this node's pods, and which namespaces are labelled. Filled by watches, read at every
//! look at the pods.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::pod::Pod;
use crate::zds::PodIdentity;

/// What a namespace says in its label [`crate::pod::DATAPLANE_MODE`].
pub type Mode = Option<String>;

/// The newest of what watches said.
#[derive(Debug, Default)]
pub struct Cluster {
    view: Mutex<View>,
    /// Since when the view names each pod.
    seen: Mutex<HashMap<String, Instant>>,
    changed: Notify,
}

/// All that is known at one time.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Pods of this node, by uid.
    pub pods: HashMap<String, Pod>,
    /// Namespaces by name.
    pub namespaces: HashMap<String, Mode>,
    /// Whether the pods are all.
    pub all_pods: bool,
    /// Whether the namespaces are all.
    pub all_namespaces: bool,
    /// Since when the watch of namespaces is broken.
    pub namespaces_broken: Option<Instant>,
    /// How often the watch of pods took some away: what was asked for before that may be one of them.
    pub removals: u64,
}

impl View {
    /// Whether what is missing is known not to be there.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.all_pods && self.all_namespaces
    }

    /// The mode of a namespace; without a label for one that is not known.
    #[must_use]
    pub fn mode(&self, namespace: &str) -> Option<&str> {
        self.namespaces.get(namespace)?.as_deref()
    }
}

impl Cluster {
    fn view_mut(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that is known now.
    #[must_use]
    pub fn view(&self) -> View {
        self.view_mut().clone()
    }

    /// Waits for a change.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Changes what is known.
    pub fn update(&self, change: impl FnOnce(&mut View)) {
        {
            let mut view = self.view_mut();
            change(&mut view);
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.retain(|uid, _| view.pods.contains_key(uid));
            for uid in view.pods.keys().filter(|uid| !seen.contains_key(*uid)).cloned().collect::<Vec<_>>() {
                seen.insert(uid, Instant::now());
            }
        }
        self.changed.notify_one();
    }

    /// Notes what the API server said when it was asked for a pod, unless the watch has taken pods away since
    /// [`View::removals`] was `removals`, which may be newer. Whether it did.
    pub fn note_pod(&self, removals: u64, pod: &Pod) -> bool {
        let mut is_noted = false;
        self.update(|view| {
            is_noted = view.removals == removals;
            if is_noted {
                view.pods.entry(pod.identity.uid.clone()).or_insert_with(|| pod.clone());
            }
        });
        is_noted
    }

    /// Notes what the API server said when it was asked for a namespace of which `known` was known, unless the watch has
    /// said something else meanwhile, which may be newer. What is known now.
    pub fn note_namespace(&self, name: &str, known: Option<&Mode>, asked: Mode) -> Mode {
        let mut now = asked.clone();
        self.update(|view| match view.namespaces.get(name) {
            Some(newer) if Some(newer) != known => now.clone_from(newer),
            _ => drop(view.namespaces.insert(name.to_owned(), asked)),
        });
        now
    }

    /// Whether the view of namespaces may be behind the object of a pod: one that came after `trust` before the watch was
    /// heard last.
    #[must_use]
    pub fn may_be_behind(&self, uid: &str, trust: std::time::Duration) -> bool {
        let heard = self.view_mut().namespaces_broken.unwrap_or_else(Instant::now);
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(uid).copied();
        seen.is_none_or(|seen| seen + trust > heard)
    }

    /// How often pods were taken away.
    #[must_use]
    pub fn removals(&self) -> u64 {
        self.view_mut().removals
    }

    /// The pod of this uid.
    #[must_use]
    pub fn pod(&self, uid: &str) -> Option<Pod> {
        self.view_mut().pods.get(uid).cloned()
    }

    /// The mode of a namespace; `None` when the namespace is not known.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Option<Mode> {
        self.view_mut().namespaces.get(name).cloned()
    }
}

/// What users are told about a pod, as an event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Notice {
    /// One word, such as `EnrolmentFailed`.
    pub reason: &'static str,
    /// What happened, why, and what to do; at most a kilobyte is shown.
    pub note: String,
    /// Whether something is wrong.
    pub warning: bool,
}

/// The API server does not do it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the API server: {0}")]
pub struct ApiError(pub String);

/// What is asked of the API server, beside watches. Every question has a limit of time.
pub trait Api: Send + Sync + 'static {
    /// The pod of this name; `None` when there is none.
    fn pod<'a>(&'a self, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<Pod>, ApiError>>;

    /// The mode of this namespace; `None` when there is none.
    fn namespace<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Mode>, ApiError>>;

    /// Sets the pod's annotation [`crate::pod::REDIRECTION`], or removes it. Does nothing to another pod of the name.
    fn annotate<'a>(
        &'a self,
        pod: &'a PodIdentity,
        value: Option<&'static str>,
    ) -> BoxFuture<'a, Result<(), ApiError>>;

    /// Tells users of the pod. What fails is lost.
    fn notify<'a>(&'a self, pod: &'a PodIdentity, notice: Notice) -> BoxFuture<'a, ()>;
}
