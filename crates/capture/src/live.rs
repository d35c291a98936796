//! The connections of a pod that go past ztunnel: those that were alive when it was enrolled, and those that
//! its rules exempt.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use net::sock_diag::{self, Connection, DestroyError, TcpState};
use net::{Netns, ZTUNNEL_MARK};

use crate::backend::Capture;
use crate::error::Error;
use crate::rules::{Matcher, Plan, Ports, Rules, Step, Tuple, Verdict};

/// Who opened a connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// Someone else, to a listener of the pod.
    Inbound,
    /// The pod.
    Outbound,
}

/// A connection between the pod and elsewhere that doesn't pass ztunnel. [`cut`] ends it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LiveConnection {
    /// Its addresses and state, seen from the pod.
    pub connection: Connection,
    /// Who opened it, as far as the kernel can tell: it doesn't keep that. `Outbound` when nothing listens on the
    /// local port, which is one that the kernel gives to those who open connections, and the peer's is not. What
    /// could be either is `Inbound`: policies decide over it.
    pub direction: Direction,
}

impl Rules {
    /// Whether a new connection between the pod's end `local` and `peer` would be captured. If so, one that goes past
    /// ztunnel does it for its age alone. Which interface it uses is not known here: an exemption by interface is
    /// not seen.
    #[must_use]
    pub fn capture(&self, direction: Direction, local: SocketAddr, peer: SocketAddr) -> bool {
        let plan = Plan::new(self);
        match direction {
            Direction::Inbound => decide(&plan.inbound, peer, local).unwrap_or(false),
            Direction::Outbound => decide(&plan.outbound_always, local, peer)
                .or_else(|| (plan.dns && peer.port() == 53).then_some(true))
                .or_else(|| decide(&plan.outbound, local, peer))
                .unwrap_or(false),
        }
    }
}

/// What the first step that matches a new connection says; `None` if none does.
fn decide(steps: &[Step], source: SocketAddr, destination: SocketAddr) -> Option<bool> {
    let matches = |matcher: &Matcher| match matcher {
        Matcher::Any => true,
        // Connections within the pod are not among those that are looked at.
        Matcher::Loopback | Matcher::FromZtunnel | Matcher::Interfaces(_) => false,
        Matcher::LoopbackAddress => destination.ip().is_loopback(),
        Matcher::Ports(ranges) => ranges.iter().any(|range| range.contains(destination.port())),
        Matcher::Source(ip) => source.ip() == *ip,
        Matcher::Destination(ranges) => ranges.iter().any(|range| range.contains(&destination.ip())),
    };
    steps.iter().find(|(matcher, _)| matches(matcher)).map(|(_, verdict)| *verdict == Verdict::Capture)
}

/// The connections of the pod in `netns` that go past the ztunnel that listens on `ports`. May be called at
/// any time; at enrolment, right after the installation, it finds what was alive before.
///
/// # Errors
/// The namespace can't be entered, or the kernel lacks sock_diag.
pub fn live_connections(netns: &Netns, ports: &Ports) -> io::Result<Vec<LiveConnection>> {
    let listening: HashSet<u16> = sock_diag::listeners(netns)?.iter().map(SocketAddr::port).collect();
    let given = given_ports(netns)?;
    let (all, ends) = with_ends(netns)?;
    // Peers of what ztunnel accepted on its redirect targets: the application's own ends.
    let redirected: HashSet<_> =
        all.iter().filter(|socket| is_target(ports, socket.local.port())).map(|socket| socket.peer).collect();
    let live = all.into_iter().filter(|socket| {
        // Both ends in the namespace: local traffic, and ztunnel's connections to the application.
        let internal = ends.contains(&(socket.peer, socket.local));
        let of_ztunnel = socket.mark == Some(ZTUNNEL_MARK)
            || is_target(ports, socket.local.port())
            || socket.local.port() == ports.inbound_hbone;
        // Its next SYN will be redirected.
        let unanswered = socket.state == TcpState::SynSent;
        !(internal || of_ztunnel || unanswered || redirected.contains(&socket.local))
    });
    let directed = live.map(|connection| {
        // Who has accepted a connection may have closed its listener since.
        let (local, peer) = (connection.local.port(), connection.peer.port());
        let outbound = !listening.contains(&local) && given.contains(&local) && !given.contains(&peer);
        let direction = if outbound { Direction::Outbound } else { Direction::Inbound };
        LiveConnection { connection, direction }
    });
    Ok(directed.collect())
}

/// Local and peer address of one end of a connection.
type End = (SocketAddr, SocketAddr);

/// The connections of `netns`, and all of their ends that are in it.
///
/// # Errors
/// As [`sock_diag::connections`].
pub(crate) fn with_ends(netns: &Netns) -> io::Result<(Vec<Connection>, HashSet<End>)> {
    let all = sock_diag::connections(netns)?;
    // A list is not of one moment: of a connection within the pod that is being made it may have one end alone. A list that is
    // begun later has the other.
    let later = sock_diag::connections(netns)?;
    let ends = all.iter().chain(&later).map(|socket| (socket.local, socket.peer)).collect();
    Ok((all, ends))
}

/// The ports that the kernel gives to sockets that connect without one (kernel Documentation/networking/ip-sysctl.rst,
/// `ip_local_port_range`; for both families).
fn given_ports(netns: &Netns) -> io::Result<RangeInclusive<u16>> {
    const FILE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = netns.run(|| std::fs::read_to_string(FILE))??;
    let mut ports = text.split_whitespace().map(str::parse);
    match (ports.next(), ports.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok(first..=last),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{FILE} says {text:?}"))),
    }
}

/// How [`cut`] ended a connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cut {
    /// It has ended, now or before.
    Ended,
    /// This kernel can't end it at once (`CONFIG_INET_DIAG_DESTROY`); its packets are answered with resets, so
    /// that it ends with the next one.
    Refused,
}

/// Ends a connection of the pod in `netns` that is no longer allowed. `rules` are those that are installed; a
/// connection that the kernel can't end is added to them. Blocks, as installing does.
///
/// # Errors
/// We may not, or the rules could not be changed.
pub fn cut(
    capture: &dyn Capture,
    netns: &Netns,
    rules: &mut Rules,
    connection: &Connection,
) -> Result<Cut, Error> {
    match sock_diag::destroy(netns, connection) {
        Ok(()) | Err(DestroyError::Gone) => Ok(Cut::Ended),
        Err(DestroyError::Io(source)) => {
            Err(Error::Netlink { action: "end a connection", netns: netns.to_string(), source })
        }
        Err(DestroyError::Unsupported) => {
            refuse(capture, netns, rules, connection)?;
            Ok(Cut::Refused)
        }
    }
}

/// Answers the packets of a connection of the pod in `netns` with resets from now on; what [`cut`] does where
/// the kernel can't end it. Take its tuple out of [`Rules::refused`] when the connection is gone.
///
/// # Errors
/// The rules could not be changed.
pub fn refuse(
    capture: &dyn Capture,
    netns: &Netns,
    rules: &mut Rules,
    connection: &Connection,
) -> Result<(), Error> {
    let tuple = Tuple { local: connection.local, peer: connection.peer };
    if !rules.refused.contains(&tuple) {
        rules.refused.push(tuple);
    }
    capture.install(netns, rules).map(drop)
}

fn is_target(ports: &Ports, port: u16) -> bool {
    [ports.outbound, ports.inbound_plaintext, ports.dns].contains(&port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::{Include, PortRange};

    fn captured(rules: &Rules, direction: Direction, local: &str, peer: &str) -> bool {
        rules.capture(direction, local.parse().unwrap(), peer.parse().unwrap())
    }

    #[test]
    fn what_is_exempt_is_not_captured_for_its_age() {
        use Direction::{Inbound, Outbound};
        let ports = |first, last| vec![PortRange::new(first, last).unwrap()];
        let rules = Rules {
            exclude_inbound_ports: ports(9000, 9100),
            exclude_outbound_ports: ports(3306, 3306),
            include_outbound_ports: ports(80, 80),
            exclude_outbound_ranges: vec!["10.9.0.0/16".parse().unwrap()],
            ..Rules::default()
        };
        for (direction, local, peer, expected) in [
            (Inbound, "10.0.0.1:8080", "10.0.0.2:5000", true),
            (Inbound, "10.0.0.1:9090", "10.0.0.2:5000", false),
            (Inbound, "10.0.0.1:15008", "10.0.0.2:5000", false),
            (Outbound, "10.0.0.1:5000", "10.0.0.2:9090", true),
            (Outbound, "10.0.0.1:5000", "10.0.0.2:3306", false),
            (Outbound, "10.0.0.1:5000", "10.9.0.2:8080", false),
            (Outbound, "10.0.0.1:5000", "10.9.0.2:80", true),
            (Outbound, "10.0.0.1:5000", "10.9.0.2:53", true),
            (Outbound, "[fd00::1]:5000", "[fd00::2]:443", true),
        ] {
            assert_eq!(captured(&rules, direction, local, peer), expected, "{direction:?} {local} {peer}");
        }
        let inbound = |rules| captured(&rules, Inbound, "10.0.0.1:8080", "10.0.0.2:5000");
        assert!(!inbound(Rules { bypass_inbound: true, ..Rules::default() }));
        assert!(!inbound(Rules { leaving: true, ..Rules::default() }));
        assert!(!inbound(Rules { include_inbound_ports: Include::Only(ports(1, 2)), ..Rules::default() }));
        assert!(inbound(Rules {
            include_inbound_ports: Include::Only(ports(8080, 8080)),
            ..Rules::default()
        }));
    }
}
