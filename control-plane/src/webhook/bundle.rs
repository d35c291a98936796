//! What the control plane keeps in the configurations of its webhooks: the mesh's own roots, also while these rotate,
//! and the revisions whose objects the API server asks about: this one's name, and the tags that mean it. The chart writes
//! both configurations; the leader keeps them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use identity::RootId;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::ca::Proxy;
use crate::in_force::InForce;
use crate::source::chain;

/// How often they are looked at: a chart that is applied again takes the roots out.
const ROUND: Duration = Duration::from_secs(10);
/// The label that says which revision an object is of.
const REVISION: &str = "istio.io/rev";

/// Says the roots in force, as PEM and by their ids; `None` while there are none.
pub type Roots = Arc<dyn Fn() -> Option<(String, Vec<RootId>)> + Send + Sync>;

/// What is kept where.
pub struct Kept {
    /// The name of both configurations.
    pub name: String,
    /// The revision that this control plane is.
    pub revision: String,
    /// The roots.
    pub roots: Roots,
    /// The tags.
    pub in_force: watch::Receiver<InForce>,
    /// Which roots the configurations were last seen with, for the gates of a rotation; `None` where there are none.
    pub seen: Arc<Mutex<Option<Proxy>>>,
}

impl Kept {
    /// Keeps the configurations while this control plane leads.
    pub async fn run(mut self, client: Client, mut leads: watch::Receiver<bool>) {
        let resources = [
            ApiResource::erase::<ValidatingWebhookConfiguration>(&()),
            ApiResource::erase::<MutatingWebhookConfiguration>(&()),
        ];
        let apis = resources.map(|resource| Api::all_with(client.clone(), &resource));
        let mut failing = false;
        loop {
            if *leads.borrow_and_update() {
                match self.write(&apis).await {
                    Ok(()) => failing = false,
                    Err(reason) => {
                        if !std::mem::replace(&mut failing, true) {
                            let configuration = &self.name;
                            tracing::warn!(
                                configuration,
                                reason,
                                "the webhooks' configurations can't be kept"
                            );
                        }
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(ROUND) => {}
                Ok(()) = self.in_force.changed() => {}
                changed = leads.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Writes all that is there and is otherwise. A root counts as known only when all of them have it.
    async fn write(&mut self, apis: &[Api<DynamicObject>]) -> Result<(), String> {
        let Some((pem, ids)) = (self.roots)() else { return Ok(()) };
        let tags = self.in_force.borrow_and_update().tags.clone();
        let mut revisions: Vec<&str> = tags.iter().map(String::as_str).collect();
        revisions.push(&self.revision);
        revisions.sort_unstable();
        revisions.dedup();
        let mut there = false;
        for api in apis {
            let Some(object) = api.get_opt(&self.name).await.map_err(|e| chain(&e))? else { continue };
            there = true;
            let Some(webhooks) = edited(&object.data, &pem, &revisions) else { continue };
            let version = object.metadata.resource_version.unwrap_or_default();
            let patch = json!({ "metadata": { "resourceVersion": version }, "webhooks": webhooks });
            let patched = api.patch(&self.name, &PatchParams::default(), &Patch::Merge(&patch)).await;
            patched.map_err(|e| chain(&e))?;
            tracing::info!(
                configuration = self.name,
                kind = object.types.map(|types| types.kind),
                ?revisions,
                "a webhook's configuration has the roots"
            );
        }
        let name = format!("the webhook configurations {}", self.name);
        *lock(&self.seen) = there.then_some(Proxy { name, trusts: ids });
        Ok(())
    }
}

fn lock(seen: &Mutex<Option<Proxy>>) -> MutexGuard<'_, Option<Proxy>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The webhooks of a configuration with these roots, and for these revisions where they are for some; `None` when they
/// are so.
fn edited(data: &Value, roots: &str, revisions: &[&str]) -> Option<Value> {
    let mut webhooks = data.get("webhooks")?.as_array()?.clone();
    let bundle = json!(STANDARD.encode(roots));
    let mut changed = false;
    for webhook in &mut webhooks {
        let client = webhook.get_mut("clientConfig").and_then(Value::as_object_mut);
        // One that is reached by a URL is somebody else's.
        let Some(client) = client.filter(|client| client.contains_key("service")) else { continue };
        changed |= set(client, "caBundle", &bundle);
        let expressions =
            webhook.pointer_mut("/objectSelector/matchExpressions").and_then(Value::as_array_mut);
        for expression in expressions.into_iter().flatten().filter_map(Value::as_object_mut) {
            if expression.get("key") == Some(&json!(REVISION))
                && expression.get("operator") == Some(&json!("In"))
            {
                changed |= set(expression, "values", &json!(revisions));
            }
        }
    }
    changed.then_some(Value::Array(webhooks))
}

fn set(map: &mut serde_json::Map<String, Value>, key: &str, value: &Value) -> bool {
    let other = map.get(key) != Some(value);
    if other {
        map.insert(key.to_owned(), value.clone());
    }
    other
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_and_revisions_are_written_once_and_nothing_else_is_touched() {
        let revision = |values: Value| {
            json!({ "matchExpressions": [
            { "key": "other", "operator": "In", "values": ["x"] },
            { "key": "istio.io/rev", "operator": "In", "values": values },
        ] })
        };
        let absent = json!({ "matchExpressions": [{ "key": "istio.io/rev", "operator": "DoesNotExist" }] });
        let data = json!({ "webhooks": [
            { "name": "a", "failurePolicy": "Fail", "clientConfig": { "service": { "name": "culvertd" } },
              "objectSelector": revision(json!(["default"])) },
            { "name": "b", "clientConfig": { "url": "https://elsewhere" }, "objectSelector": revision(json!(["b"])) },
            { "name": "c", "clientConfig": { "service": { "name": "culvertd" } }, "objectSelector": absent },
        ] });
        let tagged = ["default", "stable"];
        let written = edited(&data, "PEM", &tagged).unwrap();
        assert_eq!(written[0]["clientConfig"]["caBundle"], "UEVN");
        assert_eq!(written[0]["failurePolicy"], "Fail");
        assert_eq!(written[0]["objectSelector"], revision(json!(tagged)));
        assert_eq!(written[1], data["webhooks"][1]);
        assert_eq!(written[2]["objectSelector"], absent);
        assert_eq!(edited(&json!({ "webhooks": written }), "PEM", &tagged), None);
        assert!(edited(&json!({ "webhooks": written }), "OTHER", &tagged).is_some());
        assert!(edited(&json!({ "webhooks": written }), "PEM", &["default"]).is_some());
        assert_eq!(edited(&json!({}), "PEM", &tagged), None);
    }
}
