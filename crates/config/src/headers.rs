//! Header fields that are the connection's, not the message's.

/// Fields, in lower case, that say where a message ends or what becomes of the connection. A waypoint writes its own, so that
/// policies never see the client's, and what else wrote them would give a message two ends.
const OF_CONNECTIONS: [&str; 8] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Whether a field is one of those, whatever the case of its name.
pub(crate) fn is_of_connection(name: &str) -> bool {
    OF_CONNECTIONS.iter().any(|taken| name.eq_ignore_ascii_case(taken))
}

/// Whether a request's field says who the client is: an application may take `_` for `-`. It is the waypoint's to set, since what
/// routes and tokens change may be led to somebody else's service.
pub(crate) fn is_the_clients(name: &str) -> bool {
    name.replace('_', "-").eq_ignore_ascii_case("x-forwarded-client-cert")
}
