//! A pod of this node, as the data plane sees it.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hbone::{Baggage, HeaderValue};
use model::{Locality, Mesh, Profile, Str, TunnelProtocol, Workload};
use net::Netns;
use tokio::time::Instant;

use super::failure::Failure;

/// Addresses that are remembered of a pod; one has two as a rule.
const MOST_ADDRESSES: usize = 8;
/// How long it is believed that the pod has one.
const ADDRESS_HOLDS: Duration = Duration::from_secs(1);

/// Who a pod of this node is, whatever the snapshot of the moment knows of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Subject {
    /// Its workload's uid.
    pub uid: Str,
    /// What the node agent says of it. Without one (file mode) the configuration alone says who the pod is.
    pub claim: Option<Arc<Claim>>,
}

/// What the node agent says of a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim {
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
    /// Its service account.
    pub service_account: Str,
    /// This node.
    pub node: Str,
    /// The cluster that this node is in.
    pub cluster: Str,
    /// The network that this node's pods are on.
    pub network: Str,
}

impl Claim {
    /// Whether `workload` is the pod, or an earlier one of its name that ran as somebody else.
    fn holds_of(&self, workload: &Workload) -> bool {
        workload.namespace == self.namespace
            && *workload.name() == *self.name
            && workload.service_account == self.service_account
    }

    /// The pod before the control plane has told of it. Its identity is known, which is all that it needs to connect.
    fn workload(&self, uid: &Str, mesh: &Mesh) -> Workload {
        let profile = Profile {
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            trust_domain: mesh.settings().trust_domains.own.clone(),
            network: self.network.clone(),
            cluster: self.cluster.clone(),
            tunnel: TunnelProtocol::Hbone,
            canonical_name: None,
            canonical_revision: "latest".into(),
            workload_name: None,
            ..Profile::default()
        };
        let locality = Arc::new(Locality { node: self.node.clone(), ..Locality::default() });
        Workload { locality, ..Workload::new(uid.clone(), &self.name, Arc::new(profile)) }
    }
}

impl Subject {
    /// The pod's workload in `mesh`, if that knows it.
    pub fn known<'a>(&self, mesh: &'a Mesh) -> Option<&'a Arc<Workload>> {
        let found = mesh.workload(&self.uid)?;
        self.claim.as_ref().is_none_or(|claim| claim.holds_of(found)).then_some(found)
    }

    /// The pod as the source of connections: known to the control plane, or by the node agent's word.
    ///
    /// # Errors
    /// Nothing is known of it.
    pub fn source(&self, mesh: &Mesh) -> Result<Arc<Workload>, Failure> {
        match (self.known(mesh), &self.claim) {
            (Some(workload), _) => Ok(workload.clone()),
            (None, Some(claim)) => Ok(Arc::new(claim.workload(&self.uid, mesh))),
            (None, None) => Err(Failure::UnknownPod(self.uid.clone())),
        }
    }

    /// The pod as the destination of connections to its address `local`: only as the control plane knows it, for the
    /// policies that hold for it are not known otherwise. What is known of an address that isn't this pod's is of an
    /// earlier pod of the same name.
    ///
    /// # Errors
    /// Nothing is known of it (yet).
    pub fn destination(&self, mesh: &Mesh, local: IpAddr) -> Result<Arc<Workload>, Failure> {
        match (self.known(mesh), &self.claim) {
            (Some(workload), None) => Ok(workload.clone()),
            (Some(workload), Some(_)) if workload.addresses.contains(&local.to_canonical()) => {
                Ok(workload.clone())
            }
            (_, None) => Err(Failure::UnknownPod(self.uid.clone())),
            (_, Some(_)) => Err(Failure::NotKnownYet(self.uid.clone())),
        }
    }
}

/// A pod whose traffic this process carries. Its workload is looked up in the snapshot of the moment, so that a
/// changed manifest holds for the next connection.
#[derive(Debug)]
pub struct LocalPod {
    /// Who it is.
    pub subject: Subject,
    /// Where its sockets live.
    pub netns: Netns,
    open: AtomicUsize,
    /// Addresses that were its own a moment ago.
    own: Mutex<Vec<(IpAddr, Instant)>>,
    baggage: Mutex<Option<(Arc<Workload>, Option<HeaderValue>)>>,
}

impl LocalPod {
    /// A pod in `netns`.
    pub fn new(subject: Subject, netns: Netns) -> Self {
        Self { subject, netns, open: AtomicUsize::new(0), own: Mutex::default(), baggage: Mutex::default() }
    }

    /// Whether `ip` is an address of the pod's namespace. That it is holds for a moment; then the kernel is asked again.
    pub fn has_address(&self, ip: IpAddr) -> bool {
        let own = || self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if own().iter().any(|(known, asked)| *known == ip && asked.elapsed() < ADDRESS_HOLDS) {
            return true;
        }
        let has = net::has_address(&self.netns, ip);
        let mut own = own();
        own.retain(|(known, _)| *known != ip);
        if has && own.len() < MOST_ADDRESSES {
            own.push((ip, Instant::now()));
        }
        has
    }

    /// What tunnels say of `workload`, which is the pod's. Made once for each version of it.
    pub fn baggage(&self, workload: &Arc<Workload>) -> Option<HeaderValue> {
        let mut made = self.baggage.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, value)) = &*made
            && Arc::ptr_eq(of, workload)
        {
            return value.clone();
        }
        let some = |text: &str| (!text.is_empty()).then(|| Str::from(text));
        let value = Baggage {
            cluster: some(&workload.cluster),
            namespace: some(&workload.namespace),
            workload: some(workload.workload_name()).map(|name| (workload.workload_kind, name)),
            service_name: some(workload.canonical_name()),
            service_version: some(&workload.canonical_revision),
            region: some(&workload.locality.region),
            zone: some(&workload.locality.zone),
        }
        .encode();
        *made = Some((workload.clone(), value.clone()));
        value
    }

    /// Takes one of the pod's places for open connections, and room for the descriptors that the connection needs.
    ///
    /// # Errors
    /// There is no more, for the pod or at all.
    pub fn place(self: &Arc<Self>, room: &Arc<Room>, descriptors: usize) -> Result<Place, Failure> {
        // Dropping it gives back what could be taken.
        let mut place = Place { pod: self.clone(), room: room.clone(), descriptors: 0 };
        if self.open.fetch_add(1, Ordering::Relaxed) >= room.most.per_pod {
            room.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Failure::TooMany(room.most.per_pod));
        }
        place.descriptors = descriptors;
        if room.taken.fetch_add(descriptors, Ordering::Relaxed) + descriptors > room.most.descriptors {
            room.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Failure::NoDescriptors(room.most.descriptors));
        }
        Ok(place)
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

/// What open connections of all pods together may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoomLimits {
    /// Open connections of one pod, both directions together.
    pub per_pod: usize,
    /// Descriptors of all of them.
    pub descriptors: usize,
}

/// Descriptors of open connections, and the limit for them: one pod's connections must not leave the others, or what
/// else the process needs, without.
#[derive(Debug)]
pub struct Room {
    most: RoomLimits,
    taken: AtomicUsize,
    refused: AtomicU64,
}

impl Room {
    /// All of it.
    pub fn new(most: RoomLimits) -> Self {
        Self { most, taken: AtomicUsize::new(0), refused: AtomicU64::new(0) }
    }

    /// Descriptors that are taken.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Descriptors that may be.
    pub fn limit(&self) -> usize {
        self.most.descriptors
    }

    /// Connections that were refused for want of room.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// A place among a pod's open connections, given back when dropped.
#[derive(Debug)]
pub struct Place {
    pod: Arc<LocalPod>,
    room: Arc<Room>,
    descriptors: usize,
}

impl Place {
    /// Gives back what is above `descriptors`: the connection needs no more.
    pub fn keep(&mut self, descriptors: usize) {
        let more = self.descriptors.saturating_sub(descriptors);
        self.descriptors -= more;
        self.room.taken.fetch_sub(more, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pod.open.fetch_sub(1, Ordering::Relaxed);
        self.keep(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_end_at_the_pods_limit_and_at_the_descriptors_of_all() {
        let netns = || Netns::open("/proc/self/ns/net").unwrap();
        let [one, other] = ["one", "other"].map(|uid| {
            let subject = Subject { uid: uid.into(), claim: None };
            Arc::new(LocalPod::new(subject, netns()))
        });
        let room = Arc::new(Room::new(RoomLimits { per_pod: 3, descriptors: 8 }));
        let mut places: Vec<_> = (0..3).map(|_| one.place(&room, 2).unwrap()).collect();
        assert!(matches!(one.place(&room, 2), Err(Failure::TooMany(3))));
        assert_eq!((one.open(), room.taken(), room.refused()), (3, 6, 1));
        places.push(other.place(&room, 2).unwrap());
        assert!(matches!(other.place(&room, 1), Err(Failure::NoDescriptors(8))));
        assert_eq!((other.open(), room.taken(), room.refused()), (1, 8, 2));
        // A tunnel needs one only.
        places[0].keep(1);
        places.push(other.place(&room, 1).unwrap());
        drop(places);
        assert_eq!((one.open(), other.open(), room.taken()), (0, 0, 0));
    }

    #[test]
    fn a_pod_is_served_by_what_is_known_of_itself_and_not_of_its_predecessor() {
        let claim = Claim {
            namespace: "shop".into(),
            name: "web-0".into(),
            service_account: "web".into(),
            node: "n1".into(),
            cluster: "Kubernetes".into(),
            network: Str::default(),
        };
        let subject = Subject { uid: "Kubernetes//Pod/shop/web-0".into(), claim: Some(Arc::new(claim)) };
        let local: IpAddr = "10.0.0.7".parse().unwrap();
        let empty = Mesh::default();
        let unknown = subject.source(&empty).unwrap();
        assert_eq!(unknown.identity().unwrap().to_string(), "spiffe://cluster.local/ns/shop/sa/web");
        assert!(matches!(subject.destination(&empty, local), Err(Failure::NotKnownYet(_))));

        let told = |account: &str, address: IpAddr| {
            let workload = Workload::clone(&unknown).with(|w| {
                w.service_account = account.into();
                w.addresses = [address].into();
                w.set_canonical_name("told".into());
            });
            empty.apply([model::Change::SetWorkload(Arc::new(workload))])
        };
        let mesh = told("web", local);
        assert_eq!(subject.source(&mesh).unwrap().canonical_name(), "told");
        assert!(subject.destination(&mesh, local).is_ok());
        let mapped: IpAddr = "::ffff:10.0.0.7".parse().unwrap();
        assert!(subject.destination(&mesh, mapped).is_ok());
        // Of the one before it, which had another address, or ran as somebody else.
        let mesh = told("web", "10.0.0.6".parse().unwrap());
        assert!(subject.destination(&mesh, local).is_err());
        let mesh = told("admin", local);
        assert!(subject.destination(&mesh, local).is_err());
        assert_eq!(&*subject.source(&mesh).unwrap().service_account, "web");
        // In file mode the manifest alone counts.
        let file = Subject { claim: None, ..subject };
        assert!(file.source(&empty).is_err());
        assert_eq!(&*file.destination(&mesh, local).unwrap().service_account, "admin");
    }
}
