//! One connection that speaks HTTP/1.1, in either role: its bytes, what was read of the current message and what is to
//! be written of the next. While nothing is under way it holds no buffers.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};

use tokio::io::AsyncWrite;

use crate::http::body::{BodyReader, Output, Part};
use crate::http::h1::{Framing, HeadParser, Refusal};
use crate::http::head::{Fields, MAX_HEAD, RequestHead, ResponseHead, write_line};
use crate::http::io::{BUFFER, Buffers, Io, LARGE_BUFFER};

/// What may wait to be written before no more is taken.
pub(crate) const OUTPUT_LIMIT: usize = 64 * 1024;

/// Why a message did not come.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The connection ended before anything of the message came.
    #[error("the connection ended")]
    Ended,
    /// It ended within the message.
    #[error("the connection ended within a message")]
    Truncated,
    /// What came is refused.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The connection, or the stream, failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The stream of HTTP/2 was reset.
    #[error("{0}")]
    Stream(#[from] h2::Error),
}

impl ReadError {
    /// Whether the server has said that it has not looked at the request: a stream that it refused, or one that its GOAWAY
    /// in good order counts out (RFC 9113 section 8.7). What ends a connection for a fault, ours or theirs, says nothing of the
    /// streams on it.
    pub(crate) fn is_unseen(&self) -> bool {
        let Self::Stream(error) = self else { return false };
        error.is_remote()
            && match error.reason() {
                Some(h2::Reason::REFUSED_STREAM) => error.is_reset(),
                Some(h2::Reason::NO_ERROR) => error.is_go_away(),
                _ => false,
            }
    }
}

/// A part of a body.
#[derive(Debug)]
pub enum Frame {
    /// Data; never empty.
    Data(Bytes),
    /// The end, with trailers if there are some.
    End(Option<Box<Fields>>),
}

/// How the body that is being written is framed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Writing {
    chunked: bool,
    /// Whether trailers may be sent.
    trailers: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Wire {
    io: Io,
    input: BytesMut,
    output: Output,
    /// Whether a layer below may hold something of what was written.
    unflushed: bool,
    buffers: Buffers,
    parser: HeadParser,
    body: BodyReader,
    trailers: Option<Box<Fields>>,
    writing: Writing,
    ended: bool,
    /// Whether the end of what is written is that of the connection's direction; then whether it has come.
    shuts: bool,
    shut: bool,
    /// What the next read asks for.
    read_size: usize,
    /// Bytes of the current message that came.
    received: u64,
}

impl Wire {
    pub(crate) fn new(io: Io, buffers: &Buffers) -> Self {
        Self::begun(io, BytesMut::new(), buffers)
    }

    /// Of a connection of which `input` has been read already.
    pub(crate) fn begun(io: Io, input: BytesMut, buffers: &Buffers) -> Self {
        let received = input.len() as u64;
        Self {
            io,
            input,
            output: Output::default(),
            unflushed: false,
            buffers: buffers.clone(),
            parser: HeadParser::default(),
            body: BodyReader::default(),
            trailers: None,
            writing: Writing::default(),
            ended: false,
            shuts: false,
            shut: false,
            read_size: BUFFER,
            received,
        }
    }

    /// Reads once. A buffer is held only while there is something in it.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Ok(0));
        }
        if self.input.capacity() == 0 {
            self.input = self.buffers.take();
        }
        if self.input.capacity() - self.input.len() < self.read_size / 2 {
            self.input.reserve(self.read_size);
        }
        let room = self.input.capacity() - self.input.len();
        let result = self.io.poll_fill(cx, &mut self.input);
        if let Poll::Ready(Ok(count)) = result {
            self.ended = count == 0;
            self.received += count as u64;
            if count == room {
                self.read_size = (self.read_size * 4).min(LARGE_BUFFER);
            }
        }
        if self.input.is_empty() {
            self.release_input();
        }
        result
    }

    fn release_input(&mut self) {
        self.buffers.put(std::mem::take(&mut self.input));
    }

    /// Bytes that were read and not taken, and that are to be written.
    pub(crate) fn held(&self) -> usize {
        self.input.len() + self.output.len()
    }

    /// Whether something of the next message is here.
    pub(crate) fn has_input(&self) -> bool {
        !self.input.is_empty()
    }

    /// Whether what comes begins with `preface`: false as soon as it can't be.
    pub(crate) fn poll_preface(
        &mut self,
        cx: &mut Context<'_>,
        preface: &[u8],
    ) -> Poll<Result<bool, ReadError>> {
        loop {
            let length = self.input.len().min(preface.len());
            if self.input.get(..length) != preface.get(..length) {
                return Poll::Ready(Ok(false));
            }
            if length == preface.len() {
                return Poll::Ready(Ok(true));
            }
            ready!(self.poll_more(cx))?;
        }
    }

    /// Ready when something of the next message is here, or the connection has ended.
    pub(crate) fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.input.is_empty() {
            // An error shows again.
            ready!(self.poll_fill(cx)).ok();
        }
        Poll::Ready(())
    }

    /// From here on the connection carries bytes in both directions, each of which ends on its own.
    pub(crate) fn switch(&mut self) {
        self.body = BodyReader::new(Framing::UntilClose);
        self.shuts = true;
    }

    /// Whether bytes of the current message came.
    pub(crate) fn has_received(&self) -> bool {
        self.received > 0
    }

    /// Makes ready for the next message.
    pub(crate) fn begin_message(&mut self) {
        self.parser = HeadParser::default();
        self.received = self.input.len() as u64;
        self.read_size = BUFFER;
    }

    /// Reads a request's head.
    pub(crate) fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        head: &mut RequestHead,
    ) -> Poll<Result<Framing, ReadError>> {
        loop {
            if !self.input.is_empty()
                && let Some((length, framing)) = self.parser.request(&self.input, head)?
            {
                self.took_head(length, framing);
                return Poll::Ready(Ok(framing));
            }
            ready!(self.poll_more(cx))?;
        }
    }

    /// Reads a response's head.
    pub(crate) fn poll_response(
        &mut self,
        cx: &mut Context<'_>,
        head: &mut ResponseHead,
        to_head: bool,
    ) -> Poll<Result<Framing, ReadError>> {
        loop {
            if !self.input.is_empty()
                && let Some((length, framing)) = self.parser.response(&self.input, head, to_head)?
            {
                self.took_head(length, framing);
                return Poll::Ready(Ok(framing));
            }
            ready!(self.poll_more(cx))?;
        }
    }

    fn took_head(&mut self, length: usize, framing: Framing) {
        bytes::Buf::advance(&mut self.input, length);
        self.body = BodyReader::new(framing);
        self.parser = HeadParser::default();
    }

    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ReadError>> {
        let before = self.received;
        match ready!(self.poll_fill(cx)) {
            Ok(0) if before == 0 => Poll::Ready(Err(ReadError::Ended)),
            Ok(0) => Poll::Ready(Err(ReadError::Truncated)),
            Ok(_) => Poll::Ready(Ok(())),
            Err(_) if before == 0 => Poll::Ready(Err(ReadError::Ended)),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }

    /// The next part of the body.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Frame, ReadError>> {
        loop {
            let mut none = Fields::default();
            let trailers = self.trailers.as_deref_mut().unwrap_or(&mut none);
            let part = self.body.next(&mut self.input, trailers)?;
            if none.count() > 0 {
                self.trailers = Some(Box::new(none));
            }
            match part {
                Part::Data(data) => return Poll::Ready(Ok(Frame::Data(data))),
                Part::End => {
                    if self.input.is_empty() {
                        self.release_input();
                    }
                    return Poll::Ready(Ok(Frame::End(self.trailers.take())));
                }
                Part::More => match ready!(self.poll_fill(cx))? {
                    0 if self.body.ends_with_connection() => self.body = BodyReader::default(),
                    0 => return Poll::Ready(Err(ReadError::Truncated)),
                    _ => {}
                },
            }
        }
    }

    /// Whether the current message's body was read to its end.
    pub(crate) fn is_read(&self) -> bool {
        self.body.is_done()
    }

    /// Ready when the peer has ended the connection; what else it sends ahead is kept, as much as a head may have.
    pub(crate) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.input.len() < MAX_HEAD {
            match ready!(self.poll_fill(cx)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(_) => {}
            }
        }
        Poll::Pending
    }

    /// The same without reading, for a peer that sends more than is taken; see [`Io::poll_left`].
    pub(crate) fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.ended { Poll::Ready(()) } else { self.io.poll_left(cx) }
    }

    /// Whether an idle connection can be used: its peer has neither ended it nor sent anything.
    pub(crate) fn is_quiet(&mut self) -> bool {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        !self.ended && self.input.is_empty() && self.poll_fill(&mut cx).is_pending()
    }

    /// Where a head is written to.
    pub(crate) fn head_output(&mut self) -> &mut BytesMut {
        if self.output.is_empty() && self.output.front.capacity() == 0 {
            self.output.front = self.buffers.take();
        }
        &mut self.output.front
    }

    /// Ends a head: writes how the body is framed, and the empty line. A body of known length keeps it.
    pub(crate) fn end_head(&mut self, framing: Framing, says_none: bool, trailers: bool) {
        let out = self.head_output();
        match framing {
            Framing::None if says_none => out.put_slice(b"content-length: 0\r\n"),
            Framing::None | Framing::UntilClose => {}
            Framing::Length(length) => {
                let mut digits = [0; 20];
                write_line(out, b"content-length", decimal(length, &mut digits));
            }
            Framing::Chunked => out.put_slice(b"transfer-encoding: chunked\r\n"),
        }
        out.put_slice(b"\r\n");
        self.writing = Writing { chunked: framing == Framing::Chunked, trailers };
    }

    /// Ready when more may be added to what is written.
    pub(crate) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.output.len() >= OUTPUT_LIMIT { self.poll_flush(cx) } else { Poll::Ready(Ok(())) }
    }

    pub(crate) fn send(&mut self, data: Bytes) {
        if self.writing.chunked {
            self.output.push_chunk(data);
        } else {
            self.output.push(data);
        }
    }

    pub(crate) fn send_end(&mut self, trailers: Option<&Fields>) {
        if self.writing.chunked {
            self.output.push_last_chunk(trailers.filter(|_| self.writing.trailers));
        }
        self.writing = Writing::default();
        self.shut = self.shuts;
    }

    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(self.io.poll_drain(cx, &mut self.output, &mut self.unflushed));
        if self.output.front.capacity() > 0 {
            self.buffers.put(std::mem::take(&mut self.output.front));
        }
        if self.shut && result.is_ok() {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            self.shut = false;
        }
        Poll::Ready(result)
    }

    /// Gives up the bytes themselves, with what was read and not used (after a switch of protocols).
    pub(crate) fn into_parts(self) -> (Io, BytesMut) {
        (self.io, self.input)
    }

    /// The bytes themselves, to end them.
    pub(crate) fn io(&mut self) -> &mut Io {
        &mut self.io
    }
}

/// A number in decimal.
pub(crate) fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or_default();
        number /= 10;
        used += 1;
        if number == 0 {
            break;
        }
    }
    digits.get(20 - used..).unwrap_or_default()
}
