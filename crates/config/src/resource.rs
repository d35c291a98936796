//! The kinds that are read, and reading an object of any of them.
//!
//! To add a kind: a module with its type, its [`Schema`], its parse function and a static [`KindSpec`]; a variant
//! of [`Kind`] and of [`Resource`]; an entry in [`KINDS`]; and its place in `compile`.

use std::sync::Arc;

use model::Str;

use crate::diagnostic::{Code, ResourceName};
use crate::external::{ServiceEntry, WorkloadEntry, service_entry, workload_entry, workload_group};
use crate::fields::{Context, Cursor, Fields, Path, Schema, edit_distance, enforced, silent};
use crate::kinds::{
    EndpointSlice, Namespace, Node, Pod, Service, ServiceAccount, endpoint_slice, foreign, namespace, node,
    pod, service, service_account,
};
use crate::labels::Labels;
use crate::metadata::{self, Metadata};
use crate::policy::authorization::{self, PolicyScope};
use crate::policy::{
    AuthorizationPolicy, MeshConfig, PeerAuthentication, RateLimit, RequestAuthentication, Telemetry,
};
use crate::policy::{mesh_config, peer_authentication, rate_limit, request_authentication, telemetry};
use crate::routes::{
    DestinationRule, Gateway, HttpRoute, ReferenceGrant, StreamRoute, VirtualService, destination_rule,
    gateway, grpc_route, http_route, reference_grant, stream_route, virtual_service,
};
use crate::tree;

/// A kind that is read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Kind {
    /// `v1 Namespace`.
    Namespace,
    /// `v1 Node`.
    Node,
    /// `v1 Pod`.
    Pod,
    /// `v1 Service`.
    Service,
    /// `discovery.k8s.io/v1 EndpointSlice`.
    EndpointSlice,
    /// `v1 ServiceAccount`.
    ServiceAccount,
    /// `v1 ConfigMap`, of which one holds the mesh's settings.
    ConfigMap,
    /// `mesh.istio.io MeshConfig`.
    MeshConfig,
    /// `security.istio.io AuthorizationPolicy`.
    AuthorizationPolicy,
    /// `security.istio.io PeerAuthentication`.
    PeerAuthentication,
    /// `networking.istio.io ServiceEntry`.
    ServiceEntry,
    /// `networking.istio.io WorkloadEntry`.
    WorkloadEntry,
    /// `networking.istio.io WorkloadGroup`.
    WorkloadGroup,
    /// `gateway.networking.k8s.io HTTPRoute`.
    HttpRoute,
    /// `gateway.networking.k8s.io ReferenceGrant`.
    ReferenceGrant,
    /// `networking.istio.io DestinationRule`.
    DestinationRule,
    /// `networking.istio.io VirtualService`.
    VirtualService,
    /// `gateway.networking.k8s.io Gateway`.
    Gateway,
    /// `gateway.networking.k8s.io GRPCRoute`.
    GrpcRoute,
    /// `security.istio.io RequestAuthentication`.
    RequestAuthentication,
    /// `telemetry.istio.io Telemetry`.
    Telemetry,
    /// `culvert.dev RateLimit`.
    RateLimit,
    /// `gateway.networking.k8s.io TCPRoute`.
    TcpRoute,
    /// `gateway.networking.k8s.io TLSRoute`.
    TlsRoute,
}

/// An object of any kind.
#[derive(Debug)]
pub enum Resource {
    /// A namespace.
    Namespace(Box<Namespace>),
    /// A node.
    Node(Box<Node>),
    /// A pod.
    Pod(Box<Pod>),
    /// A service.
    Service(Box<Service>),
    /// Endpoints of a service.
    EndpointSlice(Box<EndpointSlice>),
    /// A service account.
    ServiceAccount(ServiceAccount),
    /// A ConfigMap: the mesh's settings, if it holds them.
    ConfigMap(Option<Box<MeshConfig>>),
    /// The mesh's settings.
    MeshConfig(Box<MeshConfig>),
    /// An authorization policy.
    AuthorizationPolicy(Box<AuthorizationPolicy>),
    /// A peer authentication.
    PeerAuthentication(Box<PeerAuthentication>),
    /// A service outside Kubernetes' registry.
    ServiceEntry(Box<ServiceEntry>),
    /// A machine outside Kubernetes.
    WorkloadEntry(Box<WorkloadEntry>),
    /// A template for machines.
    WorkloadGroup,
    /// Routes of HTTP requests.
    HttpRoute(Box<HttpRoute>),
    /// Routes of connections.
    StreamRoute(Box<StreamRoute>),
    /// Who of other namespaces may refer to objects of this one.
    ReferenceGrant(Box<ReferenceGrant>),
    /// How a host is spoken to.
    DestinationRule(Box<DestinationRule>),
    /// Routes of a host's requests and connections.
    VirtualService(Box<VirtualService>),
    /// A waypoint, or a gateway of another class.
    Gateway(Box<Gateway>),
    /// Whose tokens are taken.
    RequestAuthentication(Box<RequestAuthentication>),
    /// What is told of requests.
    Telemetry(Box<Telemetry>),
    /// How many requests there may be.
    RateLimit(Box<RateLimit>),
}

impl Resource {
    /// What fails closed in the place of an object with errors, as far as it could be read; `None` for a kind that
    /// restricts nothing.
    fn stand_in(kind: Kind, read: Option<Self>) -> Option<Self> {
        match (kind, read) {
            (Kind::AuthorizationPolicy, Some(Self::AuthorizationPolicy(policy))) => {
                policy.closed().map(|policy| Self::AuthorizationPolicy(Box::new(policy)))
            }
            (Kind::AuthorizationPolicy, _) => Some(Self::AuthorizationPolicy(Box::new(
                AuthorizationPolicy::denying(PolicyScope::Namespace),
            ))),
            (Kind::PeerAuthentication, Some(Self::PeerAuthentication(policy))) => {
                Some(Self::PeerAuthentication(Box::new(PeerAuthentication::strict(policy.selector))))
            }
            (Kind::PeerAuthentication, _) => {
                Some(Self::PeerAuthentication(Box::new(PeerAuthentication::strict(None))))
            }
            (Kind::RequestAuthentication, read) => {
                let scope = match read {
                    Some(Self::RequestAuthentication(read)) => read.scope,
                    _ => PolicyScope::Namespace,
                };
                Some(Self::RequestAuthentication(Box::new(RequestAuthentication::closed(scope))))
            }
            (Kind::RateLimit, read) => {
                let scope = match read {
                    Some(Self::RateLimit(read)) => read.scope,
                    _ => PolicyScope::Targets(Box::default()),
                };
                Some(Self::RateLimit(Box::new(RateLimit::closed(scope))))
            }
            (Kind::Namespace, read) => {
                let labels = match read {
                    Some(Self::Namespace(read)) => read.labels,
                    _ => Labels::default(),
                };
                Some(Self::Namespace(Box::new(Namespace::closed(labels))))
            }
            _ => None,
        }
    }
}

/// Reads the fields beside `apiVersion`, `kind` and `metadata`; `None` when the object is not valid, which has
/// been reported. A value beside a reported error is ignored.
pub type Parse = for<'f, 'n> fn(&mut Fields<'f, 'n>, &Metadata<'n>) -> Option<Resource>;

/// All there is to know of a kind.
#[derive(Debug)]
pub struct KindSpec {
    /// Which kind.
    pub kind: Kind,
    /// Its API group, empty for the core group.
    pub group: &'static str,
    /// The versions in which it is read: they must be the same in form.
    pub versions: &'static [&'static str],
    /// Its name as in `kind`.
    pub name: &'static str,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
    /// Its fields.
    pub schema: &'static Schema,
    /// Reads an object.
    pub parse: Parse,
}

impl KindSpec {
    /// Whether it is a custom resource. A cluster may not have it, and its server does not know what its fields mean.
    #[must_use]
    pub fn is_custom(&self) -> bool {
        !matches!(self.group, "" | "discovery.k8s.io")
    }
}

/// Every kind that is read.
pub static KINDS: &[&KindSpec] = &[
    &pod::KIND,
    &service::KIND,
    &endpoint_slice::KIND,
    &service_account::KIND,
    &namespace::KIND,
    &node::KIND,
    &authorization::KIND,
    &peer_authentication::KIND,
    &telemetry::KIND,
    &request_authentication::KIND,
    &rate_limit::KIND,
    &service_entry::KIND,
    &workload_entry::KIND,
    &workload_group::KIND,
    &mesh_config::CONFIG_MAP_KIND,
    &mesh_config::KIND,
    &http_route::KIND,
    &reference_grant::KIND,
    &destination_rule::KIND,
    &virtual_service::KIND,
    &gateway::KIND,
    &grpc_route::KIND,
    &stream_route::TCP,
    &stream_route::TLS,
];

impl Kind {
    /// All there is to know of it.
    #[must_use]
    pub fn spec(self) -> Option<&'static KindSpec> {
        KINDS.iter().copied().find(|spec| spec.kind == self)
    }

    /// Its name as in `kind`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.spec().map_or("", |spec| spec.name)
    }
}

/// An object's name among all.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace, empty for a kind that has none.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
}

impl ObjectKey {
    /// The name for diagnostics.
    #[must_use]
    pub fn resource_name(&self) -> ResourceName {
        ResourceName {
            kind: self.kind.name().into(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }
}

/// What a document, or an item of a list, turned out to be.
#[derive(Debug)]
pub enum Reading {
    /// A valid object.
    Object(ObjectKey, Resource),
    /// Nothing that concerns the mesh.
    Ignored,
    /// An object with errors: whose it is, and what stands in for it where nothing is known of it from before.
    Invalid(ObjectKey, Option<Resource>),
    /// Something with errors that could be any object.
    Unidentified,
}

/// Reads one object. What is wrong with it is in the context afterwards.
pub fn read<'n>(node: &'n tree::Node<'n>, context: &mut Context<'n>) -> Reading {
    let Some((group, version, kind)) = type_of(node, context) else { return Reading::Unidentified };
    let Some(spec) = KINDS.iter().copied().find(|s| s.group == group && s.name == kind) else {
        return foreign::report(node, group, kind, context);
    };
    let key = key_of(node, spec, context);
    let invalid = |key: Option<ObjectKey>| {
        key.map_or(Reading::Unidentified, |key| Reading::Invalid(key, Resource::stand_in(spec.kind, None)))
    };
    if !spec.versions.contains(&version) {
        let position = node.get("apiVersion").map_or(node.position, |n| n.position);
        let versions = spec.versions.join(", ");
        let message = format!("{kind} is not read in version {version:?}");
        let remedy = format!("use {}", api_version(group, &versions));
        context.report(Code::UnsupportedVersion, position, &Path::of("apiVersion"), message, remedy);
        return invalid(key);
    }
    let Some(key) = key else {
        let name: Arc<str> = spec.name.into();
        if let Some(cursor) = Cursor::root(node, spec.schema, context).fields().as_mut() {
            cursor.required("metadata").and_then(|m| metadata::read(m, &name, spec.namespaced));
        }
        return Reading::Unidentified;
    };
    match parse(node, spec, context) {
        Some(resource) if context.is_valid() => Reading::Object(key, resource),
        read => Reading::Invalid(key, Resource::stand_in(spec.kind, read)),
    }
}

fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

fn parse<'n>(node: &'n tree::Node<'n>, spec: &KindSpec, context: &mut Context<'n>) -> Option<Resource> {
    let name = context.pool.string(spec.name);
    let mut fields = Cursor::root(node, spec.schema, context).fields()?;
    fields.take("apiVersion");
    fields.take("kind");
    let metadata = metadata::read(fields.required("metadata")?, &name, spec.namespaced)?;
    (spec.parse)(&mut fields, &metadata)
}

/// Group, version and kind.
fn type_of<'n>(node: &'n tree::Node<'n>, context: &mut Context<'n>) -> Option<(&'n str, &'n str, &'n str)> {
    let text = |name| node.get(name).and_then(|n: &'n tree::Node<'n>| n.as_str());
    if let (Some(api_version), Some(kind)) = (text("apiVersion"), text("kind")) {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        return Some((group, version, kind));
    }
    let message = match &node.value {
        tree::Value::Mapping(_) => "an object needs apiVersion and kind, both strings".to_owned(),
        value => {
            format!("an object is a mapping with apiVersion, kind and metadata; this is {}", value.kind())
        }
    };
    context.report(Code::NotAnObject, node.position, &Path::ROOT, message, "");
    None
}

/// The key of an object, as far as it can be told without reading it.
fn key_of(node: &tree::Node<'_>, spec: &KindSpec, context: &mut Context<'_>) -> Option<ObjectKey> {
    let metadata = node.get("metadata")?;
    let name = metadata.get("name")?.as_str().filter(|n| metadata::is_subdomain(n))?;
    let namespace = match metadata.get("namespace") {
        _ if !spec.namespaced => "",
        None => "default",
        Some(tree::Node { value: tree::Value::Null, .. }) => "default",
        Some(node) => node.as_str().filter(|n| metadata::is_label(n))?,
    };
    Some(ObjectKey { kind: spec.kind, namespace: context.pool.string(namespace), name: name.into() })
}

/// The items of a `kind: List` (or `PodList` and the like), which stand for themselves; `None` for another kind.
#[must_use]
pub fn list_items<'a, 'n>(node: &'a tree::Node<'n>) -> Option<&'a [tree::Node<'n>]> {
    let kind = node.get("kind")?.as_str()?;
    match (&node.get("items")?.value, kind.strip_suffix("List")) {
        (tree::Value::Sequence(items), Some(_)) => Some(items),
        _ => None,
    }
}

/// The fields of a list itself.
pub static LIST: Schema = Schema {
    name: "List",
    fields: &[
        enforced("items"),
        silent("apiVersion", "each item has its own"),
        silent("kind", "it is a list"),
        silent("metadata", "a list is no object"),
    ],
};

/// The kind of any group whose name is most like `kind`.
pub(crate) fn similar_kind(kind: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let kind = kind.get(..kind.len().min(64))?.to_lowercase();
    let best = known.map(|name| (edit_distance(&name.to_lowercase(), &kind), name)).min()?;
    (best.0 <= kind.len() / 3).then_some(best.1)
}
