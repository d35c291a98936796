//! The webhook's configuration trusts the mesh's own root: the leader writes it there and keeps it, also while the root
//! rotates.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use identity::RootId;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::ca::Proxy;
use crate::source::chain;

/// How often it is looked at: a chart that is applied again takes the root out.
const ROUND: Duration = Duration::from_secs(10);

/// Says the roots in force, as PEM and by their ids; `None` while there are none.
pub type Roots = Arc<dyn Fn() -> Option<(String, Vec<RootId>)> + Send + Sync>;

/// Keeps the configuration of this name while this control plane leads. `seen` says which roots it has, for the gates
/// of a rotation.
pub async fn keep(
    client: Client,
    name: String,
    roots: Roots,
    mut leads: watch::Receiver<bool>,
    seen: Arc<Mutex<Option<Proxy>>>,
) {
    let resource = ApiResource::erase::<ValidatingWebhookConfiguration>(&());
    let api: Api<DynamicObject> = Api::all_with(client, &resource);
    let mut failing = false;
    loop {
        if *leads.borrow_and_update()
            && let Some((pem, ids)) = roots()
        {
            match write(&api, &name, &pem).await {
                Ok(Outcome::NotThere) => *lock(&seen) = None,
                Ok(outcome) => {
                    if outcome == Outcome::Written {
                        tracing::info!(configuration = name, "the webhook's configuration has the roots");
                    }
                    let label = format!("ValidatingWebhookConfiguration {name}");
                    *lock(&seen) = Some(Proxy { name: label, trusts: ids });
                    failing = false;
                }
                Err(reason) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(
                            configuration = name,
                            reason,
                            "the webhook's configuration can't be kept"
                        );
                    }
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(ROUND) => {}
            changed = leads.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

fn lock(seen: &Mutex<Option<Proxy>>) -> MutexGuard<'_, Option<Proxy>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The configuration is nobody's to make: the chart has it or not.
    NotThere,
    Written,
    Unchanged,
}

async fn write(api: &Api<DynamicObject>, name: &str, roots: &str) -> Result<Outcome, String> {
    let Some(object) = api.get_opt(name).await.map_err(|e| chain(&e))? else { return Ok(Outcome::NotThere) };
    let Some(webhooks) = with_roots(&object.data, roots) else { return Ok(Outcome::Unchanged) };
    let version = object.metadata.resource_version.unwrap_or_default();
    let patch = json!({ "metadata": { "resourceVersion": version }, "webhooks": webhooks });
    api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.map_err(|e| chain(&e))?;
    Ok(Outcome::Written)
}

/// The configuration's webhooks with these roots; `None` when they have them.
fn with_roots(data: &Value, roots: &str) -> Option<Value> {
    let mut webhooks = data.get("webhooks")?.as_array()?.clone();
    let bundle = json!(STANDARD.encode(roots));
    let mut changed = false;
    for client in webhooks.iter_mut().filter_map(|w| w.get_mut("clientConfig")?.as_object_mut()) {
        // One that is reached by a URL is somebody else's.
        if client.contains_key("service") && client.get("caBundle") != Some(&bundle) {
            client.insert("caBundle".to_owned(), bundle.clone());
            changed = true;
        }
    }
    changed.then_some(Value::Array(webhooks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roots_are_written_once_and_nothing_else_is_touched() {
        let data = json!({ "webhooks": [
            { "name": "a", "failurePolicy": "Fail", "clientConfig": { "service": { "name": "culvertd" } } },
            { "name": "b", "clientConfig": { "url": "https://elsewhere" } },
        ] });
        let written = with_roots(&data, "PEM").unwrap();
        assert_eq!(written[0]["clientConfig"]["caBundle"], "UEVN");
        assert_eq!(written[0]["failurePolicy"], "Fail");
        assert_eq!(written[1], data["webhooks"][1]);
        assert_eq!(with_roots(&json!({ "webhooks": written }), "PEM"), None);
        assert!(with_roots(&json!({}), "PEM").is_none());
    }
}
