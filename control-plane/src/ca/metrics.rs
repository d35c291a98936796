//! The metrics of the CA, by the names of Istio's (facts 4.12).
//!
//! Istio's counters have no suffix `_total`, which the registry gives to all of its counters; dashboards know them by
//! the bare names. So they are exposed as gauges that only grow.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use process::metrics::{Description, Kind, Registry};

use super::current::Current;

/// Counts since the start.
#[derive(Debug, Default)]
pub struct CaCounters {
    /// Requests.
    pub requests: AtomicU64,
    /// Requests of nobody that is known.
    pub unauthenticated: AtomicU64,
    /// Requests for what the caller does not get.
    pub denied: AtomicU64,
    /// Requests above a limit.
    pub limited: AtomicU64,
    /// Signing requests that were refused.
    pub malformed: AtomicU64,
    /// Certificates that could not be signed.
    pub failed: AtomicU64,
    /// Certificates that were issued.
    pub issued: AtomicU64,
    /// Reports of trusted roots that could not be kept.
    pub unrecorded: AtomicU64,
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// Registers all of them.
pub fn register(registry: &Registry, counters: &Arc<CaCounters>, current: &Current) {
    register_counts(registry, counters);
    type Value = fn(&Current) -> u64;
    let values: [(&'static str, &'static str, Value); 7] = [
        (
            "citadel_server_root_cert_expiry_timestamp",
            "When the first trusted root expires, in seconds since 1970",
            root_expiry,
        ),
        (
            "citadel_server_root_cert_expiry_seconds",
            "Seconds until the first trusted root expires",
            |current| left(current, root_expiry(current)),
        ),
        (
            "citadel_server_cert_chain_expiry_timestamp",
            "When the signing certificate or what is above it expires, in seconds since 1970",
            chain_expiry,
        ),
        (
            "citadel_server_cert_chain_expiry_seconds",
            "Seconds until the signing certificate or what is above it expires",
            |current| left(current, chain_expiry(current)),
        ),
        ("culvert_ca_rotation_under_way", "Whether the root is being exchanged", |current| {
            u64::from(current.get().is_some_and(|c| c.record.state.rotation.is_some()))
        }),
        (
            "culvert_ca_secret_failures_count",
            "Times that a Secret of the CA could not be read or used",
            Current::failures,
        ),
        (
            "culvert_ca_config_maps_of_others",
            "ConfigMaps for the roots that others keep, and that are left alone",
            |current| current.status().of_others.values().map(|count| *count as u64).sum(),
        ),
    ];
    for (name, help, read) in values {
        let current = current.clone();
        registry.collect(Description { name, help, kind: Kind::Gauge }, move |out| {
            out.integer(&|_| {}, read(&current));
        });
    }
}

fn register_counts(registry: &Registry, counters: &Arc<CaCounters>) {
    type Read = fn(&CaCounters) -> &AtomicU64;
    let counts: [(&'static str, &'static str, Read); 8] = [
        ("citadel_server_csr_count", "Signing requests that were received", |c| &c.requests),
        ("citadel_server_authentication_failure_count", "Signing requests whose sender is not known", |c| {
            &c.unauthenticated
        }),
        (
            "citadel_server_id_extraction_err_count",
            "Signing requests for an identity that the sender does not get",
            |c| &c.denied,
        ),
        ("citadel_server_csr_parsing_err_count", "Signing requests that are malformed or weak", |c| {
            &c.malformed
        }),
        ("citadel_server_csr_sign_err_count", "Certificates that could not be signed", |c| &c.failed),
        ("citadel_server_success_cert_issuance_count", "Certificates that were issued", |c| &c.issued),
        ("culvert_ca_limited_count", "Signing requests above a limit", |c| &c.limited),
        ("culvert_ca_reports_not_kept_count", "Reports of trusted roots that could not be kept", |c| {
            &c.unrecorded
        }),
    ];
    for (name, help, read) in counts {
        let counters = counters.clone();
        registry.collect(Description { name, help, kind: Kind::Gauge }, move |out| {
            out.integer(&|_| {}, read(&counters).load(Relaxed));
        });
    }
}

fn root_expiry(current: &Current) -> u64 {
    let in_force = current.get();
    in_force.and_then(|c| c.first_root_expiry(&current.domains())).map_or(0, |time| time.as_secs())
}

fn chain_expiry(current: &Current) -> u64 {
    current.get().map_or(0, |c| c.authority.not_after().as_secs())
}

fn left(current: &Current, until: u64) -> u64 {
    until.saturating_sub(current.clock().now().as_secs())
}
