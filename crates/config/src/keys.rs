//! The labels and annotations that the mesh reads, and what looks like one of them.
//!
//! Keys of labels and annotations are free, so one that is misspelt is no error anywhere, and silently without
//! effect. Those that differ in a letter or two from one that is read, and those that are a label where an annotation
//! is read or the reverse, are said.

use crate::diagnostic::Code;
use crate::fields::{Cursor, edit_distance};

/// Labels that the mesh reads.
pub static LABELS: &[&str] = &[
    "app",
    "app.kubernetes.io/name",
    "app.kubernetes.io/version",
    "endpointslice.kubernetes.io/managed-by",
    "istio-injection",
    "istio.io/dataplane-mode",
    "istio.io/rev",
    "istio.io/use-waypoint",
    "istio.io/use-waypoint-namespace",
    "kubernetes.io/service-name",
    "networking.istio.io/enable-autoallocate-ip",
    "networking.istio.io/tunnel",
    "pod-template-hash",
    "security.istio.io/tlsMode",
    "service.istio.io/canonical-name",
    "service.istio.io/canonical-revision",
    "service.istio.io/workload-name",
    "topology.istio.io/subzone",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
    "version",
];

/// Annotations that the mesh reads.
pub static ANNOTATIONS: &[&str] = &[
    "ambient.istio.io/bypass-inbound-capture",
    "ambient.istio.io/dns-capture",
    "ambient.istio.io/redirection",
    "culvert.dev/hash-load-bound",
    "culvert.dev/netns",
    "culvert.dev/node-local",
    "istio.io/dry-run",
    "networking.istio.io/traffic-distribution",
    "sidecar.istio.io/status",
    "traffic.sidecar.istio.io/excludeInboundPorts",
    "traffic.sidecar.istio.io/excludeInterfaces",
    "traffic.sidecar.istio.io/excludeOutboundIPRanges",
    "traffic.sidecar.istio.io/excludeOutboundPorts",
    "traffic.sidecar.istio.io/includeInboundPorts",
    "traffic.sidecar.istio.io/includeOutboundIPRanges",
    "traffic.sidecar.istio.io/includeOutboundPorts",
];

/// The length of the longest key that is read, and the letters by which one may differ from it.
const MOST_COMPARED: usize = 64;

/// Says so when a key looks like one that is read, and is none.
pub(crate) fn check(key: &str, is_label: bool, value: &mut Cursor<'_, '_>) {
    let Some((prefix, _)) = key.split_once('/') else { return };
    // The tables' prefixes end so; a misspelt prefix does too, or is nobody's.
    if !prefix.ends_with("istio.io") && !prefix.ends_with("culvert.dev") {
        return;
    }
    let (own, other, kind, other_kind) = if is_label {
        (LABELS, ANNOTATIONS, "label", "annotation")
    } else {
        (ANNOTATIONS, LABELS, "annotation", "label")
    };
    if own.contains(&key) {
        return;
    }
    if other.contains(&key) {
        let message = format!("{key} has no effect as {kind}: it is read as {other_kind}");
        value.report(Code::MisplacedKey, message, format!("make it a {other_kind}"));
        return;
    }
    // Longer than all that are read: none of them is meant, and comparing costs the product of the lengths.
    if key.len() > MOST_COMPARED {
        return;
    }
    let all = own.iter().chain(other);
    let near = all.map(|known| (edit_distance(known, key), *known)).min();
    if let Some((1..=2, known)) = near {
        let message = format!("{key} is no {kind} that is read, and looks like one");
        value.report(Code::MisspeltKey, message, format!("did you mean {known}?"));
    }
}
