//! Collectors are services of the mesh: they are reached as back ends of requests are, by tunnels where they are in it.

use std::io;
use std::sync::{Arc, OnceLock};

use model::telemetry::Collector;
use tokio::net::TcpStream;
use tokio::runtime::Handle;

use super::export::{Connect, Connecting};
use crate::deciding::Deciding;
use crate::http::decide::{Call, Carrier, Connection, Endpoints};
use crate::http::head::RequestHead;
use crate::upstream::Backend;

/// Reaches collectors by the waypoint's own back ends.
pub struct ThroughMesh {
    /// Who knows the mesh and its back ends. It tells of requests itself, so it comes after this.
    deciding: OnceLock<Deciding>,
    /// A thread of the data plane: it has the tunnels.
    thread: Handle,
}

impl std::fmt::Debug for ThroughMesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThroughMesh").finish_non_exhaustive()
    }
}

impl ThroughMesh {
    /// Connections are made on `thread`, one of the data plane's.
    #[must_use]
    pub fn new(thread: Handle) -> Self {
        Self { deciding: OnceLock::new(), thread }
    }

    /// Says who knows the back ends. Until then no collector is reached.
    pub fn follow(&self, deciding: &Deciding) {
        // A second one would know no more.
        let _ = self.deciding.set(deciding.clone());
    }

    fn endpoints(&self, collector: &Collector) -> io::Result<Arc<dyn Endpoints>> {
        let deciding = self.deciding.get().ok_or(io::ErrorKind::NotConnected)?;
        let mesh = deciding.rules().mesh.clone();
        let meant = |namespace: &str| collector.namespace.as_deref().is_none_or(|wanted| wanted == namespace);
        let mut named = mesh.services_named(&collector.host).iter().filter(|s| meant(&s.namespace));
        let service = named.next().ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("there is no service {}", collector.host))
        })?;
        let backend = Backend { service: service.key(), port: collector.port, subset: None };
        deciding.clusters().endpoints(&mesh, &backend).map_err(io::Error::other)
    }
}

impl Connect for ThroughMesh {
    fn connect(&self, collector: &Collector) -> Connecting {
        let endpoints = self.endpoints(collector);
        let thread = self.thread.clone();
        Box::pin(async move {
            let endpoints = endpoints?;
            let connecting = thread.spawn(async move {
                let nobody = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
                let connection = Connection {
                    client: nobody,
                    destination: nobody,
                    identity: None,
                    server_name: None,
                    secure: false,
                    said: None,
                };
                let request = RequestHead::default();
                let call = Call { request: &request, connection: &connection, tried: &[], elsewhere: false };
                let picked = endpoints.pick(&call).map_err(|none| io::Error::other(none.detail))?;
                match &picked.target.carrier {
                    Carrier::Tcp => {
                        let stream = TcpStream::connect(picked.target.address).await?;
                        Ok(Box::new(stream) as Box<dyn net::Io>)
                    }
                    Carrier::Via(dial) => dial.dial(picked.target.address).await,
                }
            });
            connecting.await.map_err(io::Error::other)?
        })
    }
}
