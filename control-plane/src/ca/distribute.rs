//! The roots, where pods find them: the ConfigMap [`CONFIG_MAP`] in every namespace of the mesh, and a
//! ClusterTrustBundle where the API server has that API. Written by the replica that leads.
//!
//! What somebody edits or deletes is put right again. Somebody who does so again and again, such as an istiod that
//! takes the same ConfigMap for its own, is not fought: the pauses double up to [`MAX_PAUSE`], and the log says who wrote
//! last. Namespaces that are not of our discovery are not touched, nor are ConfigMaps removed from those that leave it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::current::Current;
use super::record::ROOT_CERT;

/// The ConfigMap; its key is `root-cert.pem`.
pub const CONFIG_MAP: &str = "istio-ca-root-cert";
/// The ClusterTrustBundle, by the name that users of Istio know (facts 1.3, number 41).
pub const TRUST_BUNDLE: &str = "istio.io:istiod-ca:root-cert";
const TRUST_BUNDLE_SIGNER: &str = "istio.io/istiod-ca";
/// Its API, newest first.
const TRUST_BUNDLE_VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];

/// Whose field manager writes them.
const MANAGER: &str = "culvertd";
/// So many are written at once.
const WRITES: usize = 8;
/// The pause after a write to one namespace: the first, and the longest that it doubles to.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// See [`MIN_PAUSE`].
pub const MAX_PAUSE: Duration = Duration::from_secs(300);
/// After so long a quiet, pauses begin anew.
const QUIET: Duration = Duration::from_secs(600);
/// How often the ClusterTrustBundle is looked at.
const BUNDLE_LOOK: Duration = Duration::from_secs(60);

/// The namespaces that get the ConfigMap.
pub type Namespaces = watch::Receiver<Arc<BTreeSet<String>>>;

/// What is to be written where: pure, so that it can be tested.
#[derive(Debug, Default)]
struct Plan {
    /// What the ConfigMaps hold, as far as is known.
    have: HashMap<String, String>,
    /// Whether all ConfigMaps were read.
    complete: bool,
    /// When a namespace may be written again, and the pause after that.
    paused: HashMap<String, (Instant, Duration)>,
}

impl Plan {
    /// The namespaces to write now, and when to look again.
    fn due(
        &mut self,
        wanted: &BTreeSet<String>,
        roots: &str,
        now: Instant,
    ) -> (Vec<String>, Option<Instant>) {
        self.paused.retain(|_, (until, _)| now < *until + QUIET);
        if !self.complete {
            return (Vec::new(), None);
        }
        let mut due = Vec::new();
        let mut again: Option<Instant> = None;
        for namespace in wanted.iter().filter(|name| self.have.get(*name).is_none_or(|have| have != roots)) {
            match self.paused.get(namespace) {
                Some((until, _)) if now < *until => again = Some(again.map_or(*until, |at| at.min(*until))),
                _ => due.push(namespace.clone()),
            }
        }
        (due, again)
    }

    /// A namespace was written, or could not be.
    fn written(&mut self, namespace: String, roots: Option<&str>, now: Instant) {
        let pause = self.paused.get(&namespace).map_or(MIN_PAUSE, |(_, pause)| (*pause * 2).min(MAX_PAUSE));
        if let Some(roots) = roots {
            self.have.insert(namespace.clone(), roots.to_owned());
        }
        self.paused.insert(namespace, (now + pause, pause));
    }
}

/// Writes the roots wherever they belong while this replica leads. Runs until the process ends. Needs the permissions
/// `list`, `watch`, `create` and `patch` on ConfigMaps, and `create` and `patch` on ClusterTrustBundles with `attest` for
/// the signer `istio.io/istiod-ca`.
pub async fn distribute(
    client: Client,
    current: Current,
    namespaces: Namespaces,
    mut leads: watch::Receiver<bool>,
) {
    let bundles = tokio::spawn(keep_trust_bundle(client.clone(), current.clone(), leads.clone()));
    let _stop = AbortOnDrop(bundles.abort_handle());
    loop {
        if leads.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        tokio::select! {
            () = keep_config_maps(&client, &current, namespaces.clone()) => return,
            ended = leads.wait_for(|leads| !*leads) => if ended.is_err() { return },
        }
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Follows all ConfigMaps of the name, and writes those that differ. Returns when the process goes down.
async fn keep_config_maps(client: &Client, current: &Current, mut namespaces: Namespaces) {
    let all: Api<ConfigMap> = Api::all(client.clone());
    let config = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let events = watcher(all, config);
    let mut events = std::pin::pin!(events);
    let mut changes = current.subscribe();
    let mut plan = Plan::default();
    loop {
        changes.mark_unchanged();
        let wanted = namespaces.borrow_and_update().clone();
        let roots = current.get().map(|in_force| in_force.roots_pem.clone());
        let (due, mut again) = match &roots {
            Some(roots) => plan.due(&wanted, roots, Instant::now()),
            None => (Vec::new(), None),
        };
        if let Some(roots) = roots.filter(|_| !due.is_empty()) {
            write_all(client, &mut plan, due, &roots).await;
            again = Some(Instant::now());
        }
        let later = async {
            match again {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.next() => match event {
                Some(event) => take(&mut plan, event).await,
                None => return,
            },
            changed = namespaces.changed() => if changed.is_err() { return },
            changed = changes.changed() => if changed.is_err() { return },
            () = later => {}
        }
    }
}

async fn take(plan: &mut Plan, event: Result<Event<ConfigMap>, watcher::Error>) {
    let held =
        |map: &ConfigMap| map.data.as_ref().and_then(|data| data.get(ROOT_CERT)).cloned().unwrap_or_default();
    match event {
        Ok(Event::Init) => plan.have.clear(),
        Ok(Event::InitDone) => plan.complete = true,
        Ok(Event::InitApply(map) | Event::Apply(map)) => {
            if let Some(namespace) = map.namespace() {
                let text = held(&map);
                if plan.complete && plan.have.get(&namespace).is_some_and(|have| *have != text) {
                    let fields = map.metadata.managed_fields.as_deref().unwrap_or_default();
                    let last = fields.iter().max_by_key(|field| field.time.as_ref().map(|time| time.0));
                    let by = last.and_then(|field| field.manager.as_deref()).unwrap_or("somebody");
                    tracing::warn!(namespace, by, "ConfigMap {CONFIG_MAP} was changed; it is put right");
                }
                plan.have.insert(namespace, text);
            }
        }
        Ok(Event::Delete(map)) => {
            if let Some(namespace) = map.namespace() {
                plan.have.remove(&namespace);
            }
        }
        Err(error) => {
            tracing::warn!("the ConfigMaps {CONFIG_MAP} can't be followed: {error}");
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
}

async fn write_all(client: &Client, plan: &mut Plan, due: Vec<String>, roots: &str) {
    let writes = due.into_iter().map(|namespace| async move {
        let result = write_config_map(client, &namespace, roots).await;
        (namespace, result)
    });
    let mut writes = stream::iter(writes).buffer_unordered(WRITES);
    while let Some((namespace, result)) = writes.next().await {
        match &result {
            Ok(()) => {}
            Err(kube::Error::Api(status)) if is_ending(status) => {
                tracing::debug!(namespace, "ConfigMap {CONFIG_MAP} not written: {status}");
            }
            Err(error) => tracing::warn!(namespace, "ConfigMap {CONFIG_MAP} not written: {error}"),
        }
        plan.written(namespace, result.is_ok().then_some(roots), Instant::now());
    }
}

/// Whether a namespace refuses objects because it is on its way out.
fn is_ending(status: &kube::core::Status) -> bool {
    let causes = status.details.as_ref().map_or(&[][..], |details| &details.causes);
    status.is_not_found() || causes.iter().any(|cause| cause.reason == "NamespaceTerminating")
}

async fn write_config_map(client: &Client, namespace: &str, roots: &str) -> Result<(), kube::Error> {
    let map = ConfigMap {
        metadata: kube::api::ObjectMeta {
            name: Some(CONFIG_MAP.to_owned()),
            labels: Some(BTreeMap::from([("istio.io/config".to_owned(), "true".to_owned())])),
            ..Default::default()
        },
        data: Some(BTreeMap::from([(ROOT_CERT.to_owned(), roots.to_owned())])),
        ..ConfigMap::default()
    };
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    api.patch(CONFIG_MAP, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&map)).await.map(drop)
}

/// Writes the ClusterTrustBundle at each change, and looks at it now and then. Runs until the process ends.
async fn keep_trust_bundle(client: Client, current: Current, mut leads: watch::Receiver<bool>) {
    let mut changes = current.subscribe();
    let mut told = String::new();
    loop {
        if leads.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        changes.mark_unchanged();
        if let Some(in_force) = current.get() {
            let outcome = match write_trust_bundle(&client, &in_force.roots_pem).await {
                Ok(()) => String::new(),
                Err(error) => error.to_string(),
            };
            if !outcome.is_empty() && outcome != told {
                tracing::warn!("ClusterTrustBundle {TRUST_BUNDLE} not written: {outcome}");
            }
            told = outcome;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(BUNDLE_LOOK) => {}
        }
    }
}

/// Writes the bundle by the newest version of the API that is there; nothing if there is none.
async fn write_trust_bundle(client: &Client, roots: &str) -> Result<(), kube::Error> {
    let groups = client.list_api_groups().await?;
    let group = groups.groups.into_iter().find(|group| group.name == "certificates.k8s.io");
    let served: Vec<_> =
        group.into_iter().flat_map(|group| group.versions).map(|version| version.version).collect();
    for version in TRUST_BUNDLE_VERSIONS {
        if !served.iter().any(|served| served == version) {
            continue;
        }
        let resource = ApiResource {
            group: "certificates.k8s.io".to_owned(),
            version: version.to_owned(),
            api_version: format!("certificates.k8s.io/{version}"),
            kind: "ClusterTrustBundle".to_owned(),
            plural: "clustertrustbundles".to_owned(),
        };
        let known = client.list_api_group_resources(&resource.api_version).await?;
        if !known.resources.iter().any(|known| known.name == resource.plural) {
            continue;
        }
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let existing = api.get_opt(TRUST_BUNDLE).await?;
        let held = existing.as_ref().and_then(|bundle| bundle.data.pointer("/spec/trustBundle")?.as_str());
        if held == Some(roots) {
            return Ok(());
        }
        let bundle = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {"name": TRUST_BUNDLE},
            "spec": {"signerName": TRUST_BUNDLE_SIGNER, "trustBundle": roots},
        });
        let params = PatchParams::apply(MANAGER).force();
        return api.patch(TRUST_BUNDLE, &params, &Patch::Apply(&bundle)).await.map(drop);
    }
    Ok(())
}

#[cfg(test)]
#[path = "distribute_tests.rs"]
mod tests;
