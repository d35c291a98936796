//! What resources are turned into before they are joined.

use std::sync::Arc;

use model::{Change, PolicyKey, ServiceMembership, Str, TunnelProtocol, Workload};

use crate::diagnostic::Code;
use crate::kinds::{Capture, service::Distribution};
use crate::labels::{Labels, Selector};
use crate::policy::selector::Target;
use crate::policy::{Binding, Waypoint};
use crate::resource::ObjectKey;

/// Something with labels, and addresses or a host name. Services and policies of its namespace select it.
#[derive(Clone, Debug)]
pub struct Instance {
    /// What the resource says of itself. The compiler fills in `trust_domain`, `tunnel`, `services`, `policies`,
    /// `canonical_name`, `canonical_revision`, and `locality` where [`Instance::fixed_locality`] is not set.
    pub workload: Workload,
    /// Its labels.
    pub labels: Labels,
    /// Its named ports.
    pub ports: Arc<[(Str, u16)]>,
    /// What the names of its ports are.
    pub names: Names,
    /// What wins where several have one address.
    pub rank: Rank,
    /// Whether it is in the mesh.
    pub membership: Membership,
    /// Whether `workload.locality` stands as it is; else its node's is taken.
    pub fixed_locality: bool,
    /// Services that it is an endpoint of beside those that select it.
    pub services: Box<[ServiceMembership]>,
    /// How a pod's traffic is captured.
    pub capture: Option<Box<Capture>>,
}

/// What the names of an instance's ports are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Names {
    /// Containers' ports: what a Service's `targetPort` names.
    Containers,
    /// A WorkloadEntry's `ports`: what a Service's `targetPort` or a ServiceEntry's port names.
    Entry,
}

/// What wins where several instances have one address: the least, see [`super::displace`]. Two of the ranks above
/// [`Rank::Endpoint`] at one address are a conflict, which is reported; the first to come stays in force. An endpoint
/// at an address that a pod has, or another instance of its namespace, is that instance: its services become those of
/// the winner.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Rank {
    /// A pod.
    Pod,
    /// A WorkloadEntry.
    Entry,
    /// An endpoint of an EndpointSlice or ServiceEntry: an address with nothing behind it that is known.
    Endpoint,
}

/// Whether an instance is in the mesh.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Membership {
    /// As its own label and its namespace's say.
    Labelled,
    /// The resource decides.
    Fixed(TunnelProtocol),
}

/// A service and how its endpoints are found.
#[derive(Clone, Debug)]
pub struct Definition {
    /// What the resource says. The compiler fills in `load_balancing` from `distribution`, and leaves the rest.
    pub service: model::Service,
    /// Which instances of its namespace are its endpoints, beside those that name it themselves.
    pub selector: Option<Selector>,
    /// The ports behind its ports.
    pub ports: Box<[PortRule]>,
    /// Which endpoints it prefers; where it does not say, its namespace does.
    pub distribution: Option<Distribution>,
    /// Whether only endpoints on the client's node take traffic.
    pub local_only: bool,
    /// Which waypoint its traffic is meant to pass.
    pub waypoint: Binding,
    /// Whether its endpoints are outside the mesh, where nothing enforces policies for it.
    pub external: bool,
}

/// The port of an endpoint behind a port of a service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortRule {
    /// The service's port.
    pub service_port: u16,
    /// Where it leads.
    pub target: RuleTarget,
}

/// Which port of an endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RuleTarget {
    /// This one.
    Number(u16),
    /// The one of this name; endpoints without it don't serve the port (a Service's named `targetPort`).
    Name(Str),
    /// The one of this name among a [`Names::Entry`]'s ports, else this number (a ServiceEntry's port).
    NameOr(Str, u16),
}

/// What follows from setting or removing a resource.
#[derive(Debug, Default)]
pub struct Effects {
    /// Changes of the model that stand for themselves: policies and settings.
    pub changes: Vec<Change>,
    /// Workloads whose policies, trust domain and tunnel have to be looked at again.
    pub affected: Vec<Affected>,
    /// What resources make now: as a rule the one that was set, and others that depend on it.
    pub made: Vec<Made>,
    /// Findings that depend on more than one resource, by the resource that they are about. They replace what was
    /// found for it before; an empty list clears it.
    pub findings: Vec<(ObjectKey, Vec<Finding>)>,
}

/// All that a resource makes now. What it made before and makes no more is removed; so a removed resource makes
/// nothing.
#[derive(Debug)]
pub struct Made {
    /// The resource.
    pub by: ObjectKey,
    /// Its instances.
    pub instances: Vec<Instance>,
    /// Its services.
    pub definitions: Vec<Definition>,
}

/// A finding about a resource, in the light of others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What kind.
    pub code: Code,
    /// What is wrong, in a sentence.
    pub message: String,
    /// What to do; may be empty.
    pub remedy: String,
}

/// Which workloads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Affected {
    /// Those of a namespace that have these labels.
    Selected(Str, Selector),
    /// Those of any namespace that have these labels.
    SelectedAnywhere(Selector),
    /// The endpoints of the services that an object defines.
    Behind(ObjectKey),
    /// Those that are bound to a waypoint that is this target of a policy of this namespace.
    Bound(Str, Target),
    /// Those of a namespace.
    Namespace(Str),
    /// The services of a namespace, or all.
    Services(Option<Str>),
    /// Not workloads: the services with workloads of a namespace, or of any, behind waypoints.
    Covered(Option<Str>),
    /// Not workloads: the services behind waypoints that something is told of.
    Told(Told),
    /// Not workloads: what nodes enforce of a policy for workloads behind waypoints.
    Rewritten(PolicyKey),
    /// All.
    Mesh,
}

/// Services behind waypoints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Told {
    /// All.
    All,
    /// Those behind the waypoints of a namespace.
    In(Str),
    /// Those behind one waypoint.
    By(Waypoint),
    /// Those that an object defines.
    Of(ObjectKey),
}
