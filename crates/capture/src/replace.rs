//! One back-end in the place of another.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use net::sock_diag::{self, DestroyError};
use net::{Netns, ZTUNNEL_MARK};

use crate::backend::{Backend, Capture, Installed};
use crate::error::Error;
use crate::rules::{Ports, Rules};
use crate::select::probe;
use crate::tool::Tools;

/// Has `capture` capture the pod in `netns`, as the back-end `before` did. New connections are captured or refused throughout,
/// and what ztunnel carries goes on; but where eBPF comes after a back-end of netfilter, connections to and from ztunnel's
/// redirect targets are ended: the kernel would no longer rewrite their addresses, and they would go on past ztunnel. After an
/// error it can be done again.
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
        (_, Backend::Ebpf) => end_redirected(netns, &rules.ports).map_err(|source| Error::Netlink {
            action: "end connections whose addresses are rewritten",
            netns: netns.to_string(),
            source,
        })?,
        _ => {}
    }
    other.remove(netns)?;
    // They share routes.
    capture.install(netns, rules)
}

/// Ends the connections whose addresses netfilter rewrites: the application's ends of those that it opened, and ztunnel's of
/// those that came in plaintext. Both ends are told.
fn end_redirected(netns: &Netns, ports: &Ports) -> io::Result<()> {
    let all = sock_diag::connections(netns)?;
    let is_outgoing = |port: u16| port == ports.outbound || port == ports.dns;
    let opened: HashSet<SocketAddr> =
        all.iter().filter(|socket| is_outgoing(socket.local.port())).map(|socket| socket.peer).collect();
    for socket in &all {
        let of_ztunnel = socket.mark == Some(ZTUNNEL_MARK);
        let is_rewritten =
            socket.local.port() == ports.inbound_plaintext || (!of_ztunnel && opened.contains(&socket.local));
        if !is_rewritten {
            continue;
        }
        match sock_diag::destroy(netns, socket) {
            Ok(()) | Err(DestroyError::Gone) => {}
            Err(DestroyError::Io(error)) => return Err(error),
            Err(DestroyError::Unsupported) => {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "this kernel ends no connections (CONFIG_INET_DIAG_DESTROY); it is tried again until they have ended",
                ));
            }
        }
    }
    Ok(())
}
