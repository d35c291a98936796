//! What every long-running binary shares: start-up, signals and drain, readiness, admin, metrics and logs.
#![forbid(unsafe_code)]

pub mod logs;
pub mod metrics;
pub mod runtimes;
pub mod shutdown;
