//! Where a redirected connection was meant to go.
//!
//! A `REDIRECT` rule rewrites the destination and conntrack remembers it; the socket options here look it up
//! by the connection's addresses (kernel `nf_conntrack_proto.c`, `getorigdst` and `ipv6_getorigdst`).

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::SockRef;
use tokio::net::TcpStream;

/// The destination that the client dialled, for a connection that arrived at a redirecting listener from
/// `peer`: one system call. `peer` is what `accept` returned; on a dual-stack listener it is IPv4-mapped for
/// an IPv4 client, and its family decides which table is asked. The result is never IPv4-mapped.
///
/// For a connection that nothing redirected this is the listener's own address, if conntrack saw it at all.
///
/// # Errors
/// `ENOENT`: conntrack doesn't know the connection (its entry was flushed, or no NAT rule is loaded);
/// `ENOPROTOOPT`: the kernel has no conntrack in this namespace. In both cases the destination isn't knowable,
/// and the connection must be refused.
pub fn original_dst(stream: &TcpStream, peer: SocketAddr) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let address = match peer.ip().to_canonical() {
        IpAddr::V4(_) => socket.original_dst_v4()?,
        IpAddr::V6(_) => socket.original_dst_v6()?,
    };
    address.as_socket().map(canonical).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The address with an IPv4-mapped IPv6 address in its plain form.
#[must_use]
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
