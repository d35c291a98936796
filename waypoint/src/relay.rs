//! Passes bytes both ways between two connections until both have ended, or nothing has passed for too long.
//!
//! Invariants:
//! * an idle connection holds no buffer: what is read goes into one that all of a thread share, and only what the other side
//!   does not take at once is kept;
//! * a side that takes nothing stops the other;
//! * each direction ends on its own.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::http::alarm::Alarm;

/// What is read at once.
const READ: usize = 64 * 1024;
/// Reads of one direction before others get their turn.
const TURN: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());
}

/// Why bytes pass no more.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A side failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Nothing passed for too long.
    #[error("nothing passed for {0:?}")]
    Idle(Duration),
}

/// One direction.
#[derive(Default)]
struct Way {
    /// Was read, and is not taken yet.
    left: BytesMut,
    unflushed: bool,
    ended: bool,
    done: bool,
    /// Whether anything passed since it was last asked.
    moved: bool,
}

impl Way {
    /// Ready when the end has been passed on.
    fn poll<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
    ) -> Poll<io::Result<()>> {
        for _ in 0..TURN {
            if self.done {
                return Poll::Ready(Ok(()));
            }
            while !self.left.is_empty() {
                let count = ready!(Pin::new(&mut *to).poll_write(cx, &self.left))?;
                self.wrote(count)?;
                self.left.advance(count);
            }
            self.left = BytesMut::new();
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                self.done = true;
                continue;
            }
            if self.poll_read(cx, from, to)?.is_pending() {
                if self.unflushed {
                    ready!(Pin::new(&mut *to).poll_flush(cx))?;
                    self.unflushed = false;
                }
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads once, and writes what `to` takes of it.
    fn poll_read<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
    ) -> Poll<io::Result<()>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
            let mut data = buffer.filled();
            self.ended = data.is_empty();
            while !data.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, data)? {
                    Poll::Ready(count) => {
                        self.wrote(count)?;
                        data = data.get(count..).unwrap_or_default();
                    }
                    Poll::Pending => {
                        self.left.extend_from_slice(data);
                        break;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
    }

    fn wrote(&mut self, count: usize) -> io::Result<()> {
        (self.unflushed, self.moved) = (true, true);
        if count == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
    }
}

/// Passes bytes until both sides have ended. `idle` is how long nothing may pass.
///
/// # Errors
/// See [`Broken`]. What was on its way may be lost.
pub async fn relay<A, B>(a: &mut A, b: &mut B, idle: Option<Duration>) -> Result<(), Broken>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Way::default(), Way::default());
    let mut alarm = Alarm::default();
    let mut deadline = idle.map(|idle| (Instant::now() + idle, idle));
    poll_fn(|cx| {
        let (one, other) = (there.poll(cx, a, b)?, back.poll(cx, b, a)?);
        if one.is_ready() && other.is_ready() {
            return Poll::Ready(Ok(()));
        }
        let Some((at, idle)) = &mut deadline else { return Poll::Pending };
        loop {
            ready!(alarm.poll(cx, *at));
            // Whether anything passed is looked at once in this time, rather than the clock at each read.
            let moved = std::mem::take(&mut there.moved) | std::mem::take(&mut back.moved);
            if !moved {
                return Poll::Ready(Err(Broken::Idle(*idle)));
            }
            *at = Instant::now() + *idle;
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn bytes_pass_both_ways_and_each_way_ends_on_its_own() {
        let ((mut client, mut a), (mut b, mut server)) = (duplex(100), duplex(1000));
        let relaying = tokio::spawn(async move { relay(&mut a, &mut b, None).await });
        let sent: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut back = Vec::new();
            client.read_to_end(&mut back).await.unwrap();
            back
        });
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert!(got == expected);
        // The other way still goes.
        server.write_all(b"after the end").await.unwrap();
        drop(server);
        assert_eq!(writing.await.unwrap(), b"after the end");
        relaying.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_on_which_nothing_passes_ends_after_its_time() {
        let idle = Duration::from_secs(60);
        let ((mut client, mut a), (mut b, mut server)) = (duplex(100), duplex(100));
        let relaying = tokio::spawn(async move { relay(&mut a, &mut b, Some(idle)).await });
        let begun = Instant::now();
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(50)).await;
            server.write_all(b"x").await.unwrap();
            assert_eq!(client.read_u8().await.unwrap(), b'x');
        }
        let broken = relaying.await.unwrap().unwrap_err();
        assert!(matches!(broken, Broken::Idle(limit) if limit == idle), "{broken}");
        let lasted = begun.elapsed().as_secs();
        assert!((250 + 60..=250 + 120).contains(&lasted), "{lasted}");
    }

    #[tokio::test]
    async fn a_side_that_takes_nothing_stops_the_other() {
        let ((mut client, mut a), (mut b, server)) = (duplex(1000), duplex(1000));
        let relaying = tokio::spawn(async move { relay(&mut a, &mut b, None).await });
        let written = async {
            let mut written = 0;
            loop {
                let write = tokio::time::timeout(Duration::from_millis(200), client.write(&[0; 1000]));
                match write.await {
                    Ok(count) => written += count.unwrap(),
                    Err(_) => return written,
                }
            }
        };
        let written = written.await;
        assert!(written <= 2 * 1000 + READ, "{written}");
        drop(server);
        assert!(relaying.await.unwrap().is_err());
    }
}
