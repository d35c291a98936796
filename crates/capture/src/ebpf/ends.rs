//! Which pods may be ends of connections that no proxy carries, where another process writes the verdicts: ztunnel in a cluster.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ebpf::Pins;
use ebpf::verdicts::Node;
use net::{Netns, NetnsId};

use crate::error::Error;

/// Where the machine's cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// How many sweeps there are from one attempt to attach the programs to the next.
const SWEEPS: u32 = 12;

/// Programs that are wanted and could not be attached.
#[derive(Debug)]
pub(super) struct Wanted {
    netns: Netns,
    /// Sweeps since they were.
    sweeps: u32,
}

impl Wanted {
    pub(super) fn new(netns: Netns) -> Self {
        Self { netns, sweeps: 0 }
    }

    /// Tries again when it is time to.
    pub(super) fn sweep(&mut self, pins: &Pins) -> Option<Ends> {
        let is_due = self.sweeps.is_multiple_of(SWEEPS);
        self.sweeps = self.sweeps.wrapping_add(1);
        if !is_due {
            return None;
        }
        match Ends::attach(pins, self.netns.clone()) {
            Ok(ends) => {
                tracing::info!(
                    "the node's programs of verdicts are attached: nodeLocal: kernel is kept up to date"
                );
                Some(ends)
            }
            Err(error) => {
                tracing::warn!(%error, "the node's programs of verdicts can't be attached yet");
                None
            }
        }
    }
}

/// The node's programs for such connections, and what came of its pods.
#[derive(Debug)]
pub(super) struct Ends {
    pins: Pins,
    netns: Netns,
    node: Mutex<Node>,
    /// Why a pod may be none, if it may not.
    pods: Mutex<HashMap<NetnsId, Option<String>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ends {
    /// Attaches the programs, for the node whose namespace this is.
    pub(super) fn attach(pins: &Pins, netns: Netns) -> Result<Self, Error> {
        let node = Node::attach(pins, Path::new(CGROUPS), netns.clone())?;
        Ok(Self { pins: pins.clone(), netns, node: Mutex::new(node), pods: Mutex::default() })
    }

    /// Looks whether the pod may be one, after what is captured of it may have changed.
    pub(super) fn follow(&self, pod: &Netns) {
        let why = lock(&self.node).join(pod).err().map(|why| why.to_string());
        let before = lock(&self.pods).insert(pod.id(), why.clone());
        if before.as_ref() != Some(&why) {
            match why {
                None => tracing::info!(%pod, "connections of the pod within the node may pass ztunnel by"),
                Some(why) => tracing::info!(%pod, why, "connections of the pod take the way through ztunnel"),
            }
        }
    }

    /// The pod is no longer captured.
    pub(super) fn leave(&self, pod: &Netns) {
        lock(&self.pods).remove(&pod.id());
        if let Err(error) = lock(&self.node).leave(pod) {
            tracing::warn!(%pod, %error, "the program of the pod's device on the node stays");
        }
    }

    /// Whether the pod may be one; why not.
    pub(super) fn is_fit(&self, pod: &Netns) -> Option<Result<(), String>> {
        let pods = lock(&self.pods);
        pods.get(&pod.id()).map(|why| why.clone().map_or(Ok(()), Err))
    }

    /// Forgets pods that are gone, and attaches again what somebody took away: pods that are captured are then found to differ.
    pub(super) fn sweep(&self) {
        lock(&self.pods).retain(|pod, _| self.pins.root().join(pod.inode().to_string()).exists());
        let mut node = lock(&self.node);
        if node.stands() {
            node.sweep();
            return;
        }
        match Node::attach(&self.pins, Path::new(CGROUPS), self.netns.clone()) {
            Ok(again) => {
                tracing::warn!("the node's programs of verdicts were gone; they are attached again");
                *node = again;
            }
            Err(error) => tracing::warn!(%error, "the node's programs of verdicts are gone"),
        }
    }
}
