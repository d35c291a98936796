//! The agent with real namespaces, rules and sockets; the ztunnel and the cluster are the tests'.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod faults;
mod killed;
mod lab;
mod peer;
mod restart;
mod running;
mod starting;
mod verdicts;
