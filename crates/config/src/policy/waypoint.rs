//! Which waypoint traffic is meant to pass, by labels.

use model::Str;

use super::selector::{Target, TargetKind};
use crate::labels::Labels;

/// The label that binds a pod, service or namespace to a waypoint, with the waypoint's name or `none`.
pub const USE_WAYPOINT: &str = "istio.io/use-waypoint";

/// The label that says in which namespace the waypoint is, where it is another.
const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";

/// A waypoint.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Waypoint {
    /// The Gateway's namespace.
    pub namespace: Str,
    /// The Gateway's name.
    pub name: Str,
}

impl Waypoint {
    /// Whether a policy of `namespace` with this target is for the waypoint. A GatewayClass is taken for that of
    /// waypoints: a gateway at the edge has no workloads that are bound to it.
    #[must_use]
    pub fn is_target(&self, namespace: &str, target: &Target) -> bool {
        match target.kind {
            TargetKind::Gateway => *self.namespace == *namespace && self.name == target.name,
            TargetKind::GatewayClass => true,
            TargetKind::Service | TargetKind::ServiceEntry => false,
        }
    }
}

/// What an object's labels say of its waypoint.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum Binding {
    /// Nothing: its namespace's labels decide.
    #[default]
    Inherited,
    /// It passes none.
    None,
    /// It passes this one.
    To(Waypoint),
}

impl Binding {
    /// The binding of an object in `namespace`; a namespace is in itself.
    #[must_use]
    pub fn of(labels: &Labels, namespace: &Str) -> Self {
        match labels.get(USE_WAYPOINT) {
            None => Self::Inherited,
            Some(name) if &**name == "none" => Self::None,
            Some(name) => Self::To(Waypoint {
                namespace: labels.get(USE_WAYPOINT_NAMESPACE).unwrap_or(namespace).clone(),
                name: name.clone(),
            }),
        }
    }

    /// The waypoint, given the binding of the namespace.
    #[must_use]
    pub fn or<'b>(&'b self, namespace: &'b Self) -> Option<&'b Waypoint> {
        match (self, namespace) {
            (Self::To(waypoint), _) | (Self::Inherited, Self::To(waypoint)) => Some(waypoint),
            _ => None,
        }
    }
}
