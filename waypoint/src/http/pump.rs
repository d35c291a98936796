//! Passes a body on, from one channel to another, with back-pressure. A request's body is kept while it may have to be
//! sent again.

use std::collections::VecDeque;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};

use crate::http::channel::Channel;
use crate::http::copies::Feed;
use crate::http::decide::Ahead;
use crate::http::head::{Fields, Known};
use crate::http::hygiene::CLIENT_CERT;
use crate::http::messages::Messages;
use crate::http::wire::{Frame, ReadError};

/// Which side ended it.
#[derive(Debug)]
pub(crate) enum PumpError {
    /// The one that the body comes from.
    From(ReadError),
    /// The one that it goes to.
    To(#[allow(dead_code, reason = "for logs")] io::Error),
}

/// What is kept of a body.
#[derive(Debug, Default)]
struct Kept {
    parts: Vec<Bytes>,
    /// What comes after these, in small pieces.
    small: BytesMut,
    size: usize,
    limit: usize,
}

/// A piece below this size is copied to be kept: a few bytes must not keep all of the buffer that they were read into.
pub(crate) const SMALL: usize = 2048;
/// After so much those who get copies, who are on the same thread, have their turn.
const TURN: usize = 256 * 1024;

impl Kept {
    fn push(&mut self, data: &Bytes) {
        if data.len() < SMALL {
            self.small.extend_from_slice(data);
        } else {
            self.close();
            self.parts.push(data.clone());
        }
    }

    /// Makes a part of what came in small pieces.
    fn close(&mut self) {
        if !self.small.is_empty() {
            self.parts.push(self.small.split().freeze());
        }
    }
}

/// One body on its way.
#[derive(Debug, Default)]
pub(crate) struct Pump {
    /// Was read, and is not sent yet.
    pending: Bytes,
    /// Whether the sender's window is to be opened again for `pending`.
    owed: bool,
    /// Was read for an earlier try, or ahead.
    again: VecDeque<Bytes>,
    /// What is being read ahead.
    gathered: BytesMut,
    kept: Option<Kept>,
    /// Those who get copies, once these have begun.
    copies: Option<Vec<Feed>>,
    /// The body's end was read.
    read: bool,
    trailers: Option<Box<Fields>>,
    /// The end was sent.
    pub done: bool,
    /// Bytes that were read.
    pub bytes: u64,
    /// The messages of gRPC in them, if it is gRPC.
    pub messages: Option<Messages>,
    /// Whether anything moved since it was last asked.
    pub moved: bool,
    /// Whether it waits for the other side to take what was read.
    blocked: bool,
    /// Fields that trailers may not have.
    barred: Vec<model::Str>,
}

impl Pump {
    /// For a body that is there or not.
    pub(crate) fn new(empty: bool) -> Self {
        Self { read: empty, done: empty, ..Self::default() }
    }

    /// Trailers may not have these fields, also if they have been read already.
    pub(crate) fn bar(&mut self, fields: Vec<model::Str>) {
        self.barred = fields;
        self.take_barred();
    }

    fn take_barred(&mut self) {
        if let Some(trailers) = &mut self.trailers {
            self.barred.iter().for_each(|name| trailers.remove_all_like(name.as_bytes()));
        }
    }

    /// Keeps the body, up to `limit` bytes.
    pub(crate) fn keep(&mut self, limit: usize) {
        // What was read ahead is the beginning of it.
        let parts: Vec<Bytes> = self.again.iter().cloned().collect();
        let size = parts.iter().map(Bytes::len).sum();
        self.kept = (size <= limit).then_some(Kept { parts, size, limit, ..Kept::default() });
    }

    /// Reads the body's beginning, `limit` bytes and what comes with them, and keeps it to be sent. Ready when it is there,
    /// or all of the body is.
    pub(crate) fn poll_ahead(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Channel,
        limit: usize,
    ) -> Poll<Result<(), ReadError>> {
        let mut ahead: usize = self.again.iter().map(Bytes::len).sum::<usize>() + self.gathered.len();
        while !self.read && ahead <= limit {
            let frame = match from.poll_frame(cx) {
                Poll::Ready(frame) => frame?,
                Poll::Pending => return Poll::Pending,
            };
            self.take(frame, from);
            let data = std::mem::take(&mut self.pending);
            if std::mem::take(&mut self.owed) {
                // It waits here, and is little: the sender may go on.
                from.consumed(data.len());
            }
            ahead += data.len();
            self.gathered.extend_from_slice(&data);
        }
        if !self.gathered.is_empty() {
            self.again.push_back(std::mem::take(&mut self.gathered).freeze());
        }
        Poll::Ready(Ok(()))
    }

    /// Drops what has come of the body, up to `most` bytes: where that is all of it, its connection can be used again.
    pub(crate) fn discard(&mut self, cx: &mut Context<'_>, from: &mut Channel, most: u64) {
        let most = self.bytes + most;
        while !self.read && self.bytes <= most {
            match from.poll_frame(cx) {
                Poll::Ready(Ok(Frame::Data(data))) => self.bytes += data.len() as u64,
                Poll::Ready(Ok(Frame::End(_))) => self.read = true,
                // What is wrong with it ends the connection.
                Poll::Ready(Err(_)) | Poll::Pending => return,
            }
        }
    }

    /// The first `limit` bytes of what was read ahead.
    pub(crate) fn ahead(&self, limit: usize) -> Ahead {
        let size: usize = self.again.iter().map(Bytes::len).sum();
        let mut bytes = BytesMut::with_capacity(size.min(limit));
        for part in &self.again {
            let room = limit - bytes.len();
            bytes.extend_from_slice(part.get(..room.min(part.len())).unwrap_or_default());
        }
        Ahead { bytes: bytes.freeze(), whole: self.read && size <= limit }
    }

    /// Bytes that were read and are here.
    pub(crate) fn held(&self) -> usize {
        let kept = self.kept.as_ref().map_or(0, |kept| kept.size);
        let again = if self.kept.is_some() { 0 } else { self.again.iter().map(Bytes::len).sum() };
        self.pending.len() + self.gathered.len() + kept + again
    }

    /// Whether all that was read is still here.
    pub(crate) fn can_restart(&self) -> bool {
        self.kept.is_some() || (self.bytes == 0 && self.pending.is_empty())
    }

    /// Begins again with what was kept, for another channel.
    pub(crate) fn restart(&mut self, empty: bool) {
        self.kept.iter_mut().for_each(Kept::close);
        self.again = self.kept.iter().flat_map(|kept| kept.parts.iter().cloned()).collect();
        self.pending = Bytes::new();
        self.blocked = false;
        self.done = empty;
    }

    /// Whether copies have begun.
    pub(crate) fn is_copied(&self) -> bool {
        self.copies.is_some()
    }

    /// Gives a copy of all of the body, of which nothing was sent yet, to `copies`.
    pub(crate) fn copy_to(&mut self, copies: Vec<Feed>) {
        // What was read ahead is the beginning of it.
        copies.iter().for_each(|copy| copy.begin(self.again.iter()));
        self.copies = Some(copies);
        if self.read {
            self.end_copies();
        }
    }

    fn end_copies(&self) {
        self.copies.iter().flatten().for_each(|copy| copy.end(self.trailers.as_deref()));
    }

    /// Whether it waits for the other side to take what was read.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Whether the end was read.
    pub(crate) fn is_read(&self) -> bool {
        self.read
    }

    /// Ready when all is sent and flushed.
    pub(crate) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Channel,
        to: &mut Channel,
    ) -> Poll<Result<(), PumpError>> {
        let turn = self.bytes + TURN as u64;
        loop {
            self.blocked = true;
            if !self.pending.is_empty() {
                let room = ready!(to.poll_room(cx, self.pending.len())).map_err(PumpError::To)?;
                let data = self.pending.split_to(room);
                // The end goes with the last data where it is known already: a frame less of HTTP/2.
                if self.pending.is_empty() && self.again.is_empty() && !self.read && from.is_read() {
                    to.send_last(data).map_err(PumpError::To)?;
                    (self.read, self.done) = (true, true);
                    self.end_copies();
                } else {
                    to.send(data).map_err(PumpError::To)?;
                }
                self.moved = true;
                if self.owed {
                    from.consumed(room);
                }
            } else if let Some(data) = self.again.pop_front() {
                self.pending = data;
                self.owed = false;
            } else if self.done {
                return to.poll_flush(cx).map_err(PumpError::To);
            } else if self.read {
                to.send_end(self.trailers.as_deref()).map_err(PumpError::To)?;
                self.done = true;
            } else if self.bytes > turn && self.copies.is_some() {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            } else {
                // What was sent goes first: nothing is read for a peer that does not take what there is.
                ready!(to.poll_wanting(cx)).map_err(PumpError::To)?;
                self.blocked = false;
                match from.poll_frame(cx) {
                    Poll::Ready(frame) => self.take(frame.map_err(PumpError::From)?, from),
                    Poll::Pending => {
                        if let Poll::Ready(Err(error)) = to.poll_flush(cx) {
                            return Poll::Ready(Err(PumpError::To(error)));
                        }
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    fn take(&mut self, frame: Frame, from: &mut Channel) {
        self.moved = true;
        match frame {
            Frame::Data(data) => {
                self.bytes += data.len() as u64;
                self.owed = true;
                if let Some(messages) = &mut self.messages {
                    messages.pass(&data);
                }
                self.copies.iter().flatten().for_each(|copy| copy.push(&data));
                if let Some(kept) = &mut self.kept {
                    kept.size += data.len();
                    if kept.size > kept.limit {
                        self.kept = None;
                    } else {
                        kept.push(&data);
                        // It may be sent several times, and is given back once.
                        from.consumed(data.len());
                        self.owed = false;
                    }
                }
                self.pending = data;
            }
            Frame::End(trailers) => {
                self.read = true;
                self.trailers = trailers;
                if let Some(trailers) = &mut self.trailers {
                    trailers.remove_known(|known| {
                        known.is_hop_by_hop() || matches!(known, Known::Host | Known::ContentLength)
                    });
                    trailers.remove_all_like(CLIENT_CERT);
                }
                self.take_barred();
                self.end_copies();
            }
        }
    }

    /// The trailers, once the end was read.
    pub(crate) fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;
    use crate::http::head::RequestHead;
    use crate::http::io::{Buffers, Io, LARGE_BUFFER};
    use crate::http::wire::{OUTPUT_LIMIT, Wire};

    /// A request whose body comes byte by byte.
    async fn in_bytes(count: usize) -> Channel {
        in_bytes_before(count, "").await
    }

    async fn in_bytes_before(count: usize, trailers: &'static str) -> Channel {
        let (mut client, io) = duplex(100);
        tokio::spawn(async move {
            client
                .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
                .await
                .unwrap();
            for _ in 0..count {
                client.write_all(b"1\r\nx\r\n").await.unwrap();
            }
            client.write_all(format!("0\r\n{trailers}\r\n").as_bytes()).await.unwrap();
            std::future::pending::<()>().await;
        });
        let mut wire = Wire::new(Io::Layered(Box::new(io)), &Buffers::default());
        let mut head = RequestHead::default();
        poll_fn(|cx| wire.poll_request(cx, &mut head)).await.unwrap();
        Channel::H1(wire)
    }

    #[tokio::test]
    async fn reads_grow_and_nothing_is_read_for_who_takes_nothing() {
        let (mut client, io) = duplex(4 * LARGE_BUFFER);
        client.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n").await.unwrap();
        client.write_all(&[b'x'; 1_000_000]).await.unwrap();
        let mut wire = Wire::new(Io::Layered(Box::new(io)), &Buffers::default());
        poll_fn(|cx| wire.poll_request(cx, &mut RequestHead::default())).await.unwrap();
        let (mut from, mut pump) = (Channel::H1(wire), Pump::new(false));
        let (to, mut server) = duplex(1000);
        let mut to = Channel::H1(Wire::new(Io::Layered(Box::new(to)), &Buffers::default()));
        let mut most = 0;
        let passed = poll_fn(|cx| {
            let polled = pump.poll(cx, &mut from, &mut to);
            most = most.max(pump.held() + from.held() + to.held());
            polled
        });
        let mut taken = vec![0; 1_000_000];
        let (passed, read) = tokio::join!(passed, server.read_exact(&mut taken));
        assert!(passed.is_ok() && read.is_ok());
        assert!(most < LARGE_BUFFER + OUTPUT_LIMIT, "{most}");
        assert!(most > LARGE_BUFFER - 1000, "{most}");
    }

    #[tokio::test]
    async fn what_is_read_ahead_in_bytes_is_one_piece() {
        let mut from = in_bytes(5000).await;
        let mut pump = Pump::new(false);
        poll_fn(|cx| pump.poll_ahead(cx, &mut from, 10_000)).await.unwrap();
        assert_eq!(pump.again.len(), 1);
        let ahead = pump.ahead(10_000);
        assert!(ahead.whole && ahead.bytes.len() == 5000);
        assert_eq!((pump.bytes, pump.held()), (5000, 5000));
        // Asked for again, it is there, and what is asked for is not more than is wanted.
        poll_fn(|cx| pump.poll_ahead(cx, &mut from, 10)).await.unwrap();
        let ahead = pump.ahead(10);
        assert!(!ahead.whole && ahead.bytes.len() == 10);
    }

    #[tokio::test]
    async fn trailers_say_nothing_that_is_ours_to_say() {
        let said = "x_forwarded_client_cert: a\r\nX-Forwarded-Client-Cert: b\r\nx_SUB: c\r\nx-subject: d\r\n";
        // Whether an authorizer was shown the body before is no difference.
        for ahead in [false, true] {
            let (mut from, mut pump, io) = (in_bytes_before(1, said).await, Pump::new(false), duplex(1000));
            if ahead {
                poll_fn(|cx| pump.poll_ahead(cx, &mut from, 100)).await.unwrap();
            }
            pump.bar(vec!["x-sub".into()]);
            let mut to = Channel::H1(Wire::new(Io::Layered(Box::new(io.0)), &Buffers::default()));
            poll_fn(|cx| pump.poll(cx, &mut from, &mut to)).await.unwrap();
            let trailers: Vec<_> = pump.trailers().unwrap().iter().collect();
            assert_eq!(trailers, [(&b"x-subject"[..], &b"d"[..])], "{ahead}");
        }
    }

    #[tokio::test]
    async fn what_is_kept_in_bytes_is_one_piece_and_what_is_too_much_is_let_go() {
        for (limit, kept) in [(5000, true), (4999, false)] {
            let (mut from, (mut pump, io)) = (in_bytes(5000).await, (Pump::new(false), duplex(1 << 20)));
            pump.keep(limit);
            let mut to = Channel::H1(Wire::new(Io::Layered(Box::new(io.0)), &Buffers::default()));
            poll_fn(|cx| pump.poll(cx, &mut from, &mut to)).await.unwrap();
            assert_eq!((pump.can_restart(), pump.held()), (kept, if kept { 5000 } else { 0 }));
            pump.restart(false);
            assert_eq!(pump.again.iter().map(Bytes::len).collect::<Vec<_>>(), vec![5000; usize::from(kept)]);
        }
    }
}
