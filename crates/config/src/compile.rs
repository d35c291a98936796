//! From resources to the model, incrementally: a changed object costs work for what it touches.
//!
//! # How it works
//! Everything that has an address and labels is an [`Instance`]: a pod, a WorkloadEntry, an endpoint that an
//! EndpointSlice or a ServiceEntry lists. Everything that has a host name and endpoints is a [`Definition`]. The
//! compiler joins the two, attaches the policies, and gives out [`model::Change`]s.
//!
//! # How policies hook in
//! `crate::policy` keeps what it needs of its own resources and says, for each that is set or removed, what
//! follows, as [`Effects`]: changes of the model that stand for themselves (`SetPolicy`, `RemovePolicy`,
//! `SetSettings`), and which workloads' list of policies has to be made again, as [`Affected`]. The compiler finds
//! these workloads by its indexes and asks, for each, for its `Workload.policies` by namespace and labels. So
//! `crate::policy` has a state with three functions, all pure:
//!
//! ```text
//! fn set(&mut self, key: &ObjectKey, resource: …) -> Effects
//! fn remove(&mut self, key: &ObjectKey) -> Effects
//! fn attached(&self, namespace: &str, labels: &Labels) -> Vec<PolicyKey>    // sorted, no key twice
//! ```
//!
//! # How external workloads and services hook in
//! `crate::external` has a state with `set` and `remove` of the same form. It turns a WorkloadEntry or ServiceEntry
//! into instances and definitions, under the resource's own key ([`Made`]): they are all that the resource makes;
//! what it made before and makes no more is removed. A change of one resource may change what others make (a
//! WorkloadGroup's entries, virtual addresses that collide): then `made` lists these too.

mod attach;
mod authenticate;
mod binding;
mod convert;
mod displace;
mod enrolment;
mod halves;
mod hosts;
mod http;
mod ids;
mod index;
mod instance;
mod join;
mod record;
mod review;
mod review_routes;
mod review_shadows;
mod standing;

use std::collections::BTreeMap;
use std::sync::Arc;

use hashbrown::{HashMap, HashSet};
use model::http::{HttpService, ServiceTraffic};
use model::{Change, Locality, PolicyKey, Service, ServiceKey, Settings, Str, TrustDomain, Vip};

pub use enrolment::{Enrolment, EnrolmentChange};
pub use instance::{
    Affected, Definition, Effects, Finding, Instance, Made, Membership, Names, PortRule, Rank, RuleTarget,
    Told,
};
pub use standing::{Judgement, RouteStanding};

use crate::external::External;
use crate::kinds::namespace::DATAPLANE_MODE;
use crate::kinds::{Capture, EndpointSlice, Namespace, Pod};
use crate::labels::Pool;
use crate::policy::{Binding, MeshConfig, NamespaceSelector, Policies, Waypoint};
use crate::resource::{Kind, ObjectKey, Resource};
use crate::routes::gateway::WaypointSpec;
use crate::routes::{DestinationRules, Grants, Routes, VirtualServices};
use halves::Halves;
use hosts::Hosts;
use ids::Id;
use index::{Addresses, Area, Place, Uids};
use record::{Natures, Record};

/// Where the resources come from, which decides what some of them mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Origin {
    /// Files that people write: labels put pods into the mesh, and every object is read.
    #[default]
    Files,
    /// A cluster: a pod is in the mesh once its node's agent says that its traffic is captured, namespaces may be
    /// selected (`discoverySelectors`), and a policy with errors of which nothing is known fails closed at any time.
    Cluster,
}

/// What is known of the mesh before any resource is read.
#[derive(Clone, Debug)]
pub struct Options {
    /// The cluster's name.
    pub cluster: Str,
    /// The domain of its services' names.
    pub cluster_domain: Str,
    /// The network that its addresses are on.
    pub network: Str,
    /// The node whose pods are to be enrolled; `None` to enrol none.
    pub node: Option<Str>,
    /// The namespace whose policies hold for the whole mesh, unless the settings name another.
    pub root_namespace: Str,
    /// Where the resources come from.
    pub origin: Origin,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cluster: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            network: "".into(),
            node: None,
            root_namespace: Settings::default().root_namespace,
            origin: Origin::Files,
        }
    }
}

/// What conversions need: the options, and values that most workloads share.
pub struct Context<'c> {
    /// The options.
    pub options: &'c Options,
    /// Shared strings, label sets and port mappings.
    pub pool: &'c mut Pool,
    empty: Str,
    default_account: Str,
    no_locality: Arc<Locality>,
    trust_domain: TrustDomain,
}

/// What a batch of changes came to.
#[derive(Debug, Default)]
pub struct Batch {
    /// Steps from the model as it was to the model as it is.
    pub changes: Vec<Change>,
    /// The same for the node's enrolments.
    pub enrolments: Vec<EnrolmentChange>,
    /// The objects whose findings changed, or how they stand with what they name ([`Compiler::route_standing`] and its
    /// like).
    pub found: Vec<ObjectKey>,
}

/// A service: all that define it, the one in force first.
#[derive(Default)]
struct Entry {
    definitions: Vec<(ObjectKey, Definition)>,
    emitted: Option<Arc<Service>>,
}

/// Who found something: a resource may have findings of several.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Source {
    Effects,
    Instance,
    /// By host name.
    Service(Str),
}

/// Compiles resources into the model, a batch at a time.
///
/// [`Compiler::stage`] takes what changed, [`Compiler::commit`] compiles what that touches, once each. Both are
/// deterministic: the same stages and commits give the same changes, up to their order.
pub struct Compiler {
    options: Options,
    shared: Shared,
    policies: Policies,
    external: External,
    /// Whether the settings were given out.
    announced: bool,
    namespaces: HashSet<Str>,
    areas: HashMap<Str, Area>,
    places: HashMap<Str, Place>,
    records: Vec<Option<Record>>,
    natures: Natures,
    free: Vec<Id>,
    by_uid: Uids,
    by_address: Addresses,
    arrivals: u64,
    services: HashMap<ServiceKey, Entry>,
    hosts: Hosts,
    halves: Halves,
    /// How many workloads of the model are endpoints of a service and don't enforce the policies for it; services
    /// without such are not listed.
    unguarded: HashMap<ServiceKey, u32>,
    by_vip: HashMap<Vip, Vec<ServiceKey>>,
    /// The Gateways that are waypoints.
    waypoints: HashMap<Waypoint, WaypointSpec>,
    /// What names a waypoint, itself or by its namespace, as of when it was compiled last.
    bound: HashMap<ObjectKey, Waypoint>,
    /// How many workloads of the model list each policy that lets in only a waypoint.
    bindings: HashMap<PolicyKey, u32>,
    /// How many workloads of a service each RequestAuthentication selects.
    authenticated: HashMap<ServiceKey, BTreeMap<PolicyKey, u32>>,
    routes: Routes,
    grants: Grants,
    virtual_services: VirtualServices,
    destinations: DestinationRules,
    traffic: HashMap<ServiceKey, Arc<ServiceTraffic>>,
    http_services: HashMap<ServiceKey, Arc<HttpService>>,
    slices: HashMap<ObjectKey, EndpointSlice>,
    slices_of: HashMap<ServiceKey, HashSet<ObjectKey>>,
    made_instances: HashMap<ObjectKey, Vec<Id>>,
    made_services: HashMap<ObjectKey, Vec<ServiceKey>>,
    findings: HashMap<ObjectKey, Vec<(Source, Finding)>>,
    // of the batch that is being made
    dirty: Vec<Id>,
    dirty_services: HashSet<ServiceKey>,
    removed: Vec<Change>,
    changes: Vec<Change>,
    enrolments: Vec<EnrolmentChange>,
    found: HashSet<ObjectKey>,
    steps: u64,
}

/// Values that most workloads share.
struct Shared {
    empty: Str,
    default_account: Str,
    latest: Str,
    no_locality: Arc<Locality>,
}

impl Shared {
    fn context<'c>(&self, options: &'c Options, settings: &Settings, pool: &'c mut Pool) -> Context<'c> {
        Context {
            options,
            pool,
            empty: self.empty.clone(),
            default_account: self.default_account.clone(),
            no_locality: self.no_locality.clone(),
            trust_domain: settings.trust_domains.own.clone(),
        }
    }
}

impl Compiler {
    /// A compiler without resources.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let settings = Settings {
            cluster_domain: options.cluster_domain.clone(),
            root_namespace: options.root_namespace.clone(),
            ..Settings::default()
        };
        Self {
            policies: Policies::new(settings, options.origin),
            options,
            external: External::default(),
            announced: false,
            shared: Shared {
                empty: "".into(),
                default_account: "default".into(),
                latest: "latest".into(),
                no_locality: Arc::new(Locality::default()),
            },
            namespaces: HashSet::new(),
            areas: HashMap::new(),
            places: HashMap::new(),
            records: Vec::new(),
            natures: Natures::default(),
            free: Vec::new(),
            by_uid: Uids::default(),
            by_address: Addresses::default(),
            arrivals: 0,
            services: HashMap::new(),
            hosts: Hosts::default(),
            halves: Halves::default(),
            unguarded: HashMap::new(),
            by_vip: HashMap::new(),
            waypoints: HashMap::new(),
            bound: HashMap::new(),
            bindings: HashMap::new(),
            authenticated: HashMap::new(),
            routes: Routes::default(),
            grants: Grants::default(),
            virtual_services: VirtualServices::default(),
            destinations: DestinationRules::default(),
            traffic: HashMap::new(),
            http_services: HashMap::new(),
            slices: HashMap::new(),
            slices_of: HashMap::new(),
            made_instances: HashMap::new(),
            made_services: HashMap::new(),
            findings: HashMap::new(),
            dirty: Vec::new(),
            dirty_services: HashSet::new(),
            removed: Vec::new(),
            changes: Vec::new(),
            enrolments: Vec::new(),
            found: HashSet::new(),
            steps: 0,
        }
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        self.policies.settings()
    }

    /// The settings in force as they are written; `None` where there are none.
    #[must_use]
    pub fn mesh_config(&self) -> Option<&MeshConfig> {
        self.policies.config()
    }

    /// Which namespaces are read (`discoverySelectors`), one of which must match; all of them where there are none.
    #[must_use]
    pub fn discovery(&self) -> &[NamespaceSelector] {
        self.policies.discovery()
    }

    /// The Gateways that are waypoints.
    pub fn waypoints(&self) -> impl Iterator<Item = &Waypoint> {
        self.waypoints.keys()
    }

    /// How many objects, instances and services were looked at so far: what the changes cost.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// What was found about an object in the light of others.
    pub fn findings(&self, key: &ObjectKey) -> impl Iterator<Item = &Finding> {
        self.findings.get(key).into_iter().flatten().map(|(_, finding)| finding)
    }

    /// All objects that something was found about.
    pub fn found(&self) -> impl Iterator<Item = &ObjectKey> {
        self.findings.keys()
    }

    /// Takes a resource that is new or changed, or `None` for one that is gone; with it the text that is a pod's uid.
    pub fn stage(&mut self, key: &ObjectKey, resource: Option<(Str, Resource)>, pool: &mut Pool) {
        self.steps += 1;
        let (uid, resource) = resource.unzip();
        match (key.kind, resource) {
            (Kind::Namespace, Some(Resource::Namespace(namespace))) => {
                self.set_namespace(&key.name, Some(&namespace), pool);
            }
            (Kind::Namespace, _) => self.set_namespace(&key.name, None, pool),
            (Kind::Gateway, resource) => self.set_gateway(key, resource),
            (Kind::Node, Some(Resource::Node(node))) => self.set_node(&key.name, Some(node.locality)),
            (Kind::Node, _) => self.set_node(&key.name, None),
            (Kind::Pod, Some(Resource::Pod(pod))) => self.set_pod(key, uid.unwrap_or_default(), *pod, pool),
            (Kind::Pod, _) => self.remove_uid(&convert::pod_uid(&self.options, key)),
            (Kind::Service, Some(Resource::Service(service))) => {
                let definition = convert::service(
                    key,
                    *service,
                    &self.shared.context(&self.options, self.policies.settings(), pool),
                );
                self.set_definitions(key, definition.into_iter().collect(), pool);
            }
            (Kind::Service, _) => self.set_definitions(key, Vec::new(), pool),
            (Kind::EndpointSlice, Some(Resource::EndpointSlice(slice))) => {
                self.set_slice(key, Some(*slice), pool);
            }
            (Kind::EndpointSlice, _) => self.set_slice(key, None, pool),
            (Kind::ServiceAccount, _) => {}
            (Kind::ServiceEntry | Kind::WorkloadEntry | Kind::WorkloadGroup, resource) => {
                let mut context = self.shared.context(&self.options, self.policies.settings(), pool);
                let effects = match resource {
                    Some(resource) => self.external.set(key, resource, &mut context),
                    None => self.external.remove(key, &mut context),
                };
                self.take(effects, pool);
            }
            (
                Kind::HttpRoute
                | Kind::GrpcRoute
                | Kind::TcpRoute
                | Kind::TlsRoute
                | Kind::ReferenceGrant
                | Kind::DestinationRule
                | Kind::VirtualService,
                resource,
            ) => {
                self.set_route(key, resource);
            }
            (
                Kind::AuthorizationPolicy
                | Kind::PeerAuthentication
                | Kind::RequestAuthentication
                | Kind::Telemetry
                | Kind::RateLimit
                | Kind::ConfigMap
                | Kind::MeshConfig,
                resource,
            ) => {
                let effects = match resource {
                    Some(resource) => self.policies.set(key, resource),
                    None => self.policies.remove(key),
                };
                self.take(effects, pool);
            }
        }
    }

    fn set_pod(&mut self, key: &ObjectKey, uid: Str, pod: Pod, pool: &mut Pool) {
        let mut context = self.shared.context(&self.options, self.policies.settings(), pool);
        let instance = convert::pod(key, uid, pod, &mut context);
        match instance {
            Some(instance) => {
                self.put_instance(Kind::Pod, instance);
            }
            None => self.remove_uid(&convert::pod_uid(&self.options, key)),
        }
    }

    /// Compiles what the staged changes touch.
    pub fn commit(&mut self, pool: &mut Pool) -> Batch {
        self.settle_addresses();
        let mut workloads = Vec::with_capacity(self.dirty.len());
        for id in std::mem::take(&mut self.dirty) {
            workloads.extend(self.compile_instance(id, pool));
        }
        self.settle_halves();
        // After their endpoints: whether a service is closed depends on these.
        // Twice at most: routes to a service that changed are looked at again, and that changes no service.
        while !self.dirty_services.is_empty() {
            for key in std::mem::take(&mut self.dirty_services) {
                self.compile_service(&key);
            }
        }
        if !std::mem::replace(&mut self.announced, true) {
            self.changes.push(Change::SetSettings(self.policies.settings().clone().into()));
        }
        // What goes, goes first, so that an address that changes hands is free for the next.
        // Put before the workloads where these are: of all that there are at the start, no second list is made.
        workloads.reserve_exact(self.removed.len() + self.changes.len());
        let before = std::mem::take(&mut self.removed).into_iter().chain(std::mem::take(&mut self.changes));
        workloads.splice(0..0, before);
        self.natures.sweep();
        let found = std::mem::take(&mut self.found).into_iter().collect();
        Batch { changes: workloads, enrolments: std::mem::take(&mut self.enrolments), found }
    }

    fn area(&mut self, namespace: &Str) -> &mut Area {
        self.areas.entry(namespace.clone()).or_default()
    }

    fn drop_unused_area(&mut self, namespace: &str) {
        if self.areas.get(namespace).is_some_and(Area::is_unused) {
            self.areas.remove(namespace);
        }
    }

    fn set_namespace(&mut self, name: &Str, namespace: Option<&Namespace>, pool: &mut Pool) {
        let said = self.policies.set_node_local(name, namespace.and_then(|n| n.node_local));
        self.take(said, pool);
        match namespace {
            Some(_) => self.namespaces.insert(name.clone()),
            None => self.namespaces.remove(name),
        };
        let mode = namespace.and_then(|n| n.labels.get(DATAPLANE_MODE));
        let ambient = mode.is_some_and(|m| &**m == "ambient");
        let distribution = namespace.and_then(|n| n.distribution);
        let waypoint = namespace.map(|n| Binding::of(&n.labels, name)).unwrap_or_default();
        let area = self.area(name);
        let (was_ambient, was_distribution) = (area.ambient, area.distribution);
        (area.ambient, area.distribution) = (ambient, distribution);
        let was_bound = std::mem::replace(&mut area.waypoint, waypoint);
        let labels = namespace.map(|n| n.labels.clone()).unwrap_or_default();
        let relabelled = std::mem::replace(&mut area.labels, labels) != area.labels;
        let rebound = was_bound != area.waypoint || (relabelled && area.waypoint != Binding::Inherited);
        if was_ambient != ambient || rebound {
            let instances: Vec<Id> = area.instances.iter().collect();
            instances.into_iter().for_each(|id| self.mark(id));
        }
        if was_distribution != distribution || rebound {
            let services: Vec<ServiceKey> = self.area(name).services.iter().cloned().collect();
            self.dirty_services.extend(services);
        }
        self.drop_unused_area(name);
    }

    fn set_node(&mut self, name: &Str, locality: Option<Locality>) {
        let place = self.places.entry(name.clone()).or_insert_with(|| Place::new(name));
        let is_known = locality.is_some();
        let here = Locality { node: name.clone(), ..locality.unwrap_or_default() };
        if place.is_known == is_known && *place.here == here {
            return;
        }
        (place.here, place.is_known) = (Arc::new(here), is_known);
        let instances: Vec<Id> = place.instances.iter().collect();
        if !is_known && instances.is_empty() {
            self.places.remove(name);
        }
        instances.into_iter().for_each(|id| self.mark(id));
    }

    fn set_slice(&mut self, key: &ObjectKey, slice: Option<EndpointSlice>, pool: &mut Pool) {
        let service_of = |slice: &EndpointSlice| {
            let service = ObjectKey { kind: Kind::Service, name: slice.service.clone()?, ..key.clone() };
            Some(convert::service_key(&self.options, &service))
        };
        let old = self.slices.get(key).and_then(service_of);
        let new = slice.as_ref().and_then(service_of);
        if let Some(old) = old
            && let Some(set) = self.slices_of.get_mut(&old)
        {
            set.remove(key);
            if set.is_empty() {
                self.slices_of.remove(&old);
            }
        }
        match (slice, new) {
            (Some(slice), Some(service)) => {
                self.slices.insert(key.clone(), slice);
                self.slices_of.entry(service.clone()).or_default().insert(key.clone());
                self.derive_slice(key, &service, pool);
            }
            _ => {
                self.slices.remove(key);
                self.set_instances(key, Vec::new());
            }
        }
    }

    /// Names the Services anew when the settings say that the cluster's domain is another.
    fn follow_cluster_domain(&mut self, pool: &mut Pool) {
        let domain = &self.policies.settings().cluster_domain;
        if self.options.cluster_domain == *domain {
            return;
        }
        self.options.cluster_domain = domain.clone();
        let of_services = |(by, definition): &(ObjectKey, Definition)| {
            (by.kind == Kind::Service).then(|| (by.clone(), definition.clone()))
        };
        let definitions: Vec<_> =
            self.services.values().flat_map(|e| &e.definitions).filter_map(of_services).collect();
        for (by, mut definition) in definitions {
            definition.service.hostname = convert::service_key(&self.options, &by).hostname;
            self.set_definitions(&by, vec![definition], pool);
        }
        self.dirty_services.extend(self.services.keys().cloned());
        self.slices_of.clear();
        for (key, slice) in std::mem::take(&mut self.slices) {
            self.set_slice(&key, Some(slice), pool);
        }
    }

    /// Makes the endpoints of a slice again.
    fn derive_slice(&mut self, key: &ObjectKey, service: &ServiceKey, pool: &mut Pool) {
        let definition = self.services.get(service).and_then(|e| e.definitions.first()).map(|(_, d)| d);
        let instances = match (self.slices.get(key), definition) {
            (Some(slice), Some(definition)) => convert::slice(
                key,
                slice,
                definition,
                &mut self.shared.context(&self.options, self.policies.settings(), pool),
            ),
            _ => Vec::new(),
        };
        self.set_instances(key, instances);
    }

    /// Sets all the instances that a resource makes.
    fn set_instances(&mut self, by: &ObjectKey, instances: Vec<Instance>) {
        let new: Vec<Id> = instances.into_iter().map(|i| self.put_instance(by.kind, i)).collect();
        let old = if new.is_empty() {
            self.made_instances.remove(by)
        } else {
            self.made_instances.insert(by.clone(), new.clone())
        };
        let kept: HashSet<Id> = new.into_iter().collect();
        for id in old.unwrap_or_default() {
            if !kept.contains(&id) {
                self.remove_instance(id);
            }
        }
    }

    /// Sets all the services that a resource makes.
    fn set_definitions(&mut self, by: &ObjectKey, definitions: Vec<Definition>, pool: &mut Pool) {
        let mut new: Vec<ServiceKey> = Vec::with_capacity(definitions.len());
        for definition in definitions {
            let key = definition.service.key();
            self.change_service(&key, by, Some(definition), pool);
            new.push(key);
        }
        let old = if new.is_empty() {
            self.made_services.remove(by)
        } else {
            self.made_services.insert(by.clone(), new.clone())
        };
        let kept: HashSet<ServiceKey> = new.into_iter().collect();
        for key in old.unwrap_or_default() {
            if !kept.contains(&key) {
                self.found.extend(self.virtual_services.naming(&key));
                self.change_service(&key, by, None, pool);
            }
        }
        self.note_standing(by);
        let waypoint = Waypoint { namespace: by.namespace.clone(), name: by.name.clone() };
        if by.kind == Kind::Service && self.waypoints.contains_key(&waypoint) {
            self.note_bound(&waypoint);
        }
    }

    /// Looks at what depends on a change again.
    fn affect(&mut self, affected: &Affected) {
        let ids: Vec<Id> = match affected {
            Affected::Selected(namespace, selector) => {
                self.mark_selected(namespace, selector);
                return;
            }
            Affected::SelectedAnywhere(selector) => {
                let namespaces: Vec<Str> = self.areas.keys().cloned().collect();
                namespaces.iter().for_each(|namespace| self.mark_selected(namespace, selector));
                return;
            }
            Affected::Bound(namespace, target) => {
                self.mark_bound(namespace, target);
                return;
            }
            Affected::Behind(key) => {
                self.mark_behind(key);
                return;
            }
            Affected::Covered(namespace) => {
                self.touch_covered(namespace.as_ref());
                return;
            }
            Affected::Told(told) => {
                self.touch_told(told);
                return;
            }
            Affected::Rewritten(key) => {
                self.rewrite(key);
                return;
            }
            Affected::Services(None) => {
                self.dirty_services.extend(self.services.keys().cloned());
                return;
            }
            Affected::Services(Some(namespace)) => {
                let services = self.areas.get(namespace).into_iter().flat_map(|a| a.services.iter().cloned());
                self.dirty_services.extend(services);
                return;
            }
            Affected::Namespace(namespace) => {
                self.areas.get(namespace).map(|a| a.instances.iter().collect()).unwrap_or_default()
            }
            Affected::Mesh => self.by_uid.iter().collect(),
        };
        ids.into_iter().for_each(|id| self.mark(id));
    }

    /// Does what a resource's effects ask for.
    fn take(&mut self, effects: Effects, pool: &mut Pool) {
        self.announced |= effects.changes.iter().any(|c| matches!(c, Change::SetSettings(_)));
        self.changes.extend(effects.changes);
        self.follow_cluster_domain(pool);
        for affected in &effects.affected {
            self.affect(affected);
        }
        for made in effects.made {
            self.set_instances(&made.by, made.instances);
            self.set_definitions(&made.by, made.definitions, pool);
        }
        for (key, findings) in effects.findings {
            self.set_findings(&key, &Source::Effects, findings);
        }
    }

    fn set_findings(&mut self, key: &ObjectKey, source: &Source, findings: Vec<Finding>) {
        let old = self.findings.get(key).map_or(&[][..], Vec::as_slice);
        if old.iter().filter(|(s, _)| s == source).map(|(_, f)| f).eq(findings.iter()) {
            return;
        }
        let list = self.findings.entry(key.clone()).or_default();
        list.retain(|(s, _)| s != source);
        list.extend(findings.into_iter().map(|finding| (source.clone(), finding)));
        if list.is_empty() {
            self.findings.remove(key);
        }
        self.found.insert(key.clone());
    }
}
