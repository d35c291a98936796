//! Endpoint choice: which of a service's endpoints a connection goes to.
//!
//! Invariants of the crate:
//! * no I/O, no clock, no randomness of its own: time and random numbers are arguments;
//! * a choice never walks the endpoints. They are sorted once per set, service port and place of the client
//!   (`partition.rs`), and a choice looks at two of them; only the sampling by weight takes log2(n) steps over
//!   an array of sums;
//! * everything that is kept has a limit ([`Limits`]) and a counter ([`Stats`]).
//!
//! The rules, in order: the endpoint serves the port, is ready (unless the service takes unready ones too), has
//! a weight above 0, and is near enough (`LoadBalancingMode`). Of those, the ones nearest to the client that did
//! not fail lately; farther ones that did not fail before near ones that did. Among equals, of two drawn by
//! weight the one with fewer open connections for its weight.
#![forbid(unsafe_code)]

mod balancer;
mod partition;
pub mod requests;
mod second_chance;
mod stats;
mod sums;

pub use balancer::{Balancer, Candidate, Client, Limits, NoEndpoint, Picked, Request};
pub use stats::Stats;
