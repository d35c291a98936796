//! Tunnels to peers: what their connections are shared by, and how one is made.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use hbone::{
    ConnectError, ConnectRequest, Connector, Counter, OpenError, Pool, PoolCounters, PoolSettings, Transport,
};
use identity::{ExpectedPeers, PeerInfo, TlsStream};
use model::{HboneAddr, SpiffeId};
use net::{ConnectOptions, Netns};
use process::runtimes::Workers;
use source::Tls;
use tokio::net::TcpStream;

use super::Proxy;
use super::failure::Failure;
use crate::settings::Limits;

/// What tunnels share a connection by. It is dialled in the pod's own namespace, from the pod's own address, as
/// the pod's identity: two pods never share one, also when they run as one service account.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TunnelKey {
    /// The pod's namespace.
    pub netns: Netns,
    /// The pod's identity.
    pub source: SpiffeId,
    /// The pod's address.
    pub source_ip: IpAddr,
    /// Who may answer.
    pub expected: Arc<[SpiffeId]>,
    /// What is dialled.
    pub to: HboneAddr,
}

/// Dials and secures connections for the pool.
pub struct Dialer {
    /// TLS, as one of this node's pods.
    pub tls: Tls,
    /// For the TCP connect alone.
    pub connect_timeout: Duration,
    /// Whether what is sent is paced, see [`crate::settings::Flags::pace_tunnels`].
    pub pace: bool,
}

impl Connector for Dialer {
    type Key = TunnelKey;
    type Io = TlsStream<TcpStream>;
    type Peer = Arc<PeerInfo>;
    type Error = Failure;

    async fn connect(&self, key: &TunnelKey) -> Result<(Self::Io, Self::Peer), Failure> {
        let to = key.to.socket_addr();
        let source = (key.source_ip.is_ipv4() == to.is_ipv4()).then(|| SocketAddr::new(key.source_ip, 0));
        let options = ConnectOptions { source, unpaced: !self.pace, ..ConnectOptions::default() };
        let tcp = net::connect(&key.netns, &options, to, self.connect_timeout)
            .await
            .map_err(|e| Failure::Connect { to, reason: e.source.to_string() })?;
        let expected = ExpectedPeers::OneOf(key.expected.clone());
        let secured = self.tls.connect(tcp, to.ip(), &key.source, expected).await;
        let tls = secured.map_err(|e| Failure::of_handshake(to, &key.source, &e))?;
        let peer = Arc::new(tls.peer().clone());
        Ok((tls, peer))
    }
}

/// The pools of tunnels, one for each thread of the data plane: a tunnel's connection is driven by the thread that
/// carries the tunnel.
pub struct Tunnels(Box<[Pool<Dialer>]>);

impl Tunnels {
    /// Empty pools for this many threads.
    pub fn new(threads: usize, tls: &Tls, limits: &Limits) -> Self {
        let defaults = PoolSettings::default();
        // Load is spread over cores by having a pool each; the limit of all connections is shared out.
        let settings = PoolSettings {
            spread: 1,
            max_connections: (limits.pooled / threads.max(1)).max(64),
            transport: Transport { memory: limits.memory, ..defaults.transport },
            ..defaults
        };
        let dialer = || Dialer {
            tls: tls.clone(),
            connect_timeout: limits.connect_timeout,
            pace: limits.pace_tunnels,
        };
        Self((0..threads.max(1)).map(|_| Pool::new(dialer(), settings)).collect())
    }

    /// All of them.
    pub fn pools(&self) -> &[Pool<Dialer>] {
        &self.0
    }

    /// The pool of the thread that this is called on.
    // There is at least one pool, by construction.
    #[allow(clippy::indexing_slicing)]
    pub fn here(&self) -> &Pool<Dialer> {
        &self.0[Workers::current() % self.0.len()]
    }

    /// See [`Pool::retire`].
    pub fn retire(&self, matches: impl Fn(&TunnelKey) -> bool) -> usize {
        self.0.iter().map(|pool| pool.retire(&matches)).sum()
    }

    /// See [`Pool::abort`].
    pub fn abort(&self, matches: impl Fn(&TunnelKey) -> bool) -> usize {
        self.0.iter().map(|pool| pool.abort(&matches)).sum()
    }

    /// The sum of a counter of all pools.
    pub fn count(&self, counter: fn(&PoolCounters) -> &Counter) -> u64 {
        self.0.iter().map(|pool| counter(pool.counters()).get()).sum()
    }
}

impl Proxy {
    /// Opens the tunnel that `request` asks for over a pooled connection of `key`, and sends ahead what the application at
    /// `client` has to say until the peer consents; nothing without it. `early` is what was sent so to another peer, in vain, and
    /// afterwards what was sent to this one.
    ///
    /// # Errors
    /// The peer can't be reached, isn't who it should be, or refuses.
    pub async fn open_tunnel(
        &self,
        key: &TunnelKey,
        request: &ConnectRequest,
        (client, early): (Option<&mut TcpStream>, &mut BytesMut),
    ) -> Result<(hbone::Tunnel, Arc<PeerInfo>), Failure> {
        let pool = self.tunnels.here();
        let opened = match client {
            Some(client) => pool.open_early(key, request, client, early).await,
            None => pool.open(key, request).await,
        };
        opened.map(|opened| (opened.tunnel, opened.peer)).map_err(|e| failure(key.to.socket_addr(), e))
    }
}

fn failure(to: SocketAddr, error: OpenError<Failure>) -> Failure {
    match error {
        OpenError::Connect(error) => match &*error {
            ConnectError::Connector(failure) => failure.shared(),
            ConnectError::Timeout(_) => Failure::Connect { to, reason: error.to_string() },
            ConnectError::Http2(reason) => Failure::Http2 { to, reason: reason.clone() },
            ConnectError::TooManyConnections(_) => Failure::Connect { to, reason: error.to_string() },
        },
        OpenError::Refused(status) if status.as_u16() == 401 => Failure::PeerDenied(401),
        OpenError::Refused(status) => Failure::PeerStatus(status.as_u16()),
        OpenError::App(error) => Failure::Application(error.to_string()),
        other => Failure::Http2 { to, reason: other.to_string() },
    }
}
