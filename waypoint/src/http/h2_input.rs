//! What comes on a client's connection of HTTP/2: what was read of it to tell the protocol, then the rest.
//!
//! A head may be several frames (RFC 9113 section 6.10), between which nothing else may come; the library waits for all of
//! them as long as the connection lasts. Here each head has the time that one of HTTP/1.1 has, from its first byte; one that takes
//! longer ends the connection, on which nothing could be read beside it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::http::alarm::Alarm;
use crate::http::io::Io;

/// How HTTP/2 begins (RFC 9113 section 3.4).
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const FRAME_HEADER: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// A head took too long.
#[derive(Debug, thiserror::Error)]
#[error("a head did not come in time")]
pub(crate) struct HeadTooLate;

impl HeadTooLate {
    /// Whether this is what ended a connection, of which the library keeps the words.
    pub(crate) fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.to_string() == Self.to_string())
    }
}

/// Where in a connection's frames its input is.
#[derive(Debug)]
struct Frames {
    header: [u8; FRAME_HEADER],
    /// How much there is of `header`.
    read: usize,
    /// What is left of the frame, or of the preface.
    left: usize,
    /// Whether that is a head's.
    is_head: bool,
    /// Whether the head goes on in another frame.
    goes_on: bool,
    /// How many heads have begun.
    heads: u64,
}

impl Frames {
    fn new() -> Self {
        let header = [0; FRAME_HEADER];
        Self { header, read: 0, left: PREFACE.len(), is_head: false, goes_on: false, heads: 0 }
    }

    /// Follows what has come.
    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.left > 0 {
                let part = self.left.min(bytes.len());
                self.left -= part;
                bytes = bytes.get(part..).unwrap_or_default();
                continue;
            }
            let wanted = self.header.get_mut(self.read..).unwrap_or_default();
            let part = wanted.len().min(bytes.len());
            let (now, rest) = bytes.split_at(part);
            wanted.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
            (self.read, bytes) = (self.read + part, rest);
            if self.read == FRAME_HEADER {
                self.begin();
            }
        }
    }

    /// A frame's payload comes next.
    fn begin(&mut self) {
        let [a, b, c, kind, flags, ..] = self.header;
        self.read = 0;
        self.left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.is_head = matches!(kind, HEADERS | CONTINUATION);
        self.heads += u64::from(kind == HEADERS);
        if self.is_head {
            self.goes_on = flags & END_HEADERS == 0;
        }
    }

    /// The head of which some has come, and not all, by its number.
    fn unfinished(&self) -> Option<u64> {
        (self.goes_on || (self.is_head && self.left > 0)).then_some(self.heads)
    }
}

/// A connection with what was read of it.
pub(crate) struct Input {
    io: Io,
    begun: BytesMut,
    frames: Frames,
    /// The head that has to be there by then.
    due: Option<(u64, Instant)>,
    limit: Duration,
    alarm: Alarm,
}

impl Input {
    /// Of `io`, of which `begun` was read; heads have `limit`.
    pub(crate) fn new(io: Io, begun: BytesMut, limit: Duration) -> Self {
        Self { io, begun, frames: Frames::new(), due: None, limit, alarm: Alarm::default() }
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.begun.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let part = self.begun.len().min(buf.remaining());
        buf.put_slice(&self.begun.split_to(part));
        if self.begun.is_empty() {
            self.begun = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Input {
    /// Fails with [`HeadTooLate`], too.
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let polled = this.poll_bytes(cx, buf);
        if polled.is_ready() {
            this.frames.pass(buf.filled().get(before..).unwrap_or_default());
            this.due = this.frames.unfinished().map(|head| match this.due {
                Some((due, late)) if due == head => (head, late),
                _ => (head, Instant::now() + this.limit),
            });
        }
        let Some((_, late)) = this.due else { return polled };
        match polled {
            // What comes in drops is not waited for any longer either.
            Poll::Ready(result) if Instant::now() < late => Poll::Ready(result),
            Poll::Ready(_) => Poll::Ready(Err(io::Error::other(HeadTooLate))),
            Poll::Pending => {
                ready!(this.alarm.poll(cx, late));
                Poll::Ready(Err(io::Error::other(HeadTooLate)))
            }
        }
    }
}

impl AsyncWrite for Input {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut all = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        all.resize(FRAME_HEADER + usize::from(length), b'x');
        all
    }

    /// Sends these, with a second between each two; how many bytes came, or what became of it.
    async fn sent(parts: Vec<Vec<u8>>) -> io::Result<usize> {
        let (mut client, io) = duplex(1 << 16);
        let mut input = Input::new(Io::Layered(Box::new(io)), PREFACE.into(), LIMIT);
        let client = async move {
            for part in parts {
                client.write_all(&part).await.unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            // As long as anybody waits for something.
            tokio::time::sleep(LIMIT * 10).await;
            drop(client);
        };
        let mut all = Vec::new();
        let (read, ()) = tokio::join!(input.read_to_end(&mut all), client);
        read
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_its_time_and_heads_after_it_have_theirs() {
        let head = frame(HEADERS, END_HEADERS, 20);
        let data = frame(0, 1, 100);
        let (first, second) = head.split_at(15);
        // The end of one head comes with the beginning of the next, and so on for longer than one may take.
        let mut parts = vec![first.to_vec()];
        parts.extend((0..30).map(|_| [second, &data, first].concat()));
        parts.push(second.to_vec());
        let size = parts.iter().map(Vec::len).sum::<usize>() + PREFACE.len();
        assert_eq!(sent(parts).await.unwrap(), size);
        // What is no head may take as long as the connection.
        assert!(sent(vec![frame(0, 0, 100)[..20].to_vec()]).await.is_ok());
        assert!(sent(vec![head[..5].to_vec()]).await.is_ok(), "a frame of which nobody knows what it is");
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_end_ends_the_connection() {
        let open = frame(HEADERS, 0, 20);
        let mut drops = vec![open.clone()];
        drops.extend((0..30).map(|_| frame(CONTINUATION, 0, 1)));
        for parts in [vec![open.clone()], vec![open[..15].to_vec()], drops] {
            assert!(HeadTooLate::is(&sent(parts).await.unwrap_err()));
        }
    }
}
