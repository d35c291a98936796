//! A simulated network with one HBONE server a host, and clients with a pool each.
//!
//! Everything that varies comes from the seed: the network's delays and losses (turmoil), and what the clients do
//! ([`Dice`]). Real TLS would draw its own randomness and time, so the secure channel is a stand-in ([`channel`])
//! that authenticates by names and roots and encrypts nothing. The same seed makes the same [`Log`].
#![forbid(unsafe_code)]

pub mod channel;
mod client;
mod dice;
mod log;
mod server;
mod world;

pub use client::{Client, Key};
pub use dice::Dice;
pub use log::Log;
pub use server::{PORT, Server, serve_host};
pub use world::{Scenario, seeds};
