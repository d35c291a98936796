//! The proxy of services: HTTP routing, resilience and authorization.
//!
//! ```text
//!   listen     tunnels in ─▶ by protocol: http (requests), detect, streams (bytes)
//!   deciding   a request's filters, in order, over one snapshot (rules)
//!   upstream   endpoints, and connections to them: tunnels as the waypoint, or TCP
//! ```
#![forbid(unsafe_code)]

pub mod admin;
pub mod deciding;
pub mod detect;
pub mod filters;
pub mod guards;
pub mod http;
pub mod listen;
pub mod metrics;
pub mod providers;
pub mod relay;
pub mod rules;
pub mod settings;
pub mod start;
pub mod streams;
pub mod telemetry;
pub mod tunnels;
pub mod upstream;
