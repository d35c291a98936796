//! Objects as an API server writes them: JSON, of which only what the mesh reads is kept while it is decoded.
//!
//! A pod of a busy cluster is some ten kilobytes, of which the mesh reads a few hundred bytes. The kind's [`Schema`]
//! says which: what it has as [`Disposition::Silent`] is skipped where it stands, so that no tree of it is ever built.
//! Reading what is left gives the same object and the same diagnostics as reading the whole; a test holds that.
//!
//! The server has checked its own kinds, and a newer server has fields that the table does not know. Of those kinds
//! (and in `metadata` of all) such a field is left out and told to the caller, not an error as in a file. Of custom
//! resources all is kept: a field that is not known could ask for a restriction.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::fields::{Disposition, Schema};
use crate::metadata::METADATA;
use crate::resource::{Kind, KindSpec};
use crate::tree::{Entry, Node, Position, Value};

/// Nothing of JSON has a place that would mean something to people.
const NOWHERE: Position = Position { line: 0, column: 0 };

/// Values that nest deeper are not built: no field of any kind is that deep, and the reader of JSON gives up at 128,
/// which would be the end of the whole list that the object is in. What stands for them is text ([`TOO_DEEP`]), which
/// where a field is known is of the wrong type, and elsewhere is of no consequence: the field is an error by its name.
const DEPTH: usize = 64;

/// What stands for a value that nests too deep.
const TOO_DEEP: &str = "(values that nest too deep)";

/// What is told of a field that the schema of this name does not have.
pub type Unknown<'u> = &'u dyn Fn(&'static str, &str);

/// What a server says of an object beside what the mesh reads.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bookkeeping {
    /// `metadata.resourceVersion`: another for each change of the object.
    pub resource_version: String,
    /// `metadata.uid`: another for each object of the same name.
    pub uid: String,
    /// `metadata.generation`: counts the changes of what users write; 0 where it is not said.
    pub generation: i64,
}

/// An object as far as the mesh reads it.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// The object.
    pub node: Node<'static>,
    /// What the server notes of it.
    pub bookkeeping: Bookkeeping,
}

impl Decoded {
    /// A text of `metadata`, such as `name`; empty where there is none.
    #[must_use]
    pub fn metadata(&self, field: &str) -> &str {
        let found = self.node.get("metadata").and_then(|m| m.get(field));
        found.and_then(Node::as_str).unwrap_or_default()
    }

    /// The value of a label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.node.get("metadata")?.get("labels")?.get(key)?.as_str()
    }
}

/// Decodes an object of a kind. `apiVersion` and `kind`, which the items of a server's lists lack, are
/// filled in.
#[derive(Clone, Copy)]
pub struct ObjectSeed<'u> {
    /// The kind.
    pub kind: Kind,
    /// Told of each field that is left out because it is not known.
    pub unknown: Unknown<'u>,
}

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = Decoded;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let spec = self.kind.spec().ok_or_else(|| D::Error::custom("a kind without a table of fields"))?;
        let checked = !spec.is_custom();
        let notes = RefCell::default();
        let seed =
            NodeSeed { schema: Some(spec.schema), checked, depth: 0, unknown: self.unknown, notes: &notes };
        let mut node = seed.deserialize(deserializer)?;
        fill_in(&mut node, spec);
        Ok(Decoded { node, bookkeeping: notes.into_inner() })
    }
}

fn fill_in(node: &mut Node<'_>, spec: &KindSpec) {
    let Value::Mapping(entries) = &mut node.value else { return };
    let version = spec.versions.first().copied().unwrap_or_default();
    let api_version: Cow<'static, str> =
        if spec.group.is_empty() { version.into() } else { format!("{}/{version}", spec.group).into() };
    for (key, value) in [("apiVersion", api_version), ("kind", spec.name.into())] {
        if !entries.iter().any(|entry| entry.key == key) {
            let value = Node { value: Value::String(value), position: NOWHERE };
            entries.push(Entry { key: key.into(), position: NOWHERE, value });
        }
    }
}

/// Decodes a value.
#[derive(Clone, Copy)]
struct NodeSeed<'u> {
    /// The fields of the value, or of its items; `None` to keep everything.
    schema: Option<&'static Schema>,
    /// Whether the server has checked the fields, so that those that the schema lacks are left out.
    checked: bool,
    /// How many values this one is in.
    depth: usize,
    unknown: Unknown<'u>,
    notes: &'u RefCell<Bookkeeping>,
}

/// What is done with a field's value.
enum Fate {
    Skip,
    Note(fn(&mut Bookkeeping, Scalar)),
    Keep { key: Cow<'static, str>, schema: Option<&'static Schema>, checked: bool },
}

impl NodeSeed<'_> {
    fn fate(&self, key: &str) -> Fate {
        let whole = |key: Cow<'static, str>| Fate::Keep { key, schema: None, checked: self.checked };
        let Some(schema) = self.schema else { return whole(key.to_owned().into()) };
        let Some(field) = schema.fields.iter().find(|f| f.name == key) else {
            if !self.checked {
                return whole(key.to_owned().into());
            }
            (self.unknown)(schema.name, key);
            return Fate::Skip;
        };
        if std::ptr::eq(schema, &METADATA)
            && let Some(note) = note(key)
        {
            return Fate::Note(note);
        }
        match (field.disposition, field.nested) {
            (Disposition::Silent(_), _) => Fate::Skip,
            (Disposition::Enforced, Some(nested)) if self.checked || std::ptr::eq(nested, &METADATA) => {
                Fate::Keep { key: field.name.into(), schema: Some(nested), checked: true }
            }
            _ => whole(field.name.into()),
        }
    }
}

impl Scalar {
    fn text(self) -> String {
        if let Self::Text(text) = self { text } else { String::new() }
    }
}

/// A value of [`Bookkeeping`].
#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Text(String),
    Number(i64),
    Other(IgnoredAny),
}

fn note(key: &str) -> Option<fn(&mut Bookkeeping, Scalar)> {
    match key {
        "resourceVersion" => Some(|notes, value| notes.resource_version = value.text()),
        "uid" => Some(|notes, value| notes.uid = value.text()),
        "generation" => {
            Some(|notes, value| notes.generation = if let Scalar::Number(n) = value { n } else { 0 })
        }
        _ => None,
    }
}

/// Decodes a key.
struct KeySeed<'s, 'u>(&'s NodeSeed<'u>);

impl<'de> DeserializeSeed<'de> for KeySeed<'_, '_> {
    type Value = Fate;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for KeySeed<'_, '_> {
    type Value = Fate;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.fate(key))
    }
}

impl<'de> DeserializeSeed<'de> for NodeSeed<'_> {
    type Value = Node<'static>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.depth >= DEPTH {
            // Without recursion, however deep it is.
            IgnoredAny::deserialize(deserializer)?;
            return node(Value::String(TOO_DEEP.into()));
        }
        deserializer.deserialize_any(self)
    }
}

fn node<E>(value: Value<'static>) -> Result<Node<'static>, E> {
    Ok(Node { value, position: NOWHERE })
}

impl<'de> Visitor<'de> for NodeSeed<'_> {
    type Value = Node<'static>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        node(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        node(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        node(Value::Int(value))
    }

    #[expect(clippy::cast_precision_loss, reason = "as the tree has numbers beyond 64 bits with a sign")]
    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        node(i64::try_from(value).map_or(Value::Float(value as f64), Value::Int))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        node(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        node(Value::String(value.to_owned().into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Self::Value, E> {
        node(Value::String(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        let inner = Self { depth: self.depth + 1, ..self };
        while let Some(item) = seq.next_element_seed(inner)? {
            items.push(item);
        }
        node(Value::Sequence(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(fate) = map.next_key_seed(KeySeed(&self))? {
            match fate {
                Fate::Skip => {
                    map.next_value::<IgnoredAny>()?;
                }
                Fate::Note(note) => note(&mut self.notes.borrow_mut(), map.next_value()?),
                Fate::Keep { key, schema, checked } => {
                    let value =
                        map.next_value_seed(NodeSeed { schema, checked, depth: self.depth + 1, ..self })?;
                    entries.push(Entry { key, position: NOWHERE, value });
                }
            }
        }
        node(Value::Mapping(entries))
    }
}
