//! A Gateway of the waypoint class as it is to be deployed, read from the API server's object. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use kube::api::DynamicObject;
use serde_json::Value;

/// The protocol and the port of a waypoint's listener.
pub const HBONE: (&str, i64) = ("HBONE", 15008);
/// The label of a Gateway that says which control plane it is of.
const REVISION: &str = "istio.io/rev";

/// A Gateway, as far as a waypoint is made of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Gateway {
    /// Its namespace.
    pub namespace: String,
    /// Its name, which all that is made of it has.
    pub name: String,
    /// Which object of this name.
    pub uid: String,
    /// Which version of it.
    pub generation: i64,
    /// Its class.
    pub class: String,
    /// The revision that it names.
    pub revision: Option<String>,
    /// Labels of its own that say what is for the control plane, and are on what is made of it, too.
    pub labels: BTreeMap<String, String>,
    /// `spec.infrastructure.labels`.
    pub infrastructure_labels: BTreeMap<String, String>,
    /// `spec.infrastructure.annotations`.
    pub infrastructure_annotations: BTreeMap<String, String>,
    /// The ConfigMap that says what is to be otherwise: its name.
    pub parameters: Option<Result<String, String>>,
    /// Its listeners.
    pub listeners: Vec<Listener>,
    /// Whether it asks for addresses of its own.
    pub asks_for_addresses: bool,
    /// Its status as it stands.
    pub status: Arc<Value>,
    /// Whether it is being deleted.
    pub going: bool,
}

/// A listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub protocol: String,
    /// Its port.
    pub port: i64,
}

impl Listener {
    /// Whether it is that of a waypoint.
    #[must_use]
    pub fn is_fine(&self) -> bool {
        (self.protocol.as_str(), self.port) == HBONE
    }
}

impl Gateway {
    /// Reads one. What the definition requires and is missing is as if it were empty.
    #[must_use]
    pub fn read(object: &DynamicObject) -> Self {
        let metadata = &object.metadata;
        let at = |path: &str| object.data.pointer(path);
        let text = |path: &str| at(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let labels = metadata.labels.clone().unwrap_or_default();
        let listeners = at("/spec/listeners").and_then(Value::as_array).into_iter().flatten();
        Self {
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            generation: metadata.generation.unwrap_or_default(),
            class: text("/spec/gatewayClassName"),
            revision: labels.get(REVISION).cloned(),
            labels: labels.into_iter().filter(|(key, _)| is_passed_on(key)).collect(),
            infrastructure_labels: texts(at("/spec/infrastructure/labels")),
            infrastructure_annotations: texts(at("/spec/infrastructure/annotations")),
            parameters: at("/spec/infrastructure/parametersRef").map(parameters),
            listeners: listeners.map(listener).collect(),
            asks_for_addresses: at("/spec/addresses")
                .and_then(Value::as_array)
                .is_some_and(|a| !a.is_empty()),
            status: Arc::new(object.data.get("status").cloned().unwrap_or(Value::Null)),
            going: metadata.deletion_timestamp.is_some(),
        }
    }

    /// Whether it is as a waypoint has to be; else what to change.
    ///
    /// # Errors
    /// Reason (Gateway API, `Accepted`) and message.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if self.asks_for_addresses {
            let message = "a waypoint has the address of its Service: remove spec.addresses";
            return Err(("UnsupportedAddress", message.to_owned()));
        }
        if self.listeners.len() != 1 || !self.listeners.iter().all(Listener::is_fine) {
            let message =
                "a waypoint has one listener: {name: mesh, protocol: HBONE, port: 15008}".to_owned();
            return Err(("ListenersNotValid", message));
        }
        Ok(())
    }
}

/// What of a Gateway's own labels is on what is made of it, too.
fn is_passed_on(key: &str) -> bool {
    key == "istio.io/waypoint-for" || key.starts_with("topology.istio.io/")
}

fn texts(value: Option<&Value>) -> BTreeMap<String, String> {
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

fn parameters(reference: &Value) -> Result<String, String> {
    let text = |key: &str| reference.get(key).and_then(Value::as_str).unwrap_or_default();
    match (text("group"), text("kind")) {
        ("" | "core", "ConfigMap") => Ok(text("name").to_owned()),
        (group, kind) => Err(format!("it refers to a {kind} of the group {group:?}, and not to a ConfigMap")),
    }
}

fn listener(value: &Value) -> Listener {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let port = value.get("port").and_then(Value::as_i64).unwrap_or_default();
    Listener { name: text("name"), protocol: text("protocol"), port }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A Gateway of this spec.
    pub fn gateway(spec: &Value) -> Gateway {
        let object = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": { "name": "waypoint", "namespace": "shop", "uid": "u-1", "generation": 3,
                "labels": { "istio.io/waypoint-for": "all", "team": "a" } },
            "spec": spec,
        });
        Gateway::read(&serde_json::from_value(object).unwrap())
    }

    /// The spec of a usual one.
    pub fn spec() -> Value {
        json!({
            "gatewayClassName": "culvert-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        })
    }

    #[test]
    fn a_waypoint_has_one_listener_for_hbone() {
        let of = |spec: &Value| gateway(spec).check().map_err(|(reason, _)| reason);
        assert_eq!(of(&spec()), Ok(()));
        let mut other = spec();
        other["listeners"][0]["protocol"] = json!("HTTP");
        assert_eq!(of(&other), Err("ListenersNotValid"));
        let mut two = spec();
        two["listeners"].as_array_mut().unwrap().push(json!({ "name": "b", "port": 80, "protocol": "HTTP" }));
        assert_eq!(of(&two), Err("ListenersNotValid"));
        let mut addressed = spec();
        addressed["addresses"] = json!([{ "value": "10.0.0.1" }]);
        assert_eq!(of(&addressed), Err("UnsupportedAddress"));
    }

    #[test]
    fn parameters_are_a_config_map() {
        let mut with = spec();
        with["infrastructure"] =
            json!({ "parametersRef": { "group": "", "kind": "ConfigMap", "name": "own" } });
        assert_eq!(gateway(&with).parameters, Some(Ok("own".to_owned())));
        with["infrastructure"]["parametersRef"]["kind"] = json!("Secret");
        assert!(gateway(&with).parameters.unwrap().unwrap_err().contains("Secret"));
        assert_eq!(gateway(&spec()).parameters, None);
    }

    #[test]
    fn labels_for_the_control_plane_are_passed_on() {
        let labels = gateway(&spec()).labels;
        assert_eq!(labels.keys().collect::<Vec<_>>(), ["istio.io/waypoint-for"]);
    }
}
