//! What proxies say of the roots that they trust, kept where every replica sees it and people, too: in the annotation
//! [`TRUSTED_ROOTS`] of the proxy's own pod.
//!
//! A proxy sends the ids of its roots to the CA when it starts and when they change (metadata `TrustedRoots` of a request
//! for its own identity, see `identity::CaClient`). Whichever replica gets it writes the annotation, and answers when
//! it is written; the replica that leads reads it from its pods when it judges the gate of a rotation. It goes with the
//! pod. A node proxy that never says anything, being of another make, holds the gate, by name, until somebody accepts it;
//! waypoints count once they have said something. Each replica of the control plane says of itself what it trusts.
//!
//! It is written through the status of pods: whoever may do that can't change what a pod runs.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::BoxFuture;
use identity::RootId;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::authenticate::Caller;
use super::current::Current;

/// The annotation of a pod: the ids of the roots that its proxy trusts, with commas between.
pub const TRUSTED_ROOTS: &str = "culvert.dev/trusted-roots";
/// After a failure to tell what we trust ourselves.
const RETRY: Duration = Duration::from_secs(30);

/// The roots that a pod's annotations say its proxy trusts.
#[must_use]
pub fn trusted_roots(annotations: &BTreeMap<String, String>) -> Vec<RootId> {
    let text = annotations.get(TRUSTED_ROOTS).map_or("", String::as_str);
    text.split(',').filter_map(|id| RootId::from_hex(id.trim())).collect()
}

/// Keeps what proxies say.
pub trait Recorder: Send + Sync + 'static {
    /// Keeps it for the caller's pod; a caller without a pod has nothing to say.
    fn record<'a>(&'a self, caller: &'a Caller, roots: &'a [RootId]) -> BoxFuture<'a, Result<(), String>>;
}

/// Writes the annotation.
pub struct KubeRecorder(Client);

impl std::fmt::Debug for KubeRecorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KubeRecorder")
    }
}

impl KubeRecorder {
    /// Needs the permission to `patch` `pods/status` in the namespaces of proxies.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self(client)
    }
}

impl Recorder for KubeRecorder {
    fn record<'a>(&'a self, caller: &'a Caller, roots: &'a [RootId]) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let Some(pod) = &caller.pod else { return Ok(()) };
            let text = roots.iter().map(RootId::to_string).collect::<Vec<_>>().join(",");
            // The uid keeps it from another pod of the same name.
            let patch = json!({"metadata": {"uid": pod.uid, "annotations": {TRUSTED_ROOTS: text}}});
            annotate(&self.0, &caller.namespace, &pod.name, patch).await.map_err(|e| {
                format!(
                    "the annotation {TRUSTED_ROOTS} of pod {}/{} can't be written: {e}. The control plane needs the \
                     permission to patch pods/status there",
                    caller.namespace, pod.name
                )
            })
        })
    }
}

async fn annotate(client: &Client, namespace: &str, pod: &str, patch: Value) -> Result<(), kube::Error> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    pods.patch_status(pod, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
}

/// Says at this control plane's own pod which roots it trusts: by them it judges the other replicas. Runs until the
/// process ends.
pub async fn report_own(client: Client, current: Current, namespace: String, pod: String) {
    let mut changes = current.subscribe();
    let mut told = String::new();
    loop {
        changes.mark_unchanged();
        let mut failed = false;
        if let Some(in_force) = current.get() {
            let ids = in_force.record.root_ids();
            let text = ids.iter().map(RootId::to_string).collect::<Vec<_>>().join(",");
            let patch = json!({"metadata": {"annotations": {TRUSTED_ROOTS: text}}});
            if let Err(error) = annotate(&client, &namespace, &pod, patch).await {
                let error = error.to_string();
                if error != told {
                    tracing::info!(pod, "which roots this control plane trusts is not told: {error}");
                    told = error;
                }
                failed = true;
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if failed => {}
        }
    }
}
