//! The proxy of services: HTTP routing, resilience and authorization.
#![forbid(unsafe_code)]

pub mod http;
pub mod upstream;
