//! Connections of before the enrolment: they go past ztunnel, until a policy refuses them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use capture::{Cut, Direction, LiveConnection, Rules, Tuple};
use model::{Connection, Str};
use net::{Netns, sock_diag};

use super::slot::{PodState, Slot};
use super::{Node, Redirection};
use crate::proxy::pod::LocalPod;

/// More are not kept account of; they go on all the same. Incoming ones, which policies may refuse, come first.
const ADOPTED_LIMIT: usize = 65_536;

impl Node {
    /// Ends the connections of before the enrolment that the policies of now refuse. They came without identity.
    pub async fn recheck_adopted(&self) {
        if !self.proxy.state.is_complete() {
            return; // it is looked at again when it is
        }
        let candidates: Vec<(Str, Arc<LocalPod>, Rules, Vec<LiveConnection>)> = self
            .pods()
            .iter()
            .filter_map(|(key, slot)| match &slot.state {
                PodState::Enrolled(e) if !e.adopted.is_empty() || !e.rules.refused.is_empty() => {
                    Some((key.clone(), e.pod.clone(), e.rules.clone(), e.adopted.clone()))
                }
                _ => None,
            })
            .collect();
        for (key, pod, mut rules, adopted) in candidates {
            let mesh = self.proxy.state.mesh_owned();
            let Some(workload) = pod.subject.known(&mesh).cloned() else { continue };
            let (redirection, netns) = (self.redirection.clone(), pod.netns.clone());
            let result = tokio::task::spawn_blocking(move || {
                let alive = alive(&netns)?;
                rules.refused.retain(|tuple| alive.contains_key(&(tuple.local, tuple.peer)));
                let mut left = Vec::new();
                for live in adopted {
                    let old = &live.connection;
                    let Some(now) = alive.get(&(old.local, old.peer)) else { continue };
                    let inbound = Connection::new(None, old.peer.ip(), old.local);
                    let denied = match live.direction {
                        Direction::Outbound => None, // the destination's node decides over it
                        Direction::Inbound => mesh.authorize(&workload, &inbound).outcome.err(),
                    };
                    if denied.is_none_or(|deny| !cut_adopted(&redirection, &netns, &mut rules, now, &deny)) {
                        left.push(live);
                    }
                }
                std::io::Result::Ok((left, rules.refused))
            })
            .await;
            match result {
                Ok(Ok((left, refused))) => {
                    if let Some(Slot { state: PodState::Enrolled(e), .. }) = self.pods().get_mut(&key) {
                        (e.adopted, e.rules.refused) = (left, refused);
                    }
                }
                Ok(Err(error)) => {
                    tracing::error!(pod = %key, %error, "connections of before the enrolment can't be looked at");
                }
                Err(error) => tracing::error!(pod = %key, %error, "looking at connections failed"),
            }
        }
    }
}

/// Whether it is cut. `rules` are those that are installed, and are changed where the kernel can't end connections.
fn cut_adopted(
    redirection: &Redirection,
    netns: &Netns,
    rules: &mut Rules,
    connection: &sock_diag::Connection,
    deny: &model::Deny,
) -> bool {
    let (local, peer) = (connection.local, connection.peer);
    match redirection.cut(netns, rules, connection) {
        Ok(Cut::Ended) => {
            tracing::info!(%local, %peer, reason = %deny, "cut a connection of before the enrolment");
        }
        Ok(Cut::Refused) => {
            tracing::info!(%local, %peer, reason = %deny, "a connection of before the enrolment ends with its next packet");
        }
        Err(error) => {
            rules.refused.retain(|tuple| *tuple != Tuple { local, peer });
            tracing::error!(%local, %peer, %error, reason = %deny, "a connection of before the enrolment can't be cut");
            return false;
        }
    }
    true
}

/// The connections of a namespace by their ends.
fn alive(netns: &Netns) -> std::io::Result<HashMap<(SocketAddr, SocketAddr), sock_diag::Connection>> {
    Ok(sock_diag::connections(netns)?.into_iter().map(|c| ((c.local, c.peer), c)).collect())
}

/// The connections that go past ztunnel because they are older than the rules, not because these exempt them. What a ztunnel
/// that is being replaced has delivered is not among them: it had decided over the identity of its peer.
pub(super) fn before(netns: &Netns, rules: &Rules) -> Vec<LiveConnection> {
    let mut found = match capture::live_connections(netns, &rules.ports) {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%netns, %error, "connections of before the enrolment can't be listed: they go on");
            return Vec::new();
        }
    };
    found.retain(|live| rules.capture(live.direction, live.connection.local, live.connection.peer));
    if found.len() > ADOPTED_LIMIT {
        tracing::warn!(%netns, connections = found.len(), kept = ADOPTED_LIMIT, "too many of before the enrolment");
        found.sort_by_key(|live| live.direction == Direction::Outbound);
        found.truncate(ADOPTED_LIMIT);
    }
    found
}
