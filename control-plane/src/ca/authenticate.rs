//! Who asks: the bearer token, reviewed by the API server.
//!
//! Invariants: a token is nowhere but in the review's request, not in a log and not in the cache, which knows it by its
//! SHA-256; what the cache says never outlives the token, nor [`CACHE_TTL`], so that a pod that was deleted loses its
//! identity soon.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::BoxFuture;
use identity::{Clock, Timestamp};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use rustls_pki_types::UnixTime;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// What tokens must be meant for.
pub const AUDIENCE: &str = "istio-ca";
/// A review is believed for so long.
const CACHE_TTL: Duration = Duration::from_secs(60);
/// So many reviews are remembered.
const CACHE_SIZE: usize = 16_384;
/// So many are asked of the API server at once; those above wait.
const REVIEWS: usize = 16;
/// A review that takes longer has failed.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// Tokens are smaller.
const MAX_TOKEN: usize = 64 * 1024;

/// A pod that a token is bound to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BoundPod {
    /// Its name; its namespace is the account's.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The node that the token says; older API servers don't.
    pub node: Option<String>,
}

/// Who asks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// The service account's namespace.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The pod, if the token is bound to one.
    pub pod: Option<BoundPod>,
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.service_account)?;
        match &self.pod {
            Some(pod) => write!(f, " (pod {})", pod.name),
            None => f.write_str(" (no pod)"),
        }
    }
}

/// Why it is not known who asks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthenticationError {
    /// The token is not accepted.
    #[error("{0}")]
    Rejected(String),
    /// The API server can't be asked.
    #[error("the API server could not review the token: {0}")]
    Unavailable(String),
}

/// Asks whose token one is.
pub trait Reviewer: Send + Sync + 'static {
    /// One review, for [`AUDIENCE`].
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthenticationError>>;
}

/// Asks the API server.
pub struct KubeReviewer(Api<TokenReview>);

impl fmt::Debug for KubeReviewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KubeReviewer")
    }
}

impl KubeReviewer {
    /// Needs the permission to `create` `tokenreviews.authentication.k8s.io`.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self(Api::all(client))
    }
}

impl Reviewer for KubeReviewer {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthenticationError>> {
        Box::pin(async move {
            let spec =
                TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: Some(token.to_owned()) };
            let review = TokenReview { spec, ..TokenReview::default() };
            let answer = self.0.create(&PostParams::default(), &review).await;
            // The client's error may quote what was sent.
            let answer =
                answer.map_err(|e| AuthenticationError::Unavailable(without(&e.to_string(), token)))?;
            read_status(answer.status.unwrap_or_default())
        })
    }
}

fn without(text: &str, token: &str) -> String {
    text.replace(token, "(token)")
}

/// What a review says.
fn read_status(status: TokenReviewStatus) -> Result<Caller, AuthenticationError> {
    let rejected = |reason: String| Err(AuthenticationError::Rejected(reason));
    if status.authenticated != Some(true) {
        let reason = status.error.filter(|error| !error.is_empty());
        return rejected(format!(
            "the API server does not accept the token for the audience {AUDIENCE}: {}",
            reason.as_deref().unwrap_or("it says no more")
        ));
    }
    // An API server that does not know audiences names none.
    if !status.audiences.unwrap_or_default().iter().any(|audience| audience == AUDIENCE) {
        return rejected(format!("the token is not meant for the audience {AUDIENCE}"));
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let mut parts = name.splitn(4, ':');
    let (Some("system"), Some("serviceaccount"), Some(namespace), Some(account)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return rejected(format!("{name:?} is no service account"));
    };
    if namespace.is_empty() || account.is_empty() || account.contains(':') {
        return rejected(format!("{name:?} is no service account"));
    }
    let extra = user.extra.unwrap_or_default();
    let one = |key: &str| {
        let values = extra.get(&format!("authentication.kubernetes.io/{key}"))?;
        values.first().filter(|value| values.len() == 1 && !value.is_empty()).cloned()
    };
    let pod = match (one("pod-name"), one("pod-uid")) {
        (Some(name), Some(uid)) => Some(BoundPod { name, uid, node: one("node-name") }),
        _ => None,
    };
    Ok(Caller { namespace: namespace.to_owned(), service_account: account.to_owned(), pod })
}

/// Reviews tokens, and remembers for a while what was said.
pub struct Authenticator {
    reviewer: Box<dyn Reviewer>,
    clock: Clock,
    cache: Mutex<HashMap<[u8; 32], (Caller, Instant)>>,
    reviews: Semaphore,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator").finish_non_exhaustive()
    }
}

impl Authenticator {
    /// With nothing remembered.
    #[must_use]
    pub fn new(reviewer: impl Reviewer, clock: Clock) -> Self {
        Self {
            reviewer: Box::new(reviewer),
            clock,
            cache: Mutex::default(),
            reviews: Semaphore::new(REVIEWS),
        }
    }

    /// Says whose token the value of an `authorization` header holds.
    ///
    /// # Errors
    /// There is none, it is not accepted, or the API server can't be asked.
    pub async fn caller(&self, authorization: Option<&str>) -> Result<Caller, AuthenticationError> {
        let rejected = |reason: &str| AuthenticationError::Rejected(reason.to_owned());
        let value =
            authorization.ok_or_else(|| rejected("there is no header authorization with a bearer token"))?;
        let (scheme, token) = value.split_once(' ').unwrap_or_default();
        let token = token.trim();
        if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() || token.len() > MAX_TOKEN {
            return Err(rejected("the header authorization holds no bearer token"));
        }
        let mut key = [0; 32];
        key.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
        if let Some(caller) = self.remembered(&key) {
            return Ok(caller);
        }
        let unavailable = |reason: &str| AuthenticationError::Unavailable(reason.to_owned());
        let review = async {
            let _permit = self.reviews.acquire().await.map_err(|_| unavailable("it is going down"))?;
            self.reviewer.review(token).await
        };
        let caller = tokio::time::timeout(REVIEW_TIMEOUT, review)
            .await
            .map_err(|_| unavailable("it did not answer in time"))?
            .map_err(|error| self.explained(error, token))?;
        self.remember(key, &caller, token);
        Ok(caller)
    }

    /// Says of a token that the API server finds too old or too young how old it is by our clock: who looks for the
    /// cause must know whether clocks differ, or tokens are not renewed.
    fn explained(&self, error: AuthenticationError, token: &str) -> AuthenticationError {
        let AuthenticationError::Rejected(reason) = &error else { return error };
        let now = self.clock.now();
        let (Some(claims), true) =
            (claims(token), reason.contains("expired") || reason.contains("not valid yet"))
        else {
            return error;
        };
        let at = |seconds| Timestamp(UnixTime::since_unix_epoch(Duration::from_secs(seconds)));
        let (from, until) = (claims.nbf.unwrap_or(0), claims.exp);
        let ours = if now.as_secs() >= until {
            format!("it was valid until {}: look whether the cluster renews the token's file", at(until))
        } else if now.as_secs() < from {
            format!("it is valid from {} on: the clock of who issued it is ahead", at(from))
        } else {
            let differ =
                if reason.contains("expired") { until - now.as_secs() } else { now.as_secs() - from };
            format!(
                "it is valid from {} to {}, so the API server's clock differs by {differ} s or more: compare the two",
                at(from),
                at(until)
            )
        };
        AuthenticationError::Rejected(format!(
            "{reason} (by this control plane's clock, {}, {ours})",
            Timestamp(now)
        ))
    }

    /// Believes no earlier review of tokens that are bound to this pod: it is gone.
    pub fn forget(&self, uid: &str) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.retain(|_, (caller, _)| caller.pod.as_ref().is_none_or(|pod| pod.uid != uid));
    }

    fn remembered(&self, key: &[u8; 32]) -> Option<Caller> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.get(key).filter(|(_, until)| Instant::now() < *until).map(|(caller, _)| caller.clone())
    }

    fn remember(&self, key: [u8; 32], caller: &Caller, token: &str) {
        let expires = claims(token).map_or(0, |claims| claims.exp);
        let left = expires.saturating_sub(self.clock.now().as_secs());
        let left = Duration::from_secs(left).min(CACHE_TTL);
        if left.is_zero() {
            return;
        }
        let now = Instant::now();
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= CACHE_SIZE {
            cache.retain(|_, (_, until)| now < *until);
        }
        // Still full: this one is reviewed again when it comes again.
        if cache.len() < CACHE_SIZE {
            cache.insert(key, (caller.clone(), now + left));
        }
    }
}

/// When a token is valid (RFC 7519, sections 4.1.4 and 4.1.5), in seconds since 1970.
#[derive(serde::Deserialize)]
struct Claims {
    exp: u64,
    nbf: Option<u64>,
}

/// Its signature is the API server's to check.
fn claims(token: &str) -> Option<Claims> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    serde_json::from_slice(&payload).ok()
}

#[cfg(test)]
#[path = "authenticate_tests.rs"]
mod tests;
