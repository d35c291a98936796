//! What a pod's network looks like: interfaces, addresses, and the routes that its own packets take.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use net::Netns;
use net::netlink::{Message, Netlink, attributes, u32_at};
use nix::sys::socket::SockProtocol;

use crate::error::Error;
use crate::routing::Ipv6;

const RTM_GETLINK: u16 = 18;
const RTM_NEWLINK: u16 = 16;
const RTM_GETADDR: u16 = 22;
const RTM_NEWADDR: u16 = 20;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWROUTE: u16 = 24;
const IFLA_IFNAME: u16 = 3;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
const RTN_UNICAST: u8 = 1;
const TABLE_MAIN: u32 = 254;
/// `RTM_F_CLONED`: an entry of a cache.
const CLONED: u32 = 0x200;
/// Lengths of `ifinfomsg`, `ifaddrmsg` and `rtmsg`.
const LINK: usize = 16;
const ADDRESS: usize = 8;
const ROUTE: usize = 12;
/// The loopback device is the first of every namespace (kernel `LOOPBACK_IFINDEX`).
pub(super) const LOOPBACK: u32 = 1;

/// An address of the pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Address {
    pub(super) ip: IpAddr,
    pub(super) interface: u32,
}

/// A route of the pod's main table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Route {
    pub(super) destination: IpNet,
    /// 0 if it has several.
    pub(super) interface: u32,
    /// The address that packets come from.
    pub(super) source: Option<IpAddr>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Network {
    /// All but the loopback device, by name.
    pub(super) interfaces: BTreeMap<String, u32>,
    /// Those of the loopback device too, but for the loopback addresses.
    pub(super) addresses: Vec<Address>,
    pub(super) routes: Vec<Route>,
    pub(super) ipv6: Ipv6,
}

impl Network {
    pub(super) fn read(netns: &Netns) -> Result<Self, Error> {
        let failed =
            |source| Error::Netlink { action: "read the pod's network", netns: netns.to_string(), source };
        let mut netlink = Netlink::open(netns, SockProtocol::NetlinkRoute).map_err(failed)?;
        let interfaces = interfaces(&mut netlink).map_err(failed)?;
        let addresses = addresses(&mut netlink).map_err(failed)?;
        let routes = routes(&mut netlink, &addresses).map_err(failed)?;
        Ok(Self { interfaces, addresses, routes, ipv6: super::ipv6(netns) })
    }

    /// The address that a connection to anywhere would come from.
    pub(super) fn any_source(&self, v6: bool) -> Option<IpAddr> {
        let own = self.addresses.iter().filter(|a| a.ip.is_ipv6() == v6 && !is_link_local(a.ip));
        own.min_by_key(|a| a.interface == LOOPBACK).map(|a| a.ip)
    }
}

pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn interfaces(netlink: &mut Netlink) -> io::Result<BTreeMap<String, u32>> {
    let mut found = BTreeMap::new();
    netlink.dump(Message::new(RTM_GETLINK, 0).body(&[0; LINK]), |kind, payload| {
        let index = u32_at(payload, 4).filter(|index| *index != LOOPBACK && kind == RTM_NEWLINK);
        let name = attribute(payload, LINK, IFLA_IFNAME);
        if let (Some(index), Some(name)) = (index, name) {
            found.insert(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned(), index);
        }
    })?;
    Ok(found)
}

fn addresses(netlink: &mut Netlink) -> io::Result<Vec<Address>> {
    let mut found = Vec::new();
    netlink.dump(Message::new(RTM_GETADDR, 0).body(&[0; ADDRESS]), |kind, payload| {
        // An `ifaddrmsg`: family, prefix length, flags, scope, index. IPv4 has its own address in IFA_LOCAL.
        let ip = attribute(payload, ADDRESS, IFA_LOCAL).or_else(|| attribute(payload, ADDRESS, IFA_ADDRESS));
        let ip = ip.and_then(address).filter(|ip| kind == RTM_NEWADDR && !ip.is_loopback());
        if let (Some(interface), Some(ip)) = (u32_at(payload, 4), ip) {
            found.push(Address { ip, interface });
        }
    })?;
    Ok(found)
}

fn routes(netlink: &mut Netlink, addresses: &[Address]) -> io::Result<Vec<Route>> {
    let mut found = Vec::new();
    netlink.dump(Message::new(RTM_GETROUTE, 0).body(&[0; ROUTE]), |kind, payload| {
        let attribute = |wanted| attribute(payload, ROUTE, wanted);
        let table = attribute(RTA_TABLE).and_then(|value| u32_at(value, 0));
        let unicast =
            payload.get(7) == Some(&RTN_UNICAST) && u32_at(payload, 8).is_some_and(|f| f & CLONED == 0);
        let (Some(family), Some(bits)) = (payload.first(), payload.get(1)) else { return };
        if kind != RTM_NEWROUTE || table != Some(TABLE_MAIN) || !unicast {
            return;
        }
        let zero = if *family == 2 { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        let ip = attribute(RTA_DST).and_then(address).unwrap_or(zero);
        let Ok(destination) = IpNet::new(ip, *bits) else { return };
        // Those who speak to a neighbour's link-local address name the device, which our routes are not for.
        if ip.is_multicast() || (ip.is_ipv6() && is_link_local(ip)) {
            return;
        }
        let interface = attribute(RTA_OIF).and_then(|value| u32_at(value, 0)).unwrap_or(0);
        let own = || {
            let mut own =
                addresses.iter().filter(|a| a.interface == interface && a.ip.is_ipv6() == ip.is_ipv6());
            own.find(|a| !is_link_local(a.ip)).map(|a| a.ip)
        };
        let source = attribute(RTA_PREFSRC).and_then(address).or_else(own);
        found.push(Route { destination, interface, source });
    })?;
    Ok(found)
}

fn attribute(payload: &[u8], header: usize, wanted: u16) -> Option<&[u8]> {
    attributes(payload.get(header..)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

pub(super) fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}
