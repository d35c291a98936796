//! Capture with real namespaces, sockets and rules: every case for all back-ends, IPv4 and IPv6.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout)]

mod bpf;
mod cleanup;
mod closed;
mod continuity;
mod dns;
mod exclusions;
mod fixture;
mod forgotten;
mod missing;
mod node_probes;
mod redirect;
