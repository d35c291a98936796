//! The last step of an inbound connection: from a permission to a socket of the application.

use std::net::SocketAddr;

use model::Permit;
use net::ConnectOptions;
use tokio::net::TcpStream;

use super::Proxy;
use super::failure::Failure;
use super::pod::LocalPod;

/// Connects to the application that `permit` is for, with the client's address as the source, so that the
/// application sees who it talks to. There is no other way to an application than a [`Permit`].
///
/// # Errors
/// The application does not take the connection.
pub async fn deliver(proxy: &Proxy, pod: &LocalPod, permit: &Permit) -> Result<TcpStream, Failure> {
    let connection = permit.connection();
    let (client, to) = (connection.source_ip(), connection.destination());
    // A pod that calls itself: its own address needs no transparent socket. Families differ when a dual-stack
    // service was reached by the other one; then the source can't be the client's.
    let source = (client != to.ip() && client.is_ipv4() == to.is_ipv4()).then(|| SocketAddr::new(client, 0));
    // Within the pod: an end that is gone says so, there is nothing on the way to probe for.
    let options = ConnectOptions { source, keepalive: None, unpaced: true, ..ConnectOptions::default() };
    net::connect(&pod.netns, &options, to, proxy.limits.connect_timeout)
        .await
        .map_err(|e| Failure::Connect { to, reason: e.source.to_string() })
}
