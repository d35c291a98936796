//! Passes a body on, from one channel to another, with back-pressure. A request's body is kept while it may have to be
//! sent again.

use std::collections::VecDeque;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};

use crate::http::channel::Channel;
use crate::http::decide::Ahead;
use crate::http::head::{Fields, Known};
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
    size: usize,
    limit: usize,
}

/// One body on its way.
#[derive(Debug, Default)]
pub(crate) struct Pump {
    /// Was read, and is not sent yet.
    pending: Bytes,
    /// Whether the sender's window is to be opened again for `pending`.
    owed: bool,
    /// Was read for an earlier try.
    again: VecDeque<Bytes>,
    kept: Option<Kept>,
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
}

impl Pump {
    /// For a body that is there or not.
    pub(crate) fn new(empty: bool) -> Self {
        Self { read: empty, done: empty, ..Self::default() }
    }

    /// Keeps the body, up to `limit` bytes.
    pub(crate) fn keep(&mut self, limit: usize) {
        // What was read ahead is the beginning of it.
        let parts: Vec<Bytes> = self.again.iter().cloned().collect();
        let size = parts.iter().map(Bytes::len).sum();
        self.kept = (size <= limit).then_some(Kept { parts, size, limit });
    }

    /// Reads the body's beginning, `limit` bytes and what comes with them, and keeps it to be sent. Ready when it is there,
    /// or all of the body is.
    pub(crate) fn poll_ahead(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Channel,
        limit: usize,
    ) -> Poll<Result<(), ReadError>> {
        while !self.read && self.again.iter().map(Bytes::len).sum::<usize>() <= limit {
            let frame = ready!(from.poll_frame(cx))?;
            self.take(frame, from);
            let data = std::mem::take(&mut self.pending);
            if !data.is_empty() {
                // It waits here, and is little: the sender may go on.
                from.consumed(data.len());
                self.again.push_back(data);
            }
            self.owed = false;
        }
        Poll::Ready(Ok(()))
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

    /// Whether all that was read is still here.
    pub(crate) fn can_restart(&self) -> bool {
        self.kept.is_some() || (self.bytes == 0 && self.pending.is_empty())
    }

    /// Begins again with what was kept, for another channel.
    pub(crate) fn restart(&mut self, empty: bool) {
        self.again = self.kept.iter().flat_map(|kept| kept.parts.iter().cloned()).collect();
        self.pending = Bytes::new();
        self.done = empty;
    }

    /// The whole body, if it was read and kept.
    pub(crate) fn whole(&self) -> Option<Vec<Bytes>> {
        let kept = self.kept.as_ref().filter(|_| self.read)?;
        Some(kept.parts.clone())
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
        loop {
            if !self.pending.is_empty() {
                let room = ready!(to.poll_room(cx, self.pending.len())).map_err(PumpError::To)?;
                let data = self.pending.split_to(room);
                // The end goes with the last data where it is known already: a frame less of HTTP/2.
                if self.pending.is_empty() && self.again.is_empty() && !self.read && from.is_read() {
                    to.send_last(data).map_err(PumpError::To)?;
                    (self.read, self.done) = (true, true);
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
            } else {
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
                if let Some(kept) = &mut self.kept {
                    kept.size += data.len();
                    if kept.size > kept.limit {
                        self.kept = None;
                    } else {
                        kept.parts.push(data.clone());
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
                }
            }
        }
    }

    /// The trailers, once the end was read.
    pub(crate) fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }
}
