//! What goes over the wire of one stream: the gRPC frames of its responses, made in pieces as the transport takes them.
//!
//! tonic's encoder would copy a whole response, several MB of a first state, into a buffer that lives as long as the
//! stream and never shrinks: thousands of idle streams would hold a part of the state each.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body, Frame};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};
use tokio_stream::Stream;
use tonic::codegen::http::HeaderMap;
use tonic::{Code, Status};

use super::response::Response;
use super::stream::Outgoing;

/// A piece has about this many bytes; a longer resource is a piece of its own.
const PIECE: usize = 32 << 10;
/// The field of [`Response::resources`].
const RESOURCES: u32 = 2;

/// The body.
pub(super) struct Frames {
    responses: Outgoing,
    under_way: Option<Pieces>,
    over: bool,
}

impl Frames {
    pub(super) fn new(responses: Outgoing) -> Self {
        Self { responses, under_way: None, over: false }
    }
}

/// What is left of a response.
struct Pieces {
    /// What stands before the resources: the frame's length, and the fields that are short.
    head: Option<Bytes>,
    resources: std::vec::IntoIter<Bytes>,
}

impl Pieces {
    fn of(mut response: Response) -> Self {
        let length = response.encoded_len();
        let resources = std::mem::take(&mut response.resources);
        let mut head = BytesMut::with_capacity(5 + response.encoded_len());
        head.put_u8(0); // not compressed
        // Never so long: responses in parts have a limit, and a whole state is tens of MB.
        head.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        // The order of fields means nothing.
        head.put(response.encode_to_vec().as_slice());
        Self { head: Some(head.freeze()), resources: resources.into_iter() }
    }

    fn next(&mut self) -> Option<Bytes> {
        let head = self.head.take();
        let next = self.resources.as_slice().first();
        let mut piece = match (head, next) {
            (None, None) => return None,
            (Some(head), None) => return Some(head),
            (head, Some(next)) => {
                let first = head.as_ref().map_or(0, Bytes::len) + next.len() + 10;
                let left: usize = self.resources.as_slice().iter().take(PIECE).map(|r| r.len() + 6).sum();
                let mut piece = BytesMut::with_capacity(first.max(left.min(PIECE)));
                piece.extend_from_slice(&head.unwrap_or_default());
                piece
            }
        };
        while let Some(resource) = self.resources.as_slice().first() {
            let length = resource.len() as u64;
            let needed = 1 + encoded_len_varint(length) + resource.len();
            if !piece.is_empty() && piece.len() + needed > PIECE {
                break;
            }
            encode_key(RESOURCES, WireType::LengthDelimited, &mut piece);
            encode_varint(length, &mut piece);
            piece.extend_from_slice(resource);
            self.resources.next();
        }
        Some(piece.freeze())
    }
}

fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    // A message that no header may have is left out.
    if status.add_header(&mut trailers).is_err() {
        let _ = Status::new(status.code(), "").add_header(&mut trailers);
    }
    trailers
}

impl Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        loop {
            if let Some(piece) = this.under_way.as_mut().and_then(Pieces::next) {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            this.under_way = None;
            if this.over {
                return Poll::Ready(None);
            }
            match ready!(Pin::new(&mut this.responses).poll_next(context)) {
                Some(Ok(response)) => this.under_way = Some(Pieces::of(response)),
                ended => {
                    this.over = true;
                    let status = ended.and_then(Result::err).unwrap_or_else(|| Status::new(Code::Ok, ""));
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers(&status)))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(response: &Response) -> (Vec<u8>, Vec<usize>) {
        let mut pieces = Pieces::of(response.clone());
        let mut all = Vec::new();
        let mut lengths = Vec::new();
        while let Some(piece) = pieces.next() {
            all.extend_from_slice(&piece);
            lengths.push(piece.len());
        }
        (all, lengths)
    }

    #[test]
    fn pieces_are_the_message() {
        for lengths in [vec![], vec![0, 1], vec![300; 1000], vec![10, 200_000, 10], vec![PIECE; 3]] {
            let response = Response {
                system_version_info: "7 more".to_owned(),
                resources: lengths.iter().map(|length| Bytes::from(vec![7; *length])).collect(),
                type_url: "a".to_owned(),
                nonce: "3".to_owned(),
                removed_resources: vec!["gone".to_owned(); 3],
            };
            let (all, pieces) = joined(&response);
            assert_eq!(all[0], 0);
            assert_eq!(all[1..5], u32::try_from(all.len() - 5).unwrap().to_be_bytes());
            assert_eq!(Response::decode(&all[5..]).unwrap(), response);
            let longest = lengths.iter().max().copied().unwrap_or(0);
            assert!(pieces.iter().all(|piece| *piece <= PIECE.max(longest + 10)), "{pieces:?}");
        }
    }
}
