//! What of a pod's traffic is captured: the settings, valid by construction.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// Entries of one list at most. More is a mistake, and every entry costs each new connection time.
pub const LIST_LIMIT: usize = 1024;

/// The ports that ztunnel listens on in the pod's namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ports {
    /// Outgoing connections are sent here.
    pub outbound: u16,
    /// Incoming connections that aren't tunnelled are sent here.
    pub inbound_plaintext: u16,
    /// Tunnels arrive here; nothing is redirected.
    pub inbound_hbone: u16,
    /// DNS queries are sent here.
    pub dns: u16,
}

impl Default for Ports {
    /// 15001, 15006, 15008, 15053 (facts of compatibility: Istio's ztunnel).
    fn default() -> Self {
        Self { outbound: 15001, inbound_plaintext: 15006, inbound_hbone: 15008, dns: 15053 }
    }
}

/// One port or several in a row.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The ports from `first` to `last`, both included; `None` when there are none, or port 0 is among them.
    #[must_use]
    pub fn new(first: u16, last: u16) -> Option<Self> {
        (first != 0 && first <= last).then_some(Self { first, last })
    }

    /// The first port.
    #[must_use]
    pub fn first(self) -> u16 {
        self.first
    }

    /// The last port.
    #[must_use]
    pub fn last(self) -> u16 {
        self.last
    }

    /// Whether `port` is one of them.
    #[must_use]
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl fmt::Display for PortRange {
    /// `80` or `8000-8010`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// The name of a network interface: 1 to 15 letters, digits, `-`, `_` or `.`. The kernel allows more; the
/// languages of nft and iptables give meaning to the rest.
#[derive(Clone, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct InterfaceName(Box<str>);

impl InterfaceName {
    /// `name`, if it is one.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let fits = (1..=15).contains(&name.len()) && name != "." && name != "..";
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        (fits && plain).then(|| Self(name.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// All, or those listed.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub enum Include<T> {
    /// `*`.
    #[default]
    All,
    /// Only these; none if empty.
    Only(Vec<T>),
}

/// The sources of kubelet's probes, which are let through to the application. The node rewrites the source of
/// what its own processes send to pods to one of these.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ProbeSources {
    /// 169.254.7.127 in Istio.
    pub ipv4: std::net::Ipv4Addr,
    /// fd16:9254:7127:1337:ffff:ffff:ffff:ffff in Istio.
    pub ipv6: std::net::Ipv6Addr,
}

impl Default for ProbeSources {
    fn default() -> Self {
        Self {
            ipv4: std::net::Ipv4Addr::new(169, 254, 7, 127),
            ipv6: std::net::Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff),
        }
    }
}

/// A TCP connection of the pod, by its addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Tuple {
    /// The pod's end.
    pub local: SocketAddr,
    /// The other end, of the same family.
    pub peer: SocketAddr,
}

/// What of a pod's traffic is captured. The default is everything but probes' exemption: TCP both ways, and
/// DNS. Lists past [`LIST_LIMIT`] are refused at installation.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rules {
    /// Where to.
    pub ports: Ports,
    /// Whether DNS queries, UDP and TCP to port 53, go to the DNS proxy.
    pub dns: bool,
    /// Leaves all incoming traffic alone (`ambient.istio.io/bypass-inbound-capture`).
    pub bypass_inbound: bool,
    /// Incoming ports to capture.
    pub include_inbound_ports: Include<PortRange>,
    /// Incoming ports to leave alone.
    pub exclude_inbound_ports: Vec<PortRange>,
    /// Destination ports to capture whatever the address.
    pub include_outbound_ports: Vec<PortRange>,
    /// Destination ports to leave alone; port 53 among them switches `dns` off. The first of the lists.
    pub exclude_outbound_ports: Vec<PortRange>,
    /// Destination addresses to capture.
    pub include_outbound_ranges: Include<IpNet>,
    /// Destination addresses to leave alone.
    pub exclude_outbound_ranges: Vec<IpNet>,
    /// Interfaces of the pod whose traffic is left alone.
    pub exclude_interfaces: Vec<InterfaceName>,
    /// Interfaces inside the pod, of virtual machines and containers in containers, whose traffic is outgoing
    /// (`istio.io/reroute-virtual-interfaces`).
    pub virtual_interfaces: Vec<InterfaceName>,
    /// Lets kubelet's probes through. Only where the node rewrites their source.
    pub probes: Option<ProbeSources>,
    /// Connections that go past ztunnel and are no longer allowed to: their packets are answered with resets.
    /// For kernels that can't end a connection at once; see [`crate::cut`].
    pub refused: Vec<Tuple>,
    /// Captures nothing new, whatever the other fields say, and keeps what connections that are captured already
    /// need: for a pod that leaves the mesh while some are open. Without any rules the kernel would no longer
    /// translate their addresses.
    pub leaving: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            ports: Ports::default(),
            dns: true,
            bypass_inbound: false,
            include_inbound_ports: Include::All,
            exclude_inbound_ports: Vec::new(),
            include_outbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            include_outbound_ranges: Include::All,
            exclude_outbound_ranges: Vec::new(),
            exclude_interfaces: Vec::new(),
            virtual_interfaces: Vec::new(),
            probes: None,
            refused: Vec::new(),
            leaving: false,
        }
    }
}

impl Rules {
    /// The longest of the lists, entries.
    pub(crate) fn longest_list(&self) -> usize {
        let included_ports = match &self.include_inbound_ports {
            Include::All => 0,
            Include::Only(ports) => ports.len(),
        };
        let included_ranges = match &self.include_outbound_ranges {
            Include::All => 0,
            Include::Only(ranges) => ranges.len(),
        };
        let lists = [
            included_ports,
            included_ranges,
            self.exclude_inbound_ports.len(),
            self.include_outbound_ports.len(),
            self.exclude_outbound_ports.len(),
            self.exclude_outbound_ranges.len(),
            self.exclude_interfaces.len(),
            self.virtual_interfaces.len(),
            self.refused.len(),
        ];
        lists.into_iter().max().unwrap_or_default()
    }
}

/// Which packets a [`Step`] is about; all are new TCP connections.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Matcher {
    /// All.
    Any,
    /// What never leaves the pod: by the loopback device.
    Loopback,
    /// To a loopback address, where redirection has sent them.
    LoopbackAddress,
    /// Sent by ztunnel.
    FromZtunnel,
    /// By one of these interfaces: in for incoming, out for outgoing ones.
    Interfaces(Vec<InterfaceName>),
    /// To one of these ports.
    Ports(Vec<PortRange>),
    /// From this address.
    Source(IpAddr),
    /// To an address in one of these.
    Destination(Vec<IpNet>),
}

/// What becomes of new connections that should have been captured and were not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guard {
    /// Nothing, so that they are sent again, for the moment in which some of the rules are in force: processes of the pod may be
    /// making some. Queries for names over UDP, whose senders would be told of it, go on as before.
    OfEnrolment,
    /// They are refused.
    Final,
}

/// What becomes of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// Not ours.
    Pass,
    /// To ztunnel. In the guard: what should have gone to ztunnel, and is refused.
    Capture,
}

pub(crate) type Step = (Matcher, Verdict);

/// The rules as the back-ends write them down: the first step that matches decides; past the last, a packet
/// passes. Redirection and guard are written from the same steps, so that they can't disagree.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) ports: Ports,
    /// Where ztunnel alone may listen; empty when nothing is captured.
    pub(crate) targets: Vec<u16>,
    pub(crate) dns: bool,
    pub(crate) virtual_interfaces: Vec<InterfaceName>,
    /// Empty when incoming traffic is left alone.
    pub(crate) inbound: Vec<Step>,
    /// Before DNS.
    pub(crate) outbound_always: Vec<Step>,
    /// After DNS.
    pub(crate) outbound: Vec<Step>,
    /// What passes through the pod from one interface to another.
    pub(crate) forwarded: Vec<Step>,
    /// Connections to be reset.
    pub(crate) refused: Vec<Tuple>,
}

impl Plan {
    pub(crate) fn new(rules: &Rules) -> Self {
        use Matcher::{Any, Destination, FromZtunnel, Interfaces, Loopback, LoopbackAddress, Source};
        use Verdict::{Capture, Pass};

        if rules.leaving {
            let refused = sorted(&rules.refused);
            return Self { ports: rules.ports, refused, ..Self::default() };
        }
        // ztunnel's connections to the application come in by the loopback device, too. Its mark exempts what
        // goes out alone: what comes in from elsewhere with that mark was never ours.
        let mut always = vec![(Loopback, Pass)];
        if !rules.exclude_interfaces.is_empty() {
            always.push((Interfaces(sorted(&rules.exclude_interfaces)), Pass));
        }

        let mut inbound = Vec::new();
        if !rules.bypass_inbound {
            inbound.clone_from(&always);
            let hbone = PortRange::new(rules.ports.inbound_hbone, rules.ports.inbound_hbone);
            inbound.extend(hbone.map(|port| (Matcher::Ports(vec![port]), Pass)));
            inbound.extend(ports(&rules.exclude_inbound_ports, Pass));
            if let Some(ProbeSources { ipv4, ipv6 }) = rules.probes {
                inbound.extend([(Source(ipv4.into()), Pass), (Source(ipv6.into()), Pass)]);
            }
            match &rules.include_inbound_ports {
                Include::All => inbound.push((Any, Capture)),
                Include::Only(included) => inbound.extend(ports(included, Capture)),
            }
        }

        let mut outbound = Vec::new();
        outbound.extend(ports(&rules.exclude_outbound_ports, Pass));
        outbound.extend(ports(&rules.include_outbound_ports, Capture));
        if !rules.exclude_outbound_ranges.is_empty() {
            outbound.push((Destination(IpNet::aggregate(&rules.exclude_outbound_ranges)), Pass));
        }
        match &rules.include_outbound_ranges {
            Include::All => outbound.push((Any, Capture)),
            Include::Only(ranges) if ranges.is_empty() => {}
            Include::Only(ranges) => outbound.push((Destination(IpNet::aggregate(ranges)), Capture)),
        }

        let mut forwarded = always.clone();
        forwarded.push((Any, Capture));
        let mut outbound_always = always;
        outbound_always.extend([(FromZtunnel, Pass), (LoopbackAddress, Pass)]);

        let Ports { outbound: to_outbound, inbound_plaintext, inbound_hbone, dns } = rules.ports;
        Self {
            ports: rules.ports,
            targets: vec![to_outbound, inbound_plaintext, inbound_hbone, dns],
            dns: rules.dns && !rules.exclude_outbound_ports.iter().any(|range| range.contains(53)),
            virtual_interfaces: sorted(&rules.virtual_interfaces),
            inbound,
            outbound_always,
            outbound,
            forwarded,
            refused: sorted(&rules.refused),
        }
    }
}

/// A step for a list of ports; none for an empty one. Overlaps are merged: nft refuses them in a set.
fn ports(ranges: &[PortRange], verdict: Verdict) -> Option<Step> {
    let mut merged: Vec<PortRange> = Vec::new();
    for range in sorted(ranges) {
        match merged.last_mut() {
            Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    (!merged.is_empty()).then_some((Matcher::Ports(merged), verdict))
}

fn sorted<T: Ord + Clone>(list: &[T]) -> Vec<T> {
    let mut list = list.to_vec();
    list.sort();
    list.dedup();
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u16, last: u16) -> PortRange {
        PortRange::new(first, last).unwrap()
    }

    #[test]
    fn ranges_of_ports_are_valid_and_merged() {
        assert_eq!(PortRange::new(0, 5), None);
        assert_eq!(PortRange::new(6, 5), None);
        assert_eq!(range(80, 80).to_string(), "80");
        assert_eq!(range(80, 90).to_string(), "80-90");
        let merged = ports(&[range(90, 100), range(1, 2), range(80, 95), range(3, 3)], Verdict::Pass);
        assert_eq!(merged, Some((Matcher::Ports(vec![range(1, 3), range(80, 100)]), Verdict::Pass)));
        let ends = ports(&[range(1, u16::MAX), range(u16::MAX, u16::MAX)], Verdict::Pass);
        assert_eq!(ends, Some((Matcher::Ports(vec![range(1, u16::MAX)]), Verdict::Pass)));
    }

    #[test]
    fn names_that_mean_something_to_the_tools_are_no_interfaces() {
        for bad in ["", ".", "..", "eth0 accept", "a\"b", "eth+", "e*", "0123456789abcdef", "a/b", "ä"] {
            assert_eq!(InterfaceName::new(bad), None, "{bad}");
        }
        for good in ["eth0", "net1.100", "veth-a_b"] {
            assert!(InterfaceName::new(good).is_some(), "{good}");
        }
    }

    #[test]
    fn an_excluded_port_53_is_no_dns_capture() {
        let rules = Rules { exclude_outbound_ports: vec![range(50, 60)], ..Rules::default() };
        assert!(!Plan::new(&rules).dns);
        assert!(Plan::new(&Rules::default()).dns);
    }

    #[test]
    fn excluded_ports_win_over_included_ones_and_those_over_ranges() {
        let rules = Rules {
            exclude_outbound_ports: vec![range(1, 1)],
            include_outbound_ports: vec![range(2, 2)],
            include_outbound_ranges: Include::Only(Vec::new()),
            ..Rules::default()
        };
        let expected = [
            (Matcher::Ports(vec![range(1, 1)]), Verdict::Pass),
            (Matcher::Ports(vec![range(2, 2)]), Verdict::Capture),
        ];
        assert_eq!(Plan::new(&rules).outbound, expected);
    }
}
