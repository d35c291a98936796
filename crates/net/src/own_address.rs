//! Whether an address is a namespace's own, and whether anybody can be reached from there.

use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
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

/// Whether `netns` has no device that is up, other than loopback: nothing gets out of it or into it. That of a pod is left like
/// this by the network plugin's DEL, for as long as something holds it.
///
/// # Errors
/// It can't be entered, or not be asked.
pub fn is_cut_off(netns: &Netns) -> io::Result<bool> {
    let is_way = |flags: InterfaceFlags| {
        flags.contains(InterfaceFlags::IFF_UP) && !flags.contains(InterfaceFlags::IFF_LOOPBACK)
    };
    let has_way = netns.run(|| Ok::<_, io::Error>(getifaddrs()?.any(|device| is_way(device.flags))))??;
    Ok(!has_way)
}
