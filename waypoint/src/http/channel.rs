//! One message pair's way: a connection of HTTP/1.1 or a stream of HTTP/2, on either side of the proxy. What the engine
//! does with requests and responses it does with these.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::ResponseFuture;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};

use crate::http::h1::Framing;
use crate::http::h2_heads;
use crate::http::head::{Fields, RequestHead, ResponseHead, write_line};
use crate::http::wire::{Frame, ReadError, Wire};

/// A connection or a stream.
#[derive(Debug)]
pub enum Channel {
    /// HTTP/1.1
    H1(Wire),
    /// HTTP/2
    H2(Stream),
}

/// A stream of HTTP/2.
#[derive(Debug)]
pub struct Stream {
    recv: Option<RecvStream>,
    send: Option<SendStream<Bytes>>,
    /// Of a client's stream, until it is answered.
    respond: Option<SendResponse<Bytes>>,
    /// Of a server's stream, until it has answered.
    response: Option<ResponseFuture>,
    read: bool,
}

impl Stream {
    /// A client's request.
    pub(crate) fn of_client(recv: RecvStream, respond: SendResponse<Bytes>) -> Self {
        Self { recv: Some(recv), send: None, respond: Some(respond), response: None, read: false }
    }

    /// A request that was sent to a server.
    pub(crate) fn of_server(response: ResponseFuture, send: SendStream<Bytes>) -> Self {
        Self { recv: None, send: Some(send), respond: None, response: Some(response), read: false }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Frame, ReadError>> {
        let Some(recv) = self.recv.as_mut().filter(|_| !self.read) else {
            return Poll::Ready(Ok(Frame::End(None)));
        };
        loop {
            match ready!(recv.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => return Poll::Ready(Ok(Frame::Data(data))),
                Some(Err(error)) => return Poll::Ready(Err(error.into())),
                None => break,
            }
        }
        let trailers = ready!(recv.poll_trailers(cx))?;
        self.read = true;
        Poll::Ready(Ok(Frame::End(trailers.map(|map| Box::new(h2_heads::fields(&map))))))
    }

    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        let Some(send) = &mut self.send else { return Poll::Ready(Err(gone())) };
        send.reserve_capacity(wanted);
        if send.capacity() > 0 {
            return Poll::Ready(Ok(send.capacity()));
        }
        match ready!(send.poll_capacity(cx)) {
            Some(capacity) => Poll::Ready(capacity.map_err(io::Error::other)),
            None => Poll::Ready(Err(gone())),
        }
    }

    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(respond) = &mut self.respond {
            ready!(respond.poll_reset(cx)).ok();
        } else if let Some(send) = &mut self.send {
            ready!(send.poll_reset(cx)).ok();
        } else {
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

impl Channel {
    /// The next part of the body.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<Frame, ReadError>> {
        match self {
            Self::H1(wire) => wire.poll_frame(cx),
            Self::H2(stream) => stream.poll_frame(cx),
        }
    }

    /// Whether the body was read to its end.
    pub(crate) fn is_read(&self) -> bool {
        match self {
            Self::H1(wire) => wire.is_read(),
            Self::H2(stream) => stream.read || stream.recv.as_ref().is_some_and(RecvStream::is_end_stream),
        }
    }

    /// Bytes that wait here, read or to be written.
    pub(crate) fn held(&mut self) -> usize {
        match self {
            Self::H1(wire) => wire.held(),
            Self::H2(stream) => stream.recv.as_mut().map_or(0, |recv| recv.flow_control().used_capacity()),
        }
    }

    /// Lets the peer send more, for data that was passed on.
    pub(crate) fn consumed(&mut self, bytes: usize) {
        if let Self::H2(Stream { recv: Some(recv), .. }) = self {
            // Fails only for more than was received, or when the stream is gone.
            let _ = recv.flow_control().release_capacity(bytes);
        }
    }

    /// How many of `wanted` bytes may be sent now.
    pub(crate) fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        match self {
            Self::H1(wire) => wire.poll_room(cx).map_ok(|()| wanted),
            Self::H2(stream) => stream.poll_room(cx, wanted).map_ok(|room| room.min(wanted)),
        }
    }

    /// Ready when so little of what was sent waits that more should be read for it.
    pub(crate) fn poll_wanting(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::H1(wire) => wire.poll_room(cx),
            Self::H2(_) => Poll::Ready(Ok(())),
        }
    }

    /// Sends data that [`Channel::poll_room`] has allowed.
    pub(crate) fn send(&mut self, data: Bytes) -> io::Result<()> {
        match self {
            Self::H1(wire) => wire.send(data),
            Self::H2(stream) => {
                if let Some(send) = &mut stream.send {
                    send.send_data(data, false).map_err(io::Error::other)?;
                }
            }
        }
        Ok(())
    }

    /// Sends the last data that [`Channel::poll_room`] has allowed, and ends the body with it.
    pub(crate) fn send_last(&mut self, data: Bytes) -> io::Result<()> {
        match self {
            Self::H1(wire) => {
                wire.send(data);
                wire.send_end(None);
            }
            Self::H2(stream) => {
                if let Some(send) = &mut stream.send {
                    send.send_data(data, true).map_err(io::Error::other)?;
                }
            }
        }
        Ok(())
    }

    /// Ends the body.
    pub(crate) fn send_end(&mut self, trailers: Option<&Fields>) -> io::Result<()> {
        match self {
            Self::H1(wire) => wire.send_end(trailers),
            Self::H2(stream) => {
                let Some(send) = &mut stream.send else { return Ok(()) };
                match trailers {
                    Some(trailers) => {
                        send.send_trailers(h2_heads::map(trailers)).map_err(io::Error::other)?;
                    }
                    None => send.send_data(Bytes::new(), true).map_err(io::Error::other)?,
                }
            }
        }
        Ok(())
    }

    /// Ready when all that was sent is with the kernel. A stream's frames are its connection's affair.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::H1(wire) => wire.poll_flush(cx),
            Self::H2(_) => Poll::Ready(Ok(())),
        }
    }

    /// Ready when the peer has given up.
    pub(crate) fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::H1(wire) => wire.poll_gone(cx),
            Self::H2(stream) => stream.poll_reset(cx),
        }
    }

    /// The same of a peer of whose body there is more to be read.
    pub(crate) fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::H1(wire) => wire.poll_left(cx),
            Self::H2(stream) => stream.poll_reset(cx),
        }
    }

    /// Sends a request's head to a server of HTTP/1.1; on a stream it was sent when that was opened.
    pub(crate) fn send_request(&mut self, head: &RequestHead, framing: Framing) {
        let Self::H1(wire) = self else { return };
        head.write(wire.head_output());
        let says_none = matches!(head.method(), "POST" | "PUT" | "PATCH");
        wire.begin_message();
        wire.end_head(framing, says_none, false);
    }

    /// The same, for a request that asks for a switch of protocols.
    pub(crate) fn send_upgrade(&mut self, head: &RequestHead, framing: Framing, protocol: &[u8]) {
        let Self::H1(wire) = self else { return };
        let out = wire.head_output();
        head.write(out);
        write_line(out, b"connection", b"upgrade");
        write_line(out, b"upgrade", protocol);
        wire.begin_message();
        wire.end_head(framing, false, false);
    }

    /// Tells a client that waits for it to send its body.
    pub(crate) fn send_continue(&mut self) {
        match self {
            Self::H1(wire) if !wire.has_input() => {
                wire.head_output().extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            }
            // It did not wait.
            Self::H1(_) => {}
            Self::H2(stream) => {
                let mut message = http::Response::new(());
                *message.status_mut() = http::StatusCode::CONTINUE;
                if let Some(respond) = &mut stream.respond {
                    // A failure shows when the response is sent.
                    let _ = respond.send_informational(message);
                }
            }
        }
    }

    /// Tells a client something before its response. A failure shows when that is sent.
    pub(crate) fn send_informational(&mut self, head: &ResponseHead) {
        match self {
            Self::H1(wire) => {
                let out = wire.head_output();
                head.write(out);
                out.extend_from_slice(b"\r\n");
            }
            Self::H2(stream) => {
                if let Some(respond) = &mut stream.respond {
                    let _ = respond.send_informational(h2_heads::to_response(head, Framing::None));
                }
            }
        }
    }

    /// Reads a response's head, or that of an informational response before it.
    pub(crate) fn poll_response(
        &mut self,
        cx: &mut Context<'_>,
        head: &mut ResponseHead,
        to_head: bool,
    ) -> Poll<Result<Framing, ReadError>> {
        let stream = match self {
            Self::H1(wire) => return wire.poll_response(cx, head, to_head),
            Self::H2(stream) => stream,
        };
        let Some(response) = &mut stream.response else { return Poll::Ready(Err(ReadError::Ended)) };
        if let Poll::Ready(Some(Ok(word))) = response.poll_informational(cx) {
            let (parts, ()) = word.into_parts();
            return Poll::Ready(Ok(h2_heads::response(&parts, true, head)));
        }
        let response = ready!(Pin::new(response).poll(cx))?;
        stream.response = None;
        let (parts, recv) = response.into_parts();
        let framing = h2_heads::response(&parts, recv.is_end_stream(), head);
        stream.recv = Some(recv);
        Poll::Ready(Ok(framing))
    }

    /// Sends a response's head; nothing follows if the framing is none. `close` says that the connection ends after it,
    /// `trailers` that the client takes such.
    pub(crate) fn send_response(
        &mut self,
        head: &ResponseHead,
        framing: Framing,
        says_none: bool,
        close: bool,
        trailers: bool,
    ) -> io::Result<()> {
        match self {
            Self::H1(wire) => {
                let out = wire.head_output();
                head.write(out);
                if close {
                    out.extend_from_slice(b"connection: close\r\n");
                }
                wire.end_head(framing, says_none, trailers);
            }
            Self::H2(stream) => {
                let Some(mut respond) = stream.respond.take() else { return Ok(()) };
                let end = framing == Framing::None;
                let message = h2_heads::to_response(head, framing);
                stream.send = Some(respond.send_response(message, end).map_err(io::Error::other)?);
            }
        }
        Ok(())
    }

    /// Ends it at once, with what a peer understands as a failure.
    pub(crate) fn abort(&mut self) {
        let Self::H2(stream) = self else { return };
        if let Some(respond) = &mut stream.respond {
            respond.send_reset(Reason::INTERNAL_ERROR);
        }
        if let Some(send) = &mut stream.send {
            send.send_reset(Reason::INTERNAL_ERROR);
        }
    }
}
