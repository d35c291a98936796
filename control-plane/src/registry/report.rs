//! What the registry reports of objects whose status is written.

use std::sync::Arc;

use config::diagnostic::Diagnostic;
use config::json::Decoded;
use config::resource::Kind;

/// What there is to report of an object of istio.io.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Which.
    pub name: ObjectName,
    /// The object as it stands; `None` when it is gone.
    pub state: Option<ObjectState>,
}

/// An object's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.kind.name(), self.namespace, self.name)
    }
}

/// An object as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectState {
    /// Which version of it.
    pub version: ObjectVersion,
    /// What is said of it.
    pub findings: Vec<Diagnostic>,
}

/// A version of an object, and what decides who reports on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectVersion {
    /// Which object of this name.
    pub uid: Arc<str>,
    /// Which version of it.
    pub generation: i64,
    /// Its label gives it to this revision: the control planes of others do not read it.
    pub labelled: bool,
    /// It has a selector: proxies know from their workloads whether it is for them.
    pub selects: bool,
}

/// Whether the status of a kind's objects is written.
pub(super) fn is_reported(kind: Kind) -> bool {
    kind.spec().is_some_and(|spec| spec.group.ends_with("istio.io"))
}

pub(super) fn version(decoded: &Decoded) -> ObjectVersion {
    ObjectVersion {
        uid: decoded.bookkeeping.uid.as_str().into(),
        generation: decoded.bookkeeping.generation,
        labelled: decoded.label("istio.io/rev").is_some(),
        selects: decoded.node.get("spec").is_some_and(|spec| spec.get("selector").is_some()),
    }
}
