//! The connections that are open, and the last ones that ended.
//!
//! Every connection that the proxy carries is here from its decision to its end, so that an operator can list
//! them, and so that [`Registry::recheck`] can cut those that a new policy, bundle or identity no longer allows.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use hbone::Traffic;
use model::{Allow, Decision, Deny, DryRun, PolicyKey, Service, SpiffeId, Workload};
use net::ByteCounts;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use telemetry::Meter;
use tokio::sync::Notify;

/// How many ended or refused connections are remembered for `culvert why`.
const REMEMBERED: usize = 4096;
/// Locks are taken twice a connection; sixteen of them keep worker threads out of each other's way.
const SHARDS: usize = 16;

/// Which side of the mesh the proxy is on for a connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From a pod of this node.
    Outbound,
    /// To a pod of this node.
    Inbound,
}

impl From<Direction> for process::logs::Direction {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Outbound => Self::Outbound,
            Direction::Inbound => Self::Inbound,
        }
    }
}

/// How a connection reached or left the proxy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Carrier {
    /// In an HBONE tunnel.
    Hbone,
    /// As plain TCP.
    Plaintext,
    /// From a pod of this node to another, not encrypted: this process knows both ends.
    #[serde(rename = "node-local")]
    NodeLocal,
    /// The same past this process, by the kernel's verdict.
    Kernel,
}

/// What is known of a connection once it is decided. Its serialised form is the JSON of `/connections`; the
/// texts are made when somebody asks, not for every connection.
#[derive(Clone, Debug, Serialize)]
pub struct Story {
    /// Identifies the connection in this process.
    pub id: u64,
    /// Which side this is.
    pub direction: Direction,
    /// How it is carried between the nodes.
    pub carrier: Carrier,
    /// When it was accepted, milliseconds since the epoch.
    pub opened_ms: u64,
    /// The client's address.
    pub source: SocketAddr,
    /// The client's workload, when known; written as `namespace/name`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "workload_name")]
    pub source_workload: Option<Arc<Workload>>,
    /// The identity that the client proved (inbound) or has (outbound).
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "display")]
    pub source_identity: Option<SpiffeId>,
    /// The address that the client dialled (outbound), or that is delivered to (inbound).
    pub destination: SocketAddr,
    /// Where the proxy dialled instead, when it was another address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<SocketAddr>,
    /// The destination's workload, when known; written as `namespace/name`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "workload_name")]
    pub destination_workload: Option<Arc<Workload>>,
    /// The destination's service, when it was reached by one; written as `namespace/hostname`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "service_name")]
    pub destination_service: Option<Arc<Service>>,
    /// The destination's identity.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "display")]
    pub destination_identity: Option<SpiffeId>,
    /// What was decided.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// What was decided of a connection, and by what. Serialised as `decision` and `policy`, `rule`, `dry_run`.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// The evaluator let it in, since no policy says anything of it: nothing is kept of most decisions.
    NoPolicies,
    /// The evaluator decided it by policies.
    Policies(Box<ByPolicies>),
    /// The proxy itself decided, for this reason.
    Proxy(Cow<'static, str>),
}

/// A decision by policies.
#[derive(Clone, Debug)]
pub struct ByPolicies {
    outcome: Result<Allow, Deny>,
    dry_run: Vec<DryRun>,
}

impl Verdict {
    /// The evaluator's decision, as it is.
    #[must_use]
    pub fn of(decision: &Decision) -> Self {
        let outcome = match &decision.outcome {
            Ok(permit) if *permit.reason() == Allow::NoAllowPolicies && decision.dry_run.is_empty() => {
                return Self::NoPolicies;
            }
            Ok(permit) => Ok(permit.reason().clone()),
            Err(deny) => Err(deny.clone()),
        };
        Self::Policies(Box::new(ByPolicies { outcome, dry_run: decision.dry_run.clone() }))
    }

    /// What the proxy decided without a policy.
    #[must_use]
    pub fn proxy(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Proxy(reason.into())
    }

    fn by_policies(&self) -> Option<&ByPolicies> {
        match self {
            Self::Policies(by) => Some(by),
            Self::NoPolicies | Self::Proxy(_) => None,
        }
    }

    /// The policy that decided.
    #[must_use]
    pub fn policy(&self) -> Option<&PolicyKey> {
        match &self.by_policies()?.outcome {
            Ok(Allow::Matched(rule)) => Some(&rule.policy),
            Ok(Allow::NoAllowPolicies) => None,
            Err(deny) => deny.policy(),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPolicies => Allow::NoAllowPolicies.fmt(f),
            Self::Policies(by) => match &by.outcome {
                Ok(allow) => allow.fmt(f),
                Err(deny) => deny.fmt(f),
            },
            Self::Proxy(reason) => f.write_str(reason),
        }
    }
}

impl Serialize for Verdict {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let rule = match self.by_policies().map(|by| &by.outcome) {
            Some(Ok(Allow::Matched(rule)) | Err(Deny::Matched(rule))) => Some(rule),
            _ => None,
        };
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("decision", &self.to_string())?;
        if let Some(policy) = self.policy() {
            map.serialize_entry("policy", &policy.to_string())?;
        }
        if let Some(rule) = rule {
            map.serialize_entry("rule", &rule.rule)?;
            map.serialize_entry("clauses", &rule.matches)?;
        }
        let dry_run = self.by_policies().map_or(&[][..], |by| &by.dry_run);
        if !dry_run.is_empty() {
            let would = |d: &DryRun| match &d.would {
                Ok(allow) => format!("{}: would be {allow}", d.policy),
                Err(deny) => format!("{}: would be {deny}", d.policy),
            };
            map.serialize_entry("dry_run", &dry_run.iter().map(would).collect::<Vec<_>>())?;
        }
        map.end()
    }
}

// serde's `serialize_with` passes fields by reference, options included.
#[allow(clippy::ref_option)]
fn workload_name<S: Serializer>(workload: &Option<Arc<Workload>>, s: S) -> Result<S::Ok, S::Error> {
    match workload {
        Some(w) => s.collect_str(&format_args!("{}/{}", w.namespace, w.name())),
        None => s.serialize_none(),
    }
}

#[allow(clippy::ref_option)]
fn service_name<S: Serializer>(service: &Option<Arc<Service>>, s: S) -> Result<S::Ok, S::Error> {
    match service {
        Some(service) => s.collect_str(&service.key()),
        None => s.serialize_none(),
    }
}

#[allow(clippy::ref_option)]
fn display<S: Serializer, T: fmt::Display>(value: &Option<T>, s: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => s.collect_str(value),
        None => s.serialize_none(),
    }
}

/// A connection that ended, or never began.
#[derive(Clone, Debug, Serialize)]
pub struct Ended {
    /// What it was.
    #[serde(flatten)]
    pub story: Story,
    /// When it ended, milliseconds since the epoch.
    pub closed_ms: u64,
    /// Bytes towards the destination.
    pub bytes_sent: u64,
    /// Bytes from the destination.
    pub bytes_received: u64,
    /// Why it failed or was cut; absent when both sides closed it in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What [`Registry::recheck`] asks a connection's owner: `Some(reason)` when it may not go on.
pub type Recheck = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// An open connection.
pub struct Open {
    /// What it is.
    pub story: Story,
    /// What it carried, when both sides are TCP.
    pub bytes: ByteCounts,
    /// What it carried, when one side is a tunnel.
    pub traffic: Traffic,
    /// The connection that this is another view of.
    of: Option<Arc<Open>>,
    meter: Meter,
    recheck: Recheck,
    cut: OnceLock<String>,
    cut_wake: Notify,
}

impl Open {
    /// Bytes carried so far: from the client, and from the server.
    pub fn carried(&self) -> (u64, u64) {
        if let Some(of) = &self.of {
            return of.carried();
        }
        let tcp =
            (self.bytes.to_server.load(Ordering::Relaxed), self.bytes.to_client.load(Ordering::Relaxed));
        let (to_tunnel, from_tunnel) = (self.traffic.to_tunnel(), self.traffic.from_tunnel());
        match self.story.direction {
            Direction::Outbound => (tcp.0 + to_tunnel, tcp.1 + from_tunnel),
            Direction::Inbound => (tcp.0 + from_tunnel, tcp.1 + to_tunnel),
        }
    }

    /// Why the connection may not go on, if it may not.
    pub fn recheck(&self) -> Option<String> {
        (self.recheck)()
    }

    /// Waits until the connection is to be cut; returns why.
    pub async fn cut(&self) -> String {
        loop {
            let woken = self.cut_wake.notified();
            if let Some(reason) = self.cut.get() {
                return reason.clone();
            }
            woken.await;
        }
    }

    /// Cuts the connection. The first reason stays.
    pub fn cut_now(&self, reason: String) {
        if let Some(of) = &self.of {
            return of.cut_now(reason);
        }
        if self.cut.set(reason).is_ok() {
            self.cut_wake.notify_waiters();
            self.cut_wake.notify_one();
        }
    }
}

/// All connections of this process.
#[derive(Default)]
pub struct Registry {
    next_id: AtomicU64,
    open: [Mutex<HashMap<u64, Arc<Open>>>; SHARDS],
    ended: Mutex<VecDeque<Ended>>,
    cut: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded maps are valid after any panic: each change to them is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since the epoch; zero for a clock before it.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Registry {
    /// A number for a new connection, never used twice.
    pub fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The number of the newest connection.
    pub fn last_id(&self) -> u64 {
        self.next_id.load(Ordering::Relaxed)
    }

    fn shard(&self, id: u64) -> Option<&Mutex<HashMap<u64, Arc<Open>>>> {
        self.open.get(usize::try_from(id % SHARDS as u64).unwrap_or(0))
    }

    /// Enters a connection, or another view of the connection `of`; it leaves when the guard is dropped.
    pub fn enter(
        self: &Arc<Self>,
        story: Story,
        meter: Meter,
        recheck: Recheck,
        of: Option<Arc<Open>>,
    ) -> Entered {
        let open = Arc::new(Open {
            story,
            bytes: ByteCounts::default(),
            traffic: Traffic::default(),
            of,
            meter,
            recheck,
            cut: OnceLock::new(),
            cut_wake: Notify::new(),
        });
        if let Some(shard) = self.shard(open.story.id) {
            lock(shard).insert(open.story.id, open.clone());
        }
        let place = Place { registry: self.clone(), id: open.story.id, error: None };
        Entered { open, place }
    }

    /// Remembers a connection that never began.
    pub fn refused(&self, story: Story, error: String) {
        self.remember(Ended {
            story,
            closed_ms: now_ms(),
            bytes_sent: 0,
            bytes_received: 0,
            error: Some(error),
        });
    }

    /// Remembers a connection that has ended.
    pub fn remember(&self, ended: Ended) {
        let mut list = lock(&self.ended);
        if list.len() >= REMEMBERED {
            list.pop_front();
        }
        list.push_back(ended);
    }

    /// The open connections.
    pub fn open(&self) -> Vec<Arc<Open>> {
        self.open.iter().flat_map(|s| lock(s).values().cloned().collect::<Vec<_>>()).collect()
    }

    /// How many are open.
    pub fn open_count(&self) -> usize {
        self.open.iter().map(|s| lock(s).len()).sum()
    }

    /// The last ones that ended, the newest last.
    pub fn ended(&self) -> Vec<Ended> {
        lock(&self.ended).iter().cloned().collect()
    }

    /// Brings the metrics of open connections up to date; otherwise their bytes would show only at the end.
    pub fn settle(&self) {
        for open in self.open() {
            let (sent, received) = open.carried();
            open.meter.settle(sent, received);
        }
    }

    /// How many connections [`Registry::recheck`] cut so far.
    pub fn cut_count(&self) -> u64 {
        self.cut.load(Ordering::Relaxed)
    }

    /// Cuts every open connection.
    pub fn cut_all(&self, reason: &str) {
        for open in self.open() {
            open.cut_now(reason.to_owned());
        }
    }

    /// Cuts every open connection that may not go on. Returns how many.
    pub fn recheck(&self) -> usize {
        let mut cut: usize = 0;
        for open in self.open() {
            if let Some(reason) = open.recheck() {
                open.cut_now(reason);
                cut += 1;
            }
        }
        self.cut.fetch_add(cut as u64, Ordering::Relaxed);
        cut
    }
}

/// An open connection's place in the registry.
pub struct Entered {
    /// The connection. Dropped before the place, which then has it alone.
    pub open: Arc<Open>,
    place: Place,
}

impl Entered {
    /// Why it did not end in order, if it did not.
    pub fn error(&self) -> Option<&str> {
        self.place.error.as_deref()
    }

    /// Says why the connection ended, when it did not end in order.
    pub fn failed(&mut self, error: String) {
        self.place.error.get_or_insert(error);
    }
}

struct Place {
    registry: Arc<Registry>,
    id: u64,
    error: Option<String>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let left = self.registry.shard(self.id).and_then(|shard| lock(shard).remove(&self.id));
        let Some(open) = left else { return };
        let (bytes_sent, bytes_received) = open.carried();
        open.meter.close(bytes_sent, bytes_received);
        let error = self.error.take();
        // Somebody may be looking at it right now.
        let story = Arc::try_unwrap(open).map_or_else(|open| open.story.clone(), |open| open.story);
        self.registry.remember(Ended { story, closed_ms: now_ms(), bytes_sent, bytes_received, error });
    }
}

#[cfg(test)]
mod tests {
    use process::metrics::tcp::TcpMetrics;

    use super::*;

    fn meter() -> Meter {
        let metrics = TcpMetrics::new(&process::metrics::Registry::new(), 10);
        Meter::open(metrics.connection(&crate::telemetry::labels(&story(0))))
    }

    fn story(id: u64) -> Story {
        let any: SocketAddr = "10.0.0.1:80".parse().unwrap();
        Story {
            id,
            direction: Direction::Inbound,
            carrier: Carrier::Hbone,
            opened_ms: 0,
            source: any,
            source_workload: None,
            source_identity: None,
            destination: any,
            upstream: None,
            destination_workload: None,
            destination_service: None,
            destination_identity: None,
            verdict: Verdict::proxy("for the test"),
        }
    }

    #[tokio::test]
    async fn a_recheck_cuts_what_may_not_go_on_and_nothing_else() {
        let registry = Arc::new(Registry::default());
        let bad =
            registry.enter(story(registry.next_id()), meter(), Box::new(|| Some("no more".into())), None);
        let good = registry.enter(story(registry.next_id()), meter(), Box::new(|| None), None);
        assert_eq!(registry.recheck(), 1);
        assert_eq!(bad.open.cut().await, "no more");
        assert!(good.open.cut.get().is_none());
        drop((bad, good));
        assert_eq!((registry.open_count(), registry.ended().len()), (0, 2));
    }

    #[test]
    fn what_ends_is_remembered_as_it_was_whoever_looks_at_it() {
        let registry = Arc::new(Registry::default());
        let workload = Arc::new(Workload::new("uid".into(), "web", Arc::default()));
        for is_looked_at in [false, true] {
            let known = Story { source_workload: Some(workload.clone()), ..story(registry.next_id()) };
            let mut entered = registry.enter(known, meter(), Box::new(|| None), None);
            let looked_at = is_looked_at.then(|| registry.open());
            entered.open.bytes.to_server.store(7, Ordering::Relaxed);
            entered.failed("the first".into());
            entered.failed("the second".into());
            drop(entered);
            let ended = registry.ended().pop().unwrap();
            assert_eq!((ended.story.id, ended.bytes_sent), (registry.last_id(), 7));
            assert_eq!(ended.error.as_deref(), Some("the first"));
            drop((ended, looked_at));
            // Ours, and one for each that is remembered.
            assert_eq!(Arc::strong_count(&workload), 1 + registry.ended.lock().unwrap().len());
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let registry = Registry::default();
        for id in 0..REMEMBERED as u64 + 10 {
            registry.refused(story(id), "x".into());
        }
        assert_eq!(registry.ended().len(), REMEMBERED);
        assert_eq!(registry.ended().first().map(|e| e.story.id), Some(10));
    }
}
