//! Which namespaces are read (`discoverySelectors`): those that one of the selectors matches, all of them where there
//! are none. It is the source of the objects that leaves the others out, see [`crate::repository`].

use model::Str;

use crate::compile::Finding;
use crate::diagnostic::Code;
use crate::fields::{Cursor, Schema, enforced, nested};

/// A label selector of Kubernetes.
pub static SELECTOR: Schema = Schema {
    name: "MeshConfig.spec.discoverySelectors",
    fields: &[enforced("matchLabels"), nested("matchExpressions", &EXPRESSION)],
};

static EXPRESSION: Schema = Schema {
    name: "MeshConfig.spec.discoverySelectors.matchExpressions",
    fields: &[enforced("key"), enforced("operator"), enforced("values")],
};

/// Labels that a namespace must have; all of the requirements hold. Without any it matches every namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NamespaceSelector(Vec<Requirement>);

#[derive(Clone, PartialEq, Eq, Debug)]
struct Requirement {
    key: Str,
    operator: Operator,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Operator {
    In(Vec<Str>),
    /// Also without the label.
    NotIn(Vec<Str>),
    Exists,
    DoesNotExist,
}

impl NamespaceSelector {
    /// Whether a namespace matches, given the values of its labels.
    #[must_use]
    pub fn matches<'l>(&self, label: impl Fn(&str) -> Option<&'l str>) -> bool {
        self.0.iter().all(|requirement| {
            let value = label(&requirement.key);
            let listed = |values: &[Str]| value.is_some_and(|v| values.iter().any(|known| &**known == v));
            match &requirement.operator {
                Operator::In(values) => listed(values),
                Operator::NotIn(values) => !listed(values),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
            }
        })
    }
}

/// Reads a selector. `None` for one with errors, which have been reported.
pub(super) fn read(cursor: Cursor<'_, '_>) -> Option<NamespaceSelector> {
    let mut fields = cursor.fields()?.without_nulls();
    let mut requirements = Vec::new();
    let labels = fields.string_map("matchLabels").into_iter();
    requirements.extend(
        labels
            .map(|(key, value)| Requirement { key: key.into(), operator: Operator::In(vec![value.into()]) }),
    );
    let mut wrong = false;
    fields.each("matchExpressions", |item| match expression(item) {
        Some(requirement) => requirements.push(requirement),
        None => wrong = true,
    });
    (!wrong).then_some(NamespaceSelector(requirements))
}

fn expression(cursor: Cursor<'_, '_>) -> Option<Requirement> {
    let mut fields = cursor.fields()?.without_nulls();
    let key = fields.required("key")?.string()?;
    let values: Vec<Str> = fields.string_list("values").into_iter().map(Str::from).collect();
    let mut cursor = fields.required("operator")?;
    let node = cursor.node();
    let operator = match (node.as_str(), values.is_empty()) {
        (Some("In"), false) => Operator::In(values),
        (Some("NotIn"), false) => Operator::NotIn(values),
        (Some("Exists"), true) => Operator::Exists,
        (Some("DoesNotExist"), true) => Operator::DoesNotExist,
        (Some("In" | "NotIn"), true) => {
            cursor.invalid("needs values", "");
            return None;
        }
        (Some("Exists" | "DoesNotExist"), false) => {
            cursor.invalid("takes no values", "remove them, or write In or NotIn");
            return None;
        }
        (Some(other), _) => {
            cursor.invalid(format_args!("{other:?} is no operator"), "In, NotIn, Exists or DoesNotExist");
            return None;
        }
        (None, _) => {
            cursor.string();
            return None;
        }
    };
    Some(Requirement { key: key.into(), operator })
}

/// What is said where the objects come from a directory.
pub(super) fn without_effect() -> Finding {
    Finding {
        code: Code::FieldNotApplicable,
        message: "discoverySelectors has no effect: every object of the directory is read".to_owned(),
        remedy: String::new(),
    }
}
