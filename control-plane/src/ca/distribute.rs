//! The roots, where pods find them: the ConfigMap [`OWN_CONFIG_MAP`] in the mesh's own namespaces, which its own pods
//! mount; the ConfigMap [`CONFIG_MAP`] in every namespace of the mesh, for who knows Istio's; and a ClusterTrustBundle
//! where the API server has that API. Written by the replica that leads.
//!
//! What somebody edits or deletes is put right again, at first at once, then with pauses that double up to [`MAX_PAUSE`].
//! What is another's is left alone, and said in the log and in `/debug/ca`: an istiod writes a ConfigMap and a bundle of
//! the same names, and its pods trust its root by them. Whose something is, is whose field manager wrote its root last;
//! people who use `kubectl` are nobody's. Namespaces that are not of our discovery are not touched, nor are ConfigMaps
//! removed from those that leave it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::FieldsV1;
use kube::api::{ApiResource, DynamicObject, ObjectMeta, Patch, PatchParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use super::current::Current;
use super::record::ROOT_CERT;

/// The ConfigMap of our own pods; its key is `root-cert.pem`.
pub const OWN_CONFIG_MAP: &str = "culvert-ca-root-cert";
/// The ConfigMap by the name that users of Istio know, with the same key.
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
/// How often the ConfigMap of our own is looked at.
const OWN_LOOK: Duration = Duration::from_secs(10);
/// Namespaces that are named in one message.
const SHOWN: usize = 10;

/// The namespaces that get the ConfigMap.
pub type Namespaces = watch::Receiver<Arc<BTreeSet<String>>>;

/// What a ConfigMap holds.
#[derive(Debug, Default, PartialEq)]
struct Held {
    roots: String,
    /// Who else keeps it.
    owner: Option<String>,
}

impl Held {
    fn of(map: &ConfigMap) -> Self {
        let roots = map.data.as_ref().and_then(|data| data.get(ROOT_CERT)).cloned().unwrap_or_default();
        Self { roots, owner: owner(&map.metadata, &["f:data", "f:root-cert.pem"]) }
    }
}

/// Who else than we, and than people, wrote a field last.
fn owner(metadata: &ObjectMeta, path: &[&str]) -> Option<String> {
    let fields = metadata.managed_fields.iter().flatten();
    let wrote = |fields: &FieldsV1| path.iter().try_fold(&fields.0, |at, key| at.get(key)).is_some();
    let writers = fields.filter(|entry| entry.fields_v1.as_ref().is_some_and(wrote));
    let mut names = writers.map(|entry| entry.manager.as_deref().unwrap_or("somebody"));
    // Whoever writes what is there already shares the field: what we wrote too is ours.
    let first = names.next()?;
    let ours = |name: &str| name == MANAGER || name.starts_with("kubectl");
    (!ours(first) && !names.any(ours)).then(|| first.to_owned())
}

/// What is to be written where: pure, so that it can be tested.
#[derive(Debug, Default)]
struct Plan {
    /// What the ConfigMaps hold, as far as is known.
    have: HashMap<String, Held>,
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
        let differs = |held: &Held| held.roots != roots && held.owner.is_none();
        for namespace in wanted.iter().filter(|name| self.have.get(*name).is_none_or(differs)) {
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
            self.have.insert(namespace.clone(), Held { roots: roots.to_owned(), owner: None });
        }
        self.paused.insert(namespace, (now + pause, pause));
    }

    /// The namespaces whose ConfigMap is another's, by who keeps it.
    fn of_others(&self, wanted: &BTreeSet<String>) -> BTreeMap<String, Vec<String>> {
        let mut others: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for namespace in wanted {
            if let Some(owner) = self.have.get(namespace).and_then(|held| held.owner.as_ref()) {
                others.entry(owner.clone()).or_default().push(namespace.clone());
            }
        }
        others
    }
}

/// Writes the roots wherever they belong while this replica leads; `own` are the namespaces of the mesh's own pods. Runs
/// until the process ends. Needs the permissions `list`, `watch`, `create` and `patch` on ConfigMaps, and `create` and
/// `patch` on ClusterTrustBundles with `attest` for the signer `istio.io/istiod-ca`.
pub async fn distribute(
    client: Client,
    current: Current,
    own: BTreeSet<String>,
    namespaces: Namespaces,
    mut leads: watch::Receiver<bool>,
) {
    let bundles = tokio::spawn(keep_trust_bundle(client.clone(), current.clone(), leads.clone()));
    let own = tokio::spawn(keep_own(client.clone(), current.clone(), own, leads.clone()));
    let _stop = [AbortOnDrop(bundles.abort_handle()), AbortOnDrop(own.abort_handle())];
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
    let mut told = BTreeMap::new();
    loop {
        changes.mark_unchanged();
        let wanted = namespaces.borrow_and_update().clone();
        let roots = current.get().map(|in_force| in_force.roots_pem.clone());
        let (due, mut again) = match &roots {
            Some(roots) => plan.due(&wanted, roots, Instant::now()),
            None => (Vec::new(), None),
        };
        if plan.complete {
            tell_others(current, plan.of_others(&wanted), &mut told);
        }
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
    match event {
        Ok(Event::Init) => plan.have.clear(),
        Ok(Event::InitDone) => plan.complete = true,
        Ok(Event::InitApply(map) | Event::Apply(map)) => {
            if let Some(namespace) = map.namespace() {
                let held = Held::of(&map);
                let before = plan.have.get(&namespace).filter(|_| plan.complete && held.owner.is_none());
                if before.is_some_and(|before| before.roots != held.roots) {
                    let fields = map.metadata.managed_fields.as_deref().unwrap_or_default();
                    let last = fields.iter().max_by_key(|field| field.time.as_ref().map(|time| time.0));
                    let by = last.and_then(|field| field.manager.as_deref()).unwrap_or("somebody");
                    tracing::warn!(namespace, by, "ConfigMap {CONFIG_MAP} was changed; it is put right");
                }
                plan.have.insert(namespace, held);
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

/// Says whose ConfigMaps are left alone, when that changes.
fn tell_others(
    current: &Current,
    others: BTreeMap<String, Vec<String>>,
    told: &mut BTreeMap<String, Vec<String>>,
) {
    if others == *told {
        return;
    }
    for (owner, namespaces) in others.iter().filter(|(owner, names)| told.get(*owner) != Some(names)) {
        let shown = namespaces.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = if namespaces.len() > SHOWN { ", ..." } else { "" };
        tracing::warn!(
            by = owner,
            namespaces = namespaces.len(),
            "ConfigMap {CONFIG_MAP} of {shown}{more} is kept by another: it is left as it is, and who reads it trusts \
             that one's root. The mesh's own pods read {OWN_CONFIG_MAP}. If the other is gone, delete the ConfigMaps: \
             they are made anew"
        );
    }
    current.note_others(others.iter().map(|(owner, names)| (owner.clone(), names.len())).collect());
    *told = others;
}

/// Writes the ConfigMap of our own pods at each change, and puts it right. Runs until the process ends.
async fn keep_own(
    client: Client,
    current: Current,
    namespaces: BTreeSet<String>,
    mut leads: watch::Receiver<bool>,
) {
    let mut changes = current.subscribe();
    let mut told = String::new();
    loop {
        if leads.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        changes.mark_unchanged();
        let mut failure = String::new();
        if let Some(in_force) = current.get() {
            for namespace in &namespaces {
                if let Err(error) = put_own(&client, namespace, &in_force.roots_pem).await {
                    failure = format!("in namespace {namespace}: {error}");
                }
            }
        }
        if !failure.is_empty() && failure != told {
            tracing::warn!(
                "ConfigMap {OWN_CONFIG_MAP} not written, for which the mesh's own pods wait: {failure}"
            );
        }
        told = failure;
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(OWN_LOOK) => {}
        }
    }
}

async fn put_own(client: &Client, namespace: &str, roots: &str) -> Result<(), kube::Error> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let held = api.get_opt(OWN_CONFIG_MAP).await?.map(|map| Held::of(&map).roots);
    if held.as_deref() == Some(roots) {
        return Ok(());
    }
    write_config_map(client, OWN_CONFIG_MAP, namespace, roots).await
}

async fn write_all(client: &Client, plan: &mut Plan, due: Vec<String>, roots: &str) {
    let writes = due.into_iter().map(|namespace| async move {
        let result = write_config_map(client, CONFIG_MAP, &namespace, roots).await;
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

async fn write_config_map(
    client: &Client,
    name: &str,
    namespace: &str,
    roots: &str,
) -> Result<(), kube::Error> {
    let map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some(BTreeMap::from([("istio.io/config".to_owned(), "true".to_owned())])),
            ..Default::default()
        },
        data: Some(BTreeMap::from([(ROOT_CERT.to_owned(), roots.to_owned())])),
        ..ConfigMap::default()
    };
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    api.patch(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&map)).await.map(drop)
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
                Ok(Some(owner)) => format!(
                    "it is kept by {owner}, and left as it is; who reads it trusts that one's root. If that one is \
                     gone, delete it: it is made anew"
                ),
                Ok(None) => String::new(),
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

/// Writes the bundle by the newest version of the API that is there; nothing if there is none. Says who else keeps it.
async fn write_trust_bundle(client: &Client, roots: &str) -> Result<Option<String>, kube::Error> {
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
            return Ok(None);
        }
        let of = existing.as_ref().and_then(|bundle| owner(&bundle.metadata, &["f:spec", "f:trustBundle"]));
        if of.is_some() {
            return Ok(of);
        }
        let bundle = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {"name": TRUST_BUNDLE},
            "spec": {"signerName": TRUST_BUNDLE_SIGNER, "trustBundle": roots},
        });
        let params = PatchParams::apply(MANAGER).force();
        return api.patch(TRUST_BUNDLE, &params, &Patch::Apply(&bundle)).await.map(|_| None);
    }
    Ok(None)
}

#[cfg(test)]
#[path = "distribute_tests.rs"]
mod tests;
