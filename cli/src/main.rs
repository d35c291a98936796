//! `culvert`, the command line.
#![forbid(unsafe_code)]

mod admin;
mod analyze;
mod bench;
mod ca;
mod connections;
mod demo;
mod files;
mod lab;
mod load;
mod netns;
mod table;
mod what_if;
mod why;
mod ztunnel_config;

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

/// A service mesh without sidecars: look at it, ask it why, and try it out.
#[derive(Parser, Debug)]
#[command(name = "culvert", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Demo(demo::DemoArgs),
    Bench(bench::BenchArgs),
    Analyze(analyze::AnalyzeArgs),
    WhatIf(what_if::WhatIfArgs),
    Why(why::WhyArgs),
    Ca(ca::CaArgs),
    ZtunnelConfig(ztunnel_config::ZtunnelConfigArgs),
    /// Writes a completion script for a shell to standard output
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Servers that the demo and the benchmark talk to
    #[command(hide = true, subcommand)]
    LabService(LabService),
}

#[derive(Subcommand, Debug)]
enum LabService {
    /// Greets every client before it has said anything
    Greeting { address: SocketAddr },
    /// Answers datagrams
    Datagrams { address: SocketAddr },
    /// What the load generator talks to
    Load { ip: IpAddr },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(e) => {
            // Nothing is left to tell it to when that fails too.
            let _ = writeln!(io::stderr(), "culvert: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Ca(args) => ca::run(&args),
        Command::Analyze(args) => analyze::run(&args),
        Command::WhatIf(args) => what_if::run(&args),
        Command::Why(args) => why::run(&args),
        Command::ZtunnelConfig(args) => ztunnel_config::run(&args),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "culvert", &mut script);
            table::print(&String::from_utf8_lossy(&script))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::LabService(service) => {
            netns::block_on(async {
                match service {
                    LabService::Greeting { address } => load::serve_greeting(address).await,
                    LabService::Datagrams { address } => load::serve_datagrams(address).await,
                    LabService::Load { ip } => load::serve_load(ip).await,
                }
            })??;
            Ok(ExitCode::SUCCESS)
        }
    }
}
