//! The engine between real sockets: raw clients and servers that say exactly what a test wants, and programs of others.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

mod bad_input;
mod carriers;
mod clusters;
mod copies;
mod floods;
mod forwarding;
mod h2;
mod lab;
mod limits;
mod origination;
mod peers;
mod raw_h2;
mod retries;
mod smuggling;
mod upstreams;
mod websocket;
