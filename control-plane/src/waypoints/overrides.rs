//! What users want otherwise of what is made of a Gateway: the keys of a ConfigMap, each a part of an object in YAML, that
//! is merged into it as a strategic merge patch (the form of `kubectl patch`, and of Istio's `parametersRef`). Pure.

use config::tree::{self, Limits, Node, Value as Tree};
use serde_json::{Map, Value};

/// The keys, and the kinds that they are of.
pub const KEYS: [(&str, &str); 5] = [
    ("deployment", "Deployment"),
    ("service", "Service"),
    ("serviceAccount", "ServiceAccount"),
    ("horizontalPodAutoscaler", "HorizontalPodAutoscaler"),
    ("podDisruptionBudget", "PodDisruptionBudget"),
];

/// Lists that are merged item by item, and the field that tells items apart (Kubernetes, `patchMergeKey`). All other lists
/// are replaced.
const MERGED: [(&str, &[&str]); 13] = [
    ("containers", &["name"]),
    ("initContainers", &["name"]),
    ("volumes", &["name"]),
    ("env", &["name"]),
    ("volumeMounts", &["mountPath"]),
    ("volumeDevices", &["devicePath"]),
    // Of a container, and of a Service.
    ("ports", &["containerPort", "port"]),
    ("imagePullSecrets", &["name"]),
    ("hostAliases", &["ip"]),
    ("topologySpreadConstraints", &["topologyKey"]),
    ("secrets", &["name"]),
    ("sources", &[]),
    ("resourceClaims", &["name"]),
];
/// The directive of a patch.
const DIRECTIVE: &str = "$patch";
/// What says what an object is, and whose; the control plane's to say.
const FIXED: [&str; 7] = [
    "/apiVersion",
    "/kind",
    "/metadata/name",
    "/metadata/namespace",
    "/metadata/ownerReferences",
    "/metadata/finalizers",
    "/spec/selector",
];
/// Values that nest deeper are refused.
const DEPTH: usize = 40;

/// Patches by the kind that they are for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides(Map<String, Value>);

impl Overrides {
    /// Reads the data of a ConfigMap.
    ///
    /// # Errors
    /// What is wrong, and with which key.
    pub fn of_data<'d>(data: impl Iterator<Item = (&'d str, &'d str)>) -> Result<Self, String> {
        let mut all = Map::new();
        for (key, text) in data {
            all.insert(key.to_owned(), parse(text).map_err(|error| format!("{key}: {error}"))?);
        }
        Self::of(all)
    }

    /// Reads a mapping from keys to patches.
    ///
    /// # Errors
    /// What is wrong, and with which key.
    pub fn of(all: Map<String, Value>) -> Result<Self, String> {
        let mut kinds = Map::new();
        for (key, patch) in all {
            let Some((_, kind)) = KEYS.iter().find(|(known, _)| *known == key) else {
                let known = KEYS.map(|(known, _)| known).join(", ");
                return Err(format!("there is no key {key:?}; there are {known}"));
            };
            if !patch.is_object() {
                return Err(format!("{key}: it is a part of a {kind}, and has to be a mapping"));
            }
            if let Some(fixed) = FIXED.iter().find(|path| patch.pointer(path).is_some()) {
                return Err(format!(
                    "{key}: {} is not to be changed",
                    fixed.replace('/', ".").trim_start_matches('.')
                ));
            }
            kinds.insert((*kind).to_owned(), patch);
        }
        Ok(Self(kinds))
    }

    /// Whether there is something for a kind.
    #[must_use]
    pub fn has(&self, kind: &str) -> bool {
        self.0.contains_key(kind)
    }

    /// Changes an object.
    pub fn apply(&self, object: &mut Value) {
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or_default();
        if let Some(patch) = self.0.get(kind) {
            merge(object, patch);
        }
    }
}

/// Merges a patch into a value.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *into = patch.clone();
        return;
    };
    if changes.get(DIRECTIVE).is_some_and(|directive| directive == "replace") || !into.is_object() {
        *into = Value::Object(Map::new());
    }
    let Value::Object(fields) = into else { return };
    for (key, change) in changes.iter().filter(|(key, _)| *key != DIRECTIVE) {
        match change {
            Value::Null => {
                fields.remove(key);
            }
            Value::Array(items) => {
                let list = fields.entry(key.clone()).or_insert_with(|| Value::Array(Vec::new()));
                merge_list(key, list, items);
            }
            Value::Object(part) if part.get(DIRECTIVE).is_some_and(|directive| directive == "delete") => {
                fields.remove(key);
            }
            _ => merge(fields.entry(key.clone()).or_insert(Value::Null), change),
        }
    }
}

fn merge_list(name: &str, into: &mut Value, patch: &[Value]) {
    let is = |item: &Value, directive: &str| item.get(DIRECTIVE).is_some_and(|d| d == directive);
    let keys = MERGED.iter().find(|(list, _)| *list == name).map_or(&[][..], |(_, keys)| *keys);
    let key = keys.iter().find(|key| patch.iter().any(|item| item.get(**key).is_some()));
    let replaced =
        patch.iter().any(|item| is(item, "replace") && item.as_object().is_some_and(|i| i.len() == 1));
    let Some(key) = key.filter(|_| !replaced) else {
        let left = patch.iter().filter(|item| !is(item, "replace") && !is(item, "delete"));
        *into = Value::Array(left.cloned().collect());
        return;
    };
    let Value::Array(items) = into else {
        *into = Value::Array(patch.to_vec());
        return;
    };
    for change in patch {
        let place = items.iter().position(|item| item.get(key).is_some() && item.get(key) == change.get(key));
        match (place, is(change, "delete")) {
            (Some(place), true) => {
                items.remove(place);
            }
            (None, true) => {}
            (Some(place), false) => {
                if let Some(item) = items.get_mut(place) {
                    merge(item, change);
                }
            }
            (None, false) => items.push(change.clone()),
        }
    }
}

/// A document of YAML; an empty one is an empty mapping.
fn parse(text: &str) -> Result<Value, String> {
    let mut documents = tree::documents(text);
    let (first, second) = (documents.next(), documents.next());
    if second.is_some() {
        return Err("it is several documents".to_owned());
    }
    let empty = || Value::Object(Map::new());
    let Some(document) = first else { return Ok(empty()) };
    let node = tree::parse(document, &Limits::default()).map_err(|error| error.to_string())?;
    node.map_or_else(|| Ok(empty()), |node| json(&node, 0))
}

fn json(node: &Node<'_>, depth: usize) -> Result<Value, String> {
    if depth > DEPTH {
        return Err("it nests too deep".to_owned());
    }
    Ok(match &node.value {
        Tree::Null => Value::Null,
        Tree::Bool(value) => Value::Bool(*value),
        Tree::Int(value) => Value::from(*value),
        Tree::Float(value) => Value::from(*value),
        Tree::String(value) => Value::from(value.as_ref()),
        Tree::Sequence(items) => {
            Value::Array(items.iter().map(|item| json(item, depth + 1)).collect::<Result<_, _>>()?)
        }
        Tree::Mapping(entries) => {
            let entry = |e: &tree::Entry<'_>| Ok((e.key.to_string(), json(&e.value, depth + 1)?));
            Value::Object(entries.iter().map(entry).collect::<Result<_, String>>()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn overrides(key: &str, text: &str) -> Result<Overrides, String> {
        Overrides::of_data([(key, text)].into_iter())
    }

    fn deployment() -> Value {
        json!({ "kind": "Deployment", "spec": { "template": { "spec": {
            "containers": [{ "name": "waypoint", "image": "a", "args": ["1", "2"],
                "env": [{ "name": "A", "value": "1" }, { "name": "B", "value": "2" }],
                "resources": { "requests": { "cpu": "100m", "memory": "64Mi" } } }],
            "tolerations": [{ "key": "a" }], "nodeSelector": { "os": "linux" },
        } } } })
    }

    #[test]
    fn containers_are_merged_by_name_and_other_lists_are_replaced() {
        let patch = "
            spec:
              replicas: 4
              template:
                spec:
                  nodeSelector: {os: null, disk: ssd}
                  tolerations: [{key: b}]
                  containers:
                  - name: waypoint
                    env: [{name: B, $patch: delete}, {name: C, value: '3'}]
                    resources: {requests: {cpu: 2}}
                  - {name: beside, image: b}
        ";
        let mut object = deployment();
        overrides("deployment", patch).unwrap().apply(&mut object);
        let pod = &object["spec"]["template"]["spec"];
        assert_eq!(object["spec"]["replicas"], 4);
        assert_eq!(pod["nodeSelector"], json!({ "disk": "ssd" }));
        assert_eq!(pod["tolerations"], json!([{ "key": "b" }]));
        let first = &pod["containers"][0];
        assert_eq!((&first["image"], &first["args"]), (&json!("a"), &json!(["1", "2"])));
        assert_eq!(first["env"], json!([{ "name": "A", "value": "1" }, { "name": "C", "value": "3" }]));
        assert_eq!(first["resources"]["requests"], json!({ "cpu": 2, "memory": "64Mi" }));
        assert_eq!(pod["containers"][1]["name"], "beside");
    }

    #[test]
    fn a_list_can_be_replaced_whole() {
        let mut object = deployment();
        let patch = "spec: {template: {spec: {containers: [{$patch: replace}, {name: other}]}}}";
        overrides("deployment", patch).unwrap().apply(&mut object);
        assert_eq!(object["spec"]["template"]["spec"]["containers"], json!([{ "name": "other" }]));
    }

    #[test]
    fn ports_of_a_service_are_merged_by_number() {
        let mut object =
            json!({ "kind": "Service", "spec": { "ports": [{ "port": 15008, "name": "mesh" }] } });
        let patch = "spec: {type: LoadBalancer, ports: [{port: 15008, nodePort: 30008}]}";
        overrides("service", patch).unwrap().apply(&mut object);
        assert_eq!(object["spec"]["ports"], json!([{ "port": 15008, "name": "mesh", "nodePort": 30008 }]));
        assert_eq!(object["spec"]["type"], "LoadBalancer");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_key() {
        let wrong = |key: &str, text: &str| overrides(key, text).unwrap_err();
        assert!(wrong("deploymnet", "").contains("there is no key \"deploymnet\""));
        assert!(wrong("deployment", "- a").starts_with("deployment: it is a part of a Deployment"));
        assert!(wrong("service", "{spec: {selector: {a: b}}}").contains("spec.selector"));
        assert!(wrong("service", "metadata: {name: other}").contains("metadata.name"));
        assert!(wrong("service", "a: [").starts_with("service: "));
        assert!(overrides("horizontalPodAutoscaler", "").unwrap().has("HorizontalPodAutoscaler"));
    }
}
