//! Whose certificate a caller gets, and whose it does not.
//!
//! * The proxy of a node (a trusted account, its token bound to a pod that is there) gets the identity of every account
//!   of which a pod runs on the same node, and its own.
//! * Everybody else gets the identity of his own account.
//!
//! The decision is pure; what is known of pods comes through [`Pods`].

use model::{InvalidIdentity, SpiffeId, TrustDomain};

use super::authenticate::Caller;

/// What is known of a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodFacts {
    /// Its uid.
    pub uid: String,
    /// Its node; `None` before it is scheduled.
    pub node: Option<String>,
    /// Its service account.
    pub service_account: String,
    /// Whether it is over: phase Succeeded or Failed.
    pub finished: bool,
}

/// What is known of the cluster's pods, from a store that follows the API server.
pub trait Pods: Send + Sync + 'static {
    /// Whether the store has read everything once. Before that, nothing that it lacks means anything.
    fn is_ready(&self) -> bool;

    /// A pod that the API server has.
    fn pod(&self, namespace: &str, name: &str) -> Option<PodFacts>;

    /// Whether a namespace is there.
    fn has_namespace(&self, namespace: &str) -> bool;

    /// Whether a pod is a waypoint: who judges others' certificates, and so has to know of a new root.
    fn is_waypoint(&self, _namespace: &str, _name: &str) -> bool {
        false
    }

    /// Whether a pod of this service account is on this node and not over (phase Succeeded or Failed). One that is
    /// being deleted still counts: it serves until it ends.
    fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool;
}

/// An account, `namespace/name`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Account {
    /// The namespace.
    pub namespace: String,
    /// The service account.
    pub name: String,
}

impl std::str::FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?} is not NAMESPACE/SERVICEACCOUNT")),
        }
    }
}

/// Whose requests are answered how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rules {
    /// The trust domain of what is issued.
    pub domain: TrustDomain,
    /// The accounts of the proxies of nodes.
    pub trusted: Vec<Account>,
}

/// Why a certificate is not given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// What is asked for is no identity.
    #[error("ImpersonatedIdentity: {0}")]
    NoIdentity(#[from] InvalidIdentity),
    /// It is of another mesh.
    #[error("{0} is not of this mesh's trust domain, {1}")]
    ForeignDomain(SpiffeId, TrustDomain),
    /// Only proxies of nodes ask for others.
    #[error(
        "{caller} asks for {id}, but is no trusted node account: only those get other identities than their own \
         (setting: trusted node accounts)"
    )]
    NotTrusted {
        /// Who asks.
        caller: Box<Caller>,
        /// For whom.
        id: SpiffeId,
    },
    /// The token is not bound to a pod, so the node is not known.
    #[error("the token of {0} is not bound to a pod, so its node is not known: use a projected token")]
    Unbound(Box<Caller>),
    /// The caller's pod is gone, or another one of the same name.
    #[error("the pod of {caller} (uid {uid}) {how}")]
    NoSuchPod {
        /// Who asks.
        caller: Box<Caller>,
        /// The uid that the token says.
        uid: String,
        /// What is wrong.
        how: &'static str,
    },
    /// The token says another node than the pod.
    #[error("the token of {caller} is of the node {token:?}, its pod is on {pod:?}")]
    NodeMismatch {
        /// Who asks.
        caller: Box<Caller>,
        /// What the token says.
        token: String,
        /// Where the pod is.
        pod: String,
    },
    /// There is no such namespace.
    #[error("{caller} asks for {id}, whose namespace is not there")]
    UnknownNamespace {
        /// Who asks.
        caller: Box<Caller>,
        /// For whom.
        id: SpiffeId,
    },
    /// No pod of that identity is on the caller's node.
    #[error("{caller} on node {node} asks for {id}, of which no pod runs on that node")]
    NotOnNode {
        /// Who asks.
        caller: Box<Caller>,
        /// Its node.
        node: String,
        /// For whom.
        id: SpiffeId,
    },
}

impl Denied {
    /// A short constant for metrics and log fields.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoIdentity(_) => "no_identity",
            Self::ForeignDomain(..) => "foreign_trust_domain",
            Self::NotTrusted { .. } => "not_trusted",
            Self::Unbound(_) => "unbound_token",
            Self::NoSuchPod { .. } => "no_such_pod",
            Self::NodeMismatch { .. } => "node_mismatch",
            Self::UnknownNamespace { .. } => "unknown_namespace",
            Self::NotOnNode { .. } => "not_on_node",
        }
    }

    /// Whether the store of pods may only be late: the kubelet starts a pod as soon as we may hear of it.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::NoSuchPod { .. } | Self::UnknownNamespace { .. } | Self::NotOnNode { .. })
    }
}

/// Decides whose certificate `caller` gets when it asks for `impersonated`, or for its own.
///
/// # Errors
/// It gets none.
pub fn decide(
    caller: &Caller,
    impersonated: Option<&str>,
    rules: &Rules,
    pods: &dyn Pods,
) -> Result<SpiffeId, Denied> {
    let account =
        |namespace: &str, name: &str| SpiffeId::new(rules.domain.clone(), namespace.into(), name.into());
    let own = account(&caller.namespace, &caller.service_account)?;
    let id: SpiffeId = match impersonated {
        Some(text) => text.parse()?,
        None => own.clone(),
    };
    if *id.trust_domain() != rules.domain {
        return Err(Denied::ForeignDomain(id, rules.domain.clone()));
    }
    let node = node_of(caller, pods)?;
    if id == own {
        return Ok(id);
    }
    let trusted = rules
        .trusted
        .iter()
        .any(|account| account.namespace == caller.namespace && account.name == caller.service_account);
    if !trusted {
        return Err(Denied::NotTrusted { caller: Box::new(caller.clone()), id });
    }
    let node = node.ok_or_else(|| Denied::Unbound(Box::new(caller.clone())))?;
    if !pods.has_namespace(id.namespace()) {
        return Err(Denied::UnknownNamespace { caller: Box::new(caller.clone()), id });
    }
    if !pods.runs_on(&node, id.namespace(), id.service_account()) {
        return Err(Denied::NotOnNode { caller: Box::new(caller.clone()), node, id });
    }
    Ok(id)
}

/// The node of the caller's pod, which must be there if the token is bound to one.
fn node_of(caller: &Caller, pods: &dyn Pods) -> Result<Option<String>, Denied> {
    let Some(bound) = &caller.pod else { return Ok(None) };
    let no = |how| Denied::NoSuchPod { caller: Box::new(caller.clone()), uid: bound.uid.clone(), how };
    let pod = pods.pod(&caller.namespace, &bound.name).ok_or_else(|| no("is not there"))?;
    if pod.uid != bound.uid {
        return Err(no("was replaced by another one of the same name"));
    }
    if pod.service_account != caller.service_account {
        return Err(no("has another service account"));
    }
    if pod.finished {
        return Err(no("is over"));
    }
    let node = pod.node.ok_or_else(|| no("is on no node"))?;
    match &bound.node {
        Some(token) if *token != node => {
            Err(Denied::NodeMismatch { caller: Box::new(caller.clone()), token: token.clone(), pod: node })
        }
        _ => Ok(Some(node)),
    }
}

#[cfg(test)]
#[path = "authorize_tests.rs"]
mod tests;
