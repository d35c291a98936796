//! What is asked for one pod, wherever it comes from: from its manifest, or from the node agent.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use config::kinds::Exclusions;
use model::Str;
use net::Netns;
use net::netns::OpenError;

use crate::proxy::pod::Subject;

/// Where a pod's network namespace is found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// At a path, which may come to lead to another one.
    Path(PathBuf),
    /// It was handed over.
    Open(Netns),
}

impl Place {
    /// The namespace that is there now.
    ///
    /// # Errors
    /// Nothing is, or something else.
    pub fn open(&self) -> Result<Netns, OpenError> {
        match self {
            Self::Path(path) => Netns::open(path),
            Self::Open(netns) => Ok(netns.clone()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Open(netns) => netns.fmt(f),
        }
    }
}

/// A pod whose traffic is to be carried.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Enrolment {
    /// What tells it from the node's other pods: the workload's uid, or the pod's own, which is another one when the
    /// pod is made anew under its name.
    pub key: Str,
    /// Who it is.
    pub subject: Subject,
    /// Its namespace.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
    /// Where its network namespace is.
    pub netns: Place,
    /// Its addresses, where they are known: else its workload has them.
    pub addresses: Option<Box<[IpAddr]>>,
    /// Traffic that is not captured, where this process captures it.
    pub exclusions: Exclusions,
    /// Whether its DNS requests are answered by the mesh.
    pub dns_capture: bool,
    /// Whether connections to it are left alone.
    pub bypass_inbound: bool,
}

impl From<config::compile::Enrolment> for Enrolment {
    /// Of a manifest.
    fn from(e: config::compile::Enrolment) -> Self {
        Self {
            key: e.uid.clone(),
            subject: Subject { uid: e.uid, claim: None },
            namespace: e.namespace,
            name: e.name,
            netns: Place::Path(e.netns),
            addresses: Some(e.addresses),
            exclusions: e.exclusions,
            dns_capture: e.dns_capture,
            bypass_inbound: e.bypass_inbound,
        }
    }
}

/// A step from one set of enrolments to the next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EnrolmentChange {
    /// Enrols a pod, or replaces what was said of the one of the same key.
    Set(Box<Enrolment>),
    /// Lets the pod of this key go.
    Remove(Str),
}

impl EnrolmentChange {
    /// Which pod it is about.
    pub fn key(&self) -> &Str {
        match self {
            Self::Set(enrolment) => &enrolment.key,
            Self::Remove(key) => key,
        }
    }
}

impl From<config::compile::EnrolmentChange> for EnrolmentChange {
    fn from(change: config::compile::EnrolmentChange) -> Self {
        match change {
            config::compile::EnrolmentChange::Set(enrolment) => Self::Set(Box::new((*enrolment).into())),
            config::compile::EnrolmentChange::Remove(uid) => Self::Remove(uid),
        }
    }
}
