//! What is told of connections that show no requests: the metrics that the node proxy has of them, too, lines of logs, and
//! why each of them went where it did.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use model::Mesh;
use process::metrics::tcp::{ConnectionSecurity, FailureFlag, Reporter, TcpHandle, TcpLabels};
use telemetry::{party, service_labels};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Telemetry;
use super::ended::Ended;
use crate::http::decide::{Connection, Decided, Record};
use crate::http::head::{Fields, RequestHead};

/// The client's side of a connection that is carried. What passes is counted as it does, the connection itself at its
/// beginning and its end.
pub struct Counted<T> {
    io: T,
    series: Box<[TcpHandle]>,
    received: u64,
    sent: u64,
    failed: bool,
}

impl<T> fmt::Debug for Counted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counted").finish_non_exhaustive()
    }
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        self.series.iter().for_each(|series| series.closed());
    }
}

impl<T> Counted<T> {
    /// The bytes that have come from the client, and those that have gone there.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.received, self.sent)
    }

    /// Whether reading from the client, or writing to it, has failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    fn count_received(&mut self, bytes: u64) {
        self.received += bytes;
        self.series.iter().for_each(|series| series.from_client(bytes));
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
        self.count_received((buf.filled().len() - before) as u64);
        self.failed |= matches!(read, Poll::Ready(Err(_)));
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        match &written {
            Poll::Ready(Ok(count)) => {
                self.sent += *count as u64;
                self.series.iter().for_each(|series| series.from_server(*count as u64));
            }
            Poll::Ready(Err(_)) => self.failed = true,
            Poll::Pending => {}
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

/// What a connection's log line and record are made of.
#[derive(Clone, Copy, Debug)]
pub struct Carried<'a> {
    /// The snapshot.
    pub mesh: &'a Mesh,
    /// Its ends.
    pub connection: &'a Connection,
    /// What was decided.
    pub decided: &'a Decided,
    /// How it went: without a status.
    pub record: &'a Record,
}

impl Telemetry {
    /// A connection is carried to its record's endpoint: `io` is the client's side, of which `read` bytes were read already.
    #[must_use]
    pub fn connection_opened<T>(&self, carried: &Carried<'_>, (io, read): (T, usize)) -> Counted<T> {
        let nothing = (RequestHead::default(), Fields::default());
        let ended = self.carried(carried, &nothing);
        let resolved = self.resolved_for(carried.decided);
        let standard = labels(&ended);
        let series = resolved.plan.streams.iter().map(|group| {
            let mut labels = standard.clone();
            if let Some(custom) = group.labels.custom(&ended) {
                labels.hide(custom);
            }
            let series = self.tcp.connection(&labels);
            series.opened_in(group.columns);
            series
        });
        let mut counted = Counted { io, series: series.collect(), received: 0, sent: 0, failed: false };
        counted.count_received(read as u64);
        counted
    }

    /// A connection that was carried has ended.
    pub fn connection_ended(&self, carried: &Carried<'_>) {
        let nothing = (RequestHead::default(), Fields::default());
        let ended = self.carried(carried, &nothing);
        let resolved = self.resolved_for(carried.decided);
        for log in &resolved.logs {
            log.write(&ended);
        }
        self.recent.keep(&ended);
    }

    /// A connection was refused, or could not be carried.
    pub fn connection_failed(&self, carried: &Carried<'_>, flag: FailureFlag) {
        let nothing = (RequestHead::default(), Fields::default());
        let ended = self.carried(carried, &nothing);
        if self.resolved_for(carried.decided).plan.failures {
            self.tcp.failed(&labels(&ended), flag);
        }
        self.connection_ended(carried);
    }

    fn carried<'a>(&'a self, carried: &Carried<'a>, nothing: &'a (RequestHead, Fields)) -> Ended<'a> {
        let place = (carried.mesh, &self.settings.network);
        let heads = (&nothing.0, &nothing.1);
        Ended::of_connection(place, heads, carried.connection, carried.decided, carried.record)
    }

    fn resolved_for(&self, decided: &Decided) -> Arc<super::Resolved> {
        let told = decided.service.as_ref().map_or(&self.plain, |service| &service.telemetry);
        self.with_local(|local| self.resolved(local, told))
    }
}

fn labels(ended: &Ended<'_>) -> TcpLabels {
    let about = ended.about();
    let workload = about.and_then(|about| about.workload.as_ref());
    let proved = about.filter(|about| about.tunnelled).and(workload).and_then(|w| w.identity().ok());
    let identity = ended.connection.identity.as_deref();
    TcpLabels {
        reporter: Reporter::Waypoint,
        source: party(ended.source(), identity),
        destination: party(workload, proved.as_ref()),
        service: service_labels(ended.service().and_then(|key| ended.mesh.service(key))),
        security: match identity {
            Some(_) => ConnectionSecurity::MutualTls,
            None => ConnectionSecurity::Unknown,
        },
        custom: None,
    }
}
