//! The connections of a pod that go past ztunnel: those that were alive when it was enrolled, and those that
//! its rules exempt.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use net::sock_diag::{self, Connection, DestroyError, TcpState};
use net::{Netns, ZTUNNEL_MARK};

use crate::backend::Capture;
use crate::error::Error;
use crate::rules::{Ports, Rules, Tuple};

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
    /// Who opened it. Told by whether the pod listens on the local port, now.
    pub direction: Direction,
}

/// The connections of the pod in `netns` that go past the ztunnel that listens on `ports`. May be called at
/// any time; at enrolment, right after the installation, it finds what was alive before.
///
/// # Errors
/// The namespace can't be entered, or the kernel lacks sock_diag.
pub fn live_connections(netns: &Netns, ports: &Ports) -> io::Result<Vec<LiveConnection>> {
    let listening: HashSet<u16> = sock_diag::listeners(netns)?.iter().map(SocketAddr::port).collect();
    let all = sock_diag::connections(netns)?;
    let ends: HashSet<_> = all.iter().map(|socket| (socket.local, socket.peer)).collect();
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
        let inbound = listening.contains(&connection.local.port());
        let direction = if inbound { Direction::Inbound } else { Direction::Outbound };
        LiveConnection { connection, direction }
    });
    Ok(directed.collect())
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
