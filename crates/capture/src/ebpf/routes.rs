//! Policy rules and routes by which the pod's outgoing connections stay in it.
//!
//! ```text
//!   50  from this host, ztunnel's mark or the direct one    go to 59
//!   51  from this host, the replies' mark                   table 15390: everything is local
//!   52  from this host, DNS                                 table 15391: everything is local, with the source it would have
//!   53  from this host, ports that are left alone           go to 59
//!   54  from this host, ports that are always captured      table 15391
//!   55  from this host, TCP                                 table 15392: local, but for what is left alone
//!   56  from this host, TCP                                 go to 59
//!   57  TCP from elsewhere that is not for the pod          table 15390
//!   59  nothing: the pod's own rules follow
//! ```
//!
//! The kernel looks for own addresses before all of these. Whatever is wrong here, the guard refuses what leaves without having
//! been captured.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use net::netlink::{ACK, CREATE, Message, Netlink, attributes, u16_at, u32_at};
use net::{MARK_MASK, Netns};
use nix::libc;
use nix::sys::socket::SockProtocol;

use super::network::{LOOPBACK, Network, address};
use crate::backend::Drift;
use crate::error::Error;
use crate::routing::{OUR_PROTOCOL, REPLY_MARK, is_absent, is_disabled};
use crate::rules::{Include, PortRange, Rules};
use ebpf::layout;

/// Everything is local. Not the table that the other back-ends use: a route of others in it would be replaced.
const TABLE: u32 = 15390;
/// The same with a source address.
const TABLE_ALL: u32 = 15391;
/// The same for what the lists of destinations capture.
const TABLE_RANGES: u32 = 15392;
const FIRST: u32 = 50;
const LAST: u32 = 59;

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;
const FRA_IIFNAME: u16 = 3;
const FRA_GOTO: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
const FRA_IP_PROTO: u16 = 22;
const FRA_DPORT_RANGE: u16 = 24;
const FR_ACT_TO_TBL: u8 = 1;
const FR_ACT_GOTO: u8 = 2;
const FR_ACT_NOP: u8 = 3;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
const RTN_LOCAL: u8 = 2;
const RTN_THROW: u8 = 9;
const RT_SCOPE_HOST: u8 = 254;
const REPLACE: u16 = 0x100;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Length of `fib_rule_hdr` and of `rtmsg`.
const HEADER: usize = 12;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Action {
    Nothing,
    Skip,
    Table(u32),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Rule {
    v6: bool,
    preference: u32,
    from_here: bool,
    mark: Option<(u32, u32)>,
    protocol: Option<u8>,
    ports: Option<PortRange>,
    action: Action,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Route {
    table: u32,
    destination: IpNet,
    /// Not local: the next rule decides.
    throw: bool,
    source: Option<IpAddr>,
}

/// All that should be there.
#[derive(Debug)]
pub(super) struct Wanted {
    rules: BTreeSet<Rule>,
    routes: BTreeSet<Route>,
}

pub(super) fn wanted(rules: &Rules, network: &Network) -> Wanted {
    let mut wanted = Wanted { rules: BTreeSet::new(), routes: BTreeSet::new() };
    for v6 in [false, true] {
        wanted.rules(rules, v6);
        if !v6 || network.ipv6 == crate::Ipv6::Enabled {
            wanted.routes(rules, network, v6);
        }
    }
    wanted
}

impl Wanted {
    fn rules(&mut self, rules: &Rules, v6: bool) {
        let plain = Rule {
            v6,
            preference: FIRST,
            from_here: true,
            mark: None,
            protocol: None,
            ports: None,
            action: Action::Skip,
        };
        let tcp = Rule { protocol: Some(TCP), ..plain };
        let mut add = |rule: Rule| {
            self.rules.insert(rule);
        };
        add(Rule { mark: Some((layout::MARK_DIRECT, layout::MARK_DIRECT_MASK)), ..plain });
        add(Rule {
            preference: 51,
            mark: Some((REPLY_MARK, MARK_MASK)),
            action: Action::Table(TABLE),
            ..plain
        });
        add(Rule { preference: LAST, from_here: false, action: Action::Nothing, ..plain });
        if rules.leaving {
            return;
        }
        let all = Action::Table(TABLE_ALL);
        if rules.dns && !rules.exclude_outbound_ports.iter().any(|range| range.contains(53)) {
            for protocol in [TCP, UDP] {
                add(Rule {
                    preference: 52,
                    protocol: Some(protocol),
                    ports: PortRange::new(53, 53),
                    action: all,
                    ..plain
                });
            }
        }
        for range in &rules.exclude_outbound_ports {
            add(Rule { preference: 53, ports: Some(*range), ..tcp });
        }
        for range in &rules.include_outbound_ports {
            add(Rule { preference: 54, ports: Some(*range), action: all, ..tcp });
        }
        add(Rule { preference: 55, action: Action::Table(TABLE_RANGES), ..tcp });
        add(Rule { preference: 56, ..tcp });
        add(Rule { preference: 57, from_here: false, action: Action::Table(TABLE), ..tcp });
    }

    fn routes(&mut self, rules: &Rules, network: &Network, v6: bool) {
        let zero = if v6 { IpAddr::from([0; 16]) } else { IpAddr::from([0; 4]) };
        let Ok(everything) = IpNet::new(zero, 0) else { return };
        self.routes.insert(Route { table: TABLE, destination: everything, throw: false, source: None });
        if rules.leaving {
            return;
        }
        let excluded = |interface: u32| {
            let mut names = rules.exclude_interfaces.iter();
            names.any(|name| network.interfaces.get(name.as_str()) == Some(&interface))
        };
        // As the pod's own routes: the same sources, and past us where an excluded interface leads.
        let own = network.routes.iter().filter(|route| route.destination.addr().is_ipv6() == v6);
        let mut all: Vec<Route> = Vec::new();
        for route in own {
            let destination = route.destination.trunc();
            if all.iter().all(|known| known.destination != destination) {
                let throw = excluded(route.interface);
                let source = route.source.or_else(|| network.any_source(v6)).filter(|_| !throw);
                all.push(Route { table: TABLE_ALL, destination, throw, source });
            }
        }
        if all.iter().all(|route| route.destination != everything) {
            let source = network.any_source(v6);
            all.push(Route { table: TABLE_ALL, destination: everything, throw: false, source });
        }
        self.routes.extend(all.iter().copied());
        let mut some = match &rules.include_outbound_ranges {
            Include::All => all,
            Include::Only(ranges) => only(&all, ranges, v6),
        };
        let left_alone = IpNet::aggregate(&rules.exclude_outbound_ranges);
        let left_alone = left_alone.iter().filter(|range| matches!(range, IpNet::V6(_)) == v6);
        for range in left_alone {
            some.retain(|route| !range.contains(&route.destination));
            some.push(Route { table: TABLE_RANGES, destination: *range, throw: true, source: None });
        }
        self.routes.extend(some.into_iter().map(|route| Route { table: TABLE_RANGES, ..route }));
    }

    pub(super) fn drift(&self, netns: &Netns) -> Result<Drift, Error> {
        let (rules, routes) = (present_rules(netns)?, present_routes(netns)?);
        let mut drift = Drift::default();
        drift.missing.extend(self.rules.difference(&rules).map(|rule| format!("{rule:?}")));
        drift.missing.extend(self.routes.difference(&routes).map(|route| format!("{route:?}")));
        drift.unexpected.extend(rules.difference(&self.rules).map(|rule| format!("{rule:?}")));
        drift.unexpected.extend(routes.difference(&self.routes).map(|route| format!("{route:?}")));
        Ok(drift)
    }

    /// Makes it so. What is new comes before what is old goes, routes before the rules that lead to them and after those that
    /// led to them. Rules come in [`Rule::order`], and go the other way round.
    pub(super) fn apply(&self, netns: &Netns) -> Result<(), Error> {
        let (rules, routes) = (present_rules(netns)?, present_routes(netns)?);
        let mut netlink = open(netns)?;
        let fail = |action| move |source| Error::Netlink { action, netns: netns.to_string(), source };
        for route in self.routes.difference(&routes) {
            match netlink.acknowledged(route.message(RTM_NEWROUTE)) {
                Err(error)
                    if route.destination.addr().is_ipv6() && (is_disabled(&error) || is_absent(&error)) => {}
                added => added.map_err(fail("add a route"))?,
            }
        }
        let mut new: Vec<&Rule> = self.rules.difference(&rules).collect();
        new.sort_by_key(|rule| rule.order());
        for rule in new {
            match netlink.acknowledged(rule.message(RTM_NEWRULE)) {
                Err(error) if rule.v6 && is_absent(&error) => {}
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                added => added.map_err(fail("add a policy rule"))?,
            }
        }
        let mut old: Vec<&Rule> = rules.difference(&self.rules).collect();
        old.sort_by_key(|rule| Reverse(rule.order()));
        for rule in old {
            gone(netlink.acknowledged(rule.message(RTM_DELRULE))).map_err(fail("remove a policy rule"))?;
        }
        // A route with another source has replaced the old one.
        for route in routes.difference(&self.routes).filter(|old| !self.has(old)) {
            gone(netlink.acknowledged(route.message(RTM_DELROUTE))).map_err(fail("remove a route"))?;
        }
        Ok(())
    }

    fn has(&self, old: &Route) -> bool {
        self.routes.iter().any(|route| route.table == old.table && route.destination == old.destination)
    }
}

/// The routes to `ranges` alone, with the sources of `all`.
fn only(all: &[Route], ranges: &[IpNet], v6: bool) -> Vec<Route> {
    let mut some = Vec::new();
    for range in
        IpNet::aggregate(&ranges.to_vec()).into_iter().filter(|range| matches!(range, IpNet::V6(_)) == v6)
    {
        let covers = all.iter().filter(|route| route.destination.contains(&range));
        if let Some(cover) = covers.max_by_key(|route| route.destination.prefix_len()) {
            some.push(Route { destination: range, ..*cover });
        }
        some.extend(
            all.iter().filter(|route| range.contains(&route.destination) && route.destination != range),
        );
    }
    some
}

/// Whether the rules of a pod that is captured are there.
pub(super) fn captures(netns: &Netns) -> Result<bool, Error> {
    Ok(present_rules(netns)?.iter().any(|rule| rule.preference == 55 && !rule.v6))
}

/// Removes all of ours. Whether there was anything.
pub(super) fn remove(netns: &Netns) -> Result<bool, Error> {
    let nothing = Wanted { rules: BTreeSet::new(), routes: BTreeSet::new() };
    let drift = nothing.drift(netns)?;
    nothing.apply(netns)?;
    Ok(!drift.is_none())
}

impl Rule {
    /// When it comes: each is there for what those before it have left, and one that skips to the last does nothing without it.
    fn order(&self) -> (bool, u32) {
        (self.preference != LAST, self.preference)
    }

    fn message(&self, kind: u16) -> Message {
        let (action, table) = match self.action {
            Action::Nothing => (FR_ACT_NOP, None),
            Action::Skip => (FR_ACT_GOTO, None),
            Action::Table(table) => (FR_ACT_TO_TBL, Some(table)),
        };
        let family = if self.v6 { libc::AF_INET6 } else { libc::AF_INET };
        let family = u8::try_from(family).unwrap_or(0);
        // A `fib_rule_hdr`: family, prefix lengths, tos, table (in an attribute), reserved, action, flags.
        let mut message = Message::new(kind, if kind == RTM_NEWRULE { CREATE | ACK } else { ACK })
            .body(&[family, 0, 0, 0, 0, 0, 0, action, 0, 0, 0, 0])
            .attribute(FRA_PRIORITY, &self.preference.to_ne_bytes())
            .attribute(FRA_PROTOCOL, &[OUR_PROTOCOL]);
        if let Some(table) = table {
            message = message.attribute(FRA_TABLE, &table.to_ne_bytes());
        }
        if self.action == Action::Skip {
            message = message.attribute(FRA_GOTO, &LAST.to_ne_bytes());
        }
        if self.from_here {
            message = message.attribute(FRA_IIFNAME, b"lo\0");
        }
        if let Some((mark, mask)) = self.mark {
            message =
                message.attribute(FRA_FWMARK, &mark.to_ne_bytes()).attribute(FRA_FWMASK, &mask.to_ne_bytes());
        }
        if let Some(protocol) = self.protocol {
            message = message.attribute(FRA_IP_PROTO, &[protocol]);
        }
        if let Some(ports) = self.ports {
            let range = [ports.first().to_ne_bytes(), ports.last().to_ne_bytes()].concat();
            message = message.attribute(FRA_DPORT_RANGE, &range);
        }
        message
    }

    /// The rule that a listing tells of; `None` if it is not ours.
    fn read(payload: &[u8]) -> Option<Self> {
        let find = |wanted| {
            attributes(payload.get(HEADER..)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
        };
        let number = |wanted| find(wanted).and_then(|value| u32_at(value, 0));
        let preference = number(FRA_PRIORITY)?;
        let ours = find(FRA_PROTOCOL) == Some(&[OUR_PROTOCOL][..]) && (FIRST..=LAST).contains(&preference);
        let ports =
            find(FRA_DPORT_RANGE).and_then(|value| PortRange::new(u16_at(value, 0)?, u16_at(value, 2)?));
        ours.then_some(Self {
            v6: i32::from(*payload.first()?) == libc::AF_INET6,
            preference,
            from_here: find(FRA_IIFNAME) == Some(b"lo\0"),
            mark: number(FRA_FWMARK).zip(number(FRA_FWMASK)),
            protocol: find(FRA_IP_PROTO).and_then(|value| value.first().copied()),
            ports,
            action: match *payload.get(7)? {
                FR_ACT_TO_TBL => Action::Table(number(FRA_TABLE)?),
                FR_ACT_GOTO => Action::Skip,
                _ => Action::Nothing,
            },
        })
    }
}

impl Route {
    fn message(&self, kind: u16) -> Message {
        let (family, octets) = match self.destination.addr() {
            IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
            IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
        };
        let family = u8::try_from(family).unwrap_or(0);
        let (what, scope) = if self.throw { (RTN_THROW, 0) } else { (RTN_LOCAL, RT_SCOPE_HOST) };
        let bits = self.destination.prefix_len();
        // An `rtmsg`: family, prefix lengths, tos, table (in an attribute), protocol, scope, type, flags.
        let mut message = Message::new(kind, if kind == RTM_NEWROUTE { CREATE | REPLACE } else { 0 })
            .body(&[family, bits, 0, 0, 0, OUR_PROTOCOL, scope, what, 0, 0, 0, 0])
            .attribute(RTA_TABLE, &self.table.to_ne_bytes());
        if bits > 0 {
            message = message.attribute(RTA_DST, &octets);
        }
        if !self.throw {
            message = message.attribute(RTA_OIF, &LOOPBACK.to_ne_bytes());
        }
        if let Some(source) = self.source {
            let octets = match source {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            message = message.attribute(RTA_PREFSRC, &octets);
        }
        message
    }

    /// The route that a listing tells of; `None` if it is not ours.
    fn read(payload: &[u8]) -> Option<Self> {
        let find = |wanted| {
            attributes(payload.get(HEADER..)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
        };
        let table = find(RTA_TABLE).and_then(|value| u32_at(value, 0))?;
        let ours = payload.get(5) == Some(&OUR_PROTOCOL) && [TABLE, TABLE_ALL, TABLE_RANGES].contains(&table);
        let (family, bits) = (i32::from(*payload.first()?), *payload.get(1)?);
        let zero = if family == libc::AF_INET { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        let destination = IpNet::new(find(RTA_DST).and_then(address).unwrap_or(zero), bits).ok()?;
        ours.then_some(Self {
            table,
            destination,
            throw: payload.get(7) == Some(&RTN_THROW),
            source: find(RTA_PREFSRC).and_then(address),
        })
    }
}

fn present_rules(netns: &Netns) -> Result<BTreeSet<Rule>, Error> {
    let mut found = BTreeSet::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        dump(netns, family, RTM_GETRULE, "list the policy rules", |payload| {
            found.extend(Rule::read(payload));
        })?;
    }
    Ok(found)
}

fn present_routes(netns: &Netns) -> Result<BTreeSet<Route>, Error> {
    let mut found = BTreeSet::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        dump(netns, family, RTM_GETROUTE, "list the routes", |payload| found.extend(Route::read(payload)))?;
    }
    Ok(found)
}

fn dump(
    netns: &Netns,
    family: i32,
    kind: u16,
    action: &'static str,
    mut each: impl FnMut(&[u8]),
) -> Result<(), Error> {
    let mut header = [0; HEADER];
    header[0] = u8::try_from(family).unwrap_or(0);
    match open(netns)?.dump(Message::new(kind, 0).body(&header), |_, payload| each(payload)) {
        Err(error) if family == libc::AF_INET6 && is_absent(&error) => Ok(()),
        listed => listed.map_err(|source| Error::Netlink { action, netns: netns.to_string(), source }),
    }
}

fn open(netns: &Netns) -> Result<Netlink, Error> {
    Netlink::open(netns, SockProtocol::NetlinkRoute)
        .map_err(|source| Error::Enter { netns: netns.to_string(), source })
}

/// That something is gone already is fine.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV)) => {
            Ok(())
        }
        done => done,
    }
}
