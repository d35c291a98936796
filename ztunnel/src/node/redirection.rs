//! Who redirects the pods' traffic to the listeners: this process in file mode, the node agent in Kubernetes.
//!
//! All but [`Redirection::name`] blocks for some milliseconds.

use std::sync::Arc;

use capture::{Backend, Capture, Cut, Drift, Ipv6, LiveConnection, Rules, replace};
use net::netlink::Devices;
use net::{Netns, sock_diag};

use super::adopted::before;
use super::record::{Entry, Record};
use crate::verdicts::Attach;

/// Who redirects. Clones share it.
#[derive(Clone)]
pub enum Redirection {
    /// This process does, and notes where for the next one.
    Own {
        /// What writes the rules.
        capture: Arc<dyn Capture>,
        /// Where they are written.
        record: Arc<Record>,
    },
    /// The node agent does. It lets a pod begin when we have said that its listeners stand, and takes the redirection
    /// away before it says that the pod leaves.
    Agent,
}

/// What came of beginning with a pod.
pub struct Begun {
    /// Whether IPv6 is captured too; `None` where somebody else captures.
    pub ipv6: Option<Ipv6>,
    /// The connections that lived before, and go past ztunnel.
    pub adopted: Vec<LiveConnection>,
}

/// What looking at a pod's redirection came to.
pub enum Verified {
    /// It is as it should be.
    Standing,
    /// It is another now, with the connections that it finds alive.
    Changed(Box<Rules>, Vec<LiveConnection>),
    /// Somebody else's, which may not have stood before; with the connections that live beside it.
    LookedAt(Vec<LiveConnection>),
    /// Somebody had changed it; with the connections that passed meanwhile, and those of before.
    Restored(Drift, Vec<LiveConnection>),
}

/// Why a connection of before the enrolment is not cut.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// The rules could not be changed.
    #[error(transparent)]
    Capture(#[from] capture::Error),
    /// The kernel does not end it, and there are no rules of ours to refuse its packets with.
    #[error(transparent)]
    Kernel(#[from] sock_diag::DestroyError),
}

impl Redirection {
    /// What captures, as it is called outside.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Own { capture, .. } => capture.backend().as_str(),
            Self::Agent => "node-agent",
        }
    }

    /// What makes the kernel's side of verdicts: where this process captures by the programs that know them, or the node agent is to
    /// prepare pods for them.
    pub fn verdicts(&self, of_agent: bool) -> Option<Attach> {
        match self {
            Self::Own { capture, .. } if capture.backend() == Backend::Ebpf => {
                Some(crate::verdicts::programs())
            }
            Self::Agent if of_agent => Some(crate::verdicts::of_agent()),
            Self::Own { .. } | Self::Agent => None,
        }
    }

    /// Whether the node agent redirects.
    pub fn is_agents(&self) -> bool {
        matches!(self, Self::Agent)
    }

    /// What changes of the pod's devices, where the rules that we write are for one each.
    pub fn devices(&self, netns: &Netns) -> Option<Devices> {
        let Self::Own { capture, .. } = self else { return None };
        if !capture.is_by_device() {
            return None;
        }
        let opened = Devices::open(netns);
        if let Err(error) = &opened {
            tracing::warn!(%netns, %error, "a device that is added is guarded after 30 seconds only");
        }
        opened.ok()
    }

    /// Redirects the traffic of `pod`, by whatever rules there were before.
    ///
    /// # Errors
    /// What could not be done. The pod is closed then, and not open.
    pub fn begin(&self, netns: &Netns, pod: &str, rules: &Rules) -> Result<Begun, capture::Error> {
        let Self::Own { capture, record } = self else {
            return Ok(Begun { ipv6: None, adopted: before(netns, rules) });
        };
        let installed = match record.note(netns, pod, capture.backend()) {
            Some(other) => {
                tracing::info!(pod, %other, "removing the redirection of another back-end");
                let installed = replace(&**capture, other, netns, rules)?;
                record.replaced(netns, pod, capture.backend());
                installed
            }
            None => capture.install(netns, rules)?,
        };
        Ok(Begun { ipv6: Some(installed.ipv6), adopted: before(netns, rules) })
    }

    /// Sees to it that the rules are `wanted`. `installed` are those that were; `is_new` says that the pod has just been
    /// enrolled.
    ///
    /// # Errors
    /// What could not be found out or done.
    pub fn verify(
        &self,
        netns: &Netns,
        wanted: Rules,
        installed: &Rules,
        is_new: bool,
    ) -> Result<Verified, capture::Error> {
        let Self::Own { capture, .. } = self else {
            // The agent looks after its own, and writes it after we have said that we listen. Until then connections
            // passed that nobody decided on.
            return Ok(if wanted != *installed {
                let adopted = before(netns, &wanted);
                Verified::Changed(Box::new(wanted), adopted)
            } else if is_new {
                Verified::LookedAt(before(netns, &wanted))
            } else {
                Verified::Standing
            });
        };
        if wanted != *installed {
            capture.install(netns, &wanted)?;
            let adopted = before(netns, &wanted);
            return Ok(Verified::Changed(Box::new(wanted), adopted));
        }
        let drift = capture.verify(netns, &wanted)?;
        if drift.is_none() {
            return Ok(Verified::Standing);
        }
        capture.install(netns, &wanted)?;
        Ok(Verified::Restored(drift, before(netns, &wanted)))
    }

    /// Captures nothing new, and keeps up what open connections need.
    ///
    /// # Errors
    /// What could not be done: new connections are refused.
    pub fn leave(&self, netns: &Netns, rules: &Rules) -> Result<(), capture::Error> {
        match self {
            Self::Own { capture, .. } => capture.install(netns, rules).map(drop),
            Self::Agent => Ok(()),
        }
    }

    /// Removes all of the redirection.
    ///
    /// # Errors
    /// What could not be done.
    pub fn end(&self, netns: &Netns) -> Result<(), capture::Error> {
        if let Self::Own { capture, record } = self {
            // One that could not be replaced.
            if let Some(other) = record.other(netns, capture.backend()) {
                remove_of(other, netns)?;
            }
            capture.remove(netns)?;
            record.forget(netns);
        }
        Ok(())
    }

    /// Removes the node's programs of verdicts, with what is left of verdicts. Whether there was anything.
    ///
    /// # Errors
    /// It stays, without a lease.
    pub fn end_verdicts(&self) -> Result<bool, capture::Error> {
        match self {
            Self::Own { .. } => capture::remove_verdicts(),
            Self::Agent => Ok(false),
        }
    }

    /// Removes what another back-end has left, if `entry` says that one has.
    ///
    /// # Errors
    /// What could not be done.
    pub fn end_other(&self, netns: &Netns, entry: &Entry) -> Result<(), capture::Error> {
        let Self::Own { capture, .. } = self else { return Ok(()) };
        match entry.backend.parse::<Backend>() {
            Ok(other) if other != capture.backend() => remove_of(other, netns).map(drop),
            _ => Ok(()),
        }
    }

    /// Removes what is kept outside of namespaces for pods whose namespace is gone: of an earlier process, which may have captured by
    /// another back-end. Of how many that was.
    pub fn sweep(&self) -> usize {
        match self {
            Self::Own { capture, .. } => capture.sweep(),
            Self::Agent => 0,
        }
    }

    /// The namespaces that an earlier process has left redirected.
    pub fn standing(&self) -> Vec<(Netns, Entry)> {
        match self {
            Self::Own { record, .. } => record.standing(),
            Self::Agent => Vec::new(),
        }
    }

    /// Ends a connection of before the enrolment. `rules` are those that are installed, and are changed where the
    /// kernel can't end connections.
    ///
    /// # Errors
    /// It goes on.
    pub fn cut(
        &self,
        netns: &Netns,
        rules: &mut Rules,
        connection: &sock_diag::Connection,
    ) -> Result<Cut, CutError> {
        match self {
            Self::Own { capture, .. } => Ok(capture::cut(&**capture, netns, rules, connection)?),
            Self::Agent => match sock_diag::destroy(netns, connection) {
                Ok(()) | Err(sock_diag::DestroyError::Gone) => Ok(Cut::Ended),
                Err(error) => Err(error.into()),
            },
        }
    }
}

/// Removes what a back-end that is not in use has left.
fn remove_of(backend: Backend, netns: &Netns) -> Result<bool, capture::Error> {
    match capture::probe(backend, &capture::Tools::default()) {
        Ok(other) => other.remove(netns),
        Err(missing) => Err(capture::Error::Unavailable { backend, missing: Box::new(missing) }),
    }
}
