//! Long responses in parts, as they come.
//!
//! A server of another make sends a whole state in one response: tens of megabytes, which tonic would collect before the first
//! resource is read, and keep a buffer for as long as the stream lives. Here such a response becomes several, each a message of
//! its own, which are read and let go of one after the other:
//!
//! ```text
//!   response   version │ resource │ resource … resource │ type, nonce, removed names
//!   parts      resource … [`MARK`]   resource … [`MARK`]   resource … version, type, nonce, removed names
//! ```
//!
//! * Resources keep their order; what is no resource comes with the last part. Who reads them puts together again what
//!   [belongs together](proto::belongs_together).
//! * Short responses pass as they are. So do those of our own servers, which make parts themselves.
//! * A part has at most [`PART`] bytes and one resource more.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body::{Body, Frame};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field, string};
use proto::wire::discovery::DeltaDiscoveryResponse;
use tonic::Status;
use tonic::codegen::{Service, StdError, http};
use tonic::transport::Channel;

/// Longer responses are taken apart.
const LONG: usize = 4 << 20;
const PART: usize = 1 << 20;
/// A flag, and the length of the message (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX: usize = 5;
/// What the key and the length of a field take at most.
const HEADER: usize = 20;
/// Fields of [`DeltaDiscoveryResponse`].
const VERSION_INFO: u32 = 1;
const RESOURCES: u32 = 2;
/// The `system_version_info` of a part that others follow. A server that says this of itself only gets no answer.
const MARK: &str = "\u{0}part";

/// Whether others follow that belong to the same response.
pub(super) fn is_part(response: &DeltaDiscoveryResponse) -> bool {
    response.system_version_info == MARK
}

/// A channel whose long responses come in parts.
#[derive(Clone, Debug)]
pub(super) struct InParts {
    channel: Channel,
    limit: usize,
}

impl InParts {
    /// Responses may have `limit` bytes.
    pub(super) fn new(channel: Channel, limit: usize) -> Self {
        Self { channel, limit }
    }
}

impl Service<http::Request<tonic::body::Body>> for InParts {
    type Response = http::Response<Parts<tonic::body::Body>>;
    type Error = tonic::transport::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::poll_ready(&mut self.channel, context)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let (answer, limit) = (self.channel.call(request), self.limit);
        Box::pin(async move { Ok(answer.await?.map(|body| Parts::new(body, limit))) })
    }
}

/// A body in which no message is long.
pub(super) struct Parts<B> {
    body: Pin<Box<B>>,
    /// Bytes that a message may have.
    limit: usize,
    /// What has come and was not passed on.
    buffer: BytesMut,
    state: State,
}

enum State {
    /// A message begins.
    Between,
    /// So many bytes are passed on as they are.
    Short(usize),
    Long(Long),
}

/// A message that is taken apart.
struct Long {
    /// Bytes that have not been looked at.
    left: usize,
    /// The resources of the next part.
    resources: BytesMut,
    /// What comes with the last one.
    rest: BytesMut,
}

impl<B: Body + Send> Parts<B> {
    fn new(body: B, limit: usize) -> Self {
        Self { body: Box::pin(body), limit, buffer: BytesMut::new(), state: State::Between }
    }

    /// What can be passed on of what has come; `None` when more has to come first.
    fn advance(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            match &mut self.state {
                State::Between => {
                    let Some(length) = self.prefix()? else { return Ok(None) };
                    if length <= LONG {
                        self.state = State::Short(PREFIX + length);
                    } else {
                        self.buffer.advance(PREFIX);
                        let (resources, rest) = (BytesMut::new(), BytesMut::new());
                        self.state = State::Long(Long { left: length, resources, rest });
                    }
                }
                State::Short(0) => self.state = State::Between,
                State::Short(left) => {
                    let now = self.buffer.len().min(*left);
                    *left -= now;
                    let piece = self.buffer.split_to(now).freeze();
                    return Ok((now > 0).then_some(piece));
                }
                State::Long(long) => {
                    let part = long.next(&mut self.buffer)?;
                    if long.left == 0 {
                        self.state = State::Between;
                    }
                    return Ok(part);
                }
            }
        }
    }

    /// The length of the message that begins.
    fn prefix(&self) -> Result<Option<usize>, Status> {
        let Some((prefix, _)) = self.buffer.split_at_checked(PREFIX) else { return Ok(None) };
        let (flag, mut length) = prefix.split_at(1);
        if flag != [0] {
            return Err(Status::unimplemented("compressed responses are not read"));
        }
        let length = usize::try_from(length.get_u32()).unwrap_or(usize::MAX);
        if length > self.limit {
            let text =
                format!("a response of {length} bytes is too large: the limit is {} bytes", self.limit);
            return Err(Status::out_of_range(text));
        }
        Ok(Some(length))
    }

    fn over(&self) -> Result<(), Status> {
        let is_whole = matches!(self.state, State::Between | State::Short(0)) && self.buffer.is_empty();
        is_whole.then_some(()).ok_or_else(|| Status::internal("the stream ended within a response"))
    }
}

impl Long {
    /// The next part, if all of it is there.
    fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, Status> {
        while self.left > 0 {
            let Some((field, length)) = self.field(buffer)? else { return Ok(None) };
            let bytes = buffer.split_to(length);
            self.left -= length;
            if field != RESOURCES {
                self.rest.extend_from_slice(&bytes);
                continue;
            }
            self.resources.extend_from_slice(&bytes);
            if self.resources.len() >= PART && self.left > 0 {
                let mut mark = BytesMut::new();
                string::encode(VERSION_INFO, &MARK.to_owned(), &mut mark);
                return Ok(Some(message(&std::mem::take(&mut self.resources), &mark)));
            }
        }
        Ok(Some(message(&std::mem::take(&mut self.resources), &std::mem::take(&mut self.rest))))
    }

    /// The number and the length of the field that begins, if all of it is there.
    fn field(&self, buffer: &BytesMut) -> Result<Option<(u32, usize)>, Status> {
        if buffer.len() < HEADER.min(self.left) {
            return Ok(None);
        }
        let malformed = |error| Status::internal(format!("not a DeltaDiscoveryResponse: {error}"));
        let there = buffer.get(..self.left).unwrap_or(buffer.as_ref());
        let mut unread = there;
        let (field, wire) = decode_key(&mut unread).map_err(malformed)?;
        let content = match wire {
            WireType::LengthDelimited => {
                usize::try_from(decode_varint(&mut unread).map_err(malformed)?).unwrap_or(usize::MAX)
            }
            // Short ones, of which there are none in this message: all of it is there.
            _ => {
                skip_field(wire, field, &mut unread, DecodeContext::default()).map_err(malformed)?;
                0
            }
        };
        let length = (there.len() - unread.len()).saturating_add(content);
        if length > self.left {
            return Err(Status::internal("not a DeltaDiscoveryResponse: a field is longer than all of it"));
        }
        Ok((length <= there.len()).then_some((field, length)))
    }
}

/// A message of two halves.
fn message(first: &[u8], second: &[u8]) -> Bytes {
    let length = first.len() + second.len();
    let mut framed = BytesMut::with_capacity(PREFIX + length);
    framed.put_u8(0);
    // No longer than the message that it is a part of, and the mark.
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    framed.put(first);
    framed.put(second);
    framed.freeze()
}

impl<B> Body for Parts<B>
where
    B: Body + Send,
    B::Error: Into<StdError>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        loop {
            match this.advance() {
                Ok(Some(piece)) => return Poll::Ready(Some(Ok(Frame::data(piece)))),
                Err(status) => return Poll::Ready(Some(Err(status))),
                Ok(None) if this.buffer.is_empty() => this.buffer = BytesMut::new(), // nothing is kept
                Ok(None) => {}
            }
            match ready!(this.body.as_mut().poll_frame(context)) {
                None => return Poll::Ready(this.over().err().map(Err)),
                Some(Err(error)) => return Poll::Ready(Some(Err(Status::from_error(error.into())))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.buffer.put(data),
                    Err(frame) => {
                        let trailers =
                            frame.into_trailers().ok().map(|trailers| Ok(Frame::trailers(trailers)));
                        return Poll::Ready(trailers);
                    }
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use prost::Message;
    use proto::wire::discovery::Resource;

    use super::*;
    use crate::pieces::Pieces;

    fn response(bodies: &[usize], nonce: &str) -> DeltaDiscoveryResponse {
        let resource = |(at, length): (usize, &usize)| Resource {
            name: at.to_string(),
            resource: Some(prost_types::Any { type_url: "t".into(), value: vec![at as u8; *length] }),
            ..Resource::default()
        };
        DeltaDiscoveryResponse {
            system_version_info: "7".into(),
            resources: bodies.iter().enumerate().map(resource).collect(),
            type_url: "t".into(),
            nonce: nonce.into(),
            removed_resources: vec!["gone".into(), "too".into()],
        }
    }

    /// What comes out, in whole messages; with the status that it ends with.
    fn parts(wire: &[u8], piece: usize, limit: usize) -> (Vec<DeltaDiscoveryResponse>, Option<Status>) {
        let pieces = wire.chunks(piece.max(1)).map(Bytes::copy_from_slice).collect();
        let mut body = Box::pin(Parts::new(Pieces(pieces), limit));
        let mut context = Context::from_waker(std::task::Waker::noop());
        let (mut all, mut end) = (BytesMut::new(), None);
        while let Poll::Ready(Some(frame)) = body.as_mut().poll_frame(&mut context) {
            match frame {
                Ok(frame) => all.put(frame.into_data().unwrap()),
                Err(status) => {
                    end = Some(status);
                    break;
                }
            }
        }
        let mut messages = Vec::new();
        while all.len() >= PREFIX {
            assert_eq!(all.get_u8(), 0);
            let length = all.get_u32() as usize;
            if all.len() < length {
                break;
            }
            messages.push(DeltaDiscoveryResponse::decode(all.split_to(length)).unwrap());
        }
        (messages, end)
    }

    fn wire(responses: &[DeltaDiscoveryResponse]) -> Vec<u8> {
        responses.iter().flat_map(|r| message(&r.encode_to_vec(), &[])).collect()
    }

    /// The responses that parts are of.
    fn joined(parts: Vec<DeltaDiscoveryResponse>) -> Vec<DeltaDiscoveryResponse> {
        let (mut all, mut resources) = (Vec::new(), Vec::new());
        for mut part in parts {
            resources.append(&mut part.resources);
            if is_part(&part) {
                let blank = DeltaDiscoveryResponse { system_version_info: MARK.into(), ..Default::default() };
                assert_eq!(part, blank);
            } else {
                all.push(DeltaDiscoveryResponse { resources: std::mem::take(&mut resources), ..part });
            }
        }
        assert!(resources.is_empty(), "a last part is missing");
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn responses_are_the_same_in_parts_however_they_come(
            responses in prop::collection::vec(prop::collection::vec(0..1_500_000_usize, 0..7), 1..4),
            piece in prop_oneof![1000..70_000_usize, Just(1 << 20), Just(40 << 20)],
        ) {
            let responses: Vec<_> =
                responses.iter().enumerate().map(|(n, bodies)| response(bodies, &n.to_string())).collect();
            let (parts, end) = parts(&wire(&responses), piece, 200 << 20);
            prop_assert!(end.is_none());
            let longest = parts.iter().map(Message::encoded_len).max().unwrap_or_default();
            prop_assert!(longest <= LONG.max(PART + 1_600_000), "{longest}");
            prop_assert_eq!(joined(parts), responses);
        }
    }

    #[test]
    fn a_long_response_is_held_in_part_only() {
        let bodies = vec![1000; 20_000];
        let whole = response(&bodies, "n");
        let (parts, end) = parts(&wire(std::slice::from_ref(&whole)), 16 << 10, 200 << 20);
        assert!(end.is_none() && parts.len() > 15, "{}", parts.len());
        assert!(parts.iter().all(|part| part.encoded_len() < PART + 2000));
        assert_eq!(joined(parts), [whole]);
    }

    #[test]
    fn what_is_no_response_is_refused() {
        let code = |wire: &[u8]| parts(wire, 1000, 10 << 20).1.unwrap().code();
        let long = |content: &[u8]| {
            let mut content = content.to_vec();
            content.resize(LONG + 1, 0xff);
            message(&content, &[])
        };
        assert_eq!(code(&[1, 0, 0, 0, 0]), tonic::Code::Unimplemented);
        assert_eq!(code(&[0, 0xff, 0, 0, 0]), tonic::Code::OutOfRange);
        assert_eq!(code(&[0, 0, 0]), tonic::Code::Internal);
        assert_eq!(code(&wire(&[response(&[5 << 20], "n")])[..5 << 20]), tonic::Code::Internal, "cut off");
        assert_eq!(code(&long(&[])), tonic::Code::Internal, "no key");
        assert_eq!(
            code(&long(&[0x12, 0xff, 0xff, 0xff, 0xff, 0x0f])),
            tonic::Code::Internal,
            "too long a field"
        );
        assert_eq!(code(&long(&[0x13])), tonic::Code::Internal, "a group");
    }
}
