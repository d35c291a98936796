//! `v1 ServiceAccount`: its name is the identity; nothing else of it concerns the mesh.

use crate::fields::{Fields, Schema, enforced, nested, silent};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// A service account.
#[derive(Debug)]
pub struct ServiceAccount;

static SCHEMA: Schema = Schema {
    name: "ServiceAccount",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        silent("automountServiceAccountToken", "identities are not made from tokens in pods"),
        silent("secrets", "identities are not made from tokens in pods"),
        silent("imagePullSecrets", "the kubelet's business"),
    ],
};

/// How the kind is read.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::ServiceAccount,
    group: "",
    versions: &["v1"],
    name: "ServiceAccount",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

#[expect(clippy::unnecessary_wraps, reason = "the form of all parse functions")]
fn parse(_: &mut Fields<'_, '_>, _: &Metadata<'_>) -> Option<Resource> {
    Some(Resource::ServiceAccount(ServiceAccount))
}
