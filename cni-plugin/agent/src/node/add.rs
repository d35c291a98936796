//! What the CNI plugin asks for: ADD and CHECK.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use net::Netns;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Node;
use super::enrol::{EnrolError, Manner, Target};
use super::slot::{Slot, State};
use crate::cluster::Mode;
use crate::netns::{self, NetnsError};
use crate::pod::{AMBIENT, Pod, Standing};

/// Codes of the CNI specification.
const TRY_AGAIN_LATER: u32 = 11;
const INVALID: u32 = 7;

/// An attachment, as the plugin tells it: Istio's agents know the first four.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct AddRequest {
    /// The path of the network namespace.
    pub netns: String,
    /// The pod's name.
    pub pod_name: String,
    /// The pod's namespace.
    pub pod_namespace: String,
    /// The pod's addresses.
    #[serde(rename = "IPs")]
    pub ips: Vec<Address>,
    /// The pod's uid; empty where the runtime doesn't tell.
    #[serde(rename = "PodUID")]
    pub pod_uid: String,
    /// The id of the sandbox.
    #[serde(rename = "ContainerID")]
    pub container_id: String,
}

/// An address in Go's form.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Address {
    /// The address and its mask.
    pub address: IpNet,
}

/// Go's `net.IPNet`.
#[derive(Clone, Debug, Deserialize)]
pub struct IpNet {
    /// The address.
    #[serde(rename = "IP")]
    pub ip: IpAddr,
}

impl AddRequest {
    fn addresses(&self) -> Vec<IpAddr> {
        let addresses = self.ips.iter().map(|ip| ip.address.ip.to_canonical());
        addresses.filter(netns::tells).collect()
    }

    fn name(&self) -> String {
        format!("{}/{}", self.pod_namespace, self.pod_name)
    }
}

/// What became of an ADD.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The pod's traffic is captured.
    Enrolled,
    /// The pod is not to be in the mesh; why.
    Outside(&'static str),
}

/// An error in CNI's words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// CNI's code.
    pub code: u32,
    /// For users.
    pub message: String,
}

impl Refusal {
    fn later(message: impl Into<String>) -> Self {
        Self { code: TRY_AGAIN_LATER, message: message.into() }
    }
}

/// An ADD that is being done; gone when that is.
struct Adding {
    node: Arc<Node>,
    container: String,
    is_ended: Arc<watch::Sender<bool>>,
}

impl Adding {
    /// Of this sandbox, which ends where a DEL of it comes from now on.
    fn begin(node: &Arc<Node>, container: &str) -> Self {
        let is_ended = Arc::new(watch::Sender::new(false));
        if !container.is_empty() {
            node.adding().insert(container.to_owned(), is_ended.clone());
        }
        Self { node: node.clone(), container: container.to_owned(), is_ended }
    }

    fn is_ended(&self) -> bool {
        *self.is_ended.borrow()
    }

    /// Until the sandbox has ended.
    async fn ended(&self) {
        // The sender is `self`'s.
        let _ = self.is_ended.subscribe().wait_for(|is_ended| *is_ended).await;
    }
}

impl Drop for Adding {
    fn drop(&mut self) {
        let mut adding = self.node.adding();
        if adding.get(&self.container).is_some_and(|newest| Arc::ptr_eq(newest, &self.is_ended)) {
            adding.remove(&self.container);
        }
    }
}

/// The namespace of a pod that starts, and the pod's addresses: as the runtime told them, or if it didn't, as they are
/// there.
fn open(path: &Path, told: Vec<IpAddr>) -> Result<(Netns, Vec<IpAddr>), NetnsError> {
    let netns = netns::open(path)?;
    let addresses = if told.is_empty() { netns::addresses_in(&netns)? } else { told };
    netns::check(&netns, &addresses)?;
    Ok((netns, addresses))
}

impl Node {
    /// Puts a pod that starts into the mesh, if it is to be. Until then the container runtime waits. The same again changes
    /// nothing.
    ///
    /// # Errors
    /// The pod must not start now: why.
    pub async fn add(self: &Arc<Self>, request: AddRequest) -> Result<Answer, Refusal> {
        let name = request.name();
        // A task of its own: what is begun is finished, or undone, also when the plugin is killed.
        let (node, adding) = (self.clone(), Adding::begin(self, &request.container_id));
        let work = tokio::spawn(async move {
            let limit = node.parts.times.add;
            tokio::time::timeout(limit, node.add_now(&request, &adding)).await.unwrap_or_else(|_| {
                Err(Refusal::later(format!("pod {} is not in the mesh after {limit:?}", request.name())))
            })
        });
        let outcome = work.await.unwrap_or_else(|error| Err(Refusal::later(error.to_string())));
        match &outcome {
            Ok(Answer::Enrolled) => self.wake.notify_one(),
            Ok(Answer::Outside(why)) => tracing::debug!(pod = name, why, "not in the mesh"),
            Err(refusal) => tracing::warn!(pod = name, error = refusal.message, "the pod must wait"),
        }
        outcome
    }

    async fn add_now(self: &Arc<Self>, request: &AddRequest, adding: &Adding) -> Result<Answer, Refusal> {
        let name = request.name();
        let pod = self.look_up(request).await?;
        let mode = self.mode_of(&pod).await?;
        if let Standing::Outside(why) = pod.standing(mode.as_deref(), &self.parts.places) {
            return Ok(Answer::Outside(why));
        }
        let waits = |error: &dyn std::fmt::Display| {
            Refusal::later(format!("pod {name} waits, so that it doesn't start outside the mesh: {error}"))
        };
        let (path, told) = (request.netns.clone(), request.addresses());
        let opened = tokio::task::spawn_blocking(move || open(Path::new(&path), told));
        let opened = opened.await.map_err(|error| waits(&error))?;
        let (netns, addresses) = opened.map_err(|error| waits(&error))?;
        let slot = self.slot_for(&pod);
        let _work = slot.work.clone().lock_owned().await;
        let ended = || waits(&"its sandbox ended while it was added");
        if adding.is_ended() {
            return Err(ended());
        }
        let container = (!request.container_id.is_empty()).then(|| request.container_id.clone());
        if container.is_some() {
            // A DEL of an earlier sandbox, which comes late, is none of this one.
            let mut inner = slot.inner();
            (inner.container, inner.added) = (container.clone(), Some(Instant::now()));
        }
        let target = Target { pod, netns, addresses, container };
        let enrolled = tokio::select! {
            biased;
            enrolled = self.enrol(&slot, target, Manner::Starting) => enrolled,
            // Another sandbox of the pod may wait for its turn.
            () = adding.ended() => return Err(ended()),
        };
        if let Err(error) = enrolled {
            let code = if matches!(error, EnrolError::Annotation(_)) { INVALID } else { TRY_AGAIN_LATER };
            return Err(Refusal { code, ..waits(&error) });
        }
        self.slots().insert(slot.uid.clone(), slot.clone());
        // Either DEL finds the slot, or it is seen here that DEL was before.
        if adding.is_ended() {
            self.forget(&slot, "its sandbox ended while it was added");
            return Err(ended());
        }
        self.sync_probes().await;
        Ok(Answer::Enrolled)
    }

    /// The pod that is added. What the watches have not said yet is asked for.
    async fn look_up(&self, request: &AddRequest) -> Result<Pod, Refusal> {
        if let Some(pod) = self.parts.cluster.pod(&request.pod_uid) {
            return Ok(pod);
        }
        let name = request.name();
        for is_last in [false, false, true] {
            let removals = self.parts.cluster.removals();
            let asked = self.parts.api.pod(&request.pod_namespace, &request.pod_name).await;
            let found = asked.map_err(|error| {
                Refusal::later(format!(
                    "pod {name} waits: whether it is to be in the mesh can't be found out: {error}"
                ))
            })?;
            match found {
                Some(pod) if request.pod_uid.is_empty() || pod.node_uid() == request.pod_uid => {
                    // The watch will say the same, or something newer; what it has said already may be that.
                    if self.parts.cluster.note_pod(removals, &pod) || is_last {
                        return Ok(pod);
                    }
                }
                _ => break,
            }
        }
        Err(Refusal::later(format!(
            "pod {name} with the uid {:?} is not known to the API server (any more)",
            request.pod_uid
        )))
    }

    /// What the pod's namespace says. Where the pod would be outside the mesh by that alone, and the watch may be behind,
    /// the API server is asked: who labels a namespace and then makes pods is not to find the first of them outside.
    async fn mode_of(&self, pod: &Pod) -> Result<Mode, Refusal> {
        let namespace = &pod.identity.namespace;
        let known = self.parts.cluster.namespace(namespace);
        if let Some(mode) = &known {
            let standing = |mode| pod.standing(mode, &self.parts.places);
            let hangs_on_it = standing(Some(AMBIENT)) == Standing::InMesh;
            let is_outside = standing(mode.as_deref()) != Standing::InMesh;
            let trust = self.parts.times.trust;
            if !(is_outside && hangs_on_it && self.parts.cluster.may_be_behind(&pod.identity.uid, trust)) {
                return Ok(mode.clone());
            }
        }
        let asked = self.parts.api.namespace(namespace).await;
        let mode = asked.map_err(|error| {
            let message = format!(
                "pod {} waits: whether namespace {namespace} is in the mesh can't be found out: {error}",
                pod.full_name()
            );
            Refusal::later(message)
        })?;
        let mode = mode.ok_or_else(|| {
            Refusal::later(format!("namespace {namespace} is not known to the API server (any more)"))
        })?;
        Ok(self.parts.cluster.note_namespace(namespace, known.as_ref(), mode))
    }

    /// The slot of a pod. A new one is not among the others yet.
    fn slot_for(&self, pod: &Pod) -> Arc<Slot> {
        let state = State::failed(0, "it is about to start".to_owned(), self.parts.times.served);
        self.new_slot(pod, state).unwrap_or_else(|known| known)
    }

    /// Checks that a pod that is to be in the mesh is captured as ADD left it.
    ///
    /// # Errors
    /// It isn't: how.
    pub async fn check(self: &Arc<Self>, request: &AddRequest) -> Result<(), Refusal> {
        let name = request.name();
        let pod = self.look_up(request).await?;
        let mode = self.mode_of(&pod).await?;
        if let Standing::Outside(_) = pod.standing(mode.as_deref(), &self.parts.places) {
            return Ok(());
        }
        let wrong = |what: &str| Refusal::later(format!("pod {name} is to be in the mesh: {what}"));
        let slot = self.slot(&pod.identity.uid).ok_or_else(|| wrong("its traffic is not captured"))?;
        let (state, installed, netns) = {
            let inner = slot.inner();
            (inner.state.clone(), inner.rules.clone(), inner.netns.clone())
        };
        match (&state, netns) {
            (State::Enrolled { .. }, Some(netns)) => {
                let path = request.netns.clone();
                let capture = self.parts.capture.clone();
                let looked = tokio::task::spawn_blocking(move || {
                    let there = netns::open(Path::new(&path)).map_err(|error| error.to_string())?;
                    if !there.same(&netns) {
                        return Err("it is captured in another network namespace".to_owned());
                    }
                    match capture.verify(&netns, &installed) {
                        Ok(drift) if drift.is_none() => Ok(()),
                        Ok(drift) => Err(format!("its rules are not as they were: {drift}")),
                        Err(error) => Err(error.to_string()),
                    }
                });
                looked.await.map_err(|error| error.to_string()).flatten().map_err(|what| wrong(&what))
            }
            (State::Waiting { reason, .. } | State::Closed { reason, .. }, _) => Err(wrong(reason)),
            _ => Err(wrong(state.name())),
        }
    }
}
