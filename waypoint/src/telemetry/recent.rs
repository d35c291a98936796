//! Why the last requests, and connections of bytes, went as they did: what the admin page `/requests` and `culvert why` show.
//!
//! What is kept is what was decided (the evaluator's return value, the route's entry, the endpoint), not a text about it and not
//! the means to work it out again. Those that were refused or failed are kept apart from the others, so that they are
//! still there when many others came after them. When others come by so fast that none is kept for a second, most of
//! them are passed over, and counted.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use model::http::{Claims, HttpService, Route, StreamRoute};
use model::telemetry::{Facts, Headers};
use model::{PolicyKey, Str, Workload};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::ended::{Ended, protocol};
use crate::filters::ext_authz::Said;
use crate::http::decide::{Connection, Target};

/// Lists, of which a thread adds to one.
const SHARDS: usize = 8;
/// As many are kept in each list of those that went well, and of the others.
const KEPT: usize = 256;
/// Where the oldest is younger than this, only one in so many is kept.
const YOUNG: Duration = Duration::from_secs(1);
const ONE_IN: u64 = 16;
/// The longest method, authority, path and request ID that are kept, in bytes.
const LONGEST: [usize; 4] = [16, 256, 512, 128];
/// Bytes of why an endpoint could not be reached, which may quote a certificate.
const MOST_OF_A_REASON: usize = 512;

/// The records.
#[derive(Debug, Default)]
pub struct Recent {
    shards: [Mutex<Shard>; SHARDS],
    passed_over: AtomicU64,
    kept: AtomicU64,
    ids: AtomicU64,
}

#[derive(Debug, Default)]
struct Shard {
    went_well: VecDeque<Kept>,
    others: VecDeque<Kept>,
    seen: u64,
}

/// A request or a connection, and what was decided.
#[derive(Debug)]
struct Kept {
    id: u64,
    ended: Instant,
    at: SystemTime,
    duration: Duration,
    request: Option<Request>,
    connection: Connection,
    source: Option<Arc<Workload>>,
    service: Option<Arc<HttpService>>,
    port: u16,
    claims: Option<Arc<Claims>>,
    verdict: Option<Arc<model::RequestDecision>>,
    authorizers: Vec<Said>,
    route: Option<Arc<Route>>,
    stream: Option<Arc<StreamRoute>>,
    matched: Option<usize>,
    backend: Option<usize>,
    target: Option<Arc<Target>>,
    tries: u32,
    status: u16,
    grpc_status: Option<u8>,
    flags: Cow<'static, str>,
    details: &'static str,
    /// Why its endpoint could not be reached.
    unconnected: Option<Box<str>>,
    bytes: (u64, u64),
    trace: Option<u128>,
}

/// What a request asked for: its texts one after the other.
#[derive(Debug)]
struct Request {
    text: Box<str>,
    /// Where each of them ends.
    ends: [usize; 4],
    protocol: &'static str,
}

impl Request {
    fn of(ended: &Ended<'_>) -> Self {
        let head = ended.request;
        // What the client sent, not what became of it.
        let (authority, target) = match &ended.decided.original {
            Some(original) => (&*original.authority, &*original.target),
            None => (head.authority(), head.target()),
        };
        let id = ended.header(Headers::Request, "x-request-id").unwrap_or_default();
        let mut text = String::with_capacity(authority.len() + target.len().min(LONGEST[2]) + 48);
        let (mut ends, parts) = ([0; 4], [head.method(), authority, target, &*id]);
        for ((part, most), end) in parts.iter().zip(LONGEST).zip(&mut ends) {
            text.push_str(part.get(..part.floor_char_boundary(most)).unwrap_or_default());
            *end = text.len();
        }
        Self { text: text.into(), ends, protocol: protocol(head.version) }
    }

    /// Method, authority, path and ID.
    fn parts(&self) -> [&str; 4] {
        let mut begin = 0;
        self.ends.map(|end| self.text.get(std::mem::replace(&mut begin, end)..end).unwrap_or_default())
    }
}

/// As much of a reason as is kept.
fn short(why: &str) -> Box<str> {
    why.get(..why.floor_char_boundary(MOST_OF_A_REASON)).unwrap_or_default().into()
}

fn own_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: Cell<usize> = Cell::new(NEXT.fetch_add(1, Relaxed) % SHARDS);
    }
    OWN.get()
}

impl Recent {
    /// Keeps what was decided of what has ended.
    pub(super) fn keep(&self, ended: &Ended<'_>) {
        let Some(shard) = self.shards.get(own_shard()) else { return };
        let record = ended.record;
        let went_well = record.flag == crate::http::decide::Flag::None
            && record.status < 400
            && !record.retries_exhausted
            && ended.decided.verdict.as_ref().is_none_or(|verdict| verdict.outcome.is_ok());
        let now = record.started + ended.duration;
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        shard.seen = shard.seen.wrapping_add(1);
        let seen = shard.seen;
        let list = if went_well { &mut shard.went_well } else { &mut shard.others };
        if list.len() >= KEPT {
            let is_young = list.front().is_some_and(|oldest| now.duration_since(oldest.ended) < YOUNG);
            if is_young && !seen.is_multiple_of(ONE_IN) {
                self.passed_over.fetch_add(1, Relaxed);
                return;
            }
            list.pop_front();
        } else {
            self.kept.fetch_add(1, Relaxed);
        }
        list.push_back(self.of(ended, now));
    }

    fn of(&self, ended: &Ended<'_>, now: Instant) -> Kept {
        let (decided, record) = (ended.decided, ended.record);
        Kept {
            id: self.ids.fetch_add(1, Relaxed) + 1,
            ended: now,
            at: SystemTime::now(),
            duration: ended.duration,
            request: (!ended.is_connection).then(|| Request::of(ended)),
            connection: ended.connection.clone(),
            source: ended.source().cloned(),
            service: decided.service.clone(),
            port: ended.connection.destination.port(),
            claims: decided.claims.clone(),
            verdict: decided.verdict.clone(),
            authorizers: decided.authorizers.clone(),
            route: decided.route.clone(),
            stream: decided.stream.clone(),
            matched: decided.matched,
            backend: decided.backend,
            target: record.target.clone(),
            tries: record.tries,
            status: record.status,
            grpc_status: record.grpc_status,
            flags: ended.flags(),
            details: ended.details(),
            unconnected: record.unconnected.as_deref().map(short),
            bytes: (record.received, record.sent),
            trace: decided.trace.as_ref().map(|trace| trace.trace),
        }
    }

    /// Of how many a record is kept.
    #[must_use]
    pub fn kept(&self) -> u64 {
        self.kept.load(Relaxed)
    }

    /// How many were passed over.
    #[must_use]
    pub fn passed_over(&self) -> u64 {
        self.passed_over.load(Relaxed)
    }

    /// All of them, the oldest first.
    #[must_use]
    pub fn dump(&self) -> Value {
        let mut all = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.went_well.iter().chain(&shard.others).map(|kept| (kept.id, kept.dump())));
        }
        all.sort_by_key(|(id, _)| *id);
        let all: Vec<Value> = all.into_iter().map(|(_, value)| value).collect();
        json!({ "requests": all, "passed_over": self.passed_over() })
    }
}

impl Kept {
    fn dump(&self) -> Value {
        let mut value = self.ends();
        if let (Value::Object(all), Value::Object(more)) = (&mut value, self.decision()) {
            all.extend(more);
            all.retain(|_, value| !value.is_null());
        }
        value
    }

    /// Who asked for what, and how it went.
    fn ends(&self) -> Value {
        let at = self.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let [method, authority, path, request_id] =
            self.request.as_ref().map(Request::parts).unwrap_or_default();
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        json!({
            "id": self.id,
            "kind": if self.request.is_some() { "request" } else { "connection" },
            "at_ms": u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            "duration_ms": self.duration.as_secs_f64() * 1000.0,
            "request_id": some(request_id),
            "trace": self.trace.map(|trace| format!("{trace:032x}")),
            "method": some(method),
            "authority": some(authority),
            "path": some(path),
            "protocol": self.request.as_ref().map_or("TCP", |request| request.protocol),
            "server_name": self.connection.server_name.as_deref(),
            "source": self.connection.client.to_string(),
            "source_workload": self.source.as_deref().map(name_of),
            "source_identity": self.connection.identity.as_ref().map(ToString::to_string),
            "destination": self.connection.destination.to_string(),
            "destination_service": self.service.as_ref().map(|service| service.service.to_string()),
            "status": self.request.as_ref().map(|_| self.status),
            "grpc_status": self.grpc_status,
            "flags": self.flags,
            "details": self.details,
            "bytes_received": self.bytes.0,
            "bytes_sent": self.bytes.1,
        })
    }

    /// What was decided: token, policy, route, hop.
    fn decision(&self) -> Value {
        let claim = |name: &str| self.claims.as_ref()?.payload().get(name).cloned();
        let about = self.target.as_ref().and_then(|target| target.about.as_ref());
        let workload = about.and_then(|about| about.workload.as_ref());
        let asked = self.asked();
        let route = self.route.as_ref().map(|route| route.id.to_string());
        let tunnelled = about.is_some_and(|about| about.tunnelled);
        json!({
            "token": self.claims.as_ref().map(|_| json!({ "iss": claim("iss"), "sub": claim("sub") })),
            "decision": self.said(),
            "policy": self.policy(),
            "asked": (!asked.is_empty()).then_some(asked),
            "dry_run": self.trials(),
            "route": route.or_else(|| self.stream.as_ref().map(|route| route.id.to_string())),
            "match": self.matched(),
            "backend": self.backend(),
            "endpoint": self.target.as_ref().map(|target| target.address.to_string()),
            "endpoint_workload": workload.map(|w| name_of(w)),
            "hop": self.target.as_ref().map(|_| if tunnelled { "HBONE" } else { "TCP" }),
            "upstream_error": self.unconnected,
            "attempts": self.tries,
        })
    }

    /// What the evaluator said; where it was not asked, why.
    fn said(&self) -> String {
        match (&self.verdict, &self.service) {
            (Some(verdict), _) => match &verdict.outcome {
                Ok(allow) => allow.to_string(),
                Err(deny) => deny.to_string(),
            },
            (None, Some(service))
                if service.policies.is_empty() && service.selected.iter().all(|s| s.is_empty()) =>
            {
                "allowed: no policy holds for it".to_owned()
            }
            (None, Some(_)) => format!("no policy was asked: {}", self.details),
            (None, None) => {
                "no policy was asked: nothing of this address is bound to this waypoint".to_owned()
            }
        }
    }

    /// Whom CUSTOM policies name, and what they said.
    fn asked(&self) -> Vec<Value> {
        let named = self.verdict.iter().flat_map(|verdict| &verdict.ask);
        let one = |(policy, provider): &(PolicyKey, Str)| {
            // Of one that was asked again, since the route had changed the request, the last answer.
            let said = self.authorizers.iter().rfind(|said| said.provider == *provider);
            let answer = said.map_or_else(|| "not asked".to_owned(), |said| said.outcome.to_string());
            json!({ "policy": policy.to_string(), "provider": provider, "answer": answer })
        };
        named.map(one).collect()
    }

    fn policy(&self) -> Option<String> {
        match &self.verdict.as_ref()?.outcome {
            Ok(model::Allow::Matched(rule)) => Some(rule.policy.to_string()),
            Ok(model::Allow::NoAllowPolicies) => None,
            Err(deny) => deny.policy().map(ToString::to_string),
        }
    }

    fn trials(&self) -> Option<Vec<String>> {
        let verdict = self.verdict.as_ref()?;
        let one = |trial: &model::DryRun| match &trial.would {
            Ok(allow) => format!("if {} were enforced: {allow}", trial.policy),
            Err(deny) => format!("if {} were enforced: {deny}", trial.policy),
        };
        (!verdict.dry_run.is_empty()).then(|| verdict.dry_run.iter().map(one).collect())
    }

    /// What of the route held.
    fn matched(&self) -> Option<String> {
        let port = self.service.as_ref()?.port(self.port)?;
        Some(port.routes.entries().get(self.matched?)?.0.to_string())
    }

    /// The back end that the route chose.
    fn backend(&self) -> Option<String> {
        use model::http::{BackendRef, RouteAction};
        let of_endpoint = || {
            let about = self.target.as_ref()?.about.as_ref()?;
            Some(format!("{}:{}", about.service.as_ref()?, about.port))
        };
        let Some(RouteAction::Forward(forward)) = self.route.as_ref().map(|route| &route.action) else {
            return of_endpoint();
        };
        Some(match &forward.backends().get(self.backend?)?.to {
            BackendRef::Service { service, port, subset: None } => format!("{service}:{port}"),
            BackendRef::Service { service, port, subset: Some(subset) } => {
                format!("{service}:{port} subset {subset}")
            }
            BackendRef::Original => "the address that was dialled".to_owned(),
            BackendRef::Unresolved { reason } => format!("none: {reason}"),
        })
    }
}
/// `namespace/name`; of a client that its node tells of, of what made its pod, which is all that baggage says.
fn name_of(workload: &Workload) -> String {
    let name =
        Some(workload.name()).filter(|name| !name.is_empty()).unwrap_or_else(|| workload.workload_name());
    format!("{}/{name}", workload.namespace)
}
