//! Which workloads a policy is for: a selector by labels, or references to other objects.

use model::Str;

use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced};
use crate::form::Form;
use crate::labels::Selector;
use crate::resource::{Kind, ObjectKey};

/// `selector`.
pub static SELECTOR: Schema = Schema { name: "WorkloadSelector", fields: &[enforced("matchLabels")] };

/// `targetRef`, and the items of `targetRefs`.
pub static TARGET_REF: Schema = Schema {
    name: "PolicyTargetReference",
    fields: &[
        enforced("kind").of(Form::Name(63)).required(),
        enforced("name").of(Form::Name(253)).required(),
        enforced("group").of(Form::UpTo(253)),
        enforced("namespace")
            .of(Form::Empty("what a policy is for is in its own namespace: leave the namespace out")),
    ],
};

/// Reads `selector`. `None` when it is absent or has no labels: then it selects everything.
pub fn read_selector(spec: &mut Fields<'_, '_>) -> Option<Selector> {
    let mut fields = spec.object("selector")?.without_nulls();
    fields.take("matchLabels").and_then(read_labels)
}

/// Reads labels that must be there. A wildcard would be a label like any other and match nothing, so that the
/// policy would hold nowhere: refused, as in Istio.
pub fn read_labels(cursor: Cursor<'_, '_>) -> Option<Selector> {
    let mut labels = Vec::new();
    cursor.entries(|key, mut value| {
        let node = value.node();
        let Some(text) = node.as_str() else {
            value.string();
            return;
        };
        if key.is_empty() || key.contains('*') || text.contains('*') {
            value.invalid(
                format_args!("{key}={text} is no label: wildcards and empty keys select nothing"),
                "name the label and its value in full",
            );
        } else {
            let pool = &mut value.context().pool;
            labels.push((pool.string(key), pool.string(text)));
        }
    });
    Selector::new(labels)
}

/// What a `targetRef` points to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TargetKind {
    /// A Kubernetes Service.
    Service,
    /// A ServiceEntry.
    ServiceEntry,
    /// A Gateway of the Gateway API: a waypoint, or a gateway at the edge.
    Gateway,
    /// All gateways of a class.
    GatewayClass,
}

impl TargetKind {
    /// The kind's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::ServiceEntry => "ServiceEntry",
            Self::Gateway => "Gateway",
            Self::GatewayClass => "GatewayClass",
        }
    }
}

/// A `targetRef`. What it points to is in the policy's own namespace.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Target {
    /// The kind.
    pub kind: TargetKind,
    /// The name.
    pub name: Str,
}

/// Reads `targetRef` and `targetRefs`, of which at most one may be set.
pub fn read_targets(spec: &mut Fields<'_, '_>) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut one = false;
    if let Some(cursor) = spec.take("targetRef") {
        one = true;
        targets.extend(read_target(cursor));
    }
    if let Some(mut cursor) = spec.take("targetRefs") {
        if one {
            cursor.report(
                Code::InvalidValue,
                "targetRef and targetRefs are both set; only one may be",
                "move the reference into targetRefs",
            );
        }
        // The limit is the one of Istio's CRD.
        let mut count = 0;
        cursor.each(|mut item| {
            count += 1;
            if count == 17 {
                item.invalid("more than 16 references", "split the policy");
            }
            if count <= 16 {
                targets.extend(read_target(item));
            }
        });
    }
    targets
}

fn read_target(cursor: Cursor<'_, '_>) -> Option<Target> {
    let mut fields = cursor.fields()?.without_nulls();
    let group = fields.string("group").unwrap_or_default();
    let name = fields.required("name").and_then(non_empty);
    if let Some(mut namespace) = fields.take("namespace") {
        // Upstream has the field and refuses any value of it.
        if namespace.node().as_str() != Some("") {
            namespace.invalid("references into other namespaces are not allowed", "remove the namespace");
        }
    }
    let mut kind = fields.required("kind")?;
    let Some(text) = kind.node().as_str() else {
        kind.string();
        return None;
    };
    let known = match (group, text) {
        ("" | "core", "Service") => TargetKind::Service,
        ("networking.istio.io", "ServiceEntry") => TargetKind::ServiceEntry,
        ("gateway.networking.k8s.io", "Gateway") => TargetKind::Gateway,
        ("gateway.networking.k8s.io", "GatewayClass") => TargetKind::GatewayClass,
        (_, other) => {
            let message = format!("a {other} of group {group:?} cannot be the target of a policy");
            kind.invalid(
                message,
                "refer to a Service (group \"\"), a ServiceEntry (networking.istio.io), a Gateway or GatewayClass \
                 (gateway.networking.k8s.io)",
            );
            return None;
        }
    };
    Some(Target { kind: known, name: fields.context().pool.string(name?) })
}

/// A string that is not empty.
pub fn non_empty<'n>(mut cursor: Cursor<'_, 'n>) -> Option<&'n str> {
    if cursor.node().as_str() == Some("") {
        cursor.invalid("is empty", "");
        return None;
    }
    cursor.string()
}

impl Target {
    /// The target that is this object, if policies can have it as one.
    #[must_use]
    pub fn of(object: &ObjectKey) -> Option<Self> {
        let kind = match object.kind {
            Kind::Service => TargetKind::Service,
            Kind::ServiceEntry => TargetKind::ServiceEntry,
            _ => return None,
        };
        Some(Self { kind, name: object.name.clone() })
    }

    /// Whether it is a gateway, or all of a class.
    #[must_use]
    pub fn is_gateway(&self) -> bool {
        matches!(self.kind, TargetKind::Gateway | TargetKind::GatewayClass)
    }

    /// The object of `namespace` that it points to, where workloads are behind it.
    #[must_use]
    pub fn object(&self, namespace: &Str) -> Option<ObjectKey> {
        let kind = match self.kind {
            TargetKind::Service => Kind::Service,
            TargetKind::ServiceEntry => Kind::ServiceEntry,
            TargetKind::Gateway | TargetKind::GatewayClass => return None,
        };
        Some(ObjectKey { kind, namespace: namespace.clone(), name: self.name.clone() })
    }
}
