//! A stand-in of the node agent: it tells ztunnel of pods by ZDS, with their network namespaces, and redirects.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use capture::{Capture, Rules, Tools};
use harness::netns::Host;
use net::Netns;
use net::seqpacket::{Seqpacket, SeqpacketListener};
use prost::Message;
use proto::wire::zds::workload_request::Payload;
use proto::wire::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse,
    ZdsHello, workload_response,
};
use std::os::fd::AsFd;
use tokio::time::timeout;

use super::PATIENCE;

/// The agent of one node, and its connection to a ztunnel.
pub struct Agent {
    path: PathBuf,
    listener: Option<SeqpacketListener>,
    ztunnel: Option<Seqpacket>,
    pub capture: Arc<dyn Capture>,
    /// What it says of the capture of the pods that it tells of.
    pub annotations: Vec<(&'static str, &'static str)>,
}

impl Agent {
    pub fn new(path: &Path) -> Self {
        let capture = capture::select(None, &Tools::default()).unwrap().capture;
        let listener = Some(SeqpacketListener::bind(path).unwrap());
        Self { path: path.to_owned(), listener, ztunnel: None, capture, annotations: Vec::new() }
    }

    /// Waits for a ztunnel, and its hello.
    pub async fn meet(&mut self) {
        self.ztunnel = Some(self.accept().await);
    }

    /// Another ztunnel that connects; what is sent goes to the one before it still.
    pub async fn accept(&self) -> Seqpacket {
        let accepted = timeout(PATIENCE, self.listener.as_ref().unwrap().accept()).await.unwrap().unwrap();
        let hello = timeout(PATIENCE, accepted.receive(1024)).await.unwrap().unwrap().unwrap();
        let hello = ZdsHello::decode(hello.bytes.as_slice()).unwrap();
        assert!(hello.version == 1 && hello.culvert_capture);
        accepted
    }

    /// What is sent from now on goes to this one.
    pub fn turn_to(&mut self, ztunnel: Seqpacket) -> Option<Seqpacket> {
        self.ztunnel.replace(ztunnel)
    }

    /// Ends, with its listener and its connection.
    pub fn stop(&mut self) {
        (self.listener, self.ztunnel) = (None, None);
    }

    /// Begins anew.
    pub async fn restart(&mut self) {
        self.stop();
        self.listener = Some(SeqpacketListener::bind(&self.path).unwrap());
        self.meet().await;
    }

    /// Sends a message and waits for the answer: its error, if it has one.
    pub async fn ask(&self, payload: Payload, netns: Option<&Netns>) -> Result<(), String> {
        self.ask_bytes(&WorkloadRequest { payload: Some(payload) }.encode_to_vec(), netns).await
    }

    pub async fn ask_bytes(&self, bytes: &[u8], netns: Option<&Netns>) -> Result<(), String> {
        let ztunnel = self.ztunnel.as_ref().unwrap();
        ztunnel.send(bytes, netns.map(AsFd::as_fd)).await.unwrap();
        let answer = timeout(PATIENCE, ztunnel.receive(4096)).await.unwrap().unwrap().unwrap();
        let answer = WorkloadResponse::decode(answer.bytes.as_slice()).unwrap();
        let Some(workload_response::Payload::Ack(ack)) = answer.payload else { panic!("{answer:?}") };
        if ack.error.is_empty() { Ok(()) } else { Err(ack.error) }
    }

    /// Tells of a pod of the namespace `shop` without redirecting it.
    pub async fn tell(&self, uid: &str, pod: &Host, account: &str) -> Result<(), String> {
        let info = WorkloadInfo {
            name: pod.name.clone(),
            namespace: "shop".into(),
            service_account: account.into(),
        };
        let culvert_capture =
            self.annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let add = AddWorkload { uid: uid.into(), workload_info: Some(info), culvert_capture };
        self.ask(Payload::Add(add), Some(&pod.netns)).await
    }

    /// Takes a pod of the namespace `shop` into the mesh, as its own service account.
    pub async fn add(&self, pod: &Host) {
        let told = self.tell(&uid(pod), pod, &pod.name).await;
        told.unwrap_or_else(|error| panic!("{}: {error}", pod.name));
        self.redirect(pod);
    }

    pub fn redirect(&self, pod: &Host) {
        self.capture.install(&pod.netns, &Rules::default()).unwrap();
    }

    pub async fn keep(&self, pod: &Host) -> Result<(), String> {
        self.ask(Payload::Keep(KeepWorkload { uid: uid(pod) }), None).await
    }

    /// Takes a pod out of the mesh.
    pub async fn remove(&self, pod: &Host) {
        self.capture.remove(&pod.netns).unwrap();
        self.ask(Payload::Del(DelWorkload { uid: uid(pod) }), None).await.unwrap();
    }

    pub async fn snapshot_sent(&self) {
        self.ask(Payload::SnapshotSent(SnapshotSent {}), None).await.unwrap();
    }
}

/// A pod's uid in Kubernetes.
pub fn uid(pod: &Host) -> String {
    format!("uid-of-{}", pod.name)
}
