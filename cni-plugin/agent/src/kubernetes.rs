//! The API server: watches, questions, and what is written to it.

use std::collections::HashMap;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Node, ObjectReference, Pod as KubePod};
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::events::{Event as KubeEvent, EventType, Recorder, Reporter};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Config, Resource};
use serde_json::json;
use tokio::time::Instant;

use crate::cluster::{Api, ApiError, Cluster, Mode, Notice};
use crate::pod::{DATAPLANE_MODE, Pod, REDIRECTION};
use crate::zds::PodIdentity;

/// For one question.
const LIMIT: Duration = Duration::from_secs(5);
/// What the API server takes as the text of an event, bytes.
const NOTE_LIMIT: usize = 1000;
/// Objects in one answer to a list: they are decoded whole, to keep a few of their fields.
const PAGE: u32 = 50;
/// Conflicts with others who write the node's taints.
const TAINT_ATTEMPTS: u32 = 5;

/// Who speaks, in events and in field managers.
const NAME: &str = "culvert-node";

/// A client: of the kubeconfig, or of the cluster that this process runs in.
///
/// # Errors
/// The file can't be read, or this process runs in no cluster.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).with_context(|| path.display().to_string())?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .with_context(|| path.display().to_string())?
        }
        None => Config::incluster().context("no --kubeconfig, and this process runs in no cluster")?,
    };
    config.connect_timeout = Some(LIMIT);
    Ok(Client::try_from(config)?)
}

/// Texts of events that are known to have been written: the same again is counted in the event that is there.
const NOTES: usize = 64;

/// Questions to a real API server.
#[derive(Clone)]
pub struct Kubernetes {
    client: Client,
    reporter: Reporter,
    /// By the events' texts. A recorder goes by the reason alone: it would repeat its first text where another one has come.
    recorders: Arc<Mutex<HashMap<String, Recorder>>>,
}

impl std::fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kubernetes").finish_non_exhaustive()
    }
}

impl Kubernetes {
    /// By this client, as the agent of `node`.
    #[must_use]
    pub fn new(client: Client, node: &str) -> Self {
        let reporter = Reporter { controller: NAME.to_owned(), instance: Some(node.to_owned()) };
        Self { client, reporter, recorders: Arc::default() }
    }

    /// What writes events with this text.
    fn recorder(&self, note: &str) -> Recorder {
        let mut all = self.recorders.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= NOTES && !all.contains_key(note) {
            // What is written again is then one more event.
            all.clear();
        }
        let new = || Recorder::new(self.client.clone(), self.reporter.clone());
        all.entry(note.to_owned()).or_insert_with(new).clone()
    }

    /// Follows the pods of `node`, for ever.
    pub async fn follow_pods(self, node: String, cluster: &Cluster) {
        let api: kube::Api<KubePod> = kube::Api::all(self.client);
        let config = watcher::Config::default().fields(&format!("spec.nodeName={node}")).page_size(PAGE);
        let mut all = Vec::new();
        follow(
            "pods",
            watcher(api, config),
            |_| (),
            |event| match event {
                Event::Init => all.clear(),
                Event::InitApply(pod) => all.extend(Pod::of(&pod)),
                Event::InitDone => {
                    let all = std::mem::take(&mut all);
                    cluster.update(|view| {
                        view.pods = all.into_iter().map(|pod| (pod.identity.uid.clone(), pod)).collect();
                        view.all_pods = true;
                        view.removals += 1;
                    });
                }
                Event::Apply(pod) => {
                    if let Some(pod) = Pod::of(&pod) {
                        cluster.update(|view| drop(view.pods.insert(pod.identity.uid.clone(), pod)));
                    }
                }
                Event::Delete(pod) => {
                    if let Some(uid) = &pod.metadata.uid {
                        cluster.update(|view| {
                            view.pods.remove(uid);
                            view.removals += 1;
                        });
                    }
                }
            },
        )
        .await;
    }

    /// Follows the namespaces, for ever.
    pub async fn follow_namespaces(self, cluster: &Cluster) {
        let api: kube::Api<PartialObjectMeta<Namespace>> = kube::Api::all(self.client);
        let mut all = Vec::new();
        let named = |namespace: &PartialObjectMeta<Namespace>| {
            Some((namespace.metadata.name.clone()?, mode_of(namespace.metadata.labels.as_ref())))
        };
        let is_broken = |broken: bool| {
            let since = broken.then(Instant::now);
            cluster.update(|view| view.namespaces_broken = since);
        };
        let config = watcher::Config::default().page_size(PAGE);
        follow("namespaces", watcher(api, config), is_broken, |event| match event {
            Event::Init => all.clear(),
            Event::InitApply(namespace) => all.extend(named(&namespace)),
            Event::InitDone => {
                let all = std::mem::take(&mut all);
                cluster.update(|view| {
                    view.namespaces = all.into_iter().collect();
                    view.all_namespaces = true;
                });
            }
            Event::Apply(namespace) => {
                if let Some((name, mode)) = named(&namespace) {
                    cluster.update(|view| drop(view.namespaces.insert(name, mode)));
                }
            }
            Event::Delete(namespace) => {
                if let Some(name) = &namespace.metadata.name {
                    cluster.update(|view| drop(view.namespaces.remove(name)));
                }
            }
        })
        .await;
    }

    /// Follows the DaemonSet that this agent is of, for ever: `gone` says whether it was there and is deleted now. That
    /// is the end of the mesh on this node, where a pod that is replaced, or a watch that broke, is not.
    pub async fn follow_own(self, namespace: String, name: String, gone: &AtomicBool) {
        let api: kube::Api<PartialObjectMeta<DaemonSet>> = kube::Api::namespaced(self.client, &namespace);
        let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut own = Own::default();
        follow(
            "own DaemonSet",
            watcher(api, only),
            |_| (),
            |event| {
                if let Some(is_gone) = own.is_gone(&event) {
                    gone.store(is_gone, Ordering::Relaxed);
                }
            },
        )
        .await;
    }

    /// Adds and removes taints of `node` by their keys, and leaves all others.
    ///
    /// # Errors
    /// The API server doesn't do it.
    pub async fn taint(&self, node: &str, add: &[&str], remove: &[&str]) -> Result<bool, ApiError> {
        let api: kube::Api<Node> = kube::Api::all(self.client.clone());
        let mut last = None;
        for _ in 0..TAINT_ATTEMPTS {
            let found = bounded(api.get(node)).await?;
            let old = found.spec.and_then(|spec| spec.taints).unwrap_or_default();
            let mut new = old.clone();
            new.retain(|taint| !remove.contains(&taint.key.as_str()));
            for key in add {
                if !new.iter().any(|taint| taint.key == *key) {
                    new.push(k8s_openapi::api::core::v1::Taint {
                        key: (*key).to_owned(),
                        effect: "NoSchedule".to_owned(),
                        ..Default::default()
                    });
                }
            }
            if new == old {
                return Ok(false);
            }
            // Replaces the list, unless somebody else has meanwhile.
            let patch = json!({
                "metadata": { "resourceVersion": found.metadata.resource_version },
                "spec": { "taints": new },
            });
            let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
            match bounded(api.patch(node, &parameters, &patch)).await {
                Ok(_) => return Ok(true),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| ApiError("no attempt was made".to_owned())))
    }
}

impl Api for Kubernetes {
    fn pod<'a>(&'a self, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<Pod>, ApiError>> {
        let api: kube::Api<KubePod> = kube::Api::namespaced(self.client.clone(), namespace);
        Box::pin(async move { Ok(bounded(api.get_opt(name)).await?.as_ref().and_then(Pod::of)) })
    }

    fn namespace<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<Mode>, ApiError>> {
        let api: kube::Api<Namespace> = kube::Api::all(self.client.clone());
        Box::pin(async move {
            let found = bounded(api.get_metadata_opt(name)).await?;
            Ok(found.map(|namespace| mode_of(namespace.metadata.labels.as_ref())))
        })
    }

    fn annotate<'a>(
        &'a self,
        pod: &'a PodIdentity,
        value: Option<&'static str>,
    ) -> BoxFuture<'a, Result<(), ApiError>> {
        let api: kube::Api<KubePod> = kube::Api::namespaced(self.client.clone(), &pod.namespace);
        // With the uid, the API server refuses to change another pod of that name.
        let patch = json!({ "metadata": { "uid": pod.uid, "annotations": { REDIRECTION: value } } });
        Box::pin(async move {
            let (parameters, patch) = (PatchParams::default(), Patch::Merge(patch));
            bounded(api.patch_metadata(&pod.name, &parameters, &patch)).await.map(drop)
        })
    }

    fn notify<'a>(&'a self, pod: &'a PodIdentity, notice: Notice) -> BoxFuture<'a, ()> {
        let reference = ObjectReference {
            api_version: Some(KubePod::api_version(&()).into_owned()),
            kind: Some(KubePod::kind(&()).into_owned()),
            namespace: Some(pod.namespace.clone()),
            name: Some(pod.name.clone()),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        };
        let mut note = notice.note;
        let end = (0..=NOTE_LIMIT).rev().find(|at| note.is_char_boundary(*at)).unwrap_or_default();
        note.truncate(end);
        let recorder = self.recorder(&note);
        let event = KubeEvent {
            type_: if notice.warning { EventType::Warning } else { EventType::Normal },
            reason: notice.reason.to_owned(),
            note: Some(note),
            action: "Enrol".to_owned(),
            secondary: None,
        };
        Box::pin(async move {
            if let Err(error) = bounded(recorder.publish(&event, &reference)).await {
                tracing::warn!(pod = %format_args!("{}/{}", pod.namespace, pod.name), %error, "an event is lost");
            }
        })
    }
}

fn mode_of(labels: Option<&std::collections::BTreeMap<String, String>>) -> Mode {
    labels?.get(DATAPLANE_MODE).cloned()
}

async fn bounded<T>(question: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ApiError> {
    match tokio::time::timeout(LIMIT, question).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(ApiError(format!("{} ({})", status.message, status.code))),
        Ok(Err(error)) => Err(ApiError(error.to_string())),
        Err(_) => Err(ApiError(format!("no answer within {LIMIT:?}"))),
    }
}

/// What a watch of one object has shown.
#[derive(Debug, Default)]
struct Own {
    /// Ever.
    seen: bool,
    /// In the list that is being read.
    listed: bool,
}

impl Own {
    /// Whether the object is gone, where an event tells. What never was there is not gone: a wrong name, or a right that is
    /// missing, must not take the pods out of the mesh.
    fn is_gone<K>(&mut self, event: &Event<PartialObjectMeta<K>>) -> Option<bool> {
        match event {
            Event::Init => {
                self.listed = false;
                None
            }
            Event::InitApply(object) | Event::Apply(object) => {
                (self.seen, self.listed) = (true, true);
                Some(object.metadata.deletion_timestamp.is_some())
            }
            Event::InitDone => (self.seen && !self.listed).then_some(true),
            Event::Delete(_) => Some(true),
        }
    }
}

/// Follows a watch, through its errors: it is taken up where it broke off, or begun anew, with growing pauses. `broken` is
/// told when it breaks and when it no longer is.
async fn follow<K: Send + 'static>(
    what: &'static str,
    watch: impl futures_util::Stream<Item = watcher::Result<Event<K>>> + Send,
    mut broken: impl FnMut(bool),
    mut take: impl FnMut(Event<K>),
) {
    let mut watch = pin!(watch.default_backoff());
    let (mut fails, mut is_behind) = (false, false);
    while let Some(event) = watch.next().await {
        match event {
            Ok(event) => {
                // The watch begins anew before anybody has answered.
                if !matches!(event, Event::Init) && std::mem::take(&mut fails) {
                    tracing::info!(what, "the API server answers again");
                }
                // Until the list is whole, what was known last is what is known.
                let is_whole = !matches!(event, Event::Init | Event::InitApply(_));
                take(event);
                if is_whole && std::mem::take(&mut is_behind) {
                    broken(false);
                }
            }
            Err(error) if !fails => {
                fails = true;
                if !std::mem::replace(&mut is_behind, true) {
                    broken(true);
                }
                tracing::warn!(what, %error, "the watch broke; what was known last stays, trying again");
            }
            Err(error) => tracing::debug!(what, %error, "the watch is still broken"),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;
    use kube::api::ObjectMeta;

    use super::*;

    #[test]
    fn only_what_was_there_is_gone() {
        let there = |deleted: bool| PartialObjectMeta::<DaemonSet> {
            metadata: ObjectMeta {
                deletion_timestamp: deleted.then_some(Time(Timestamp::UNIX_EPOCH)),
                ..ObjectMeta::default()
            },
            ..PartialObjectMeta::default()
        };
        let mut own = Own::default();
        assert_eq!(own.is_gone(&Event::<PartialObjectMeta<DaemonSet>>::Init), None);
        assert_eq!(own.is_gone(&Event::<PartialObjectMeta<DaemonSet>>::InitDone), None);
        assert_eq!(own.is_gone(&Event::Apply(there(false))), Some(false));
        assert_eq!(own.is_gone(&Event::Apply(there(true))), Some(true));
        assert_eq!(own.is_gone(&Event::Delete(there(false))), Some(true));
        // Made again.
        assert_eq!(own.is_gone(&Event::Apply(there(false))), Some(false));
        // Deleted while the watch was broken.
        assert_eq!(own.is_gone(&Event::<PartialObjectMeta<DaemonSet>>::Init), None);
        assert_eq!(own.is_gone(&Event::<PartialObjectMeta<DaemonSet>>::InitDone), Some(true));
    }
}
