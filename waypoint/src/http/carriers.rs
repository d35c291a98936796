//! What carries HTTP beside plain TCP: TLS, and HBONE tunnels, on either side.
//!
//! Who opens tunnels to us is the affair of [`crate::listen`].

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use hbone::{Authority, ConnectRequest, Connector, TunnelHeaders};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::http::decide::{Connection, Dial, Dialing};
use crate::http::io::Io;
use crate::http::serve;
use crate::http::worker::Worker;

/// Connections with TLS to servers that are not of the mesh. What is spoken on them is for the configuration's ALPN and
/// the target's protocol to agree on.
pub struct TlsOut {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl std::fmt::Debug for TlsOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsOut").field("name", &self.name).finish_non_exhaustive()
    }
}

impl TlsOut {
    /// With `name` as the server name that is sent and verified.
    #[must_use]
    pub fn new(config: Arc<ClientConfig>, name: ServerName<'static>) -> Self {
        Self { connector: TlsConnector::from(config), name }
    }
}

impl Dial for TlsOut {
    fn dial(&self, address: SocketAddr) -> Dialing {
        let (connector, name) = (self.connector.clone(), self.name.clone());
        Box::pin(async move {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let stream = connector.connect(name, tcp).await?;
            Ok(Box::new(stream) as Box<dyn net::Io>)
        })
    }
}

/// Connections through tunnels to endpoints that speak HBONE. One is made for a key, and kept: the pool of HTTP
/// connections tells carriers apart by their place in memory.
pub struct TunnelOut<C: Connector> {
    /// One for each thread of the data plane.
    pools: Arc<[hbone::Pool<C>]>,
    key: C::Key,
    headers: TunnelHeaders,
}

impl<C: Connector> std::fmt::Debug for TunnelOut<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TunnelOut").field("key", &self.key).finish_non_exhaustive()
    }
}

impl<C: Connector> TunnelOut<C> {
    /// Tunnels over the connections that `key` stands for. `headers` say who we are: requests of many clients go through
    /// one tunnel, so they can't say who these are.
    #[must_use]
    pub fn new(pools: Arc<[hbone::Pool<C>]>, key: C::Key, headers: TunnelHeaders) -> Self {
        Self { pools, key, headers }
    }
}

impl<C: Connector> Dial for TunnelOut<C> {
    fn dial(&self, address: SocketAddr) -> Dialing {
        let pool = crate::tunnels::here(&self.pools).cloned();
        let (key, headers) = (self.key.clone(), self.headers.clone());
        Box::pin(async move {
            let pool = pool.ok_or(io::ErrorKind::NotConnected)?;
            let authority = Authority::from_addr(address).ok_or(io::ErrorKind::AddrNotAvailable)?;
            let request = ConnectRequest { authority, headers };
            let opened = pool.open(&key, &request).await.map_err(io::Error::other)?;
            Ok(Box::new(opened.tunnel) as Box<dyn net::Io>)
        })
    }
}

/// Serves a connection that begins with TLS; the server name and the protocol are what the handshake says. Its time is
/// that of a request's head.
pub async fn serve_tls(
    worker: Arc<Worker>,
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    mut connection: Connection,
) {
    let limit = worker.settings.head_timeout;
    let stream = match timeout(limit, TlsAcceptor::from(config).accept(tcp)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            worker.stats.handshakes_failed.inc();
            tracing::debug!(%error, client = %connection.client, "a TLS handshake failed");
            return;
        }
        Err(_) => {
            worker.stats.handshakes_failed.inc();
            return;
        }
    };
    connection.secure = true;
    connection.server_name = stream.get_ref().1.server_name().map(Arc::from);
    serve(worker, Io::Layered(Box::new(stream)), connection).await;
}
