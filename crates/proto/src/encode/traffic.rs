//! Writing how services are spoken to.

use model::http::{
    ConnectionPool, Distribution, HashKey, HashTable, LoadBalancer, LocalitySetting, Outliers, RetryBudget,
    ServiceTraffic, Subset, TlsOrigination, TrafficPolicy, Warmup,
};

use super::http::{duration, labels, service_key, text};
use super::texts;
use crate::wire::waypoint as wire;

/// Writes what is said of how a service is spoken to.
#[must_use]
pub fn encode_traffic(traffic: &ServiceTraffic) -> wire::ServiceTraffic {
    let ServiceTraffic { service, default, ports: of_ports, subsets } = traffic;
    wire::ServiceTraffic {
        service: Some(service_key(service)),
        default: Some(policy(default)),
        ports: ports(of_ports),
        subsets: subsets.iter().map(subset).collect(),
    }
}

fn subset(subset: &Subset) -> wire::Subset {
    let Subset { name, labels: wanted, default, ports: of_ports } = subset;
    wire::Subset {
        name: name.to_string(),
        labels: labels(wanted),
        default: Some(policy(default)),
        ports: ports(of_ports),
    }
}

fn ports(ports: &[(u16, TrafficPolicy)]) -> Vec<wire::PortTraffic> {
    let port = |(number, said): &(u16, TrafficPolicy)| wire::PortTraffic {
        port: (*number).into(),
        policy: Some(policy(said)),
    };
    ports.iter().map(port).collect()
}

fn policy(policy: &TrafficPolicy) -> wire::TrafficPolicy {
    let TrafficPolicy {
        load_balancer: balancer,
        warmup,
        locality: localities,
        pool: limits,
        outliers: left_out,
        retry_budget,
        tls: origination,
    } = policy;
    wire::TrafficPolicy {
        load_balancer: Some(load_balancer(balancer)),
        warmup: warmup.as_ref().map(|Warmup { duration: time, minimum_percent, aggression }| wire::Warmup {
            duration: Some(duration(*time)),
            minimum_percent: *minimum_percent,
            aggression: *aggression,
        }),
        locality: localities.as_ref().map(locality),
        pool: Some(pool(limits)),
        outliers: left_out.as_ref().map(outliers),
        retry_budget: retry_budget.as_ref().map(|RetryBudget { share, min_concurrency, interval }| {
            wire::RetryBudget {
                share: share.millionths(),
                min_concurrency: *min_concurrency,
                interval: interval.map(duration),
            }
        }),
        tls: origination.as_deref().map(tls),
    }
}

fn load_balancer(balancer: &LoadBalancer) -> wire::LoadBalancer {
    use wire::load_balancer::hash::{Key, Table};
    use wire::load_balancer::{Cookie, Hash, Kind};
    let kind = match balancer {
        LoadBalancer::LeastRequest => Kind::LeastRequest(()),
        LoadBalancer::RoundRobin => Kind::RoundRobin(()),
        LoadBalancer::Random => Kind::Random(()),
        LoadBalancer::Passthrough => Kind::Passthrough(()),
        LoadBalancer::Hash { key, table, bound } => Kind::Hash(Hash {
            key: Some(match key {
                HashKey::Header(name) => Key::Header(name.to_string()),
                HashKey::Cookie { name, path, ttl } => {
                    Key::Cookie(Cookie { name: name.to_string(), path: text(path), ttl: ttl.map(duration) })
                }
                HashKey::Query(name) => Key::Query(name.to_string()),
                HashKey::SourceIp => Key::SourceIp(()),
            }),
            table: Some(match table {
                HashTable::Ring(size) => Table::Ring(*size),
                HashTable::Maglev(size) => Table::Maglev(*size),
            }),
            bound: *bound,
        }),
    };
    wire::LoadBalancer { kind: Some(kind) }
}

fn locality(setting: &LocalitySetting) -> wire::LocalitySetting {
    use wire::locality_setting::{Distribution as Wire, Failover, Share};
    let LocalitySetting { distribute, failover, failover_priority, disabled } = setting;
    let distribution = |Distribution { from, to }: &Distribution| Wire {
        from: from.to_string(),
        to: to.iter().map(|(at, percent)| Share { locality: at.to_string(), percent: *percent }).collect(),
    };
    wire::LocalitySetting {
        distribute: distribute.iter().map(distribution).collect(),
        failover: failover
            .iter()
            .map(|(from, to)| Failover { from: from.to_string(), to: to.to_string() })
            .collect(),
        failover_priority: texts(failover_priority),
        disabled: *disabled,
    }
}

fn pool(pool: &ConnectionPool) -> wire::ConnectionPool {
    let ConnectionPool {
        max_connections,
        connect_timeout,
        max_connection_duration,
        idle_timeout,
        keepalive,
        max_pending_requests,
        max_requests,
        max_requests_per_connection,
        max_retries,
        max_concurrent_streams,
        h2_upgrade,
        use_client_protocol,
    } = pool;
    wire::ConnectionPool {
        max_connections: *max_connections,
        connect_timeout: connect_timeout.map(duration),
        max_connection_duration: max_connection_duration.map(duration),
        idle_timeout: idle_timeout.map(duration),
        keepalive: keepalive.map(|(after, every, probes)| wire::connection_pool::Keepalive {
            after: Some(duration(after)),
            every: Some(duration(every)),
            probes,
        }),
        max_pending_requests: *max_pending_requests,
        max_requests: *max_requests,
        max_requests_per_connection: *max_requests_per_connection,
        max_retries: *max_retries,
        max_concurrent_streams: *max_concurrent_streams,
        h2_upgrade: *h2_upgrade,
        use_client_protocol: *use_client_protocol,
    }
}

fn outliers(outliers: &Outliers) -> wire::Outliers {
    let Outliers {
        consecutive_5xx,
        consecutive_gateway_errors,
        split_local_origin,
        consecutive_local_origin_failures,
        interval,
        base_ejection,
        max_ejection,
        min_health,
    } = outliers;
    wire::Outliers {
        consecutive_5xx: *consecutive_5xx,
        consecutive_gateway_errors: *consecutive_gateway_errors,
        split_local_origin: *split_local_origin,
        consecutive_local_origin_failures: *consecutive_local_origin_failures,
        interval: Some(duration(*interval)),
        base_ejection: Some(duration(*base_ejection)),
        max_ejection: max_ejection.millionths(),
        min_health: min_health.millionths(),
    }
}

fn tls(tls: &TlsOrigination) -> wire::TlsOrigination {
    let TlsOrigination { sni, subject_alt_names, credential, files, insecure_skip_verify } = tls;
    wire::TlsOrigination {
        sni: text(sni),
        subject_alt_names: texts(subject_alt_names),
        credential: text(credential),
        files: files.as_ref().map(|(certificate, key, trusted)| wire::tls_origination::Files {
            certificate: text(certificate),
            key: text(key),
            trusted: text(trusted),
        }),
        insecure_skip_verify: *insecure_skip_verify,
    }
}
