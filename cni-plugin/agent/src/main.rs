//! `culvert-node`: the node agent.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let flags = node_agent::settings::Flags::parse();
    match node_agent::start::run(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Logging may be what failed.
            #[allow(clippy::print_stderr)]
            {
                eprintln!("culvert-node: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
