//! HBONE: TCP connections through HTTP/2 CONNECT streams (RFC 9113 section 8.5) over mutually authenticated TLS.
//!
//! * [`serve`] takes one secured connection and hands its CONNECT requests on as [`Incoming`];
//! * [`Pool`] keeps secured connections to peers and opens tunnels over them;
//! * [`pump`] copies between a [`Tunnel`] and an application's connection.
//!
//! Invariants of the crate:
//! * it does not know certificates: a secure channel is anything that is [`net::Io`], made by the caller;
//! * `h2` appears in no public type, so that another transport can take its place;
//! * a tunnel that is not read holds up no other one; what all of them hold together is limited by [`Memory`];
//! * every queue, wait and allocation that a peer can cause has a limit and a counter;
//! * idle connections and tunnels hold no buffers of ours.
#![forbid(unsafe_code)]

mod authority;
mod backlog;
mod control;
mod counters;
mod flood;
mod headers;
mod keepalive;
mod link;
mod memory;
mod open;
mod pool;
mod pump;
mod server;
mod settings;
mod tunnel;
mod wire;

pub use authority::{Authority, Host, InvalidAuthority};
pub use control::Control;
pub use counters::{Counter, PoolCounters, ServerCounters};
pub use flood::Flood;
pub use headers::{Baggage, Forwarded, TunnelHeaders};
pub use http::{HeaderValue, StatusCode};
pub use memory::Memory;
pub use open::{ConnectRequest, OpenError, Opened};
pub use pool::{ConnectError, ConnectionInfo, Connector, Pool};
pub use pump::{AppIo, Outcome, PumpLimits, Side, Traffic, pump};
pub use server::{Closed, Incoming, serve};
pub use settings::{PoolSettings, ServerSettings, Transport};
pub use tunnel::{ErrorCode, Tunnel, TunnelError};
