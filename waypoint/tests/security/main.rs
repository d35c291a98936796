//! Who may: tokens, external authorizers, rate limits, over real connections and against what others expect.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

mod beyond;
mod chain;
mod fetch;
mod lab;
mod mixed;
mod peers;
mod redis;
mod routes;
mod told;
mod ways_past;
