//! Writing conditions to the API server: several objects at a time, one request to look and one to change each.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use config::resource::Kind;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};

use super::conditions::Condition;
use crate::registry::{ObjectName, ObjectState};
use crate::source::{chain, find};

/// How often a write is tried whose object somebody else changes at the same time.
const TRIES: usize = 3;

/// Writes the status of objects.
pub struct Writer {
    client: Client,
    resources: Mutex<HashMap<Kind, ApiResource>>,
}

impl Writer {
    /// A writer.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client, resources: Mutex::default() }
    }

    /// Writes conditions of an object; those of others stay. Does nothing when the object is gone or another version by
    /// now: that is reported on for itself.
    ///
    /// # Errors
    /// The API server refuses it, or does not answer.
    pub async fn write(
        &self,
        name: &ObjectName,
        state: &ObjectState,
        wanted: &[Condition],
    ) -> Result<(), String> {
        let resource = self.resource(name.kind).await?;
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &name.namespace, &resource);
        let mut tries = 0;
        loop {
            tries += 1;
            let object = match api.get_opt(&name.name).await {
                Ok(Some(object)) => object,
                Ok(None) => {
                    self.lock().remove(&name.kind);
                    return Ok(());
                }
                Err(error) => return Err(chain(&error)),
            };
            let same = object.metadata.uid.as_deref() == Some(&state.version.uid)
                && object.metadata.generation.unwrap_or(0) == state.version.generation;
            let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let Some(status) = merged(&object.data, wanted, state.version.generation, &now).filter(|_| same)
            else {
                return Ok(());
            };
            let version = object.metadata.resource_version.unwrap_or_default();
            let patch = json!({ "metadata": { "resourceVersion": version }, "status": status });
            let patched = api.patch_status(&name.name, &PatchParams::default(), &Patch::Merge(&patch)).await;
            match patched {
                Ok(_) => return Ok(()),
                Err(kube::Error::Api(status)) if status.code == 409 && tries < TRIES => {}
                Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
                Err(error) => return Err(chain(&error)),
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Kind, ApiResource>> {
        self.resources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn resource(&self, kind: Kind) -> Result<ApiResource, String> {
        if let Some(known) = self.lock().get(&kind) {
            return Ok(known.clone());
        }
        let spec = kind.spec().ok_or("no such kind")?;
        let found = find(&self.client, spec).await.map_err(|error| chain(&error))?;
        let found = found.ok_or_else(|| format!("the API server does not have the kind {}", spec.name))?;
        self.lock().insert(kind, found.clone());
        Ok(found)
    }
}

/// The status with `wanted` in it; `None` when the object has it already. A condition's time is when it last turned.
fn merged(data: &Value, wanted: &[Condition], generation: i64, now: &str) -> Option<Value> {
    let old = data.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let is = |value: &Value, kind: &str| value.get("type").and_then(Value::as_str) == Some(kind);
    let ours = |c: &&Value| wanted.iter().any(|condition| is(c, condition.kind));
    let mut all: Vec<Value> = old.iter().filter(|c| !ours(c)).cloned().collect();
    for condition in wanted {
        let status = match condition.holds {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        let before = old.iter().find(|c| is(c, condition.kind));
        let turned = before.filter(|c| c.get("status").and_then(Value::as_str) == Some(status));
        let time = turned.and_then(|c| c.get("lastTransitionTime")).cloned().unwrap_or_else(|| json!(now));
        all.push(json!({
            "type": condition.kind,
            "status": status,
            "reason": condition.reason,
            "message": condition.message,
            "lastTransitionTime": time,
            "observedGeneration": generation,
        }));
    }
    if all == old {
        return None;
    }
    Some(json!({ "conditions": all, "observedGeneration": generation }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(holds: Option<bool>, message: &str) -> Condition {
        Condition { kind: "Enforced", holds, reason: "Reason", message: message.to_owned() }
    }

    #[test]
    fn conditions_of_others_stay_and_times_change_with_the_status_only() {
        let data = json!({ "status": { "conditions": [
            { "type": "WaypointAccepted", "status": "True" },
            { "type": "Enforced", "status": "True", "lastTransitionTime": "then" },
        ] } });
        let same = merged(&data, &[condition(Some(true), "2/2")], 7, "now").unwrap();
        assert_eq!(same["conditions"][0]["type"], "WaypointAccepted");
        assert_eq!(same["conditions"][1]["lastTransitionTime"], "then");
        assert_eq!(same["conditions"][1]["observedGeneration"], 7);
        let turned = merged(&data, &[condition(Some(false), "1/2")], 7, "now").unwrap();
        assert_eq!(turned["conditions"][1]["lastTransitionTime"], "now");
        assert_eq!(turned["conditions"][1]["status"], "False");
    }

    #[test]
    fn what_is_there_already_is_not_written() {
        let first = merged(&json!({}), &[condition(None, "x")], 1, "now").unwrap();
        let data = json!({ "status": first });
        assert_eq!(merged(&data, &[condition(None, "x")], 1, "later"), None);
        assert!(merged(&data, &[condition(None, "x")], 2, "later").is_some());
    }
}
