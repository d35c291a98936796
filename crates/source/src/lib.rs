//! Where a proxy's configuration and identity come from: in file mode a directory of manifests and a CA of its own, in a
//! cluster a control plane and its CA. Both proxies stand on it.
//!
//! * [`Mode`]: which of the two, by flags that belong together;
//! * [`Source`]: what is followed, as steps from one snapshot to the next;
//! * [`State`]: the snapshot that all decisions are made by, and whether it may be worked by yet;
//! * [`Tls`]: handshakes as workloads of the mesh, and whether a peer is still trusted after the roots have changed.
//!
//! Invariants:
//! * a step is put in force whole, and acknowledged after that;
//! * the last good version of what can't be read stays in force.
#![forbid(unsafe_code)]

mod cluster;
mod files;
mod place;
mod settings;
mod state;
mod tls;
mod waypoint;
mod xds;

use config::compile::EnrolmentChange;
use model::Change;
use serde_json::Value;

pub use self::files::Files;
pub use self::place::Place;
pub use self::settings::{ClusterMode, FileMode, Mode, RawSettings};
pub use self::state::State;
pub use self::tls::{REAUTHENTICATION, Tls};
pub use self::xds::{Xds, XdsStatus};

/// What a node's proxy asks a control plane for: settings, and policies, before the workloads, since by these alone nothing
/// is decided.
pub const NODE_TYPES: [&str; 3] =
    [proto::MESH_SETTINGS_TYPE_URL, proto::AUTHORIZATION_TYPE_URL, proto::ADDRESS_TYPE_URL];

/// What a waypoint asks for: the same, where of the addresses it gets the services; the workloads that it needs; and what
/// it does for services, last of all, since it names the rest.
pub const WAYPOINT_TYPES: [&str; 10] = [
    proto::MESH_SETTINGS_TYPE_URL,
    proto::AUTHORIZATION_TYPE_URL,
    proto::AUTHORIZER_TYPE_URL,
    proto::AUTHENTICATION_TYPE_URL,
    proto::RATE_LIMIT_TYPE_URL,
    proto::HTTP_POLICY_TYPE_URL,
    proto::TRAFFIC_TYPE_URL,
    proto::ADDRESS_TYPE_URL,
    proto::REACHABLE_TYPE_URL,
    proto::HTTP_SERVICE_TYPE_URL,
];

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
    /// Which pods of the node are to be captured, and how, as far as it changed.
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
    #[must_use]
    pub fn diagnostics(&self) -> Value {
        match self {
            Self::Files(files) => files.diagnostics(),
            Self::Xds(xds) => xds.diagnostics(),
        }
    }
}
