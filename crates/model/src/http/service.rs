//! What a waypoint does for one service.

use std::fmt;
use std::sync::Arc;

use super::{RouteTable, StreamTable};
use crate::telemetry::Telemetry;
use crate::{PolicyKey, ServiceKey, Str};

/// A waypoint, by the Gateway that it is.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WaypointKey {
    /// The Gateway's namespace.
    pub namespace: Str,
    /// The Gateway's name.
    pub name: Str,
}

impl fmt::Display for WaypointKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What a waypoint does for one service that is bound to it.
#[derive(Clone, PartialEq, Debug)]
pub struct HttpService {
    /// The service.
    pub service: ServiceKey,
    /// Who does it.
    pub waypoint: WaypointKey,
    /// The ports of the service.
    pub ports: Box<[HttpPort]>,
    /// The policies that hold for what reaches it, by name; one that is listed and not known refuses.
    pub policies: Box<[PolicyKey]>,
    /// The policies of the workloads behind it that are enforced here, for the client and not for the waypoint: one set
    /// for each combination that there is among the workloads. Which of them takes a request is not known when it is
    /// decided, so each set must let it in. Nearly always there is one, or none.
    pub selected: Box<[Box<[PolicyKey]>]>,
    /// Of these sets those of the workloads behind other services that its routes lead to, which are asked about the request as
    /// that service gets it where no waypoint stands before that. Services without any are left out.
    pub led_to: Box<[LedTo]>,
    /// Whose tokens are looked for in what reaches it, by name; one that is listed and not known refuses.
    pub authentication: Box<[PolicyKey]>,
    /// The rate limits that hold for what reaches it, by name; one that is listed and not known refuses.
    pub rate_limits: Box<[PolicyKey]>,
    /// What is told of its requests. Shared by services of which the same is told.
    pub telemetry: Arc<Telemetry>,
}

impl HttpService {
    /// The port `number`.
    #[must_use]
    pub fn port(&self, number: u16) -> Option<&HttpPort> {
        self.ports.iter().find(|p| p.number == number)
    }
}

/// A service that routes of another lead to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LedTo {
    /// The service.
    pub service: ServiceKey,
    /// The policies of the workloads behind it, as [`HttpService::selected`] has them.
    pub selected: Box<[Box<[PolicyKey]>]>,
}

/// A port of a service.
#[derive(Clone, PartialEq, Debug)]
pub struct HttpPort {
    /// The service's port.
    pub number: u16,
    /// What is spoken there.
    pub protocol: Protocol,
    /// The routes of its requests. Without any, requests go to the service itself.
    pub routes: Arc<RouteTable>,
    /// The routes of connections that are not HTTP, or of which nobody looks for it.
    pub streams: Arc<StreamTable>,
}

/// What is spoken at a port: by `appProtocol`, or the name's prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Protocol {
    /// Nothing is said: the first bytes tell.
    #[default]
    Detect,
    /// HTTP/1.1; HTTP/2 by prior knowledge is taken too.
    Http,
    /// HTTP/2 by prior knowledge (h2c, gRPC).
    Http2,
    /// Bytes.
    Tcp,
    /// Bytes that begin with a TLS handshake.
    Tls,
}

impl Protocol {
    /// What is spoken at a port of this application protocol (`appProtocol`, or the prefix of the port's name).
    #[must_use]
    pub fn of(app: &str) -> Self {
        match app.to_ascii_lowercase().as_str() {
            "" => Self::Detect,
            "http" | "kubernetes.io/ws" => Self::Http,
            "http2" | "grpc" | "grpc-web" | "kubernetes.io/h2c" => Self::Http2,
            "https" | "tls" | "kubernetes.io/wss" => Self::Tls,
            _ => Self::Tcp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Protocol;

    #[test]
    fn websocket_is_requests_in_the_clear_and_bytes_within_tls() {
        assert_eq!(Protocol::of("kubernetes.io/ws"), Protocol::Http);
        assert_eq!(Protocol::of("kubernetes.io/wss"), Protocol::of("https"));
        assert_eq!(Protocol::of("https"), Protocol::Tls);
    }
}
