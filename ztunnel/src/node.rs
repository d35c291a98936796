//! The pods of this node: each is enrolled (listeners, then redirection), kept so, and let go.
//!
//! ```text
//!            netns, listeners, rules        manifest gone, or no longer in the mesh
//!   Pending ------------------------> Enrolled ------------------------------------> gone
//!      ^  | failed: say why, try again   |
//!      |  +------------------------------+ the namespace is another one, or what listens changes
//! ```
//!
//! Order matters. Listeners stand before the redirection does, so that no connection meets a closed port; on a
//! restart the redirection stands already, and refuses until the listeners are there. A pod keeps what it has when
//! something fails: neither a rule nor a listener goes because of that.
//!
//! One task does all the work on pods; only [`Node::recheck_adopted`] may run beside it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capture::{Capture, Cut, Direction, Include, InterfaceName, LiveConnection, PortRange, Rules, Tuple};
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
/// More connections of before the enrolment are not kept account of; they go on all the same. Incoming ones, which
/// policies may refuse, come first.
const ADOPTED_LIMIT: usize = 65_536;
/// How soon they are compared again when that failed.
const TROUBLE_INTERVAL: Duration = Duration::from_secs(5);
/// For the tasks of listeners to end when they are told to.
const CLOSING_LIMIT: Duration = Duration::from_secs(1);

/// This node's pods.
pub struct Node {
    proxy: Arc<Proxy>,
    capture: Arc<dyn Capture>,
    dns: Arc<DnsProxy>,
    upstreams: Arc<Upstreams>,
    /// Where connections are carried; this module itself runs on the control runtime.
    workers: Arc<Workers>,
    pods: Mutex<HashMap<Str, Slot>>,
    /// Pods that left the mesh and have open connections.
    leaving: Mutex<Vec<(Arc<str>, Arc<LocalPod>)>>,
    started: AtomicU64,
    stopped: AtomicU64,
    diagnostics: Mutex<Value>,
}

struct Slot {
    enrolment: Enrolment,
    state: PodState,
}

enum PodState {
    Pending { failures: u32, reason: String, retry_at: Instant },
    Enrolled(Box<Enrolled>),
}

/// An enrolled pod. Dropping it closes the listeners; open connections go on.
struct Enrolled {
    pod: Arc<LocalPod>,
    accepting: Vec<AbortHandle>,
    /// What is installed.
    rules: Rules,
    ipv6: capture::Ipv6,
    /// When the rules are compared with what they should be.
    verify_at: Instant,
    /// Why they can't be.
    trouble: Option<String>,
    /// Connections of before the enrolment that are still alive.
    adopted: Vec<LiveConnection>,
    drifts: u64,
}

impl Enrolled {
    /// Closes the listeners, and waits for it: the ports are free then.
    async fn close(self) {
        let tasks = self.accepting.clone();
        drop(self);
        let closed = async {
            while !tasks.iter().all(AbortHandle::is_finished) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        // A thread that hangs is another trouble; binding will say so.
        let _ = tokio::time::timeout(CLOSING_LIMIT, closed).await;
    }
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        self.accepting.iter().for_each(AbortHandle::abort);
    }
}

/// What looking at an enrolled pod's rules came to.
enum Verified {
    /// They are as they should be.
    Standing,
    /// They are others now, with the connections that these find alive.
    Changed(Box<Rules>, Vec<LiveConnection>),
    /// Somebody had changed them.
    Restored(capture::Drift),
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
    #[error("the network namespace is ztunnel's own: to capture its traffic would be to cut the node off")]
    Own,
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
            leaving: Mutex::default(),
            started: AtomicU64::new(0),
            stopped: AtomicU64::new(0),
            diagnostics: Mutex::new(Value::Array(Vec::new())),
        }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<Str, Slot>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<(Arc<str>, Arc<LocalPod>)>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows changes of the configuration.
    pub async fn apply(self: &Arc<Self>, changes: impl IntoIterator<Item = EnrolmentChange>) {
        let mut left = Vec::new();
        for change in changes {
            match change {
                EnrolmentChange::Set(enrolment) => left.extend(self.set(*enrolment)),
                EnrolmentChange::Remove(uid) => left.extend(self.pods().remove(&uid)),
            }
        }
        for slot in left {
            self.un_enrol(slot).await;
        }
        self.reconcile().await;
        // What a pod's policies refuse they refuse from its first moment in the mesh.
        self.recheck_adopted().await;
    }

    /// Notes what is to be. Returns what has to go first.
    fn set(&self, enrolment: Enrolment) -> Option<Slot> {
        let mut pods = self.pods();
        let now = Instant::now();
        let pending = || PodState::Pending { failures: 0, reason: "new".into(), retry_at: now };
        let Some(slot) = pods.get_mut(&enrolment.uid) else {
            pods.insert(enrolment.uid.clone(), Slot { enrolment, state: pending() });
            return None;
        };
        if slot.enrolment == enrolment {
            return None;
        }
        let old = std::mem::replace(&mut slot.enrolment, enrolment);
        let new = &slot.enrolment;
        let listens_alike = old.netns == new.netns
            && old.dns_capture == new.dns_capture
            && old.addresses == new.addresses
            && old.namespace == new.namespace;
        match &mut slot.state {
            // Other rules, which replace the old ones without a gap.
            PodState::Enrolled(enrolled) if listens_alike => {
                enrolled.verify_at = now;
                None
            }
            state => Some(Slot { enrolment: old, state: std::mem::replace(state, pending()) }),
        }
    }

    /// Enrols what is not, and looks after what is.
    pub async fn reconcile(self: &Arc<Self>) {
        self.release_left().await;
        let now = Instant::now();
        let is_due = |slot: &&Slot| match &slot.state {
            PodState::Pending { retry_at, .. } => *retry_at <= now,
            // A pod that began anew under its name must not wait long: it is not captured yet.
            PodState::Enrolled(enrolled) => enrolled.verify_at <= now || slot.is_elsewhere(),
        };
        let due: Vec<Enrolment> =
            self.pods().values().filter(is_due).map(|slot| slot.enrolment.clone()).collect();
        let mut tasks = tokio::task::JoinSet::new();
        for enrolment in due {
            let node = self.clone();
            tasks.spawn(async move { node.look_after(enrolment).await });
        }
        while tasks.join_next().await.is_some() {}
    }

    async fn look_after(self: Arc<Self>, enrolment: Enrolment) {
        let standing = match self.pods().get(&enrolment.uid) {
            Some(slot) if slot.is_elsewhere() => None,
            Some(Slot { state: PodState::Enrolled(e), .. }) => Some((e.pod.clone(), e.rules.clone())),
            _ => None,
        };
        if let Some((pod, installed)) = standing {
            let outcome = self.verify(&enrolment, &pod.netns, installed).await;
            if let Some(slot) = self.pods().get_mut(&enrolment.uid) {
                slot.verified(outcome);
            }
        } else {
            let outcome = self.enrol(&enrolment).await;
            if let Some(slot) = self.pods().get_mut(&enrolment.uid) {
                match outcome {
                    Ok(enrolled) => slot.state = PodState::Enrolled(Box::new(enrolled)),
                    Err(error) => slot.failed(&error),
                }
            }
        }
    }

    /// Listeners, then redirection, then the connections that lived before.
    async fn enrol(&self, enrolment: &Enrolment) -> Result<Enrolled, EnrolError> {
        let netns = Netns::open(&enrolment.netns)?;
        if netns.same(&Netns::current()?) {
            return Err(EnrolError::Own);
        }
        let rules = rules(enrolment)?;
        let pod = self.returning(&enrolment.uid, &netns);
        let pod = pod.unwrap_or_else(|| Arc::new(LocalPod::new(enrolment.uid.clone(), netns.clone())));
        self.prepare_certificate(&pod);
        // Closes what listens already when something fails from here on.
        let mut enrolled = Enrolled {
            accepting: Vec::new(),
            pod: pod.clone(),
            rules: rules.clone(),
            ipv6: capture::Ipv6::Absent,
            verify_at: Instant::now() + VERIFY_INTERVAL,
            trouble: None,
            adopted: Vec::new(),
            drifts: 0,
        };
        self.listen(&mut enrolled.accepting, &pod, enrolment)?;
        let capture = self.capture.clone();
        let installed = tokio::task::spawn_blocking(move || {
            let installed = capture.install(&netns, &rules)?;
            Ok::<_, capture::Error>((installed, before(&netns, &rules)))
        });
        let (installed, adopted) = installed.await??;
        (enrolled.ipv6, enrolled.adopted) = (installed.ipv6, adopted);
        self.started.fetch_add(1, Ordering::Relaxed);
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
    fn listen(
        &self,
        tasks: &mut Vec<AbortHandle>,
        pod: &Arc<LocalPod>,
        enrolment: &Enrolment,
    ) -> Result<(), EnrolError> {
        self.accept(tasks, pod, OUTBOUND_PORT, proxy::outbound::handle)?;
        self.accept(tasks, pod, PLAINTEXT_PORT, proxy::plaintext::handle)?;
        self.accept(tasks, pod, HBONE_PORT, proxy::inbound::handle)?;
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
        Ok(())
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

    /// Sees to it that the rules are as they should be. `installed` are those that were.
    async fn verify(
        &self,
        enrolment: &Enrolment,
        netns: &Netns,
        installed: Rules,
    ) -> Result<Verified, EnrolError> {
        let wanted = Rules { refused: installed.refused.clone(), ..rules(enrolment)? };
        let (capture, netns) = (self.capture.clone(), netns.clone());
        let verified = tokio::task::spawn_blocking(move || {
            if wanted != installed {
                capture.install(&netns, &wanted)?;
                let adopted = before(&netns, &wanted);
                return Ok(Verified::Changed(Box::new(wanted), adopted));
            }
            let drift = capture.verify(&netns, &wanted)?;
            if drift.is_none() {
                return Ok(Verified::Standing);
            }
            capture.install(&netns, &wanted)?;
            Ok::<_, capture::Error>(Verified::Restored(drift))
        })
        .await??;
        let pod = format_args!("{}/{}", enrolment.namespace, enrolment.name);
        match &verified {
            Verified::Standing => {}
            Verified::Changed(..) => tracing::info!(%pod, "the pod's redirection follows its manifest"),
            Verified::Restored(drift) => {
                tracing::warn!(%pod, %drift, "somebody changed the pod's redirection; it is restored");
            }
        }
        Ok(verified)
    }

    /// Takes a pod out of the mesh: no more redirection, then no more listeners. Open connections go on.
    async fn un_enrol(&self, slot: Slot) {
        let Slot { enrolment, state } = slot;
        let pod: Arc<str> = format!("{}/{}", enrolment.namespace, enrolment.name).into();
        let enrolled = match state {
            PodState::Enrolled(enrolled) => enrolled,
            PodState::Pending { .. } => {
                // A namespace that is gone has no rules either.
                if let Ok(netns) = Netns::open(&enrolment.netns) {
                    self.release(&pod, &netns).await;
                }
                return;
            }
        };
        self.stopped.fetch_add(1, Ordering::Relaxed);
        let (local, rules) = (enrolled.pod.clone(), Rules { leaving: true, ..enrolled.rules.clone() });
        self.proxy.tunnels.retire(|key| key.netns == local.netns);
        if local.open() == 0 {
            self.release(&pod, &local.netns).await;
        } else {
            self.leave(pod, local, rules).await;
        }
        enrolled.close().await;
    }

    /// Captures nothing new of a pod that left, and keeps up what its open connections need.
    async fn leave(&self, pod: Arc<str>, local: Arc<LocalPod>, rules: Rules) {
        if !self.is_claimed(&local.netns) {
            let (capture, netns) = (self.capture.clone(), local.netns.clone());
            match flatten(tokio::task::spawn_blocking(move || capture.install(&netns, &rules)).await) {
                Ok(_) => {
                    tracing::info!(%pod, connections = local.open(), "pod leaves; its connections go on");
                }
                Err(error) => tracing::error!(%pod, %error, "the pod's new connections are refused"),
            }
        }
        self.leaving().push((pod, local));
    }

    /// The pod as it was before it left, if it has open connections of that time.
    fn returning(&self, uid: &Str, netns: &Netns) -> Option<Arc<LocalPod>> {
        let mut leaving = self.leaving();
        let found = leaving.iter().position(|(_, pod)| pod.uid == *uid && pod.netns.same(netns))?;
        Some(leaving.swap_remove(found).1)
    }

    /// Removes the redirection of a namespace, unless it is another pod's by now: removed, it would leave that one
    /// open until it is restored.
    async fn release(&self, pod: &str, netns: &Netns) {
        if self.is_claimed(netns) {
            tracing::info!(pod, %netns, "pod un-enrolled; another has its network namespace");
            return;
        }
        let (capture, target) = (self.capture.clone(), netns.clone());
        match flatten(tokio::task::spawn_blocking(move || capture.remove(&target)).await) {
            Ok(_) => tracing::info!(pod, "pod un-enrolled"),
            Err(error) => {
                tracing::error!(pod, %error, "the pod's redirection could not be removed: its traffic is refused");
            }
        }
    }

    /// Removes what is left of the redirection of pods that left the mesh and have no open connections any more.
    async fn release_left(&self) {
        let over: Vec<_> = self.leaving().extract_if(.., |(_, local)| local.open() == 0).collect();
        for (pod, local) in over {
            self.release(&pod, &local.netns).await;
        }
    }

    /// Whether a pod that is or should be enrolled has this namespace.
    fn is_claimed(&self, netns: &Netns) -> bool {
        self.pods().values().any(|slot| match &slot.state {
            PodState::Enrolled(enrolled) if enrolled.pod.netns.same(netns) => true,
            _ => Netns::open(&slot.enrolment.netns).is_ok_and(|its| its.same(netns)),
        })
    }

    /// Removes the redirection from all pods: they are outside the mesh from then on.
    pub async fn clean_up(&self) {
        let slots: Vec<Slot> = self.pods().drain().map(|(_, slot)| slot).collect();
        for slot in slots {
            self.un_enrol(slot).await;
        }
        let left = std::mem::take(&mut *self.leaving());
        for (pod, local) in left {
            self.release(&pod, &local.netns).await;
        }
    }

    /// Ends the connections of before the enrolment that the policies of now refuse. They came without identity.
    pub async fn recheck_adopted(&self) {
        let candidates: Vec<(Str, Netns, Rules, Vec<LiveConnection>)> = self
            .pods()
            .values()
            .filter_map(|slot| match &slot.state {
                PodState::Enrolled(e) if !e.adopted.is_empty() || !e.rules.refused.is_empty() => {
                    Some((e.pod.uid.clone(), e.pod.netns.clone(), e.rules.clone(), e.adopted.clone()))
                }
                _ => None,
            })
            .collect();
        for (uid, netns, mut rules, adopted) in candidates {
            let mesh = self.proxy.state.mesh_owned();
            let Some(workload) = mesh.workload(&uid).cloned() else { continue };
            let capture = self.capture.clone();
            let result = tokio::task::spawn_blocking(move || {
                let alive = alive(&netns)?;
                rules.refused.retain(|tuple| alive.contains_key(&(tuple.local, tuple.peer)));
                let mut left = Vec::new();
                for live in adopted {
                    let old = &live.connection;
                    let Some(now) = alive.get(&(old.local, old.peer)) else { continue };
                    let inbound = Connection::new(None, old.peer.ip(), old.local);
                    let denied = match live.direction {
                        Direction::Outbound => None, // the destination's node decides over it
                        Direction::Inbound => mesh.authorize(&workload, &inbound).outcome.err(),
                    };
                    if denied.is_none_or(|deny| !cut_adopted(&*capture, &netns, &mut rules, now, &deny)) {
                        left.push(live);
                    }
                }
                std::io::Result::Ok((left, rules.refused))
            })
            .await;
            match result {
                Ok(Ok((left, refused))) => {
                    if let Some(Slot { state: PodState::Enrolled(e), .. }) = self.pods().get_mut(&uid) {
                        (e.adopted, e.rules.refused) = (left, refused);
                    }
                }
                Ok(Err(error)) => {
                    tracing::error!(pod = %uid, %error, "connections of before the enrolment can't be looked at");
                }
                Err(error) => tracing::error!(pod = %uid, %error, "looking at connections failed"),
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

    /// How many pods were enrolled, and un-enrolled, since the start.
    pub fn totals(&self) -> (u64, u64) {
        (self.started.load(Ordering::Relaxed), self.stopped.load(Ordering::Relaxed))
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
    /// Whether the pod has another network namespace than the one that it is enrolled in.
    fn is_elsewhere(&self) -> bool {
        match &self.state {
            PodState::Enrolled(enrolled) => {
                Netns::open(&self.enrolment.netns).is_ok_and(|now| !now.same(&enrolled.pod.netns))
            }
            PodState::Pending { .. } => false,
        }
    }

    fn failed(&mut self, error: &EnrolError) {
        let enrolment = &self.enrolment;
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

    /// Notes what came of looking at the pod. What stands stays, whatever went wrong.
    fn verified(&mut self, outcome: Result<Verified, EnrolError>) {
        let PodState::Enrolled(enrolled) = &mut self.state else { return };
        enrolled.verify_at = Instant::now() + VERIFY_INTERVAL;
        let trouble = match outcome {
            Ok(Verified::Standing) => None,
            Ok(Verified::Changed(rules, adopted)) => {
                (enrolled.rules, enrolled.adopted) = (*rules, adopted);
                None
            }
            Ok(Verified::Restored(_)) => {
                enrolled.drifts += 1;
                None
            }
            Err(error) => {
                enrolled.verify_at = Instant::now() + TROUBLE_INTERVAL;
                Some(error.to_string())
            }
        };
        if trouble != enrolled.trouble {
            let pod = format_args!("{}/{}", self.enrolment.namespace, self.enrolment.name);
            match &trouble {
                Some(error) => {
                    tracing::error!(%pod, error, "the pod's redirection can't be looked at; it stays as it was");
                }
                None => tracing::info!(%pod, "the pod's redirection is as it should be again"),
            }
        }
        enrolled.trouble = trouble;
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
                "trouble": enrolled.trouble,
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

/// Whether it is cut. `rules` are those that are installed, and are changed where the kernel can't end connections.
fn cut_adopted(
    capture: &dyn Capture,
    netns: &Netns,
    rules: &mut Rules,
    connection: &sock_diag::Connection,
    deny: &model::Deny,
) -> bool {
    let (local, peer) = (connection.local, connection.peer);
    match capture::cut(capture, netns, rules, connection) {
        Ok(Cut::Ended) => {
            tracing::info!(%local, %peer, reason = %deny, "cut a connection of before the enrolment");
        }
        Ok(Cut::Refused) => {
            tracing::info!(%local, %peer, reason = %deny, "a connection of before the enrolment ends with its next packet");
        }
        Err(error) => {
            rules.refused.retain(|tuple| *tuple != Tuple { local, peer });
            tracing::error!(%local, %peer, %error, reason = %deny, "a connection of before the enrolment can't be cut");
            return false;
        }
    }
    true
}

/// The connections of a namespace by their ends.
fn alive(netns: &Netns) -> std::io::Result<HashMap<(SocketAddr, SocketAddr), sock_diag::Connection>> {
    Ok(sock_diag::connections(netns)?.into_iter().map(|c| ((c.local, c.peer), c)).collect())
}

/// The connections that go past ztunnel because they are older than the rules, not because these exempt them.
fn before(netns: &Netns, rules: &Rules) -> Vec<LiveConnection> {
    let mut found = match capture::live_connections(netns, &rules.ports) {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%netns, %error, "connections of before the enrolment can't be listed: they go on");
            return Vec::new();
        }
    };
    found.retain(|live| rules.capture(live.direction, live.connection.local, live.connection.peer));
    if found.len() > ADOPTED_LIMIT {
        tracing::warn!(%netns, connections = found.len(), kept = ADOPTED_LIMIT, "too many of before the enrolment");
        found.sort_by_key(|live| live.direction == Direction::Outbound);
        found.truncate(ADOPTED_LIMIT);
    }
    found
}

/// One error for what failed and what did not get to its end.
fn flatten<T>(result: Result<Result<T, capture::Error>, tokio::task::JoinError>) -> Result<T, EnrolError> {
    Ok(result??)
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
