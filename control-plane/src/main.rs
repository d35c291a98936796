//! The control plane's program.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use control_plane::{settings, start};

fn main() -> ExitCode {
    let flags = settings::Flags::parse();
    match start::run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Logging may be what failed.
            #[allow(clippy::print_stderr)]
            {
                eprintln!("culvertd: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
