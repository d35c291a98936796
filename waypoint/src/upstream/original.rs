//! The address that a client dialled itself, as an endpoint: of a workload, of a headless service, or outside of the mesh.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use hashbrown::HashMap;
use model::{Mesh, NetworkAddress, Workload};

use crate::http::decide::{
    Call, Carrier, Dial, Endpoints, NoEndpoint, Outcome, Picked, Protocol, Target, Watch,
};
use crate::http::head::Version;
use crate::upstream::circuit::Circuit;
use crate::upstream::clusters::{Backend, Shared};
use crate::upstream::dial::ToAddress;
use crate::upstream::endpoint::{about, reach, secured};
use crate::upstream::tls::Origination;

/// Targets of addresses that clients dialled, so that their requests share connections.
pub(crate) struct Targets {
    shared: Arc<Shared>,
    known: Mutex<HashMap<(SocketAddr, Protocol), Known>>,
}

/// What has an address, and how it is reached.
type Known = (Option<Arc<Workload>>, Arc<Target>);

impl Targets {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, known: Mutex::default() }
    }

    /// The target of an address; `None` if what has it can't be reached.
    fn target(&self, mesh: &Mesh, address: SocketAddr, protocol: Protocol) -> Option<Arc<Target>> {
        let network = self.shared.origin.load().client.network.clone();
        let workload = mesh.workload_at(&NetworkAddress::new(network, address.ip()));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, target)) = known.get(&(address, protocol)) {
            let same = match (of, workload) {
                (Some(of), Some(workload)) => Arc::ptr_eq(of, workload),
                (None, None) => true,
                _ => false,
            };
            if same {
                return Some(Arc::clone(target));
            }
        }
        let carrier = match workload {
            Some(workload) => reach(&self.shared, workload, address.port(), None, None)?.1,
            None => Carrier::Tcp,
        };
        let about = about(None, address.port(), workload.cloned(), &carrier);
        let target = Arc::new(Target { about: Some(about), ..Target::new(address, protocol, carrier) });
        if known.len() >= self.shared.limits.originals {
            // Those in use come back with their next request.
            known.clear();
            self.shared.stats.originals_forgotten.inc();
        }
        known.insert((address, protocol), (workload.cloned(), Arc::clone(&target)));
        Some(target)
    }
}

/// See the module.
pub(crate) struct Original {
    mesh: Arc<Mesh>,
    targets: Arc<Targets>,
}

impl Original {
    pub(crate) fn new(mesh: Arc<Mesh>, targets: Arc<Targets>) -> Self {
        Self { mesh, targets }
    }
}

impl Endpoints for Original {
    fn pick(&self, call: &Call<'_>) -> Result<Picked, NoEndpoint> {
        let protocol = match call.request.version {
            Version::Http1 => Protocol::Http1,
            Version::Http2 => Protocol::Http2,
        };
        let target = self.targets.target(&self.mesh, call.connection.destination, protocol);
        target.map(Picked::new).ok_or(NoEndpoint::NONE)
    }
}

/// The endpoints of a service that has none of its own (a ServiceEntry with `resolution: NONE`): whatever address of it was
/// dialled.
pub(crate) struct Outside {
    backend: Backend,
    circuit: Arc<Circuit>,
    /// With whether the protocol inside is told.
    tls: Option<(Arc<Origination>, bool)>,
    limit: usize,
    known: Mutex<HashMap<(SocketAddr, Protocol), Arc<Target>>>,
    counted: Arc<Counted>,
}

/// Counts requests that no endpoint is told of.
struct Counted(Arc<Circuit>);

impl Watch for Counted {
    fn reported(&self, _: Outcome) {}

    fn ended(&self) {
        self.0.request_ended();
    }
}

impl Outside {
    pub(crate) fn new(
        shared: &Shared,
        backend: Backend,
        circuit: Arc<Circuit>,
        tls: Option<(Arc<Origination>, bool)>,
    ) -> Self {
        let counted = Arc::new(Counted(Arc::clone(&circuit)));
        Self { backend, circuit, tls, limit: shared.limits.originals, known: Mutex::default(), counted }
    }

    /// The endpoint that has `address`.
    pub(crate) fn pick(&self, address: SocketAddr, protocol: Protocol) -> Picked {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= self.limit {
            known.clear();
        }
        let target = known.entry((address, protocol)).or_insert_with(|| {
            let carrier = match &self.tls {
                Some((origination, tells)) => {
                    let base: Arc<dyn Dial> =
                        Arc::new(ToAddress { keepalive: self.circuit.settings().keepalive });
                    secured(origination, &base, tells.then_some(protocol))
                }
                None => Carrier::Tcp,
            };
            let about = about(Some(&self.backend), self.backend.port, None, &carrier);
            Arc::new(Target {
                circuit: Some(Arc::clone(&self.circuit)),
                about: Some(about),
                ..Target::new(address, protocol, carrier)
            })
        });
        Picked::watched(Arc::clone(target), Arc::clone(&self.counted) as Arc<dyn Watch>)
    }
}
