//! What a client has, for `status` of resources and for people.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use proto::Extensions;
use proto::wire::core::Node;

use super::store::Generation;
use super::subscription::TypeStatus;
use super::{Caller, ClientId};

/// One connected client.
#[derive(Clone, Debug)]
pub struct ClientStatus {
    /// Which stream; not used twice.
    pub id: ClientId,
    /// What it says of itself.
    pub node: Arc<Node>,
    /// Who it is.
    pub caller: Caller,
    /// Whether it is one of ours. Only then does an answer mean that it enforces what it was sent.
    pub audience: Extensions,
    /// Where it is, if that is known.
    pub peer: Option<SocketAddr>,
    /// Since when.
    pub connected: SystemTime,
    /// What it has, by type.
    pub types: Vec<TypeStatus>,
}

/// Whether a client has a resource.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Holds {
    /// It answered that it has it as it was made at that time, or newer.
    Yes,
    /// It has not answered yet.
    Pending,
    /// It refused it, and this is why.
    Rejected(Arc<str>),
    /// It does not ask for this type, or only for single names of it.
    NotSubscribed,
}

impl ClientStatus {
    /// Whether the client has what a change has made: of this type and name, and at the generation that
    /// [`Server::apply`](super::Server::apply) returned for it. `NotSubscribed` is also the answer for a client that
    /// asks for single names.
    #[must_use]
    pub fn holds(&self, type_url: &str, name: &str, generation: Generation) -> Holds {
        let Some(status) = self.types.iter().find(|t| &*t.type_url == type_url && t.wildcard) else {
            return Holds::NotSubscribed;
        };
        if let Some(rejected) = status.rejected.iter().find(|r| &*r.name == name) {
            return Holds::Rejected(Arc::clone(&rejected.reason));
        }
        if status.acked < generation {
            return Holds::Pending;
        }
        if status.blurred.is_some_and(|until| generation <= until) {
            return Holds::Rejected("it refused more than is remembered, and this may be among it".into());
        }
        Holds::Yes
    }
}
