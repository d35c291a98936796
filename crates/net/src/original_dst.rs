//! Where a redirected connection was meant to go.
//!
//! A `REDIRECT` rule rewrites the destination and conntrack remembers it; the socket options here look it up
//! by the connection's addresses (kernel `nf_conntrack_proto.c`, `getorigdst` and `ipv6_getorigdst`). Capture without netfilter
//! rewrites nothing: there the destination is the socket's own address.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::SockRef;
use tokio::net::TcpStream;

/// The destination that the client dialled, for a connection that arrived at a redirecting listener from
/// `peer`: one system call. `peer` is what `accept` returned; on a dual-stack listener it is IPv4-mapped for
/// an IPv4 client, and its family decides which table is asked. The result is never IPv4-mapped.
///
/// For a connection that nothing redirected this is the listener's own address, and so it is for one that was redirected and
/// that conntrack has forgotten: one to the listener's own port must be refused.
///
/// # Errors
/// The kernel's, of a connection that is over.
pub fn original_dst(stream: &TcpStream, peer: SocketAddr) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let address = match peer.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    let address = match address {
        // Nothing was rewritten that the kernel knows of.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT)) => {
            return stream.local_addr().map(canonical);
        }
        address => address?,
    };
    address.as_socket().map(canonical).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The address with an IPv4-mapped IPv6 address in its plain form.
#[must_use]
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
