//! References to other objects: a route's parents, and its back ends.

use model::Str;
use model::http::HeaderEdits;

use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced};

/// `parentRefs[]`.
pub(super) static PARENT: Schema = Schema {
    name: "ParentReference",
    fields: &[
        enforced("group"),
        enforced("kind"),
        enforced("name"),
        enforced("namespace"),
        enforced("sectionName"),
        enforced("port"),
    ],
};

/// What a route hangs on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ParentKind {
    /// A Kubernetes Service.
    Service,
    /// A ServiceEntry.
    ServiceEntry,
    /// A Gateway.
    Gateway,
}

/// What a route hangs on: the requests to it are the route's.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ParentRef {
    /// Its kind.
    pub kind: ParentKind,
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
    /// The part of it that is meant: a listener, or a port's name.
    pub section: Option<Str>,
    /// The port that is meant.
    pub port: Option<u16>,
}

impl ParentRef {
    /// Whether it is about this port of the object that it names.
    #[must_use]
    pub fn means(&self, port: &model::ServicePort) -> bool {
        self.port.is_none_or(|number| number == port.port)
            && self.section.as_ref().is_none_or(|name| *name == port.name)
    }
}

/// Reads `parentRefs`. A kind that is none of ours has no effect here, and is another controller's business.
pub(super) fn read_parents(spec: &mut Fields<'_, '_>, namespace: &Str) -> Box<[ParentRef]> {
    let mut parents: Vec<ParentRef> = Vec::new();
    spec.each("parentRefs", |item| {
        let Some(mut fields) = item.fields() else { return };
        let group = fields.string("group").unwrap_or("gateway.networking.k8s.io");
        let kind = fields.string("kind").unwrap_or("Gateway");
        let name = fields.required("name").and_then(crate::policy::selector::non_empty);
        let to = fields.string("namespace");
        let section = fields.string("sectionName");
        let port = fields.integer("port", 1..=u16::MAX);
        let Some(name) = name else { return };
        let known = match (group, kind) {
            ("" | "core", "Service") => ParentKind::Service,
            ("networking.istio.io", "ServiceEntry") => ParentKind::ServiceEntry,
            ("gateway.networking.k8s.io", "Gateway") => ParentKind::Gateway,
            _ => {
                let message = format!("a route on a {kind} of group {group:?} has no effect in the mesh");
                fields.report(Code::WithoutEffect, message, "refer to a Service (group \"\")");
                return;
            }
        };
        let pool = &mut fields.context().pool;
        let parent = ParentRef {
            kind: known,
            namespace: to.map_or_else(|| namespace.clone(), |n| pool.string(n)),
            name: pool.string(name),
            section: section.map(|s| pool.string(s)),
            port,
        };
        if parents.contains(&parent) {
            fields.report(Code::InvalidValue, "the parent is listed twice", "remove one");
        } else {
            parents.push(parent);
        }
    });
    parents.into()
}

/// What a back end's reference says, before it is known whether there is such a thing.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Reference {
    /// A Kubernetes Service.
    Service {
        /// Its namespace.
        namespace: Str,
        /// Its name.
        name: Str,
    },
    /// A host of any service, ServiceEntries' included (Istio's kind `Hostname`).
    Host(Str),
    /// What there cannot be.
    Unknown(Str),
}

/// Why a reference leads nowhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unresolved {
    /// What kind of reason.
    pub why: Why,
    /// In words.
    pub message: Str,
}

impl std::fmt::Display for Unresolved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// What kind of reason it is that a reference leads nowhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Why {
    /// It is to what is no back end.
    InvalidKind,
    /// It is to another namespace, which does not allow it.
    NotPermitted,
    /// What it is to is not there.
    NotFound,
}

/// A back end as it is written.
#[derive(Clone, PartialEq, Debug)]
pub struct BackendDraft {
    /// What it refers to.
    pub to: Reference,
    /// The service's port.
    pub port: Option<u16>,
    /// The subset of it that is meant.
    pub subset: Option<Str>,
    /// Its weight.
    pub weight: u32,
    /// Changes of requests to it.
    pub request_headers: HeaderEdits,
    /// Changes of its responses.
    pub response_headers: HeaderEdits,
}

/// Fields of `backendRefs[]`, and of the `backendRef` of a mirror, which has no weight and no filters.
pub(super) static MIRRORED: Schema = Schema {
    name: "BackendObjectReference",
    fields: &[enforced("group"), enforced("kind"), enforced("name"), enforced("namespace"), enforced("port")],
};

/// Reads a reference to a back end, and its weight.
pub(super) fn read_weighted(fields: &mut Fields<'_, '_>, namespace: &Str) -> Option<BackendDraft> {
    let backend = read_backend(fields, namespace);
    let weight = fields.integer("weight", 0..=1_000_000).unwrap_or(1);
    Some(BackendDraft { weight, ..backend? })
}

/// Reads a reference to a back end.
pub(super) fn read_backend(fields: &mut Fields<'_, '_>, namespace: &Str) -> Option<BackendDraft> {
    let group = fields.string("group").unwrap_or_default();
    let kind = fields.string("kind").unwrap_or("Service");
    let name = fields.required("name").and_then(crate::policy::selector::non_empty);
    let to = fields.string("namespace");
    let port = fields.take("port").and_then(|c: Cursor<'_, '_>| c.integer(1..=u16::MAX));
    let name = name?;
    let pool = &mut fields.context().pool;
    let to = match (group, kind) {
        ("" | "core", "Service") => Reference::Service {
            namespace: to.map_or_else(|| namespace.clone(), |n| pool.string(n)),
            name: pool.string(name),
        },
        ("networking.istio.io", "Hostname") => Reference::Host(pool.string(&name.to_ascii_lowercase())),
        _ => Reference::Unknown(pool.string(&format!("{kind} of group {group:?} is no back end"))),
    };
    if port.is_none() && !matches!(to, Reference::Unknown(_)) {
        fields.report(Code::MissingField, "a back end needs a port", "add the service's port");
    }
    Some(BackendDraft {
        to,
        port,
        subset: None,
        weight: 1,
        request_headers: HeaderEdits::default(),
        response_headers: HeaderEdits::default(),
    })
}
