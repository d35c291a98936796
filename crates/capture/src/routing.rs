//! The policy route that brings an application's replies to ztunnel.
//!
//! ztunnel connects to the application with the client's own address. The application's reply is addressed to
//! the client, which is elsewhere; its mark, restored from the connection, selects a table in which every
//! address is local, so that the reply meets ztunnel's socket.
//!
//! What is added carries a protocol number of our own; only that is removed again.

use std::io;

use net::netlink::{CREATE, EXCLUSIVE, Message, Netlink, attributes, u32_at};
use net::{MARK_MASK, Netns};
use nix::libc;
use nix::sys::socket::SockProtocol;

use crate::error::Error;

/// The mark of packets that go to the table (facts of compatibility: Istio's).
pub(crate) const REPLY_MARK: u32 = 0x111;
/// The table and the preference of the rule (facts of compatibility: Istio's).
const TABLE: u32 = 100;
const PREFERENCE: u32 = 32764;
/// `protocol` in the listings of `ip`; 187 to 250 are free but for a few routing daemons.
pub(crate) const OUR_PROTOCOL: u8 = 211;
/// The loopback device is the first of every namespace (kernel `LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
const RTA_OIF: u16 = 4;
const RTA_TABLE: u16 = 15;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
const FR_ACT_TO_TBL: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RT_SCOPE_HOST: u8 = 254;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;

/// Whether the pod speaks IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ipv6 {
    /// It does.
    Enabled,
    /// It is switched off in the namespace (`disable_ipv6`). The rules are in place; only the source address
    /// of IPv6 clients could not be kept, should it be switched on: install again then.
    Disabled,
    /// The kernel has none.
    Absent,
}

/// Adds rules and routes that aren't there. Whether anything was added, and the state of IPv6.
///
/// The loopback device of a new pod may still be down: runtimes raise it at the same time as they add the pod to its
/// network. Routes of IPv6 want it up.
pub(crate) fn install(netns: &Netns) -> Result<(bool, Ipv6), Error> {
    match add(netns) {
        Err(Error::Netlink { source, .. }) if source.raw_os_error() == Some(libc::ENETDOWN) => {
            loopback_up(netns)?;
            add(netns)
        }
        outcome => outcome,
    }
}

fn add(netns: &Netns) -> Result<(bool, Ipv6), Error> {
    let mut netlink = open(netns)?;
    let fail = |action| move |source| Error::Netlink { action, netns: netns.to_string(), source };
    let rule =
        added(netlink.acknowledged(rule(RTM_NEWRULE, AF_INET))).map_err(fail("add the policy rule"))?;
    let route =
        added(netlink.acknowledged(route(RTM_NEWROUTE, AF_INET))).map_err(fail("add the local route"))?;
    let mut changed = rule || route;
    let ipv6 = match added(netlink.acknowledged(self::rule(RTM_NEWRULE, AF_INET6))) {
        Err(error) if is_absent(&error) => Ipv6::Absent,
        rule => {
            changed |= rule.map_err(fail("add the IPv6 policy rule"))?;
            match added(netlink.acknowledged(self::route(RTM_NEWROUTE, AF_INET6))) {
                Err(error) if is_disabled(&error) => Ipv6::Disabled,
                route => {
                    changed |= route.map_err(fail("add the IPv6 local route"))?;
                    Ipv6::Enabled
                }
            }
        }
    };
    Ok((changed, ipv6))
}

/// What of it is missing, in words.
pub(crate) fn missing(netns: &Netns) -> Result<Vec<String>, Error> {
    let mut netlink = open(netns)?;
    let mut missing = Vec::new();
    for (family, name) in [(AF_INET, "ipv4"), (AF_INET6, "ipv6")] {
        let mut dump = |request, matches: fn(&[u8]) -> bool, action| {
            let mut found = false;
            match netlink.dump(request, |_, payload| found |= matches(payload)) {
                Err(error) if family == AF_INET6 && is_absent(&error) => Ok(true),
                Err(source) => Err(Error::Netlink { action, netns: netns.to_string(), source }),
                Ok(()) => Ok(found),
            }
        };
        let header = [family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        if !dump(Message::new(RTM_GETRULE, 0).body(&header), is_our_rule, "list policy rules")? {
            missing.push(format!("{name} rule fwmark {REPLY_MARK:#x}/{MARK_MASK:#x} lookup {TABLE}"));
        }
        let routes = dump(Message::new(RTM_GETROUTE, 0).body(&header), is_our_route, "list routes")?;
        if !routes && (family == AF_INET || !ipv6_is_disabled(netns)) {
            missing.push(format!("{name} route local default dev lo table {TABLE}"));
        }
    }
    Ok(missing)
}

/// Removes what [`install`] added, and nothing that someone else did. Whether there was anything.
pub(crate) fn remove(netns: &Netns) -> Result<bool, Error> {
    let mut netlink = open(netns)?;
    let mut changed = false;
    for family in [AF_INET, AF_INET6] {
        let requests = [
            (rule(RTM_DELRULE, family), "delete the policy rule"),
            (route(RTM_DELROUTE, family), "delete the local route"),
        ];
        for (request, action) in requests {
            match netlink.acknowledged(request) {
                Ok(()) => changed = true,
                Err(error) if is_gone(&error) || (family == AF_INET6 && is_absent(&error)) => {}
                Err(source) => return Err(Error::Netlink { action, netns: netns.to_string(), source }),
            }
        }
    }
    Ok(changed)
}

/// Brings the loopback device up; it is down in a new namespace, and routes want it up.
pub(crate) fn loopback_up(netns: &Netns) -> Result<(), Error> {
    // An `ifinfomsg`: family, padding, type, index, flags, which of the flags to change.
    let mut body = vec![0; 4];
    for field in [LOOPBACK, IFF_UP, IFF_UP] {
        body.extend(field.to_ne_bytes());
    }
    let raised = open(netns)?.acknowledged(Message::new(RTM_NEWLINK, 0).body(&body));
    raised.map_err(|source| Error::Netlink { action: "bring lo up", netns: netns.to_string(), source })
}

fn open(netns: &Netns) -> Result<Netlink, Error> {
    Netlink::open(netns, SockProtocol::NetlinkRoute)
        .map_err(|source| Error::Enter { netns: netns.to_string(), source })
}

/// `ip rule add fwmark 0x111/0xfff lookup 100 pref 32764 protocol 211`.
fn rule(kind: u16, family: u8) -> Message {
    // A `fib_rule_hdr`: family, prefix lengths, tos, table (in an attribute), reserved, action, flags.
    Message::new(kind, if kind == RTM_NEWRULE { CREATE | EXCLUSIVE } else { 0 })
        .body(&[family, 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0])
        .attribute(FRA_PRIORITY, &PREFERENCE.to_ne_bytes())
        .attribute(FRA_FWMARK, &REPLY_MARK.to_ne_bytes())
        .attribute(FRA_FWMASK, &MARK_MASK.to_ne_bytes())
        .attribute(FRA_TABLE, &TABLE.to_ne_bytes())
        .attribute(FRA_PROTOCOL, &[OUR_PROTOCOL])
}

/// `ip route add local default dev lo table 100 proto 211`.
fn route(kind: u16, family: u8) -> Message {
    // An `rtmsg`: family, prefix lengths, tos, table (in an attribute), protocol, scope, type, flags.
    Message::new(kind, if kind == RTM_NEWROUTE { CREATE | EXCLUSIVE } else { 0 })
        .body(&[family, 0, 0, 0, 0, OUR_PROTOCOL, RT_SCOPE_HOST, RTN_LOCAL, 0, 0, 0, 0])
        .attribute(RTA_OIF, &LOOPBACK.to_ne_bytes())
        .attribute(RTA_TABLE, &TABLE.to_ne_bytes())
}

fn is_our_rule(payload: &[u8]) -> bool {
    let wanted =
        [(FRA_PRIORITY, PREFERENCE), (FRA_FWMARK, REPLY_MARK), (FRA_FWMASK, MARK_MASK), (FRA_TABLE, TABLE)];
    has_all(payload, &wanted) && payload.get(7) == Some(&FR_ACT_TO_TBL)
}

fn is_our_route(payload: &[u8]) -> bool {
    let default = payload.get(1) == Some(&0);
    default
        && payload.get(7) == Some(&RTN_LOCAL)
        && has_all(payload, &[(RTA_OIF, LOOPBACK), (RTA_TABLE, TABLE)])
}

fn has_all(payload: &[u8], wanted: &[(u16, u32)]) -> bool {
    let rest = payload.get(12..).unwrap_or_default();
    wanted
        .iter()
        .all(|(kind, value)| attributes(rest).any(|(k, v)| k == *kind && u32_at(v, 0) == Some(*value)))
}

/// Whether a request added something; that it is there already is fine.
fn added(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV))
}

/// The kernel has no such family.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EPFNOSUPPORT))
}

/// The device has no IPv6.
pub(crate) fn is_disabled(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EINVAL | libc::ENODEV))
}

/// Whether the kernel has IPv6 at all; a namespace may still have it switched off.
pub(crate) fn kernel_has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

/// Whether the pod in `netns` speaks IPv6.
pub(crate) fn ipv6(netns: &Netns) -> Ipv6 {
    match (kernel_has_ipv6(), ipv6_is_disabled(netns)) {
        (false, _) => Ipv6::Absent,
        (true, true) => Ipv6::Disabled,
        (true, false) => Ipv6::Enabled,
    }
}

fn ipv6_is_disabled(netns: &Netns) -> bool {
    let read = || std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6");
    let value = netns.run(read).and_then(|value| value);
    value.map_or(true, |value| value.trim() == "1")
}
