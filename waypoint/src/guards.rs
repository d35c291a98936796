//! What decides over requests beside the policies, for the whole program: tokens and their issuers' keys, external
//! authorizers, rate limits.

use std::sync::Arc;

use model::Mesh;
use process::metrics::{Counter, Description, Kind, Registry};
use tokio::runtime::Handle;

use crate::filters::ext_authz::AuthorizerStats;
use crate::filters::jwt::Authenticator;
use crate::filters::rate_limit::RateLimits;
use crate::providers::fetch::{Fetch, Network};
use crate::providers::jwks::Jwks;
use crate::telemetry::Connect;

/// Verdicts on so many tokens are kept, at about a kilobyte each.
const REMEMBERED_TOKENS: usize = 8192;

/// See the module.
pub struct Guards {
    /// Issuers' keys.
    pub keys: Arc<Jwks>,
    /// Verifies tokens.
    pub authenticator: Authenticator,
    /// Counts requests.
    pub limits: RateLimits,
    /// What became of questions to external authorizers.
    pub authorizers: Arc<AuthorizerStats>,
    /// Copies of requests that what guards their destination kept back.
    pub copies_refused: Counter,
}

impl Guards {
    /// Fetches issuers' keys over the network, on `runtime`, which is not that of the data plane; by `inside` from hosts of
    /// the mesh.
    ///
    /// # Errors
    /// When the cryptography can't be set up.
    pub fn new(runtime: Handle, inside: Option<Arc<dyn Connect>>) -> Result<Self, rustls::Error> {
        Ok(Self::fetching(Arc::new(Network::new(inside)?), runtime))
    }

    /// The same, with `fetch` in the network's place.
    #[must_use]
    pub fn fetching(fetch: Arc<dyn Fetch>, runtime: Handle) -> Self {
        let keys = Arc::new(Jwks::new(fetch, runtime));
        let authenticator = Authenticator::new(Arc::clone(&keys), REMEMBERED_TOKENS);
        Self {
            keys,
            authenticator,
            limits: RateLimits::default(),
            authorizers: Arc::default(),
            copies_refused: Counter::default(),
        }
    }

    /// Follows a snapshot, before requests are decided by it.
    pub fn follow(&self, mesh: &Mesh) {
        self.keys.follow(mesh);
        self.limits.follow(mesh);
    }

    /// Registers its metrics.
    pub fn register(self: &Arc<Self>, registry: &Registry) {
        let number = |name, help, kind, read: fn(&Self) -> u64| {
            let guards = Arc::clone(self);
            registry
                .collect(Description { name, help, kind }, move |out| out.integer(&|_| {}, read(&guards)));
        };
        let counter = |name, help, read| number(name, help, Kind::Counter, read);
        let gauge = |name, help, read| number(name, help, Kind::Gauge, read);
        counter("culvert_jwt_taken", "Requests whose token was taken", |g| {
            g.authenticator.stats().taken.get()
        });
        counter("culvert_jwt_known", "Of these, those whose token was known", |g| {
            g.authenticator.stats().known.get()
        });
        counter("culvert_jwt_refused", "Requests that were refused for their token", |g| {
            g.authenticator.stats().refused.get()
        });
        counter("culvert_jwt_missing", "Requests without a token where one is looked for", |g| {
            g.authenticator.stats().missing.get()
        });
        gauge("culvert_jwt_remembered", "Tokens whose verdict is kept", |g| {
            g.authenticator.remembered() as u64
        });
        counter("culvert_jwks_fetched", "Key sets that were fetched of issuers", |g| {
            g.keys.stats().fetched.get()
        });
        counter("culvert_jwks_failed", "Attempts to fetch an issuer's keys that failed", |g| {
            g.keys.stats().failed.get()
        });
        gauge("culvert_jwks_issuers", "Issuers that keys are fetched of", |g| {
            size(g.keys.stats().issuers.get())
        });
        gauge("culvert_jwks_issuers_without_keys", "Of these, those that there are no keys of", |g| {
            size(g.keys.stats().without_keys.get())
        });
        counter("culvert_ext_authz_allowed", "Requests that external authorizers allowed", |g| {
            g.authorizers.allowed.get()
        });
        counter("culvert_ext_authz_denied", "Requests that they refused", |g| g.authorizers.denied.get());
        counter("culvert_ext_authz_failed", "Questions to external authorizers without an answer", |g| {
            g.authorizers.failed.get()
        });
        counter("culvert_ext_authz_failed_open", "Of these, those whose request went on", |g| {
            g.authorizers.failed_open.get()
        });
        counter("culvert_rate_limit_within", "Requests that rate limits had room for", |g| {
            g.limits.stats().within.get()
        });
        counter("culvert_rate_limit_over", "Requests that were refused for a rate limit", |g| {
            g.limits.stats().over.get()
        });
        counter("culvert_rate_limit_would_refuse", "Requests that a dry-run limit would have refused", |g| {
            g.limits.stats().would_refuse.get()
        });
        gauge("culvert_rate_limit_keys", "Values that local rate limits count", |g| {
            size(g.limits.stats().keys.get())
        });
        counter("culvert_rate_limit_shared", "Requests whose value found no room and shared a bucket", |g| {
            g.limits.stats().shared.get()
        });
        counter("culvert_rate_limit_failed", "Questions to rate-limit services without an answer", |g| {
            g.limits.stats().failed.get()
        });
        counter("culvert_copies_refused", "Copies that what guards their destination kept back", |g| {
            g.copies_refused.get()
        });
        counter("culvert_rate_limit_failed_open", "Of these, those whose request went on", |g| {
            g.limits.stats().failed_open.get()
        });
    }
}

fn size(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}
