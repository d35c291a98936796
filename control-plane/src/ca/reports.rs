//! What proxies say of the roots that they trust, kept where every replica sees it and people, too: in the annotation
//! [`TRUSTED_ROOTS`] of the proxy's own pod.
//!
//! A proxy sends the ids of its roots with each request to the CA (metadata `TrustedRoots`, see
//! `identity::CaClient`), and makes one as soon as they change. Whichever replica gets it writes the annotation, if it
//! is another one; the replica that leads reads it from its pods when it judges the gate of a rotation. It goes with
//! the pod. A proxy that never says anything, being of another make, holds the gate, by name, until somebody accepts it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use futures_util::future::BoxFuture;
use identity::RootId;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use super::authenticate::Caller;

/// The annotation of a pod: the ids of the roots that its proxy trusts, with commas between.
pub const TRUSTED_ROOTS: &str = "culvert.dev/trusted-roots";
/// The last reports of so many pods are remembered, so that the same one is not written twice.
const REMEMBERED: usize = 16_384;

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
pub struct KubeRecorder {
    client: Client,
    last: Mutex<HashMap<String, String>>,
}

impl std::fmt::Debug for KubeRecorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KubeRecorder")
    }
}

impl KubeRecorder {
    /// Needs the permission to `patch` Pods in the namespaces of proxies.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client, last: Mutex::default() }
    }
}

impl Recorder for KubeRecorder {
    fn record<'a>(&'a self, caller: &'a Caller, roots: &'a [RootId]) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async move {
            let Some(pod) = &caller.pod else { return Ok(()) };
            let text = roots.iter().map(RootId::to_string).collect::<Vec<_>>().join(",");
            let last = |known: &HashMap<String, String>| known.get(&pod.uid) == Some(&text);
            if last(&self.last.lock().unwrap_or_else(PoisonError::into_inner)) {
                return Ok(());
            }
            // The uid keeps it from another pod of the same name.
            let patch = json!({"metadata": {"uid": pod.uid, "annotations": {TRUSTED_ROOTS: text}}});
            let pods: Api<Pod> = Api::namespaced(self.client.clone(), &caller.namespace);
            let patched = pods.patch_metadata(&pod.name, &PatchParams::default(), &Patch::Merge(patch)).await;
            patched.map_err(|e| {
                format!(
                    "the annotation {TRUSTED_ROOTS} of pod {}/{} can't be written: {e}. The control plane needs the \
                     permission to patch pods there",
                    caller.namespace, pod.name
                )
            })?;
            let mut known = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= REMEMBERED {
                known.clear();
            }
            known.insert(pod.uid.clone(), text);
            Ok(())
        })
    }
}
