//! Workloads: what has an address and an identity.

use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use hashbrown::HashSet;

use crate::{InvalidIdentity, NetworkAddress, PolicyKey, ServiceKey, SpiffeId, Str, TrustDomain};

/// One instance of an application: a pod, a machine, or an endpoint that a ServiceEntry lists.
///
/// It holds what no other instance has; what its siblings have too is in its [`Profile`], whose fields are read and set as if
/// they were its own. A field that is set takes the profile apart from the siblings' (as [`Arc::make_mut`] does);
/// [`Profiles::share`] joins it with an equal one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Workload {
    /// Unique in the mesh: `cluster/group/kind/namespace/name/section` (WDS). Replaced by an equal text only.
    pub uid: Str,
    /// Its addresses, never IPv4-mapped; empty for a workload that is known by a host name only.
    pub addresses: Addresses,
    /// Where it runs. Shared between those of a node.
    pub locality: Arc<Locality>,
    /// What it has in common with others.
    pub profile: Arc<Profile>,
}

/// What the instances of an application have in common.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Profile {
    /// The namespace of the workload and of its service account.
    pub namespace: Str,
    /// The service account, `default` when the resource names none.
    pub service_account: Str,
    /// The trust domain of its identity.
    pub trust_domain: TrustDomain,
    /// Whether it is ready for traffic: as a rule all are, or none.
    pub health: Health,
    /// The network that the addresses are on; empty for the default one.
    pub network: Str,
    /// The name to resolve when there is no address; else empty.
    pub hostname: Str,
    /// The cluster that it runs in.
    pub cluster: Str,
    /// How connections to it are carried.
    pub tunnel: TunnelProtocol,
    /// Whether its addresses are its own or the node's.
    pub network_mode: NetworkMode,
    /// For telemetry: the application that it is an instance of. `None`: as [`Workload::workload_name`].
    pub canonical_name: Option<Str>,
    /// For telemetry: the version of that application.
    pub canonical_revision: Str,
    /// For telemetry: the name of the object that made it. `None`: its own name.
    pub workload_name: Option<Str>,
    /// For telemetry: the kind of the object that made it.
    pub workload_kind: WorkloadKind,
    /// The services that it is an endpoint of. Shared between equal workloads.
    pub services: Arc<[ServiceMembership]>,
    /// The policies that select it; namespace-wide and mesh-wide ones are found by their scope.
    pub policies: Box<[PolicyKey]>,
    /// The waypoint that its traffic passes first.
    pub waypoint: Option<Box<GatewayAddress>>,
    /// The east-west gateway through which other networks reach it.
    pub network_gateway: Option<Box<GatewayAddress>>,
    /// Set when the application itself takes tunnelled traffic on a port of its own.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Its weight among the endpoints of a service; 1 when nothing else is said, 0 takes no traffic.
    pub capacity: u32,
    /// Its labels, sorted by key, where whoever tells of it knows them (WDS does not): what subsets and `sourceLabels` ask
    /// for. Shared between equal workloads.
    pub labels: Arc<[(Str, Str)]>,
    /// Where its name is, see [`Workload::name`].
    pub named: NameIn,
}

impl Default for Profile {
    /// Nothing is known but the service account, which always has a name: one of `default` in `cluster.local`.
    fn default() -> Self {
        Self {
            namespace: Str::default(),
            service_account: "default".into(),
            trust_domain: TrustDomain::cluster_local(),
            health: Health::Healthy,
            network: Str::default(),
            hostname: Str::default(),
            cluster: Str::default(),
            tunnel: TunnelProtocol::None,
            network_mode: NetworkMode::Standard,
            canonical_name: Some(Str::default()),
            canonical_revision: Str::default(),
            workload_name: Some(Str::default()),
            workload_kind: WorkloadKind::Pod,
            services: Arc::default(),
            policies: Box::default(),
            waypoint: None,
            network_gateway: None,
            application_tunnel: None,
            capacity: 1,
            labels: Arc::default(),
            named: NameIn::default(),
        }
    }
}

impl Deref for Workload {
    type Target = Profile;

    fn deref(&self) -> &Profile {
        &self.profile
    }
}

impl DerefMut for Workload {
    fn deref_mut(&mut self) -> &mut Profile {
        Arc::make_mut(&mut self.profile)
    }
}

impl Workload {
    /// A workload of which only this is known: ready, without addresses, on no node.
    #[must_use]
    pub fn new(uid: Str, name: &str, profile: Arc<Profile>) -> Self {
        let named = NameIn::find(&uid, name);
        let mut workload = Self { uid, addresses: Addresses::default(), locality: Arc::default(), profile };
        if workload.named != named {
            workload.named = named;
        }
        workload
    }

    /// The same, changed.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The pod's or entry's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.profile.named.of(&self.uid)
    }

    /// The node that it runs on; empty when unknown.
    #[must_use]
    pub fn node(&self) -> &Str {
        &self.locality.node
    }

    /// For telemetry: the name of the object that made it.
    #[must_use]
    pub fn workload_name(&self) -> &str {
        self.profile.workload_name.as_deref().unwrap_or_else(|| self.name())
    }

    /// For telemetry: the application that it is an instance of.
    #[must_use]
    pub fn canonical_name(&self) -> &str {
        self.profile.canonical_name.as_deref().unwrap_or_else(|| self.workload_name())
    }

    /// Sets [`Workload::workload_name`].
    pub fn set_workload_name(&mut self, name: Str) {
        self.workload_name = if *name == *self.name() { None } else { Some(name) };
    }

    /// Sets [`Workload::canonical_name`], after [`Workload::workload_name`].
    pub fn set_canonical_name(&mut self, name: Str) {
        self.canonical_name = if *name == *self.workload_name() { None } else { Some(name) };
    }

    /// [`Workload::workload_name`], shared where it is.
    #[must_use]
    pub fn shared_workload_name(&self) -> Str {
        self.profile.workload_name.clone().unwrap_or_else(|| self.name().into())
    }

    /// [`Workload::canonical_name`], shared where it is.
    #[must_use]
    pub fn shared_canonical_name(&self) -> Str {
        self.profile.canonical_name.clone().unwrap_or_else(|| self.shared_workload_name())
    }

    /// Its SPIFFE identity.
    ///
    /// # Errors
    /// Namespace or service account hold a character that a SPIFFE ID may not.
    pub fn identity(&self) -> Result<SpiffeId, InvalidIdentity> {
        SpiffeId::new(self.trust_domain.clone(), self.namespace.clone(), self.service_account.clone())
    }

    /// The value of a label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&Str> {
        let at = self.labels.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        self.labels.get(at).map(|(_, value)| value)
    }

    /// The keys that it is found by.
    pub fn network_addresses(&self) -> impl Iterator<Item = NetworkAddress> {
        self.addresses.iter().map(|ip| NetworkAddress::new(self.network.clone(), *ip))
    }
}

/// Which part of a workload's uid is its name: as a rule there is one, so that no name is kept beside it, and it is the same one
/// for all of a kind.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum NameIn {
    /// What stands between slashes, counted from the end.
    Part(u8),
    /// None of them.
    Apart(Str),
}

/// Parts of a uid that are looked at.
const PARTS: usize = 6;

impl Default for NameIn {
    fn default() -> Self {
        Self::Part(0)
    }
}

impl NameIn {
    fn find(uid: &str, name: &str) -> Self {
        let place = uid.rsplit('/').take(PARTS).position(|part| part == name);
        match place.and_then(|place| u8::try_from(place).ok()) {
            Some(place) => Self::Part(place),
            None => Self::Apart(name.into()),
        }
    }

    fn of<'a>(&'a self, uid: &'a str) -> &'a str {
        match self {
            Self::Part(place) => uid.rsplit('/').nth(usize::from(*place)).unwrap_or_default(),
            Self::Apart(name) => name,
        }
    }
}

/// The addresses of a workload: nearly always one, which is kept in its place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Addresses(Few);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Few {
    One(IpAddr),
    /// None, or several.
    Others(Box<[IpAddr]>),
}

impl Default for Addresses {
    fn default() -> Self {
        Self(Few::Others(Box::default()))
    }
}

impl Deref for Addresses {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        match &self.0 {
            Few::One(ip) => std::slice::from_ref(ip),
            Few::Others(list) => list,
        }
    }
}

impl From<&[IpAddr]> for Addresses {
    fn from(list: &[IpAddr]) -> Self {
        match list {
            [one] => Self(Few::One(*one)),
            others => Self(Few::Others(others.into())),
        }
    }
}

impl From<Vec<IpAddr>> for Addresses {
    fn from(list: Vec<IpAddr>) -> Self {
        match *list {
            [one] => Self(Few::One(one)),
            _ => Self(Few::Others(list.into())),
        }
    }
}

impl From<Box<[IpAddr]>> for Addresses {
    fn from(list: Box<[IpAddr]>) -> Self {
        list.into_vec().into()
    }
}

impl<const N: usize> From<[IpAddr; N]> for Addresses {
    fn from(list: [IpAddr; N]) -> Self {
        list.as_slice().into()
    }
}

impl FromIterator<IpAddr> for Addresses {
    fn from_iter<T: IntoIterator<Item = IpAddr>>(list: T) -> Self {
        Vec::from_iter(list).into()
    }
}

impl<'a> IntoIterator for &'a Addresses {
    type Item = &'a IpAddr;
    type IntoIter = std::slice::Iter<'a, IpAddr>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Makes equal profiles one. It holds references, so [`Profiles::sweep`] must be called now and then.
#[derive(Debug, Default)]
pub struct Profiles(HashSet<Arc<Profile>>);

impl Profiles {
    /// Puts the shared form of a profile in its place.
    pub fn share(&mut self, profile: &mut Arc<Profile>) {
        match self.0.get(&**profile) {
            Some(known) => *profile = known.clone(),
            None => _ = self.0.insert(profile.clone()),
        }
    }

    /// Forgets the profiles that only this table still holds.
    pub fn sweep(&mut self) {
        self.0.retain(|profile| Arc::strong_count(profile) > 1);
    }

    /// How many distinct profiles the table holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How connections to a workload are carried.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TunnelProtocol {
    /// As plain TCP: the workload is not in the mesh.
    #[default]
    None,
    /// In an HBONE tunnel to port 15008.
    Hbone,
    /// Mutual TLS as sidecars of Istio speak it; we pass it through as plain TCP and report it.
    LegacyIstioMtls,
}

/// Whose addresses a workload has.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum NetworkMode {
    /// Its own.
    #[default]
    Standard,
    /// Its node's (`hostNetwork`), shared with others: such an address identifies no workload.
    HostNetwork,
}

/// Whether a workload takes traffic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Health {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready, or terminating.
    Unhealthy,
}

/// Where a workload runs. Empty parts are unknown.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Locality {
    /// The node.
    pub node: Str,
    /// `topology.kubernetes.io/region`.
    pub region: Str,
    /// `topology.kubernetes.io/zone`.
    pub zone: Str,
    /// `topology.istio.io/subzone`.
    pub subzone: Str,
}

/// The kind of object that made a workload.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum WorkloadKind {
    /// A Deployment.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A pod without an owner.
    #[default]
    Pod,
    /// A Job.
    Job,
}

/// That a workload is an endpoint of a service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ServiceMembership {
    /// The service.
    pub service: ServiceKey,
    /// Which port of the workload serves which port of the service. Shared between equal workloads.
    pub ports: Arc<[PortMapping]>,
}

/// A service's port and the workload's port behind it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PortMapping {
    /// The service's port.
    pub service_port: u16,
    /// The workload's port.
    pub target_port: u16,
}

/// A gateway or waypoint.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct GatewayAddress {
    /// What to resolve it by.
    pub target: GatewayTarget,
    /// Its HBONE port, 15008 as a rule.
    pub hbone_mtls_port: u16,
}

/// How a gateway is found.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum GatewayTarget {
    /// A service, by namespace and host name.
    Service(ServiceKey),
    /// A workload or service, by address.
    Address(NetworkAddress),
}

/// An application that takes tunnelled traffic itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ApplicationTunnel {
    /// Whether the PROXY protocol precedes the data.
    pub proxy_protocol: bool,
    /// The port it listens on for that; `None` for the port that was asked for.
    pub port: Option<u16>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_workload_takes_little() {
        // Of 100,000 in a mesh each byte is 100 kB; what siblings share stands once for all of them.
        assert!(size_of::<Workload>() <= 56, "{}", size_of::<Workload>());
    }

    #[test]
    fn siblings_share_a_profile_until_one_is_changed() {
        let mut profiles = Profiles::default();
        let pod = |name: &str| {
            let uid = format!("Kubernetes//Pod/shop/{name}");
            Workload::new(uid.into(), name, Arc::default())
        };
        let (mut a, mut b) = (pod("a"), pod("b"));
        profiles.share(&mut a.profile);
        profiles.share(&mut b.profile);
        assert!(Arc::ptr_eq(&a.profile, &b.profile) && profiles.len() == 1);
        b.tunnel = TunnelProtocol::Hbone;
        assert_eq!((a.tunnel, b.tunnel), (TunnelProtocol::None, TunnelProtocol::Hbone));
        b.tunnel = TunnelProtocol::None;
        profiles.share(&mut b.profile);
        assert!(Arc::ptr_eq(&a.profile, &b.profile));
        drop((a, b));
        profiles.sweep();
        assert!(profiles.is_empty());
    }

    proptest! {
        #[test]
        fn names_read_back_as_they_were(
            uid in "[a-c/]{0,8}",
            long in prop::option::of(Just("x".repeat(70_000))),
            name in "[a-c/]{0,4}",
            workload_name in "[a-c]{0,2}",
            canonical_name in "[a-c]{0,2}",
        ) {
            let uid = format!("{}{uid}", long.unwrap_or_default());
            let mut workload = Workload::new(uid.as_str().into(), &name, Arc::default());
            workload.set_workload_name(workload_name.as_str().into());
            workload.set_canonical_name(canonical_name.as_str().into());
            prop_assert_eq!(workload.name(), &name);
            prop_assert_eq!(workload.workload_name(), &workload_name);
            prop_assert_eq!(workload.canonical_name(), &canonical_name);
            prop_assert_eq!(&*workload.shared_workload_name(), &workload_name);
            prop_assert_eq!(&*workload.shared_canonical_name(), &canonical_name);
        }

        #[test]
        fn addresses_read_back_as_they_were(list in prop::collection::vec(any::<IpAddr>(), 0..4)) {
            let addresses = Addresses::from(list.as_slice());
            prop_assert_eq!(&*addresses, &*list);
            prop_assert_eq!(Addresses::from(list.clone()), addresses.clone());
            prop_assert_eq!(list.iter().copied().collect::<Addresses>(), addresses);
        }
    }
}
