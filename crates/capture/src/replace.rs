//! One back-end in the place of another.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use net::sock_diag::{self, Connection, DestroyError, TcpState};
use net::{Netns, ZTUNNEL_MARK};

use crate::backend::{Backend, Capture, Installed};
use crate::ebpf::mark;
use crate::error::Error;
use crate::live::Direction;
use crate::rules::Rules;
use crate::select::probe;
use crate::tool::Tools;

/// Has `capture` capture the pod in `netns`, as the back-end `before` did. New connections are captured or refused throughout,
/// and what ztunnel carries goes on; but where eBPF comes after a back-end of netfilter, connections to and from ztunnel's
/// redirect targets are ended: the kernel would no longer rewrite their addresses, and they would go on past ztunnel. So are
/// those that the other end has finished, where they could be what is left of such a connection. After an error it can be done
/// again.
///
/// # Errors
/// What could not be done. Both back-ends may be there then; no traffic passes because of that.
pub fn replace(
    capture: &dyn Capture,
    before: Backend,
    netns: &Netns,
    rules: &Rules,
) -> Result<Installed, Error> {
    let installed = capture.install(netns, rules)?;
    if before == capture.backend() {
        return Ok(installed);
    }
    let unavailable = |missing| Error::Unavailable { backend: before, missing: Box::new(missing) };
    let other = probe(before, &Tools::default()).map_err(unavailable)?;
    match (before, capture.backend()) {
        // What ztunnel carries is known by its routes: it is given the mark that those of all back-ends are for.
        (Backend::Ebpf, _) => {
            other.install(netns, &Rules { leaving: true, ..rules.clone() })?;
        }
        (_, Backend::Ebpf) => {
            // Netfilter gives the replies of what ztunnel delivers their mark, packet by packet. The sockets have it from now on.
            mark(netns, true)?;
            end_redirected(netns, rules).map_err(|source| Error::Netlink {
                action: "end connections whose addresses are rewritten",
                netns: netns.to_string(),
                source,
            })?;
        }
        _ => {}
    }
    other.remove(netns)?;
    // They share routes.
    capture.install(netns, rules)
}

/// Ends the connections whose addresses netfilter rewrites: the application's ends of those that it opened, and ztunnel's of
/// those that came in plaintext. Both ends are told. And the application's ends that ztunnel may have had the other end of.
fn end_redirected(netns: &Netns, rules: &Rules) -> io::Result<()> {
    let ports = &rules.ports;
    let listening: HashSet<u16> = sock_diag::listeners(netns)?.iter().map(SocketAddr::port).collect();
    let all = sock_diag::connections(netns)?;
    let is_outgoing = |port: u16| port == ports.outbound || port == ports.dns;
    let opened: HashSet<SocketAddr> =
        all.iter().filter(|socket| is_outgoing(socket.local.port())).map(|socket| socket.peer).collect();
    let ends: HashSet<_> = all.iter().map(|socket| (socket.local, socket.peer)).collect();
    for socket in &all {
        let of_ztunnel = socket.mark == Some(ZTUNNEL_MARK)
            || is_outgoing(socket.local.port())
            || socket.local.port() == ports.inbound_hbone;
        let internal = ends.contains(&(socket.peer, socket.local));
        let is_rewritten =
            socket.local.port() == ports.inbound_plaintext || (!of_ztunnel && opened.contains(&socket.local));
        if is_rewritten || (!of_ztunnel && !internal && may_be_left(socket, rules, &listening)) {
            end(netns, socket)?;
        }
    }
    Ok(())
}

/// Whether ztunnel may have had the other end of an application's connection, and closed it. The kernel does not tell it from
/// one that lived at enrolment and whose peer has finished: that one is ended too, since what is sent by the other would pass.
fn may_be_left(socket: &Connection, rules: &Rules, listening: &HashSet<u16>) -> bool {
    let is_finished = matches!(socket.state, TcpState::CloseWait | TcpState::LastAck | TcpState::Closing);
    let within = socket.peer.ip().is_loopback() || socket.peer.ip() == socket.local.ip();
    if !is_finished || within {
        return false;
    }
    let direction =
        if listening.contains(&socket.local.port()) { Direction::Inbound } else { Direction::Outbound };
    // A pod that leaves captured as well, before.
    Rules { leaving: false, ..rules.clone() }.capture(direction, socket.local, socket.peer)
}

fn end(netns: &Netns, socket: &Connection) -> io::Result<()> {
    match sock_diag::destroy(netns, socket) {
        Ok(()) | Err(DestroyError::Gone) => Ok(()),
        Err(DestroyError::Io(error)) => Err(error),
        Err(DestroyError::Unsupported) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel ends no connections (CONFIG_INET_DIAG_DESTROY); it is tried again until they have ended",
        )),
    }
}
