//! The gRPC service. Hand-written, since responses are of a type of our own ([`Response`]), which the generated
//! one could not send without encoding each resource for each client.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use proto::wire::discovery::DeltaDiscoveryRequest;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::response::Response;
use super::stream::{self, Outgoing};
use super::{Event, Shared};

const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// Serves `envoy.service.discovery.v3.AggregatedDiscoveryService`, of which the state-of-the-world form is not
/// implemented.
#[derive(Clone)]
pub struct AdsService(Arc<Shared>);

impl AdsService {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }
}

impl std::fmt::Debug for AdsService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdsService").finish_non_exhaustive()
    }
}

impl NamedService for AdsService {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

struct Method(Arc<Shared>);

impl StreamingService<DeltaDiscoveryRequest> for Method {
    type Response = Response;
    type ResponseStream = Outgoing;
    type Future = BoxFuture<tonic::Response<Outgoing>, Status>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        Box::pin(async move {
            let opened = stream::open(&shared, request).await;
            opened
                .inspect_err(|status| shared.observer.observe(Event::Refused(status)))
                .map(tonic::Response::new)
        })
    }
}

impl<B> Service<http::Request<B>> for AdsService
where
    B: tonic::codegen::Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        Box::pin(async move {
            if request.uri().path() != METHOD {
                let status = Status::unimplemented("only DeltaAggregatedResources is served here");
                return Ok(status.into_http());
            }
            let codec = ProstCodec::<Response, DeltaDiscoveryRequest>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(shared.config.request_bytes);
            Ok(grpc.streaming(Method(shared), request).await)
        })
    }
}
