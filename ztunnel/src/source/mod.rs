//! Where the configuration comes from: in file mode a directory of manifests, in a cluster a control plane.

mod files;
mod place;
mod xds;

use model::Change;
use serde_json::Value;

pub use self::files::Files;
pub use self::place::Place;
pub use self::xds::{Xds, XdsStatus};
use crate::node::EnrolmentChange;

/// A source that is followed.
pub enum Source {
    /// A directory.
    Files(Box<Files>),
    /// A control plane.
    Xds(Box<Xds>),
}

/// A step of the configuration, to be put in force as one.
#[derive(Debug, Default)]
pub struct Update {
    /// From the snapshot as it is to the next one.
    pub changes: Vec<Change>,
    /// Which of the node's pods are to be captured, and how, as far as it changed.
    pub enrolments: Vec<EnrolmentChange>,
    /// Whether the snapshot after it holds all that the source has, so that it may be worked by.
    pub complete: bool,
}

impl Source {
    /// The next step; `None` when there will be none any more.
    pub async fn next(&mut self) -> Option<Update> {
        match self {
            Self::Files(files) => Some(files.next().await),
            Self::Xds(xds) => xds.next().await,
        }
    }

    /// Says that the last step is in force.
    pub fn applied(&mut self) {
        match self {
            Self::Files(_) => {}
            Self::Xds(xds) => xds.applied(),
        }
    }

    /// All there is to say of the configuration as it is.
    pub fn diagnostics(&self) -> Value {
        match self {
            Self::Files(files) => files.diagnostics(),
            Self::Xds(xds) => xds.diagnostics(),
        }
    }
}
