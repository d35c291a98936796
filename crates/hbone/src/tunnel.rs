//! One open tunnel: bytes in both directions, each of which ends on its own, and a reset that ends both at once.
//!
//! ```text
//!            send side: Open ── finish ──▶ Finished          either side, any time:
//!            recv side: Open ── END_STREAM ─▶ Finished         reset, or the connection's end ──▶ error on both
//! ```
//!
//! Back-pressure goes all the way: [`Tunnel::poll_capacity`] is pending while the peer's window is used up, and the
//! peer's window is opened again only as [`Tunnel::release`] is called for bytes that were delivered.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::backlog::Backlog;
use crate::memory::{Holding, Memory};

/// An error code of HTTP/2 (RFC 9113 section 7).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ErrorCode(pub u32);

impl ErrorCode {
    /// Nothing went wrong; the peer only reads no more.
    pub const NO_ERROR: Self = Self(0);
    /// The tunnel is no longer wanted.
    pub const CANCEL: Self = Self(8);
    /// The connection behind a CONNECT was reset or ended abnormally.
    pub const CONNECT_ERROR: Self = Self(10);
    /// The stream was not processed and may be tried again.
    pub const REFUSED_STREAM: Self = Self(7);
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            0 => "NO_ERROR",
            1 => "PROTOCOL_ERROR",
            2 => "INTERNAL_ERROR",
            3 => "FLOW_CONTROL_ERROR",
            4 => "SETTINGS_TIMEOUT",
            5 => "STREAM_CLOSED",
            6 => "FRAME_SIZE_ERROR",
            7 => "REFUSED_STREAM",
            8 => "CANCEL",
            9 => "COMPRESSION_ERROR",
            10 => "CONNECT_ERROR",
            11 => "ENHANCE_YOUR_CALM",
            12 => "INADEQUATE_SECURITY",
            13 => "HTTP_1_1_REQUIRED",
            other => return write!(f, "code {other}"),
        };
        f.write_str(name)
    }
}

impl fmt::Debug for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a tunnel ended before both sides had finished.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TunnelError {
    /// The peer reset the tunnel.
    #[error("the peer reset the tunnel with {0}")]
    Reset(ErrorCode),
    /// We reset the tunnel, because of what the peer sent or because it was no longer wanted.
    #[error("the tunnel was reset here with {0}")]
    ResetHere(ErrorCode),
    /// Its data was not taken, here or by the peer, and there was no more room for that of all tunnels together: see
    /// [`Memory`].
    #[error("cut: {bytes} bytes were not taken, and all tunnels together hold the limit of {limit} bytes")]
    NotTaken {
        /// Bytes that waited.
        bytes: usize,
        /// The limit for all tunnels.
        limit: usize,
    },
    /// The connection under the tunnel ended.
    #[error("the connection under the tunnel ended: {0}")]
    Connection(String),
}

impl From<h2::Error> for TunnelError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() && error.is_remote() => Self::Reset(ErrorCode(reason.into())),
            Some(reason) if error.is_reset() => Self::ResetHere(ErrorCode(reason.into())),
            _ => Self::Connection(error.to_string()),
        }
    }
}

impl From<TunnelError> for io::Error {
    fn from(error: TunnelError) -> Self {
        let kind = match error {
            TunnelError::Reset(_) | TunnelError::ResetHere(_) | TunnelError::NotTaken { .. } => {
                io::ErrorKind::ConnectionReset
            }
            TunnelError::Connection(_) => io::ErrorKind::ConnectionAborted,
        };
        io::Error::new(kind, error)
    }
}

/// Who counts a tunnel as long as it is open.
pub(crate) trait Owner: Send + Sync {
    /// The tunnel is gone.
    fn ended(&self);
    /// Bytes went through it, in either direction.
    fn carried(&self, bytes: usize);
    /// Where it is counted what the tunnel holds, and how much of its window may be withheld.
    fn memory(&self) -> (Memory, u32);
}

/// Calls [`Owner::ended`] once, when dropped.
pub(crate) struct Ticket(Arc<dyn Owner>);

impl Ticket {
    pub(crate) fn new(owner: Arc<dyn Owner>) -> Self {
        Self(owner)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.ended();
    }
}

/// An open tunnel. Dropping it before both directions have finished resets it with CANCEL.
///
/// It is also a byte stream, for what runs over a tunnel (a tunnel in a tunnel); [`crate::pump`] uses the methods
/// that need no copy.
pub struct Tunnel {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// What was received before the tunnel was open.
    early: Option<Box<Backlog>>,
    /// What [`AsyncRead`] has not handed out yet of a frame.
    unread: Bytes,
    /// What is counted of this tunnel.
    holding: Holding,
    /// Delivered, and not yet given back to the window.
    owed: u32,
    send_finished: bool,
    recv_finished: bool,
    // After the streams: these are released before the owner counts the tunnel as ended.
    ticket: Ticket,
}

impl Tunnel {
    pub(crate) fn new(send: SendStream<Bytes>, recv: RecvStream, ticket: Ticket) -> Self {
        Self {
            send,
            recv,
            early: None,
            unread: Bytes::new(),
            holding: Holding::default(),
            owed: 0,
            send_finished: false,
            recv_finished: false,
            ticket,
        }
    }

    /// The tunnel, with what was received while it was not open yet.
    pub(crate) fn with_early(mut self, early: Backlog, holding: Holding) -> Self {
        self.early = (!early.is_empty()).then(|| Box::new(early));
        self.holding = holding;
        self
    }

    /// How many bytes of `wanted` may be sent now; pending while it is none. Reserves them of the connection's
    /// window until they are sent, so ask only for what is there to send.
    pub fn poll_capacity(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, TunnelError>> {
        self.send.reserve_capacity(wanted);
        let capacity = self.send.capacity();
        if capacity > 0 {
            return Poll::Ready(Ok(capacity));
        }
        match ready!(self.send.poll_capacity(cx)) {
            Some(Ok(capacity)) => Poll::Ready(Ok(capacity)),
            Some(Err(error)) => Poll::Ready(Err(error.into())),
            // The send side is closed: by the peer's reset or the connection's end.
            None => Poll::Ready(Err(ready!(self.poll_reset(cx)))),
        }
    }

    /// Queues `data`, which [`Tunnel::poll_capacity`] must have allowed.
    ///
    /// # Errors
    /// The tunnel has ended.
    pub fn send(&mut self, data: Bytes) -> Result<(), TunnelError> {
        let length = data.len();
        self.send.send_data(data, false)?;
        self.ticket.0.carried(length);
        Ok(())
    }

    /// Ends the sending direction after all that was sent; the other direction goes on.
    ///
    /// # Errors
    /// The tunnel has ended.
    pub fn finish(&mut self) -> Result<(), TunnelError> {
        if !self.send_finished {
            self.send_finished = true;
            self.send.send_data(Bytes::new(), true)?;
        }
        Ok(())
    }

    /// The next data from the peer; `None` when it has finished. What it returns must be given back with
    /// [`Tunnel::release`], once it is delivered.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, TunnelError>>> {
        if self.recv_finished {
            return Poll::Ready(None);
        }
        if let Some(early) = &mut self.early {
            if let Some(data) = early.pop() {
                self.ticket.0.carried(data.len());
                return Poll::Ready(Some(Ok(data)));
            }
            self.early = None;
        }
        loop {
            match ready!(self.recv.poll_data(cx)) {
                // END_STREAM often comes on an empty frame.
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    self.ticket.0.carried(data.len());
                    return Poll::Ready(Some(Ok(data)));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => {
                    self.recv_finished = true;
                    return Poll::Ready(None);
                }
            }
        }
    }

    /// Lets the peer send `delivered` bytes more.
    pub fn release(&mut self, delivered: usize) {
        // Fails only for more than was received, or when the tunnel is gone.
        let _ = self.recv.flow_control().release_capacity(delivered);
    }

    /// Lets the peer send more for the `taken` bytes that were delivered, and counts those that wait: received ones for
    /// the application, or read ones for the peer, of which `sent` went.
    ///
    /// When all tunnels hold much, each gets back only its share of the window.
    pub(crate) fn settle(
        &mut self,
        cx: &mut Context<'_>,
        waiting: usize,
        taken: u32,
        sent: u32,
    ) -> Result<(), TunnelError> {
        let (memory, window) = self.ticket.0.memory();
        if self.holding.note(memory, waiting, taken.saturating_add(sent), cx).is_err() {
            return Err(TunnelError::NotTaken { bytes: waiting, limit: memory.limit() });
        }
        self.owed += taken;
        if self.owed > 0 {
            let back = self.owed.saturating_sub(memory.withheld(window));
            self.owed -= back;
            if back > 0 {
                self.release(back as usize);
            }
        }
        Ok(())
    }

    /// Ready when the tunnel has been reset or its connection has ended.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<TunnelError> {
        Poll::Ready(match ready!(self.send.poll_reset(cx)) {
            Ok(reason) => TunnelError::Reset(ErrorCode(reason.into())),
            Err(error) => error.into(),
        })
    }

    /// Ends both directions at once; what was not sent yet is dropped.
    pub fn reset(&mut self, code: ErrorCode) {
        self.send_finished = true;
        self.recv_finished = true;
        self.send.send_reset(code.0.into());
    }

    /// Whether both directions have finished in good order.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.send_finished && self.recv_finished
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            match ready!(self.poll_data(cx)) {
                Some(data) => self.unread = data?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let part = self.unread.len().min(buf.remaining());
        buf.put_slice(self.unread.get(..part).unwrap_or_default());
        self.unread.advance(part);
        self.release(part);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let capacity = ready!(self.poll_capacity(cx, buf.len()))?;
        let part = buf.get(..capacity).unwrap_or(buf);
        self.send(Bytes::copy_from_slice(part))?;
        Poll::Ready(Ok(part.len()))
    }

    /// What was sent is on its way already.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish().map_err(Into::into))
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("send_finished", &self.send_finished)
            .field("recv_finished", &self.recv_finished)
            .finish_non_exhaustive()
    }
}
