//! The real `ztunnel` on nodes made of network namespaces, with real traffic: how it serves, and what it does when
//! peers, files, the machine or its own death get in the way.
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
    reason = "tests"
)]

mod ahead;
mod drawn;
mod ending;
mod endpoints;
mod enrolment;
mod externals;
mod files;
mod floods;
mod gaps;
mod lab;
mod machine;
mod policies;
mod restart;
mod services;
mod strangers;
mod streams;
mod threads;
mod verdicts;
mod waypoint;
mod within;
