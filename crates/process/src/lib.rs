//! What every long-running binary shares: start-up, signals and drain, readiness, admin, metrics and logs.
//!
//! Invariants of the crate:
//! * nothing here can stop traffic: a full disk, a scrape, a slow or hostile client of a local port cost lines,
//!   samples or that client's connection, never more;
//! * everything has a limit, and what a limit cut off is counted.
#![forbid(unsafe_code)]

pub mod admin;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod ports;
pub mod readiness;
pub mod runtimes;
pub mod settings;
pub mod shutdown;
