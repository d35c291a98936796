//! Compiles the `.proto` files, without `protoc`.
#![allow(clippy::print_stdout, reason = "this is how a build script talks to cargo")]

use std::error::Error;

const FILES: [&str; 11] = [
    "envoy/config/core/v3/base.proto",
    "envoy/service/discovery/v3/discovery.proto",
    "envoy/service/auth/v3/external_auth.proto",
    "envoy/service/ratelimit/v3/rls.proto",
    "google/rpc/status.proto",
    "istio/workload.proto",
    "istio/authorization.proto",
    "istio/zds.proto",
    "istio/ca.proto",
    "culvert/waypoint.proto",
    "culvert/wire.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    prost_build::Config::new()
        // Ordered, so that equal objects have equal bytes, and a version can be a hash of them.
        .btree_map(["."])
        .include_file("wire.rs")
        .service_generator(tonic_prost_build::configure().service_generator())
        .compile_fds(descriptors)?;
    Ok(())
}
