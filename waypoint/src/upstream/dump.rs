//! Destinations, as the admin page `/clusters` shows them.

use serde_json::{Value, json};

use crate::http::decide::Protocol;
use crate::upstream::clusters::{ClusterInfo, Clusters, EndpointInfo};

/// All destinations that requests were sent to, by name, with their endpoints.
#[must_use]
pub fn dump(clusters: &Clusters) -> Value {
    let mut all: Vec<(String, Value)> =
        clusters.snapshot().iter().map(|info| (info.backend.to_string(), cluster(info))).collect();
    all.sort_by(|(a, _), (b, _)| a.cmp(b));
    Value::Array(all.into_iter().map(|(_, cluster)| cluster).collect())
}

fn cluster(info: &ClusterInfo) -> Value {
    let counts = &info.circuit;
    json!({
        "name": info.backend.to_string(),
        "service": info.backend.service.to_string(),
        "port": info.backend.port,
        "subset": info.backend.subset,
        "endpointsEligible": info.eligible,
        "endpointsHealthy": info.healthy,
        "connections": counts.connections,
        "pending": counts.pending,
        "requests": counts.requests,
        "retries": counts.retries,
        "refused": {
            "connections": counts.connections_refused,
            "pending": counts.pending_refused,
            "requests": counts.requests_refused,
            "retries": counts.retries_refused,
        },
        "endpoints": info.endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

fn endpoint(info: &EndpointInfo) -> Value {
    let about = info.target.about.as_ref();
    let workload = about.and_then(|about| about.workload.as_ref());
    json!({
        "address": info.target.address.to_string(),
        "hostname": workload.map(|w| &*w.hostname).filter(|name| !name.is_empty()),
        "workload": workload.map(|w| &*w.uid),
        "ready": workload.map(|w| w.health == model::Health::Healthy),
        "weight": workload.map(|w| w.capacity),
        "tunnelled": about.is_some_and(|about| about.tunnelled),
        "protocol": match info.target.protocol {
            Protocol::Http1 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
        },
        "requests": info.under_way,
        "ejected": info.ejected,
    })
}
