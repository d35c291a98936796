//! WorkloadEntry (`networking.istio.io`): a machine outside Kubernetes.

use model::Str;

use super::endpoint::{ENDPOINT, EntryEndpoint, read};
use crate::fields::{Fields, Schema, enforced, nested, silent};
use crate::labels::Labels;
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::WorkloadEntry,
    group: "networking.istio.io",
    versions: &["v1", "v1beta1", "v1alpha3"],
    name: "WorkloadEntry",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "WorkloadEntry",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &ENDPOINT),
        silent("status", "it is written by the control plane"),
    ],
};

/// A machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkloadEntry {
    /// What it is.
    pub endpoint: EntryEndpoint,
    /// Its labels: those of the object and those of the endpoint, which go first.
    pub labels: Labels,
    /// The name of the application that it is an instance of, for telemetry.
    pub workload_name: Str,
}

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let endpoint = read(&mut fields.required("spec")?.fields()?, false);
    let own = metadata.labels.iter().filter(|(key, _)| endpoint.labels.get(key).is_none());
    let pairs = endpoint.labels.iter().chain(own).map(|(k, v)| (&**k, &**v)).collect();
    let labels = fields.context().pool.labels(pairs);
    let owner = metadata.owner.map_or(metadata.name, |o| o.name);
    let workload_name = fields.context().pool.string(owner);
    Some(Resource::WorkloadEntry(Box::new(WorkloadEntry { endpoint, labels, workload_name })))
}
