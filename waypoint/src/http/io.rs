//! What carries bytes, and the buffers that they are read into.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use hbone::Tunnel;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::io::{poll_read_buf, poll_write_buf};

use crate::http::body::Output;

/// A connection's bytes.
pub enum Io {
    /// TCP.
    Tcp(TcpStream),
    /// A client's tunnel.
    Tunnel(Box<Tunnel>),
    /// Anything else above TCP: TLS, a tunnel of ours, TLS in a tunnel.
    Layered(Box<dyn net::Io>),
}

impl std::fmt::Debug for Io {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp(_) => "Tcp",
            Self::Tunnel(_) => "Tunnel",
            Self::Layered(_) => "Layered",
        })
    }
}

impl Io {
    /// Reads once; 0 is the end.
    pub(crate) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut BytesMut,
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Tcp(stream) => poll_read_buf(Pin::new(stream), cx, buffer),
            Self::Tunnel(stream) => poll_read_buf(Pin::new(&mut **stream), cx, buffer),
            Self::Layered(stream) => poll_read_buf(Pin::new(stream), cx, buffer),
        }
    }

    /// Writes all of `output`. `unflushed` is whether a layer may hold something of what was written, which it says from one
    /// call to the next: a layer that the connection below has no room for is to be asked again.
    pub(crate) fn poll_drain(
        &mut self,
        cx: &mut Context<'_>,
        output: &mut Output,
        unflushed: &mut bool,
    ) -> Poll<io::Result<()>> {
        while !output.is_empty() {
            let written = ready!(match self {
                // The kernel takes one piece for less than a list of one.
                Self::Tcp(stream) if output.is_one_piece() => {
                    let written = ready!(Pin::new(stream).poll_write(cx, output.chunk()))?;
                    output.advance(written);
                    Poll::Ready(Ok(written))
                }
                Self::Tcp(stream) => poll_write_buf(Pin::new(stream), cx, output),
                Self::Tunnel(stream) => poll_write_buf(Pin::new(&mut **stream), cx, output),
                Self::Layered(stream) => poll_write_buf(Pin::new(stream), cx, output),
            })?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *unflushed = true;
        }
        match self {
            // What was written to it is on its way.
            Self::Tcp(_) | Self::Tunnel(_) => {}
            Self::Layered(stream) if *unflushed => ready!(Pin::new(stream).poll_flush(cx))?,
            Self::Layered(_) => {}
        }
        *unflushed = false;
        Poll::Ready(Ok(()))
    }
}

impl Io {
    /// Ready when the peer has reset the connection, whatever of it was not read yet; one that only has no more to say waits for
    /// its answer. Of TCP nobody is woken for that: it is to be asked again; of TLS it is not seen.
    pub(crate) fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Tcp(stream) => {
                // What the kernel has told of the connection, for those who ask nothing but that.
                let told = std::pin::pin!(stream.ready(Interest::ERROR)).poll(cx);
                let left = matches!(told, Poll::Ready(Ok(ready)) if ready.is_error());
                if left { Poll::Ready(()) } else { Poll::Pending }
            }
            Self::Tunnel(stream) => stream.poll_reset(cx).map(|_| ()),
            Self::Layered(_) => Poll::Pending,
        }
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tunnel(stream) => Pin::new(&mut **stream).poll_read(cx, buf),
            Self::Layered(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tunnel(stream) => Pin::new(&mut **stream).poll_write(cx, buf),
            Self::Layered(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tunnel(stream) => Pin::new(&mut **stream).poll_write_vectored(cx, bufs),
            Self::Layered(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Tunnel(stream) => stream.is_write_vectored(),
            Self::Layered(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(_) | Self::Tunnel(_) => Poll::Ready(Ok(())),
            Self::Layered(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tunnel(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
            Self::Layered(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// What is read at a time, where nothing says that more will come.
pub(crate) const BUFFER: usize = 16 * 1024;
/// The most that is read at a time: four times as much after each read that filled its buffer. Each piece that is passed on
/// wakes who it is for, so that large ones cost both ends less.
pub(crate) const LARGE_BUFFER: usize = 256 * 1024;
/// Buffers that a thread keeps: more than are ever read into at a time; 1 MiB at the most.
const KEPT: usize = 64;

/// A thread's free buffers. A connection has one only while something is in it.
#[derive(Clone, Debug, Default)]
pub struct Buffers(Arc<Mutex<Vec<BytesMut>>>);

impl Buffers {
    /// An empty buffer with room for [`BUFFER`] bytes.
    pub(crate) fn take(&self) -> BytesMut {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.unwrap_or_else(|| BytesMut::with_capacity(BUFFER))
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Takes a buffer back. One that others still look into, or that has grown, is let go of.
    pub(crate) fn put(&self, mut buffer: BytesMut) {
        buffer.clear();
        if !buffer.try_reclaim(BUFFER) || buffer.capacity() > BUFFER {
            return;
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            kept.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::future::poll_fn;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    /// A layer that keeps what is written to it until it may pass it on, as TLS does where the connection below has no room.
    #[derive(Default)]
    struct Layer {
        kept: usize,
        passed: Arc<AtomicUsize>,
        full: Arc<AtomicBool>,
    }

    impl AsyncRead for Layer {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Layer {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.kept += buf.len();
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            if self.full.load(Relaxed) {
                return Poll::Pending;
            }
            let kept = std::mem::take(&mut self.kept);
            self.passed.fetch_add(kept, Relaxed);
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.poll_flush(cx)
        }
    }

    #[tokio::test]
    async fn what_a_layer_has_not_passed_on_is_asked_for_again() {
        let layer = Layer { full: Arc::new(AtomicBool::new(true)), ..Layer::default() };
        let (passed, full) = (layer.passed.clone(), layer.full.clone());
        let mut io = Io::Layered(Box::new(layer));
        let (mut output, mut unflushed) = (Output::default(), false);
        output.push(Bytes::from_static(b"the end of a message"));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        for _ in 0..2 {
            assert!(io.poll_drain(&mut cx, &mut output, &mut unflushed).is_pending());
            assert!(output.is_empty());
        }
        full.store(false, Relaxed);
        assert!(matches!(io.poll_drain(&mut cx, &mut output, &mut unflushed), Poll::Ready(Ok(()))));
        assert_eq!(passed.load(Relaxed), 20);
        // And no more than that.
        full.store(true, Relaxed);
        assert!(io.poll_drain(&mut cx, &mut output, &mut unflushed).is_ready());
    }

    #[tokio::test]
    async fn who_has_no_more_to_say_has_not_left_and_who_resets_the_connection_has() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut io = Io::Tcp(stream);
        let left = async |io: &mut Io| {
            // Nobody is woken.
            tokio::time::sleep(Duration::from_millis(50)).await;
            poll_fn(|cx| Poll::Ready(io.poll_left(cx).is_ready())).await
        };
        peer.write_all(b"what nobody reads").await.unwrap();
        assert!(!left(&mut io).await);
        peer.shutdown().await.unwrap();
        assert!(!left(&mut io).await, "it waits for its answer");
        peer.set_zero_linger().unwrap();
        drop(peer);
        let begin = tokio::time::Instant::now();
        while !left(&mut io).await {
            assert!(begin.elapsed() < Duration::from_secs(10), "it has gone");
        }
    }
}
