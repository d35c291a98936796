//! Tunnels to the destinations' nodes, opened as the waypoint. One connection to a node's proxy for a pod carries the
//! tunnels of all clients: who they are was decided here, and the pod's node lets in nobody but the waypoint.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hbone::{Connector, HeaderValue, Pool, PoolSettings, Transport, TunnelHeaders};
use identity::{ExpectedPeers, HandshakeError, PeerInfo, TlsStream};
use model::{HboneAddr, SpiffeId};
use process::runtimes::Workers;
use source::Tls;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::http::carriers::TunnelOut;
use crate::http::decide::{Dial, Dialing};
use crate::upstream::Dialers;

/// What tunnels share a connection by.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TunnelKey {
    /// The waypoint's identity.
    pub source: SpiffeId,
    /// Who may answer.
    pub expected: Arc<[SpiffeId]>,
    /// What is dialled.
    pub to: SocketAddr,
}

/// Why a peer can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// There is no connection.
    #[error("connect to {0}: {1}")]
    Connect(SocketAddr, #[source] std::io::Error),
    /// It did not come in time.
    #[error("connect to {0}: no answer within {1:?}")]
    Timeout(SocketAddr, Duration),
    /// The peer is not who it should be, or we can't prove who we are.
    #[error("TLS handshake with {0}: {1}")]
    Tls(SocketAddr, #[source] HandshakeError),
}

/// Dials and secures connections for the pools.
pub struct Dialer {
    tls: Tls,
    connect_timeout: Duration,
}

impl Connector for Dialer {
    type Key = TunnelKey;
    type Io = TlsStream<TcpStream>;
    type Peer = Arc<PeerInfo>;
    type Error = DialError;

    async fn connect(&self, key: &TunnelKey) -> Result<(Self::Io, Self::Peer), DialError> {
        let (to, limit) = (key.to, self.connect_timeout);
        let connected = timeout(limit, TcpStream::connect(to)).await;
        let tcp = connected.map_err(|_| DialError::Timeout(to, limit))?;
        let tcp = tcp.map_err(|error| DialError::Connect(to, error))?;
        tcp.set_nodelay(true).map_err(|error| DialError::Connect(to, error))?;
        let expected = ExpectedPeers::OneOf(key.expected.clone());
        let secured = self.tls.connect(tcp, to.ip(), &key.source, expected).await;
        let tls = secured.map_err(|error| DialError::Tls(to, error))?;
        let peer = Arc::new(tls.peer().clone());
        Ok((tls, peer))
    }
}

/// Of connections that carry tunnels, on either side: a peer from which nothing comes is asked as soon as Envoy's waypoints ask
/// theirs, so that the tunnels of a node that has gone end before their clients give up.
pub(crate) fn transport() -> Transport {
    Transport {
        ping_interval: Duration::from_secs(10),
        ping_timeout: Duration::from_secs(20),
        ..Transport::default()
    }
}

/// The pools of tunnels, one for each thread of the data plane.
#[derive(Clone)]
pub struct Tunnels(Arc<[Pool<Dialer>]>);

impl Tunnels {
    /// Empty pools for this many threads.
    #[must_use]
    pub fn new(threads: usize, tls: &Tls) -> Self {
        let settings = PoolSettings { spread: 1, transport: transport(), ..PoolSettings::default() };
        let limit = settings.connect_timeout;
        let pool = |_| Pool::new(Dialer { tls: tls.clone(), connect_timeout: limit }, settings);
        Self((0..threads.max(1)).map(pool).collect())
    }

    /// All of them.
    #[must_use]
    pub fn pools(&self) -> &[Pool<Dialer>] {
        &self.0
    }

    /// What dials endpoints through tunnels of `key`. One is made for a key, and kept, see [`TunnelOut`].
    #[must_use]
    pub fn to(&self, key: TunnelKey) -> Arc<dyn Dial> {
        let headers = TunnelHeaders {
            istio_source: Some(HeaderValue::from_static("waypoint")),
            ..TunnelHeaders::default()
        };
        Arc::new(TunnelOut::new(self.0.clone(), key, headers))
    }

    /// See [`Pool::retire`].
    pub fn retire(&self, matches: impl Fn(&TunnelKey) -> bool) -> usize {
        self.0.iter().map(|pool| pool.retire(&matches)).sum()
    }
}

/// Makes tunnels as the waypoint that `identity` says, once that is known.
pub struct AsWaypoint {
    /// The pools.
    pub tunnels: Tunnels,
    /// Who we are: the trust domain may not be known at first, and may change.
    pub identity: Box<dyn Fn() -> Option<SpiffeId> + Send + Sync>,
}

impl Dialers for AsWaypoint {
    fn tunnel(&self, to: HboneAddr, expected: Arc<[SpiffeId]>) -> Arc<dyn Dial> {
        match (self.identity)() {
            Some(source) => self.tunnels.to(TunnelKey { source, expected, to: to.socket_addr() }),
            None => Arc::new(NoIdentity),
        }
    }
}

/// Reaches nothing.
struct NoIdentity;

impl Dial for NoIdentity {
    fn dial(&self, _: SocketAddr) -> Dialing {
        Box::pin(async { Err(std::io::Error::other("the waypoint's names make no identity")) })
    }
}

/// The pool of the thread that this is called on.
pub(crate) fn here<T>(pools: &[T]) -> Option<&T> {
    pools.get(Workers::current() % pools.len().max(1))
}
