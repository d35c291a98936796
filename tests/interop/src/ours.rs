//! Our ends of the tunnel, put together as ztunnel does: TCP, mutual TLS, HBONE.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use hbone::{
    Closed, Connector, Control, Incoming, Pool, PoolSettings, PumpLimits, ServerCounters, ServerSettings,
    Traffic, TunnelHeaders, pump, serve,
};
use identity::{
    Certificates, ExpectedPeers, HandshakeError, HandshakeLimits, PeerInfo, TlsStream, accept, connect,
};
use model::SpiffeId;
use tokio::net::{TcpListener, TcpStream};

/// Dials a server of the mesh.
pub struct Dialer {
    certificates: Certificates,
    from: SpiffeId,
    expected: SpiffeId,
}

impl Connector for Dialer {
    type Key = SocketAddr;
    type Io = TlsStream<TcpStream>;
    type Peer = Option<PeerInfo>;
    type Error = HandshakeError;

    async fn connect(&self, to: &SocketAddr) -> Result<(Self::Io, Self::Peer), HandshakeError> {
        let tcp = TcpStream::connect(to).await.map_err(HandshakeError::Transport)?;
        let expected = ExpectedPeers::One(self.expected.clone());
        let tls = connect(tcp, &self.certificates, &self.from, expected, HandshakeLimits::default()).await?;
        let peer = tls.peer().clone();
        Ok((tls, Some(peer)))
    }
}

/// A pool that connects as `from` to servers that must be `expected`.
#[must_use]
pub fn pool(
    certificates: Certificates,
    from: SpiffeId,
    expected: SpiffeId,
    settings: PoolSettings,
) -> Pool<Dialer> {
    Pool::new(Dialer { certificates, from, expected }, settings)
}

/// What our server saw.
#[derive(Default)]
pub struct Seen {
    /// Each request's destination, source by certificate, and headers.
    pub requests: Mutex<Vec<(String, SpiffeId, TunnelHeaders)>>,
    /// How connections ended.
    pub closed: Mutex<Vec<Closed>>,
    /// Controls of all connections so far.
    pub controls: Mutex<Vec<Control>>,
    /// What the server counted.
    pub counters: Arc<ServerCounters>,
}

impl Seen {
    /// Drains all connections there are.
    pub fn drain(&self, patience: std::time::Duration) {
        let controls = self.controls.lock().unwrap_or_else(PoisonError::into_inner);
        controls.iter().for_each(|control| control.drain(patience));
    }
}

/// Serves HBONE as `local`: tunnels to port 1 are refused with 401, all others lead to `app`.
///
/// # Errors
/// No port.
pub async fn server(
    certificates: Certificates,
    local: SpiffeId,
    settings: ServerSettings,
    app: SocketAddr,
) -> io::Result<(SocketAddr, Arc<Seen>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let seen = Arc::new(Seen::default());
    let all = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (certificates, local, seen) = (certificates.clone(), local.clone(), Arc::clone(&all));
            tokio::spawn(async move {
                let Ok(tls) = accept(tcp, &certificates, &local, HandshakeLimits::default()).await else {
                    return;
                };
                connection(tls, &settings, &seen, app).await;
            });
        }
    });
    Ok((address, seen))
}

async fn connection(tls: TlsStream<TcpStream>, settings: &ServerSettings, seen: &Arc<Seen>, app: SocketAddr) {
    let control = Control::default();
    let source = tls.peer().id.clone();
    seen.controls.lock().unwrap_or_else(PoisonError::into_inner).push(control.clone());
    let closed = serve(tls, settings, &control, &seen.counters, |incoming| {
        let request = (incoming.authority.to_string(), source.clone(), incoming.headers.clone());
        seen.requests.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        tokio::spawn(deliver(incoming, app));
    })
    .await;
    seen.closed.lock().unwrap_or_else(PoisonError::into_inner).push(closed);
}

async fn deliver(incoming: Incoming, app: SocketAddr) {
    let none = TunnelHeaders::default();
    if incoming.authority.port() == 1 {
        return incoming.refuse(hbone::StatusCode::UNAUTHORIZED, &none);
    }
    let Ok(tcp) = TcpStream::connect(app).await else {
        return incoming.refuse(hbone::StatusCode::SERVICE_UNAVAILABLE, &none);
    };
    if let Ok(tunnel) = incoming.accept(&none) {
        pump(tunnel, tcp, &Traffic::default(), PumpLimits::default()).await;
    }
}
