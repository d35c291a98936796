//! Kinds that are not read: said, so that nobody waits for an effect.

use crate::diagnostic::Code;
use crate::fields::{Context, Path, edit_distance};
use crate::resource::{KINDS, Reading, similar_kind};
use crate::tree::Node;

/// Kinds of groups of the mesh that this version does not act on.
static UNSUPPORTED: &[(&str, &[&str])] = &[
    ("networking.istio.io", &["Gateway", "Sidecar", "ProxyConfig"]),
    ("gateway.networking.k8s.io", &["GatewayClass", "UDPRoute", "BackendTLSPolicy", "ListenerSet"]),
    // An older form of EndpointSlice; a cluster mirrors it into one.
    ("", &["Endpoints"]),
];

/// Kinds that no state of a cluster could enforce, and what does their job here.
static REFUSED: &[(&str, &str, &str)] = &[
    (
        "networking.istio.io",
        "EnvoyFilter",
        "there is no Envoy: use VirtualService and DestinationRule for routing, AuthorizationPolicy (CUSTOM for an \
         authorizer of your own), RateLimit of culvert.dev, Telemetry",
    ),
    ("extensions.istio.io", "WasmPlugin", WASM),
    ("extensions.istio.io", "TrafficExtension", WASM),
];
const WASM: &str = "no code is loaded: use an AuthorizationPolicy with the action CUSTOM, which asks a service of yours, or \
                    header changes of an HTTPRoute or VirtualService";

/// Kinds of the core group that have no part in the mesh.
static CORE: &[&str] = &[
    "Secret",
    "Event",
    "LimitRange",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "PodTemplate",
    "ReplicationController",
    "ResourceQuota",
    "Binding",
    "ComponentStatus",
];

/// Groups in which only what is read or listed above exists.
static OWN_GROUPS: &[&str] = &[
    "",
    "discovery.k8s.io",
    "networking.istio.io",
    "security.istio.io",
    "telemetry.istio.io",
    "extensions.istio.io",
    "gateway.networking.k8s.io",
    "mesh.istio.io",
    "culvert.dev",
];

/// What does the job of a kind that no state of a cluster could enforce; `None` for others.
#[must_use]
pub fn refused(group: &str, kind: &str) -> Option<&'static str> {
    REFUSED.iter().find(|(g, k, _)| *g == group && *k == kind).map(|(.., remedy)| *remedy)
}

/// Says what is (not) done with an object of a kind that is not read.
pub fn report<'n>(node: &'n Node<'n>, group: &str, kind: &str, context: &mut Context<'n>) -> Reading {
    let position = node.get("kind").map_or(node.position, |n| n.position);
    let path = Path::of("kind");
    let shown: String = kind.chars().take(64).collect();
    let name = if group.is_empty() { shown } else { format!("{shown} of {group}") };
    let listed =
        |list: &[(&str, &[&'static str])]| list.iter().any(|(g, k)| *g == group && k.contains(&kind));
    if let Some(remedy) = refused(group, kind) {
        let message = format!("{name} is refused: what it asks for is not done by the mesh");
        context.report(Code::RefusedKind, position, &path, message, remedy);
        return Reading::Ignored;
    }
    if listed(UNSUPPORTED) {
        let message = format!("{name} is not acted on by this version of the mesh");
        let remedy = if kind == "Endpoints" { "use an EndpointSlice" } else { "" };
        context.report(Code::UnsupportedKind, position, &path, message, remedy);
        return Reading::Ignored;
    }
    if let Some(meant) = meant_group(group, kind) {
        // What is meant may be a policy: it must not be taken for gone, nor for something else.
        let position = node.get("apiVersion").map_or(node.position, |n| n.position);
        let message = format!("there is no kind {name}: the group looks misspelt");
        let meant = if meant.is_empty() { "v1" } else { meant };
        context.report(
            Code::UnknownKind,
            position,
            &Path::of("apiVersion"),
            message,
            format!("did you mean {meant}?"),
        );
        return Reading::Unidentified;
    }
    let ignored = (group.is_empty() && CORE.contains(&kind)) || !OWN_GROUPS.contains(&group);
    if ignored {
        let message = format!("{name} is ignored: it has no part in the mesh");
        let remedy = match kind {
            "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Job" | "CronJob" => {
                "without a cluster nothing makes its pods: list them"
            }
            _ => "",
        };
        context.report(Code::IgnoredKind, position, &path, message, remedy);
        return Reading::Ignored;
    }
    let known = KINDS.iter().filter(|s| s.group == group).map(|s| s.name);
    let never = REFUSED.iter().filter(|(g, ..)| *g == group).map(|(_, k, _)| *k);
    let others = UNSUPPORTED.iter().filter(|(g, _)| *g == group).flat_map(|(_, k)| k.iter().copied());
    let others = others.chain(never);
    let core = CORE.iter().copied().filter(|_| group.is_empty());
    let remedy = similar_kind(kind, known.chain(others).chain(core))
        .map_or(String::new(), |s| format!("did you mean {s}?"));
    context.report(Code::UnknownKind, position, &path, format!("there is no kind {name}"), remedy);
    Reading::Unidentified
}

/// The group that is meant by one that does not exist: one that differs in a letter or two, or the one that has the
/// kind. Kinds of the core group have names that others use too, such as Knative's Service; those have groups of the
/// form of a domain.
fn meant_group(group: &str, kind: &str) -> Option<&'static str> {
    if OWN_GROUPS.contains(&group) {
        return None;
    }
    let near = |known: &&&str| !known.is_empty() && group.len() <= 64 && edit_distance(known, group) <= 2;
    let of_kind = KINDS.iter().find(|s| s.name == kind && !(s.group.is_empty() && group.contains('.')));
    OWN_GROUPS.iter().find(near).copied().or(of_kind.map(|spec| spec.group))
}
