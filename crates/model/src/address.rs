//! Addresses by role. A plain `SocketAddr` says nothing of what it is the address of; these do, so that the
//! address an application dialled is never mistaken for the one that the proxy dials.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::Str;

/// An IPv4-mapped IPv6 address (`::ffff:1.2.3.4`, RFC 4291 section 2.5.5.2) as the IPv4 address that it stands
/// for; any other address unchanged. Sockets of family v6 report v4 peers in the mapped form, and policies and
/// tables are written in the plain one.
#[must_use]
pub fn canonical_ip(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

macro_rules! role {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(SocketAddr);

        impl $name {
            /// Wraps `addr`, with an IPv4-mapped address in its plain form.
            #[must_use]
            pub fn new(addr: SocketAddr) -> Self {
                Self(SocketAddr::new(canonical_ip(addr.ip()), addr.port()))
            }

            /// The address and port.
            #[must_use]
            pub fn socket_addr(self) -> SocketAddr {
                self.0
            }

            /// The address alone.
            #[must_use]
            pub fn ip(self) -> IpAddr {
                self.0.ip()
            }

            /// The port alone.
            #[must_use]
            pub fn port(self) -> u16 {
                self.0.port()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

role! {
    /// Where an application tried to connect to before capture redirected it.
    OriginalDst
}
role! {
    /// A pod's own address and the port that its application listens on.
    PodAddr
}
role! {
    /// A virtual address of a service and the service's port.
    ServiceAddr
}
role! {
    /// Where a tunnel is dialled: a pod, waypoint or gateway, and its HBONE port.
    HboneAddr
}

/// An address on a network. Networks are disjoint address spaces; the empty name is the default one.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// The network's name, empty for the default one.
    pub network: Str,
    /// The address on it, never IPv4-mapped.
    pub ip: IpAddr,
}

impl NetworkAddress {
    /// The address `ip` (an IPv4-mapped one in its plain form) on `network`.
    #[must_use]
    pub fn new(network: Str, ip: IpAddr) -> Self {
        Self { network, ip: canonical_ip(ip) }
    }
}

impl fmt::Display for NetworkAddress {
    /// `network/ip`, the alias form of WDS names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}
