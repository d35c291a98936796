//! Why a connection failed, and what each failure is called outside: the response flag of metrics, the status of
//! a CONNECT, the words of the log. They are chosen here and nowhere else.

use std::net::SocketAddr;

use identity::HandshakeError;
use model::{Deny, SpiffeId};
use process::metrics::tcp::FailureFlag;

use super::resolve::Refusal;

/// Why a connection never began.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The address that the application dialled can't be told.
    #[error("the original destination is not known: {0}")]
    OriginalDst(#[source] std::io::Error),
    /// Somebody dialled a listener of ztunnel itself.
    #[error("{0} is a listener of ztunnel, not a destination")]
    Loop(std::net::SocketAddr),
    /// Somebody beside the pod sent a packet for an address that is not on its wire.
    #[error("{0} can't be reached from outside of the pod")]
    NotReachable(std::net::SocketAddr),
    /// There is nowhere to go.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Policy does not allow it.
    #[error("{0}")]
    Denied(Deny),
    /// The peer refused it by its policy.
    #[error("the peer's policy refused the connection (status {0})")]
    PeerDenied(u16),
    /// The peer refused it for another reason.
    #[error("the peer answered the CONNECT with status {0}")]
    PeerStatus(u16),
    /// The destination can't be reached.
    #[error("connect to {to}: {reason}")]
    Connect {
        /// What was dialled.
        to: std::net::SocketAddr,
        /// Why it failed.
        reason: String,
    },
    /// The client's connection failed before there was anybody to talk to.
    #[error("the client's connection: {0}")]
    Application(String),
    /// What the application had said first, to a tunnel that was refused, did not get to another endpoint.
    #[error("send to {to} what the application said first: {reason}")]
    Ahead {
        /// Where to.
        to: std::net::SocketAddr,
        /// Why it failed.
        reason: String,
    },
    /// The host name of an endpoint can't be resolved.
    #[error("resolve {0}: {1}")]
    Resolve(String, String),
    /// The TLS handshake failed.
    #[error("TLS handshake with {to}: {reason}")]
    Tls {
        /// The peer.
        to: std::net::SocketAddr,
        /// Why it failed.
        reason: String,
    },
    /// The HTTP/2 connection failed.
    #[error("HBONE connection to {to}: {reason}")]
    Http2 {
        /// The peer.
        to: std::net::SocketAddr,
        /// Why it failed.
        reason: String,
    },
    /// There is no certificate for the pod.
    #[error("no certificate for {0}: {1}")]
    Identity(SpiffeId, String),
    /// The pod is not (or no longer) in the configuration.
    #[error("nothing is known of the pod {0}: its manifest was removed or is invalid")]
    UnknownPod(model::Str),
    /// The control plane has not told of the pod (yet), so its policies are not known.
    #[error("the control plane has not told of the pod {0}, so that its policies are not known")]
    NotKnownYet(model::Str),
    /// The control plane has not told what there is.
    #[error("the control plane has not told yet what workloads, services and policies there are")]
    NothingKnownYet,
    /// The CONNECT asks for an address that is not the pod's.
    #[error("CONNECT to {authority}, and this is {local}: a tunnel ends at the pod that it was opened to")]
    WrongAddress {
        /// What was asked for.
        authority: String,
        /// The pod's address.
        local: std::net::IpAddr,
    },
    /// The CONNECT asks for a port of ztunnel's own.
    #[error("CONNECT to port {0}, a listener of ztunnel")]
    ListenerPort(u16),
    /// The pod has as many connections as it may have.
    #[error("the pod has {0} open connections, the limit")]
    TooMany(usize),
    /// All pods' connections together have as many descriptors as they may have.
    #[error("all connections have {0} descriptors, the limit")]
    NoDescriptors(usize),
    /// There are as many HBONE connections as there may be.
    #[error("{0}")]
    NoRoom(#[source] super::peers::NoRoom),
    /// ztunnel is stopping.
    #[error("ztunnel is draining")]
    Draining,
}

impl Failure {
    /// What the failure of a handshake with `peer`, as `own`, is called here.
    pub fn of_handshake(peer: SocketAddr, own: &SpiffeId, error: &HandshakeError) -> Self {
        match error {
            HandshakeError::OwnCertificate(reason) => Self::Identity(own.clone(), reason.to_string()),
            other => Self::Tls { to: peer, reason: other.to_string() },
        }
    }

    /// The value of the `response_flags` label.
    pub fn flag(&self) -> FailureFlag {
        match self {
            Self::Denied(_) | Self::PeerDenied(_) | Self::Refused(Refusal::RegistryOnly(_)) => {
                FailureFlag::Deny
            }
            Self::Tls { .. } => FailureFlag::TlsFailure,
            Self::Http2 { .. } => FailureFlag::H2HandshakeFailure,
            Self::Identity(..) | Self::UnknownPod(_) | Self::NotKnownYet(_) => FailureFlag::IdentityError,
            _ => FailureFlag::Connect,
        }
    }

    /// The answer to a CONNECT (facts: 400 for what is malformed, 401 for policy, 503 for the rest).
    pub fn status(&self) -> u16 {
        match self {
            Self::Denied(_) => 401,
            Self::WrongAddress { .. } | Self::ListenerPort(_) | Self::Loop(_) => 400,
            _ => 503,
        }
    }

    /// What a client's end is told of a failure at the other end, which has the identity `other`, where this process is
    /// both: the same as of another node's.
    pub fn of_other_end(self, other: &SpiffeId) -> Self {
        match self {
            Self::TooMany(_) | Self::NoDescriptors(_) | Self::NotKnownYet(_) | Self::UnknownPod(_) => {
                Self::PeerStatus(503)
            }
            Self::Identity(id, _) if id == *other => Self::PeerStatus(503),
            same => same,
        }
    }

    /// The same failure for another caller who waited for the same connection. A connector fails only in these ways.
    pub fn shared(&self) -> Self {
        match self {
            Self::Connect { to, reason } => Self::Connect { to: *to, reason: reason.clone() },
            Self::Tls { to, reason } => Self::Tls { to: *to, reason: reason.clone() },
            Self::Identity(id, reason) => Self::Identity(id.clone(), reason.clone()),
            other => Self::Resolve("peer".into(), other.to_string()),
        }
    }

    /// Whether another endpoint of the same service may fare better. Policy and what is malformed do not change
    /// with the endpoint.
    pub fn worth_another_endpoint(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. }
                | Self::Tls { .. }
                | Self::Resolve(..)
                | Self::PeerStatus(503)
                | Self::Http2 { .. }
        )
    }

    /// Whether another endpoint may be tried, with what was sent `ahead` to this one, which may be a `waypoint`.
    pub fn elsewhere(&self, ahead: bool, waypoint: bool) -> bool {
        self.worth_another_endpoint() && !(ahead && self.may_have_passed_on(waypoint))
    }

    /// Whether something that was sent ahead of the peer's answer may have got to an application: then no other may get
    /// it too. It may where the answer never came. A ztunnel refuses before it passes anything on; a `waypoint`, of another
    /// make, may have passed it on before it fails the request.
    fn may_have_passed_on(&self, waypoint: bool) -> bool {
        match self {
            Self::Http2 { .. } => true,
            Self::PeerStatus(_) | Self::PeerDenied(_) => waypoint,
            // There was no tunnel yet.
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_arrived_goes_nowhere_else() {
        let to: SocketAddr = "10.0.0.1:15008".parse().unwrap();
        let reason = String::new;
        // The failure; whether another endpoint is tried with nothing sent, with something sent, and if to a waypoint.
        for (failure, nothing, something, to_waypoint) in [
            (Failure::Connect { to, reason: reason() }, true, true, true),
            (Failure::Tls { to, reason: reason() }, true, true, true),
            (Failure::Resolve(reason(), reason()), true, true, true),
            (Failure::PeerStatus(503), true, true, false),
            (Failure::Http2 { to, reason: reason() }, true, false, false),
            (Failure::PeerStatus(400), false, false, false),
            (Failure::PeerStatus(502), false, false, false),
            (Failure::PeerDenied(401), false, false, false),
            (Failure::Application(reason()), false, false, false),
            (Failure::Ahead { to, reason: reason() }, false, false, false),
            (Failure::Draining, false, false, false),
        ] {
            let goes_on = |ahead: bool, waypoint| failure.elsewhere(ahead, waypoint);
            let all = [goes_on(false, false), goes_on(true, false), goes_on(true, true)];
            assert_eq!(all, [nothing, something, to_waypoint], "{failure:?}");
            assert_eq!(goes_on(false, true), nothing, "{failure:?}");
        }
    }
}
