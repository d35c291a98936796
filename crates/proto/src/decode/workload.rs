//! Reading workloads.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::{
    ApplicationTunnel, Health, Locality, NameIn, NetworkMode, PolicyKey, PortMapping, Profile, ServiceKey,
    ServiceMembership, Str, TrustDomain, TunnelProtocol, Workload, WorkloadKind,
};

use super::{DecodeError, Decoder, Fault, Problem, each, ip, port};
use crate::wire::{culvert, workload as wire};

impl Decoder {
    /// Reads a workload. Its services come out in the order of their names.
    ///
    /// # Errors
    /// A field has no meaning in the model; the error names it.
    pub fn workload(&mut self, workload: &wire::Workload) -> Result<Workload, DecodeError> {
        self.read_workload(workload).map_err(|fault| fault.of("workload", &workload.uid))
    }

    fn read_workload(&mut self, w: &wire::Workload) -> Result<Workload, Fault> {
        if w.uid.is_empty() {
            return Err(Fault::new("uid", Problem::Missing));
        }
        let profile = Profile {
            namespace: self.text(&w.namespace),
            service_account: self.text(if w.service_account.is_empty() {
                "default"
            } else {
                &w.service_account
            }),
            trust_domain: self.trust_domain(&w.trust_domain)?,
            health: health(w.status)?,
            network: self.text(&w.network),
            hostname: self.text(&w.hostname),
            cluster: if w.cluster_id.is_empty() {
                self.elided.cluster.clone()
            } else {
                self.text(&w.cluster_id)
            },
            tunnel: tunnel(w.tunnel_protocol)?,
            network_mode: network_mode(w.network_mode)?,
            canonical_name: None,
            canonical_revision: self.text(&w.canonical_revision),
            workload_name: None,
            workload_kind: kind(w.workload_type),
            services: self.memberships(&w.services)?,
            policies: each(&w.authorization_policies, "authorization_policies", |name| {
                let (namespace, name) = self.qualified(name).map_err(|p| Fault::new("name", p))?;
                Ok(PolicyKey { namespace, name })
            })?,
            waypoint: self.gateway(w.waypoint.as_ref(), "waypoint")?.map(Box::new),
            network_gateway: self.gateway(w.network_gateway.as_ref(), "network_gateway")?.map(Box::new),
            application_tunnel: w
                .application_tunnel
                .as_ref()
                .map(application_tunnel)
                .transpose()
                .map_err(|f| f.within("application_tunnel"))?,
            capacity: w.capacity.unwrap_or(1),
            labels: self.shared_labels(w.culvert.as_ref()),
            named: NameIn::default(),
        };
        // Uid and name are in no other workload.
        let mut workload = Workload::new(w.uid.as_str().into(), &w.name, Arc::new(profile));
        if w.workload_name != w.name {
            workload.set_workload_name(self.text(&w.workload_name));
        }
        if w.canonical_name != workload.workload_name() {
            workload.set_canonical_name(self.text(&w.canonical_name));
        }
        self.profiles.share(&mut workload.profile);
        let read_ip = |a: &Vec<u8>| ip(a).map_err(|p| Fault::new("bytes", p));
        workload.addresses = each(&w.addresses, "addresses", read_ip)?.into();
        workload.locality = self.locality(&w.node, w.locality.as_ref());
        Ok(workload)
    }

    fn shared_labels(&mut self, extension: Option<&culvert::WorkloadExtension>) -> Arc<[(Str, Str)]> {
        let Some(extension) = extension.filter(|e| !e.labels.is_empty()) else { return Arc::default() };
        // Sorted by key, as the model has them.
        let labels: Vec<(Str, Str)> =
            extension.labels.iter().map(|(key, value)| (self.text(key), self.text(value))).collect();
        if let Some(known) = self.labels.get(&*labels) {
            return known.clone();
        }
        let shared: Arc<[(Str, Str)]> = labels.into();
        self.labels.insert(shared.clone());
        shared
    }

    fn trust_domain(&mut self, name: &str) -> Result<TrustDomain, Fault> {
        if name.is_empty() {
            return Ok(self.elided.trust_domain.clone());
        }
        TrustDomain::new(self.text(name)).map_err(|invalid| Fault::new("trust_domain", invalid))
    }

    fn locality(&mut self, node: &str, locality: Option<&wire::Locality>) -> Arc<Locality> {
        let node = self.text(node);
        let locality = match locality {
            None => Locality { node, ..Locality::default() },
            Some(l) => Locality {
                node,
                region: self.text(&l.region),
                zone: self.text(&l.zone),
                subzone: self.text(&l.subzone),
            },
        };
        if let Some(known) = self.localities.get(&locality) {
            return known.clone();
        }
        let shared = Arc::new(locality);
        self.localities.insert(shared.clone());
        shared
    }

    fn memberships(
        &mut self,
        services: &BTreeMap<String, wire::PortList>,
    ) -> Result<Arc<[ServiceMembership]>, Fault> {
        let read = |(name, ports): (&String, &wire::PortList)| {
            let fault = |f: Fault| f.within(format_args!("services[{:?}]", super::cut(name)));
            self.membership(name, ports).map_err(fault)
        };
        let read = services.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        if let Some(known) = self.memberships.get(&*read) {
            return Ok(known.clone());
        }
        let shared: Arc<[ServiceMembership]> = read.into();
        self.memberships.insert(shared.clone());
        Ok(shared)
    }

    fn membership(&mut self, name: &str, ports: &wire::PortList) -> Result<ServiceMembership, Fault> {
        let (namespace, hostname) = self.qualified(name).map_err(|p| Fault::new("key", p))?;
        let mappings = each(&ports.ports, "ports", |p| {
            Ok(PortMapping {
                service_port: port(p.service_port, "service_port")?,
                target_port: port(p.target_port, "target_port")?,
            })
        })?;
        let shared = match self.ports.get(&*mappings) {
            Some(known) => known.clone(),
            None => {
                let shared: Arc<[PortMapping]> = mappings.into();
                self.ports.insert(shared.clone());
                shared
            }
        };
        Ok(ServiceMembership { service: ServiceKey { namespace, hostname }, ports: shared })
    }
}

fn tunnel(value: i32) -> Result<TunnelProtocol, Fault> {
    match wire::TunnelProtocol::try_from(value) {
        Ok(wire::TunnelProtocol::None) => Ok(TunnelProtocol::None),
        Ok(wire::TunnelProtocol::Hbone) => Ok(TunnelProtocol::Hbone),
        Ok(wire::TunnelProtocol::LegacyIstioMtls) => Ok(TunnelProtocol::LegacyIstioMtls),
        Err(_) => Err(Fault::new("tunnel_protocol", Problem::Enum(value))),
    }
}

fn network_mode(value: i32) -> Result<NetworkMode, Fault> {
    match wire::NetworkMode::try_from(value) {
        Ok(wire::NetworkMode::Standard) => Ok(NetworkMode::Standard),
        Ok(wire::NetworkMode::HostNetwork) => Ok(NetworkMode::HostNetwork),
        Err(_) => Err(Fault::new("network_mode", Problem::Enum(value))),
    }
}

fn health(value: i32) -> Result<Health, Fault> {
    match wire::WorkloadStatus::try_from(value) {
        Ok(wire::WorkloadStatus::Healthy) => Ok(Health::Healthy),
        Ok(wire::WorkloadStatus::Unhealthy) => Ok(Health::Unhealthy),
        Err(_) => Err(Fault::new("status", Problem::Enum(value))),
    }
}

/// For telemetry only, so an unknown kind is no error.
fn kind(value: i32) -> WorkloadKind {
    match wire::WorkloadType::try_from(value) {
        Ok(wire::WorkloadType::Deployment) => WorkloadKind::Deployment,
        Ok(wire::WorkloadType::Cronjob) => WorkloadKind::CronJob,
        Ok(wire::WorkloadType::Job) => WorkloadKind::Job,
        Ok(wire::WorkloadType::Pod) | Err(_) => WorkloadKind::Pod,
    }
}

fn application_tunnel(tunnel: &wire::ApplicationTunnel) -> Result<ApplicationTunnel, Fault> {
    use wire::application_tunnel::Protocol;
    let proxy_protocol = match Protocol::try_from(tunnel.protocol) {
        Ok(Protocol::None) => false,
        Ok(Protocol::Proxy) => true,
        Err(_) => return Err(Fault::new("protocol", Problem::Enum(tunnel.protocol))),
    };
    let number = port(tunnel.port, "port")?;
    Ok(ApplicationTunnel { proxy_protocol, port: (number != 0).then_some(number) })
}

impl wire::Workload {
    /// The fields that are set and have no place in the model, by name.
    #[must_use]
    pub fn not_applied(&self) -> Vec<&'static str> {
        let fields = [("native_tunnel", self.native_tunnel), ("extensions", !self.extensions.is_empty())];
        fields.into_iter().filter_map(|(name, set)| set.then_some(name)).collect()
    }
}
