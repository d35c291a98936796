//! The control plane: `culvertd`.
//!
//! ```text
//!   API server ─▶ source ─▶ registry (config: compile) ─▶ push ─▶ xds ─▶ node proxies
//!                 watches    a thread of its own          encode     │ acknowledgements
//!                                    │                               ▼
//!                                    └────── policies ─────▶ status ─▶ conditions, by the leader
//!   users ─▶ API server ─▶ webhook (config: the same checks)       ca: root, certificates
//! ```
//!
//! Invariants:
//! * a proxy is told nothing before everything was read once, and nothing that did not change;
//! * what was read last stays in force while the API server is away; only what is deleted is taken for gone;
//! * every replica serves proxies, reviews objects and signs; the one that leads ([`leader`]) writes.
#![forbid(unsafe_code)]

pub mod alive;
pub mod ca;
pub mod debug;
pub mod gateways;
pub mod in_force;
pub mod leader;
pub mod metrics;
pub mod objects;
pub mod pods;
pub mod push;
pub mod registry;
pub mod serve;
pub mod settings;
pub mod source;
pub mod start;
pub mod status;
pub mod trusted;
pub mod trusting;
pub mod waypoints;
pub mod webhook;
