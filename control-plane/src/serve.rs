//! The gRPC port: xDS and the CA on one server, over TLS with a certificate of the mesh's own root.
//!
//! Whoever connects proves by a token who he is, for every stream; certificates of clients are not asked for. The mesh's
//! configuration goes to node proxies only, each as the pod that its token is bound to.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use proto::wire::core::Node;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tonic::{Request, Status};
use xds::server::{Admission, Authorizer, Caller};

use crate::ca::{Account, AuthenticationError, Authenticator};

/// Connections at most: one for each node, and some more.
const MOST_CONNECTIONS: usize = 12_000;
/// TLS handshakes at a time.
const MOST_HANDSHAKES: usize = 256;
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A connection that is secured.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo { local_addr: None, remote_addr: Some(self.peer) }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The connections of a listener, once they are secured. Handshakes go on beside each other.
pub fn connections(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
) -> impl Stream<Item = io::Result<Connection>> {
    let (out, accepted) = mpsc::channel(16);
    let acceptor = TlsAcceptor::from(tls);
    tokio::spawn(async move {
        let (places, handshakes) =
            (Arc::new(Semaphore::new(MOST_CONNECTIONS)), Arc::new(Semaphore::new(MOST_HANDSHAKES)));
        loop {
            // Beyond the limit connections wait in the kernel's queue.
            let (Ok(place), Ok(handshake)) =
                (places.clone().acquire_owned().await, handshakes.clone().acquire_owned().await)
            else {
                return;
            };
            let (stream, peer) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "accept failed");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                () = out.closed() => return,
            };
            let _ = stream.set_nodelay(true); // only a matter of speed
            let (out, acceptor) = (out.clone(), acceptor.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        drop(handshake);
                        // Closed when the process ends.
                        let _ = out.send(Ok(Connection { stream, peer, _place: place })).await;
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(%peer, error = &error as &dyn std::error::Error, "no handshake");
                    }
                    Err(_) => tracing::debug!(%peer, "no handshake in time"),
                }
            });
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(accepted)
}

/// Lets node proxies in, by their tokens.
pub struct NodeProxies {
    authenticator: Arc<Authenticator>,
    cluster_id: String,
    trusted: Vec<Account>,
}

impl NodeProxies {
    /// Those of these accounts.
    #[must_use]
    pub fn new(authenticator: Arc<Authenticator>, cluster_id: String, trusted: Vec<Account>) -> Self {
        Self { authenticator, cluster_id, trusted }
    }
}

#[tonic::async_trait]
impl Authorizer for NodeProxies {
    async fn authenticate(&self, request: &Request<()>) -> Result<Caller, Status> {
        let text = |key: &str| request.metadata().get(key).and_then(|value| value.to_str().ok());
        if let Some(cluster) = text("clusterid").filter(|cluster| *cluster != self.cluster_id) {
            return Err(Status::permission_denied(format!(
                "this control plane is of the cluster {}, and not of {}",
                self.cluster_id,
                cluster.chars().take(100).collect::<String>()
            )));
        }
        let caller = self.authenticator.caller(text("authorization")).await.map_err(|error| match error {
            AuthenticationError::Rejected(_) => Status::unauthenticated(error.to_string()),
            AuthenticationError::Unavailable(_) => Status::unavailable(error.to_string()),
        })?;
        let known = |account: &Account| {
            account.namespace == caller.namespace && account.name == caller.service_account
        };
        if !self.trusted.iter().any(known) {
            return Err(Status::permission_denied(format!(
                "{caller} is no node proxy of this mesh: --trusted-node-accounts names those that are"
            )));
        }
        Ok(Caller { name: name_of(&caller.namespace, caller.pod.as_ref().map(|p| p.name.as_str())).into() })
    }

    fn admit(&self, caller: &Caller, node: &Node) -> Result<Admission, Status> {
        // `ztunnel~IP~POD.NAMESPACE~DOMAIN`: what is counted as a proxy that enforces must be that proxy.
        let pod = node.id.split('~').nth(2).unwrap_or_default();
        let own = caller.name.strip_prefix("pod ");
        if own.is_some_and(|own| own != pod) {
            return Err(Status::permission_denied(format!(
                "the token is of {}, and not of the pod {}",
                caller.name,
                pod.chars().take(300).collect::<String>()
            )));
        }
        Ok(Admission::default())
    }
}

/// The pod that a token is bound to, or the namespace of an account whose token is bound to none.
fn name_of(namespace: &str, pod: Option<&str>) -> String {
    match pod {
        Some(pod) => format!("pod {pod}.{namespace}"),
        None => format!("an account of {namespace}"),
    }
}
