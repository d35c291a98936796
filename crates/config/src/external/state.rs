//! All ServiceEntries and WorkloadEntries, and what follows for the model when one of them changes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use model::{
    Addresses, LoadBalancing, PortMapping, Profile, ServiceKey, ServiceMembership, ServicePort,
    ServiceSource, Str, TargetPort, TunnelProtocol, Vip, Workload,
};

use super::endpoint::EntryEndpoint;
use super::host::{Address, is_host};
use super::service_entry::{Resolution, ServiceEntry};
use super::vip::Vips;
use super::workload_entry::WorkloadEntry;
use crate::compile::{
    Context, Definition, Effects, Finding, Instance, Made, Membership, Names, PortRule, Rank, RuleTarget,
};
use crate::diagnostic::Code;
use crate::labels::Labels;
use crate::policy::age::Age;
use crate::resource::{Kind, ObjectKey, Resource};

/// The label by which an endpoint says how it is connected to, and its value for HBONE.
const TUNNEL: (&str, &str) = ("networking.istio.io/tunnel", "http");

/// The label by which an endpoint says that it has a sidecar, and its value for that.
const TLS_MODE: (&str, &str) = ("security.istio.io/tlsMode", "istio");

/// The state.
#[derive(Debug, Default)]
pub struct External {
    entries: HashMap<ObjectKey, Arc<ServiceEntry>>,
    /// Which entries of a namespace define a host; the oldest is in force.
    hosts: HashMap<ServiceKey, BTreeMap<Age, ObjectKey>>,
    vips: Vips,
}

impl External {
    /// Sets or replaces a resource. Resources of other kinds have no effect.
    pub fn set(&mut self, key: &ObjectKey, resource: Resource, context: &mut Context<'_>) -> Effects {
        match resource {
            Resource::ServiceEntry(entry) => self.set_entry(key, Some(&Arc::new(*entry)), context),
            Resource::WorkloadEntry(entry) => {
                let instances = workload_entry(key, *entry, context).into_iter().collect();
                let made = Made { by: key.clone(), instances, definitions: Vec::new() };
                Effects { made: vec![made], ..Effects::default() }
            }
            _ => Effects::default(),
        }
    }

    /// Removes a resource.
    pub fn remove(&mut self, key: &ObjectKey, context: &mut Context<'_>) -> Effects {
        match key.kind {
            Kind::ServiceEntry => self.set_entry(key, None, context),
            Kind::WorkloadEntry => {
                let made = Made { by: key.clone(), instances: Vec::new(), definitions: Vec::new() };
                Effects { made: vec![made], ..Effects::default() }
            }
            _ => Effects::default(),
        }
    }

    fn set_entry(
        &mut self,
        key: &ObjectKey,
        entry: Option<&Arc<ServiceEntry>>,
        context: &mut Context<'_>,
    ) -> Effects {
        let old = self.entries.remove(key);
        let mut touched = BTreeSet::from([key.clone()]);
        let hosts = |entry: Option<&Arc<ServiceEntry>>| -> BTreeSet<ServiceKey> {
            let service =
                |host: &Str| ServiceKey { namespace: key.namespace.clone(), hostname: host.clone() };
            entry.into_iter().flat_map(|e| e.hosts.iter()).map(service).collect()
        };
        let concerned: BTreeSet<ServiceKey> = hosts(old.as_ref()).union(&hosts(entry)).cloned().collect();
        for host in &concerned {
            touched.extend(self.owner(host).cloned());
        }
        if let Some(old) = &old {
            self.leave(key, old, &mut touched);
        }
        if let Some(new) = entry {
            self.enter(key, new, &mut touched);
        }
        for host in &concerned {
            self.allot(host, &mut touched);
            touched.extend(self.owner(host).cloned());
            // Those that define it too have something else to say of who is in force.
            touched.extend(self.hosts.get(host).into_iter().flat_map(|o| o.values()).cloned());
        }
        let mut effects = Effects::default();
        for by in touched {
            effects.findings.push((by.clone(), self.findings(&by)));
            effects.made.push(self.make(by, context));
        }
        effects
    }

    fn enter(&mut self, key: &ObjectKey, entry: &Arc<ServiceEntry>, touched: &mut BTreeSet<ObjectKey>) {
        self.entries.insert(key.clone(), entry.clone());
        for host in &entry.hosts {
            let service = ServiceKey { namespace: key.namespace.clone(), hostname: host.clone() };
            self.hosts.entry(service).or_default().insert(age(key, entry), key.clone());
        }
        for address in singles(entry) {
            let moved = self.vips.reserve(address);
            self.touch(&moved, touched);
        }
    }

    fn leave(&mut self, key: &ObjectKey, entry: &ServiceEntry, touched: &mut BTreeSet<ObjectKey>) {
        for host in &entry.hosts {
            let service = ServiceKey { namespace: key.namespace.clone(), hostname: host.clone() };
            if let Some(owners) = self.hosts.get_mut(&service) {
                owners.remove(&age(key, entry));
                if owners.is_empty() {
                    self.hosts.remove(&service);
                }
            }
        }
        for address in singles(entry) {
            let moved = self.vips.release(address);
            self.touch(&moved, touched);
        }
    }

    /// Gives a host virtual addresses or takes them back, as whoever defines it now asks for.
    fn allot(&mut self, host: &ServiceKey, touched: &mut BTreeSet<ObjectKey>) {
        let entry = self.owner(host).and_then(|key| self.entries.get(key));
        let wanted = entry.is_some_and(|e| e.auto_allocate) && is_host(&host.hostname);
        let moved = if wanted { self.vips.insert(host) } else { self.vips.remove(host) };
        self.touch(&moved, touched);
    }

    fn touch(&self, hosts: &BTreeSet<ServiceKey>, touched: &mut BTreeSet<ObjectKey>) {
        touched.extend(hosts.iter().filter_map(|host| self.owner(host)).cloned());
    }

    /// The entry in force for a host.
    fn owner(&self, host: &ServiceKey) -> Option<&ObjectKey> {
        self.hosts.get(host)?.first_key_value().map(|(_, key)| key)
    }

    fn findings(&self, key: &ObjectKey) -> Vec<Finding> {
        let Some(entry) = self.entries.get(key) else { return Vec::new() };
        let mut findings = Vec::new();
        for host in &entry.hosts {
            let service = ServiceKey { namespace: key.namespace.clone(), hostname: host.clone() };
            if let Some(owner) = self.owner(&service).filter(|owner| *owner != key) {
                findings.push(Finding {
                    code: Code::HostConflict,
                    message: format!(
                        "{host:?} is not in force here: the ServiceEntry {} defines it too, and is older or the first by name",
                        owner.name
                    ),
                    remedy: "put the ports and endpoints of both into one entry".to_owned(),
                });
            }
            let unplaced = entry.auto_allocate
                && is_host(host)
                && self.owner(&service) == Some(key)
                && self.vips.addresses(&service).is_none();
            if unplaced {
                findings.push(Finding {
                    code: Code::WithoutEffect,
                    message: format!("{host:?} gets no address: too many hosts have one"),
                    remedy: "give it addresses".to_owned(),
                });
            }
        }
        let mut seen = HashSet::with_capacity(entry.endpoints.len());
        for endpoint in &entry.endpoints {
            let Some(Address::Ip(ip)) = &endpoint.address else { continue };
            if !seen.insert(ip) {
                findings.push(Finding {
                    code: Code::WithoutEffect,
                    message: format!(
                        "an endpoint {ip} is not in force: of one address the first counts, with its ports and labels"
                    ),
                    remedy: "give it an address of its own".to_owned(),
                });
            }
        }
        findings
    }

    /// All that an entry makes now.
    fn make(&self, by: ObjectKey, context: &mut Context<'_>) -> Made {
        let mut made = Made { by, instances: Vec::new(), definitions: Vec::new() };
        let Some(entry) = self.entries.get(&made.by) else { return made };
        let mut own = Vec::new();
        for host in &entry.hosts {
            let service = ServiceKey { namespace: made.by.namespace.clone(), hostname: host.clone() };
            if self.owner(&service) == Some(&made.by) {
                made.definitions.push(self.definition(&made.by, entry, &service, context));
                own.push(service);
            }
        }
        let mut seen = HashSet::with_capacity(entry.endpoints.len());
        for (index, endpoint) in entry.endpoints.iter().enumerate() {
            let again = (!seen.insert(&endpoint.address)).then_some(index);
            // Of one IP address the first endpoint counts: another one is the same workload. A name may have others.
            if again.is_some() && matches!(endpoint.address, Some(Address::Ip(_))) {
                continue;
            }
            made.instances.extend(listed_endpoint(&made.by, entry, again, endpoint, &own, context));
        }
        if entry.resolution == Resolution::Dns && entry.endpoints.is_empty() && entry.selector.is_none() {
            made.instances.extend(own.iter().map(|host| host_itself(&made.by, entry, host, context)));
        }
        made
    }

    fn definition(
        &self,
        key: &ObjectKey,
        entry: &ServiceEntry,
        service: &ServiceKey,
        context: &Context<'_>,
    ) -> Definition {
        let network = &context.options.network;
        let vip = |range| Vip { network: network.clone(), range };
        let allotted = self.vips.addresses(service).into_iter().flatten().map(ipnet::IpNet::from);
        Definition {
            service: model::Service {
                name: key.name.clone(),
                namespace: service.namespace.clone(),
                hostname: service.hostname.clone(),
                vips: entry.addresses.iter().copied().chain(allotted).map(vip).collect(),
                ports: entry.ports.iter().map(service_port).collect(),
                subject_alt_names: entry.identities.iter().map(|i| i.to_string().into()).collect(),
                waypoint: None,
                load_balancing: LoadBalancing::default(),
                ip_families: model::IpFamilies::Automatic,
                session_affinity: None,
                source: match entry.resolution {
                    Resolution::None => ServiceSource::Passthrough,
                    Resolution::Static => ServiceSource::Static,
                    Resolution::Dns => ServiceSource::Dns,
                },
                canonical: false,
            },
            selector: entry.selector.clone(),
            ports: entry.ports.iter().map(port_rule).collect(),
            distribution: entry.distribution,
            local_only: false,
            waypoint: entry.waypoint.clone(),
            external: entry.external,
        }
    }
}

fn age(key: &ObjectKey, entry: &ServiceEntry) -> Age {
    Age::new(&entry.created, key.namespace.clone(), key.name.clone())
}

/// The single addresses that an entry gives itself.
fn singles(entry: &ServiceEntry) -> impl Iterator<Item = std::net::IpAddr> {
    entry.addresses.iter().filter(|a| a.prefix_len() == a.max_prefix_len()).map(ipnet::IpNet::addr)
}

fn service_port(port: &super::service_entry::EntryPort) -> ServicePort {
    ServicePort {
        name: port.name.clone(),
        port: port.number,
        target: TargetPort::PerEndpoint,
        app_protocol: port.protocol.clone(),
    }
}

fn port_rule(port: &super::service_entry::EntryPort) -> PortRule {
    PortRule { service_port: port.number, target: RuleTarget::NameOr(port.name.clone(), port.target) }
}

/// An endpoint that an entry lists, with its index where its address was listed before. `None` for one that cannot be
/// reached.
fn listed_endpoint(
    key: &ObjectKey,
    entry: &ServiceEntry,
    again: Option<usize>,
    endpoint: &EntryEndpoint,
    services: &[ServiceKey],
    context: &mut Context<'_>,
) -> Option<Instance> {
    let address = endpoint.address.as_ref()?;
    let shown = match address {
        Address::Ip(ip) => ip.to_string(),
        Address::Name(name) => name.clone(),
    };
    let section = again.map_or(shown.clone(), |index| format!("{shown}-{index}"));
    let mapping = |p: &super::service_entry::EntryPort| PortMapping {
        service_port: p.number,
        target_port: endpoint.port(&p.name).unwrap_or(p.target),
    };
    let ports = context.pool.mappings(&entry.ports.iter().map(mapping).collect::<Vec<_>>());
    let memberships =
        services.iter().map(|s| ServiceMembership { service: s.clone(), ports: ports.clone() }).collect();
    Some(instance(key, &section, address, endpoint, endpoint.labels.clone(), memberships, context))
}

/// A host that is its own endpoint.
fn host_itself(
    key: &ObjectKey,
    entry: &ServiceEntry,
    host: &ServiceKey,
    context: &mut Context<'_>,
) -> Instance {
    let mapping =
        |p: &super::service_entry::EntryPort| PortMapping { service_port: p.number, target_port: p.target };
    let ports = context.pool.mappings(&entry.ports.iter().map(mapping).collect::<Vec<_>>());
    let membership = ServiceMembership { service: host.clone(), ports };
    let endpoint = EntryEndpoint {
        address: Some(Address::Name(host.hostname.to_string())),
        ports: Box::new([]),
        labels: Labels::default(),
        service_account: context.profile().service_account,
        network: context.options.network.clone(),
        locality: Arc::default(),
        weight: 1,
    };
    let address = Address::Name(host.hostname.to_string());
    instance(key, &host.hostname, &address, &endpoint, Labels::default(), Box::new([membership]), context)
}

fn instance(
    key: &ObjectKey,
    section: &str,
    address: &Address,
    endpoint: &EntryEndpoint,
    labels: Labels,
    services: Box<[ServiceMembership]>,
    context: &mut Context<'_>,
) -> Instance {
    let cluster = &context.options.cluster;
    let uid = format!("{cluster}/networking.istio.io/ServiceEntry/{}/{}/{section}", key.namespace, key.name);
    let rank = Rank::Endpoint;
    Instance {
        rank,
        ..entry_instance(uid.into(), key, &key.name, address, endpoint, labels, services, context)
    }
}

/// A WorkloadEntry as an instance. `None` for one that cannot be reached.
fn workload_entry(key: &ObjectKey, entry: WorkloadEntry, context: &mut Context<'_>) -> Option<Instance> {
    let address = entry.endpoint.address.clone()?;
    let cluster = &context.options.cluster;
    let uid = format!("{cluster}/networking.istio.io/WorkloadEntry/{}/{}", key.namespace, key.name);
    let services = Box::new([]);
    let name = &entry.workload_name;
    Some(entry_instance(uid.into(), key, name, &address, &entry.endpoint, entry.labels, services, context))
}

#[expect(clippy::too_many_arguments, reason = "the parts of one value, from two callers")]
fn entry_instance(
    uid: Str,
    key: &ObjectKey,
    workload_name: &Str,
    address: &Address,
    endpoint: &EntryEndpoint,
    labels: Labels,
    services: Box<[ServiceMembership]>,
    context: &mut Context<'_>,
) -> Instance {
    let blank = context.profile();
    let (addresses, hostname): (Addresses, Str) = match address {
        Address::Ip(ip) => ([*ip].into(), blank.hostname.clone()),
        Address::Name(name) => (Addresses::default(), name.as_str().into()),
    };
    let is = |(key, value): (&str, &str)| labels.get(key).is_some_and(|v| **v == *value);
    let tunnel = if is(TUNNEL) {
        TunnelProtocol::Hbone
    } else if is(TLS_MODE) {
        TunnelProtocol::LegacyIstioMtls
    } else {
        TunnelProtocol::None
    };
    let profile = Profile {
        namespace: key.namespace.clone(),
        service_account: endpoint.service_account.clone(),
        network: if endpoint.network.is_empty() { blank.network.clone() } else { endpoint.network.clone() },
        hostname,
        workload_name: Some(workload_name.clone()).filter(|name| *name != key.name),
        capacity: endpoint.weight,
        labels: labels.shared(),
        ..blank
    };
    Instance {
        workload: Workload {
            addresses,
            locality: endpoint.locality.clone(),
            ..context.workload(uid, &key.name, profile)
        },
        labels,
        ports: endpoint.ports.iter().cloned().collect(),
        names: Names::Entry,
        rank: Rank::Entry,
        membership: Membership::Fixed(tunnel),
        fixed_locality: true,
        services,
        capture: None,
    }
}
