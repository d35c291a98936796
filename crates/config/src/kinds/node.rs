//! `v1 Node`: where its pods are. Whether it is ready is kept when it is decoded, for who asks which proxies are alive;
//! nothing is compiled from it.

use crate::fields::{Fields, Schema, enforced, nested, silent};
use crate::metadata::{METADATA, Metadata};
use crate::resource::{Kind, KindSpec, Resource};

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its region, zone and subzone.
    pub locality: model::Locality,
}

static SCHEMA: Schema = Schema {
    name: "Node",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        silent("spec", "the cluster's business; localities are labels"),
        nested("status", &STATUS),
    ],
};

const REPORT: &str = "the kubelet's report; pods say themselves whether they are ready";

static STATUS: Schema = Schema {
    name: "Node.status",
    fields: &[
        nested("conditions", &CONDITION),
        silent("addresses", REPORT),
        silent("allocatable", REPORT),
        silent("capacity", REPORT),
        silent("config", REPORT),
        silent("daemonEndpoints", REPORT),
        silent("declaredFeatures", REPORT),
        silent("features", REPORT),
        silent("images", REPORT),
        silent("nodeInfo", REPORT),
        silent("phase", REPORT),
        silent("runtimeHandlers", REPORT),
        silent("volumesAttached", REPORT),
        silent("volumesInUse", REPORT),
    ],
};

static CONDITION: Schema = Schema {
    name: "Node.status.conditions",
    fields: &[
        enforced("type"),
        enforced("status"),
        silent("lastHeartbeatTime", REPORT),
        silent("lastTransitionTime", REPORT),
        silent("reason", REPORT),
        silent("message", REPORT),
    ],
};

/// How the kind is read.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::Node,
    group: "",
    versions: &["v1"],
    name: "Node",
    namespaced: false,
    schema: &SCHEMA,
    parse,
};

#[expect(clippy::unnecessary_wraps, reason = "the form of all parse functions")]
fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    if let Some(mut status) = fields.object("status") {
        status.each("conditions", |item| {
            if let Some(mut condition) = item.fields() {
                let _ = (condition.string("type"), condition.string("status")); // see the module's documentation
            }
        });
    }
    // The older names are what clusters before 1.17 have, and are still read by Kubernetes' own tools.
    let label = |names: [&str; 2]| {
        names.iter().find_map(|name| metadata.labels.get(name)).cloned().unwrap_or_else(|| "".into())
    };
    let locality = model::Locality {
        region: label(["topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"]),
        zone: label(["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"]),
        subzone: label(["topology.istio.io/subzone", ""]),
        ..model::Locality::default()
    };
    Some(Resource::Node(Box::new(Node { locality })))
}
