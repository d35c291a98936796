//! Inbound connections that come without a tunnel: from outside the mesh, captured on port 15006.
//!
//! Their source proved no identity, so policies that ask for one refuse them; STRICT is such a policy.

use std::net::SocketAddr;
use std::sync::Arc;

use model::{Connection, OriginalDst, Permit};
use tokio::net::TcpStream;

use super::pod::LocalPod;
use super::{Carried, Carrying, Proxy};
use crate::connections::{Carrier, Direction, Story, Verdict, now_ms};
use crate::proxy::failure::Failure;

/// Carries one captured connection from `peer` to its end.
pub async fn handle(proxy: Arc<Proxy>, pod: Arc<LocalPod>, client: TcpStream, peer: SocketAddr) {
    let _hold = proxy.shutdown.hold();
    // Boxed: delivering needs kilobytes, and the task lives as long as the connection.
    if let Some(carrying) = Box::pin(begin(proxy, pod, client, peer)).await {
        carrying.await;
    }
}

/// Delivers what is permitted; what carries it, if it could be delivered.
async fn begin(
    proxy: Arc<Proxy>,
    pod: Arc<LocalPod>,
    client: TcpStream,
    peer: SocketAddr,
) -> Option<Carrying> {
    let dialled = match proxy.captured(&client, peer).and_then(reachable) {
        Ok(dialled) => proxy.may_serve(&pod, dialled.ip()).await.map(|()| dialled),
        Err(failure) => Err(failure),
    };
    let (story, decision) = match dialled.and_then(|dialled| decide(&proxy, &pod, peer, dialled)) {
        Ok(decided) => decided,
        Err(failure) => {
            proxy.refuse_early(client, Direction::Inbound, peer, &failure);
            return None;
        }
    };
    let delivered = match decision {
        Ok(permit) => open(&proxy, &pod, &permit).await.map(|server| (server, permit)),
        Err(failure) => Err(failure),
    };
    match delivered {
        Ok(((server, place), permit)) => {
            let recheck = proxy.recheck_inbound(&pod, permit.connection().clone(), None);
            Some(proxy.carry(story, recheck, Carried::Plain { client, server, ahead: 0 }, place))
        }
        Err(failure) => {
            proxy.refuse(client, story, &failure);
            None
        }
    }
}

/// What could be reached without the redirection too. It comes before the kernel's check of addresses that don't belong on
/// a wire: a neighbour's packet for 127.0.0.1 gets here.
fn reachable(dialled: OriginalDst) -> Result<OriginalDst, Failure> {
    let address = dialled.socket_addr();
    let ip = address.ip().to_canonical();
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
        return Err(Failure::NotReachable(address));
    }
    Ok(dialled)
}

type Decided = (Story, Result<Permit, Failure>);

fn decide(proxy: &Proxy, pod: &LocalPod, peer: SocketAddr, dialled: OriginalDst) -> Result<Decided, Failure> {
    let mesh = proxy.state.mesh();
    let workload = pod.subject.destination(&mesh, dialled.ip())?;
    let connection = Connection::new(None, peer.ip(), dialled.socket_addr());
    let decision = mesh.authorize(&workload, &connection);
    let story = Story {
        id: proxy.registry.next_id(),
        direction: Direction::Inbound,
        carrier: Carrier::Plaintext,
        opened_ms: now_ms(),
        source: peer,
        source_workload: proxy.workload_of(&mesh, &workload.network, connection.source_ip()),
        source_identity: None,
        destination: dialled.socket_addr(),
        upstream: None,
        destination_identity: workload.identity().ok(),
        destination_workload: Some(workload),
        destination_service: None,
        verdict: Verdict::of(&decision),
    };
    Ok((story, decision.outcome.map_err(Failure::Denied)))
}

async fn open(
    proxy: &Proxy,
    pod: &Arc<LocalPod>,
    permit: &Permit,
) -> Result<(TcpStream, super::pod::Place), Failure> {
    let place = pod.place(&proxy.room, 2)?;
    Ok((super::deliver::deliver(proxy, pod, permit).await?, place))
}
