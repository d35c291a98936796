//! How a destination is spoken to: what a DestinationRule says of a service, its ports and its subsets.

use std::time::Duration;

use super::Percent;
use crate::{ServiceKey, Str};

/// What is said of a service.
#[derive(Clone, PartialEq, Debug)]
pub struct ServiceTraffic {
    /// The service.
    pub service: ServiceKey,
    /// For ports of which nothing else is said.
    pub default: TrafficPolicy,
    /// For these ports, whole: what is not set there is not that of `default` (DestinationRule `portLevelSettings`).
    pub ports: Box<[(u16, TrafficPolicy)]>,
    /// The subsets.
    pub subsets: Box<[Subset]>,
}

impl ServiceTraffic {
    /// What holds for `port` of the service, or of its subset.
    #[must_use]
    pub fn policy(&self, port: u16, subset: Option<&str>) -> &TrafficPolicy {
        let at = |ports: &'_ [(u16, TrafficPolicy)]| ports.iter().position(|(p, _)| *p == port);
        let subset = subset.and_then(|name| self.subsets.iter().find(|s| *s.name == *name));
        let (default, ports) =
            subset.map_or((&self.default, &self.ports), |subset| (&subset.default, &subset.ports));
        at(ports).and_then(|i| ports.get(i)).map_or(default, |(_, policy)| policy)
    }
}

/// A part of a service's endpoints.
#[derive(Clone, PartialEq, Debug)]
pub struct Subset {
    /// Its name.
    pub name: Str,
    /// Labels that its endpoints have.
    pub labels: Box<[(Str, Str)]>,
    /// What holds for it: the service's, with what the subset says in its place.
    pub default: TrafficPolicy,
    /// The same for ports.
    pub ports: Box<[(u16, TrafficPolicy)]>,
}

/// How a destination is spoken to.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct TrafficPolicy {
    /// Which endpoint takes the next request.
    pub load_balancer: LoadBalancer,
    /// How much of its share a new endpoint gets.
    pub warmup: Option<Warmup>,
    /// What the localities of client and endpoints mean.
    pub locality: Option<LocalitySetting>,
    /// Limits of connections and requests.
    pub pool: ConnectionPool,
    /// When an endpoint is left out for a while.
    pub outliers: Option<Outliers>,
    /// How many retries there may be at a time.
    pub retry_budget: Option<RetryBudget>,
    /// TLS that is begun here.
    pub tls: Option<Box<TlsOrigination>>,
}

/// Which endpoint takes the next request.
#[derive(Clone, PartialEq, Debug, Default)]
pub enum LoadBalancer {
    /// Of two at random the one with fewer requests under way.
    #[default]
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// The one that the client dialled.
    Passthrough,
    /// The same for the same key, as far as the endpoints stay.
    Hash {
        /// What of a request is hashed.
        key: HashKey,
        /// How.
        table: HashTable,
        /// Up to how many percent of the average load an endpoint takes what hashes to it; what is beyond goes to the
        /// next one. `None`: all of it.
        bound: Option<u32>,
    },
}

/// What of a request is hashed. A request without it goes to any endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HashKey {
    /// A header field, by its name in lower case.
    Header(Str),
    /// A cookie. With a life time, a client that has none is given one.
    Cookie {
        /// Its name.
        name: Str,
        /// For which paths it is given.
        path: Option<Str>,
        /// How long it lives; zero is until the browser ends. `None`: it is not given.
        ttl: Option<Duration>,
    },
    /// A query parameter.
    Query(Str),
    /// The client's address.
    SourceIp,
}

/// How keys are spread.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HashTable {
    /// A ring with at least so many entries.
    Ring(u64),
    /// Maglev, with a table of this prime size.
    Maglev(u64),
}

/// How much of its share a new endpoint gets.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Warmup {
    /// Until it has all.
    pub duration: Duration,
    /// What it has from the start, in percent of its share.
    pub minimum_percent: f64,
    /// How fast it grows: 1 is even; more is slower first.
    pub aggression: f64,
}

/// What localities mean (`localityLbSetting`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LocalitySetting {
    /// Where the requests of which locality go.
    pub distribute: Box<[Distribution]>,
    /// From a region to the region that takes over.
    pub failover: Box<[(Str, Str)]>,
    /// Labels, and `key=value`, of which endpoints that share more from the first on come first.
    pub failover_priority: Box<[Str]>,
    /// Whether near endpoints do not come first. Without a setting they do, where those that fail are left out.
    pub disabled: bool,
}

/// Where the requests of a locality go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Distribution {
    /// The clients' locality: `region/zone/subzone`, `*` for any.
    pub from: Str,
    /// The endpoints' localities, and how many percent each gets.
    pub to: Box<[(Str, u32)]>,
}

/// Limits of connections and requests to a destination. `None` is the limit of the program.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ConnectionPool {
    /// Connections at a time.
    pub max_connections: Option<u32>,
    /// For how long one may be asked for.
    pub connect_timeout: Option<Duration>,
    /// Its longest life.
    pub max_connection_duration: Option<Duration>,
    /// How long it may be idle.
    pub idle_timeout: Option<Duration>,
    /// Keep-alive of TCP: after, every, how often.
    pub keepalive: Option<(Duration, Duration, u32)>,
    /// Requests that wait for a connection.
    pub max_pending_requests: Option<u32>,
    /// Requests at a time.
    pub max_requests: Option<u32>,
    /// Requests that one connection carries; 0 is without end.
    pub max_requests_per_connection: Option<u32>,
    /// Retries at a time.
    pub max_retries: Option<u32>,
    /// Streams of one HTTP/2 connection.
    pub max_concurrent_streams: Option<u32>,
    /// Whether HTTP/1 requests go on by HTTP/2.
    pub h2_upgrade: Option<bool>,
    /// Whether a request goes on by the protocol that it came by.
    pub use_client_protocol: bool,
}

/// When an endpoint is left out for a while (`outlierDetection`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outliers {
    /// After so many 5xx in a row; errors of our own connections count, unless they are split off. 0 is never.
    pub consecutive_5xx: u32,
    /// After so many 502, 503, 504 in a row. 0 is never.
    pub consecutive_gateway_errors: u32,
    /// Whether errors of our own connections are counted apart.
    pub split_local_origin: bool,
    /// After so many of these. 0 is never.
    pub consecutive_local_origin_failures: u32,
    /// How often ejections are looked at.
    pub interval: Duration,
    /// How long the first ejection is; the n-th is n times as long.
    pub base_ejection: Duration,
    /// Of how many endpoints at most.
    pub max_ejection: Percent,
    /// Below which share of healthy ones all are used.
    pub min_health: Percent,
}

/// How many retries there may be at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryBudget {
    /// Of the requests of late.
    pub share: Percent,
    /// What is always allowed.
    pub min_concurrency: u32,
    /// How long "of late" is.
    pub interval: Option<Duration>,
}

/// TLS that is begun here, inside of whatever carries it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TlsOrigination {
    /// The server name that is sent.
    pub sni: Option<Str>,
    /// Names of which the server's certificate has to have one.
    pub subject_alt_names: Box<[Str]>,
    /// The Secret (`kubernetes://NAME`) or files with our certificate and whom we trust.
    pub credential: Option<Str>,
    /// Our certificate, our key, and whom we trust, as files.
    pub files: Option<(Option<Str>, Option<Str>, Option<Str>)>,
    /// Whether the server's certificate is not looked at. Written for what can't be verified, and reported.
    pub insecure_skip_verify: bool,
}
