//! The bytes under `h2`: many small frames become one write, and what comes in passes the [`FrameWatch`].
//!
//! `h2` writes and flushes each DATA frame on its own. Over TLS each of these would be a record and a system call.
//! A [`Wire`] collects small writes instead, and sends them when the task that drives the connection has nothing
//! more to do ([`Wire::poll_flush_now`]); large payloads are not copied but go out together with what was collected.
//!
//! What is collected is in the thread's one buffer for that, as a rule; what the transport does not take is in one of its size.
//!
//! Invariant: after the driving task's poll either nothing is left to send or its waker is registered for writing.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use net::Io;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::flood::{Flood, FrameWatch};

/// Writes up to this size in all are collected; a TLS record holds 16 KiB (RFC 8446 section 5.1).
const COLLECT: usize = 16 * 1024;
/// Pieces of one vectored write.
const PIECES: usize = 16;
/// What is read in one poll of the connection before its tunnels get their turn to deliver it. Of much more the first
/// would have left the processor's cache by then, and none of the buffers that it lies in could be used again for the rest.
const TURN: usize = 256 * 1024;

thread_local! {
    /// What connections of the thread collect in, one after the other.
    static SPARE: Cell<BytesMut> = Cell::new(BytesMut::new());
}

/// The connection's byte stream; a clone for `h2` and one for the task that drives it. Only that task uses them, so
/// the lock is never waited for.
pub(crate) struct Wire<T>(Arc<Mutex<State<T>>>);

struct State<T> {
    io: T,
    out: BytesMut,
    unflushed: bool,
    /// Read in this turn.
    turn: usize,
    watch: FrameWatch,
    flood: Option<Flood>,
}

impl<T> Clone for Wire<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Io> Wire<T> {
    pub(crate) fn new(io: T, watch: FrameWatch) -> Self {
        let state = State { io, out: BytesMut::new(), unflushed: false, turn: 0, watch, flood: None };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what was collected. To be called at the end of each poll of the connection.
    pub(crate) fn poll_flush_now(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state().poll_flush_now(cx)
    }

    /// What came of the frames so far.
    pub(crate) fn seen(&self) -> Seen {
        let state = self.state();
        Seen { progress: state.watch.progress(), goaway: state.watch.goaway(), flood: state.flood }
    }
}

/// What a peer's frames say to the task that drives its connection.
pub(crate) struct Seen {
    /// See [`FrameWatch::progress`].
    pub(crate) progress: u64,
    /// See [`FrameWatch::goaway`].
    pub(crate) goaway: bool,
    /// The flood that ended reading, if there was one.
    pub(crate) flood: Option<Flood>,
}

impl<T: Io> State<T> {
    fn poll_flush_now(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.turn = 0;
        ready!(self.poll_send_out(cx))?;
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let Poll::Ready(sent) = Pin::new(&mut self.io).poll_write(cx, &self.out) else {
                self.shrink();
                return Poll::Pending;
            };
            let sent = sent?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.out.advance(sent);
        }
        // An idle connection holds no buffer.
        give(std::mem::take(&mut self.out));
        Poll::Ready(Ok(()))
    }

    /// Has what waits for the transport hold no more than it needs.
    fn shrink(&mut self) {
        if self.out.capacity() > 2 * self.out.len() {
            let exact = BytesMut::from(&self.out[..]);
            give(std::mem::replace(&mut self.out, exact));
        }
    }

    fn collect(&mut self, pieces: &[IoSlice<'_>], total: usize) -> bool {
        if self.out.len() + total > COLLECT {
            return false;
        }
        if self.out.capacity() == 0 && total > 0 {
            self.out = SPARE.try_with(Cell::take).unwrap_or_default();
            // Makes anew what was used of it, as a rule: it is empty.
            self.out.reserve(COLLECT);
        }
        pieces.iter().for_each(|piece| self.out.extend_from_slice(piece));
        self.note_written(pieces, total);
        true
    }

    /// Shows the watch the first `length` bytes of `pieces`.
    fn note_written(&mut self, pieces: &[IoSlice<'_>], mut length: usize) {
        for piece in pieces {
            let part = piece.get(..length).unwrap_or(piece);
            length -= part.len();
            if let Err(flood) = self.watch.write(part) {
                self.flood = Some(flood);
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let total = pieces.iter().map(|piece| piece.len()).sum();
        if self.collect(pieces, total) {
            return Poll::Ready(Ok(total));
        }
        loop {
            let collected = self.out.len();
            let sent = if collected == 0 {
                ready!(Pin::new(&mut self.io).poll_write_vectored(cx, pieces))?
            } else {
                let mut all = [IoSlice::new(&[]); PIECES];
                let sources = std::iter::once(&self.out[..]).chain(pieces.iter().map(|piece| &piece[..]));
                all.iter_mut().zip(sources).for_each(|(slot, source)| *slot = IoSlice::new(source));
                let Poll::Ready(sent) = Pin::new(&mut self.io).poll_write_vectored(cx, &all) else {
                    self.shrink();
                    return Poll::Pending;
                };
                sent?
            };
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.out.advance(sent.min(collected));
            if sent > collected {
                self.note_written(pieces, sent - collected);
                return Poll::Ready(Ok(sent - collected));
            }
            if self.collect(pieces, total) {
                return Poll::Ready(Ok(total));
            }
        }
    }
}

/// Leaves it to the next connection of the thread.
fn give(mut buffer: BytesMut) {
    if buffer.capacity() > 0 {
        buffer.clear();
        // A thread that ends has no use for it.
        let _ = SPARE.try_with(|spare| spare.set(buffer));
    }
}

impl<T: Io> AsyncRead for Wire<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut guard = self.state();
        let state = &mut *guard;
        if state.flood.is_some() {
            // Nothing more is read; the driving task looks at `flood` after each poll.
            return Poll::Pending;
        }
        if state.turn >= TURN {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut state.io).poll_read(cx, buf))?;
        state.turn += buf.filled().len() - before;
        if let Err(flood) = state.watch.read(buf.filled().get(before..).unwrap_or_default()) {
            state.flood = Some(flood);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: Io> AsyncWrite for Wire<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.state().poll_write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // One place is for what was collected.
        let bufs = bufs.get(..PIECES - 1).unwrap_or(bufs);
        self.state().poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Puts the flush off until the driving task calls [`Wire::poll_flush_now`].
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state();
        ready!(state.poll_flush_now(cx))?;
        Pin::new(&mut state.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::task::{ArcWake, noop_waker_ref, waker};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Takes at most `step` bytes a call, or none yet, and records each call's length. Always has more to read.
    struct Sink {
        step: usize,
        got: Vec<u8>,
        calls: Vec<usize>,
    }

    impl AsyncRead for Sink {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let [_, high, middle, low] = u32::try_from(buf.remaining() - 9).unwrap().to_be_bytes();
            buf.put_slice(&[high, middle, low, 0, 0, 0, 0, 0, 1]);
            buf.put_slice(&vec![0; buf.remaining()]);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Sink {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            if self.step == 0 {
                return Poll::Pending;
            }
            let n = buf.len().min(self.step);
            self.got.extend_from_slice(&buf[..n]);
            self.calls.push(n);
            Poll::Ready(Ok(n))
        }
        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let mut room = self.step;
            let mut taken = 0;
            for buf in bufs {
                let part = &buf[..buf.len().min(room)];
                self.got.extend_from_slice(part);
                room -= part.len();
                taken += part.len();
            }
            self.calls.push(taken);
            Poll::Ready(Ok(taken))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn wire(step: usize) -> Wire<Sink> {
        Wire::new(Sink { step, got: Vec::new(), calls: Vec::new() }, FrameWatch::of_server())
    }

    #[tokio::test]
    async fn small_writes_become_one_and_large_ones_follow_in_order() {
        for step in [1, 7, 4096, usize::MAX] {
            let mut wire = wire(step);
            let mut cx = Context::from_waker(noop_waker_ref());
            let mut expected = Vec::new();
            for (at, length) in [9, 100, 60_000, 3, 16_384, 1, 16_385, 0, 40].into_iter().enumerate() {
                let data = vec![at as u8; length];
                let mut rest = &data[..];
                while !rest.is_empty() {
                    let (a, b) = rest.split_at(rest.len().min(5));
                    let slices = [IoSlice::new(a), IoSlice::new(b)];
                    let Poll::Ready(Ok(n)) = Pin::new(&mut wire).poll_write_vectored(&mut cx, &slices) else {
                        panic!("the sink is always ready")
                    };
                    rest = &rest[n..];
                }
                expected.extend(data);
            }
            assert!(matches!(wire.poll_flush_now(&mut cx), Poll::Ready(Ok(()))));
            let state = wire.state();
            assert!(state.io.got == expected, "step {step}");
            assert_eq!(state.out.capacity(), 0);
            if step == usize::MAX {
                assert_eq!(state.io.calls, [60_109, 16_387, 16_386, 40]);
            }
        }
    }

    #[test]
    fn what_waits_holds_what_it_needs_and_nothing_is_held_by_who_waits_for_nothing() {
        let held = |wire: &Wire<Sink>| wire.state().out.capacity();
        let spare = || {
            let mut spare = SPARE.take();
            spare.reserve(COLLECT);
            let address = spare.as_ptr();
            SPARE.set(spare);
            address
        };
        let mut cx = Context::from_waker(noop_waker_ref());
        let (mut full, mut other) = (wire(0), wire(usize::MAX));
        assert!(Pin::new(&mut full).poll_write(&mut cx, &[7; 100]).is_ready());
        assert!(held(&full) >= COLLECT);
        assert!(full.poll_flush_now(&mut cx).is_pending());
        assert!((100..=200).contains(&held(&full)), "{}", held(&full));
        let shared = spare();
        for _ in 0..3 {
            let mut write =
                |length: usize| Pin::new(&mut other).poll_write(&mut cx, &vec![7; length]).is_ready();
            assert!(write(0) && write(300) && write(10_000));
            assert!(other.poll_flush_now(&mut cx).is_ready());
            assert_eq!((held(&other), spare()), (0, shared), "the buffer of one is the other's");
        }
        full.state().io.step = usize::MAX;
        assert!(full.poll_flush_now(&mut cx).is_ready());
        assert_eq!(full.state().io.got, [7; 100]);
        assert_eq!(held(&full), 0);
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl ArcWake for Woken {
        fn wake_by_ref(this: &Arc<Self>) {
            this.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn reading_stops_for_others_and_goes_on() {
        let woken = Arc::new(Woken::default());
        let waker = waker(Arc::clone(&woken));
        let (mut wire, mut cx) = (wire(1), Context::from_waker(&waker));
        for turn in 1..4 {
            let (mut room, mut read) = (vec![0; 40_000], 0);
            loop {
                let mut buf = ReadBuf::new(&mut room);
                match Pin::new(&mut wire).poll_read(&mut cx, &mut buf) {
                    Poll::Ready(result) => result.unwrap(),
                    Poll::Pending => break,
                }
                read += buf.filled().len();
            }
            assert!((TURN..TURN + 40_000).contains(&read), "{read} bytes in turn {turn}");
            assert_eq!(woken.0.load(Ordering::Relaxed), turn, "nobody would come back");
            assert!(wire.poll_flush_now(&mut cx).is_ready());
        }
    }
}
