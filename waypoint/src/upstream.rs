//! The servers' side: connections to endpoints.

pub mod pool;
