//! The real `ztunnel` between the programs of Istio that it takes the place of a proxy for: its control plane and CA
//! (`pilot-discovery`), its node agent (`install-cni`) and its CNI plugin (`istio-cni`), on a real API server.
//!
//! `make interop` builds those programs, from the Go module `istio.io/istio` and those of `tests/kube`; without them the
//! tests say so and pass, unless `CULVERT_REQUIRE_ISTIO` is set. They need root, and say so without.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    dead_code,
    reason = "tests; the lab is shared with those of other modes"
)]

mod control_plane;
mod lab;
mod node_agent;
mod objects;
