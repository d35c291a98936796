//! Pods by ZDS: the node agent says which pods are in the mesh, and hands over their network namespaces
//! (facts: ZDS; `proto/istio/zds.proto`).
//!
//! ```text
//! connect --hello--> AddWorkload | KeepWorkload ... SnapshotSent --> AddWorkload | DelWorkload ... --> the agent is gone
//!    ^                        (what is not mentioned is dropped)                                             |
//!    +------------------------------------ all pods are kept meanwhile ---------------------------------------+
//! ```
//!
//! Each message is answered before the next one comes: a pod begins when its listeners stand. An answer that would come
//! too late says so; the work goes on, and the agent's next try finds it done.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use config::kinds::Capture;
use model::{SpiffeId, Str, TrustDomain};
use net::Netns;
use net::seqpacket::{Packet, Seqpacket};
use process::readiness::Condition;
use process::shutdown::Shutdown;
use prost::Message as _;
use proto::wire::zds::workload_request::Payload;
use proto::wire::zds::{
    Ack, AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response,
};
use tokio::time::{Instant, timeout};

use crate::node::{Enrolment, EnrolmentChange, Place, Work};
use crate::proxy::pod::{Claim, Subject};

/// A longer message is refused. Istio's proxies take 1024 bytes.
const MESSAGE_LIMIT: usize = 4096;
/// Bytes of what an answer says: agents take packets of 1024.
const ERROR_LIMIT: usize = 900;
/// More pods are refused; the kubelet allows 110 by default.
const PODS_LIMIT: usize = 4096;
/// The agent waits for 5 s (facts: ZDS); an answer that says why is worth more than none.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);
/// Between attempts to reach the agent: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// A connection that lived so long was a good one: the next attempt need not wait.
const GOOD: Duration = Duration::from_secs(10);

/// Where this process is: what workloads of this node have in common.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Here {
    /// The node.
    pub node: Str,
    /// Its cluster.
    pub cluster: Str,
    /// The network of its pods.
    pub network: Str,
}

/// How it goes with the agent, for metrics and the admin page.
#[derive(Default, Debug)]
pub struct ZdsStatus {
    connected: AtomicBool,
    connections: AtomicU64,
    messages: AtomicU64,
    refused: AtomicU64,
    pods: AtomicUsize,
}

impl ZdsStatus {
    /// Whether the agent is there.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Connections to the agent that were made.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Messages of the agent.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    /// Messages that were answered with an error.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Pods that the agent has told of.
    pub fn pods(&self) -> usize {
        self.pods.load(Ordering::Relaxed)
    }
}

/// The connection to the agent.
pub struct Zds {
    socket: PathBuf,
    here: Here,
    work: Arc<Work>,
    status: Arc<ZdsStatus>,
    /// Holds from the first whole snapshot on.
    complete: Condition,
    /// The pods that the agent has told of.
    known: HashSet<Str>,
}

impl Zds {
    /// Of the agent that listens at `socket`. `complete` holds when it has told of all pods once.
    pub fn new(
        socket: PathBuf,
        here: Here,
        work: Arc<Work>,
        status: Arc<ZdsStatus>,
        complete: Condition,
    ) -> Self {
        complete.fails(format!("the node agent has not been reached yet at {}", socket.display()));
        Self { socket, here, work, status, complete, known: HashSet::new() }
    }

    /// Does what the agent says, until the process drains: a successor is told then.
    pub async fn run(mut self, shutdown: Shutdown) {
        tokio::select! {
            () = shutdown.draining() => {}
            () = self.follow() => {}
        }
        self.status.connected.store(false, Ordering::Relaxed);
    }

    async fn follow(&mut self) {
        let (mut wait, mut is_told) = (RETRY.0, false);
        loop {
            let started = Instant::now();
            let outcome = match self.connect() {
                Ok(socket) => {
                    tracing::info!(socket = %self.socket.display(), "the node agent is there");
                    self.status.connections.fetch_add(1, Ordering::Relaxed);
                    self.status.connected.store(true, Ordering::Relaxed);
                    is_told = false;
                    self.session(&socket).await
                }
                Err(error) => Err(error),
            };
            self.status.connected.store(false, Ordering::Relaxed);
            if !std::mem::replace(&mut is_told, true) {
                let (socket, pods) = (self.socket.display(), self.known.len());
                match outcome {
                    Ok(()) => tracing::warn!(%socket, pods, "the node agent has gone; its pods stay"),
                    Err(error) => {
                        tracing::warn!(%socket, pods, %error, "no connection to the node agent; trying again");
                    }
                }
            }
            wait = if started.elapsed() > GOOD { RETRY.0 } else { (wait * 2).min(RETRY.1) };
            tokio::time::sleep(wait).await;
        }
    }

    fn connect(&self) -> io::Result<Seqpacket> {
        let socket = Seqpacket::connect(&self.socket)?;
        // Who says which pods are who must be as privileged as we are.
        let (user, process) = socket.peer()?;
        let own = nix::unistd::geteuid().as_raw();
        if user != 0 && user != own {
            let what = format!("process {process} of user {user} listens there, which is not the node agent");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        Ok(socket)
    }

    /// One connection, to its end.
    async fn session(&mut self, socket: &Seqpacket) -> io::Result<()> {
        let hello = ZdsHello { version: Version::V1.into(), culvert_capture: true };
        socket.send(&hello.encode_to_vec(), None).await?;
        // The pods that this snapshot mentions; `None` when it is over.
        let mut snapshot = Some(HashSet::new());
        while let Some(packet) = socket.receive(MESSAGE_LIMIT).await? {
            self.status.messages.fetch_add(1, Ordering::Relaxed);
            let mut error = self.message(packet, &mut snapshot).await.err().unwrap_or_default();
            if !error.is_empty() {
                self.status.refused.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(error, "what the node agent asked for was not done");
            }
            self.status.pods.store(self.known.len(), Ordering::Relaxed);
            error.truncate(error.floor_char_boundary(ERROR_LIMIT));
            let ack = workload_response::Payload::Ack(Ack { error });
            let answer = WorkloadResponse { payload: Some(ack) };
            socket.send(&answer.encode_to_vec(), None).await?;
        }
        Ok(())
    }

    async fn message(&mut self, packet: Packet, snapshot: &mut Option<HashSet<Str>>) -> Result<(), String> {
        let request = WorkloadRequest::decode(packet.bytes.as_slice())
            .map_err(|error| format!("not a WorkloadRequest: {error}"))?;
        let mut mention = |key: &Str| {
            if let Some(mentioned) = snapshot {
                mentioned.insert(key.clone());
            }
        };
        match request.payload {
            Some(Payload::Add(add)) => {
                // Also when it fails: the pod is there, and what is served of it goes on.
                mention(&add.uid.as_str().into());
                let enrolment = self.enrolment(add, packet.descriptor)?;
                self.add(enrolment).await
            }
            Some(Payload::Keep(keep)) => {
                let key: Str = keep.uid.as_str().into();
                mention(&key);
                if self.known.contains(&key) {
                    return Ok(());
                }
                Err(format!("pod {key} can't be kept: it is not served, and its network namespace is needed"))
            }
            Some(Payload::Del(del)) => {
                let key: Str = del.uid.as_str().into();
                if !self.known.remove(&key) {
                    return Ok(());
                }
                in_time(self.work.done(EnrolmentChange::Remove(key))).await
            }
            Some(Payload::SnapshotSent(_)) => {
                let mentioned = snapshot.take().ok_or("SnapshotSent came twice")?;
                let gone: Vec<Str> = self.known.extract_if(|key| !mentioned.contains(key)).collect();
                tracing::info!(
                    pods = self.known.len(),
                    gone = gone.len(),
                    "the node agent has told of all pods"
                );
                self.work.add(gone.into_iter().map(EnrolmentChange::Remove));
                self.complete.holds();
                Ok(())
            }
            None => Err("a message of a kind that is not known: is the node agent a newer one?".into()),
        }
    }

    async fn add(&mut self, enrolment: Enrolment) -> Result<(), String> {
        if self.known.len() >= PODS_LIMIT && !self.known.contains(&enrolment.key) {
            return Err(format!("there are {PODS_LIMIT} pods already, which is the limit"));
        }
        self.known.insert(enrolment.key.clone());
        in_time(self.work.done(EnrolmentChange::Set(Box::new(enrolment)))).await
    }

    /// What an `AddWorkload` asks for.
    fn enrolment(&self, add: AddWorkload, netns: Option<OwnedFd>) -> Result<Enrolment, String> {
        let key: Str = match add.uid.as_str() {
            "" => return Err("AddWorkload without a uid".into()),
            uid => uid.into(),
        };
        let info = add.workload_info.ok_or_else(|| format!("pod {key}: without workload_info"))?;
        let account = if info.service_account.is_empty() { "default" } else { &info.service_account };
        let (namespace, name, account): (Str, Str, Str) =
            (info.namespace.as_str().into(), info.name.as_str().into(), account.into());
        SpiffeId::new(TrustDomain::cluster_local(), namespace.clone(), account.clone())
            .map_err(|error| format!("pod {key}: {error}"))?;
        if name.is_empty() {
            return Err(format!("pod {key}: without a name"));
        }
        let netns =
            netns.ok_or_else(|| format!("pod {key}: no descriptor of its network namespace came along"))?;
        let netns = Netns::from_fd(netns, &format!("pod {namespace}/{name}")).map_err(|e| e.to_string())?;
        let capture = Capture::of_annotations(&add.culvert_capture).map_err(|e| format!("pod {key}: {e}"))?;
        let Here { node, cluster, network } = self.here.clone();
        let uid = format!("{cluster}//Pod/{namespace}/{name}").into();
        let claim = Claim {
            namespace: namespace.clone(),
            name: name.clone(),
            service_account: account,
            node,
            cluster,
            network,
        };
        Ok(Enrolment {
            key,
            subject: Subject { uid, claim: Some(Arc::new(claim)) },
            namespace,
            name,
            netns: Place::Open(netns),
            addresses: None,
            exclusions: capture.exclusions,
            // Where it is not captured, nobody asks.
            dns_capture: true,
            bypass_inbound: capture.bypass_inbound,
        })
    }
}

async fn in_time(done: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    match timeout(ANSWER_WITHIN, done).await {
        Ok(outcome) => outcome,
        Err(_) => Err(format!("not done within {ANSWER_WITHIN:?}; it goes on")),
    }
}
