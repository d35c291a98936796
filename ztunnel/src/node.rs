//! The pods of this node: each is enrolled (listeners, then redirection), kept so, and let go.
//!
//! ```text
//!            netns, listeners, rules        manifest gone, or no longer in the mesh
//!   Pending ------------------------> Enrolled ------------------------------------> gone
//!      ^  | failed: say why, try again   |
//!      |  +------------------------------+ the rules drifted, the namespace is another one
//! ```
//!
//! Order matters. Listeners stand before the redirection does, so that no connection meets a closed port; on a
//! restart the redirection stands already, and refuses until the listeners are there. A pod that can't be enrolled
//! keeps what it has: nothing here removes a rule because something failed.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capture::{Capture, Direction, Include, InterfaceName, LiveConnection, PortRange, Rules};
use config::compile::{Enrolment, EnrolmentChange};
use model::{Connection, Str};
use net::{DatagramOptions, ListenOptions, Netns, ProxyUdpSocket, sock_diag};
use process::runtimes::Workers;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::dns::{self, DnsProxy, Upstreams};
use crate::proxy::pod::LocalPod;
use crate::proxy::{self, DNS_PORT, HBONE_PORT, OUTBOUND_PORT, PLAINTEXT_PORT, Proxy};

/// How often failed enrolments are tried again, and standing ones looked at.
pub const RECONCILE_INTERVAL: Duration = Duration::from_secs(1);
/// How often the rules of an enrolled pod are compared with what they should be.
const VERIFY_INTERVAL: Duration = Duration::from_secs(30);
/// More connections of before the enrolment are not kept account of; they go on all the same.
const ADOPTED_LIMIT: usize = 10_000;

/// This node's pods.
pub struct Node {
    proxy: Arc<Proxy>,
    capture: Arc<dyn Capture>,
    dns: Arc<DnsProxy>,
    upstreams: Arc<Upstreams>,
    /// Where connections are carried; this module itself runs on the control runtime.
    workers: Arc<Workers>,
    pods: Mutex<HashMap<Str, Slot>>,
    diagnostics: Mutex<Value>,
}

struct Slot {
    enrolment: Enrolment,
    state: PodState,
    /// Whether work on the pod is under way: only one at a time.
    busy: bool,
}

enum PodState {
    Pending { failures: u32, reason: String, retry_at: Instant },
    Enrolled(Enrolled),
}

/// An enrolled pod. Dropping it closes the listeners; open connections go on.
struct Enrolled {
    pod: Arc<LocalPod>,
    accepting: Vec<AbortHandle>,
    ipv6: capture::Ipv6,
    verified_at: Instant,
    /// Connections of before the enrolment that are still alive.
    adopted: Vec<LiveConnection>,
    drifts: u64,
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        self.accepting.iter().for_each(AbortHandle::abort);
    }
}

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
enum EnrolError {
    #[error("network namespace: {0}")]
    Netns(#[from] net::netns::OpenError),
    #[error("{0}")]
    Socket(#[from] net::SocketError),
    #[error("a listener for each thread: {0}")]
    Listener(#[source] std::io::Error),
    #[error("redirection: {0}")]
    Capture(#[from] capture::Error),
    #[error("the network namespace is another one than before")]
    Replaced,
    #[error("{0} is not a valid exclusion")]
    Exclusion(String),
    #[error("the task of the enrolment failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl Node {
    /// A node without pods.
    pub fn new(
        proxy: Arc<Proxy>,
        capture: Arc<dyn Capture>,
        dns: Arc<DnsProxy>,
        upstreams: Arc<Upstreams>,
        workers: Arc<Workers>,
    ) -> Self {
        Self {
            proxy,
            capture,
            dns,
            upstreams,
            workers,
            pods: Mutex::default(),
            diagnostics: Mutex::new(Value::Array(Vec::new())),
        }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<Str, Slot>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a change of the configuration.
    pub async fn apply(self: &Arc<Self>, changes: Vec<EnrolmentChange>) {
        let mut removed = Vec::new();
        for change in changes {
            match change {
                EnrolmentChange::Set(enrolment) => self.set(*enrolment),
                EnrolmentChange::Remove(uid) => removed.extend(self.pods().remove(&uid)),
            }
        }
        for slot in removed {
            self.un_enrol(slot).await;
        }
        self.reconcile().await;
        // What a pod's policies refuse they refuse from its first moment in the mesh.
        self.recheck_adopted().await;
    }

    fn set(&self, enrolment: Enrolment) {
        let mut pods = self.pods();
        let now = Instant::now();
        let pending = || PodState::Pending { failures: 0, reason: "new".into(), retry_at: now };
        match pods.get_mut(&enrolment.uid) {
            Some(slot) if slot.enrolment == enrolment => {}
            Some(slot) => {
                // Other rules or another namespace: enrolled anew. The rules are replaced without a gap.
                slot.enrolment = enrolment;
                slot.state = pending();
            }
            None => {
                pods.insert(enrolment.uid.clone(), Slot { enrolment, state: pending(), busy: false });
            }
        }
    }

    /// Enrols what is not, and looks after what is.
    pub async fn reconcile(self: &Arc<Self>) {
        let now = Instant::now();
        let due: Vec<Enrolment> = self
            .pods()
            .values_mut()
            .filter(|slot| !slot.busy)
            .filter(|slot| match &slot.state {
                PodState::Pending { retry_at, .. } => *retry_at <= now,
                PodState::Enrolled(enrolled) => enrolled.verified_at + VERIFY_INTERVAL <= now,
            })
            .map(|slot| {
                slot.busy = true;
                slot.enrolment.clone()
            })
            .collect();
        let mut tasks = tokio::task::JoinSet::new();
        for enrolment in due {
            let node = self.clone();
            tasks.spawn(async move { node.look_after(enrolment).await });
        }
        while tasks.join_next().await.is_some() {}
    }

    async fn look_after(self: Arc<Self>, enrolment: Enrolment) {
        let standing = match self.pods().get(&enrolment.uid).map(|slot| &slot.state) {
            Some(PodState::Enrolled(enrolled)) => Some(enrolled.pod.clone()),
            _ => None,
        };
        let outcome = match standing {
            Some(pod) => self.verify(&enrolment, &pod).await.map(|()| None),
            None => self.enrol(&enrolment).await.map(Some),
        };
        let mut pods = self.pods();
        let Some(slot) = pods.get_mut(&enrolment.uid) else { return };
        slot.busy = false;
        if slot.enrolment != enrolment {
            return; // changed meanwhile; the next round sees to it
        }
        match outcome {
            Ok(Some(enrolled)) => slot.state = PodState::Enrolled(enrolled),
            Ok(None) => {
                if let PodState::Enrolled(enrolled) = &mut slot.state {
                    enrolled.verified_at = Instant::now();
                }
            }
            Err(error) => slot.failed(&enrolment, &error),
        }
    }

    /// Listeners, then redirection, then the connections that lived before.
    async fn enrol(&self, enrolment: &Enrolment) -> Result<Enrolled, EnrolError> {
        let netns = Netns::open(&enrolment.netns)?;
        let rules = rules(enrolment)?;
        let pod = Arc::new(LocalPod::new(enrolment.uid.clone(), netns.clone()));
        self.prepare_certificate(&pod);
        let accepting = self.listen(&pod, enrolment)?;
        let (capture, target) = (self.capture.clone(), netns.clone());
        let installed = tokio::task::spawn_blocking(move || {
            let installed = capture.install(&target, &rules);
            let mut alive = capture::live_connections(&target, &rules.ports).unwrap_or_default();
            alive.truncate(ADOPTED_LIMIT);
            (installed, alive)
        })
        .await?;
        let (installed, alive) = installed;
        let enrolled = Enrolled {
            ipv6: installed?.ipv6,
            adopted: alive,
            pod,
            accepting,
            verified_at: Instant::now(),
            drifts: 0,
        };
        tracing::info!(
            pod = %format_args!("{}/{}", enrolment.namespace, enrolment.name),
            netns = %enrolment.netns.display(),
            backend = self.capture.backend().as_str(),
            ipv6 = ?enrolled.ipv6,
            connections_alive = enrolled.adopted.len(),
            "pod enrolled"
        );
        Ok(enrolled)
    }

    /// Has the pod's certificate issued, so that its first connection need not wait for it.
    fn prepare_certificate(&self, pod: &LocalPod) {
        let workload = pod.workload(&self.proxy.state.mesh());
        let Some(id) = workload.ok().and_then(|w| w.identity().ok()) else { return };
        let tls = self.proxy.tls.clone();
        tokio::spawn(async move {
            if let Err(error) = tls.certificates().get(&id).await {
                tracing::warn!(%id, %error, "no certificate yet; it is tried again");
            }
        });
    }

    /// The pod's listeners. Every thread of the data plane accepts from each of them.
    fn listen(&self, pod: &Arc<LocalPod>, enrolment: &Enrolment) -> Result<Vec<AbortHandle>, EnrolError> {
        let mut tasks = Vec::new();
        self.accept(&mut tasks, pod, OUTBOUND_PORT, proxy::outbound::handle)?;
        self.accept(&mut tasks, pod, PLAINTEXT_PORT, proxy::plaintext::handle)?;
        self.accept(&mut tasks, pod, HBONE_PORT, proxy::inbound::handle)?;
        if enrolment.dns_capture {
            // One thread serves a pod's queries; which one differs from pod to pod.
            let worker = self.worker(pod.netns.id().inode());
            let _context = worker.enter();
            let any = any(DNS_PORT);
            let options = DatagramOptions { mark: Some(net::ZTUNNEL_MARK), ..DatagramOptions::default() };
            let udp = ProxyUdpSocket::bind(&pod.netns, any, &options)?;
            let tcp = net::listen(&pod.netns, any, &listen_options())?;
            let client = self.dns_client(enrolment);
            tasks.push(worker.spawn(self.dns.clone().serve_udp(udp, client.clone())).abort_handle());
            tasks.push(worker.spawn(self.dns.clone().serve_tcp(tcp, client)).abort_handle());
        }
        Ok(tasks)
    }

    /// One of the data plane's threads.
    fn worker(&self, number: u64) -> Handle {
        let handles = self.workers.handles();
        let index = usize::try_from(number % handles.len().max(1) as u64).unwrap_or(0);
        handles.get(index).cloned().unwrap_or_else(Handle::current)
    }

    fn accept<F, Fut>(
        &self,
        tasks: &mut Vec<AbortHandle>,
        pod: &Arc<LocalPod>,
        port: u16,
        handle: F,
    ) -> Result<(), EnrolError>
    where
        F: Fn(Arc<Proxy>, Arc<LocalPod>, TcpStream, SocketAddr) -> Fut + Clone + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let first = net::listen(&pod.netns, any(port), &listen_options())?;
        for worker in self.workers.handles() {
            // The same socket, known to each thread's own runtime.
            let shared = first.as_fd().try_clone_to_owned().map_err(EnrolError::Listener)?;
            let _context = worker.enter();
            let listener = TcpListener::from_std(shared.into()).map_err(EnrolError::Listener)?;
            let accepting = proxy::accept(self.proxy.clone(), pod.clone(), listener, handle.clone());
            tasks.push(worker.spawn(accepting).abort_handle());
        }
        Ok(())
    }

    /// The pod as the DNS proxy sees it.
    fn dns_client(&self, enrolment: &Enrolment) -> Arc<dns::Client> {
        let mesh = self.proxy.state.mesh_owned();
        let workload = mesh.workload(&enrolment.uid);
        let of = |part: fn(&model::Workload) -> &Str| workload.map_or_else(|| "".into(), |w| part(w).clone());
        self.dns.client(dns::ClientSettings {
            namespace: enrolment.namespace.clone(),
            network: of(|w| &w.network),
            addresses: enrolment.addresses.clone(),
            canonical_service: of(|w| &w.canonical_name),
            canonical_revision: of(|w| &w.canonical_revision),
            upstreams: self.upstreams.clone(),
            upstreams_from: None,
            ask_original: false,
        })
    }

    /// Whether the namespace is still the pod's and the rules are as they should be; repaired if they aren't.
    async fn verify(&self, enrolment: &Enrolment, pod: &LocalPod) -> Result<(), EnrolError> {
        let netns = Netns::open(&enrolment.netns)?;
        if !netns.same(&pod.netns) {
            return Err(EnrolError::Replaced);
        }
        let rules = rules(enrolment)?;
        let capture = self.capture.clone();
        let drift = tokio::task::spawn_blocking(move || {
            let drift = capture.verify(&netns, &rules)?;
            if !drift.is_none() {
                capture.install(&netns, &rules)?;
            }
            Ok::<_, capture::Error>(drift)
        })
        .await??;
        if !drift.is_none() {
            let pod = format_args!("{}/{}", enrolment.namespace, enrolment.name);
            tracing::warn!(%pod, %drift, "somebody changed the pod's redirection; it is restored");
            if let Some(Slot { state: PodState::Enrolled(enrolled), .. }) =
                self.pods().get_mut(&enrolment.uid)
            {
                enrolled.drifts += 1;
            }
        }
        Ok(())
    }

    /// Takes a pod out of the mesh: no more redirection, then no more listeners. Open connections go on.
    async fn un_enrol(&self, slot: Slot) {
        let Slot { enrolment, state, .. } = slot;
        let pod = format!("{}/{}", enrolment.namespace, enrolment.name);
        let netns = match &state {
            PodState::Enrolled(enrolled) => Some(enrolled.pod.netns.clone()),
            // A namespace that is gone has no rules either.
            PodState::Pending { .. } => Netns::open(&enrolment.netns).ok(),
        };
        let Some(netns) = netns else { return };
        let (capture, target) = (self.capture.clone(), netns.clone());
        match tokio::task::spawn_blocking(move || capture.remove(&target)).await {
            Ok(Ok(_)) => tracing::info!(pod, "pod un-enrolled"),
            Ok(Err(error)) => {
                tracing::error!(pod, %error, "the pod's redirection could not be removed: its traffic is refused");
            }
            Err(error) => tracing::error!(pod, %error, "un-enrolling failed"),
        }
        self.proxy.tunnels.retire(|key| key.netns == netns);
        drop(state);
    }

    /// Removes the redirection from all pods: they are outside the mesh from then on.
    pub async fn clean_up(&self) {
        let slots: Vec<Slot> = self.pods().drain().map(|(_, slot)| slot).collect();
        for slot in slots {
            self.un_enrol(slot).await;
        }
    }

    /// Ends the connections of before the enrolment that the policies of now refuse. They came without identity.
    pub async fn recheck_adopted(&self) {
        let candidates: Vec<(Str, Netns, Vec<LiveConnection>)> = self
            .pods()
            .values()
            .filter_map(|slot| match &slot.state {
                PodState::Enrolled(e) if !e.adopted.is_empty() => {
                    Some((e.pod.uid.clone(), e.pod.netns.clone(), e.adopted.clone()))
                }
                _ => None,
            })
            .collect();
        for (uid, netns, adopted) in candidates {
            let mesh = self.proxy.state.mesh_owned();
            let Some(workload) = mesh.workload(&uid).cloned() else { continue };
            let result = tokio::task::spawn_blocking(move || {
                let alive = sock_diag::connections(&netns)?;
                let mut left = Vec::new();
                for live in adopted {
                    let old = &live.connection;
                    let same = |c: &&sock_diag::Connection| c.local == old.local && c.peer == old.peer;
                    let Some(now) = alive.iter().find(same) else { continue };
                    if live.direction == Direction::Outbound {
                        left.push(live); // the destination's node decides over it
                        continue;
                    }
                    let inbound = Connection::new(None, old.peer.ip(), old.local);
                    match mesh.authorize(&workload, &inbound).outcome {
                        Ok(_) => left.push(live),
                        Err(deny) => cut_adopted(&netns, now, &deny),
                    }
                }
                std::io::Result::Ok(left)
            })
            .await;
            let Ok(Ok(left)) = result else { continue };
            if let Some(Slot { state: PodState::Enrolled(enrolled), .. }) = self.pods().get_mut(&uid) {
                enrolled.adopted = left;
            }
        }
    }

    /// Whether all pods are enrolled; else the first that isn't, and why.
    ///
    /// # Errors
    /// Not all are.
    pub fn ready(&self) -> Result<(), String> {
        let pods = self.pods();
        let pending = pods.values().find_map(|slot| match &slot.state {
            PodState::Pending { reason, .. } => Some((&slot.enrolment, reason)),
            PodState::Enrolled(_) => None,
        });
        pending.map_or(Ok(()), |(e, reason)| Err(format!("pod {}/{}: {reason}", e.namespace, e.name)))
    }

    /// How many pods are enrolled, and how many should be and are not.
    pub fn counts(&self) -> (usize, usize) {
        let pods = self.pods();
        let enrolled = pods.values().filter(|s| matches!(s.state, PodState::Enrolled(_))).count();
        (enrolled, pods.len() - enrolled)
    }

    /// Connections of before the enrolment that were alive when they were last looked at.
    pub fn adopted(&self) -> usize {
        let alive = |slot: &Slot| match &slot.state {
            PodState::Enrolled(enrolled) => enrolled.adopted.len(),
            PodState::Pending { .. } => 0,
        };
        self.pods().values().map(alive).sum()
    }

    /// The diagnostics of the configuration, as the admin page shows them.
    pub fn set_diagnostics(&self, diagnostics: Value) {
        *self.diagnostics.lock().unwrap_or_else(PoisonError::into_inner) = diagnostics;
    }

    /// See [`Node::set_diagnostics`].
    pub fn diagnostics(&self) -> Value {
        self.diagnostics.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The capture state of each pod as JSON.
    pub fn dump(&self) -> Value {
        let pods = self.pods();
        let mut list: Vec<_> = pods.values().collect();
        list.sort_by(|a, b| a.enrolment.uid.cmp(&b.enrolment.uid));
        list.into_iter().map(|slot| slot.dump(self.capture.backend().as_str())).collect()
    }
}

impl Slot {
    fn failed(&mut self, enrolment: &Enrolment, error: &EnrolError) {
        let failures = match &self.state {
            PodState::Pending { failures, .. } => failures + 1,
            PodState::Enrolled(_) => 1,
        };
        let wait = RECONCILE_INTERVAL * 2_u32.pow(failures.min(6) - 1);
        if failures == 1 {
            let pod = format_args!("{}/{}", enrolment.namespace, enrolment.name);
            tracing::error!(%pod, netns = %enrolment.netns.display(), %error, "the pod is not enrolled; trying again");
        }
        let retry_at = Instant::now() + wait;
        self.state = PodState::Pending { failures, reason: error.to_string(), retry_at };
    }

    fn dump(&self, backend: &str) -> Value {
        let e = &self.enrolment;
        let mut pod = json!({
            "uid": &*e.uid,
            "namespace": &*e.namespace,
            "name": &*e.name,
            "netns": e.netns,
            "addresses": e.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "dnsCapture": e.dns_capture,
            "bypassInbound": e.bypass_inbound,
        });
        let state = match &self.state {
            PodState::Pending { failures, reason, .. } => {
                json!({ "state": "pending", "failures": failures, "reason": reason })
            }
            PodState::Enrolled(enrolled) => json!({
                "state": "enrolled",
                "capture": backend,
                "ipv6": format!("{:?}", enrolled.ipv6),
                "openConnections": enrolled.pod.open(),
                "drifts": enrolled.drifts,
                "connectionsFromBefore": enrolled.adopted.iter().map(|c| json!({
                    "local": c.connection.local.to_string(),
                    "peer": c.connection.peer.to_string(),
                    "direction": format!("{:?}", c.direction).to_lowercase(),
                })).collect::<Vec<_>>(),
            }),
        };
        if let (Value::Object(pod), Value::Object(state)) = (&mut pod, state) {
            pod.extend(state);
        }
        pod
    }
}

fn cut_adopted(netns: &Netns, connection: &sock_diag::Connection, deny: &model::Deny) {
    let (local, peer) = (connection.local, connection.peer);
    match sock_diag::destroy(netns, connection) {
        Ok(()) => tracing::info!(%local, %peer, reason = %deny, "cut a connection of before the enrolment"),
        Err(error) => {
            tracing::error!(%local, %peer, %error, reason = %deny, "a connection of before the enrolment can't be cut");
        }
    }
}

/// All addresses of both families.
fn any(port: u16) -> SocketAddr {
    SocketAddr::from(([0_u16; 8], port))
}

fn listen_options() -> ListenOptions {
    ListenOptions { mark: Some(net::ZTUNNEL_MARK), ..ListenOptions::default() }
}

/// The rules that a pod's enrolment asks for.
fn rules(enrolment: &Enrolment) -> Result<Rules, EnrolError> {
    let ports = |list: &[config::kinds::PortRange]| -> Result<Vec<PortRange>, EnrolError> {
        let range = |p: &config::kinds::PortRange| {
            PortRange::new(p.first, p.last)
                .ok_or_else(|| EnrolError::Exclusion(format!("{}-{}", p.first, p.last)))
        };
        list.iter().map(range).collect()
    };
    let e = &enrolment.exclusions;
    let interface =
        |name: &Str| InterfaceName::new(name).ok_or_else(|| EnrolError::Exclusion(name.to_string()));
    Ok(Rules {
        dns: enrolment.dns_capture,
        bypass_inbound: enrolment.bypass_inbound,
        include_inbound_ports: match &e.include_inbound_ports {
            None => Include::All,
            Some(list) => Include::Only(ports(list)?),
        },
        exclude_inbound_ports: ports(&e.exclude_inbound_ports)?,
        include_outbound_ports: ports(&e.include_outbound_ports)?,
        exclude_outbound_ports: ports(&e.exclude_outbound_ports)?,
        include_outbound_ranges: e
            .include_outbound_ranges
            .as_ref()
            .map_or(Include::All, |l| Include::Only(l.to_vec())),
        exclude_outbound_ranges: e.exclude_outbound_ranges.to_vec(),
        exclude_interfaces: e.exclude_interfaces.iter().map(interface).collect::<Result<_, _>>()?,
        ..Rules::default()
    })
}
