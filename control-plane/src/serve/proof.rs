//! Beside each request of the gRPC port: how many of a source are undecided, and whether its sender came to be known.
//!
//! The services themselves find out who asks. What they refuse they answer with a `grpc-status` in the head; what they
//! begin to answer otherwise is of somebody known, and proves its connection as long as the answer goes on.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::transport::server::TcpConnectInfo;
use tower::{Layer, Service};

use super::connections::{Peer, Port, Proven, What};

/// Looks at the requests of a port's connections.
#[derive(Clone, Debug)]
pub struct Proving(pub Port);

impl<S> Layer<S> for Proving {
    type Service = ProvingService<S>;

    fn layer(&self, inner: S) -> ProvingService<S> {
        ProvingService { port: self.0.clone(), inner }
    }
}

/// See [`Proving`].
#[derive(Clone, Debug)]
pub struct ProvingService<S> {
    port: Port,
    inner: S,
}

impl<S, B> Service<Request<B>> for ProvingService<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Answer>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let Some(peer) = request.extensions().get::<Peer>().cloned() else {
            // Not of a listener of ours, as in a test.
            let answer = self.inner.call(request);
            return Box::pin(async move { Ok(answer.await?.map(|body| Answer { body, _proven: None })) });
        };
        // By this, the services know the address.
        let info = TcpConnectInfo { local_addr: None, remote_addr: Some(peer.address) };
        request.extensions_mut().insert(info);
        let Some(undecided) = self.port.take(peer.address.ip(), What::Request) else {
            let status = Status::resource_exhausted(
                "too many requests of this address are not decided yet; try again later",
            );
            let response = status.into_http::<Body>();
            return Box::pin(async move { Ok(response.map(|body| Answer { body, _proven: None })) });
        };
        let answer = self.inner.call(request);
        let proof = Arc::clone(&peer.proof);
        Box::pin(async move {
            let response = answer.await?;
            drop(undecided);
            let proven = is_of_somebody_known(&response).then(|| proof.stream());
            Ok(response.map(|body| Answer { body, _proven: proven }))
        })
    }
}

fn is_of_somebody_known<B>(response: &Response<B>) -> bool {
    response.status().is_success() && response.headers().get("grpc-status").is_none_or(|status| status == "0")
}

/// An answer's body, which proves its connection.
pub struct Answer {
    body: Body,
    _proven: Option<Proven>,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
