//! One ztunnel.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use net::seqpacket::Seqpacket;
use prost::Message;
use proto::wire::zds::workload_request::Payload;
use proto::wire::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, Version, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, ZdsHello, workload_response,
};
use tokio::time::Instant;

use super::{Peer, PodIdentity, Served, Ztunnels};

/// The largest packet, either way; but see [`CAPTURE_LIMIT`].
const PACKET_LIMIT: usize = 1024;
/// The largest packet with annotations, which go to Culvert's ztunnel only.
const CAPTURE_LIMIT: usize = 4096;
/// What a request takes around its content.
const ENVELOPE: usize = 16;
/// For a hello and for an acknowledgement.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Until what was refused is sent again; doubled each time.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("it closed the connection")]
    Closed,
    #[error("no answer within {ANSWER_LIMIT:?}")]
    Silent,
    #[error("it sent what it should not: {0}")]
    Protocol(String),
    #[error("{0}")]
    Socket(#[from] io::Error),
}

/// What is to be done next.
enum Step {
    Remove(String),
    Add(Box<Served>),
    /// Nothing until something changes, or this moment.
    Wait(Option<Instant>),
}

pub(super) struct Connection {
    ztunnels: Ztunnels,
    socket: Seqpacket,
    id: u64,
    /// Whether it wants to be told what of a pod's traffic is not captured.
    wants_capture: bool,
    /// When what was refused is tried again, and how often it was.
    retries: HashMap<String, (Instant, u32)>,
    /// What was refused: its ztunnel knows of it all the same.
    tried: HashSet<String>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let id = self.id;
        self.ztunnels.change(|state| state.peers.retain(|peer| peer.id != id));
    }
}

impl Connection {
    pub(super) fn new(ztunnels: Ztunnels, socket: Seqpacket) -> Self {
        // It is none of the peers before it has said hello.
        Self { ztunnels, socket, id: 0, wants_capture: false, retries: HashMap::new(), tried: HashSet::new() }
    }

    pub(super) async fn run(mut self) {
        let process = self.socket.peer().map_or(0, |(_, process)| process);
        let ended = match self.serve().await {
            Ok(never) => match never {},
            Err(ended) => ended,
        };
        tracing::warn!(process, reason = %ended, "ztunnel disconnected");
    }

    async fn serve(&mut self) -> Result<std::convert::Infallible, Ended> {
        self.hello().await?;
        self.snapshot().await?;
        let mut changes = self.ztunnels.changed.subscribe();
        loop {
            changes.borrow_and_update();
            match self.next() {
                Step::Remove(uid) => self.remove(&uid).await?,
                Step::Add(pod) => self.add(&pod).await?,
                Step::Wait(until) => {
                    let until = until.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
                    tokio::select! {
                        _ = changes.changed() => {}
                        () = tokio::time::sleep_until(until) => {}
                        unasked = self.socket.receive(PACKET_LIMIT) => {
                            return Err(match unasked? {
                                None => Ended::Closed,
                                Some(_) => Ended::Protocol("a message that nothing was asked for".to_owned()),
                            });
                        }
                    }
                }
            }
        }
    }

    async fn hello(&mut self) -> Result<(), Ended> {
        let hello = ZdsHello::decode(&*self.receive().await?)
            .map_err(|error| Ended::Protocol(format!("no hello: {error}")))?;
        if hello.version != i32::from(Version::V1) {
            return Err(Ended::Protocol(format!("version {}, and version 1 is spoken", hello.version)));
        }
        self.wants_capture = hello.culvert_capture;
        self.id = self.ztunnels.change(|state| {
            state.last_peer += 1;
            let id = state.last_peer;
            state.peers.push(Peer { id, ..Peer::default() });
            id
        });
        let (_, process) = self.socket.peer()?;
        tracing::info!(process, "ztunnel connected");
        Ok(())
    }

    /// All pods that are served now. What a ztunnel refuses is tried again later.
    async fn snapshot(&mut self) -> Result<(), Ended> {
        let pods: Vec<Served> = self.ztunnels.state().pods.values().cloned().collect();
        let count = pods.len();
        for pod in pods {
            self.add(&pod).await?;
        }
        if let Some(error) = self.exchange(Payload::SnapshotSent(SnapshotSent {}), None).await? {
            tracing::warn!(error, "ztunnel has not taken the end of the snapshot");
        }
        tracing::info!(pods = count, "ztunnel has all pods");
        Ok(())
    }

    /// The next difference between what is and what should be.
    fn next(&mut self) -> Step {
        let mut state = self.ztunnels.state();
        self.retries.retain(|uid, _| state.pods.contains_key(uid));
        let is_newest = state.is_newest(self.id);
        let has: BTreeMap<String, u64> = state.peer(self.id).map(|peer| peer.has.clone()).unwrap_or_default();
        let is_wanted = |(uid, generation): &(&String, &u64)| match state.pods.get(*uid) {
            // In another namespace it is another pod to ztunnel: first the one goes, then the other comes. An older
            // ztunnel is not told of namespaces any more.
            Some(pod) => pod.generation == **generation || !is_newest,
            None => false,
        };
        if let Some((uid, _)) = has.iter().find(|entry| !is_wanted(entry)) {
            return Step::Remove(uid.clone());
        }
        // A ztunnel keeps what it refused, and tries again by itself.
        if let Some(uid) = self.tried.iter().find(|uid| !state.pods.contains_key(*uid)) {
            return Step::Remove(uid.clone());
        }
        if !is_newest {
            return Step::Wait(None);
        }
        let now = Instant::now();
        let missing: Vec<&Served> = state
            .pods
            .values()
            .filter(|pod| !has.contains_key(&pod.pod.uid) && pod.netns.is_some())
            .collect();
        let due = |pod: &&&Served| self.retries.get(&pod.pod.uid).is_none_or(|(at, _)| *at <= now);
        match missing.iter().find(due) {
            Some(pod) => Step::Add(Box::new((**pod).clone())),
            None => {
                let missing: HashSet<&str> = missing.iter().map(|pod| &*pod.pod.uid).collect();
                let waits = self.retries.iter().filter(|(uid, _)| missing.contains(uid.as_str()));
                Step::Wait(waits.map(|(_, (at, _))| *at).min())
            }
        }
    }

    async fn add(&mut self, served: &Served) -> Result<(), Ended> {
        let PodIdentity { uid, namespace, name, service_account } = served.pod.clone();
        let refused = match &served.netns {
            Some(netns) => {
                let workload_info = Some(WorkloadInfo { name, namespace, service_account });
                let mut add = AddWorkload { uid: uid.clone(), workload_info, ..AddWorkload::default() };
                if self.wants_capture {
                    add.culvert_capture = served.capture.clone();
                    if add.encoded_len() > CAPTURE_LIMIT - ENVELOPE {
                        add.culvert_capture.clear();
                    }
                }
                self.exchange(Payload::Add(add), Some(netns.as_fd())).await?
            }
            None => self.exchange(Payload::Keep(KeepWorkload { uid: uid.clone() }), None).await?,
        };
        let pod = format_args!("{}/{}", served.pod.namespace, served.pod.name);
        match &refused {
            None => {
                self.retries.remove(&uid);
                self.tried.remove(&uid);
                tracing::debug!(%pod, uid, "ztunnel serves the pod");
            }
            Some(error) => {
                let failures = self.retries.get(&uid).map_or(0, |(_, failures)| *failures);
                let wait = (RETRY * 2_u32.pow(failures.min(5))).min(LONGEST_RETRY);
                self.retries.insert(uid.clone(), (Instant::now() + wait, failures + 1));
                self.tried.insert(uid.clone());
                tracing::warn!(%pod, uid, error, "ztunnel refuses the pod; trying again");
            }
        }
        let (id, generation) = (self.id, served.generation);
        self.ztunnels.change(|state| {
            let Some(peer) = state.peer(id) else { return };
            match refused {
                None => {
                    peer.refused.remove(&uid);
                    peer.has.insert(uid, generation);
                }
                Some(error) => drop(peer.refused.insert(uid, (generation, error))),
            }
        });
        Ok(())
    }

    async fn remove(&mut self, uid: &str) -> Result<(), Ended> {
        let del = DelWorkload { uid: uid.to_owned() };
        if let Some(error) = self.exchange(Payload::Del(del), None).await? {
            // As a rule it does not know the pod.
            tracing::warn!(uid, error, "ztunnel has not let go of the pod");
        }
        self.retries.remove(uid);
        self.tried.remove(uid);
        let id = self.id;
        self.ztunnels.change(|state| {
            if let Some(peer) = state.peer(id) {
                peer.has.remove(uid);
                peer.refused.remove(uid);
            }
        });
        Ok(())
    }

    /// Sends a message and waits for its acknowledgement. Returns the error that it carries, if any.
    async fn exchange(
        &self,
        payload: Payload,
        descriptor: Option<std::os::fd::BorrowedFd<'_>>,
    ) -> Result<Option<String>, Ended> {
        let bytes = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
        if bytes.len() > if self.wants_capture { CAPTURE_LIMIT } else { PACKET_LIMIT } {
            return Ok(Some(format!("{} bytes do not fit in a packet", bytes.len())));
        }
        let sending = self.socket.send(&bytes, descriptor);
        tokio::time::timeout(ANSWER_LIMIT, sending).await.map_err(|_| Ended::Silent)??;
        let response = WorkloadResponse::decode(&*self.receive().await?)
            .map_err(|error| Ended::Protocol(format!("no acknowledgement: {error}")))?;
        match response.payload {
            Some(workload_response::Payload::Ack(ack)) if ack.error.is_empty() => Ok(None),
            Some(workload_response::Payload::Ack(ack)) => Ok(Some(ack.error.chars().take(500).collect())),
            None => Err(Ended::Protocol("an answer without an acknowledgement".to_owned())),
        }
    }

    async fn receive(&self) -> Result<Vec<u8>, Ended> {
        let receiving = self.socket.receive(PACKET_LIMIT);
        let packet = tokio::time::timeout(ANSWER_LIMIT, receiving).await.map_err(|_| Ended::Silent)??;
        Ok(packet.ok_or(Ended::Closed)?.bytes)
    }
}
