//! The status of the mesh's objects: whether they are accepted, and how many of the proxies enforce a policy.
//!
//! ```text
//!   commits ──▶ followers ◀──────────── ledger ──▶ keeper ──▶ writer ──▶ API server
//!   streams ──▶ proxies ──▶ exchange      ▲          │
//!                             └─▶ others' peers ─────┘ asks
//! ```
//!
//! Every control plane knows which of the proxies that are connected to it hold which policy, and tells the others
//! ([`exchange`]); the leader asks them ([`peers`]), puts that together and writes it ([`ledger`]). Of several revisions
//! the one that an object's label names writes its status; of an object without one, the default revision, or, where there
//! is none, the first by name. Proxies that are alive and connected to no control plane count as those that do not enforce.

pub mod conditions;
pub mod exchange;
mod followers;
mod keeper;
pub mod ledger;
pub mod peers;
mod proxies;
mod writer;

use std::time::Duration;

use config::resource::Kind;
use serde::Serialize;

use conditions::Tally;
pub use followers::Followers;
pub use keeper::Keeper;
pub use proxies::{Proxies, proxy_name};
pub(crate) use writer::put_in;
pub use writer::{CONTROLLER, Writer};

/// For so long a proxy, or a control plane, that comes or goes does not take from a policy that it is enforced.
pub const FRESH: Duration = Duration::from_secs(10);

/// How the proxies of this control plane stand with a policy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PolicyAnswer {
    /// The policy's uid.
    pub uid: String,
    /// Its version.
    pub generation: i64,
    /// The proxies.
    pub tally: Tally,
}

/// Whether a kind is of policies, which proxies enforce.
fn is_policy(kind: Kind) -> bool {
    matches!(kind, Kind::AuthorizationPolicy | Kind::PeerAuthentication)
}
