//! The gRPC service. Hand-written, since responses are of a type of our own ([`super::Response`]), whose resources are
//! encoded once for all clients, and go out in pieces ([`Frames`]).

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::{Service, StdError, http};
use tonic::server::NamedService;
use tonic::{Request, Status};

use super::body::Frames;
use super::requests::Requests;
use super::stream;
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
            let limit = shared.config.request_bytes;
            let request = request.map(|body| Requests::new(body, limit));
            match stream::open(&shared, Request::from_http(request)).await {
                Ok(outgoing) => {
                    let mut response = http::Response::new(Body::new(Frames::new(outgoing)));
                    let grpc = http::HeaderValue::from_static("application/grpc");
                    response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
                    let known = http::HeaderValue::from_static(crate::EXTENSIONS_VERSION);
                    response.headers_mut().insert(crate::EXTENSIONS_HEADER, known);
                    Ok(response)
                }
                Err(status) => {
                    shared.observer.observe(Event::Refused(&status));
                    Ok(status.into_http())
                }
            }
        })
    }
}
