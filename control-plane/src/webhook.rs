//! Admission of the mesh's resources: what no state of the cluster could enforce is refused where it is written, and
//! little else is put right.
//!
//! The resources are read by the same code that compiles them, under the settings in force ([`review`]); [`mutate`] has
//! what is changed. The API server asks over TLS, under the mesh's own root, which the leader writes into the
//! configurations of the webhooks and keeps there, as it does the revisions whose objects are asked about ([`bundle`]).
//! While no control plane answers, the configurations' `failurePolicy` decides: the chart has `Fail` for
//! security.istio.io and culvert.dev, so that no policy comes in unread, and `Ignore` for all else, mutation included.
//! What comes in unread all the same fails closed here, see [`config::repository`].

pub mod bundle;
pub mod mutate;
pub mod review;

use std::sync::Arc;
use std::time::Duration;

use config::compile::Options;
use process::http::{Limits, Request, Response, Routes, StatusCode};
use process::metrics::{Counter, Family, Registry};
use tokio::sync::{Semaphore, watch};

use crate::in_force::InForce;

/// Where objects are reviewed.
pub const PATH: &str = "/validate";
/// Where they are put right.
pub const MUTATION_PATH: &str = "/mutate";

/// Reviews at a time. Whoever reaches the port can ask, and what is read of a request takes many times its size.
const MOST_REVIEWS: usize = 4;

type ByKind = Family<[(&'static str, Arc<str>); 1], Counter>;

/// Reviews objects.
pub struct Webhook {
    options: Options,
    in_force: watch::Receiver<InForce>,
    passed: Arc<ByKind>,
    failed: Arc<ByKind>,
    mutated: Arc<ByKind>,
    errors: process::metrics::Handle<(), Counter>,
    reviews: Semaphore,
}

impl Webhook {
    /// A webhook; `options` and `in_force` as the registry has them.
    #[must_use]
    pub fn new(options: Options, in_force: watch::Receiver<InForce>, metrics: &Registry) -> Self {
        Self {
            options,
            in_force,
            mutated: metrics.counters("culvertd_mutations", "Objects of which something was put right"),
            passed: metrics.counters("galley_validation_passed", "Objects that were admitted"),
            failed: metrics.counters("galley_validation_failed", "Objects that were refused"),
            errors: metrics.counter("galley_validation_http_error", "Requests to the webhook that are none"),
            reviews: Semaphore::new(MOST_REVIEWS),
        }
    }

    /// The pages that answer.
    #[must_use]
    pub fn routes(self: Arc<Self>, routes: Routes) -> Routes {
        let webhook = self.clone();
        let routes = routes.post(PATH, "reviews an object (AdmissionReview v1)", move |request| {
            let webhook = webhook.clone();
            async move { webhook.answer(request, Self::review).await }
        });
        routes.post(MUTATION_PATH, "puts an object right (AdmissionReview v1)", move |request| {
            let webhook = self.clone();
            async move { webhook.answer(request, Self::mutate).await }
        })
    }

    fn review(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let settings = self.in_force.borrow().settings.clone();
        let reviewed = review::answer(body, &self.options, settings.as_deref())?;
        let family = if reviewed.allowed { &self.passed } else { &self.failed };
        family.with(&[("resource", reviewed.kind.into())]).inc();
        Ok(reviewed.body)
    }

    fn mutate(&self, body: &[u8]) -> Result<Vec<u8>, String> {
        let mutated = mutate::answer(body)?;
        if let Some(kind) = mutated.changed {
            self.mutated.with(&[("resource", kind.into())]).inc();
        }
        Ok(mutated.body)
    }

    async fn answer(self: Arc<Self>, request: Request, answer: Answer) -> Response {
        // Others wait, until the time for a request is over.
        let _turn = self.reviews.acquire().await;
        let webhook = self.clone();
        // A large object takes some milliseconds.
        match tokio::task::spawn_blocking(move || answer(&webhook, request.body())).await {
            Ok(Ok(body)) => Response::new(StatusCode::OK, "application/json", body),
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

type Answer = fn(&Webhook, &[u8]) -> Result<Vec<u8>, String>;

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
