//! What tests share: network namespaces and processes that clean up after themselves.
#![forbid(unsafe_code)]

pub mod netns;
pub mod port;
