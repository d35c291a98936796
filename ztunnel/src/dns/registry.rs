//! Names that the mesh knows, and what they stand for. Pure functions over a snapshot.
//!
//! A name is looked up as it stands, as a short form of a service's name as seen from the client's namespace
//! (`name`, `name.ns`, `name.ns.svc`), and, when it carries one of the search domains that resolvers in pods
//! append (`<ns>.svc.<domain>`, `svc.<domain>`, `<domain>`), as what the resolver would ask next: that saves the
//! client up to four round trips, and mesh names need no upstream.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use model::{Endpoint, Health, HealthPolicy, IpFamilies, Mesh, Service, ServiceSource, Str, Workload};

/// No answer holds more addresses: what fits into a message over TCP, and more than any client reads.
const ANSWER_LIMIT: usize = 1000;

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct Asker<'a> {
    /// The pod's namespace.
    pub(super) namespace: &'a str,
    /// The pod's network.
    pub(super) network: &'a Str,
    /// The namespace whose definition of a host is taken where the client's own has none.
    pub(super) preferred_namespace: Option<&'a str>,
}

/// What a name stands for.
#[derive(Clone, Debug)]
pub(super) enum Host {
    /// A service.
    Service(Arc<Service>),
    /// One pod of a service, by its name or its address.
    Pod(Arc<Service>, Arc<Workload>),
}

/// What an SRV record points at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Target {
    /// The host name.
    pub(super) host: String,
    /// The port.
    pub(super) port: u16,
    /// Its addresses, for the additional section.
    pub(super) addresses: Vec<IpAddr>,
}

/// Finds what `name` (lower case, no dot at the end) stands for.
pub(super) fn find(mesh: &Mesh, asker: &Asker<'_>, name: &str) -> Option<Host> {
    let domain: &str = &mesh.settings().cluster_domain;
    let suffixes =
        [format!(".{}.svc.{domain}", asker.namespace), format!(".svc.{domain}"), format!(".{domain}")];
    if let Some(host) = exact(mesh, asker, name) {
        return Some(host);
    }
    let expanded = |short: &str, suffixes: &[String]| {
        suffixes.iter().find_map(|suffix| exact(mesh, asker, &format!("{short}{suffix}")))
    };
    // A name with a search domain: what the resolver would ask after it.
    for (index, suffix) in suffixes.iter().enumerate() {
        if let Some(short) = name.strip_suffix(suffix.as_str()) {
            let later = suffixes.get(index + 1..).unwrap_or_default();
            let found = expanded(short, later).or_else(|| exact(mesh, asker, short));
            if let Some(host) = found.or_else(|| wildcard(mesh, asker, short)) {
                return Some(host);
            }
        }
    }
    // `name.ns` before `pod.service`: services are asked for more often.
    let [own, all, whole] = &suffixes;
    let short_forms = if name.contains('.') { [all, own, whole] } else { [own, all, whole] };
    if !name.ends_with(whole.as_str())
        && let Some(host) =
            short_forms.into_iter().find_map(|suffix| exact(mesh, asker, &format!("{name}{suffix}")))
    {
        return Some(host);
    }
    wildcard(mesh, asker, name)
}

/// A service of this name, or a pod `<pod>.<service>`.
fn exact(mesh: &Mesh, asker: &Asker<'_>, name: &str) -> Option<Host> {
    if let Some(service) = service(mesh, asker, name) {
        return Some(Host::Service(service));
    }
    let (pod, rest) = name.split_once('.')?;
    let service = service(mesh, asker, rest).filter(|s| s.vips.is_empty() && !s.hostname.starts_with('*'))?;
    let endpoints = mesh.endpoints(&service.key())?;
    let address = undashed(pod);
    let found = endpoints.as_slice().iter().find(|endpoint| {
        let is_named = || match address {
            Some(ip) => endpoint.workload.addresses.contains(&ip),
            None => false,
        };
        is_published(&service, endpoint) && (*endpoint.workload.name() == *pod || is_named())
    })?;
    Some(Host::Pod(service, found.workload.clone()))
}

/// The address that a label stands for: `10-0-0-1`, `fd00--1`.
fn undashed(label: &str) -> Option<IpAddr> {
    // The longest address has 39 characters, and only hexadecimal digits beside the dashes.
    if label.len() > 39 || !label.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()) {
        return None;
    }
    let v4 = label.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    v4.or_else(|_| label.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)).ok()
}

/// The service of a host name that is the client's: its own namespace's, the preferred one's, or the one that the
/// model puts first.
fn service(mesh: &Mesh, asker: &Asker<'_>, hostname: &str) -> Option<Arc<Service>> {
    let list = mesh.services_named(hostname);
    let of = |namespace: &str| list.iter().find(|s| *s.namespace == *namespace);
    of(asker.namespace).or_else(|| of(asker.preferred_namespace?)).or_else(|| list.first()).cloned()
}

/// The service with the longest wildcard host (`*.example.com`) that covers `name`.
fn wildcard(mesh: &Mesh, asker: &Asker<'_>, name: &str) -> Option<Host> {
    let mut left = name;
    while let Some((_, parent)) = left.split_once('.') {
        if let Some(service) = service(mesh, asker, &format!("*.{parent}")) {
            return Some(Host::Service(service));
        }
        left = parent;
    }
    None
}

fn is_published(service: &Service, endpoint: &Endpoint) -> bool {
    endpoint.workload.health == Health::Healthy || service.load_balancing.health == HealthPolicy::AllowAll
}

fn has_family(service: &Service, ip: IpAddr) -> bool {
    match service.ip_families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::V4Only => ip.is_ipv4(),
        IpFamilies::V6Only => ip.is_ipv6(),
    }
}

/// The addresses of a host, of both families; `None` when the mesh has none to give and upstream resolvers may:
/// a ServiceEntry without addresses of its own.
pub(super) fn addresses(mesh: &Mesh, asker: &Asker<'_>, host: &Host) -> Option<Vec<IpAddr>> {
    match host {
        Host::Pod(service, workload) => {
            let own = workload.addresses.iter().copied().filter(|ip| has_family(service, *ip));
            Some(own.collect())
        }
        Host::Service(service) => service_addresses(mesh, asker, service),
    }
}

fn service_addresses(mesh: &Mesh, asker: &Asker<'_>, service: &Service) -> Option<Vec<IpAddr>> {
    let is_single = |vip: &&model::Vip| vip.range.prefix_len() == vip.range.max_prefix_len();
    let vips: Vec<&model::Vip> = service.vips.iter().filter(is_single).collect();
    if !vips.is_empty() {
        let reachable = vips.into_iter().filter(|vip| vip.network == *asker.network);
        let families = reachable.map(|vip| vip.range.addr()).filter(|ip| has_family(service, *ip));
        return Some(families.collect());
    }
    let mut found: Vec<IpAddr> = Vec::new();
    if let Some(endpoints) = mesh.endpoints(&service.key()) {
        let reachable = endpoints
            .as_slice()
            .iter()
            .filter(|e| is_published(service, e) && e.workload.network == *asker.network);
        for endpoint in reachable {
            found.extend(endpoint.workload.addresses.iter().copied().filter(|ip| has_family(service, *ip)));
        }
    }
    // A headless service without endpoints exists all the same.
    (!found.is_empty() || service.source == ServiceSource::Kubernetes).then_some(found)
}

/// Moves a part of `addresses` to the front that differs from query to query, so that clients that take the first
/// one spread, and drops what no answer could hold.
pub(super) fn rotate(addresses: &mut Vec<IpAddr>, turn: usize) {
    if let Some(first) = turn.checked_rem(addresses.len()) {
        addresses.rotate_left(first);
    }
    addresses.truncate(ANSWER_LIMIT);
}

/// What `_port._tcp.<name>` points at; `None` when the mesh does not know. Our model has TCP ports only.
pub(super) fn targets(mesh: &Mesh, asker: &Asker<'_>, name: &str) -> Option<Vec<Target>> {
    let (port_name, rest) = name.strip_prefix('_')?.split_once('.')?;
    let rest = rest.strip_prefix("_tcp.")?;
    let Host::Service(service) = find(mesh, asker, rest)? else { return None };
    if service.hostname.starts_with('*') {
        return None;
    }
    let port = service.ports.iter().find(|p| *p.name == *port_name)?.port;
    if !service.vips.is_empty() {
        let addresses = service_addresses(mesh, asker, &service)?;
        return Some(vec![Target { host: service.hostname.to_string(), port, addresses }]);
    }
    let endpoints = mesh.endpoints(&service.key())?;
    let published = endpoints.as_slice().iter().filter(|e| is_published(&service, e));
    let targets = published.filter_map(|endpoint| {
        let workload = &endpoint.workload;
        let addresses: Vec<IpAddr> =
            workload.addresses.iter().copied().filter(|ip| has_family(&service, *ip)).collect();
        (!addresses.is_empty() && workload.network == *asker.network).then(|| Target {
            host: format!("{}.{}", workload.name(), service.hostname),
            port: endpoints.target_port(endpoint, port).unwrap_or(port),
            addresses,
        })
    });
    Some(targets.take(ANSWER_LIMIT).collect())
}
