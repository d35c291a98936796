//! What comes over the wire of one stream: the gRPC frames of its requests.
//!
//! tonic's decoder would keep a buffer as long as the longest request for as long as the stream lives. The longest is the one
//! in which a client that comes back says what it holds, megabytes: thousands of idle streams would hold that each. Here
//! nothing is kept of a request that was read.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use proto::wire::discovery::DeltaDiscoveryRequest;
use tonic::Status;
use tonic::codegen::{Body, StdError};

/// A flag, and the length of the message (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX: usize = 5;

type Next = Box<dyn FnMut(&mut Context<'_>) -> Poll<Option<Result<Bytes, Status>>> + Send>;

/// The requests of a stream.
pub(super) struct Requests {
    /// Gives the next piece of the body.
    next: Next,
    /// What has come of requests that are not read yet.
    buffer: BytesMut,
    /// Bytes that a request may have.
    limit: usize,
}

impl Requests {
    /// The requests in `body`, each of at most `limit` bytes.
    pub(super) fn new<B>(body: B, limit: usize) -> Self
    where
        B: Body + Send + 'static,
        B::Error: Into<StdError> + Send + 'static,
    {
        let mut body = Box::pin(body);
        let next = move |context: &mut Context<'_>| {
            loop {
                match ready!(body.as_mut().poll_frame(context)) {
                    None => return Poll::Ready(None),
                    Some(Err(error)) => return Poll::Ready(Some(Err(Status::from_error(error.into())))),
                    // Trailers say nothing that a server needs.
                    Some(Ok(frame)) => {
                        if let Ok(mut data) = frame.into_data() {
                            return Poll::Ready(Some(Ok(data.copy_to_bytes(data.remaining()))));
                        }
                    }
                }
            }
        };
        Self { next: Box::new(next), buffer: BytesMut::new(), limit }
    }

    /// The next request; `None` when the client has ended the stream. Nothing is lost when it is not waited for.
    ///
    /// # Errors
    /// The transport failed, or what came is no request.
    pub(super) async fn message(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        loop {
            if let Some(request) = self.whole()? {
                return Ok(Some(request));
            }
            match poll_fn(|context| (self.next)(context)).await {
                Some(piece) => self.buffer.extend_from_slice(&piece?),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Status::internal("the stream ended within a request")),
            }
        }
    }

    /// The first request, if all of it is there.
    fn whole(&mut self) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        let Some((prefix, rest)) = self.buffer.split_at_checked(PREFIX) else { return Ok(None) };
        let (flag, mut length) = prefix.split_at(1);
        if flag != [0] {
            return Err(Status::unimplemented("compressed requests are not read"));
        }
        let length = usize::try_from(length.get_u32()).unwrap_or(usize::MAX);
        if length > self.limit {
            let text = format!("a request of {length} bytes is too long: the limit is {} bytes", self.limit);
            return Err(Status::out_of_range(text));
        }
        let Some((message, rest)) = rest.split_at_checked(length) else { return Ok(None) };
        let request = DeltaDiscoveryRequest::decode(message)
            .map_err(|error| Status::internal(format!("not a DeltaDiscoveryRequest: {error}")))?;
        // A copy of what is left, so that what was read takes no memory any more.
        self.buffer = BytesMut::from(rest);
        Ok(Some(request))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use bytes::BufMut;
    use proptest::prelude::*;

    use super::*;
    use crate::pieces::Pieces;

    fn framed(names: &[String]) -> Vec<u8> {
        let mut wire = Vec::new();
        for name in names {
            let request = DeltaDiscoveryRequest { type_url: name.clone(), ..Default::default() };
            wire.put_u8(0);
            wire.put_u32(u32::try_from(request.encoded_len()).unwrap());
            wire.extend(request.encode_to_vec());
        }
        wire
    }

    fn requests(pieces: impl IntoIterator<Item = Vec<u8>>) -> Requests {
        Requests::new(Pieces(pieces.into_iter().map(Bytes::from).collect()), 1000)
    }

    fn block<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #[test]
        fn requests_are_the_same_however_they_come_in_pieces(
            names in prop::collection::vec("[a-z]{0,40}", 0..6),
            cuts in prop::collection::vec(0..300_usize, 0..8),
        ) {
            let wire = framed(&names);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(wire.len())).collect();
            cuts.extend([0, wire.len()]);
            cuts.sort_unstable();
            let mut read = requests(cuts.windows(2).map(|w| wire[w[0]..w[1]].to_vec()));
            block(async {
                for name in &names {
                    prop_assert_eq!(&read.message().await.unwrap().unwrap().type_url, name);
                }
                prop_assert!(read.message().await.unwrap().is_none());
                Ok(())
            })?;
        }
    }

    #[test]
    fn nothing_is_kept_of_what_was_read() {
        let mut read = requests([framed(&["x".repeat(900), "y".to_owned()])]);
        block(async {
            read.message().await.unwrap();
            assert!(read.buffer.capacity() < 100, "{}", read.buffer.capacity());
            assert_eq!(read.message().await.unwrap().unwrap().type_url, "y");
            assert_eq!(read.buffer.capacity(), 0);
        });
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let code = |pieces: Vec<Vec<u8>>| block(requests(pieces).message()).unwrap_err().code();
        assert_eq!(code(vec![vec![1, 0, 0, 0, 0]]), tonic::Code::Unimplemented);
        assert_eq!(code(vec![vec![0, 0, 0, 4, 0]]), tonic::Code::OutOfRange);
        assert_eq!(code(vec![vec![0, 0, 0, 0, 2, 0xff, 0xff]]), tonic::Code::Internal);
        assert_eq!(code(vec![vec![0, 0, 0]]), tonic::Code::Internal);
    }
}
