//! `v1 Namespace`: whether its pods are in the mesh, and defaults for its services.

use model::NodeLocal;

use super::service::{Distribution, distribution_annotation};
use crate::diagnostic::Code;
use crate::fields::{Fields, Schema, enforced, nested, silent};
use crate::labels::Labels;
use crate::metadata::{METADATA, Metadata};
use crate::policy::node_local_annotation;
use crate::resource::{Kind, KindSpec, Resource};

/// The label that puts pods into the mesh, on a namespace or a pod.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

/// The labels by which a namespace asks for sidecars.
const SIDECAR_LABELS: [&str; 2] = ["istio-injection", "istio.io/rev"];

/// A namespace.
#[derive(Debug)]
pub struct Namespace {
    /// Its labels.
    pub labels: Labels,
    /// Which endpoints its services prefer, where they don't say it themselves.
    pub distribution: Option<Distribution>,
    /// How connections of its workloads are carried that stay on a node, where it says so itself.
    pub node_local: Option<NodeLocal>,
}

impl Namespace {
    /// What stands in for one with errors: its labels hold, as far as they could be read, and its connections are encrypted,
    /// where the mesh's word may be that those of a node are not.
    #[must_use]
    pub fn closed(labels: Labels) -> Self {
        Self { labels, distribution: None, node_local: Some(NodeLocal::Encrypted) }
    }
}

static SCHEMA: Schema = Schema {
    name: "Namespace",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        silent("spec", "it holds finalizers only"),
        silent("status", "the API server's bookkeeping"),
    ],
};

/// How the kind is read.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::Namespace,
    group: "",
    versions: &["v1"],
    name: "Namespace",
    namespaced: false,
    schema: &SCHEMA,
    parse,
};

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    report_mode(fields, metadata);
    for label in SIDECAR_LABELS {
        let Some(value) = metadata.labels.get(label) else { continue };
        let off = label == "istio-injection" && &**value == "disabled";
        if off || metadata.labels.get(DATAPLANE_MODE).is_some_and(|mode| &**mode == "ambient") {
            continue;
        }
        let message = "the namespace is set up for sidecars and is left alone";
        let remedy = "to put it into this mesh, remove the label and set istio.io/dataplane-mode=ambient";
        metadata.report_label(label, fields, Code::SidecarNamespace, message, remedy);
    }
    let distribution = distribution_annotation(fields, metadata);
    let node_local = node_local_annotation(fields, metadata);
    Some(Resource::Namespace(Box::new(Namespace {
        labels: metadata.labels.clone(),
        distribution,
        node_local,
    })))
}

/// Says so when the value of [`DATAPLANE_MODE`] is not one of ours.
pub(crate) fn report_mode(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) {
    let mode = metadata.labels.get(DATAPLANE_MODE);
    if mode.is_some_and(|m| !matches!(&**m, "ambient" | "none")) {
        let message = "the value is neither 'ambient' nor 'none', so it enrols nothing";
        metadata.report_label(DATAPLANE_MODE, fields, Code::UnknownLabelValue, message, "");
    }
}
