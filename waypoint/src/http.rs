//! The engine: HTTP/1.1 and HTTP/2 in, HTTP/1.1 and HTTP/2 out.
//!
//! ```text
//!   serve      a client's connection ─▶ requests, each with a Channel
//!   exchange   one request: hygiene ─▶ Decide ─▶ endpoint ─▶ pool ─▶ response
//!   channel    a connection of HTTP/1.1 (wire) or a stream of HTTP/2, on either side
//!   mirror     copies of requests, whose bodies wait in copies
//!   h1, body   what HTTP/1.1 is in bytes          head, h2_heads   heads in our own form
//! ```
//!
//! Invariants:
//! * everything of a connection is on the thread that accepted it, the connections to endpoints included;
//! * an idle connection holds no buffer;
//! * bodies pass with back-pressure: what waits for a slow reader is limited on both sides;
//! * a message that could be read in two ways is refused.

pub mod alarm;
pub mod body;
pub mod carriers;
pub mod channel;
mod copies;
pub mod decide;
pub mod edits;
pub mod exchange;
mod failure;
pub mod h1;
pub(crate) mod h2_heads;
mod h2_input;
pub mod head;
pub mod held;
pub(crate) mod hygiene;
pub mod io;
mod limit;
pub(crate) mod messages;
mod mirror;
mod pump;
pub mod serve;
pub mod stats;
pub mod wire;
pub mod worker;

pub use serve::{serve, serve_begun};
pub use worker::{ForwardedFor, Settings, Underscores, Worker};
