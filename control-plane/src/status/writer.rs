//! Writing conditions to the API server: several objects at a time, one request to look and one to change each.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use config::resource::Kind;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde_json::{Value, json};

use super::conditions::Condition;
use crate::registry::{ObjectName, ObjectState, is_route};
use crate::source::{chain, find};

/// How often a write is tried whose object somebody else changes at the same time.
const TRIES: usize = 3;

/// Who says what is said of routes, and who deploys waypoints.
pub const CONTROLLER: &str = "culvert.dev/mesh-controller";

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
            let status = merged(name.kind, &object.data, wanted, state.version.generation, &now);
            let Some(status) = status.filter(|_| same) else { return Ok(()) };
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
        let found = if spec.is_custom() {
            let found = find(&self.client, spec).await.map_err(|error| chain(&error))?;
            found.ok_or_else(|| format!("the API server does not have the kind {}", spec.name))?
        } else {
            let version = spec.versions.first().copied().unwrap_or("v1");
            ApiResource::from_gvk(&GroupVersionKind::gvk(spec.group, version, spec.name))
        };
        self.lock().insert(kind, found.clone());
        Ok(found)
    }
}

/// The status with `wanted` in it; `None` when the object has it already.
fn merged(kind: Kind, data: &Value, wanted: &[Condition], generation: i64, now: &str) -> Option<Value> {
    if is_route(kind) {
        return with_parents(data, wanted, generation, now);
    }
    let old = list(data, "/status/conditions");
    let wanted: Vec<&Condition> = wanted.iter().collect();
    let all = put_in(&old, &wanted, generation, now);
    if all == old {
        return None;
    }
    // Of Kubernetes' own kinds none has it.
    if !kind.spec().is_some_and(config::resource::KindSpec::is_custom) {
        return Some(json!({ "conditions": all }));
    }
    Some(json!({ "conditions": all, "observedGeneration": generation }))
}

/// The conditions of a list with `wanted` in it. A condition's time is when it last turned.
pub(crate) fn put_in(old: &[Value], wanted: &[&Condition], generation: i64, now: &str) -> Vec<Value> {
    let is = |value: &Value, kind: &str| value.get("type").and_then(Value::as_str) == Some(kind);
    let says = |c: &Value, start: &str| {
        start.is_empty() || c.get("message").and_then(Value::as_str).is_some_and(|m| m.starts_with(start))
    };
    let ours = |c: &&Value| {
        let goes = |w: &Condition| !w.is_none() || says(c, &w.message);
        wanted.iter().any(|condition| is(c, condition.kind) && goes(condition))
    };
    let mut all: Vec<Value> = old.iter().filter(|c| !ours(c)).cloned().collect();
    for condition in wanted.iter().filter(|condition| !condition.is_none()) {
        let status = match condition.holds {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        let before = old.iter().find(|c| is(c, condition.kind));
        let turned = before.filter(|c| c.get("status").and_then(Value::as_str) == Some(status));
        let time = turned.and_then(|c| c.get("lastTransitionTime")).cloned().unwrap_or_else(|| json!(now));
        let mut new = json!({
            "type": condition.kind,
            "status": status,
            "reason": condition.reason,
            "message": condition.message,
            "lastTransitionTime": time,
        });
        // Objects that have no generation are not compared by it, and their servers leave it out.
        if generation > 0
            && let Some(new) = new.as_object_mut()
        {
            new.insert("observedGeneration".to_owned(), generation.into());
        }
        all.push(new);
    }
    all
}

/// A route's status: entries of other controllers stay as they are, and where they are.
fn with_parents(data: &Value, wanted: &[Condition], generation: i64, now: &str) -> Option<Value> {
    let old = list(data, "/status/parents");
    let is_ours = |entry: &&Value| entry.get("controllerName").is_some_and(|name| name == CONTROLLER);
    let mut all: Vec<Value> = old.iter().filter(|entry| !is_ours(entry)).cloned().collect();
    let mut parents: Vec<&Value> = Vec::new();
    for parent in wanted.iter().filter_map(|condition| condition.parent.as_deref()) {
        if !parents.contains(&parent) {
            parents.push(parent);
        }
    }
    for parent in parents {
        let of_parent: Vec<&Condition> =
            wanted.iter().filter(|condition| condition.parent.as_deref() == Some(parent)).collect();
        let before = old.iter().filter(is_ours).find(|entry| entry.get("parentRef") == Some(parent));
        let before = before.map(|entry| list(entry, "/conditions")).unwrap_or_default();
        // All conditions of an entry of ours are ours.
        let kept = before
            .into_iter()
            .filter(|c| of_parent.iter().any(|w| c.get("type").is_some_and(|t| t == w.kind)));
        let kept: Vec<Value> = kept.collect();
        all.push(json!({
            "parentRef": parent,
            "controllerName": CONTROLLER,
            "conditions": put_in(&kept, &of_parent, generation, now),
        }));
    }
    // The order of what is the same says nothing.
    let is_same = all.len() == old.len() && all.iter().all(|entry| old.contains(entry));
    (!is_same).then(|| json!({ "parents": all }))
}

fn list(data: &Value, path: &str) -> Vec<Value> {
    data.pointer(path).and_then(Value::as_array).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn condition(holds: Option<bool>, message: &str) -> Condition {
        Condition { kind: "Enforced", holds, reason: "Reason", message: message.to_owned(), parent: None }
    }

    fn merged(data: &Value, wanted: &[Condition], generation: i64, now: &str) -> Option<Value> {
        super::merged(Kind::AuthorizationPolicy, data, wanted, generation, now)
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

    #[test]
    fn what_is_not_so_any_more_is_removed() {
        let data = json!({ "status": { "conditions": [{ "type": "a" }, { "type": "b" }] } });
        let service = |data: &Value| super::merged(Kind::Service, data, &[Condition::none("a")], 0, "now");
        let left = service(&data).unwrap();
        assert_eq!(left, json!({ "conditions": [{ "type": "b" }] }));
        assert_eq!(service(&json!({ "status": left })), None);
        // Only what we said, where it may be another's.
        let policy = |message: &str| {
            let data = json!({ "status": { "conditions": [{ "type": "a", "message": message }] } });
            merged(&data, &[Condition::none_of("a", "waypoints ")], 1, "now")
        };
        assert_eq!(policy("bound to shop/gate"), None);
        assert_eq!(policy("waypoints enforce it").unwrap()["conditions"], json!([]));
        assert_eq!(policy("waypoints don't enforce it").unwrap()["conditions"], json!([]));
    }

    #[test]
    fn a_route_has_an_entry_of_ours_for_each_parent_beside_those_of_others() {
        let (one, two) = (Arc::new(json!({ "name": "one" })), Arc::new(json!({ "name": "two" })));
        let about = |parent: &Arc<Value>, holds| Condition {
            parent: Some(parent.clone()),
            ..condition(Some(holds), "x")
        };
        let theirs = json!({ "parentRef": { "name": "one" }, "controllerName": "example.org/other", "conditions": [] });
        let route = |data: &Value, wanted: &[Condition], now: &str| {
            super::merged(Kind::HttpRoute, data, wanted, 3, now).map(|status| json!({ "status": status }))
        };
        let data = json!({ "status": { "parents": [theirs] } });
        let both = route(&data, &[about(&one, true), about(&two, true)], "then").unwrap();
        let parents = both["status"]["parents"].as_array().unwrap();
        assert_eq!((parents.len(), &parents[0]), (3, &theirs));
        assert_eq!(parents[2]["controllerName"], CONTROLLER);
        assert_eq!(parents[2]["conditions"][0]["observedGeneration"], 3);
        assert_eq!(route(&both, &[about(&two, true), about(&one, true)], "now"), None);
        let left = route(&both, &[about(&two, false)], "now").unwrap();
        let parents = left["status"]["parents"].as_array().unwrap();
        assert_eq!((parents.len(), &parents[0]), (2, &theirs));
        assert_eq!(parents[1]["parentRef"], *two);
        assert_eq!(parents[1]["conditions"][0]["lastTransitionTime"], "now");
    }
}
