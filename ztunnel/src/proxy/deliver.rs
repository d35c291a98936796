//! The last step of an inbound connection: from a permission to a socket of the application.

use std::io::ErrorKind;
use std::net::SocketAddr;

use model::Permit;
use net::ConnectOptions;
use tokio::net::TcpStream;

use super::Proxy;
use super::failure::Failure;
use super::pod::LocalPod;

/// Odd ports that are tried before the kernel chooses; more than this are taken only when a client has thousands of
/// connections.
const ODD_PORTS_TRIED: usize = 3;

/// Connects to the application that `permit` is for, with the client's address as the source, so that the
/// application sees who it talks to. There is no other way to an application than a [`Permit`].
///
/// # Errors
/// The application does not take the connection.
pub async fn deliver(proxy: &Proxy, pod: &LocalPod, permit: &Permit) -> Result<TcpStream, Failure> {
    let is_beside = permit.connection().source().is_none();
    deliver_beside(proxy, pod, permit, is_beside).await
}

/// The same. `is_beside` says that connections of the client's own come to the same address: with the port of another of them,
/// what is delivered would be taken for that one, and both would break.
///
/// # Errors
/// As [`deliver`].
pub async fn deliver_beside(
    proxy: &Proxy,
    pod: &LocalPod,
    permit: &Permit,
    is_beside: bool,
) -> Result<TcpStream, Failure> {
    let connection = permit.connection();
    let (client, to) = (connection.source_ip(), connection.destination());
    // A pod that calls itself: its own address needs no transparent socket. Families differ when a dual-stack
    // service was reached by the other one; then the source can't be the client's.
    let own = client == to.ip() || client.is_ipv4() != to.is_ipv4();
    // Within the pod: an end that is gone says so, there is nothing on the way to probe for.
    let connect = async |port: Option<u16>| {
        let source = port.map(|port| SocketAddr::new(client, port));
        let options = ConnectOptions { source, keepalive: None, unpaced: true, ..ConnectOptions::default() };
        net::connect(&pod.netns, &options, to, proxy.limits.connect_timeout).await
    };
    let failed = |e: net::SocketError| Failure::Connect { to, reason: e.source.to_string() };
    if own {
        return connect(None).await.map_err(failed);
    }
    if is_beside {
        // Linux gives even ports to those who connect without one (kernel net/ipv4/inet_hashtables.c,
        // `__inet_hash_connect`).
        for _ in 0..ODD_PORTS_TRIED {
            match connect(Some(odd_port(proxy.random()))).await {
                Err(e) if matches!(e.kind(), ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable) => {}
                other => return other.map_err(failed),
            }
        }
    }
    connect(Some(0)).await.map_err(failed)
}

/// An odd one of the ports that Linux gives out by default (`ip_local_port_range`).
fn odd_port(random: u64) -> u16 {
    let number = u16::try_from(random % 14_116).unwrap_or(0);
    32_769 + 2 * number
}
