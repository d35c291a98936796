//! What each waypoint is told: the services that are bound to it, and what these need of what is there for all.
//!
//! * A part (a policy, what is said of a service, …) is encoded when it changes, and given to the waypoints that need it
//!   under a name of their own: what one needs more or less costs no other one anything.
//! * A waypoint's needs are counted by its services, so that a changed service costs what it needs, and no more.
//! * A waypoint has so many bytes. What goes beyond is not sent, and said: what it had before stays in force there, until
//!   there is room.
//! * Of workloads' labels proxies are sent those that some waypoint is asked about: by subsets, by failover, by routes for
//!   some sources.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use model::http::{
    BackendRef, Count, HttpService, KeySource, Limit, RateLimit, RequestAuthentication, RouteAction,
    ServiceTraffic,
};
use model::telemetry::{LogSink, Telemetry};
use model::{Change, PolicyKey, ServiceKey, Str};
use prost::Message;
use proto::{
    AUTHENTICATION_TYPE_URL, AUTHORIZER_TYPE_URL, Features, HTTP_POLICY_TYPE_URL, HTTP_SERVICE_TYPE_URL,
    RATE_LIMIT_TYPE_URL, TRAFFIC_TYPE_URL,
};
use xds::server::{Change as Update, Resource};

use super::Exceptions;
use super::reach::Wishes;

/// How many bytes of resources one waypoint is sent: 10,000 routes are a few MiB.
pub const MOST_BYTES: usize = 64 << 20;

/// Something that a waypoint may need, by its type and its name among those of the type.
type Part = (&'static str, Arc<str>);

type WaypointsByPolicy = HashMap<Arc<str>, BTreeSet<Arc<str>>>;

/// Which waypoints enforce a policy, as a view that stays up to date: names by name. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Enforcers(Arc<RwLock<WaypointsByPolicy>>);

impl Enforcers {
    /// The waypoints that are to enforce a policy (`NAMESPACE/NAME`).
    #[must_use]
    pub fn of(&self, policy: &str) -> BTreeSet<Arc<str>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(policy).cloned().unwrap_or_default()
    }

    /// A waypoint is one that is to enforce a policy, or no longer.
    pub(crate) fn change(&self, policy: &Arc<str>, waypoint: &Arc<str>, is_one: bool) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let of = all.entry(policy.clone()).or_default();
        if is_one {
            of.insert(waypoint.clone());
        } else {
            of.remove(waypoint);
        }
        if of.is_empty() {
            all.remove(policy);
        }
    }
}

/// What is there of a part.
struct Content {
    body: Bytes,
    asks: Asks,
}

/// What a part makes needed that is no part of the service.
#[derive(Clone, PartialEq, Default)]
struct Asks {
    /// Labels of workloads.
    labels: BTreeSet<Str>,
    /// Hosts of providers: waypoints speak to them as is said of them.
    hosts: BTreeSet<Str>,
}

/// A service as it was told last.
struct Bound {
    waypoint: Arc<str>,
    needs: BTreeSet<Part>,
    /// The labels that its routes ask of clients.
    clients: BTreeSet<Str>,
}

/// What one waypoint needs and has.
#[derive(Default)]
struct Waypoint {
    /// How many of its services need a part.
    counts: HashMap<Part, u32>,
    /// How many of them ask clients for a label.
    clients: BTreeMap<Str, u32>,
    /// The length of what it was sent.
    sent: HashMap<Part, usize>,
    bytes: usize,
    /// Parts to be looked at, and those that there was no room for.
    due: BTreeSet<Part>,
}

/// See the module's documentation.
pub(super) struct Waypoints {
    most_bytes: usize,
    contents: HashMap<Part, Content>,
    services: HashMap<ServiceKey, Bound>,
    waypoints: BTreeMap<Arc<str>, Waypoint>,
    enforcers: Enforcers,
    /// What labels are asked about, and whether that may have changed.
    labels: BTreeSet<Str>,
    asks: bool,
    /// The hosts of all providers, and whether these may have changed.
    providers: BTreeSet<Str>,
    moved: bool,
    /// Services to whose endpoints waypoints send now, or no longer do.
    moves: Vec<(Arc<str>, ServiceKey, bool)>,
}

impl Waypoints {
    pub(super) fn new(most_bytes: usize, enforcers: Enforcers) -> Self {
        Self {
            most_bytes,
            contents: HashMap::new(),
            services: HashMap::new(),
            waypoints: BTreeMap::new(),
            enforcers,
            labels: BTreeSet::new(),
            asks: false,
            providers: BTreeSet::new(),
            moved: false,
            moves: Vec::new(),
        }
    }

    /// Takes a change; whether it is one of what waypoints are told.
    pub(super) fn take(&mut self, change: &Change) -> bool {
        let policy = |key: &PolicyKey| -> Arc<str> { key.to_string().into() };
        let service = |key: &ServiceKey| -> Arc<str> { key.to_string().into() };
        match change {
            Change::SetHttpService(service) => self.bind(service),
            Change::RemoveHttpService(key) => self.unbind(key),
            Change::SetHttpPolicy(p) => {
                let body = proto::encode_http_policy(p).encode_to_vec();
                self.set((HTTP_POLICY_TYPE_URL, policy(&p.key)), body, Asks::default());
            }
            Change::RemoveHttpPolicy(key) => self.remove(&(HTTP_POLICY_TYPE_URL, policy(key))),
            Change::SetTraffic(t) => {
                let body = proto::encode_traffic(t).encode_to_vec();
                self.set(
                    (TRAFFIC_TYPE_URL, service(&t.service)),
                    body,
                    Asks { labels: labels_of_traffic(t), ..Asks::default() },
                );
            }
            Change::RemoveTraffic(key) => self.remove(&(TRAFFIC_TYPE_URL, service(key))),
            Change::SetAuthentication(a) => {
                let body = proto::encode_authentication(a).encode_to_vec();
                self.set((AUTHENTICATION_TYPE_URL, policy(&a.key)), body, asks_of_issuers(a));
            }
            Change::RemoveAuthentication(key) => self.remove(&(AUTHENTICATION_TYPE_URL, policy(key))),
            Change::SetRateLimit(limit) => {
                let body = proto::encode_rate_limit(limit).encode_to_vec();
                self.set((RATE_LIMIT_TYPE_URL, policy(&limit.key)), body, asks_of_limits(limit));
            }
            Change::RemoveRateLimit(key) => self.remove(&(RATE_LIMIT_TYPE_URL, policy(key))),
            Change::SetAuthorizer(authorizer) => {
                let body = proto::encode_authorizer(authorizer).encode_to_vec();
                self.set(
                    (AUTHORIZER_TYPE_URL, authorizer.name.clone()),
                    body,
                    asks_of(&authorizer.address.host),
                );
            }
            Change::RemoveAuthorizer(name) => self.remove(&(AUTHORIZER_TYPE_URL, name.clone())),
            Change::SetWorkload(_)
            | Change::RemoveWorkload(_)
            | Change::SetService(_)
            | Change::RemoveService(_)
            | Change::SetPolicy(_)
            | Change::RemovePolicy(_)
            | Change::SetSettings(_) => return false,
        }
        true
    }

    fn set(&mut self, part: Part, body: Vec<u8>, asks: Asks) {
        let new = asks.clone();
        self.touch(&part);
        let old = self.contents.insert(part, Content { body: body.into(), asks });
        self.note(&old.map(|old| old.asks).unwrap_or_default(), &new);
    }

    fn remove(&mut self, part: &Part) {
        if let Some(old) = self.contents.remove(part) {
            self.note(&old.asks, &Asks::default());
            self.touch(part);
        }
    }

    fn note(&mut self, old: &Asks, new: &Asks) {
        self.asks |= old.labels != new.labels;
        self.moved |= old.hosts != new.hosts;
    }

    /// A part changed: has it looked at where it is needed.
    fn touch(&mut self, part: &Part) {
        for waypoint in self.waypoints.values_mut() {
            if waypoint.needs(part, &self.providers) || waypoint.sent.contains_key(part) {
                waypoint.due.insert(part.clone());
            }
        }
    }

    fn bind(&mut self, service: &HttpService) {
        let waypoint: Arc<str> = proto::waypoint_scope(&service.waypoint).into();
        let body = proto::encode_http_service(service).encode_to_vec();
        let own: Part = (HTTP_SERVICE_TYPE_URL, service.service.to_string().into());
        let clients = labels_of_routes(service);
        let asks = Asks { labels: clients.clone(), hosts: collectors(&service.telemetry) };
        self.set(own.clone(), body, asks);
        let mut needs = needs(service);
        needs.insert(own);
        let bound = Bound { waypoint, needs, clients };
        self.acquire(&bound);
        if let Some(old) = self.services.insert(service.service.clone(), bound) {
            self.release(&old);
        }
    }

    fn unbind(&mut self, key: &ServiceKey) {
        if let Some(old) = self.services.remove(key) {
            self.release(&old);
            self.remove(&(HTTP_SERVICE_TYPE_URL, key.to_string().into()));
        }
    }

    fn acquire(&mut self, bound: &Bound) {
        let name = &bound.waypoint;
        let is_new = !self.waypoints.contains_key(name);
        let waypoint = self.waypoints.entry(name.clone()).or_default();
        for label in &bound.clients {
            *waypoint.clients.entry(label.clone()).or_default() += 1;
        }
        for part in &bound.needs {
            let count = waypoint.counts.entry(part.clone()).or_default();
            *count += 1;
            if *count == 1 {
                waypoint.due.insert(part.clone());
                self.asks |= self.contents.get(part).is_some_and(|c| !c.asks.labels.is_empty());
                if part.0 == HTTP_POLICY_TYPE_URL {
                    self.enforcers.change(&part.1, name, true);
                }
                self.moves.extend(destination(part).map(|key| (name.clone(), key, true)));
            }
        }
        if is_new {
            // Few, and policies name them: every waypoint has all.
            let all = self.contents.keys().filter(|part| is_for_all(part, &self.providers));
            waypoint.due.extend(all.cloned());
        }
    }

    fn release(&mut self, old: &Bound) {
        let Some(waypoint) = self.waypoints.get_mut(&old.waypoint) else { return };
        for label in &old.clients {
            if let Some(count) = waypoint.clients.get_mut(label) {
                *count = count.saturating_sub(1);
            }
        }
        waypoint.clients.retain(|_, count| *count > 0);
        for part in &old.needs {
            let Some(count) = waypoint.counts.get_mut(part) else { continue };
            *count = count.saturating_sub(1);
            if *count == 0 {
                waypoint.counts.remove(part);
                waypoint.due.insert(part.clone());
                self.asks |= self.contents.get(part).is_some_and(|c| !c.asks.labels.is_empty());
                if part.0 == HTTP_POLICY_TYPE_URL {
                    self.enforcers.change(&part.1, &old.waypoint, false);
                }
                self.moves.extend(destination(part).map(|key| (old.waypoint.clone(), key, false)));
            }
        }
        if waypoint.counts.is_empty() {
            waypoint.due.extend(waypoint.sent.keys().cloned());
        }
    }

    /// What follows for the proxies from what was taken.
    pub(super) fn updates(&mut self, exceptions: &Exceptions) -> Vec<Update> {
        if std::mem::take(&mut self.moved) {
            self.find_providers();
        }
        let mut updates = Vec::new();
        for (name, waypoint) in &mut self.waypoints {
            let providers = &self.providers;
            waypoint.settle(name, (&self.contents, providers), self.most_bytes, exceptions, &mut updates);
        }
        self.waypoints.retain(|_, waypoint| !waypoint.counts.is_empty());
        updates
    }

    /// Looks which hosts providers have now. They change seldom.
    fn find_providers(&mut self) {
        let hosts = self.contents.values().flat_map(|content| content.asks.hosts.iter().cloned()).collect();
        let before = std::mem::replace(&mut self.providers, hosts);
        let changed: BTreeSet<Str> = self.providers.symmetric_difference(&before).cloned().collect();
        let parts: Vec<Part> =
            self.contents.keys().filter(|part| is_for_all(part, &changed)).cloned().collect();
        for waypoint in self.waypoints.values_mut() {
            waypoint.due.extend(parts.iter().cloned());
        }
    }

    /// The labels that waypoints are asked about now, if they are other ones than before.
    pub(super) fn new_labels(&mut self) -> Option<BTreeSet<Str>> {
        if !std::mem::take(&mut self.asks) {
            return None;
        }
        let needed = self.waypoints.values().flat_map(|waypoint| waypoint.counts.keys());
        let asked: BTreeSet<Str> = needed
            .filter_map(|part| self.contents.get(part))
            .flat_map(|c| c.asks.labels.iter().cloned())
            .collect();
        if asked == self.labels {
            return None;
        }
        let changed = self.labels.symmetric_difference(&asked).cloned().collect();
        self.labels = asked;
        Some(changed)
    }

    /// The services to whose endpoints waypoints send since this was asked last, or no longer do.
    pub(super) fn moves(&mut self) -> Vec<(Arc<str>, ServiceKey, bool)> {
        std::mem::take(&mut self.moves)
    }

    /// What waypoints ask of workloads now, beside the endpoints of services.
    pub(super) fn wishes(&self) -> Wishes {
        let of = |waypoint: &Waypoint| waypoint.clients.keys().cloned().collect();
        let labels = self.waypoints.iter().map(|(name, waypoint)| (name.clone(), of(waypoint))).collect();
        Wishes { labels, providers: self.providers.clone() }
    }

    /// Whether a label is one that waypoints are asked about.
    pub(super) fn asks_about(&self, label: &str) -> bool {
        self.labels.contains(label)
    }
}

impl Waypoint {
    fn needs(&self, part: &Part, providers: &BTreeSet<Str>) -> bool {
        self.counts.contains_key(part) || (is_for_all(part, providers) && !self.counts.is_empty())
    }

    /// Sends what is due, as far as there is room; what is no longer needed makes room first.
    fn settle(
        &mut self,
        name: &Arc<str>,
        (contents, providers): (&HashMap<Part, Content>, &BTreeSet<Str>),
        most_bytes: usize,
        exceptions: &Exceptions,
        updates: &mut Vec<Update>,
    ) {
        let due = std::mem::take(&mut self.due);
        let (wanted, gone): (Vec<Part>, Vec<Part>) =
            due.into_iter().partition(|part| self.needs(part, providers) && contents.contains_key(part));
        for part in gone {
            let resource = resource_name(name, &part);
            exceptions.set(&resource, None);
            if let Some(length) = self.sent.remove(&part) {
                self.bytes -= length;
                updates.push(Update::Remove { type_url: part.0, name: resource });
            }
        }
        for part in wanted {
            let Some(content) = contents.get(&part) else { continue };
            let resource = resource_name(name, &part);
            let length = content.body.len() + resource.len();
            let had = self.sent.get(&part).copied().unwrap_or_default();
            if self.bytes - had + length > most_bytes {
                let what = format!(
                    "not sent: with its {length} bytes the waypoint {name} would have more than {most_bytes}; what it \
                     had of it before stays in force: bind fewer services to one waypoint"
                );
                exceptions.set(&resource, Some(what));
                self.due.insert(part);
                continue;
            }
            self.bytes = self.bytes - had + length;
            exceptions.set(&resource, None);
            updates.push(Update::Set(Resource {
                type_url: part.0,
                name: resource,
                aliases: Vec::new(),
                scope: Some(name.clone()),
                plain: None,
                culvert: Some(content.body.clone()),
                // One that does not know all of it refuses it, see `proto`'s strict reading.
                needs: Features::NONE,
            }));
            self.sent.insert(part, length);
        }
    }
}

/// Whether every waypoint has a part: authorizers, and what is said of the hosts of providers.
fn is_for_all((kind, name): &Part, providers: &BTreeSet<Str>) -> bool {
    let is_provider = || name.split_once('/').is_some_and(|(_, host)| providers.contains(host));
    *kind == AUTHORIZER_TYPE_URL || (*kind == TRAFFIC_TYPE_URL && is_provider())
}

/// The service that a part says how to speak to: who needs that sends to its endpoints.
fn destination((kind, name): &Part) -> Option<ServiceKey> {
    let (namespace, hostname) = name.split_once('/').filter(|_| *kind == TRAFFIC_TYPE_URL)?;
    Some(ServiceKey { namespace: namespace.into(), hostname: hostname.into() })
}

fn asks_of(host: &Str) -> Asks {
    Asks { hosts: BTreeSet::from([host.clone()]), ..Asks::default() }
}

/// The hosts that an authentication's keys are fetched from, as far as it says so itself.
fn asks_of_issuers(authentication: &RequestAuthentication) -> Asks {
    let host = |keys: &KeySource| match keys {
        KeySource::Inline(_) => None,
        KeySource::Url(url) | KeySource::Discovered(url) => {
            let uri: http::Uri = url.parse().ok()?;
            Some(uri.host()?.to_ascii_lowercase().into())
        }
    };
    let hosts = authentication.rules.iter().filter_map(|rule| host(&rule.keys)).collect();
    Asks { hosts, ..Asks::default() }
}

/// The hosts that are sent spans and log entries.
fn collectors(telemetry: &Telemetry) -> BTreeSet<Str> {
    let logs = telemetry.logs.iter().flatten().filter_map(|log| match &log.sink {
        LogSink::Service(service) => Some(&service.collector),
        LogSink::File { .. } => None,
    });
    telemetry.tracing.iter().map(|tracing| &tracing.collector).chain(logs).map(|to| to.host.clone()).collect()
}

fn asks_of_limits(limit: &RateLimit) -> Asks {
    let host = |limit: &Arc<Limit>| match &limit.count {
        Count::Global(global) => Some(global.address.host.clone()),
        Count::Local(_) => None,
    };
    Asks { hosts: limit.limits.iter().filter_map(host).collect(), ..Asks::default() }
}

fn resource_name(waypoint: &str, (_, name): &Part) -> Arc<str> {
    format!("{waypoint}/{name}").into()
}

/// What a waypoint needs for a service, beside the service itself.
fn needs(service: &HttpService) -> BTreeSet<Part> {
    let policy = |kind: &'static str| move |key: &PolicyKey| -> Part { (kind, key.to_string().into()) };
    let selected = service.selected.iter().flatten();
    let mut needs: BTreeSet<Part> =
        service.policies.iter().chain(selected).map(policy(HTTP_POLICY_TYPE_URL)).collect();
    needs.extend(service.authentication.iter().map(policy(AUTHENTICATION_TYPE_URL)));
    needs.extend(service.rate_limits.iter().map(policy(RATE_LIMIT_TYPE_URL)));
    let mut to = |key: &ServiceKey| {
        needs.insert((TRAFFIC_TYPE_URL, key.to_string().into()));
    };
    // Where there are no routes.
    to(&service.service);
    let mut backend = |backend: &BackendRef| {
        if let BackendRef::Service { service, .. } = backend {
            to(service);
        }
    };
    for port in &service.ports {
        for (_, route) in port.routes.entries() {
            if let RouteAction::Forward(forward) = &route.action {
                forward.backends().iter().for_each(|b| backend(&b.to));
            }
            route.mirrors.iter().for_each(|mirror| backend(&mirror.to));
        }
        for (_, route) in port.streams.entries() {
            route.to.backends().iter().for_each(|b| backend(&b.to));
        }
    }
    needs
}

fn labels_of_routes(service: &HttpService) -> BTreeSet<Str> {
    let of_routes = |port: &model::http::HttpPort| -> Vec<Str> {
        let requests = port.routes.entries().iter().filter_map(|(when, _)| when.source.as_deref());
        let streams = port.streams.entries().iter().filter_map(|(when, _)| when.source.as_deref());
        requests.chain(streams).flat_map(|source| &source.labels).map(|(key, _)| key.clone()).collect()
    };
    service.ports.iter().flat_map(of_routes).collect()
}

fn labels_of_traffic(traffic: &ServiceTraffic) -> BTreeSet<Str> {
    let ports = |ports: &'_ [(u16, model::http::TrafficPolicy)]| -> Vec<Str> {
        ports.iter().flat_map(|(_, policy)| failover_labels(policy)).collect()
    };
    let mut labels: BTreeSet<Str> = failover_labels(&traffic.default).into_iter().collect();
    labels.extend(ports(&traffic.ports));
    for subset in &traffic.subsets {
        labels.extend(subset.labels.iter().map(|(key, _)| key.clone()));
        labels.extend(failover_labels(&subset.default));
        labels.extend(ports(&subset.ports));
    }
    labels
}

/// Labels that endpoints are compared by, each alone or as `key=value`.
fn failover_labels(policy: &model::http::TrafficPolicy) -> Vec<Str> {
    let priority = policy.locality.iter().flat_map(|locality| &locality.failover_priority);
    priority.map(|label| label.split('=').next().unwrap_or_default().into()).collect()
}

#[cfg(test)]
#[path = "waypoints_tests.rs"]
mod tests;
