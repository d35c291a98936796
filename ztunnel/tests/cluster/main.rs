//! The real `ztunnel` as it runs in a cluster, on nodes made of network namespaces: configuration by delta ADS from the
//! real server of `xds`, certificates by the CA service, pods from a stand-in of the node agent that speaks ZDS and
//! captures with the real rules.
//!
//! Each test has a network of its own, so they run beside each other. They need root, and say so without.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    missing_docs,
    dead_code,
    reason = "tests; the lab is shared with those of file mode"
)]

mod agent;
mod configuration;
mod lab;
mod outage;
mod together;
mod upgrade;
mod verdicts;
