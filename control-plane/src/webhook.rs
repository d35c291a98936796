//! Admission of the mesh's resources: what no state of the cluster could enforce is refused where it is written.
//!
//! The resources are read by the same code that compiles them ([`review`]). The API server asks over TLS, under the mesh's
//! own root, which the leader writes into the webhook's configuration and keeps there ([`bundle`]). While no control plane
//! answers, the configuration's `failurePolicy` decides: the chart has `Fail` for security.istio.io, so that no policy
//! comes in unread, and `Ignore` for the rest. What comes in unread all the same fails closed here, see
//! [`config::repository`].

pub mod bundle;
pub mod review;

use std::sync::Arc;
use std::time::Duration;

use config::compile::Options;
use process::http::{Limits, Request, Response, Routes, StatusCode};
use process::metrics::{Counter, Family, Registry};
use tokio::sync::Semaphore;

/// Where objects are reviewed.
pub const PATH: &str = "/validate";

/// Reviews at a time. Whoever reaches the port can ask, and what is read of a request takes many times its size.
const MOST_REVIEWS: usize = 4;

type ByKind = Family<[(&'static str, Arc<str>); 1], Counter>;

/// Reviews objects.
pub struct Webhook {
    options: Options,
    passed: Arc<ByKind>,
    failed: Arc<ByKind>,
    errors: process::metrics::Handle<(), Counter>,
    reviews: Semaphore,
}

impl Webhook {
    /// A webhook; `options` as the registry has them.
    #[must_use]
    pub fn new(options: Options, metrics: &Registry) -> Self {
        Self {
            options,
            passed: metrics.counters("galley_validation_passed", "Objects that were admitted"),
            failed: metrics.counters("galley_validation_failed", "Objects that were refused"),
            errors: metrics.counter("galley_validation_http_error", "Requests to the webhook that are none"),
            reviews: Semaphore::new(MOST_REVIEWS),
        }
    }

    /// The page that answers.
    #[must_use]
    pub fn routes(self: Arc<Self>, routes: Routes) -> Routes {
        routes.post(PATH, "reviews an object (AdmissionReview v1)", move |request| {
            let webhook = self.clone();
            async move { webhook.answer(request).await }
        })
    }

    async fn answer(self: Arc<Self>, request: Request) -> Response {
        // Others wait, until the time for a request is over.
        let _turn = self.reviews.acquire().await;
        let webhook = self.clone();
        // A large object takes some milliseconds.
        let answer = tokio::task::spawn_blocking(move || review::answer(request.body(), &webhook.options));
        match answer.await {
            Ok(Ok(reviewed)) => {
                let family = if reviewed.allowed { &self.passed } else { &self.failed };
                family.with(&[("resource", reviewed.kind.into())]).inc();
                Response::new(StatusCode::OK, "application/json", reviewed.body)
            }
            Ok(Err(reason)) => {
                self.errors.inc();
                Response::text(StatusCode::BAD_REQUEST, format!("{reason}\n"))
            }
            Err(_) => {
                self.errors.inc();
                Response::text(StatusCode::INTERNAL_SERVER_ERROR, "the review failed, see the log\n")
            }
        }
    }
}

/// What clients of the webhook's port may take up: an object, and what it was, have at most some megabytes, and the API
/// server waits for ten seconds. All of them together stay well below the memory that the chart allows.
#[must_use]
pub fn limits() -> Limits {
    Limits {
        connections: 64,
        body_bytes: 8 << 20,
        handler_time: Duration::from_secs(10),
        ..Limits::default()
    }
}
