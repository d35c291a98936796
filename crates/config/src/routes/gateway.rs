//! Gateway (`gateway.networking.k8s.io`), as far as it is a waypoint. Gateways of other classes are other controllers'.

use model::Str;

use crate::compile::Finding;
use crate::diagnostic::Code;
use crate::fields::{Fields, Schema, enforced, nested, silent};
use crate::labels::{Labels, Selector};
use crate::metadata::{METADATA, Metadata};
use crate::policy::selector::{non_empty, read_labels};
use crate::resource::{Kind, KindSpec, Resource};

use super::value::word;

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::Gateway,
    group: "gateway.networking.k8s.io",
    versions: &["v1", "v1beta1"],
    name: "Gateway",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "Gateway",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};
static SPEC: Schema = Schema {
    name: "Gateway.spec",
    fields: &[
        enforced("gatewayClassName"),
        nested("listeners", &LISTENER),
        silent("addresses", "a waypoint is found by its Service"),
        silent("infrastructure", "it is for what deploys the gateway"),
        silent("tls", "it is for gateways at the edge"),
        silent("allowedListeners", "it is for gateways at the edge"),
        silent("defaultScope", "it is for gateways at the edge"),
    ],
};
static LISTENER: Schema = Schema {
    name: "Gateway.spec.listeners[]",
    fields: &[
        enforced("name"),
        enforced("port"),
        enforced("protocol"),
        nested("allowedRoutes", &ALLOWED),
        silent("hostname", "it is for gateways at the edge"),
        silent("tls", "it is for gateways at the edge"),
    ],
};
static ALLOWED: Schema = Schema {
    name: "AllowedRoutes",
    fields: &[
        nested("namespaces", &NAMESPACES),
        silent("kinds", "which routes a service has is said by their parents"),
    ],
};
static NAMESPACES: Schema =
    Schema { name: "RouteNamespaces", fields: &[enforced("from"), nested("selector", &SELECTOR)] };
static SELECTOR: Schema = Schema {
    name: "LabelSelector",
    fields: &[
        enforced("matchLabels"),
        crate::fields::refused(
            "matchExpressions",
            "namespaces are allowed by labels and their values",
            "use matchLabels",
        ),
    ],
};

/// The label of a waypoint's Gateway that says for which traffic it is.
const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
/// The annotation of a waypoint's Gateway that says whether what is bound to it may be reached past it.
const BINDING: &str = "culvert.dev/waypoint-binding";
/// Classes whose Gateways are waypoints of ours.
const CLASSES: [&str; 2] = ["culvert-waypoint", "istio-waypoint"];
/// The port of HBONE.
const HBONE: i64 = 15008;

/// A Gateway.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gateway {
    /// What it is as a waypoint; `None` for one of another class.
    pub waypoint: Option<WaypointSpec>,
}

/// What a waypoint takes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WaypointSpec {
    /// Whether traffic to services.
    pub services: bool,
    /// Whether traffic to workloads, by their own addresses.
    pub workloads: bool,
    /// Which namespaces may bind to it.
    pub allowed: AllowedNamespaces,
    /// Whether what is bound to it may be reached past it.
    pub permissive: bool,
}

/// Which namespaces may bind.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum AllowedNamespaces {
    /// Its own.
    #[default]
    Same,
    /// All.
    All,
    /// None.
    None,
    /// Those with these labels; without any, all.
    Selector(Option<Selector>),
}

impl AllowedNamespaces {
    /// Whether `namespace`, with these labels, may bind to a waypoint of `own`.
    #[must_use]
    pub fn has(&self, own: &str, namespace: &str, labels: Option<&Labels>) -> bool {
        match self {
            Self::Same => own == namespace,
            Self::All => true,
            Self::None => false,
            Self::Selector(None) => true,
            Self::Selector(Some(selector)) => labels.is_some_and(|labels| selector.matches(labels)),
        }
    }
}

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let wanted = metadata.labels.get(WAYPOINT_FOR).map_or("service", |t| &**t);
    let (services, workloads) = match wanted {
        "service" => (true, false),
        "workload" => (false, true),
        "all" => (true, true),
        "none" => (false, false),
        _ => {
            let message = "the value is none of service, workload, all and none; it is taken for service";
            metadata.report_label(WAYPOINT_FOR, fields, Code::UnknownLabelValue, message, "");
            (true, false)
        }
    };
    let permissive = metadata.annotation(BINDING).is_some_and(|annotation| {
        if !matches!(annotation.value, "permissive" | "strict") {
            annotation.invalid(fields, "neither \"permissive\" nor \"strict\"", "");
        }
        annotation.value == "permissive"
    });
    let mut spec = fields.required("spec")?.fields()?;
    let class = spec.required("gatewayClassName").and_then(non_empty);
    let is_waypoint = class.is_some_and(|class| CLASSES.contains(&class));
    let mut allowed = AllowedNamespaces::default();
    spec.each("listeners", |item| {
        let Some(mut listener) = item.fields() else { return };
        let (_, protocol) = (listener.string("name"), listener.string("protocol"));
        let port = listener.integer("port", 1..=65_535_i64);
        let read = listener.object("allowedRoutes").and_then(|mut f| read_allowed(&mut f));
        if !is_waypoint {
            return;
        }
        if protocol != Some("HBONE") || port != Some(HBONE) {
            let message = "a waypoint listens for HBONE on port 15008, and for nothing else";
            listener.report(Code::InvalidValue, message, "write protocol: HBONE and port: 15008");
        }
        allowed = read.unwrap_or_default();
    });
    let waypoint = is_waypoint.then_some(WaypointSpec { services, workloads, allowed, permissive });
    Some(Resource::Gateway(Box::new(Gateway { waypoint })))
}

#[derive(Clone, Copy)]
enum From {
    Same,
    All,
    None,
    Selector,
}

fn read_allowed(fields: &mut Fields<'_, '_>) -> Option<AllowedNamespaces> {
    let mut namespaces = fields.object("namespaces")?;
    let words =
        [("Same", From::Same), ("All", From::All), ("None", From::None), ("Selector", From::Selector)];
    let from = namespaces.take("from").and_then(|c| word(c, &words)).unwrap_or(From::Same);
    let selector =
        namespaces.object("selector").and_then(|mut s| s.take("matchLabels").and_then(read_labels));
    Some(match from {
        From::Same => AllowedNamespaces::Same,
        From::All => AllowedNamespaces::All,
        From::None => AllowedNamespaces::None,
        From::Selector => AllowedNamespaces::Selector(selector),
    })
}

/// Why something that is bound to a waypoint can't pass it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unbound {
    /// There is no such Gateway, or it is of another class.
    Missing,
    /// It does not allow the namespace.
    NotAllowed,
    /// It is not for this kind of traffic.
    OtherTraffic,
}

impl Unbound {
    /// What to say of the object that is bound.
    #[must_use]
    pub fn finding(self, namespace: &Str, name: &Str) -> Finding {
        let (why, remedy) = match self {
            Self::Missing => {
                ("there is no such waypoint", "deploy it, or remove the label istio.io/use-waypoint")
            }
            Self::NotAllowed => (
                "which does not let this namespace bind to it",
                "let the Gateway's listener allow it (allowedRoutes.namespaces)",
            ),
            Self::OtherTraffic => (
                "which is not for this kind of traffic",
                "set the label istio.io/waypoint-for of the Gateway",
            ),
        };
        Finding {
            code: Code::WaypointNotReady,
            message: format!(
                "is bound to the waypoint {namespace}/{name}: {why}; connections to it are refused"
            ),
            remedy: remedy.to_owned(),
        }
    }
}
