//! Connections of before the enrolment: they go past ztunnel, until a policy refuses them.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use capture::{Cut, Direction, LiveConnection, Rules, Tuple};
use model::{Connection, Mesh, Str};
use net::{Netns, sock_diag};

use super::slot::{PodState, Slot};
use super::{Node, Redirection};
use crate::proxy::pod::LocalPod;
use crate::verdicts::Passing;

/// More are not kept account of; they go on all the same. Incoming ones, which policies may refuse, come first.
const ADOPTED_LIMIT: usize = 65_536;

/// A pod with connections of before its enrolment.
struct Candidate {
    key: Str,
    pod: Arc<LocalPod>,
    rules: Rules,
    adopted: Vec<LiveConnection>,
}

/// What becomes of a pod's.
struct Judged {
    left: Vec<LiveConnection>,
    refused: Vec<Tuple>,
    /// Whether some of those left are refused, and may not be ended yet.
    put_off: bool,
}

impl Node {
    /// Ends the connections of before the enrolment that the policies of now refuse. They came without identity.
    pub async fn recheck_adopted(&self) {
        if !self.proxy.state.is_complete() {
            return; // it is looked at again when it is
        }
        let candidates = self.candidates();
        if candidates.is_empty() {
            return;
        }
        // What passes by a verdict looks like one of before, and is judged by that.
        let passing = self.proxy.verdicts.passing().await;
        let mesh = self.proxy.state.mesh_owned();
        // While another process has the verdicts, it is not known which do. They are between pods of the node.
        let unknown = Arc::new(if passing.is_none() { self.addresses(&mesh) } else { HashSet::new() });
        let passing = passing.unwrap_or_default();
        for mut candidate in candidates {
            candidate.adopted.retain(|live| !passes(&passing, live));
            let Some(workload) = candidate.pod.subject.known(&mesh).cloned() else { continue };
            let key = candidate.key.clone();
            let (redirection, mesh, unknown) = (self.redirection.clone(), mesh.clone(), unknown.clone());
            let judging = move || {
                judge(candidate, &redirection, &unknown, |c| mesh.authorize(&workload, c).outcome.err())
            };
            match tokio::task::spawn_blocking(judging).await {
                Ok(Ok(judged)) => {
                    self.put_off.fetch_or(judged.put_off, Relaxed);
                    if let Some(Slot { state: PodState::Enrolled(e), .. }) = self.pods().get_mut(&key) {
                        (e.adopted, e.rules.refused) = (judged.left, judged.refused);
                    }
                }
                Ok(Err(error)) => {
                    tracing::error!(pod = %key, %error, "connections of before the enrolment can't be looked at");
                }
                Err(error) => tracing::error!(pod = %key, %error, "looking at connections failed"),
            }
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        let of = |(key, slot): (&Str, &Slot)| match &slot.state {
            PodState::Enrolled(e) if !e.adopted.is_empty() || !e.rules.refused.is_empty() => {
                Some(Candidate {
                    key: key.clone(),
                    pod: e.pod.clone(),
                    rules: e.rules.clone(),
                    adopted: e.adopted.clone(),
                })
            }
            _ => None,
        };
        self.pods().iter().filter_map(of).collect()
    }

    /// Those of the node's pods.
    fn addresses(&self, mesh: &Mesh) -> HashSet<IpAddr> {
        let mut addresses = HashSet::new();
        for slot in self.pods().values() {
            addresses.extend(slot.enrolment.addresses.iter().flatten());
            addresses.extend(
                slot.enrolment.subject.known(mesh).iter().flat_map(|workload| workload.addresses.iter()),
            );
        }
        addresses
    }
}

/// Ends what is refused of a pod's connections, but for those from `unknown` addresses.
fn judge(
    candidate: Candidate,
    redirection: &Redirection,
    unknown: &HashSet<IpAddr>,
    refuses: impl Fn(&Connection) -> Option<model::Deny>,
) -> std::io::Result<Judged> {
    let Candidate { pod, mut rules, adopted, .. } = candidate;
    let alive = alive(&pod.netns)?;
    rules.refused.retain(|tuple| alive.contains_key(&(tuple.local, tuple.peer)));
    let (mut left, mut put_off) = (Vec::new(), false);
    for live in adopted {
        let old = &live.connection;
        let Some(now) = alive.get(&(old.local, old.peer)) else { continue };
        let denied = match live.direction {
            Direction::Outbound => None, // the destination's node decides over it
            Direction::Inbound => refuses(&Connection::new(None, old.peer.ip(), old.local)),
        };
        let waits = denied.is_some() && unknown.contains(&old.peer.ip());
        put_off |= waits;
        if waits || denied.is_none_or(|deny| !cut_adopted(redirection, &pod.netns, &mut rules, now, &deny)) {
            left.push(live);
        }
    }
    Ok(Judged { left, refused: rules.refused, put_off })
}

/// Whether a connection is one of those that pass.
fn passes(passing: &Passing, live: &LiveConnection) -> bool {
    let (local, peer) = (live.connection.local, live.connection.peer);
    passing.contains(&match live.direction {
        Direction::Inbound => (local, peer),
        Direction::Outbound => (peer, local),
    })
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
