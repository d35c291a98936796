//! DestinationRule (`networking.istio.io`): how a host is spoken to. Read with every upstream field; what it comes to
//! for a service is [`ServiceTraffic`].

use std::time::Duration;

use model::http::{
    ConnectionPool, Distribution, HashKey, HashTable, LoadBalancer, LocalitySetting, Outliers, Percent,
    RetryBudget, ServiceTraffic, Subset, TlsOrigination, TrafficPolicy, Warmup,
};
use model::{ServiceKey, Str};

use super::value::{go_duration, is_token, number, some_time, word};
use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields, Schema, enforced, nested, refused, silent};
use crate::metadata::{METADATA, Metadata, is_label};
use crate::policy::selector::non_empty;
use crate::resource::{Kind, KindSpec, Resource};

/// The kind.
pub static KIND: KindSpec = KindSpec {
    kind: Kind::DestinationRule,
    group: "networking.istio.io",
    versions: &["v1", "v1beta1", "v1alpha3"],
    name: "DestinationRule",
    namespaced: true,
    schema: &SCHEMA,
    parse,
};

static SCHEMA: Schema = Schema {
    name: "DestinationRule",
    fields: &[
        enforced("apiVersion"),
        enforced("kind"),
        nested("metadata", &METADATA),
        nested("spec", &SPEC),
        silent("status", "it is written by the control plane"),
    ],
};
static SPEC: Schema = Schema {
    name: "DestinationRule.spec",
    fields: &[
        enforced("host"),
        nested("trafficPolicy", &POLICY),
        nested("subsets", &SUBSET),
        enforced("exportTo"),
        refused(
            "workloadSelector",
            "a waypoint speaks for all clients, so a rule for some of them can't be kept apart",
            "remove it, or use a route with sourceLabels and a subset",
        ),
    ],
};
static SUBSET: Schema = Schema {
    name: "DestinationRule.spec.subsets[]",
    fields: &[enforced("name"), enforced("labels"), nested("trafficPolicy", &POLICY)],
};
static POLICY: Schema = Schema {
    name: "DestinationRule.spec.trafficPolicy",
    fields: &[
        nested("loadBalancer", &BALANCER),
        nested("connectionPool", &POOL),
        nested("outlierDetection", &OUTLIERS),
        nested("tls", &TLS),
        nested("portLevelSettings", &PORT_LEVEL),
        nested("retryBudget", &BUDGET),
        refused("tunnel", "connections are tunnelled by HBONE only", "remove it"),
        refused("proxyProtocol", "the PROXY protocol is not spoken to destinations", "remove it"),
    ],
};
static PORT_LEVEL: Schema = Schema {
    name: "DestinationRule.spec.trafficPolicy.portLevelSettings[]",
    fields: &[
        nested("port", &PORT),
        nested("loadBalancer", &BALANCER),
        nested("connectionPool", &POOL),
        nested("outlierDetection", &OUTLIERS),
        nested("tls", &TLS),
    ],
};
static PORT: Schema = Schema { name: "PortSelector", fields: &[enforced("number")] };
static BALANCER: Schema = Schema {
    name: "LoadBalancerSettings",
    fields: &[
        enforced("simple"),
        nested("consistentHash", &HASH),
        nested("localityLbSetting", &LOCALITY),
        enforced("warmupDurationSecs"),
        nested("warmup", &WARMUP),
        refused(
            "zoneAwareLbSetting",
            "requests are not spread by the share of each zone",
            "use localityLbSetting",
        ),
    ],
};
static HASH: Schema = Schema {
    name: "ConsistentHashLB",
    fields: &[
        enforced("httpHeaderName"),
        nested("httpCookie", &COOKIE),
        enforced("useSourceIp"),
        enforced("httpQueryParameterName"),
        nested("ringHash", &RING),
        nested("maglev", &MAGLEV),
        enforced("minimumRingSize"),
    ],
};
static COOKIE: Schema = Schema {
    name: "HTTPCookie",
    fields: &[
        enforced("name"),
        enforced("path"),
        enforced("ttl"),
        refused("attributes", "a cookie that is set has Path, Max-Age and HttpOnly", "remove them"),
    ],
};
static RING: Schema = Schema { name: "RingHash", fields: &[enforced("minimumRingSize")] };
static MAGLEV: Schema = Schema { name: "MagLev", fields: &[enforced("tableSize")] };
static WARMUP: Schema = Schema {
    name: "WarmupConfiguration",
    fields: &[enforced("duration"), enforced("minimumPercent"), enforced("aggression")],
};
/// `localityLbSetting`, of MeshConfig too.
pub static LOCALITY: Schema = Schema {
    name: "LocalityLoadBalancerSetting",
    fields: &[
        nested("distribute", &DISTRIBUTE),
        nested("failover", &FAILOVER),
        enforced("failoverPriority"),
        enforced("enabled"),
    ],
};
static DISTRIBUTE: Schema = Schema { name: "Distribute", fields: &[enforced("from"), enforced("to")] };
static FAILOVER: Schema = Schema { name: "Failover", fields: &[enforced("from"), enforced("to")] };
static POOL: Schema =
    Schema { name: "ConnectionPoolSettings", fields: &[nested("tcp", &TCP), nested("http", &HTTP)] };
static TCP: Schema = Schema {
    name: "TCPSettings",
    fields: &[
        enforced("maxConnections"),
        enforced("connectTimeout"),
        nested("tcpKeepalive", &KEEPALIVE),
        enforced("maxConnectionDuration"),
        enforced("idleTimeout"),
    ],
};
static KEEPALIVE: Schema =
    Schema { name: "TcpKeepalive", fields: &[enforced("probes"), enforced("time"), enforced("interval")] };
static HTTP: Schema = Schema {
    name: "HTTPSettings",
    fields: &[
        enforced("http1MaxPendingRequests"),
        enforced("http2MaxRequests"),
        enforced("maxRequestsPerConnection"),
        enforced("maxRetries"),
        enforced("idleTimeout"),
        enforced("h2UpgradePolicy"),
        enforced("useClientProtocol"),
        enforced("maxConcurrentStreams"),
        refused(
            "http2KeepAlive",
            "HTTP/2 connections are kept alive at an interval of the program",
            "set tcp.tcpKeepalive",
        ),
    ],
};
static OUTLIERS: Schema = Schema {
    name: "OutlierDetection",
    fields: &[
        enforced("consecutive5xxErrors"),
        enforced("consecutiveGatewayErrors"),
        enforced("consecutiveErrors"),
        enforced("splitExternalLocalOriginErrors"),
        enforced("consecutiveLocalOriginFailures"),
        enforced("interval"),
        enforced("baseEjectionTime"),
        enforced("maxEjectionPercent"),
        enforced("minHealthPercent"),
        refused(
            "outlierDetectionHttpErrorCodes",
            "which statuses are errors is not to be chosen",
            "use consecutive5xxErrors or consecutiveGatewayErrors",
        ),
    ],
};
static TLS: Schema = Schema {
    name: "ClientTLSSettings",
    fields: &[
        enforced("mode"),
        enforced("clientCertificate"),
        enforced("privateKey"),
        enforced("caCertificates"),
        enforced("credentialName"),
        enforced("subjectAltNames"),
        enforced("sni"),
        enforced("insecureSkipVerify"),
        refused("caCrl", "revocation lists are not read", "revoke by a new caCertificates"),
    ],
};
static BUDGET: Schema = Schema {
    name: "RetryBudget",
    fields: &[enforced("percent"), enforced("minRetryConcurrency"), enforced("budgetInterval")],
};

/// A DestinationRule.
#[derive(Clone, PartialEq, Debug)]
pub struct DestinationRule {
    /// The host: a short name is one of the rule's namespace; `*.` at the start is for all below.
    pub host: Str,
    /// What holds for it.
    pub policy: PolicyDraft,
    /// The subsets.
    pub subsets: Box<[SubsetDraft]>,
    /// The namespaces that it is for: `None` is all, an empty list its own only.
    pub export_to: Option<Box<[Str]>>,
    /// When it was made (RFC 3339), empty when not said.
    pub created: Str,
}

/// A subset as it is written.
#[derive(Clone, PartialEq, Debug)]
pub struct SubsetDraft {
    /// Its name.
    pub name: Str,
    /// Labels of its endpoints.
    pub labels: Box<[(Str, Str)]>,
    /// What it says in place of the rule's.
    pub policy: PolicyDraft,
}

/// A traffic policy as it is written: what is not set is another's to say, or has its default.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct PolicyDraft {
    own: Parts,
    ports: Box<[(u16, Parts)]>,
}

#[derive(Clone, PartialEq, Debug, Default)]
struct Parts {
    balancer: Option<Balancer>,
    pool: Option<ConnectionPool>,
    outliers: Option<Outliers>,
    budget: Option<RetryBudget>,
    /// `Some(None)` is the mode DISABLE, or ISTIO_MUTUAL, which is HBONE here.
    tls: Option<Option<Box<TlsOrigination>>>,
}

#[derive(Clone, PartialEq, Debug, Default)]
struct Balancer {
    choice: LoadBalancer,
    warmup: Option<Warmup>,
    locality: Option<LocalitySetting>,
}

impl Parts {
    /// These, and of `other` what they don't say: whole settings, never parts of one (Istio).
    fn or(&self, other: &Self) -> Self {
        Self {
            balancer: self.balancer.clone().or_else(|| other.balancer.clone()),
            pool: self.pool.clone().or_else(|| other.pool.clone()),
            outliers: self.outliers.clone().or_else(|| other.outliers.clone()),
            budget: self.budget.or(other.budget),
            tls: self.tls.clone().or_else(|| other.tls.clone()),
        }
    }

    fn policy(&self) -> TrafficPolicy {
        let balancer = self.balancer.clone().unwrap_or_default();
        TrafficPolicy {
            load_balancer: balancer.choice,
            warmup: balancer.warmup,
            locality: balancer.locality,
            pool: self.pool.clone().unwrap_or_default(),
            outliers: self.outliers.clone(),
            retry_budget: self.budget,
            tls: self.tls.clone().flatten(),
        }
    }
}

impl DestinationRule {
    /// What it comes to for a service.
    #[must_use]
    pub fn traffic(&self, service: ServiceKey) -> ServiceTraffic {
        let ports =
            |list: &[(u16, Parts)]| list.iter().map(|(port, parts)| (*port, parts.policy())).collect();
        let subset = |subset: &SubsetDraft| {
            // What a subset says itself goes before what the rule says of a port; its own ports stand alone (Istio).
            let of_rule = self.policy.ports.iter();
            let of_rule = of_rule.filter(|(port, _)| !subset.policy.ports.iter().any(|(own, _)| own == port));
            let mut at: Vec<(u16, Parts)> =
                of_rule.map(|(port, parts)| (*port, subset.policy.own.or(parts))).collect();
            at.extend(subset.policy.ports.iter().map(|(port, parts)| {
                let budget = parts.budget.or(self.policy.own.budget);
                (*port, Parts { budget, ..parts.clone() })
            }));
            Subset {
                name: subset.name.clone(),
                labels: subset.labels.clone(),
                default: subset.policy.own.or(&self.policy.own).policy(),
                ports: ports(&at),
            }
        };
        ServiceTraffic {
            service,
            default: self.policy.own.policy(),
            ports: ports(&self.policy.ports),
            subsets: self.subsets.iter().map(subset).collect(),
        }
    }
}

fn parse(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<Resource> {
    let created = fields.context().pool.string(metadata.created);
    let mut spec = fields.required("spec")?.fields()?;
    let host = spec.required("host").and_then(non_empty).map(str::to_ascii_lowercase);
    let mut policy = spec.object("trafficPolicy").map(|mut p| read_policy(&mut p)).unwrap_or_default();
    let mut subsets: Vec<SubsetDraft> = Vec::new();
    spec.each("subsets", |item| {
        let Some(mut fields) = item.fields() else { return };
        let Some(subset) = read_subset(&mut fields) else { return };
        if subsets.iter().any(|s| s.name == subset.name) {
            let message = format!("there is a subset {:?} already", &*subset.name);
            fields.report(Code::InvalidValue, message, "give it another name");
        }
        subsets.push(subset);
    });
    let bound = read_bound(&mut spec, metadata);
    policy.bound_hashes(bound);
    subsets.iter_mut().for_each(|subset| subset.policy.bound_hashes(bound));
    let export_to = read_export(&mut spec, metadata.namespace);
    let host = spec.context().pool.string(&host?);
    let rule = DestinationRule { host, policy, subsets: subsets.into(), export_to, created };
    Some(Resource::DestinationRule(Box::new(rule)))
}

/// How much more than the average an endpoint takes of what hashes to it, in percent; of all consistent hashes of a rule.
/// Istio has no field for it.
const BOUND: &str = "culvert.dev/hash-load-bound";

fn read_bound(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<u32> {
    let annotation = metadata.annotation(BOUND)?;
    let bound = annotation.value.parse().ok().filter(|bound| (101..=10_000).contains(bound));
    if bound.is_none() {
        let message = "is no number of percent from 101 to 10000";
        annotation.invalid(fields, message, "write \"150\", for one and a half times the average");
    }
    bound
}

impl PolicyDraft {
    fn bound_hashes(&mut self, limit: Option<u32>) {
        let own = std::iter::once(&mut self.own);
        for parts in own.chain(self.ports.iter_mut().map(|(_, parts)| parts)) {
            if let Some(Balancer { choice: LoadBalancer::Hash { bound, .. }, .. }) = &mut parts.balancer {
                *bound = limit;
            }
        }
    }
}

/// `exportTo`: `*` is all namespaces, `.` the object's own.
pub(super) fn read_export(spec: &mut Fields<'_, '_>, own: &str) -> Option<Box<[Str]>> {
    let list = spec.string_list("exportTo");
    if list.is_empty() || list.contains(&"*") {
        return None;
    }
    let pool = &mut spec.context().pool;
    Some(list.into_iter().map(|n| pool.string(if n == "." { own } else { n })).collect())
}

fn read_subset(fields: &mut Fields<'_, '_>) -> Option<SubsetDraft> {
    let name = fields.required("name").and_then(|mut cursor| {
        if cursor.node().as_str().is_some_and(|t| !is_label(t)) {
            cursor.invalid("is no name of lower-case letters, digits and '-'", "");
        }
        cursor.string()
    });
    let labels = fields.string_map("labels");
    let policy = fields.object("trafficPolicy").map(|mut p| read_policy(&mut p)).unwrap_or_default();
    let pool = &mut fields.context().pool;
    let labels = labels.into_iter().map(|(k, v)| (pool.string(k), pool.string(v))).collect();
    Some(SubsetDraft { name: pool.string(name?), labels, policy })
}

fn read_policy(fields: &mut Fields<'_, '_>) -> PolicyDraft {
    let mut own = read_parts(fields);
    own.budget = fields.object("retryBudget").map(|mut budget| read_budget(&mut budget));
    let mut ports: Vec<(u16, Parts)> = Vec::new();
    fields.each("portLevelSettings", |item| {
        let Some(mut fields) = item.fields() else { return };
        let port = fields
            .required("port")
            .and_then(Cursor::fields)
            .and_then(|mut port| port.required("number").and_then(|c| c.integer(1..=u16::MAX)));
        let parts = read_parts(&mut fields);
        let Some(port) = port else { return };
        if ports.iter().any(|(p, _)| *p == port) {
            fields.report(Code::InvalidValue, format!("port {port} has settings already"), "remove one");
        }
        // The one setting that ports have none of: it is that of all of them.
        ports.push((port, Parts { budget: own.budget, ..parts }));
    });
    PolicyDraft { own, ports: ports.into() }
}

fn read_parts(fields: &mut Fields<'_, '_>) -> Parts {
    Parts {
        balancer: fields.object("loadBalancer").map(|mut f| read_balancer(&mut f)),
        pool: fields.object("connectionPool").map(|mut f| read_pool(&mut f)),
        outliers: fields.object("outlierDetection").map(|mut f| read_outliers(&mut f)),
        budget: None,
        tls: fields.object("tls").map(|mut f| read_tls(&mut f)),
    }
}

fn read_balancer(fields: &mut Fields<'_, '_>) -> Balancer {
    let simple = fields.take("simple").and_then(|c| word(c, &SIMPLE));
    let hash = fields.object("consistentHash").and_then(|mut f| read_hash(&mut f));
    if simple.is_some() && hash.is_some() {
        fields.report(Code::InvalidValue, "simple and consistentHash are both set", "remove one");
    }
    let seconds = fields.take("warmupDurationSecs").and_then(some_time);
    let warmup = fields.object("warmup").and_then(|mut warmup| {
        let duration = warmup.required("duration").and_then(some_time);
        let minimum_percent =
            warmup.take("minimumPercent").and_then(|c| number(c, 0.0, 100.0)).unwrap_or(10.0);
        let aggression = warmup.take("aggression").and_then(|c| number(c, 1.0, 1000.0)).unwrap_or(1.0);
        Some(Warmup { duration: duration?, minimum_percent, aggression })
    });
    let from_seconds = |duration| Warmup { duration, minimum_percent: 10.0, aggression: 1.0 };
    let locality = fields.object("localityLbSetting").map(|mut f| read_locality(&mut f));
    let choice = match (hash, simple) {
        (Some(hash), _) => hash,
        (None, Some(Simple::RoundRobin)) => LoadBalancer::RoundRobin,
        (None, Some(Simple::Random)) => LoadBalancer::Random,
        (None, Some(Simple::Passthrough)) => LoadBalancer::Passthrough,
        (None, Some(Simple::LeastRequest) | None) => LoadBalancer::LeastRequest,
    };
    Balancer { choice, warmup: warmup.or(seconds.map(from_seconds)), locality }
}

#[derive(Clone, Copy)]
enum Simple {
    LeastRequest,
    RoundRobin,
    Random,
    Passthrough,
}

const SIMPLE: [(&str, Simple); 6] = [
    ("LEAST_REQUEST", Simple::LeastRequest),
    ("ROUND_ROBIN", Simple::RoundRobin),
    ("RANDOM", Simple::Random),
    ("PASSTHROUGH", Simple::Passthrough),
    ("LEAST_CONN", Simple::LeastRequest),
    ("UNSPECIFIED", Simple::LeastRequest),
];

/// Envoy's default ring, and its limit; and its default table.
const RING_SIZE: u64 = 1024;
const MAX_RING: u64 = 8 << 20;
const TABLE_SIZE: u64 = 65_537;

fn read_hash(fields: &mut Fields<'_, '_>) -> Option<LoadBalancer> {
    let mut keys = Vec::new();
    if let Some(name) = fields.take("httpHeaderName").and_then(super::value::header_name) {
        keys.push(HashKey::Header(name.as_str().into()));
    }
    if let Some(mut cookie) = fields.object("httpCookie") {
        let name = cookie.required("name").and_then(|mut cursor| {
            if cursor.node().as_str().is_some_and(|name| !is_token(name)) {
                cursor.invalid("is no name of a cookie", "");
            }
            cursor.string()
        });
        let path = cookie.take("path").and_then(|mut cursor| {
            let may = |b: u8| (b' '..0x7f).contains(&b) && b != b';';
            if cursor.node().as_str().is_some_and(|path| !path.bytes().all(may)) {
                cursor.invalid("is no path of a cookie", "");
            }
            cursor.string().filter(|path| !path.is_empty())
        });
        let ttl = cookie.take("ttl").and_then(go_duration);
        let pool = &mut cookie.context().pool;
        let path = path.map(|p| pool.string(p));
        keys.extend(name.map(|name| HashKey::Cookie { name: pool.string(name), path, ttl }));
    }
    if fields.boolean("useSourceIp").unwrap_or(false) {
        keys.push(HashKey::SourceIp);
    }
    if let Some(name) = fields.string("httpQueryParameterName").filter(|n| !n.is_empty()) {
        keys.push(HashKey::Query(fields.context().pool.string(name)));
    }
    let old = fields.integer("minimumRingSize", 0..=MAX_RING);
    let ring = fields.object("ringHash").map(|mut ring| ring.integer("minimumRingSize", 0..=MAX_RING));
    let maglev = fields.object("maglev").map(|mut maglev| {
        let size = maglev.take("tableSize").and_then(|mut cursor| {
            let node = cursor.node();
            let size = match node.value {
                crate::tree::Value::Int(size) => u64::try_from(size).ok().filter(|s| *s <= 5_000_011),
                _ => None,
            };
            if !size.is_some_and(is_prime) {
                cursor.invalid("is no prime of at most 5000011", "write 65537");
            }
            size
        });
        size.unwrap_or(TABLE_SIZE)
    });
    if maglev.is_some() && ring.is_some() {
        fields.report(Code::InvalidValue, "ringHash and maglev are both set", "remove one");
    }
    if keys.len() != 1 {
        let message = format!("a consistent hash is of one thing, and {} are named", keys.len());
        fields.report(
            Code::InvalidValue,
            message,
            "name a header, a cookie, a query parameter or useSourceIp",
        );
    }
    let table = match maglev {
        Some(size) => HashTable::Maglev(size),
        None => HashTable::Ring(ring.flatten().or(old).filter(|n| *n > 0).unwrap_or(RING_SIZE)),
    };
    Some(LoadBalancer::Hash { key: keys.into_iter().next()?, table, bound: None })
}

fn is_prime(n: u64) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// Reads `localityLbSetting`.
pub(crate) fn read_locality(fields: &mut Fields<'_, '_>) -> LocalitySetting {
    let enabled = fields.boolean("enabled").unwrap_or(true);
    let mut distribute = Vec::new();
    fields.each("distribute", |item| {
        let Some(mut fields) = item.fields() else { return };
        let from = fields.required("from").and_then(non_empty);
        let mut to = Vec::new();
        let mut sum = 0_u32;
        if let Some(cursor) = fields.required("to") {
            cursor.entries(|locality, share| {
                if let Some(share) = share.integer(1..=100_u32) {
                    sum += share;
                    to.push((Str::from(locality), share));
                }
            });
        }
        if sum != 100 {
            let message = format!("the shares come to {sum}, and have to come to 100");
            fields.report(Code::InvalidValue, message, "");
        }
        distribute.extend(from.map(|from| Distribution { from: from.into(), to: to.into() }));
    });
    let mut failover = Vec::new();
    fields.each("failover", |item| {
        let Some(mut fields) = item.fields() else { return };
        let from = fields.required("from").and_then(non_empty);
        let to = fields.required("to").and_then(non_empty);
        let (Some(from), Some(to)) = (from, to) else { return };
        if from == to || from.contains('/') || to.contains('/') {
            let message = "failover is from one region to another";
            fields.report(Code::InvalidValue, message, "name two regions, without zones");
        }
        failover.push((Str::from(from), Str::from(to)));
    });
    let priority: Box<[Str]> = fields.string_list("failoverPriority").into_iter().map(Into::into).collect();
    let set = [!distribute.is_empty(), !failover.is_empty(), !priority.is_empty()];
    if set.iter().filter(|s| **s).count() > 1 && set.first() == Some(&true) {
        let message = "distribute does not go with failover or failoverPriority";
        fields.report(Code::InvalidValue, message, "remove one of them");
    }
    if !enabled {
        return LocalitySetting { disabled: true, ..LocalitySetting::default() };
    }
    LocalitySetting {
        distribute: distribute.into(),
        failover: failover.into(),
        failover_priority: priority,
        disabled: false,
    }
}

/// As good as without end, and small enough to be added to a time.
const FOR_EVER: Duration = Duration::from_hours(10 * 365 * 24);

fn read_pool(fields: &mut Fields<'_, '_>) -> ConnectionPool {
    let mut pool = ConnectionPool::default();
    if let Some(mut tcp) = fields.object("tcp") {
        pool.max_connections = limit(&mut tcp, "maxConnections");
        pool.connect_timeout = tcp.take("connectTimeout").and_then(some_time);
        pool.max_connection_duration = tcp.take("maxConnectionDuration").and_then(some_time);
        // Zero is for ever (Istio, TCPSettings.idleTimeout).
        let idle = tcp.take("idleTimeout").and_then(go_duration);
        pool.idle_timeout = idle.map(|idle| if idle.is_zero() { FOR_EVER } else { idle });
        pool.keepalive = tcp.object("tcpKeepalive").map(|mut keepalive| {
            let probes = limit(&mut keepalive, "probes").unwrap_or(9);
            let time = keepalive.take("time").and_then(go_duration).unwrap_or(Duration::from_hours(2));
            let interval =
                keepalive.take("interval").and_then(go_duration).unwrap_or(Duration::from_secs(75));
            (time, interval, probes)
        });
    }
    if let Some(mut http) = fields.object("http") {
        pool.max_pending_requests = limit(&mut http, "http1MaxPendingRequests");
        pool.max_requests = limit(&mut http, "http2MaxRequests");
        pool.max_requests_per_connection = limit(&mut http, "maxRequestsPerConnection");
        pool.max_retries = limit(&mut http, "maxRetries");
        pool.max_concurrent_streams = limit(&mut http, "maxConcurrentStreams");
        pool.idle_timeout = http.take("idleTimeout").and_then(some_time).or(pool.idle_timeout);
        let upgrade = http.take("h2UpgradePolicy");
        let words = [("DEFAULT", None), ("DO_NOT_UPGRADE", Some(false)), ("UPGRADE", Some(true))];
        pool.h2_upgrade = upgrade.and_then(|c| word(c, &words)).flatten();
        pool.use_client_protocol = http.boolean("useClientProtocol").unwrap_or(false);
    }
    pool
}

/// A limit, for which 0 is "not set" (protobuf).
fn limit(fields: &mut Fields<'_, '_>, name: &'static str) -> Option<u32> {
    fields.integer(name, 0..=i32::MAX.unsigned_abs()).filter(|n| *n > 0)
}

/// Envoy's defaults, as far as Istio leaves them.
fn read_outliers(fields: &mut Fields<'_, '_>) -> Outliers {
    let consecutive = fields.integer("consecutive5xxErrors", 0..=u32::MAX);
    let gateway = fields.integer("consecutiveGatewayErrors", 0..=u32::MAX);
    let old = fields.integer("consecutiveErrors", 0..=u32::MAX).filter(|n| *n > 0);
    if old.is_some() && (consecutive.is_some() || gateway.is_some()) {
        let message = "consecutiveErrors is the old name of consecutiveGatewayErrors; both are set";
        fields.report(Code::InvalidValue, message, "remove consecutiveErrors");
    }
    let split_local_origin = fields.boolean("splitExternalLocalOriginErrors").unwrap_or(false);
    let local = fields.integer("consecutiveLocalOriginFailures", 0..=u32::MAX).unwrap_or(5);
    let interval = fields.take("interval").and_then(some_time);
    let base = fields.take("baseEjectionTime").and_then(some_time);
    let most = fields.integer("maxEjectionPercent", 0..=100_u32).unwrap_or(10);
    let least = fields.integer("minHealthPercent", 0..=100_u32).unwrap_or(0);
    Outliers {
        consecutive_5xx: consecutive.unwrap_or(5),
        consecutive_gateway_errors: gateway.or(old).unwrap_or(0),
        split_local_origin,
        consecutive_local_origin_failures: local,
        interval: interval.unwrap_or(Duration::from_secs(10)),
        base_ejection: base.unwrap_or(Duration::from_secs(30)),
        max_ejection: Percent::of(most, 100),
        min_health: Percent::of(least, 100),
    }
}

fn read_budget(fields: &mut Fields<'_, '_>) -> RetryBudget {
    let percent = fields.take("percent").and_then(|c| number(c, 0.0, 100.0)).unwrap_or(20.0);
    let min_concurrency = fields.integer("minRetryConcurrency", 0..=u32::MAX).unwrap_or(3);
    let interval = fields.take("budgetInterval").and_then(some_time);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 1,000,000")]
    let share = Percent::of((percent * 10_000.0) as u32, 1_000_000);
    RetryBudget { share, min_concurrency, interval }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TlsMode {
    Off,
    Simple,
    Mutual,
}

fn read_tls(fields: &mut Fields<'_, '_>) -> Option<Box<TlsOrigination>> {
    let words = [
        ("DISABLE", TlsMode::Off),
        ("SIMPLE", TlsMode::Simple),
        ("MUTUAL", TlsMode::Mutual),
        ("ISTIO_MUTUAL", TlsMode::Off),
    ];
    let mode = fields.take("mode").and_then(|c| word(c, &words)).unwrap_or(TlsMode::Off);
    let mut text = |name| fields.string(name).filter(|t: &&str| !t.is_empty()).map(Str::from);
    let files = (text("clientCertificate"), text("privateKey"), text("caCertificates"));
    let (credential, sni) = (text("credentialName"), text("sni"));
    let subject_alt_names: Box<[Str]> =
        fields.string_list("subjectAltNames").into_iter().map(Into::into).collect();
    let insecure_skip_verify = fields.boolean("insecureSkipVerify").unwrap_or(false);
    let has_own = files.0.is_some() || files.1.is_some();
    let named = has_own || files.2.is_some();
    let checks = !subject_alt_names.is_empty() || files.2.is_some();
    let wrong = match mode {
        _ if insecure_skip_verify && checks => Some(
            "insecureSkipVerify looks at no certificate, and subjectAltNames and caCertificates ask for a look",
        ),
        TlsMode::Off => (named || credential.is_some()).then_some("certificates mean nothing to this mode"),
        _ if credential.is_some() && named => Some("credentialName and files are both set"),
        TlsMode::Simple if has_own => Some("a certificate of our own needs the mode MUTUAL"),
        TlsMode::Mutual if credential.is_none() && (files.0.is_none() || files.1.is_none()) => {
            Some("MUTUAL needs clientCertificate and privateKey, or credentialName")
        }
        TlsMode::Simple | TlsMode::Mutual => None,
    };
    if let Some(wrong) = wrong {
        fields.report(Code::InvalidValue, wrong, "");
    } else if let Some(name) = &credential {
        let said = format!(
            "the Secret is not fetched: waypoints read it from the directory /etc/culvert/credentials/{name}, and \
             connections fail where it is not mounted"
        );
        let remedy =
            "mount it there by a ConfigMap that the Gateway names in spec.infrastructure.parametersRef";
        fields.report(Code::ActsOtherwise, said, remedy);
    }
    (mode != TlsMode::Off).then(|| {
        Box::new(TlsOrigination {
            sni,
            subject_alt_names,
            credential,
            files: named.then_some(files),
            insecure_skip_verify,
        })
    })
}
