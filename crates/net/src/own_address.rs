//! Whether an address is a namespace's own.

use std::net::{IpAddr, SocketAddr};

use socket2::Type;

use crate::netns::Netns;
use crate::socket::new_bound;

/// Whether `ip` is an address of `netns` that others reach it by: what is sent there from inside of it stays inside. An
/// address that can't be used yet (an IPv6 one that others may have) is none.
#[must_use]
pub fn has_address(netns: &Netns, ip: IpAddr) -> bool {
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
        return false;
    }
    let address = SocketAddr::new(ip, 0);
    // Nothing is sent, and the port is given back at once.
    let made = new_bound(netns, address, Type::STREAM, |_, _| Ok(()));
    made.is_ok_and(|(socket, address)| socket.bind(&address.into()).is_ok())
}
