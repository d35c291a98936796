//! The engine between real sockets: raw clients and servers that say exactly what a test wants, and programs of others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod bad_input;
mod carriers;
mod clusters;
mod forwarding;
mod h2;
mod lab;
mod peers;
mod retries;
