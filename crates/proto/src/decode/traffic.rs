//! Reading how services are spoken to.

use model::Str;
use model::http::{
    ConnectionPool, Distribution, HashKey, HashTable, LoadBalancer, LocalitySetting, Outliers, RetryBudget,
    ServiceTraffic, Subset, TlsOrigination, TrafficPolicy, Warmup,
};

use super::http::{duration, needed_duration, share};
use super::strict::{needed, strict};
use super::{DecodeError, Decoder, Fault, Problem, cut, each, port};
use crate::wire::waypoint as wire;

impl Decoder {
    /// Reads how a service is spoken to.
    ///
    /// # Errors
    /// These are no bytes of such a message, a field has no meaning in the model, or there is one that this version does
    /// not know. What was in force of it must then stay.
    pub fn traffic(&mut self, bytes: &[u8]) -> Result<ServiceTraffic, DecodeError> {
        let message: wire::ServiceTraffic =
            strict(bytes).map_err(|problem| Fault::new("message", problem).of("traffic", ""))?;
        self.read_traffic(&message).map_err(|fault| {
            let key = message.service.unwrap_or_default();
            fault.of("traffic", format_args!("{}/{}", cut(&key.namespace), key.hostname))
        })
    }

    fn read_traffic(&mut self, t: &wire::ServiceTraffic) -> Result<ServiceTraffic, Fault> {
        Ok(ServiceTraffic {
            service: self.service_key(t.service.as_ref(), "service")?,
            default: self.traffic_policy(t.default.as_ref(), "default")?,
            ports: self.ports(&t.ports)?,
            subsets: each(&t.subsets, "subsets", |subset| {
                Ok(Subset {
                    name: self.text(&subset.name),
                    labels: self.labels(&subset.labels),
                    default: self.traffic_policy(subset.default.as_ref(), "default")?,
                    ports: self.ports(&subset.ports)?,
                })
            })?,
        })
    }

    fn ports(&mut self, ports: &[wire::PortTraffic]) -> Result<Box<[(u16, TrafficPolicy)]>, Fault> {
        each(ports, "ports", |p| {
            Ok((port(p.port, "port")?, self.traffic_policy(p.policy.as_ref(), "policy")?))
        })
    }

    fn traffic_policy(
        &mut self,
        policy: Option<&wire::TrafficPolicy>,
        field: &str,
    ) -> Result<TrafficPolicy, Fault> {
        let policy = needed(policy, field)?;
        self.read_traffic_policy(policy).map_err(|f| f.within(field))
    }

    fn read_traffic_policy(&mut self, p: &wire::TrafficPolicy) -> Result<TrafficPolicy, Fault> {
        let balancer = needed(p.load_balancer.as_ref(), "load_balancer")?;
        let limits = needed(p.pool.as_ref(), "pool")?;
        Ok(TrafficPolicy {
            load_balancer: self.load_balancer(balancer).map_err(|f| f.within("load_balancer"))?,
            warmup: p.warmup.as_ref().map(warmup).transpose().map_err(|f| f.within("warmup"))?,
            locality: p.locality.as_ref().map(|l| self.locality_setting(l)),
            pool: pool(limits).map_err(|f| f.within("pool"))?,
            outliers: p.outliers.as_ref().map(outliers).transpose().map_err(|f| f.within("outliers"))?,
            retry_budget: p
                .retry_budget
                .as_ref()
                .map(retry_budget)
                .transpose()
                .map_err(|f| f.within("retry_budget"))?,
            tls: p.tls.as_ref().map(|t| Box::new(self.tls(t))),
        })
    }

    fn load_balancer(&mut self, balancer: &wire::LoadBalancer) -> Result<LoadBalancer, Fault> {
        use wire::load_balancer::Kind;
        Ok(match needed(balancer.kind.as_ref(), "kind")? {
            Kind::LeastRequest(()) => LoadBalancer::LeastRequest,
            Kind::RoundRobin(()) => LoadBalancer::RoundRobin,
            Kind::Random(()) => LoadBalancer::Random,
            Kind::Passthrough(()) => LoadBalancer::Passthrough,
            Kind::Hash(hash) => self.hash(hash).map_err(|f| f.within("hash"))?,
        })
    }

    fn hash(&mut self, hash: &wire::load_balancer::Hash) -> Result<LoadBalancer, Fault> {
        use wire::load_balancer::hash::{Key, Table};
        let key = match needed(hash.key.as_ref(), "key")? {
            Key::Header(name) => HashKey::Header(self.header_key(name)?),
            Key::Cookie(cookie) => HashKey::Cookie {
                name: self.text(&cookie.name),
                path: self.optional(cookie.path.as_ref()),
                ttl: duration(cookie.ttl.as_ref(), "cookie.ttl")?,
            },
            Key::Query(name) => HashKey::Query(self.text(name)),
            Key::SourceIp(()) => HashKey::SourceIp,
        };
        let table = match needed(hash.table.as_ref(), "table")? {
            Table::Ring(size) => HashTable::Ring(*size),
            Table::Maglev(size) => HashTable::Maglev(*size),
        };
        Ok(LoadBalancer::Hash { key, table, bound: hash.bound })
    }

    fn locality_setting(&mut self, l: &wire::LocalitySetting) -> LocalitySetting {
        let mut pair = |from: &str, to: &str| -> (Str, Str) { (self.text(from), self.text(to)) };
        let failover = l.failover.iter().map(|f| pair(&f.from, &f.to)).collect();
        let distribute = l.distribute.iter().map(|d| Distribution {
            from: self.text(&d.from),
            to: d.to.iter().map(|share| (self.text(&share.locality), share.percent)).collect(),
        });
        LocalitySetting {
            distribute: distribute.collect(),
            failover,
            failover_priority: self.texts(&l.failover_priority),
            disabled: l.disabled,
        }
    }

    fn tls(&mut self, t: &wire::TlsOrigination) -> TlsOrigination {
        TlsOrigination {
            sni: self.optional(t.sni.as_ref()),
            subject_alt_names: self.texts(&t.subject_alt_names),
            credential: self.optional(t.credential.as_ref()),
            files: t.files.as_ref().map(|f| {
                let mut file = |name: &Option<String>| self.optional(name.as_ref());
                (file(&f.certificate), file(&f.key), file(&f.trusted))
            }),
            insecure_skip_verify: t.insecure_skip_verify,
        }
    }
}

/// A number that can be reckoned with.
fn finite(number: f64, field: &str) -> Result<f64, Fault> {
    if number.is_finite() && number >= 0.0 { Ok(number) } else { Err(Fault::new(field, Problem::Finite)) }
}

fn warmup(w: &wire::Warmup) -> Result<Warmup, Fault> {
    Ok(Warmup {
        duration: needed_duration(w.duration.as_ref(), "duration")?,
        minimum_percent: finite(w.minimum_percent, "minimum_percent")?,
        aggression: finite(w.aggression, "aggression")?,
    })
}

fn pool(p: &wire::ConnectionPool) -> Result<ConnectionPool, Fault> {
    let keepalive = |k: &wire::connection_pool::Keepalive| {
        let after = needed_duration(k.after.as_ref(), "keepalive.after")?;
        Ok((after, needed_duration(k.every.as_ref(), "keepalive.every")?, k.probes))
    };
    Ok(ConnectionPool {
        max_connections: p.max_connections,
        connect_timeout: duration(p.connect_timeout.as_ref(), "connect_timeout")?,
        max_connection_duration: duration(p.max_connection_duration.as_ref(), "max_connection_duration")?,
        idle_timeout: duration(p.idle_timeout.as_ref(), "idle_timeout")?,
        keepalive: p.keepalive.as_ref().map(keepalive).transpose()?,
        max_pending_requests: p.max_pending_requests,
        max_requests: p.max_requests,
        max_requests_per_connection: p.max_requests_per_connection,
        max_retries: p.max_retries,
        max_concurrent_streams: p.max_concurrent_streams,
        h2_upgrade: p.h2_upgrade,
        use_client_protocol: p.use_client_protocol,
    })
}

fn outliers(o: &wire::Outliers) -> Result<Outliers, Fault> {
    Ok(Outliers {
        consecutive_5xx: o.consecutive_5xx,
        consecutive_gateway_errors: o.consecutive_gateway_errors,
        split_local_origin: o.split_local_origin,
        consecutive_local_origin_failures: o.consecutive_local_origin_failures,
        interval: needed_duration(o.interval.as_ref(), "interval")?,
        base_ejection: needed_duration(o.base_ejection.as_ref(), "base_ejection")?,
        max_ejection: share(o.max_ejection, "max_ejection")?,
        min_health: share(o.min_health, "min_health")?,
    })
}

fn retry_budget(b: &wire::RetryBudget) -> Result<RetryBudget, Fault> {
    Ok(RetryBudget {
        share: share(b.share, "share")?,
        min_concurrency: b.min_concurrency,
        interval: duration(b.interval.as_ref(), "interval")?,
    })
}
