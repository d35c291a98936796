//! Where a redirected datagram was meant to go.
//!
//! `SO_ORIGINAL_DST` knows connections only. For datagrams conntrack itself is asked, by the addresses that a
//! reply would have (kernel include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::sys::socket::SockProtocol;

use crate::netlink::{Message, Netlink, attribute, attributes};
use crate::netns::Netns;
use crate::original_dst::canonical;

const IPCTNL_MSG_CT_GET: u16 = 1 << 8 | 1;
const NFGENMSG: usize = 4;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const NESTED: u16 = 0x8000;

/// Questions to the connection tracking of a namespace. Each takes some microseconds and needs
/// `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct Conntrack {
    netlink: Netlink,
}

impl Conntrack {
    /// Opens the table of `netns`.
    ///
    /// # Errors
    /// The namespace can't be entered, or the kernel lacks `CONFIG_NF_CT_NETLINK`.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        Netlink::open(netns, SockProtocol::NetlinkNetFilter).map(|netlink| Self { netlink })
    }

    /// Where `client` sent the datagram that was redirected to `local`; both as the receiver saw them
    /// ([`crate::Datagram::peer`], and [`crate::Datagram::local`] with the socket's port).
    ///
    /// # Errors
    /// `ENOENT`: the table doesn't know it.
    pub fn original_udp_dst(&mut self, client: SocketAddr, local: SocketAddr) -> io::Result<SocketAddr> {
        let (client, local) = (canonical(client), canonical(local));
        let family = if client.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let header = [u8::try_from(family).unwrap_or_default(), 0, 0, 0];
        let request = Message::new(IPCTNL_MSG_CT_GET, 0)
            .body(&header)
            .attribute(CTA_TUPLE_REPLY | NESTED, &udp_tuple(local, client));
        let mut found = None;
        self.netlink.get(request, |_, payload| found = original_dst(payload))?;
        found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }
}

fn udp_tuple(src: SocketAddr, dst: SocketAddr) -> Vec<u8> {
    let ip = match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            [attribute(CTA_IP_V4_SRC, &src.octets()), attribute(CTA_IP_V4_DST, &dst.octets())].concat()
        }
        (src, dst) => {
            let octets = |ip| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            [attribute(CTA_IP_V6_SRC, &octets(src)), attribute(CTA_IP_V6_DST, &octets(dst))].concat()
        }
    };
    let udp = u8::try_from(libc::IPPROTO_UDP).unwrap_or_default();
    let proto = [
        attribute(CTA_PROTO_NUM, &[udp]),
        attribute(CTA_PROTO_SRC_PORT, &src.port().to_be_bytes()),
        attribute(CTA_PROTO_DST_PORT, &dst.port().to_be_bytes()),
    ];
    [attribute(CTA_TUPLE_IP | NESTED, &ip), attribute(CTA_TUPLE_PROTO | NESTED, &proto.concat())].concat()
}

/// The destination of the original direction of an entry.
fn original_dst(payload: &[u8]) -> Option<SocketAddr> {
    let within = |bytes, wanted| attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let tuple = within(payload.get(NFGENMSG..)?, CTA_TUPLE_ORIG)?;
    let (ip, proto) = (within(tuple, CTA_TUPLE_IP)?, within(tuple, CTA_TUPLE_PROTO)?);
    let ip: IpAddr = match within(ip, CTA_IP_V4_DST) {
        Some(octets) => Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?).into(),
        None => Ipv6Addr::from(<[u8; 16]>::try_from(within(ip, CTA_IP_V6_DST)?).ok()?).into(),
    };
    let port = u16::from_be_bytes(within(proto, CTA_PROTO_DST_PORT)?.try_into().ok()?);
    Some(SocketAddr::new(ip, port))
}
