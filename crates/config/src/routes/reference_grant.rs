//! ReferenceGrant (`gateway.networking.k8s.io`): which objects of other namespaces may refer to objects of its own.

use hashbrown::HashMap;
use model::Str;

use crate::fields::{Fields, Schema, enforced, nested};
use crate::metadata::{METADATA, Metadata};
use crate::policy::selector::non_empty;
use crate::resource::{Kind, KindSpec, ObjectKey, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::ReferenceGrant,
    group: "gateway.networking.k8s.io",
    versions: &["v1", "v1beta1"],
    name: "ReferenceGrant",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "ReferenceGrant",
    fields: &[enforced("apiVersion"), enforced("kind"), nested("metadata", &METADATA), nested("spec", &SPEC)],
};
static SPEC: Schema =
    Schema { name: "ReferenceGrant.spec", fields: &[nested("from", &FROM), nested("to", &TO)] };
static FROM: Schema = Schema {
    name: "ReferenceGrant.spec.from[]",
    fields: &[enforced("group"), enforced("kind"), enforced("namespace")],
};
static TO: Schema = Schema {
    name: "ReferenceGrant.spec.to[]",
    fields: &[enforced("group"), enforced("kind"), enforced("name")],
};

/// A ReferenceGrant. Kinds of objects that nothing here refers to, or from, are left out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReferenceGrant {
    /// Kinds of routes, and the namespaces that they may be in.
    pub from: Box<[(Str, Str)]>,
    /// Names of Services that may be referred to; `None` is all.
    pub services: Box<[Option<Str>]>,
}

fn parse(fields: &mut Fields<'_, '_>, _: &Metadata<'_>) -> Option<Resource> {
    let mut spec = fields.required("spec")?.fields()?;
    let (mut from, mut services) = (Vec::new(), Vec::new());
    spec.each("from", |item| {
        let Some(mut fields) = item.fields() else { return };
        let group = fields.string("group").unwrap_or_default();
        let kind = fields.required("kind").and_then(non_empty);
        let namespace = fields.required("namespace").and_then(non_empty);
        if let (KIND_GROUP, Some(kind), Some(namespace)) = (group, kind, namespace) {
            let pool = &mut fields.context().pool;
            from.push((pool.string(kind), pool.string(namespace)));
        }
    });
    spec.each("to", |item| {
        let Some(mut fields) = item.fields() else { return };
        let group = fields.string("group").unwrap_or_default();
        let kind = fields.required("kind").and_then(non_empty);
        let name = fields.string("name").filter(|name| !name.is_empty());
        if let ("" | "core", Some("Service")) = (group, kind) {
            services.push(name.map(|name| fields.context().pool.string(name)));
        }
    });
    let grant = ReferenceGrant { from: from.into(), services: services.into() };
    Some(Resource::ReferenceGrant(Box::new(grant)))
}

const KIND_GROUP: &str = "gateway.networking.k8s.io";

/// The grants that there are.
#[derive(Debug, Default)]
pub struct Grants(HashMap<Str, HashMap<Str, ReferenceGrant>>);

impl Grants {
    /// Sets a grant, or removes it.
    pub fn set(&mut self, key: &ObjectKey, grant: Option<ReferenceGrant>) {
        match grant {
            Some(grant) => {
                self.0.entry(key.namespace.clone()).or_default().insert(key.name.clone(), grant);
            }
            None => {
                if let Some(list) = self.0.get_mut(&key.namespace) {
                    list.remove(&key.name);
                    if list.is_empty() {
                        self.0.remove(&key.namespace);
                    }
                }
            }
        }
    }

    /// Whether an object of `kind` in the namespace `from` may refer to the Service `name` of the namespace `to`.
    #[must_use]
    pub fn allow(&self, kind: &str, from: &str, to: &str, name: &str) -> bool {
        from == to
            || self.0.get(to).is_some_and(|grants| {
                grants.values().any(|grant| {
                    grant.from.iter().any(|(k, ns)| **k == *kind && **ns == *from)
                        && grant.services.iter().any(|s| s.as_ref().is_none_or(|s| **s == *name))
                })
            })
    }
}
