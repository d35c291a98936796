//! The encrypted stream: an [`AsyncRead`] and [`AsyncWrite`] over another one.
//!
//! * Reads take up to 160 KiB from the transport at once, writes hand it up to nine records at once.
//! * Written bytes are **buffered**: they are only sure to be on their way after a flush or a shutdown.
//! * A stream that waits holds no buffer: only keys, and the incomplete record, if there is one.
//! * Half-close is TLS 1.3's: `shutdown` sends close_notify and shuts the transport's sending side, reading goes
//!   on; the peer's close_notify ends reading, writing goes on. An end without close_notify is an error
//!   ([`TlsError::Truncated`]).
//! * Every call is cancellation safe: bytes are accepted or delivered exactly as its result says.

mod buffers;
mod inbound;
mod outbound;
mod record;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use rustls::AlertDescription;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::inbound::Inbound;
use self::outbound::Outbound;
pub(crate) use self::record::{Keys, Schedule};
use crate::handshake::PeerInfo;

/// Why an established stream failed. It is inside the [`io::Error`] that reads and writes return.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    /// The transport ended without the peer saying that nothing follows.
    #[error("the peer closed the connection without a close_notify")]
    Truncated,
    /// The peer gave up, and why.
    #[error("the peer ended the connection with the alert {0:?}")]
    Alert(AlertDescription),
    /// The peer does not keep to TLS.
    #[error("the peer sent {0}")]
    Protocol(&'static str),
    /// A record can't be sealed or opened.
    #[error("a record failed: {0}")]
    Record(String),
    /// The transport failed.
    #[error("{0}")]
    Transport(#[source] Arc<io::Error>),
}

impl TlsError {
    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Truncated => io::ErrorKind::UnexpectedEof,
            Self::Alert(_) => io::ErrorKind::ConnectionAborted,
            Self::Protocol(_) | Self::Record(_) => io::ErrorKind::InvalidData,
            Self::Transport(error) => error.kind(),
        }
    }

    /// What the peer is told, if there is anything to tell it.
    fn alert(&self) -> Option<AlertDescription> {
        match self {
            Self::Protocol(_) => Some(AlertDescription::UnexpectedMessage),
            Self::Record(_) => Some(AlertDescription::BadRecordMac),
            Self::Truncated | Self::Alert(_) | Self::Transport(_) => None,
        }
    }
}

impl From<TlsError> for io::Error {
    fn from(error: TlsError) -> Self {
        Self::new(error.kind(), error)
    }
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        Self::Transport(Arc::new(error))
    }
}

/// An authenticated, encrypted stream; made by [`accept`](crate::accept) and [`connect`](crate::connect).
pub struct TlsStream<IO> {
    io: IO,
    /// Boxed, so that a future that holds a stream stays small.
    tls: Box<Tls>,
}

struct Tls {
    keys: Keys,
    inbound: Inbound,
    outbound: Outbound,
    /// Who waits until the transport takes more. It remembers one waker for all that is written, and where the halves
    /// are apart, the reader's task is another.
    writer: Option<Waker>,
    peer: PeerInfo,
}

impl Tls {
    /// Notes whether the writer waits.
    fn noted<T>(writer: &mut Option<Waker>, cx: &Context<'_>, polled: Poll<T>) -> Poll<T> {
        match (&polled, &mut *writer) {
            (Poll::Ready(_), _) => *writer = None,
            (Poll::Pending, Some(waker)) => waker.clone_from(cx.waker()),
            (Poll::Pending, None) => *writer = Some(cx.waker().clone()),
        }
        polled
    }
}

impl<IO> TlsStream<IO> {
    /// `ahead` was read behind the handshake, `last` is what of it is still to be sent.
    pub(crate) fn new(io: IO, keys: Keys, ahead: Vec<u8>, last: Vec<u8>, peer: PeerInfo) -> Self {
        let (inbound, outbound) = (Inbound::new(ahead), Outbound::new(last));
        let tls = Tls { keys, inbound, outbound, writer: None, peer };
        Self { io, tls: Box::new(tls) }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &PeerInfo {
        &self.tls.peer
    }

    /// The transport.
    #[must_use]
    pub fn get_ref(&self) -> &IO {
        &self.io
    }
}

impl<IO: AsyncWrite + Unpin> TlsStream<IO> {
    /// Tells the peer why the connection ends, and shuts the transport's sending side.
    pub(crate) async fn abort(&mut self, alert: AlertDescription) -> io::Result<()> {
        let Tls { keys, outbound, .. } = &mut *self.tls;
        outbound.seal_alert(keys, alert)?;
        std::future::poll_fn(|cx| {
            ready!(self.tls.outbound.poll_drain(&mut self.io, cx))?;
            Pin::new(&mut self.io).poll_shutdown(cx)
        })
        .await
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { io, tls } = self.get_mut();
        let Tls { keys, inbound, outbound, writer, .. } = &mut **tls;
        match ready!(inbound.poll_read(io, keys, cx, out)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => {
                if let Some(alert) = error.alert()
                    && !outbound.is_closing()
                {
                    // Best effort: the connection is lost, whether the peer learns why or not. A writer that waits
                    // must be woken as before, or it would wait for ever.
                    let mut cx = Context::from_waker(writer.as_ref().unwrap_or(cx.waker()));
                    let _ = outbound.seal_alert(keys, alert).map(|()| outbound.poll_drain(io, &mut cx));
                }
                Poll::Ready(Err(error.into()))
            }
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for TlsStream<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, input: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(input)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        input: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { io, tls } = self.get_mut();
        let Tls { keys, outbound, writer, .. } = &mut **tls;
        let polled = outbound.poll_accept(io, keys, cx, input);
        Tls::noted(writer, cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, tls } = self.get_mut();
        let Tls { keys, outbound, writer, .. } = &mut **tls;
        let polled = outbound.poll_flush(io, keys, cx);
        Tls::noted(writer, cx, polled)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, tls } = self.get_mut();
        let Tls { keys, outbound, writer, .. } = &mut **tls;
        let polled = outbound.poll_shutdown(io, keys, cx);
        Tls::noted(writer, cx, polled)
    }
}

impl<IO> std::fmt::Debug for TlsStream<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsStream").field("peer", &self.tls.peer).finish_non_exhaustive()
    }
}
