//! `metadata`, which all objects have in common.

use std::sync::Arc;

use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Path, Schema, enforced, nested, silent};
use crate::keys;
use crate::labels::Labels;
use crate::tree::Position;

const BOOKKEEPING: &str = "the API server's bookkeeping";

/// `metadata`.
pub static METADATA: Schema = Schema {
    name: "metadata",
    fields: &[
        enforced("name"),
        enforced("namespace"),
        enforced("labels"),
        enforced("annotations"),
        nested("ownerReferences", &OWNER),
        enforced("deletionTimestamp"),
        enforced("creationTimestamp"),
        silent("uid", BOOKKEEPING),
        silent("resourceVersion", BOOKKEEPING),
        silent("generation", BOOKKEEPING),
        silent("generateName", "an object in a file has a name of its own"),
        silent("managedFields", BOOKKEEPING),
        silent("finalizers", BOOKKEEPING),
        silent("deletionGracePeriodSeconds", BOOKKEEPING),
        silent("selfLink", BOOKKEEPING),
    ],
};

static OWNER: Schema = Schema {
    name: "metadata.ownerReferences",
    fields: &[
        enforced("kind"),
        enforced("name"),
        enforced("controller"),
        silent("apiVersion", "kind and name suffice"),
        silent("uid", BOOKKEEPING),
        silent("blockOwnerDeletion", BOOKKEEPING),
    ],
};

/// What an object says of itself.
pub struct Metadata<'n> {
    /// Its name: a DNS subdomain.
    pub name: &'n str,
    /// Its namespace: a DNS label; empty for a kind that has none.
    pub namespace: &'n str,
    /// Its labels.
    pub labels: Labels,
    /// Where its labels stand.
    pub label_positions: Vec<(&'n str, Position)>,
    /// Its annotations, in the order of the file.
    pub annotations: Vec<Annotation<'n>>,
    /// The controller that made it.
    pub owner: Option<Owner<'n>>,
    /// Whether it is being deleted.
    pub terminating: bool,
    /// When it was made (RFC 3339), empty when not said.
    pub created: &'n str,
    /// Where `metadata` starts.
    pub position: Position,
}

/// An annotation.
#[derive(Clone, Copy)]
pub struct Annotation<'n> {
    /// Its key.
    pub key: &'n str,
    /// Its value.
    pub value: &'n str,
    /// Where the value starts.
    pub position: Position,
}

impl Annotation<'_> {
    /// Reports that the value means nothing for this annotation, which makes the object invalid.
    pub fn invalid(&self, fields: &mut Fields<'_, '_>, message: &str, remedy: &str) {
        self.report(fields, Code::InvalidValue, message, remedy);
    }

    /// Reports something about the value.
    pub fn report(&self, fields: &mut Fields<'_, '_>, code: Code, message: &str, remedy: &str) {
        let path = format!("metadata.annotations.{}", self.key);
        let message = format!("annotation {}: {message}", self.key);
        fields.context().report(code, self.position, &Path::of(&path), message, remedy);
    }
}

/// The object that made another.
#[derive(Clone, Copy)]
pub struct Owner<'n> {
    /// Its kind.
    pub kind: &'n str,
    /// Its name.
    pub name: &'n str,
}

impl<'n> Metadata<'n> {
    /// The annotation of a key.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&Annotation<'n>> {
        self.annotations.iter().find(|a| a.key == key)
    }

    /// An annotation that is `true` or `false`; anything else is reported.
    pub fn boolean_annotation(&self, key: &str, fields: &mut Fields<'_, '_>) -> Option<bool> {
        let annotation = self.annotation(key)?;
        match annotation.value {
            "true" => Some(true),
            "false" => Some(false),
            _ => {
                annotation.invalid(fields, "neither \"true\" nor \"false\"", "");
                None
            }
        }
    }

    /// Reports something about a label.
    pub fn report_label(
        &self,
        key: &str,
        fields: &mut Fields<'_, '_>,
        code: Code,
        message: &str,
        remedy: &str,
    ) {
        let found = self.label_positions.iter().find(|(k, _)| *k == key);
        let position = found.map_or(self.position, |(_, position)| *position);
        let path = format!("metadata.labels.{key}");
        fields.context().report(code, position, &Path::of(&path), format!("label {key}: {message}"), remedy);
    }
}

/// Reads `metadata` and names the object in the context. `None` when the object has no valid name or namespace.
pub fn read<'n>(cursor: Cursor<'_, 'n>, kind: &Arc<str>, namespaced: bool) -> Option<Metadata<'n>> {
    let mut fields = cursor.fields()?;
    let position = fields.position();
    let name = name(fields.required("name"), is_subdomain, "a DNS subdomain (a-z, 0-9, '-', '.')")?;
    let namespace = if namespaced {
        match fields.take("namespace") {
            Some(cursor) => self::name(Some(cursor), is_label, "a DNS label (a-z, 0-9, '-', at most 63)")?,
            None => "default",
        }
    } else {
        if let Some(mut cursor) = fields.take("namespace") {
            cursor.report(Code::InvalidValue, format!("a {kind} is in no namespace"), "remove it");
        }
        ""
    };
    fields.context().set_resource(kind.clone(), namespace, name);
    let (labels, label_positions) = labels(&mut fields);
    let mut annotations = Vec::new();
    if let Some(cursor) = fields.take("annotations") {
        cursor.entries(|key, mut value| {
            let position = value.position();
            keys::check(key, false, &mut value);
            annotations.extend(value.string().map(|value| Annotation { key, value, position }));
        });
    }
    Some(Metadata {
        name,
        namespace,
        labels,
        label_positions,
        annotations,
        owner: owner(&mut fields),
        terminating: fields.string("deletionTimestamp").is_some(),
        created: fields.string("creationTimestamp").unwrap_or_default(),
        position,
    })
}

fn name<'n>(cursor: Option<Cursor<'_, 'n>>, valid: fn(&str) -> bool, form: &str) -> Option<&'n str> {
    let cursor = cursor?;
    let node = cursor.node();
    let mut cursor = cursor;
    match node.as_str() {
        Some(text) if valid(text) => cursor.string(),
        Some(text) => {
            cursor.invalid(format_args!("{text:?} is not {form}"), "");
            None
        }
        None => {
            cursor.string();
            None
        }
    }
}

fn labels<'n>(fields: &mut Fields<'_, 'n>) -> (Labels, Vec<(&'n str, Position)>) {
    let (mut pairs, mut positions) = (Vec::new(), Vec::new());
    if let Some(cursor) = fields.take("labels") {
        cursor.entries(|key, mut value| {
            let position = value.position();
            if !is_label_key(key) {
                value.invalid("the key is not [prefix/]name with a name of at most 63 characters", "");
            }
            keys::check(key, true, &mut value);
            if value.node().as_str().is_some_and(|v| !is_label_value(v)) {
                value.invalid("not at most 63 letters, digits, '-', '_' and '.'", "");
            }
            if let Some(value) = value.string() {
                pairs.push((key, value));
                positions.push((key, position));
            }
        });
    }
    (fields.context().pool.labels(pairs), positions)
}

fn owner<'n>(fields: &mut Fields<'_, 'n>) -> Option<Owner<'n>> {
    let mut found = None;
    fields.each("ownerReferences", |item| {
        let Some(mut fields) = item.fields() else { return };
        let kind = fields.string("kind");
        let name = fields.string("name");
        let controller = fields.boolean("controller").unwrap_or(false);
        if let (Some(kind), Some(name), true, None) = (kind, name, controller, found) {
            found = Some(Owner { kind, name });
        }
    });
    found
}

/// RFC 1123, as `metadata.name` of most kinds.
#[must_use]
pub fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(|part| is_label_of(part, 253))
}

/// RFC 1123's label, as a namespace's name.
#[must_use]
pub fn is_label(text: &str) -> bool {
    is_label_of(text, 63)
}

fn is_label_of(text: &str, longest: usize) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty()
        && text.len() <= longest
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// `[prefix/]name`: the prefix a DNS subdomain, the name like a label's value.
#[must_use]
pub fn is_label_key(text: &str) -> bool {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    prefix.is_none_or(is_subdomain) && !name.is_empty() && is_label_value(name)
}

/// At most 63 letters, digits, `-`, `_` and `.`, the first and last a letter or digit.
#[must_use]
pub fn is_label_value(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let ends = |b: Option<u8>| b.is_none_or(|b| b.is_ascii_alphanumeric());
    text.len() <= 63 && text.bytes().all(inner) && ends(text.bytes().next()) && ends(text.bytes().last())
}
