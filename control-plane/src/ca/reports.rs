//! What proxies say of the roots that they trust, kept where every replica sees it and people, too: in the annotation
//! [`TRUSTED_ROOTS`] of the proxy's own pod.
//!
//! A proxy sends the ids of its roots to the CA when it starts and when they change (metadata `TrustedRoots` of a request
//! for its own identity, see `identity::CaClient`). Whichever replica gets it writes the annotation, and answers when
//! it is written; the replica that leads reads it from its pods when it judges the gate of a rotation. It goes with the
//! pod. A proxy that never says anything, being of another make, holds the gate, by name, until somebody accepts it.

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use identity::RootId;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use super::authenticate::Caller;

/// The annotation of a pod: the ids of the roots that its proxy trusts, with commas between.
pub const TRUSTED_ROOTS: &str = "culvert.dev/trusted-roots";

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
    /// Needs the permission to `patch` Pods in the namespaces of proxies.
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
            let pods: Api<Pod> = Api::namespaced(self.0.clone(), &caller.namespace);
            let patched = pods.patch_metadata(&pod.name, &PatchParams::default(), &Patch::Merge(patch)).await;
            patched.map(drop).map_err(|e| {
                format!(
                    "the annotation {TRUSTED_ROOTS} of pod {}/{} can't be written: {e}. The control plane needs the \
                     permission to patch pods there",
                    caller.namespace, pod.name
                )
            })
        })
    }
}
