//! A snapshot of all that is known of the mesh, with the indexes that lookups need.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::hash::{BuildHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use ipnet::{Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use crate::holders::ByAddress;
use crate::http::{Authorizer, HttpService, RateLimit, Request, RequestAuthentication, ServiceTraffic};
use crate::verdict::{Connection, Decision, Held, RequestDecision, decide, decide_request};
use crate::{
    CowMap, NetworkAddress, OriginalDst, Policy, PolicyKey, PortMapping, Scope, Service, ServiceKey,
    ServiceSource, Settings, Str, Workload, WorkloadKind, canonical_ip,
};

/// One step from a snapshot to the next.
#[derive(Clone, Debug)]
pub enum Change {
    /// Adds a workload or replaces the one of the same uid.
    SetWorkload(Arc<Workload>),
    /// Removes the workload of this uid.
    RemoveWorkload(Str),
    /// Adds a service or replaces the one of the same key.
    SetService(Arc<Service>),
    /// Removes a service.
    RemoveService(ServiceKey),
    /// Adds a policy or replaces the one of the same key.
    SetPolicy(Arc<Policy>),
    /// Removes a policy.
    RemovePolicy(PolicyKey),
    /// Adds what a waypoint does for a service, or replaces it.
    SetHttpService(Arc<HttpService>),
    /// Removes it.
    RemoveHttpService(ServiceKey),
    /// Adds what waypoints enforce of a policy, or replaces it.
    SetHttpPolicy(Arc<Policy>),
    /// Removes it.
    RemoveHttpPolicy(PolicyKey),
    /// Adds how a service is spoken to, or replaces it.
    SetTraffic(Arc<ServiceTraffic>),
    /// Removes it.
    RemoveTraffic(ServiceKey),
    /// Adds whose tokens are taken, or replaces it.
    SetAuthentication(Arc<RequestAuthentication>),
    /// Removes it.
    RemoveAuthentication(PolicyKey),
    /// Adds rate limits, or replaces those of the same key.
    SetRateLimit(Arc<RateLimit>),
    /// Removes them.
    RemoveRateLimit(PolicyKey),
    /// Adds an external authorizer, or replaces the one of the same name.
    SetAuthorizer(Arc<Authorizer>),
    /// Removes it.
    RemoveAuthorizer(Str),
    /// Replaces the settings.
    SetSettings(Arc<Settings>),
}

/// An endpoint of a service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The workload. Its own membership says which of its ports serve which of the service's, see [`EndpointSet::ports`].
    pub workload: Arc<Workload>,
}

/// The endpoints of a service, ready or not.
#[derive(Clone, Debug, Default)]
pub struct EndpointSet {
    service: Option<ServiceKey>,
    list: Vec<Endpoint>,
    /// Positions in the list, by the uids that stand there.
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    generation: u64,
}

impl EndpointSet {
    /// The endpoints, in no order that means anything.
    #[must_use]
    pub fn as_slice(&self) -> &[Endpoint] {
        &self.list
    }

    /// The index in [`EndpointSet::as_slice`] of the workload of this uid.
    #[must_use]
    pub fn position(&self, uid: &str) -> Option<usize> {
        let stands = |at: &u32| self.uid(*at) == Some(uid);
        self.index.find(self.hasher.hash_one(uid), stands).map(|at| *at as usize)
    }

    /// Which of an endpoint's ports serve which ports of the service.
    #[must_use]
    pub fn ports<'a>(&self, endpoint: &'a Endpoint) -> &'a [PortMapping] {
        let mut memberships = endpoint.workload.services.iter();
        memberships.rfind(|m| Some(&m.service) == self.service.as_ref()).map_or(&[], |m| &m.ports)
    }

    /// An endpoint's port behind the service's port.
    #[must_use]
    pub fn target_port(&self, endpoint: &Endpoint, service_port: u16) -> Option<u16> {
        self.ports(endpoint).iter().find(|p| p.service_port == service_port).map(|p| p.target_port)
    }

    /// The [`Mesh::generation`] in which the set last changed: what was derived from it holds until then.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    fn uid(&self, at: u32) -> Option<&str> {
        self.list.get(at as usize).map(|endpoint| &*endpoint.workload.uid)
    }

    fn insert(&mut self, endpoint: Endpoint) {
        let position = self.position(&endpoint.workload.uid);
        if let Some(slot) = position.and_then(|at| self.list.get_mut(at)) {
            *slot = endpoint;
            return;
        }
        // As many as there are addresses at most.
        let at = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        let hash = self.hasher.hash_one(&*endpoint.workload.uid);
        if self.list.len() == self.list.capacity() {
            // An eighth more, not twice as much: there are as many endpoints as workloads.
            self.list.reserve_exact((self.list.len() / 8).max(4));
        }
        self.list.push(endpoint);
        let (list, hasher) = (&self.list, &self.hasher);
        let again = |at: &u32| list.get(*at as usize).map_or(0, |e| hasher.hash_one(&*e.workload.uid));
        self.index.insert_unique(hash, at, again);
    }

    fn remove(&mut self, uid: &str) {
        let Some(position) = self.position(uid) else { return };
        let last = self.list.len() - 1;
        self.unindex(uid, position);
        if position != last {
            // The last one takes its place.
            let moved = self.list.last().map(|e| e.workload.uid.clone()).unwrap_or_default();
            let found = self.index.find_mut(self.hasher.hash_one(&*moved), |at| *at as usize == last);
            if let (Some(found), Ok(at)) = (found, u32::try_from(position)) {
                *found = at;
            }
        }
        self.list.swap_remove(position);
    }

    fn unindex(&mut self, uid: &str, position: usize) {
        let found = self.index.find_entry(self.hasher.hash_one(uid), |at| *at as usize == position);
        if let Ok(found) = found {
            found.remove();
        }
    }
}

/// What an address belongs to.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A virtual address of a service.
    Service(Arc<Service>),
    /// A workload's own address.
    Workload(Arc<Workload>),
    /// Nothing is known of it.
    Unknown,
}

/// An immutable snapshot. Cloning and replacing it is cheap, see [`CowMap`].
#[derive(Clone, Debug, Default)]
pub struct Mesh {
    generation: u64,
    policy_generation: u64,
    settings: Arc<Settings>,
    workloads: CowMap<ByUid, ()>,
    /// Usually one; with several, the first by uid, so that it does not depend on the order in which they came. Of
    /// one cluster, pods' uids come before those of entries and their endpoints.
    by_address: ByAddress,
    services: CowMap<ServiceKey, Arc<Service>>,
    by_vip: CowMap<NetworkAddress, Vec<Arc<Service>>>,
    by_range: Arc<Ranges>,
    by_hostname: CowMap<Str, Vec<Arc<Service>>>,
    endpoints: CowMap<ServiceKey, Arc<EndpointSet>>,
    http_services: CowMap<ServiceKey, Arc<HttpService>>,
    http_policies: CowMap<PolicyKey, Arc<Policy>>,
    traffic: CowMap<ServiceKey, Arc<ServiceTraffic>>,
    authentications: CowMap<PolicyKey, Arc<RequestAuthentication>>,
    rate_limits: CowMap<PolicyKey, Arc<RateLimit>>,
    authorizers: CowMap<Str, Arc<Authorizer>>,
    policies: CowMap<PolicyKey, Arc<Policy>>,
    global_policies: Arc<[Arc<Policy>]>,
    namespace_policies: CowMap<Str, Arc<[Arc<Policy>]>>,
}

/// A workload that is found by its uid.
#[derive(Clone, Debug)]
struct ByUid(Arc<Workload>);

impl Borrow<str> for ByUid {
    fn borrow(&self) -> &str {
        &self.0.uid
    }
}

impl PartialEq for ByUid {
    fn eq(&self, other: &Self) -> bool {
        self.0.uid == other.0.uid
    }
}

impl Eq for ByUid {}

impl Hash for ByUid {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.uid.hash(state);
    }
}

/// Services by ranges of addresses, the longest prefix first. Rare, so kept whole.
#[derive(Clone, Debug, Default)]
struct Ranges {
    v4: HashMap<Str, PrefixMap<Ipv4Net, Vec<Arc<Service>>>>,
    v6: HashMap<Str, PrefixMap<Ipv6Net, Vec<Arc<Service>>>>,
}

impl Mesh {
    /// The snapshot after `changes`. This one is left as it is, and all that the changes don't touch is shared.
    #[must_use]
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut next = self.clone();
        next.generation += 1;
        for change in changes {
            match change {
                Change::SetWorkload(workload) => next.set_workload(workload),
                Change::RemoveWorkload(uid) => next.remove_workload(&uid),
                Change::SetService(service) => next.set_service(service),
                Change::RemoveService(key) => next.remove_service(&key),
                Change::SetPolicy(policy) => next.set_policy(policy),
                Change::RemovePolicy(key) => next.remove_policy(&key),
                Change::SetHttpService(service) => {
                    next.http_services.insert(service.service.clone(), service);
                }
                Change::RemoveHttpService(key) => {
                    next.http_services.remove(&key);
                }
                Change::SetHttpPolicy(policy) => {
                    next.http_policies.insert(policy.key.clone(), policy);
                }
                Change::RemoveHttpPolicy(key) => {
                    next.http_policies.remove(&key);
                }
                Change::SetTraffic(traffic) => {
                    next.traffic.insert(traffic.service.clone(), traffic);
                }
                Change::RemoveTraffic(key) => {
                    next.traffic.remove(&key);
                }
                Change::SetAuthentication(authentication) => {
                    next.authentications.insert(authentication.key.clone(), authentication);
                }
                Change::RemoveAuthentication(key) => {
                    next.authentications.remove(&key);
                }
                Change::SetRateLimit(limit) => {
                    next.rate_limits.insert(limit.key.clone(), limit);
                }
                Change::RemoveRateLimit(key) => {
                    next.rate_limits.remove(&key);
                }
                Change::SetAuthorizer(authorizer) => {
                    next.authorizers.insert(authorizer.name.clone(), authorizer);
                }
                Change::RemoveAuthorizer(name) => {
                    next.authorizers.remove(&name);
                }
                Change::SetSettings(settings) => {
                    next.policy_generation = next.generation;
                    next.settings = settings;
                }
            }
        }
        next
    }

    /// Counts the snapshots: one more with every [`Mesh::apply`].
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The generation in which a decision over an existing connection could last have changed: policies, the
    /// settings, or the policies and identity of a workload that was there.
    #[must_use]
    pub fn policy_generation(&self) -> u64 {
        self.policy_generation
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The workload of a uid.
    #[must_use]
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get_key(uid).map(|ByUid(workload)| workload)
    }

    /// All workloads.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|(ByUid(workload), ())| workload)
    }

    /// The number of workloads.
    #[must_use]
    pub fn workload_count(&self) -> usize {
        self.workloads.len()
    }

    /// The workload with this address. Workloads in the host's network are not found by it: the address is the
    /// node's.
    #[must_use]
    pub fn workload_at(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.by_address.first(&address.ip, &address.network)
    }

    /// The service of a key.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The services of a host name, one for each namespace that defines it: those of Kubernetes first, then the
    /// canonical ones, then by namespace.
    #[must_use]
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.by_hostname.get(hostname).map_or(&[], Vec::as_slice)
    }

    /// The service with this virtual address, or the smallest range around it.
    #[must_use]
    pub fn service_at(&self, address: &NetworkAddress) -> Option<&Arc<Service>> {
        self.by_vip.get(address).and_then(|list| list.first()).or_else(|| self.by_range.lookup(address))
    }

    /// The endpoints of a service.
    #[must_use]
    pub fn endpoints(&self, service: &ServiceKey) -> Option<&Arc<EndpointSet>> {
        self.endpoints.get(service)
    }

    /// The policy of a key.
    #[must_use]
    pub fn policy(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// All policies.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// What a waypoint does for a service.
    #[must_use]
    pub fn http_service(&self, key: &ServiceKey) -> Option<&Arc<HttpService>> {
        self.http_services.get(key)
    }

    /// All services that a waypoint does something for.
    pub fn http_services(&self) -> impl Iterator<Item = &Arc<HttpService>> {
        self.http_services.values()
    }

    /// The services that waypoints do something else for than in `before`, see [`CowMap::changed_since`].
    #[must_use]
    pub fn http_services_since(&self, before: &Self) -> Vec<ServiceKey> {
        self.http_services.changed_since(&before.http_services, Arc::ptr_eq)
    }

    /// The policies of which waypoints enforce something else than in `before`.
    #[must_use]
    pub fn http_policies_since(&self, before: &Self) -> Vec<PolicyKey> {
        self.http_policies.changed_since(&before.http_policies, Arc::ptr_eq)
    }

    /// The services that are others than in `before`, or have other endpoints, or are spoken to otherwise. One may be named
    /// more than once.
    #[must_use]
    pub fn destinations_since(&self, before: &Self) -> Vec<ServiceKey> {
        let mut keys = self.services.changed_since(&before.services, Arc::ptr_eq);
        keys.extend(self.endpoints.changed_since(&before.endpoints, Arc::ptr_eq));
        keys.extend(self.traffic.changed_since(&before.traffic, Arc::ptr_eq));
        keys
    }

    /// How a service is spoken to, where something is said of it.
    #[must_use]
    pub fn traffic(&self, key: &ServiceKey) -> Option<&Arc<ServiceTraffic>> {
        self.traffic.get(key)
    }

    /// What waypoints enforce of the policy of a key.
    #[must_use]
    pub fn http_policy(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.http_policies.get(key)
    }

    /// The policies for what reaches a service through its waypoint; `Err` for one that is listed and not known.
    #[must_use]
    pub fn policies_of<'a>(&'a self, service: &'a HttpService) -> Vec<Held<'a>> {
        service.policies.iter().map(|key| self.http_policies.get(key).ok_or(key)).collect()
    }

    /// Whose tokens are taken, by the name of the RequestAuthentication.
    #[must_use]
    pub fn authentication(&self, key: &PolicyKey) -> Option<&Arc<RequestAuthentication>> {
        self.authentications.get(key)
    }

    /// All RequestAuthentications.
    pub fn authentications(&self) -> impl Iterator<Item = &Arc<RequestAuthentication>> {
        self.authentications.values()
    }

    /// Rate limits, by the name of their resource.
    #[must_use]
    pub fn rate_limit(&self, key: &PolicyKey) -> Option<&Arc<RateLimit>> {
        self.rate_limits.get(key)
    }

    /// All rate limits.
    pub fn rate_limits(&self) -> impl Iterator<Item = &Arc<RateLimit>> {
        self.rate_limits.values()
    }

    /// The external authorizer of a name.
    #[must_use]
    pub fn authorizer(&self, name: &str) -> Option<&Arc<Authorizer>> {
        self.authorizers.get(name)
    }

    /// All external authorizers.
    pub fn authorizers(&self) -> impl Iterator<Item = &Arc<Authorizer>> {
        self.authorizers.values()
    }

    /// What the dialled address belongs to: an exact virtual address first, then a workload, then a range.
    #[must_use]
    pub fn destination(&self, network: &Str, dialled: OriginalDst) -> Destination {
        let address = NetworkAddress::new(network.clone(), dialled.ip());
        if let Some(service) = self.by_vip.get(&address).and_then(|list| list.first()) {
            return Destination::Service(service.clone());
        }
        if let Some(workload) = self.workload_at(&address) {
            return Destination::Workload(workload.clone());
        }
        self.by_range.lookup(&address).map_or(Destination::Unknown, |s| Destination::Service(s.clone()))
    }

    /// The policies that hold for `workload`; `Err` for one that it lists and that is not known.
    #[must_use]
    pub fn policies_for<'a>(&'a self, workload: &'a Workload) -> Vec<Held<'a>> {
        let namespace = self.namespace_policies.get(&workload.namespace).map_or(&[][..], |list| list);
        let selected = workload.policies.iter().map(|key| self.policies.get(key).ok_or(key));
        self.global_policies.iter().chain(namespace).map(Ok).chain(selected).collect()
    }

    /// Decides whether a request, or a connection that shows none, may pass a service's waypoint, and says why: the
    /// policies for the service have to let it in, and each set of those of the workloads behind it.
    #[must_use]
    pub fn authorize_at_waypoint(
        &self,
        service: &HttpService,
        connection: &Connection,
        request: Option<&Request<'_>>,
    ) -> RequestDecision {
        let held = |keys: &[PolicyKey]| {
            let held: Vec<Held<'_>> = keys.iter().map(|key| self.http_policies.get(key).ok_or(key)).collect();
            decide_request(&held, connection, request)
        };
        let sets = service.selected.iter().map(|set| held(set));
        sets.fold(held(&service.policies), RequestDecision::and)
    }

    /// Decides whether `connection` may be delivered to `workload`, and says why.
    #[must_use]
    pub fn authorize(&self, workload: &Workload, connection: &Connection) -> Decision {
        decide(&self.policies_for(workload), connection)
    }

    fn set_workload(&mut self, workload: Arc<Workload>) {
        let old = self.workload(&workload.uid).cloned();
        if let Some(old) = &old {
            let same = old.policies == workload.policies
                && old.namespace == workload.namespace
                && old.service_account == workload.service_account
                && old.trust_domain == workload.trust_domain
                && old.addresses == workload.addresses
                && old.network == workload.network
                && old.network_mode == workload.network_mode
                && old.tunnel == workload.tunnel;
            if !same {
                self.policy_generation = self.generation;
            }
            self.unindex_workload(old, Some(&workload));
        }
        if workload.network_mode == crate::NetworkMode::Standard {
            for address in &workload.addresses {
                self.by_address.put(address, &workload);
            }
        }
        for membership in &*workload.services {
            let endpoint = Endpoint { workload: workload.clone() };
            let generation = self.generation;
            if let Some(set) = self.endpoints.entry_or_default(&membership.service) {
                let set = Arc::make_mut(set);
                set.generation = generation;
                set.service.get_or_insert_with(|| membership.service.clone());
                set.insert(endpoint);
            }
        }
        self.workloads.replace(ByUid(workload), ());
    }

    fn remove_workload(&mut self, uid: &str) {
        if let Some(old) = self.workload(uid).cloned() {
            self.workloads.remove(uid);
            self.policy_generation = self.generation;
            self.unindex_workload(&old, None);
        }
    }

    /// Takes `old` out of the indexes, except where `next`, which is about to be put in, stands in the same place.
    fn unindex_workload(&mut self, old: &Workload, next: Option<&Workload>) {
        let keeps_address = |a: &IpAddr| {
            next.is_some_and(|n| n.network_mode == crate::NetworkMode::Standard && n.addresses.contains(a))
        };
        for address in &old.addresses {
            if !keeps_address(address) {
                self.by_address.remove(address, &old.uid);
            }
        }
        for membership in &*old.services {
            let keeps = next.is_some_and(|n| n.services.iter().any(|m| m.service == membership.service));
            if keeps {
                continue;
            }
            let generation = self.generation;
            if let Some(set) = self.endpoints.get_mut(&membership.service) {
                let set = Arc::make_mut(set);
                set.generation = generation;
                set.remove(&old.uid);
                if set.list.is_empty() {
                    self.endpoints.remove(&membership.service);
                }
            }
        }
    }

    fn set_service(&mut self, service: Arc<Service>) {
        let key = service.key();
        self.remove_service(&key);
        for vip in &service.vips {
            if is_single(vip) {
                let address = NetworkAddress::new(vip.network.clone(), vip.range.addr());
                if let Some(list) = self.by_vip.entry_or_default(&address) {
                    list.push(service.clone());
                    list.sort_by(by_precedence);
                }
            } else {
                Arc::make_mut(&mut self.by_range).insert(vip, &service);
            }
        }
        if let Some(list) = self.by_hostname.entry_or_default(&service.hostname.clone()) {
            list.push(service.clone());
            list.sort_by(by_precedence);
        }
        self.services.insert(key, service);
    }

    fn remove_service(&mut self, key: &ServiceKey) {
        let Some(old) = self.services.remove(key) else { return };
        for vip in &old.vips {
            if is_single(vip) {
                let address = NetworkAddress::new(vip.network.clone(), vip.range.addr());
                if let Some(list) = self.by_vip.get_mut(&address) {
                    list.retain(|s| s.key() != *key);
                    if list.is_empty() {
                        self.by_vip.remove(&address);
                    }
                }
            } else {
                Arc::make_mut(&mut self.by_range).remove(vip, key);
            }
        }
        if let Some(list) = self.by_hostname.get_mut(&old.hostname) {
            list.retain(|s| s.key() != *key);
            if list.is_empty() {
                self.by_hostname.remove(&old.hostname);
            }
        }
    }

    fn set_policy(&mut self, policy: Arc<Policy>) {
        self.remove_policy(&policy.key.clone());
        self.policy_generation = self.generation;
        match policy.scope {
            Scope::Global => self.global_policies = with(&self.global_policies, &policy),
            Scope::Namespace => {
                let list = self.namespace_policies.get(&policy.key.namespace).map_or(&[][..], |l| l);
                let list = with(list, &policy);
                self.namespace_policies.insert(policy.key.namespace.clone(), list);
            }
            Scope::WorkloadSelector => {}
        }
        self.policies.insert(policy.key.clone(), policy);
    }

    fn remove_policy(&mut self, key: &PolicyKey) {
        let Some(old) = self.policies.remove(key) else { return };
        self.policy_generation = self.generation;
        match old.scope {
            Scope::Global => self.global_policies = without(&self.global_policies, key),
            Scope::Namespace => {
                let list = self.namespace_policies.get(&key.namespace).map_or(&[][..], |l| l);
                let list = without(list, key);
                if list.is_empty() {
                    self.namespace_policies.remove(&key.namespace);
                } else {
                    self.namespace_policies.insert(key.namespace.clone(), list);
                }
            }
            Scope::WorkloadSelector => {}
        }
    }
}

/// Which of several services of one name, address or range answers. It must not depend on the order in which they
/// came, which differs between nodes, and whoever may write a ServiceEntry must not take a Service's address: so
/// those of Kubernetes go first, then the canonical ones, then by name.
fn by_precedence(a: &Arc<Service>, b: &Arc<Service>) -> Ordering {
    let rank = |s: &Service| (s.source != ServiceSource::Kubernetes, !s.canonical);
    rank(a)
        .cmp(&rank(b))
        .then_with(|| a.namespace.cmp(&b.namespace))
        .then_with(|| a.hostname.cmp(&b.hostname))
}

/// Sorted by name, so that the policy that a decision names does not depend on the order of arrival.
fn with(list: &[Arc<Policy>], policy: &Arc<Policy>) -> Arc<[Arc<Policy>]> {
    let mut list: Vec<_> = list.iter().cloned().chain([policy.clone()]).collect();
    list.sort_by(|a, b| a.key.cmp(&b.key));
    list.into()
}

fn without(list: &[Arc<Policy>], key: &PolicyKey) -> Arc<[Arc<Policy>]> {
    list.iter().filter(|p| p.key != *key).cloned().collect()
}

fn is_single(vip: &crate::Vip) -> bool {
    vip.range.prefix_len() == vip.range.max_prefix_len()
}

impl Ranges {
    fn insert(&mut self, vip: &crate::Vip, service: &Arc<Service>) {
        let network = vip.network.clone();
        let list = match vip.range {
            ipnet::IpNet::V4(net) => self.v4.entry(network).or_default().entry(net.trunc()).or_default(),
            ipnet::IpNet::V6(net) => self.v6.entry(network).or_default().entry(net.trunc()).or_default(),
        };
        list.push(service.clone());
        list.sort_by(by_precedence);
    }

    fn remove(&mut self, vip: &crate::Vip, key: &ServiceKey) {
        match vip.range {
            ipnet::IpNet::V4(net) => {
                let Some(map) = self.v4.get_mut(&vip.network) else { return };
                if let Some(list) = map.get_mut(&net.trunc()) {
                    list.retain(|s| s.key() != *key);
                    if list.is_empty() {
                        map.remove(&net.trunc());
                    }
                }
            }
            ipnet::IpNet::V6(net) => {
                let Some(map) = self.v6.get_mut(&vip.network) else { return };
                if let Some(list) = map.get_mut(&net.trunc()) {
                    list.retain(|s| s.key() != *key);
                    if list.is_empty() {
                        map.remove(&net.trunc());
                    }
                }
            }
        }
    }

    fn lookup(&self, address: &NetworkAddress) -> Option<&Arc<Service>> {
        let list = match canonical_ip(address.ip) {
            IpAddr::V4(ip) => self.v4.get(&address.network)?.get_lpm(&ip.into())?.1,
            IpAddr::V6(ip) => self.v6.get(&address.network)?.get_lpm(&ip.into())?.1,
        };
        list.first()
    }
}

// The parts of a workload that the kind of its owner is told from, in WDS's spelling.
impl std::fmt::Display for WorkloadKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        })
    }
}
