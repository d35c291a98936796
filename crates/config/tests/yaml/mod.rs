//! Documents of YAML as JSON, by the parser of the crate.

use config::tree::{Node, Value};
use serde_json::{Value as Json, json};

/// What a node holds.
pub fn to_json(node: &Node<'_>) -> Json {
    match &node.value {
        Value::Null => Json::Null,
        Value::Bool(b) => json!(b),
        Value::Int(n) => json!(n),
        Value::Float(n) => json!(n),
        Value::String(s) => json!(s),
        Value::Sequence(items) => items.iter().map(to_json).collect(),
        Value::Mapping(entries) => {
            Json::Object(entries.iter().map(|e| (e.key.to_string(), to_json(&e.value))).collect())
        }
    }
}
