//! What is told of connections that are not HTTP: the metrics that the node proxy has of them, too.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use model::{Mesh, NetworkAddress, ServiceKey};
use process::metrics::tcp::{ConnectionSecurity, FailureFlag, Reporter, TcpHandle, TcpLabels};
use telemetry::{party, service_labels};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Telemetry;
use crate::http::decide::{About, Connection};

/// The client's side of a connection that is carried. What passes is counted as it does, the connection itself at its
/// beginning and its end.
pub struct Counted<T> {
    io: T,
    series: TcpHandle,
}

impl<T> fmt::Debug for Counted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counted").finish_non_exhaustive()
    }
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        self.series.closed();
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        self.series.from_client((buf.filled().len() - before) as u64);
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        if let Poll::Ready(Ok(count)) = &written {
            self.series.from_server(*count as u64);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl Telemetry {
    /// A connection is carried to the endpoint that `about` tells of: `io` is the client's side, of which `read` bytes were
    /// read already.
    #[must_use]
    pub fn connection_opened<T>(
        &self,
        mesh: &Mesh,
        connection: &Connection,
        about: Option<&About>,
        (io, read): (T, usize),
    ) -> Counted<T> {
        let service = about.and_then(|about| about.service.as_ref());
        let series = self.tcp.connection(&self.connection_labels(mesh, connection, service, about));
        series.opened();
        series.from_client(read as u64);
        Counted { io, series }
    }

    /// A connection to `service` was refused, or could not be carried.
    pub fn connection_failed(
        &self,
        mesh: &Mesh,
        connection: &Connection,
        service: Option<&ServiceKey>,
        flag: FailureFlag,
    ) {
        self.tcp.failed(&self.connection_labels(mesh, connection, service, None), flag);
    }

    fn connection_labels(
        &self,
        mesh: &Mesh,
        connection: &Connection,
        service: Option<&ServiceKey>,
        about: Option<&About>,
    ) -> TcpLabels {
        let client = NetworkAddress::new(self.settings.network.clone(), connection.client.ip());
        let workload = about.and_then(|about| about.workload.as_ref());
        let proved = about.filter(|about| about.tunnelled).and(workload).and_then(|w| w.identity().ok());
        TcpLabels {
            reporter: Reporter::Waypoint,
            source: party(mesh.workload_at(&client), connection.identity.as_deref()),
            destination: party(workload, proved.as_ref()),
            service: service_labels(service.and_then(|key| mesh.service(key))),
            security: match connection.identity {
                Some(_) => ConnectionSecurity::MutualTls,
                None => ConnectionSecurity::Unknown,
            },
        }
    }
}
