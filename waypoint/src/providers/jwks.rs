//! The keys of issuers: those written in a rule, and those that are fetched, kept, and fetched again.
//!
//! ```text
//!   follow(mesh) ─▶ an Issuer for each source ─▶ fetch ─▶ keys ─▶ after REFRESH, or when a token names a key that is not
//!                                                  │                there (once in PAUSE): fetch again
//!                                                  └─ failed ─▶ what there was stays; again after a pause that grows
//! ```
//!
//! Invariants:
//! * keys are fetched when a rule comes, not when a request does; a request waits for the first attempt only;
//! * keys that were fetched stay in use while the issuer is away, or answers with what can't be used;
//! * whoever sends tokens can't make us fetch more often than once in [`PAUSE`].

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use hashbrown::HashMap;
use model::Mesh;
use model::http::{KeySource, TokenRule};
use process::metrics::{Counter, Gauge};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use super::fetch::{Fetch, FetchError};
use super::keys::KeySet;

/// Keys are fetched again after this time.
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// Not oftener than this for tokens whose key is not known.
const PAUSE: Duration = Duration::from_secs(10);
/// After a failure: the first pause, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Counts, for metrics.
#[derive(Debug, Default)]
pub struct KeyStats {
    /// Key sets that were fetched.
    pub fetched: Counter,
    /// Attempts that failed.
    pub failed: Counter,
    /// Issuers that keys are fetched from.
    pub issuers: Gauge,
    /// Of these, those that there are no keys of.
    pub without_keys: Gauge,
}

/// All issuers.
pub struct Jwks {
    fetch: Arc<dyn Fetch>,
    /// Where fetches run: not on a thread of the data plane.
    runtime: Handle,
    issuers: Mutex<HashMap<KeySource, Arc<Issuer>>>,
    /// By the address of the rule, which is held here, so that no other has it.
    by_rule: ArcSwap<HashMap<usize, Held>>,
    stats: Arc<KeyStats>,
}

/// A rule, and whose keys its tokens are signed with.
type Held = (Arc<TokenRule>, Arc<Issuer>);

/// The keys of a source.
struct Issuer {
    source: KeySource,
    keys: ArcSwapOption<KeySet>,
    /// Attempts that have ended.
    attempts: watch::Sender<u64>,
    wanted: Arc<Notify>,
    /// When it was last asked for out of turn, in milliseconds since `made`, plus one.
    asked_ms: AtomicU64,
    made: Instant,
    /// How long an attempt may take: as the most patient rule says.
    limit_ms: AtomicU64,
    task: Mutex<Option<AbortHandle>>,
    stats: Arc<KeyStats>,
}

impl Drop for Issuer {
    fn drop(&mut self) {
        if let Some(task) = self.task.get_mut().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
            self.stats.issuers.dec();
            if self.keys.load().is_none() {
                self.stats.without_keys.dec();
            }
        }
    }
}

/// What there is of an issuer's keys.
pub enum Found {
    /// These.
    Keys(Arc<KeySet>),
    /// The first attempt is under way.
    Pending(Attempt),
    /// None, and no attempt has brought any.
    None,
}

/// An attempt that can be waited for.
pub struct Attempt {
    ended: watch::Receiver<u64>,
    limit: Duration,
}

impl Attempt {
    /// Returns when the attempt has ended, or its time is up.
    pub async fn wait(mut self) {
        // An issuer that is gone has no more attempts.
        let _ = timeout(self.limit, self.ended.changed()).await;
    }
}

impl Jwks {
    /// Without issuers. Fetches run on `runtime`.
    #[must_use]
    pub fn new(fetch: Arc<dyn Fetch>, runtime: Handle) -> Self {
        Self { fetch, runtime, issuers: Mutex::default(), by_rule: ArcSwap::default(), stats: Arc::default() }
    }

    /// Counts.
    #[must_use]
    pub fn stats(&self) -> &Arc<KeyStats> {
        &self.stats
    }

    fn issuers(&self) -> MutexGuard<'_, HashMap<KeySource, Arc<Issuer>>> {
        self.issuers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the rules of a snapshot: fetches the keys of issuers that are new, and forgets those that are gone.
    pub fn follow(&self, mesh: &Mesh) {
        self.fetch.require(mesh.settings().tls_minimum);
        self.follow_rules(mesh.authentications().flat_map(|authentication| authentication.rules.iter()));
    }

    /// The same, for these rules.
    pub fn follow_rules<'r>(&self, rules: impl Iterator<Item = &'r Arc<TokenRule>>) {
        let known = self.by_rule.load();
        let rules: Vec<&Arc<TokenRule>> = rules.collect();
        let same = |rule: &&Arc<TokenRule>| known.contains_key(&address(rule));
        if rules.len() == known.len() && rules.iter().all(same) {
            return;
        }
        let mut issuers = self.issuers();
        let mut by_rule = HashMap::with_capacity(rules.len());
        let mut used: HashMap<KeySource, Arc<Issuer>> = HashMap::new();
        for rule in rules {
            let issuer = used.get(&rule.keys).or_else(|| issuers.get(&rule.keys)).cloned();
            let issuer = issuer.unwrap_or_else(|| self.issuer(rule));
            let limit = u64::try_from(rule.timeout.as_millis()).unwrap_or(u64::MAX);
            issuer.limit_ms.fetch_max(limit, Relaxed);
            used.insert(rule.keys.clone(), Arc::clone(&issuer));
            by_rule.insert(address(rule), (Arc::clone(rule), issuer));
        }
        *issuers = used;
        self.by_rule.store(Arc::new(by_rule));
    }

    fn issuer(&self, rule: &TokenRule) -> Arc<Issuer> {
        let issuer = Arc::new(Issuer {
            source: rule.keys.clone(),
            keys: ArcSwapOption::empty(),
            attempts: watch::channel(0).0,
            wanted: Arc::default(),
            asked_ms: AtomicU64::new(0),
            made: Instant::now(),
            limit_ms: AtomicU64::new(u64::try_from(rule.timeout.as_millis()).unwrap_or(u64::MAX)),
            task: Mutex::default(),
            stats: Arc::clone(&self.stats),
        });
        if let KeySource::Inline(text) = &rule.keys {
            match KeySet::parse(text.as_bytes()) {
                Ok(keys) => issuer.keys.store(Some(Arc::new(keys))),
                Err(error) => {
                    tracing::warn!(issuer = ?rule.issuer, %error, "the keys of a rule can't be used");
                }
            }
            issuer.attempts.send_replace(1);
            return issuer;
        }
        self.stats.issuers.inc();
        self.stats.without_keys.inc();
        let keeps = keep(Arc::downgrade(&issuer), Arc::clone(&self.fetch));
        let task = self.runtime.spawn(keeps).abort_handle();
        *issuer.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        issuer
    }

    /// The keys that a rule's tokens are signed with.
    #[must_use]
    pub fn keys(&self, rule: &Arc<TokenRule>) -> Found {
        let by_rule = self.by_rule.load();
        let Some((_, issuer)) = by_rule.get(&address(rule)) else { return Found::None };
        if let Some(keys) = issuer.keys.load_full() {
            return Found::Keys(keys);
        }
        if *issuer.attempts.borrow() > 0 {
            return Found::None;
        }
        // An attempt that ends in between is seen by the receiver, which knows of none.
        Found::Pending(issuer.attempt(0, rule.timeout))
    }

    /// Asks for the keys of a rule to be fetched now, since a token names one that is not there. `None` if they are not
    /// fetched, or have been a moment ago.
    #[must_use]
    pub fn refresh(&self, rule: &Arc<TokenRule>) -> Option<Attempt> {
        let by_rule = self.by_rule.load();
        let (_, issuer) = by_rule.get(&address(rule))?;
        if matches!(issuer.source, KeySource::Inline(_)) {
            return None;
        }
        let now = u64::try_from(issuer.made.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        let last = issuer.asked_ms.load(Relaxed);
        let pause = u64::try_from(PAUSE.as_millis()).unwrap_or(u64::MAX);
        if last > 0 && now.saturating_sub(last) < pause {
            return None;
        }
        issuer.asked_ms.compare_exchange(last, now, Relaxed, Relaxed).ok()?;
        let attempt = issuer.attempt(*issuer.attempts.borrow(), rule.timeout);
        issuer.wanted.notify_one();
        Some(attempt)
    }

    /// Returns when each issuer has been asked once, for a program that wants to be ready only then.
    pub async fn tried(&self) {
        let all: Vec<_> = self.issuers().values().map(|issuer| issuer.attempts.subscribe()).collect();
        for mut attempts in all {
            // An issuer that is gone has not to be waited for.
            let _ = attempts.wait_for(|count| *count > 0).await;
        }
    }
}

fn address(rule: &Arc<TokenRule>) -> usize {
    Arc::as_ptr(rule).addr()
}

impl Issuer {
    /// The attempt after `count` ones.
    fn attempt(&self, count: u64, limit: Duration) -> Attempt {
        let mut ended = self.attempts.subscribe();
        if *ended.borrow() > count {
            ended.mark_changed();
        }
        Attempt { ended, limit }
    }
}

/// Fetches an issuer's keys again and again, until the issuer is dropped.
async fn keep(issuer: std::sync::Weak<Issuer>, fetch: Arc<dyn Fetch>) {
    let mut pause = RETRY.0;
    loop {
        let Some(this) = issuer.upgrade() else { return };
        let limit = Duration::from_millis(this.limit_ms.load(Relaxed));
        let fetched = fetch_keys(&this.source, &*fetch, limit).await;
        let wait = match fetched {
            Ok(keys) => {
                if this.keys.swap(Some(Arc::new(keys))).is_none() {
                    this.stats.without_keys.dec();
                }
                this.stats.fetched.inc();
                pause = RETRY.0;
                // Not all proxies at once.
                REFRESH.mul_f64(0.9 + 0.1 * share())
            }
            Err(error) => {
                this.stats.failed.inc();
                let kept = this.keys.load().is_some();
                let source = this.source.url();
                tracing::warn!(source, %error, kept, "an issuer's keys could not be fetched");
                let wait = pause;
                pause = (pause * 2).min(RETRY.1);
                wait
            }
        };
        this.attempts.send_modify(|count| *count += 1);
        let wanted = Arc::clone(&this.wanted);
        drop(this);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = wanted.notified() => {}
        }
    }
}

/// A number from 0 to 1.
fn share() -> f64 {
    use std::hash::BuildHasher as _;
    let random = std::hash::RandomState::new().hash_one(0) >> 40;
    #[expect(clippy::cast_precision_loss, reason = "24 bits")]
    let share = random as f64 / f64::from(1 << 24);
    share
}

async fn fetch_keys(source: &KeySource, fetch: &dyn Fetch, limit: Duration) -> Result<KeySet, FetchError> {
    let document = match source {
        KeySource::Inline(text) => Bytes::copy_from_slice(text.as_bytes()),
        KeySource::Url(url) => fetch.fetch(url, limit).await?,
        KeySource::Discovered(issuer) => {
            let begin = Instant::now();
            let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
            let uri = key_uri(issuer, &fetch.fetch(&url, limit).await?)?;
            fetch.fetch(&uri, limit.saturating_sub(begin.elapsed())).await?
        }
    };
    let keys = KeySet::parse(&document).map_err(|error| FetchError::Content(error.to_string()))?;
    for reason in keys.passed_over() {
        tracing::debug!(source = source.url(), reason, "a key of an issuer can't be used");
    }
    Ok(keys)
}

/// Where an issuer's keys are, as its configuration says, which must be its own (OpenID Connect Discovery 1.0 section
/// 4.3).
fn key_uri(issuer: &str, document: &[u8]) -> Result<String, FetchError> {
    let configuration: serde_json::Value =
        serde_json::from_slice(document).map_err(|error| FetchError::Content(error.to_string()))?;
    let text = |name: &str| configuration.get(name).and_then(serde_json::Value::as_str);
    let own = text("issuer").is_some_and(|own| own.trim_end_matches('/') == issuer.trim_end_matches('/'));
    if !own {
        return Err(FetchError::Content(format!("the configuration is not that of {issuer}")));
    }
    let uri = text("jwks_uri").ok_or_else(|| FetchError::Content("there is no jwks_uri".to_owned()))?;
    Ok(uri.to_owned())
}

/// Where keys are fetched from, for the log.
trait Source {
    fn url(&self) -> &str;
}

impl Source for KeySource {
    fn url(&self) -> &str {
        match self {
            Self::Inline(_) => "the rule",
            Self::Url(url) | Self::Discovered(url) => url,
        }
    }
}
