//! `ztunnel`: the node proxy.
//!
//! Two runtimes: the data plane carries connections; the control runtime follows the configuration, enrols pods and
//! serves the admin, metrics and readiness ports, so that a scrape or a large change never delays traffic.
#![forbid(unsafe_code)]

mod admin;
mod cluster;
mod connections;
mod dns;
mod dump;
mod metrics;
mod node;
mod proxy;
mod settings;
mod start;
mod telemetry;
mod verdicts;
mod zds;

use std::process::ExitCode;

use clap::Parser;

/// Samples what is allocated, for `/debug/pprof/heap`.
#[cfg(feature = "heap-profile")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let flags = settings::Flags::parse();
    match start::run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Logging may be what failed.
            #[allow(clippy::print_stderr)]
            {
                eprintln!("ztunnel: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
