//! What a server has given to objects: an address, a node, a status. Who writes an object to a file leaves it out, and means what
//! the server has.

use hashbrown::HashMap;

use crate::resource;
use crate::tree::{Entry, Node, Value};

/// The fields that a server gives objects of a kind, each with the field that it is in, and those beside it that say that it has none
/// of the server's.
const FIELDS: &[(&str, Option<&str>, &str, &[&str])] = &[
    ("Service", Some("spec"), "clusterIP", &["clusterIP", "clusterIPs", "externalName"]),
    ("Service", Some("spec"), "clusterIPs", &["clusterIP", "clusterIPs", "externalName"]),
    ("Service", None, "status", &["status"]),
    ("Pod", Some("metadata"), "uid", &["uid"]),
    ("Pod", Some("spec"), "nodeName", &["nodeName"]),
    ("Pod", None, "status", &["status"]),
    ("Node", None, "status", &["status"]),
];

/// See the module's documentation. By kind, namespace and name.
#[derive(Debug, Default)]
pub(super) struct Assigned(HashMap<[String; 3], Node<'static>>);

impl Assigned {
    /// Remembers what `object` was given. Of other kinds nothing is.
    pub(super) fn add(&mut self, object: Node<'static>) {
        if let Some(key) = key(&object) {
            self.0.insert(key, object);
        }
    }

    /// Puts it into the objects of a document that lack it.
    pub(super) fn complete(&self, root: &mut Node<'_>) {
        if self.0.is_empty() {
            return;
        }
        if resource::list_items(root).is_none() {
            self.complete_one(root);
        } else if let Some(Value::Sequence(items)) = value_of(root, "items") {
            for item in items {
                self.complete_one(item);
            }
        }
    }

    fn complete_one(&self, object: &mut Node<'_>) {
        let Some(given) = key(object).and_then(|key| self.0.get(&key)) else { return };
        let kind = given.get("kind").and_then(Node::as_str).unwrap_or_default();
        let mut missing = Vec::new();
        for (_, parent, field, instead) in FIELDS.iter().filter(|(of, ..)| *of == kind) {
            let value = inside(given, *parent).and_then(|given| given.get(field));
            let is_free = inside(object, *parent)
                .is_some_and(|here| instead.iter().all(|other| here.get(other).is_none()));
            if let (Some(value), true) = (value, is_free) {
                missing.push((parent, *field, value));
            }
        }
        for (parent, field, value) in missing {
            let inside = match parent {
                Some(parent) => value_of(object, parent),
                None => Some(&mut object.value),
            };
            if let Some(Value::Mapping(entries)) = inside {
                entries.push(Entry { key: field.into(), position: value.position, value: value.clone() });
            }
        }
    }
}

fn inside<'n, 's>(object: &'n Node<'s>, parent: Option<&str>) -> Option<&'n Node<'s>> {
    parent.map_or(Some(object), |parent| object.get(parent))
}

fn value_of<'n, 's>(node: &'n mut Node<'s>, key: &str) -> Option<&'n mut Value<'s>> {
    let Value::Mapping(entries) = &mut node.value else { return None };
    entries.iter_mut().find(|entry| entry.key == key).map(|entry| &mut entry.value.value)
}

fn key(object: &Node<'_>) -> Option<[String; 3]> {
    let kind = object.get("kind")?.as_str()?;
    let metadata = object.get("metadata")?;
    let namespace = match kind {
        "Node" => "",
        _ => metadata.get("namespace").and_then(Node::as_str).unwrap_or("default"),
    };
    let is_given = FIELDS.iter().any(|(of, ..)| *of == kind);
    let name = metadata.get("name")?.as_str()?;
    is_given.then(|| [kind, namespace, name].map(str::to_owned))
}
