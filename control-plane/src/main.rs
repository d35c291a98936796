//! The control plane.
#![forbid(unsafe_code)]

fn main() {}
