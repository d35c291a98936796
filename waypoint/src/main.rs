//! `waypoint`: the proxy of services. See the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let flags = waypoint::settings::Flags::parse();
    match waypoint::start::run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Logging may be what failed.
            #[allow(clippy::print_stderr)]
            {
                eprintln!("waypoint: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
