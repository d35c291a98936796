//! What a node's capture is told of its pods.

use std::net::IpAddr;
use std::path::PathBuf;

use model::{Str, TunnelProtocol, Workload};

use crate::kinds::{Capture, Exclusions};

/// A pod of this node whose traffic is to be captured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Enrolment {
    /// The workload's uid.
    pub uid: Str,
    /// The pod's namespace.
    pub namespace: Str,
    /// The pod's name.
    pub name: Str,
    /// The pod's service account.
    pub service_account: Str,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its addresses.
    pub addresses: Box<[IpAddr]>,
    /// Traffic that is not captured.
    pub exclusions: Exclusions,
    /// Whether its DNS requests are answered by the mesh.
    pub dns_capture: bool,
    /// Whether connections to it are left alone.
    pub bypass_inbound: bool,
}

/// A step from one set of enrolments to the next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EnrolmentChange {
    /// Enrols a pod, or replaces what was said of the one of the same uid.
    Set(Box<Enrolment>),
    /// Lets the pod of this uid go.
    Remove(Str),
}

/// Whether, and how, a pod's traffic is captured.
pub(super) enum Verdict {
    /// It is.
    Enrol(Box<Enrolment>),
    /// It should be, and nothing says where its network namespace is.
    NoNetns,
    /// It is not: the pod is not in the mesh or not on this node.
    Leave,
}

pub(super) fn decide(workload: &Workload, capture: Option<&Capture>, node: Option<&Str>) -> Verdict {
    if workload.tunnel != TunnelProtocol::Hbone || node != Some(workload.node()) {
        return Verdict::Leave;
    }
    let Some((capture, netns)) = capture.and_then(|c| Some((c, c.netns.clone()?))) else {
        return Verdict::NoNetns;
    };
    Verdict::Enrol(Box::new(Enrolment {
        uid: workload.uid.clone(),
        namespace: workload.namespace.clone(),
        name: workload.name().into(),
        service_account: workload.service_account.clone(),
        netns,
        addresses: (*workload.addresses).into(),
        exclusions: capture.exclusions.clone(),
        dns_capture: capture.dns_capture,
        bypass_inbound: capture.bypass_inbound,
    }))
}
