//! How many requests there may be: RateLimits. What this waypoint counts itself is looked at first; what a service counts
//! for all waypoints is asked for only then.
//!
//! A request takes from each limit that is of it; the first without room refuses it with 429. Clients are told by
//! `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10), or by the older `X-RateLimit-*`.
//!
//! Invariants:
//! * a limit counts on while its resource stays as it is, whatever else changes;
//! * what is counted at a time is limited ([`Bucket::max_keys`]); what is beyond shares one bucket, and is counted;
//! * what happens when the service is away is said in the resource.

mod bucket;
mod global;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use model::http::{
    Claims, Count, HttpService, Limit, LimitHeaders, LimitKey, LimitMatch, RateLimit, Request,
};
use model::{Mesh, PolicyKey, Str};
use process::metrics::{Counter, Gauge};
use tokio::time::Instant;

use self::bucket::{Buckets, Taken};
use super::{Refusal, answer, view};
use crate::http::decide::{Connection, Edit, Flag, Response, Value};
use crate::http::head::RequestHead;
use crate::upstream::Clusters;

pub use global::{Answered, Asking};

/// Counts, for metrics.
#[derive(Debug, Default)]
pub struct LimitStats {
    /// Requests that a limit was of, and that had room.
    pub within: Counter,
    /// Requests that were refused.
    pub over: Counter,
    /// Requests that a limit would have refused, were it enforced.
    pub would_refuse: Counter,
    /// Values that had to share a bucket, because there were too many.
    pub shared: Counter,
    /// Values that are counted.
    pub keys: Gauge,
    /// Questions to a service that it did not answer.
    pub failed: Counter,
    /// Of these, those whose request passed all the same.
    pub failed_open: Counter,
}

/// What is told a client of a limit.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Told {
    name: Box<str>,
    quota: u32,
    window: Duration,
    left: u32,
    reset: Duration,
    headers: LimitHeaders,
}

/// All limits, and what was counted. One for the program.
pub struct RateLimits {
    made: Instant,
    /// By the address of the limit, which is held here, so that no other has it.
    buckets: ArcSwap<HashMap<usize, Held>>,
    stats: Arc<LimitStats>,
}

/// A limit, and what is counted of it.
type Held = (Arc<Limit>, Arc<Local>);

/// What is counted here of a limit, which has this name in the resource of this name.
struct Local {
    resource: PolicyKey,
    name: Str,
    buckets: Buckets,
}

/// What the limits say of a request.
pub enum Checked {
    /// It may go on; with fields for its response.
    Passed(Vec<Edit>),
    /// It is answered so; with the detail for the log.
    Refused(Refusal, &'static str),
    /// A service has to be asked.
    Ask(Box<Asking>),
}

impl Default for RateLimits {
    fn default() -> Self {
        Self { made: Instant::now(), buckets: ArcSwap::default(), stats: Arc::default() }
    }
}

impl RateLimits {
    /// Counts.
    #[must_use]
    pub fn stats(&self) -> &Arc<LimitStats> {
        &self.stats
    }

    /// Follows the limits of a snapshot. Those that are as they were count on.
    pub fn follow(&self, mesh: &Mesh) {
        let before = self.buckets.load();
        let known: HashMap<(&PolicyKey, &Str), &Held> =
            before.values().map(|held| ((&held.1.resource, &held.1.name), held)).collect();
        // A request that waits goes on by the limits that were in force when it came: while somebody has them, they count.
        let in_use = before.iter().filter(|(_, (limit, _))| Arc::strong_count(limit) > 1);
        let mut next: HashMap<usize, Held> = in_use.map(|(at, held)| (*at, held.clone())).collect();
        for limits in mesh.rate_limits() {
            for limit in &limits.limits {
                let Count::Local(bucket) = limit.count else { continue };
                let same = known.get(&(&limits.key, &limit.name)).filter(|(old, _)| old == limit);
                let local = same.map(|(_, local)| local.clone()).unwrap_or_else(|| {
                    let buckets = Buckets::new(bucket, Arc::clone(&self.stats));
                    Arc::new(Local { resource: limits.key.clone(), name: limit.name.clone(), buckets })
                });
                next.insert(Arc::as_ptr(limit).addr(), (Arc::clone(limit), local));
            }
        }
        self.buckets.store(Arc::new(next));
    }

    fn now(&self) -> u64 {
        u64::try_from(self.made.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Looks at a request to `service`, and takes it from the limits that are of it.
    #[must_use]
    pub fn check(
        &self,
        mesh: &Arc<Mesh>,
        clusters: &Clusters,
        service: &HttpService,
        request: &RequestHead,
        connection: &Connection,
        claims: Option<&Claims>,
    ) -> Checked {
        if service.rate_limits.is_empty() {
            return Checked::Passed(Vec::new());
        }
        let mut all = Vec::new();
        for key in &service.rate_limits {
            let Some(limits) = mesh.rate_limit(key) else {
                return unknown();
            };
            all.push(limits);
        }
        let seen = view(request, connection, claims);
        let (told, questions) = match self.here(&all, &seen, connection) {
            Ok(found) => found,
            Err(refused) => return refused,
        };
        if questions.is_empty() {
            return Checked::Passed(self.passed(&told));
        }
        match Asking::new(mesh, clusters, questions, told, connection, Arc::clone(&self.stats)) {
            Ok(asking) => Checked::Ask(Box::new(asking)),
            Err(refused) => refused,
        }
    }

    /// Looks at a connection to `service` that is not HTTP, and takes it from the limits that it can be told to be of: those
    /// that ask nothing of requests, and that are counted here.
    ///
    /// # Errors
    /// There is no room, in words.
    pub fn admit(&self, mesh: &Mesh, service: &HttpService, connection: &Connection) -> Result<(), String> {
        let buckets = self.buckets.load();
        for key in &service.rate_limits {
            let limits =
                mesh.rate_limit(key).ok_or_else(|| format!("the rate limit {key} is not known yet"))?;
            for limit in limits.limits.iter().filter(|limit| limit.on == LimitMatch::default()) {
                let one = |key: &LimitKey| of_connection(key, connection);
                let values: Option<Vec<String>> = limit.by.iter().map(one).collect();
                let local = buckets.get(&Arc::as_ptr(limit).addr());
                let (Some(values), Count::Local(_)) = (values, &limit.count) else { continue };
                let Some((_, local)) = local else {
                    return Err(format!("the limit {} of {key} is not counted any more", limit.name));
                };
                match local.buckets.take(&values, self.now()) {
                    Taken::Over { .. } if limit.dry_run => self.stats.would_refuse.inc(),
                    Taken::Over { .. } => {
                        self.stats.over.inc();
                        return Err(format!("the limit {} of {key} has no room", limit.name));
                    }
                    Taken::Within { .. } => {}
                }
            }
        }
        Ok(())
    }

    fn passed(&self, told: &[Told]) -> Vec<Edit> {
        if !told.is_empty() {
            self.stats.within.inc();
        }
        edits(told)
    }

    /// What is counted here, and what has to be asked for.
    fn here<'l>(
        &self,
        all: &[&'l Arc<RateLimit>],
        request: &Request<'_>,
        connection: &Connection,
    ) -> Result<(Vec<Told>, Vec<global::Question<'l>>), Checked> {
        let (mut told, mut questions) = (Vec::new(), Vec::new());
        let buckets = self.buckets.load();
        for limits in all {
            for limit in limits.limits.iter().filter(|limit| is_of(limit, request)) {
                let Some(values) = values(limit, request, connection) else { continue };
                match &limit.count {
                    Count::Global(global) => questions.push((global, limit, values, limits.headers)),
                    Count::Local(bucket) => {
                        // It comes before the snapshot that the limit comes with, and stays as long as that.
                        let Some((_, local)) = buckets.get(&Arc::as_ptr(limit).addr()) else {
                            return Err(unknown());
                        };
                        let taken = local.buckets.take(&values, self.now());
                        let (left, reset, over) = match taken {
                            Taken::Within { left, reset } => (left, reset, false),
                            Taken::Over { after } => (0, after, true),
                        };
                        let one = Told {
                            name: Box::from(&*limit.name),
                            quota: bucket.requests,
                            window: bucket.per,
                            left,
                            reset,
                            headers: limits.headers,
                        };
                        // What is not in force yet is not told of.
                        if limit.dry_run {
                            self.stats.would_refuse.add(u64::from(over));
                            continue;
                        }
                        told.push(one);
                        if over {
                            self.stats.over.inc();
                            return Err(refused(&told, "local_rate_limited", &[]));
                        }
                    }
                }
            }
        }
        Ok((told, questions))
    }
}

/// The answer where a limit is listed and can't be counted.
fn unknown() -> Checked {
    Checked::Refused(answer(503, "rate limit is not known yet", Flag::None), "rate_limit_unknown")
}

/// Whether a limit is of a request.
fn is_of(limit: &Limit, request: &Request<'_>) -> bool {
    let on = &limit.on;
    (on.methods.is_empty() || on.methods.iter().any(|method| **method == *request.method))
        && (on.paths.is_empty() || on.paths.iter().any(|path| path.matches(request.path)))
        && on.headers.iter().all(|(name, wanted)| {
            let value = request.headers.field(name);
            value.is_some_and(|value| wanted.matches(&String::from_utf8_lossy(&value)))
        })
}

/// What requests have in common that share the limit; `None` where the request lacks one of these.
fn values(limit: &Limit, request: &Request<'_>, connection: &Connection) -> Option<Vec<String>> {
    let one = |key: &LimitKey| {
        Some(match key {
            LimitKey::Path => request.path.to_owned(),
            LimitKey::Method => request.method.to_owned(),
            LimitKey::Header(name) => String::from_utf8_lossy(&request.headers.field(name)?).into_owned(),
            LimitKey::Claim(path) => {
                let value = request.claims?.at(path)?;
                value.as_str().map_or_else(|| value.to_string(), str::to_owned)
            }
            LimitKey::Address => address(request.remote_ip),
            LimitKey::Identity | LimitKey::Constant { .. } => of_connection(key, connection)?,
        })
    };
    limit.by.iter().map(one).collect()
}

/// What a connection shows of it.
fn of_connection(key: &LimitKey, connection: &Connection) -> Option<String> {
    match key {
        LimitKey::Identity => Some(connection.identity.as_ref()?.principal()),
        LimitKey::Address => Some(address(connection.client.ip())),
        LimitKey::Constant { value, .. } => Some(value.to_string()),
        LimitKey::Path | LimitKey::Method | LimitKey::Header(_) | LimitKey::Claim(_) => None,
    }
}

/// Whoever has one address of IPv6 has a whole network of them (RFC 6177): these share a limit.
fn address(ip: IpAddr) -> String {
    match model::canonical_ip(ip) {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => {
            let net = u128::from(ip) >> 64 << 64;
            format!("{}/64", std::net::Ipv6Addr::from(net))
        }
    }
}

/// The answer to a request that is over a limit, which is the last of `told`.
fn refused(told: &[Told], detail: &'static str, more: &[(Box<str>, Box<str>)]) -> Checked {
    let mut fields: Vec<(Box<str>, Box<str>)> = Vec::new();
    for edit in edits(told) {
        if let Edit::Set(name, Value::Plain(value)) = edit {
            fields.push((name, String::from_utf8_lossy(&value).as_ref().into()));
        }
    }
    if let Some(last) = told.last() {
        fields.push(("retry-after".into(), seconds(last.reset).max(1).to_string().into()));
    }
    fields.push(("x-envoy-ratelimited".into(), "true".into()));
    fields.extend_from_slice(more);
    let response =
        Response { status: 429, fields: fields.into(), body: detail.into(), flag: Flag::Decided("RL") };
    Checked::Refused(Arc::new(response), detail)
}

/// Whole seconds, rounded up: who comes after them finds room.
fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

/// The fields that tell of limits.
fn edits(told: &[Told]) -> Vec<Edit> {
    let mut edits = Vec::new();
    let mut set = |name: &str, value: String| {
        if !value.is_empty() {
            edits.push(Edit::Set(name.into(), Value::Plain(value.into_bytes().into())));
        }
    };
    let of = |headers| told.iter().filter(move |one| one.headers == headers);
    let list =
        |item: &dyn Fn(&Told) -> String| of(LimitHeaders::Standard).map(item).collect::<Vec<_>>().join(", ");
    set(
        "ratelimit-policy",
        list(&|one| format!("\"{}\";q={};w={}", one.name, one.quota, seconds(one.window).max(1))),
    );
    set("ratelimit", list(&|one| format!("\"{}\";r={};t={}", one.name, one.left, seconds(one.reset))));
    // The one with the least room, as Envoy shows it, and all of them after it.
    if let Some(least) = of(LimitHeaders::Legacy).min_by_key(|one| one.left) {
        let each = of(LimitHeaders::Legacy);
        let each: Vec<String> = each
            .map(|one| format!("{};w={};name=\"{}\"", one.quota, seconds(one.window).max(1), one.name))
            .collect();
        set("x-ratelimit-limit", format!("{}, {}", least.quota, each.join(", ")));
        set("x-ratelimit-remaining", least.left.to_string());
        set("x-ratelimit-reset", seconds(least.reset).to_string());
    }
    edits
}

/// A time that only goes on, for what several threads write.
#[derive(Debug, Default)]
struct Mark(AtomicU64);

impl Mark {
    /// Takes the time `next` in the place of what is there, if `next` says so; what was there, or `Err` with it.
    fn update(&self, next: impl Fn(u64) -> Option<u64>) -> Result<u64, u64> {
        self.0.fetch_update(Relaxed, Relaxed, next)
    }
}

#[cfg(test)]
mod tests;
