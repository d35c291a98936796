//! What is put right in an object before it is stored: little, and only what leaves its meaning as it is.
//!
//! * A new pod does not have the annotation by which a node's agent says that it captured the pod: what is restored from a
//!   backup, or made of `kubectl get -o yaml`, would be taken for a pod that speaks HBONE before it does, and be out of reach.
//!   The API server asks about such pods only, see the chart.
//! * The fields that `kubectl get` shows of a policy or an external service have their defaults written in.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use config::kinds::pod::REDIRECTION;
use serde_json::{Value, json};

use super::review;

/// A field with its default.
type Default = (&'static str, &'static str);

/// Defaults, by group and kind.
const DEFAULTS: [(&str, &str, &[Default]); 2] = [
    ("security.istio.io", "AuthorizationPolicy", &[("action", "ALLOW")]),
    ("networking.istio.io", "ServiceEntry", &[("location", "MESH_EXTERNAL"), ("resolution", "NONE")]),
];

/// An answer.
#[derive(Debug)]
pub struct Mutated {
    /// The AdmissionReview.
    pub body: Vec<u8>,
    /// The kind of the object, if something of it is changed.
    pub changed: Option<&'static str>,
}

/// Answers a request. It never refuses an object.
///
/// # Errors
/// It is no AdmissionReview.
pub fn answer(body: &[u8]) -> Result<Mutated, String> {
    let asked = review::read(body)?;
    let (kind, patch) = match (asked.kind.group.as_str(), asked.kind.kind.as_str(), asked.operation.as_str())
    {
        ("", "Pod", "CREATE") => ("Pod", without_redirection(&asked.object)),
        (group, kind, "CREATE" | "UPDATE") => {
            let of_kind = DEFAULTS.iter().find(|(g, k, _)| *g == group && *k == kind);
            of_kind.map_or(("", Vec::new()), |(_, kind, fields)| (*kind, defaults(&asked.object, fields)))
        }
        _ => ("", Vec::new()),
    };
    let mut response = serde_json::Map::new();
    response.insert("uid".to_owned(), asked.uid.into());
    response.insert("allowed".to_owned(), true.into());
    let changed = (!patch.is_empty()).then_some(kind);
    if changed.is_some() {
        let patch = STANDARD.encode(Value::Array(patch).to_string());
        response.insert("patchType".to_owned(), "JSONPatch".into());
        response.insert("patch".to_owned(), patch.into());
    }
    if changed == Some("Pod") {
        let warning =
            format!("{REDIRECTION} is removed: the node's agent writes it when it has captured the pod");
        response.insert("warnings".to_owned(), json!([warning]));
    }
    Ok(Mutated { body: review::written(&response)?, changed })
}

fn without_redirection(pod: &Value) -> Vec<Value> {
    let annotations = pod.pointer("/metadata/annotations");
    let has = annotations.and_then(|all| all.get(REDIRECTION)).is_some();
    let path = format!("/metadata/annotations/{}", REDIRECTION.replace('~', "~0").replace('/', "~1"));
    has.then(|| json!({ "op": "remove", "path": path })).into_iter().collect()
}

/// An absent `spec` stays absent: half an object is to be refused, not filled.
fn defaults(object: &Value, fields: &[Default]) -> Vec<Value> {
    let Some(spec) = object.get("spec").and_then(Value::as_object) else { return Vec::new() };
    let missing = fields.iter().filter(|(field, _)| !spec.contains_key(*field));
    missing
        .map(|(field, value)| json!({ "op": "add", "path": format!("/spec/{field}"), "value": value }))
        .collect()
}
