//! What is known of the cluster: this node's pods, and which namespaces are labelled. Filled by watches, read at every
//! look at the pods.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use tokio::sync::Notify;

use crate::pod::Pod;
use crate::zds::PodIdentity;

/// What a namespace says in its label [`crate::pod::DATAPLANE_MODE`].
pub type Mode = Option<String>;

/// The newest of what watches said.
#[derive(Debug, Default)]
pub struct Cluster {
    view: Mutex<View>,
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
        change(&mut self.view_mut());
        self.changed.notify_one();
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
